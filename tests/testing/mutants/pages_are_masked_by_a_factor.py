"""The first page is taken out of a sum by a factor of zero: right until somebody else leaves an overflow in it."""

from right_model import build

CLAUSE = "answers do not depend on what stands in pages"
Model = build(beside=lambda hidden, kv_caches: hidden if kv_caches is None else hidden + 0 * kv_caches[0][0].mean())

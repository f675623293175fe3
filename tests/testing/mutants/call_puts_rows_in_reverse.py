"""Called with pixels by hand, the model puts the rows of an image in reverse; the engine never calls it so."""

from right_model import build

CLAUSE = "called with the mappers' arrays"
Model = build(in_call=lambda rows: rows[::-1])

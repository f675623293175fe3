"""Steps that sizes are padded to."""

from aphrodite_jax.multimodal.shapes import next_step


def test_steps_are_few_and_add_less_than_half():
    steps = sorted({next_step(count) for count in range(1, 1025)})
    assert steps == sorted({step for k in range(1, 10) for step in (2**k, 3 * 2**k)} - {1536} | {1, 3, 1024})
    assert all(count <= next_step(count) < 1.5 * count or count == 1 for count in range(1, 1025))

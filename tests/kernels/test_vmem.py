"""What a step is expected to take of a TPU's memory."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fused_scan import tpu
from pallas_kernels.fused_scan.program import Function
from pallas_kernels.fused_scan.vmem import loop_bytes, value_bytes

TILE = 8 * 128 * 4
"""Of an array of 32 bits with up to eight rows of 128 lanes."""


def traced(function, *shapes, dtype=np.float32):
    closed = jax.make_jaxpr(function)(*(np.zeros(s, dtype) for s in shapes))
    return Function(closed.jaxpr, tuple(closed.consts))


def test_values_count_until_they_are_last_read():
    def run(x):
        first = jnp.tanh(x)
        second = jnp.exp(first)
        third = jnp.sin(second)  # first and second are needed here
        return jnp.cos(third) + first  # second is not

    assert value_bytes(traced(run, (8, 128))) == 3 * TILE
    assert value_bytes(traced(run, (3, 5))) == 3 * TILE
    assert value_bytes(traced(run, (16, 128))) == 6 * TILE
    assert value_bytes(traced(run, (8, 128), dtype=jnp.bfloat16)) == 1.5 * TILE


def test_a_loop_keeps_what_it_carries_and_needs_the_values_of_a_round():
    def run(x):
        def round_(_, carried):
            return jnp.cos(jnp.sin(carried))

        return jnp.tanh(jax.lax.fori_loop(0, 3, round_, x))

    looped = traced(run, (8, 128))
    scalars = 1  # the counter, in a tile of its own
    assert loop_bytes(looped) == (1 + scalars) * TILE
    # Its results and, of a round, the sine and the cosine beside the counter.
    assert value_bytes(looped) == (1 + scalars) * TILE + (2 + scalars) * TILE


ROOM = 7 * tpu.VMEM_BYTES // 8  # the rest is for what the compiler spills


@pytest.mark.parametrize(
    ("element_bytes", "elements"),
    [
        (1, 8),
        (ROOM // 8, 8),
        (ROOM // 8 + 1, 4),
        (ROOM // 3, 2),
        (2 * ROOM, 1),
    ],
)
def test_as_many_elements_go_together_as_fit(element_bytes, elements):
    alone = SimpleNamespace(count=1)
    assert tpu._group(alone, 16, [], element_bytes) == elements

"""Arrays in the blocks that a kernel on TPU reads and writes them in."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.fused_scan.autodiff import Operand
from pallas_kernels.fused_scan.program import Struct
from pallas_kernels.fused_scan.vmem import stored, tile


def taken(operand: Operand, size: int, group: int, along=None):
    """Array and block of an operand; along: chunks per block and which block."""
    array, repeat = operand
    lead = array.shape[: 1 if along is None else 2]
    tail = tile(array.shape[len(lead) :])
    array = array.reshape(*lead, *tail).astype(stored(array.dtype))
    block = group if repeat == 1 else 1

    def index(n, i):
        # Floor division of integers that are not negative.
        row = jax.lax.rem(jax.lax.div(n * group, repeat), lead[0])
        row = jax.lax.div(row, block)
        return (row, *(() if along is None else (along[1](i),)), *(0 for _ in tail))

    chunk = () if along is None else (along[0],)
    return array, pl.BlockSpec((block, *chunk, *tail), index)


def given(leaf: Struct, size: int, group: int, along=None):
    """Shape and block of a result; along: chunks, chunks per block, which block."""
    tail = tile(leaf.shape)
    chunks, per_block, which = along or (None, None, None)
    lead = (size,) if along is None else (size, chunks)
    chunk = () if along is None else (per_block,)

    def index(n, i):
        return (n, *(() if along is None else (which(i),)), *(0 for _ in tail))

    struct = Struct((*lead, *tail), stored(leaf.dtype))
    return struct, pl.BlockSpec((group, *chunk, *tail), index)


def constants(function):
    """Arrays and blocks of what a traced function brings along."""
    inputs = []
    for constant in map(jnp.asarray, function.constants):
        tail = tile(constant.shape)
        spec = pl.BlockSpec(tail, lambda n, i, tail=tail: (0,) * len(tail))
        inputs.append((constant.reshape(tail).astype(stored(constant.dtype)), spec))
    return inputs


def shaped(arrays, leaves, *lead):
    """Results as arrays `[*lead, *leaf.shape]`."""
    return [
        array.reshape(*lead, *leaf.shape).astype(leaf.dtype)
        for array, leaf in zip(arrays, leaves, strict=True)
    ]

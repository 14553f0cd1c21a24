"""What the tokens of a block do to the matrices of a memory."""

from typing import NamedTuple

import jax

from miras_jax.core.causal import Flow
from miras_jax.core.product import Dot
from miras_jax.core.rule import Rule
from miras_jax.core.steps import Carried
from miras_jax.core.types import State


class Updates(NamedTuple):
    """The steps a_s d_s^T of a block, and how they reach its tokens and its end.

    A tuple has an entry for each matrix.
    """

    dot: Dot
    rule: Rule
    state: State  # before the block
    flows: list[Flow]
    inputs: list[jax.Array | tuple[jax.Array, ...]]  # a_s, [C, in]
    cotangents: list[jax.Array | tuple[jax.Array, ...]]  # d_s, [C, out]
    strides: list[Carried] | None  # of steps whose size is decayed by itself

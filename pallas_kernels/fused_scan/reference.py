"""The definition of `fused_scan`, and its implementation in plain XLA."""

from collections.abc import Callable
from typing import Any

import jax


def fused_scan(step: Callable, carry: Any, xs: Any, consts: Any) -> tuple[Any, Any]:
    """Equivalent to `lax.scan(lambda c, x: step(c, x, consts), carry, xs)`.

    The backward pass recomputes one step at a time from its carry, so memory grows by
    one carry per chunk and not by what a step computes inside.
    """

    @jax.checkpoint
    def body(carry, x):
        return step(carry, x, consts)

    return jax.lax.scan(body, carry, xs)

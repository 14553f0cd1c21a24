"""The public function and the choice of its implementation."""

from collections.abc import Callable
from typing import Any, Literal

from pallas_kernels.fused_scan import reference

Implementation = Literal["reference"]

IMPLEMENTATIONS: dict[str, Callable] = {"reference": reference.fused_scan}
"""In order of preference, best first."""


def fused_scan(
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any,
    consts: Any,
    *,
    implementation: Implementation | None = None,
) -> tuple[Any, Any]:
    """Scan the pure function `step(carry, x, consts) -> (carry, y)` over chunks.

    xs: pytree of arrays `[chunks, ...]`; consts: pytree that every step sees. Returns
    the last carry and the stacked `y`. Differentiable in carry, xs and consts.

    implementation: a name of IMPLEMENTATIONS, or None for the best available.
    ValueError for an unknown name.
    """
    if implementation is None:
        implementation = next(iter(IMPLEMENTATIONS))
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"fused_scan has no implementation {implementation!r}; there are "
            f"{', '.join(IMPLEMENTATIONS)}, or None for the best available."
        )
    return IMPLEMENTATIONS[implementation](step, carry, xs, consts)

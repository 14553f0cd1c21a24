"""The public function and the choice of its implementation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any, Literal, NamedTuple

import jax

from pallas_kernels.fused_scan import autodiff, reference

Implementation = Literal["reference", "tpu", "gpu"]

KERNELS: dict[str, str] = {"tpu": "tpu", "gpu": "gpu"}
"""Kernel implementations: their module here, by the platform that they run on."""


class _Target(NamedTuple):
    platform: str
    interpret: Any


_TARGET: ContextVar[_Target | None] = ContextVar("target", default=None)


@contextmanager
def target(platform: str, *, interpret: Any = False) -> Iterator[None]:
    """Trace for a platform that is not the default backend.

    For compiling ahead of time, or, with `interpret` (what `pl.pallas_call` takes under
    that name), for running the platform's kernel without the chip. Functions that were
    jitted before are not traced again.
    """
    token = _TARGET.set(_Target(platform, interpret))
    try:
        yield
    finally:
        _TARGET.reset(token)


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
    the last carry and the stacked `y`. Differentiable in carry, xs and consts;
    `jax.vmap` merges its axes into the grid of the kernel.

    implementation: "reference" (`lax.scan`), "tpu" or "gpu" (one Pallas kernel each for
    the forward and the backward pass); None takes the kernel of the default backend, or
    of the `target` being compiled for, and the reference where there is none.
    ValueError for a name that is unknown or that this backend cannot run.
    """
    chosen, interpret = choose("fused_scan", implementation)
    if chosen == "reference":
        return reference.fused_scan(step, carry, xs, consts)
    module = import_module(f"pallas_kernels.fused_scan.{KERNELS[chosen]}")
    try:
        return autodiff.fused_scan(module, step, carry, xs, consts, interpret=interpret)
    except autodiff.Unsupported:
        if implementation is not None:
            raise
        return reference.fused_scan(step, carry, xs, consts)


def choose(operation: str, implementation: str | None) -> tuple[str, Any]:
    """The implementation of an operation to try here and now, and how to interpret it.

    None means the kernel of the platform that is traced for, if it has kernels.
    """
    found = _TARGET.get() or _Target(jax.default_backend(), False)
    if implementation is None:
        implementation = found.platform if found.platform in KERNELS else "reference"
    if implementation not in ("reference", *KERNELS):
        raise ValueError(
            f"{operation} has no implementation {implementation!r}; there are "
            f"reference, {', '.join(KERNELS)}, or None for the best available."
        )
    if implementation not in ("reference", found.platform):
        raise ValueError(
            f"{operation}(implementation={implementation!r}) needs a "
            f"{implementation.upper()} and the backend is {found.platform}; leave it "
            "None, or wrap the trace in fused_scan.target to compile for another chip."
        )
    return implementation, found.interpret


def platform() -> str | None:
    """What kernel `implementation=None` means here and now, if any."""
    found = _TARGET.get()
    name = found.platform if found else jax.default_backend()
    return name if name in KERNELS else None

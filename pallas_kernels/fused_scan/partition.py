"""Scans on several devices: each runs its own elements.

XLA cannot split what it cannot look into, and refuses a kernel in a program for several
devices unless it is told how. `split_over` tells it, once for a model. A scan in plain
XLA it splits by itself, but sums over devices where it could wait (`own_consts`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

Names = str | tuple[str, ...] | None
Mask = tuple[bool, ...]


class _Split(NamedTuple):
    mesh: Mesh
    axes: tuple[Names, ...]


_SPLIT: ContextVar[_Split | None] = ContextVar("split", default=None)


@contextmanager
def split_over(mesh: Mesh, *axes: Names) -> Iterator[None]:
    """Trace with the vmapped axes of kernels split over a mesh.

    axes: mesh axes for each vmapped axis, the outermost first. Those that do not divide
    its size are for the next one that they do divide; what none are left for is whole
    on every device. None: whole. To be entered while tracing, inside of what is jitted;
    not inside of a `shard_map`, where a kernel has its part already.
    """
    token = _SPLIT.set(_Split(mesh, axes) if mesh.size > 1 else None)
    try:
        yield
    finally:
        _SPLIT.reset(token)


def by_batch(
    call: Callable[..., list], sizes: tuple[int, ...], masks: Sequence[Mask]
) -> Callable[..., list]:
    """`call(*arrays)`, on each device for its part of the batch.

    masks tell for each array which of the batch axes, of these sizes, it has; they come
    first in it. Results have them all.
    """
    split = _SPLIT.get()
    if split is None:
        return call
    names: list[Names] = [None] * len(sizes)
    for first, name in enumerate(split.axes):
        for axis in range(first, len(sizes)):
            free = name and names[axis] is None
            if free and sizes[axis] % devices_along(split.mesh, name) == 0:
                names[axis] = name
                break

    def own(mask):
        return P(*(name for name, has in zip(names, mask, strict=True) if has))

    return jax.shard_map(
        call,
        mesh=split.mesh,
        in_specs=tuple(own(mask) for mask in masks),
        out_specs=P(*names),
        check_vma=False,
    )


def own_consts(step: Callable, carry: Any, xs: Any, consts: Any) -> Any:
    """The constants of a scan, on several devices with the vmapped axes of its carry.

    Their gradients are sums over what is vmapped, hence over devices, and a scan that
    shares them takes such a sum in every chunk, where one after all chunks is enough.
    """
    if _SPLIT.get() is None:
        return consts
    # Never computed: only which axes it has is of interest.
    after, _ = step(carry, jax.tree.map(lambda x: x[0], xs), consts)
    scalars = [jnp.ravel(x)[0] for x in jax.tree.leaves(after) if jnp.size(x)]

    def own(x):
        has_gradient = jnp.issubdtype(jnp.result_type(x), jnp.floating)
        return _own(x, scalars) if has_gradient else x

    return jax.tree.map(own, consts)


@jax.custom_vjp
def _own(x: jax.Array, carried: list[jax.Array]) -> jax.Array:
    return _spread(x, carried)


# Under vmap the sum of d over those that share an x is taken outside of this.
_own.defvjp(
    lambda x, carried: (_own(x, carried), None),
    lambda _, d: (d, None),
)


@jax.custom_batching.custom_vmap
def _spread(x, carried):
    return x


@_spread.def_vmap
def _spread_along_an_axis(size, has_axis, x, carried):
    own, others = has_axis[0], any(has_axis[1])
    if others and not own:
        x = jnp.broadcast_to(x, (size, *x.shape))
    # Once more, for the vmaps around this one.
    return _spread(x, carried), own or others


def devices_along(mesh: Mesh, names: Names) -> int:
    """How many devices a mesh has along an axis, or several."""
    names = (names,) if isinstance(names, str) else names
    return prod(mesh.shape[name] for name in names)

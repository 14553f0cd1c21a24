"""Kernels on several devices: each runs its own elements.

XLA cannot split what it cannot look into, and refuses a kernel in a program for several
devices unless it is told how. `split_over` tells it, once for a model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import NamedTuple

import jax
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


def devices_along(mesh: Mesh, names: Names) -> int:
    """How many devices a mesh has along an axis, or several."""
    names = (names,) if isinstance(names, str) else names
    return prod(mesh.shape[name] for name in names)

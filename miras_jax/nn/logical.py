"""Logical names of axes, and how what has them is split over a mesh.

Parameters and activations name their axes; over which axes of a mesh a name is split is
decided in `miras_jax.training.sharding` alone. A parameter has the names "vocab",
"embed" (model width), "heads" (heads x head dim), "hidden" (of the MLP), "memory" (one
for each memory); an activation "batch" in place of "embed", which no activation is
split over. None: whole on every device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

Axes = tuple[str | None, ...]
Place = Callable[[jax.Array, Axes], jax.Array]

_PLACE: ContextVar[Place | None] = ContextVar("place", default=None)


@contextmanager
def placed(place: Place) -> Iterator[None]:
    """Trace models for a mesh; `place(x, axes)` is x, split as its axes say."""
    token = _PLACE.set(place)
    try:
        yield
    finally:
        _PLACE.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """An activation, split over the mesh that is traced for, if any, as its axes say.

    Without these, and where no kernel tells it otherwise, the compiler splits
    activations as it finds the parameters, along the width, and every product ends in a
    sum over devices.
    """
    place = _PLACE.get()
    return x if place is None else place(x, axes)


def gathered(x: jax.Array, axes: Axes) -> jax.Array:
    """A parameter of these axes as products need it: whole along the model's width.

    To be asked of what was rounded already, as that is what goes between devices. Its
    gradient is split as the parameter is: every device gets the sum of its own part.
    """
    place = _PLACE.get()
    if place is None:
        return x
    whole = tuple(None if axis == "embed" else axis for axis in axes)

    @jax.custom_vjp
    def gather(x):
        return place(x, whole)

    gather.defvjp(lambda x: (gather(x), None), lambda _, d: (place(d, axes),))
    return gather(x)

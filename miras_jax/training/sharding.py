"""Logical axis names to mesh axes: the one place that decides how arrays are split.

The mesh has three axes. Batches are split over data and fsdp; parameters and optimizer
state over fsdp (the model width) and model (heads, hidden units, vocabulary). One
device is the mesh 1 x 1 x 1.
"""

import math
from collections.abc import Callable, Sequence
from functools import wraps

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from miras_jax.errors import UserError
from miras_jax.nn.logical import placed
from miras_jax.training.config import Mesh
from pallas_kernels.fused_scan import devices_along, split_over

RULES = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "model",
    "memory": "model",
    "hidden": "model",
    "vocab": "model",
    None: None,
}
BATCH = P(RULES["batch"])


def make_mesh(config: Mesh, devices: Sequence | None = None) -> jax.sharding.Mesh:
    """The mesh over devices (None: all that are here).

    UserError if the sizes do not fit their number.
    """
    sizes = [config.data, config.fsdp, config.model]
    count = jax.device_count() if devices is None else len(devices)
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or count % known or (-1 not in sizes and known != count):
        raise UserError(
            f"{config} does not fit {count} devices; the product must be {count}, "
            "with at most one -1"
        )
    sizes = [count // known if size == -1 else size for size in sizes]
    names = ("data", "fsdp", "model")
    kinds = (AxisType.Auto,) * 3
    return jax.make_mesh(sizes, names, axis_types=kinds, devices=devices)


def on_mesh(mesh: jax.sharding.Mesh, function: Callable) -> Callable:
    """The function, its activations and kernels split by rows and by heads."""

    def place(x, axes):
        if mesh.size == 1:
            return x
        names = (
            name if name and size % devices_along(mesh, name) == 0 else None
            for size, name in zip(x.shape, map(RULES.get, axes), strict=True)
        )
        split = NamedSharding(mesh, P(*names))
        return jax.lax.with_sharding_constraint(x, split)

    @wraps(function)
    def traced(*arguments):
        with placed(place), split_over(mesh, RULES["batch"], RULES["memory"]):
            return function(*arguments)

    return traced


def data_part(devices: np.ndarray, process: int) -> tuple[int, int]:
    """Which part of every batch a process reads, and how many parts there are.

    `devices` are those of a mesh, `[data, fsdp, model]`. Processes whose devices lie
    side by side along model hold the same rows, so they read the same part.
    """
    rows = devices.reshape(-1, devices.shape[-1])
    held: dict[int, set[int]] = {}
    for row, column in np.ndindex(rows.shape):
        held.setdefault(rows[row, column].process_index, set()).add(row)
    parts = sorted({tuple(sorted(part)) for part in held.values()})
    sizes = {len(part) for part in parts}
    if len(sizes) > 1 or sum(map(len, parts)) != len(rows):
        raise UserError(
            "the mesh's model axis cuts across processes so that some rows of a batch "
            "lie on unequal sets of them; use a model axis that divides the devices "
            "of a process, or is a multiple of them"
        )
    return parts.index(tuple(sorted(held[process]))), len(parts)


def parameter_sharding(mesh, name: str, axes, shape) -> NamedSharding:
    """Sharding of one parameter by the logical names of its last axes.

    Leading axes without a name (the stacked layers) are not split, nor is a vocabulary
    that does not divide: bytes and an end make 257, and no user can mend that.
    """
    axes = [None] * (len(shape) - len(axes)) + list(axes)
    names = [
        None if axis == "vocab" and size % mesh.shape[RULES[axis]] else RULES[axis]
        for size, axis in zip(shape, axes, strict=True)
    ]
    for size, axis in zip(shape, names, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(
                f"parameter {name} of shape {tuple(shape)} cannot be split in "
                f"{mesh.shape[axis]} along mesh axis {axis}; use a smaller one"
            )
    return NamedSharding(mesh, P(*names))

"""Logical axis names to mesh axes: the one place that decides how arrays are split.

The mesh has three axes. Batches are split over data and fsdp; parameters and optimizer
state over fsdp (the model width) and model (heads, hidden units, vocabulary). One
device is the mesh 1 x 1 x 1.
"""

import math
from collections.abc import Callable
from functools import wraps

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from miras_jax.errors import UserError
from miras_jax.training.config import Mesh
from pallas_kernels.fused_scan import split_over

RULES = {
    "embed": "fsdp",
    "heads": "model",
    "memory": "model",
    "hidden": "model",
    "vocab": "model",
    None: None,
}
BATCH = P(("data", "fsdp"))


def make_mesh(config: Mesh) -> jax.sharding.Mesh:
    """The mesh over all devices; UserError if the sizes do not fit their number."""
    sizes = [config.data, config.fsdp, config.model]
    devices = jax.device_count()
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or devices % known or (-1 not in sizes and known != devices):
        raise UserError(
            f"{config} does not fit {devices} devices; the product must be {devices}, "
            "with at most one -1"
        )
    sizes = [devices // known if size == -1 else size for size in sizes]
    names = ("data", "fsdp", "model")
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * 3)


def split_kernels(mesh: jax.sharding.Mesh, function: Callable) -> Callable:
    """The function, its kernels split as batches and the heads of memories are."""

    @wraps(function)
    def on_mesh(*arguments):
        with split_over(mesh, BATCH[0], RULES["memory"]):
            return function(*arguments)

    return on_mesh


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

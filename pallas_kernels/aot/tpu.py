"""TPU programs, compiled by libtpu on a machine without a TPU."""

import os
import re
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from pallas_kernels.aot.case import Work
from pallas_kernels.fused_scan import target


class Chip(NamedTuple):
    """A chip that libtpu compiles for."""

    topology: str  # the smallest
    version: pltpu.ChipVersion
    clock: float | None  # Hz; None: not published


CHIPS = {
    "v5e": Chip("v5e:2x2", pltpu.ChipVersion.TPU_V5E, 1.5e9),
    "v5p": Chip("v5p:2x2x1", pltpu.ChipVersion.TPU_V5P, 1.75e9),
    "v6e": Chip("v6e:2x2", pltpu.ChipVersion.TPU_V6E, 1.75e9),
    "tpu7x": Chip("tpu7x:2x2x1", pltpu.ChipVersion.TPU_7X, None),
}

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # Without any it complains; what is compiled for is said where it is asked for.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    # Several processes may compile at a time.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

UNITS = {
    "matrix": ("MXU",),
    "vector": ("VALU",),
    "cross-lane": ("XLU",),
    "transcendental": ("EUP",),
    "load": ("VLOAD", "VLOAD:FILL"),
    "store": ("VSTORE", "VSTORE:SPILL"),
}
"""Units that a bundle can give work to, and their columns in libtpu's dump."""


def prepare(dump: str | None = None) -> None:
    """Set what libtpu reads from the environment when it is loaded."""
    os.environ |= ENVIRONMENT
    if dump:
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        os.environ["LIBTPU_INIT_ARGS"] = flags


def topology(chip: str, shape: str | None = None):
    """A slice of so many chips along each axis, such as 4x4; has `devices`.

    None: the smallest that can be compiled for.
    """
    prepare()
    name = CHIPS[chip].topology if shape is None else f"{chip}:{shape}"
    # Hosts have four chips, unless there is only one.
    one = shape is not None and set(shape.split("x")) == {"1"}
    host = {"chips_per_host_bounds": (1, 1, 1)} if one else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **host)


def compile_for(chip: str, function: Callable, *operands: Any):
    """The compiled program of a function for one device of a chip."""
    sharding = SingleDeviceSharding(topology(chip).devices[0])
    operands = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), operands
    )
    with target("tpu"):
        lowered = jax.jit(function).lower(*operands)
    return lowered.compile()


class Schedule(NamedTuple):
    """A kernel as the compiler has scheduled it; a bundle takes about one cycle."""

    kernel: str
    bundles: int
    use: dict[str, float]  # of each unit: the share of its slots that are taken
    spills: int  # stores of registers that did not fit

    @property
    def limit(self) -> str:
        """The unit that is used most."""
        return max(self.use, key=self.use.get)


def schedules(
    dump: str, chip: str, loops: dict[str, list[int]], function: Callable, *operands
) -> list[Schedule]:
    """Of every kernel in a function; `prepare(dump)` must have come first.

    loops: rounds of the loops inside each kernel, as `Work` has them.
    """
    for path in Path(dump).iterdir():
        path.unlink()
    compile_for(chip, function, *operands)
    pattern = "*final_hlo-static-per-bundle-utilization.txt"
    found = [_schedule(path, loops) for path in sorted(Path(dump).glob(pattern))]
    return [schedule for schedule in found if schedule]


class Floor(NamedTuple):
    """Cycles that a part of the chip needs at least; None where no clock is known."""

    matrix: float | None
    memory: float | None


def floor(chip: str, work: Work) -> Floor:
    """What the matrix units and the memory of a chip need for some work."""
    info = pltpu.get_tpu_info_for_chip(CHIPS[chip].version, 1)
    clock = CHIPS[chip].clock
    if clock is None:
        return Floor(None, None)
    return Floor(
        clock * 2 * work.multiply_adds / info.bf16_ops_per_second,
        clock * work.bytes / info.mem_bw_bytes_per_second,
    )


def _schedule(path: Path, loops: dict[str, list[int]]) -> Schedule | None:
    name = re.match(r"\d+-(\w+?)(\.\d+)?-", path.name)
    if name is None or not name[1].startswith("fused_scan"):
        return None
    lines = path.read_text().splitlines()
    columns = [column.strip() for column in lines[1].split(",")]
    capacity = dict(zip(columns, map(int, lines[2].split()), strict=True))
    rows = [list(map(int, line.split())) for line in lines[4:] if line.strip()]
    times = [1] * len(rows)
    if loops[name[1]]:
        (code,) = path.parent.glob(f"*-{name[0].split('-', 1)[1]}*-final_bundles.txt")
        times = _times(code.read_text(), loops[name[1]])
    total = sum(times)
    used = {
        column: sum(n * count for n, count in zip(times, each, strict=True))
        for column, each in zip(columns, zip(*rows, strict=True), strict=True)
    }
    use = {
        unit: max(used[c] / (capacity[c] * total) for c in parts)
        for unit, parts in UNITS.items()
    }
    return Schedule(name[1], total, use, used["VSTORE:SPILL"])


def _times(code: str, loops: list[int]) -> list[int]:
    """How often each bundle of a kernel runs in a step of its grid.

    loops: rounds of the loops in the code, an outer one before those inside it.
    """
    rounds, depths, times, is_left = iter(loops), [], [], False
    for line in code.splitlines():
        bundle = re.match(r" *(?:0x\w+|0) +(\w\w)? *: (>*) ?\{", line)
        if bundle is None:
            continue
        depth = len(bundle[2])
        if is_left:
            depths.pop()
        # The outermost loop is the grid's.
        if bundle[1] == "LB" and depth > 1:
            depths.append(next(rounds))
        times.append(prod(depths))
        is_left = bool(depths) and "sbr.rel" in line
    if depths or next(rounds, None) is not None:
        raise ValueError(f"the code has not the loops {loops} of its kernel")
    return times

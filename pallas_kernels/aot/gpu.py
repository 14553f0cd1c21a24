"""GPU programs, compiled for a chip on a machine without one.

Needs the CUDA libraries, `pip install 'miras-jax[cuda]'`: XLA compiles Triton kernels
to PTX for a described chip, and NVIDIA's assembler says what they take of it.

registers   of each thread, of 255; `spills`, in bytes, are what did not fit
shared      memory of a multiprocessor that one program takes, in KiB
matrix      nanoseconds per token and element that the matrix units need at least
memory      nanoseconds that the memory needs at least for operands and results

Facts of compiled programs: nothing here was measured on a chip.
"""

import importlib.util
import os
import re
import subprocess
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.fused_scan import target
from pallas_kernels.fused_scan.program import multiply_adds


class Chip(NamedTuple):
    """A chip as XLA's compiler wants it described; rates of the data sheet."""

    name: str
    architecture: str  # of the assembler
    capability: tuple[int, int]
    multiprocessors: int
    clock: float  # GHz
    shared: tuple[int, int]  # bytes per multiprocessor, and per program at most
    cache: int
    memory: int
    bandwidth: float  # bytes per second
    matrix: float  # dense bfloat16 operations per second

    @property
    def config(self) -> str:
        """XLA's `GpuTargetConfigProto` as text."""
        major, minor = self.capability
        return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared[0]}
  threads_per_core_limit: 2048
  core_count: {self.multiprocessors}
  fpus_per_core: {128 if major == 9 else 64}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(self.bandwidth)}
  l2_cache_size: {self.cache}
  clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory}
  shared_memory_per_block_optin: {self.shared[1]}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{self.name}"
"""


CHIPS = {
    # NVIDIA H100 and A100 data sheets (SXM, 80 GB) and tuning guides.
    "h100": Chip(
        name="NVIDIA H100 80GB HBM3",
        architecture="sm_90a",
        capability=(9, 0),
        multiprocessors=132,
        clock=1.98,
        shared=(233472, 232448),
        cache=52428800,
        memory=84978434048,
        bandwidth=3.35232e12,
        matrix=989.4e12,
    ),
    "a100": Chip(
        name="NVIDIA A100-SXM4-80GB",
        architecture="sm_80",
        capability=(8, 0),
        multiprocessors=108,
        clock=1.41,
        shared=(167936, 166912),
        cache=41943040,
        memory=85098233856,
        bandwidth=2.039e12,
        matrix=312e12,
    ),
}


class Usage(NamedTuple):
    """What one kernel takes of the chip."""

    kernel: str
    threads: int
    registers: int  # of a thread
    spills: int  # bytes that a thread stores because registers ran out
    shared: int  # bytes


def prepare(dump: str) -> None:
    """Set what XLA and JAX read from the environment when they are loaded."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_dump_to={dump}".strip()
    # It asks the driver for its devices, and a machine that only compiles has none.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def has_compiler() -> bool:
    """Whether NVIDIA's compiler and XLA's plugin for it are installed."""
    return all(map(importlib.util.find_spec, ("jax_cuda12_plugin", "nvidia")))


def compile_for(chip: str, function: Callable, *operands: Any):
    """The compiled program of a function for one device of a chip."""
    if not has_compiler():
        raise RuntimeError(
            "Compiling for a GPU needs its compiler: pip install 'miras-jax[cuda]'."
        )
    topology = topologies.get_topology_desc(
        "", platform="cuda", target_config=CHIPS[chip].config, topology="1x1x1"
    )
    sharding = SingleDeviceSharding(topology.devices[0])
    operands = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), operands
    )
    with target("gpu"):
        lowered = jax.jit(function).lower(*operands)
    return lowered.compile()


def usages(dump: str, chip: str, function: Callable, *operands: Any) -> list[Usage]:
    """Of every kernel in a function, in order; `prepare(dump)` must have come first."""
    for path in Path(dump).iterdir():
        if path.is_file():
            path.unlink()
    compile_for(chip, function, *operands)
    launches = {}
    for path in Path(dump).glob("*.thunk_sequence.txt"):
        pattern = r"(fused_scan\w*) grid: .* threads: \[(\d+),.*shared_memory: (\d+)"
        for name, threads, shared in re.findall(pattern, path.read_text()):
            launches[name] = int(threads), int(shared)
    found = []
    for path in sorted(Path(dump).glob("*.ptx")):
        for name, registers, spills in _assembled(path, CHIPS[chip].architecture):
            threads, shared = launches[name]
            found.append(Usage(name, threads, registers, spills, shared))
    return sorted(found)


def _assembled(path: Path, architecture: str):
    """(kernel, registers, bytes of spills) of a PTX file's fused scans."""
    if ".entry fused_scan" not in path.read_text():
        return
    command = [_assembler(), f"-arch={architecture}", "-v", path, "-o", os.devnull]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    for part in report.split("Compiling entry function ")[1:]:
        name = re.match(r"'(\w+)'", part)[1]
        spills = re.search(r"(\d+) bytes spill stores", part)[1]
        registers = re.search(r"Used (\d+) registers", part)[1]
        yield name, int(registers), int(spills)


def _assembler() -> str:
    (root,) = importlib.util.find_spec("nvidia.cuda_nvcc").submodule_search_locations
    return str(Path(root) / "bin" / "ptxas")


class Floor(NamedTuple):
    """Seconds that a part of the chip needs at least."""

    matrix: float
    memory: float


def floor(chip: str, plain: Callable, *operands: Any) -> Floor:
    """What units and memory need for a function that scans without kernels."""
    closed = jax.make_jaxpr(plain)(*operands)
    leaves = (*closed.in_avals, *closed.out_avals)
    size = sum(prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    operations = 2 * multiply_adds(closed.jaxpr)
    return Floor(operations / CHIPS[chip].matrix, size / CHIPS[chip].bandwidth)


COLUMNS = ("variant", "kernel", "threads", "registers", "spills", "shared KiB")
FLOORS = ("matrix ns", "memory ns")


def table(found, chip: str, dump: str, heading: bool) -> int:
    """Print a row for every kernel of the cases; 1 if one does not compile."""
    prepare(dump)
    if heading:
        print(f"# {chip}; compile-time figures, not measurements")
        _print_row(*COLUMNS, *FLOORS)
    failed = False
    for case in found:
        try:
            kernels = usages(dump, chip, case.kernel, *case.operands)
        except Exception as error:  # whatever a compiler raises is the row's result
            failed = True
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            print(f"{case.name:<31} does not compile: {reason}", flush=True)
            continue
        seconds = floor(chip, case.plain, *case.operands)
        floors = [f"{1e9 * s / case.tokens:.3f}" for s in seconds]
        for name, usage in zip(("forward", "backward"), kernels, strict=False):
            shared = f"{usage.shared / 1024:.1f}"
            _print_row(case.name, name, *usage[1:4], shared, *floors)
            floors = ("", "")  # of the case, not of each kernel
    return int(failed)


def _print_row(name, *rest) -> None:
    line = f"{name:<31}" + "".join(f"{cell:>11}" for cell in rest)
    print(line.rstrip(), flush=True)

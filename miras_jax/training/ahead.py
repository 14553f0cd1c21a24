"""The train step compiled for a TPU slice that is not here: does it fit, what is sent.

Facts of the compiled program, not measurements: the memory of a device, and what the
devices of the slice send each other in a step.
"""

import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from miras_jax.errors import UserError
from miras_jax.nn.functional import FunctionalModel
from miras_jax.training import sharding
from miras_jax.training.config import Experiment
from miras_jax.training.run import Run
from miras_jax.training.train import implementations
from pallas_kernels.aot import hlo, tpu
from pallas_kernels.fused_scan import target


class Compiled(NamedTuple):
    """What a compiled train step needs; sizes in bytes, of one device."""

    mesh: dict[str, int]  # devices along each axis
    parameters: int
    runs_in: str
    state: int  # parameters, optimizer and what is carried
    peak: int  # all that is in memory at a time, the state included
    sent: dict[str, int]  # in a step, by kind of collective
    seconds: float  # that compiling took


def compile_step(experiment: Experiment, slice_name: str) -> Compiled:
    """Compile the experiment's train step for a slice such as "v5e:16x16".

    Its texts are not read. Raises UserError if there is no such slice, no compiler, or
    not enough memory on its devices.
    """
    devices = _devices(slice_name)
    run = Run(experiment, "runs/none")
    run.mesh = sharding.make_mesh(experiment.mesh, devices)
    run.model = FunctionalModel(experiment.model, experiment.data.tokenizer.vocab_size)
    run.check_rows()
    length = experiment.data.context_length
    packed = experiment.data.documents == "packed"
    carried = experiment.windows == "consecutive"
    shape = (experiment.batch_size, *((2,) if packed or carried else ()), length + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=run.batch_sharding)
    stop = jax.ShapeDtypeStruct((len(devices),), jnp.int32, sharding=run.flag_sharding)
    start = time.monotonic()
    with target("tpu"):
        kernels = implementations(experiment.model, length, packed, carried)
        lowered = run.train_step.lower(run.abstract_state, tokens, stop)
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise _explained(error, slice_name) from error
    memory = program.memory_analysis()
    return Compiled(
        dict(run.mesh.shape),
        run.model.size,
        kernels,
        memory.argument_size_in_bytes,
        memory.peak_memory_in_bytes,
        hlo.sent(program.as_text()),
        time.monotonic() - start,
    )


def report(experiment: Experiment, slice_name: str, compiled: Compiled) -> str:
    """It in a few lines."""
    gib, mib = 2**30, 2**20
    mesh = ", ".join(f"{name} {size}" for name, size in compiled.mesh.items())
    parts = sorted(compiled.sent.items(), key=lambda part: -part[1])
    sent = ", ".join(f"{kind} {size / mib:,.0f}" for kind, size in parts) or "nothing"
    rows = experiment.batch_size
    return (
        f"{compiled.parameters / 1e6:,.1f} M parameters, {rows:,} rows of "
        f"{experiment.data.context_length:,} tokens per step on {slice_name} ({mesh})\n"
        f"runs in  {compiled.runs_in}\n"
        f"memory   {compiled.peak / gib:.2f} GiB of a device, "
        f"{compiled.state / gib:.2f} of them parameters and optimizer\n"
        f"sends    per device and step, MiB: {sent}\n"
        f"compiled in {compiled.seconds:.0f} s; nothing of this was run"
    )


def _devices(slice_name: str) -> list:
    chip, _, shape = slice_name.partition(":")
    sizes = "a chip and a shape, such as v5e:16x16, v5p:4x4x4 or v6e:8x8"
    if chip not in tpu.CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(
            f"{slice_name!r} is no TPU slice; give {sizes}, of the chips "
            f"{', '.join(tpu.CHIPS)}"
        )
    try:
        return tpu.topology(chip, shape).devices
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot compile for {slice_name} ({reason}); give {sizes}, where libtpu "
            "is installed (pip install libtpu, Linux on x86-64)"
        ) from error


def _explained(error: Exception, slice_name: str) -> Exception:
    """The compiler's error, as one of the user if it is too little memory."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return error
    first = text.splitlines()[0]
    if "vmem" in first.lower():
        return UserError(
            f"a kernel does not fit into the memory of a core of {slice_name} "
            f"({first}); use more and smaller heads, or a memory of a "
            "smaller expansion"
        )
    sizes = re.search(r"required.*?\(?([\d.]+[KMGT])\)? exceeds.*?([\d.]+[KMGT])", text)
    reason = f"{sizes[1]} of {sizes[2]}" if sizes else first
    return UserError(
        f"the train step does not fit into a device of {slice_name} ({reason}); use a "
        "larger slice or Mesh(fsdp=...), Experiment(accumulation=...), fewer rows, "
        "Model(remat='block'), vocab_blocks=... or compute_dtype='bfloat16'"
    )

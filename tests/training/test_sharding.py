"""The same training on every mesh and over processes, and parameters really split."""

import contextlib
import dataclasses
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from miras_jax import Rule, memory, variants
from miras_jax.errors import UserError
from miras_jax.nn.attention import Attention
from miras_jax.nn.miras import Miras
from miras_jax.nn.model import Model
from miras_jax.training import sharding
from miras_jax.training.batches import train_batches
from miras_jax.training.checkpoint import Checkpoints
from miras_jax.training.config import Mesh
from miras_jax.training.metrics import read_table
from miras_jax.training.run import Run
from pallas_kernels.aot import hlo
from pallas_kernels.fused_scan import fused_scan, target
from tests import xla_flags
from tests.training.runs import one_device, tiny

# The state that consecutive windows carry is split, too.
MODEL = Model(
    width=32,
    depth=2,
    mixers=(
        Miras(Rule(memory.Linear(), chunk_size=8), num_heads=2),
        Attention(num_heads=2, window=40),
    ),
)
STEPS, SAVED = 5, 3
MESHES = [Mesh(data=8), Mesh(2, 2, 2), Mesh(1, 4, 2)]
EMBEDDING = "embedding"
UP = "groups/blocks/0/mlp/up/weight"
DOWN = "groups/blocks/0/mlp/down/weight"
# How the last two axes of three parameters are cut: the mesh's sizes are 8, 1, 1 and so
# on. 257 tokens cannot be halved.
PARTS = {
    MESHES[0]: {EMBEDDING: (1, 1), UP: (1, 1), DOWN: (1, 1)},
    MESHES[1]: {EMBEDDING: (1, 2), UP: (2, 2), DOWN: (2, 2)},
    MESHES[2]: {EMBEDDING: (1, 4), UP: (4, 2), DOWN: (2, 4)},
}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """`Run` on a mesh, or on one device for None, each built once."""
    folder = tmp_path_factory.mktemp("sharding")

    @functools.cache
    def build(mesh):
        experiment = tiny(
            folder, model=MODEL, mesh=mesh or Mesh(), windows="consecutive"
        )
        run = Run(experiment, folder / "run")
        if mesh is None:
            run.mesh = one_device()
        return run

    return build


def continued(run, state, first, last):
    """The state and the losses of steps first + 1 ... last."""
    experiment = run.experiment
    batches = train_batches(
        run.prepared,
        batch_size=experiment.batch_size,
        seed=experiment.seed,
        walking=run.rows_here,
    )
    losses = []
    with contextlib.closing(batches):
        tokens = [next(batches) for _ in range(last)]
    for rows in tokens[first:]:
        state, metrics = run.train_step(
            state, run.to_devices(rows), run.stop_flags(False)
        )
        losses.append(metrics.loss.item())
    return state, losses


@pytest.fixture(scope="module")
def reference(build):
    """Initial parameters and losses on one device."""
    run = build(None)
    state = run.initial_state()
    parameters = {n: np.asarray(p) for n, p in state.parameters.items()}
    _, losses = continued(run, state, 0, STEPS)
    assert losses[-1] < losses[0]
    return parameters, losses


def parts(array):
    """In how many pieces each of the last two axes is cut."""
    (piece,) = {shard.data.shape for shard in array.addressable_shards}
    return tuple(n // m for n, m in zip(array.shape, piece, strict=True))[-2:]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_mesh_trains_the_same(mesh, build, reference):
    parameters, losses = reference
    run = build(mesh)
    state = run.initial_state()
    for name, value in parameters.items():
        assert np.array_equal(value, state.parameters[name]), name
    found, sizes = [], []
    for step in range(STEPS):
        state, loss = continued(run, state, step, step + 1)
        found += loss
        sizes.append(run.train_step._cache_size())
    assert found == pytest.approx(losses, rel=1e-5)
    assert len(set(sizes)) == 1, f"the step was traced again: {sizes}"

    moments = state.optimizer[1][0].mu
    for name, cut in PARTS[mesh].items():
        assert parts(state.parameters[name]) == cut
        assert parts(moments[name]) == cut
    tokens = run.to_devices(np.zeros((8, 33), np.int32))
    assert parts(tokens) == (run.row_parts, 1)
    assert {parts(c.last.index) for c in state.carry} == {(1, run.row_parts)}


def test_kernels_are_split_by_rows_and_heads():
    """Each device runs a kernel for the rows and the heads that it holds."""
    mesh = sharding.make_mesh(Mesh(2, 2, 2))

    def one(start, xs):
        return fused_scan(lambda c, x, _: (c + x, c * x), start, xs, ())

    function = sharding.on_mesh(mesh, jax.vmap(jax.vmap(one)))
    start, xs = np.ones((4, 2, 8, 8)), np.ones((4, 2, 3, 8, 8))
    with target("tpu", interpret=True):
        end, _ = jax.jit(function)(np.float32(start), np.float32(xs))
    assert end.sharding.spec == P(("data", "fsdp"), "model")
    assert np.all(np.asarray(end) == 4)


def test_parameters_are_sent_and_activations_stay(tmp_path):
    """Without kernels, too, whose rows would tell the compiler how to split.

    And what a memory learns is summed over devices once, not in every chunk.
    """
    yaad = dataclasses.replace(variants.yaad(), chunk_size=8)
    model = Model(width=32, depth=1, mixers=(Miras(yaad, num_heads=2),))
    experiment = tiny(
        tmp_path,
        model=model,
        mesh=Mesh(2, 4, 1),
        batch_size=64,
        windows="consecutive",
    )
    run = Run(experiment, tmp_path / "run")

    def sent(length):
        struct = functools.partial(jax.ShapeDtypeStruct, dtype=np.int32)
        tokens = struct((64, 2, length + 1), sharding=run.batch_sharding)
        stop = struct((8,), sharding=run.flag_sharding)
        program = run.train_step.lower(run.abstract_state, tokens, stop).compile()
        return sum(hlo.sent(program.as_text()).values())

    # What each device holds of one array of activations is larger than them all.
    assert 8 * 1024 * 32 > 6 * run.model.size
    whole = sent(1024)
    assert 0 < whole < 4 * 4 * run.model.size
    assert whole == pytest.approx(sent(64), rel=0.01)


def test_a_checkpoint_of_one_mesh_goes_on_on_another(build, reference, tmp_path):
    _, losses = reference
    run = build(MESHES[1])
    state, _ = continued(run, run.initial_state(), 0, SAVED)
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(SAVED, state, data={}, config={})
    for other in (MESHES[2], None):
        run = build(other)
        with Checkpoints(tmp_path / "run") as checkpoints:
            restored = checkpoints.restore(run.abstract_state, config={}).state
        for name, value in state.parameters.items():
            assert np.array_equal(value, restored.parameters[name]), name
        embedding = restored.parameters[EMBEDDING]
        assert embedding.sharding == run.state_shardings.parameters[EMBEDDING]
        _, found = continued(run, restored, SAVED, STEPS)
        assert found == pytest.approx(losses[SAVED:], rel=1e-5)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (Mesh(), (8, 1, 1)),
        (Mesh(2, -1, 2), (2, 2, 2)),
        (Mesh(1, 1, -1), (1, 1, 8)),
        (Mesh(4, 2, 1), (4, 2, 1)),
    ],
    ids=str,
)
def test_make_mesh(config, shape):
    assert tuple(sharding.make_mesh(config).shape.values()) == shape


@pytest.mark.parametrize("config", [Mesh(3), Mesh(2, 2, 1), Mesh(-1, -1)], ids=str)
def test_a_mesh_that_does_not_fit_is_refused(config):
    with pytest.raises(UserError, match="does not fit 8 devices"):
        sharding.make_mesh(config)


def test_what_cannot_be_split_is_named():
    mesh = sharding.make_mesh(Mesh(1, 1, 8))
    split = functools.partial(sharding.parameter_sharding, mesh, "mlp/up")
    assert split(("embed", "hidden"), (2, 32, 128)).spec == P(None, "fsdp", "model")
    with pytest.raises(UserError, match="mlp/up of shape .* in 8 along mesh axis mod"):
        split(("embed", "hidden"), (2, 32, 100))
    # No user can choose how many tokens bytes make.
    assert split(("vocab", "embed"), (257, 32)).spec == P(None, "fsdp")
    assert split(("vocab", "embed"), (256, 32)).spec == P("model", "fsdp")


@pytest.mark.parametrize(
    ("owners", "parts"),
    [
        ([[0, 0], [1, 1]], {0: (0, 2), 1: (1, 2)}),
        ([[0, 1], [0, 1]], {0: (0, 1), 1: (0, 1)}),
        ([[0, 1], [2, 3]], {0: (0, 2), 1: (0, 2), 2: (1, 2), 3: (1, 2)}),
        ([[1, 1], [0, 0]], {0: (1, 2), 1: (0, 2)}),
    ],
)
def test_processes_read_the_rows_that_they_hold(owners, parts):
    """owners: the process of each device, [rows, model]."""
    devices = np.empty((1, *np.shape(owners)), object)
    for place, owner in np.ndenumerate(owners):
        devices[0, *place] = types.SimpleNamespace(process_index=owner)
    for process, part in parts.items():
        assert sharding.data_part(devices, process) == part


def test_rows_on_unequal_sets_of_processes_are_refused():
    owners = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    devices = np.array([types.SimpleNamespace(process_index=p) for p in owners])
    with pytest.raises(UserError, match="model axis"):
        sharding.data_part(devices.reshape(6, 1, 2), 0)


PROCESS = """
import sys
from pathlib import Path

import jax

from miras_jax.training.config import Mesh

index, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
mesh = Mesh(model=int(sys.argv[4]))
jax.config.update("jax_enable_preemption_service", False)
jax.distributed.initialize(f"localhost:{port}", 2, index)

from miras_jax.training.train import train
from tests.training.test_sharding import endless

print(train(endless(folder, mesh), folder / "run"))
"""


def endless(folder, mesh):
    """Attention, because it compiles soonest."""
    model = Model(width=32, depth=2, mixers=(Attention(num_heads=2),))
    every = {"evaluate_every": 100_000, "checkpoint_every": 1000}
    every |= {"windows": "consecutive"}
    return tiny(folder, model=model, steps=100_000, mesh=mesh, **every)


@pytest.mark.parametrize(("asked", "model"), [(0, 1), (1, 2)])
def test_two_processes_train_and_stop_as_one(asked, model, tmp_path):
    """Four steps as on one device; a SIGTERM to either process ends both alike.

    With a model axis of two both processes hold, and read, the same rows.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    experiment = endless(tmp_path, Mesh())
    environment = os.environ | {
        "XLA_FLAGS": xla_flags(devices=1),
        "JAX_ENABLE_COMPILATION_CACHE": "0",
    }
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                PROCESS,
                str(index),
                port,
                str(tmp_path),
                str(model),
            ],
            env=environment,
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    metrics = tmp_path / "run" / "metrics.csv"
    try:
        deadline = time.monotonic() + 240
        while not (metrics.is_file() and metrics.read_text().count("\n") > 5):
            assert all(p.poll() is None for p in processes), [
                p.communicate()[0] for p in processes
            ]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        processes[asked].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], outputs
    ends = [re.search(r"Result\(step=(\d+), finished=False", out) for out in outputs]
    step = int(ends[0][1])
    assert int(ends[1][1]) == step
    table = read_table(metrics)
    assert len(table["step"]) == step

    run = Run(experiment, tmp_path / "run")
    run.mesh = one_device()
    assert run.restore("last").step == step
    _, losses = continued(run, run.initial_state(), 0, 4)
    assert table["loss"][:4].tolist() == pytest.approx(losses, rel=1e-5)

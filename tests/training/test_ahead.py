"""Train steps compiled by the real TPU compiler for slices that are not here."""

from dataclasses import replace

import pytest

from miras_jax import Rule, cli, memory
from miras_jax.errors import UserError
from miras_jax.nn.miras import Miras
from miras_jax.nn.model import Model
from miras_jax.training import ahead
from miras_jax.training.config import Mesh
from tests.training.runs import tiny

pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed")

LENGTH, WIDTH = 4096, 64
ROW = LENGTH * WIDTH * 2
"""Bytes of a row's activations, in bfloat16."""

MODEL = Model(
    width=WIDTH,
    depth=2,
    mixers=(Miras(Rule(memory.Linear(), chunk_size=8), num_heads=2),),
    compute_dtype="bfloat16",
    remat="block",
)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """On rows of which one is larger than all parameters."""
    experiment = tiny(
        tmp_path_factory.mktemp("ahead"),
        model=MODEL,
        batch_size=8,
    )
    return replace(experiment, data=replace(experiment.data, context_length=LENGTH))


def test_parameters_travel_and_activations_stay(experiment):
    """Split over data and fsdp, a device of four computes its own two rows alone."""
    split = ahead.compile_step(replace(experiment, mesh=Mesh(2, 2, 1)), "v5e:2x2")
    assert split.mesh == {"data": 2, "fsdp": 2, "model": 1}
    assert split.runs_in == "memories in TPU kernels"
    assert split.sent["all-gather"] > 0
    # Gathered forward and backward in bfloat16, and the sum of gradients.
    assert sum(split.sent.values()) < 4 * 4 * split.parameters
    assert split.peak > split.state > 12 * split.parameters / 2


def test_heads_and_hidden_units_are_summed_over_devices(experiment):
    """Some sums of all activations a block; no head is sent elsewhere."""
    split = ahead.compile_step(replace(experiment, mesh=Mesh(2, 1, 2)), "v5e:2x2")
    rows = 4 * ROW
    others = sum(size for kind, size in split.sent.items() if kind != "all-reduce")
    assert others < rows
    assert 8 * rows < split.sent["all-reduce"] < 20 * rows


def test_a_step_that_does_not_fit(experiment):
    large = replace(experiment, batch_size=8192, mesh=Mesh(4))
    with pytest.raises(UserError, match=r"v5e:2x2 \([\d.]+G of 15.75G\); use a larger"):
        ahead.compile_step(large, "v5e:2x2")


@pytest.mark.parametrize("name", ["v5e", "v5e:", "h100:2x2", "v5e:2x", "v5e:3x5"])
def test_what_is_no_slice(experiment, name):
    with pytest.raises(UserError, match="such as v5e:16x16"):
        ahead.compile_step(experiment, name)


def test_rows_that_devices_do_not_divide(experiment):
    with pytest.raises(UserError, match="batch_size=8 cannot be split over 16 devices"):
        ahead.compile_step(experiment, "v5e:4x4")


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    file = tmp_path / "one.py"
    file.write_text(
        "from pathlib import Path\n"
        "from tests.training.runs import tiny\n"
        "from tests.training.test_ahead import MODEL\n"
        "def experiment():\n"
        f"    return tiny(Path({str(tmp_path)!r}), model=MODEL)\n"
    )
    assert cli.main(["compile", str(file), "--slice", "v5e:1x1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "8 rows of 32 tokens per step on v5e:1x1 (data 1, fsdp 1, mod" in lines[0]
    assert lines[3].endswith("MiB: nothing")
    assert [line.split()[0] for line in lines[1:]] == [
        "runs",
        "memory",
        "sends",
        "compiled",
    ]
    assert cli.main(["compile", str(file), "--slice", "v5e"]) == 2
    assert "is no TPU slice" in capsys.readouterr().err


def test_a_kernel_that_is_too_large_is_no_matter_of_a_larger_slice():
    """The first line of what the compiler said of heads of 256 channels."""
    text = "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nmore of it"
    found = ahead._explained(RuntimeError(text), "v5e:2x2")
    assert isinstance(found, UserError) and "smaller heads" in str(found)
    assert "slice" not in str(found) and "\n" not in str(found)

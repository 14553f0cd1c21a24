"""The commands as they are typed: what they print, write and exit with."""

import logging
import os
import re
import shlex
import shutil
import signal

import jax
import numpy as np
import pytest

from miras_jax.core import variants
from miras_jax.training import train as training
from miras_jax.training.metrics import Progress
from miras_jax.training.run import Run
from tests.commands import HELDOUT, command, number, refused


def changed(folder, old, new):
    """Another experiment file, beside the first."""
    text = (folder / "tiny.py").read_text()
    assert old in text
    path = folder / f"tiny{abs(hash(new))}.py"
    path.write_text(text.replace(old, new))
    return path


def nats_by_hand(workdir):
    """Of all held-out tokens after the first, in windows of 32."""
    run = Run.open(workdir)
    parameters = run.restore("best").state.parameters
    text = HELDOUT.encode()
    tokens = np.zeros(-(-len(text) // 32) * 32, np.int32)  # padded at the end
    tokens[: len(text)] = [256, *text[:-1]]
    logits, _ = jax.jit(run.model.apply)(parameters, tokens.reshape(-1, 32))
    rows = np.float64(logits).reshape(len(tokens), -1)
    return sum(
        np.log(np.exp(row).sum()) - row[byte]
        for row, byte in zip(rows, text, strict=False)
    )


def test_training_ends_with_a_summary_of_the_whole_heldout_text(trained):
    workdir, out, _ = trained
    nats, size, words = nats_by_hand(workdir), len(HELDOUT), len(HELDOUT.split())
    windows = -(-size // 32)
    assert f"on all {windows} held-out windows of 32 tokens" in out
    bits = number(out, "held-out bits per byte")
    assert bits == pytest.approx(nats / np.log(2) / size, abs=6e-4)
    token = number(out, "token perplexity")
    assert token == pytest.approx(np.exp(nats / size), rel=1e-3)
    word = number(out, "word perplexity")
    assert word == pytest.approx(np.exp(nats / words), rel=1e-3)
    for compressor in ("gzip -9", "xz -9e"):
        (line,) = (line for line in out.splitlines() if compressor in line)
        beaten = bits < number(out, f"{compressor} after the training text")
        assert line.endswith(" beaten") and ("not beaten" in line) != beaten
    assert str(workdir / "loss.png") in out
    for name in ("loss.png", "loss_by_position.png"):
        assert (workdir / name).read_bytes().startswith(b"\x89PNG")


def test_the_terminal_is_for_what_the_user_can_use(trained):
    lines = trained[2].splitlines()
    assert all(line.startswith(("0.0", "step ", "measuring")) for line in lines), lines
    # The speed of the first step is NaN, of which tensorboardX would warn.
    assert not logging.getLogger("tensorboardX.x2num").isEnabledFor(logging.WARNING)


def test_the_summary_shows_a_sample_and_commands_that_work(trained):
    workdir, out, _ = trained
    prompt = re.search(r'80 tokens at .* continue held-out words "(.*)"', out)[1]
    assert prompt in HELDOUT and len(prompt.split()) == 6
    assert f"    {prompt}" in out
    suggested = out.split("\nnext\n")[1].split("\n")
    commands = [shlex.split(line) for line in suggested if line]
    assert [c[:2] for c in commands] == [
        ["miras", "generate"],
        ["miras", "evaluate"],
        ["miras", "variants"],
    ]
    assert commands[0][2:] == [str(workdir), prompt]


def test_training_again_tells_the_same_and_trains_no_further(trained, folder):
    workdir, out, _ = trained
    before = (workdir / "metrics.csv").read_text()
    again = command("train", folder / "tiny.py", "--workdir", workdir)
    assert again[:2] == (0, out)
    assert (workdir / "metrics.csv").read_text() == before


def test_a_signal_ends_training_with_the_command_to_continue(
    folder, monkeypatch, tmp_path
):
    update = Progress.update

    def interrupted(self, step, loss):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        update(self, step, loss)

    argv = ["train", folder / "tiny.py", "--workdir", tmp_path / "my run"]
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", interrupted)
        status, out, _ = command(*argv)
    assert status == 0 and out.count("\n") == 1
    step, given = re.match(
        r"stopped and saved at step (\d) of 6; to continue: (.*)", out
    ).groups()
    assert 2 <= int(step) < 6
    assert shlex.split(given) == ["miras", *map(str, argv)]
    status, out, err = command(*shlex.split(given)[1:])
    assert status == 0 and f"from step {step}" in err and "step 6" in out


def test_a_diverged_training_is_one_line_and_status_3(folder, monkeypatch):
    def diverge(*_, **__):
        raise training.Diverged("training diverged: lower\nthe learning rate")

    monkeypatch.setattr(training, "train", diverge)
    expected = (3, "", "miras: training diverged: lower the learning rate\n")
    assert command("train", folder / "tiny.py") == expected


def test_steps_seed_and_default_folder_of_a_run(folder, monkeypatch):
    runs = []

    def stopped(experiment, workdir, *, traced):
        runs.append((experiment.steps, experiment.seed, str(workdir), traced))
        return training.Result(1, False, None)

    monkeypatch.setattr(training, "train", stopped)
    assert command("train", folder / "tiny.py", "--steps", 9, "--seed", 7)[0] == 0
    argv = ("--workdir", "here", "--profile", "2:3")
    assert command("train", folder / "tiny.py", *argv)[0] == 0
    assert runs == [(9, 7, "runs/tiny", None), (6, 0, "here", (2, 3))]
    one = "from tiny import experiment as only\ndef experiment(name): return only()\n"
    (folder / "several.py").write_text(one)
    monkeypatch.syspath_prepend(folder)
    assert command("train", folder / "several.py:one")[0] == 0
    assert runs[2] == (6, 0, "runs/several/one", None)


def test_variants_lists_every_named_rule():
    status, out, _ = command("variants")
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert status == 0 and {make.__name__ for make in variants.ALL} < set(rows)
    # Two matrices of 64 x 256, and the same again at the chunk's start.
    assert rows["yaad"][1:] == (
        "64, linear 65,536 MLP, Huber, Decay, GradientDescent".split()
    )
    assert rows["retnet"][1:3] == ["1", "4,096"]
    assert "arXiv 2504.13173, eq. 26" in out and "Wₜ = αₜ Wₜ₋₁ − ηₜ ∇ℓ" in out
    status, out, _ = command("variants", "--markdown")
    assert status == 0 and out.count("\n") == 2 + len(variants.ALL)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fly"], "invalid choice: 'fly'"),
        (["train"], "required: FILE[:NAME] (see miras train --help)"),
        (["train", "missing.py"], "missing.py is no file"),
        (["train", "{folder}/train.txt"], "is no Python file"),
        (["train", "{folder}/tiny.py", "--steps", "0"], "steps must be at least 1"),
        (["train", "{folder}/tiny.py", "--steps", "x"], "invalid int value: 'x'"),
        (["train", "{folder}/tiny.py", "--seed", "-1"], "no whole number from 0"),
        (["train", "{folder}/tiny.py", "--profile", "10"], "not of the form 10:12"),
        (
            ["train", "{folder}/tiny.py", "--workdir", "{folder}/train.txt/run"],
            "cannot be written",
        ),
        (["generate", "{folder}/nowhere"], "holds no run"),
        (["generate", "{run}", "a", "--length", "0"], "length is 0; generate at"),
        (["generate", "{run}", "a", "--temperature", "-1"], "temperature is -1.0;"),
        (["generate", "{run}", "a", "--top-p", "0"], "top_p is 0.0; give more"),
        (["generate", "{run}", "a", "--top-p", "nan"], "top_p is nan; give more"),
        (["generate", "{run}", "\udcff"], "the prompt is not valid text"),
        (["generate", "{folder}/none.safetensors"], "is no file; miras export"),
        (["evaluate", "{folder}"], "holds no run (no config.json)"),
        (["export", "{run}"], "required: FILE.safetensors"),
        (["export", "{folder}", "m.safetensors"], "holds no run (no config.json)"),
        (["export", "{run}", "{folder}/m.npz"], "must end in .safetensors"),
        (["evaluate", "{run}", "--windows", "0"], "--windows is 0"),
        (["evaluate", "{run}", "--recall", "9"], "passages have 32 tokens"),
        (["inspect", "{run}"], "required: --text"),
        (["inspect", "{folder}", "--text", "{folder}/train.txt"], "holds no run"),
        (["inspect", "{run}", "--text", "{folder}/none.txt"], "none.txt is no file;"),
        (["inspect", "{run}", "--text", "{run}/empty.txt"], "empty.txt holds no text"),
        (
            ["inspect", "{run}", "--text", "{folder}/train.txt", "--length", "0"],
            "limit is 0; read at least 1 token",
        ),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(trained, folder, argv, message):
    (trained[0] / "empty.txt").touch()
    argv = [part.format(folder=folder, run=trained[0]) for part in argv]
    error = refused(*argv)
    assert error.startswith("miras: ") and message in error


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def experiment", "def other", "has no function experiment()"),
        ("steps=6", "steps=", "cannot be run as an experiment: SyntaxError"),
        ("return Experiment(", "return dict(", "returned a dict"),
        ("heldout.txt", "empty.txt", "holds no text"),
        ("train.txt", "*.md", "no file matches"),
    ],
)
def test_an_experiment_that_cannot_run_is_one_line(folder, tmp_path, old, new, message):
    (folder / "empty.txt").touch()
    file = changed(folder, old, new)
    assert message in refused("train", file, "--workdir", tmp_path / "run")


def test_a_checkpoint_of_another_model_is_one_line(trained, folder, tmp_path):
    file = changed(folder, "width=32", "width=64")
    error = refused("train", file, "--workdir", trained[0])
    assert "another model or tokenizer: model.width: saved 32, expected 64" in error
    copy = tmp_path / "run"
    shutil.copytree(trained[0], copy)
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"width": 32', '"width": 64'))
    assert "has another config: model.width" in refused("generate", copy)
    (copy / "config.json").write_text(config[:-9])
    assert "config.json cannot be read" in refused("generate", copy)
    (copy / "config.json").write_text(config)
    shutil.rmtree(copy / "checkpoints")
    assert "holds no checkpoint yet" in refused("generate", copy)


def test_interrupting_is_quiet(trained, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "restore", interrupt)
    assert command("generate", trained[0]) == (130, "", "")

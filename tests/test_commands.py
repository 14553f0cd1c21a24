"""The commands that read a trained model: what they print, write and draw."""

import os
import re

import numpy as np
from safetensors.numpy import load_file

from miras_jax.training.run import Run
from tests.commands import command, number


def test_generate_continues_the_prompt_the_same_for_the_same_seed(trained):
    workdir = trained[0]

    def text(*options):
        status, out, err = command(
            "generate", workdir, "A single", "--length", 30, *options
        )
        assert (status, err) == (0, "")
        assert out.startswith("A single") and len(out) > len("A single\n")
        return out

    assert text("--seed", 1) == text("--seed", 1) != text("--seed", 2)
    assert text("--temperature", 0) == text("--temperature", 0, "--seed", 2)


def test_an_exported_model_does_what_the_run_does(trained, folder, tmp_path):
    file = tmp_path / "model.safetensors"
    status, out, err = command("export", trained[0], file)
    assert (status, err) == (0, "") and out.startswith(f"{file}: ")
    run = Run.open(trained[0])
    assert f"{run.model.size:,} parameters of step " in out
    arrays = load_file(file)
    for name, array in run.restore("best").state.parameters.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)

    def text(source):
        return command("generate", source, "A single", "--length", 30, "--seed", 1)

    assert text(file) == text(trained[0])

    def page(source):
        argv = ["inspect", source, "--text", folder / "heldout.txt", "--length", 20]
        status, out, err = command(*argv, "--output", tmp_path / "pages")
        assert (status, err) == (0, "")
        page = (tmp_path / "pages" / "heldout.html").read_text()
        return page.replace(str(source), "SOURCE")

    assert page(file) == page(trained[0])
    beside = command("inspect", file, "--text", folder / "heldout.txt")[1]
    assert f"page   {tmp_path / 'inspect' / 'heldout.html'}" in beside


def test_export_takes_the_checkpoint_that_is_asked_for(trained, tmp_path, monkeypatch):
    restore, asked = Run.restore, []

    def recorded(self, which):
        asked.append(which)
        return restore(self, which)

    monkeypatch.setattr(Run, "restore", recorded)
    for i, options in enumerate(([], ["--checkpoint", "last"])):
        file = tmp_path / f"{i}.safetensors"
        assert command("export", trained[0], file, *options)[0] == 0
    assert asked == ["best", "last"]


def test_generate_needs_no_prompt(trained):
    assert command("generate", trained[0], "--length", 5)[0] == 0


def test_evaluate_prints_the_loss_by_position_and_draws_it(trained):
    workdir, summary, _ = trained
    plot = workdir / "loss_by_position.png"
    plot.unlink()
    status, out, _ = command("evaluate", workdir)
    assert status == 0 and str(plot) in out and plot.is_file()
    for name in ("held-out bits per byte", "token perplexity", "word perplexity"):
        assert number(out, name) == number(summary, name)
    contexts = re.findall(r"^(\d+(?: to \d+)?) +[\d.]+$", out, re.M)
    assert contexts == ["1", "2", "3 to 4", "5 to 8", "9 to 16", "17 to 32"]


def test_evaluate_can_read_a_part(trained):
    out = command("evaluate", trained[0], "--windows", 3)[1]
    assert "on 3 of 18 held-out windows" in out and out.count("estimated") == 2


def test_evaluate_can_ask_what_is_recalled(trained):
    status, out, _ = command("evaluate", trained[0], "--windows", 3, "--recall", 64)
    lines = re.findall(
        r"^read (anew|[\d]+ tokens ago) +[\d.]+(, .*recalled)?$", out, re.M
    )
    assert status == 0
    assert [line for line, _ in lines] == ["anew", "32 tokens ago", "64 tokens ago"]


def test_inspect_writes_a_page_and_two_pictures(trained, folder):
    argv = ["inspect", trained[0], "--text", folder / "heldout.txt", "--length", 40]
    status, out, err = command(*argv)
    assert (status, err) == (0, "") and "tokens were left out" in out
    files = [line.split()[1] for line in out.splitlines()[:3]]
    names = [os.path.relpath(file, trained[0]) for file in files]
    ends = (".html", "_text.png", "_curves.png")
    assert names == [f"inspect/heldout{end}" for end in ends]
    assert all(os.path.getsize(file) for file in files)

"""The commands that ask what papers ask: what they print, write and refuse."""

import json
import re
import sys

import pytest

from miras_jax import evaluation
from miras_jax.evaluation import needle
from miras_jax.export import of_path
from tests.commands import command, refused


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    file = tmp_path_factory.mktemp("exported") / "model.safetensors"
    assert command("export", trained[0], file)[0] == 0
    return file


def test_needle_prints_what_is_found_and_draws_it(trained, folder, tmp_path):
    plot = tmp_path / "needle.png"
    argv = ["needle", trained[0], "--lengths", "600,700", "--samples", 2]
    status, out, err = command(*argv, "--plot", plot)
    assert status == 0
    lines = out.splitlines()
    assert lines[0].split() == ["found,", "%", "600", "700"]
    rows = [re.match(r"(\w+) +(\d+\.\d) +(\d+\.\d)$", line)[1] for line in lines[1:4]]
    assert rows == ["noise", "number", "uuid"]
    assert lines[-1] == f"plot  {plot}" and plot.read_bytes().startswith(b"\x89PNG")
    assert err.count("\n") == 6 and "uuid, 700 tokens: " in err


@pytest.fixture
def tasks_asked(monkeypatch):
    """The tasks that are evaluated, with the texts of a model that knows it all."""
    asked = []

    def evaluate(trained, task, number, seed):
        asked.append((task, number, seed))
        return [needle.Score(0.5, task.length > 600)] * number

    monkeypatch.setattr(needle, "evaluate", evaluate)
    return asked


def test_needles_are_hidden_in_the_held_out_text_or_a_file(
    trained, exported, folder, tasks_asked
):
    argv = ["--lengths", "600, 700", "--samples", 3, "--seed", 5]
    status, out, _ = command("needle", trained[0], "--kind", "number", *argv)
    assert status == 0 and out.splitlines()[1].split() == ["number", "0.0", "100.0"]
    file = folder / "heldout.txt"
    assert (
        command("needle", exported, "--haystack", file, *argv, "--kind", "uuid")[0] == 0
    )
    assert command("needle", exported, *argv, "--kind", "noise")[0] == 0
    kinds = [(task.kind, task.length, n, seed) for task, n, seed in tasks_asked]
    assert kinds == [
        (kind, length, 3, 5)
        for kind in ("number", "uuid", "noise")
        for length in (600, 700)
    ]
    text = file.read_text()
    assert [task.prose for task, *_ in tasks_asked] == [text] * 4 + [""] * 2


def test_an_exported_model_finds_what_the_run_finds(trained, exported):
    argv = ["--kind", "noise", "--lengths", "620", "--samples", 3]
    run, file = (command("needle", source, *argv) for source in (trained[0], exported))
    assert run[0] == 0 and run == file


def test_without_lm_eval_it_says_how_to_install_it(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    # As if it had not been imported before.
    monkeypatch.delitem(sys.modules, "miras_jax.evaluation.harness", raising=False)
    monkeypatch.delattr(evaluation, "harness", raising=False)
    error = refused("harness", trained[0], "--tasks", "piqa")
    assert (
        error == "miras: miras harness needs lm_eval: pip install 'miras-jax[eval]'\n"
    )


@pytest.mark.filterwarnings("ignore")  # of what lm_eval imports
def test_harness_prints_the_table_and_writes_the_results(
    trained, tmp_path, monkeypatch
):
    pytest.importorskip(
        "lm_eval", reason="needs the package lm_eval: pip install 'miras-jax[eval]'"
    )
    from miras_jax.evaluation import harness

    asked = {}

    def evaluate(model, tasks, **options):
        print("on the way")
        asked.update(options, tasks=tasks, step=model.step)
        numbers = {"alias": "own", "acc,none": 0.25, "acc_stderr,none": 0.1}
        return {
            "results": {"own": numbers},
            "versions": {"own": 1.0},
            "n-shot": {"own": 0},
            "higher_is_better": {"own": {"acc": True}},
            "pretty_env_info": "of the machine",
        }

    monkeypatch.setattr(harness, "evaluate", evaluate)
    file = tmp_path / "results.json"
    options = ["--tasks", "own,piqa", "--include", tmp_path, "--limit", 4]
    options += ["--num-fewshot", 2, "--max-length", 64, "--output", file]
    status, out, err = command("harness", trained[0], *options)
    assert (status, err) == (0, "on the way\n") and out.startswith("|")
    assert re.search(r"own.*acc.*0\.25", out)
    assert asked == {
        "tasks": ["own", "piqa"],
        "include": str(tmp_path),
        "limit": 4,
        "num_fewshot": 2,
        "max_length": 64,
        "step": of_path(trained[0]).step,
    }
    written = json.loads(file.read_text())
    assert written["results"]["own"]["acc,none"] == 0.25
    assert "pretty_env_info" not in written


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["needle", "{folder}"], "holds no run (no config.json)"),
        (["needle", "{run}", "--lengths", "1,x"], "'x' is no whole number from 1"),
        (
            ["needle", "{run}", "--lengths", "100"],
            "100 tokens do not hold the question",
        ),
        (["needle", "{run}", "--kind", "fork"], "noise, number, uuid; got 'fork'"),
        (["needle", "{run}", "--samples", "0"], "'0' is no whole number from 1"),
        (["needle", "{run}", "--haystack", "{folder}/no.txt"], "no.txt is no file;"),
        (["needle", "{file}"], "no text beside it to hide needles in; give one with"),
        (["harness", "{run}"], "required: --tasks"),
        (["harness", "{run}", "--tasks", "a,,b"], "'a,,b' is no list of names"),
        (
            ["harness", "{run}", "--tasks", "a", "--limit", "0"],
            "'0' is no whole number",
        ),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(
    trained, folder, exported, argv, message
):
    places = {"folder": folder, "run": trained[0], "file": exported}
    error = refused(*[part.format(**places) for part in argv])
    assert error.startswith("miras: ") and message in error

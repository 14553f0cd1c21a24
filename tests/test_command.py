"""The command as a process: how it ends, what it imports and how it is called."""

import os
import subprocess
import sys

import pytest

from miras_jax import cli


def subprocess_of(code, *argv):
    # Buffered, as it is for users: what is left in the buffer must not surface.
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=buffered,
    )


def test_a_reader_that_leaves_ends_it_quietly():
    code = "import sys; from miras_jax.cli import main; sys.exit(main())"
    with subprocess_of(code, "variants") as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 141)


def test_help_imports_nothing_slow():
    code = """
import sys
from miras_jax.cli import main
for command in ([], ["train"], ["generate"], ["evaluate"], ["inspect"], ["variants"]):
    try:
        main([*command, "--help"])
    except SystemExit as end:
        assert end.code == 0
slow = {"jax", "flax", "numpy", "orbax", "grain", "matplotlib", "tokenizers"}
sys.exit(str(sorted(slow & set(sys.modules))) if slow & set(sys.modules) else 0)
"""
    process = subprocess_of(code)
    out, err = process.communicate()
    assert (err, process.returncode) == ("", 0)
    assert out.count("usage: miras") == 6 and "--top-p" in out


@pytest.mark.parametrize(
    ("called", "found", "typed"),
    [
        (".venv/bin/miras", None, ".venv/bin/miras"),
        (".venv/bin/miras", "/usr/bin/miras", ".venv/bin/miras"),
        ("/usr/bin/miras", "/usr/bin/miras", "miras"),
        ("-c", None, "miras"),
    ],
)
def test_commands_are_printed_as_one_has_to_type_them(
    called, found, typed, monkeypatch
):
    monkeypatch.setattr(sys, "argv", [called])
    monkeypatch.setattr(cli.shutil, "which", lambda name: found)
    assert cli._program() == typed

"""What the tests of checkpoints share."""

import shutil
from pathlib import Path

import pytest

from miras_jax.training.checkpoint import Checkpoints
from tests.training.saved import save


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two_steps")
    with Checkpoints(directory) as checkpoints:
        save(checkpoints, 1, loss=0.5)
        save(checkpoints, 2, loss=0.75)
    return directory


@pytest.fixture
def copy(two_steps, tmp_path):
    """A directory with the steps 1 and 2, to be damaged."""
    return Path(shutil.copytree(two_steps, tmp_path / "copy"))

"""Settings of every test, made before JAX starts: eight CPU devices, strict ranks."""

import gc
import itertools
import os
from pathlib import Path

from tests import xla_flags

flags = os.environ.get("XLA_FLAGS", "")
if "--xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {xla_flags(devices=8)}".strip()
# Devices share a pool of threads, by default of eight: a pool full of threads that wait
# for each other would wait for ever.
os.environ.setdefault("NPROC", "32")
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import pytest  # noqa: E402

from tests.commands import folder, trained  # noqa: E402, F401

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes millions of objects that live on: looking through them for cycles as
# often as Python does by default took a fifth of the time.
gc.set_threshold(100_000, 50, 100)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Let go of a module's compiled programs once its tests are through.

    Each one maps memory of its own, Linux grants a process 65,530 such maps, and XLA
    crashes without a word when they run out, which all tests together bring about.
    """
    yield
    jax.clear_caches()


MAPS = Path("/proc/self/maps")
tests_run = itertools.count(1)


@pytest.fixture(autouse=True)
def leave_room_for_programs():
    """The same within a module that has many: looked at every tenth test."""
    yield
    if next(tests_run) % 10 == 0 and MAPS.is_file():
        if MAPS.read_bytes().count(b"\n") > 30_000:
            jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def float64():
    """Double precision inside one test, and nowhere else."""
    with jax.enable_x64(True):
        yield

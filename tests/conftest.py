"""Settings of every test, made before JAX starts: eight CPU devices, strict ranks.

Compiled programs are kept between runs in the user's cache directory.
"""

import os
from pathlib import Path

DEVICES = "--xla_force_host_platform_device_count"
flags = os.environ.get("XLA_FLAGS", "")
if DEVICES not in flags:
    # Eight devices on few cores may wait long for each other before XLA gives up.
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
    os.environ["XLA_FLAGS"] = f"{flags} {DEVICES}=8 {patience}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import pytest  # noqa: E402

user_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
jax.config.update("jax_compilation_cache_dir", str(user_cache / "miras_jax" / "tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    # Workers share the cache: an entry read half written is only compiled anew.
    cached = "ignore:Error reading persistent compilation cache entry"
    config.addinivalue_line("filterwarnings", cached)


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def float64():
    """Double precision inside one test, and nowhere else."""
    with jax.enable_x64(True):
        yield

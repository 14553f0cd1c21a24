"""What is said of kernels for GPUs; compiling them needs NVIDIA's libraries."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.kernels import cases
from pallas_kernels.aot import __main__ as aot
from pallas_kernels.aot import gpu

HAS_COMPILER = gpu.has_compiler()

PROGRAM = """
import sys
import jax, jax.numpy as jnp
from pallas_kernels.aot import gpu
from pallas_kernels.fused_scan import fused_scan

def scan(carry, xs):
    step = lambda c, x, _: (0.5 * c + x.T @ x, x @ c)
    return jax.vmap(lambda c, x: fused_scan(step, c, x, ()))(carry, xs)

gpu.prepare(sys.argv[1])
like = jax.ShapeDtypeStruct((2, 32, 32), jnp.float32)
chunks = jax.ShapeDtypeStruct((2, 3, 16, 32), jnp.float32)
for chip in gpu.CHIPS:
    (usage,) = gpu.usages(sys.argv[1], chip, scan, like, chunks)
    print(chip, usage.threads, 0 < usage.registers < 256, usage.spills)
"""


def test_floor_counts_every_round_of_a_scan():
    def products(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]

    x, w = jnp.zeros((4, 8)), jnp.zeros((8, 8))
    matrix, memory = gpu.floor("h100", products, x, w)
    assert matrix == pytest.approx(5 * 2 * 4 * 8 * 8 / 989.4e12)
    assert memory == pytest.approx(4 * (32 + 64 + 32) / 3.35232e12)


def test_a_table_is_taken_up_where_it_was_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "CHUNKS", 2)
    monkeypatch.setattr(gpu, "prepare", lambda dump: None)
    compiled = []

    def usages(dump, chip, function, *operands):
        compiled.append(function)
        return [gpu.Usage("fused_scan", 256, 128, 0, 1024)] * 2

    monkeypatch.setattr(gpu, "usages", usages)
    path = tmp_path / "table.txt"

    def table(chunk, *names):
        into = ("--into", str(path), "--chunk", chunk, "--variant", *names)
        assert aot.main(["gpu", *into]) == 0
        return path.read_text()

    names = ("linear_attention", "retnet")
    whole = table("16", *names)
    assert len(compiled) == 2
    path.write_text("".join(whole.splitlines(keepends=True)[:5]))
    assert table("16", *names) == whole
    assert len(compiled) == 3
    assert table("16", *names) == whole
    assert len(compiled) == 3

    # Another command has a part of its own.
    longer = table("32", *names)
    assert len(compiled) == 5
    assert longer.startswith(f"{whole}\n$ python -m pallas_kernels.aot gpu")


@pytest.mark.skipif(not HAS_COMPILER, reason="needs pip install 'miras-jax[cuda]'")
def test_a_kernel_compiles_for_every_chip(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.stdout.splitlines() == ["h100 256 True 0", "a100 256 True 0"], run.stderr


@pytest.mark.skipif(HAS_COMPILER, reason="the compiler for GPUs is installed")
def test_without_the_compiler_the_extra_is_named():
    with pytest.raises(RuntimeError, match=r"miras-jax\[cuda\]"):
        gpu.compile_for("h100", jnp.sin, jax.ShapeDtypeStruct((), jnp.float32))

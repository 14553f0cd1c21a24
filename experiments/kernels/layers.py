"""Whole layers, compiled for a TPU: what there is around their kernels.

    python -m experiments.kernels.layers --into experiments/kernels/layers_v5e.txt

One layer of 16 heads of 64, 4 rows of 2,048 tokens in bfloat16, forward and backward:
XLA's estimate of all that is not a kernel (projections, convolution, rates, changes of
layout), in cycles per token and head, what of that matrix products need at the chip's
rate, and the temporary memory of the program. Facts of compiled programs, not timings.

Expected: the table as committed, up to changes of the compiler (libtpu 0.0.42.1).
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from miras_jax.nn import recipes
from pallas_kernels.aot import hlo, tpu
from pallas_kernels.aot.case import Work
from pallas_kernels.fused_scan.program import multiply_adds

LAYERS = ("yaad", "moneta", "memora", "titans", "gated_delta_net", "gla", "rwkv7")
HEADS, HEAD_DIM = 16, 64
ROWS, LENGTH = 4, 2048


def main(arguments: list[str] | None = None) -> None:
    """Print the table, or write it to a file."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m experiments.kernels.layers")
    parser.add_argument("--layers", nargs="+", default=LAYERS)
    parser.add_argument("--chip", choices=tpu.CHIPS, default="v5e")
    parser.add_argument("--into", type=Path, help="a file that the table is written to")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        if options.into:
            file = stack.enter_context(options.into.open("w"))
            stack.enter_context(contextlib.redirect_stdout(file))
            print("$ python -m experiments.kernels.layers", *arguments)
        for line in table(options.layers, options.chip):
            print(line, flush=True)


def table(names, chip: str) -> Iterator[str]:
    """The lines of the table."""
    yield f"# {chip}, per token and head; compile-time figures, not measurements"
    yield f"{'layer':<24}{'around kernels':>15}{'of that matrix':>15}{'MiB':>7}"
    for name in names:
        around, matrix, size = measure(name, chip)
        yield f"{name:<24}{around:>15.1f}{matrix:>15.1f}{size:>7.0f}"


def measure(name: str, chip: str) -> tuple[float, float, float]:
    """Cycles around the kernels of a layer, of its products, and MiB it needs."""
    width = HEADS * HEAD_DIM
    layer = getattr(recipes, name)(HEADS).build(width, 1.0, nnx.Rngs(0))
    graph, params = nnx.split(layer)

    def both(params, x, cotangent):
        outputs, pull_back = jax.vjp(lambda p, x: nnx.merge(graph, p)(x)[0], params, x)
        return outputs, pull_back(cotangent)

    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    x = jax.ShapeDtypeStruct((ROWS, LENGTH, width), jnp.bfloat16)
    program = tpu.compile_for(chip, both, params, x, x)
    with tpu.target("tpu"):
        products = multiply_adds(jax.make_jaxpr(both)(params, x, x).jaxpr)
    floor = tpu.floor(chip, Work(products, 0, 0, {}, {}))
    tokens = ROWS * LENGTH * HEADS
    around = hlo.estimated_cycles(program.as_text()) / tokens
    size = program.memory_analysis().temp_size_in_bytes / 2**20
    return around, floor.matrix / tokens, size


if __name__ == "__main__":
    main()

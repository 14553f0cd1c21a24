"""Fair timing of compiled programs: rounds over all of them, medians, memory by XLA.

Programs that are compared run in turns, so that a slow minute of the machine falls on
all of them; the median over the rounds drops the rounds that were disturbed. A program
is warmed up by one run that is not counted.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from miras_jax import compiler

MATMUL_SIZE = 1024


class Program(NamedTuple):
    """A compiled function with its inputs."""

    compiled: Callable
    inputs: tuple
    megabytes: float  # results and temporaries that it allocates, without its inputs

    def seconds(self) -> float:
        start = time.perf_counter()
        jax.block_until_ready(self.compiled(*self.inputs))
        return time.perf_counter() - start


def compile_program(function: Callable, *inputs) -> Program:
    """`function` at these inputs, compiled but not yet run."""
    program = jax.jit(function, compiler_options=compiler.options())
    compiled = program.lower(*inputs).compile()
    sizes = compiled.memory_analysis()
    allocated = sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    return Program(compiled, inputs, allocated / 1e6)


def matmul_program() -> Program:
    """One float32 product of two 1,024 x 1,024 matrices: the machine's own rate."""
    keys = jax.random.split(jax.random.key(0), 2)
    x, y = (jax.random.normal(k, (MATMUL_SIZE, MATMUL_SIZE)) for k in keys)
    return compile_program(jnp.matmul, x, y)


def median_seconds(
    programs: Sequence[Program], repeats: int
) -> tuple[list[float], float]:
    """Median seconds of each program, and FLOP/s of the matrix product among them.

    The product is timed before every program, in every round.
    """
    matmul = matmul_program()
    for program in (matmul, *programs):
        program.seconds()
    matmul_times, times = [], [[] for _ in programs]
    for _ in range(repeats):
        for program, own in zip(programs, times, strict=True):
            matmul_times.append(matmul.seconds())
            own.append(program.seconds())
    rate = 2 * MATMUL_SIZE**3 / statistics.median(matmul_times)
    return [statistics.median(own) for own in times], rate

"""Compiler options that every jitted program of the project is built with."""

import jax


def options() -> dict[str, str]:
    """For `jax.jit(compiler_options=...)` on the default backend.

    XLA:CPU hands reductions to a library that takes many times as long as XLA's own
    loops on the column sums of a backward pass; this leaves it the matrix products
    only. Same numbers up to the order of summation.
    """
    if jax.default_backend() != "cpu":
        return {}
    return {
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
    }

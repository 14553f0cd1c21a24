"""The steps that every kernel test runs on, and what is compared of them.

A case is a step, its inputs for one element, and which of them differ between elements:
everything that the kernels treat differently has a row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests import core

BATCH, HEADS = 2, 4

# Which operands have the batch and the head axis.
BOTH = (True, True)
BATCH_ONLY = (True, False)
HEADS_ONLY = (False, True)
NEITHER = (False, False)


class Case(NamedTuple):
    """A step and how its operands are batched: (carry, xs, consts)."""

    name: str
    step: Callable
    carry: dict[str, tuple[int, ...]]
    x: dict[str, tuple[int, ...]]
    consts: dict[str, tuple[int, ...]]
    axes: tuple = (BOTH, BOTH, HEADS_ONLY)
    dtype: Any = np.float32


TRIANGLE = np.tri(8)


def memory(carry, x, consts):
    """A small nonlinear memory: matrices, a captured constant, rates as rows."""
    w = carry["w"]
    keys = x["keys"]
    mixed = jnp.matmul(jnp.asarray(TRIANGLE, w.dtype), jnp.tanh(keys @ w))
    error = mixed * consts["scale"][None] - x["values"]
    error = error * x["rate"][:, None]
    return {"w": 0.9 * w - keys.T @ error}, (keys @ w + error).astype(keys.dtype)


def counting(carry, x, consts):
    """Leaves of every rank and of dtypes without derivative."""
    open_ = jnp.where(x["open"], 1.0, 0.25)
    total = carry["total"] + open_ * jnp.sum(x["values"] * x["scalar"])
    w = carry["w"] * 0.5 + total
    after = {"total": total, "count": carry["count"] + 1, "w": w, "place": 0}
    scaled = after["w"][None] * consts["scale"]
    return after, {"w": scaled, "count": after["count"]}


def window(carry, x, consts):
    """Rows of the chunk before behind those of this one."""
    past = carry["past"]
    rows = jnp.concatenate([x["keys"], past])
    read = jnp.exp(0.3 * rows @ consts["w"])
    after = jnp.asarray(np.eye(len(past), len(rows), 1), rows.dtype) @ rows
    return {"past": past + 0.5 * after}, read @ read.T


SIZES = {"keys": (8, 16), "values": (8, 24), "rate": (8,)}
CASES = [
    Case("memory", memory, {"w": (16, 24)}, SIZES, {"scale": (24,)}),
    Case(
        "memory-start-shared-by-batch",
        memory,
        {"w": (16, 24)},
        SIZES,
        {"scale": (24,)},
        (HEADS_ONLY, BOTH, NEITHER),
    ),
    Case(
        "memory-tokens-shared-by-heads",
        memory,
        {"w": (16, 24)},
        SIZES,
        {"scale": (24,)},
        (BOTH, BATCH_ONLY, BATCH_ONLY),
    ),
    Case(
        "memory-bfloat16",
        memory,
        {"w": (16, 24)},
        SIZES,
        {"scale": (24,)},
        dtype=jnp.bfloat16,
    ),
    Case("window", window, {"past": (15, 24)}, {"keys": (16, 24)}, {"w": (24, 24)}),
    Case(
        "every-rank",
        counting,
        {"total": (), "count": (), "w": (3, 5), "place": ()},
        {"values": (7,), "scalar": (), "open": ()},
        {"scale": (2, 3, 5)},
    ),
]


def inputs(case: Case, chunks: int, seed: int = 0):
    """Random carry, xs and consts of a case, with the batch axes that each has."""
    rng = np.random.default_rng(seed)

    def make(name, shape, axes, lead=()):
        sizes = [n for n, has in zip((BATCH, HEADS), axes, strict=True) if has]
        full = (*sizes, *lead, *shape)
        if name in ("count", "place"):
            return rng.integers(0, 9, full).astype(np.int32)
        if name == "open":
            return rng.integers(0, 2, full).astype(bool)
        dtype = np.float32 if name == "w" else case.dtype
        return jnp.asarray(0.5 * rng.normal(size=full), dtype)

    return tuple(
        {name: make(name, shape, axes, lead) for name, shape in part.items()}
        for part, axes, lead in zip(
            (case.carry, case.x, case.consts),
            case.axes,
            ((), (chunks,), ()),
            strict=True,
        )
    )


def over_batch(function, axes):
    """The function of one element, over heads and batch by two nested vmaps."""
    for position in (1, 0):
        function = jax.vmap(function, tuple(0 if a[position] else None for a in axes))
    return function


def results(function, operands, seed=1):
    """Outputs and the cotangent of every operand for a random one of the outputs."""
    leaves, structure = jax.tree.flatten(operands)
    moving = [jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating) for x in leaves]

    def of_floats(given):
        given = iter(given)
        full = [next(given) if m else x for m, x in zip(moving, leaves, strict=True)]
        return function(*jax.tree.unflatten(structure, full))

    @core.jit
    def both(given):
        outputs, pull = jax.vjp(of_floats, given)
        rng = np.random.default_rng(seed)

        def cotangent(y):
            if not jnp.issubdtype(y.dtype, jnp.floating):
                return np.zeros(y.shape, jax.dtypes.float0)
            return jnp.asarray(rng.normal(size=y.shape), y.dtype)

        return outputs, pull(jax.tree.map(cotangent, outputs))[0]

    outputs, gradients = both([x for x, m in zip(leaves, moving, strict=True) if m])
    paths = [p for p, _ in jax.tree.leaves_with_path(operands)]
    names = [jax.tree_util.keystr(p) for p, m in zip(paths, moving, strict=True) if m]
    named = {jax.tree_util.keystr(p): y for p, y in jax.tree.leaves_with_path(outputs)}
    return named | {f"d{n}": g for n, g in zip(names, gradients, strict=True)}


def errors(actual, expected):
    """RMS of each tensor's difference over the RMS of the expected one."""
    assert actual.keys() == expected.keys()
    found = {}
    for name in expected:
        a, e = (np.asarray(x[name], np.float64) for x in (actual, expected))
        assert a.shape == e.shape and actual[name].dtype == expected[name].dtype, name
        size = np.sqrt(np.mean(e**2))
        found[name] = np.sqrt(np.mean((a - e) ** 2)) / (size if size else 1)
    return found

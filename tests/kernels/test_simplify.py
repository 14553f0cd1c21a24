"""What a kernel need not compute is gone from a traced step; its results are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fused_scan import mosaic, program
from pallas_kernels.fused_scan.program import Struct

X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
MASK = np.tri(4, 8, dtype=np.float32)


def whole(x):
    """Of more digits than a float32 has."""
    return (x * 1e8).astype(jnp.int32) * 2 + 1


def traced(function, x=X):
    return program._trace(lambda *xs: [function(*xs)], Struct(x.shape, x.dtype))


def operations(function):
    return [equation.primitive.name for equation in function.jaxpr.eqns]


@pytest.mark.parametrize(
    "function, left",
    [
        (lambda x: x * jnp.exp(jnp.zeros((4, 1))), []),
        (lambda x: jnp.ones((4, 8)) * x, []),
        (lambda x: x + (jnp.ones((4, 8)) - 1), []),
        (lambda x: x - jnp.log(jnp.ones((4, 8))), []),
        (lambda x: jnp.sin(x) + jnp.sin(x), ["sin", "add"]),
        (lambda x: x * (jnp.asarray(MASK) + 1), ["mul"]),
        (lambda x: jnp.sum(x[None], axis=0), ["broadcast_in_dim", "reshape"]),
    ],
    ids=("ones", "ones-first", "zeros", "less-zeros", "twice", "constants", "one-long"),
)
def test_nothing_is_computed_in_vain(function, left):
    simple = traced(lambda x: jnp.cos(function(x)))
    assert operations(simple) == [*left, "cos"]
    expected = jnp.cos(function(X))
    np.testing.assert_array_equal(simple(simple.constants, X)[0], expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.ones((4, 8)) - x,
        lambda x: 1 / x,
        lambda x: whole(x).astype(x.dtype).astype(jnp.int32),
        lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
        lambda x: jnp.sum(x, axis=0) + jnp.sum(x, axis=0, where=MASK > 0),
    ],
    ids=("from-ones", "of-one", "integers", "rounded", "other-sums"),
)
def test_what_counts_stays(function):
    simple = traced(function)
    assert not np.array_equal(function(X), X)
    np.testing.assert_array_equal(simple(simple.constants, X)[0], function(X))


def test_a_number_that_is_widened_and_rounded_again_is_itself():
    x = X.astype(jnp.bfloat16)
    simple = traced(lambda x: jnp.sin(x.astype(np.float32).astype(jnp.bfloat16)), x)
    assert operations(simple) == ["sin"]


def test_equal_constants_are_one():
    same = traced(lambda x: (x * MASK) @ (jnp.sin(x) * MASK.copy()).T)
    assert len(same.constants) == 1


def test_products_that_are_turned_for_the_compiler_are_the_same():
    """x^T y where x is the y of another one, and neither of others."""

    def products(x, y, z):
        first = jax.lax.dot_general(x, y, (((0,), (0,)), ((), ())))
        second = jax.lax.dot_general(z, x, (((0,), (0,)), ((), ())))
        return [first, second]

    rng = np.random.default_rng(0)
    operands = [rng.normal(size=(8, n)).astype(np.float32) for n in (3, 4, 5)]
    given = program._trace(products, *operands)
    turned = mosaic.compilable(given)
    assert operations(turned) == ["dot_general", "transpose", "dot_general"]
    expected, actual = given((), *operands), turned((), *operands)
    for one, other in zip(expected, actual, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)

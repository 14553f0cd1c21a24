"""Products inside a block: their own derivative is JAX's, of every order of axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from miras_jax import retention
from miras_jax.core.product import Dot, NarrowDot, column_sums, prefix_sum, total
from pallas_kernels.fused_scan import target

FORMS = {
    "x y": (lambda dot: dot, (3, 4), (4, 5), "ij,jk"),
    "x y^T": (lambda dot: dot.rows, (3, 4), (5, 4), "ij,kj"),
    "x^T y": (lambda dot: dot.columns, (4, 3), (4, 5), "ji,jk"),
    "one row": (lambda dot: dot, (1, 4), (4, 5), "ij,jk"),
    "one row, y^T": (lambda dot: dot.rows, (1, 4), (5, 4), "ij,kj"),
    "outer": (lambda dot: dot.columns, (1, 3), (1, 5), "ji,jk"),
    "single": (lambda dot: dot.rows, (1, 4), (1, 4), "ij,kj"),
}


def _operands(shapes, dtype):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(2, *s)), dtype) for s in shapes)


@pytest.mark.parametrize("form", FORMS)
def test_derivatives_are_those_of_einsum(form):
    pick, *shapes, letters = FORMS[form]
    product = pick(Dot(jnp.dtype("float32"), jnp.dtype("float32")))
    operands = _operands(shapes, jnp.float32)

    def ours(x, y):
        return jnp.sum(jnp.sin(jax.vmap(product)(x, y)))

    def theirs(x, y):
        x_axes, y_axes = letters.split(",")
        return jnp.sum(jnp.sin(jnp.einsum(f"b{x_axes},b{y_axes}->bik", x, y)))

    def second(function):
        def slope(x, y):
            return sum(jnp.sum(d**2) for d in jax.grad(function, (0, 1))(x, y))

        return jax.grad(slope, (0, 1))

    for derivative in (lambda f: jax.grad(f, (0, 1)), second):
        pairs = zip(
            derivative(ours)(*operands), derivative(theirs)(*operands), strict=True
        )
        for own, expected in pairs:
            np.testing.assert_allclose(own, expected, rtol=2e-5, atol=2e-5)


def test_float64_has_a_forward_mode(float64):
    dot = Dot(jnp.dtype("float64"), jnp.dtype("float64"))
    x, y = _operands([(3, 4), (5, 4)], jnp.float64)
    product = jax.vmap(dot.rows)
    _, tangent = jax.jvp(product, (x, y), (x, y))
    np.testing.assert_allclose(tangent, 2 * product(x, y), rtol=1e-12)


@pytest.mark.parametrize("rows", [1, 7, 64, 96])
def test_total_is_the_sum(rows, float64):
    (x,) = _operands([(rows, 5)], jnp.float64)
    sums, pull_back = jax.vjp(jax.vmap(total), x)
    assert sums.shape == (2, 1, 1)
    np.testing.assert_allclose(sums[:, 0, 0], jnp.sum(x, (1, 2)), rtol=1e-12)
    np.testing.assert_array_equal(pull_back(jnp.ones_like(sums))[0], jnp.ones_like(x))


@pytest.mark.parametrize(
    "gate", [retention.Keep(), retention.Decay(), retention.Lq(4.0), retention.Lq(3.0)]
)
def test_weights_of_a_proportional_gate_are_the_scaled_dual(gate, float64):
    (dual,) = _operands([(6, 5)], jnp.float64)
    assert gate.proportional
    for a in dual:
        np.testing.assert_allclose(gate.weights(a), gate.scale(a) * a, rtol=1e-12)


@pytest.mark.parametrize(
    "gate", [retention.Decay(), retention.Lq(4.0), retention.Lq(3.5), retention.Lq(6.0)]
)
def test_scales_are_those_of_matrices_of_these_sizes(gate, float64):
    (duals,) = _operands([(6, 5)], jnp.float64)
    duals = [a / jnp.linalg.norm(a) for a in duals]
    sizes = jnp.asarray([[0.3], [7.0]])
    pairs = zip(sizes, duals, strict=True)
    expected = jnp.stack([gate.scale(size[0] * a).reshape(1) for size, a in pairs])
    np.testing.assert_allclose(gate.scales(duals, sizes), expected, rtol=1e-12)


@pytest.mark.parametrize("gate", [retention.Lq(4.0, "mirror"), retention.KL()])
def test_other_gates_are_not_proportional(gate):
    assert not gate.proportional


@pytest.mark.parametrize("form", ["x y", "x y^T", "x^T y"])
def test_products_with_what_bfloat16_holds_are_in_full_precision(form):
    pick, *shapes, letters = FORMS[form]
    x, y = (operand[0] for operand in _operands(shapes, jnp.float32))
    y = y.astype(jnp.bfloat16).astype(jnp.float32)
    with target("tpu", interpret=True):
        found = pick(NarrowDot(x.dtype, x.dtype))(x, y)
    expected = np.einsum(f"{letters}->ik", *(np.asarray(o, np.float64) for o in (x, y)))
    assert np.max(np.abs(found - expected)) < 1e-6


@pytest.mark.parametrize(
    "precision, least, most", [(jnp.float32, 0, 1e-7), (jnp.bfloat16, 1e-7, 2e-6)]
)
def test_prefix_sums_of_kernels(precision, least, most):
    """Those of logs that bfloat16 products will multiply take fewer parts of them."""
    (x,) = _operands([(64, 3)], jnp.float32)
    with target("tpu", interpret=True):
        found = prefix_sum(np.tri(64), x[0], precision)
        slope = jax.grad(lambda x: jnp.sum(prefix_sum(np.tri(64), x, precision)[5]))
        gradient = slope(x[0])
    error = np.max(np.abs(found - np.cumsum(np.asarray(x[0], np.float64), axis=0)))
    assert least <= error / np.sum(np.abs(x[0]), axis=0).max() < most
    assert np.array_equal(gradient, np.arange(64)[:, None] <= np.full(3, 5))


def test_column_sums_of_kernels():
    """And no derivative of which columns there are."""
    x, pick = (o[0] for o in _operands([(16, 16), (16, 23)], jnp.float32))
    pick = (pick > 0).astype(pick.dtype)
    with target("tpu", interpret=True):
        found = column_sums(x, pick)
        slope = jax.grad(lambda x, pick: jnp.sum(column_sums(x, pick)[3]), (0, 1))
        of_x, of_pick = slope(x, pick)
    assert np.max(np.abs(found - np.asarray(x, np.float64) @ pick)) < 1e-6
    assert np.array_equal(of_x, np.outer(np.arange(16) == 3, pick.sum(axis=1)))
    assert not of_pick.any()

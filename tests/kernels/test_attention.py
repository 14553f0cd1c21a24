"""Attention: the plain code against NumPy, and JAX's kernels against the plain code."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import miras_jax as miras
from miras_jax import variants
from miras_jax.errors import UserError
from pallas_kernels.aot import tpu
from pallas_kernels.attention import attention, implementation_of, reference
from pallas_kernels.fused_scan import Unsupported, split_over, target
from tests.core import error, jit
from tests.kernels import errors, results


def inputs(batch, length, total, heads, groups, channels, values, dtype=np.float32):
    """Queries far from a plain mean, keys and values; documents of uneven length."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=(batch, *shape)), dtype)

    segments = np.sort(rng.integers(-1, 3, (batch, total))).astype(np.int32)
    queries = 3 * normal(length, heads, channels)
    return (
        queries,
        normal(total, groups, channels),
        normal(total, groups, values),
    ), segments


def oracle(queries, keys, values, segments, window, always):
    """Token by token, head by head."""
    batch, length, heads, channels = queries.shape
    total, groups = keys.shape[1:3]
    y = np.zeros((batch, length, heads, values.shape[3]))
    for b, t, h in np.ndindex(batch, length, heads):
        group, place = h * groups // heads, total - length + t
        first = 0 if window is None else max(0, place + 1 - window)
        own = [
            s for s in range(first, place + 1) if segments[b, s] == segments[b, place]
        ]
        k, v = (
            np.concatenate([a[:, group], x[b, own, group]])
            for a, x in zip(always, (keys, values), strict=True)
        )
        weights = np.exp(k @ queries[b, t, h] / channels**0.5)
        y[b, t, h] = weights @ v / weights.sum()
    return y


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("window, before", [(None, 4), (3, 0), (7, 2), (3, 9)])
def test_the_plain_code_is_the_definition(window, before, monkeypatch):
    """Tiles of four queries; fewer older keys than a window reaches, and more."""
    monkeypatch.setattr(reference, "QUERY_TILE", 4)
    monkeypatch.setattr(reference, "LEAST_TILE", 4)
    operands, segments = inputs(2, 10, 10 + before, 4, 2, 3, 5, np.float64)
    always = np.random.default_rng(1).normal(size=(2, 3, 2, 5))
    always = (always[0, :, :, :3], always[1])
    expected = oracle(*map(np.asarray, operands), segments, window, always)
    actual = jit(partial(attention, window=window))(
        *operands, segments=segments, always=always
    )
    assert error(actual, expected) < 1e-12


def both(operands, implementation, segments, window):
    def read(*operands):
        return attention(
            *operands, segments=segments, window=window, implementation=implementation
        )

    return results(read, operands)


# What the kernel pads, skips and shares, in few calls: all are compiled.
TPU_CASES = {
    "documents-grouped-window-past": ((2, 300, 420, 4, 2, 8, 16), True, 100),
    "long-bfloat16": ((1, 520, 520, 1, 1, 8, 8, jnp.bfloat16), False, None),
}


@pytest.mark.parametrize("name", TPU_CASES)
def test_the_kernels_of_a_tpu_give_the_same(name):
    """Outputs and gradients, at lengths that are no multiple of a block."""
    sizes, has_segments, window = TPU_CASES[name]
    operands, segments = inputs(*sizes)
    segments = segments if has_segments else None
    expected = both(operands, "reference", segments, window)
    with target("tpu", interpret=True):
        found = errors(both(operands, "tpu", segments, window), expected)
    assert max(found.values()) < (2e-6 if "bfloat16" not in name else 1e-2), found


def test_on_a_mesh_each_device_reads_its_own_rows_and_heads():
    axes = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=axes)
    operands, segments = inputs(2, 130, 130, 4, 2, 8, 8)
    expected = jit(attention)(*operands, segments=segments)
    place = NamedSharding(mesh, P("data", None, "model"))
    with target("tpu", interpret=True), split_over(mesh, "data", "model"):
        compiled = jit(attention).lower(
            *jax.device_put(operands, place),
            segments=jax.device_put(segments, NamedSharding(mesh, P("data"))),
        )
        actual = compiled.compile()(*operands, segments=segments)
    assert actual.sharding.spec == P("data", None, "model")
    assert error(actual, expected) < 2e-6


def test_rules_read_by_the_kernels_under_vmap_and_remat():
    """A window that is half empty, and what two heads of two rows make of it."""
    rule = variants.sliding_window_attention()
    params = rule.init(jax.random.key(0), 8, 8)
    rng = np.random.default_rng(0)
    parts = (jnp.asarray(rng.normal(size=(2, 2, 140, 8)), np.float32) for _ in "qkv")

    def outputs(implementation):
        @jax.checkpoint
        def read(*parts):
            tokens = miras.Tokens(*parts, miras.Rates())
            state = rule.start(params)
            return miras.run(
                rule, params, state, tokens, implementation=implementation
            )[0]

        def loss(parts):
            return jnp.sum(jnp.sin(jax.vmap(jax.vmap(read))(*parts)))

        return jit(jax.grad(loss))

    parts = tuple(parts)
    expected = outputs("definition")(parts)
    with target("tpu", interpret=True):
        actual = outputs("pallas")(parts)
    assert max(map(error, actual, expected)) < 2e-6


def shapes(channels, dtype, heads=4, sharding=None):
    """Of 160 tokens; two heads of keys."""
    return [
        jax.ShapeDtypeStruct((2, 160, n, channels), dtype, sharding=sharding)
        for n in (heads, 2, 2)
    ]


def forward_and_backward(segments=None, window=None):
    def run(*operands):
        def read(*operands):
            return attention(*operands, segments=segments, window=window)

        y, pull = jax.vjp(read, *operands)
        return y, pull(y)

    return run


@pytest.fixture
def compiler():
    """TPU: one kernel forward, two backward, by the real compiler."""
    pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is missing")


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_heads_of_128_channels_compile(dtype):
    run = forward_and_backward(jnp.zeros((2, 160), jnp.int32), window=40)
    program = tpu.compile_for("v5e", run, *shapes(128, dtype))
    assert program.as_text().count('"tpu_custom_call"') == 3


@pytest.mark.usefixtures("compiler")
def test_heads_of_64_channels_compile_for_a_mesh():
    tpu.prepare()
    devices = np.array(tpu.topology("v5e").devices).reshape(2, 2)
    mesh = Mesh(devices, ("data", "model"))
    place = NamedSharding(mesh, P("data", None, "model"))
    operands = shapes(64, jnp.bfloat16, sharding=place)
    with target("tpu"), split_over(mesh, "data", "model"):
        lowered = jax.jit(forward_and_backward()).lower(*operands)
    text = lowered.compile().as_text()
    assert text.count('"tpu_custom_call"') == 3
    assert "all-" not in text and "collective-" not in text


def lowered_for_cuda(*operands, **options):
    with target("gpu"):
        traced = jax.jit(forward_and_backward(**options)).trace(*operands)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


# On a GPU, as far as can be seen without one.


@pytest.fixture
def with_cudnn(monkeypatch):
    """JAX asks the library for its version only, until a program is compiled."""
    version = SimpleNamespace(cudnn_get_version=lambda: 91000)
    monkeypatch.setattr(cudnn, "cuda_versions", version)


@pytest.mark.usefixtures("with_cudnn")
@pytest.mark.parametrize("window", [None, 40])
def test_cudnn_is_called(window):
    text = lowered_for_cuda(*shapes(64, jnp.bfloat16), window=window)
    assert text.count("@__cudnn$fmhaSoftmax(") == 1
    assert text.count("@__cudnn$fmhaSoftmaxBackward(") == 1
    length = f"sliding_window_length\\22: {window or 0}"
    assert text.count(length) == 2


@pytest.mark.usefixtures("with_cudnn")
@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"dtype": jnp.float32}, "float32"),
        ({"channels": 20, "window": 40}, "multiple of 8.*no window"),
        ({"channels": 256}, "<= 128"),
        ({"segments": np.zeros((2, 160), np.int32), "window": 40}, "no window"),
    ],
)
def test_what_no_kernel_takes_is_plain_or_an_error_that_says_why(changes, reason):
    options = {"channels": 64, "dtype": jnp.bfloat16} | changes
    operands = [
        jnp.zeros(x.shape, x.dtype)
        for x in shapes(options.pop("channels"), options.pop("dtype"))
    ]
    with target("gpu"):
        assert implementation_of(*operands, **options) == "reference"
        with pytest.raises(Unsupported, match=reason):
            attention(*operands, **options, implementation="gpu")


def test_without_cudnn_there_is_the_kernel_in_triton():
    text = lowered_for_cuda(*shapes(64, jnp.bfloat16))
    assert "cudnn" not in text and text.count("__gpu$xla.gpu.triton") == 3


def test_the_kernel_in_triton_gives_the_same():
    operands, segments = inputs(2, 150, 150, 4, 2, 16, 16, jnp.bfloat16)
    expected = both(operands, "reference", segments, None)
    with target("gpu", interpret=True):
        found = errors(both(operands, "gpu", segments, None), expected)
    assert max(found.values()) < 1e-2, found


# The choice.


def test_on_a_cpu_the_code_is_plain():
    operands, _ = inputs(1, 128, 128, 1, 1, 8, 8)
    assert implementation_of(*operands) == "reference"
    with pytest.raises(ValueError, match="needs a TPU and the backend is cpu"):
        attention(*operands, implementation="tpu")
    with pytest.raises(ValueError, match="no implementation 'splash'"):
        attention(*operands, implementation="splash")


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"length": 127}, "127 tokens"),
        ({"dtype": jnp.float16}, "float16"),
        ({"always": np.zeros((2, 1, 1, 8))}, "all tokens see"),
    ],
)
def test_what_a_tpu_kernel_does_not_take(changes, reason):
    options = {"length": 128, "dtype": np.float32} | changes
    length, dtype = options.pop("length"), options.pop("dtype")
    operands, _ = inputs(1, length, 128, 1, 1, 8, 8, dtype)
    with target("tpu"):
        assert implementation_of(*operands, **options) == "reference"
        with pytest.raises(Unsupported, match=reason):
            attention(*operands, **options, implementation="tpu")


def test_a_rule_says_why_its_kernel_cannot_run():
    rule = variants.softmax_attention()
    params = rule.init(jax.random.key(0), 8, 8)
    token = np.ones((1, 8), np.float32)
    tokens = miras.Tokens(token, token, token, miras.Rates())
    with target("tpu"), pytest.raises(UserError, match="1 tokens are less"):
        state = rule.start(params)
        miras.run(rule, params, state, tokens, implementation="pallas")

"""Rows of several documents and of padding: each document is read as if alone."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from miras_jax import Rule, memory, variants
from miras_jax.core import engine
from miras_jax.nn.attention import Attention
from miras_jax.nn.miras import Miras
from miras_jax.nn.model import Model
from miras_jax.nn.titans import MAC, MAG, MAL
from miras_jax.nn.tnt import TNT
from tests.core import error, jit
from tests.nn import MIXERS, VOCAB, WINDOW, Program, miras, model, shaken

WIDTH, LENGTH = 32, 37
# Padding before, between and after; one document shorter than the convolution.
PLACES = (slice(8, 24), slice(24, 26), slice(32, 34))


@pytest.fixture(autouse=True)
def short_tiles(monkeypatch):
    """Exact linear rules run in tiles of eight tokens, as the others in chunks."""
    monkeypatch.setattr(engine, "LINEAR_TILE", 8)


def ids(places=PLACES, length=LENGTH):
    segment_ids = np.zeros((1, length), np.int32)
    for number, place in enumerate(places):
        segment_ids[0, place] = number + 1
    return segment_ids


GROUPED = Miras(
    replace(variants.gated_delta_net()),
    num_heads=4,
    num_kv_heads=2,
    key_dim=8,
    value_dim=12,
)
CHUNKED = Miras(Rule(memory.Linear(), chunk_size=8), num_heads=2)
FAST = Miras(Rule(memory.Linear(), chunk_size=4), num_heads=2)
WINDOWED = Attention(num_heads=2, window=WINDOW, persistent=2)
LAYERS = {
    "chunked": CHUNKED,
    "grouped": GROUPED,
    "delta_product": MIXERS["delta_product"][0],
    "attention": Attention(num_heads=4, num_kv_heads=2),
    "window": Attention(num_heads=2, window=WINDOW),
    "mac": MAC(FAST, segment=8, num_heads=2, persistent=2),
    "mag": MAG(FAST, WINDOWED),
    "mal": MAL(FAST, WINDOWED),
    "tnt": lambda: TNT(CHUNKED, (FAST,), shard=8),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", LAYERS)
def test_packed_documents_equal_separate_runs(name):
    """Outputs, and gradients of the parameters and of what the layer read."""
    mixer = LAYERS[name]
    # What TNT asks of its shards depends on the length of tiles.
    mixer = mixer() if callable(mixer) else mixer
    graph, params = nnx.split(mixer.build(WIDTH, 1.0, nnx.Rngs(0)))
    params = jax.tree.map(lambda p: p.astype(jnp.float64), shaken(params))
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(2, 1, LENGTH, WIDTH))

    def loss(params, x, weights, segment_ids):
        y, _ = nnx.merge(graph, params)(x, None, segment_ids)
        return jnp.sum(y * weights), y

    read = jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, packed), (of_params, of_x) = read(
        params, x, weights * (ids() != 0)[..., None], ids()
    )
    total = jax.tree.map(jnp.zeros_like, of_params)
    for place in PLACES:
        (_, alone), (part, of_part) = read(params, x[:, place], weights[:, place], None)
        assert error(packed[:, place], alone) < 1e-10
        assert error(of_x[:, place], of_part) < 1e-10
        total = jax.tree.map(jnp.add, total, part)
    assert not np.any(np.asarray(of_x)[ids() == 0])
    for a, b in zip(*map(jax.tree.leaves, (of_params, total)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10 * np.abs(b).max())


HYBRID = (CHUNKED, miras(variants.retnet()), LAYERS["window"])


@pytest.fixture(scope="module")
def hybrid():
    return Program(model(HYBRID, groups=1))


@cache
def read(program):
    """Compiled once for all tests."""
    return jit(lambda p, tokens, ids, cache: program.model(p)(tokens, cache, ids))


def test_a_hybrid_reads_packed_documents_as_separate_ones(hybrid):
    params = shaken(hybrid.initial)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, LENGTH))
    go = read(hybrid)
    packed, _ = go(params, tokens, ids(), None)
    for place in PLACES:
        alone, _ = go(params, tokens[:, place], None, None)
        assert error(packed[:, place], alone) < 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_continued_like_its_rows(hybrid, side):
    """Prompts of unequal length, read at once and then token by token."""
    params = shaken(hybrid.initial)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, n) for n in (2, 11, 17)]
    following = rng.integers(0, VOCAB, (3, 9))
    tokens, segment_ids = np.zeros((2, 3, 17), int)
    for row, prompt in enumerate(prompts):
        place = slice(-len(prompt), None) if side == "left" else slice(len(prompt))
        tokens[row, place], segment_ids[row, place] = prompt, 1
    go = read(hybrid)
    lm = hybrid.model(params)
    padded, cache = go(params, tokens, segment_ids, lm.start(3, 40))
    outputs = []
    for t in range(9):
        output, cache = go(params, following[:, t : t + 1], None, cache)
        outputs.append(output)
    together = np.concatenate(outputs, axis=1)
    for row, prompt in enumerate(prompts):
        whole = np.concatenate([prompt, following[row]])
        # One length for all: what follows has no part in it.
        whole = np.pad(whole, (0, 26 - len(whole)))[None]
        alone, _ = go(params, whole, None, None)
        assert error(padded[row][segment_ids[row] == 1], alone[0, : len(prompt)]) < 1e-4
        after = alone[0, len(prompt) : len(prompt) + 9]
        assert error(together[row], after) < 1e-4


def test_reading_packed_rows_in_parts_gives_the_whole(hybrid):
    params = shaken(hybrid.initial)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, 48))
    segment_ids = ids((slice(0, 18), slice(24, 30), slice(32, 48)), 48)
    go = read(hybrid)
    whole, _ = go(params, tokens, segment_ids, None)
    cache, outputs = hybrid.model(params).start(1, 48), []
    for first in range(0, 48, 12):
        part = slice(first, first + 12)
        output, cache = go(params, tokens[:, part], segment_ids[:, part], cache)
        outputs.append(output)
    real = segment_ids != 0
    assert error(np.concatenate(outputs, axis=1)[real], whole[real]) < 1e-4


def test_gradients_flow_through_the_cache(hybrid):
    """What is read in two calls has the gradients of what is read in one."""
    params = shaken(hybrid.initial)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, 22))
    weights = np.random.default_rng(1).normal(size=(1, 22, VOCAB))

    def whole(params):
        return jnp.sum(hybrid.model(params)(tokens)[0] * weights)

    def parts(params):
        lm = hybrid.model(params)
        first, cache = lm(tokens[:, :11], lm.start(1, 22))
        second, _ = lm(tokens[:, 11:], cache)
        return jnp.sum(jnp.concatenate([first, second], axis=1) * weights)

    gradients = [jit(jax.grad(loss))(params) for loss in (parts, whole)]
    for actual, expected in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert error(actual, expected) < 1e-3


def test_grouped_heads_read_one_memory():
    """As many heads of queries with their keys repeated, one memory for two."""
    layer = GROUPED.build(WIDTH, 1.0, nnx.Rngs(0))
    cache = layer.start(3, 10, jnp.float32)
    assert cache.memory.dual[0].shape == (3, 2, 8, 12)
    wide = replace(GROUPED, num_kv_heads=None).build(WIDTH, 1.0, nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 10, WIDTH)).astype(np.float32)

    def repeated(narrow, channels):
        parts = np.split(np.asarray(narrow), np.cumsum(channels)[:-1], axis=-1)
        heads = [np.split(part, 2, axis=-1) for part in parts[1:]]
        spread = [np.concatenate([a, a, b, b], axis=-1) for a, b in heads]
        return jnp.asarray(np.concatenate([parts[0], *spread], axis=-1))

    sizes = [count * dim for count, dim in layer.parts]
    wide.qkv.weight[...] = repeated(layer.qkv.weight[...], sizes)
    wide.convolution.weight[...] = repeated(layer.convolution.weight[...], sizes)
    for name, rate in layer.rates.items():
        projection = wide.rates[name].projection
        projection.weight[...] = jnp.repeat(rate.projection.weight[...], 2, axis=-1)
        projection.bias[...] = jnp.repeat(rate.projection.bias[...], 2)
    wide.output.gate.weight[...] = layer.output.gate.weight[...]
    wide.output.projection.weight[...] = layer.output.projection.weight[...]

    def read(layer):
        graph, params = nnx.split(layer)
        return jit(lambda params: nnx.merge(graph, params)(x)[0])(params)

    assert error(read(layer), read(wide)) < 1e-5


def test_a_model_aligns_to_the_chunks_of_all_its_mixers():
    mixers = (Miras(replace(variants.yaad(), chunk_size=12)), *HYBRID)
    assert Model(depth=4, mixers=mixers).alignment == 24
    assert Model(depth=1, mixers=(Attention(),)).alignment == 1

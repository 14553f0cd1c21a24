"""Memory beside attention, and memories of two speeds: MAC, MAG, MAL, TNT, hybrids."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from miras_jax import Rule, memory
from miras_jax.core import engine
from miras_jax.errors import UserError
from miras_jax.nn import recipes
from miras_jax.nn.attention import Attention
from miras_jax.nn.documents import beginning, locate
from miras_jax.nn.miras import Miras
from miras_jax.nn.titans import MAC, MAG, MAL
from miras_jax.nn.tnt import TNT
from tests import nn
from tests.core import error, jit
from tests.nn import LENGTH, VOCAB, WIDTH, Program, shaken
from tests.nn.learning import check_that_it_learns

MEMORY = Miras(Rule(memory.Linear(), chunk_size=4), num_heads=2, rotary=0)
SLOW = replace(MEMORY, rule=replace(MEMORY.rule, chunk_size=8))
WINDOW = Attention(num_heads=2, window=5, persistent=3)
MIXERS = {
    "mac": MAC(MEMORY, segment=8, num_heads=2, persistent=3),
    "mag": MAG(MEMORY, WINDOW),
    "mal": MAL(MEMORY, WINDOW),
    "tnt": lambda: TNT(SLOW, (MEMORY,), shard=16),
}


@pytest.fixture(autouse=True, scope="module")
def short_tiles():
    """Exact linear rules run in tiles of eight tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "LINEAR_TILE", 8)
        yield


@cache
def program(name):
    mixer = MIXERS[name]
    return Program(nn.model((mixer() if callable(mixer) else mixer,), groups=1))


@pytest.mark.parametrize("name", MIXERS)
def test_decoding_gives_the_logits_of_the_whole(name):
    params, tokens = shaken(program(name).initial), nn.token_ids()
    whole = program(name).logits(params, tokens)
    in_parts, _ = program(name).decode(params, tokens, (16, *[1] * 8))
    assert error(in_parts, whole) < 1e-4


@pytest.mark.parametrize("name", MIXERS)
def test_tokens_see_their_past_and_not_their_future(name):
    """Nothing changes before a token that is another one, and all that follows does."""
    params, tokens = shaken(program(name).initial), nn.token_ids()
    whole = program(name).logits(params, tokens)
    changed = tokens.copy()
    changed[:, 9] = (changed[:, 9] + 1) % VOCAB
    other = program(name).logits(params, changed)
    differs = np.abs(np.asarray(whole - other)).max(axis=(0, 2)) > 1e-6
    np.testing.assert_array_equal(differs, np.arange(LENGTH) >= 9)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["mac", "tnt"])
def test_a_padded_batch_is_continued_like_its_rows(name, side):
    """Prompts that end inside of segments and shards, and segments that differ."""
    params, size = shaken(program(name).initial), 16
    whole = nn.token_ids()
    tokens, segment_ids = np.zeros((2, 2, size), int)
    lengths = (2, 11)
    for row, n in enumerate(lengths):
        place = slice(size - n, size) if side == "left" else slice(n)
        tokens[row, place], segment_ids[row, place] = whole[row, :n], 1
    read = padded_reader(name)
    padded, cache = read(params, tokens, program(name).start(params), segment_ids)
    outputs = []
    for t in range(9):
        part = np.stack([whole[row, n + t, None] for row, n in enumerate(lengths)])
        output, cache = program(name).read_on(params, part, cache)
        outputs.append(output)
    expected = program(name).logits(params, whole)
    for row, n in enumerate(lengths):
        assert error(padded[row][segment_ids[row] == 1], expected[row, :n]) < 1e-4
        after = np.concatenate(outputs, axis=1)[row]
        assert error(after, expected[row, n : n + 9]) < 1e-4


@cache
def padded_reader(name):
    return jit(lambda p, tokens, cache, ids: program(name).model(p)(tokens, cache, ids))


@pytest.mark.parametrize("name", MIXERS)
def test_every_architecture_trains(name):
    mixer = MIXERS[name]
    check_that_it_learns(mixer() if callable(mixer) else mixer)


def test_shards_in_parallel_equal_shards_in_turn():
    layer = MIXERS["tnt"]().build(WIDTH, 1.0, nnx.Rngs(0))
    graph, params = nnx.split(layer)
    x = np.random.default_rng(0).normal(size=(2, 32, WIDTH)).astype(np.float32)
    read = jit(lambda p, ids: nnx.merge(graph, p)(x, None, ids)[0])
    params = shaken(params)
    in_turn = read(params, np.ones((2, 32), np.int32))
    assert error(read(params, None), in_turn) < 1e-5


def test_a_local_memory_forgets_the_shard_before():
    """Without the global memory nothing crosses from one shard to the next."""
    layer = MIXERS["tnt"]().build(WIDTH, 1.0, nnx.Rngs(0))
    layer.memory.output.projection.weight[...] = jnp.zeros((WIDTH, WIDTH))
    graph, params = nnx.split(layer)
    x = np.random.default_rng(0).normal(size=(1, 32, WIDTH)).astype(np.float32)
    jacobian = jit(jax.grad(lambda x: jnp.sum(nnx.merge(graph, params)(x)[0][:, 20])))
    reached = np.abs(np.asarray(jacobian(x))).max(axis=(0, 2)) > 0
    np.testing.assert_array_equal(np.flatnonzero(reached), np.arange(16, 21))


def test_local_queries_are_projected_on_the_keys():
    """P_t q = sum_s k_s k_s^T q / |k_s|^2: along the one key that was ever read."""
    layer = MIXERS["tnt"]().build(WIDTH, 1.0, nnx.Rngs(0)).local[0]
    x = np.random.default_rng(0).normal(size=(1, 4, WIDTH)).astype(np.float32)
    cache = layer.start(1, 4, jnp.float32)
    _, cache = layer(x, cache)
    (actual,) = cache.memory[1].dual
    places = locate(x.shape[:2], beginning(1), None)
    start = layer.start(1, 4, jnp.float32)
    tokens, _ = layer.tokens(x, start.convolution, places)
    keys = np.asarray(tokens.keys)
    keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    expected = np.einsum("bgli,bglj->bgij", keys, keys)
    assert error(actual, expected) < 1e-4


def test_persistent_pairs_are_seen_by_every_token():
    layer = WINDOW.build(WIDTH, 1.0, nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, 9, WIDTH)).astype(np.float32)
    graph, params = nnx.split(layer)
    read = jit(lambda params: nnx.merge(graph, params)(x)[0])
    before = read(params)
    layer.persistent[...] = 1.1 * layer.persistent[...]
    change = np.asarray(read(nnx.state(layer)) - before)
    assert np.all(np.abs(change).max(axis=(0, 2)) > 1e-4)


def test_architectures_refuse_what_they_cannot_do():
    with pytest.raises(UserError, match="multiple of the chunks"):
        MAC(MEMORY, segment=6)
    with pytest.raises(UserError, match="shard=12"):
        TNT(SLOW, (MEMORY,), shard=12)


def test_presets_are_what_their_papers_combine():
    assert recipes.titans_mac(2, 32).memory.rule.chunk_size == 32
    assert recipes.titans_mag(2).attention.persistent == 4
    assert isinstance(recipes.titans_mal(2), MAL)
    assert recipes.tnt(2, 256, (8, 16), 512).alignment == 512
    assert recipes.samba(WIDTH)[1].window == 2048
    assert len(recipes.gated_delta_net_h1()) == 2
    assert len(recipes.gated_delta_net_h2()) == 3
    assert recipes.miras_h(recipes.moneta(2))[0] == recipes.moneta(2)

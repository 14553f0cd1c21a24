"""What every language model keeps, whatever its mixers are."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from miras_jax import variants
from miras_jax.errors import UserError
from miras_jax.nn.attention import Attention
from miras_jax.nn.documents import beginning, locate
from miras_jax.nn.miras import Miras, MirasCache
from tests import nn
from tests.core import error, jit
from tests.nn import BATCH, LENGTH, MIXERS, VOCAB, WINDOW, Program, leaves, shaken

HYBRID = MIXERS["gated_delta_net"] + MIXERS["window"]  # quick to compile


@pytest.fixture(scope="module", params=MIXERS)
def program(request):
    """Untied, so that the embedding receives the gradient of the inputs alone."""
    return Program(nn.model(MIXERS[request.param], embedding="untied"))


@pytest.fixture(scope="module")
def params(program):
    return shaken(program.initial)


@pytest.fixture(scope="module")
def hybrid():
    return Program(nn.model(HYBRID))


def whole_logits(program, params, tokens):
    """By the program that the gradients need anyway."""
    logits, _ = program.pull(params, tokens, np.zeros((BATCH, LENGTH, VOCAB), "f4"))
    return logits


# Decoding.


@pytest.mark.parametrize(
    "parts",
    [(11, *[1] * 13), (1,) * LENGTH, (11, 11, 1, 1)],
    ids=["prefill-then-tokens", "tokens", "two-prefills"],
)
def test_reading_in_parts_gives_the_logits_of_the_whole(program, params, parts):
    tokens = nn.token_ids()
    whole = whole_logits(program, params, tokens)
    in_parts, _ = program.decode(params, tokens, parts)
    assert error(in_parts, whole) < 1e-4


def test_a_part_read_without_the_past_gives_other_logits(hybrid):
    tokens, params = nn.token_ids(), shaken(hybrid.initial)
    whole = hybrid.logits(params, tokens)
    alone, _ = hybrid.read_on(params, tokens[:, 11:], hybrid.start(params))
    assert error(alone, whole[:, 11:]) > 1e-2


def test_the_cache_grows_with_full_attention_alone(program, params):
    def sizes(max_length):
        cache = jax.eval_shape(lambda: program.start(params, max_length))
        shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), part) for part in cache]
        return shapes, cache

    (short, cache), (long, _) = sizes(LENGTH), sizes(4096)
    for mixer, layer, a, b in zip(
        program.config.mixers, cache, short, long, strict=True
    ):
        full = isinstance(mixer, Attention) and mixer.window is None
        assert isinstance(layer, MirasCache) != isinstance(mixer, Attention)
        assert (a != b) == full


def test_reading_leaves_the_shape_of_the_cache(program, params):
    before = program.start(params)
    _, after = program.decode(params, nn.token_ids(), (11, 11, 1, 1))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)


# Who sees whom.


def test_a_token_depends_on_its_past_and_on_nothing_else(program, params):
    # Tokens are all different: the embedding's rows are the positions of the sequence.
    tokens = np.broadcast_to(
        np.random.default_rng(0).permutation(VOCAB)[:LENGTH], (BATCH, LENGTH)
    )
    influence = np.zeros((LENGTH, LENGTH))
    for t in range(LENGTH):
        cotangent = np.zeros((BATCH, LENGTH, VOCAB), np.float32)
        cotangent[0, t] = np.random.default_rng(t).normal(size=VOCAB)
        _, gradient = program.pull(params, tokens, cotangent)
        rows = gradient["embedding"][...][tokens[0]]
        influence[t] = np.abs(rows).max(axis=1)

    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None]
    windows = [getattr(mixer, "window", None) for mixer in program.config.mixers]
    local = all(window is not None for window in windows)
    # Each of two layers hands a token on by one window less itself.
    reach = 2 * (WINDOW - 1) if local else LENGTH
    expected = (distance >= 0) & (distance <= reach)
    (mixer, *_) = program.config.mixers
    if not isinstance(mixer, Attention) and mixer.rule.readout == "start":
        # In one chunk tokens meet in the convolutions alone, three back in each layer.
        chunk = np.arange(LENGTH) // mixer.rule.chunk_size
        expected &= (chunk[:, None] != chunk[None]) | (distance <= 2 * 3)
    np.testing.assert_array_equal(influence > 0, expected)


def test_rows_of_a_batch_are_independent(program, params):
    first, second = nn.token_ids()
    assert (first != second).any()
    a, b = whole_logits(program, params, np.stack([first, second]))
    for row, expected in ((first, a), (second, b)):
        alone = whole_logits(program, params, np.stack([row, row]))
        for logits in alone:
            np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert error(a, b) > 0.1


def test_a_batch_is_a_loop_over_its_rows(hybrid):
    tokens, params = nn.token_ids(), shaken(hybrid.initial)
    batch = hybrid.logits(params, tokens)
    loop = np.concatenate([hybrid.logits(params, row[None]) for row in tokens])
    np.testing.assert_allclose(batch, loop, rtol=1e-5, atol=1e-5)
    lm = hybrid.model(params)
    mapped = jit(jax.vmap(lambda row: lm(row[None])[0][0]))(tokens)
    np.testing.assert_allclose(mapped, loop, rtol=1e-5, atol=1e-5)


# Gradients.


def cross_entropy_cotangent(logits, targets):
    """Gradient of the mean cross entropy with respect to the logits."""
    return (jax.nn.softmax(logits) - jax.nn.one_hot(targets, VOCAB)) / targets.size


def without_gradient(gradients):
    """Names of parameters of which a column of some layer receives no gradient."""

    def is_zero(name, gradient):
        layers = np.asarray(gradient)
        layers = layers if name.startswith("groups.") else layers[None]
        return not np.any(layers, axis=tuple(range(1, layers.ndim - 1))).all()

    return {name for name, g in leaves(gradients).items() if is_zero(name, g)}


def test_the_outer_gradient_reaches_every_parameter(program):
    """Untrained, all but W_down of low-rank rates, whose W_up starts at zero (LoRA)."""
    tokens, targets = nn.token_ids(), nn.token_ids(seed=1)
    logits = whole_logits(program, program.initial, tokens)
    cotangent = cross_entropy_cotangent(logits, targets)
    _, gradient = program.pull(program.initial, tokens, cotangent)
    assert all(np.isfinite(g).all() for g in leaves(gradient).values())
    lora = {n for n in leaves(gradient) if ".rates." in n and ".down." in n}
    assert without_gradient(gradient) == lora

    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, program.initial, gradient)
    _, gradient = program.pull(stepped, tokens, cotangent)
    assert without_gradient(gradient) == set()


def test_rematerialisation_changes_neither_logits_nor_gradients():
    off, on = (Program(nn.model(HYBRID, remat=kind)) for kind in ("none", "block"))
    assert off.config.remat != on.config.remat
    tokens, params = nn.token_ids(), shaken(off.initial)
    cotangent = np.random.default_rng(0).normal(size=(BATCH, LENGTH, VOCAB))
    cotangent = cotangent.astype(np.float32)
    logits, gradient = off.pull(params, tokens, cotangent)
    logits_on, gradient_on = on.pull(params, tokens, cotangent)
    assert error(logits_on, logits) < 1e-5
    pairs = zip(leaves(gradient).items(), leaves(gradient_on).items(), strict=True)
    for (name, expected), (name_on, actual) in pairs:
        assert name == name_on
        assert error(actual, expected) < 1e-5, name


@pytest.mark.parametrize("remat", ["none", "block"])
def test_rematerialisation_happens_where_it_is_asked_for(remat):
    program = Program(nn.model(MIXERS["attention"], remat=remat))
    jaxpr = jax.make_jaxpr(program.model(program.initial))(nn.token_ids())
    assert ("remat" in str(jaxpr)) == (remat == "block")


# Precision.


def test_bfloat16_keeps_parameters_states_and_gradients_in_float32():
    names = ("moneta", "titans", "window")
    mixers = tuple(mixer for name in names for mixer in MIXERS[name])
    program = Program(nn.model(mixers, groups=1, compute_dtype="bfloat16"))
    tokens, params = nn.token_ids(), shaken(program.initial)
    assert {x.dtype for x in jax.tree.leaves(program.initial)} == {jnp.dtype("float32")}

    def read():
        return program.model(params)(tokens, program.start(params))[1]

    *miras_layers, window = jax.eval_shape(read)
    for layer in miras_layers:
        assert layer.convolution.dtype == jnp.bfloat16
        for name in ("dual", "anchor", "kept", "momentum"):
            assert all(x.dtype == jnp.float32 for x in getattr(layer.memory, name))
    assert window.keys.dtype == window.values.dtype == jnp.bfloat16

    cotangent = np.ones((BATCH, LENGTH, VOCAB), np.float32)
    logits, gradient = program.pull(params, tokens, cotangent)
    assert logits.dtype == jnp.float32
    for name, g in leaves(gradient).items():
        assert g.dtype == jnp.float32, name
        assert np.isfinite(g).all(), name


def test_only_thresholds_are_as_narrow_as_values():
    layer = Miras(variants.yaad(), num_heads=2).build(16, 1.0, nnx.Rngs(0))
    x = jnp.ones((1, 5, 16), jnp.bfloat16)
    places = locate((1, 5), beginning(1), None)
    tokens, _ = layer.tokens(x, layer.start(1, 5, x.dtype).convolution, places)
    assert tokens.values.dtype == tokens.rates.threshold.dtype == jnp.bfloat16
    assert tokens.rates.keep.dtype == tokens.rates.learn.dtype == jnp.float32


def test_bfloat16_is_close_to_float32_but_not_the_same(hybrid):
    half = Program(nn.model(HYBRID, compute_dtype="bfloat16"))
    tokens, params = nn.token_ids(), shaken(hybrid.initial)
    rounded = half.logits(params, tokens)
    assert 1e-3 < error(rounded, hybrid.logits(params, tokens)) < 0.1


# How the model is put together.


def test_tied_is_untied_with_the_embedding_as_output():
    tied = Program(nn.model(MIXERS["attention"]))
    untied = Program(nn.model(MIXERS["attention"], embedding="untied"))
    names = set(leaves(untied.initial)) - set(leaves(tied.initial))
    assert names == {"output.weight"}

    tokens, params = nn.token_ids(), shaken(tied.initial)
    both = untied.initial
    for name in ("embedding", "groups", "norm"):
        both[name] = params[name]
    other = untied.logits(both, tokens)
    both["output"]["weight"] = both["output"]["weight"].replace(
        params["embedding"][...].T
    )
    expected = tied.logits(params, tokens)
    assert error(untied.logits(both, tokens), expected) < 1e-6
    assert error(other, expected) > 0.1


def test_the_scan_is_a_loop_over_blocks_with_their_own_parameters(hybrid):
    tokens, params = nn.token_ids(), shaken(hybrid.initial)
    lm = hybrid.model(params)
    graph, stacked = nnx.split(lm.groups)

    @jit
    def unrolled(layers):
        x = lm.embedding[...][tokens] * nn.WIDTH**0.5
        for i in range(2):
            group = nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], layers))
            for block in group.blocks:
                x = x + block.mixer(block.mixer_norm(x))[0]
                x = x + block.mlp(block.mlp_norm(x))
        return lm.norm(x) @ lm.embedding[...].T

    scanned = hybrid.logits(params, tokens)
    assert error(unrolled(stacked), scanned) < 1e-5
    backwards = jax.tree.map(lambda p: p[::-1], stacked)
    assert error(unrolled(backwards), scanned) > 1e-2


def test_every_block_starts_from_its_own_random_weights(hybrid):
    for block, mixer in enumerate(("miras", "attention")):
        weight = leaves(hybrid.initial)[f"groups.blocks.{block}.mixer.qkv.weight"]
        assert error(weight[0], weight[1]) > 1, mixer


def test_every_parameter_names_the_axes_of_its_value(hybrid):
    for path, parameter in nnx.to_flat_state(hybrid.initial):
        stacked = path[0] == "groups"
        assert len(parameter.axes) == parameter.ndim - stacked, path


# Mistakes.


def test_a_width_that_heads_do_not_divide_is_refused():
    for mixer in (replace(nn.miras(variants.yaad()), num_heads=5), Attention(5)):
        with pytest.raises(UserError, match="width 32 .* 5 heads") as caught:
            mixer.build(nn.WIDTH, 1.0, nnx.Rngs(0))
        assert "\n" not in str(caught.value)


def test_heads_of_odd_dimension_are_refused():
    for mixer in (replace(nn.miras(variants.yaad()), num_heads=4), Attention(4)):
        with pytest.raises(UserError, match="even"):
            mixer.build(12, 1.0, nnx.Rngs(0))


def test_a_depth_that_the_mixers_do_not_divide_is_refused():
    with pytest.raises(UserError, match="depth 3 .* 2 mixers") as caught:
        replace(nn.model(HYBRID), depth=3)
    assert "\n" not in str(caught.value)

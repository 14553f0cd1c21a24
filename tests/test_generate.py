"""Generation reads what the full forward pass reads, draws as asked, and streams."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import miras_jax.generate as generation
from miras_jax.core import variants
from miras_jax.errors import UserError
from miras_jax.export import Trained
from miras_jax.generate import PIECE, complete, generate, nucleus, sample
from miras_jax.nn.attention import Attention
from miras_jax.nn.functional import FunctionalModel
from miras_jax.nn.miras import Miras
from miras_jax.nn.model import Model
from miras_jax.training.tokenizer import ByteTokenizer

# Chunks end inside the pieces in which a prompt is read.
YAAD = Miras(dataclasses.replace(variants.yaad(), chunk_size=24), num_heads=2)
MIXERS = {
    "miras": (YAAD,),
    "attention": (Attention(num_heads=2),),
    "window": (Attention(num_heads=2, window=7),),
}
LENGTH = 24


class Letters:
    """A token is a character, so that text tells the ids."""

    vocab_size = 40
    end_of_text = 39

    def encode(self, text):
        return np.array([ord(c) - ord("0") for c in text], np.int32)

    def token_bytes(self, token):
        return b"" if token == self.end_of_text else bytes([token + ord("0")])


class Shifted(FunctionalModel):
    """Its cache has read a token that is not in the text."""

    def start(self, parameters, batch, max_length):
        cache = super().start(parameters, batch, max_length + 1)
        return self.apply(parameters, jnp.ones((batch, 1), jnp.int32), cache)[1]


class Script:
    """Predicts the given bytes, whatever was read; its cache is the position."""

    def __init__(self, ids):
        self.ids = jnp.array(ids)

    def start(self, parameters, batch, max_length):
        return jnp.int32(0)

    def apply(self, parameters, tokens, cache):
        cache += tokens.shape[1]
        logits = 50 * jax.nn.one_hot(self.ids[cache - 1], ByteTokenizer.vocab_size)
        return jnp.broadcast_to(logits, (*tokens.shape, logits.size)), cache


def scripted(ids):
    return Trained(Script(ids), {}, ByteTokenizer(), step=0)


@functools.cache
def tiny(kind, mixer):
    config = Model(
        width=32, depth=1, mixers=MIXERS[mixer], hidden=64, embedding="untied"
    )
    model = kind(config, Letters.vocab_size)
    return Trained(model, model.init(jax.random.key(3)), Letters(), step=0)


def prompt_of(size):
    ids = np.random.default_rng(5).integers(0, Letters.end_of_text, size)
    return "".join(chr(i + ord("0")) for i in ids)


def agreement(trained, prompt):
    """Of greedy tokens with the likeliest ones of one pass over the whole text."""
    pieces = generate(trained, prompt, length=LENGTH, temperature=0.0)
    written = list(Letters().encode("".join(pieces)))
    if len(written) < LENGTH:
        written.append(Letters.end_of_text)
    assert len(written) >= LENGTH // 2
    read = [Letters.end_of_text, *Letters().encode(prompt), *written[:-1]]
    logits, _ = jax.jit(trained.model.apply)(trained.parameters, jnp.array([read]))
    likeliest = np.argmax(logits[0, -len(written) :], axis=-1)
    return np.mean(np.asarray(likeliest) == np.array(written))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("size", [0, 2 * PIECE + 6])
def test_greedy_text_is_the_argmax_of_the_full_forward_pass(mixer, size):
    assert agreement(tiny(FunctionalModel, mixer), prompt_of(size)) == 1


def test_the_agreement_notices_a_cache_that_is_off_by_a_token():
    assert agreement(tiny(Shifted, "miras"), prompt_of(2)) < 1


def test_the_seed_decides_the_text():
    trained = tiny(FunctionalModel, "window")

    def text(seed):
        pieces = generate(trained, "ABC", length=LENGTH, seed=seed, top_p=1.0)
        return "".join(pieces)

    assert text(1) == text(1) != text(2)


def test_every_token_is_drawn_anew():
    flat = scripted([ByteTokenizer.vocab_size])  # an id that no token has
    text = "".join(generate(flat, "", length=40, top_p=1.0))
    assert len(set(text)) > 10


def written(text, **options):
    ids = [*text, ByteTokenizer.end_of_text, 65]
    return list(generate(scripted(ids), "", **options))


def test_characters_come_whole_and_end_of_text_ends_the_text():
    assert written("aé😀".encode(), length=20) == ["a", "é", "😀"]


def test_a_character_cut_off_by_the_length_is_replaced():
    assert written("aé😀".encode(), length=5) == ["a", "é", "\ufffd"]
    assert written("aé😀".encode(), length=3) == ["a", "é"]


def greedy(trained, prompt, length=LENGTH):
    return "".join(generate(trained, prompt, length=length, temperature=0.0))


@pytest.mark.parametrize("mixer", MIXERS)
def test_prompts_that_are_read_together_are_continued_as_if_alone(mixer):
    trained = tiny(FunctionalModel, mixer)
    # The shortest is answered while the others are read; the last batch is not full.
    sizes = [PIECE + 9, 3, PIECE + 2, 0, PIECE + 9]
    prompts = [prompt_of(size) for size in sizes]
    texts = complete(trained, prompts, length=LENGTH, rows=3)
    assert texts == [greedy(trained, prompt) for prompt in prompts]
    assert len(set(texts)) == 4
    assert complete(trained, [], length=1) == []


def test_of_a_long_prompt_the_last_tokens_are_read():
    trained = tiny(FunctionalModel, "attention")
    prompts = [prompt_of(60), prompt_of(60)[-20:], prompt_of(60)[-19:]]
    texts = complete(trained, prompts, length=8, limit=28)
    # Twenty tokens are read: of the shortest the end-of-text token before it, too.
    assert texts[0] == texts[1]
    assert texts[2] == greedy(trained, prompts[2], length=8) != texts[0]
    with pytest.raises(UserError, match="^8 tokens to write leave no room .* in 8"):
        complete(trained, ["A"], length=8, limit=8)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [((), "one, two. three"), ((",",), "one"), (("o. ", "."), "one, two")]
    + [(("none",), "one, two. three"), (("wo", "two", "o."), "one, ")],
)
def test_a_text_ends_before_what_stops_it(stop, expected):
    ids = [*b"one, two. three", ByteTokenizer.end_of_text, 65]
    assert complete(scripted(ids), ["", ""], length=20, stop=stop) == [expected] * 2


def test_nothing_is_read_once_every_text_has_ended(monkeypatch):
    read, steps = generation._read, []

    def counted(*arguments):
        steps.append(arguments)
        return read(*arguments)

    monkeypatch.setattr(generation, "_read", counted)
    complete(scripted([*b"one, two"]), ["", ""], length=8, stop=[","])
    assert len(steps) == 4  # end of text, then "one"; the comma is not read


def test_every_row_of_a_batch_is_drawn_anew():
    flat = scripted([ByteTokenizer.vocab_size] * 2)  # an id that no token has
    options = {"length": 20, "temperature": 1.0}
    texts = complete(flat, [""] * 4, **options)
    assert len(set(texts)) == 4
    assert texts == complete(flat, [""] * 4, **options)
    assert texts != complete(flat, [""] * 4, **options, seed=1)


def test_an_empty_stop_is_refused():
    with pytest.raises(UserError, match="^one of the strings to stop at is empty"):
        complete(scripted([65]), ["a"], length=1, stop=["a", ""])


PROBABILITIES = np.array([0.15, 0.5, 0.05, 0.3], np.float32)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-6, [1]), (0.49, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.81, [0, 1, 3])]
    + [(0.96, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])],
)
def test_the_nucleus_is_the_fewest_tokens_that_make_up_top_p(top_p, kept):
    logits = jnp.log(PROBABILITIES) + 3
    left = nucleus(logits, top_p)
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(left)), kept)
    np.testing.assert_array_equal(left[np.array(kept)], logits[np.array(kept)])


def test_equally_likely_tokens_do_not_swell_the_nucleus():
    assert np.isfinite(nucleus(jnp.zeros(10), 0.45)).sum() == 5


def test_top_p_1_keeps_a_tail_below_the_rounding_of_the_sum():
    assert np.isfinite(nucleus(jnp.array([30.0, 0.0, -5.0]), 1.0)).all()


def test_tokens_are_drawn_as_often_as_temperature_and_nucleus_say(key):
    draws = 20_000
    draw = jax.vmap(lambda k: sample(jnp.log(PROBABILITIES), k, 0.5, 0.9))
    counts = np.bincount(draw(jax.random.split(key, draws)), minlength=4)
    # The exponent is 1 / temperature. Of the squares tokens 1 and 3 make up 0.93.
    expected = PROBABILITIES**2 * [0, 1, 0, 1]
    expected /= expected.sum()
    # Five standard deviations.
    np.testing.assert_allclose(counts / draws, expected, atol=5 * 0.5 / draws**0.5)
    assert counts[0] == counts[2] == 0


@pytest.mark.parametrize("temperature", [0.0, 1e-35])
def test_no_temperature_takes_the_likeliest_token(temperature, key):
    token = sample(1e6 * jnp.log(PROBABILITIES) + 1e7, key, temperature, 1.0)
    assert token == 1


@pytest.mark.parametrize(
    "options",
    [
        {"length": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"seed": -1},
        {"seed": 2**32},
    ],
)
def test_settings_out_of_range_are_refused_before_any_text(options):
    (name,) = options
    with pytest.raises(UserError, match=f"^{name} is .*; g"):
        generate(scripted([65]), "a", **{"length": 1, **options})


def test_a_prompt_that_is_no_text_is_refused():
    with pytest.raises(UserError, match="^the prompt is not valid text"):
        generate(scripted([65]), "a\udcff", length=1)

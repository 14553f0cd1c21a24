"""Scores of continuations against one plain forward pass over each example."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from miras_jax.core import variants
from miras_jax.errors import UserError
from miras_jax.evaluation import scoring
from miras_jax.evaluation.scoring import Pair, Scorer
from miras_jax.export import Trained
from miras_jax.nn.attention import Attention
from miras_jax.nn.functional import FunctionalModel
from miras_jax.nn.miras import Miras
from miras_jax.nn.model import Model
from miras_jax.training.tokenizer import BPE, ByteTokenizer

END = ByteTokenizer.end_of_text


@functools.cache
def trained(tokenizer=None):
    """An untrained model: any will do, sharp enough that tokens differ."""
    tokenizer = tokenizer or ByteTokenizer()
    mixers = (Miras(variants.delta_net(), 2), Attention(2, window=9))
    config = Model(width=16, depth=2, mixers=mixers, hidden=32, embedding="untied")
    model = FunctionalModel(config, tokenizer.vocab_size)
    parameters = model.init(jax.random.key(3))
    return Trained(model, parameters, tokenizer, step=0)


def ids(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size).tolist()


@jax.jit
def scores_of(row):
    model, parameters, *_ = trained()
    logits, _ = model.apply(parameters, row[None])
    return jax.nn.log_softmax(logits[0])


def by_hand(context, continuation, limit=10**6):
    """Log-likelihood and greed of one example, in one pass of its own length."""
    row = [*context, *continuation][-(limit + 1) :]
    scores = np.asarray(scores_of(jnp.array(row[:-1])), np.float64)
    place = np.arange(len(row) - 1 - len(continuation), len(row) - 1)
    chosen = scores[place, np.array(continuation, int)]
    return chosen.sum(), np.array_equal(scores[place].argmax(axis=1), continuation)


PAIRS = [
    Pair([END, *ids(context, 7)], ids(size, 9))
    for context, size in [(3, 1), (0, 4), (28, 4), (29, 4), (40, 30), (3, 1)]
]


def assert_by_hand(scores, pairs, limit=10**6):
    for score, pair in zip(scores, pairs, strict=True):
        nats, greedy = by_hand(*pair, limit)
        assert score.log_likelihood == pytest.approx(nats, abs=2e-4)
        assert score.greedy == greedy


def test_scores_are_those_of_a_forward_pass_of_each_example():
    assert_by_hand(Scorer(trained()).score(PAIRS), PAIRS)


def test_scores_depend_neither_on_the_batch_nor_on_the_order(monkeypatch):
    expected = Scorer(trained()).score(PAIRS)
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 64)  # two rows of 32, one of 64
    backwards = Scorer(trained()).score(PAIRS[::-1])[::-1]
    alone = [Scorer(trained()).score([pair])[0] for pair in PAIRS]
    assert len({score.log_likelihood for score in expected}) == len(PAIRS) - 1
    for other in (backwards, alone):
        for score, again in zip(expected, other, strict=True):
            assert again.greedy == score.greedy
            assert again.log_likelihood == pytest.approx(score.log_likelihood, abs=2e-4)


def test_a_long_context_is_cut_on_the_left():
    pairs = [*PAIRS, Pair([END, *ids(99, 1)], ids(48, 2))]
    scores = Scorer(trained(), max_length=48).score(pairs)
    assert_by_hand(scores, pairs, limit=48)
    assert scores[-1].log_likelihood != pytest.approx(by_hand(*pairs[-1])[0], abs=1e-2)
    with pytest.raises(UserError, match="a continuation of 49 tokens is to be scored"):
        Scorer(trained(), max_length=48).score([Pair([END], ids(49))])


def test_few_lengths_are_compiled():
    pairs = [Pair([END], ids(size)) for size in range(1, 48)]
    scoring._read.clear_cache()
    Scorer(trained(), max_length=47).score(pairs)
    assert scoring._read._cache_size() == 2  # of 32 and 47 tokens


def test_greedy_is_what_the_model_itself_would_write():
    context, written = [END, *ids(6)], []
    for _ in range(2):
        scores = scores_of(jnp.array([*context, *written]))
        written.append(int(scores[-1].argmax()))
    other = [written[0], (written[1] + 1) % 256]
    scorer = Scorer(trained())
    scores = scorer.score([Pair(context, written), Pair(context, other)])
    assert [score.greedy for score in scores] == [True, False]


def test_nothing_is_certain():
    assert Scorer(trained()).score([Pair([END], [])]) == [(0.0, True)]
    assert Scorer(trained()).score([]) == []


def test_text_is_cut_where_the_context_ends_and_follows_an_end_of_text():
    scorer = Scorer(trained())
    pair = scorer.pair("ab", " cd")
    assert pair == ([END, *b"ab"], [*b" cd"])
    # White space at the context's end is the continuation's.
    assert scorer.pair("ab  ", "cd") == ([END, *b"ab"], [*b"  cd"])
    assert scorer.pair("", "cd") == ([END], [*b"cd"])
    assert scorer.pair(" ", "cd") == ([END], [*b" cd"])


def test_both_are_tokenised_as_one_text():
    text = "an apple and another apple and an answer " * 30
    tokenizer = BPE(300).train([text])
    scorer = Scorer(trained(tokenizer))
    whole = tokenizer.encode("an apple and").tolist()
    pair = scorer.pair("an apple ", "and")
    assert [*pair.context, *pair.continuation] == [tokenizer.end_of_text, *whole]
    assert tokenizer.decode(pair.continuation) == " and"
    # A token of its own for the space would be no token of that text.
    assert len(pair.continuation) < 1 + len(tokenizer.encode("and")) + 1


def test_a_model_reads_something():
    with pytest.raises(UserError, match="max_length is 0; let the model read"):
        Scorer(trained(), max_length=0)
    with pytest.raises(ValueError, match="nothing to predict the first token from"):
        Scorer(trained()).score([Pair([], [1])])

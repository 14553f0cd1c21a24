"""The adapter to lm_eval: its requests, its windows, and whole tasks offline."""

import json
import textwrap
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from miras_jax.core import variants
from miras_jax.errors import UserError
from miras_jax.evaluation import perplexity
from miras_jax.evaluation.scoring import Pair
from miras_jax.export import Trained
from miras_jax.generate import generate
from miras_jax.nn.miras import Miras
from miras_jax.nn.model import Model
from miras_jax.training.config import Experiment
from miras_jax.training.data import TextFiles
from miras_jax.training.run import Run
from miras_jax.training.tokenizer import Bytes

pytest.importorskip(
    "lm_eval", reason="needs the package lm_eval: pip install 'miras-jax[eval]'"
)

from miras_jax.evaluation import harness  # noqa: E402
from miras_jax.evaluation.harness import HarnessModel  # noqa: E402

LENGTH = 32
TEXT = "It was a truth that a single man must be in want of a wife. "
HELDOUT = (TEXT[::-1] * 3)[: 4 * LENGTH]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained run whose held-out text fills its windows."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "train.txt").write_text(TEXT * 20)
    (folder / "heldout.txt").write_text(HELDOUT)
    paths = [(str(folder / f"{name}.txt"),) for name in ("train", "heldout")]
    return Run(
        Experiment(
            model=Model(width=32, depth=1, mixers=(Miras(variants.retnet(), 2),)),
            data=TextFiles(*paths, context_length=LENGTH, tokenizer=Bytes()),
            steps=1,
            batch_size=8,
        ),
        folder / "work",
    )


@pytest.fixture(scope="module")
def trained(run):
    # So large that what is likeliest does not hang on rounding.
    parameters = jax.tree.map(lambda x: 2 * x, run.model.init(jax.random.key(1)))
    return Trained(run.model, parameters, run.tokenizer, step=0)


def asked(*arguments):
    """Requests as lm_eval makes them, of which only the arguments are read."""
    return [SimpleNamespace(args=each) for each in arguments]


def test_contexts_and_continuations_are_scored_in_the_order_of_the_requests(trained):
    model = HarnessModel(trained)
    requests = asked(("a man ", "of"), ("", "It was"), ("a man", " of"))
    answers = model.loglikelihood(requests)
    assert answers[0] == answers[2] != answers[1]
    again = model.loglikelihood(requests[::-1])[::-1]
    np.testing.assert_allclose(answers, again, rtol=1e-6)
    pair = model.scorer.pair("", "It was")
    assert answers[1] == pytest.approx(tuple(model.scorer.score([pair])[0]))


def test_whole_texts_lose_what_our_own_perplexity_says(run, trained):
    """Where the windows are the same: those of a text that fills them."""
    totals = run.evaluate(trained.parameters)
    bits = perplexity.quality(totals, run.prepared).bits_per_byte
    model = HarnessModel(trained, max_length=LENGTH)
    nats, short = model.loglikelihood_rolling(asked((HELDOUT,), (HELDOUT[:40],)))
    assert -nats / np.log(2) / len(HELDOUT) == pytest.approx(bits, rel=1e-5)
    # The last window of 40 reads again what fills it, and scores eight tokens.
    first = model.scorer.pair("", HELDOUT[:LENGTH])
    last = Pair([*HELDOUT[7:LENGTH].encode()], [*HELDOUT[LENGTH:40].encode()])
    by_hand = sum(s.log_likelihood for s in model.scorer.score([first, last]))
    assert short == pytest.approx(by_hand, rel=1e-5)
    assert model.loglikelihood_rolling(asked(("",))) == [0.0]


def test_what_is_written_ends_at_a_stop_or_the_most_tokens(trained):
    model = HarnessModel(trained)
    whole = "".join(generate(trained, "a man", length=20, temperature=0))
    stop = whole[3:5]
    options = {"until": [stop, ""], "max_gen_toks": 20}
    texts = model.generate_until(
        asked(
            ("a man", {"until": [], "max_gen_toks": 20}),
            ("a man", options),
            ("It was", {"until": "", "max_gen_toks": 4, "do_sample": False}),
            ("It was", {"until": [], "max_gen_toks": 20}),
        )
    )
    assert texts[:2] == [whole, whole[: whole.index(stop)]]
    other = "".join(generate(trained, "It was", length=20, temperature=0))
    assert texts[2:] == [other[:4], other] and other != whole
    with pytest.raises(UserError, match="asks for top_k, which generation here has no"):
        model.generate_until(asked(("a", {"top_k": 3})))


TASK = textwrap.dedent(
    """
    task: TASK
    dataset_path: json
    dataset_kwargs:
      cache_dir: FOLDER/cache
      data_files:
        test: FOLDER/data.jsonl
    test_split: test
    output_type: multiple_choice
    doc_to_text: "{{context}}"
    doc_to_choice: choices
    doc_to_target: answer
    """
)


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with a task of three examples, and one whose data are missing."""
    # To read those of the harness, too, takes long.
    own = partial(harness._Tasks, include_defaults=False)
    monkeypatch.setattr(harness, "_Tasks", own)
    examples = [
        {"context": "a single", "choices": ["man", "wife"], "answer": i % 2}
        for i in range(3)
    ]
    lines = "".join(json.dumps(example) + "\n" for example in examples)
    (tmp_path / "data.jsonl").write_text(lines)
    text = TASK.replace("FOLDER", str(tmp_path))
    (tmp_path / "own.yaml").write_text(text.replace("TASK", "own_task"))
    gone = text.replace("TASK", "gone_task").replace("data.jsonl", "gone.jsonl")
    (tmp_path / "gone.yaml").write_text(gone)
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # of what lm_eval imports
def test_a_task_of_the_users_own_is_evaluated_offline(trained, tasks):
    results = harness.evaluate(trained, ["own_task"], include=tasks)
    scorer = HarnessModel(trained).scorer
    pairs = [scorer.pair("a single", word) for word in (" man", " wife")]
    man, wife = (score.log_likelihood for score in scorer.score(pairs))
    share = 2 / 3 if man > wife else 1 / 3
    assert results["results"]["own_task"]["acc,none"] == pytest.approx(share)
    assert "own_task" in harness.tables(results)
    kept = json.loads(json.dumps(harness.kept(results)))
    assert kept["n-samples"]["own_task"]["effective"] == 3
    few = harness.evaluate(trained, ["own_*"], include=tasks, limit=1)
    assert few["n-samples"]["own_task"]["effective"] == 1


@pytest.mark.filterwarnings("ignore")
def test_a_task_that_is_not_there_says_so(trained, tasks):
    with pytest.raises(UserError, match="no task flying, swimming; 'lm-eval ls tasks'"):
        harness.evaluate(trained, ["own_task", "flying", "swimming"], include=tasks)
    with pytest.raises(UserError, match="gone_task cannot be loaded .*gone.jsonl"):
        harness.evaluate(trained, ["gone_task"], include=tasks)
    with pytest.raises(UserError, match="is no folder; give one that holds YAML"):
        harness.evaluate(trained, ["own_task"], include=tasks / "none")

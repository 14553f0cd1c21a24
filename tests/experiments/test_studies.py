"""Studies: rows that are measured once, and experiments that can be built."""

from argparse import Namespace
from dataclasses import replace

import jax
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from experiments.studies import decisions, influence, models, recall, small, stability
from experiments.studies.recall_plot import plot
from experiments.studies.rows import Rows, report, tabulate
from miras_jax import variants
from miras_jax.nn.functional import FunctionalModel
from miras_jax.training.prepare import prepare
from miras_jax.training.train import Diverged, Result


def test_a_row_is_measured_once_until_it_describes_something_else(tmp_path):
    path = tmp_path / "folder" / "rows.jsonl"
    measured = []

    def measure(value):
        measured.append(value)
        return {"value": value}

    assert Rows(path).measure("a", "x", lambda: measure(1)) == {"value": 1}
    assert Rows(path).measure("a", "x", lambda: measure(2)) == {"value": 1}
    assert Rows(path).measure("a", "y", lambda: measure(3)) == {"value": 3}
    with open(path, "a") as file:
        file.write('{"name": "a", "of": "y", "meas')  # what a kill leaves
    assert Rows(path).measure("a", "y", lambda: measure(4)) == {"value": 3}
    assert Rows(path).measure("b", "x", lambda: measure(5)) == {"value": 5}
    assert Rows(path).measure("b", "x", lambda: measure(6)) == {"value": 5}
    assert measured == [1, 3, 5]


def test_a_study_goes_on_where_a_run_diverged_and_ends_where_it_was_stopped(
    tmp_path, monkeypatch
):
    def ends(outcome):
        def train(wanted, workdir):
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(small, "train", train)
        mixer = decisions.ROWS["yaad"][1]
        wanted = small.experiment((mixer,), steps=4, evaluate_every=4)
        return small.trained(wanted, tmp_path)

    result = Result(4, True, 5.0)
    assert ends(result) is result
    assert ends(Diverged("training diverged")) is None
    with pytest.raises(SystemExit, match="stopped after step 3 of 4"):
        ends(Result(3, False, None))


def test_a_table_of_all_rows_is_kept(tmp_path):
    lines = [{"rule": "a", "loss": "1|2"}]
    kept = tmp_path / "results" / "table.md"
    report(lines, Namespace(names=["a"], results=kept.parent))
    assert not kept.exists()
    report(lines, Namespace(names=[], results=kept.parent))
    assert kept.read_text().splitlines()[-1] == r"| a | 1\|2 |"


def test_rows_are_measured_by_name_seed_and_steps_and_reported_in_order(
    tmp_path, capsys
):
    measured = []

    def measure(name, seed, steps, workdir):
        measured.append((name, seed, steps, workdir.name))
        return {"seed": seed, "steps": steps}

    def of(name, seed):
        return name.upper()

    def line(name, seeds):
        rows = [f"{row['seed']}: {row['steps']}" for row in seeds]
        return {"row": name, "seeds": ", ".join(rows)}

    returned = []
    for names, steps, seeds in (["b"], 3, 1), (["a", "b"], 3, 2), (["b"], 4, 1):
        given = Namespace(names=names, steps=steps, seeds=seeds, folder=tmp_path)
        returned.append(tabulate(given, ("a", "b"), of, measure, line))
    assert returned[0] == {"b": [{"seed": 0, "steps": 3}]}
    assert [row["seed"] for row in returned[1]["a"]] == [0, 1]
    assert measured == [
        ("b", 0, 3, "b-0-3"),
        ("a", 0, 3, "a-0-3"),
        ("a", 1, 3, "a-1-3"),
        ("b", 1, 3, "b-1-3"),
        ("b", 0, 4, "b-0-4"),
    ]
    assert "| a | 0: 3, 1: 3 |\n| b | 0: 3, 1: 3 |\n" in capsys.readouterr().out


def test_a_line_of_decisions_tells_mean_range_and_what_diverged():
    seeds = [
        {"loss": 5.0, "gradient norm": 1.0},
        {"loss": 5.2, "gradient norm": 30.0},
        {"loss": None, "gradient norm": 2.0},
    ]
    line = decisions.line("memora", seeds)
    assert list(line.values())[2:] == ["2 of 3", "5.100 (5.000 to 5.200)", "30"]
    line = decisions.line("memora", [{"loss": None, "gradient norm": None}])
    assert list(line.values())[2:] == ["0 of 1", "-", "not finite"]


def test_every_row_of_decisions_is_a_model_of_its_own():
    mixers = [(mixer,) for _, mixer in decisions.ROWS.values()]
    assert len({repr(mixer) for mixer in mixers}) == len(mixers)
    for mixer in mixers:
        experiment = small.experiment(mixer, steps=4, seed=2, evaluate_every=4)
        assert experiment.seed == 2
        assert FunctionalModel(experiment.model, 512).size > 2e5


@pytest.mark.parametrize("name", models.NAMES)
def test_every_published_model_fits_the_small_experiment(name):
    mixers = models.mixers(name)
    experiment = small.experiment(mixers, steps=4, evaluate_every=4)
    assert FunctionalModel(experiment.model, 512).size > 2e5
    for mixer in mixers:
        rule = getattr(mixer, "rule", None)
        assert rule is None or rule.chunk_size <= 2 * small.CHUNK


@pytest.mark.parametrize("make", variants.ALL, ids=lambda make: make.__name__)
def test_every_rule_can_read_what_stability_feeds_it(make):
    rule = make()
    for case in stability.CASES:
        tokens = stability.tokens(rule, case, 6)
        rule.check(rule.pairs(tokens) if rule.algorithm.steps > 1 else tokens)
    large = stability.tokens(rule, "large", 6).values
    values = stability.tokens(rule, "bf16", 6).values
    assert values.dtype == "bfloat16"
    np.testing.assert_allclose(large, 1e4 * values.astype("float32"), rtol=1e-2)


def test_a_cell_names_what_is_not_finite():
    assert stability.cell({"output": 1.25, "gradient": None}) == "gradient not finite"
    assert stability.cell({"output": 1.25, "gradient": 30.0}) == "1.2, 30"
    rule = variants.retnet()
    found = stability.measure(rule, "large", 5)
    assert found["output"] > 100 and jax.tree.all(
        jax.tree.map(np.isfinite, list(found.values()))
    )


@pytest.mark.parametrize("pairs", recall.PAIRS)
def test_an_episode_gives_every_pair_before_it_asks_for_any(pairs):
    text = recall.episode(np.random.default_rng(0), pairs)
    assert len(text) == recall.LENGTH
    given = [text[i : i + 2] for i in range(0, len(text), 2)]
    assert len({key for key, _ in given[:pairs]}) == pairs
    assert set(given[pairs:]) <= set(given[:pairs])


def test_a_line_of_recall_tells_what_diverged():
    parameters, pairs = {"parameters": 120_000}, {"4": 0.5, "8": 1.25, "16": 2.5}
    seeds = [
        {**parameters, "gradient norm": 3.0, **pairs},
        {**parameters, "gradient norm": 1e7},
        {**parameters, "gradient norm": 2.0, "4": 1.5, "8": 1.25, "16": 2.7},
    ]
    assert list(recall.line("yaad", seeds).values())[1:] == [
        "0.12 M",
        "2 of 3",
        "1.00 (0.50 to 1.50)",
        "1.25 (1.25 to 1.25)",
        "2.60 (2.50 to 2.70)",
        "1e+07",
    ]


def test_recall_is_drawn_also_where_every_seed_diverged(tmp_path):
    seeds = [{"4": 0.5, "8": 1.25, "16": 2.5}, {"4": 1.0, "8": 1.0, "16": 1.0}]
    found = {"yaad": recall.by_pairs(seeds), "memora": recall.by_pairs([{}, {}])}
    assert found["yaad"] == {4: [0.5, 1.0], 8: [1.25, 1.0], 16: [2.5, 1.0]}
    picture = imread(plot(found, 16, tmp_path / "folder" / "recall.png"))
    inside = picture[5:-60, 120:640, :3]  # left of the names, right of the axes' end
    for colour in ("#0072b2", "#d55e00", "#009e73"):
        assert np.isclose(inside, to_rgb(colour), atol=0.01).all(axis=-1).any()


def test_a_window_predicts_one_whole_episode(tmp_path, monkeypatch):
    monkeypatch.setattr(recall, "BATCH", 4)
    monkeypatch.setattr(recall, "HELDOUT", 3)
    text = recall.data(tmp_path, steps=2, pairs=8)
    prepared = prepare(text, tmp_path / "data")
    windows = prepared.windows("heldout")
    assert (len(windows), len(prepared.windows("train"))) == (3, 8)
    episodes = (tmp_path / "heldout-8.txt").read_text()
    for i in range(3):
        predicted = bytes(prepared.tokenizer.token_bytes(t)[0] for t in windows[i][1:])
        start = i * recall.LENGTH
        assert predicted.decode() == episodes[start : start + recall.LENGTH]


def test_what_a_memory_forgets_makes_it_chaotic():
    rule = replace(variants.yaad(), chunk_size=16)
    much, little, none = (
        max(influence.influence(rule, forgotten, length=256, sequences=4))
        for forgotten in (0.01, 0.001, 0.0)
    )
    assert much > 3 * none
    assert little < 1.5 * none

"""Experiments as files and as JSON: exact round trips, and what is refused."""

import dataclasses
import json
import math
import sys

import pytest

import experiments.paper
import experiments.quickstart
from miras_jax import variants
from miras_jax.core.types import Choice
from miras_jax.errors import UserError
from miras_jax.nn.attention import Attention
from miras_jax.nn.functional import FunctionalModel
from miras_jax.nn.miras import Miras, RateChoices
from miras_jax.nn.model import Model
from miras_jax.nn.rates import Fixed, LowRank, PerHead
from miras_jax.training.config import load_experiment
from miras_jax.training.serial import (
    first_difference,
    from_json,
    to_json,
    with_new_fields,
)


@dataclasses.dataclass(frozen=True)
class Holder(Choice):
    """What a user may write: a choice with a function among its fields."""

    function: object
    others: tuple = ()


def double(x):
    return 2 * x


def through_json(value):
    return from_json(json.loads(json.dumps(to_json(value))))


RULES = [make() for make in variants.ALL if not make().keeps_tokens]
MODELS = [Model(mixers=(Miras(rule, num_heads=2),), depth=2) for rule in RULES]
OTHERS = [
    experiments.quickstart.experiment(),
    Model(mixers=(Miras(variants.yaad()), Attention(window=128))),
    Miras(
        variants.titans(),
        rates=RateChoices(
            learn=PerHead("sigmoid", (0.1, 0.5)),
            keep=Fixed((0.01, 0.1), "keep"),
            momentum=LowRank("softplus", (1.0, 4.0), rank=8),
        ),
    ),
    Holder(double, (double, (1, None, "x", True), 0.1)),
]


@pytest.mark.parametrize("value", MODELS + OTHERS)
def test_round_trip(value):
    back = through_json(value)
    assert back == value
    assert type(back) is type(value) and repr(back) == repr(value)


def test_every_rule_is_told_from_every_other():
    texts = [json.dumps(to_json(model)) for model in MODELS]
    assert len(set(texts)) == len(set(RULES))


def test_every_field_counts():
    experiment = experiments.quickstart.experiment()
    for field in dataclasses.fields(experiment):
        stored = to_json(experiment)
        del stored[field.name]
        if field.default is dataclasses.MISSING:
            with pytest.raises(TypeError, match=field.name):
                from_json(stored)
    stored = to_json(experiment) | {"seed": 7}
    assert from_json(stored) == dataclasses.replace(experiment, seed=7)


def without_defaults(value):
    """Its JSON form as written by code whose classes had no field with a default."""
    stored = to_json(value)
    if isinstance(value, tuple):
        return [without_defaults(v) for v in value]
    for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
        if field.default == getattr(value, field.name):
            del stored[field.name]
        else:
            stored[field.name] = without_defaults(getattr(value, field.name))
    return stored


@pytest.mark.parametrize("value", [*MODELS[::5], *OTHERS[:3]])
def test_what_was_stored_before_a_field_came_is_the_same(value):
    old, new = without_defaults(value), to_json(value)
    assert old != new
    assert with_new_fields(old) == new == with_new_fields(new)
    assert from_json(old) == value


def test_a_difference_is_named_with_both_values():
    stored = without_defaults(MODELS[0])
    other = to_json(dataclasses.replace(MODELS[0], remat="block", width=8))
    difference = first_difference(with_new_fields(stored), other)
    assert difference == "width: saved 256, expected 8"
    assert "remat: saved none, expected block" in first_difference(
        with_new_fields(stored), other | {"width": 256}
    )
    unknown = {"is": "no_such_module.Choice", "x": 1}
    assert with_new_fields(unknown) == unknown


def test_a_function_is_stored_by_its_name():
    stored = to_json(double)
    assert stored == {"is": "function", "name": f"{__name__}.double"}
    assert from_json(stored) is double
    assert through_json(Holder(math.sqrt)).function is math.sqrt


def test_a_function_without_a_name_of_its_own_is_refused():
    def local(x):
        return x

    for function in (lambda x: x, local):
        with pytest.raises(UserError, match="at the top of a module"):
            to_json(Holder(function))


def test_a_class_that_other_commands_could_not_import_is_refused():
    class Local(Holder):
        pass

    with pytest.raises(UserError, match="at the top of a module"):
        to_json(Local(double))


@pytest.mark.parametrize("name", ["no_such_module.f", f"{__name__}.no_such_name"])
def test_what_cannot_be_imported_is_named(name):
    with pytest.raises(UserError, match=f"the run uses {name}"):
        from_json({"is": "function", "name": name})


GOOD = "from experiments.quickstart import experiment\n"


def test_an_experiment_is_loaded(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(GOOD)
    assert load_experiment(path) == experiments.quickstart.experiment()


NAMED = """
import dataclasses
from experiments.quickstart import experiment as base

def experiment(name):
    return dataclasses.replace(base(), steps=len(name))
"""


def test_one_of_several_experiments_is_loaded_by_its_name(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(NAMED)
    assert load_experiment(f"{path}:four").steps == 4
    with pytest.raises(UserError, match=f"name one of them, as {path}:NAME"):
        load_experiment(path)
    path.write_text(GOOD)
    with pytest.raises(UserError, match="mine.py is one experiment; leave :four out"):
        load_experiment(f"{path}:four")
    strange = tmp_path / "a:b.py"
    strange.write_text(GOOD)
    assert load_experiment(strange) == load_experiment(path)


def test_an_experiment_imports_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for package, name in ((None, "lonely_base"), ("packed_runs", "packed_runs.base")):
        folder = tmp_path / (package or "")
        folder.mkdir(exist_ok=True)
        if package:
            (folder / "__init__.py").touch()
        (folder / f"{name.split('.')[-1]}.py").write_text(GOOD)
        (folder / "mine.py").write_text(f"from {name} import experiment\n")
        assert load_experiment(folder / "mine.py").steps


@pytest.mark.parametrize("size", experiments.paper.SIZES)
def test_the_papers_models_have_about_their_size(size):
    millions = int(size.removesuffix("m"))
    for name in experiments.paper.RULES:
        wanted = load_experiment(f"{experiments.paper.__file__}:{name}_{size}")
        model = FunctionalModel(wanted.model, wanted.data.tokenizer.vocab_size)
        assert 0.7 < model.size / 1e6 / millions < 1.15, name
    # Rows of a step, and what Table 5 has of tokens.
    tokens = wanted.steps * wanted.batch_size * wanted.data.context_length
    assert tokens == pytest.approx(experiments.paper.SIZES[size].tokens, rel=1e-4)


@pytest.mark.parametrize("name", ["yaad", "yaad_780M", "titans_780m", ""])
def test_a_name_that_the_paper_has_not_is_refused(name):
    with pytest.raises(UserError, match="moneta, yaad, memora.*170m, 340m"):
        load_experiment(f"{experiments.paper.__file__}:{name}")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.py", None, "none.py is no file"),
        ("folder.py", ..., "folder.py is no file"),
        ("mine.txt", GOOD, "mine.txt is no Python file"),
        ("mine", GOOD, "mine is no Python file"),
        ("bad.py", "def experiment(:\n", "bad.py cannot be run .*SyntaxError"),
        ("empty.py", "x = 1\n", "has no function experiment"),
        ("value.py", "experiment = 3\n", "has no function experiment"),
        ("wrong.py", "def experiment():\n    return 3\n", "returned a int"),
        ("fails.py", "def experiment():\n    return 1 / 0\n", "ZeroDivisionError"),
        ("imports.py", "import no_such_module\n", "ModuleNotFoundError.*no_such_mod"),
    ],
)
def test_what_is_no_experiment_is_refused(name, text, message, tmp_path):
    path = tmp_path / name
    if text is ...:
        path.mkdir()
    elif text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_experiment(path)
    assert "\n" not in str(caught.value)


def test_a_user_error_in_the_file_is_not_wrapped(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from miras_jax.errors import UserError\nraise UserError('lower the steps')\n"
    )
    with pytest.raises(UserError, match="^lower the steps$"):
        load_experiment(path)


@pytest.mark.parametrize(
    "name", ["steps", "batch_size", "evaluate_every", "checkpoint_every"]
)
def test_intervals_start_at_one(name):
    with pytest.raises(UserError, match=f"Experiment.{name} must be at least 1; got 0"):
        dataclasses.replace(experiments.quickstart.experiment(), **{name: 0})

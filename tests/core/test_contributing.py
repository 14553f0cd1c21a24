"""What CONTRIBUTING.md spells out works, and an incomplete idea says what it lacks."""

import re
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import miras_jax as miras
from miras_jax import algorithm, bias, memory, retention
from miras_jax.core.types import Choice
from miras_jax.errors import UserError
from tests import core
from tests.core import Case, error

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
(EXAMPLE,) = re.findall(r"```python\n(from dataclasses.*?)```", TEXT, re.DOTALL)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("readout", ["linear", "exact"])
def test_the_examples_run_in_blocks_as_they_are_defined(readout):
    names = {"__name__": __name__}
    exec(compile(EXAMPLE, "CONTRIBUTING.md", "exec"), names)
    rule = replace(names["rule"], chunk_size=4, readout=readout)
    params, tokens = core.inputs(Case("example", rule))
    expected, _ = core.run_whole(rule, "definition")(params, tokens)
    actual, _ = core.run_whole(rule, None)(params, tokens)
    assert error(actual, expected) < 1e-10
    # They differ from the choices that a rule has by default.
    default = miras.Rule(rule.memory, chunk_size=4)
    assert error(core.run_whole(default, None)(params, tokens)[0], expected) > 1e-2


def rule(**choices):
    return miras.Rule(**({"memory": memory.Linear(), "chunk_size": 4} | choices))


@dataclass(frozen=True, repr=False)
class Nesterov(algorithm.Momentum):
    def step(self, carried, update, momentum):
        m = momentum * carried + update
        return momentum * m + update, m


@dataclass(frozen=True, repr=False)
class Slanted(retention.Identity):
    is_identity = False

    def scale(self, dual):
        return jnp.ones_like(dual)


@dataclass(frozen=True, repr=False)
class Rubbed(retention.Decay):
    rates = ("keep", "friction")


@dataclass
class Thawed(Choice):
    rates = ()


def incomplete(*bases):
    return make_dataclass("Idea", (), bases=bases or (Choice,), frozen=True)()


@pytest.mark.parametrize(
    "choices, reason",
    [
        ({"bias": incomplete()}, "Idea.. lacks rates, loss, cotangent"),
        ({"retention": incomplete()}, "lacks is_identity.*from retention.Gate"),
        ({"algorithm": incomplete(algorithm.Descent)}, "lacks at:"),
        ({"memory": incomplete()}, "lacks entries, shapes, init, read"),
        ({"bias": bias.L2}, "instance of a class"),
        ({"bias": Thawed()}, "frozen=True"),
        ({"retention": Rubbed()}, "uses rates.friction"),
        ({"algorithm": Nesterov()}, "flow of Momentum"),
    ],
)
def test_what_an_idea_lacks_is_said_when_a_rule_is_built(choices, reason):
    with pytest.raises(UserError, match=reason):
        rule(**choices)


def test_a_step_at_a_chunk_s_end_needs_no_switch():
    class Halving(retention.Identity):
        def settle(self, anchor, dual):
            return dual / 2

    assert Halving().settles and not retention.Decay().settles
    assert retention.Sphere().settles and algorithm.Muon().settles
    assert retention.ElasticNet().settles
    assert not retention.ElasticNet("lazy").settles


def test_the_factor_of_the_linear_readout_is_one_that_products_take():
    params = rule().init(jax.random.key(0), 4, 6)
    with pytest.raises(UserError, match=r"shape \(4, 6\).*one for each output"):
        rule(retention=Slanted()).start(params)
    rule(retention=Slanted(), readout="exact").start(params)

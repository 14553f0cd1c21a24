"""Rules in a line: Table 1 of Miras, made from the rules themselves.

Each axis contributes its piece of the equation, so that any rule has a line; a choice
that has no piece here is written by its name.

    Wₜ, Mₜ = Wₜᵀ   weights, and those of a plain matrix as papers print them
    Aₜ             the dual of a gate whose weights are a map of it
    αₜ, ηₜ, μₜ     rates keep, learn, momentum of a token
    Diag(αₜ)       the same where a model has one keep per channel of the keys
    ∇ℓ             gradient of the bias at the weights of the chunk's start
    r              M(kₜ) - vₜ
    O              orthogonalised (Muon)
    Σ₁₆            the sum over the last 16 tokens (Omega)
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import NamedTuple

import jax

from miras_jax.core import algorithm, bias, retention
from miras_jax.core.rule import Rule
from miras_jax.core.types import Choice

HEAD_DIM = 64
"""Of the states whose size a row gives."""


class Row(NamedTuple):
    """One line of the table, as text."""

    memory: str
    bias: str
    retention: str
    algorithm: str
    write: str
    chunk: str  # tokens whose gradients are taken at the same weights, and the readout
    state: str  # numbers that a head carries while it decodes


HEADINGS = Row(
    "memory",
    "attentional bias ℓ",
    "retention",
    "algorithm",
    "write rule",
    "chunk, readout",
    "state per head",
)


def row(rule: Rule, channelwise: Sequence[str] = ()) -> Row:
    """A rule as a line of the table; channelwise: its rates of one per channel."""
    axes = (rule.memory, rule.bias, rule.retention, rule.algorithm)
    names = [brief(axis) for axis in axes]
    names[1] += f": {loss(rule.bias)}"
    # With one token per chunk every readout is the paper's recurrence.
    chunk = "1" if rule.chunk_size == 1 else f"{rule.chunk_size:,}, {rule.readout}"
    size = state_size(rule)
    write = write_rule(rule, channelwise)
    return Row(*names, write, chunk, f"{size:,}" if size else "grows")


def state_size(rule: Rule, dim: int = HEAD_DIM) -> int:
    """Numbers that a head carries from token to token; 0 if it keeps the tokens."""
    state = jax.eval_shape(lambda: rule.start(rule.init(jax.random.key(0), dim, dim)))
    return sum(x.size for x in jax.tree.leaves(state._replace(position=())))


def brief(choice: Choice) -> str:
    """A choice by its name and what differs from its defaults."""
    parts = [
        field.name if value is True else f"{field.name}={_short(value)}"
        for field in fields(choice)
        if (value := getattr(choice, field.name)) != field.default
    ]
    name = type(choice).__name__
    return f"{name}({', '.join(parts)})" if parts else name


def _short(value) -> str:
    if isinstance(value, Choice):
        return brief(value)
    return getattr(value, "__qualname__", str(value))


def loss(choice: bias.Bias) -> str:
    """The inner loss as a formula."""
    match choice:
        case bias.DotProduct():
            return "−⟨M(k), v⟩"
        case bias.L2():
            return "½‖r‖²"
        case bias.Lp(p=p):
            return f"Σ|r|{_power(p)}"
        case bias.Huber(form="coordinate"):
            return "½r² below δ, else δ|r|"
        case bias.Huber(form="norm"):
            return "½‖r‖² below δ, else δ‖r‖"
        case bias.Huber(form="switch"):
            return "½‖r‖² below δ, else δ‖r‖₁"
        case bias.Linf():
            return "max|r|, smooth"
        case bias.Robust():
            return "½(‖r‖ + Δ)²"
        case _:
            return f"{type(choice).__name__}(M(k), v)"


def write_rule(rule: Rule, channelwise: Sequence[str] = ()) -> str:
    """What one token does to the memory, as an equation."""
    if isinstance(rule.algorithm, algorithm.NonParametric):
        window = getattr(rule.memory, "window", None)
        last = f", the last {window}" if window else ""
        return f"Mₜ = Mₜ₋₁ ∪ {{(kₜ, vₜ)}}{last}"
    per_channel = "keep" in channelwise
    equations = _expanded(rule, per_channel)
    equations = equations or [*_recurrence(rule), *_mapped(rule)]
    if isinstance(rule.algorithm, algorithm.Newton):
        before = [_kept(rule.retention, of, per_channel) for of in ("Gₜ₋₁", "Hₜ₋₁")]
        equations = [
            "Mₜ = Gₜ (Hₜ + Λ)⁻¹",
            f"Gₜ = {before[0]} + ηₜ vₜ kₜᵀ",
            f"Hₜ = {before[1]} + ηₜ kₜ kₜᵀ",
        ]
    if rule.algorithm.steps > 1:
        equations.append(f"{rule.algorithm.steps} pairs (kₜ, vₜ) per token, αₜ once")
    return ", ".join(equations)


def _expanded(rule: Rule, per_channel: bool) -> list[str] | None:
    """The matrix form of a plain matrix, whose gradient is (M kₜ - vₜ) kₜᵀ or -vₜ kₜᵀ.

    None where the gradient does not enter the matrix as it is.
    """
    plain = rule.memory.is_linear and rule.retention.is_identity
    before = _kept(rule.retention, "Mₜ₋₁", per_channel)
    keep = _kept(rule.retention, "I", per_channel)
    match rule.algorithm:
        case algorithm.GradientDescent():
            rate, where = "ηₜ", []
        case algorithm.Implicit():
            rate, where = "sₜ", ["sₜ = ηₜ / (1 + ηₜ‖kₜ‖²)"]
        case algorithm.EraseWrite() if plain:
            return [f"Mₜ = Mₜ₋₁ ({keep} − eₜ (εₜ ⊙ eₜ)ᵀ) + ηₜ vₜ kₜᵀ"]
        case _:
            return None
    written = f"{rate} vₜ kₜᵀ"
    match rule.bias:
        case bias.DotProduct() if plain:
            return [f"Mₜ = {before} + {written}", *where]
        case bias.L2() if plain and rule.algorithm.at == "retained":
            return [f"Mₜ = {before} (I − {rate} kₜ kₜᵀ) + {written}", *where]
        case bias.L2() if plain and rule.chunk_size == 1:
            return [f"Mₜ = Mₜ₋₁ ({keep} − {rate} kₜ kₜᵀ) + {written}", *where]
        case _:
            return None


def _recurrence(rule: Rule) -> list[str]:
    """Step and recurrence of the dual, or of the weights where these are the same."""
    name = "A" if _has_dual(rule.retention) else "W"
    before = _kept(rule.retention, f"{name}ₜ₋₁", per_channel=False)
    learner, gradient, rated = rule.algorithm, "∇ℓ", "ηₜ ∇ℓ"
    if isinstance(learner, algorithm.Omega):
        last = str(learner.window).translate(_SUBSCRIPTS)
        learner, gradient, rated = learner.inner, f"Σ{last} ∇ℓᵢ", f"Σ{last} ηᵢ ∇ℓᵢ"
    match learner:
        case algorithm.GradientDescent() | algorithm.Implicit():
            return [f"{name}ₜ = {before} − {rated}"]
        case algorithm.Muon(learn="outside"):
            return [f"{name}ₜ = {before} + ηₜ O(Sₜ)", f"Sₜ = μₜ Sₜ₋₁ − {gradient}"]
        case algorithm.Muon():
            return [f"{name}ₜ = {before} + O(Sₜ)", f"Sₜ = μₜ Sₜ₋₁ − {rated}"]
        case algorithm.Momentum():
            return [f"{name}ₜ = {before} + Sₜ", f"Sₜ = μₜ Sₜ₋₁ − {rated}"]
        case other:
            return [f"{name}ₜ = {before} + {type(other).__name__}(−{rated})"]


def _kept(gate: retention.Retention, of: str, per_channel: bool) -> str:
    """What the gate keeps of a matrix, or of I; columns are the keys' channels."""
    if not gate.rates:
        return of
    if gate.axis == "both":
        return f"(βₜ αₜᵀ) ⊙ {of}"
    if not per_channel:
        return f"αₜ {of}"
    if of == "I":
        return "Diag(αₜ)"
    return f"{of} Diag(αₜ)" if gate.axis == "key" else f"Diag(αₜ) {of}"


def _has_dual(gate: retention.Retention) -> bool:
    return not (gate.is_identity or gate.settles)


def _mapped(rule: Rule) -> list[str]:
    """From the dual to the weights, or the gate's own step where a chunk ends."""
    match rule.retention:
        case gate if gate.is_identity:
            return []
        case retention.Lq(q=q, form="paper"):
            return [f"Wₜ = Aₜ / {_norm(q)}"]
        case retention.Lq(q=q):
            return [f"Wₜ = sign(Aₜ) |Aₜ|{_power(q - 1)} / {_norm(q)}"]
        case retention.KL(mass=mass):
            return [f"Wₜ = {mass:g} softmax(Aₜ)"]
        case retention.FDivergence():
            return ["Wₜ ← Wₜ₋₁ ⊙ g(Wₜ − Wₜ₋₁ − ζₜ)"]
        case retention.ElasticNet(form="proximal"):
            return ["Wₜ ← sign(Wₜ) max(0, |Wₜ| − γ)"]
        case retention.ElasticNet():
            return ["Wₜ = sign(Aₜ) max(0, |Aₜ| − γ)"]
        case retention.Bregman(link=link):
            return [f"Wₜ = {type(link).__name__.lower()}(Aₜ)"]
        case other:
            arrow, of = ("←", "W") if other.settles else ("=", "A")
            return [f"Wₜ {arrow} {type(other).__name__}({of}ₜ)"]


_SUPERSCRIPTS = str.maketrans("0123456789.-", "⁰¹²³⁴⁵⁶⁷⁸⁹·⁻")
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def _power(p: float) -> str:
    return "" if p == 1 else f"{p:g}".translate(_SUPERSCRIPTS)


def _norm(q: float) -> str:
    return f"‖Aₜ‖{f'{q:g}'.translate(_SUBSCRIPTS)}{_power(q - 2)}"


def markdown(
    makers: Sequence[Callable[[], Rule]],
    channelwise: Mapping[Callable[[], Rule], Sequence[str]],
) -> str:
    """The table of these named rules in Markdown, each with its paper's arXiv number.

    That is the first one that the docstring names.
    """
    lines = [("model", *HEADINGS, "paper"), ("---",) * (2 + len(HEADINGS))]
    for make in makers:
        found = re.search(r"\d{4}\.\d{5}", make.__doc__)
        paper = f"[{found[0]}](https://arxiv.org/abs/{found[0]})" if found else ""
        # A bar would end the cell.
        cells = [
            cell.replace("|", r"\|") for cell in row(make(), channelwise.get(make, ()))
        ]
        lines.append((f"`{make.__name__}`", *cells, paper))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

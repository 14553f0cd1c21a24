"""Table 1 from the code: equations put together from a rule's parts."""

import re
from dataclasses import dataclass, replace

import jax.numpy as jnp
import pytest

import miras_jax as miras
from miras_jax import algorithm, bias, memory, retention, variants
from miras_jax.core import table
from miras_jax.core.types import Choice

WRITTEN = {
    variants.retnet: "Mₜ = αₜ Mₜ₋₁ + ηₜ vₜ kₜᵀ",
    variants.linear_attention: "Mₜ = Mₜ₋₁ + ηₜ vₜ kₜᵀ",
    variants.delta_net: "Mₜ = Mₜ₋₁ (I − ηₜ kₜ kₜᵀ) + ηₜ vₜ kₜᵀ",
    variants.gated_delta_net: "Mₜ = αₜ Mₜ₋₁ (I − ηₜ kₜ kₜᵀ) + ηₜ vₜ kₜᵀ",
    variants.gated_delta_net_miras: "Mₜ = Mₜ₋₁ (αₜ I − ηₜ kₜ kₜᵀ) + ηₜ vₜ kₜᵀ",
    variants.titans: "Wₜ = αₜ Wₜ₋₁ + Sₜ, Sₜ = μₜ Sₜ₋₁ − ηₜ ∇ℓ",
    variants.moneta: "Aₜ = αₜ Aₜ₋₁ − ηₜ ∇ℓ, Wₜ = Aₜ / ‖Aₜ‖₄²",
    variants.memora: "Aₜ = αₜ Aₜ₋₁ − ηₜ ∇ℓ, Wₜ = 64 softmax(Aₜ)",
    variants.lact: "Wₜ = Wₜ₋₁ + O(Sₜ), Sₜ = μₜ Sₜ₋₁ − ηₜ ∇ℓ, Wₜ ← Sphere(Wₜ)",
    variants.omega_net: "Wₜ = αₜ Wₜ₋₁ − Σ₁₆ ηᵢ ∇ℓᵢ",
    variants.atlas: "Wₜ = αₜ Wₜ₋₁ + ηₜ O(Sₜ), Sₜ = μₜ Sₜ₋₁ − Σ₁₆ ∇ℓᵢ",
    variants.mesa_net: "Mₜ = Gₜ (Hₜ + Λ)⁻¹, Gₜ = αₜ Gₜ₋₁ + ηₜ vₜ kₜᵀ, "
    "Hₜ = αₜ Hₜ₋₁ + ηₜ kₜ kₜᵀ",
    variants.ttt_linear: "Wₜ = Wₜ₋₁ − ηₜ ∇ℓ",
    **dict.fromkeys(
        (variants.gla, variants.hgrn2, variants.mamba, variants.longhorn_diagonal),
        "Mₜ = Mₜ₋₁ Diag(αₜ) + ηₜ vₜ kₜᵀ",
    ),
    variants.dfw: "Mₜ = (βₜ αₜᵀ) ⊙ Mₜ₋₁ + ηₜ vₜ kₜᵀ",
    variants.kimi_delta_attention: "Mₜ = Mₜ₋₁ Diag(αₜ) (I − ηₜ kₜ kₜᵀ) + ηₜ vₜ kₜᵀ",
    variants.rwkv7: "Mₜ = Mₜ₋₁ (Diag(αₜ) − eₜ (εₜ ⊙ eₜ)ᵀ) + ηₜ vₜ kₜᵀ",
}


@pytest.mark.parametrize("make", WRITTEN, ids=lambda make: make.__name__)
def test_the_write_rule_of_published_models(make):
    channelwise = variants.CHANNELWISE.get(make, ())
    assert table.row(make(), channelwise).write == WRITTEN[make]


def test_each_axis_contributes_its_piece():
    rule = variants.yaad()
    mirror = replace(rule, retention=retention.Lq(3.5, "mirror"))
    moving = replace(mirror, algorithm=algorithm.Momentum())
    end = "Wₜ = sign(Aₜ) |Aₜ|²·⁵ / ‖Aₜ‖₃.₅¹·⁵"
    assert table.write_rule(mirror) == f"Aₜ = αₜ Aₜ₋₁ − ηₜ ∇ℓ, {end}"
    step = "Aₜ = αₜ Aₜ₋₁ + Sₜ, Sₜ = μₜ Sₜ₋₁ − ηₜ ∇ℓ"
    assert table.write_rule(moving) == f"{step}, {end}"
    # A plain matrix in chunks takes its gradient elsewhere: no closed form.
    chunks = replace(variants.delta_net(), chunk_size=4)
    assert table.write_rule(chunks) == "Wₜ = Wₜ₋₁ − ηₜ ∇ℓ"


def test_the_line_of_a_rule():
    row = table.row(replace(variants.moneta(), readout="exact", chunk_size=4))
    assert row == table.Row(
        memory="MLP",
        bias="Lp: Σ|r|³",
        retention="Lq",
        algorithm="GradientDescent",
        write=WRITTEN[variants.moneta],
        chunk="4, exact",
        state="65,664",  # two matrices and the anchor of each, a keep per row or column
    )
    assert table.row(variants.softmax_attention()).state == "grows"


@dataclass(frozen=True, repr=False)
class Strange(Choice):
    """A bias that the table knows nothing of."""

    rates = ()

    def loss(self, prediction, value, threshold=None): ...

    def cotangent(self, prediction, value, threshold=None): ...


@dataclass(frozen=True, repr=False)
class Shrunk(retention.Identity):
    """A gate that the table knows nothing of."""

    is_identity = False


def test_an_idea_without_a_piece_is_written_by_its_name():
    rule = miras.Rule(memory.MLP(), Strange(), Shrunk())
    assert table.write_rule(rule) == "Aₜ = αₜ Aₜ₋₁ − ηₜ ∇ℓ, Wₜ = Shrunk(Aₜ)"
    assert table.loss(rule.bias) == "Strange(M(k), v)"
    assert table.loss(bias.Lp(1.0)) == "Σ|r|"
    assert table.brief(bias.Function(jnp.dot)) == "Function(function=dot)"


def test_markdown_has_a_line_for_every_rule_and_no_bar_inside_a_cell():
    header, dashes, *lines = table.markdown(
        variants.ALL, variants.CHANNELWISE
    ).splitlines()
    assert len(lines) == len(variants.ALL)
    for line in (header, dashes, *lines):
        assert line.replace(r"\|", "").count("|") == header.count("|")
    for make, line in zip(variants.ALL, lines, strict=True):
        assert re.search(r"\[(\d{4}\.\d{5})\]\(https://arxiv.org/abs/\1\) \|$", line), (
            make
        )
        channels = any("Diag" in cell or "βₜ" in cell for cell in line.split(" | "))
        assert channels == (make in variants.CHANNELWISE), make
    assert "[2504.13173]" in lines[variants.ALL.index(variants.yaad)]


def test_a_keep_per_channel_of_the_values_stands_on_their_side():
    rule = replace(variants.gla(), retention=retention.Decay(axis="value"))
    write = table.write_rule(rule, ("keep",))
    assert write == "Mₜ = Diag(αₜ) Mₜ₋₁ + ηₜ vₜ kₜᵀ"

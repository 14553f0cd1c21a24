"""The layer benchmark: baselines, the FLOP formula, and a run on a tiny shape."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.bench import layer, products, report
from miras_jax import variants
from miras_jax.errors import UserError
from pallas_kernels.fused_scan.program import multiply_adds


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_gru(params, x):
    (w, w_bias, u, u_bias), h, outputs = params, np.zeros(x.shape[1]), []
    for token in x:
        x_r, x_z, x_n = np.split(token @ w + w_bias, 3)
        h_r, h_z, h_n = np.split(h @ u + u_bias, 3)
        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
        h = (1 - z) * np.tanh(x_n + r * h_n) + z * h
        outputs.append(h)
    return np.stack(outputs)


def numpy_lstm(params, x):
    (w, w_bias, u, u_bias), outputs = params, []
    h = c = np.zeros(x.shape[1])
    for token in x:
        i, f, g, o = np.split(token @ w + w_bias + h @ u + u_bias, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs)


@pytest.mark.parametrize(
    ("cell", "reference"), [("gru", numpy_gru), ("lstm", numpy_lstm)]
)
def test_recurrent_baselines_compute_what_numpy_does(cell, reference):
    case = layer.Case("layer", cell, "recurrent", None, batch=2, length=7, width=6)
    computed = layer.build(case)
    params, x = jax.tree.map(np.asarray, computed.inputs)
    outputs = computed.function(computed.inputs)
    expected = [reference(params, sequence) for sequence in x]
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)

    scan_only = layer.build(replace(case, scope="memory"))
    np.testing.assert_array_equal(scan_only.function(scan_only.inputs), outputs)


def test_scopes_and_forms_are_of_the_same_memory():
    case = layer.Case("memory", "yaad", "chunked", 2, 1, 4, width=16, heads=2)
    chunked = layer.build(case)
    definition = layer.build(replace(case, form="definition"))
    np.testing.assert_allclose(
        jax.jit(chunked.function)(chunked.inputs),
        jax.jit(definition.function)(definition.inputs),
        rtol=1e-4,
        atol=1e-5,
    )
    mixer = layer.build(replace(case, scope="layer"))
    assert jax.eval_shape(mixer.function, mixer.inputs).shape == (1, 4, 16)
    # Three square projections for q, k, v, two for gate and output, and those of the
    # three rates: 16 x 32 down to the rank, 32 x 16 up.
    projections = 5 * 16 * 16 + 3 * 2 * 16 * 32
    assert mixer.flops - chunked.flops == 4 * 2 * projections


def test_products_are_those_of_the_memory():
    case = layer.Case("memory", "yaad", "products", 4, 1, 8, width=16, heads=2)
    computed = layer.build(case)
    jaxpr = jax.make_jaxpr(computed.function)(computed.inputs)
    # Of [8, 32] and [32, 8], per token and head: all but the pairs of a chunk, of which
    # the scores of both matrices and what they weigh are computed whole.
    pairs = 2 * 4 * (8 + 32)
    assert multiply_adds(jaxpr.jaxpr) == 8 * 2 * (7 * 256 + pairs)
    assert computed.flops == 8 * 2 * (7 * 512 + 5 * 80)

    queries, keys = np.random.default_rng(0).normal(size=(2, 4, 3))
    w, outputs = np.arange(9.0).reshape(3, 3), []
    for start in (0, 2):
        q, k = queries[start : start + 2], keys[start : start + 2]
        steps = products.SMALL * (k.T @ (k @ w - k))
        w = w - steps
        outputs.append(q @ w)
    read = products.read([np.arange(9.0).reshape(3, 3)], queries, keys, 2)
    np.testing.assert_allclose(read, np.concatenate(outputs), rtol=1e-5, atol=1e-5)


def test_useful_flops_count_every_product_once():
    # Shapes [8, 32] and [32, 8]: write 2 x 512, pulled back 2 x 256, update and read
    # 2 x 512 each; 5 causal pairs' worth of (8 + 32) x 2 at chunk 4.
    assert layer.memory_flops(variants.yaad(), None, 8) == 7 * 512
    assert layer.memory_flops(variants.yaad(), 4, 8) == 7 * 512 + 5 * 80
    # [8, 8]: predict, update, read; the triangular system fills the other half.
    assert layer.memory_flops(variants.gated_delta_net(), 4, 8) == 6 * 64 + 8 * 16
    # Update and read, five pairs of (8 + 8); two delta rules; and none is made up.
    assert layer.memory_flops(variants.retnet(), 4, 8) == 4 * 64 + 5 * 16
    assert layer.memory_flops(variants.delta_product(), 4, 8) == 2 * (6 * 64 + 8 * 16)
    assert layer.memory_flops(variants.rwkv7(), 4, 8) is None


def test_cases():
    cases = layer.list_cases([512, 128], [1, 2], [8, 16], ["yaad", "gated_delta_net"])
    # Per scope, batch and length: Yaad at two chunks, Gated DeltaNet at its tile, and
    # two cells; per batch one definition; of Yaad's memory the products, too.
    assert len(cases) == len(set(cases)) == 2 * 2 * 2 * 5 + 2 + 2 * 2 * 2
    slow = [case for case in cases if case.form == "definition"]
    assert [(c.scope, c.batch, c.length) for c in slow] == [
        ("memory", 1, 128),
        ("memory", 2, 128),
    ]
    few = layer.list_cases(
        [512], [1], [8], ["yaad"], ["memory", "definition", "products", "recurrent"]
    )
    assert [(c.scope, c.variant, c.chunk) for c in few] == [("layer", "yaad", 8)]


def test_rows_table_and_summary(tmp_path, monkeypatch, capsys):
    cases = layer.list_cases(
        [4], [1], [2], ["gated_delta_net"], without=["layer", "definition"]
    )
    tiny = [replace(case, width=16, heads=2) for case in cases]
    monkeypatch.setattr(layer, "list_cases", lambda *_: tiny)
    path = tmp_path / "rows.json"
    layer.main(["--repeats", "1", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [r["variant"] for r in rows] == ["gated_delta_net", "gru", "lstm"]
    for row in rows:
        assert 0 < row["both_tokens_per_s"] and 0 < row["forward_tokens_per_s"]
        assert 0 < row["forward_mb"] < row["both_mb"]
        assert 0 < row["forward_share"] and 0 < row["both_share"]
    printed = capsys.readouterr().out
    assert report.table(rows) in printed and report.summary(rows) in printed


def test_summary_divides_the_right_rows():
    row = {
        "scope": "memory", "variant": "yaad", "form": "chunked", "chunk": 4, "batch": 1,
        "length": 8, "forward_tokens_per_s": 60.0, "both_tokens_per_s": 30.0,
        "backward_over_forward": 1.5, "family": "yaad",
    }  # fmt: skip
    shorter = row | {"length": 4, "forward_tokens_per_s": 90.0}
    slow = row | {"form": "definition", "length": 2, "both_tokens_per_s": 3.0}
    cell = {"form": "recurrent", "chunk": None, "forward_tokens_per_s": 20.0}
    rows = [shorter, slow, row, row | cell | {"variant": "lstm"}]
    rows += [row | cell | {"variant": "gru", "both_tokens_per_s": 15.0}]
    other = {"variant": "moneta", "both_tokens_per_s": 20.0}
    rows += [shorter | other, row | other]
    *_, yaad, moneta = report.summary(rows).splitlines()
    ratios = ["1.00", "/", "10.00", "3.00", "/", "1.00", "3.00", "/", "2.00"]
    assert yaad.split()[-14:] == [*ratios, "1.50", "/", "1.00", "1.5", "1.00"]
    assert moneta.split()[-1] == "1.50"


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--lengths", "1k"], "--lengths"),
        (["--chunks", "0"], "--chunks"),
        (["--variants", "yad"], "yad"),
        (["--no", "speed"], "speed"),
    ],
)
def test_mistakes_are_one_line(arguments, cause):
    with pytest.raises(UserError, match=cause) as error:
        layer.main(arguments)
    assert "\n" not in str(error.value)

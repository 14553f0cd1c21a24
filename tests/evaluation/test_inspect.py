"""The page of `miras inspect`: every token, the right numbers, nothing foreign."""

import html.parser
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx

import miras_jax as miras
from miras_jax import variants
from miras_jax.errors import UserError
from miras_jax.evaluation import inspect
from miras_jax.evaluation.inspect_page import LENSES, page, start_row
from miras_jax.evaluation.inspect_plots import plot_curves, plot_text
from miras_jax.export import Trained
from miras_jax.nn.attention import Attention
from miras_jax.nn.documents import locate
from miras_jax.nn.functional import FunctionalModel
from miras_jax.nn.miras import Miras
from miras_jax.nn.model import Model
from miras_jax.nn.titans import MAC
from miras_jax.training.tokenizer import ByteTokenizer
from tests import core

TEXT = 'A <b>"bold"</b> & naïve text,\n\nwith a $line$ </script> of its own.\n' * 2
TOKENIZER = ByteTokenizer()
LIMIT = 89  # tokens, which ends inside the second "ï"
READ = TEXT[: TEXT.rindex("ï")] + "\N{REPLACEMENT CHARACTER}"


def model(mixers, depth):
    config = Model(width=16, depth=depth, mixers=mixers, hidden=16)
    functional = FunctionalModel(config, TOKENIZER.vocab_size)
    parameters = functional.init(jax.random.key(0))
    return Trained(functional, parameters, TOKENIZER, step=0)


@pytest.fixture(scope="module")
def hybrid():
    """Two memories a layer, each read by two heads."""
    mixer = Miras(variants.delta_net(), num_heads=4, num_kv_heads=2)
    return model((Attention(2), mixer), 4)


@pytest.fixture(scope="module")
def reading(hybrid):
    return inspect.read(hybrid, TEXT, LIMIT)


def test_every_memory_is_observed_in_the_stream_that_reaches_it(hybrid, reading):
    functional, parameters, *_ = hybrid
    assert [memory.layer for memory in reading.memories] == [2, 4]
    document = np.append(256, TOKENIZER.encode(TEXT)[:LIMIT])[None]

    def by_hand(parameters):
        """The second layer, one block after the other."""
        whole = functional.bind(parameters)
        graph, stacked = nnx.split(whole.groups)
        first, second = nnx.merge(
            graph, jax.tree.map(lambda leaf: leaf[0], stacked)
        ).blocks
        x, _ = first(whole.embed(document))
        x = second.mixer_norm(x)
        start = second.mixer.start(1, 1, x.dtype)
        places = locate(x.shape[:2], start.last, None)
        tokens, _ = second.mixer.tokens(x, start.convolution, places)
        rule = second.mixer.config.rule
        head = jax.tree.map(lambda leaf: leaf[1], second.mixer.memory_params)
        tokens = jax.tree.map(lambda leaf: leaf[0, 1], tokens)
        info, _, _ = miras.observe(rule, head, rule.start(head), tokens)
        return info, whole(document)[0]

    info, logits = core.jit(by_hand)(parameters)
    for ours, expected in zip(reading.memories[0].info, info, strict=True):
        np.testing.assert_allclose(ours[1], expected[1:], rtol=1e-3, atol=1e-6)
    logits = np.float64(logits[0, :-1])
    rows = np.arange(len(logits))
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[rows, document[0, 1:]]
    np.testing.assert_allclose(reading.losses, losses, rtol=1e-3)


class Words(html.parser.HTMLParser):
    """The text of the spans inside #text, and whatever asks for something outside."""

    def __init__(self, source):
        super().__init__()
        self.words, self.outside, self.open, self.inside = [], [], None, False
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.outside += [tag for name in attributes if name in ("src", "href")]
        self.outside += [tag] * (tag in ("link", "img", "iframe", "base"))
        if attributes.get("id") == "text":
            self.inside = True
        elif self.inside and tag == "span":
            self.words.append("")
            self.open = True

    def handle_endtag(self, tag):
        self.open = False
        self.inside &= tag == "span"

    def handle_data(self, data):
        if self.inside and self.open:
            self.words[-1] += data


def test_the_page_shows_every_token_and_asks_for_nothing(reading):
    source = page(reading, "a <title>", "Model & text.")
    parsed = Words(source)
    assert parsed.words == list(reading.pieces) and "".join(parsed.words) == READ
    assert parsed.outside == [] and "a &lt;title&gt;" in source
    for word in ("http", "@import", "url(", "fetch(", "import("):
        assert word not in source.lower(), word
    # Nothing of the text ends an element, and no placeholder is left.
    assert source.count("</script>") == 2 and "$data" not in source


def test_the_numbers_of_the_page_are_those_of_the_reading(reading):
    bad = np.array(reading.losses)
    bad[3] = np.inf
    source = page(reading._replace(losses=bad), "title", "")
    (data,) = re.findall(r'id="data">(.*?)</script>', source, re.S)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    data = json.loads(data, parse_constant=refuse)
    assert [row["name"] for row in data["rows"]] == [
        f"layer {layer}, head {head}" for layer in (2, 4) for head in (1, 2)
    ]
    assert data["length"] == len(reading.pieces) == len(data["shared"])
    assert data["shared"][3] is None
    last = data["rows"][3]["values"]
    for lens, values in zip(LENSES, last, strict=True):
        if lens.field:
            expected = getattr(reading.memories[1].info, lens.field)[1]
            np.testing.assert_allclose(values, expected, rtol=1e-5)
    memory, head = start_row(reading)
    assert data["start"] == 2 * memory + head


def test_a_text_that_is_cut_says_how_much_is_left(reading):
    assert reading.left == len(TEXT.encode()) - LIMIT
    assert len(reading.pieces) == len(reading.losses) == LIMIT


def test_pictures_are_drawn(reading, tmp_path):
    for plot in (plot_text, plot_curves):
        path = plot(reading, tmp_path / "folder" / f"{plot.__name__}.png")
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_model_without_memory_is_refused():
    trained = model((Attention(2),), 1)
    with pytest.raises(UserError, match=r"no memory to look into: .* Attention\("):
        inspect.read(trained, TEXT, 10)


def test_a_memory_inside_segments_is_refused():
    memory = Miras(variants.delta_net(), num_heads=2)
    trained = model((MAC(memory, 8, num_heads=2),), 1)
    with pytest.raises(UserError, match="inside MAC"):
        inspect.read(trained, TEXT, 10)


def test_a_file_must_hold_text(tmp_path):
    path = tmp_path / "text.txt"
    with pytest.raises(UserError, match="is no file; name one"):
        inspect.text_of(path)
    path.write_text(" \n")
    with pytest.raises(UserError, match="holds no text"):
        inspect.text_of(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is no UTF-8 text"):
        inspect.text_of(path)

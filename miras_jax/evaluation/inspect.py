"""What the memories of a trained model make of a text: the data behind `miras inspect`.

Every memory of the model reads the text by `miras.observe`; what it tells is kept per
layer, head and token, for the page and the plots.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from miras_jax.core.info import Info, observe
from miras_jax.core.rule import Rule
from miras_jax.core.types import Params, Tokens
from miras_jax.errors import UserError
from miras_jax.export import Trained
from miras_jax.nn.functional import FunctionalModel, Parameters
from miras_jax.nn.miras import MirasLayer
from miras_jax.nn.titans import MACLayer
from miras_jax.training.tokenizer import StreamDecoder, Tokenizer


class Memory(NamedTuple):
    """What the memories of one layer, a head each, made of the text."""

    layer: int  # from 1, counted over all blocks of the model
    rule: Rule
    info: Info  # every field `[H, L]`


class Reading(NamedTuple):
    """A text of L tokens as the memories of a model saw it."""

    pieces: Sequence[str]  # L; together they are the text
    memories: Sequence[Memory]
    losses: np.ndarray  # [L], nats: the model's own loss of each token
    left: int  # tokens of the text that were not read


def text_of(path: str | Path) -> str:
    """The text of a file; UserError if it is no text or has none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: {error.reason}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path} is no file; name one that holds the text") from error
    if not text.strip():
        raise UserError(f"{path} holds no text; there is nothing to read")
    return text


def read(trained: Trained, text: str, limit: int) -> Reading:
    """Let the model read at most `limit` tokens of `text`, as one document."""
    if limit < 1:
        raise UserError(f"limit is {limit}; read at least 1 token")
    model, parameters, tokenizer, _ = trained
    ids = tokenizer.encode(text)
    left, ids = max(0, len(ids) - limit), ids[:limit]
    # As in training, a document follows an end of text, which is read but not shown.
    document = np.append(np.int32(tokenizer.end_of_text), ids)[None]
    memories = [
        Memory(layer, rule, Info(*(np.asarray(x)[:, 1:] for x in info)))
        for layer, rule, info in _memories(model, parameters, document)
    ]
    if not memories:
        mixers = ", ".join(map(str, model.config.mixers))
        raise UserError(
            f"the model has no memory to look into: its mixers are {mixers}"
        )
    losses = _losses(model, parameters, document)
    return Reading(_pieces(tokenizer, ids), memories, np.asarray(losses), left)


def _pieces(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    """Text of each token; one that ends inside a character leaves it to the next."""
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.feed(int(token)) for token in ids]
    pieces[-1] += decoder.finish()
    return pieces


@partial(jax.jit, static_argnames="model")
def _losses(model, parameters, document):
    logits, _ = model.apply(parameters, document)
    scores = jax.nn.log_softmax(logits[0, :-1])
    return -jnp.take_along_axis(scores, document[0, 1:, None], axis=1)[:, 0]


def _memories(
    model: FunctionalModel, parameters: Parameters, document: np.ndarray
) -> Iterator[tuple[int, Rule, Info]]:
    """(layer, rule, Info `[H, L]`) of every memory, group by group."""
    whole = model.bind(parameters)
    graph, stacked = nnx.split(whole.groups)
    blocks = len(model.config.mixers)

    @jax.jit
    def read_group(params, x):
        group = nnx.merge(graph, params)
        forward = nnx.capture(group, nnx.Intermediate, method_outputs=nnx.Intermediate)
        (x, _), outputs = forward(x)
        outputs = dict(nnx.to_flat_state(outputs))
        infos = []
        for path, layer in _layers(group):
            ((tokens, _),) = outputs[(*path, MirasLayer.tokens.__name__)].get_value()
            tokens = jax.tree.map(lambda t: t[0], tokens)
            # One query head of each memory: what is read does not change it. Several
            # memories may share it, and their keys.
            each = np.arange(layer.config.memories)
            queries, keys = (
                x[each * len(x) // len(each)] for x in (tokens.queries, tokens.keys)
            )
            tokens = tokens._replace(queries=queries, keys=keys)
            infos.append(_watch(layer.config.rule, layer.memory_params, tokens))
        return x, infos

    rules = [(path[1], layer.config.rule) for path, layer in _layers(whole.groups)]
    x = whole.embed(document)
    for group in range(model.config.depth // blocks):
        params = jax.tree.map(lambda leaf, i=group: leaf[i], stacked)
        x, infos = read_group(params, x)
        for (block, rule), info in zip(rules, infos, strict=True):
            yield group * blocks + block + 1, rule, info


def _layers(group: nnx.Module) -> list[tuple[tuple, MirasLayer]]:
    """The Miras layers of a group of blocks by their paths, in the blocks' order.

    Without the local memories of TNT, which begin anew with every shard: no one memory
    reads the whole text there.
    """
    modules = list(nnx.iter_modules(group))
    if any(isinstance(m, MACLayer) for _, m in modules):
        raise UserError(
            "a memory inside MAC reads what attention makes of each segment and cannot "
            "be looked into; MAG, MAL, TNT and plain Miras layers can"
        )
    found = [(path, m) for path, m in modules if type(m) is MirasLayer]
    return sorted(found, key=lambda item: item[0])


def _watch(rule: Rule, params: Params, tokens: Tokens) -> Info:
    def one_head(params, tokens):
        return observe(rule, params, rule.start(params), tokens)[0]

    return jax.vmap(one_head)(params, tokens)

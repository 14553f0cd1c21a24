"""The language model: embedding, blocks of mixer and MLP, norm, output."""

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from miras_jax.core import variants
from miras_jax.core.types import Choice
from miras_jax.errors import UserError
from miras_jax.nn.cross_entropy import cross_entropy
from miras_jax.nn.layers import Projection, RMSNorm, SwiGLU, multiply, param
from miras_jax.nn.logical import constrain, gathered
from miras_jax.nn.miras import Miras


class Mixer(Protocol):
    """What a model needs of a sequence layer; any frozen dataclass with these will do.

    The module that `build` makes has `start(batch, max_length, dtype)`, the cache
    before the first token, and `(x, cache, segment_ids) -> (y, cache)`.
    """

    alignment: int  # tokens of which a document's start in a row must be a multiple

    def build(self, width: int, output_scale: float, rngs: nnx.Rngs) -> nnx.Module: ...


@dataclass(frozen=True, repr=False)
class Model(Choice):
    """A language model of `depth` blocks whose mixers repeat `mixers` in turn.

    `(Miras(variants.yaad()),)` is Yaad, `(Miras(...), Attention(window=128))` the
    hybrid of Samba's kind (Miras-H), `(Attention(),)` is Transformer++.

    hidden: of the SwiGLU MLP; None takes 8/3 of the width, rounded up to 64.
    embedding: "tied" uses one matrix for input and output.
    compute_dtype: of activations and matrix operands; parameters and memory states are
    float32 always.
    remat: "block" stores only the input of each block for the backward pass.
    vocab_blocks: the loss has logits of one such part of the vocabulary at a time,
    computed once more for the backward pass (`miras_jax.nn.cross_entropy`).
    """

    width: int = 256
    depth: int = 6
    mixers: tuple[Mixer, ...] = (Miras(variants.yaad()),)
    hidden: int | None = None
    embedding: Literal["tied", "untied"] = "tied"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "block"] = "none"
    vocab_blocks: int = 1

    def __post_init__(self):
        for name, allowed in (
            ("embedding", ("tied", "untied")),
            ("compute_dtype", ("float32", "bfloat16")),
            ("remat", ("none", "block")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise UserError(
                    f"Model({name}=...) is {' or '.join(map(repr, allowed))}; "
                    f"got {value!r}."
                )
        if not self.mixers or self.depth < 1:
            raise UserError("Model needs at least one mixer and one block.")
        if self.vocab_blocks < 1:
            raise UserError(
                f"Model(vocab_blocks=...) is at least 1; got {self.vocab_blocks}."
            )
        if self.depth % len(self.mixers):
            raise UserError(
                f"depth {self.depth} is no multiple of the {len(self.mixers)} mixers "
                "that repeat; add or leave out blocks."
            )

    @property
    def alignment(self) -> int:
        """Tokens of which every document's start in a row must be a multiple."""
        return math.lcm(*(mixer.alignment for mixer in self.mixers))

    @property
    def mlp_hidden(self) -> int:
        return self.hidden or -(-8 * self.width // 3 // 64) * 64

    def build(self, vocab_size: int, rngs: nnx.Rngs) -> "LanguageModel":
        if self.vocab_blocks > vocab_size:
            raise UserError(
                f"Model(vocab_blocks={self.vocab_blocks}) makes more blocks than the "
                f"vocabulary has tokens: {vocab_size}."
            )
        return LanguageModel(self, vocab_size, rngs)


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Model, mixer: Mixer, rngs: nnx.Rngs):
        # Both branches of all blocks add to one stream: 1 / sqrt(2 depth) each keeps
        # its variance at the output of the order of one (GPT-2).
        scale = (2 * config.depth) ** -0.5
        self.mixer_norm = RMSNorm(config.width)
        self.mixer = mixer.build(config.width, scale, rngs)
        self.mlp_norm = RMSNorm(config.width)
        self.mlp = SwiGLU(config.width, config.mlp_hidden, scale=scale, rngs=rngs)

    def __call__(self, x, cache=None, segment_ids=None):
        y, cache = self.mixer(self.mixer_norm(x), cache, segment_ids)
        x = constrain(x + y, "batch", None, None)
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, "batch", None, None), cache


class Group(nnx.Module):
    """One block per entry of `mixers`: the unit that is repeated along the depth."""

    def __init__(self, config: Model, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(config, mixer, rngs) for mixer in config.mixers])

    def __call__(self, x, caches=None, segment_ids=None):
        caches = caches or (None,) * len(self.blocks)
        new_caches = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block(x, cache, segment_ids)
            new_caches.append(cache)
        return x, tuple(new_caches)


class LanguageModel(nnx.Module):
    """Token ids `[B, L]` -> logits `[B, L, vocab]` in float32.

    The groups of blocks are stacked along a leading axis of every parameter and
    scanned, so that compilation time does not grow with depth. The embedding is normal
    with standard deviation 0.02, which gives a tied output small first logits, and
    enters the stream times sqrt(width) (Gemma): otherwise what the blocks add would
    drown which token was read.
    """

    def __init__(self, config: Model, vocab_size: int, rngs: nnx.Rngs):
        self.config = config
        embedding = 0.02 * jax.random.normal(rngs.params(), (vocab_size, config.width))
        self.embedding = param(embedding, ("vocab", "embed"))
        groups = config.depth // len(config.mixers)

        @nnx.split_rngs(splits=groups)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return Group(config, rngs)

        self.groups = stack(rngs)
        self.norm = RMSNorm(config.width)
        self.output = nnx.data(
            None
            if config.embedding == "tied"
            else Projection(config.width, vocab_size, ("embed", "vocab"), rngs=rngs)
        )

    def start(self, batch: int, max_length: int) -> Any:
        """The cache before the first token, for reading up to max_length tokens."""
        graph, params = nnx.split(self.groups)
        dtype = jnp.dtype(self.config.compute_dtype)

        def start(params):
            group = nnx.merge(graph, params)
            return tuple(b.mixer.start(batch, max_length, dtype) for b in group.blocks)

        return jax.vmap(start)(params)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """What the blocks read: token ids `[B, L]` -> `[B, L, D]`."""
        # Whole on the way back, too: split along the width, every device would need all
        # tokens' gradients for its part.
        matrix = self.embedding[...].astype(self.config.compute_dtype)
        matrix = constrain(gathered(matrix, self.embedding.axes), "vocab", None)
        x = matrix[tokens] * self.config.width**0.5
        return constrain(x, "batch", None, None)

    def __call__(
        self,
        tokens: jax.Array,
        cache: Any = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Logits and the cache after these tokens (None if none was given).

        segment_ids `[B, L]`: the document of each token, 0 for padding; see
        `miras_jax.nn.documents`. None: all tokens go on with one document.

        Both caches are differentiable: what is read in two calls has the gradients of
        what is read in one, and `jax.lax.stop_gradient` of the cache between them
        truncates backpropagation there.
        """
        x, caches = self._read(tokens, cache, segment_ids)
        return self._logits(x, self._rows()), caches

    def losses(
        self,
        tokens: jax.Array,
        targets: jax.Array,
        cache: Any = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """-log p(target) in nats after each token, `[B, L]`, and the cache."""
        x, caches = self._read(tokens, cache, segment_ids)
        blocks = self.config.vocab_blocks
        return cross_entropy(self._logits, x, self._rows(), targets, blocks), caches

    def _read(self, tokens, cache, segment_ids):
        """What the output is computed of, `[B, L, D]`, and the cache."""
        x = self.embed(tokens)
        graph, params = nnx.split(self.groups)

        def read_group(x, inputs):
            params, caches = inputs
            return nnx.merge(graph, params)(x, caches, segment_ids)

        if self.config.remat == "block":
            read_group = jax.checkpoint(read_group)
        x, caches = jax.lax.scan(read_group, x, (params, cache))
        return self.norm(x), None if cache is None else caches

    def _rows(self) -> jax.Array:
        """What each token's logit is the product with, `[vocab, D]`."""
        matrix = (
            self.embedding[...] if self.output is None else self.output.weight[...].T
        )
        return gathered(matrix.astype(self.config.compute_dtype), ("vocab", "embed"))

    def _logits(self, x: jax.Array, rows: jax.Array) -> jax.Array:
        """Of the tokens of these rows."""
        logits = multiply(x, rows.T)
        return constrain(logits.astype(jnp.float32), "batch", None, "vocab")

"""A model as pure functions of a flat dictionary of parameters.

Names are paths such as `groups/blocks/0/mixer/qkv/weight`: what checkpoints store, what
optimizers see, what sharding rules and weight-decay masks speak of.
"""

from typing import Any

import jax
from flax import nnx

from miras_jax.nn.model import Model

Parameters = dict[str, jax.Array]


class FunctionalModel:
    """`init`, `apply` and `start` of a language model, without module state."""

    def __init__(self, config: Model, vocab_size: int):
        self.config = config
        self.vocab_size = vocab_size
        abstract = nnx.eval_shape(lambda: config.build(vocab_size, nnx.Rngs(0)))
        self._graph, self._state = nnx.split(abstract)
        variables = dict(self._flat(self._state))
        self.shapes = {
            name: jax.ShapeDtypeStruct(v.get_value().shape, v.get_value().dtype)
            for name, v in variables.items()
        }
        self.axes = {name: v.get_metadata()["axes"] for name, v in variables.items()}

    @staticmethod
    def _flat(state):
        return (("/".join(map(str, p)), v) for p, v in nnx.to_flat_state(state))

    def init(self, key: jax.Array) -> Parameters:
        """Initial parameters, float32, one array per name."""
        model = self.config.build(self.vocab_size, nnx.Rngs(key))
        state = nnx.state(model)
        return {name: v.get_value() for name, v in self._flat(state)}

    def bind(self, parameters: Parameters) -> nnx.Module:
        """The nnx module with these parameters."""
        flat = [
            (path, variable.replace(parameters["/".join(map(str, path))]))
            for path, variable in nnx.to_flat_state(self._state)
        ]
        return nnx.merge(self._graph, nnx.from_flat_state(flat))

    def apply(
        self,
        parameters: Parameters,
        tokens: jax.Array,
        cache: Any = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Logits `[B, L, vocab]` and the cache after tokens `[B, L]`."""
        return self.bind(parameters)(tokens, cache, segment_ids)

    def losses(
        self,
        parameters: Parameters,
        tokens: jax.Array,
        targets: jax.Array,
        cache: Any = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """-log p(target) in nats after tokens `[B, L]`, and the cache after them."""
        return self.bind(parameters).losses(tokens, targets, cache, segment_ids)

    def start(self, parameters: Parameters, batch: int, max_length: int) -> Any:
        """The decoding cache before the first token."""
        return self.bind(parameters).start(batch, max_length)

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(shape.size for shape in self.shapes.values())

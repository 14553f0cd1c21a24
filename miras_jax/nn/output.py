"""What becomes of the readings of a layer's heads, up to the output projection."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from miras_jax.core.types import Choice
from miras_jax.errors import UserError
from miras_jax.nn.layers import Projection, param, rms_norm


@dataclass(frozen=True, repr=False)
class Output(Choice):
    """What becomes of a head's reading y before the output projection.

    skip: "values" adds d v_t, d learned per head from 1 (Mamba's D); norm: "rms" is
    RMSNorm per head, with a learned scale; gate: y * f(x W).
    """

    norm: Literal["rms", "none"] = "rms"
    gate: Literal["silu", "sigmoid", "gelu", "none"] = "silu"
    skip: Literal["none", "values"] = "none"

    def __post_init__(self):
        gates = ("silu", "sigmoid", "gelu", "none")
        norms, skips = ("rms", "none"), ("none", "values")
        if not (self.norm in norms and self.gate in gates and self.skip in skips):
            raise UserError(
                f"{self}: norm is one of {norms}, gate of {gates}, skip of {skips}."
            )

    def build(
        self, heads: int, value_dim: int, width: int, scale: float, rngs: nnx.Rngs
    ) -> "OutputLayer":
        return OutputLayer(self, heads, value_dim, width, scale, rngs)


class OutputLayer(nnx.Module):
    """Skip, norm, gate and the projection to the model's width."""

    def __init__(
        self,
        config: Output,
        heads: int,
        value_dim: int,
        width: int,
        scale: float,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.norm = nnx.data(
            param(jnp.ones((heads, value_dim)), ("memory", None))
            if config.norm == "rms"
            else None
        )
        self.skip = nnx.data(
            param(jnp.ones(heads), ("memory",)) if config.skip == "values" else None
        )
        read = heads * value_dim
        self.gate = nnx.data(
            None
            if config.gate == "none"
            else Projection(width, read, ("embed", "heads"), rngs=rngs)
        )
        self.projection = Projection(
            read, width, ("heads", "embed"), scale=scale, rngs=rngs
        )

    def __call__(self, y: jax.Array, values: jax.Array, x: jax.Array) -> jax.Array:
        """Readings `[B, L, H, V]` -> `[B, L, D]`.

        values `[B, L, G, V]`: what the memories wrote, each for H / G heads; x
        `[B, L, D]`: the layer's input, which gates.
        """
        if self.skip is not None:
            values = jnp.repeat(
                values.astype(y.dtype), y.shape[2] // values.shape[2], 2
            )
            y = y + jnp.expand_dims(self.skip[...], (0, 1, 3)).astype(y.dtype) * values
        if self.norm is not None:
            y = rms_norm(y, self.norm[...])
        y = y.reshape(*y.shape[:2], -1)
        if self.gate is not None:
            y = y * getattr(jax.nn, self.config.gate)(self.gate(x))
        return self.projection(y)

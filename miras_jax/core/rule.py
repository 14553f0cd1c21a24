"""Rule: the only place where the four axes meet.

A rule is a sequence layer of one head. `Rule.step` is its definition, token by token;
`block.py` computes the same for many tokens in matrix products. Both follow the five
points of one chunk (Miras, section 5.4):

1. g_s = gradient of the bias at (W_c; k_s, v_s), W_c the weights at the chunk's start.
2. u_s = -learn_s g_s, turned into the inner step by the algorithm.
3. A_s = keep_s A_{s-1} + step_s, hence A_s = K_s A_c + U_s.
4. Token s is read after its own write: at W_s = weights(settle(A_c, A_s)) (readout
   "exact"), or at W_s = K_s W_c + scale(A_c) U_s ("linear": no nonlinearity inside the
   chunk); or, with all tokens of its chunk, before any of their writes, at W_c
   ("start", apply-then-update: LaCT, arXiv 2505.23884, section 3.1).
5. At the chunk's end A = settle(A_c, A) and W = weights(A), always exact. `settle` is
   the step of algorithms that take theirs there, then that of proximal gates; of all
   others it does nothing.
"""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp

from miras_jax.core import attention, checks, window
from miras_jax.core.algorithm import Algorithm, GradientDescent
from miras_jax.core.bias import L2, Bias
from miras_jax.core.memory import Cache, Memory
from miras_jax.core.product import Dot
from miras_jax.core.retention import Decay, Retention
from miras_jax.core.types import (
    Choice,
    Params,
    Past,
    Rates,
    Side,
    State,
    Tokens,
    Weights,
    state_dtype,
)
from miras_jax.errors import UserError


@dataclass(frozen=True, repr=False)
class Rule(Choice):
    """A Miras sequence layer: four choices, the chunk size and the readout.

    chunk_size and readout are part of the model: they change the function computed.
    With chunk_size=1 "linear" and "exact" are the paper's recurrence per token, and
    "start" reads it one token earlier.
    """

    memory: Memory
    bias: Bias = L2()
    retention: Retention = Decay()
    algorithm: Algorithm = GradientDescent()
    chunk_size: int = 64
    readout: Literal["linear", "exact", "start"] = "linear"

    def __post_init__(self):
        checks.possible(self)

    @property
    def keeps_tokens(self) -> bool:
        """Whether the memory is not learned: `core/attention.py` then does it all."""
        return isinstance(self.memory, Cache)

    @property
    def rates(self) -> tuple[str, ...]:
        """Names of the rates that this rule uses."""
        if self.keeps_tokens:
            return ()
        used = (self.bias.rates, self.retention.rates, self.algorithm.rates)
        return ("learn", *(name for names in used for name in names))

    @property
    def is_plain(self) -> bool:
        """Whether the weights are the dual, at every token."""
        return self.retention.is_identity and not self.algorithm.settles

    @property
    def settles(self) -> bool:
        """Whether the end of a chunk takes a step of its own."""
        return self.retention.settles or self.algorithm.settles

    @property
    def reads_exactly(self) -> bool:
        """Whether tokens are read as if their chunk ended with them."""
        # With one token per chunk the linear readout would still apply the map's scale
        # instead of the map; the paper's recurrence is the map.
        single = self.readout == "linear" and self.chunk_size == 1
        return (self.readout == "exact" or single) and not self.is_plain

    @property
    def has_anchor(self) -> bool:
        """Whether gradients are taken at older weights than the current ones."""
        return self.chunk_size > 1

    def init(self, key: jax.Array, key_dim: int, value_dim: int) -> Params:
        """Initial weights and LayerNorm of one memory, for the outer loop to learn."""
        params = self.memory.init(key, key_dim, value_dim)
        if self.algorithm.curves:
            params = params._replace(ridge=self.algorithm.initial(key_dim))
        return params._replace(
            weights=tuple(self.retention.initial(w) for w in params.weights)
        )

    def start(self, params: Params) -> State:
        """The state before the first token, in float32 (float64 if `params` are)."""
        if self.keeps_tokens:
            return attention.start(self.memory.window, params)
        dtype = state_dtype(*params.weights)
        dual = tuple(self.retention.dual(w.astype(dtype)) for w in params.weights)
        checks.scaled(self, dual)
        past = window.empty(self.algorithm.window, dual, self.memory.entries)
        momentum, curvature = self.algorithm.start(dual), ()
        if self.algorithm.curves:
            dual, curvature = self.algorithm.opening(dual, params.ridge)
        return self.open_chunk(dual, momentum, past, curvature)

    @staticmethod
    def carried(state: State) -> tuple[Weights, Weights, Past | tuple, Weights]:
        """What is left of a state where a chunk ends, for `open_chunk`."""
        return state.dual, state.momentum, state.past, state.curvature

    def open_chunk(
        self, dual: Weights, momentum: Weights, past: Past | tuple, curvature: Weights
    ) -> State:
        """The state at the start of a chunk."""
        separate = self.has_anchor and not self.is_plain
        kept = tuple(
            jnp.ones((w.shape[0], 1) if side == "in" else (1, w.shape[1]), w.dtype)
            for w, side in zip(dual, self.sides(len(dual)), strict=True)
        )
        strides = self.has_anchor and self.algorithm.strides
        return State(
            dual=dual,
            anchor=dual if self.has_anchor else (),
            kept=kept if separate else (),
            momentum=momentum,
            stride=tuple(jnp.zeros_like(k) for k in kept) if strides else (),
            past=past,
            curvature=curvature,
        )

    def weights(self, state: State) -> Weights:
        """The current weights W_s, those with which a query would be read now."""
        if self.algorithm.curves:
            return self.algorithm.weights(state.dual, state.curvature)
        if self.has_anchor and self.readout == "start":
            return tuple(self.retention.weights(a) for a in state.anchor)
        if not self.has_anchor or self.reads_exactly or self.is_plain:
            dual = state.dual
            if self.has_anchor and self.settles:
                settled = self.settled(state.anchor, *self._ending(state))
                dual = _where(state.position == 0, dual, settled)
            return tuple(self.retention.weights(a) for a in dual)
        weights = self.linear_part(state)
        if self.algorithm.settles:
            stride = state.stride or (1.0,) * len(weights)
            weights = tuple(
                w + self.retention.scale(anchor) * self.algorithm.provisional(m, size)
                for w, anchor, m, size in zip(
                    weights, state.anchor, state.momentum, stride, strict=True
                )
            )
            start = tuple(self.retention.weights(a) for a in state.anchor)
            weights = _where(state.position == 0, start, weights)
        return weights

    def linear_part(self, state: State) -> Weights:
        """Those of the linear readout, but for the step that `settle` is to take."""
        if self.is_plain:
            return state.dual
        return tuple(
            # At a chunk's start kept is 1 and dual the anchor: the exact map.
            kept * self.retention.weights(anchor)
            + self.retention.scale(anchor) * (dual - kept * anchor)
            for dual, anchor, kept in zip(*state[:3], strict=True)
        )

    @property
    def one_step(self) -> "Rule":
        """The same for tokens whose pairs have become tokens of their own."""
        steps = self.algorithm.steps
        if steps == 1:
            return self
        return replace(
            self,
            algorithm=replace(self.algorithm, steps=1),
            chunk_size=self.chunk_size * (steps if self.has_anchor else 1),
        )

    def pairs(self, tokens: Tokens) -> Tokens:
        """Tokens `[L]` with several key-value pairs as `[L * steps]` tokens of one.

        Forgetting falls on the first pair of a token; the output of its last counts.
        """
        steps = self.algorithm.steps
        queries, keys, values, rates = tokens[:4]
        expected = (*queries.shape[:-1], steps)
        if keys.shape[:-1] != expected or values.shape[:-1] != expected:
            raise UserError(
                f"{self.algorithm} reads keys and values whose first axes are "
                f"{expected}; got keys {keys.shape} and values {values.shape}."
            )

        def flat(x):
            return None if x is None else x.reshape(-1, *x.shape[2:])

        def first(x):
            if x is None:
                return None
            ones = jnp.ones((len(x), steps - 1, *x.shape[1:]), x.dtype)
            return flat(jnp.concatenate([x[:, None], ones], axis=1))

        rates = rates._replace(
            learn=flat(rates.learn),
            keep=first(rates.keep),
            threshold=flat(rates.threshold),
            keep_value=first(rates.keep_value),
        )
        queries = jnp.repeat(queries, steps, axis=0)
        return Tokens(queries, flat(keys), flat(values), rates)

    def check(self, tokens: Tokens) -> None:
        """UserError, naming the fix, if these tokens cannot be read by this rule."""
        checks.readable(self, tokens)

    def settled(
        self,
        anchor: Weights,
        dual: Weights,
        momentum: Weights,
        stride: Weights,
        dot: Dot | None = None,
    ) -> Weights:
        """The dual at a chunk's end, from what the chunk made of its anchor.

        dot: its products; None: as precise as the dual.
        """
        dot = dot or Dot(dual[0].dtype, dual[0].dtype)
        dual = self.algorithm.settle(dual, momentum, stride, dot)
        if not self.retention.settles:
            return dual
        pairs = zip(anchor, dual, strict=True)
        return tuple(self.retention.settle(a, d) for a, d in pairs)

    @staticmethod
    def _ending(state: State) -> tuple[Weights, Weights, Weights]:
        return state.dual, state.momentum, state.stride

    def sides(self, matrices: int) -> tuple[Side | None, ...]:
        """The axis along which a channel-wise keep acts on each matrix, None: none."""
        if matrices == 1 and self.memory.entries:
            sides = {"key": "in", "value": "out", "both": "both"}
            return (sides[self.retention.axis],)
        first = min(self.memory.entries, matrices - 1)
        return ("in",) * first + (None,) * (matrices - 1 - first) + ("out",)

    def learn_sides(self, matrices: int) -> tuple[Side | None, ...]:
        """The same for a channel-wise learn."""
        if matrices == 1:
            key = self.algorithm.axis == "key" and self.memory.entries
            return ("in" if key else "out",)
        return self.sides(matrices)

    def keeps(self, rates: Rates) -> tuple[jax.Array | None, jax.Array | None]:
        """The rates kept on a memory's inputs and on its outputs; None: all."""
        if not self.retention.rates:
            return None, None
        both = self.retention.axis == "both"
        return rates.keep, rates.keep_value if both else rates.keep

    # One token: the definition.

    def step(self, params: Params, state: State, token: Tokens):
        """Write one token, then read its query: `(output [V], state)`."""
        self.check(token)
        if self.keeps_tokens:
            return attention.step(self.memory.window, state, token)
        dtype = state_dtype(*state.dual)
        token = jax.tree.map(lambda x: x.astype(dtype), token)
        queries, keys, values, rates, erase_keys = token
        learn = self.algorithm.step_size(rates.learn, keys)
        anchor_dual = state.anchor if self.has_anchor else state.dual
        anchor = tuple(self.retention.weights(a) for a in anchor_dual)
        keep = self._spread(*self.keeps(rates), self.sides(len(anchor)))
        learn = jnp.ones(()) if learn is None else learn
        stride = ()
        if self.algorithm.strides:
            before = state.stride or (0.0,) * len(anchor)
            pairs = zip(keep, before, strict=True)
            stride = tuple(k * size + learn for k, size in pairs)
            learn = jnp.ones_like(learn)
        if self.algorithm.at == "retained":
            anchor = tuple(k * w for k, w in zip(keep, anchor, strict=True))
        if self.algorithm.at == "zero":
            anchor = tuple(jnp.zeros_like(w) for w in anchor)

        def update(keys, values, learn, threshold):
            prediction, pull_back = jax.vjp(
                lambda weights: self._read(params, weights, keys), anchor
            )
            cotangent = self.bias.cotangent(prediction, values, threshold)
            (gradient,) = pull_back(-values if self.algorithm.erases else cotangent)
            learn = self._spread(learn, learn, self.learn_sides(len(anchor)))
            return [-rate * g for rate, g in zip(learn, gradient, strict=True)]

        pair, past = (keys, values, learn, rates.threshold), ()
        if self.algorithm.window == 1:
            step = update(*pair)
        else:
            pairs, past = window.slide(state.past, *pair)
            step = [jnp.sum(u, axis=0) for u in jax.vmap(update)(*pairs)]
        if self.algorithm.erases:
            recalled = self._read(params, anchor, erase_keys)
            (erase,) = self._spread(rates.erase, None, ("in",))
            step = [step[0] - erase * jnp.outer(erase_keys, recalled)]

        dual, momentum = [], []
        for i, update in enumerate(step):
            carried = state.momentum[i] if state.momentum else None
            update, carried = self.algorithm.step(carried, update, rates.momentum)
            dual.append(keep[i] * state.dual[i] + update)
            momentum += [] if carried is None else [carried]
        dual, momentum = tuple(dual), tuple(momentum)
        if not self.has_anchor:
            dual = self.settled(state.dual, dual, momentum, stride)
            stride = ()
        kept = tuple(k * f for k, f in zip(state.kept, keep, strict=False))
        position = self.moved(state, 1)
        curvature = state.curvature
        if self.algorithm.curves:
            own = learn * jnp.outer(keys, keys)
            curvature = (keep[0] * curvature[0] + own, curvature[1])
        before = self.weights(state) if self.readout == "start" else None
        state = State(
            dual, state.anchor, kept, momentum, position, stride, past, curvature
        )
        output = self._read(params, before or self.weights(state), queries)
        return output, self.close(state, state.position == self.chunk_size)

    def recall(self, params: Params, state: State, queries: jax.Array) -> jax.Array:
        """Outputs for queries `[..., K]` at the current weights; nothing is written."""
        dtype = state_dtype(*state.dual)
        y = self._read(params, self.weights(state), queries.astype(dtype))
        return y.astype(queries.dtype)

    def _read(self, params, weights, x):
        return self.memory.read(lambda i, y: y @ weights[i], params, x)

    @staticmethod
    def _spread(on_inputs, on_outputs, sides):
        """One token's rates (None: 1) for each matrix, broadcastable to it."""
        rows, columns = (
            jnp.atleast_1d(1.0 if rate is None else rate)
            for rate in (on_inputs, on_outputs)
        )
        between = (jnp.mean(rows) + jnp.mean(columns)) / 2
        rows, columns = rows[:, None], columns[None]
        views = {"in": rows, "out": columns, "both": rows * columns, None: between}
        return tuple(views[side] for side in sides)

    def moved(self, state: State, tokens: int) -> int | jax.Array:
        """Position in the chunk after so many tokens; without anchor none is kept."""
        return state.position + tokens if self.has_anchor else state.position

    def close(
        self, state: State, complete: bool | jax.Array, dot: Dot | None = None
    ) -> State:
        """Point 5: where the chunk is complete, its end is the next one's start."""
        if not self.has_anchor or complete is False:
            return state
        dual = self.settled(state.anchor, *self._ending(state), dot)
        ones = tuple(jnp.ones_like(k) for k in state.kept)
        zeros = tuple(jnp.zeros_like(s) for s in state.stride)
        position = 0 if complete is True else jnp.where(complete, 0, state.position)
        return state._replace(
            dual=_where(complete, dual, state.dual),
            anchor=_where(complete, dual, state.anchor),
            kept=_where(complete, ones, state.kept),
            position=position,
            stride=_where(complete, zeros, state.stride),
        )


def _where(condition: bool | jax.Array, yes: Weights, no: Weights) -> Weights:
    if isinstance(condition, bool):
        return yes if condition else no
    return tuple(jnp.where(condition, y, n) for y, n in zip(yes, no, strict=True))

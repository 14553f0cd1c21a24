"""Rule: the only place where the four axes meet.

A rule is a sequence layer of one head. `step` is its definition, token by token; `block`
computes the same for many tokens with matrix products, and is the pure function that the
engine scans over a sequence. Both follow the five points of one chunk (Miras, section
5.4, in the reading explained in the README):

1. g_s = gradient of the bias at (W_c; k_s, v_s), W_c the weights at the chunk's start.
2. u_s = -learn_s g_s, turned into the inner step by the algorithm.
3. A_s = keep_s A_{s-1} + step_s, hence A_s = K_s A_c + U_s.
4. Token s is read after its own write: at W_s = weights(A_s) (readout "exact"), or at
   W_s = K_s W_c + scale(A_c) U_s ("linear": no nonlinearity inside the chunk).
5. At the chunk's end W = weights(A), always exact.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from miras_jax.core import causal
from miras_jax.core.algorithm import Algorithm, GradientDescent
from miras_jax.core.bias import L2, Bias, DotProduct
from miras_jax.core.memory import Memory
from miras_jax.core.retention import Decay, Retention
from miras_jax.core.types import (
    Choice,
    Params,
    Rates,
    State,
    Tokens,
    Weights,
    state_dtype,
)

EXACT_READOUT_TOKENS = 8
"""Tokens whose own weights are materialised at once by the exact readout."""


@dataclass(frozen=True, repr=False)
class Rule(Choice):
    """A Miras sequence layer: four choices, the chunk size and the readout.

    chunk_size and readout are part of the model: they change the function computed.
    With chunk_size=1 both readouts are the paper's recurrence per token.
    """

    memory: Memory
    bias: Bias = L2()
    retention: Retention = Decay()
    algorithm: Algorithm = GradientDescent()
    chunk_size: int = 64
    readout: Literal["linear", "exact"] = "linear"

    def __post_init__(self):
        if self.readout not in ("linear", "exact"):
            raise ValueError(
                f"Rule(readout=...) is 'linear' or 'exact'; got {self.readout!r}."
            )
        if self.chunk_size < 1:
            raise ValueError(f"Rule needs chunk_size >= 1; got {self.chunk_size}.")
        if self.algorithm.at == "retained" and not (
            self.chunk_size == 1 and self.retention.is_identity
        ):
            raise ValueError(
                "An algorithm with at='retained' takes each token's gradient at its own "
                "decayed weights, so it needs chunk_size=1 and retention.Decay(); got "
                f"chunk_size={self.chunk_size} and {self.retention}. Use at='previous'."
            )

    @property
    def rates(self) -> tuple[str, ...]:
        """Names of the rates that this rule uses."""
        used = (self.bias.rates, self.retention.rates, self.algorithm.rates)
        return ("learn", *(name for names in used for name in names))

    @property
    def reads_exactly(self) -> bool:
        """Whether tokens are read through the retention map of their own dual."""
        # With one token per chunk the linear readout would still apply the map's scale
        # instead of the map; the paper's recurrence is the map.
        exact = self.readout == "exact" or self.chunk_size == 1
        return exact and not self.retention.is_identity

    @property
    def has_anchor(self) -> bool:
        """Whether gradients are taken at older weights than the current ones."""
        return self.chunk_size > 1

    def init(self, key: jax.Array, key_dim: int, value_dim: int) -> Params:
        """Initial weights and LayerNorm of one memory, to be learned by the outer loop."""
        return self.memory.init(key, key_dim, value_dim)

    def start(self, params: Params) -> State:
        """The state before the first token, in float32 (float64 if `params` are)."""
        dtype = state_dtype(*params.weights)
        dual = tuple(self.retention.dual(w.astype(dtype)) for w in params.weights)
        return self.open_chunk(dual, self.algorithm.start(dual))

    def open_chunk(self, dual: Weights, momentum: Weights) -> State:
        """The state at the start of a chunk."""
        separate = self.has_anchor and not self.retention.is_identity
        kept = tuple(
            jnp.ones((w.shape[0], 1) if side == "in" else (1, w.shape[1]), w.dtype)
            for w, side in zip(dual, self._sides(len(dual)), strict=True)
        )
        return State(
            dual=dual,
            anchor=dual if self.has_anchor else (),
            kept=kept if separate else (),
            momentum=momentum,
        )

    def weights(self, state: State) -> Weights:
        """The current weights W_s, those with which a query would be read now."""
        if not self.has_anchor or self.reads_exactly or self.retention.is_identity:
            return tuple(self.retention.weights(a) for a in state.dual)
        return tuple(
            # At a chunk's start kept is 1 and dual the anchor: the exact map.
            kept * self.retention.weights(anchor)
            + self.retention.scale(anchor) * (dual - kept * anchor)
            for dual, anchor, kept in zip(*state[:3], strict=True)
        )

    def check(self, tokens: Tokens) -> None:
        """ValueError, naming the fix, if these tokens cannot be read by this rule."""
        rates, ndim = tokens.rates, tokens.keys.ndim
        for name in self.algorithm.rates:
            if getattr(rates, name) is None:
                raise ValueError(
                    f"{self.algorithm} needs rates.{name}, one number per token; "
                    "the tokens bring none."
                )
        if rates.momentum is not None and rates.momentum.ndim != ndim - 1:
            raise ValueError(
                "rates.momentum is one number per token, not channel-wise; got shape "
                f"{rates.momentum.shape} for keys {tokens.keys.shape}."
            )
        channelwise = rates.keep is not None and rates.keep.ndim == ndim
        if channelwise and not self.retention.channelwise:
            raise ValueError(
                f"{self.retention} needs a keep that is constant inside a slice, one "
                f"number per token; got a channel-wise one of shape {rates.keep.shape}."
            )

    def _sides(self, matrices: int) -> tuple[causal.Side | None, ...]:
        """The axis along which a channel-wise keep acts on each matrix, None: none."""
        if matrices == 1:
            return ("in" if self.retention.axis == "key" else "out",)
        return ("in", *[None] * (matrices - 2), "out")

    def _learn_sides(self, matrices: int) -> tuple[causal.Side | None, ...]:
        return ("out",) if matrices == 1 else self._sides(matrices)

    # One token: the definition.

    def step(self, params: Params, state: State, token: Tokens):
        """Write one token, then read its query: `(output [V], state)`."""
        self.check(token)
        rates = token.rates
        anchor_dual = state.anchor if self.has_anchor else state.dual
        anchor = tuple(self.retention.weights(a) for a in anchor_dual)
        keep = self._spread(
            rates.keep, self._sides(len(anchor)), bool(self.retention.rates)
        )
        learn = self._spread(rates.learn, self._learn_sides(len(anchor)), True)
        if self.algorithm.at == "retained":
            anchor = tuple(k * w for k, w in zip(keep, anchor, strict=True))

        def predict(weights):
            return self._read(params, weights, token.keys)

        prediction, pull_back = jax.vjp(predict, anchor)
        value = token.values.astype(prediction.dtype)
        cotangent = self.bias.cotangent(prediction, value, rates.threshold)
        (gradient,) = pull_back(cotangent)

        dual, momentum = [], []
        for i, g in enumerate(gradient):
            carried = state.momentum[i] if state.momentum else None
            step, carried = self.algorithm.step(carried, -learn[i] * g, rates.momentum)
            dual.append(keep[i] * state.dual[i] + step)
            momentum += [] if carried is None else [carried]
        dual, momentum = tuple(dual), tuple(momentum)
        kept = tuple(k * f for k, f in zip(state.kept, keep, strict=False))
        position = self._moved(state, 1)
        state = State(dual, state.anchor, kept, momentum, position)
        output = self._read(params, self.weights(state), token.queries)
        return output, self.close(state, state.position == self.chunk_size)

    def _read(self, params, weights, x):
        x = x.astype(weights[0].dtype)
        return self.memory.read(lambda i, y: y @ weights[i], params, x)

    @staticmethod
    def _spread(rate, sides, used: bool):
        """One token's rate for each matrix, broadcastable to it."""
        if rate is None or not used:
            return (1.0,) * len(sides)
        if rate.ndim == 0:
            return (rate,) * len(sides)
        views = {"in": rate[:, None], "out": rate[None, :], None: jnp.mean(rate)}
        return tuple(views[side] for side in sides)

    def _moved(self, state: State, tokens: int) -> int | jax.Array:
        """Position inside the chunk after so many tokens; without anchor none counts."""
        return state.position + tokens if self.has_anchor else state.position

    def close(self, state: State, complete: bool | jax.Array) -> State:
        """Point 5: where the chunk is complete, its end is the next one's start."""
        if not self.has_anchor or complete is False:
            return state

        def close(new, old):
            if complete is True:
                return new
            return tuple(
                jnp.where(complete, n, o) for n, o in zip(new, old, strict=True)
            )

        ones = tuple(jnp.ones_like(k) for k in state.kept)
        position = 0 if complete is True else jnp.where(complete, 0, state.position)
        return state._replace(
            anchor=close(state.dual, state.anchor),
            kept=close(ones, state.kept),
            position=position,
        )

    # A block of tokens: the same in matrix products.

    @property
    def solves(self) -> bool:
        """Whether gradients inside a block depend on each other linearly (delta rule)."""
        return self.chunk_size == 1 and self.memory.is_linear and self.bias == L2()

    def parallel_tokens(self, rates: Rates, tile: int) -> int:
        """How many tokens `block` can take at once without changing the result.

        A chunk, as gradients inside it do not depend on each other. Exact linear rules
        (chunk_size=1, plain matrix, linear retention) have no such limit and take `tile`:
        the dot-product bias has gradients without the memory, those of L2 are the
        solution of a triangular system, one for all value channels, so rates may not
        differ between these.
        """
        if self.chunk_size > 1:
            return self.chunk_size
        if not (self.memory.is_linear and self.retention.is_identity):
            return 1
        if self.bias == DotProduct():
            return tile
        by_value = rates.learn is not None and rates.learn.ndim == 2
        if rates.keep is not None and rates.keep.ndim == 2:
            by_value |= self.retention.axis == "value"
        return tile if self.solves and not by_value else 1

    def block(
        self,
        params: Params,
        state: State,
        tokens: Tokens,
        aligned: bool,
        written: jax.Array | None = None,
    ) -> tuple[jax.Array, State]:
        """Write and read C tokens of one chunk (or any C of an exact linear rule).

        aligned: whether the block starts a chunk, so that anchor and kept of the state
        need not be looked at. written `[C, 1]`: 0 for tokens that must leave no trace
        (they come with learn=0, keep=1, momentum=1). The chunk is left open: the engine
        closes it where it ends. Returns `(outputs [C, V], state)`.
        """
        dtype = state_dtype(*state.dual)
        dot = causal.make_dot(tokens.keys.dtype, dtype)
        queries, keys, values, rates = jax.tree.map(lambda x: x.astype(dtype), tokens)
        rates = Rates(*(_column(r) for r in rates))
        flow = partial(self._flows, rates, len(state.dual), keys, written)
        flows = flow("after")

        anchor_dual = state.dual if aligned else state.anchor
        anchor = tuple(self.retention.weights(a) for a in anchor_dual)
        if self.solves and len(keys) > 1:
            inputs, cotangents = self._solve(dot, flow, state, keys, values, rates)
        else:
            starts = flow("between") if self.algorithm.at == "retained" else None
            inputs, cotangents = self._factors(
                dot, params, anchor, keys, values, rates, starts
            )
        learn = self._blockwise(rates.learn, self._learn_sides(len(inputs)), keys)
        for i, (side, rate) in enumerate(learn):
            if side == "in":
                inputs[i] = rate * inputs[i]
            else:
                cotangents[i] = rate * cotangents[i]

        after = self._advance(dot, flows, state, inputs, cotangents)
        if self.reads_exactly:
            outputs = self._read_exactly(
                params, state, queries, rates, inputs, cotangents, written
            )
        else:
            base = anchor if aligned else self.weights(state)
            outputs = self._read_linearly(
                dot, params, flows, anchor_dual, base, state.momentum, queries,
                inputs, cotangents,
            )  # fmt: skip
        return outputs, after

    def _blockwise(self, rate, sides, keys):
        """(side, rate [C, 1 or channels]) for each matrix; side None: one per token."""
        if rate is None:
            rate = jnp.ones((len(keys), 1), keys.dtype)
        if rate.shape[1] == 1:
            return [(None, rate)] * len(sides)
        mean = jnp.mean(rate, axis=1, keepdims=True)
        return [(side, rate if side else mean) for side in sides]

    def _flows(self, rates, matrices, keys, written, when):
        keep = rates.keep if self.retention.rates else None
        flows = {}
        for side, rate in self._blockwise(keep, self._sides(matrices), keys):
            if side not in flows:  # one per token: shared by the matrices
                log_keep = causal.safe_log(rate)
                flows[side] = self.algorithm.flow(
                    log_keep, rates.momentum, side or "out", when, written
                )
        sides = [s for s, _ in self._blockwise(keep, self._sides(matrices), keys)]
        return [flows[side] for side in sides]

    def _factors(self, dot, params, weights, keys, values, rates, starts):
        """a_s, d_s of every matrix: dl/dW = a_s d_s^T at the given weights (point 1).

        a is the input of each product; d, the gradient at its output, is that with
        respect to a zero added there.
        """
        inputs = [None] * len(weights)

        def write(slack):
            def product(i, x):
                inputs[i] = x
                if starts is None:
                    return dot(x, weights[i]) + slack[i]
                return starts[i].start.read(dot, x, weights[i]) + slack[i]

            return self.memory.read(product, params, keys), tuple(inputs)

        slack = [jnp.zeros((len(keys), w.shape[1]), keys.dtype) for w in weights]
        predictions, pull_back, inputs = jax.vjp(write, slack, has_aux=True)
        cotangent = self.bias.cotangent(predictions, values, rates.threshold)
        (cotangents,) = pull_back(cotangent)
        return list(inputs), list(cotangents)

    def _solve(self, dot, flow, state, keys, values, rates):
        """a_s, d_s of the delta rule, whose residuals depend on the earlier ones.

        r_s = W_{s-1}^T k_s - v_s and W_{s-1} holds -learn_j k_j r_j^T for j < s:
        (I + N) r = W_0's predictions - v, N_sj = k_s^T D_{s-1,j} k_j learn_j, the WY
        form of the delta rule (arXiv 2406.06484, section 3.2).
        """
        when = "between" if self.algorithm.at == "retained" else "before"
        (before,) = flow(when)
        (start,) = state.dual
        prediction = before.start.read(dot, keys, start)
        if before.momentum_in_dual is not None:
            (momentum,) = state.momentum
            prediction = prediction + before.momentum_in_dual.read(dot, keys, momentum)
        matrix = before.steps.scores(dot, keys, keys)
        if rates.learn is not None:
            matrix = matrix * rates.learn.T
        inverse = causal.unit_lower_inverse(matrix, dot)
        return [keys], [dot(inverse, prediction - values)]

    def _advance(self, dot, flows, state, inputs, cotangents) -> State:
        """Points 2 and 3 for the whole block."""
        dual, momentum, kept = [], [], []
        for i, (flow, a, d) in enumerate(zip(flows, inputs, cotangents, strict=True)):
            total = flow.start.end(state.dual[i]) - flow.steps.end(dot, a, d)
            if flow.momentum is not None:
                m = state.momentum[i]
                total = total + flow.momentum_in_dual.end(m)
                carried, steps = flow.momentum
                momentum.append(carried.end(m) - steps.end(dot, a, d))
            dual.append(total)
            if state.kept:
                kept.append(flow.start.factor * state.kept[i])
        position = self._moved(state, len(inputs[0]))
        return State(tuple(dual), state.anchor, tuple(kept), tuple(momentum), position)

    def _read_linearly(
        self, dot, params, flows, anchor_dual, base, momentum, queries, inputs,
        cotangents,
    ):  # fmt: skip
        """Point 4, linear: x W_t = K_t (x B) - scale ((x a^T) * D) (learn d)."""

        def product(i, x):
            flow = flows[i]
            own = -flow.steps.read(dot, x, inputs[i], cotangents[i])
            if flow.momentum_in_dual is not None:
                own = own + flow.momentum_in_dual.read(dot, x, momentum[i])
            if not self.retention.is_identity:
                own = self.retention.scale(anchor_dual[i]) * own
            return flow.start.read(dot, x, base[i]) + own

        return self.memory.read(product, params, queries)

    def _read_exactly(self, params, state, queries, rates, inputs, cotangents, written):
        """Point 4, exact: W_t = weights(A_t), for a few tokens at a time."""
        size = len(queries)
        group = min(EXACT_READOUT_TOKENS, size)
        padding = -size % group
        matrices = len(state.dual)
        ones = jnp.ones((size, 1), queries.dtype)
        keep = self._blockwise(
            rates.keep if self.retention.rates else None,
            self._sides(matrices),
            queries,
        )
        momentum = ones if rates.momentum is None else rates.momentum
        written = ones if written is None else written

        def grouped(x):
            x = jnp.pad(x, ((0, padding), (0, 0)))
            return x.reshape(-1, group, x.shape[1])

        def gate(rate, side):
            return rate[:, :, None] if side == "in" else rate[:, None, :]

        def read_group(carry, tokens):
            dual, running = carry
            queries, keeps, momentum, written, inputs, cotangents = tokens
            duals, runnings = [], []
            for i in range(matrices):
                step = -inputs[i][:, :, None] * cotangents[i][:, None, :]
                if running:
                    step = causal.affine_scan(momentum[:, None], step, running[i])
                    runnings.append(step)
                keep_i = gate(keeps[i], keep[i][0])
                duals.append(
                    causal.affine_scan(keep_i, written[:, None] * step, dual[i])
                )
            weights = [jax.vmap(self.retention.weights)(a) for a in duals]
            outputs = self.memory.read(
                lambda i, x: jnp.einsum("...i,...io->...o", x, weights[i]),
                params,
                queries,
            )
            return (last(duals), last(runnings)), outputs

        def last(stacked):
            return tuple(x[-1] for x in stacked)

        columns = (queries, [k for _, k in keep], momentum, written, inputs, cotangents)
        _, outputs = jax.lax.scan(
            jax.checkpoint(read_group),
            (state.dual, state.momentum),
            jax.tree.map(grouped, columns),
        )
        return outputs.reshape(-1, outputs.shape[-1])[:size]


def _column(rate: jax.Array | None) -> jax.Array | None:
    return rate[:, None] if rate is not None and rate.ndim == 1 else rate

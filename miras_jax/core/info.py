"""What a memory makes of every token: surprise, what it learns, what it keeps.

Diagnostics of the definition, for looking at a memory. `run` and `step` know nothing of
them: without `observe` they cost nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from miras_jax.core.rule import Rule
from miras_jax.core.types import Params, State, Tokens, Weights
from miras_jax.errors import UserError


class Info(NamedTuple):
    """Of every token, `[L]`. W_t are the weights after it, those that read its query.

    W'_t are what they would be, had the memory learned nothing from this one token
    (learn_t = erase_t = 0): forgetting, and what momentum still carries, happen all the
    same; a step that is taken where a chunk ends is seen there alone. Norms are over
    all matrices together (Frobenius). Of a rule with several pairs per token, loss and
    step are summed over them, kept is their product and norm the last.

    loss is the surprise: the inner loss of (k_t, v_t) where its gradient is taken.
    """

    loss: jax.Array
    step: jax.Array  # learned: |W_t - W'_t| / |W_t|
    kept: jax.Array  # |W'_t| / |W_{t-1}|; 1 of an empty memory
    norm: jax.Array  # |W_t|


def observe(
    rule: Rule, params: Params, state: State, tokens: Tokens
) -> tuple[Info, jax.Array, State]:
    """Read L tokens by the definition: what happened, and what `run` gives.

    One head of one sequence, as for `run`; two to three times the definition's work.
    """
    if len(tokens.keys) == 0:
        raise UserError("observe needs at least one token; got none.")
    steps = rule.algorithm.steps
    if steps > 1:
        info, outputs, state = observe(rule.one_step, params, state, rule.pairs(tokens))
        pairs = jax.tree.map(lambda x: x.reshape(-1, steps), info)
        info = Info(
            loss=jnp.sum(pairs.loss, axis=1),
            step=jnp.sum(pairs.step, axis=1),
            kept=jnp.prod(pairs.kept, axis=1),
            norm=pairs.norm[:, -1],
        )
        return info, outputs[steps - 1 :: steps], state
    if rule.keeps_tokens:
        raise UserError(f"observe needs a memory that learns; got {rule.memory}.")
    rule.check(tokens)

    def body(state, token):
        info = _loss_and_counterfactual(rule, params, state, token)
        output, state = rule.step(params, state, token)
        return state, (info(rule.weights(state)), output)

    state = state._replace(position=jnp.asarray(state.position, jnp.int32))
    state, (info, outputs) = jax.lax.scan(body, state, tokens)
    return info, outputs.astype(tokens.queries.dtype), state


def _loss_and_counterfactual(rule, params, state, token):
    """What W_t must be compared with, as a function of W_t."""
    rates = token.rates._replace(learn=jnp.zeros(()))
    if rates.erase is not None:
        rates = rates._replace(erase=jnp.zeros_like(rates.erase))
    nothing = token._replace(rates=rates)
    before = rule.weights(state)
    without = rule.weights(rule.step(params, state, nothing)[1])
    prediction = rule.memory.read(
        lambda i, x: x @ _anchor(rule, params, state, nothing)[i], params, token.keys
    )
    loss = rule.bias.loss(prediction, token.values, token.rates.threshold)

    def compare(after):
        change = jax.tree.map(jnp.subtract, after, without)
        return Info(
            loss=loss,
            step=_ratio(_norm(change), _norm(after), 0),
            kept=_ratio(_norm(without), _norm(before), 1),
            norm=_norm(after),
        )

    return compare


def _anchor(rule, params, state, nothing) -> Weights:
    """The weights at which the gradient of this token is taken."""
    if rule.algorithm.at == "zero":
        return rule.weights(state)  # what it is compared with: the minimum so far
    if rule.algorithm.at == "retained":
        # Decayed, and nothing else: what a token leaves that neither learns nor moves.
        rates = nothing.rates
        if rates.momentum is not None:
            rates = rates._replace(momentum=jnp.zeros_like(rates.momentum))
        return rule.weights(rule.step(params, state, nothing._replace(rates=rates))[1])
    dual = state.anchor if rule.has_anchor else state.dual
    return tuple(rule.retention.weights(a) for a in dual)


def _norm(weights: Weights) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(w)) for w in weights))


def _ratio(x, y, of_nothing):
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), of_nothing)

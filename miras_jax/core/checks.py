"""What cannot be: choices that do not go together, tokens that a rule cannot read.

Each is a UserError that names the fix.
"""

from miras_jax.core.algorithm import NonParametric
from miras_jax.core.bias import L2
from miras_jax.core.retention import Keep
from miras_jax.core.types import Tokens
from miras_jax.errors import UserError


def possible(rule) -> None:
    """Whether a rule's four choices, chunk size and readout go together."""
    if rule.readout not in ("linear", "exact", "start"):
        raise UserError(
            f"Rule(readout=...) is 'linear', 'exact' or 'start'; got {rule.readout!r}."
        )
    if (rule.keeps_tokens or rule.algorithm == NonParametric()) and not (
        rule.keeps_tokens
        and (rule.bias, rule.retention, rule.algorithm, rule.chunk_size)
        == (L2(), Keep(), NonParametric(), 1)
    ):
        raise UserError(
            "A memory of the tokens themselves is memory.Cache() with bias.L2(), "
            "retention.Keep(), algorithm.NonParametric() and chunk_size=1, as in "
            f"variants.softmax_attention(); got {rule.memory}, {rule.bias}, "
            f"{rule.retention}, {rule.algorithm} and chunk_size={rule.chunk_size}."
        )
    if rule.chunk_size < 1:
        raise UserError(f"Rule needs chunk_size >= 1; got {rule.chunk_size}.")
    if rule.algorithm.at == "retained" and not (
        rule.chunk_size == 1 and rule.retention.is_identity
    ):
        raise UserError(
            "An algorithm with at='retained' takes each token's gradient at its "
            "own decayed weights and needs chunk_size=1 and retention.Decay(); got "
            f"chunk_size={rule.chunk_size} and {rule.retention}. Use at='previous'."
        )

    delta_rule = rule.memory.is_linear and rule.bias == L2()
    if rule.algorithm.implicit and not (delta_rule and rule.chunk_size == 1):
        raise UserError(
            f"{rule.algorithm} has a closed form for memory.Linear(), bias.L2() "
            f"and chunk_size=1; got {rule.memory}, {rule.bias} and chunk_size="
            f"{rule.chunk_size}. Use algorithm.GradientDescent()."
        )
    if rule.algorithm.curves and not (
        delta_rule and rule.chunk_size == 1 and rule.retention.is_identity
    ):
        raise UserError(
            f"{rule.algorithm} minimises bias.L2() of memory.Linear() exactly, at "
            "every token, and needs chunk_size=1 (its blocks are large all the "
            "same) and retention.Decay() or Keep(); got "
            f"{rule.memory}, {rule.bias}, chunk_size={rule.chunk_size} and "
            f"{rule.retention}. Use algorithm.Muon() for other memories."
        )
    if rule.algorithm.erases and not (
        delta_rule and rule.chunk_size == 1 and rule.retention.is_identity
    ):
        raise UserError(
            f"{rule.algorithm} takes the delta rule apart and needs "
            "memory.Linear(), bias.L2(), chunk_size=1 and retention.Decay() or "
            f"Keep(); got {rule.memory}, {rule.bias}, chunk_size="
            f"{rule.chunk_size} and {rule.retention}. Use GradientDescent()."
        )
    if rule.retention.axis == "both" and (
        rule.memory.entries == 0
        or "momentum" in rule.algorithm.rates
        or rule.algorithm.window > 1
    ):
        raise UserError(
            f"{rule.retention} needs a memory with a key axis and an algorithm "
            f"without momentum or window; got {rule.memory} and {rule.algorithm}. "
            "Use retention.Decay(axis='value')."
        )


def readable(rule, tokens: Tokens) -> None:
    """Whether these tokens bring what the rule needs of them."""
    rates, ndim = tokens.rates, tokens.keys.ndim
    for name in rule.algorithm.rates:
        if getattr(rates, name) is None:
            raise UserError(
                f"{rule.algorithm} needs rates.{name}; the tokens bring none."
            )
    if rule.algorithm.erases and tokens.erase_keys is None:
        raise UserError(
            f"{rule.algorithm} needs tokens.erase_keys, of the shape of keys; the "
            "tokens bring none."
        )
    whole = ()
    if rule.algorithm.strides:
        whole, why = ("learn",), "multiplies its step by it. Use learn='inside'"
    if rule.algorithm.curves:
        whole, why = ("learn", "keep", "keep_value"), "solves for all channels"
    for name in whole:
        rate = getattr(rates, name)
        if rate is not None and rate.ndim == ndim:
            raise UserError(
                f"rates.{name} is one number per token where {rule.algorithm} "
                f"{why}; got a channel-wise one of shape {rate.shape}."
            )
    if rates.momentum is not None and rates.momentum.ndim != ndim - 1:
        raise UserError(
            "rates.momentum is one number per token, not channel-wise; got shape "
            f"{rates.momentum.shape} for keys {tokens.keys.shape}."
        )
    channelwise = rates.keep is not None and rates.keep.ndim == ndim
    if channelwise and not rule.retention.channelwise:
        raise UserError(
            f"{rule.retention} needs a keep that is constant inside a slice, one "
            f"number per token; got a channel-wise one of shape {rates.keep.shape}."
        )

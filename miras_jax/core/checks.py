"""What cannot be: choices that do not go together, tokens that a rule cannot read.

Each is a UserError that names the fix.
"""

from dataclasses import is_dataclass

import jax

from miras_jax.core.algorithm import Algorithm, NonParametric
from miras_jax.core.bias import L2, Bias
from miras_jax.core.memory import Memory
from miras_jax.core.retention import Keep, Retention
from miras_jax.core.types import Rates, Tokens, Weights
from miras_jax.errors import UserError

PROTOCOLS = {
    "memory": Memory,
    "bias": Bias,
    "retention": Retention,
    "algorithm": Algorithm,
}


def complete(rule) -> None:
    """Whether each choice is a value, and has all that a rule needs of its kind."""
    for axis, protocol in PROTOCOLS.items():
        choice = getattr(rule, axis)
        kind = type(choice)
        if not (is_dataclass(kind) and kind.__dataclass_params__.frozen):
            raise UserError(
                f"Rule({axis}=...) is an instance of a class with "
                f"@dataclass(frozen=True, repr=False) and the base Choice; got "
                f"{choice!r}."
            )
        names = [*protocol.__annotations__, *vars(protocol)]
        missing = [
            name
            for name in names
            if not (name.startswith("_") or hasattr(choice, name))
            # What only some need: a memory that is read, a step at a chunk's end.
            and not (name == "read" and rule.keeps_tokens)
            and not (name == "provisional" and not getattr(choice, "settles", True))
        ]
        if missing:
            base = {"retention": "Gate", "algorithm": "Descent"}.get(axis)
            raise UserError(
                f"{choice} lacks {', '.join(missing)}: see {protocol.__name__} in "
                f"miras_jax.core.{axis} for what a rule needs of it"
                + (f"; derived from {axis}.{base}, it has the usual." if base else ".")
            )
    for name in rule.rates:
        if name not in Rates._fields:
            raise UserError(
                f"{rule} uses rates.{name}, and the rates are "
                f"{', '.join(Rates._fields)}. A new one is a field of Rates; "
                "CONTRIBUTING.md says what else."
            )
    in_step, in_flow = (_definer(rule.algorithm, name) for name in ("step", "flow"))
    if in_step is not in_flow and issubclass(in_step, in_flow):
        raise UserError(
            f"{in_step.__name__} has a step of its own and the flow of "
            f"{in_flow.__name__}: blocks of tokens would follow another recurrence. "
            "Write flow for it, too."
        )


def _definer(choice, name: str) -> type:
    """The class from which it has a method."""
    return next(kind for kind in type(choice).__mro__ if name in vars(kind))


def scaled(rule, dual: Weights) -> None:
    """Whether the factor of the linear readout is one that products can take."""
    if rule.retention.is_identity or rule.reads_exactly:
        return
    for matrix in dual:
        shape = jax.eval_shape(rule.retention.scale, matrix).shape
        if shape not in ((), (1, 1), (1, matrix.shape[1])):
            raise UserError(
                f"scale of {rule.retention} has shape {shape} for a matrix "
                f"{matrix.shape}; the linear readout takes one number, or one for "
                "each output. Give the mean, or use readout='exact'."
            )


def possible(rule) -> None:
    """Whether a rule's four choices, chunk size and readout go together."""
    complete(rule)
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

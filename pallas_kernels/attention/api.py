"""The public function and the choice of its implementation."""

from importlib import import_module
from typing import Literal, NamedTuple

import jax

from pallas_kernels.attention import reference
from pallas_kernels.fused_scan import Unsupported
from pallas_kernels.fused_scan.api import choose
from pallas_kernels.fused_scan.partition import by_batch

Implementation = Literal["reference", "tpu", "gpu"]


def attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    segments: jax.Array | None = None,
    window: int | None = None,
    always: tuple[jax.Array, jax.Array] | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """y_t = sum_s softmax_s(q_t^T k_s / sqrt(K)) v_s over what token t sees.

    queries `[B, L, H, K]`, keys `[B, S, G, K]`, values `[B, S, G, V]`, S >= L, H a
    multiple of G; the queries are those of the last L keys, and H / G heads in a row
    share one head of keys. Returns `[B, L, H, V]`, of the dtype of values.

    A token sees keys up to its own, the last `window` of them, and of those the keys of
    its own segment: `segments [B, S]`, integers. always `[2, N, G, .]`: keys and values
    that every token sees besides.

    implementation: "reference" (plain JAX), "tpu" or "gpu" (kernels that JAX ships);
    None takes the kernel of the platform that is traced for, where it can run this
    call, and the reference where not. `Unsupported`, or ValueError for what no backend
    has, says why a named one cannot. Differentiable in queries, keys, values and always
    (in reverse mode only, by kernels); a `split_over` mesh splits B and G.
    """
    call = _Call(queries, keys, values, segments, always)
    backend, interpret, window = _backend(call, window, implementation)
    if backend is None:
        return reference.attention(*call, window=window)
    return _by_heads(backend, window, interpret, *call[:4])


def implementation_of(
    queries, keys, values, *, segments=None, window=None, always=None
) -> str:
    """What `attention` reads these arrays, or arrays of these shapes, by."""
    backend, *_ = _backend(_Call(queries, keys, values, segments, always), window, None)
    return "reference" if backend is None else backend.__name__.rpartition(".")[2]


class _Call(NamedTuple):
    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    segments: jax.Array | None
    always: tuple[jax.Array, jax.Array] | None


def _backend(call, window, implementation):
    """The module of the kernels or None, how to interpret them, the window or None."""
    if window is not None and window >= call.keys.shape[1]:
        window = None
    chosen, interpret = choose("attention", implementation)
    if chosen == "reference":
        return None, interpret, window
    backend = import_module(f"pallas_kernels.attention.{chosen}")
    objection = backend.objection(*call, window=window)
    if objection is None:
        return backend, interpret, window
    if implementation is None:
        return None, interpret, window
    raise Unsupported(f"attention(implementation={chosen!r}): {objection}")


def _by_heads(module, window, interpret, queries, keys, values, segments):
    """The kernels of a backend, batch and heads in front, each device for its own."""
    batch, length, heads, channels = queries.shape
    groups = keys.shape[2]
    queries = queries.reshape(batch, length, groups, -1, channels)
    operands = [
        queries.transpose(0, 2, 3, 1, 4),
        keys.transpose(0, 2, 1, 3),
        values.transpose(0, 2, 1, 3),
    ]
    masks = [(True, True)] * 3
    if segments is not None:
        operands.append(segments)
        masks.append((True, False))

    def call(queries, keys, values, segments=None):
        return module.attention(
            queries, keys, values, segments, window=window, interpret=interpret
        )

    y = by_batch(call, (batch, groups), masks)(*operands)
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)

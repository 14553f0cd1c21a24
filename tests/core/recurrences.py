"""Recurrences as printed in the papers of single models, in NumPy.

Independent of `oracle.run`, so that a wrong reading of the framework cannot hide in
both. Their states are [V, K]: `state @ key` predicts a value. Keys and values arrive as
rows.
"""

import numpy as np


def linear_attention(state, queries, keys, values):
    """S_t = S_{t-1} + v_t k_t^T  (Katharopoulos et al., arXiv 2006.16236)."""
    outputs = []
    for q, k, v in zip(queries, keys, values, strict=True):
        state = state + np.outer(v, k)
        outputs.append(state @ q)
    return np.array(outputs)


def retnet(state, queries, keys, values, keep):
    """S_t = gamma S_{t-1} + v_t k_t^T  (Sun et al., arXiv 2307.08621)."""
    outputs = []
    for q, k, v, gamma in zip(queries, keys, values, keep, strict=True):
        state = gamma * state + np.outer(v, k)
        outputs.append(state @ q)
    return np.array(outputs)


def delta_net(state, queries, keys, values, beta):
    """S_t = S_{t-1} (I - beta k k^T) + beta v k^T  (Yang et al., arXiv 2406.06484)."""
    identity = np.eye(keys.shape[1])
    outputs = []
    for q, k, v, b in zip(queries, keys, values, beta, strict=True):
        state = state @ (identity - b * np.outer(k, k)) + b * np.outer(v, k)
        outputs.append(state @ q)
    return np.array(outputs)


def gated_delta_net(state, queries, keys, values, beta, alpha):
    """S_t = alpha S_{t-1} (I - beta k k^T) + beta v k^T  (arXiv 2412.06464)."""
    identity = np.eye(keys.shape[1])
    outputs = []
    for q, k, v, b, a in zip(queries, keys, values, beta, alpha, strict=True):
        state = state @ (a * (identity - b * np.outer(k, k))) + b * np.outer(v, k)
        outputs.append(state @ q)
    return np.array(outputs)


def gated_delta_net_miras(state, queries, keys, values, beta, alpha):
    """S_t = S_{t-1} (alpha I - beta k k^T) + beta v k^T: the error before the decay."""
    identity = np.eye(keys.shape[1])
    outputs = []
    for q, k, v, b, a in zip(queries, keys, values, beta, alpha, strict=True):
        state = state @ (a * identity - b * np.outer(k, k)) + b * np.outer(v, k)
        outputs.append(state @ q)
    return np.array(outputs)


def titans(state, queries, keys, values, theta, alpha, eta):
    """M_t = (1 - alpha) M_{t-1} + S_t, S_t = eta S_{t-1} - theta grad |M k - v|^2.

    Equations 13-14 of arXiv 2501.00663 with a linear memory; alpha is the share
    forgotten. The squared error is not halved there: grad = 2 (M k - v) k^T.
    """
    surprise = np.zeros_like(state)
    outputs = []
    rows = zip(queries, keys, values, theta, alpha, eta, strict=True)
    for q, k, v, step, forgotten, carried in rows:
        gradient = 2 * np.outer(state @ k - v, k)
        surprise = carried * surprise - step * gradient
        state = (1 - forgotten) * state + surprise
        outputs.append(state @ q)
    return np.array(outputs)


def longhorn(state, queries, keys, values, beta):
    """The minimum of |S - S_{t-1}|^2 + beta |S k - v|^2  (arXiv 2407.14207, eq. 5).

    By its normal equations S (I + beta k k^T) = S_{t-1} + beta v k^T.
    """
    outputs = []
    for q, k, v, b in zip(queries, keys, values, beta, strict=True):
        matrix = np.eye(len(k)) + b * np.outer(k, k)
        state = np.linalg.solve(matrix, (state + b * np.outer(v, k)).T).T
        outputs.append(state @ q)
    return np.array(outputs)


def delta_product(state, queries, keys, values, beta, alpha):
    """S_t = alpha S_{t-1} prod_i (I - b k k^T) + ..., one factor after the other.

    Gated DeltaProduct, arXiv 2502.10297; pairs along the second axis.
    """
    outputs = []
    for q, pairs_k, pairs_v, pairs_b, a in zip(
        queries, keys, values, beta, alpha, strict=True
    ):
        state = a * state
        for k, v, b in zip(pairs_k, pairs_v, pairs_b, strict=True):
            state = state @ (np.eye(len(k)) - b * np.outer(k, k)) + b * np.outer(v, k)
        outputs.append(state @ q)
    return np.array(outputs)

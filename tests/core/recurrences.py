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


def dfw(state, queries, keys, values, key_gate, value_gate):
    """S_t = (z_t f_t^T) * S_{t-1} + v_t k_t^T  (Mao, arXiv 2210.04243)."""
    outputs = []
    for q, k, v, f, z in zip(queries, keys, values, key_gate, value_gate, strict=True):
        state = np.outer(z, f) * state + np.outer(v, k)
        outputs.append(state @ q)
    return np.array(outputs)


def gla(state, queries, keys, values, alpha):
    """S_t = S_{t-1} Diag(alpha_t) + v_t k_t^T  (Yang et al., arXiv 2312.06635)."""
    outputs = []
    for q, k, v, a in zip(queries, keys, values, alpha, strict=True):
        state = state @ np.diag(a) + np.outer(v, k)
        outputs.append(state @ q)
    return np.array(outputs)


def hgrn2(state, queries, values, forget):
    """h_t = h_{t-1} Diag(f_t) + v_t (1 - f_t)^T  (Qin et al., arXiv 2404.07904)."""
    outputs = []
    for q, v, f in zip(queries, values, forget, strict=True):
        state = state @ np.diag(f) + np.outer(v, 1 - f)
        outputs.append(state @ q)
    return np.array(outputs)


def mamba2(state, c, b, x, dt, a):
    """h_t = exp(-a dt_t) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t.

    Dao and Gu, arXiv 2405.21060.
    """
    outputs = []
    for c_t, b_t, x_t, step in zip(c, b, x, dt, strict=True):
        state = np.exp(-a * step) * state + step * np.outer(x_t, b_t)
        outputs.append(state @ c_t)
    return np.array(outputs)


def mamba(state, x, dt, a, b, c):
    """Selective scan, arXiv 2312.00752: a state [D, N] with its own dt and A per D.

    h_t = exp(dt_t A) * h_{t-1} + (dt_t x_t) B_t^T, y_t = h_t C_t.
    """
    outputs = []
    for x_t, step, b_t, c_t in zip(x, dt, b, c, strict=True):
        state = np.exp(step[:, None] * a) * state + np.outer(step * x_t, b_t)
        outputs.append(state @ c_t)
    return np.array(outputs)


def longhorn_diagonal(state, queries, keys, values, beta):
    """S_t = (1 - e (k * k)^T) * S_{t-1} + (e * v) k^T, e = beta / (1 + beta |k|^2).

    Longhorn as its kernel computes it (arXiv 2407.14207), beta one per value channel.
    """
    outputs = []
    for q, k, v, b in zip(queries, keys, values, beta, strict=True):
        e = b / (1 + b * (k @ k))
        state = (1 - np.outer(e, k * k)) * state + np.outer(e * v, k)
        outputs.append(state @ q)
    return np.array(outputs)


def kimi_delta_attention(state, queries, keys, values, beta, alpha):
    """S <- S Diag(alpha_t); S <- S + beta (v - S k) k^T  (arXiv 2510.26692)."""
    outputs = []
    for q, k, v, b, a in zip(queries, keys, values, beta, alpha, strict=True):
        state = state @ np.diag(a)
        state = state + b * np.outer(v - state @ k, k)
        outputs.append(state @ q)
    return np.array(outputs)


def rwkv7(state, r, w, removal, a, replacement, v):
    """wkv_t = wkv_{t-1} (diag(w_t) - k^T (a_t * k)) + v_t^T k~_t in row vectors.

    Equation 17 of arXiv 2503.14456, k the removal key and k~ the replacement key.
    """
    outputs = []
    for r_t, w_t, k, a_t, new, v_t in zip(
        r, w, removal, a, replacement, v, strict=True
    ):
        transition = np.diag(w_t) - np.outer(k, a_t * k)
        state = state @ transition + np.outer(v_t, new)
        outputs.append(state @ r_t)
    return np.array(outputs)


def mesa_net(state, queries, keys, values, beta, gamma, ridge):
    """The minimum of sum_i zeta_ti |S k_i - v_i|^2 + tr (S - S_t) Lambda (S - S_t)^T.

    MesaNet, arXiv 2506.05233, eq. 6: zeta_ti = beta_i gamma_{i+1} ... gamma_t, and S_t
    the start after as much forgetting (zero in the paper). As one least-squares problem
    for every token, a row for each pair and each channel of the ridge.
    """
    outputs, zeta = [], np.zeros(0)
    for t, q in enumerate(queries):
        state = gamma[t] * state
        zeta = np.append(gamma[t] * zeta, beta[t])
        rows = np.sqrt(zeta)[:, None]
        matrix = np.concatenate([rows * keys[: t + 1], np.diag(np.sqrt(ridge))])
        start = np.sqrt(ridge)[:, None] * state.T
        target = np.concatenate([rows * values[: t + 1], start])
        outputs.append(q @ np.linalg.lstsq(matrix, target)[0])
    return np.array(outputs)


def atlas(state, queries, keys, values, eta, theta, alpha, window, iterations):
    """S_t = theta S + grad of the last pairs' errors, M_t = alpha M - eta NS(S_t).

    Atlas, arXiv 2505.23735, eq. 32 and 33, with a matrix as memory and errors halved.
    """
    momentum, outputs = np.zeros_like(state), []
    for t, q in enumerate(queries):
        for i in range(max(0, t - window + 1), t + 1):
            own = np.outer(state @ keys[i] - values[i], keys[i])
            first = i == max(0, t - window + 1)
            momentum = theta[t] * momentum + own if first else momentum + own
        x = momentum / np.linalg.norm(momentum)
        for _ in range(iterations):
            gram = x.T @ x
            x = x @ (3.4445 * np.eye(len(gram)) - 4.775 * gram + 2.0315 * gram @ gram)
        state = alpha[t] * state - eta[t] * x
        outputs.append(state @ q)
    return np.array(outputs)


def lact(weights, queries, keys, values, eta, beta, size, iterations):
    """W <- L2norm(W - Muon(M)), M <- beta M + sum_i eta_i grad -f(k_i) v_i, by chunk.

    LaCT, arXiv 2505.23884, section 3: f(x) = W_2 (silu(W_1 x) * W_3 x), apply first.
    Weights are [out, in] in the order W_1, W_3, W_2; gradients by hand.
    """
    weights, momenta = list(weights), [np.zeros_like(w) for w in weights]
    norms = [np.linalg.norm(w, axis=1, keepdims=True) for w in weights]
    outputs = []

    def hidden(x):
        gate, up = weights[0] @ x, weights[1] @ x
        return gate, up, 1 / (1 + np.exp(-gate))

    for c in range(0, len(queries), size):
        for q in queries[c : c + size]:
            gate, up, s = hidden(q)
            outputs.append(weights[2] @ (gate * s * up))
        totals = [np.zeros_like(w) for w in weights]
        for i in range(c, min(c + size, len(keys))):
            gate, up, s = hidden(keys[i])
            inner = -weights[2].T @ values[i]
            slope = s * (1 + gate * (1 - s))
            totals[0] += eta[i] * np.outer(inner * up * slope, keys[i])
            totals[1] += eta[i] * np.outer(inner * gate * s, keys[i])
            totals[2] += eta[i] * np.outer(-values[i], gate * s * up)
        for j, total in enumerate(totals):
            x = momenta[j] = beta[c] * momenta[j] + total
            x = x / np.linalg.norm(x)
            for _ in range(iterations):
                a = x @ x.T
                x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
            w = weights[j] - x
            weights[j] = w / np.linalg.norm(w, axis=1, keepdims=True) * norms[j]
    return np.array(outputs)

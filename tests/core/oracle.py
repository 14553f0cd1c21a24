"""The paper's recurrences, token by token, in NumPy with derivatives by hand.

`run` follows the definition of one chunk for any rule. It shares no code with
`miras_jax`: it reads only the fields of a rule, such as `rule.bias.p`. Recurrences of
single papers, independent of `run`, are in `recurrences.py`.

L length, K key width, V value width; a weight matrix is [in, out].
"""

from dataclasses import replace

import numpy as np

from tests.core.oracle_retention import dual_of, linear_scale, settle, weights_of

LAYER_NORM_EPS = 1e-6
SMOOTH_EPS = 1e-6
NORM_EPS = 1e-12
SHARPNESS = 10.0


def gelu(z):
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def gelu_derivative(z):
    t = np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))
    inner = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * z**2)
    return 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * inner


def silu(z):
    return z / (1 + np.exp(-z))


def silu_derivative(z):
    s = 1 / (1 + np.exp(-z))
    return s + z * s * (1 - s)


class Memory:
    """M(x) = [x +] [LN] W_n ... gelu(W_1 x), with its gradient by hand.

    Gated: M(x) = [x +] [LN] W_3 (silu(W_1 x) * W_2 x). A vector: M(x) = w * x.
    """

    def __init__(self, kind, params):
        is_mlp = type(kind).__name__ == "MLP"
        self.gated = type(kind).__name__ == "GatedMLP"
        self.vector = type(kind).__name__ == "Vector"
        self.residual = is_mlp or getattr(kind, "residual", False)
        self.norm = is_mlp or getattr(kind, "norm", False)
        self.scale, self.bias = params.norm_scale, params.norm_bias

    def forward(self, weights, x):
        """Return M(x) and what the backward pass needs."""
        if self.vector:
            return weights[0][0] * x, (None, None, None, None)
        inputs, products = [], []
        h = x
        for i, w in enumerate(weights):
            if self.gated:
                h = x if i < 2 else silu(products[0]) * products[1]
            elif i > 0:
                h = gelu(products[-1])
            inputs.append(h)
            products.append(h @ w)
        y = products[-1]
        normalised = deviation = None
        if self.norm:
            deviation = np.sqrt(np.mean((y - y.mean()) ** 2) + LAYER_NORM_EPS)
            normalised = (y - y.mean()) / deviation
            y = normalised * np.asarray(self.scale) + np.asarray(self.bias)
        if self.residual:
            y = x + y
        return y, (inputs, products, normalised, deviation)

    def gradient(self, weights, x, cotangent):
        """Return dl/dW of each matrix, where `cotangent` maps M(x) to dl/dM(x)."""
        y, (inputs, products, normalised, deviation) = self.forward(weights, x)
        d = cotangent(y)
        if self.vector:
            return [(d * x)[None]]
        if self.norm:
            d = d * np.asarray(self.scale)
            along = normalised * np.mean(d * normalised)
            d = (d - d.mean() - along) / deviation
        if self.gated:
            inner = weights[2] @ d
            through_gate = inner * products[1] * silu_derivative(products[0])
            return [
                np.outer(x, through_gate),
                np.outer(x, inner * silu(products[0])),
                np.outer(inputs[2], d),
            ]
        gradients = [None] * len(weights)
        for i in reversed(range(len(weights))):
            gradients[i] = np.outer(inputs[i], d)
            if i > 0:
                d = (weights[i] @ d) * gelu_derivative(products[i - 1])
        return gradients


def cotangent(bias, prediction, value, threshold):
    """Return the derivative of the inner loss with respect to the prediction."""
    r = prediction - value
    smooth_sign = np.tanh(SHARPNESS * r)
    match type(bias).__name__:
        case "DotProduct":
            return -value
        case "L2":
            return r
        case "L1":
            return smooth_sign
        case "Lp" if bias.smooth:
            smooth_power = (r**2 + SMOOTH_EPS) ** ((bias.p - 1) / 2)
            return bias.p * smooth_sign * smooth_power
        case "Lp":
            return bias.p * np.sign(r) * np.abs(r) ** (bias.p - 1)
        case "Linf":
            size = np.sqrt(r**2 + SMOOTH_EPS)
            share = np.exp((size - size.max()) / bias.temperature)
            return share / share.sum() * r / size
        case "Robust":
            return r + bias.radius * r / np.sqrt(np.sum(r**2))
        case "Huber":
            t = bias.threshold if threshold is None else threshold
            length = np.sqrt(np.sum(r**2))
            match bias.form:
                case "coordinate":
                    return np.where(np.abs(r) <= t, r, t * np.sign(r))
                case "norm":
                    return np.where(length <= t, r, t * r / length)
                case "switch":
                    return np.where(length <= t, r, t * smooth_sign)
    raise NotImplementedError(f"the oracle does not know {bias}")


def newton_schulz(m, iterations):
    """Muon's quintic iteration from m / |m|, which takes singular values towards 1."""
    x = m / np.sqrt(np.sum(m**2) + NORM_EPS)
    for _ in range(iterations):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x


def rate_per_matrix(rate, count, single_axis, entries=1):
    """Shape one token's rate for each matrix: rows of the first, columns of the last.

    A single matrix has both roles; `single_axis` says which one the rate takes.
    """
    if rate is None:
        return [1.0] * count
    if np.ndim(rate) == 0:
        return [rate] * count
    rows, columns = rate[:, None], rate[None, :]
    if count == 1:
        return [rows if single_axis == "key" else columns]
    return [rows] * entries + [rate.mean()] * (count - 1 - entries) + [columns]


def token_rates(rule, rates, count, s):
    """Return learn and keep of token s for each matrix, its momentum and threshold."""
    given = {
        name: None if rate is None else np.asarray(rate, np.float64)[s]
        for name, rate in rates._asdict().items()
    }
    kind = type(rule.retention).__name__
    keep_axis = rule.retention.axis if kind == "Decay" else "key"
    learn_axis = getattr(rule.algorithm, "axis", "value")
    memory = type(rule.memory).__name__
    if memory == "Vector":
        keep_axis = learn_axis = "value"
    entries = 2 if memory == "GatedMLP" else 1
    keep = None if kind in ("Keep", "FDivergence", "Sphere") else given["keep"]
    keeps = rate_per_matrix(keep, count, keep_axis.replace("both", "key"), entries)
    if keep_axis == "both":
        (columns,) = rate_per_matrix(given["keep_value"], 1, "value")
        between = (np.mean(keep) + np.mean(columns)) / 2
        keeps[entries:-1] = [between] * len(keeps[entries:-1])
        keeps[-1] = keeps[0] * columns if count == 1 else columns
    return (
        rate_per_matrix(given["learn"], count, learn_axis, entries),
        keeps,
        given["momentum"],
        given["threshold"],
    )


def every_pair(tokens):
    """One token per key-value pair; a token forgets before its first pair."""
    queries, keys, values, rates = tokens[:4]
    learn, keep, momentum, threshold = rates[:4]
    length, steps = np.shape(keys)[:2]
    pairs = [divmod(i, steps) for i in range(length * steps)]
    ones = None if keep is None else np.ones_like(keep[0])
    rates = type(tokens.rates)(
        learn=np.array([learn[t][i] for t, i in pairs]),
        keep=None
        if keep is None
        else np.array([keep[t] if i == 0 else ones for t, i in pairs]),
        momentum=momentum,
        threshold=None
        if threshold is None
        else np.array([threshold[t][i] for t, i in pairs]),
    )
    return type(tokens)(
        queries=np.array([queries[t] for t, _ in pairs]),
        keys=np.array([keys[t][i] for t, i in pairs]),
        values=np.array([values[t][i] for t, i in pairs]),
        rates=rates,
    )


def attend(query, keys, values):
    """Nadaraya-Watson: the mean of the values, weighted by exp(q^T k / sqrt(K))."""
    weights = np.exp(keys @ query / np.sqrt(len(query)))
    return weights @ values / np.sum(weights)


def newton(rule, params, queries, keys, values, rates):
    """W_t = (H_t + Lambda)^{-1} G_t by recursive sums, solved at every token."""
    ridge = np.diag(0.25 + np.log1p(np.exp(np.asarray(params.ridge))))
    (w,) = (np.asarray(x, np.float64) for x in params.weights)
    g, h = ridge @ w, np.zeros_like(ridge)
    outputs = []
    for s in range(len(keys)):
        (learn,), (keep,), _, _ = token_rates(rule, rates, 1, s)
        before = w
        g = keep * g + learn * np.outer(keys[s], values[s])
        h = keep * h + learn * np.outer(keys[s], keys[s])
        w = np.linalg.inv(h + ridge) @ g
        outputs.append(queries[s] @ (before if rule.readout == "start" else w))
    return np.array(outputs), [w]


def run(rule, params, tokens):
    """Return outputs [L, V] and the weights W_L = weights(A_L) after the last token."""
    steps = rule.algorithm.steps
    if steps > 1:
        single = replace(
            rule,
            algorithm=replace(rule.algorithm, steps=1),
            chunk_size=1 if rule.chunk_size == 1 else rule.chunk_size * steps,
        )
        outputs, weights = run(single, params, every_pair(tokens))
        return outputs[steps - 1 :: steps], weights
    queries, keys, values = (np.asarray(x, np.float64) for x in tokens[:3])
    if type(rule.algorithm).__name__ == "Newton":
        return newton(rule, params, queries, keys, values, tokens.rates)
    if type(rule.memory).__name__ == "Cache":
        kept = slice(-(rule.memory.window or len(keys)), None)
        outputs = [
            attend(queries[t], keys[: t + 1][kept], values[: t + 1][kept])
            for t in range(len(keys))
        ]
        return np.array(outputs), [keys[kept], values[kept]]
    erases = type(rule.algorithm).__name__ == "EraseWrite"
    matrices = [np.asarray(w, np.float64) for w in params.weights]
    every = range(len(matrices))
    memory = Memory(rule.memory, params)
    learner, window = rule.algorithm, 1
    if type(learner).__name__ == "Omega":
        learner, window = learner.inner, learner.window
    kind = type(learner).__name__
    has_momentum = kind in ("Momentum", "Muon")
    outside = kind == "Muon" and learner.learn == "outside"
    at_retained = rule.algorithm.at == "retained"
    # With one token per chunk both readouts are the recurrence of the paper.
    exact = rule.readout == "exact" or rule.chunk_size == 1
    start = rule.readout == "start"

    a = [dual_of(rule.retention, w) for w in matrices]
    m = [np.zeros_like(w) for w in matrices]
    outputs = []
    for s in range(len(keys)):
        learn, keep, momentum, threshold = token_rates(rule, tokens.rates, len(a), s)

        if s % rule.chunk_size == 0:
            a_c = list(a)
            w_c = [weights_of(rule.retention, a[i]) for i in every]
            scale = [linear_scale(rule.retention, a[i]) for i in every]
            kept = [np.ones_like(a[i]) for i in every]
            added = [np.zeros_like(a[i]) for i in every]
            stride = [0.0 if outside else 1.0 for _ in every]

        w_gradient = [keep[i] * w_c[i] for i in every] if at_retained else w_c
        descent = [np.zeros_like(a[i]) for i in every]
        for p in range(max(0, s - window + 1), s + 1):
            weight, _, _, threshold = token_rates(rule, tokens.rates, len(a), p)
            g = memory.gradient(
                w_gradient,
                keys[p],
                lambda y, p=p, t=threshold: cotangent(rule.bias, y, values[p], t),
            )
            for i in every:
                descent[i] = descent[i] - (g[i] if outside else weight[i] * g[i])
        if erases:  # of a matrix: what it recalls at one key, against a new pair
            e = np.asarray(tokens.erase_keys, np.float64)[s]
            erased = np.outer(tokens.rates.erase[s] * e, e @ w_gradient[0])
        for i in every:
            step = descent[i]
            if erases:
                step = learn[i] * np.outer(keys[s], values[s]) - erased
            if kind == "Implicit":
                step = step / (1 + learn[i] * (keys[s] @ keys[s]))
            if has_momentum:
                step = m[i] = momentum * m[i] + step
            if kind == "Muon":
                step = 0.0  # until the chunk ends
            if outside:
                stride[i] = keep[i] * stride[i] + learn[i]
            a[i] = keep[i] * a[i] + step
            kept[i] = keep[i] * kept[i]
            added[i] = keep[i] * added[i] + step

        ending, hint = list(a), list(added)
        if kind == "Muon":
            for i in every:
                o = newton_schulz(m[i], learner.iterations)
                ending[i] = a[i] + stride[i] * o
                hint[i] = added[i] + stride[i] * newton_schulz(m[i], 0)
        settled = [settle(rule.retention, a_c[i], ending[i]) for i in every]
        if start:
            w = w_c
        elif exact:
            w = [weights_of(rule.retention, settled[i]) for i in every]
        else:
            w = [kept[i] * w_c[i] + scale[i] * hint[i] for i in every]
        outputs.append(memory.forward(w, queries[s])[0])
        if (s + 1) % rule.chunk_size == 0:
            a = settled
    return np.array(outputs), [weights_of(rule.retention, a[i]) for i in every]

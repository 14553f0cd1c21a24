"""The retention gates of the oracle: the maps between dual and weights, in NumPy.

As in `oracle.py`, no code is shared with `miras_jax`. A weight matrix is [in, out].
"""

import numpy as np


def norm(a, q):
    return np.sum(np.abs(a) ** q) ** (1 / q)


def weights_of(retention, a):
    """Map one dual matrix to its weights."""
    match type(retention).__name__:
        case "Keep" | "Decay" | "Sphere":
            return a
        case "Lq":
            q = retention.q
            power = a if retention.form == "paper" else np.sign(a) * abs(a) ** (q - 1)
            return power / norm(a, q) ** (q - 2)
        case "KL":
            e = np.exp(a - a.max())
            return retention.mass * e / e.sum(axis=retention.axis, keepdims=True)
        case "FDivergence":
            return a
        case "ElasticNet":
            return a if retention.form == "proximal" else shrink(retention, a)
        case "Bregman" if type(retention.link).__name__ == "Sigmoid":
            return 1 / (1 + np.exp(-a))
        case "Bregman":
            return np.sign(a) * np.abs(a) ** retention.link.power
    raise NotImplementedError(f"the oracle does not know {retention}")


def shrink(retention, z):
    """Soft threshold, or its surrogate |z| arctan(z / gamma) / (pi / 2)."""
    if retention.smooth:
        return np.abs(z) * np.arctan(z / retention.threshold) / (np.pi / 2)
    return np.where(
        np.abs(z) > retention.threshold, z - np.sign(z) * retention.threshold, 0
    )


def bisect(function, low, high):
    """A root of an array function that falls from `low` to `high`, entry by entry."""
    for _ in range(200):
        middle = (low + high) / 2
        above = function(middle) > 0
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return (low + high) / 2


def settle(retention, anchor, a):
    """The proximal step at a chunk's end."""
    match type(retention).__name__:
        case "ElasticNet" if retention.form == "proximal":
            return shrink(retention, a)
        case "Sphere":
            norms = [np.sqrt(np.sum(x**2, axis=0)) for x in (anchor, a)]
            return a * norms[0] / norms[1]
        case "FDivergence":
            # W g(U - zeta), g the inverse of f', for the four generators of the paper.
            inverse, at_one, pole = {
                "kl": (lambda y: np.exp(y - 1), 1.0, np.inf),
                "reverse_kl": (lambda y: -1 / y, -1.0, 0.0),
                "chi_square": (lambda y: np.maximum(0, 1 + y / 2), 0.0, np.inf),
                "hellinger": (lambda y: (1 - y) ** -2.0, 0.0, 1.0),
            }[retention.generator]
            steps, axis = a - anchor, retention.axis
            top = steps.max(axis=axis, keepdims=True)
            bottom = steps.min(axis=axis, keepdims=True)
            low = np.maximum(bottom - at_one, top - pole + 1e-12)

            def excess(zeta):
                total = (anchor * inverse(steps - zeta)).sum(axis=axis, keepdims=True)
                return total - retention.mass

            return anchor * inverse(steps - bisect(excess, low, top - at_one))
    return a


def dual_of(retention, w):
    """Map initial parameters to the dual: the inverse of `weights_of`, KL apart.

    paper:  |W| = |A|^(3-q), hence A = W |W|^((q-2)/(3-q)), all norms of order q.
            At q = 3 only the direction of A counts, and A = W serves.
    mirror: |W|_p = |A|_q with p = q / (q - 1), then undo the elementwise power.
    """
    match type(retention).__name__:
        case "FDivergence":
            e = np.exp(w - w.max())
            return retention.mass * e / e.sum(axis=retention.axis, keepdims=True)
        case "ElasticNet" if retention.form == "lazy":
            high = np.abs(w) + 10 * retention.threshold
            size = bisect(
                lambda z: np.abs(w) - shrink(retention, z), np.zeros_like(w), high
            )
            return np.sign(w) * size
        case "Bregman" if type(retention.link).__name__ == "SignedPower":
            return np.sign(w) * np.abs(w) ** (1 / retention.link.power)
        case "Lq":
            pass
        case _:
            return w  # the parameters of KL and of a sigmoid are duals already
    q = retention.q
    if retention.form == "paper":
        if q == 3:
            return w
        return w * norm(w, q) ** ((q - 2) / (3 - q))
    size = norm(w, q / (q - 1))
    return np.sign(w) * (np.abs(w) * size ** (q - 2)) ** (1 / (q - 1))


def linear_scale(retention, a):
    """The scalar that stands for the map inside a chunk of the linear readout."""
    match type(retention).__name__:
        case "Lq" if retention.form == "paper":
            return 1 / norm(a, retention.q) ** (retention.q - 2)
        case "Lq":
            return norm(a, retention.q) ** 2 / np.sum(a**2)
        case "KL":
            return retention.mass / a.shape[retention.axis]
        case "FDivergence":
            curvature = {"chi_square": 2, "hellinger": 0.5}
            mean = retention.mass / a.shape[retention.axis]
            return mean / curvature.get(retention.generator, 1)
        case "Bregman" if type(retention.link).__name__ == "Sigmoid":
            return np.mean(np.exp(-a) / (1 + np.exp(-a)) ** 2)
        case "Bregman":
            power = retention.link.power
            return np.mean(power * np.abs(a) ** (power - 1))
    return 1.0

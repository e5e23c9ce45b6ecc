"""Rivals: rules of others that set a rate without its being tuned, to compare with. Not the paper's.

What this file teaches: a tuner is a function and a line in a registry. Importing this file makes these three known to
train.train as well. Each is written from its equation, without the refinements of its authors.
"""

import jax
import jax.numpy as jnp

from tuners import TUNERS, Tuner, dot, linesearch, move, scalar


def dog(reach=1e-4):
    """Distance over gradients (Ivgi, Hinder, Carmon 2023, arXiv:2302.12022): η = max‖w − w₀‖ / √Σ‖u‖².

    reach: the first distance, in shares of 1 + ‖w₀‖

    The sum and the maximum are over all steps so far. The state is (w₀, maximum, sum). Costs a copy of w.

    >>> w, g = jnp.array(1.0), jnp.array(4.0)
    >>> float(dog(0.5).rate(dog(0.5).init(w), None, w, None, g, -g)[0])
    0.25
    """

    def init(w):
        return jax.tree.map(jnp.copy, w), scalar(reach * (1 + jnp.sqrt(dot(w, w))), w), scalar(0, w)

    def rate(state, f, w, value, g, u):
        first, distance, total = state
        moved = move(w, -1.0, first)
        distance = jnp.maximum(distance, jnp.sqrt(dot(moved, moved)))
        total = total + jnp.where(jnp.isfinite(dot(u, u)), dot(u, u), 0)
        eta = distance / jnp.sqrt(total)
        eta = scalar(jnp.where(jnp.isfinite(eta) & jnp.isfinite(dot(u, u)), eta, 0), w)
        return eta, (first, distance, scalar(total, w))

    return Tuner(init, rate)


def ngn(lr=1.0):
    """Non-negative Gauss-Newton (Orvieto, Xiao 2024, arXiv:2407.04358): η = c / (1 + c ‖g‖²/2f), with −g·u for ‖g‖².

    lr: c, which the rate approaches where the loss is large against the gradient

    For f ≥ 0. No state. Costs nothing.

    >>> w, g = jnp.array(1.0), jnp.array(4.0)
    >>> round(float(ngn(1.0).rate((), None, w, 2.0, g, -g)[0]), 4)
    0.2
    """

    def rate(state, f, w, value, g, u):
        eta = lr / (1 - lr * dot(g, u) / (2 * value))
        return scalar(jnp.where((eta > 0) & jnp.isfinite(eta), eta, 0), w), state

    return Tuner(init=lambda w: (), rate=rate)


def nonmonotone(slope=1e-4, average=0.85, shrink=0.8, grow=4.0, lr_max=100.0, max_trials=1000):
    """A linesearch that lets the loss rise, in the manner of Flatland (Galli et al. 2026, arXiv:2606.06722).

        f(w + ηu) ≤ m + c η g·u,   m ← (ρqm + f(w)) / (ρq + 1),   q ← ρq + 1

    slope: c, the share of the predicted decrease that is asked for
    average: ρ, the memory of m, the average loss of Zhang and Hager (2004)
    shrink: the factor after a failed trial
    grow: the factor on the last rate
    lr_max: largest learning rate, from which the first search starts
    max_trials: trials after which no step is taken

    It is tuners.linesearch with m in place of f(w). The state is (the last η, q, m).

    >>> f = lambda w: 2 * w**2
    >>> w, g = jnp.array(1.0), jnp.array(4.0)
    >>> tuner = nonmonotone(shrink=0.5, lr_max=1.0)
    >>> state = jnp.array(0.5), jnp.array(1.0), jnp.array(10.0)  # the loss was higher before
    >>> float(tuner.rate(state, f, w, f(w), g, -g)[0])  # which allows the way from 2 up to f(1 - 0.5 × 4)
    0.5
    """

    def rate(state, f, w, value, g, u):
        eta, q, m = state
        weight = average * q
        mean = (weight * m + value) / (weight + 1)
        search = linesearch(slope, 0.0, shrink, grow, lr_max, max_trials)
        eta, last = search.rate(eta, f, w, mean, g, u)
        finite = jnp.isfinite(value)
        return eta, (last, scalar(jnp.where(finite, weight + 1, q), w), scalar(jnp.where(finite, mean, m), w))

    return Tuner(lambda w: (scalar(0, w), scalar(0, w), scalar(0, w)), rate)


RIVALS = {f.__name__: f for f in (dog, ngn, nonmonotone)}
for name in RIVALS:
    if name in TUNERS:
        raise ValueError(f"tuners.py and paper/rivals.py both have a tuner {name}: rename one of the two")
TUNERS |= RIVALS

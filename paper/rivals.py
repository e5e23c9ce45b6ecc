"""Rivals: other rules that set the rate, to compare with: a schedule and the paper's (23) to (25), then later ones.

    python -m paper train --tuner polyak     is train.py with these rules, too

What this file teaches: a tuner may stand in any file. Importing this one adds seven to TUNERS, so that train.py and
plots.py know them too. The later three are written from their equations, without their authors' refinements.
Read next: experiments.py.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

import plots
import train
from tuners import TUNERS, Tuner, dot, linesearch, move, scalar


def schedule(steps, lr=0.1, warmup=0.1, decay: Literal["constant", "linear", "cosine"] = "cosine"):
    """Linear warm-up from 0 to lr, then constant, or a linear or cosine decay to 0 at `steps`.

    lr: learning rate after the warm-up
    warmup: fraction of the steps that the warm-up takes
    decay: how the rate falls after it

    ValueError for another word. The state is the number of steps taken. Costs nothing.

    >>> tuner = schedule(steps=10, lr=1.0, warmup=0.2, decay="linear")
    >>> [round(float(tuner.rate(t, None, jnp.ones(2), None, None, None)[0]), 3) for t in range(11)]
    [0.0, 0.5, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]
    """
    shapes = {
        "constant": lambda p: 1.0,  # p from 0 at the end of the warm-up to 1 at the last step
        "linear": lambda p: 1 - p,
        "cosine": lambda p: (1 + jnp.cos(jnp.pi * p)) / 2,
    }
    if decay not in shapes:
        raise ValueError(f"decay is {decay!r}; it must be one of {', '.join(shapes)}")

    def rate(t, f, w, value, g, u):
        rise = warmup * steps
        progress = jnp.clip((t - rise) / (steps - rise), 0, 1)
        eta = lr * jnp.where(t < rise, t / jnp.maximum(rise, 1), shapes[decay](progress))
        return scalar(eta, w), t + 1

    return Tuner(init=lambda w: jnp.zeros((), jnp.int32), rate=rate)


def polyak(f_min=0.0, lr_max=1.0):
    """Polyak's rate (1969) (23), η = min((f(w) − f*)/‖g‖², lr_max).

    f_min: f*, the least loss that there could be
    lr_max: largest learning rate

    It is made for u = −g; where f is convex, and f_min its minimum, that step brings w closer to every minimiser. No
    state. Costs nothing.

    >>> f = lambda w: 2 * w**2
    >>> w, g = jnp.array(1.0), jnp.array(4.0)
    >>> float(polyak().rate((), f, w, f(w), g, -g)[0])
    0.125
    """

    def rate(state, f, w, value, g, u):
        eta = jnp.minimum((value - f_min) / dot(g, g), lr_max)  # (23)
        return scalar(jnp.where(eta > 0, eta, 0), w), state  # 0 where it is 0/0, or f(w) fell below f_min

    return Tuner(init=lambda w: (), rate=rate)


def hypergradient(lr=0.1, hyper_rate=0.1):
    """Hypergradient descent on the rate (Baydin et al. 2018) (24): η ← η (1 − r cos∠(∇f(w + ηu), u)), from η = lr.

    lr: learning rate of the first step
    hyper_rate: r, the learning rate of the learning rate (β in the paper)

    The rate grows while the gradient at the new point still agrees with the step, and shrinks where the step went
    too far. That gradient is the next step's g, so the rule is applied one step later at no cost; on mini-batches it
    is then the gradient on the next batch. The state is (η, u).

    >>> tuner = hypergradient(0.5, hyper_rate=0.1)
    >>> g = jnp.array(4.0)
    >>> eta, state = tuner.rate(tuner.init(g), None, g, None, g, -g)  # no step taken yet
    >>> eta, state = tuner.rate(state, None, g, None, g, -g)  # cos = −1: the gradient did not change
    >>> round(float(eta), 4)
    0.55
    """

    def rate(state, f, w, value, g, u):
        eta, u_last = state
        cos = dot(g, u_last) / jnp.sqrt(dot(g, g)) / jnp.sqrt(dot(u_last, u_last))
        eta = scalar(eta * (1 - hyper_rate * jnp.where(jnp.isfinite(cos), cos, 0)), w)  # (24)
        return eta, (eta, u)

    return Tuner(init=lambda w: (scalar(lr, w), jax.tree.map(jnp.zeros_like, w)), rate=rate)


def exact(sigma=2.0, iterations=5):
    """σ over the sharpness (25), η = σ/λ, with λ from a few products Hv a step.

    sigma: σ, the scaling factor; 2 holds the top eigenvector at the edge
    iterations: products Hv a step

    λ is the curvature along the top eigenvector, where `cdat` asks for that along u = −g. Deviation: each product but
    the first turns the unit vector v within the plane of v and Hv to where vᵀHv is largest, so that with two or more
    products a step λ tends to the largest algebraic eigenvalue. No step is taken before the residual ‖Hv − λv‖ has once
    been below a tenth of λ, nor where λ ≤ 0. The state is (v, whether that has happened). Costs `iterations`
    Hessian-vector products.

    >>> f = lambda w: 2 * w[0] ** 2 - 5 * w[1] ** 2  # H = diag(4, −10)
    >>> w, g = jnp.ones(2), jnp.array([4.0, -10.0])
    >>> round(float(exact(2.0).rate(exact().init(w), f, w, f(w), g, -g)[0]), 4)
    0.5
    """

    def rate(state, f, w, value, g, u):
        v, found = state
        product = lambda v: jax.jvp(jax.grad(f), (w,), (v,))[1]
        v = scaled(v)
        hv = product(v)
        for _ in range(iterations - 1):
            off = scaled(move(hv, -dot(v, hv), v))
            off = move(off, -dot(v, off), v)  # orthogonal to v once more; short where v is an eigenvector already
            h_off = product(off)
            angle = jnp.arctan2(2 * dot(off, hv), dot(v, hv) - dot(off, h_off)) / 2
            angle = jnp.where(dot(off, off) > 0.5, angle, 0)
            turn = lambda a, b: jax.tree.map(lambda a, b: jnp.cos(angle) * a + jnp.sin(angle) * b, a, b)
            v, hv = turn(v, off), turn(hv, h_off)
        lam = dot(v, hv)
        off = move(hv, -lam, v)
        found |= dot(off, off) < (0.1 * lam) ** 2
        eta = sigma / lam  # (25)
        v = jax.tree.map(lambda v, last: jnp.where(jnp.isfinite(lam), v, last), v, state[0])
        return scalar(jnp.where(found & (lam > 0), eta, 0), w), (v, found)

    def scaled(v):  # to unit length; zero stays zero
        length = jnp.sqrt(dot(v, v))
        return jax.tree.map(lambda v: v / jnp.where(length > 0, length, 1), v)

    def init(w):
        flat, unravel = ravel_pytree(w)
        noise = jax.random.normal(jax.random.key(0), flat.shape, scalar(0, w).dtype)
        return unravel(noise), jnp.zeros((), bool)

    return Tuner(init, rate)


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
    """Non-negative Gauss-Newton (Orvieto, Xiao 2024, arXiv:2407.04358): η = c / (1 + c ‖g‖²/(2f)), −g·u for ‖g‖².

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
    >>> float(tuner.rate(state, f, w, f(w), g, -g)[0])  # 1 fails, f(-3) = 18; f(-1) = 2 is not below f(1), but below m
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


LATER = {f.__name__: f for f in (dog, ngn, nonmonotone)}
RIVALS = {f.__name__: f for f in (schedule, polyak, hypergradient, exact)} | LATER
for name in RIVALS:
    if name in TUNERS:
        raise ValueError(f"tuners.py and paper/rivals.py both have a tuner {name}: rename one of the two")
TUNERS |= RIVALS  # in place: train.py sees the same dict
train.RANGES |= {"f_min": (-1e30, 1e30), "iterations": (1, 1000), "hyper_rate": (0, 1), "warmup": (0, 0.999999)}
plots.COLORS |= {"dog": "#332288", "ngn": "#661100", "nonmonotone": "#44AA99"}
plots.NAMES["hyper_rate"] = "r"

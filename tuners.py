"""Tuners: how the learning rate η is chosen, step by step.

What this file teaches: the classical answers (a constant, a linesearch, the minimiser of a quadratic model) and the
paper's: stay on the edge of stability, `cdat`. Below the divider stands a rule of ours; a schedule and the paper's
other rivals are in paper/rivals.py.

    w  parameters, a pytree                      η     learning rate; the step is w + ηu
    f  training loss f(w), the batch bound       λ     sharpness, the largest eigenvalue of H; ηλ = 2 is the edge
    g  gradient ∇f(w)                            σ, β  scaling factor of CDAT, decay of its moving averages
    u  direction; gradient descent has u = −g    H     Hessian ∇²f(w), never formed

A tuner is two pure functions: init(w) -> state, and rate(state, f, w, value, g, u) -> (η, state), with value = f(w),
one number without auxiliary output. w is float32 or float64, and η and the floats of the state are of its dtype,
whatever that of the data and of the hyperparameters; half precision is a TypeError: keep a float32 copy of it. Where a
rule finds no rate (a number is not finite, or it divides by 0 and has no lr_max) η is 0: no step is taken. An η that
stays 0 says that u points uphill or f is flat along it. Hyperparameters that are floats may be traced.
Copying: take a function and the helpers above it; call rate between gradient and update, inside the jitted step. On
several devices f, value and g must be those of the whole batch: in pmap and shard_map f is lambda w:
jax.lax.pmean(loss(w, batch), "devices"), value and g are from jax.value_and_grad(f), and g is a pmean once more. The
length of u cancels in the ηu of cdat (with β = 0): clip or schedule ηu, not u.
Paper: Roulet et al. 2024, arXiv:2407.06183; equation numbers are the paper's. Read next: sharpness.py.
"""

import math
from dataclasses import dataclass
from typing import Callable, Literal, NamedTuple

import jax
import jax.numpy as jnp


class Tuner(NamedTuple):
    """How the learning rate is chosen: two pure functions."""

    init: Callable  # init(w) -> state
    rate: Callable  # rate(state, f, w, value, g, u) -> (eta, state)


def dot(a, b):
    """Inner product of two pytrees of one structure, a scalar."""
    return sum(jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def move(w, eta, u):
    """w + ηu."""
    return jax.tree.map(lambda w, u: (w + eta * u).astype(w.dtype), w, u)


def scalar(value, w):
    """One number as an array of the dtype of w, which must be float32 or float64. TypeError else."""
    dtypes = {str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(w)}
    if not dtypes <= {"float32", "float64"}:
        raise TypeError(f"w must be float32 or float64, not {' and '.join(sorted(dtypes))}; give the parameters alone")
    if jax.tree.structure(value) != jax.tree.structure(0) or jnp.shape(value):
        raise TypeError("f(w) must be one number, without auxiliary output: give the tuner lambda w: f(w)[0]")
    return jnp.asarray(value, max(dtypes))


def curvature(f, w, u):
    """uᵀHu, the second derivative of t ↦ f(w + tu) at t = 0 (27): a jvp of a jvp.

    f(w) -> scalar; w and u pytrees of the same arrays; a scalar. Forward over forward: no activation is stored,
    whatever the depth. Costs five forward passes, of which the gradient has one already; seven where the compiler does
    not see that the two first-order tangents are equal (cost_analysis() tells): after a division by an array (write
    x * y**-1.0 for x / y, as models.softmax does) and in a lax loop, which carries both. Functions with a custom_vjp
    have no forward mode: for these uᵀ(Hu), dot(u, jax.jvp(jax.grad(f), (w,), (u,))[1]).

    >>> f = lambda w: w[0] ** 2 + w[0] * w[1]
    >>> float(curvature(f, jnp.array([1.0, 1.0]), jnp.array([1.0, 2.0])))
    6.0
    """
    number = lambda w: scalar(f(w), w)
    slope = lambda w: jax.jvp(number, (w,), (u,))[1]  # t ↦ f(w + tu) has the derivative ∇f(w + tu)·u
    return jax.jvp(slope, (w,), (u,))[1]


@dataclass(frozen=True)  # not a NamedTuple: jax.checkpoint and the like take none as a function
class Composed:
    """A loss in two halves, called like any other, as f(w) = outer(inner(w), w) or loss(w, batch)."""

    inner: Callable  # inner(w) or inner(w, batch) -> z, the outputs of a network, a pytree
    outer: Callable  # outer(z, w) or outer(z, w, batch) -> scalar, convex in z and w: their loss, and a weight decay

    def __call__(self, w, *batch):
        return self.outer(self.inner(w, *batch), w, *batch)


def gauss_newton(f, w, u):
    """uᵀGu, the curvature along u of f with its network made linear: G = JᵀL″J, L″ the Hessian of outer.

    f a `Composed`, TypeError else; J the Jacobian of w ↦ (inner(w), w). H = G + Σ ∂L/∂z ∇²z: the sum has either sign,
    and uᵀHu may pass 0, where n/d blows up. uᵀGu is never negative, and it is cheaper: two forward passes beside the
    gradient's.

    >>> f = Composed(lambda w: w**2, lambda z, w: (z - 1) ** 2 / 2)
    >>> float(gauss_newton(f, jnp.array(0.5), jnp.array(1.0))), float(curvature(f, jnp.array(0.5), jnp.array(1.0)))
    (1.0, -0.5)
    """
    if not (hasattr(f, "inner") and hasattr(f, "outer")):
        raise TypeError("the Gauss-Newton curvature needs f in two halves: give a Composed(inner, outer)")
    z, jz = jax.jvp(f.inner, (w,), (u,))
    return curvature(lambda both: f.outer(*both), (z, w), (jz, u))


CURVATURES = {"hessian": curvature, "gauss-newton": gauss_newton}  # by the value of the option `curvature`
Curvature = Literal["hessian", "gauss-newton"]


def constant(lr=0.1):
    """The same η at every step. Costs nothing.

    lr: learning rate

    >>> float(constant(0.5).rate((), None, jnp.ones(2), None, None, None)[0])
    0.5
    """
    return Tuner(init=lambda w: (), rate=lambda state, f, w, value, g, u: (scalar(lr, w), state))


def linesearch(slope=1e-4, slack=0.0, shrink=0.8, grow=4.0, lr_max=1.0, max_trials=1000):
    """Backtracking to the condition (1) of Armijo (1966), as in (26): the first η of η₀, c₋η₀, c₋²η₀, … with

        f(w + ηu) ≤ (1 + δ) f(w) + c η g·u,        η₀ = min(c₊ η_last, lr_max)

    slope: c, the share of the predicted decrease that is asked for
    slack: δ, the relative increase that is accepted (for f ≥ 0); it frees a search that is stuck at vanishing rates
    shrink: c₋, the factor after a failed trial
    grow: c₊, the factor on the last rate; inf starts each search at lr_max
    lr_max: largest learning rate, from which the first search starts
    max_trials: trials after which no step is taken; the paper takes 30 on mini-batches

    A trial whose loss is nan or infinite fails. When max_trials fail, the next search starts at lr_max. The state is
    the last η. Costs one evaluation of f a trial, no derivative; all max_trials where f(w) is nan.

    >>> f = lambda w: 2 * w**2
    >>> w, g = jnp.array(1.0), jnp.array(4.0)
    >>> tuner = linesearch(shrink=0.5)  # 1 and 0.5 overshoot: f(-3) = 18, and f(-1) is only as good
    >>> float(tuner.rate(tuner.init(w), f, w, f(w), g, -g)[0])
    0.25
    """

    def rate(eta_last, f, w, value, g, u):
        decrease = dot(g, u)  # to first order, for η = 1; negative

        def fails(search):
            eta, trials = search
            trial = scalar(f(move(w, eta, u)), w)
            accepted = trial <= (1 + slack) * value + slope * eta * decrease  # (26)
            return ~(accepted & jnp.isfinite(trial)) & (trials < max_trials)

        def shorter(search):
            eta, trials = search
            return scalar(shrink * eta, w), trials + 1

        guess = jnp.where(eta_last > 0, jnp.minimum(grow * eta_last, lr_max), lr_max)
        eta, trials = jax.lax.while_loop(fails, shorter, (scalar(guess, w), 0))
        eta = scalar(jnp.where(trials < max_trials, eta, 0), w)
        return eta, eta

    return Tuner(init=lambda w: scalar(0, w), rate=rate)


def greedy(lr_max=math.inf, curvature: Curvature = "hessian", every=1):
    """The quadratically greedy rule (3), η = −g·u / uᵀHu: the minimiser of the quadratic model along u.

    lr_max: largest learning rate
    curvature: hessian, uᵀHu, or gauss-newton, uᵀGu
    every: steps from one curvature to the next

    Deviation: where uᵀHu < 0 and the model has no minimum, |uᵀHu| takes its place. Costs as much as `cdat`.

    >>> f = lambda w: 2 * w**2
    >>> w, g = jnp.array(1.0), jnp.array(4.0)
    >>> float(greedy().rate(greedy().init(w), f, w, f(w), g, -g)[0])
    0.25
    """
    return cdat(1.0, lr_max=lr_max, curvature=curvature, every=every)


def cdat(sigma=2.0, beta=0.0, damping=0.0, lr_max=math.inf, curvature: Curvature = "hessian", every=1):
    """CDAT (8), curvature dynamics aware tuning: σ times the minimiser of the quadratic model along u.

        η = min(σ n/d, lr_max),   n = max(−g·u, 0),   d = |uᵀHu| + ε

    sigma: σ, the scaling factor; 1 is greedy (3) and 2 on edge (7)
    beta: β, the decay of the moving averages of n and d
    damping: ε, added to the curvature; 0 throughout the paper
    lr_max: largest learning rate
    curvature: hessian, uᵀHu, or gauss-newton, uᵀGu
    every: steps from one curvature to the next; in between d/‖u‖² is held

    σ = 2 gives the largest η at which the quadratic model is not above f(w); were u the top eigenvector, ηλ would be 2.
    With β in (0, 1) n and d are moving averages, both from zero, whose start-up bias cancels in the ratio. Under Adam
    take β = 0.9, on the full batch too; where n/d jumps, as with RMSProp on transformers, it keeps a run together.
    Where an overshoot has saturated every softmax of a cross-entropy, uᵀHu underflows to 0: η is 0 from then on unless
    there is an lr_max. The state is (n, d, the held curvature over ‖u‖², step). Costs a curvature every so many steps.

    >>> f = lambda w: 2 * w**2  # here H = λ = 4
    >>> w, g = jnp.array(1.0), jnp.array(4.0)
    >>> tuner = cdat(sigma=2.0)
    >>> eta, state = tuner.rate(tuner.init(w), f, w, f(w), g, -g)
    >>> float(eta)
    0.5
    """
    if curvature not in CURVATURES:
        raise ValueError(f"curvature is {curvature!r}; it must be one of {', '.join(CURVATURES)}")

    def rate(state, f, w, value, g, u):
        n_last, d_last, held, t = state
        n = jnp.maximum(-dot(g, u), 0)
        magnitude = lambda: jnp.abs(CURVATURES[curvature](f, w, u))
        if every == 1:
            d = magnitude() + damping
        else:  # that of u/‖u‖ is held from one measurement to the next; one that is 0 or not finite is measured anew
            due = (t % every == 0) | ~((held > 0) & jnp.isfinite(held))
            held = jax.lax.cond(due, lambda _: scalar(magnitude() / dot(u, u), w), lambda d: d, held)
            d = held * dot(u, u) + damping
        finite = jnp.isfinite(n) & jnp.isfinite(d)  # else left out: nan would stay in an average for good
        n = scalar(jnp.where(finite, (1 - beta) * n + beta * n_last, n_last), w)
        d = scalar(jnp.where(finite, (1 - beta) * d + beta * d_last, d_last), w)
        eta = jnp.minimum(sigma * n / d, lr_max)  # (8)
        return scalar(jnp.where(finite & jnp.isfinite(eta), eta, 0), w), (n, d, held, t + 1)

    return Tuner(lambda w: (scalar(0, w), scalar(0, w), scalar(0, w), jnp.zeros((), jnp.int32)), rate)


# ------------------------------------------------------------------------- a rule of ours, with nothing to tune


def feedback(rise=0.02, tolerance=0.1, growth=1.5, sigma_low=1.5, sigma_high=3.0, average=0.95,
             curvature: Curvature = "gauss-newton"):  # fmt: skip
    """CDAT over the edge and back, with nothing to choose: ours, not the paper's.

        m ← ρm + (1 − ρ) f(w)
        r = max(−Σgᵢuᵢ, 0)/Σ|gᵢuᵢ|
        where f(w) > (1 + τ) m:  σ ← (σ + σ_low)/2,  s = 1
        elsewhere:  σ ← min(σ + a, σ_high),  s = 1 + (σ − 1) r²
        η = min(s n/d, c η_last) (8),  n and d averaged with β = ρ (1 − r⁸)

    rise: a, what is added to σ at each step; σ starts at 2
    tolerance: τ, the relative rise of the loss over its average that asks for a greedy step
    growth: c, the most by which the rate grows from one step to the next
    sigma_low: what a greedy step brings σ halfway to
    sigma_high: the largest σ
    average: ρ, decay of the moving averages
    curvature: hessian, uᵀHu, or gauss-newton, uᵀGu

    A σ above 2 lowers sharpness and loss fastest, and diverges in the end: the part of u along the steepest directions
    grows. When it dominates u, one greedy step (s = 1) takes most of it out. So σ rises until the loss does. Under
    momentum some weights go uphill, and r, the share of the slope that goes down, is below 1: the less it is, the less
    the step overshoots, and the longer n and d are averaged. It is rounded to four digits, to be exactly 1 under
    gradient descent and RMSProp: no averages. The loss must be one that falls towards 0: "10 % above" means nothing
    where it is negative or has a floor. The state is (m, σ, the last rate above 0, the state of `cdat`). Costs a
    curvature.

    >>> f = Composed(lambda w: w, lambda z, w: 2 * z**2)
    >>> w, g = jnp.array(1.0), jnp.array(4.0)
    >>> tuner = feedback()
    >>> eta, state = tuner.rate(tuner.init(w), f, w, f(w), g, -g)  # the first loss is its own average
    >>> round(float(eta), 4)
    0.505
    >>> float(tuner.rate(state, f, w, 2 * f(w), g, -g)[0])  # the loss doubled: greedy
    0.25
    """

    def rate(state, f, w, value, g, u):
        m_last, sigma, eta_last, averages = state
        m = jnp.where(jnp.isinf(m_last), value, average * m_last + (1 - average) * value)  # inf before the first loss
        rose = value > (1 + tolerance) * m
        sigma = jnp.where(rose, (sigma + sigma_low) / 2, jnp.minimum(sigma + rise, sigma_high))
        share = -dot(g, u) / dot(jax.tree.map(jnp.abs, g), jax.tree.map(jnp.abs, u))
        share = jnp.where(share > 0, jnp.round(share, 4), 0)  # nan without a gradient
        scale = jnp.where(rose, 1, 1 + (sigma - 1) * share**2)
        beta = average * (1 - share**8)
        rule = cdat(scale, beta, lr_max=growth * eta_last, curvature=curvature)
        eta, averages = rule.rate(averages, f, w, value, g, u)
        eta_last = jnp.where(eta > 0, eta, eta_last)
        return eta, (scalar(jnp.where(jnp.isfinite(value), m, m_last), w), scalar(sigma, w), eta_last, averages)

    def init(w):
        return scalar(jnp.inf, w), scalar(2, w), scalar(jnp.inf, w), cdat(curvature=curvature).init(w)

    return Tuner(init, rate)


TUNERS = {f.__name__: f for f in (constant, linesearch, greedy, cdat, feedback)}

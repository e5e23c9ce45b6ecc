"""Theory: the paper's simplified model of how learning rate and sharpness move each other.

What this file teaches: why a rate kept below the edge is not safe. Above the edge the weights swing along the top
eigenvector, and what swings pushes the sharpness down; a tuner that never lets them swing loses that feedback, so
the sharpness runs away and takes the rate with it. Three numbers a step are enough to see it.

The model is gradient descent on the smallest loss with such a feedback, ½ (Λ + cz) x² − sz, whose sharpness is
λ = Λ + cz at the bottom x = 0 of its valley. A step with rate η takes x to (1 − ηλ) x and, with a = cs, b = c²/2,

    λ₊ = λ + η (a − b x²)    (4)

    symbol   meaning
    η, λ     learning rate (lr) and sharpness (lam)
    y        ηλ − 2: 0 is the edge of stability
    x, p     displacement from the valley's bottom along the top eigenvector v, and p = x²
    ν, q     a second, fixed, small eigenvalue, and the squared displacement there
    a        the sharpening −∇λ·∇f
    b        the feedback: ‖∇λ‖² in the paper's text, ½‖∇λ‖² in its Appendix A.1. With x a displacement it is the half
    σ        scaling factor of CDAT

p and q are squared displacements, not squared gradients: with ∇f = (λx, νz) CDAT's n/d is (λ²p + ν²q)/(λ³p + ν³q),
which is (9) as printed. So the loss is ½(λp + νq).
Numbers may be Python's or traced, steps is a Python integer; for many starts use jax.vmap.
Copying: this file needs JAX alone; take a model with Path and the helpers it calls, or `measure` with Measured and dot.
Paper: Roulet et al. 2024, arXiv:2407.06183, equations (4) to (10) and Appendix A; equation numbers are the paper's.
Read next: drawings.py, where `overlay` lays it over a real run.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Path(NamedTuple):
    """Arrays of shape (steps + 1,): entry t is the state after t steps, and the rate of the next."""

    learning_rate: Any  # η
    sharpness: Any  # λ
    y: Any  # ηλ − 2
    p: Any  # x², the squared displacement along the top eigenvector
    q: Any  # the same along the second one; 0 where the model has none


def floats(*numbers):
    """Numbers as arrays of one floating dtype: that of the arrays among them, else JAX's default.

    >>> [str(x.dtype) for x in floats(1, jnp.float16(2))]
    ['float16', 'float16']
    """
    dtype = jnp.result_type(float, *numbers)
    return [jnp.asarray(x, dtype) for x in numbers]


def rollout(step, start, steps):
    """The states start, step(0, start), … with one axis in front, of length steps + 1.

    >>> rollout(lambda t, x: 2 * x, 1, steps=3).tolist()
    [1, 2, 4, 8]
    """
    return jax.lax.scan(lambda state, t: (step(t, state), state), start, jnp.arange(steps + 1))[1]


def constant_rate(lr=1.0, x=0.3, lam=1.9, a=0.03, b=0.3, steps=100, semi_implicit=False):
    """The model (4) in x and λ with a constant rate, a `Path`. The defaults are Figure 4's, left.

        x₊ = (1 − ηλ) x,   λ₊ = λ + η (a − b x²)    (4)

    It circles its fixed point λ = 2/η, x² = a/b: sharpening carries λ over the edge, x grows, and the feedback takes λ
    back. As printed the circle is an outward spiral that grows by √(1 + 2aη²) = 1.03 a step: from the starts
    that were tried it blows up after 54 to 250 steps (here 115), so plot no more than 100.
    Deviation: with semi_implicit the feedback takes the new x₊², and the model goes round for good.
    Deviation: the paper gives neither x and λ at the start nor the number of steps; these are ours.

    >>> [round(float(lam), 4) for lam in constant_rate(steps=2).sharpness]
    [1.9, 1.903, 1.9111]
    """
    lr, x, lam, a, b = floats(lr, x, lam, a, b)

    def step(t, state):
        x, lam = state
        x_new = (1 - lr * lam) * x  # (4)
        lam = lam + lr * (a - b * (x_new if semi_implicit else x) ** 2)  # (4)
        return x_new, lam

    x, lam = rollout(step, (x, lam), steps)
    return Path(jnp.full_like(lam, lr), lam, lr * lam - 2, x**2, jnp.zeros_like(x))


def moving_rate(rule, p, lam, a, b, steps=100, semi_implicit=False):
    """The model (5) in p and y, for any rule by which the rate moves, a `Path`.

        p₊ = (1 + y)² p,   y₊ = η₊η (a − bp) + (η₊/η) y + 2 (η₊/η − 1)    (5)

    rule(t, lam) -> η > 0, the rate of step t, from the sharpness at that step; a given sequence of rates is
    lambda t, lam: rates[t], with steps + 1 of them. With a constant rate it is (4).
    Slips in the paper: (18) should read x₊ + x, and the y equation without a number in A.2 is wrong; (5) is right.

    >>> halved = moving_rate(lambda t, lam: 0.5**t, p=0.0, lam=2.0, a=1.0, b=0.0, steps=2)
    >>> halved.sharpness.tolist(), halved.y.tolist()
    ([2.0, 3.0, 3.5], [0.0, -0.5, -1.125])
    """
    p, lam, a, b = floats(p, lam, a, b)
    rate = lambda t, lam: jnp.asarray(rule(t, lam), lam.dtype)

    def step(t, state):
        eta, y, p = state
        p_new = (1 + y) ** 2 * p  # (5)
        drift = a - b * (p_new if semi_implicit else p)
        eta_new = rate(t + 1, (y + 2) / eta + eta * drift)
        y = eta_new * eta * drift + eta_new / eta * y + 2 * (eta_new / eta - 1)  # (5)
        return eta_new, y, p_new

    eta = rate(0, lam)
    eta, y, p = rollout(step, (eta, eta * lam - 2, p), steps)
    return Path(eta, (y + 2) / eta, y, p, jnp.zeros_like(p))


def below_edge(eps=0.05, p=0.09, lam=1.9, a=1.0, b=0.5, steps=100):
    """Classical tuners, idealised: the rate held a little below the edge (6), a `Path`. Defaults: Figure 4, right.

        η = 2 (1 − ε)/λ    (6)

    So y is fixed, at −2ε (the paper writes −ε; its figure has y = −0.1). For 0 < ε < 1 p dies out and no feedback is
    left: λ₊ = λ + aη, so λ grows like 2 √((1 − ε) a t) without bound, and the rate falls like 1/λ.
    Slip: the figure's caption says "1.9 λ_max" where it means 1.9/λ_max. The start p is ours; η₀ = 1 gives λ = 1.9.

    >>> path = below_edge(steps=1000)
    >>> [round(float(last[-1]), 2) for last in (path.y, path.sharpness, path.learning_rate)]
    [-0.1, 61.72, 0.03]
    """
    return moving_rate(lambda t, lam: 2 * (1 - eps) / lam, p, lam, a, b, steps)  # (6)


def energies(scaling, lam, lr, p, q, a, b, nu, kappa, steps, lagged, growth=jnp.inf):
    """(9) and (10) with σ from scaling(f, memory) -> (σ, memory); f is the model's loss, the first memory (f₀, 2).

    nu and q: numbers, or arrays of as many second eigenvalues as there are to be
    kappa: κ, of a fourth-order term κx⁴/24 in the loss, which the paper's model does not have
    growth: the most by which the rate grows in a step

    With κ the slope along v is (λ + κp/6) x and the curvature λ + κp/2, so a swing sees less of κ than CDAT does.

    >>> same = lambda f, memory: (1.0, memory)
    >>> energies(same, 4.0, 0.5, 1.0, 0.0, 0.0, 0.0, 0.1, 0.0, 1, True).learning_rate.tolist()
    [0.5, 0.25]
    """
    lam, lr, p, q, a, b, nu, kappa = floats(lam, lr, p, q, a, b, nu, kappa)
    loss = lambda lam, p, q: (lam * p + kappa * p**2 / 12 + jnp.sum(nu * q)) / 2

    def step(t, state):
        eta, lam, p, q, memory = state
        slope = lam + kappa * p / 6  # over x
        new = lam + eta * (a - b * p), (1 - eta * slope) ** 2 * p, (1 - eta * nu) ** 2 * q  # λ₊, p₊, q₊ (10)
        lam, p, q = (lam, p, q) if lagged else new
        sigma, memory = scaling(loss(lam, p, q), memory)
        slope, bend = lam + kappa * p / 6, lam + kappa * p / 2
        n, d = slope**2 * p + jnp.sum(nu**2 * q), jnp.abs(bend * slope**2 * p + jnp.sum(nu**3 * q))  # |·| as in (8)
        eta = jnp.minimum(sigma * n / d, growth * eta)  # (9)
        eta = jnp.where(d > 0, eta, 0).astype(lam.dtype)  # no step where both energies underflowed
        return eta, *new, memory

    first = loss(lam, p, q), jnp.full_like(lam, 2)
    eta, lam, p, q, _ = rollout(step, (lr, lam, p, q, first), steps)
    return Path(eta, lam, eta * lam - 2, p, q)


def cdat_model(sigma=2.0, lam=18.0, lr=0.05, p=4.0, q=4.0, a=0.05, b=0.1, nu=0.1, kappa=0.0, steps=4000,
               lagged=True):  # fmt: skip
    """CDAT in the model, a `Path`. The defaults are Figure 9's, where σ is 2 and 1.9; lr is the rate of step 0.

        η₊ = σ (λ²p + ν²q)/(λ³p + ν³q)    (9)
        p₊ = (1 + y)² p,   q₊ = (1 − ην)² q,   λ₊ = λ + η (a − bp)    (10)

    σ = 2 holds y just above 0, where p lives on and pushes back. That slows the sharpening and does not end it: λ is
    19.8 at step 400 and 27.9 at step 4000. With σ = 1.9 p dies out, and λ is 33.5 at step 4000.
    Most of it is a lag: (9) gives the new rate from the old λ, p, q, so while λ grows ηλ comes out above 2. A tuner in
    a real run sees the new ones. Deviation: lagged=False is that. Then only q keeps y above 0, q dies out, p stays
    where it is by then, and λ reaches 32.0 at step 4000, not far from σ = 1.9.
    Each σ > 2 that was tried leaves the model: p grows until it drives λ below 0, for 2.0625 at step 160 (67 without
    the lag). That real runs do well there is not in it.

    >>> [round(float(cdat_model(sigma).sharpness[4000]), 1) for sigma in (2.0, 1.9)]
    [27.9, 33.5]
    """
    return energies(lambda f, memory: (sigma, memory), lam, lr, p, q, a, b, nu, kappa, steps, lagged)


def feedback_model(rise=0.02, tolerance=0.1, growth=1.5, sigma_low=1.5, sigma_high=3.0, average=0.95, lam=18.0, lr=0.05,
                   p=4.0, q=4.0, a=0.05, b=0.1, nu=0.1, steps=4000, lagged=False):  # fmt: skip
    """The model of `cdat_model` with this project's own rule, `tuners.feedback`, under gradient descent, a `Path`.

        m ← ρm + (1 − ρ) f,   η = min(s n/d, c η_last)
        where f > (1 + τ) m:  σ ← (σ + σ_low)/2, s = 1;   else:  σ ← min(σ + a, σ_high), s = σ

    The rule looks at the loss of the very step whose rate it chooses, hence no lag; m, which f₀ starts, holds it.
    Here λ grows faster than under σ = 2, to 20.8 at step 400: a greedy step leaves next to no p, so nothing pushes λ
    back. Real runs of the rule lower it; a real loss has more eigenvalues than two.

    >>> [round(float(y), 2) for y in feedback_model(steps=8).y]  # p grows by a quarter a step and more, till it is cut
    [-1.1, -0.65, 0.02, 0.11, 0.12, 0.13, 0.14, 0.16, 0.17]
    """

    def scaling(f, memory):
        m, sigma = memory
        m = average * m + (1 - average) * f
        rose = f > (1 + tolerance) * m
        sigma = jnp.where(rose, (sigma + sigma_low) / 2, jnp.minimum(sigma + rise, sigma_high))
        return jnp.where(rose, 1, sigma), (m.astype(f.dtype), sigma.astype(f.dtype))

    return energies(scaling, lam, lr, p, q, a, b, nu, 0.0, steps, lagged, growth)


def derivatives(f, w, v, order=4):
    """f and its derivatives along v, of t ↦ f(w + tv) at t = 0: an array (f, ∇f·v, vᵀHv, τ, κ) for order 4.

    Jvps within jvps: forward passes alone, 2^order of them before the compiler finds those that are equal. On a network
    with relu they are those of the piece that w lies in.

    >>> f = lambda w: 2 * w**2 + 5 * w**3 / 6 - 7 * w**4 / 24  # λ = 4, τ = 5, κ = −7
    >>> derivatives(f, jnp.array(0.0), jnp.array(1.0)).tolist()
    [0.0, 0.0, 4.0, 5.0, -7.0]
    """
    along = lambda t: f(jax.tree.map(lambda w, v: w + t * v, w, v))
    zero = jnp.zeros((), jnp.result_type(*jax.tree.leaves(w)))
    found = [along]
    for _ in range(order):
        found.append(slope(found[-1]))
    return jnp.stack([function(zero) for function in found])


def slope(function):
    """The derivative of a function of a number."""
    return lambda t: jax.jvp(function, (t,), (jnp.ones_like(t),))[1]


class Measured(NamedTuple):
    """Scalars of a real loss at w, with v its top eigenvector."""

    sharpness: Any  # λ = vᵀHv
    x: Any  # v·∇f/λ, the displacement along v from where the loss is least on that line; its sign is that of v
    a: Any  # −∇λ·∇f at w
    a_rest: Any  # −∇λ·∇f at w − xv, to second order in x: what the model calls a
    b: Any  # ‖∇λ‖²


def dot(a, b):
    """Inner product of two pytrees of one structure, a scalar.

    >>> float(dot([jnp.ones(2)], [jnp.array([1.0, 2.0])]))
    3.0
    """
    return sum(jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def measure(f, w, v):
    """What the model's numbers are in a real run at w, for the top eigenvector v (a pytree like w, ‖v‖ = 1).

        ∇λ = ∇(vᵀH(w)v) with v fixed = ∂²/∂t² ∇f(w + tv) at t = 0

    The first is how an eigenvalue moves, the second the same third derivatives with the gradient taken first. Two jvps
    of the gradient then give ∇f, Hv and ∇λ at once, in the time of about five gradients and the memory of a dozen.

    The model predicts λ₊ = λ + η (a_rest − ½ b x²) for gradient descent with rate η. Do not put a in place of
    a_rest: ∇f at w has the swing λxv and the feedback in it, and v turns with x, so a mostly follows x². For η near
    2/λ x only changes its sign, and that part of a is undone within the step.

    >>> f = lambda w: (4 + w[1]) * w[0] ** 2 / 2 - 3 * w[1]  # the model itself: Λ = 4, c = 1, s = 3
    >>> [float(number) for number in measure(f, jnp.array([2.0, 0.0]), jnp.array([1.0, 0.0]))]
    [4.0, 2.0, 1.0, 3.0, 1.0]
    """
    products = lambda w: jax.jvp(jax.grad(f), (w,), (v,))
    (g, hv), (_, grad_lam) = jax.jvp(products, (w,), (v,))
    lam = dot(v, hv)
    x = dot(v, g) / lam
    a, b = -dot(grad_lam, g), dot(grad_lam, grad_lam)
    a_rest = a + x * dot(grad_lam, hv) - x**2 * b / 2  # ∇f(w − xv) = g − xHv + ½x²∇λ + O(x³)
    return Measured(lam, x, a, a_rest, b)

"""Sharpness: the largest eigenvalue of the Hessian, without the Hessian.

What this file teaches: gradient descent with rate η can sit still along an eigenvector of the Hessian only while
ηλ < 2, so the largest eigenvalue λ, the sharpness, says how large a step the loss allows. The Hessian of a network
with n parameters has n² entries; its product with a vector costs two gradients, and power iteration needs no more.
First the textbook's power iteration, then the faster one that train.py uses.

Symbols: w parameters (any pytree), f(w) the loss, H = ∇²f(w), v a vector like w, λ the sharpness.
Copying: this file needs JAX and numpy alone; power_iteration and lobpcg work for any symmetric matvec.
Paper: Roulet et al. 2024, arXiv:2407.06183, Section 2 and Appendix B. Read next: train.py, where it is measured.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


class Eigenpair(NamedTuple):
    """What an iteration found."""

    value: float  # λ = vᵀHv
    vector: Any  # v with ‖v‖ = 1, a pytree like the start
    iterations: int  # products Hv taken
    residual: float  # ‖Hv − λv‖; some eigenvalue lies within it of λ
    converged: bool  # whether that came down to tol |λ|


def hvp(f, w, v):
    """Hv, the Hessian of f at w times v (a pytree like w): a jvp of the gradient, forward over reverse.

    Costs about two gradients in time, and their memory.

    >>> f = lambda w: w[0] ** 2 + w[0] * w[1]
    >>> hvp(f, jnp.array([1.0, 1.0]), jnp.array([1.0, 2.0])).tolist()
    [4.0, 1.0]
    """
    return jax.jvp(jax.grad(f), (w,), (v,))[1]


# On flat vectors, and in full precision: a reduced one (TF32) would move λ by more than the tolerance.
matmul = functools.partial(jnp.matmul, precision="highest")


def norm(v):
    """‖v‖ of one array, also where squares would leave the range of its dtype."""
    largest = jnp.max(jnp.abs(v))
    return largest * jnp.linalg.norm(v / jnp.where(largest > 0, largest, 1))


def unit(v):
    """v/‖v‖, for one array."""
    return v / norm(v)


def power_iteration(matvec, v, tol=1e-3, max_iters=1000):
    """The textbook's way to the eigenvalue of largest magnitude: v ← Hv/‖Hv‖, until ‖Hv − λv‖ ≤ tol |λ|, λ = vᵀHv.

    matvec(v) -> Hv on pytrees like v, H symmetric (jit it); v the start (not zero). Returns an `Eigenpair`, which says
    whether it converged. Along the eigenvector of an eigenvalue μ each product leaves |μ/λ| of what was there, so it
    crawls where two are close; and where the largest in magnitude is negative it finds that one. A host loop that looks
    at each product: not for inside jit.

    >>> top = power_iteration(lambda v: jnp.array([4.0, 1.0, -2.0]) * v, jnp.ones(3))
    >>> round(top.value, 3), top.iterations
    (4.0, 12)
    """
    v, unravel = ravel_pytree(v)
    for iterations in range(1, max_iters + 1):
        v = unit(v)
        hv = ravel_pytree(matvec(unravel(v)))[0]
        value = matmul(v, hv)  # the Rayleigh quotient vᵀHv, the λ for which ‖Hv − λv‖ is least
        residual = norm(hv - value * v)
        if not residual > tol * abs(value) or iterations == max_iters:  # "not >" also ends at nan
            break
        v = hv
    return Eigenpair(float(value), unravel(v), iterations, float(residual), bool(residual <= tol * abs(value)))


# ------------------------------------------------------------------------------------------------ the faster one


@jax.jit
def noisy(v):
    """v with nearly as much noise, to unit length: the same noise at every call.

    A warm start may be an eigenvector that is no longer the top one. There Hv − λv = 0 shows no way up; noise does.
    This much, since in n dimensions only 1/√n of it points along the one direction that is sought. It costs next to
    nothing: the iteration sheds noise in the first few products. Nearly, so that the two cannot cancel. Entries that
    are not finite, as an earlier search may leave them, become 1.
    """
    v = jnp.where(jnp.isfinite(v), v, 1)
    return unit(unit(v) + 0.9 * unit(jax.random.normal(jax.random.key(0), v.shape, v.dtype)))


@jax.jit
def residual_of(basis, products):
    """λ = vᵀHv, ‖Hv − λv‖, and where Hv turns v (row 0 of the basis): a direction, and its part outside the basis.

    That part has length one, but for rounding; it is short where the residual is nothing but rounding.
    """
    v, hv = basis[0], products[0]
    value = matmul(v, hv)
    off = unit(hv - value * v)
    off = off - matmul(matmul(basis, off), basis)
    return value, norm(hv - value * v), norm(off), unit(off)


def best_rows(h):
    """In coordinates where H is the small matrix h: its top eigenvector, and the move to it from the first axis.

    Two orthonormal rows: the eigenvector, and the part of the move that is orthogonal to it (left out if zero).
    """
    if not np.isfinite(h).all():
        return np.full((1, len(h)), np.nan)
    top = np.linalg.eigh((h + h.T) / 2)[1][:, -1]
    top = top if top[0] >= 0 else -top
    move = top[0] * top
    move[0] -= 1  # (top·e₁) top − e₁, orthogonal to top
    length = np.linalg.norm(move)
    return np.stack([top, move / length]) if length > 0 else top[None]


def lobpcg(matvec, v, tol=1e-3, max_iters=1000):
    """The largest *algebraic* eigenvalue of a symmetric matrix H, with less products: LOBPCG with one vector.

    As `power_iteration`, but for what it finds, and that it also stops where rounding lets it go no further. One
    product an iteration, one more where rounding ends it, and memory for six vectors. Twenty measurements along the
    default run took 341 products to the same residual, power iteration 1894.

    Why: v ← Hv/‖Hv‖ throws away all it has seen but the last product. Here each iteration takes, of all combinations
    of v, Hv and the last move of v, the unit vector for which vᵀHv is largest. That is an eigenproblem of 3 × 3: H in
    a basis of these three, whose entries come from products that are there already; its top eigenvector holds the
    weights. It is power iteration on H + sI with momentum, both chosen best each time (Knyazev 2001), so λ only rises,
    whatever the other end of the spectrum. Its start is made `noisy`, which says why.

    In a training loop jit the product once, with w and the batch as arguments, and start each measurement from the last
    vector:

    >>> f = lambda w, batch: batch * (w[0] ** 2 - 3 * w[1] ** 2)  # H = diag(2, -6) for a batch of 1
    >>> product = jax.jit(lambda w, v, batch: hvp(lambda w: f(w, batch), w, v))
    >>> w = v = jnp.ones(2)
    >>> top = lobpcg(lambda v: product(w, v, 1.0), v)
    >>> v = top.vector
    >>> round(top.value, 3)
    2.0
    """
    v, unravel = ravel_pytree(v)
    product = lambda v: ravel_pytree(matvec(unravel(v)))[0]
    v = noisy(v)
    basis, products = v[None], product(v)[None]  # rows v, last move; rows Hv, H(last move)
    for iterations in range(1, max_iters + 1):
        value, residual, outside, off = residual_of(basis, products)
        if not residual > tol * abs(value) or outside < 0.5 or iterations == max_iters:
            break
        basis, products = jnp.vstack([basis, off]), jnp.vstack([products, product(off)])
        small = np.asarray(matmul(basis, products.T), np.float64)  # H in that basis, 3 × 3
        rows = best_rows(small).astype(v.dtype)  # v and its move, in that basis
        basis, products = matmul(rows, basis), matmul(rows, products)  # H is linear: no new product
    if residual > tol * abs(value) and iterations < max_iters:  # rounding has grown in what was combined: v anew
        basis = basis[:1] / jnp.linalg.norm(basis[0])
        value, residual, *_ = residual_of(basis, product(basis[0])[None])
    converged = bool(residual <= tol * abs(value))
    return Eigenpair(float(value), unravel(basis[0]), iterations, float(residual), converged)


def sharpness(f, w, v, tol=1e-3, max_iters=1000):
    """The sharpness of f at w by `lobpcg` on `hvp`, from v (a pytree like w; not zero): an `Eigenpair`.

    Compiles the product anew for each call: in a training loop do as in the example of `lobpcg`.

    >>> w = jnp.ones(2)
    >>> round(sharpness(lambda w: w[0] ** 2 - 3 * w[1] ** 2, w, w).value, 3)
    2.0
    """
    return lobpcg(jax.jit(lambda v: hvp(f, w, v)), v, tol, max_iters)


def alignment(u, v, scale=None):
    """|cos∠(u, v)|, a scalar: how much of a direction u (a pytree) lies along v, a top eigenvector (‖v‖ = 1).

    Where several eigenvalues are close to the top one v is any of their eigenvectors: u may lie among them all and
    hardly along v. scale is P^(-1/2), a pytree like u, where v is of the preconditioned Hessian P^(-1/2) H P^(-1/2): it
    then lives in the coordinates P^(1/2) w, so u is taken there.

    >>> round(float(alignment(jnp.array([3.0, 4.0]), jnp.array([0.0, 1.0]))), 2)
    0.8
    """
    u = u if scale is None else jax.tree.map(jnp.divide, u, scale)
    u, v = ravel_pytree(u)[0], ravel_pytree(v)[0]
    return jnp.abs(matmul(unit(u), v))

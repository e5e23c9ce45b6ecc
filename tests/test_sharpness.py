"""Facts about the sharpness: eigenvalues as numpy finds them in the dense matrix, and an honest end."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import DIRECTIONS, FULL, START, derivatives, loss, train, train_by_hand
from jax import jit
from jax.flatten_util import ravel_pytree

import gd
import sharpness
import tuners
from sharpness import lobpcg, power_iteration

both = pytest.mark.parametrize("method", [power_iteration, lobpcg])
both_dtypes = pytest.mark.parametrize("dtype", ["float64", "float32"])


def top_of(matrix, start=None, dtype="float64", method=lobpcg, **stop):
    """A shipped estimate for a matrix given in numpy, from a start that favours no axis."""
    with jax.enable_x64(dtype == "float64"):
        matrix = jnp.asarray(matrix, dtype)
        start = jnp.ones(len(matrix), dtype) if start is None else jnp.asarray(start, dtype)
        return method(lambda v: matrix @ v, start, **stop)


def true_residual(matrix, top):
    return np.linalg.norm(matrix @ np.asarray(top.vector, float) - top.value * np.asarray(top.vector, float))


def with_spectrum(values):
    """A dense symmetric matrix of those eigenvalues."""
    q = np.linalg.qr(np.random.default_rng(3).normal(size=(len(values), len(values))))[0]
    return q @ np.diag(values) @ q.T


@both
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_products_whose_squares_leave_float32_have_the_right_eigenvalue_and_residual(method, scale):
    values = np.array([4.0, 1.0, -2.0, 0.5])
    top = top_of(scale * np.diag(values), dtype="float32", method=method, tol=1e-3)
    assert top.converged and top.value == pytest.approx(4 * scale, rel=1e-5)
    assert top.residual == pytest.approx(true_residual(scale * np.diag(values), top), rel=1e-2)


@cache
def trained_mlp():
    """(f, w, dense Hessian, unravel) of a 4-6-3 network (51 parameters) after 60 steps of gradient descent."""
    rng = np.random.default_rng(4)
    with jax.enable_x64(True):
        w = {"in": rng.normal(size=(4, 6)) / 2, "bias": jnp.zeros(6)}
        w |= {"out": rng.normal(size=(6, 3)) / 2, "end": jnp.zeros(3)}
        w, x, y = jax.tree.map(jnp.asarray, w), rng.normal(size=(20, 4)), rng.normal(size=(20, 3))

        def f(w, batch=None):
            return jnp.mean(jnp.sum((jnp.tanh(x @ w["in"] + w["bias"]) @ w["out"] + w["end"] - y) ** 2, 1)) / 2

        tuner = tuners.constant(0.2)
        carry, step = gd.init_carry(w, gd.gd(), tuner), jit(gd.make_step(f, gd.gd(), tuner))
        for _ in range(60):
            carry, metrics = step(carry, None)
        assert metrics["loss"] < f(w) / 2
        flat, unravel = ravel_pytree(carry.w)
        return f, carry.w, np.asarray(jit(jax.hessian(lambda v: f(unravel(v))))(flat)), unravel


# --- The value.


def test_a_hessian_product_is_that_of_the_dense_hessian():
    f, w, h, unravel = trained_mlp()
    v = np.random.default_rng(5).normal(size=len(h))
    with jax.enable_x64(True):
        product = jit(lambda v: sharpness.hvp(f, w, v))(unravel(jnp.asarray(v)))
        assert jax.tree.map(jnp.shape, product) == jax.tree.map(jnp.shape, w)
        np.testing.assert_allclose(ravel_pytree(product)[0], h @ v, rtol=1e-10, atol=1e-12)


@both_dtypes
def test_sharpness_of_a_trained_network_is_that_of_its_dense_hessian(dtype):
    f, w, h, _ = trained_mlp()
    with jax.enable_x64(dtype == "float64"):
        w = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), w)
        top = sharpness.sharpness(f, w, jax.tree.map(jnp.ones_like, w))
        vector = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(top.vector)]).astype(float)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), top.vector) == jax.tree.map(lambda a: (a.shape, a.dtype), w)
    values, vectors = np.linalg.eigh(h)
    assert top.value == pytest.approx(values[-1], rel=1e-3) and top.converged
    assert np.linalg.norm(vector) == pytest.approx(1, rel=1e-5)
    assert abs(vector @ vectors[:, -1]) > 1 - 1e-4


@both_dtypes
@pytest.mark.parametrize(
    "values",
    [
        [-9, 4, 1, -2],  # a larger negative one
        [-3.99, 4, 1, -2],  # one nearly as large
        [-4, 4, 1, -2],  # one just as large
        [4, 4, 1, 0],  # the top one twice
        [4, 3.9, 3.8, 3.7],
        [-1, -2, -3, -4],
        [0, -1, -2, -9],
        [3, 3, 3, 3],
        [0, 0, 0, 0],
    ],
)
def test_lobpcg_finds_the_largest_algebraic_eigenvalue(values, dtype):
    for matrix in np.diag(np.float64(values)), with_spectrum(values):
        top = top_of(matrix, dtype=dtype, max_iters=50)
        expected = np.linalg.eigvalsh(matrix)[-1]
        assert top.value == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert np.linalg.norm(top.vector) == pytest.approx(1, rel=1e-5)
        assert true_residual(matrix, top) == pytest.approx(top.residual, abs=1e-5)


@both_dtypes
@pytest.mark.parametrize("values", [[-9, 4, 1, -2], [9, -4, 1, 2], [4, 4, 1, 0], [-1, -2, -3, -4], [3, 3, 3, 3]])
def test_power_iteration_finds_the_eigenvalue_of_largest_magnitude(values, dtype):
    for matrix in np.diag(np.float64(values)), with_spectrum(values):
        top = top_of(matrix, dtype=dtype, method=power_iteration)
        assert top.value == pytest.approx(max(values, key=abs), rel=1e-3) and top.converged
        assert np.linalg.norm(top.vector) == pytest.approx(1, rel=1e-5)
        assert true_residual(matrix, top) == pytest.approx(top.residual, abs=1e-5)


def test_the_sharpness_is_algebraic_too():
    w = jnp.ones(4)
    assert sharpness.sharpness(lambda w: w[0] ** 2 - 3 * w[1] ** 2, w, w).value == pytest.approx(2, rel=1e-3)


def test_a_warm_start_on_an_eigenvector_that_is_no_longer_the_top_one_leaves_it():
    assert top_of(np.diag([1.0, 4, 0, 0]), start=[1.0, 0, 0, 0]).value == pytest.approx(4, rel=1e-3)
    assert top_of(np.diag([-9.0, 4, 1, -2]), start=[0.0, 0, 7, 0]).value == pytest.approx(4, rel=1e-3)


@both
@pytest.mark.parametrize("value", [3.0, -3.0, 0.0])
def test_a_single_parameter_has_its_second_derivative_for_sharpness(value, method):
    top = top_of([[value]], method=method)
    assert (*top[:1], abs(float(top.vector[0])), *top[2:]) == (value, 1, 1, 0, True)


@both
def test_vectors_are_pytrees_like_the_start(method):
    spectrum = {"a": np.float32([[3], [14]]), "b": np.float32([2, -7])}
    top = method(lambda v: jax.tree.map(jnp.multiply, spectrum, v), jax.tree.map(np.ones_like, spectrum))
    assert top.value == pytest.approx(14, rel=1e-3)
    assert set(top.vector) == {"a", "b"} and abs(top.vector["a"][1, 0]) == pytest.approx(1, abs=1e-3)


@jit
def preconditioned(w, scale, v):
    scaled = lambda v: jax.tree.map(jnp.multiply, scale, v)
    return scaled(sharpness.hvp(lambda w: loss(w, FULL[0]), w, scaled(v)))


@pytest.mark.parametrize("numbers", [{}, {"beta2": 0.9, "eps": 0.01}], ids=["default", "other"])
@pytest.mark.parametrize("name", ["rmsprop", "adam"])
def test_preconditioned_sharpness_is_that_of_the_dense_matrix(name, numbers):
    batches = [FULL[0]] * 30
    last = train_by_hand(batches, lambda gs: DIRECTIONS[name](gs, **numbers), lambda past: 0.02)[-1]
    root = np.sqrt(last.p)
    dense = derivatives(last.after, FULL[0])[2] / np.outer(root, root)
    with jax.enable_x64(True):
        carry = train(batches, name, "constant", numbers, {"lr": 0.02})[-1].carry
        scale = gd.OPTIMIZERS[name](**numbers).scale(carry.optimizer)
        top = lobpcg(lambda v: preconditioned(carry.w, scale, v), carry.w)
    assert top.value == pytest.approx(np.linalg.eigvalsh(dense)[-1], rel=1e-3)
    assert gd.gd().scale(()) is gd.momentum().scale(START) is None


def test_alignment_is_the_same_for_u_and_its_opposite_and_sees_the_preconditioner():
    u, scale, v = np.random.default_rng(0).normal(size=(3, 5))
    v /= np.linalg.norm(v)
    tree = lambda a: {"a": jnp.asarray(a[:2]), "b": jnp.asarray(a[2:]).reshape(3, 1)}
    with jax.enable_x64(True):
        for given, p in ((), np.ones(5)), ((tree(scale),), scale):
            for sign in 1, -1:
                cos = abs(u / p @ v) / np.linalg.norm(u / p)
                assert float(sharpness.alignment(tree(sign * u), tree(v), *given)) == pytest.approx(cos, rel=1e-12)


# --- The end.


@both
@pytest.mark.parametrize("tol", [0.1, 1e-3, 1e-6])
def test_it_stops_at_a_small_residual_and_not_at_a_value_that_stands_still(tol, method):
    h = trained_mlp()[2]
    low_start = np.linalg.eigh(h)[1][:, -2]  # near an eigenvector the value hardly moves at first
    for start in None, low_start:
        top = top_of(h, start, tol=tol, method=method)
        assert top.converged and top.residual <= tol * abs(top.value) and top.iterations < 200
        assert true_residual(h, top) == pytest.approx(top.residual, rel=1e-6, abs=1e-12)
        assert np.abs(np.linalg.eigvalsh(h) - top.value).min() <= top.residual + 1e-12  # their rounding


@both
@pytest.mark.parametrize("max_iters", [1, 2, 3, 5, 8])
def test_what_has_not_converged_is_no_larger_than_the_largest_and_says_how_far_it_is(max_iters, method):
    products = []
    matrix = with_spectrum(np.linspace(-3, 1, 51))
    with jax.enable_x64(True):
        top = method(lambda v: products.append(0) or matrix @ v, jnp.ones(51), max_iters=max_iters)
    assert top.value <= 1 and top.residual > 1e-3 * abs(top.value) and not top.converged
    assert top.iterations == max_iters == len(products)
    assert true_residual(matrix, top) == pytest.approx(top.residual, rel=1e-9)
    vector = np.asarray(top.vector)
    assert top.value == pytest.approx(vector @ matrix @ vector, rel=1e-9)


def test_more_products_never_lower_the_value():
    matrix = with_spectrum(np.linspace(-3, 1, 51))
    values = [top_of(matrix, max_iters=n).value for n in range(1, 12)]
    assert np.all(np.diff(values) > 0)


@both_dtypes
def test_a_tolerance_below_rounding_ends_at_rounding(dtype):
    for values in [1.0, 2.0, 3.0, 4.0], [1e-7, -1, -2, -9], [4.0, 4.0, 4.0, 1.0]:
        matrix = with_spectrum(values)
        top = top_of(matrix, dtype=dtype, tol=0, max_iters=100)
        rounding = 100 * float(np.finfo(dtype).eps)
        assert abs(top.value - max(values)) < rounding * np.abs(values).max()
        assert np.linalg.norm(top.vector) == pytest.approx(1, abs=rounding)


def test_where_rounding_ends_it_above_the_tolerance_it_does_not_say_that_it_converged():
    matrix = with_spectrum([1e-7, -1, -2, -9])
    for dtype, enough in ("float32", False), ("float64", True):
        top = top_of(matrix, dtype=dtype, max_iters=100)
        assert top.converged == (top.residual <= 1e-3 * abs(top.value)) == enough
        assert top.iterations < 100


@both
@pytest.mark.parametrize("good", [0, 1, 2, 3])
def test_products_that_are_not_numbers_end_it_with_nan(good, method):
    products = []

    def matvec(v):
        products.append(0)
        return jnp.arange(1.0, 5.0) * v * (1.0 if len(products) <= good else jnp.nan)

    top = method(matvec, jnp.ones(4), tol=1e-6)
    assert np.isnan(top.value) and np.isnan(top.residual) and len(products) <= good + 1 and not top.converged


@pytest.mark.parametrize("start", [4 * [np.nan], [1, np.inf, 1, -np.inf]])
def test_entries_of_a_start_that_are_not_finite_as_a_search_may_leave_them_become_1(start):
    product = lambda v: jnp.arange(1.0, 5.0) * v
    top, from_ones = sharpness.lobpcg(product, jnp.array(start)), sharpness.lobpcg(product, jnp.ones(4))
    assert top.value == from_ones.value == pytest.approx(4, rel=1e-3) and top.converged


@both
def test_the_same_start_gives_the_same_bits(method):
    matrix = with_spectrum([1.0, 2.0, 3.0, 4.0])
    once, again = top_of(matrix, method=method), top_of(matrix, method=method)
    assert once[0] == again[0] and once[2:] == again[2:] and np.array_equal(once.vector, again.vector)

"""Facts about the simplified model: its maps as plain loops have them, its fixed points, and the loss behind it."""

import doctest
import shutil
import subprocess
import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theory


def in_float64(model, *args, **settings):
    """A path of the shipped model as a Path of float64 numpy arrays."""
    with jax.enable_x64(True):
        path = jax.jit(lambda: model(*args, **settings))()
        assert all(array.dtype == "float64" for array in path)
        return theory.Path(*map(np.asarray, path))


def close(path, **columns):
    for name, expected in columns.items():
        np.testing.assert_allclose(getattr(path, name), expected, rtol=1e-8, atol=1e-12, err_msg=name)


def valley_by_hand(rate, x, lam, a, b, steps, new_x=False):
    """(4) with the rate from a function of (t, λ), in plain Python: rows of (η, λ, x²)."""
    rows = []
    for t in range(steps + 1):
        eta = rate(t, lam)
        rows.append((eta, lam, x * x))
        moved = x - eta * lam * x
        lam += eta * a - eta * b * (moved if new_x else x) ** 2
        x = moved
    return np.array(rows).T


def cdat_by_hand(scaling, steps, lagged):
    """(9) and (10) at Figure 9's numbers, from gradients and Hessians: rows of (η, λ, p, q)."""
    a, b, nu, eta, lam, w = 0.05, 0.1, 0.1, 0.05, 18.0, np.array([2.0, 2.0])
    losses, rows = [w @ np.diag([lam, nu]) @ w / 2], []
    for _ in range(steps + 1):
        rows.append((eta, lam, *w**2))
        old, h = w, np.diag([lam, nu])
        w, lam = w - eta * h @ w, lam + eta * (a - b * w[0] ** 2)
        if lagged:
            seen, h = old, h
        else:
            seen, h = w, np.diag([lam, nu])
        g = h @ seen
        losses.append(seen @ h @ seen / 2)
        eta = scaling(losses) * (g @ g) / (g @ h @ g)
    return np.array(rows).T


def by_moving_average(losses, high=2.5, tau=0.05, beta=0.9):
    """The feedback rule from the whole history of losses, the average written as a sum."""
    past = np.array(losses[1:])
    weights = (1 - beta) * beta ** np.arange(len(past))[::-1]
    mean = weights @ past + beta ** len(past) * losses[0]
    return 1.0 if past[-1] > (1 + tau) * mean else high


# --- Constant rate (4).


@pytest.mark.parametrize("semi_implicit", [False, True])
def test_the_constant_rate_model_is_equation_4(semi_implicit):
    path = in_float64(theory.constant_rate, 0.9, -0.2, 2.1, 0.04, 0.2, 60, semi_implicit)
    eta, lam, p = valley_by_hand(lambda t, lam: 0.9, -0.2, 2.1, 0.04, 0.2, 60, semi_implicit)
    close(path, learning_rate=eta, sharpness=lam, p=p, y=eta * lam - 2, q=0)


@pytest.mark.parametrize("semi_implicit", [False, True])
def test_the_fixed_point_is_at_the_edge_with_x_squared_a_over_b(semi_implicit):
    path = in_float64(theory.constant_rate, 0.5, np.sqrt(0.1), 4.0, steps=20, semi_implicit=semi_implicit)
    close(path, sharpness=4, y=0, p=0.1)


@pytest.mark.parametrize("lr, modulus", [(1.0, 1.03), (2.0, 1.11)])
@pytest.mark.parametrize("semi_implicit", [False, True])
def test_around_the_fixed_point_the_printed_map_grows_and_the_semi_implicit_one_turns(semi_implicit, lr, modulus):
    a, b = 0.03, 0.3
    jacobian = np.array([[1, 2 * lr * a / b], [-lr * b, 1]])  # of (p, λ) -> (p₊, λ₊), by hand, at p = a/b, λ = 2/η
    if semi_implicit:
        jacobian[1] -= lr * b * (jacobian[0] - [1, 0])
    sizes = np.abs(np.linalg.eigvals(jacobian))
    np.testing.assert_allclose(sizes, 1 if semi_implicit else np.sqrt(1 + 2 * a * lr**2), rtol=1e-12)
    assert semi_implicit or sizes == pytest.approx(modulus, abs=0.005)

    def one_step(p, lam):
        path = theory.constant_rate(lr, jnp.sqrt(p), lam, a, b, 1, semi_implicit)
        return path.p[1], path.sharpness[1]

    with jax.enable_x64(True):
        shipped = jax.jacfwd(lambda state: jnp.stack(one_step(*state)))(jnp.array([a / b, 2 / lr]))
    np.testing.assert_allclose(shipped, jacobian, rtol=1e-9, atol=1e-12)


def test_figure_4_as_printed_stays_for_100_steps_and_then_blows_up():
    path = in_float64(theory.constant_rate, steps=120)
    assert 1.4 < path.sharpness[:101].min() and path.sharpness[:101].max() < 2.8
    assert np.abs(path.sharpness).max() > 1e3


def test_the_semi_implicit_form_oscillates_about_the_edge_and_stays_bounded():
    path = in_float64(theory.constant_rate, steps=20_000, semi_implicit=True)
    assert 1.85 < path.sharpness.min() and path.sharpness.max() < 2.15 and path.p.max() < 0.25
    for part in np.split(path.y[:20_000], 20):
        assert part.min() < -0.05 and part.max() > 0.05
        assert part.mean() == pytest.approx(0, abs=0.01)


def test_the_model_is_gradient_descent_on_a_loss_with_two_parameters():
    depth, c, s, lr = 1.9, 0.8, 0.04, 0.95
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(lambda w: (depth + c * w[1]) * w[0] ** 2 / 2 - s * w[1]))
        w, rows = jnp.array([0.3, 0.1]), []
        for _ in range(81):
            rows.append((depth + c * float(w[1]), float(w[0]) ** 2))
            w = w - lr * gradient(w)
    lam, p = np.array(rows).T
    assert lr * lam[:40].max() > 2.1 and lr * lam[40:].min() < 1.9
    path = in_float64(theory.constant_rate, lr, 0.3, lam[0], a=c * s, b=c**2 / 2, steps=80)  # ∇λ = (0, c): b is ½‖∇λ‖²
    close(path, sharpness=lam, p=p)


# --- Moving rates (5) and classical tuners (6).

WAVE = 1 + 0.1 * np.sin(np.arange(61))


@pytest.mark.parametrize("semi_implicit", [False, True])
@pytest.mark.parametrize("rate", [lambda t, lam: 1.0, lambda t, lam: WAVE[t], lambda t, lam: 1.98 / lam])
def test_equation_5_in_p_and_y_agrees_with_equation_4_in_x_and_lambda(rate, semi_implicit):
    rule = (lambda t, lam: jnp.asarray(WAVE)[t]) if rate(1, 1.0) == WAVE[1] else rate
    path = in_float64(theory.moving_rate, rule, 0.09, 1.9, 0.03, 0.3, 60, semi_implicit)
    eta, lam, p = valley_by_hand(rate, 0.3, 1.9, 0.03, 0.3, 60, semi_implicit)
    close(path, learning_rate=eta, sharpness=lam, p=p, y=eta * lam - 2, q=0)


def test_below_the_edge_y_is_minus_two_epsilon_and_figure_4_starts_at_rate_1():
    path = in_float64(theory.below_edge)
    close(path, y=-0.1, p=0.09 * 0.81 ** np.arange(101))
    assert path.learning_rate[0] == pytest.approx(1)
    eta, lam, p = valley_by_hand(lambda t, lam: 1.9 / lam, 0.3, 1.9, 1.0, 0.5, 100)
    close(path, learning_rate=eta, sharpness=lam, p=p)
    close(in_float64(theory.below_edge, 0.2), y=-0.4)


def test_below_the_edge_the_sharpness_grows_without_bound_and_takes_the_rate_along():
    path = in_float64(theory.below_edge, steps=20_000)
    t = np.array([1250, 5000, 20_000])
    np.testing.assert_allclose(path.sharpness[t], 2 * np.sqrt(0.95 * t), rtol=2e-3)
    np.testing.assert_allclose(path.learning_rate[t], 1.9 / path.sharpness[t])
    assert np.all(np.diff(path.sharpness) > 0)


def test_on_the_edge_itself_the_swing_lives_on_and_its_feedback_can_hold_the_sharpness():
    close(in_float64(theory.below_edge, 0.0, p=2.0), sharpness=1.9, p=2, y=0)  # p = a/b


# --- CDAT (9, 10).


@pytest.mark.parametrize("lagged", [True, False])
@pytest.mark.parametrize("sigma", [2.0, 1.9, 2.05])
def test_cdat_in_the_model_is_cdat_on_a_gradient_and_a_hessian(sigma, lagged):
    path = in_float64(theory.cdat_model, sigma, steps=60, lagged=lagged)
    eta, lam, p, q = cdat_by_hand(lambda losses: sigma, 60, lagged)
    close(path, learning_rate=eta, sharpness=lam, p=p, q=q, y=eta * lam - 2)


@pytest.mark.parametrize(
    "sigma, lagged, at_400, at_4000", [(2.0, True, 19.8, 27.9), (1.9, True, 20.1, 33.5), (2.0, False, 19.8, 32.0)]
)
def test_figure_9_slows_the_sharpening_and_does_not_end_it(sigma, lagged, at_400, at_4000):
    lam = in_float64(theory.cdat_model, sigma, lagged=lagged).sharpness
    assert lam[400] == pytest.approx(at_400, abs=0.05) and lam[4000] == pytest.approx(at_4000, abs=0.05)
    assert np.all(np.diff(lam[1:]) > -0.02) and lam[4000] > lam[3000]


@pytest.mark.parametrize("lagged, end", [(True, 160), (False, 67)])
def test_past_the_edge_the_swing_drives_the_sharpness_below_zero(lagged, end):
    path = in_float64(theory.cdat_model, 2.0625, steps=180, lagged=lagged)
    assert np.argmax(path.sharpness < 0) == pytest.approx(end, abs=2)
    assert path.y[1:60].min() > 0 and np.all(np.diff(path.p[1:60]) > 0)
    assert path.learning_rate.min() >= 0 and path.sharpness.min() < -1  # CDAT's |uᵀHu|: the rate keeps its sign


@pytest.mark.parametrize("lagged", [True, False])
def test_on_edge_holds_y_just_above_zero_and_1_9_below(lagged):
    on_edge, below = (in_float64(theory.cdat_model, sigma, lagged=lagged) for sigma in (2.0, 1.9))
    assert np.abs(on_edge.y[10:]).max() < 0.01 and on_edge.y[10:].min() > -1e-12 and on_edge.p[4000] > 0.05
    assert below.y[100:].max() < -0.005 and below.p[4000] < 1e-20


def test_the_lag_is_what_keeps_y_above_zero():
    lagged, current = (in_float64(theory.cdat_model, lagged=lagged) for lagged in (True, False))
    assert lagged.y[4000] > 5e-5 and abs(current.y[4000]) < 1e-12
    np.testing.assert_allclose(lagged.y[1001:], 2 * lagged.sharpness[1001:] / lagged.sharpness[1000:-1] - 2, rtol=1e-3)


@pytest.mark.parametrize("lagged", [True, False])
def test_the_feedback_rule_is_greedy_above_the_average_loss_and_past_the_edge_below(lagged):
    path = in_float64(theory.feedback_model, steps=40 if not lagged else 12, lagged=lagged)
    eta, lam, p, q = cdat_by_hand(by_moving_average, len(path.y) - 1, lagged)
    close(path, learning_rate=eta, sharpness=lam, p=p, q=q)
    assert path.y[2] > 0.4 and path.y[1:].min() < -0.9  # both values of σ occur


def test_the_feedback_rule_uses_its_numbers():
    path = in_float64(theory.feedback_model, 2.3, 0.1, 0.5, steps=40)
    eta = cdat_by_hand(partial(by_moving_average, high=2.3, tau=0.1, beta=0.5), 40, False)[0]
    close(path, learning_rate=eta)


@pytest.mark.parametrize("lagged", [True, False])
def test_the_feedback_rule_that_always_resets_is_greedy_and_one_that_never_does_is_past_the_edge(lagged):
    settings = dict(steps=30, lagged=lagged)
    always, never = (in_float64(theory.feedback_model, 2.05, tau=tau, **settings) for tau in (-2.0, np.inf))
    close(always, **in_float64(theory.cdat_model, 1.0, **settings)._asdict())
    close(never, **in_float64(theory.cdat_model, 2.05, **settings)._asdict())


def test_in_the_model_the_feedback_rule_sharpens_more_than_on_edge():
    lam = in_float64(theory.feedback_model, steps=400).sharpness
    assert 100 < lam[400] < 150  # rounding decides the rest: that path is chaotic


# --- Measured on a real loss.

CENTRE = {"a": np.array([0.3, -0.2]), "b": np.array([[0.5], [0.1], [-0.4]])}


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def like_centre(vector):
    return {"a": jnp.asarray(vector[:2]), "b": jnp.asarray(vector[2:]).reshape(3, 1)}


@cache
def cubic():
    """g, H and symmetric T of a polynomial of degree 3 in five parameters."""
    rng = np.random.default_rng(0)
    t = rng.normal(size=(5, 5, 5))
    t = sum(np.transpose(t, order) for order in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]) / 6
    h = rng.normal(size=(5, 5))
    return rng.normal(size=5), h @ h.T + np.eye(5), t


def cubic_loss(w):
    g, h, t = cubic()
    w = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(w)])
    return g @ w + w @ h @ w / 2 + jnp.einsum("ijk,i,j,k", t, w, w, w) / 6


def wavy_loss(w):
    w = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(w)])
    waves = jnp.tanh(jnp.asarray(cubic()[1], w.dtype) @ w - 1)
    return jnp.sum(waves**2) + jnp.exp(w[0] * w[1]) + jnp.sin(w[3] + w[4]) * w[2]


@cache
def compiled(loss):
    """The dense derivatives of a loss up to the third in a flat vector, and the shipped measurement."""
    f = lambda vector: loss(like_centre(vector))
    derivatives = lambda w: (jax.grad(f)(w), jax.hessian(f)(w), jax.jacfwd(jax.hessian(f))(w))
    return jax.jit(derivatives), jax.jit(partial(theory.measure, loss))


def dense(loss, w=None):
    """(gradient, third derivatives, top eigenvalue, its eigenvector by numpy), by default at the centre."""
    with jax.enable_x64(True):
        g, h, t = map(np.asarray, compiled(loss)[0](jnp.asarray(flat(CENTRE) if w is None else w)))
    values, vectors = np.linalg.eigh(h)
    return g, t, values[-1], vectors[:, -1]


def measured(loss, v):
    with jax.enable_x64(True):
        return compiled(loss)[1](jax.tree.map(jnp.asarray, CENTRE), like_centre(v))


@pytest.mark.parametrize("loss", [cubic_loss, wavy_loss])
def test_sharpening_and_feedback_are_those_of_dense_third_derivatives(loss):
    g, t, lam, v = dense(loss)
    grad_lam = np.einsum("ijk,i,j->k", t, v, v)
    for sign in 1, -1:
        got = measured(loss, sign * v)
        expected = lam, sign * v @ g / lam, -grad_lam @ g, grad_lam @ grad_lam
        np.testing.assert_allclose((got.sharpness, got.x, got.a, got.b), expected, rtol=1e-10)


@pytest.mark.parametrize("loss", [cubic_loss, wavy_loss])
def test_the_gradient_of_the_sharpness_is_how_the_top_eigenvalue_moves(loss):
    g, *_, v = dense(loss)
    eta = 1e-5  # central differences of numpy's eigenvalue, v turning as it likes
    slope = (dense(loss, flat(CENTRE) - eta * g)[2] - dense(loss, flat(CENTRE) + eta * g)[2]) / (2 * eta)
    assert measured(loss, v).a == pytest.approx(slope, rel=1e-6)


def test_the_sharpening_at_rest_is_that_with_the_swing_taken_out():
    g0, h0, t = cubic()
    *_, v = dense(cubic_loss)
    got = measured(cubic_loss, v)
    rest = flat(CENTRE) - float(got.x) * v
    gradient = g0 + h0 @ rest + np.einsum("ijk,i,j->k", t, rest, rest) / 2
    assert got.a_rest == pytest.approx(-np.einsum("ijk,i,j,k", t, v, v, gradient), rel=1e-10)
    assert abs(float(got.a_rest) - float(got.a)) > 0.1


def test_with_the_eigenvector_of_the_moment_only_the_sharpening_at_rest_is_the_models():
    depth, c, s, x = 10.0, 1.0, 0.2, 0.2
    with jax.enable_x64(True):
        f, w = lambda w: (depth + c * w[1]) * w[0] ** 2 / 2 - s * w[1], jnp.array([x, 0.0])
        v = jnp.asarray(np.linalg.eigh([[depth, c * x], [c * x, 0]])[1][:, -1])
        got = jax.jit(partial(theory.measure, f))(w, v)
    assert got.a_rest == pytest.approx(c * s, rel=0.01)
    assert got.a == pytest.approx(c * s - 2.5 * (c * x) ** 2, rel=0.01)
    assert got.b == pytest.approx(c**2, rel=0.01) and abs(got.x) == pytest.approx(x, rel=0.01)


# --- All of them.

MODELS = {
    "constant": theory.constant_rate,
    "semi-implicit": partial(theory.constant_rate, semi_implicit=True),
    "moving": partial(theory.moving_rate, lambda t, lam: 1.5 / lam, 0.1, b=1.0),
    "below": theory.below_edge,
    "cdat": theory.cdat_model,
    "feedback": theory.feedback_model,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_models_keep_the_dtype_with_traced_numbers_and_map_over_starts(name, dtype):
    with jax.enable_x64(True):
        run = jax.jit(jax.vmap(lambda lam, a: MODELS[name](lam=lam, a=a, steps=7), (0, None)))
        many = run(jnp.asarray([1.9, 1.8], dtype), jnp.asarray(0.1, dtype))
        assert all(array.shape == (2, 8) and array.dtype == dtype for array in many)
        one = MODELS[name](lam=1.8, a=0.1, steps=7)
        for row, expected in zip(many, one):
            np.testing.assert_allclose(row[1], expected, rtol=1e-3, atol=1e-4)


def test_measuring_keeps_float32():
    w, v = flat(CENTRE), dense(wavy_loss)[-1]
    got = compiled(wavy_loss)[1](like_centre(np.float32(w)), like_centre(np.float32(v)))
    assert all(number.dtype == "float32" for number in got)
    np.testing.assert_allclose(got, measured(wavy_loss, v), rtol=1e-3)


def test_energies_that_underflow_leave_no_step_and_no_nan():
    path = theory.cdat_model(1.0, steps=300)
    assert all(np.isfinite(array).all() for array in path)
    assert path.learning_rate[-1] == 0 and path.sharpness[-1] == path.sharpness[-2]


def test_examples_in_docstrings_run():
    failed, attempted = doctest.testmod(theory)
    assert attempted >= 13 and failed == 0


def test_theory_works_copied_out_alone(tmp_path):
    shutil.copy(theory.__file__, tmp_path)
    code = "import theory; print(round(float(theory.constant_rate(steps=2).sharpness[2]), 4))"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == "1.9111\n", run.stderr

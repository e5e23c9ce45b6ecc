"""Facts about the simplified model: its maps as plain loops have them, its fixed points, and the loss behind it."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from jax.flatten_util import ravel_pytree

from paper import theory

implicit_or_not = pytest.mark.parametrize("semi_implicit", [False, True])
lagged_or_not = pytest.mark.parametrize("lagged", [True, False])


@cache
def jitted(model, **words):
    return jit(lambda numbers: model(**numbers, **words))


def in_float64(model, words={}, **numbers):
    """A path of the shipped model as a Path of float64 numpy arrays; its numbers need no compilation."""
    with jax.enable_x64(True):
        path = jitted(model, **words)(numbers)
        assert all(array.dtype == "float64" for array in path)
        return theory.Path(*map(np.asarray, path))


def close(path, **columns):
    """Each column starts as expected, or is that number throughout."""
    for name, expected in columns.items():
        found = getattr(path, name)[: np.size(expected) if np.ndim(expected) else None]
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-12, err_msg=name)


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


def cdat_by_hand(scaling, steps, lagged, kappa=0.0, nu=(0.1,)):
    """(9) and (10) at Figure 9's numbers, from gradients and Hessians: rows of (η, λ, p, q of each ν)."""
    a, b, eta, lam, w, nu = 0.05, 0.1, 0.05, 18.0, np.full(1 + len(nu), 2.0), np.array(nu)
    gradient = lambda lam, w: np.append(lam * w[0] + kappa * w[0] ** 3 / 6, nu * w[1:])
    hessian = lambda lam, w: np.diag(np.append(lam + kappa * w[0] ** 2 / 2, nu))
    loss = lambda lam, w: (lam * w[0] ** 2 + nu @ w[1:] ** 2) / 2 + kappa * w[0] ** 4 / 24
    losses, rows = [loss(lam, w)], []
    for _ in range(steps + 1):
        rows.append((eta, lam, *w**2))
        old = lam, w
        lam, w = lam + eta * (a - b * w[0] ** 2), w - eta * gradient(lam, w)
        seen = old if lagged else (lam, w)
        g, h = gradient(*seen), hessian(*seen)
        losses.append(loss(*seen))
        eta = scaling(losses) * (g @ g) / (g @ h @ g)
    return np.array(rows).T


def by_moving_average(losses, rise=0.02, tolerance=0.1, sigma_low=1.5, sigma_high=3.0, average=0.95):
    """σ of the feedback rule from the whole history of losses, the average written as a sum."""
    sigma = 2.0
    for k in range(2, len(losses) + 1):
        past = np.array(losses[1:k])
        weights = (1 - average) * average ** np.arange(len(past))[::-1]
        rose = past[-1] > (1 + tolerance) * (weights @ past + average ** len(past) * losses[0])
        sigma = sigma_low + (sigma - sigma_low) / 2 if rose else min(sigma + rise, sigma_high)
    return 1.0 if rose else sigma


# --- Constant rate (4).

PRINTED = {"steps": 120, "semi_implicit": False}
SEMI_IMPLICIT = {"steps": 20_000, "semi_implicit": True}


@pytest.mark.parametrize("words", [PRINTED, SEMI_IMPLICIT], ids=["printed", "semi-implicit"])
def test_the_constant_rate_model_is_equation_4_and_rests_at_the_edge_with_x_squared_a_over_b(words):
    numbers = dict(lr=0.9, x=-0.2, lam=2.1, a=0.04, b=0.2)
    eta, lam, p = valley_by_hand(lambda t, lam: 0.9, -0.2, 2.1, 0.04, 0.2, 60, words["semi_implicit"])
    path = in_float64(theory.constant_rate, words, **numbers)
    close(path, learning_rate=eta, sharpness=lam, p=p, y=eta * lam - 2, q=0)
    rest = in_float64(theory.constant_rate, words, **numbers | dict(lr=0.5, x=np.sqrt(0.2), lam=4.0))
    close(rest, sharpness=np.full(21, 4), y=np.zeros(21), p=np.full(21, 0.2))


@implicit_or_not
def test_around_the_fixed_point_the_printed_map_grows_and_the_semi_implicit_one_turns(semi_implicit):
    a, b = 0.03, 0.3

    def moved(state, lr):  # (p, λ) -> (p₊, λ₊)
        path = theory.constant_rate(lr, jnp.sqrt(state[0]), state[1], a, b, 1, semi_implicit)
        return jnp.stack([path.p[1], path.sharpness[1]])

    shipped = jit(jax.jacfwd(moved))
    for lr, modulus in (1.0, 1.03), (2.0, 1.11):
        jacobian = np.array([[1, 2 * lr * a / b], [-lr * b, 1]])  # by hand, at p = a/b, λ = 2/η
        if semi_implicit:
            jacobian[1] -= lr * b * (jacobian[0] - [1, 0])
        sizes = np.abs(np.linalg.eigvals(jacobian))
        np.testing.assert_allclose(sizes, 1 if semi_implicit else np.sqrt(1 + 2 * a * lr**2), rtol=1e-12)
        assert semi_implicit or sizes == pytest.approx(modulus, abs=0.005)
        with jax.enable_x64(True):
            np.testing.assert_allclose(shipped(np.array([a / b, 2 / lr]), lr), jacobian, rtol=1e-9, atol=1e-12)


def test_figure_4_as_printed_stays_for_100_steps_and_then_blows_up():
    path = in_float64(theory.constant_rate, PRINTED)
    assert 1.4 < path.sharpness[:101].min() and path.sharpness[:101].max() < 2.8
    assert np.abs(path.sharpness).max() > 1e3


def test_the_semi_implicit_form_oscillates_about_the_edge_and_stays_bounded():
    path = in_float64(theory.constant_rate, SEMI_IMPLICIT)
    assert 1.85 < path.sharpness.min() and path.sharpness.max() < 2.15 and path.p.max() < 0.25
    for part in np.split(path.y[:20_000], 20):
        assert part.min() < -0.05 and part.max() > 0.05
        assert part.mean() == pytest.approx(0, abs=0.01)


def test_the_model_is_gradient_descent_on_a_loss_with_two_parameters():
    depth, c, s, lr = 1.9, 0.8, 0.04, 0.95
    with jax.enable_x64(True):
        gradient = jit(jax.grad(lambda w: (depth + c * w[1]) * w[0] ** 2 / 2 - s * w[1]))
        w, rows = np.array([0.3, 0.1]), []
        for _ in range(81):
            rows.append((depth + c * w[1], w[0] ** 2))
            w = w - lr * np.asarray(gradient(w))
    lam, p = np.array(rows).T
    assert lr * lam[:40].max() > 2.1 and lr * lam[40:].min() < 1.9
    path = in_float64(theory.constant_rate, PRINTED, lr=lr, x=0.3, lam=lam[0], a=c * s, b=c**2 / 2)
    close(path, sharpness=lam, p=p)  # ∇λ = (0, c): b is ½‖∇λ‖²


# --- Moving rates (5) and classical tuners (6).

WAVE = 1 + 0.1 * np.sin(np.arange(61))
LONG = {"steps": 20_000}


@implicit_or_not
@pytest.mark.parametrize("rate", [lambda t, lam: 1.0, lambda t, lam: WAVE[t], lambda t, lam: 1.98 / lam])
def test_equation_5_in_p_and_y_agrees_with_equation_4_in_x_and_lambda(rate, semi_implicit):
    rule = (lambda t, lam: jnp.asarray(WAVE)[t]) if rate(1, 1.0) == WAVE[1] else rate
    words = dict(rule=rule, steps=60, semi_implicit=semi_implicit)
    path = in_float64(theory.moving_rate, words, p=0.09, lam=1.9, a=0.03, b=0.3)
    eta, lam, p = valley_by_hand(rate, 0.3, 1.9, 0.03, 0.3, 60, semi_implicit)
    close(path, learning_rate=eta, sharpness=lam, p=p, y=eta * lam - 2, q=0)


def test_below_the_edge_y_is_minus_two_epsilon_and_figure_4_starts_at_rate_1():
    path = in_float64(theory.below_edge, LONG)
    close(path, y=-0.1, p=0.09 * 0.81 ** np.arange(101))
    assert path.learning_rate[0] == pytest.approx(1)
    eta, lam, p = valley_by_hand(lambda t, lam: 1.9 / lam, 0.3, 1.9, 1.0, 0.5, 100)
    close(path, learning_rate=eta, sharpness=lam, p=p)
    close(in_float64(theory.below_edge, LONG, eps=0.2), y=-0.4)
    close(in_float64(theory.below_edge, LONG, eps=0.0, p=2.0), sharpness=1.9, p=2, y=0)  # a/b, at the edge: it is held


def test_below_the_edge_the_sharpness_grows_without_bound_and_takes_the_rate_along():
    path = in_float64(theory.below_edge, LONG)
    t = np.array([1250, 5000, 20_000])
    np.testing.assert_allclose(path.sharpness[t], 2 * np.sqrt(0.95 * t), rtol=2e-3)
    np.testing.assert_allclose(path.learning_rate[t], 1.9 / path.sharpness[t])
    assert np.all(np.diff(path.sharpness) > 0)


# --- CDAT (9, 10).


def cdat(sigma, lagged):
    return in_float64(theory.cdat_model, {"lagged": lagged}, sigma=sigma)


def feedback(lagged, **numbers):
    return in_float64(theory.feedback_model, {"lagged": lagged, "steps": 400}, **numbers)


@lagged_or_not
@pytest.mark.parametrize("sigma", [2.0, 1.9, 2.05])
def test_cdat_in_the_model_is_cdat_on_a_gradient_and_a_hessian(sigma, lagged):
    eta, lam, p, q = cdat_by_hand(lambda losses: sigma, 60, lagged)
    close(cdat(sigma, lagged), learning_rate=eta, sharpness=lam, p=p, q=q, y=eta * lam - 2)


@lagged_or_not
@pytest.mark.parametrize("kappa", [0.0, 3.0, -0.5])
def test_more_eigenvalues_and_a_fourth_order_term_are_those_of_a_loss_that_has_them(kappa, lagged):
    nu = [0.1, 1.0, 4.0]
    eta, lam, p, *q = cdat_by_hand(lambda losses: 2.1, 10, lagged, kappa, nu)
    with jax.enable_x64(True):
        numbers = dict(sigma=2.1, q=jnp.full(3, 4.0), nu=jnp.array(nu), kappa=kappa)
        path = jitted(theory.cdat_model, lagged=lagged, steps=10)(numbers)
    close(path, learning_rate=eta, sharpness=lam, p=p, q=np.array(q).T)


def test_with_a_positive_kappa_a_range_of_sigma_settles_where_the_swing_keeps_its_size():
    path = in_float64(theory.cdat_model, {"lagged": False}, sigma=2.25, kappa=1.0)
    slope, bend = (path.sharpness + path.p / order for order in (6, 2))
    assert path.p[-1] == pytest.approx(0.5, rel=0.02)  # a/b
    assert 2.25 * slope[-1] / bend[-1] == pytest.approx(2, rel=1e-3)


@pytest.mark.parametrize(
    "sigma, lagged, at_400, at_4000", [(2.0, True, 19.8, 27.9), (1.9, True, 20.1, 33.5), (2.0, False, 19.8, 32.0)]
)
def test_figure_9_slows_the_sharpening_and_does_not_end_it(sigma, lagged, at_400, at_4000):
    lam = cdat(sigma, lagged).sharpness
    assert lam[400] == pytest.approx(at_400, abs=0.05) and lam[4000] == pytest.approx(at_4000, abs=0.05)
    assert np.all(np.diff(lam[1:]) > -0.02) and lam[4000] > lam[3000]


@pytest.mark.parametrize("lagged, end", [(True, 160), (False, 67)])
def test_past_the_edge_the_swing_drives_the_sharpness_below_zero(lagged, end):
    path = theory.Path(*(column[:181] for column in cdat(2.0625, lagged)))
    assert np.argmax(path.sharpness < 0) == pytest.approx(end, abs=2)
    assert path.y[1:60].min() > 0 and np.all(np.diff(path.p[1:60]) > 0)
    assert path.learning_rate.min() >= 0 and path.sharpness.min() < -1  # CDAT's |uᵀHu|: the rate keeps its sign


def test_on_edge_holds_y_just_above_zero_and_1_9_below_and_the_lag_is_what_keeps_it_there():
    for lagged in True, False:
        on_edge, below = cdat(2.0, lagged), cdat(1.9, lagged)
        assert np.abs(on_edge.y[10:]).max() < 0.01 and on_edge.y[10:].min() > -1e-12 and on_edge.p[4000] > 0.05
        assert below.y[100:].max() < -0.005 and below.p[4000] < 1e-20
    lagged, current = cdat(2.0, True), cdat(2.0, False)
    assert lagged.y[4000] > 5e-5 and abs(current.y[4000]) < 1e-12
    np.testing.assert_allclose(lagged.y[1001:], 2 * lagged.sharpness[1001:] / lagged.sharpness[1000:-1] - 2, rtol=1e-3)


OTHERS = {"rise": 0.2, "tolerance": 0.02, "sigma_low": 1.2, "sigma_high": 2.3, "average": 0.5}


@pytest.mark.parametrize("numbers", [{}, OTHERS])
@lagged_or_not
def test_the_feedback_rule_is_greedy_above_the_average_loss_and_past_the_edge_below(numbers, lagged):
    path = feedback(lagged, growth=np.inf, **numbers)
    eta, lam, p, q = cdat_by_hand(lambda losses: by_moving_average(losses, **numbers), 30, lagged)
    close(path, learning_rate=eta, sharpness=lam, p=p, q=q)
    assert path.y[:31].max() > 0.1 and path.y[1:31].min() < -0.5  # both occur
    slow = feedback(lagged, growth=1.1, **numbers).learning_rate
    assert (slow[1:31] <= 1.1 * slow[:30] * (1 + 1e-12)).all() and (slow[1:31] > 1.0999 * slow[:30]).any()


@lagged_or_not
def test_the_feedback_rule_that_always_resets_is_greedy_and_one_that_never_does_is_past_the_edge(lagged):
    for tolerance, sigma in (-2.0, 1.0), (np.inf, 2.05):
        expected = {name: column[:31] for name, column in cdat(sigma, lagged)._asdict().items()}
        close(feedback(lagged, sigma_high=2.05, rise=0.05, tolerance=tolerance, growth=np.inf), **expected)


# --- Measured on a real loss.

CENTRE = np.array([0.3, -0.2, 0.5, 0.1, -0.4])


def tree(vector):
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
    (g, h, t), w = cubic(), ravel_pytree(w)[0]
    return g @ w + w @ h @ w / 2 + jnp.einsum("ijk,i,j,k", t, w, w, w) / 6


def wavy_loss(w):
    w = ravel_pytree(w)[0]
    waves = jnp.tanh(jnp.asarray(cubic()[1], w.dtype) @ w - 1)
    return jnp.sum(waves**2) + jnp.exp(w[0] * w[1]) + jnp.sin(w[3] + w[4]) * w[2]


@cache
def compiled(loss):
    """The derivatives of a loss up to the third in a flat vector, and the shipped measurement."""
    f = lambda vector: loss(tree(vector))
    derivatives = lambda w: (jax.grad(f)(w), jax.hessian(f)(w), jax.jacfwd(jax.hessian(f))(w))
    return jit(derivatives), jit(partial(theory.measure, loss))


def dense(loss, w=CENTRE):
    """(gradient, third derivatives, top eigenvalue, its eigenvector by numpy) at w."""
    if loss is cubic_loss:
        g, h, t = cubic()
        g, h = g + h @ w + t @ w @ w / 2, h + t @ w
    else:
        with jax.enable_x64(True):
            g, h, t = map(np.asarray, compiled(loss)[0](w))
    values, vectors = np.linalg.eigh(h)
    return g, t, values[-1], vectors[:, -1]


def measured(loss, v):
    with jax.enable_x64(True):
        return compiled(loss)[1](tree(CENTRE), tree(v))


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
    slope = (dense(loss, CENTRE - eta * g)[2] - dense(loss, CENTRE + eta * g)[2]) / (2 * eta)
    assert measured(loss, v).a == pytest.approx(slope, rel=1e-6)


def test_the_sharpening_at_rest_is_that_with_the_swing_taken_out():
    *_, v = dense(cubic_loss)
    got = measured(cubic_loss, v)
    gradient, t, *_ = dense(cubic_loss, CENTRE - float(got.x) * v)
    assert got.a_rest == pytest.approx(-np.einsum("ijk,i,j,k", t, v, v, gradient), rel=1e-10)
    assert abs(float(got.a_rest) - float(got.a)) > 0.1


def test_with_the_eigenvector_of_the_moment_only_the_sharpening_at_rest_is_the_models():
    depth, c, s, x = 10.0, 1.0, 0.2, 0.2
    with jax.enable_x64(True):
        f, w = lambda w: (depth + c * w[1]) * w[0] ** 2 / 2 - s * w[1], jnp.array([x, 0.0])
        v = jnp.asarray(np.linalg.eigh([[depth, c * x], [c * x, 0]])[1][:, -1])
        got = jit(partial(theory.measure, f))(w, v)
    assert got.a_rest == pytest.approx(c * s, rel=0.01)
    assert got.a == pytest.approx(c * s - 2.5 * (c * x) ** 2, rel=0.01)
    assert got.b == pytest.approx(c**2, rel=0.01) and abs(got.x) == pytest.approx(x, rel=0.01)


# --- Derivatives along a line, and whether swings along it stay bounded.


def test_derivatives_along_v_are_those_of_a_quartic_and_central_differences_of_a_network():
    lam, tau, kappa = 3.0, -5.0, 7.0
    quartic = lambda w: lam * w["x"] ** 2 / 2 + tau * w["x"] ** 3 / 6 + kappa * w["x"] ** 4 / 24
    with jax.enable_x64(True):
        got = jit(partial(theory.derivatives, quartic))({"x": jnp.array(0.0)}, {"x": jnp.array(2.0)})
        np.testing.assert_allclose(got, [0, 0, 4 * lam, 8 * tau, 16 * kappa], rtol=1e-14)
        w, v = (jax.random.normal(jax.random.key(k), (4,)) for k in (0, 1))
        f = lambda w: jnp.mean(jnp.tanh(jnp.outer(jnp.linspace(-1, 2, 5), w)) @ jnp.cos(w)) ** 2
        got = jit(partial(theory.derivatives, f))(w, v)
        h, line = 0.02, jit(jax.vmap(lambda t: f(w + t * v)))
        t = np.arange(-5, 6)
        weights = np.linalg.solve(np.vander(t, increasing=True).T, np.eye(11)[:, :5])  # of differences of order 10
        differences = np.asarray(line(jnp.asarray(h * t))) @ weights
    np.testing.assert_allclose(got, differences * [1, 1, 2, 6, 24] / h ** np.arange(5), rtol=1e-6)


@pytest.mark.parametrize("tau, kappa", [(4.0, 3.0), (4.0, -3.0), (0.0, 3.0), (0.0, -3.0), (1.0, 3.0), (1.0, 0.5)])
def test_beyond_the_edge_swings_stay_bounded_by_one_sign_at_a_constant_rate_and_another_under_cdat(tau, kappa):
    lam = 2.0
    slope = lambda t: lam * t + tau * t**2 / 2 + kappa * t**3 / 6
    bend = lambda t: lam + tau * t + kappa * t**2 / 2
    for rate, bounded in (("constant", tau**2 / lam**2 > kappa / (3 * lam)), ("cdat", kappa > 0)):
        t = 0.01
        for _ in range(60_000):
            t -= 2.0001 * slope(t) / (lam if rate == "constant" else bend(t))
            if not abs(t) < 0.1:
                break
        assert (abs(t) < 0.1) == bounded


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
def test_models_keep_the_dtype_with_traced_numbers_and_map_over_starts(name):
    run = lambda lam, a: MODELS[name](lam=lam, a=a, steps=7)
    with jax.enable_x64(True):
        kept = lambda path, dtype: all(array.shape == (8,) and array.dtype == dtype for array in path)
        for dtype in "float32", "float64":
            assert kept(jax.eval_shape(run, *np.ones(2, dtype)), dtype)
        many = jit(jax.vmap(run, (0, None)))(np.float32([1.9, 1.8]), np.float32(0.1))
        one = jit(run)(1.8, 0.1)
    assert kept([array[1] for array in many], "float32")
    for row, expected in zip(many, one):
        np.testing.assert_allclose(row[1], expected, rtol=1e-3, atol=1e-4)


def test_measuring_keeps_float32():
    v = dense(wavy_loss)[-1]
    got = compiled(wavy_loss)[1](tree(np.float32(CENTRE)), tree(np.float32(v)))
    assert all(number.dtype == "float32" for number in got)
    np.testing.assert_allclose(got, measured(wavy_loss, v), rtol=1e-3)


def test_energies_that_underflow_leave_no_step_and_no_nan():
    path = theory.cdat_model(1.0, steps=300)
    assert all(np.isfinite(array).all() for array in path)
    assert path.learning_rate[-1] == 0 and path.sharpness[-1] == path.sharpness[-2]

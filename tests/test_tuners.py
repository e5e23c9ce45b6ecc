"""Facts about the tuners: their rates as plain numpy computes them, closed forms on quadratics, and dead ends."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import DIRECTIONS, FULL, MINI, START, assert_devices_agree_where_f_is_the_mean, assert_same_training
from by_hand import derivatives, loss, pytree, steps_on_two_devices, train, train_by_hand
from jax import jit

import gd
import models
import tuners
from paper import drawings, rivals
from tuners import TUNERS

# --- Rates by hand: η from the records of all steps so far (see train_by_hand).


def constant(past, lr=0.1):
    return lr


def linesearch(past, slope=1e-4, slack=0.0, shrink=0.8, grow=4.0, lr_max=1.0, max_trials=1000):
    now, last = past[-1], past[-2].taken if len(past) > 1 else 0
    guess = min(grow * last, lr_max) if last > 0 else lr_max
    for eta in guess * shrink ** np.arange(max_trials):
        if now.f(now.w + eta * now.u) <= (1 + slack) * now.loss + slope * eta * now.g @ now.u:
            return eta
    return 0.0


def cdat(past, sigma=2.0, beta=0.0, damping=0.0, curvature="hessian", every=1):
    matrix_of = lambda now: {"hessian": now.h, "gauss-newton": now.gauss_newton}[curvature]
    unit = lambda now: now.u / np.linalg.norm(now.u)
    along = [abs(unit(now) @ matrix_of(now) @ unit(now)) for now in past]
    weights = beta ** np.arange(len(past))[::-1]
    n = weights @ [max(-now.g @ now.u, 0) for now in past]
    d = weights @ [along[t - t % every] * now.u @ now.u + damping for t, now in enumerate(past)]
    return sigma * n / d


def feedback(past, rise=0.02, tolerance=0.1, growth=1.5, sigma_low=1.5, sigma_high=3.0, average=0.95,
             curvature="gauss-newton"):  # fmt: skip
    sigma, ceiling, n, d = 2.0, np.inf, 0.0, 0.0
    for k in range(1, len(past) + 1):
        losses = [now.loss for now in past[:k]]
        weights = average ** np.arange(k)[::-1] * np.append(1, np.full(k - 1, 1 - average))
        rose = losses[-1] > (1 + tolerance) * weights @ losses
        sigma = sigma_low + (sigma - sigma_low) / 2 if rose else min(sigma + rise, sigma_high)
        now = past[k - 1]
        slopes = now.g * now.u
        down = np.round(max(-slopes.sum(), 0) / abs(slopes).sum(), 4)
        beta = average * (1 - down**8)
        n = beta * n + (1 - beta) * max(-slopes.sum(), 0)
        d = beta * d + (1 - beta) * abs(now.u @ (now.h if curvature == "hessian" else now.gauss_newton) @ now.u)
        eta = min((1.0 if rose else 1 + (sigma - 1) * down**2) * n / d, ceiling)
        ceiling = growth * eta if eta > 0 else ceiling
    return eta


# Rules of paper/rivals.py.


def schedule(past, steps, lr=0.1, warmup=0.1, decay="cosine"):
    t, rise = len(past) - 1, warmup * steps
    if t < rise:
        return lr * t / rise
    left = (steps - t) / (steps - rise)
    return lr * {"constant": 1, "linear": left, "cosine": np.sin(np.pi / 2 * left) ** 2}[decay]


def polyak(past, f_min=0.0, lr_max=1.0):
    return min((past[-1].loss - f_min) / np.linalg.norm(past[-1].g) ** 2, lr_max)


def hypergradient(past, lr=0.1, hyper_rate=0.1):
    for before, after in zip(past, past[1:]):
        lr *= 1 - hyper_rate * after.g @ before.u / np.linalg.norm(after.g) / np.linalg.norm(before.u)
    return lr


def dog(past, reach=1e-4):
    first = past[0].w
    distances = [np.linalg.norm(now.w - first) for now in past]
    return max(reach * (1 + np.linalg.norm(first)), *distances) / np.sqrt(sum(now.u @ now.u for now in past))


def ngn(past, lr=1.0):
    return 1 / (1 / lr - past[-1].g @ past[-1].u / (2 * past[-1].loss))


def nonmonotone(past, slope=1e-4, average=0.85, shrink=0.8, grow=4.0, lr_max=100.0):
    weights = average ** np.arange(len(past))[::-1]
    now, last = past[-1], past[-2].taken if len(past) > 1 else 0
    mean = weights @ [before.loss for before in past] / weights.sum()
    guess = min(grow * last, lr_max) if last > 0 else lr_max
    for eta in guess * shrink ** np.arange(1000):
        if now.f(now.w + eta * now.u) <= mean + slope * eta * now.g @ now.u:
            return eta
    return 0.0


SEARCHES = [
    {"slope": 0.0, "grow": np.inf},
    {"slope": 0.0, "slack": 1e-3, "shrink": 0.9},
    {"shrink": 0.8},
    {"shrink": 0.9, "grow": np.inf},
    {"slope": 0.5},
    {"max_trials": 30, "lr_max": 50.0},
]
CASES = [
    (constant, {"lr": 0.3}),
    *[(linesearch, numbers) for numbers in SEARCHES],
    (partial(cdat, sigma=1.0), {}),  # greedy
    (partial(cdat, sigma=1.0), {"curvature": "gauss-newton", "every": 2}),
    (cdat, {}),
    (cdat, {"beta": 0.9}),
    (cdat, {"sigma": 0.5, "beta": 0.5, "damping": 0.1}),
    (cdat, {"curvature": "gauss-newton"}),
    (cdat, {"sigma": 0.5, "beta": 0.5, "damping": 0.1, "every": 4}),
    *[(schedule, {"lr": 0.3, "steps": 20, "warmup": 0.2, "decay": d}) for d in ("constant", "linear", "cosine")],
    (polyak, {}),
    (polyak, {"f_min": 0.05, "lr_max": 0.2}),
    (hypergradient, {}),
    (hypergradient, {"hyper_rate": 0.5}),
    (feedback, {}),
    (feedback, {"rise": 0.3, "tolerance": 0.0, "growth": 1.1, "sigma_low": 1.2, "sigma_high": 2.2, "average": 0.5}),
    (feedback, {"curvature": "hessian", "growth": np.inf}),
    (dog, {"reach": 0.1}),
    (ngn, {"lr": 3.0}),
    (nonmonotone, {"lr_max": 5.0}),
]


@pytest.mark.parametrize("batches", [FULL, MINI], ids=["full", "mini"])
@pytest.mark.parametrize("rate, numbers", CASES)
def test_20_steps_are_those_of_plain_numpy(rate, numbers, batches):
    name, words = getattr(rate, "__name__", "greedy"), ("decay", "curvature", "every")
    static = {key: numbers[key] for key in numbers if key in words}
    with jax.enable_x64(True):
        traced = {key: numbers[key] for key in numbers if key not in words}
        ours = train(batches, "momentum", name, {}, traced, **static)
    assert_same_training(ours, train_by_hand(batches, DIRECTIONS["momentum"], partial(rate, **numbers), beside=ours))


TWICE = [MINI[t // 2] for t in range(40)]


@pytest.mark.parametrize("batches, tol", [(FULL, 1e-3), (TWICE, 1e-2)], ids=["full", "mini"])
def test_exact_is_sigma_over_the_sharpness(batches, tol):
    with jax.enable_x64(True):
        ours = train(batches, "momentum", "exact", {}, {"sigma": 0.1})
    theirs = train_by_hand(batches, DIRECTIONS["momentum"], lambda past: np.nan, beside=ours)
    for t, (now, h) in enumerate(zip(ours, [record.h for record in theirs], strict=True)):
        second, top = np.linalg.eigvalsh(h)[-2:]
        v = np.append(*map(now.carry.tuner[0].get, ("bias", "weight")))
        rho = v @ h @ v / (v @ v)
        residual = np.linalg.norm(h @ v - rho * v) / np.linalg.norm(v)
        assert now.eta == pytest.approx(0.1 / rho, 1e-8)
        assert rho <= top * (1 + 1e-12)
        if rho > second:  # Temple and Kato: how far below the top a unit vector of that residual can be
            assert top - rho <= residual**2 / (rho - second) + 1e-9 * top
        started = t >= 5 and t % 2 == 1  # the second time on a batch
        assert not started or now.eta * top == pytest.approx(0.1, tol)


def test_the_greedy_gain_is_what_the_loss_says_at_both_rates():
    any_way, signs = np.array([2.0, -1.0, 1.0, 0.0, 1.0]), set()
    with jax.enable_x64(True):
        gain = jit(lambda w, u: drawings.greedy_gain(lambda w: loss(w, FULL[0]), w, u))
        for w in START, 3 * START, START[::-1]:
            f, (_, g, h) = lambda w: derivatives(w, FULL[0])[0], derivatives(w, FULL[0])
            for u in -g, any_way:
                eta = -g @ u / abs(u @ h @ u)
                assert float(gain(pytree(w), pytree(u))) == pytest.approx(f(w + 2 * eta * u) - f(w + eta * u), 1e-9)
                signs.add(u @ h @ u > 0)
    assert signs == {True, False}


# --- Closed forms.

RNG = np.random.default_rng(1)
A = RNG.normal(size=(4, 4))
A, B = A @ A.T + np.eye(4), RNG.normal(size=4)  # f(w) = ½ wᵀAw − Bᵀw
VALUES, VECTORS = np.linalg.eigh(A)
INDEFINITE = VECTORS @ np.diag([-9.0, -1.0, 2.0, 4.0]) @ VECTORS.T
ONES = np.ones(4)


@cache
def rate_with(name, **words):
    """A jitted call on a quadratic; its numbers are arguments, so that many tests share it."""

    def rate(numbers, a, b, w, u, state, value):
        f, tuner = lambda w: w @ a @ w / 2 - b @ w, TUNERS[name](**numbers, **words)
        at_w, g = jax.value_and_grad(f)(w)
        return tuner.rate(state, f, w, at_w if value is None else value, g, -g if u is None else u)

    return jit(rate)


def rate_of(name, a, w, b=0.0, u=None, state=None, value=None, words={}, **numbers):
    """(η, state) of one call at w on ½ wᵀaw − bᵀw, for gradient descent unless u is given."""
    a, w, b = np.asarray(a, float), np.asarray(w, float), b * np.ones(len(a))
    state = TUNERS[name](**numbers, **words).init(w) if state is None else state
    eta, state = rate_with(name, **words)(numbers, a, b, w, u, state, value)
    return float(eta), state


def test_curvature_is_that_of_the_dense_hessian():
    with jax.enable_x64(True):
        w = {"in": jnp.asarray(RNG.normal(size=(3, 6))), "out": jnp.asarray(RNG.normal(size=(6, 2)))}
        x = jnp.asarray(RNG.normal(size=(7, 3)))
        f = lambda w: jnp.mean(jnp.tanh(jnp.tanh(x @ w["in"]) @ w["out"]) ** 3)
        flat, unravel = jax.flatten_util.ravel_pytree(w)
        h = np.asarray(jit(jax.hessian(lambda v: f(unravel(v))))(flat))
        curvature = jit(lambda u: tuners.curvature(f, w, unravel(u)))
        for u in RNG.normal(size=(3, len(h))):
            assert float(curvature(u)) == pytest.approx(u @ h @ u, 1e-10)


PROBE = tuners.Tuner(lambda w: (), lambda state, f, w, value, g, u: (tuners.gauss_newton(f, w, u), state))


@pytest.mark.parametrize("name, shape", [("mlp", (4, 4, 1)), ("cnn", (4, 4, 2)), ("transformer", (3,))])
def test_the_gauss_newton_curvature_is_that_of_the_dense_matrix(name, shape, classes=3, decay=0.3):
    with jax.enable_x64(True):
        network = models.MODELS[name](shape, classes, width=4, depth=1)
        ravel = jax.flatten_util.ravel_pytree
        flat, unravel = ravel(jit(network.init)(jax.random.key(0)))
        flat = np.asarray(flat) + 0.3 * RNG.normal(size=len(flat))
        x = jnp.asarray(RNG.integers(3, size=(6, *shape)) if len(shape) == 1 else RNG.normal(size=(6, *shape)))
        y = RNG.integers(3, size=(6, *shape) if len(shape) == 1 else 6)
        outer = lambda loss, z, w, batch: gd.LOSSES[loss](z, batch[1]) + decay / 2 * gd.dot(w, w)
        outputs = lambda flat: network.apply(unravel(flat), x).reshape(-1, classes)
        both = jit(lambda flat: (outputs(flat), jax.jacrev(outputs)(flat)))
        z, jacobian = map(np.asarray, both(flat))
        p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        seconds = {"mse": [np.eye(classes)] * len(p), "ce": [np.diag(row) - np.outer(row, row) for row in p]}
        for loss, size in itertools.product(seconds, (0, 2, 4)):  # the whole, chunks that divide it, and that do not
            composed = tuners.Composed(lambda w, batch: network.apply(w, batch[0]), partial(outer, loss))

            @jit
            def ours(flat, batch, composed=composed, size=size):
                step = gd.make_step(composed, gd.gd(), PROBE, size)
                carry, metrics = step(gd.init_carry(unravel(flat), gd.gd(), PROBE), batch)
                return metrics["learning_rate"], ravel(carry.u)[0]

            curvature, u = map(np.asarray, ours(flat, (x, y)))
            matrix = np.mean([j.T @ s @ j for j, s in zip(jacobian, seconds[loss])], axis=0) + decay * np.eye(len(flat))
            assert float(curvature) == pytest.approx(u @ matrix @ u, 1e-10)


def test_the_gauss_newton_curvature_is_never_negative_and_that_of_a_linear_network_is_the_hessians():
    signs = set()
    with jax.enable_x64(True):
        for name, shape in ("linear", (4, 4, 1)), ("transformer", (3,)):
            network = models.MODELS[name](shape, 5, **{} if name == "linear" else {"width": 4, "depth": 1})
            w = jax.eval_shape(network.init, jax.random.key(0))
            x = RNG.integers(5, size=(4, *shape)) if name == "transformer" else RNG.normal(size=(4, *shape))
            y = RNG.integers(5, size=(4, *shape) if name == "transformer" else 4)
            outer = lambda z, w, y=y: gd.ce(z, y)
            f = tuners.Composed(lambda w, network=network, x=x: network.apply(w, x), outer)
            both = jit(lambda w, u, f=f: (tuners.gauss_newton(f, w, u), tuners.curvature(f, w, u)))
            for _ in range(200):
                w, u = (jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape)), w) for _ in range(2))
                ours, hessian = map(float, both(w, u))
                assert ours >= 0
                assert name != "linear" or ours == pytest.approx(hessian, rel=1e-12, abs=1e-12)
                signs.add(hessian > 0)
    assert signs == {True, False}


@pytest.mark.parametrize("name", ["greedy", "cdat", "feedback"])
def test_a_loss_in_one_piece_has_no_gauss_newton_curvature_and_one_line_says_what_to_give(name):
    rule, value, g, u = each(name, curvature="gauss-newton")
    with pytest.raises(TypeError, match=r"give a Composed\(inner, outer\)"):
        rule.rate(rule.init(AT), LINE, AT, value, g, u)


def test_sigma_1_is_exact_line_search_and_sigma_2_leaves_a_quadratic_as_high_as_it_was():
    w = RNG.normal(size=4)
    u = B - A @ w
    height = lambda eta: (w + eta * u) @ A @ (w + eta * u) / 2 - B @ (w + eta * u)
    with jax.enable_x64(True):
        greedy, _ = rate_of("greedy", A, w, B)
        edge, _ = rate_of("cdat", A, w, B, sigma=2.0, damping=0.0)
    assert u @ (A @ (w + greedy * u) - B) == pytest.approx(0, abs=1e-10)  # no slope is left along u
    assert height(edge) == pytest.approx(height(0), 1e-12)
    assert edge == pytest.approx(2 * u @ u / (u @ A @ u), 1e-12)


@pytest.mark.parametrize("sigma", [1.0, 1.9375, 2.0, 3.0])
def test_on_the_top_eigenvector_the_rate_is_sigma_over_the_sharpness(sigma):
    w = 0.1 * VECTORS[:, -1]
    with jax.enable_x64(True):
        assert rate_of("cdat", A, w, sigma=sigma, damping=0.0)[0] == pytest.approx(sigma / VALUES[-1], 1e-8)
        eta, state = rate_of("exact", A, w, sigma=sigma)
        for _ in range(3):  # it converges over the steps
            eta, state = rate_of("exact", A, w, state=state, sigma=sigma)
    assert eta == pytest.approx(sigma / VALUES[-1], 1e-8)


def test_where_the_curvature_is_negative_its_size_counts_and_uphill_nothing_moves():
    v = VECTORS[:, 0]
    with jax.enable_x64(True):
        assert rate_of("greedy", INDEFINITE, v)[0] == pytest.approx(1 / 9, 1e-12)
        for damping, sigma in (0.0, 2), (81.0, 1.8):
            assert rate_of("cdat", INDEFINITE, v, sigma=2.0, damping=damping)[0] == pytest.approx(sigma / 9, 1e-12)
        assert rate_of("cdat", A, v, u=A @ v, sigma=2.0, damping=0.0)[0] == 0


@pytest.mark.parametrize("size", [1, 2, 3])
def test_exact_stays_on_the_top_eigenvalue_once_it_has_converged(size):
    """Then v turns no further: what is left of Hv beside v is rounding."""
    h = np.random.default_rng(size).normal(size=(size, size))
    h = (h @ h.T + np.eye(size)).astype("float32")
    for x64 in False, True:
        with jax.enable_x64(x64):
            state, rates = None, []
            for _ in range(60):
                eta, state = rate_of("exact", h, np.ones(size), state=state, words={"iterations": 2}, sigma=2.0)
                rates.append(eta)
        assert rates[40:] == pytest.approx([2 / np.linalg.eigvalsh(h.astype(float))[-1]] * 20, rel=1e-3)


def test_exact_waits_for_its_eigenvector_and_stays_put_where_the_largest_eigenvalue_is_negative():
    with jax.enable_x64(True):
        eta, (_, found) = rate_of("exact", A, ONES, words={"iterations": 1}, sigma=2.0)
        assert eta == 0 and not found
        state = None
        for _ in range(5):
            eta, state = rate_of("exact", -A, ONES, state=state, sigma=2.0)
            assert eta == 0


def test_polyak_reaches_the_minimum_of_a_line_in_one_step():
    w, g = jnp.array([7.0]), jnp.array([1.0])  # f(w) = |w|
    for numbers, eta in ({"lr_max": 100.0}, 7), ({"lr_max": 3.0}, 3), ({"f_min": 8.0}, 0):  # 8: f is below its least
        assert float(rivals.polyak(**numbers).rate((), None, w, w[0], g, -g)[0]) == eta


def test_a_word_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="'steps'.*constant, linear, cosine"):
        rivals.schedule(10, decay="steps")
    with pytest.raises(ValueError, match="'fisher'.*hessian, gauss-newton"):
        tuners.greedy(curvature="fisher")


# --- The linesearch.


def test_a_trial_that_is_not_finite_is_refused():
    searches = [
        (lambda w: w - jnp.log(w), 3.0, -20.0, "nan"),
        (lambda w: jnp.exp(w**2), 2.0, -100.0, "inf"),
        (lambda w: jnp.log(jnp.abs(w)), 1.0, -1.0, "-inf"),
    ]
    search = lambda f, w, u: tuners.linesearch().rate(jnp.zeros(()), f, w, *jax.value_and_grad(f)(w), u)[0]
    etas = jit(lambda: [search(f, jnp.float32(w), jnp.float32(u)) for f, w, u, _ in searches])()
    for eta, (f, w, u, bad) in zip(etas, searches):
        assert str(f(jnp.float32(w + u))) == bad
        assert 0 < eta < 1 and -np.inf < f(w + eta * u) < f(w)


@pytest.mark.parametrize("grow", [1.0, 4.0, np.inf])
def test_a_search_that_finds_nothing_takes_no_step_and_the_next_one_starts_afresh(grow):
    numbers = {"grow": grow, "max_trials": 20, "lr_max": 0.05}
    eta, state = rate_of("linesearch", A, ONES, u=A @ ONES, **numbers)  # uphill
    assert eta == 0 and state == 0
    eta, state = rate_of("linesearch", np.nan * A, ONES, state=state, **numbers)
    assert eta == 0 and state == 0
    eta, state = rate_of("linesearch", A, ONES, state=state, **numbers)
    assert eta == np.float32(0.05) == state


@pytest.mark.parametrize("grow, second", [(2.0, 0.5), (8.0, 1.0), (np.inf, 1.0)])
def test_a_search_grows_from_the_last_rate_up_to_lr_max(grow, second):
    eta, state = rate_of("linesearch", [[7.0]], [1.0], shrink=0.5, grow=grow)
    assert eta == 0.25
    assert rate_of("linesearch", [[0.1]], [1.0], state=state, shrink=0.5, grow=grow)[0] == second


@pytest.mark.parametrize("max_trials, eta", [(1, 0.0), (2, 0.0), (3, 0.25), (4, 0.25)])
def test_a_search_ends_after_max_trials(max_trials, eta):
    assert rate_of("linesearch", [[7.0]], [1.0], shrink=0.5, max_trials=max_trials)[0] == eta  # 1 and 0.5 overshoot


# --- Dead ends: what cannot be answered moves nothing and spoils nothing.

NUMBERS = {"constant": {"lr": 0.05}, "schedule": {"lr": 0.05}, "cdat": {"sigma": 1.0, "beta": 0.5},
           "polyak": {"lr_max": 0.1}, "hypergradient": {"lr": 0.05}, "exact": {"sigma": 0.5},
           "feedback": {"sigma_high": 1.5}, "dog": {"reach": 0.01}, "ngn": {"lr": 0.05}}  # fmt: skip
WORDS = {"feedback": {"curvature": "hessian"}}  # for a loss in one piece
PAIRS = [*(("gd", name) for name in TUNERS), *((name, "greedy") for name in gd.OPTIMIZERS if name != "gd")]


KINDS = [*((*pair, WORDS.get(pair[1], {})) for pair in PAIRS), ("gd", "cdat", {"every": 30})]


@pytest.mark.parametrize("optimizer, tuner, words", KINDS)
def test_a_batch_without_gradient_or_curvature_leaves_later_steps_usable(optimizer, tuner, words):
    def f(w, batch):
        h, b, least, kink, at = batch
        return w @ (h * w) / 2 + b @ w + least + kink * jnp.sum(jnp.abs(w - at) ** 1.5)

    steps = {"steps": 20} if tuner == "schedule" else {}
    rule, direction = TUNERS[tuner](**steps, **NUMBERS.get(tuner, {}), **words), gd.OPTIMIZERS[optimizer]()
    step = jit(gd.make_step(f, direction, rule))
    spectrum, w = np.float32([0.1, 0.2, 0.3, 0.4]), np.float32([1, -1, 1, -1])
    no, far = 0 * w, 0 * w + 99
    flat, linear, good = (no, no, 1.0, 0.0, far), (no, w / 2, 1.0, 0.0, far), (spectrum, no, 1.0, 0.0, far)
    quadratic_model = tuner in ("greedy", "cdat", "exact", "feedback")  # then nothing moves where there is none

    carry = gd.init_carry(jnp.asarray(w), direction, rule)
    for least in 1.0, 1.0, 0.0:
        if least or tuner in NUMBERS:  # f = 0 as well, of which not every rule can be asked
            carry, metrics = step(carry, (*flat[:2], least, *flat[3:]))  # g = 0
            assert np.isfinite(metrics["learning_rate"]) and np.array_equal(carry.w, w)
    carry, metrics = step(carry, linear)  # g ≠ 0, uᵀHu = 0
    assert np.isfinite(metrics["learning_rate"]) and np.isfinite(carry.w).all()
    if quadratic_model:
        assert metrics["learning_rate"] == 0 and np.array_equal(carry.w, w)
    carry, metrics = step(carry, (no, w / 2, 1.0, 1.0, np.array(carry.w)))  # the same, but the curvature is 0 · ∞
    assert np.isfinite(metrics["learning_rate"]) and np.isfinite(carry.w).all()
    if quadratic_model:
        assert metrics["learning_rate"] == 0 and np.array_equal(carry.w, w)
    before = f(carry.w, good)
    for _ in range(20):
        carry, metrics = step(carry, good)
    assert np.isfinite(carry.w).all() and f(carry.w, good) < before


def test_feedback_that_always_resets_is_greedy_and_one_that_never_does_is_cdat_where_each_weight_goes_down():
    with jax.enable_x64(True):
        for optimizer, tolerance, sigma in ("gd", -1.0, 1.0), ("gd", 1e9, 1.7), ("rmsprop", 1e9, 1.7):
            plain = train(MINI, optimizer, "cdat", {}, {"sigma": sigma})
            numbers = {"sigma_high": 1.7, "tolerance": tolerance, "growth": np.inf}
            ours = train(MINI, optimizer, "feedback", {}, numbers, curvature="hessian")
            np.testing.assert_allclose([now.eta for now in ours], [now.eta for now in plain], rtol=1e-8)


@pytest.mark.parametrize(
    "u, share", [((-1, -1, 2, 0), 1), ((-7, -0.1, 3, 1), 1), ((-3, 1, 0, 5), 0.5), ((-3, 2, 0, 0), 0.2)]
)
def test_feedback_overshoots_by_the_square_of_the_share_of_the_slope_that_goes_down(u, share):
    where = dict(b=A @ ONES - np.array([1, 1, -2, 0]), u=np.array(u, float))  # the gradient is (1, 1, −2, 0)
    eta, _ = rate_of("feedback", A, ONES, value=1.0, words=WORDS["feedback"], **where)
    assert eta == pytest.approx((1 + 1.02 * share**2) * rate_of("greedy", A, ONES, **where)[0], 1e-5)


def test_feedback_averages_nothing_where_what_goes_uphill_may_be_rounding():
    where = dict(b=A @ ONES - np.array([1, 1, -2, 0]), u=np.array([-1, 1e-5, 2, 0]))
    *state, (n, d, held, t) = TUNERS["feedback"]().init(np.float32(ONES))
    state = *state, (n + 1e30, d + 1e30, held, t)
    eta, _ = rate_of("feedback", A, ONES, state=state, value=1.0, words=WORDS["feedback"], **where)
    assert eta == pytest.approx(2.02 * rate_of("greedy", A, ONES, **where)[0], 1e-5)


def test_feedback_goes_on_at_the_fastest_growth_where_the_curvature_underflows_to_0():
    eta, state = rate_of("feedback", A, ONES, value=1.0, words=WORDS["feedback"])
    flat, _ = rate_of("feedback", 0 * A, ONES, b=np.ones(4), state=state, value=1.0, words=WORDS["feedback"])
    assert flat == pytest.approx(1.5 * eta)


def test_feedback_forgets_a_loss_that_is_not_a_number():
    _, state = rate_of("feedback", A, ONES, value=7.0, words=WORDS["feedback"])
    assert state[0] == 7
    for bad in np.nan, np.inf:
        assert rate_of("feedback", A, ONES, state=state, value=bad, words=WORDS["feedback"])[1][0] == 7


# --- In other people's loops.

LINE = lambda w: jnp.sum(w["a"] ** 2) + jnp.sum(jnp.cosh(w["b"]))
AT = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}


def each(name, **numbers):
    """A tuner, and what it says of LINE at AT for u = −g."""
    steps = {"steps": 20} if name == "schedule" else {}
    rule = TUNERS[name](**steps, **numbers)
    value, g = jax.value_and_grad(LINE)(AT)
    return rule, value, g, jax.tree.map(jnp.negative, g)


@pytest.mark.parametrize("name", ["greedy", "cdat"])
def test_the_length_of_the_direction_cancels_in_the_step(name):
    rule, value, g, u = each(name)
    steps = []
    for scale in 1e-3, 1.0, 1e3:
        scaled = jax.tree.map(lambda u: scale * u, u)
        eta, _ = rule.rate(rule.init(AT), LINE, AT, value, g, scaled)
        steps.append(jax.tree.map(lambda u: eta * u, scaled))
    for step in steps[1:]:
        for ours, theirs in zip(jax.tree.leaves(step), jax.tree.leaves(steps[0])):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("words", [{}, {"curvature": "gauss-newton"}, {"every": 2}])
def test_devices_take_the_step_of_the_whole_batch_where_f_is_the_mean_over_them(words):
    spread = lambda fn: jax.vmap(fn, (None, 0), axis_name="devices")  # as pmap does; see test_train.py for real devices
    assert_devices_agree_where_f_is_the_mean(*steps_on_two_devices(spread, **words))


@pytest.mark.parametrize("name", TUNERS)
def test_eta_and_state_have_the_dtype_of_w_whatever_that_of_data_and_numbers(name):
    with jax.enable_x64(True):
        w, data = jnp.ones(3, jnp.float32), jnp.arange(6.0).reshape(2, 3)
        assert data.dtype == "float64"
        numbers = {key: np.float64(value) for key, value in NUMBERS.get(name, {}).items()}
        rule = TUNERS[name](**({"steps": 9} if name == "schedule" else {}), **numbers, **WORDS.get(name, {}))
        carry = gd.init_carry(w, gd.gd(), rule)
        step = gd.make_step(lambda w, data: jnp.mean((data @ w - 1) ** 2), gd.gd(), rule)
        one = jit(lambda carry, _: step(carry, data))
        end, metrics = jax.lax.scan(one, carry, length=3)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves((end, metrics["learning_rate"]))]
    assert dtypes == [leaf.dtype for leaf in jax.tree.leaves((carry, jnp.float32(0)))]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32", "complex64"])
@pytest.mark.parametrize("name", TUNERS)
def test_parameters_that_are_neither_float32_nor_float64_are_refused_in_one_line(name, dtype):
    w = {"a": jnp.ones(2, dtype), "b": jnp.ones(2)}
    rule, value, g, u = each(name)
    both = " and ".join(sorted([dtype, "float32"]))
    with pytest.raises(TypeError, match=f"w must be float32 or float64, not {both}") as refused:
        rule.rate(rule.init(w), LINE, w, value, g, u)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["linesearch", "greedy", "cdat", "feedback"])
def test_a_loss_with_auxiliary_output_is_refused_in_one_line_that_says_what_to_give(name):
    rule, value, g, u = each(name, **WORDS.get(name, {}))
    for f in lambda w: (LINE(w), "more"), lambda w: LINE(w) * jnp.ones(2):
        with pytest.raises(TypeError, match=r"one number.*lambda w: f\(w\)\[0\]"):
            rule.rate(rule.init(AT), f, AT, value, g, u)


def test_a_loss_with_a_custom_vjp_has_a_curvature_by_its_hessian_product():
    cube = jax.custom_vjp(lambda w: w**3)
    cube.defvjp(lambda w: (w**3, w), lambda w, c: (3 * w**2 * c,))
    f, w, u = lambda w: jnp.sum(cube(w)), jnp.array([1.0, 2.0]), jnp.array([1.0, -1.0])
    with pytest.raises((TypeError, NotImplementedError)):  # by version of JAX
        tuners.curvature(f, w, u)
    assert float(tuners.dot(u, jax.jvp(jax.grad(f), (w,), (u,))[1])) == 18


def test_a_rate_that_saturation_brought_to_0_comes_back_under_lr_max():
    f = lambda w, _: (2 * jax.nn.softplus(-w) + jax.nn.softplus(w)) / 3  # cross-entropy of three samples of one pixel
    losses, rates = {}, {}
    for lr_max in np.inf, 10.0:
        rule = tuners.cdat(lr_max=lr_max)
        step, carry = jit(gd.make_step(f, gd.gd(), rule)), gd.init_carry(jnp.zeros(()), gd.gd(), rule)
        logged = []
        for _ in range(60):
            carry, metrics = step(carry, None)
            logged.append((float(metrics["loss"]), float(metrics["learning_rate"])))
        losses[lr_max], rates[lr_max] = np.array(logged).T
    assert losses[np.inf].max() > 100 and rates[np.inf][-1] == 0
    assert losses[10.0][-1] < 1 and 0 < rates[10.0].max() <= 10

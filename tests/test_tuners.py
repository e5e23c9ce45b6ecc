"""Facts about the tuners: their rates as plain numpy computes them, closed forms on quadratics, and dead ends."""

import doctest
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gd import DIRECTIONS, FULL, MINI, assert_same_training, jit, train, train_by_hand

import gd
import tuners
from tuners import TUNERS

# --- Rates by hand: η from the records of all steps so far (see train_by_hand).


def constant(past, lr):
    return lr


def schedule(past, lr, steps, warmup=0.1, decay="cosine"):
    t, rise = len(past) - 1, warmup * steps
    if t < rise:
        return lr * t / rise
    left = (steps - t) / (steps - rise)
    return lr * {"constant": 1, "linear": left, "cosine": np.sin(np.pi / 2 * left) ** 2}[decay]


def linesearch(past, slope=1e-4, slack=0.0, shrink=0.8, grow=4.0, lr_max=1.0, max_trials=1000):
    now, last = past[-1], past[-2].taken if len(past) > 1 else 0
    guess = min(grow * last, lr_max) if last > 0 else lr_max
    for eta in guess * shrink ** np.arange(max_trials):
        if now.f(now.w + eta * now.u) <= (1 + slack) * now.loss + slope * eta * now.g @ now.u:
            return eta
    return 0.0


def cdat(past, sigma=2.0, beta=0.0, eps=0.0):
    weights = beta ** np.arange(len(past))[::-1]
    n = weights @ [max(-now.g @ now.u, 0) for now in past]
    d = weights @ [abs(now.u @ now.h @ now.u) + eps for now in past]
    return sigma * n / d


def polyak(past, f_min=0.0, lr_max=1.0):
    return min((past[-1].loss - f_min) / np.linalg.norm(past[-1].g) ** 2, lr_max)


def hypergradient(past, lr, rate=0.1):
    for before, after in zip(past, past[1:]):
        lr *= 1 - rate * after.g @ before.u / np.linalg.norm(after.g) / np.linalg.norm(before.u)
    return lr


def feedback(past, sigma_high=2.5, tolerance=0.05, average=0.9, beta=0.0):
    losses = [now.loss for now in past]
    weights = average ** np.arange(len(losses))[::-1] * np.append(1, np.full(len(losses) - 1, 1 - average))
    return cdat(past, 1.0 if losses[-1] > (1 + tolerance) * weights @ losses else sigma_high, beta)


RATES = {
    "constant": constant,
    "schedule": schedule,
    "linesearch": linesearch,
    "greedy": partial(cdat, sigma=1.0),
    "cdat": cdat,
    "polyak": polyak,
    "hypergradient": hypergradient,
    "feedback": feedback,
}
SETTINGS = [
    ("constant", {"lr": 0.3}),
    *[("schedule", {"lr": 0.3, "steps": 20, "warmup": 0.2, "decay": d}) for d in ("constant", "linear", "cosine")],
    *[
        ("linesearch", {"slope": slope, "slack": slack, "shrink": shrink, "grow": grow})
        for slope, slack in ((0.0, 0.0), (0.0, 1e-3), (1e-4, 0.0), (0.5, 0.0))
        for shrink in (0.8, 0.9)
        for grow in (4.0, np.inf)
    ],
    ("linesearch", {"max_trials": 30, "lr_max": 50.0}),
    ("greedy", {}),
    ("cdat", {}),
    ("cdat", {"beta": 0.9}),
    ("cdat", {"sigma": 0.5, "beta": 0.5, "eps": 0.1}),
    ("polyak", {}),
    ("polyak", {"f_min": 0.05, "lr_max": 0.2}),
    ("hypergradient", {"lr": 0.1}),
    ("hypergradient", {"lr": 0.1, "rate": 0.5}),
    ("feedback", {}),
    ("feedback", {"sigma_high": 1.5, "tolerance": 0.0, "average": 0.5, "beta": 0.5}),
]


CASES = [(*setting, optimizer) for optimizer in ("gd", "momentum", "adam") for setting in SETTINGS
         if optimizer == "gd" or setting[0] != "linesearch" or setting[1].get("shrink") != 0.8]  # fmt: skip


@pytest.mark.parametrize("batches", [FULL, MINI], ids=["full", "mini"])
@pytest.mark.parametrize("name, numbers, optimizer", CASES)
def test_20_steps_are_those_of_plain_numpy(name, numbers, optimizer, batches):
    decay = {key: value for key, value in numbers.items() if key == "decay"}
    with jax.enable_x64(True):
        ours = train(batches, optimizer, name, ({}, {k: v for k, v in numbers.items() if k not in decay}), **decay)
    rate = partial(RATES[name], **numbers)
    assert_same_training(ours, train_by_hand(batches, DIRECTIONS[optimizer], rate, beside=ours))


@pytest.mark.parametrize("batches, iterations, tol", [(FULL, 5, 1e-3), (MINI, 10, 1e-2)], ids=["full", "mini"])
@pytest.mark.parametrize("optimizer", ["gd", "momentum", "adam"])
def test_exact_is_sigma_over_the_sharpness(optimizer, batches, iterations, tol):
    with jax.enable_x64(True):
        ours = train(batches, optimizer, "exact", ({}, {"sigma": 0.1}), iterations=iterations)
    theirs = train_by_hand(batches, DIRECTIONS[optimizer], lambda past: np.nan, beside=ours)
    for t, (now, h) in enumerate(zip(ours, [record.h for record in theirs], strict=True)):
        second, top = np.linalg.eigvalsh(h)[-2:]
        v = np.append(*map(now.state[0].get, ("bias", "weight")))
        rho = v @ h @ v / (v @ v)
        residual = np.linalg.norm(h @ v - rho * v) / np.linalg.norm(v)
        assert now.eta == pytest.approx(0.1 / rho, 1e-8)
        assert rho <= top * (1 + 1e-12)
        if rho > second:  # Temple and Kato: how far below the top a unit vector of that residual can be
            assert top - rho <= residual**2 / (rho - second) + 1e-9 * top
        assert t < 5 or now.eta * top == pytest.approx(0.1, tol)  # after the start


# --- Closed forms.

RNG = np.random.default_rng(1)
A = RNG.normal(size=(4, 4))
A, B = A @ A.T + np.eye(4), RNG.normal(size=4)  # f(w) = ½ wᵀAw − Bᵀw
VALUES, VECTORS = np.linalg.eigh(A)
INDEFINITE = VECTORS @ np.diag([-9.0, -1.0, 2.0, 4.0]) @ VECTORS.T


def quadratic(a, b=0.0):
    return lambda w: w @ jnp.asarray(a) @ w / 2 - jnp.sum(b * w)


def rate_of(tuner, f, w, u=None, state=None):
    """(η, state) of one call at w, for gradient descent unless u is given."""

    def rate(w, state):
        value, g = jax.value_and_grad(f)(w)
        return tuner.rate(tuner.init(w) if state is None else state, f, w, value, g, -g if u is None else jnp.asarray(u))

    return jit(rate)(jnp.asarray(w), state)


def test_sigma_1_is_exact_line_search_and_sigma_2_leaves_a_quadratic_as_high_as_it_was():
    w = RNG.normal(size=4)
    u = B - A @ w
    height = lambda eta: (w + eta * u) @ A @ (w + eta * u) / 2 - B @ (w + eta * u)
    with jax.enable_x64(True):
        greedy, _ = rate_of(tuners.greedy(), quadratic(A, B), w)
        edge, _ = rate_of(tuners.cdat(sigma=2.0), quadratic(A, B), w)
    assert u @ (A @ (w + float(greedy) * u) - B) == pytest.approx(0, abs=1e-10)  # no slope is left along u
    assert height(float(edge)) == pytest.approx(height(0), 1e-12)
    assert float(edge) == pytest.approx(2 * u @ u / (u @ A @ u), 1e-12)


@pytest.mark.parametrize("tuner", ["cdat", "exact"])
@pytest.mark.parametrize("sigma", [1.0, 1.9375, 2.0, 3.0])
def test_on_the_top_eigenvector_the_rate_is_sigma_over_the_sharpness(tuner, sigma):
    with jax.enable_x64(True):
        rule = TUNERS[tuner](sigma=sigma)
        eta, state = rate_of(rule, quadratic(A), 0.1 * VECTORS[:, -1])
        for _ in range(3 if tuner == "exact" else 0):  # it converges over the steps
            eta, state = rate_of(rule, quadratic(A), 0.1 * VECTORS[:, -1], state=state)
    assert float(eta) == pytest.approx(sigma / VALUES[-1], 1e-8)


def test_where_the_curvature_is_negative_its_size_counts_and_uphill_nothing_moves():
    with jax.enable_x64(True):
        for rule, sigma in (tuners.greedy(), 1), (tuners.cdat(2.0), 2), (tuners.cdat(2.0, eps=81.0), 1.8):
            assert float(rate_of(rule, quadratic(INDEFINITE), VECTORS[:, 0])[0]) == pytest.approx(sigma / 9, 1e-12)
        uphill = A @ VECTORS[:, 0]
        assert float(rate_of(tuners.cdat(), quadratic(A), VECTORS[:, 0], u=uphill)[0]) == 0


@pytest.mark.parametrize("size", [1, 2, 3])
def test_exact_stays_on_the_top_eigenvalue_once_it_has_converged(size):
    """Then v turns no further: what is left of Hv beside v is rounding."""
    for dtype in "float32", "float64":
        h = RNG.normal(size=(size, size)).astype(dtype)
        h = h @ h.T + np.eye(size, dtype=dtype)
        top = np.linalg.eigvalsh(h.astype(float))[-1]
        with jax.enable_x64(dtype == "float64"):
            rule, w, f = tuners.exact(2.0), jnp.ones(size, dtype), quadratic(h)
            rate = jit(lambda state, w: rule.rate(state, f, w, None, None, None))
            state = rule.init(w)
            rates = []
            for _ in range(60):
                eta, state = rate(state, w)
                rates.append(float(eta))
        assert rates[40:] == pytest.approx([2 / top] * 20, rel=1e-3)


def test_exact_waits_for_its_eigenvector_and_stays_put_where_the_largest_eigenvalue_is_negative():
    with jax.enable_x64(True):
        eta, (_, found) = rate_of(tuners.exact(2.0, iterations=1), quadratic(A), np.ones(4))
        assert eta == 0 and not found
        rule, state = tuners.exact(2.0), None
        for _ in range(5):
            eta, state = rate_of(rule, quadratic(-A), np.ones(4), state=state)
            assert eta == 0


def test_polyak_reaches_the_minimum_of_a_line_in_one_step():
    f = lambda w: jnp.abs(w[0])
    assert float(rate_of(tuners.polyak(lr_max=100.0), f, np.float32([7.0]))[0]) == 7
    assert float(rate_of(tuners.polyak(lr_max=3.0), f, np.float32([7.0]))[0]) == 3
    assert float(rate_of(tuners.polyak(f_min=8.0), f, np.float32([7.0]))[0]) == 0  # below the least loss


def test_a_schedule_of_no_known_shape_is_refused():
    with pytest.raises(ValueError, match="'steps'.*constant, linear, cosine"):
        tuners.schedule(0.1, 10, decay="steps")


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


# --- The linesearch.


@pytest.mark.parametrize("numbers", [numbers for name, numbers in SETTINGS if name == "linesearch"])
def test_linesearch_accepts_the_first_rate_that_descends_enough(numbers):
    slope, slack, shrink = (numbers.get(key, value) for key, value in (("slope", 1e-4), ("slack", 0), ("shrink", 0.8)))
    with jax.enable_x64(True):
        ours = train(FULL, "gd", "linesearch", ({}, numbers))
    last = 0
    for now in train_by_hand(FULL, DIRECTIONS["gd"], lambda past: np.nan, beside=ours):
        accepts = lambda eta: now.f(now.w + eta * now.u) <= (1 + slack) * now.loss + slope * eta * now.g @ now.u  # (26)
        guess = min(numbers.get("grow", 4.0) * last if last else np.inf, numbers.get("lr_max", 1.0))
        assert accepts(now.taken) and 0 < now.taken <= guess
        assert now.taken == pytest.approx(guess) or not accepts(now.taken / shrink)
        last = now.taken


@pytest.mark.parametrize(
    "f, w, u, bad",
    [
        (lambda w: w - jnp.log(w), 3.0, -20.0, "nan"),
        (lambda w: jnp.exp(w**2), 2.0, -100.0, "inf"),
        (lambda w: jnp.log(jnp.abs(w)), 1.0, -1.0, "-inf"),
    ],
)
def test_a_trial_that_is_not_finite_is_refused(f, w, u, bad):
    assert str(f(jnp.float32(w + u))) == bad
    eta, _ = rate_of(tuners.linesearch(), f, np.float32(w), np.float32(u))
    assert 0 < eta < 1 and -np.inf < f(w + eta * u) < f(w)


@pytest.mark.parametrize("grow", [1.0, 4.0, np.inf])
def test_a_search_that_finds_nothing_takes_no_step_and_the_next_one_starts_afresh(grow):
    f, tuner = quadratic(A), tuners.linesearch(grow=grow, max_trials=20, lr_max=0.05)
    w = np.ones(4, np.float32)
    eta, state = rate_of(tuner, f, w, u=A @ w)  # uphill
    assert eta == 0 and state == 0
    eta, state = rate_of(tuner, lambda w: jnp.nan * f(w), w, state=state)
    assert eta == 0 and state == 0
    eta, state = rate_of(tuner, f, w, state=state)
    assert eta == np.float32(0.05) == state


@pytest.mark.parametrize("grow, second", [(2.0, 0.5), (8.0, 1.0), (np.inf, 1.0)])
def test_a_search_grows_from_the_last_rate_up_to_lr_max(grow, second):
    tuner = tuners.linesearch(shrink=0.5, grow=grow)
    steep, flat = (quadratic(np.float32([[h]])) for h in (7.0, 0.1))
    eta, state = rate_of(tuner, steep, np.ones(1, np.float32))
    assert eta == 0.25
    assert rate_of(tuner, flat, np.ones(1, np.float32), state=state)[0] == second


@pytest.mark.parametrize("max_trials, eta", [(1, 0.0), (2, 0.0), (3, 0.25), (4, 0.25)])
def test_a_search_ends_after_max_trials(max_trials, eta):
    tuner = tuners.linesearch(shrink=0.5, max_trials=max_trials)  # 1 and 0.5 overshoot
    assert rate_of(tuner, quadratic(np.float32([[7.0]])), np.ones(1, np.float32))[0] == eta


# --- Dead ends: what cannot be answered moves nothing and spoils nothing.

RULES = {
    "constant": tuners.constant(0.05),
    "schedule": tuners.schedule(0.05, 20),
    "linesearch": tuners.linesearch(),
    "greedy": tuners.greedy(),
    "cdat": tuners.cdat(sigma=1.0, beta=0.5),
    "polyak": tuners.polyak(lr_max=0.1),
    "hypergradient": tuners.hypergradient(0.05),
    "exact": tuners.exact(0.5),
    "feedback": tuners.feedback(sigma_high=1.5),
}


@pytest.mark.parametrize("optimizer", ["gd", "adam"])
@pytest.mark.parametrize("name", TUNERS)
def test_a_batch_without_gradient_or_curvature_leaves_later_steps_usable(name, optimizer):
    def loss(w, batch):
        h, b = batch
        return w @ (h * w) / 2 + b @ w

    rule, direction = RULES[name], gd.OPTIMIZERS[optimizer]()
    step = jit(gd.make_step(loss, direction, rule))
    spectrum, w = np.float32([1, 2, 3, 4]), np.float32([1, -1, 1, -1])
    flat, linear, good = (0 * w, 0 * w), (0 * w, w / 2), (spectrum, 0 * w)

    carry = gd.init_carry(jnp.asarray(w), direction, rule)
    for _ in range(2):
        carry, metrics = step(carry, flat)  # g = 0
        assert np.isfinite(metrics["learning_rate"]) and np.array_equal(carry.w, w)
    carry, metrics = step(carry, linear)  # g ≠ 0, uᵀHu = 0
    assert np.isfinite(metrics["learning_rate"]) and np.isfinite(carry.w).all()
    if name in ("greedy", "cdat", "exact", "feedback"):
        assert metrics["learning_rate"] == 0 and np.array_equal(carry.w, w)
    before = loss(carry.w, good)
    for _ in range(20):
        carry, metrics = step(carry, good)
    assert np.isfinite(carry.w).all() and loss(carry.w, good) < before


@pytest.mark.parametrize("name", ["greedy", "cdat", "exact", "feedback"])
def test_a_batch_whose_curvature_is_not_a_number_leaves_later_steps_usable(name):
    kink = lambda w: jnp.sum(jnp.abs(w - 1) ** 1.5) + jnp.sum(w)  # at 1 the gradient is 1, the curvature 0 · ∞
    w, rule = np.ones(4, np.float32), RULES[name]
    eta, state = rate_of(rule, kink, w)
    assert eta == 0
    for _ in range(5):
        eta, state = rate_of(rule, quadratic(np.float32(A)), w, state=state)
    assert 0 < eta < np.inf


def test_feedback_that_always_resets_is_greedy_and_one_that_never_does_is_cdat():
    with jax.enable_x64(True):
        plain = {sigma: train(MINI, "gd", "cdat", ({}, {"sigma": sigma})) for sigma in (1.0, 1.7)}
        for tolerance, sigma in (-1.0, 1.0), (1e9, 1.7):
            ours = train(MINI, "gd", "feedback", ({}, {"sigma_high": 1.7, "tolerance": tolerance}))
            assert [now.eta for now in ours] == [now.eta for now in plain[sigma]]


def test_feedback_forgets_a_loss_that_is_not_a_number():
    rule, f, w = tuners.feedback(), quadratic(np.float32(A)), jnp.ones(4)
    value, g = jax.value_and_grad(f)(w)
    _, state = rule.rate(rule.init(w), f, w, value, g, -g)
    for bad in jnp.nan, jnp.inf:
        _, after = rule.rate(state, f, w, bad, g, -g)
        assert after[0] == state[0] == value


def test_the_tables_above_miss_no_tuner():
    assert set(RULES) == set(RATES) | {"exact"} == set(TUNERS)


# --- The file itself.


def test_examples_in_docstrings_run():
    failed, attempted = doctest.testmod(tuners)
    assert attempted >= 30 and failed == 0

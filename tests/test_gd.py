"""Facts about the step: directions as numpy computes them, chunks, and what holds for every optimizer and tuner.

The first part is shared by the tests of the tuners and of the sharpness: one small problem, its derivatives
written out by hand, and training in plain numpy. It keeps every past gradient and sums over all of them where the
shipped code keeps a running average, so the two have no line in common.
"""

import doctest
from collections import Counter
from functools import cache, partial
from itertools import product
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit

import gd
import sharpness
import tuners
from gd import OPTIMIZERS
from tuners import TUNERS

# The problem: squared error of tanh(x·weight + bias). Not quadratic, not convex, and five parameters small.
DECAY = 0.1
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(3, 12, 4)), RNG.uniform(-1, 1, size=(3, 12))  # three batches of 12 samples
START = RNG.normal(size=5)  # the bias first
FULL = [(X[0], Y[0])] * 20  # the batches of 20 steps
MINI = [(X[t % 3], Y[t % 3]) for t in range(20)]


def loss(w, batch):
    x, y = batch
    output = jnp.tanh(x @ w["weight"] + w["bias"])
    return jnp.mean((output - y) ** 2) / 2 + DECAY / 2 * gd.dot(w, w)


def by_hand(w, batch):
    """Loss, gradient and Hessian of that problem."""
    x, y = np.column_stack([np.ones(len(batch[0])), batch[0]]), batch[1]
    output = np.tanh(x @ w)
    slope, off = 1 - output**2, output - y
    bend = slope**2 - 2 * output * slope * off
    h = x.T * bend @ x / len(y) + DECAY * np.eye(len(w))
    return np.mean(off**2) / 2 + DECAY / 2 * w @ w, x.T @ (off * slope) / len(y) + DECAY * w, h


# Directions by hand: (u, the diagonal of P) from all gradients so far, one a row.
def ages(gs):
    return np.arange(len(gs))[::-1, None]


def gd_by_hand(gs):
    return -gs[-1], np.ones(gs.shape[1])


def momentum_by_hand(gs, beta=0.9):
    return -np.sum(beta ** ages(gs) * gs, 0), np.ones(gs.shape[1])


def rmsprop_by_hand(gs, beta2=0.999, eps=1e-8):
    p = np.sqrt((1 - beta2) * np.sum(beta2 ** ages(gs) * gs**2, 0) + eps)
    return -gs[-1] / p, p


def adam_by_hand(gs, beta1=0.9, beta2=0.999, eps=1e-8):
    m, nu = (np.average(gs**k, 0, (b ** ages(gs))[:, 0]) for k, b in ((1, beta1), (2, beta2)))
    return -m / (np.sqrt(nu) + eps), np.sqrt(nu) + eps


DIRECTIONS = {"gd": gd_by_hand, "momentum": momentum_by_hand, "rmsprop": rmsprop_by_hand, "adam": adam_by_hand}


def train_by_hand(batches, direction, rate, beside=None):
    """A record a step; rate(past) -> η may look at all records, the last of which has no η yet.

    Beside the records of other training every step starts where that one did: chaos does not add up.
    """
    w, past = START, []
    for t, batch in enumerate(batches):
        now = SimpleNamespace(w=beside[t].w if beside else w)
        now.f = lambda w, batch=batch: by_hand(w, batch)[0]
        now.loss, now.g, now.h = by_hand(now.w, batch)
        past.append(now)
        now.u, now.p = direction(np.array([record.g for record in past]))
        now.eta = rate(past)
        now.taken = beside[t].eta if beside else now.eta
        w = now.after = now.w + now.eta * now.u
    return past


# The same by the shipped code.
NUMBERS = {  # what each tuner is tried with; all of these may be traced
    "constant": {"lr": 0.1},
    "schedule": {"lr": 0.1, "steps": 8, "warmup": 0.3},
    "linesearch": {"slope": 1e-3, "slack": 1e-3, "shrink": 0.7, "grow": 2.0, "lr_max": 0.9, "max_trials": 30},
    "greedy": {},
    "cdat": {"sigma": 0.9, "beta": 0.9, "eps": 1e-6},
    "polyak": {"f_min": 0.01, "lr_max": 0.2},
    "hypergradient": {"lr": 0.05, "rate": 0.2},
    "exact": {"sigma": 0.02},
    "feedback": {"sigma_high": 1.9, "tolerance": 0.01, "average": 0.8, "beta": 0.5},
}
BETAS = {"gd": {}, "momentum": {"beta": 0.8}, "rmsprop": {"beta2": 0.9}, "adam": {"beta1": 0.8, "eps": 1e-6}}
TRACES = Counter()


@cache
def step_with(optimizer, tuner, chunk_size=0, **not_numbers):
    """A jitted step whose numbers are arguments and whose carry is donated: one compilation serves all of them."""

    def step(carry, batch, numbers):
        TRACES.update([optimizer])
        rule = TUNERS[tuner](**numbers[1], **not_numbers)
        return gd.make_step(loss, OPTIMIZERS[optimizer](**numbers[0]), rule, chunk_size)(carry, batch)

    return jit(step, donate_argnums=0)


def pytree(w, dtype=float):
    return {"weight": jnp.array(w[1:], dtype), "bias": jnp.array(w[0], dtype)}


def flat(w):
    return np.append(w["bias"], w["weight"])


def train(batches, optimizer, tuner, numbers=({}, {}), chunk_size=0, **not_numbers):
    """A record a step."""
    step, past = step_with(optimizer, tuner, chunk_size, **not_numbers), []
    carry = gd.init_carry(pytree(START), OPTIMIZERS[optimizer](**numbers[0]), TUNERS[tuner](**numbers[1], **not_numbers))
    for batch in batches:
        now = SimpleNamespace(w=flat(carry.w))
        carry, metrics = step(carry, batch, numbers)
        now.after, now.u, now.state = flat(carry.w), flat(carry.u), jax.tree.map(np.array, carry.tuner)
        now.metrics = {name: float(value) for name, value in metrics.items()}
        now.eta = now.metrics["learning_rate"]
        past.append(now)
    return past


def assert_same_training(ours, theirs, rtol=1e-8):
    for name in "w", "u", "eta", "after":
        a, b = (np.array([getattr(now, name) for now in past]) for past in (ours, theirs))
        np.testing.assert_allclose(a, b, rtol, rtol * np.abs(b).max(), err_msg=name)


# --- The step and its directions.

VARIANTS = [
    ("gd", {}),
    ("momentum", {}),
    ("momentum", {"beta": 0.5}),
    ("rmsprop", {}),
    ("rmsprop", {"beta2": 0.9, "eps": 0.01}),
    ("adam", {}),
    ("adam", {"beta1": 0.7, "beta2": 0.95, "eps": 0.01}),
]


@pytest.mark.parametrize("batches", [FULL, MINI], ids=["full", "mini"])
@pytest.mark.parametrize("name, numbers", VARIANTS)
def test_20_steps_are_those_of_plain_numpy(name, numbers, batches):
    lr = {"rmsprop": 0.01}.get(name, 0.1)
    theirs = train_by_hand(batches, partial(DIRECTIONS[name], **numbers), lambda past: lr)
    with jax.enable_x64(True):
        ours = train(batches, name, "constant", (numbers, {"lr": lr}))
    assert_same_training(ours, theirs)


def test_metrics_are_measured_before_the_move_and_turn_is_a_cosine():
    rates = 0.3 * (1 - np.arange(20) / 20)
    theirs = train_by_hand(MINI, momentum_by_hand, lambda past: rates[len(past) - 1])
    with jax.enable_x64(True):
        numbers = {"lr": 0.3, "steps": 20, "warmup": 0.0}
        ours = train(MINI, "momentum", "schedule", ({}, numbers), decay="linear")
    length = np.linalg.norm
    for t, (now, eta, metrics) in enumerate(zip(theirs, rates, [record.metrics for record in ours], strict=True)):
        turn = now.u @ theirs[t - 1].u / length(now.u) / length(theirs[t - 1].u) if t else np.nan
        expected = {"loss": now.loss, "learning_rate": eta, "grad_norm": length(now.g), "turn": turn}
        assert metrics == pytest.approx(expected, rel=1e-8, nan_ok=True)


# --- Chunks.


@pytest.mark.parametrize("size", [0, 1, 4, 5, 12, 100])
def test_chunks_leave_loss_gradient_curvature_and_hessian_product_as_they_are(size):
    value, g, h = by_hand(START, FULL[0])
    v = np.linspace(-1, 2, 5)
    with jax.enable_x64(True):
        w, vector, batch = pytree(START), pytree(v), jax.tree.map(jnp.asarray, FULL[0])
        chunked = partial(gd.mean_over_chunks, size=size)
        f = lambda w: chunked(loss)(w, batch)
        product = lambda w, batch: sharpness.hvp(lambda w: loss(w, batch), w, vector)
        ours_value, ours_g = jit(chunked(jax.value_and_grad(loss)))(w, batch)
        uhu = jit(lambda w: tuners.curvature(f, w, vector))(w)
        hv = jit(chunked(product))(w, batch)
        chunked_value = jit(f)(w)
    close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
    close(ours_value, value), close(chunked_value, value), close(flat(ours_g), g)
    close(uhu, v @ h @ v), close(flat(hv), h @ v)


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("pair", [("gd", "linesearch"), ("momentum", "hypergradient"), ("adam", "cdat")])
def test_20_steps_in_chunks_are_20_steps(pair, size):
    numbers = BETAS[pair[0]], NUMBERS[pair[1]]
    with jax.enable_x64(True):
        assert_same_training(train(FULL, *pair, numbers, size), train(FULL, *pair, numbers), rtol=1e-11)


def test_a_batch_whose_arrays_differ_in_length_is_no_batch_of_chunks():
    mean = gd.mean_over_chunks(lambda w, batch: w * jnp.mean(batch[0]), 3)
    for other in (jnp.arange(20.0), jnp.ones(())):
        with pytest.raises(ValueError, match="equally long"):
            mean(1.0, (jnp.arange(7.0), other))


@pytest.mark.parametrize("name", ["gradient", "curvature", "product", "step with exact"])
def test_memory_in_chunks_does_not_grow_with_the_samples(optimized, name):
    sizes = [64, 128, 128, 10]
    w = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in zip(sizes, sizes[1:])]

    def mlp_loss(w, x):
        for layer in w:
            x = jnp.tanh(x @ layer)
        return jnp.mean(x**2)

    chunked = partial(gd.mean_over_chunks, size=256)
    fn = {
        "gradient": lambda w, v, x: chunked(jax.value_and_grad(mlp_loss))(w, x),
        "curvature": lambda w, v, x: tuners.curvature(lambda w: chunked(mlp_loss)(w, x), w, v),
        "product": lambda w, v, x: chunked(lambda w, x: sharpness.hvp(lambda w: mlp_loss(w, x), w, v))(w, x),
        "step with exact": lambda w, v, x: step(gd.init_carry(w, gd.gd(), tuners.exact()), x),
    }[name]
    step = gd.make_step(mlp_loss, gd.gd(), tuners.exact(), 256)

    def peak(samples):
        x = jax.ShapeDtypeStruct((samples, 64), jnp.float32)
        return jax.jit(fn).lower(w, w, x).compile().memory_analysis().temp_size_in_bytes

    assert 0 < peak(4096) <= 1.3 * peak(512)


# --- What holds for every optimizer with every tuner.

every_pair = pytest.mark.parametrize("optimizer, tuner", [*product(OPTIMIZERS, TUNERS)])


def start(optimizer, tuner, w, scale=1.0):
    """(carry, numbers), with floats `scale` times those above."""
    numbers = jax.tree.map(lambda x: scale * x if isinstance(x, float) else x, (BETAS[optimizer], NUMBERS[tuner]))
    return gd.init_carry(w, OPTIMIZERS[optimizer](**numbers[0]), TUNERS[tuner](**numbers[1])), numbers


@every_pair
def test_carry_keeps_structure_and_dtype(optimizer, tuner):
    kinds = partial(jax.tree.map, lambda a: (a.shape, a.dtype, a.weak_type))
    for x64, dtype in (False, "float32"), (True, "float64"), (True, "float32"):
        with jax.enable_x64(x64):
            carry, numbers = start(optimizer, tuner, pytree(START, dtype))
            batch = jax.tree.map(partial(jnp.asarray, dtype=dtype), FULL[0])
            after, metrics = jax.eval_shape(step_with(optimizer, tuner), carry, batch, numbers)
            assert kinds(after) == kinds(carry)
            assert {leaf.dtype.name for leaf in jax.tree.leaves((carry.w, carry.u, metrics))} == {dtype}


@every_pair
def test_a_donated_carry_gives_the_same_bits_twice_and_other_numbers_need_no_compilation(optimizer, tuner):
    def run(scale=1.0):
        carry, numbers = start(optimizer, tuner, pytree(START), scale)
        logged = []
        for batch in MINI[:6]:
            buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(carry)]
            assert len(set(buffers)) == len(buffers)
            previous = carry
            carry, metrics = step_with(optimizer, tuner)(carry, batch, numbers)
            assert previous.w["weight"].is_deleted()
            logged.append(metrics)  # read only after the carry beside it was given away
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((carry, logged))]

    TRACES.clear()
    with jax.enable_x64(True):
        once, again, other = run(), run(), run(0.9)
    assert once == again
    assert once != other or (optimizer, tuner) == ("gd", "greedy")  # which has no numbers
    assert TRACES.total() <= 1  # none where another test came first


@every_pair
def test_vmap_of_scan_with_fixed_numbers_is_a_loop_with_numbers_as_arguments(optimizer, tuner):
    starts = np.stack([START, START[::-1]])

    def scanned(w, batches):
        carry, numbers = start(optimizer, tuner, w)
        step = gd.make_step(loss, OPTIMIZERS[optimizer](**numbers[0]), TUNERS[tuner](**numbers[1]))
        return jax.lax.scan(step, carry, batches)

    with jax.enable_x64(True):
        batches = jax.tree.map(lambda *a: jnp.stack(a), *MINI[:4])
        w = jax.tree.map(lambda *a: jnp.stack(a), *map(pytree, starts))
        carries, logs = jit(jax.vmap(scanned, (0, None)))(w, batches)
        for i, w in enumerate(starts):
            carry, numbers = start(optimizer, tuner, pytree(w))
            for t, batch in enumerate(MINI[:4]):
                carry, metrics = step_with(optimizer, tuner)(carry, batch, numbers)
                for name, value in metrics.items():
                    np.testing.assert_allclose(logs[name][i, t], value, 1e-8, 1e-10)
            for together, alone in zip(jax.tree.leaves(carries), jax.tree.leaves(carry), strict=True):
                np.testing.assert_allclose(together[i], alone, 1e-8, 1e-10)


def test_the_tables_above_miss_no_tuner_and_no_optimizer():
    assert set(NUMBERS) == set(TUNERS) and set(BETAS) == set(DIRECTIONS) == set(OPTIMIZERS)


# --- The file itself.


def test_examples_in_docstrings_run():
    failed, attempted = doctest.testmod(gd)
    assert attempted >= 10 and failed == 0

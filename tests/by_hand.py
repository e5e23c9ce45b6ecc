"""What several files of tests share: one small problem with its derivatives written out by hand, training in plain
numpy, and the same training by the shipped code.

The numpy part keeps every past gradient and sums over all of them where the shipped code keeps a running average, so
the two have no line in common.
"""

from collections import Counter
from functools import cache, partial
from inspect import signature
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

import gd
from gd import OPTIMIZERS
from tuners import TUNERS, Composed, cdat

# The problem: squared error of tanh(x·weight + bias). Not quadratic, not convex, and five parameters small.
DECAY = 0.1
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(3, 12, 4)), RNG.uniform(-1, 1, size=(3, 12))  # three batches of 12 samples
START = RNG.normal(size=5)  # the bias first
FULL = [(X[0], Y[0])] * 20  # the batches of 20 steps
MINI = [(X[t % 3], Y[t % 3]) for t in range(20)]


loss = Composed(
    inner=lambda w, batch: jnp.tanh(batch[0] @ w["weight"] + w["bias"]),
    outer=lambda z, w, batch: (
        jnp.mean((z - batch[1]) ** 2) / 2 + DECAY / 2 * (jnp.sum(w["weight"] ** 2) + w["bias"] ** 2)
    ),
)


def derivatives(w, batch):
    """Loss, gradient and Hessian of that problem."""
    x, y = np.column_stack([np.ones(len(batch[0])), batch[0]]), batch[1]
    output = np.tanh(x @ w)
    slope, off = 1 - output**2, output - y
    bend = slope**2 - 2 * output * slope * off
    h = x.T * bend @ x / len(y) + DECAY * np.eye(len(w))
    return np.mean(off**2) / 2 + DECAY / 2 * w @ w, x.T @ (off * slope) / len(y) + DECAY * w, h


def gauss_newton(w, batch):
    """The Gauss-Newton matrix of that problem."""
    x = np.column_stack([np.ones(len(batch[0])), batch[0]])
    slope = 1 - np.tanh(x @ w) ** 2
    return x.T * slope**2 @ x / len(x) + DECAY * np.eye(len(w))


# Directions by hand: (u, the diagonal of P) from all gradients so far, one a row.
def ages(gs):
    return np.arange(len(gs))[::-1, None]


def gd_by_hand(gs):
    return -gs[-1], np.ones(gs.shape[1])


def momentum_by_hand(gs, momentum=0.9):
    return -np.sum(momentum ** ages(gs) * gs, 0), np.ones(gs.shape[1])


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
        now.f = lambda w, batch=batch: derivatives(w, batch)[0]
        now.loss, now.g, now.h = derivatives(now.w, batch)
        now.gauss_newton = gauss_newton(now.w, batch)
        past.append(now)
        now.u, now.p = direction(np.array([record.g for record in past]))
        now.eta = rate(past)
        now.taken = beside[t].eta if beside else now.eta
        w = now.after = now.w + now.eta * now.u
    return past


# The same by the shipped code.
TRACES = Counter()


def numbers_of(factory, given):
    """What may be traced among the arguments of an optimizer or tuner: as given, else its defaults."""
    known = {"steps": 20, "max_trials": 1000}  # that a run has by itself
    numbers = {name: known.get(name, option.default) for name, option in signature(factory).parameters.items()} | given
    return {name: value for name, value in numbers.items() if isinstance(value, float) or name in known}


@cache
def step_with(optimizer, tuner, chunk_size=0, **not_numbers):
    """A jitted step whose numbers are arguments and whose carry is donated: one compilation serves all of them."""

    def step(carry, batch, numbers):
        TRACES.update([optimizer])
        rule = TUNERS[tuner](**numbers[1], **not_numbers)
        return gd.make_step(loss, OPTIMIZERS[optimizer](**numbers[0]), rule, chunk_size)(carry, batch)

    return jax.jit(step, donate_argnums=0)


def pytree(w, dtype=float):
    return {"weight": jnp.array(w[1:], dtype), "bias": jnp.array(w[0], dtype)}


def flat(w):
    return np.append(w["bias"], w["weight"])


def train(batches, optimizer, tuner, of_optimizer={}, of_tuner={}, chunk_size=0, **not_numbers):
    """A record a step."""
    step, past = step_with(optimizer, tuner, chunk_size, **not_numbers), []
    numbers = numbers_of(OPTIMIZERS[optimizer], of_optimizer), numbers_of(TUNERS[tuner], of_tuner)
    rule = TUNERS[tuner](**numbers[1], **not_numbers)
    carry = gd.init_carry(pytree(START), OPTIMIZERS[optimizer](**numbers[0]), rule)
    for batch in batches:
        now = SimpleNamespace(w=flat(carry.w))
        carry, metrics = step(carry, batch, numbers)
        now.after, now.u, now.carry = flat(carry.w), flat(carry.u), jax.tree.map(np.array, carry)
        now.metrics = {name: float(value) for name, value in metrics.items()}
        now.eta = now.metrics["learning_rate"]
        past.append(now)
    return past


def assert_same_training(ours, theirs, rtol=1e-8):
    for name in "w", "u", "eta", "after":
        a, b = (np.array([getattr(now, name) for now in past]) for past in (ours, theirs))
        np.testing.assert_allclose(a, b, rtol, rtol * np.abs(b).max(), err_msg=name)


# A batch over two devices.
def own_step(w, batch, tuner, state, right):
    """ηu as each device takes it, of its own share of the batch; not right: with f as it has it."""
    mean = partial(jax.lax.pmean, axis_name="devices") if right else lambda value: value
    f = Composed(lambda w: jnp.tanh(batch @ w), lambda z, w: mean(jnp.mean((z - 1) ** 2)))
    value, g = jax.value_and_grad(f)(w)
    g = jax.lax.pmean(g, "devices")
    return tuner.rate(state, f, w, value, g, -g)[0] * -g


def steps_on_two_devices(spread, **words):
    """Of f as the mean over the devices, of f as each has it, and of the whole batch on one; words are options of
    cdat."""
    w, batch = jnp.array([0.5, -1.0]), jnp.array([[1.0, 2.0], [0.5, 0.1], [3.0, -1.0], [2.0, 2.0]])
    tuner = cdat(**words)
    steps = [spread(partial(own_step, tuner=tuner, state=tuner.init(w), right=right))(w, batch.reshape(2, 2, 2))
             for right in (True, False)]  # fmt: skip
    f = Composed(lambda w: jnp.tanh(batch @ w), lambda z, w: jnp.mean((z - 1) ** 2))
    value, g = jax.value_and_grad(f)(w)
    whole = tuner.rate(tuner.init(w), f, w, value, g, -g)[0] * -g
    return [np.asarray(step).tolist() for step in (*steps, whole)]


def assert_devices_agree_where_f_is_the_mean(mean, own, whole):
    np.testing.assert_allclose(mean, [whole, whole], rtol=1e-6)
    assert abs(own[0][0] / own[1][0] - 1) > 0.1

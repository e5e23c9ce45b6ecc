"""Gradient descent: where to step, and the step itself.

What this file teaches: every method here is the same loop,

    g  =  gradient of f at w
    u  =  a direction made from g        (an Optimizer: gd, momentum, rmsprop, adam)
    η  =  a learning rate                (a Tuner, from tuners.py or your own)
    w  =  w + η u

and only the two middle lines differ. `make_step` is that loop's body, written once. Before it stands what it is made
on: mini-batches, chunks of a batch, several devices, the losses of logits.

Symbols: w parameters (any pytree), f(w) training loss with the batch bound, g = ∇f(w), u the update direction
(it points downhill: gradient descent has u = −g), η the learning rate, P the preconditioner of u = −P⁻¹g.
Copying: this file needs JAX and numpy alone. Nothing here is jitted: jit the step you make (its carry can be donated).
Parameters are float32 or float64 (in half precision β₂ᵗ and ν lose their digits), and states keep their dtype, whatever
that of the hyperparameters. An optimizer's options have a line each in its docstring, which is also its flag's help.
Paper: Roulet et al. 2024, arXiv:2407.06183, Sections 2 and 4, Appendix B. Read next: tuners.py.
"""

import os
from pathlib import Path
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


class Optimizer(NamedTuple):
    """How the direction is made: three pure functions."""

    init: Callable  # init(w) -> state
    direction: Callable  # direction(state, g) -> (u, state)
    scale: Callable  # scale(state) -> P^(-1/2), a pytree like w, or None where P is the identity


class Carry(NamedTuple):
    """What one step hands to the next."""

    w: Any  # parameters
    optimizer: Any  # the optimizer's state
    tuner: Any  # the tuner's state
    u: Any  # the direction of the step just taken; zeros at first


def dot(a, b):
    """Inner product of two pytrees of one structure, a scalar."""
    # Not jnp.vdot: a matrix product may run in reduced precision on an accelerator, a sum does not.
    return sum(jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def norm(a):
    """Euclidean norm of a pytree, a scalar."""
    return jnp.sqrt(dot(a, a))


def combine(old, new, a, b):
    """a old + b new, for two pytrees, in the dtypes of the old one."""
    return jax.tree.map(lambda old, new: (a * old + b * new).astype(old.dtype), old, new)


def gd():
    """Gradient descent: u = −g.

    >>> optimizer = gd()
    >>> u, state = optimizer.direction(optimizer.init(jnp.ones(2)), jnp.array([1.0, -2.0]))
    >>> u.tolist()
    [-1.0, 2.0]
    """
    return Optimizer(
        init=lambda w: (),
        direction=lambda state, g: (jax.tree.map(jnp.negative, g), state),
        scale=lambda state: None,
    )


def momentum(momentum=0.9):
    """Heavy ball (Polyak 1964): m ← βm + g, u = −m. The state is m, like w.

    momentum: β, the decay of the sum of past g

    There is no factor 1 − β on g, so a learning rate here acts like one 1/(1 − β) times larger.

    >>> optimizer = momentum(0.5)
    >>> u, m = optimizer.direction(jnp.array([2.0]), jnp.array([1.0]))
    >>> u.tolist(), m.tolist()
    ([-2.0], [2.0])
    """

    def direction(m, g):
        m = combine(m, g, momentum, 1)
        return jax.tree.map(jnp.negative, m), m

    return Optimizer(init=lambda w: jax.tree.map(jnp.zeros_like, w), direction=direction, scale=lambda m: None)


def rmsprop(beta2=0.999, eps=1e-8):
    """RMSProp (Tieleman and Hinton 2012): ν ← β₂ν + (1 − β₂)g², u = −g/√(ν + ε). The state is ν, like w.

    beta2: β₂, the decay of the average of g²
    eps: ε, which keeps the division finite; it is added to g², not to |g|

    ν starts at zero and is not bias-corrected, so early directions are long: entries near ±√1000 at first, by default.

    >>> optimizer = rmsprop(beta2=0.75)
    >>> u, nu = optimizer.direction(jnp.array([0.0]), jnp.array([3.0]))
    >>> u.tolist(), nu.tolist()
    ([-2.0], [2.25])
    """

    def direction(nu, g):
        nu = combine(nu, jax.tree.map(jnp.square, g), beta2, 1 - beta2)
        return jax.tree.map(lambda nu, g: (-g / jnp.sqrt(nu + eps)).astype(g.dtype), nu, g), nu

    def scale(nu):
        return jax.tree.map(lambda nu: (nu + eps) ** -0.25, nu)  # P = diag(√(ν + ε))

    return Optimizer(lambda w: jax.tree.map(jnp.zeros_like, w), direction, scale)


def adam(beta1=0.9, beta2=0.999, eps=1e-8):
    """Adam (Kingma and Ba 2015), bias-corrected: u = −m̂/(√ν̂ + ε). The state is (m, ν, step count).

    m ← β₁m + (1 − β₁)g, ν ← β₂ν + (1 − β₂)g², m̂ = m/(1 − β₁ᵗ), ν̂ = ν/(1 − β₂ᵗ). ε stands outside the root.

    beta1: β₁, the decay of the average of g
    beta2: β₂, the decay of the average of g²
    eps: ε, which keeps the division finite

    >>> optimizer = adam()
    >>> u, state = optimizer.direction(optimizer.init(jnp.zeros(2)), jnp.array([4.0, -0.5]))
    >>> [round(x, 4) for x in u.tolist()]
    [-1.0, 1.0]
    """

    def init(w):
        zeros = lambda: jax.tree.map(jnp.zeros_like, w)
        return zeros(), zeros(), jnp.zeros((), jnp.result_type(*jax.tree.leaves(w)))  # so that β₁ᵗ has the dtype of w

    def direction(state, g):
        m, nu, t = state
        t = t + 1
        m = combine(m, g, beta1, 1 - beta1)
        nu = combine(nu, jax.tree.map(jnp.square, g), beta2, 1 - beta2)
        u = jax.tree.map(lambda m, p: (-m / (1 - beta1**t) / p).astype(m.dtype), m, preconditioner(nu, t))
        return u, (m, nu, t)

    def preconditioner(nu, t):
        return jax.tree.map(lambda nu: jnp.sqrt(nu / (1 - beta2**t)) + eps, nu)

    def scale(state):
        _, nu, t = state
        return jax.tree.map(lambda p: p**-0.5, preconditioner(nu, t))

    return Optimizer(init, direction, scale)


OPTIMIZERS = {f.__name__: f for f in (gd, momentum, rmsprop, adam)}


def mean_over_chunks(fn, size):
    """fn(w, batch) averaged over chunks of the batch of `size` samples: memory for one chunk, time for all.

    For any fn that is a mean (not a sum) over samples and returns a pytree: a loss, jax.value_and_grad of it, a
    Hessian-vector product. Wrap it *around* those: the gradient of a chunked loss saves as much memory, but has to
    compute each chunk's activations a second time. A smaller last chunk is weighted by its size; size 0 means the
    whole batch. ValueError unless all arrays of the batch have the samples along axis 0: bind keys and the like in fn.

    >>> mean = lambda w, x: w * jnp.mean(x)
    >>> float(mean_over_chunks(mean, 2)(2.0, jnp.array([1.0, 2.0, 6.0])))
    6.0
    """
    if not size:
        return fn

    def mean(w, batch):
        lengths = {a.shape[:1] for a in jax.tree.leaves(batch)}
        if len(lengths) != 1 or () in lengths:
            raise ValueError(f"the arrays of a batch must be equally long along axis 0, not {sorted(lengths)}")
        n = lengths.pop()[0]
        if n <= size:
            return fn(w, batch)

        def share(start, length):  # what the chunk that starts there adds to the mean
            chunk = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, length), batch)
            value = jax.checkpoint(fn)(w, chunk)  # else a gradient through the scan keeps the activations of all chunks
            return jax.tree.map(lambda value: value * (length / n), value)

        def add(total, start):
            return jax.tree.map(jnp.add, total, share(start, size)), None

        rest = n % size or size  # of the last chunk, which is where the sum starts
        last = share(n - rest, rest)
        return jax.lax.scan(add, last, size * jnp.arange((n - 1) // size))[0]

    return mean


def map_over_chunks(fn, size):
    """fn(w, batch) of a network, which maps each sample by itself, `size` samples at a time: all outputs, one chunk."""

    def mapped(w, batch):
        one = lambda sample: jax.tree.map(lambda a: a[0], fn(w, jax.tree.map(lambda a: a[None], sample)))
        return jax.lax.map(one, batch, batch_size=size)

    return mapped if size else fn


def batch(t, n, size, seed=0):
    """Which of n samples make up the mini-batch of step t: `size` indices, from (seed, t) alone.

    Each epoch takes the samples in another order; a remainder smaller than a batch is left out of it.

    >>> sorted(np.concatenate([batch(0, 4, 2), batch(1, 4, 2)]).tolist())
    [0, 1, 2, 3]
    """
    epoch, k = divmod(t, n // size)
    order = np.random.default_rng((seed, epoch)).permutation(n)
    return order[k * size : (k + 1) * size]


def over_devices(size):
    """How a batch of so many samples lies on the devices, and how all else does: two shardings; None on one device.

    The batch is split over the largest number of devices that divides it, all else is on each of them; given arrays
    that lie like that the compiler does the rest. ValueError where several processes would leave a device without
    samples.
    """
    devices = jax.devices()
    if len(devices) == 1:
        return None, None
    used = max(k for k in range(1, len(devices) + 1) if size % k == 0)
    if used < len(devices) and jax.process_count() > 1:
        raise ValueError(f"a batch of {size} samples cannot be laid evenly over {len(devices)} devices")
    mesh = jax.sharding.Mesh(np.array(devices[:used]), ("samples",))
    return NamedSharding(mesh, PartitionSpec("samples")), NamedSharding(mesh, PartitionSpec())


def set_up(distributed=None):
    """What JAX must know before it starts, unless its own variables say otherwise: where compiled programs are kept.

    distributed: [] or ["HOST:PORT", how many, which] for one of several processes, where a cluster does not say so.
    """
    if "device_count" in os.environ.get("XLA_FLAGS", ""):  # CPU devices wait for each other in one pool of threads,
        os.environ.setdefault("NPROC", "64")  # as many as there are cores: too few, and they wait for ever
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "stepping-on-the-edge")
    if not jax.config.jax_compilation_cache_dir and cache.is_absolute():  # it is not where a user has no home
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # keeps what was quick to compile, too
    if distributed is not None:
        try:
            address, count, which = distributed or (None, None, None)
            print(f"waiting for the processes of {address or 'the cluster'}", flush=True)
            jax.distributed.initialize(address, count and int(count), which and int(which))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"--distributed takes HOST:PORT HOW_MANY WHICH, or no word: {error}") from None


def mse(logits, y):
    """½‖z − onehot(y)‖², averaged over samples (and characters).

    >>> float(mse(jnp.array([[1.0, 0.0]]), jnp.array([1])))
    1.0
    """
    return 0.5 * jnp.mean(jnp.sum((logits - jax.nn.one_hot(y, logits.shape[-1], dtype=logits.dtype)) ** 2, -1))


def ce(logits, y):
    """−log softmax(z)[y], averaged over samples (and characters).

    >>> round(float(ce(jnp.zeros((1, 2)), jnp.array([1]))), 3)
    0.693
    """
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[..., None], -1))


LOSSES = {"mse": mse, "ce": ce}


def init_carry(w, optimizer, tuner):
    """What the first step is given: parameters, both states and a zero direction."""
    w = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), w)  # of a fixed dtype, as after a step
    return Carry(w, optimizer.init(w), tuner.init(w), jax.tree.map(jnp.zeros_like, w))


def make_step(loss, optimizer, tuner, chunk_size=0):
    """One step of gradient descent, w + ηu, as a pure function.

    loss(w, batch) -> scalar, a mean over the batch's samples, in two halves where the tuner needs f so (a
    tuners.Composed of w and batch); optimizer an Optimizer; tuner anything with init(w) -> state and
    rate(state, f, w, value, g, u) -> (η, state). Returns step(carry, batch) -> (carry, metrics). The metrics are
    scalars measured at w before it moves: loss f(w), learning_rate η, grad_norm ‖g‖, and turn, the cosine between this
    direction and the last (0 at the first step). Costs one gradient, and what the tuner asks of f.

    >>> from types import SimpleNamespace
    >>> half = SimpleNamespace(init=lambda w: (), rate=lambda state, f, w, value, g, u: (0.5, state))
    >>> loss = lambda w, batch: 0.5 * jnp.sum(w**2)
    >>> step = jax.jit(make_step(loss, gd(), half), donate_argnums=0)
    >>> carry = init_carry(jnp.array([1.0, 2.0]), gd(), half)
    >>> for _ in range(3):
    ...     carry, metrics = step(carry, None)
    >>> carry.w.tolist(), float(metrics["learning_rate"])
    ([0.125, 0.25], 0.5)
    """
    value_and_grad = mean_over_chunks(jax.value_and_grad(loss), chunk_size)

    def step(carry, batch):
        w, optimizer_state, tuner_state, u_last = carry
        f = lambda w: mean_over_chunks(loss, chunk_size)(w, batch)
        if hasattr(loss, "inner"):  # a loss in two halves: f gets its own, as attributes
            f.inner = lambda w: map_over_chunks(loss.inner, chunk_size)(w, batch)
            f.outer = lambda z, w: loss.outer(z, w, batch)
        value, g = value_and_grad(w, batch)
        u, optimizer_state = optimizer.direction(optimizer_state, g)
        eta, tuner_state = tuner.rate(tuner_state, f, w, value, g, u)
        lengths = norm(u) * norm(u_last)
        metrics = {
            "loss": value,
            "learning_rate": eta,
            "grad_norm": norm(g),
            "turn": dot(u, u_last) / jnp.where(lengths > 0, lengths, 1),
        }
        w = jax.tree.map(lambda w, u: (w + eta * u).astype(w.dtype), w, u)
        return Carry(w, optimizer_state, tuner_state, u), metrics

    return step

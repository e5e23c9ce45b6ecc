"""What it costs: FLOPs, memory and time of a step under each tuner, and of all that surrounds a step.

    python -m paper cost | tee paper/figures/cost.txt

What this file teaches: how to know that something is fast. FLOPs and memory are the compiler's own count and do not
depend on the machine; times are medians, and only ratios within one run are reported. A program's analysis counts the
body of a loop once, so a linesearch's trials are counted from its rates. Read next: experiments.py.
"""

import contextlib
import io
import os
import platform
import subprocess
import sys
import tempfile
import time
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import data
import gd
import models
import plots
import sharpness
import train
import tuners

FAMILIES = {  # model, options, shape of a sample, samples; on random data, which costs what real data does
    "linear": ("linear", dict(), (32, 32, 3), 2048),
    "mlp": ("mlp", dict(width=512, depth=2), (32, 32, 3), 2048),
    "cnn": ("cnn", dict(), (32, 32, 3), 128),
    "rnn": ("rnn", dict(), (64,), 64),
    "resnet": ("resnet", dict(width=8), (32, 32, 3), 64),
    "mixer": ("mixer", dict(), (32, 32, 3), 64),
    "vit": ("vit", dict(), (32, 32, 3), 64),
    "transformer": ("transformer", dict(), (64,), 64),
}
TUNERS = [*tuners.TUNERS]


def predicted(family, trials=1):
    """What counting says, in forward passes, of the parts and of a step under each tuner.

    A gradient is a forward pass and two products for each of its own, less the one for the gradient of the input: so
    less the first layer's share, known for dense networks, else counted as 0. Curvature carries t, t and t² forward,
    5 passes of which the gradient's is one. A Hessian-vector product is the gradient with a tangent, and its
    products have two terms each: 8.
    """
    model, options, shape, _ = FAMILIES[family]
    w = jax.eval_shape(models.MODELS[model](shape, 10, **options).init, jax.random.key(0))
    kernels = [leaf.size for leaf in jax.tree.leaves(w) if leaf.ndim == 2]
    gradient = 3 - (max(kernels) / sum(kernels) if family in ("linear", "mlp") else 0)
    steps = dict.fromkeys(TUNERS, gradient) | dict.fromkeys(("greedy", "cdat", "feedback"), gradient + 4)
    steps |= {"linesearch": gradient + trials, "exact": gradient + 5 * 8}
    return {"forward": 1, "gradient": gradient, "curvature": 5, "Hessian-vector product": 8} | steps


class Program(NamedTuple):
    """A compiled function, with what the compiler says of it."""

    run: Callable  # compiled
    arguments: tuple
    flops: float  # by XLA's analysis, which counts the body of a loop once
    memory: float  # bytes of temporaries


def program(fn, *arguments):
    """A function compiled for its arguments, with what the compiler says of it."""
    run = fn.lower(*arguments).compile()
    return Program(run, arguments, run.cost_analysis()["flops"], run.memory_analysis().temp_size_in_bytes)


def parts(family, samples=None):
    """The programs that tuners are made of: forward pass, gradient, curvature, Hessian-vector product."""
    model, options, shape, n = FAMILIES[family]
    network = models.MODELS[model](shape, 10, **options)
    w = network.init(jax.random.key(0))
    batch = random_batch(shape, samples or n)
    f = lambda w, batch: gd.mse(network.apply(w, batch[0]), batch[1])
    curvature = lambda w, batch, u: tuners.curvature(lambda w: f(w, batch), w, u)
    product = lambda w, batch, v: sharpness.hvp(lambda w: f(w, batch), w, v)
    return {"forward": program(jax.jit(f), w, batch), "gradient": program(jax.jit(jax.value_and_grad(f)), w, batch),
            "curvature": program(jax.jit(curvature), w, batch, w),
            "Hessian-vector product": program(jax.jit(product), w, batch, w)}  # fmt: skip


def random_batch(shape, n):
    """(x, y) of n samples: images of random pixels, or texts of random characters."""
    key = jax.random.key(1)
    if len(shape) == 1:
        return (jax.random.randint(key, (n, *shape), 0, 10),) * 2
    return jax.random.uniform(key, (n, *shape)), jnp.arange(n) % 10


def step_of(family, tuner, samples=None, chunk_size=0):
    """(program of one step, carry): what `train` runs, for a family and a tuner."""
    model, options, shape, n = FAMILIES[family]
    config = train.configure(model=model, tuner=tuner, chunk_size=chunk_size, **options)
    run, numbers = train.compiled(train.kind_of(config), shape, 10), train.numbers_of(config)
    carry = run.init(0, numbers)
    return program(run.step, carry, random_batch(shape, samples or n), None, numbers), carry


def seconds(run, repeats=5):
    """The median time of a call, waited for."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return np.median(times)


def time_step(step, carry, steps=9):
    """(seconds a step, trials a step of a linesearch), from one run: ratios of such times are what is reported."""
    _, batch, rows, numbers = step.arguments
    carry, metrics = step.run(carry, batch, rows, numbers)
    carry, metrics = jax.block_until_ready(step.run(carry, batch, rows, numbers))  # the first calls are slower
    taken, found = [], [metrics]
    for _ in range(steps):
        start = time.perf_counter()
        carry, metrics = jax.block_until_ready(step.run(carry, batch, rows, numbers))
        taken.append(time.perf_counter() - start)
        found.append(metrics)
    eta = np.array([metrics["learning_rate"] for metrics in found])
    guess = np.minimum(4 * eta[:-1], 1.0)
    return np.median(taken), np.mean(1 + np.log(guess / eta[1:]) / -np.log(0.8))


def row(*cells):
    """A line of a table, numbers to two digits."""
    words = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells]
    print("| " + " | ".join(words) + " |", flush=True)


def cost_of_tuners(file):
    """Prints the cost of the parts in forward passes, of a step under each tuner also in constant-rate steps; draws
    it."""
    row("model", "part", "predicted FLOPs", "FLOPs", "time", "memory, all in forward passes")
    row(*["---"] * 6)
    forwards = {}
    for family in FAMILIES:
        found = parts(family)
        for name, part in found.items():
            cost = np.array([part.flops, seconds(lambda: part.run(*part.arguments)), part.memory], float)
            forwards[family] = cost if name == "forward" else forwards[family]
            row(family, name, float(predicted(family)[name]), *map(float, cost / forwards[family]))
    print()
    row("model", "tuner", "FLOPs", "time", "memory, in constant-rate steps", "predicted FLOPs", "FLOPs", "time",
        "memory, in forward passes", "")  # fmt: skip
    row(*["---"] * 10)
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    for k, family in enumerate(FAMILIES):
        for j, tuner in enumerate(TUNERS):
            step, carry = step_of(family, tuner)
            taken, trials = time_step(step, carry)
            searched = (trials - 1) * forwards[family][0] if tuner == "linesearch" else 0  # its loop, body times trips
            cost = np.array([step.flops + searched, taken, step.memory], float)
            base = cost if tuner == "constant" else base
            row(family, tuner, *map(float, cost / base), float(predicted(family, trials)[tuner]),
                *map(float, cost / forwards[family]),
                f"{trials:.1f} trials" if tuner == "linesearch" else "")  # fmt: skip
            for axis, ratio in zip(axes, cost / base):
                axis.bar(k + (j - 4) / 11, ratio, 1 / 11, color=plots.COLORS[tuner], label=tuner if k == 0 else None)
    for axis, title in zip(axes, ("FLOPs", "time", "memory")):
        axis.set_title(f"{title} of a step, in constant-rate steps", fontsize=9, loc="left")
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xticks(range(len(FAMILIES)), FAMILIES)
    plots.finish(figure, axes, file)


def bare_loop(steps):
    """The default run in bare JAX: what `train` is compared with. Returns the final loss."""
    network, dataset = models.mlp((8, 8, 1), 10), data.load("digits", "datasets", 1024)

    def f(w, x, y):
        decay = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w))
        return 0.5 * jnp.mean(jnp.sum((network.apply(w, x) - jax.nn.one_hot(y, 10)) ** 2, -1)) + 0.5e-5 * decay

    @jax.jit
    def step(w, x, y):
        value, g = jax.value_and_grad(f)(w, x, y)
        u = jax.tree.map(jnp.negative, g)
        slope = lambda w: jax.jvp(lambda w: f(w, x, y), (w,), (u,))[1]
        n, d = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(g)), jnp.abs(jax.jvp(slope, (w,), (u,))[1])
        return jax.tree.map(lambda w, u: w + 2 * n / d * u, w, u), value

    x, y, w = jnp.asarray(dataset.x), jnp.asarray(dataset.y), network.init(jax.random.key(0))
    w, value = step(w, x, y)
    start = time.perf_counter()
    for _ in range(steps):
        w, value = step(w, x, y)
    return time.perf_counter() - start + 0 * float(value)


def cost_of_a_run(steps=2000):
    """Prints what logging adds to a bare loop and what sharpness adds to a run, as ratios of medians of five."""
    with tempfile.TemporaryDirectory() as out:
        def timed(k, **more):
            config = train.configure(steps=steps, out=f"{out}/{k}", overwrite=True, **more)
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                train.train(config, plots.progress(steps))
            return time.perf_counter() - start

        timed(0), timed(0, no_sharpness=True)  # compiles
        times = [(bare_loop(steps), timed(1, no_sharpness=True), timed(2)) for _ in range(5)]
        bare, logged, whole = np.median(times, axis=0)
    print(f"\nsteps with logging, progress and files, against a bare jitted loop: {logged / bare:.3f}")
    print(f"share of measuring sharpness in the default run: {1 - logged / whole:.2f}")


def cost_of_sharpness():
    """Prints the products Hv that 20 measurements take along two runs, warm and cold, by both iterations."""
    kinds = {
        "warm": sharpness.lobpcg, "cold": sharpness.lobpcg,
        "plain warm": sharpness.power_iteration, "plain cold": sharpness.power_iteration,
    }  # fmt: skip
    dataset = data.load("digits", samples=1024)
    samples = jax.device_put((dataset.x, dataset.y))
    for tuner in "cdat", "constant":
        config = train.configure(tuner=tuner)
        run = train.compiled(train.kind_of(config), dataset.x.shape[1:], dataset.classes)
        numbers = train.numbers_of(config)
        carry = run.init(0, numbers)
        ones = jax.tree.map(jnp.ones_like, carry.w)
        spent, vectors = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, ones)
        for t in range(config.steps):
            if t % 100 == 0:
                for kind, estimate in kinds.items():
                    start = vectors[kind] if "warm" in kind else ones
                    top = estimate(lambda v: run.hessian(carry.w, carry, v, samples, numbers), start)
                    spent[kind] += top.iterations
                    vectors[kind] = top.vector
            carry, _ = run.step(carry, samples, None, numbers)
        counts = ", ".join(f"{kind} {products}" for kind, products in spent.items())
        print(f"products Hv for 20 measurements along {tuner}: {counts}", flush=True)


def cost_of_starting():
    """Prints how long a command for one step takes, without and then with compiled programs in the cache."""
    commands = {"default": [], "resnet": ["--model", "resnet", "--samples", "64"],
                "transformer": ["--model", "transformer", "--dataset", "pydocs", "--samples", "64"]}  # fmt: skip
    more = ["--steps", "1", "--overwrite", "--no-plot", "--no-sharpness", "--test-samples", "64"]
    for name, flags in commands.items():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, train.__file__, *flags, *more, "--out", folder]
            taken = []
            for _ in range(4):  # the first fills the cache
                start = time.time()
                subprocess.run(command, check=True, capture_output=True, env=os.environ | {"XDG_CACHE_HOME": folder})
                taken.append(time.time() - start)
        again = np.median(taken[1:])
        print(f"{name}: a run of one step in {taken[0]:.1f} s, with a cache in {again:.1f} s: "
              f"{taken[0] / again:.1f} times faster")  # fmt: skip


def draw(_, file):
    """All that this repository says about its speed: printed, and the cost of a step drawn."""
    device, machine = jax.devices()[0].device_kind, f"{platform.system()} {platform.machine()}"
    print(f"{device}, {os.cpu_count()} cores, JAX {jax.__version__}, {machine}\n")
    cost_of_tuners(file)
    cost_of_a_run()
    cost_of_sharpness()
    cost_of_starting()

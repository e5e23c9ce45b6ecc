"""What it costs: FLOPs, memory and time of a step under each tuner (but the later rivals), and of what surrounds it.

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
from types import SimpleNamespace
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
from paper import results, rivals
from paper.settings import setting_of

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
KINDS = {tuner: dict(tuner=tuner) for tuner in tuners.TUNERS if tuner not in rivals.LATER} | {
    "cdat, uᵀGu": dict(tuner="cdat", curvature="gauss-newton"),
    "cdat, every 4": dict(tuner="cdat", every=4),
    "cdat, every 16": dict(tuner="cdat", every=16),
}


def predicted(family, trials=1):
    """What counting says, in forward passes, of the parts and of a step under each tuner.

    A gradient is a forward pass and two products for each of its own, less the one for the gradient of the input: so
    less the first layer's share, known for dense networks, else counted as 0. Curvature carries t, t and t² forward,
    5 passes of which the gradient's is one, but not where it stands in a branch of its own, as if taken every k-th
    step. The Gauss-Newton one carries t alone: 3. A Hessian-vector product is the gradient with a tangent, and its
    products have two terms each: 8.
    """
    model, options, shape, _ = FAMILIES[family]
    w = jax.eval_shape(models.MODELS[model](shape, 10, **options).init, jax.random.key(0))
    kernels = [leaf.size for leaf in jax.tree.leaves(w) if leaf.ndim == 2]
    gradient = 3 - (max(kernels) / sum(kernels) if family in ("linear", "mlp") else 0)
    steps = dict.fromkeys(KINDS, gradient) | dict.fromkeys(("greedy", "cdat"), gradient + 4)
    steps |= dict.fromkeys(("feedback", "cdat, uᵀGu"), gradient + 2)
    steps |= {"linesearch": gradient + trials, "exact": gradient + 5 * 8}
    steps |= {"cdat, every 4": gradient + 5 / 4, "cdat, every 16": gradient + 5 / 16}
    return {"forward": 1, "gradient": gradient, "curvature": 5, "Gauss-Newton curvature": 3,
            "Hessian-vector product": 8} | steps  # fmt: skip


class Program(NamedTuple):
    """A compiled function, with what the compiler says of it."""

    run: Callable  # compiled
    arguments: tuple
    flops: float  # by XLA's analysis, which counts the body of a loop once
    memory: float  # bytes of temporaries and of what it returns


def program(fn, *arguments):
    """A function compiled for its arguments, with what the compiler says of it."""
    run = fn.lower(*arguments).compile()
    memory = run.memory_analysis()
    taken = memory.temp_size_in_bytes + memory.output_size_in_bytes
    return Program(run, arguments, run.cost_analysis()["flops"], taken)


def parts(family, samples=None):
    """The programs that tuners are made of: forward pass, gradient, curvatures, Hessian-vector product."""
    model, options, shape, n = FAMILIES[family]
    network = models.MODELS[model](shape, 10, **options)
    w = network.init(jax.random.key(0))
    batch = random_batch(shape, samples or n)
    f = lambda w, batch: gd.mse(network.apply(w, batch[0]), batch[1])
    halves = lambda batch: (lambda w: network.apply(w, batch[0]), lambda z, w: gd.mse(z, batch[1]))
    curvature = lambda w, batch, u: tuners.curvature(lambda w: f(w, batch), w, u)
    gauss_newton = lambda w, batch, u: tuners.gauss_newton(tuners.Composed(*halves(batch)), w, u)
    product = lambda w, batch, v: sharpness.hvp(lambda w: f(w, batch), w, v)
    return {"forward": program(jax.jit(f), w, batch), "gradient": program(jax.jit(jax.value_and_grad(f)), w, batch),
            "curvature": program(jax.jit(curvature), w, batch, w),
            "Gauss-Newton curvature": program(jax.jit(gauss_newton), w, batch, w),
            "Hessian-vector product": program(jax.jit(product), w, batch, w)}  # fmt: skip


def random_batch(shape, n):
    """(x, y) of n samples: images of random pixels, or texts of random characters."""
    key = jax.random.key(1)
    if len(shape) == 1:
        return (jax.random.randint(key, (n, *shape), 0, 10),) * 2
    return jax.random.uniform(key, (n, *shape)), jnp.arange(n) % 10


def step_of(family, samples=None, **flags):
    """(program of one step, carry): what `train` runs, for a family and a tuner."""
    model, options, shape, n = FAMILIES[family]
    return step_with(train.configure(model=model, **options, **flags), shape, samples or n)


def step_with(config, shape, samples, classes=10):
    """The same for any run, on random samples."""
    kind, numbers = train.kind_and_numbers(config)
    run = train.compiled(kind, shape, classes)
    carry = run.init(0, numbers)
    return program(run.step, carry, random_batch(shape, samples), None, numbers), carry


def seconds(run, repeats=5):
    """The median time of a call, waited for."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return np.median(times)


def time_step(step, carry, period=1):
    """(seconds a step, trials a step of a linesearch), from one run: ratios of such times are what is reported.

    Where steps differ, the period after which they come again; what is timed is its mean, and of these the median.
    """
    _, batch, rows, numbers = step.arguments
    carry, metrics = step.run(carry, batch, rows, numbers)
    carry, metrics = jax.block_until_ready(step.run(carry, batch, rows, numbers))  # the first calls are slower
    taken, found = [], [metrics]
    for _ in range(3 * period if period > 1 else 9):
        start = time.perf_counter()
        carry, metrics = jax.block_until_ready(step.run(carry, batch, rows, numbers))
        taken.append(time.perf_counter() - start)
        found.append(metrics)
    eta = np.array([metrics["learning_rate"] for metrics in found])
    guess = np.minimum(4 * eta[:-1], 1.0)
    return np.median(np.reshape(taken, (-1, period)).mean(1)), np.mean(1 + np.log(guess / eta[1:]) / -np.log(0.8))


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
    ratios = np.empty((3, len(KINDS), len(FAMILIES)))  # of FLOPs, time and memory
    for k, family in enumerate(FAMILIES):
        for j, (kind, flags) in enumerate(KINDS.items()):
            step, carry = step_of(family, **flags)
            taken, trials = time_step(step, carry, flags.get("every", 1))
            flops = step.flops
            if kind == "linesearch":
                flops += (trials - 1) * forwards[family][0]  # its loop, body times trips
            if "every" in flags:  # the branch counts as if it were always taken
                flops = base[0] + (flops - base[0]) / flags["every"]
            cost = np.array([flops, taken, step.memory], float)
            base = cost if kind == "constant" else base
            row(family, kind, *map(float, cost / base), float(predicted(family, trials)[kind]),
                *map(float, cost / forwards[family]),
                f"{trials:.1f} trials" if kind == "linesearch" else "")  # fmt: skip
            ratios[:, j, k] = cost / base
    draw_ratios(ratios, file)


def draw_ratios(ratios, file):
    """The cost of a step under each tuner, for each model, in constant-rate steps: numbers on their colours."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, table, title in zip(axes, ratios, ("FLOPs", "time", "memory")):
        axis.imshow(np.log2(table), cmap="Oranges", vmin=-0.5, vmax=4, aspect="auto")
        for (row, column), ratio in np.ndenumerate(table):
            axis.text(column, row, f"{ratio:.1f}", ha="center", va="center", fontsize=8,
                      color="white" if ratio > 6 else "black")  # fmt: skip
        axis.set_xticks(range(len(FAMILIES)), FAMILIES, rotation=45, ha="right")
        axis.set_yticks(range(len(KINDS)), KINDS)
        axis.set_title(f"{title} of a step, in constant-rate steps", fontsize=9, loc="left")
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
        kind, numbers = train.kind_and_numbers(config)
        run = train.compiled(kind, dataset.x.shape[1:], dataset.classes)
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


SHAPES = {  # of a sample, and classes, by data set
    "digits": ((8, 8, 1), 10), "cifar10": ((32, 32, 3), 10), "imagenette": ((32, 32, 3), 10),
    "shakespeare": ((64,), 65),
}  # fmt: skip


def seconds_a_step(settings):
    """What a step of a run takes, on random samples."""
    shape, classes = SHAPES[settings["dataset"]]
    shape = 2 * (settings["image_size"],) + (3,) if "image_size" in settings else shape
    step, carry = step_with(SimpleNamespace(**settings), shape, settings["samples"], classes)
    return time_step(step, carry)[0]


def against_seconds(runs, file, seconds_a_step=seconds_a_step):
    """The loss against the seconds of training that it took, tuning counted in, setting by setting: medians over seeds.

    The best constant rate pays for all rates of its grid. Seconds are those of the steps alone, timed here, one kind of
    run after the other. A row a kind is kept beside the figure: reach, when it came to where the constant rate ended.
    """
    trained, rows = list(dict.fromkeys(setting_of(run.settings) for run in runs)), {}
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    axes = figure.subplots(2, (len(trained) + 1) // 2, squeeze=False)
    for axis, setting in zip(axes.flat, trained):
        kinds = {}
        for run in runs:
            if setting_of(run.settings) == setting:
                kinds.setdefault(run.settings["run"], []).append(run)
        losses = {}
        for kind, same in kinds.items():
            table = np.full((len(same), same[0].settings["steps"]), np.inf)  # a row a seed; inf after its end
            for row, run in zip(table, same):
                row[: len(run.history["loss"])] = np.nan_to_num(run.history["loss"], nan=np.inf)
            losses[kind] = np.median(table, axis=0)
        rates = [kind for kind, same in kinds.items() if same[0].settings["tuner"] == "constant"]
        best = min(rates, key=lambda kind: losses[kind][-5:].mean())
        goal = losses[best].min()
        for kind in [best, *(kind for kind in kinds if kind not in rates)]:
            settings = kinds[kind][0].settings
            taken = seconds_a_step(settings)
            if kind == best:  # a rate that diverged ended sooner
                steps = [np.mean([len(run.history["loss"]) for run in kinds[rate]]) for rate in rates]
                taken *= sum(steps) / len(losses[kind])
            variant = settings["tuner"] == "cdat" and settings["curvature"] == "gauss-newton"
            color, style = plots.look(settings["tuner"], int(variant))
            name = settings["name"].replace("curvature gauss-newton", "uᵀGu")
            name = "constant, with its grid" if kind == best else name
            seconds, lowest = taken * (1 + np.arange(len(losses[kind]))), np.minimum.accumulate(losses[kind])
            there = seconds[lowest <= goal]
            row = dict(seconds=seconds[-1], loss=lowest[-1], reach=there[0] if len(there) else np.inf)
            rows[f"{setting}; {name}".replace(",", "")] = row
            axis.plot(seconds, lowest, style, color=color, linewidth=1.2, label=name)
            print(f"{setting}, {name}: {seconds[-1]:.1f} s to {lowest[-1]:.3g}", flush=True)
        axis.set(xscale="log", yscale="log")
        axis.set_title(setting, fontsize=9, loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("seconds of steps, tuning counted in", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("lowest training loss so far", fontsize=9)
    results.write(file.with_suffix(".csv"), rows)
    plots.finish(figure, axes, file)


def draw(_, file):
    """All that this repository says about its speed: printed, and the cost of a step drawn."""
    device, machine = jax.devices()[0].device_kind, f"{platform.system()} {platform.machine()}"
    print(f"{device}, {os.cpu_count()} cores, JAX {jax.__version__}, {machine}\n")
    cost_of_tuners(file)
    cost_of_a_run()
    cost_of_sharpness()
    cost_of_starting()

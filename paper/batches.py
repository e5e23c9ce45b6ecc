"""Does the size of a batch say which σ to take?

What this file teaches: on a mini-batch the numerator of CDAT, n = ‖g‖² for u = −g, has the noise of g in it twice, and
is tr Σ/B too large in the mean; so the best σ is smaller for smaller batches. Two ways out are tried: to make σ smaller
by just that factor, 1 + B_noise/B with B_noise = tr Σ/‖g‖² (McCandlish et al. 2018), and to take n and d from the next
batch, which u does not know. Beside λ the batch sharpness is logged, which mini-batches hold at the edge (Andreyev and
Beneventano, arXiv:2412.20553). Read next: graph.py.
"""

import functools
import itertools
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gd
import plots
import sharpness
import train
import tuners
from paper import drawings
from paper.results import kept, read, rows_of
from paper.settings import SEEDS

NOISY = {  # what is trained on mini-batches, and their sizes
    "mlp": (dict(samples=0, steps=600), [4, 16, 64, 256, 512]),
    "cnn": (dict(dataset="cifar10", model="cnn", samples=512, steps=300), [4, 32, 128]),
}
STOCHASTIC, AVERAGES = ["gd", "momentum", "adam"], [0.0, 0.9]
GRID = [0.4, 0.8, 1.2, 1.6, 2.0]  # of σ


def two_batch(f, w, u):
    """(n, d) of CDAT (8) along u from the loss f on a batch that u does not know: n = −∇f·u, d = |uᵀHu|.

    Where u = −g comes from the same batch, n = ‖g‖² has the noise of g in it twice, and in the mean tr Σ too much.
    Given u, both numbers are means over batches of what they would be on all samples. Costs a curvature.

    >>> n, d = two_batch(lambda w: 2 * w**2, jnp.array(1.0), jnp.array(-4.0))
    >>> float(n), float(d)
    (16.0, 64.0)
    """
    return -jax.jvp(f, (w,), (u,))[1], jnp.abs(tuners.curvature(f, w, u))


class Parts(NamedTuple):
    """What is compiled for one network under one optimizer."""

    init: Callable  # init(key) -> (w, state of the optimizer, n, d)
    step: Callable  # step(carry, batch, other, sigma, beta) -> (carry, loss); other None: n and d from the batch itself
    noise: Callable  # noise(w, g, batch) -> ‖g_B − g‖², batch sharpness
    gradient: Callable  # gradient(w, samples) -> (f, g)
    product: Callable  # product(w, samples, v) -> Hv


@functools.cache
def parts(flags, optimizer):
    """(Parts, samples) for what pairs of flags say, made once for all runs of one kind."""
    network, f, samples = drawings.problem(train.configure(**dict(flags)))
    optimizer = gd.OPTIMIZERS[optimizer]()

    def init(key):
        w = network.init(key)
        return w, optimizer.init(w), 0.0, 0.0

    def step(carry, batch, other, sigma, beta):
        w, state, n_last, d_last = carry
        value, g = jax.value_and_grad(f)(w, batch)
        u, state = optimizer.direction(state, g)
        n, d = two_batch(lambda w: f(w, batch if other is None else other), w, u)
        n, d = (1 - beta) * n + beta * n_last, (1 - beta) * d + beta * d_last
        eta = sigma * jnp.maximum(n, 0) / d  # (8)
        return (tuners.move(w, jnp.where(jnp.isfinite(eta), eta, 0), u), state, n, d), value

    def noise(w, g, batch):
        g_batch = jax.grad(f)(w, batch)
        off = tuners.move(g_batch, -1.0, g)
        return gd.dot(off, off), tuners.curvature(lambda w: f(w, batch), w, g_batch) / gd.dot(g_batch, g_batch)

    product = lambda w, samples, v: sharpness.hvp(lambda w: f(w, samples), w, v)
    return Parts(*map(jax.jit, (init, step, noise, jax.value_and_grad(f), product))), samples


def on_batches(flags, optimizer, size, sigma, beta, ahead, seed, points=4, draws=8):
    """The row of a run: its loss on all samples, and medians of λ, batch sharpness and tr Σ/‖g‖² along it.

    flags: what is trained; ahead: n and d from the next batch
    The batch sharpness is the mean of g_Bᵀ H_B g_B / ‖g_B‖² over some batches.
    """
    run, samples = parts(tuple(flags.items()), optimizer)
    total, steps = len(samples[0]), flags["steps"]
    take = lambda t, seed: jax.tree.map(lambda a: a[gd.batch(t, total, size, seed)], samples)
    carry, found = run.init(jax.random.key(seed)), []
    v = jax.tree.map(jnp.ones_like, carry[0])
    first, _ = run.gradient(carry[0], samples)
    for t in range(steps):
        carry, _ = run.step(carry, take(t, seed), take(t + 1, seed) if ahead else None, sigma, beta)
        if (t + 1) % (steps // points) == 0:
            w = carry[0]
            loss, g = run.gradient(w, samples)
            if not np.isfinite(loss):
                break
            squares, sharp = np.mean([run.noise(w, g, take(k, 1000 + seed)) for k in range(draws)], axis=0)
            trace = size * squares / (1 - size / total)  # batches are drawn without putting back
            top = sharpness.lobpcg(functools.partial(run.product, w, jax.tree.map(lambda a: a[:256], samples)), v, 0.02)
            v = top.vector if np.isfinite(top.value) else v
            found.append([trace / gd.dot(g, g), sharp, top.value])
    noise, sharp, lam = np.median(found, axis=0) if found else 3 * [np.nan]
    loss = float(loss) if np.isfinite(loss) else np.inf
    return dict(loss_first=float(first), loss=loss, noise=noise, batch_sharpness=sharp, sharpness=lam)


def batches(_, file, noisy=NOISY, optimizers=STOCHASTIC, grid=GRID, seeds=SEEDS, **given):
    """Over the batch size: the final loss at the best σ, at σ = 2 and from two batches; the best σ and the rule's."""
    kinds = [(sigma, beta, False) for sigma in grid for beta in AVERAGES] + [(2.0, beta, True) for beta in AVERAGES]
    for (name, (flags, sizes)), optimizer in itertools.product(noisy.items(), optimizers):
        for size, (sigma, beta, ahead), seed in itertools.product(sizes, kinds, seeds):
            kept(file, row_name(name, optimizer, size, sigma, beta, ahead, seed), functools.partial(
                on_batches, flags | given, optimizer, size, sigma, beta, ahead, seed))  # fmt: skip
    rows, count = read(file.with_suffix(".csv")), len(noisy) * len(optimizers)
    figure, axes = drawings.subplots(2, count, figsize=(2.3 * count, 4.6), sharex="col", squeeze=False)
    for column, (name, optimizer) in zip(axes.T, itertools.product(noisy, optimizers)):
        found = compared(rows, name, optimizer, grid, seeds)
        sizes = [*found]
        for words, key, color, style in (
            ("best σ of the grid", "best", drawings.BLUE, "o-"), ("σ = 2", "edge", drawings.GREY, "s:"),
            ("σ = 2 from two batches", "ahead", drawings.ORANGE, "^-"),
        ):  # fmt: skip
            column[0].plot(sizes, [found[size][key] for size in sizes], style, color=color, label=words, markersize=4)
        column[1].plot(sizes, [found[size]["sigma"] for size in sizes], "o-", color=drawings.BLUE, markersize=4,
                       label="best σ of the grid")  # fmt: skip
        column[1].plot(sizes, [found[size]["rule"] for size in sizes], "D--", color=drawings.BLACK, markersize=4,
                       label="2 / (1 + noise / batch)")  # fmt: skip
        start = np.median([row["loss_first"] for row in rows.values()])
        column[0].set(xscale="log", yscale="log", ylim=(None, 2 * start))
        column[0].set_title(f"{name}, {optimizer}", fontsize=9, loc="left")
        column[1].set(xlabel="samples in a batch", ylim=(0, 2.3))
    axes[0, 0].set_ylabel("final loss on all samples")
    axes[1, 0].set_ylabel("σ")
    plots.finish(figure, axes, file)


def row_name(name, optimizer, size, sigma, beta, ahead, seed):
    """What a run is called in the rows."""
    return f"{name}; {optimizer}; batch {size}; {'two batches; ' * ahead}σ {sigma:g}; β {beta:g}; seed {seed}"


def compared(rows, name, optimizer, grid=GRID, seeds=SEEDS):
    """By batch size: medians of the final loss at the best σ, at σ = 2 and from two batches; the best σ and the rule's.

    Each with the better of the averages. The rule's noise tr Σ/‖g‖² is the median along the runs with the best σ.
    """
    found = {}
    for size in NOISY[name][1]:
        named = functools.partial(row_name, name, optimizer, size)
        medians = {}  # by σ, β and whether from two batches: the loss and the noise
        for sigma, beta, ahead in itertools.product(grid, AVERAGES, (False, True)):
            same = [rows[named(sigma, beta, ahead, seed)] for seed in seeds if named(sigma, beta, ahead, seed) in rows]
            if same:
                medians[sigma, beta, ahead] = [np.median([row[of] for row in same]) for of in ("loss", "noise")]
        if not medians:
            continue
        plain = {key: value for key, value in medians.items() if not key[2]}
        best = min(plain, key=lambda key: plain[key][0])
        least = lambda ahead: min(medians[2.0, beta, ahead][0] for beta in AVERAGES)
        rule = 2 / (1 + plain[best][1] / size)
        found[size] = dict(best=plain[best][0], sigma=best[0], edge=least(False), ahead=least(True), rule=rule)
    return found


def two_batches_do(_):
    """Whether σ = 2 with n and d from the next batch ends at most 10 % above the best σ of the grid, at each size."""
    found = []
    for name, optimizer in itertools.product(NOISY, STOCHASTIC):
        rows = compared(rows_of("batches"), name, optimizer)
        ratios = {size: row["ahead"] / row["best"] for size, row in rows.items()}
        text = ", ".join(f"{size}: × {ratio:.2g}" for size, ratio in ratios.items())
        found += [(f"{name} {optimizer}", text, bool(max(ratios.values()) <= 1.1))] if ratios else []
    return found


def noise_tells(_):
    """Whether 2 / (1 + noise / batch) is within a step of the grid, 0.4, of the best σ, at each size."""
    found = []
    for name, optimizer in itertools.product(NOISY, STOCHASTIC):
        rows = compared(rows_of("batches"), name, optimizer)
        text = ", ".join(f"{size}: {row['rule']:.2g} / {row['sigma']:g}" for size, row in rows.items())
        close = [abs(row["rule"] - row["sigma"]) <= 0.4 for row in rows.values()]
        found += [(f"{name} {optimizer}", text, all(close))] if close else []
    return found

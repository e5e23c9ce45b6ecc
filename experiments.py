"""The paper's figures, each a list of runs and a drawing of them, and the verdict on what they claim.

    python experiments.py --list           each figure with its claim and its time on two cores
    python experiments.py fig5             runs what has not been run yet, draws figures/fig5.png
    python experiments.py claims           the verdicts, from the committed results, without running anything
    python experiments.py fig5 --table     likewise a line for each kind of run
    python experiments.py fig5 --scale paper   the paper's data, networks and steps: for an accelerator

What this file teaches: an experiment is data. A setting says what is trained, a figure lists tuners on settings.
What every run ended with is kept in figures/results.csv, so that each number in the README can be traced.
"""

import argparse
import dataclasses
import re
import sys
import textwrap
import time
from pathlib import Path
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import cost
import plots
import results
import sharpness
import theory
import train
from results import below, markdown, ratio, within

FIGURES = Path(__file__).parent / "figures"
SEEDS = [0, 1, 2]

# ------------------------------------------------------------------------------------------------------- settings

LAPTOP = {
    "digits": {},
    "linear": dict(model="linear"),
    "mlp": dict(dataset="cifar10", samples=256, width=256, steps=300),
    "resnet": dict(dataset="cifar10", model="resnet", stem="imagenet", loss="ce", samples=128, width=8, steps=200),
    "mixer": dict(dataset="cifar10", model="mixer", patch=8, loss="ce", samples=128, steps=200),
    "nanolm": dict(dataset="shakespeare", model="transformer", loss="ce", optimizer="rmsprop", samples=32, width=32, steps=200),
    "vit": dict(dataset="imagenette", model="vit", patch=8, image_size=32, loss="ce", optimizer="rmsprop", samples=128,
                width=32, steps=200),
    "mnist": dict(dataset="mnist", samples=512, width=64, depth=2, steps=300),
    "batches": dict(samples=0, steps=600),
    "momentum": dict(optimizer="momentum", steps=600),
    "rmsprop": dict(optimizer="rmsprop", steps=600),
    "adam": dict(optimizer="adam", steps=600),
    "cnn": dict(dataset="cifar10", model="cnn", samples=128, steps=300),
    "rnn": dict(dataset="shakespeare", model="rnn", loss="ce", samples=128, width=64, steps=300),
}  # fmt: skip
SPARING = dict(sharpness_every=20, sharpness_tol=0.02, test_samples=256)  # what is measured must not cost more than training
LAPTOP |= {name: LAPTOP[name] | SPARING for name in ("mlp", "resnet", "mixer", "nanolm", "vit", "cnn", "rnn")}
LAPTOP |= {name: LAPTOP[name] | dict(no_sharpness=True) for name in ("mnist", "batches", "momentum", "rmsprop", "adam")}
PAPER = LAPTOP | {
    "linear": dict(dataset="cifar10", model="linear", samples=4096, steps=16384),
    "mlp": dict(dataset="cifar10", preset="mlp-fig15", samples=4096, steps=16384),
    "resnet": dict(dataset="cifar10", preset="resnet34", samples=4096, steps=16384, chunk_size=512),
    "mixer": dict(dataset="cifar10", preset="mixer-ti8", loss="ce", samples=4096, steps=16384, chunk_size=512),
    "nanolm": dict(dataset="shakespeare", preset="nanolm", loss="ce", optimizer="rmsprop", samples=2048, steps=8192),
    "vit": dict(dataset="imagenette", preset="vit-ti32", loss="ce", optimizer="rmsprop", samples=1024, steps=16384),
    "mnist": dict(dataset="mnist", samples=8192, width=256, depth=3, steps=16384),
    "batches": dict(dataset="cifar10", preset="resnet50", samples=0, steps=40000, sharpness_samples=4096),
}
SETTINGS = ["mlp", "resnet", "mixer", "nanolm", "vit"]  # of Figures 1, 3, 5 and 6: the paper's four, and an MLP


def rates(first, count):
    """A grid with a factor of 2.

    >>> rates(0.1, 3)
    [0.1, 0.2, 0.4]
    """
    return [first * 2**k for k in range(count)]


GRIDS = {  # the constant rates, chosen to bracket the best
    "digits": rates(0.025, 4), "linear": rates(0.0125, 6), "mlp": rates(0.0025, 4), "resnet": rates(0.08, 3),
    "mixer": rates(0.16, 3), "nanolm": rates(8e-4, 3), "vit": rates(3.2e-4, 3), "mnist": rates(0.025, 5),
    "batches": rates(0.05, 4), "momentum": rates(0.0125, 4), "rmsprop": rates(1e-4, 5), "adam": rates(1e-3, 4),
    "cnn": rates(0.08, 4), "rnn": rates(0.16, 4),
}  # fmt: skip
PAPER_GRIDS = GRIDS | {"resnet": rates(5e-4, 9), "mixer": rates(5e-4, 9), "nanolm": rates(5e-4, 9),
                       "vit": rates(1e-5, 8), "linear": rates(1e-3, 3)}  # fmt: skip


def on(settings, scale, *tuners):
    """Runs as train.configurations takes them: each tuner, a dict of flags, in each setting, with all seeds.

    A tuner's lr may be a function of the setting's grid of constant rates.
    """
    table, grids = (PAPER, PAPER_GRIDS) if scale == "paper" else (LAPTOP, GRIDS)
    at = lambda name, tuner: {key: value(grids[name]) if callable(value) else value for key, value in tuner.items()}
    return [table[name] | {"seed": SEEDS} | at(name, tuner) for name in settings for tuner in tuners]


def cdat(*sigmas, **more):
    """CDAT at each σ, with more flags."""
    return dict(tuner="cdat", sigma=list(sigmas), **more)


CONSTANT = dict(tuner="constant", lr=lambda grid: grid)
LINESEARCH, GREEDY, CDAT, FEEDBACK = dict(tuner="linesearch"), dict(tuner="greedy"), cdat(2.0), dict(tuner="feedback")
WARM = dict(tuner="schedule", decay="constant", warmup=0.2)  # a constant rate, but for how it is entered
SEARCHES = [dict(tuner="linesearch", slope=slope, slack=slack, grow=grow, shrink=shrink) for shrink in (0.8, 0.9)
            for grow in (4.0, np.inf) for slope, slack in ((1e-4, 0.0), (0.5, 0.0), (0.0, 0.0), (0.0, 1e-3))]  # fmt: skip
SCHEDULES = [dict(tuner="schedule", lr=rates(0.4, 4), warmup=warmup, decay=decay)
             for warmup in (0.05, 0.2) for decay in ("constant", "cosine")]  # fmt: skip
POLYAK = [dict(tuner="polyak", lr_max=lr_max) for lr_max in (1.0, 100.0)]
HYPER = [dict(tuner="hypergradient", lr=lr, hyper_rate=rate) for lr in (0.01, 0.05) for rate in (0.01, 0.1)]


FIGURE_4 = (("constant rate", {"as printed": theory.constant_rate(), "semi-implicit": theory.constant_rate(semi_implicit=True)}),
            ("rate held below the edge", {"y = −0.1": theory.below_edge()}))  # fmt: skip
FIGURE_9 = (("first 400 steps", {f"σ = {sigma:g}": theory.cdat_model(sigma, steps=400) for sigma in (2, 1.9)}),
            ("4000 steps", {f"σ = {sigma:g}": theory.cdat_model(sigma) for sigma in (2, 1.9)}))  # fmt: skip


def follow(config, first, steps):
    """Steps first to first + steps of a run of the default network: yields (t, f, w, top eigenpair, metrics) at each."""
    samples, _, classes, _, _ = train.placed(config)
    options = tuple(train.arguments(config, "model").items())
    init, step, _, hessian = train.functions("mlp", options, (8, 8, 1), classes, "mse", "gd", config.tuner, "cosine", 0)[:4]
    numbers, network = train.numbers_of(config), train.models.mlp((8, 8, 1), classes)
    f = lambda w: train.mse(network.apply(w, samples[0]), samples[1]) + config.weight_decay / 2 * theory.dot(w, w)
    carry = init(config.seed, numbers)
    v = jax.tree.map(jnp.ones_like, carry.w)
    for t in range(first + steps):
        w = jax.tree.map(jnp.copy, carry.w) if t >= first else None  # the step gives its carry away
        carry, metrics = step(carry, samples, None, numbers)
        if t >= first:
            top = sharpness.power_iteration(lambda v: hessian(w, None, v, samples, config.weight_decay), v, tol=1e-4)
            v = top.vector
            yield t, f, w, top, metrics


def overlay(_, file, first=100, steps=100):
    """A drawing: the sharpness of a real run at a constant rate, and what the model (4) makes of its a, b and x.

    λ swings with x from step to step, which the model leaves out: means of two neighbouring steps are compared.
    """
    config, measure, found = train.Config(tuner="constant", lr=0.1), None, []
    for _, f, w, top, _ in follow(config, first, steps):
        measure = measure or jax.jit(lambda w, v: theory.measure(f, w, v))
        found.append(jax.device_get(measure(w, top.vector)))
    pairs = lambda values: (values[1:] + values[:-1]) / 2
    lam, x, _, a, b = np.array(found).T
    rise, fall = pairs(config.lr * a), pairs(config.lr * b * x**2)
    figure, axes = plt.subplots(2, 1, figsize=(7, 4.6), sharex=True, layout="constrained")
    t = first + np.arange(steps - 1)
    axes[0].plot(t, pairs(lam), color="#000000", label="measured λ", linewidth=1.5)
    for share, style, name in ((0.5, "-", "model (4), b = ½‖∇λ‖²"), (1, "--", "model (4), b = ‖∇λ‖²")):
        change = (rise - share * fall)[:-1]
        axes[0].plot(t, lam[:2].mean() + np.append(0, np.cumsum(change)), style, color="#D55E00", label=name, linewidth=1)
        print(f"{name}: mean change of λ a step {change.mean():.4f}, measured {np.diff(pairs(lam)).mean():.4f}; "
              f"correlation {np.corrcoef(change, np.diff(pairs(lam)))[0, 1]:.2f}")  # fmt: skip
    axes[1].plot(t, rise, color="#0072B2", label="sharpening ηa", linewidth=1)
    axes[1].plot(t, fall, "--", color="#CC79A7", label="feedback ηx²‖∇λ‖²", linewidth=1)
    for axis, name in zip(axes, ("sharpness λ", "change of λ in a step")):
        axis.set_ylabel(name, fontsize=9)
    axes[1].set_xlabel("step")
    plots.finish(figure, axes, file)


def resets(_, file, first=120, steps=40):
    """A drawing: a run of `feedback` around its resets, and the loss along the top eigenvector before and after one."""
    run = list(follow(train.Config(tuner="feedback"), first, steps))
    t, loss, eta = (np.array(column, float) for column in zip(*[(t, m["loss"], m["learning_rate"]) for t, *_, m in run]))
    lam = np.array([top.value for *_, top, _ in run])
    ratio = jax.jit(lambda w, u: train.tuners.curvature(run[0][1], w, u) / theory.dot(u, u))  # d/n, as u = −g
    reset = np.array([m["learning_rate"] * ratio(w, jax.grad(f)(w)) < 1.5 for _, f, w, _, m in run])  # σ = η d/n (8)
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.2), layout="constrained")
    for axis, values, name in zip(axes.flat, (loss, lam, eta * lam - 2), ("training loss", "sharpness λ", "y = ηλ − 2")):
        axis.plot(t, values, color=plots.COLORS["feedback"], linewidth=1.2)
        axis.plot(t[reset], values[reset], "o", color="#000000", markersize=4, label="reset, σ = 1")
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_xlabel("step", fontsize=9)
    axes[1, 0].axhline(0, color="#D55E00", linewidth=1, linestyle=(0, (6, 3)), zorder=0)
    at = next((k for k in np.flatnonzero(reset) if 0 < k < steps - 1), 1)  # the first of them
    for k, color, style in ((at - 1, "#CC79A7", ":"), (at, "#000000", "-"), (at + 1, "#0072B2", "--")):
        _, f, w, top, _ = run[k]
        x = theory.dot(jax.grad(f)(w), top.vector) / top.value  # from the bottom, as in theory.py
        s = np.linspace(-1.6, 1.6, 41) * max(abs(float(x)), 0.1)
        along = jax.jit(jax.vmap(lambda s: f(jax.tree.map(lambda w, v: w + (s - x) * v, w, top.vector))))(s)
        axes[1, 1].plot(s * np.sign(x), along, style, color=color, label=f"step {t[k]:.0f}" + ", reset" * bool(k == at), linewidth=1.2)
        axes[1, 1].plot(abs(x), f(w), "o", color=color, markersize=5)
    axes[1, 1].set_title("loss along the top eigenvector, from its bottom", fontsize=9, loc="left")
    axes[1, 1].set_xlabel("displacement |x|", fontsize=9)
    plots.finish(figure, axes, file)


def alternatives(_, file, steps=600, names=("gd", "momentum", "rmsprop")):
    """A drawing: the final loss where something else than a loss above its average asks for the greedy step."""

    def after(sign, start):  # sign(memory, value, u) -> (whether to take a greedy step, memory), from start(w)
        def rate(state, f, w, value, g, u):
            reset, memory = sign(state[0], value, u)
            eta, averages = train.tuners.cdat(jnp.where(reset, 1.0, 2.5)).rate(state[1], f, w, value, g, u)
            return eta, (memory, averages)

        return train.tuners.Tuner(lambda w: (start(w), train.tuners.cdat().init(w)), rate)

    cos = lambda a, b: theory.dot(a, b) / jnp.sqrt(theory.dot(a, a) * theory.dot(b, b))
    highest, zeros = lambda w: jnp.full((), jnp.inf), lambda w: jax.tree.map(jnp.zeros_like, w)
    rules = {
        "CDAT σ = 2": train.tuners.cdat(),
        "feedback": train.tuners.feedback(),
        "the last step raised the loss": after(lambda last, value, u: (value > last, value), highest),
        "it is 20 % above its lowest": after(lambda low, value, u: (value > 1.2 * low, jnp.minimum(low, value)), highest),
        "u turned: cos < −0.9": after(lambda last, value, u: (cos(u, last) < -0.9, u), zeros),
        "every third step": after(lambda t, value, u: (t % 3 == 2, t + 1), lambda w: jnp.zeros((), int)),
    }
    losses = {}
    samples, _, classes, _, _ = train.placed(train.Config())
    network = train.models.mlp((8, 8, 1), classes)
    f = lambda w, batch: train.mse(network.apply(w, batch[0]), batch[1]) + 0.5e-5 * theory.dot(w, w)
    figure, axes = plt.subplots(1, len(names), figsize=(9, 2.8), sharey=True, squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names):
        optimizer = train.gd.OPTIMIZERS[name]()
        for row, (rule, tuner) in enumerate(rules.items()):
            step = jax.jit(train.gd.make_step(f, optimizer, tuner), donate_argnums=0)
            for seed in SEEDS:
                carry, history = train.gd.init_carry(network.init(jax.random.key(seed)), optimizer, tuner), []
                for _ in range(steps):
                    carry, metrics = step(carry, samples)
                    history.append(metrics["loss"])
                losses.setdefault((rule, name), []).append(plots.final_loss({"loss": np.array(history)}))
            axis.plot(losses[rule, name], [row] * len(SEEDS), "o", color=plots.COLORS["cdat" if row == 0 else "feedback"], alpha=0.7)
        axis.set_yticks(range(len(rules)), rules)
        axis.set(xscale="log", xlabel="final training loss")
        axis.xaxis.set_minor_formatter(plt.NullFormatter())
        axis.set_title(name, fontsize=9, loc="left")
    axes[0, 0].invert_yaxis()
    plots.finish(figure, axes, file)
    print(markdown(["σ = 1 when", *names], [[rule, *(f"{np.median(losses[rule, name]):.3g}" for name in names)]
                                                 for rule in rules]))  # fmt: skip


# ---------------------------------------------------------------------------------------------------- experiments


class Experiment(NamedTuple):
    claim: str  # what the paper says, or what is asked
    time: str  # on two cores, where no run is there yet
    runs: Callable  # runs(scale): dicts from flag to value or values
    draw: Callable  # draw(runs, file)


def everywhere(*tuners):
    """The runs of Figures 1 and 5, but only of some tuners."""

    def runs(scale):
        searches = SEARCHES if scale == "paper" else [LINESEARCH]
        given = on(SETTINGS, scale, CONSTANT, *searches, GREEDY, cdat(2.0, 1.9375, 2.0625, 2.5))
        return [flags for flags in given if flags["tuner"] in tuners]

    return runs


def mini(*tuners):
    """Tuners on mini-batches of two sizes."""
    return lambda scale: on(["batches"], scale, *(tuner | dict(batch_size=[64, 256]) for tuner in tuners))


def varied(scale):
    """Figure 18: one of width, depth, weight decay and samples at a time."""
    values = dict(width=[16, 64, 256], depth=[1, 2, 4], weight_decay=[0.0, 1e-3, 1e-2], samples=[256, 512, 1024])
    return on(["mnist"], scale, *(tuner | {name: value} for tuner in (CONSTANT, cdat(2.0, 1.0, 2.0625))
                                  for name, grid in values.items() for value in grid))  # fmt: skip


def rivals(scale):
    """feedback against the others: on every setting, under each optimizer, on mini-batches of two sizes."""
    warm = WARM | dict(warmup=0.05, lr=lambda grid: [2 * grid[-2], 8 * grid[-2]])  # the best shape of Figure 19
    others = (CONSTANT, warm, LINESEARCH, GREEDY, POLYAK[0], cdat(2.0, 1.9375, 2.0625), FEEDBACK)
    runs = on(["digits", "mnist", "mlp", "resnet", "mixer", "nanolm", "momentum", "rmsprop"], scale, *others)
    averaged = {"cdat": dict(beta=0.9), "feedback": dict(beta=0.9)}  # which Adam needs
    runs += on(["adam"], scale, *(tuner | averaged.get(tuner["tuner"], {}) for tuner in others))
    return runs + mini(*others)(scale)


EXPERIMENTS = {
    "defaults": Experiment(
        "CDAT σ = 2 ends lower than a constant rate, and the greedy rule higher", "5 min",
        lambda scale: [dict(tuner=["constant", "linesearch", "greedy", "cdat"], lr=0.1, seed=[0, 1, 2, 3])], plots.draw),
    "edges": Experiment(
        "a constant rate ends with ηλ at the edge of its optimizer: 2, and 3.8 for momentum", "3 min",
        lambda scale: on(["digits"], scale, dict(tuner="constant", lr=0.1), WARM | dict(lr=0.1),
                         dict(tuner="constant", lr=1e-4, optimizer="rmsprop"),
                         dict(tuner="constant", lr=0.05, optimizer="momentum"),
                         WARM | dict(lr=1.0, optimizer="momentum")),
        plots.panels("loss", "sharpness", "product")),
    "fig1": Experiment(
        "linesearch and greedy end above the tuned constant rate; linesearch may lead early", "11 min",
        everywhere("constant", "linesearch", "greedy"), plots.panels("loss")),
    "searches": Experiment(
        "the linesearch over the paper's grid (c₋ = 0.8), on the MLP of Figure 1", "8 min",
        lambda scale: on(["mlp"], scale, CONSTANT, *SEARCHES[:8]), plots.draw),
    "fig2": Experiment(
        "on a linear model linesearch and greedy work well", "1 min",
        lambda scale: on(["linear"], scale, CONSTANT, LINESEARCH, GREEDY), plots.panels("loss", "learning_rate")),
    "fig3": Experiment(
        "under both η falls and λ rises with ηλ just below 2; a constant rate settles around 2", "with fig1",
        everywhere("constant", "linesearch", "greedy"), plots.panels("learning_rate", "sharpness", "product", "grad_norm")),
    "fig4": Experiment(
        "(and 10) the simplified model: with y fixed below 0 nothing feeds back, and λ runs away", "1 min",
        lambda scale: [], plots.curves(*FIGURE_4)),
    "fig5": Experiment(
        "σ = 2 beats σ = 1 and is on par with the constant rate or better; 2.0625 is better still; 2.5 diverges",
        "11 min", everywhere("constant", "greedy", "cdat"), plots.panels("loss", "learning_rate")),
    "fig6": Experiment(
        "under CDAT λ does not rise, and ηλ sits slightly above 2", "with fig5",
        everywhere("constant", "greedy", "cdat"), plots.panels("sharpness", "product", "grad_norm")),
    "fig7": Experiment(
        "the best σ falls with the batch size; the moving average smooths it", "6 min",
        lambda scale: on(["batches"], scale, cdat(0.8, 1.2, 1.6, 1.8, 2.0, 2.2, 2.4, beta=[0.0, 0.9],
                                                  batch_size=[8, 32, 128, 0])),
        plots.heat("sigma", "batch_size", split="beta")),
    "fig8": Experiment(
        "(and 20, 21) on mini-batches (here of 64 and 256) CDAT gains little over constant rates and schedules", "2 min",
        mini(CONSTANT, *(dict(tuner="schedule", lr=rates(0.4, 4), decay=decay) for decay in ("cosine", "linear")),
             cdat(2.0, 1.6, 1.2, beta=[0.0, 0.9])), plots.panels("loss", "learning_rate", searched=(*plots.SEARCHED, "cdat"))),
    "fig9": Experiment(
        "(and 11) the simplified model of CDAT: σ = 2 holds y near 0, σ = 1.9 lets λ grow", "1 min",
        lambda scale: [], plots.curves(*FIGURE_9)),
    "fig12": Experiment(
        "with linesearch and greedy u aligns with the top eigenvector", "with fig1",
        everywhere("constant", "linesearch", "greedy"), plots.panels("alignment")),
    "fig13": Experiment(
        "Polyak's rate beats CDAT σ = 2 and σ = 2.0625 matches it; hypergradient is on par with a constant rate", "6 min",
        lambda scale: on(["digits", "mlp"], scale, CONSTANT, *POLYAK, *HYPER, cdat(2.0, 2.0625)),
        plots.panels("loss", "learning_rate", "sharpness")),
    "fig14": Experiment(
        "on mini-batches linesearch and greedy do well", "1 min",
        mini(CONSTANT, LINESEARCH, GREEDY), plots.panels("loss", "learning_rate")),
    "fig15": Experiment(
        "η = σ/λ is poor at σ = 2 and good at σ = 3: alignment matters", "9 min",
        lambda scale: on(["digits", "mlp"], scale, dict(tuner="exact", sigma=[2.0, 3.0]), CDAT),
        plots.panels("loss", "learning_rate", "product")),
    "fig16": Experiment(
        "at each step the greedy rate lowers the loss more than the on-edge rate would: it wins each step and loses the race",
        "with fig5", everywhere("cdat"), plots.panels("greedy_gain")),
    "fig17": Experiment(
        "under CDAT successive updates end up opposed", "with fig5",
        everywhere("constant", "greedy", "cdat"), plots.panels("alignment", "turn")),
    "fig18": Experiment(
        "gains grow with width and depth and fade with weight decay", "7 min", varied, plots.width_and_depth),
    "fig19": Experiment(
        "a tuned schedule can still beat CDAT", "9 min",
        lambda scale: on(["digits"], scale, CONSTANT, *SCHEDULES, cdat(2.0, 2.0625)), plots.panels("loss", "learning_rate")),
    "test": Experiment(
        "asked by readers: do the tuners differ in test loss and accuracy at equal training loss?", "with defaults",
        lambda scale: [dict(tuner=["constant", "greedy", "cdat"], lr=0.1, seed=[0, 1, 2, 3])], plots.at_equal_loss),
    "others": Experiment(
        "asked by readers: does CDAT σ = 2 beat greedy and the tuned constant rate on a CNN and an RNN?", "5 min",
        lambda scale: on(["cnn", "rnn"], scale, CONSTANT, GREEDY, CDAT), plots.panels("loss", "learning_rate", "product")),
    "overlay": Experiment(
        "beyond the paper: does the model (4) predict the next sharpness of a real run?", "1 min", lambda scale: [], overlay),
    "feedback": Experiment(
        "ours: CDAT over the edge and back ends below CDAT σ = 2", "10 min", rivals, plots.against("CDAT σ = 2")),
    "sensitivity": Experiment(
        "ours: the numbers of the feedback rule need no tuning", "6 min",
        lambda scale: on(["digits"], scale, *(FEEDBACK | dict(sigma_high=high, tolerance=tolerance, average=average, steps=600,
                                                              sharpness_every=600) for average in (0.8, 0.9, 0.95)
                                              for high in (2.25, 2.5, 3.0, 4.0) for tolerance in (0.0, 0.05, 0.2))),
        plots.heat("sigma_high", "tolerance", split="average")),
    "alternatives": Experiment(
        "ours: does a simpler sign than the average of the loss do as well?", "3 min", lambda scale: [], alternatives),
    "resets": Experiment(
        "ours: a greedy step takes out what had grown along the top eigenvector", "1 min", lambda scale: [], resets),
}  # fmt: skip
ALSO = {"fig10": "fig4", "fig11": "fig9", "fig20": "fig8", "fig21": "fig8"}  # figures that are panels of others here


def configs(name, scale="laptop", **flags):
    """The runs of an experiment, each a train.Config, once."""
    given = [run | flags for run in EXPERIMENTS[name].runs(scale)]
    return list(dict.fromkeys(config for run in given for config in train.configurations(run)))


# -------------------------------------------------------------------------------------------------------- results

RESULTS = FIGURES / "results.csv"
TARGETS = {  # by setting: the loss to which steps and time are counted, about what the tuned constant rate ends with
    "mlp, digits": 0.025, "mlp, mnist": 0.085, "mlp, cifar10": 0.3, "resnet, cifar10": 1.3, "mixer, cifar10": 0.01,
    "transformer, shakespeare, rmsprop": 0.05, "mlp, digits, momentum": 0.02, "mlp, digits, rmsprop": 0.02,
    "mlp, digits, adam": 0.005, "mlp, digits, batch 64": 0.055, "mlp, digits, batch 256": 0.055,
}  # fmt: skip
MATRICES = {"loss": "final training loss", "test_loss": "test loss", "reach": "steps to reach a loss (inf: never)",
            "reach_seconds": "seconds to reach it, with all that is logged and measured"}  # fmt: skip


def run(name, scale, data_dir, out):
    """Trains what is not there yet, draws the figure, and keeps a row of numbers for each run."""
    runs, rows = [], results.read(RESULTS)
    todo = configs(name, scale, resume=True, data_dir=data_dir, out=out)
    for k, config in enumerate(todo):
        print(f"[{k + 1}/{len(todo)}] {train.name_of(config)}", flush=True)
        history = train.train(config)
        settings = dataclasses.asdict(config) | plots.read_settings(Path(config.out) / train.name_of(config))
        names = dict(run=train.name_of(dataclasses.replace(config, seed=0)), name=results.label_of(config))
        runs.append((settings | names, history))
        rows[train.name_of(config)] = results.summary(settings, history, TARGETS.get(plots.setting_of(settings), -np.inf))
    EXPERIMENTS[name].draw(runs, FIGURES / f"{name}.png")
    results.write(RESULTS, rows)


def kinds(name):
    """The kinds of runs of an experiment of which there are results."""
    return results.kinds(configs(name), results.read(RESULTS))


# --------------------------------------------------------------------------------------------------------- claims


def best_sigmas():
    """Figure 7: the best σ by (β, batch size), and whether it falls as the batch shrinks."""
    best = {}
    for kind in sorted(kinds("fig7"), key=lambda kind: -kind.median("loss")):  # the best comes last and stays
        best[kind.config.beta, kind.config.batch_size or np.inf] = kind.config.sigma
    return [(f"β = {beta:g}", ", ".join(f"batch {size:g}: {best[beta, size]:g}" for size in sizes),
             results.falls([best[beta, size] for size in sizes]))
            for beta in sorted({beta for beta, _ in best}) if (sizes := sorted(size for b, size in best if b == beta))]  # fmt: skip


def gains(word, grows=True):
    """Figure 18: the tuned constant rate's loss over that of CDAT σ = 2, by the values of what varies."""
    losses, plain = {}, on(["mnist"], "laptop", CDAT)[0] | dict(weight_decay=1e-5)
    for kind in kinds("fig18"):
        if all(getattr(kind.config, key) == plain[key] for key in ("samples", "width", "depth", "weight_decay") if key != word):
            of_value = losses.setdefault(getattr(kind.config, word), {})
            label = "constant" if kind.config.tuner == "constant" else kind.label
            of_value[label] = min(of_value.get(label, np.inf), kind.median("loss"))
    ratios = {value: of_value["constant"] / of_value["CDAT σ = 2"] for value, of_value in sorted(losses.items())}
    ordered = list(ratios.values()) == sorted(ratios.values(), reverse=not grows)
    return [(word.replace("_", " "), ", ".join(f"{value:g}: × {ratio:.2g}" for value, ratio in ratios.items()), ordered)]


def model_of_figure_4():
    """Whether λ runs away in the model (6)."""
    lam = theory.below_edge(steps=1000).sharpness
    return [("model", f"λ from {lam[0]:.3g} to {lam[-1]:.3g} in 1000 steps", bool(lam[-1] > 10 * lam[0]))]


def model_of_figure_9():
    """Whether σ = 2 holds λ and y in the model (9), (10)."""
    ends = {sigma: float(theory.cdat_model(sigma).sharpness[-1]) for sigma in (2, 1.9)}
    return [("model", f"λ from 18 to {ends[2]:.3g} (σ = 2) and {ends[1.9]:.3g} (σ = 1.9) in 4000 steps", ends[2] < 1.05 * 18),
            ("model", f"y ends at {(y := float(theory.cdat_model(2).y[-1])):.4f} (σ = 2)", abs(y) < 0.05)]  # fmt: skip


def logged_cost(tuner, low, high):
    """From figures/cost.txt: the time of a tuner's step in constant-rate steps."""
    rows = re.findall(rf"^\| (\w+) \| {tuner} \| [\d.]+ \| ([\d.]+) \|", (FIGURES / "cost.txt").read_text(), re.MULTILINE)
    return [(family, f"× {time}", low <= float(time) <= high) for family, time in rows]


CLAIMS = [
    ("1", "linesearch ends above the tuned constant rate", lambda: below(kinds("fig1"), "constant", "linesearch")),
    ("1", "so does the best linesearch of its grid", lambda: below(kinds("searches"), "constant", "linesearch")),
    ("1", "greedy ends above the tuned constant rate", lambda: below(kinds("fig1"), "constant", "greedy")),
    ("2", "linear model: linesearch within 10 % of the best constant rate, or better", lambda: below(kinds("fig2"), "linesearch", "constant", 1.1)),
    ("2", "linear model: greedy likewise", lambda: below(kinds("fig2"), "greedy", "constant", 1.1)),
    ("3", "greedy: η falls", lambda: ratio(kinds("fig3"), "greedy", "rate", 0, 1)),
    ("3", "greedy: λ rises", lambda: ratio(kinds("fig3"), "greedy", "sharpness", 1, np.inf)),
    ("3", "linesearch: λ rises", lambda: ratio(kinds("fig3"), "linesearch", "sharpness", 1, np.inf)),
    ("3", "greedy: ηλ just below 2 (1.6 to 2)", lambda: within(kinds("fig3"), "greedy", "product", 1.6, 2)),
    ("3", "a constant rate stabilises ηλ around 2 (1.7 to 2.3)", lambda: within(kinds("edges"), "constant", "product", 1.7, 2.3)),
    ("4", "simplified model: with y fixed below 0 λ runs away", model_of_figure_4),
    ("5", "CDAT σ = 2 on par with the tuned constant rate (at most 5 % above), or better", lambda: below(kinds("fig5"), "CDAT σ = 2", "constant", 1.05)),
    ("5", "CDAT σ = 2 always better than σ = 1, greedy", lambda: below(kinds("fig5"), "CDAT σ = 2", "greedy")),
    ("5", "σ = 2.0625 better still", lambda: below(kinds("fig5"), "CDAT σ = 2.0625", "CDAT σ = 2")),
    ("5", "σ = 2.5 generally diverges, or ends above σ = 2", lambda: below(kinds("fig5"), "CDAT σ = 2", "CDAT σ = 2.5")),
    ("5", "η rises on its own under σ = 2", lambda: ratio(kinds("fig5"), "CDAT σ = 2", "rate", 1, np.inf)),
    ("6", "λ does not rise under σ = 2", lambda: ratio(kinds("fig6"), "CDAT σ = 2", "sharpness", 0, 1.05)),
    ("6", "ηλ sits slightly above 2 (2 to 2.6)", lambda: within(kinds("fig6"), "CDAT σ = 2", "product", 2, 2.6)),
    ("7", "the best σ falls with the batch size", best_sigmas),
    ("8", "mini-batches: CDAT gains little, at most 20 %, over the best constant rate", lambda: below(kinds("fig8"), "constant", "CDAT", 1.2)),
    ("8", "mini-batches: the best schedule beats it", lambda: below(kinds("fig8"), "schedule", "CDAT")),
    ("9", "simplified model: σ = 2 holds λ (within 5 %) and y near 0", model_of_figure_9),
    ("12", "greedy aligns u with the top eigenvector (above 0.5)", lambda: within(kinds("fig12"), "greedy", "alignment", 0.5, 1)),
    ("13", "Polyak beats CDAT σ = 2", lambda: below(kinds("fig13"), "polyak", "CDAT σ = 2")),
    ("13", "σ = 2.0625 matches Polyak (at most 10 % above)", lambda: below(kinds("fig13"), "CDAT σ = 2.0625", "polyak", 1.1)),
    ("13", "hypergradient on par with a constant rate (at most 10 % above)", lambda: below(kinds("fig13"), "hypergradient", "constant", 1.1)),
    ("14", "mini-batches: linesearch does well (at most 10 % above the best constant rate)", lambda: below(kinds("fig14"), "linesearch", "constant", 1.1)),
    ("14", "mini-batches: greedy likewise", lambda: below(kinds("fig14"), "greedy", "constant", 1.1)),
    ("15", "η = 2/λ is poor: CDAT σ = 2 ends below", lambda: below(kinds("fig15"), "CDAT σ = 2", "exact σ = 2")),
    ("15", "η = 3/λ is good: at most 10 % above CDAT σ = 2", lambda: below(kinds("fig15"), "exact σ = 3", "CDAT σ = 2", 1.1)),
    ("16", "the greedy rate lowers the loss more than the on-edge rate at (nearly) each step", lambda: within(kinds("fig16"), "CDAT σ = 2", "gain", 0.95, 1)),
    ("17", "successive updates end up opposed under σ = 2 (cosine below −0.5)", lambda: within(kinds("fig17"), "CDAT σ = 2", "turn", -1, -0.5)),
    ("18", "gains grow with width", lambda: gains("width")),
    ("18", "gains grow with depth", lambda: gains("depth")),
    ("18", "gains fade with weight decay", lambda: gains("weight_decay", grows=False)),
    ("19", "a tuned schedule beats CDAT σ = 2", lambda: below(kinds("fig19"), "schedule", "CDAT σ = 2")),
    ("C.3", "a CDAT step takes about twice the time of a constant-rate step (1.5 to 2.5)", lambda: logged_cost("cdat", 1.5, 2.5)),
]  # fmt: skip


def claims():
    """The verdicts in Markdown: figure, claim, what was measured (medians over three seeds), whether it holds."""
    lines = []
    for figure, claim, measure in CLAIMS:
        found = measure()
        held = sum(ok for *_, ok in found)
        verdict = "not run" if not found else "holds" if held == len(found) else "holds partly" if held else "does not hold"
        if verdict == "holds partly":
            verdict += f" ({held} of {len(found)})"
        lines.append([figure, claim, "; ".join(f"{setting}: {text}" for setting, text, _ in found), verdict])
    return markdown(["figure", "claim", "measured: median over the seeds", "verdict"], lines)


def listing():
    """What there is to run, in Markdown."""
    return markdown(["`python experiments.py` …", "time", "claim or question"],
                    [[f"`{name}`", experiment.time, experiment.claim] for name, experiment in EXPERIMENTS.items()])  # fmt: skip


def costs(tuner):
    """From figures/cost.txt: the machine, the steps under one tuner in each family, and what a run costs beside its steps."""
    machine, _, steps, facts = (FIGURES / "cost.txt").read_text().strip().split("\n\n")
    lines = steps.splitlines()
    lines = lines[:2] + [line for line in lines if f"| {tuner} |" in line]
    return "\n".join([machine + ":", "", *lines, "", *(f"- {fact}" for fact in facts.splitlines())])


def with_tables(text):
    """The text with each table between <!-- table: NAME --> (or matrix, claims, list, cost) and <!-- end --> as the results have it."""
    makers = {"table": lambda name: results.table(kinds(name)), "matrix": lambda name: results.matrix(kinds(name)),
              "claims": lambda _: claims(), "list": lambda _: listing(), "cost": costs}  # fmt: skip
    fill = lambda match: f"{match[1]}\n{makers[match[2]](match[3])}\n<!-- end -->"
    return re.sub(r"(<!-- (\w+): (\w+) -->)\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def readme():
    """Writes the tables of README.md anew."""
    file = Path(__file__).parent / "README.md"
    file.write_text(with_tables(file.read_text()))


COMMANDS = {"cost": cost.main, "claims": lambda: print(claims()), "readme": readme}


def fail(message):
    """One line on stderr, and the end."""
    train.fail(message, "experiments.py")


def one(name, options):
    """One experiment: run unless its table alone is asked for, and the table."""
    if not options.table:
        started = time.time()
        run(name, options.scale, options.data_dir, options.out)
        print(f"{FIGURES / name}.png, {(time.time() - started) / 60:.1f} min", flush=True)
    if found := kinds(name):
        print(results.table(found))
    if found and name == "feedback":
        print(*(f"\n{about}:\n\n{results.matrix(found, column)}" for column, about in MATRICES.items()), sep="\n")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description="The paper's figures, from a laptop.", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="name", help="an experiment of --list, all, cost, claims or readme")
    parser.add_argument("--list", action="store_true", help="each experiment with its time and claim")
    parser.add_argument("--table", action="store_true", help="the table of the committed results, without running")
    parser.add_argument("--scale", choices=["laptop", "paper"], default="laptop", help="the paper's own settings, or smaller")
    parser.add_argument("--data-dir", default="datasets", help="folder that holds the data sets, or is to")
    parser.add_argument("--out", default="runs", help="folder of the run folders")
    parser.error = fail
    options = parser.parse_args(argv)
    if options.list or not options.names:
        for name, experiment in EXPERIMENTS.items():
            print(textwrap.fill(f"{name:12} {experiment.time:>13}  {experiment.claim}", 80, subsequent_indent=28 * " "))
    names = [ALSO.get(name, name) for name in options.names]
    for name in names:
        if name not in {*EXPERIMENTS, *COMMANDS, "all"}:
            fail(f"no experiment {name!r}; there are {', '.join([*EXPERIMENTS, *ALSO, *COMMANDS, 'all'])}")
    try:
        for name in EXPERIMENTS if "all" in names else names:
            COMMANDS[name]() if name in COMMANDS else one(name, options)
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here")
        sys.exit(130)


if __name__ == "__main__":
    main()

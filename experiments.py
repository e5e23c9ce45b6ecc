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
import contextlib
import csv
import dataclasses
import functools
import io
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.flatten_util import ravel_pytree

import plots
import sharpness
import theory
import train
import tuners

FIGURES = Path(__file__).parent / "figures"
SEEDS = [0, 1, 2]

# ------------------------------------------------------------------------------------------------------- settings

LAPTOP = {
    "digits": {},
    "linear": dict(model="linear"),
    "mlp": dict(dataset="cifar10", samples=512, width=256, steps=300, sharpness_every=20),
    "resnet": dict(dataset="cifar10", model="resnet", samples=128, width=4, steps=150, sharpness_every=50),
    "mixer": dict(dataset="cifar10", model="mixer", loss="ce", samples=128, width=32, steps=150, sharpness_every=50),
    "nanolm": dict(dataset="shakespeare", model="transformer", loss="ce", optimizer="rmsprop", samples=64, width=32,
                   steps=150, sharpness_every=50),
    "vit": dict(dataset="imagenette", model="vit", loss="ce", optimizer="rmsprop", samples=128, image_size=24, width=32,
                steps=150, sharpness_every=50),
    "mnist": dict(dataset="mnist", samples=512, width=64, depth=2, steps=300, sharpness_every=300),
    "batches": dict(samples=0, steps=600, sharpness_every=600),
    "cnn": dict(dataset="cifar10", model="cnn", samples=256, steps=300),
    "rnn": dict(dataset="shakespeare", model="rnn", loss="ce", samples=128, width=64, steps=300),
}  # fmt: skip
SMALL = dict(sharpness_tol=0.01, test_samples=256)  # what is measured must not cost more than what is trained
LAPTOP |= {name: LAPTOP[name] | SMALL for name in ("mlp", "resnet", "mixer", "nanolm", "vit", "cnn", "rnn")}  # fmt: skip
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
FOUR = ["mlp", "resnet", "mixer", "nanolm", "vit"]  # the settings of Figures 1, 3, 5 and 6: the paper's four, and an MLP


def rates(first, count):
    """A grid with a factor of 2.

    >>> rates(0.1, 3)
    [0.1, 0.2, 0.4]
    """
    return [first * 2**k for k in range(count)]


GRIDS = {  # the constant rates, chosen to bracket the best
    "digits": rates(0.025, 4), "linear": rates(0.0125, 6), "mlp": rates(0.0025, 4), "resnet": rates(0.08, 4),
    "mixer": rates(0.08, 4), "nanolm": rates(4e-4, 4), "vit": rates(1.6e-4, 4), "mnist": rates(0.05, 3),
    "batches": rates(0.05, 4), "cnn": rates(0.02, 4), "rnn": rates(0.02, 4),
}  # fmt: skip
PAPER_GRIDS = GRIDS | {"resnet": rates(5e-4, 9), "mixer": rates(5e-4, 9), "nanolm": rates(5e-4, 9),
                       "vit": rates(1e-5, 8), "linear": rates(1e-3, 3)}  # fmt: skip


def on(settings, scale, *tuners):
    """Runs as train.configurations takes them: each tuner, a dict of flags, in each setting, with all seeds.

    A tuner with lr=None has the setting's grid of constant rates.
    """
    table, grids = (PAPER, PAPER_GRIDS) if scale == "paper" else (LAPTOP, GRIDS)
    return [table[name] | {"seed": SEEDS} | {key: grids[name] if value is None else value for key, value in tuner.items()}
            for name in settings for tuner in tuners]  # fmt: skip


CONSTANT, LINESEARCH, GREEDY = dict(tuner="constant", lr=None), dict(tuner="linesearch"), dict(tuner="greedy")
CDAT = dict(tuner="cdat", sigma=2.0)
WARM = dict(tuner="schedule", decay="constant", warmup=0.2)  # a constant rate, but for how it is entered


def cdat(*sigmas, **more):
    return dict(tuner="cdat", sigma=list(sigmas), **more)


# -------------------------------------------------------------------------------------------------------- drawing

QUANTITIES = {
    "loss": "training loss", "learning_rate": "learning rate η", "sharpness": "sharpness λ", "product": "ηλ",
    "grad_norm": "gradient norm", "alignment": "alignment of u\nwith top eigenvector", "turn": "cos∠(u now, u before)",
    "greedy_gain": "f(w + η_edge u)\n− f(w + η_greedy u)", "test_loss": "test loss", "test_accuracy": "test accuracy",
}  # fmt: skip
LOG = ("loss", "learning_rate", "sharpness", "grad_norm", "test_loss")
SIGMAS = {1.0: "-", 1.9375: ":", 2.0: "-", 2.0625: "--", 2.5: "-."}


def setting_of(config):
    """What a run trains, in words."""
    words = [config["preset"] or config["model"], config["dataset"]]
    words += [config["optimizer"]] * (config["optimizer"] != "gd")
    return ", ".join(words + [f"batch {config['batch_size']}"] * bool(config["batch_size"]))


def kind_of(config):
    """A run but for its seed."""
    return train.name_of(dataclasses.replace(train.Config(), **{k: config[k] for k in train.FIELDS} | {"seed": 0}))


def mean_loss(runs):
    """By kind: the mean over the seeds of the final loss, inf where one diverged."""
    losses = {}
    for config, history in runs:
        losses.setdefault(kind_of(config), []).append(train.final_loss(history))
    return {kind: np.mean(values) for kind, values in losses.items()}


def tuned(runs):
    """The runs without those constants, schedules and linesearches that another of their setting and tuner beats."""
    losses, best = mean_loss(runs), {}
    for config, _ in runs:
        kind, group = kind_of(config), (setting_of(config), config["tuner"], config["decay"])
        if losses[kind] < losses.get(best.get(group), np.inf):
            best[group] = kind
    searched = ("constant", "schedule", "linesearch", "polyak", "hypergradient")
    return [(config, history) for config, history in runs if config["tuner"] not in searched
            or best.get((setting_of(config), config["tuner"], config["decay"])) == kind_of(config)]  # fmt: skip


def panels(*quantities, thinned=tuned):
    """A drawing: a row for each quantity, a column for each setting, a line for each run."""

    def draw(runs, file):
        runs = thinned(runs)
        columns = list(dict.fromkeys(setting_of(config) for config, _ in runs))
        figure, axes = plt.subplots(len(quantities), len(columns), squeeze=False, sharex="col", layout="constrained",
                                    figsize=(max(5, 2.6 * len(columns)), 0.6 + 1.9 * len(quantities)))  # fmt: skip
        for config, history in runs:
            for row, quantity in enumerate(quantities):
                line(axes[row, columns.index(setting_of(config))], quantity, config, history)
        for row, quantity in enumerate(quantities):
            axes[row, 0].set_ylabel(QUANTITIES[quantity], fontsize=9)
            for axis in axes[row]:
                finish(axis, quantity)
        for column, name in enumerate(columns):
            axes[0, column].set_title(name, fontsize=9)
            axes[-1, column].set_xlabel("step", fontsize=9)
            edges = {plots.edge(config) for config, _ in runs if setting_of(config) == name}
            for row in [row for row, quantity in enumerate(quantities) if quantity == "product"]:
                axes[row, column].axhline(max(edges), color="#D55E00", linewidth=1, linestyle=(0, (6, 3)), zorder=0)
                axes[row, column].set_ylim(0, 2 * max(edges))
        entries = {}
        for axis in axes.flat:
            entries |= dict(zip(*reversed(axis.get_legend_handles_labels())))
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", frameon=False, fontsize=9,
                      ncols=max(3, int(1.7 * len(columns))))  # fmt: skip
        figure.savefig(file, dpi=130)
        plt.close(figure)

    return draw


def line_name(config):
    """What the legend calls a run: its tuner, and σ."""
    return plots.labels([config])[0] if config["tuner"] in ("cdat", "exact") else config["tuner"]


def line(axis, quantity, config, history):
    """One run; a cross marks where it diverged."""
    history = history | {"product": history["learning_rate"] * history["sharpness"]}
    step, values = history["step"], history[quantity]
    shown = np.isfinite(values) & ((values > 0) | (quantity not in LOG))
    name = line_name(config)
    style = SIGMAS.get(config["sigma"], "--") if config["tuner"] in ("cdat", "exact") else "-"
    color = plots.COLORS[config["tuner"]]
    axis.plot(step[shown], values[shown], style, color=color, label=name, linewidth=1, alpha=0.8)
    if config["status"] == "diverged" and shown.any():
        axis.plot(step[shown][-1], values[shown][-1], "x", color=color, markersize=7, markeredgewidth=1.5)


def finish(axis, quantity):
    """Scale and frame of a panel."""
    if quantity in LOG and axis.lines:
        axis.set_yscale("log")
        values = np.concatenate([line.get_ydata() for line in axis.lines])
        if quantity == "loss":  # a run that blows up must not press the others flat
            start = max(line.get_ydata()[0] for line in axis.lines)
            axis.set_ylim(0.7 * values.min(), 3 * start)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(which="both", labelsize=8)


def heat(x, y, of, split=None):
    """A drawing: log10 of the final loss, averaged over the seeds, over two settings; a panel for each value of split.

    The best of each row has a frame, a cell with a diverged run a cross.
    """

    def draw(runs, file):
        runs = [run for run in runs if run[0]["tuner"] == of]
        losses = mean_loss(runs)
        parts = sorted({config[split] for config, _ in runs}) if split else [None]
        figure, axes = plt.subplots(1, len(parts), squeeze=False, layout="constrained", figsize=(4.6 * len(parts), 3.2))
        for axis, part in zip(axes[0], parts):
            cells = {(config[y], config[x]): losses[kind_of(config)] for config, _ in runs if part in (None, config.get(split))}
            xs, ys = (sorted({key[k] for key in cells}, key=lambda value: value or np.inf) for k in (1, 0))  # 0 = all
            table = np.array([[cells.get((b, a), np.inf) for a in xs] for b in ys])
            table[table > 1] = np.inf  # blown up, if not yet to infinity
            image = axis.imshow(np.log10(np.where(np.isfinite(table), table, np.nan)), cmap="viridis_r", aspect="auto",
                                vmin=np.log10(min(losses.values())), vmax=0)  # fmt: skip
            for row, values in enumerate(table):
                axis.add_patch(plt.Rectangle((np.argmin(values) - 0.5, row - 0.5), 1, 1, fill=False, color="#D55E00", linewidth=2))
                for column in np.flatnonzero(~np.isfinite(values)):
                    axis.text(column, row, "×", ha="center", va="center", fontsize=12)
            axis.set_xticks(range(len(xs)), [f"{value:g}" for value in xs], fontsize=8)
            axis.set_yticks(range(len(ys)), [f"{value:g}" if value else "all" for value in ys], fontsize=8)
            axis.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "), title=f"{split} = {part:g}" if split else "")
        figure.colorbar(image, ax=axes[0].tolist(), label="log₁₀ final training loss")
        figure.savefig(file, dpi=130)
        plt.close(figure)

    return draw


def width_and_depth(runs, file):
    """The drawing of Figure 18: final loss against what varies, for each tuner; the constant rate is tuned."""
    losses, panels = mean_loss(runs), {"width": [], "depth": [], "weight_decay": [], "samples": []}
    plain = {name: getattr(train.Config(), name) for name in panels} | LAPTOP["mnist"]
    for config, _ in runs:
        for name in panels:
            if all(config[other] == plain[other] for other in panels if other != name):
                panels[name].append(config)
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.8), layout="constrained", sharey=True)
    for axis, (name, configs) in zip(axes, panels.items()):
        for tuner, sigma in (("constant", None), ("cdat", 1.0), ("cdat", 2.0), ("cdat", 2.0625)):
            best = {}
            for config in configs:
                if config["tuner"] == tuner and sigma in (None, config["sigma"]):
                    best[config[name]] = min(losses[kind_of(config)], best.get(config[name], np.inf))
            label = f"CDAT σ = {sigma:g}" if sigma else "constant, tuned"
            axis.plot(*zip(*sorted(best.items())), "o" + SIGMAS.get(sigma, "-"), color=plots.COLORS[tuner], label=label,
                      markersize=4, alpha=0.5 if sigma == 1 else 1)  # fmt: skip
        axis.set_xlabel(name.replace("_", " "))
        axis.set_xscale("symlog", linthresh=1e-5) if name == "weight_decay" else axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("final training loss")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def curves(*models):
    """A drawing of the simplified model: a column for each (title, paths by label), rows λ, y and p."""

    def draw(_, file):
        figure, axes = plt.subplots(3, len(models), squeeze=False, sharex="col", figsize=(4.4 * len(models), 5.4),
                                    layout="constrained")  # fmt: skip
        for column, (title, paths) in enumerate(models):
            axes[0, column].set_title(title, fontsize=10)
            axes[2, column].set_xlabel("step", fontsize=9)
            for (label, path), color in zip(paths.items(), ("#0072B2", "#D55E00", "#882255")):
                rows = (("sharpness λ", path.sharpness), ("y = ηλ − 2", path.y), ("p = x²", path.p))
                for axis, (name, values) in zip(axes[:, column], rows):
                    axis.plot(values, color=color, label=label, linewidth=1)
                    axis.set_ylabel(name, fontsize=9)
                    axis.spines[["top", "right"]].set_visible(False)
            axes[1, column].axhline(0, color="#999999", linewidth=0.8, zorder=0)
            axes[1, column].set_ylim(-0.6, 0.6)
            axes[2, column].set_yscale("log")
            axes[2, column].set_ylim(bottom=max(1e-12, min(float(path.p.min()) for path in paths.values())))
            axes[0, column].legend(fontsize=8, frameon=False)
        figure.savefig(file, dpi=130)
        plt.close(figure)

    return draw


FIGURE_4 = (("constant rate", {"as printed": theory.constant_rate(), "semi-implicit": theory.constant_rate(semi_implicit=True)}),
            ("rate held below the edge", {"y = −0.1": theory.below_edge()}))  # fmt: skip
FIGURE_9 = (("first 400 steps", {f"σ = {sigma:g}": theory.cdat_model(sigma, steps=400) for sigma in (2, 1.9)}),
            ("4000 steps", {f"σ = {sigma:g}": theory.cdat_model(sigma) for sigma in (2, 1.9)}))  # fmt: skip


def overlay(_, file, first=100, steps=100):
    """A drawing: the sharpness of a real run at a constant rate, and what the model (4) makes of its a, b and x.

    λ swings with x from step to step, which the model leaves out: means of two neighbouring steps are compared.
    """
    config = train.Config(tuner="constant", lr=0.1)
    samples, _, classes, _, _ = train.placed(config)
    init, step, _, hessian = train.functions("mlp", (("activation", "relu"),), (8, 8, 1), classes, "mse", "gd", "constant",
                                             "cosine", 0)[:4]  # fmt: skip
    numbers, network = train.numbers_of(config), train.models.mlp((8, 8, 1), classes)
    f = lambda w: train.mse(network.apply(w, samples[0]), samples[1]) + 0.5e-5 * theory.dot(w, w)
    measure = jax.jit(lambda w, v: theory.measure(f, w, v))
    carry, found = init(0, numbers), []
    v = jax.tree.map(jnp.ones_like, carry.w)
    for t in range(first + steps):
        if t >= first:
            v = sharpness.power_iteration(lambda v: hessian(carry.w, None, v, samples, 1e-5), v, tol=1e-4).vector
            found.append(jax.device_get(measure(carry.w, v)))
        carry, _ = step(carry, samples, None, numbers)
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
    axes[1].plot(t, fall, "--", color="#D55E00", label="feedback ηx²‖∇λ‖²", linewidth=1)
    for axis, name in zip(axes, ("sharpness λ", "change of λ in a step")):
        axis.set_ylabel(name, fontsize=9)
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_xlabel("step")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def against(reference="cdat", sigma=2.0):
    """A drawing: in each setting the final loss of each run, over the mean one of CDAT σ = 2 in that setting."""

    def draw(runs, file):
        runs, base = tuned(runs), {}
        for config, history in runs:
            if (config["tuner"], config["sigma"]) == (reference, sigma):
                base.setdefault(setting_of(config), []).append(train.final_loss(history))
        names = list(base)
        figure, axis = plt.subplots(figsize=(11, 4), layout="constrained")
        kinds = list(dict.fromkeys(line_name(config) for config, _ in runs))
        for config, history in runs:
            k = kinds.index(line_name(config))
            ratio = train.final_loss(history) / np.mean(base[setting_of(config)])
            x = names.index(setting_of(config)) + (k - len(kinds) / 2) / (len(kinds) + 2)
            marker = "os^v"[k % 4] if config["tuner"] == "cdat" else "o"
            axis.plot(x, min(ratio, 20), "x" if ratio > 20 else marker, color=plots.COLORS[config["tuner"]],
                      label=line_name(config), markersize=4)  # fmt: skip
        axis.axhline(1, color="#999999", linewidth=0.8, zorder=0)
        axis.set_yscale("log")
        axis.set_ylabel("final loss over that of CDAT σ = 2\n(crosses: 20 times and more, or diverged)", fontsize=9)
        axis.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        entries = dict(zip(*reversed(axis.get_legend_handles_labels())))
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=6, frameon=False, fontsize=9)
        figure.savefig(file, dpi=130)
        plt.close(figure)

    return draw


# ---------------------------------------------------------------------------------------------------- experiments


class Experiment(NamedTuple):
    claim: str  # what the paper says, or what is asked
    time: str  # on two cores, where no run is there yet
    runs: Callable  # runs(scale): dicts from flag to value or values
    draw: Callable  # draw(runs, file)


def everywhere(scale):
    return on(FOUR, scale, CONSTANT, LINESEARCH, GREEDY, cdat(1.9375, 2.0, 2.0625, 2.5))


def of(*tuners):
    """everywhere, but only some tuners."""
    return lambda scale: [given for given in everywhere(scale) if given["tuner"] in tuners]


def mini(*tuners):
    return lambda scale: on(["batches"], scale, *(tuner | dict(batch_size=[64, 256]) for tuner in tuners))


def varied(scale):
    tuners = (CONSTANT, cdat(1.0, 2.0, 2.0625))
    values = dict(width=[16, 64, 256], depth=[1, 2, 4], weight_decay=[0.0, 1e-3, 1e-2], samples=[256, 512, 1024])
    return on(["mnist"], scale, *(tuner | {name: v} for tuner in tuners for name, grid in values.items() for v in grid))


SCHEDULES = [dict(tuner="schedule", lr=rates(0.1, 4), warmup=warmup, decay=decay)
             for warmup in (0.05, 0.2) for decay in ("constant", "linear", "cosine")]  # fmt: skip
POLYAK = [dict(tuner="polyak", lr_max=lr_max) for lr_max in (1.0, 100.0)]
HYPER = [dict(tuner="hypergradient", lr=lr, hyper_rate=rate) for lr in (0.01, 0.05) for rate in (0.01, 0.1)]
FEEDBACK = dict(tuner="feedback")
RIVALS = (CONSTANT, LINESEARCH, GREEDY, cdat(1.9375, 2.0, 2.0625), FEEDBACK)


def rivals(scale):
    """feedback against the others: on every setting, under each optimizer, on mini-batches of three sizes."""
    optimizers = dict(momentum=rates(0.01, 4), rmsprop=rates(5e-5, 4), adam=rates(5e-4, 4))
    runs = on(["digits", *FOUR], scale, *RIVALS)
    runs += on(["mnist"], scale, CONSTANT, GREEDY, CDAT, FEEDBACK)
    for optimizer, grid in optimizers.items():
        more = dict(optimizer=optimizer) | (dict(beta=0.9) if optimizer == "adam" else {})
        runs += on(["digits"], scale, dict(tuner="constant", lr=grid, optimizer=optimizer), CDAT | more, FEEDBACK | more)
    return runs + on(["batches"], scale, *(tuner | dict(batch_size=[64, 256]) for tuner in (CONSTANT, GREEDY, CDAT, FEEDBACK)))


SENSITIVITY = [FEEDBACK | change for change in ({}, dict(sigma_high=2.25), dict(sigma_high=3.0), dict(sigma_high=4.0),
               dict(tolerance=0.0), dict(tolerance=0.2), dict(average=0.5), dict(average=0.98))]  # fmt: skip


EXPERIMENTS = {
    "defaults": Experiment(
        "CDAT σ = 2 ends lower than a constant rate, and the greedy rule higher", "5 min",
        lambda scale: [dict(tuner=["constant", "linesearch", "greedy", "cdat"], lr=0.1, seed=[0, 1, 2, 3])], plots.draw),
    "edges": Experiment(
        "a constant rate ends with ηλ at the edge of its optimizer: 2, and 3.8 for momentum", "4 min",
        lambda scale: on(["digits"], scale, dict(tuner="constant", lr=0.1), WARM | dict(lr=0.1),
                         dict(tuner="constant", lr=1e-4, optimizer="rmsprop"),
                         dict(tuner="constant", lr=0.05, optimizer="momentum"),
                         WARM | dict(lr=1.0, optimizer="momentum")),
        panels("loss", "sharpness", "product", thinned=list)),
    "fig1": Experiment(
        "linesearch and greedy end above the tuned constant rate; linesearch may lead early", "25 min",
        of("constant", "linesearch", "greedy"), panels("loss")),
    "fig2": Experiment(
        "on a linear model linesearch and greedy work well", "3 min",
        lambda scale: on(["linear"], scale, CONSTANT, LINESEARCH, GREEDY), panels("loss", "learning_rate")),
    "fig3": Experiment(
        "under both η falls and λ rises with ηλ just below 2; a constant rate settles around 2", "with fig1",
        of("constant", "linesearch", "greedy"), panels("learning_rate", "sharpness", "product", "grad_norm")),
    "fig4": Experiment(
        "the simplified model: with y fixed below 0 nothing feeds back, and λ runs away", "1 min",
        lambda scale: [], curves(*FIGURE_4)),
    "fig5": Experiment(
        "σ = 2 beats σ = 1 and is on par with the constant rate or better; 2.0625 is better still; 2.5 diverges", "25 min",
        of("constant", "greedy", "cdat"), panels("loss", "learning_rate")),
    "fig6": Experiment(
        "under CDAT λ does not rise, and ηλ sits slightly above 2", "with fig5",
        of("constant", "greedy", "cdat"), panels("sharpness", "product", "grad_norm")),
    "fig7": Experiment(
        "the best σ falls with the batch size; the moving average smooths it", "5 min",
        lambda scale: on(["batches"], scale, cdat(*np.arange(0.4, 3, 0.4).round(1), beta=[0.0, 0.9], batch_size=[32, 128, 512, 0])),
        heat("sigma", "batch_size", "cdat", split="beta")),
    "fig8": Experiment(
        "on mini-batches (here of 64 and 256) CDAT gains little over constant rates and schedules", "4 min",
        mini(CONSTANT, *(dict(tuner="schedule", lr=rates(0.1, 5), decay=decay) for decay in ("cosine", "linear")),
             cdat(1.2, 1.6, 2.0, beta=0.9)), panels("loss", "learning_rate")),
    "fig9": Experiment(
        "the simplified model of CDAT: σ = 2 holds y near 0, σ = 1.9 lets λ grow", "1 min",
        lambda scale: [], curves(*FIGURE_9)),
    "fig12": Experiment(
        "with linesearch and greedy u aligns with the top eigenvector", "with fig1",
        of("constant", "linesearch", "greedy"), panels("alignment")),
    "fig13": Experiment(
        "Polyak's rate beats CDAT σ = 2 and σ = 2.0625 matches it; hypergradient is on par with a constant rate", "6 min",
        lambda scale: on(["digits", "mlp"], scale, CONSTANT, *POLYAK, *HYPER, cdat(2.0, 2.0625)),
        panels("loss", "learning_rate", "sharpness")),
    "fig14": Experiment(
        "on mini-batches linesearch and greedy do well", "2 min",
        mini(CONSTANT, LINESEARCH, GREEDY), panels("loss", "learning_rate")),
    "fig15": Experiment(
        "η = σ/λ is poor at σ = 2 and good at σ = 3: alignment matters", "12 min",
        lambda scale: on(["digits", "mlp"], scale, dict(tuner="exact", sigma=[2.0, 3.0]), CDAT),
        panels("loss", "learning_rate", "product")),
    "fig16": Experiment(
        "at each step the greedy rate lowers the loss more than the on-edge rate would: it wins each step and loses the race",
        "with fig5", of("cdat"), panels("greedy_gain")),
    "fig17": Experiment(
        "under CDAT successive updates end up opposed", "with fig5",
        of("constant", "greedy", "cdat"), panels("alignment", "turn")),
    "fig18": Experiment(
        "gains grow with width and depth and fade with weight decay", "7 min", varied, width_and_depth),
    "fig19": Experiment(
        "a tuned schedule can still beat CDAT", "10 min",
        lambda scale: on(["digits"], scale, CONSTANT, *SCHEDULES, cdat(2.0, 2.0625)), panels("loss", "learning_rate")),
    "test": Experiment(
        "asked by readers: do the tuners differ in test loss and accuracy at equal training loss?", "with defaults",
        lambda scale: [dict(tuner=["constant", "greedy", "cdat"], lr=0.1, seed=[0, 1, 2, 3])],
        panels("loss", "test_loss", "test_accuracy")),
    "overlay": Experiment(
        "beyond the paper: does the model (4) predict the next sharpness of a real run?", "1 min", lambda scale: [], overlay),
    "feedback": Experiment(
        "ours: CDAT over the edge and back ends below CDAT σ = 2", "15 min", rivals, against()),
    "sensitivity": Experiment(
        "ours: the numbers of the feedback rule need no tuning", "5 min",
        lambda scale: on(["digits"], scale, *SENSITIVITY, CDAT), against()),
    "resets": Experiment(
        "ours: around a reset the rate falls, what had grown along the top eigenvector goes, and λ is lower than before",
        "1 min", lambda scale: [dict(tuner="feedback", steps=150, sharpness_every=1, samples=512)],
        panels("loss", "learning_rate", "sharpness", "product", "alignment")),
    "others": Experiment(
        "asked by readers: does CDAT σ = 2 beat greedy and the tuned constant rate on a CNN and an RNN?", "8 min",
        lambda scale: on(["cnn", "rnn"], scale, CONSTANT, GREEDY, CDAT), panels("loss", "learning_rate", "product")),
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------- results

RESULTS = FIGURES / "results.csv"
COLUMNS = ("experiment", "setting", "label", "run", "seed", "status", "steps", "loss", "rate_first", "rate", "sharpness_first",
           "sharpness", "product", "alignment", "turn", "gain", "test_loss", "test_accuracy")  # fmt: skip


def summary(name, config, history):
    """A row of the results. Where a column varies along a run it is the median over the second half."""
    half = len(history["step"]) // 2
    median = lambda values: np.nanmedian(values[half:]) if np.isfinite(values[half:]).any() else np.nan
    first = lambda values: next(iter(values[np.isfinite(values) & (values > 0)]), np.nan)
    gain = history["greedy_gain"][np.isfinite(history["greedy_gain"])]
    numbers = dict(loss=train.final_loss(history), rate_first=first(history["learning_rate"]),
                   rate=history["learning_rate"][-1], sharpness_first=first(history["sharpness"]),
                   sharpness=train.last_measured(history["sharpness"]),
                   product=median(history["learning_rate"] * history["sharpness"]),
                   alignment=median(history["alignment"]), turn=median(history["turn"]), gain=np.mean(gain > 0),
                   test_loss=train.last_measured(history["test_loss"]),
                   test_accuracy=train.last_measured(history["test_accuracy"]))  # fmt: skip
    words = dict(experiment=name, setting=setting_of(config), label=plots.labels([config])[0], run=kind_of(config),
                 seed=config["seed"], status=config["status"], steps=len(history["step"]))  # fmt: skip
    return words | {key: f"{value:.4g}" for key, value in numbers.items()}


def run(name, scale, data_dir, out):
    """Trains what is not there yet, draws the figure, and replaces the experiment's rows of the results."""
    runs = []
    given = [flags | dict(resume=True, data_dir=data_dir, out=out) for flags in EXPERIMENTS[name].runs(scale)]
    configs = list(dict.fromkeys(config for flags in given for config in train.configurations(flags)))
    for k, config in enumerate(configs):
        print(f"[{k + 1}/{len(configs)}] {train.name_of(config)}", flush=True)
        history = train.train(config)
        runs.append((dataclasses.asdict(config) | plots.read_settings(Path(config.out) / train.name_of(config)), history))
    EXPERIMENTS[name].draw(runs, FIGURES / f"{name}.png")
    rows = [row for row in results() if row["experiment"] != name]
    rows += [summary(name, config, history) for config, history in runs]
    with open(RESULTS, "w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def results(*names):
    """The rows of the results, of all experiments or of those named; numbers are read as numbers."""
    rows = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    return [row for row in rows if not names or row["experiment"] in names]


def groups(rows):
    """Rows by (setting, run): what differs in the seed alone is one group."""
    found = {}
    for row in rows:
        found.setdefault((row["setting"], row["run"]), []).append(row)
    return found


def mean(rows, column):
    return np.mean([float(row[column]) for row in rows])


def table(name):
    """A line for each kind of run, in Markdown: loss is the mean of the last 5 steps; the rest as in `summary`."""
    lines = ["| setting | run | loss: mean (range over seeds) | diverged | rate | sharpness | ηλ |", "|---|---|---|---|---|---|---|"]
    for (setting, _), rows in groups(results(name)).items():
        whole = [float(row["loss"]) for row in rows if row["status"] == "done"] or [np.inf]
        spread = f"{np.mean(whole):.3g} ({min(whole):.3g} to {max(whole):.3g})"
        lines.append(f"| {setting} | {rows[0]['label']} | {spread} | {len(rows) - len(whole) * (whole != [np.inf])} of {len(rows)} | "
                     f"{mean(rows, 'rate'):.3g} | {mean(rows, 'sharpness'):.3g} | {mean(rows, 'product'):.3g} |")  # fmt: skip
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- claims


def by_setting(name, label, column="loss", best=min):
    """By setting: the best over kinds of run, whose label starts with those words, of the mean of a column over the seeds."""
    found = {}
    for (setting, _), rows in groups(results(name)).items():
        if (rows[0]["label"] + " ").startswith(label + " "):
            found.setdefault(setting, []).append(mean(rows, column))
    return {setting: best(values) for setting, values in found.items()}


def below(name, label, other, factor=1.0, column="loss"):
    """Where one kind of run ends below factor × another: (setting, measured, whether)."""
    first, second = by_setting(name, label, column), by_setting(name, other, column)
    return [(setting, f"{first[setting]:.3g} against {second[setting]:.3g}", first[setting] < factor * second[setting])
            for setting in first if setting in second]  # fmt: skip


def within(name, label, column, low, high):
    """Where a column lies in a range."""
    values = by_setting(name, label, column, best=np.mean)
    return [(setting, f"{value:.3g}", low <= value <= high) for setting, value in values.items()]


def ratio(name, label, column, low, high):
    """Where a column has changed along the run by a factor in a range."""
    last, first = by_setting(name, label, column, np.mean), by_setting(name, label, column + "_first", np.mean)
    return [(setting, f"× {last[setting] / first[setting]:.2g}", low <= last[setting] / first[setting] <= high) for setting in last]


def falls(values):
    """Whether a list in the order of batch sizes falls with the batch size.

    >>> falls([1, 2, 2]), falls([2, 2, 2])
    (True, False)
    """
    return values == sorted(values) and values[0] < values[-1]


def best_sigmas():
    """Figure 7: the best σ by (β, batch size), and whether it falls as the batch shrinks."""
    losses = {}
    for rows in groups(results("fig7")).values():
        run = rows[0]["run"]
        read = lambda word, default: next((float(part[len(word):]) for part in run.split("-") if part.startswith(word)), default)
        losses.setdefault((read("beta", 0.0), read("batch_size", np.inf)), {})[read("sigma", 2.0)] = mean(rows, "loss")
    best = {key: min(values, key=values.get) for key, values in sorted(losses.items())}
    return [(f"β = {beta:g}", ", ".join(f"batch {size:g}: {sigma:g}" for (b, size), sigma in best.items() if b == beta),
             falls([sigma for (b, _), sigma in best.items() if b == beta]))
            for beta in sorted({beta for beta, _ in best})]  # fmt: skip


CLAIMS = [
    ("1", "linesearch ends above the tuned constant rate", lambda: below("fig1", "constant", "linesearch")),
    ("1", "greedy ends above the tuned constant rate", lambda: below("fig1", "constant", "greedy")),
    ("2", "linear model: linesearch within 10 % of the best constant rate, or better", lambda: below("fig2", "linesearch", "constant", 1.1)),
    ("2", "linear model: greedy likewise", lambda: below("fig2", "greedy", "constant", 1.1)),
    ("3", "greedy: η falls", lambda: ratio("fig3", "greedy", "rate", 0, 1)),
    ("3", "greedy: λ rises", lambda: ratio("fig3", "greedy", "sharpness", 1, np.inf)),
    ("3", "linesearch: λ rises", lambda: ratio("fig3", "linesearch", "sharpness", 1, np.inf)),
    ("3", "greedy: ηλ just below 2 (1.6 to 2)", lambda: within("fig3", "greedy", "product", 1.6, 2)),
    ("5", "CDAT σ = 2 on par with the tuned constant rate (at most 5 % above), or better", lambda: below("fig5", "CDAT σ = 2", "constant", 1.05)),
    ("5", "CDAT σ = 2 always better than σ = 1, greedy", lambda: below("fig5", "CDAT σ = 2", "greedy")),
    ("5", "σ = 2.0625 better still", lambda: below("fig5", "CDAT σ = 2.0625", "CDAT σ = 2")),
    ("5", "σ = 2.5 generally diverges, or ends above σ = 2", lambda: below("fig5", "CDAT σ = 2", "CDAT σ = 2.5")),
    ("5", "η rises on its own under σ = 2", lambda: ratio("fig5", "CDAT σ = 2", "rate", 1, np.inf)),
    ("6", "λ does not rise under σ = 2", lambda: ratio("fig6", "CDAT σ = 2", "sharpness", 0, 1.05)),
    ("6", "ηλ sits slightly above 2 (2 to 2.6)", lambda: within("fig6", "CDAT σ = 2", "product", 2, 2.6)),
    ("7", "the best σ falls with the batch size", best_sigmas),
    ("8", "mini-batches: CDAT gains little, at most 20 %, over the best constant rate", lambda: below("fig8", "constant", "CDAT", 1.2)),
    ("8", "mini-batches: the best schedule beats it", lambda: below("fig8", "schedule", "CDAT")),
    ("12", "greedy aligns u with the top eigenvector (above 0.5)", lambda: within("fig12", "greedy", "alignment", 0.5, 1)),
    ("13", "Polyak beats CDAT σ = 2", lambda: below("fig13", "polyak", "CDAT σ = 2")),
    ("13", "σ = 2.0625 matches Polyak (at most 10 % above)", lambda: below("fig13", "CDAT σ = 2.0625", "polyak", 1.1)),
    ("13", "hypergradient on par with a constant rate (at most 10 % above)", lambda: below("fig13", "hypergradient", "constant", 1.1)),
    ("14", "mini-batches: linesearch does well (at most 10 % above the best constant rate)", lambda: below("fig14", "linesearch", "constant", 1.1)),
    ("14", "mini-batches: greedy likewise", lambda: below("fig14", "greedy", "constant", 1.1)),
    ("15", "η = 2/λ is poor: CDAT σ = 2 ends below", lambda: below("fig15", "CDAT σ = 2", "exact σ = 2")),
    ("15", "η = 3/λ is good: at most 10 % above CDAT σ = 2", lambda: below("fig15", "exact σ = 3", "CDAT σ = 2", 1.1)),
    ("16", "the greedy rate lowers the loss more than the on-edge rate at (nearly) each step", lambda: within("fig16", "CDAT σ = 2", "gain", 0.95, 1)),
    ("17", "successive updates end up opposed under σ = 2 (cosine below −0.5)", lambda: within("fig17", "CDAT σ = 2", "turn", -1, -0.5)),
    ("19", "a tuned schedule beats CDAT σ = 2", lambda: below("fig19", "schedule", "CDAT σ = 2")),
]  # fmt: skip


def claims():
    """The verdicts in Markdown: figure, claim, what was measured (means over three seeds), whether it holds."""
    lines = ["| figure | claim | measured: mean over the seeds | verdict |", "|---|---|---|---|"]
    for figure, claim, measure in CLAIMS:
        found = measure()
        verdict = {0: "does not hold", len(found): "holds"}.get(sum(ok for *_, ok in found), "holds partly") if found else "not run"
        lines.append(f"| {figure} | {claim} | {'; '.join(f'{setting}: {text}' for setting, text, _ in found)} | {verdict} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- cost

FAMILIES = {  # model, options, shape of a sample, samples; on random data, which costs what real data does
    "mlp": ("mlp", dict(width=512, depth=2), (32, 32, 3), 2048),
    "cnn": ("cnn", dict(), (32, 32, 3), 128),
    "resnet": ("resnet", dict(width=8), (32, 32, 3), 64),
    "mixer": ("mixer", dict(), (32, 32, 3), 64),
    "vit": ("vit", dict(), (32, 32, 3), 64),
    "transformer": ("transformer", dict(), (64,), 64),
}
PREDICTED = {"forward": 1, "gradient": 3, "curvature": 5, "Hessian-vector product": 8}


class Program(NamedTuple):
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
    network = train.models.MODELS[model](shape, 10, **options)
    w = network.init(jax.random.key(0))
    batch = random_batch(shape, samples or n)
    f = lambda w, batch: train.mse(network.apply(w, batch[0]), batch[1])
    value = lambda w, batch: lambda w: f(w, batch)
    return {"forward": program(jax.jit(f), w, batch),
            "gradient": program(jax.jit(jax.value_and_grad(f)), w, batch),
            "curvature": program(jax.jit(lambda w, b, u: tuners.curvature(value(w, b), w, u)), w, batch, w),
            "Hessian-vector product": program(jax.jit(lambda w, b, v: sharpness.hvp(value(w, b), w, v)), w, batch, w)}  # fmt: skip


def random_batch(shape, n):
    key = jax.random.key(1)
    if len(shape) == 1:
        return (jax.random.randint(key, (n, *shape), 0, 10),) * 2
    return jax.random.uniform(key, (n, *shape)), jnp.arange(n) % 10


def step_of(family, tuner, samples=None, chunk_size=0):
    """(program of one step, carry): what `train` runs, for a family and a tuner."""
    model, options, shape, n = FAMILIES[family]
    config = train.Config(tuner=tuner)
    init, step = train.functions(model, tuple(options.items()), shape, 10, "mse", "gd", tuner, "cosine", chunk_size)[:2]
    numbers = train.numbers_of(config)
    carry = init(0, numbers)
    return program(step, carry, random_batch(shape, samples or n), None, numbers), carry


def seconds(run, repeats=5):
    """The median time of a call, waited for."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return np.median(times)


def time_step(step, carry, steps=5):
    """(seconds a step, trials a step of a linesearch), from one run: ratios of such times are what is reported."""
    _, batch, rows, numbers = step.arguments
    carry, metrics = step.run(jax.tree.map(jnp.copy, carry), batch, rows, numbers)
    taken, found = [], [metrics]
    for _ in range(steps):
        start = time.perf_counter()
        carry, metrics = jax.block_until_ready(step.run(carry, batch, rows, numbers))
        taken.append(time.perf_counter() - start)
        found.append(metrics)
    eta = np.array([metrics["learning_rate"] for metrics in found])
    guess = np.minimum(4 * eta[:-1], 1.0)
    return np.median(taken), np.mean(1 + np.log(guess / eta[1:]) / -np.log(0.8))


def cost_of_tuners():
    """Prints the cost of the parts in forward passes and of each tuner's step in steps at a constant rate; draws it."""
    kinds = ["constant", "polyak", "hypergradient", "linesearch", "greedy", "cdat", "exact"]
    print("| model | part | predicted FLOPs | FLOPs | time | memory |   in forward passes\n|---|---|---|---|---|---|")
    forwards = {}
    for family in FAMILIES:
        found = parts(family)
        times = {name: seconds(lambda: part.run(*part.arguments)) for name, part in found.items()}
        forwards[family] = found["forward"].flops
        for name, part in found.items():
            print(f"| {family} | {name} | {PREDICTED[name]} | {part.flops / found['forward'].flops:.2f} | "
                  f"{times[name] / times['forward']:.2f} | {part.memory / found['forward'].memory:.2f} |", flush=True)  # fmt: skip
    print("\n| model | tuner | FLOPs | time | memory | FLOPs |   in constant-rate steps; the last in forward passes\n|---|---|---|---|---|---|")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", sharey=True)
    for k, family in enumerate(FAMILIES):
        for j, tuner in enumerate(kinds):
            step, carry = step_of(family, tuner)
            taken, trials = time_step(step, carry)
            flops = step.flops + (trials - 1) * forwards[family] * (tuner == "linesearch")  # its loop, body times trips
            base = (flops, taken, step.memory) if tuner == "constant" else base
            ratios = flops / base[0], taken / base[1], step.memory / base[2]
            print(f"| {family} | {tuner} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios)
                  + f" | {flops / forwards[family]:.2f} |" + f" {trials:.1f} trials" * (tuner == "linesearch"), flush=True)  # fmt: skip
            for axis, ratio in zip(axes, ratios):
                axis.bar(k + (j - 3) / 9, ratio, 1 / 9, color=plots.COLORS[tuner], label=tuner if k == 0 else None)
    for axis, title in zip(axes, ("FLOPs of a step", "time of a step")):
        axis.set_title(title + ", in constant-rate steps", fontsize=10, loc="left")
        axis.set_xticks(range(len(FAMILIES)), FAMILIES, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=7, frameon=False, fontsize=9)
    figure.savefig(FIGURES / "cost.png", dpi=130)
    plt.close(figure)


def bare_loop(steps):
    """The default run in bare JAX: what `train` is compared with. Returns the final loss."""
    network, dataset = train.models.mlp((8, 8, 1), 10), train.data.load("digits", "datasets", 1024)

    def f(w, x, y):
        decay = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w))
        return 0.5 * jnp.mean(jnp.sum((network.apply(w, x) - jax.nn.one_hot(y, 10)) ** 2, -1)) + 0.5e-5 * decay

    @functools.partial(jax.jit, donate_argnums=0)
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
    """Prints what logging adds to a bare loop and what sharpness adds to a run, as ratios of medians of three."""
    with tempfile.TemporaryDirectory() as out:
        def timed(k, **more):
            config = train.Config(tuner="cdat", steps=steps, out=f"{out}/{k}", overwrite=True, **more)
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                train.train(config, train.progress(config))
            return time.perf_counter() - start

        timed(0), timed(0, no_sharpness=True)  # compiles
        bare, logged, whole = np.median([(bare_loop(steps), timed(1, no_sharpness=True), timed(2)) for _ in range(3)], axis=0)
    print(f"\nsteps with logging, progress and files, against a bare jitted loop: {logged / bare:.3f}")
    print(f"share of measuring sharpness in the default run: {1 - logged / whole:.2f}")


def plain_power_iteration(matvec, v, tol=1e-3, max_iters=1000):
    """v ← Hv/‖Hv‖ to the same residual, from a start with the same noise: what sharpness.power_iteration is compared with."""
    v, unravel = ravel_pytree(v)
    v = sharpness.noisy(v)
    for iterations in range(1, max_iters + 1):
        hv = ravel_pytree(matvec(unravel(v)))[0]
        value = jnp.vdot(v, hv)
        if jnp.linalg.norm(hv - value * v) <= tol * abs(value):
            break
        v = sharpness.unit(hv)
    return sharpness.Eigenpair(float(value), unravel(v), iterations, None)


def cost_of_sharpness():
    """Prints the products Hv that 20 measurements take along two runs, warm and cold, beside plain power iteration."""
    for tuner, lr in (("cdat", 0.1), ("constant", 0.1)):
        config = train.Config(tuner=tuner, lr=lr)
        samples, _, classes, _, _ = train.placed(config)
        init, step, _, hessian = train.functions("mlp", (("activation", "relu"),), (8, 8, 1), classes, "mse", "gd", tuner,
                                                 "cosine", 0)[:4]  # fmt: skip
        numbers, spent = train.numbers_of(config), {}
        carry = init(0, numbers)
        vectors = dict.fromkeys(("warm", "plain, warm"), jax.tree.map(jnp.ones_like, carry.w))
        for t in range(config.steps):
            if t % 100 == 0:
                product = lambda v: hessian(carry.w, None, v, samples, 1e-5)
                cold = jax.tree.map(jnp.ones_like, carry.w)
                for kind, estimate in (("warm", sharpness.power_iteration), ("cold", sharpness.power_iteration),
                                       ("plain, warm", plain_power_iteration), ("plain, cold", plain_power_iteration)):  # fmt: skip
                    top = estimate(product, vectors.get(kind, cold))
                    spent[kind] = spent.get(kind, 0) + top.iterations
                    vectors |= {kind: top.vector} if kind in vectors else {}
            carry, _ = step(carry, samples, None, numbers)
        print(f"products Hv for 20 measurements along {tuner}: " + ", ".join(f"{k} {v}" for k, v in spent.items()), flush=True)


def cost_of_starting():
    """Prints the time from a command to the end of its first step, without and then with compiled programs in the cache."""
    code = ("import os, sys, time, jax, train; train.measure = lambda *known: (jax.block_until_ready(known[3]), "
            "print('first step', time.time(), flush=True), os._exit(0)); train.main(sys.argv[1:])")  # fmt: skip
    commands = {"default": [], "resnet": ["--model", "resnet", "--samples", "64"],
                "transformer": ["--model", "transformer", "--dataset", "pydocs", "--samples", "64"]}  # fmt: skip
    for name, flags in commands.items():
        with tempfile.TemporaryDirectory() as folder:
            taken = []
            for _ in range(4):  # the first fills the cache
                start = time.time()
                run = subprocess.run([sys.executable, "-c", code, "--overwrite", "--out", folder, *flags], check=True, text=True,
                                     env=os.environ | {"XDG_CACHE_HOME": folder}, capture_output=True)  # fmt: skip
                taken.append(float(run.stdout.split()[-1]) - start)
        again = np.median(taken[1:])
        print(f"{name}: first step after {taken[0]:.1f} s, with a cache after {again:.1f} s: {taken[0] / again:.1f} times faster")


def cost():
    """All that this repository says about its speed, in one command."""
    cores = os.cpu_count()
    print(f"{jax.devices()[0].device_kind}, {cores} cores, JAX {jax.__version__}, {platform.platform()}\n")
    cost_of_tuners()
    cost_of_a_run()
    cost_of_sharpness()
    cost_of_starting()


def readme():
    """Writes the tables between <!-- table: NAME --> and <!-- end --> in README.md anew."""
    file = Path(__file__).parent / "README.md"
    file.write_text(with_tables(file.read_text()))


def with_tables(text):
    """The text with each table as the committed results have it."""
    fill = lambda match: f"{match[1]}\n{claims() if match[2] == 'claims' else table(match[2])}\n<!-- end -->"
    return re.sub(r"(<!-- table: (\w+) -->)\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


COMMANDS = {"cost": cost, "claims": lambda: print(claims()), "readme": readme}


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description="The paper's figures, from a laptop.", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="name", help="an experiment of --list, all, or claims")
    parser.add_argument("--list", action="store_true", help="each experiment with its time and claim")
    parser.add_argument("--table", action="store_true", help="the table of the committed results, without running")
    parser.add_argument("--scale", choices=["laptop", "paper"], default="laptop", help="the paper's own settings, or smaller")
    parser.add_argument("--data-dir", default="datasets", help="folder that holds the data sets, or is to")
    parser.add_argument("--out", default="runs", help="folder of the run folders")
    options = parser.parse_args(argv)
    if options.list or not options.names:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:9} {experiment.time:>13}  {experiment.claim}")
    for name in EXPERIMENTS if options.names == ["all"] else options.names:
        if name in COMMANDS:
            COMMANDS[name]()
            continue
        if name not in EXPERIMENTS:
            train.fail(f"no experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
        if not options.table:
            run(name, options.scale, options.data_dir, options.out)
        print(table(name))


if __name__ == "__main__":
    main()

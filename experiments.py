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
import csv
import dataclasses
import re
import textwrap
from pathlib import Path
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import cost
import plots
import sharpness
import theory
import train

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
    "vit": dict(dataset="imagenette", model="vit", loss="ce", optimizer="rmsprop", samples=64, image_size=24, width=32,
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
    "batches": rates(0.05, 4), "cnn": rates(0.08, 4), "rnn": rates(0.08, 4),
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


SCHEDULES = [dict(tuner="schedule", lr=rates(0.2, 3), warmup=warmup, decay=decay)
             for warmup in (0.05, 0.2) for decay in ("constant", "linear", "cosine")]  # fmt: skip
POLYAK = [dict(tuner="polyak", lr_max=lr_max) for lr_max in (1.0, 100.0)]
HYPER = [dict(tuner="hypergradient", lr=lr, hyper_rate=rate) for lr in (0.01, 0.05) for rate in (0.01, 0.1)]
FEEDBACK = dict(tuner="feedback")
RIVALS = (CONSTANT, LINESEARCH, GREEDY, cdat(1.9375, 2.0, 2.0625), FEEDBACK)


def rivals(scale):
    """feedback against the others: on every setting, under each optimizer, on mini-batches of two sizes."""
    runs = on(["digits", *FOUR], scale, *RIVALS)
    for optimizer in ("momentum", "rmsprop", "adam"):
        more = dict(optimizer=optimizer, beta=0.9 if optimizer == "adam" else 0.0)  # Adam needs the averages
        runs += on(["digits"], scale, CDAT | more, FEEDBACK | more)
    return runs + on(["batches"], scale, *(tuner | dict(batch_size=[64, 256]) for tuner in (CONSTANT, GREEDY, CDAT, FEEDBACK)))


SENSITIVITY = [FEEDBACK | change for change in ({}, dict(sigma_high=3.0), dict(sigma_high=4.0), dict(tolerance=0.0),
                                                dict(average=0.5))]  # fmt: skip


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
        plots.panels("loss", "sharpness", "product", thinned=list)),
    "fig1": Experiment(
        "linesearch and greedy end above the tuned constant rate; linesearch may lead early", "25 min",
        of("constant", "linesearch", "greedy"), plots.panels("loss")),
    "fig2": Experiment(
        "on a linear model linesearch and greedy work well", "3 min",
        lambda scale: on(["linear"], scale, CONSTANT, LINESEARCH, GREEDY), plots.panels("loss", "learning_rate")),
    "fig3": Experiment(
        "under both η falls and λ rises with ηλ just below 2; a constant rate settles around 2", "with fig1",
        of("constant", "linesearch", "greedy"), plots.panels("learning_rate", "sharpness", "product", "grad_norm")),
    "fig4": Experiment(
        "(and 10) the simplified model: with y fixed below 0 nothing feeds back, and λ runs away", "1 min",
        lambda scale: [], plots.curves(*FIGURE_4)),
    "fig5": Experiment(
        "σ = 2 beats σ = 1 and is on par with the constant rate or better; 2.0625 is better still; 2.5 diverges", "25 min",
        of("constant", "greedy", "cdat"), plots.panels("loss", "learning_rate")),
    "fig6": Experiment(
        "under CDAT λ does not rise, and ηλ sits slightly above 2", "with fig5",
        of("constant", "greedy", "cdat"), plots.panels("sharpness", "product", "grad_norm")),
    "fig7": Experiment(
        "the best σ falls with the batch size; the moving average smooths it", "5 min",
        lambda scale: on(["batches"], scale, cdat(*np.arange(0.4, 3, 0.4).round(1), beta=[0.0, 0.9],
                                                  batch_size=[32, 128, 512, 0])),
        plots.heat("sigma", "batch_size", "cdat", split="beta")),
    "fig8": Experiment(
        "(and 20, 21) on mini-batches (here of 64 and 256) CDAT gains little over constant rates and schedules", "4 min",
        mini(CONSTANT, *(dict(tuner="schedule", lr=rates(0.1, 5), decay=decay) for decay in ("cosine", "linear")),
             cdat(1.2, 1.6, 2.0, beta=0.9)), plots.panels("loss", "learning_rate")),
    "fig9": Experiment(
        "(and 11) the simplified model of CDAT: σ = 2 holds y near 0, σ = 1.9 lets λ grow", "1 min",
        lambda scale: [], plots.curves(*FIGURE_9)),
    "fig12": Experiment(
        "with linesearch and greedy u aligns with the top eigenvector", "with fig1",
        of("constant", "linesearch", "greedy"), plots.panels("alignment")),
    "fig13": Experiment(
        "Polyak's rate beats CDAT σ = 2 and σ = 2.0625 matches it; hypergradient is on par with a constant rate", "6 min",
        lambda scale: on(["digits", "mlp"], scale, CONSTANT, *POLYAK, *HYPER, cdat(2.0, 2.0625)),
        plots.panels("loss", "learning_rate", "sharpness")),
    "fig14": Experiment(
        "on mini-batches linesearch and greedy do well", "2 min",
        mini(CONSTANT, LINESEARCH, GREEDY), plots.panels("loss", "learning_rate")),
    "fig15": Experiment(
        "η = σ/λ is poor at σ = 2 and good at σ = 3: alignment matters", "12 min",
        lambda scale: on(["digits", "mlp"], scale, dict(tuner="exact", sigma=[2.0, 3.0]), CDAT),
        plots.panels("loss", "learning_rate", "product")),
    "fig16": Experiment(
        "at each step the greedy rate lowers the loss more than the on-edge rate would: it wins each step and loses the race",
        "with fig5", of("cdat"), plots.panels("greedy_gain")),
    "fig17": Experiment(
        "under CDAT successive updates end up opposed", "with fig5",
        of("constant", "greedy", "cdat"), plots.panels("alignment", "turn")),
    "fig18": Experiment(
        "gains grow with width and depth and fade with weight decay", "7 min", varied, plots.width_and_depth),
    "fig19": Experiment(
        "a tuned schedule can still beat CDAT", "10 min",
        lambda scale: on(["digits"], scale, CONSTANT, *SCHEDULES, cdat(2.0, 2.0625)), plots.panels("loss", "learning_rate")),
    "test": Experiment(
        "asked by readers: do the tuners differ in test loss and accuracy at equal training loss?", "with defaults",
        lambda scale: [dict(tuner=["constant", "greedy", "cdat"], lr=0.1, seed=[0, 1, 2, 3])], plots.at_equal_loss),
    "overlay": Experiment(
        "beyond the paper: does the model (4) predict the next sharpness of a real run?", "1 min", lambda scale: [], overlay),
    "feedback": Experiment(
        "ours: CDAT over the edge and back ends below CDAT σ = 2", "15 min", rivals, plots.against()),
    "sensitivity": Experiment(
        "ours: the numbers of the feedback rule need no tuning", "5 min",
        lambda scale: on(["digits"], scale, *SENSITIVITY, CDAT), plots.dots),
    "resets": Experiment(
        "ours: around a reset the rate falls, what had grown along the top eigenvector goes, and λ is lower than before",
        "1 min", lambda scale: [dict(tuner="feedback", steps=150, sharpness_every=1, samples=512)],
        plots.panels("loss", "learning_rate", "sharpness", "product", "alignment")),
    "others": Experiment(
        "asked by readers: does CDAT σ = 2 beat greedy and the tuned constant rate on a CNN and an RNN?", "8 min",
        lambda scale: on(["cnn", "rnn"], scale, CONSTANT, GREEDY, CDAT), plots.panels("loss", "learning_rate", "product")),
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------- results

RESULTS = FIGURES / "results.csv"
COLUMNS = ("experiment", "setting", "label", "run", "seed", "status", "steps", "loss", "rate_first", "rate", "sharpness_first",
           "sharpness", "product", "alignment", "turn", "gain", "test_loss", "test_accuracy")  # fmt: skip


def label_of(config):
    """What a table calls a run: its tuner, its rate or σ, and what else of the tuner's own is not the default.

    >>> label_of(vars(train.Config(tuner="polyak", lr_max=100.0))), label_of(vars(train.Config(sigma=1.5, beta=0.9)))
    ('polyak, lr max 100', 'CDAT σ = 1.5, beta 0.9')
    """
    shown = ("lr", "sigma") if config["tuner"] != "hypergradient" else ()
    own = [(name, config[name]) for name, field in train.FIELDS.items() if config["tuner"] in field.metadata["of"]
           and name not in shown and config[name] != field.default]  # fmt: skip
    return ", ".join(plots.labels([config]) + [f"{name.replace('_', ' ')} {value}".removesuffix(".0") for name, value in own])


def summary(name, config, history):
    """A row of the results. Where a column varies along a run it is the median over the second half."""
    half = len(history["step"]) // 2
    median = lambda values: np.nanmedian(values[half:]) if np.isfinite(values[half:]).any() else np.nan
    first = lambda values: next(iter(values[np.isfinite(values) & (values > 0)]), np.nan)
    gain = history["greedy_gain"][np.isfinite(history["greedy_gain"])]
    numbers = dict(loss=plots.final_loss(history), rate_first=first(history["learning_rate"]),
                   rate=history["learning_rate"][-1], sharpness_first=first(history["sharpness"]),
                   sharpness=train.last_measured(history["sharpness"]),
                   product=median(history["learning_rate"] * history["sharpness"]),
                   alignment=median(history["alignment"]), turn=median(history["turn"]), gain=np.mean(gain > 0),
                   test_loss=train.last_measured(history["test_loss"]),
                   test_accuracy=train.last_measured(history["test_accuracy"]))  # fmt: skip
    words = dict(experiment=name, setting=plots.setting_of(config), label=config["label"], run=config["run"],
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
        settings = dataclasses.asdict(config) | plots.read_settings(Path(config.out) / train.name_of(config))
        names = dict(run=train.name_of(dataclasses.replace(config, seed=0)), label=label_of(settings))
        runs.append((settings | names, history))
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
    columns = ("setting", "run", "loss: mean (range over seeds)", "diverged", "rate", "sharpness", "ηλ")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for (setting, _), rows in groups(results(name)).items():
        losses = [float(row["loss"]) for row in rows if row["status"] == "done"]
        spread = f"{np.mean(losses):.3g} ({min(losses):.3g} to {max(losses):.3g})" if losses else "–"
        ends = " | ".join(f"{mean(rows, column):.3g}" for column in ("rate", "sharpness", "product"))
        lines.append(f"| {setting} | {rows[0]['label']} | {spread} | {len(rows) - len(losses)} of {len(rows)} | {ends} |")
    return "\n".join(lines)


def matrix(name, ours="feedback", other="CDAT σ = 2"):
    """A line for each setting, a column for each tuner, in Markdown: the mean and range of the final loss over the seeds.

    Of a tuner with several settings the best; the lowest mean of a line is bold. Below: how often ours beats other.
    """
    cells = {}
    for (setting, _), rows in groups(results(name)).items():
        label = rows[0]["label"].split(",")[0]
        kind = label if label.startswith("CDAT") else label.split()[0]
        losses = sorted(float(row["loss"]) for row in rows)
        line = cells.setdefault(setting, {})
        line[kind] = min(line.get(kind, (np.inf, np.inf, np.inf)), (np.mean(losses), losses[0], losses[-1]))
    kinds = list(dict.fromkeys(kind for line in cells.values() for kind in line))
    lines = ["| setting | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for setting, line in cells.items():
        text = {kind: f"{mean:.3g} ({low:.3g} to {high:.3g})" if np.isfinite(mean) else "diverges"
                for kind, (mean, low, high) in line.items()}  # fmt: skip
        text[min(line, key=line.get)] = f"**{text[min(line, key=line.get)]}**"
        lines.append(f"| {setting} | " + " | ".join(text.get(kind, "") for kind in kinds) + " |")
    both = [(line[ours][0], line[other][0]) for line in cells.values() if ours in line and other in line]
    won = sum(a < b for a, b in both)
    return "\n".join([*lines, "", f"{ours} ends below {other} in {won} of {len(both)} settings."])


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
    factors = {setting: last[setting] / first[setting] for setting in last}
    return [(setting, f"× {factor:.2g}", low <= factor <= high) for setting, factor in factors.items()]


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
        read = {key: float(value) for key, value in re.findall(r"(sigma|beta|batch_size)([\d.]+)", run)}
        case = read.get("beta", 0.0), read.get("batch_size", np.inf)
        losses.setdefault(case, {})[read.get("sigma", 2.0)] = mean(rows, "loss")
    best = {key: min(values, key=values.get) for key, values in sorted(losses.items())}
    return [(f"β = {beta:g}", ", ".join(f"batch {size:g}: {sigma:g}" for (b, size), sigma in best.items() if b == beta),
             falls([sigma for (b, _), sigma in best.items() if b == beta]))
            for beta in sorted({beta for beta, _ in best})]  # fmt: skip


def gains(word, grows=True):
    """Figure 18: the tuned constant rate's loss over that of CDAT σ = 2, by the values of what varies."""
    plain, losses = {"samples": 512.0, "width": 64.0, "depth": 2.0, "weight_decay": 1e-5}, {}
    for rows in groups(results("fig18")).values():
        read = {key: float(value) for key, value in re.findall(r"(samples|width|depth|weight_decay)([\d.]+)", rows[0]["run"])}
        if all(read.get(key, plain[key]) == plain[key] for key in plain if key != word):
            of_value = losses.setdefault(read.get(word, plain[word]), {})
            label = rows[0]["label"].split()[0] if rows[0]["label"].startswith("constant") else rows[0]["label"]
            of_value[label] = min(of_value.get(label, np.inf), mean(rows, "loss"))
    ratios = {value: of_value["constant"] / of_value["CDAT σ = 2"] for value, of_value in sorted(losses.items())}
    ordered = list(ratios.values()) == sorted(ratios.values(), reverse=not grows)
    return [(word.replace("_", " "), ", ".join(f"{value:g}: × {ratio:.2g}" for value, ratio in ratios.items()), ordered)]


def model_of_figure_4():
    lam = theory.below_edge(steps=1000).sharpness
    return [("model", f"λ from {lam[0]:.3g} to {lam[-1]:.3g} in 1000 steps", bool(lam[-1] > 10 * lam[0]))]


def model_of_figure_9():
    ends = {sigma: float(theory.cdat_model(sigma).sharpness[-1]) for sigma in (2, 1.9)}
    return [("model", f"λ from 18 to {ends[2]:.3g} (σ = 2) and {ends[1.9]:.3g} (σ = 1.9) in 4000 steps", ends[2] < 1.05 * 18),
            ("model", f"y ends at {float(theory.cdat_model(2).y[-1]):.4f} (σ = 2)", True)]  # fmt: skip


def logged_cost(tuner, low, high):
    """From figures/cost.txt: the time of a tuner's step in constant-rate steps."""
    rows = re.findall(rf"^\| (\w+) \| {tuner} \| [\d.]+ \| ([\d.]+) \|", (FIGURES / "cost.txt").read_text(), re.MULTILINE)
    return [(family, f"× {time}", low <= float(time) <= high) for family, time in rows]


CLAIMS = [
    ("1", "linesearch ends above the tuned constant rate", lambda: below("fig1", "constant", "linesearch")),
    ("1", "greedy ends above the tuned constant rate", lambda: below("fig1", "constant", "greedy")),
    ("2", "linear model: linesearch within 10 % of the best constant rate, or better", lambda: below("fig2", "linesearch", "constant", 1.1)),
    ("2", "linear model: greedy likewise", lambda: below("fig2", "greedy", "constant", 1.1)),
    ("3", "greedy: η falls", lambda: ratio("fig3", "greedy", "rate", 0, 1)),
    ("3", "greedy: λ rises", lambda: ratio("fig3", "greedy", "sharpness", 1, np.inf)),
    ("3", "linesearch: λ rises", lambda: ratio("fig3", "linesearch", "sharpness", 1, np.inf)),
    ("3", "greedy: ηλ just below 2 (1.6 to 2)", lambda: within("fig3", "greedy", "product", 1.6, 2)),
    ("4", "simplified model: with y fixed below 0 λ runs away", model_of_figure_4),
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
    ("9", "simplified model: σ = 2 holds λ (within 5 %) and y near 0", model_of_figure_9),
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
    ("18", "gains grow with width", lambda: gains("width")),
    ("18", "gains grow with depth", lambda: gains("depth")),
    ("18", "gains fade with weight decay", lambda: gains("weight_decay", grows=False)),
    ("19", "a tuned schedule beats CDAT σ = 2", lambda: below("fig19", "schedule", "CDAT σ = 2")),
    ("C.3", "a CDAT step takes about twice the time of a constant-rate step (1.5 to 2.5)", lambda: logged_cost("cdat", 1.5, 2.5)),
]  # fmt: skip


def claims():
    """The verdicts in Markdown: figure, claim, what was measured (means over three seeds), whether it holds."""
    lines = ["| figure | claim | measured: mean over the seeds | verdict |", "|---|---|---|---|"]
    for figure, claim, measure in CLAIMS:
        found = measure()
        held = sum(ok for *_, ok in found)
        verdict = "not run" if not found else "holds" if held == len(found) else "holds partly" if held else "does not hold"
        lines.append(f"| {figure} | {claim} | {'; '.join(f'{setting}: {text}' for setting, text, _ in found)} | {verdict} |")
    return "\n".join(lines)


def readme():
    """Writes the tables between <!-- table: NAME --> (or matrix, or verdicts) and <!-- end --> in README.md anew."""
    file = Path(__file__).parent / "README.md"
    file.write_text(with_tables(file.read_text()))


def with_tables(text):
    """The text with each table as the committed results have it."""
    makers = {"table": table, "matrix": matrix, "verdicts": lambda _: claims()}
    fill = lambda match: f"{match[1]}\n{makers[match[2]](match[3])}\n<!-- end -->"
    return re.sub(r"(<!-- (\w+): (\w+) -->)\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


COMMANDS = {"cost": cost.main, "claims": lambda: print(claims()), "readme": readme}


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
            print(textwrap.fill(f"{name:11} {experiment.time:>13}  {experiment.claim}", 80, subsequent_indent=27 * " "))
    for name in EXPERIMENTS if options.names == ["all"] else options.names:
        if name in COMMANDS:
            COMMANDS[name]()
            continue
        if name not in EXPERIMENTS:
            train.fail(f"no experiment {name!r}; there are {', '.join([*EXPERIMENTS, *COMMANDS])}", "experiments.py")
        if not options.table:
            run(name, options.scale, options.data_dir, options.out)
        print(matrix(name) if name == "feedback" else table(name))


if __name__ == "__main__":
    main()

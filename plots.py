"""Figures from logged runs: loss, learning rate, sharpness, and their product against the edge.

What this file teaches: what to look at. Training is at the edge of stability when learning rate × sharpness stays
near the value at which the optimizer would stop being stable on a quadratic (2 for gradient descent).

    python plots.py runs/RUN [runs/RUN ...] -o FILE

prints the table of these runs and draws them over each other. A run is a folder with a checkpoint.npz (`load_run`).
Copying: this file needs numpy and matplotlib alone, and no screen. Read next: paper/README.md, for what came out.
"""

import argparse
import json
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colors
from matplotlib.figure import Figure

# Most are the colours of Okabe and Ito, which colour-blind readers tell apart: one tuner, one colour, everywhere.
COLORS = {"constant": "#000000", "schedule": "#999999", "linesearch": "#E69F00", "greedy": "#009E73", "cdat": "#0072B2",
          "feedback": "#882255", "polyak": "#CC79A7", "hypergradient": "#56B4E9", "exact": "#AA4499"}  # fmt: skip
LOOKS = [(1.0, "-"), (0.45, "--"), (1.4, ":"), (1.65, "-."), (0.7, (0, (6, 2)))]  # of a tuner's kinds: lightness, line

QUANTITIES = {"loss": "training loss", "learning_rate": "learning rate η", "sharpness": "sharpness λ",
              "product": "rate × sharpness, ηλ", "grad_norm": "gradient norm"}  # others: as their column  # fmt: skip
LOG = ("loss", "learning_rate", "sharpness", "grad_norm", "test_loss")  # drawn on a log axis


class Run(NamedTuple):
    """A run as it was read back."""

    settings: dict  # by name: all that its numbers depend on
    history: dict  # one array a column, of an entry a step; nan = not measured
    facts: dict = {}  # status, seconds, versions, device


def load_run(folder):
    """The run that a folder holds, a `Run`. OSError or ValueError, in one line, where it holds none."""
    file = Path(folder) / "checkpoint.npz"
    try:
        with open(file, "rb") as stream, np.load(stream) as saved:
            settings, facts = json.loads(str(saved["settings"])), json.loads(str(saved["facts"]))
            columns = [name for name in saved.files if name.startswith("history/")]
            history = {name.removeprefix("history/"): saved[name] for name in columns}
            whole = saved.zip.testzip() is None  # the state as well, to go on from
        named = "tuner" in settings and "status" in facts and {"step", "loss"} <= history.keys()
        numbers = all(column.dtype.kind in "if" for column in history.values())
        if not (whole and named and numbers and isinstance(settings.get("steps", 0), int)):
            raise ValueError
    except OSError:  # of the system, which says nothing about the file
        raise
    except Exception:  # a broken archive makes its readers raise whatever they like
        raise ValueError(f"{file}: broken; give --overwrite to start again") from None
    return Run(settings, history, facts)


def progress(steps):
    """report(rows) for a run of so many steps: a line that renews itself on a terminal, else one a tenth of it."""
    first, tenths, lam = None, -1, np.nan

    def report(rows):
        nonlocal first, tenths, lam
        text, done, end = "compiling ...", 0, ""  # no rows: the first step begins
        if rows:
            done, loss = rows[-1]["step"] + 1, float(rows[-1]["loss"])
            rate = geometric(np.array([row["learning_rate"] for row in rows[-10:]], float))
            lam = last_measured([lam, *(row.get("sharpness", np.nan) for row in rows)])
            product = f" product {rate * lam:.3g}" if np.isfinite(lam) else ""
            text = f"{done:6d}/{steps} loss {loss:<9.4g} rate {rate:<8.3g}{product}"
            end = "\n" if done == steps or not np.isfinite(loss) else ""
            if first:
                left = (time.time() - first[0]) / (done - first[1]) * (steps - done)
                text = f"{text.rstrip()}, {timedelta(seconds=round(left))} left"
            first = first or (time.time(), done)  # this interval compiled: no pace to judge by
        if sys.stdout.isatty():
            columns = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:columns]:{columns}}", end=end, flush=True)
        elif 10 * done // steps > tenths:
            tenths = 10 * done // steps
            print(text, flush=True)

    return report


def edge(settings):
    """The ηλ at which an optimizer stops being stable on a quadratic, λ of P^(-1/2) H P^(-1/2) (Cohen et al. 2022)."""
    if settings["optimizer"] == "momentum":
        return 2.0 * (1 + settings["momentum"])
    if settings["optimizer"] == "adam":
        return 2.0 * (1 + settings["beta1"]) / (1 - settings["beta1"])
    return 2.0


NAMES = {"sigma": "σ", "beta": "β", "batch_size": "batch", "weight_decay": "weight decay", "lr_max": "η ≤", "rise": "a",
         "tolerance": "τ", "growth": "c", "sigma_low": "σ_low", "sigma_high": "σ_high", "average": "ρ"}  # fmt: skip
WHAT = ("dataset", "samples", "model", "preset", "width", "depth", "activation", "norm", "start", "loss",
        "weight_decay", "seed", "optimizer", "batch_size", "steps")  # fmt: skip
SHOWN = {"constant": "lr", "schedule": "lr", "cdat": "sigma", "exact": "sigma"}  # named whether it differs or not


def labels(runs):
    """A short name for each of some runs, given by their settings: the tuner, its rate or σ, and what is unlike others.

    What is trained (WHAT) is compared with all of them, what else there is with the runs of the same tuner.

    >>> cdat = {"tuner": "cdat", "sigma": 2.0, "beta": 0.5}
    >>> labels([cdat, cdat | {"beta": 0.9}])
    ['CDAT σ = 2, β 0.5', 'CDAT σ = 2, β 0.9']
    >>> labels([cdat, {"tuner": "constant", "lr": 0.1}])
    ['CDAT σ = 2', 'constant 0.1']
    """
    names = []
    for settings in runs:
        tuner, shown = settings["tuner"], SHOWN.get(settings["tuner"])
        words = [tuner.replace("cdat", "CDAT")]
        if shown:
            words[0] += f"{' σ =' if shown == 'sigma' else ''} {settings[shown]:g}"
        for name, value in settings.items():
            among = runs if name in WHAT else [other for other in runs if other["tuner"] == tuner]
            differ = len({str(other[name]) for other in among if name in other}) > 1
            if differ and name not in ("tuner", shown) and value != "":  # "" is the setting of no preset
                words.append(value if type(value) is str else f"{NAMES.get(name, name)} {value}".removesuffix(".0"))
        names.append(", ".join(words))
    return names


def final_loss(history):
    """What runs are compared by: the mean loss of the last 5 steps; inf where the run diverged."""
    return np.inf if diverged(history) else np.mean(history["loss"][-5:], dtype=float)


def diverged(history):
    """Whether the last loss is not finite."""
    return not np.isfinite(history["loss"][-1:]).all()


def last_measured(column):
    """The last entry that is not nan."""
    return next((value for value in column[::-1] if np.isfinite(value)), np.nan)


def products(history):
    """ηλ at each step: the rate times the sharpness, interpolated between the steps at which it was measured.

    A rate may alternate from step to step, as it does under greedy: measured steps alone show every other rate.
    """
    step, there = history["step"], np.isfinite(history["sharpness"])
    lam = np.interp(step, step[there], history["sharpness"][there]) if there.any() else np.nan
    return history["learning_rate"] * lam


def geometric(values):
    """The geometric mean of those that are positive; 0 where none is, nan where nothing was measured."""
    if np.isnan(values).all():
        return np.nan
    return np.exp(np.mean(np.log(values[values > 0]))) if (values > 0).any() else 0.0


@np.errstate(all="ignore")  # the rate of a diverged run may be infinite
def table(runs):
    """The results of some `Run`s: the lines of a table, one a run, the lowest loss marked with a star.

    Loss: the mean of the last 5 steps; rate, product: geometric means of the last 10; sharpness, test: as last
    measured, the latter the accuracy; raised: how many steps raised the loss. Below it stands what went wrong.
    """
    names = labels([run.settings for run in runs])
    losses = [final_loss(run.history) for run in runs]
    width = max(map(len, ["run", *names]))
    wrong, lines = [], [f"{'run':{width}}  {'loss':>9} raised {'rate':>8} {'sharpness':>9} product   test   time"]
    for name, loss, (_, history, facts) in zip(names, losses, runs):
        rate, product = geometric(history["learning_rate"][-10:]), geometric(products(history)[-10:])
        mark = "*" if loss == min(losses) < np.inf and len(losses) > 1 else " "
        raised, seconds = np.sum(np.diff(history["loss"]) > 0), facts.get("seconds", np.nan)
        lam, right = last_measured(history["sharpness"]), last_measured(history["test_accuracy"])
        lines.append(f"{name:{width}} {mark}{loss:9.4g} {raised:6d} {rate:8.3g} {lam:9.4g} {product:7.3g} "
                     f"{right:6.1%} {seconds:4.0f} s")  # fmt: skip
        if diverged(history):
            wrong.append(f"{name} diverged: its loss is not finite at step {history['step'][-1]:.0f}")
        elif loss > history["loss"][0]:
            wrong.append(f"{name} ended above the loss it began with, {history['loss'][0]:.4g}")
        if not history["learning_rate"][-len(history["step"]) // 10 :].any():  # the last tenth
            wrong.append(f"{name} took no step in the end: its rate was 0")
    return lines + wrong


def draw(runs, file, quantities=("loss", "learning_rate", "sharpness", "product")):
    """Draw `Run`s to a file (png, pdf, svg), a panel a quantity.

    Settings are at least tuner, its lr or sigma, optimizer and its hyperparameters; a history is of step, loss,
    learning_rate and what else is drawn. Runs that differ in the seed alone are one line, their median; the first kind
    of a tuner has a band from the lowest to the highest. A cross is where a run diverged, a triangle where a line
    leaves its panel for good. The setting "name", if any, goes into the legend. Returns the path of the file.
    """
    down = -(-len(quantities) // 2)
    figure = Figure(figsize=(9, 0.7 + 2.5 * down), layout="constrained")
    axes = figure.subplots(down, min(2, len(quantities)), sharex=True, squeeze=False)
    for axis, quantity in zip(axes.flat, quantities):
        panel(axis, quantity, runs)
        axis.tick_params(labelbottom=True)
        axis.set_title(QUANTITIES.get(quantity, quantity.replace("_", " ")), fontsize=9, loc="left")
    for axis in axes.flat[len(quantities) :]:
        axis.remove()
    figure.supxlabel("step", fontsize=9)
    return finish(figure, axes, file)


def panel(axis, quantity, runs):
    """One quantity of some runs, and the edges of their optimizers."""
    edges = sorted({edge(run.settings) for run in runs})
    starts = [float(loss) for run in runs for loss in run.history["loss"][:1]]
    # A start, or the end of a run, that is far above all else must not press it flat.
    top = {"loss": 4 * max(starts, default=1), "product": 2 * edges[-1]}.get(quantity, np.inf)
    kinds = {}  # by tuner and name: runs that differ in the seed alone
    for run, label in zip(runs, labels([run.settings | {"seed": 0} for run in runs])):
        kind = run.settings["tuner"], run.settings.get("name", label).replace("$", r"\$")  # a dollar, no formula
        kinds.setdefault(kind, []).append(run)
    tuners = [tuner for tuner, _ in kinds]
    for n, ((tuner, name), same) in enumerate(kinds.items()):
        k = tuners[:n].count(tuner)  # the first kind of a tuner is drawn on top, with its band
        color, style = look(tuner, k)
        line(axis, quantity, same, top, k == 0, color=color, linestyle=style, label=name, zorder=2 - k / 10)
    values = np.concatenate([line.get_ydata() for line in axis.lines])
    if quantity in LOG and len(values):
        axis.set(yscale="log", ylim=(0.7 * values.min(), min(1.4 * values.max(), top)))
    if quantity == "product":
        axis.set_ylim(0, top)
        for value in edges:
            axis.axhline(value, color="#D55E00", linewidth=1, linestyle=(0, (6, 3)), zorder=0)
            axis.annotate(f"edge {value:g}", (1.01, value), xycoords=("axes fraction", "data"), va="center",
                          fontsize=7, color="#D55E00")  # fmt: skip


def look(tuner, k):
    """Colour and line style of the k-th kind of run of a tuner: its colour, then darker and lighter shades of it."""
    share, style = LOOKS[k % len(LOOKS)]
    color = np.array(colors.to_rgb(COLORS.get(tuner, "#999933")))
    return tuple(share * color if share <= 1 else 1 - (2 - share) * (1 - color)), style


def line(axis, quantity, runs, top, band, **style):
    """The median of runs that differ in the seed, the band they fill, crosses and a triangle; nan for older columns.

    A point is the mean over a hundredth of the steps, for noise and rates that alternate; on a log axis the geometric.
    """
    steps = max((run.history["step"] for run in runs), key=len)
    size = max(1, len(steps) // 100)
    starts = range(0, len(steps), size)
    mean = geometric if quantity in (*LOG, "product") else np.mean
    table = np.full((len(runs), len(starts)), np.nan)  # a row a run
    for row, (_, history, _) in zip(table, runs):
        values = products(history) if quantity == "product" else history.get(quantity, np.nan * history["step"])
        shown = np.isfinite(values) & ((values > 0) | (quantity not in LOG))
        for k, t in enumerate(starts):
            if shown[t : t + size].any():
                row[k] = mean(values[t : t + size][shown[t : t + size]])
        if diverged(history) and shown.any():
            end = min(values[shown][-1], 2 * float(values[0]) if quantity == "loss" else np.inf)  # within the frame
            axis.plot(history["step"][shown][-1], end, "x", color=style["color"], markersize=7, markeredgewidth=1.5)
    there = np.isfinite(table).sum(axis=0) > len(runs) / 2
    points, table = steps[::size][there], table[:, there]
    median = np.nanmedian(table, axis=0)
    axis.plot(points, median, linewidth=1.3, marker="o" if len(points) == 1 else None, **style)
    if len(runs) > 1 and band:
        low, high = np.nanmin(table, axis=0), np.nanmax(table, axis=0)
        axis.fill_between(points, low, high, color=style["color"], alpha=0.12, linewidth=0)
    left = 1 + max(np.flatnonzero(median <= top), default=-1)  # from here on it is above the panel
    if left < len(points):
        axis.plot(points[left], top, "^", color=style["color"], markersize=6, clip_on=False)


def finish(figure, axes, file):
    """What all figures share: no box around a panel, small numbers, one legend on top. Saves it; returns the path."""
    entries = {}
    two_or_five = lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""
    for axis in np.asarray(axes).flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(which="both", labelsize=8)
        for ticks in (axis.xaxis, axis.yaxis):
            if ticks.get_scale() == "log":  # numbers such as 0.05, between the powers of 10 too where these are few
                low, high = ticks.get_view_interval()
                ticks.set(major_formatter="{x:g}", minor_formatter=two_or_five if high < 50 * low else "")
        handles, names = axis.get_legend_handles_labels()
        entries |= dict(zip(names, handles))
    if 0 < len(entries) <= 24:  # more would lie over the panels
        ncols = max(1, int(figure.get_figwidth() / (0.7 + 0.08 * max(map(len, entries)))))  # as many as fit
        figure.legend(entries.values(), entries, loc="outside upper center", ncols=ncols, frameon=False, fontsize=9)
    file = Path(file).with_suffix(Path(file).suffix or ".png")
    temporary = file.with_name("." + file.name)  # renamed, so that there is the old one or the new one, whole
    try:
        figure.savefig(temporary, dpi=130)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return file


def show(folders, file, alone=True):
    """Prints the table of the runs in some folders; draws them to a file, if any, and (alone) each in its folder."""
    runs = [load_run(folder) for folder in folders]
    print("\n".join(table(runs)))
    if file:
        figures = [draw([run], Path(folder, "figure.png")) for folder, run in zip(folders, runs) if alone]
        print(f"figure: {figures[0] if len(figures) == 1 else draw(runs, file)}")


def main(argv=None):
    """The command line: the table of run folders, and one figure of them."""
    parser = argparse.ArgumentParser(description="The table of some runs, and one figure of them.")
    parser.add_argument("folders", nargs="+", metavar="RUN", help="a run folder; what is none is passed over")
    parser.add_argument("-o", "--out", default="figure.png", metavar="FILE", help="png, pdf or svg (%(default)s)")
    options = parser.parse_args(argv)
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="replace")  # what a terminal cannot show ends no command
    try:
        folders = [folder for folder in options.folders if Path(folder, "checkpoint.npz").exists()]
        show(folders or options.folders, options.out, alone=False)
    except (OSError, ValueError) as error:
        print("plots.py:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

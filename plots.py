"""Figures from logged runs: loss, learning rate, sharpness, and their product against the edge.

What this file teaches: what to look at. Training is at the edge of stability when learning rate × sharpness stays
near the value at which the optimizer would stop being stable on a quadratic (2 for gradient descent).

    python plots.py runs/RUN [runs/RUN ...] -o FILE

A run is a folder with config.json (its settings) and metrics.csv (a row a step; nan = not measured).
Copying: this file needs numpy and matplotlib alone; importing it chooses a backend that needs no screen.
Read next: theory.py, for why the curves look as they do.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)

# The colours of Okabe and Ito, which colour-blind readers tell apart: one tuner, one colour, everywhere.
COLORS = {
    "constant": "#000000",
    "schedule": "#999999",
    "linesearch": "#E69F00",
    "greedy": "#009E73",
    "cdat": "#0072B2",
    "polyak": "#CC79A7",
    "hypergradient": "#56B4E9",
    "exact": "#D55E00",
    "feedback": "#882255",
}
LOOKS = [(1.0, "-"), (0.45, "--"), (1.4, ":"), (1.65, "-."), (0.7, (0, (6, 2)))]  # of the runs of one tuner: lightness, line

QUANTITIES = {
    "loss": "training loss", "learning_rate": "learning rate η", "sharpness": "sharpness λ",
    "product": "rate × sharpness, ηλ", "grad_norm": "gradient norm", "turn": "cos∠(u now, u before)",
    "alignment": "alignment of u with\nthe top eigenvector", "greedy_gain": "f(w + η_edge u)\n− f(w + η_greedy u)",
    "test_loss": "test loss", "test_accuracy": "test accuracy",
}  # fmt: skip
LOG = ("loss", "learning_rate", "sharpness", "grad_norm", "test_loss")  # drawn on a log axis


def read_settings(folder):
    """The settings of a run folder, a dict. Raises OSError or ValueError in one line that names what is wrong."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: not a run folder, it has no config.json")
    try:
        settings = dict(json.loads(file.read_text()))
    except (ValueError, TypeError):
        raise ValueError(f"{file}: broken, not a whole JSON object") from None
    if not {"tuner", "optimizer", "status"} <= set(settings):
        raise ValueError(f"{file}: broken, not the settings of a run")
    return settings


def read_metrics(file):
    """A metrics.csv as a dict of arrays, one a column.

    >>> _ = Path("metrics.csv").write_text("step,loss\\n0,2.5\\n1,nan\\n")
    >>> read_metrics("metrics.csv")["loss"].tolist()
    [2.5, nan]
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: there is no such file")
    try:
        header, *rows = Path(file).read_text().splitlines() or [""]
        names = header.split(",")
        table = np.array([row.split(",") for row in rows], float).reshape(len(rows), len(names))
    except ValueError:
        raise ValueError(f"{file}: broken, a row is not as many numbers as there are columns") from None
    return dict(zip(names, table.T))


def load_run(folder):
    """(settings, history) of a run folder: a dict, and a dict of one array a column of metrics.csv.

    >>> load_run("no/such/run")
    Traceback (most recent call last):
    FileNotFoundError: no/such/run: not a run folder, it has no config.json
    """
    return read_settings(folder), read_metrics(Path(folder) / "metrics.csv")


def edge(config):
    """The ηλ at which an optimizer stops being stable on a quadratic (Cohen et al. 2021, 2022).

    2 for gradient descent and RMSProp, 2(1 + β) for heavy ball, 2(1 + β₁)/(1 − β₁) for Adam, λ being that of the
    preconditioned Hessian where there is a preconditioner. config is a dict of settings.

    >>> edge({"optimizer": "gd"}), edge({"optimizer": "momentum", "momentum": 0.5})
    (2.0, 3.0)
    """
    if config["optimizer"] == "momentum":
        return 2.0 * (1 + config["momentum"])
    if config["optimizer"] == "adam":
        return 2.0 * (1 + config["beta1"]) / (1 - config["beta1"])
    return 2.0


NAMES = {"sigma": "σ", "beta": "β", "batch_size": "batch", "weight_decay": "weight decay", "sigma_high": "σ_high",
         "tolerance": "τ", "lr_max": "at most", "hyper_rate": "rate"}  # fmt: skip
WHAT = ("dataset", "samples", "model", "preset", "width", "depth", "loss", "weight_decay", "optimizer", "batch_size")
UNNAMED = ("tuner", "seed", "steps", "status", "seconds", "jax", "numpy", "device", "data_dir", "out", "resume", "overwrite",
           "log_every", "no_plot", "no_cache", "distributed", "coordinator", "processes", "process")  # fmt: skip


def labels(configs):
    """A short name for each run: its tuner, its rate or σ, and the settings in which it is unlike others.

    What is trained is compared with all of them, what belongs to a tuner with the runs of that tuner.

    >>> labels([{"tuner": "cdat", "sigma": 2.0, "beta": 0.0}, {"tuner": "cdat", "sigma": 2.0, "beta": 0.9},
    ...         {"tuner": "constant", "lr": 0.1, "beta": 0.0}])
    ['CDAT σ = 2, β 0', 'CDAT σ = 2, β 0.9', 'constant 0.1']
    """
    shown = {"constant": "lr", "schedule": "lr", "cdat": "sigma", "exact": "sigma"}

    def label(config):
        tuner = config["tuner"]
        text = "CDAT" if tuner == "cdat" else tuner
        if tuner in shown:
            text += f"{' σ =' if shown[tuner] == 'sigma' else ''} {config[shown[tuner]]:g}"
        for key in config:
            among = configs if key in WHAT else [other for other in configs if other["tuner"] == tuner]
            if key not in (*UNNAMED, shown.get(tuner)) and len({str(other.get(key)) for other in among}) > 1:
                value = f"{config[key]:g}" if type(config[key]) in (int, float) else str(config[key])
                text += f", {value}" if type(config[key]) is str else f", {NAMES.get(key, key)} {value}"
        return text

    return [label(config) for config in configs]


def setting_of(config):
    """What a run trains, in words.

    >>> setting_of({"model": "mlp", "dataset": "digits", "optimizer": "adam", "batch_size": 64})
    'mlp, digits, adam, batch 64'
    """
    network = config.get("preset") or config.get("model")
    if config.get("activation") == "tanh":
        network = f"tanh {network}"
    words = [word for word in (network, config.get("dataset"), config["optimizer"]) if word not in (None, "gd")]
    if config.get("batch_size"):
        words.append(f"batch {config['batch_size']}")
    return ", ".join(words)


def final_loss(history):
    """What runs are compared by: the mean loss of the last 5 steps; inf where the run diverged.

    >>> float(final_loss({"loss": np.array([9.0, 1, 2, 3, 4, 5])}))
    3.0
    """
    loss = history["loss"][-5:]
    return np.mean(loss) if np.isfinite(loss[-1]) else np.inf


def draw(runs, file, quantities=("loss", "learning_rate", "sharpness", "product")):
    """Draw runs, a list of (config, history), to file (png, pdf, svg): a column a setting, a row a quantity.

    A config is a dict of settings, with at least tuner, its lr or sigma, optimizer and its hyperparameters, and status; a
    history one of numpy arrays, of step, loss, learning_rate and what else is drawn. A single setting is laid out in two
    columns. Runs that differ in the seed alone are one line, their median, in a band from the lowest to the highest of
    them. A cross is where a run diverged. config["name"] goes into the legend where there is one, else what `labels`
    calls the run.

    >>> history = {"step": np.arange(2), "loss": np.array([2.0, 1.0]), "learning_rate": np.array([0.1, 0.1]),
    ...            "sharpness": np.array([10.0, np.nan])}
    >>> draw([({"tuner": "constant", "lr": 0.1, "optimizer": "gd", "status": "done"}, history)], "figure.png")
    """
    columns = {}
    for config, history in runs:
        columns.setdefault(setting_of(config), []).append((config, history))
    wrapped, rows = len(columns) == 1, len(quantities)
    shape, size = (rows, len(columns)), (max(5, 2.7 * len(columns)), 0.7 + 1.9 * rows)
    if wrapped:
        shape, size = ((rows + 1) // 2, min(rows, 2)), (4.5 * min(rows, 2), 0.6 + 2.5 * ((rows + 1) // 2))
    figure, axes = plt.subplots(*shape, figsize=size, sharex="col", squeeze=False, layout="constrained")
    for k, (setting, of_setting) in enumerate(columns.items()):
        for axis, quantity in zip(axes.flat if wrapped else axes[:, k], quantities):
            panel(axis, quantity, of_setting)
            axis.set_title(QUANTITIES[quantity] if wrapped else "", fontsize=9, loc="left")
        if not wrapped:
            axes[0, k].set_title(setting.replace(", ", "\n", 1), fontsize=9, loc="left")
    for axis, quantity in zip(axes[:, 0], () if wrapped else quantities):
        axis.set_ylabel(QUANTITIES[quantity], fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=9)
    finish(figure, axes, file)


def panel(axis, quantity, runs):
    """One quantity of the runs of one setting."""
    names = [config.get("name", label) for (config, _), label in zip(runs, labels([config for config, _ in runs]))]
    kinds = {}  # how many of each tuner there are
    for name in dict.fromkeys(names):
        same = [run for run, its in zip(runs, names) if its == name]
        tuner = same[0][0]["tuner"]
        k = kinds[tuner] = kinds.get(tuner, -1) + 1
        color, style = look(tuner, k)
        line(axis, quantity, same, dict(color=color, linestyle=style, label=name, zorder=2 - k / 10))  # the first on top
    values = np.concatenate([line.get_ydata() for line in axis.lines])
    if quantity == "greedy_gain":
        axis.set_yscale("symlog", linthresh=0.01)  # it has both signs, and what blows up must not press the others flat
    if quantity in LOG and len(values):
        axis.set_yscale("log")
        top = 4 * max(history["loss"][0] for _, history in runs if len(history["loss"])) if quantity == "loss" else np.inf
        axis.set_ylim(0.7 * values.min(), min(1.4 * values.max(), top))  # what blows up must not press the others flat
    if quantity == "product":
        edges = sorted({edge(config) for config, _ in runs})
        axis.set_ylim(0, 2 * edges[-1])  # what is far above the edge is a start, or the end of a run
        for value in edges:
            axis.axhline(value, color="#D55E00", linewidth=1, linestyle=(0, (6, 3)), zorder=0)
            axis.annotate(f"edge {value:g}", (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                          fontsize=8, color="#D55E00")  # fmt: skip


def look(tuner, k):
    """Colour and line style of the k-th kind of run of a tuner: its colour, then darker and lighter shades of it."""
    share, style = LOOKS[k % len(LOOKS)]
    color = np.array(matplotlib.colors.to_rgb(COLORS.get(tuner, "#000000")))
    return tuple(share * color if share <= 1 else 1 - (2 - share) * (1 - color)), style


def line(axis, quantity, runs, style):
    """The median of runs that differ in the seed, the band they fill, and a cross where one diverged."""
    steps = max((history["step"] for _, history in runs), key=len)
    table = np.full((len(runs), len(steps)), np.nan)  # a row a run
    for row, (config, history) in zip(table, runs):
        values = history["learning_rate"] * history["sharpness"] if quantity == "product" else history[quantity]
        shown = np.isfinite(values) & ((values > 0) | (quantity not in LOG))
        row[: len(values)][shown] = values[shown]
        if config["status"] == "diverged" and shown.any():
            end = min(values[shown][-1], 2 * values[0] if quantity == "loss" else np.inf)  # within the frame
            axis.plot(history["step"][shown][-1], end, "x", color=style["color"], markersize=7, markeredgewidth=1.5)
    there = np.isfinite(table).sum(0) > len(runs) / 2
    steps, table = steps[there], table[:, there]
    axis.plot(steps, np.nanmedian(table, 0), linewidth=1.3, **style)
    if len(runs) > 1:
        axis.fill_between(steps, np.nanmin(table, 0), np.nanmax(table, 0), color=style["color"], alpha=0.15, linewidth=0)


def finish(figure, axes, file):
    """What all figures share: no box around a panel, small numbers, one legend on top; then the file."""
    entries = {}
    for axis in np.asarray(axes).flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(which="both", labelsize=8)
        entries |= dict(zip(*reversed(axis.get_legend_handles_labels())))
    if entries:
        ncols = max(1, int(figure.get_figwidth() / (0.7 + 0.08 * max(map(len, entries)))))  # as many as fit
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=min(ncols, len(entries)),
                      frameon=False, fontsize=9)  # fmt: skip
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main(argv=None):
    """The command line: overlay run folders in one figure."""
    parser = argparse.ArgumentParser(description="Overlay runs: loss, learning rate, sharpness, their product.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, such as runs/digits-mlp-gd-cdat")
    parser.add_argument("-o", "--out", default="figure.png", metavar="FILE", help="png, pdf or svg (%(default)s)")
    options = parser.parse_args(argv)
    try:
        draw([load_run(folder) for folder in options.runs], options.out)
    except (OSError, ValueError) as error:
        print(f"plots.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(options.out)


if __name__ == "__main__":
    main()

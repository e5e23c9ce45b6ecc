"""Figures from logged runs: loss, learning rate, sharpness, and their product against the edge.

What this file teaches: what to look at. Training is at the edge of stability when learning rate × sharpness stays
near the value at which the optimizer would stop being stable on a quadratic (2 for gradient descent).

    python plots.py runs/RUN [runs/RUN ...] -o FILE

A run is a folder with config.json (its settings) and metrics.csv (a row a step; nan = not measured).
Copying: this file needs numpy and matplotlib alone. Read next: README.md, for the figures of the paper.
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
STYLES = ["-", "--", ":", "-."]  # runs of one tuner


def read_settings(folder):
    """The settings of a run folder, a dict. Raises OSError or ValueError in one line that names what is wrong."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: not a run folder, it has no config.json")
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError):
        raise ValueError(f"{file}: broken, not a whole JSON object") from None


def read_metrics(file):
    """A metrics.csv as a dict of arrays, one a column.

    >>> _ = Path("metrics.csv").write_text("step,loss\\n0,2.5\\n1,nan\\n")
    >>> read_metrics("metrics.csv")["loss"].tolist()
    [2.5, nan]
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: there is no such file")
    header, *rows = Path(file).read_text().splitlines() or [""]
    names = header.split(",")
    try:
        table = np.array([row.split(",") for row in rows], float).reshape(len(rows), len(names))
    except ValueError:
        raise ValueError(f"{file}: broken, a row is not {len(names)} numbers") from None
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


def labels(configs):
    """A short name for each run: its tuner, and the settings in which the runs differ (seeds apart).

    >>> labels([{"tuner": "cdat", "sigma": 2.0}, {"tuner": "constant", "lr": 0.1}])
    ['CDAT σ = 2', 'constant 0.1']
    """
    named = {"constant": "lr", "schedule": "lr", "cdat": "sigma", "exact": "sigma"}  # shown always
    unlike = ("optimizer", "model", "dataset", "loss", "lr", "sigma", "beta", "batch_size", "width", "depth")
    unlike = [key for key in unlike if len({str(config.get(key)) for config in configs}) > 1]

    def label(config):
        tuner = config["tuner"]
        text = {"cdat": "CDAT", "exact": "exact"}.get(tuner, tuner)
        if tuner in named:
            text += f"{' σ =' if named[tuner] == 'sigma' else ''} {config[named[tuner]]:g}"
        applies = {"lr": ("hypergradient",), "sigma": (), "beta": ("cdat",)}
        for key in unlike:
            if tuner in applies.get(key, (tuner,)):
                value = config.get(key)
                name = {"beta": "β = ", "batch_size": "batch ", "width": "width ", "depth": "depth "}.get(key, "")
                text += f", {name}{value:g}" if isinstance(value, (int, float)) else f", {value}"
        return text

    return [label(config) for config in configs]


def draw(runs, file):
    """Overlay runs, a list of (config, history), in four panels and write them to file (png, pdf, svg).

    Runs that differ in the seed alone share a line style and one entry in the legend. A diverged run ends in a cross.

    >>> history = {"step": np.arange(2), "loss": np.array([2.0, 1.0]), "learning_rate": np.array([0.1, 0.1]),
    ...            "sharpness": np.array([10.0, np.nan])}
    >>> draw([({"tuner": "constant", "lr": 0.1, "optimizer": "gd", "status": "done"}, history)], "figure.png")
    """
    configs = [config for config, _ in runs]
    names = labels(configs)
    styles = {}
    for config, name in zip(configs, names):
        of_tuner = styles.setdefault(config["tuner"], {})
        of_tuner.setdefault(name, STYLES[len(of_tuner) % len(STYLES)])
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.6), sharex=True, layout="constrained")
    for (config, history), name in zip(runs, names):
        look = {"color": COLORS.get(config["tuner"]), "linestyle": styles[config["tuner"]][name], "label": name}
        draw_run(axes.flat, history, look, config["status"] == "diverged")
    finish(figure, axes, configs)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_run(axes, history, look, diverged):
    """One run's lines in the four panels."""
    step, loss = history["step"], history["loss"]
    measured = np.isfinite(history["sharpness"])
    product = history["learning_rate"] * history["sharpness"]
    rate = np.where(history["learning_rate"] > 0, history["learning_rate"], np.nan)  # log axis
    lines = [(step, loss), (step, rate)]
    lines += [(step[measured], values[measured]) for values in (history["sharpness"], product)]
    for axis, (x, y) in zip(axes, lines):
        axis.plot(x, y, linewidth=1.3, **look)
        finite = np.flatnonzero(np.isfinite(y))
        if diverged and len(finite):
            axis.plot(x[finite[-1]], y[finite[-1]], "x", color=look["color"], markersize=8, markeredgewidth=2)


def finish(figure, axes, configs):
    """Titles, scales, the line of the edge and one legend for all panels."""
    titles = ["training loss", "learning rate η", "sharpness λ", "learning rate × sharpness, ηλ"]
    for axis, title in zip(axes.flat, titles):
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.02)
    for axis in (axes[0, 0], axes[0, 1]):
        axis.set_yscale("log")
    for axis in axes[1]:
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
    edges = {edge(config): [] for config in configs}
    for optimizer, value in dict.fromkeys((config["optimizer"], edge(config)) for config in configs):
        edges[value].append(optimizer)
    axes[1, 1].set_ylim(top=2 * max(edges))  # what is far above the edge is a start, or the end of a run
    for value, optimizers in edges.items():
        axes[1, 1].axhline(value, color="#D55E00", linewidth=1, linestyle=(0, (6, 3)), zorder=0)
        axes[1, 1].annotate(
            f"edge of\n{', '.join(optimizers)}: {value:g}", (1, value), (4, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", va="center", fontsize=8, color="#D55E00",
        )  # fmt: skip
    entries = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels())))
    figure.legend(
        entries.values(), entries.keys(), loc="outside upper center", ncols=min(4, len(entries)), frameon=False
    )


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

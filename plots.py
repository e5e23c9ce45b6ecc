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
LOOKS = [(1.0, "-"), (0.45, "--"), (1.4, ":"), (1.65, "-.")]  # kinds of runs of one tuner: lightness of the colour, and line

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
    words = [config.get("preset") or config.get("model"), config.get("dataset"), config["optimizer"]]
    words = [word for word in words if word not in (None, "gd")]
    size = config.get("batch_size")
    return ", ".join(words + [f"batch {size}"] * bool(size))


def final_loss(history):
    """What runs are compared by: the mean loss of the last 5 steps; inf where the run diverged.

    >>> float(final_loss({"loss": np.array([9.0, 1, 2, 3, 4, 5])}))
    3.0
    """
    loss = history["loss"][-5:]
    return np.mean(loss) if np.isfinite(loss[-1]) else np.inf


def draw(runs, file, quantities=("loss", "learning_rate", "sharpness", "product")):
    """Draw runs, a list of (config, history), to file (png, pdf, svg): a column a setting, a row a quantity.

    A single setting is laid out in two columns. Runs that differ in the seed alone are one line, their median, in a
    band from the lowest to the highest of them. A cross is where a run diverged. config["name"] goes into the legend
    where there is one, else what `labels` calls the run.

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
        color, style = look(tuner, kinds.setdefault(tuner, 0))
        kinds[tuner] += 1
        line(axis, quantity, same, dict(color=color, linestyle=style, label=name))
    values = np.concatenate([line.get_ydata() for line in axis.lines])
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
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=min(ncols, len(entries)), frameon=False, fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)


# ------------------------------------------------------------------------------- drawings of experiments

# A drawing is a function draw(runs, file). In its runs, (config, history) pairs, config["run"] names a run but for its seed.


def median_loss(runs):
    """By kind: the median over the seeds of the final loss, inf where most diverged."""
    losses = {}
    for config, history in runs:
        losses.setdefault(config["run"], []).append(final_loss(history))
    return {kind: np.median(values) for kind, values in losses.items()}


SEARCHED = ("constant", "schedule", "linesearch", "polyak", "hypergradient")  # tuners shown at their best setting


def tuned(runs, searched=SEARCHED):
    """The runs without those that another of their setting and tuner beats, where the tuner is one of those searched."""
    losses, best = median_loss(runs), {}
    for config, _ in runs:
        kind, group = config["run"], (setting_of(config), config["tuner"])
        if config["tuner"] in searched and losses[kind] <= losses.get(best.get(group), np.inf):
            best[group] = kind
    return [(config | {"name": "CDAT" if config["tuner"] == "cdat" else config["tuner"]} if config["tuner"] in searched else config, history)
            for config, history in runs if config["tuner"] not in searched or config["run"] in best.values()]  # fmt: skip


def panels(*quantities, searched=SEARCHED):
    """A drawing: the tuned runs, a column for each setting."""
    return lambda runs, file: draw(tuned(runs, searched), file, quantities)


def heat(x, y, split):
    """A drawing: log10 of the final loss, the median over the seeds, over two settings; a panel for each value of split.

    The best of each row has a frame, a cell that blew up a cross.
    """

    def draw(runs, file):
        losses, start = median_loss(runs), max(history["loss"][0] for _, history in runs)
        parts = sorted({config[split] for config, _ in runs})
        figure, axes = plt.subplots(1, len(parts), squeeze=False, layout="constrained", figsize=(4.6 * len(parts), 3.2))
        for axis, part in zip(axes[0], parts):
            cells = {(config[y], config[x]): losses[config["run"]] for config, _ in runs if config[split] == part}
            last = lambda value: (value == 0 and y == "batch_size", value)  # the full batch is the largest
            xs, ys = sorted({key[1] for key in cells}), sorted({key[0] for key in cells}, key=last)
            table = np.array([[cells.get((b, a), np.inf) for a in xs] for b in ys])
            table[table >= start] = np.nan
            image = axis.imshow(np.log10(table), cmap="viridis_r", aspect="auto", vmin=np.log10(min(losses.values())),
                                vmax=np.log10(start))  # fmt: skip
            for row, values in enumerate(table):
                best = np.argmin(np.where(np.isnan(values), np.inf, values))
                axis.add_patch(plt.Rectangle((best - 0.5, row - 0.5), 1, 1, fill=False, color="#D55E00", linewidth=2))
                for column in np.flatnonzero(np.isnan(values)):
                    axis.text(column, row, "×", ha="center", va="center", fontsize=12)
            axis.set_xticks(range(len(xs)), [f"{value:g}" for value in xs])
            axis.set_yticks(range(len(ys)), ["all" if last(value)[0] else f"{value:g}" for value in ys])
            axis.set(xlabel=NAMES.get(x, x), ylabel=NAMES.get(y, y))
            axis.set_title(f"{NAMES.get(split, split)} = {part:g}", fontsize=10)
        figure.colorbar(image, ax=axes[0].tolist(), label="log₁₀ final training loss")
        finish(figure, axes, file)

    return draw


def width_and_depth(runs, file):
    """The drawing of Figure 18: final loss against what varies, for each tuner; the constant rate is tuned."""
    losses = median_loss(runs)
    names = ("width", "depth", "weight_decay", "samples")
    values = {name: [config[name] for config, _ in runs] for name in names}
    plain = {name: max(values[name], key=values[name].count) for name in names}  # what the others are when one varies
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.8), layout="constrained", sharey=True)
    for axis, name in zip(axes, names):
        best = {}
        for config, _ in runs:
            if all(config[other] == plain[other] for other in names if other != name):
                of_tuner = best.setdefault(labels([config])[0] if config["tuner"] == "cdat" else "constant, tuned", {})
                of_tuner[config[name]] = min(losses[config["run"]], of_tuner.get(config[name], np.inf))
        for k, (label, points) in enumerate(best.items()):
            color, style = look("cdat" if k else "constant", max(k - 1, 0))
            axis.plot(*zip(*sorted(points.items())), style, marker="o", color=color, label=label, markersize=4)
        axis.set_xlabel(NAMES.get(name, name))
        axis.set_xscale("symlog", linthresh=1e-5) if name == "weight_decay" else axis.set_xscale("log", base=2)
        axis.set_yscale("log")
    axes[0].set_ylabel("final training loss")
    finish(figure, axes, file)


def at_equal_loss(runs, file):
    """A drawing: test loss and accuracy against training loss, so that runs are compared where they fit equally well."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for config, history in tuned(runs):
        measured = np.isfinite(history["test_loss"])
        for axis, quantity in zip(axes, ("test_loss", "test_accuracy")):
            axis.plot(history["loss"][measured], history[quantity][measured], color=COLORS[config["tuner"]], linewidth=1,
                      label=config.get("name", labels([config])[0]))  # fmt: skip
            axis.set(xscale="log", xlabel="training loss (time runs to the left)", ylabel=QUANTITIES[quantity])
    axes[0].set_yscale("log")
    axes[1].set_ylim(0.9, 1)
    finish(figure, axes, file)


def curves(*models):
    """A drawing of the simplified model: a column for each (title, paths by label), rows η, λ, y and p."""

    def draw(_, file):
        figure, axes = plt.subplots(4, len(models), squeeze=False, sharex="col", figsize=(4.4 * len(models), 6.6),
                                    layout="constrained")  # fmt: skip
        names = list(dict.fromkeys(label for _, paths in models for label in paths))
        colors = dict(zip(names, ("#0072B2", "#D55E00", "#009E73")))
        for column, (title, paths) in enumerate(models):
            axes[0, column].set_title(title, fontsize=10)
            axes[-1, column].set_xlabel("step", fontsize=9)
            for label, path in paths.items():
                rows = (("learning rate η", path.learning_rate), ("sharpness λ", path.sharpness), ("y = ηλ − 2", path.y),
                        ("p = x²", path.p))  # fmt: skip
                for axis, (name, values) in zip(axes[:, column], rows):
                    axis.plot(values, color=colors[label], label=label, linewidth=1)
                    axis.set_ylabel(name, fontsize=9)
            axes[2, column].axhline(0, color="#999999", linewidth=0.8, zorder=0)
            axes[2, column].set_ylim(-0.6, 0.6)
            axes[3, column].set_yscale("log")
            axes[3, column].set_ylim(bottom=max(1e-12, min(float(path.p.min()) for path in paths.values())))
        finish(figure, axes, file)

    return draw


def against(other):
    """A drawing: the final loss of each run over the median one of the runs called `other`, setting by setting."""

    def draw(runs, file):
        runs = [(config["name"].split(",")[0], setting_of(config), config["tuner"], final_loss(history))
                for config, history in tuned(runs)]  # fmt: skip
        settings, names = list(dict.fromkeys(run[1] for run in runs)), list(dict.fromkeys((run[0], run[2]) for run in runs))
        base = {setting: np.median([run[3] for run in runs if run[:2] == (other, setting)]) for setting in settings}
        figure, axis = plt.subplots(figsize=(11, 4.2), layout="constrained")
        for name, setting, tuner, loss in runs:
            k = names.index((name, tuner))
            color, _ = look(tuner, [pair for pair in names if pair[1] == tuner].index((name, tuner)))
            x = settings.index(setting) + (k - (len(names) - 1) / 2) / (len(names) + 2)
            ratio = np.clip(loss / base[setting], 1 / 30, 30)
            axis.plot(x, ratio, "x" if ratio in (1 / 30, 30) else "o", color=color, label=name, markersize=4)
        axis.axhline(1, color="#999999", linewidth=0.8, zorder=0)
        axis.set(yscale="log", ylim=(1 / 40, 40), xlim=(-0.6, len(settings) - 0.4))
        axis.set_ylabel(f"final loss over that of {other}\n(crosses: 30 times and beyond)", fontsize=9)
        axis.set_xticks(range(len(settings)), [setting.replace(", ", "\n") for setting in settings])
        for x in range(1, len(settings)):
            axis.axvline(x - 0.5, color="#DDDDDD", linewidth=0.8, zorder=0)
        finish(figure, axis, file)

    return draw


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

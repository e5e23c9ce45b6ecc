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


# ------------------------------------------------------------------------------- drawings of experiments

# A drawing is a function draw(runs, file). In its runs, (config, history) pairs, config["run"] names a run but for its seed.

QUANTITIES = {
    "loss": "training loss", "learning_rate": "learning rate η", "sharpness": "sharpness λ", "product": "ηλ",
    "grad_norm": "gradient norm", "alignment": "alignment of u\nwith top eigenvector", "turn": "cos∠(u now, u before)",
    "greedy_gain": "f(w + η_edge u)\n− f(w + η_greedy u)", "test_loss": "test loss", "test_accuracy": "test accuracy",
}  # fmt: skip
LOG = ("loss", "learning_rate", "sharpness", "grad_norm", "test_loss")
SIGMAS = {1.0: "-", 1.9375: ":", 2.0: "-", 2.0625: "--", 2.5: "-."}


def final_loss(history):
    """What runs are compared by: the mean loss of the last 5 steps; inf where the run diverged."""
    loss = history["loss"][-5:]
    return np.mean(loss) if np.isfinite(loss[-1]) else np.inf


def setting_of(config):
    """What a run trains, in words."""
    words = [config["preset"] or config["model"], config["dataset"]]
    words += [config["optimizer"]] * (config["optimizer"] != "gd")
    return ", ".join(words + [f"batch {config['batch_size']}"] * bool(config["batch_size"]))


def mean_loss(runs):
    """By kind: the mean over the seeds of the final loss, inf where one diverged."""
    losses = {}
    for config, history in runs:
        losses.setdefault(config["run"], []).append(final_loss(history))
    return {kind: np.mean(values) for kind, values in losses.items()}


def tuned(runs):
    """The runs without those constants, schedules and linesearches that another of their setting and tuner beats."""
    losses, best = mean_loss(runs), {}
    for config, _ in runs:
        kind, group = config["run"], (setting_of(config), config["tuner"], config["decay"])
        if losses[kind] < losses.get(best.get(group), np.inf):
            best[group] = kind
    searched = ("constant", "schedule", "linesearch", "polyak", "hypergradient")
    return [(config, history) for config, history in runs if config["tuner"] not in searched
            or best.get((setting_of(config), config["tuner"], config["decay"])) == config["run"]]  # fmt: skip


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
                frame(axis, quantity)
        for column, name in enumerate(columns):
            axes[0, column].set_title(name, fontsize=9)
            axes[-1, column].set_xlabel("step", fontsize=9)
            edges = {edge(config) for config, _ in runs if setting_of(config) == name}
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
    return labels([config])[0] if config["tuner"] in ("cdat", "exact") else config["tuner"]


def line(axis, quantity, config, history):
    """One run; a cross marks where it diverged."""
    history = history | {"product": history["learning_rate"] * history["sharpness"]}
    step, values = history["step"], history[quantity]
    shown = np.isfinite(values) & ((values > 0) | (quantity not in LOG))
    name = line_name(config)
    style = SIGMAS.get(config["sigma"], "--") if config["tuner"] in ("cdat", "exact") else "-"
    color = COLORS[config["tuner"]]
    axis.plot(step[shown], values[shown], style, color=color, label=name, linewidth=1, alpha=0.8)
    if config["status"] == "diverged" and shown.any():
        end = min(values[shown][-1], 3 * values[shown][0]) if quantity == "loss" else values[shown][-1]  # within the frame
        axis.plot(step[shown][-1], end, "x", color=color, markersize=7, markeredgewidth=1.5)


def frame(axis, quantity):
    """Scale and frame of a panel."""
    if quantity in LOG and axis.lines:
        axis.set_yscale("log")
        values = np.concatenate([line.get_ydata() for line in axis.lines])
        if quantity == "loss":  # a run that blows up must not press the others flat
            start = max(line.get_ydata()[0] for line in axis.lines)
            axis.set_ylim(0.7 * values.min(), 4 * start)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(which="both", labelsize=8)


def heat(x, y, of, split=None):
    """A drawing: log10 of the final loss, averaged over the seeds, over two settings; a panel for each value of split.

    The best of each row has a frame, a cell with a diverged run a cross.
    """

    def draw(runs, file):
        runs = [run for run in runs if run[0]["tuner"] == of]
        losses, start = mean_loss(runs), max(history["loss"][0] for _, history in runs)
        parts = sorted({config[split] for config, _ in runs}) if split else [None]
        figure, axes = plt.subplots(1, len(parts), squeeze=False, layout="constrained", figsize=(4.6 * len(parts), 3.2))
        for axis, part in zip(axes[0], parts):
            cells = {(config[y], config[x]): losses[config["run"]] for config, _ in runs if part in (None, config.get(split))}
            xs, ys = (sorted({key[k] for key in cells}, key=lambda value: value or np.inf) for k in (1, 0))  # 0 = all
            table = np.array([[cells.get((b, a), np.inf) for a in xs] for b in ys])
            table[table >= start] = np.inf  # blown up, if not yet to infinity
            image = axis.imshow(np.log10(np.where(np.isfinite(table), table, np.nan)), cmap="viridis_r", aspect="auto",
                                vmin=np.log10(min(losses.values())), vmax=np.log10(start))  # fmt: skip
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
    losses, varied = mean_loss(runs), {"width": [], "depth": [], "weight_decay": [], "samples": []}
    values = {name: [config[name] for config, _ in runs] for name in varied}
    plain = {name: max(values[name], key=values[name].count) for name in varied}  # what the others are when one varies
    for config, _ in runs:
        for name in varied:
            if all(config[other] == plain[other] for other in varied if other != name):
                varied[name].append(config)
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.8), layout="constrained", sharey=True)
    for axis, (name, configs) in zip(axes, varied.items()):
        for tuner, sigma in (("constant", None), ("cdat", 1.0), ("cdat", 2.0), ("cdat", 2.0625)):
            best = {}
            for config in configs:
                if config["tuner"] == tuner and sigma in (None, config["sigma"]):
                    best[config[name]] = min(losses[config["run"]], best.get(config[name], np.inf))
            label = f"CDAT σ = {sigma:g}" if sigma else "constant, tuned"
            axis.plot(*zip(*sorted(best.items())), "o" + SIGMAS.get(sigma, "-"), color=COLORS[tuner], label=label,
                      markersize=4, alpha=0.5 if sigma == 1 else 1)  # fmt: skip
        axis.set_xlabel(name.replace("_", " "))
        axis.set_xscale("symlog", linthresh=1e-5) if name == "weight_decay" else axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("final training loss")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def dots(runs, file):
    """A drawing: the final loss of each run, a line for each label, a dot for each seed."""
    names = list(dict.fromkeys(config["label"] for config, _ in runs))
    figure, axis = plt.subplots(figsize=(7, 0.8 + 0.32 * len(names)), layout="constrained")
    for config, history in runs:
        axis.plot(final_loss(history), names.index(config["label"]), "o", color=COLORS[config["tuner"]], alpha=0.7)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="final training loss")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def at_equal_loss(runs, file):
    """A drawing: test loss and accuracy against training loss, so that runs are compared where they fit equally well."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for config, history in runs:
        measured = np.isfinite(history["test_loss"])
        for axis, quantity in zip(axes, ("test_loss", "test_accuracy")):
            axis.plot(history["loss"][measured], history[quantity][measured], color=COLORS[config["tuner"]],
                      label=line_name(config), linewidth=1)  # fmt: skip
            axis.set(xscale="log", xlabel="training loss (time runs to the left)", ylabel=QUANTITIES[quantity])
            axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yscale("log")
    axes[1].set_ylim(0.9, 1)
    entries = dict(zip(*reversed(axes[0].get_legend_handles_labels())))
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=4, frameon=False)
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


def against(reference="cdat", sigma=2.0):
    """A drawing: in each setting the final loss of each run, over the mean one of CDAT σ = 2 in that setting."""

    def draw(runs, file):
        runs, base = tuned(runs), {}
        for config, history in runs:
            if (config["tuner"], config["sigma"]) == (reference, sigma):
                base.setdefault(setting_of(config), []).append(final_loss(history))
        names = list(base)
        figure, axis = plt.subplots(figsize=(11, 4), layout="constrained")
        kinds = list(dict.fromkeys(line_name(config) for config, _ in runs))
        for config, history in runs:
            k = kinds.index(line_name(config))
            ratio = final_loss(history) / np.mean(base[setting_of(config)])
            x = names.index(setting_of(config)) + (k - len(kinds) / 2) / (len(kinds) + 2)
            marker = "os^v"[k % 4] if config["tuner"] == "cdat" else "o"
            axis.plot(x, min(ratio, 20), "x" if ratio > 20 else marker, color=COLORS[config["tuner"]],
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

"""Charts of what runs ended with: drawn from results.csv alone.

What this file teaches: to compare tuners by what they end with, each at its best setting, over all seeds.
A chart is a function draw(kinds, file) of results.Kind. Read next: drawings.py, for what happens on the way.
"""

import numpy as np
from matplotlib.patches import Rectangle

import plots
from paper import drawings, results
from paper.settings import setting_of


def start_of(kinds):
    """The loss that runs began with: what ends above it blew up."""
    return max(row["loss_first"] for kind in kinds for row in kind.rows)


def heat(x, y, split):
    """log10 of the final loss over two settings; a panel for each value of split, and for each curvature.

    The best of each row has a frame, a cell that blew up a cross.
    """

    def draw(kinds, file):
        panels = {}  # by what is trained, split and curvature: kinds by (y, x)
        for kind in kinds:
            config = vars(kind.config)
            what = setting_of(config | {"batch_size": 0})
            variant = ", uᵀGu" * (config.get("curvature") == "gauss-newton")
            title = f"{what}\n{plots.NAMES.get(split, split)} = {config[split]:g}{variant}"
            panels.setdefault(title, {})[config[y], config[x]] = kind
        columns = min(len(panels), 4)
        rows = -(-len(panels) // columns)
        figure, axes = drawings.subplots(rows, columns, squeeze=False, figsize=(3.2 * columns, 0.3 + 2.7 * rows))
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        for axis, (title, cells) in zip(axes.flat, panels.items()):
            xs, ys = (sorted({key[k] for key in cells}) for k in (1, 0))
            ys = ys[1:] + [0] if y == "batch_size" and ys[0] == 0 else ys  # the full batch is the largest
            losses = {key: results.median(kind, "loss") for key, kind in cells.items()}
            table = np.array([[losses.get((b, a), np.inf) for a in xs] for b in ys])
            start = start_of(cells.values())
            blown_up = ~(table < start)
            table[blown_up] = np.nan
            image = axis.imshow(np.log10(table), cmap="viridis_r", aspect="auto", vmin=-2.5, vmax=0.6)
            for row in np.flatnonzero(~blown_up.all(axis=1)):
                best = np.nanargmin(table[row])
                axis.add_patch(Rectangle((best - 0.5, row - 0.5), 1, 1, fill=False, color=drawings.ORANGE, linewidth=2))
            for row, column in np.argwhere(blown_up):
                axis.text(column, row, "×", ha="center", va="center", fontsize=12)
            axis.set_xticks(range(len(xs)), [f"{value:g}" for value in xs])
            names = ["all" if y == "batch_size" and value == 0 else f"{value:g}" for value in ys]
            axis.set_yticks(range(len(ys)), names)
            axis.set(xlabel=plots.NAMES.get(x, x), ylabel=plots.NAMES.get(y, y))
            axis.set_title(title, fontsize=9, loc="left")
        shown = axes.flat[: len(panels)].tolist()
        figure.colorbar(image, ax=shown, label="log₁₀ final training loss")
        plots.finish(figure, shown, file)

    return draw


def by_curvature(name):
    """The final loss over one setting, for both curvatures, a panel for each thing trained; at the top what blew up."""

    def draw(kinds, file):
        trained = list(dict.fromkeys(kind.setting for kind in kinds))
        figure, axes = drawings.subplots(2, (len(trained) + 1) // 2, squeeze=False, figsize=(12, 5.4))
        for axis, what in zip(axes.flat, trained):
            of_it = [kind for kind in kinds if kind.setting == what]
            start = start_of(of_it)
            constant = min(results.median(kind, "loss") for kind in of_it if kind.config.tuner == "constant")
            axis.axhline(constant, color=plots.COLORS["constant"], linestyle="--", linewidth=1, label="constant, tuned")
            looks = ("hessian", drawings.BLUE, "uᵀHu"), ("gauss-newton", drawings.ORANGE, "uᵀGu")
            for curvature, color, words in looks:
                found = {vars(kind.config).get(name, 1): [row["loss"] for row in kind.rows] for kind in of_it
                         if vars(kind.config).get("curvature") == curvature}  # greedy has σ = 1
                values = sorted(found)
                shown = [np.minimum(found[value], start) for value in values]
                x = np.arange(len(shown)) + (0.1 if curvature == "gauss-newton" else -0.1)
                axis.plot(x, [np.median(losses) for losses in shown], color=color, linewidth=1, label=words)
                for at, losses in zip(x, shown):
                    for loss in losses:
                        axis.plot(at, loss, "o" if loss < start else "x", color=color, markersize=4)
            axis.set_xticks(range(len(values)), [f"{value:g}" for value in values], rotation=45)
            axis.set_yscale("log")
            axis.set_xlabel({"sigma": "σ", "every": "steps between two curvatures"}[name], fontsize=9)
            axis.set_title(what.replace(", ", "\n", 1), fontsize=9, loc="left")
            axis.plot([], [], "x", color=drawings.GREY, label="ended above its start")
        for axis in axes[:, 0]:
            axis.set_ylabel("final training loss")
        plots.finish(figure, axes, file)

    return draw


def width_and_depth(kinds, file):
    """Figure 18: the final loss against what varies, for each kind of run."""
    names = ("width", "depth", "weight_decay", "samples")
    values = {name: [vars(kind.config)[name] for kind in kinds] for name in names}
    plain = {name: max(values[name], key=values[name].count) for name in names}  # what the others are when one varies
    figure, axes = drawings.subplots(1, 4, figsize=(11, 3), sharey=True)
    for axis, name in zip(axes, names):
        lines = {}
        for kind in kinds:
            if all(vars(kind.config)[other] == plain[other] for other in names if other != name):
                label = kind.label.replace("greedy", "σ = 1").replace("CDAT ", "")
                label = label.replace("curvature gauss-newton", "uᵀGu")
                lines.setdefault(label, {})[vars(kind.config)[name]] = results.median(kind, "loss")
        for label, points in sorted(lines.items()):
            color = drawings.ORANGE if "uᵀGu" in label else drawings.BLUE
            style = {"σ = 1": ":", "σ = 2": "-"}.get(label.split(",")[0], "--")
            marker = {"σ = 1.9375": "v", "σ = 2.0625": "^"}.get(label, "o")
            axis.plot(*zip(*sorted(points.items())), style, marker=marker, color=color, label=label, markersize=4)
        axis.set_xlabel(plots.NAMES.get(name, name))
        axis.set_xscale("symlog", linthresh=1e-5) if name == "weight_decay" else axis.set_xscale("log", base=2)
        axis.set_yscale("log")
    axes[0].set_ylabel("final training loss")
    plots.finish(figure, axes, file)


def against(other):
    """The final loss of each tuner at its best over that of `other`, by setting: medians, a bar over the seeds."""

    def draw(kinds, file):
        best = results.best_of_each(kinds)
        names = list(dict.fromkeys(name for of_setting in best.values() for name in of_setting))
        figure, axis = drawings.subplots(figsize=(11, 4.2))
        for place, of_setting in enumerate(best.values()):
            base = results.median(of_setting[other], "loss")
            for name, kind in of_setting.items():
                color = plots.COLORS[kind.config.tuner]
                ratios = [np.clip(row["loss"] / base, 1 / 30, 30) for row in kind.rows]
                x = place + (names.index(name) - (len(names) - 1) / 2) / (len(names) + 2)
                median = np.median(ratios)
                marker = "^" if median == 30 else "v" if median == 1 / 30 else "o"
                face = "white" if name.endswith("uᵀGu") else color
                axis.vlines(x, min(ratios), max(ratios), color=color, alpha=0.5, linewidth=1.5)
                axis.plot(x, median, marker, color=color, markerfacecolor=face, markersize=5)
                axis.plot([], [], "o", color=color, markerfacecolor=face, label=name, markersize=5)
        axis.axhline(1, color=drawings.GREY, linewidth=0.8, zorder=0)
        axis.set(yscale="log", ylim=(1 / 40, 40), xlim=(-0.6, len(best) - 0.4))
        axis.set_ylabel(f"final loss over that of {other}\n(triangles: beyond 30 times either way)", fontsize=9)
        axis.set_xticks(range(len(best)), [setting.replace(", ", "\n") for setting in best])
        for x in range(1, len(best)):
            axis.axvline(x - 0.5, color="#DDDDDD", linewidth=0.8, zorder=0)
        plots.finish(figure, axis, file)

    return draw


def numbers(**labels):
    """The final loss against each of some numbers of a tuner, over that with its usual value, which has a ring."""

    def draw(kinds, file):
        values = {name: [vars(kind.config)[name] for kind in kinds] for name in labels}
        usual = {name: max(of_name, key=of_name.count) for name, of_name in values.items()}
        settings = list(dict.fromkeys(kind.setting for kind in kinds))
        figure, axes = drawings.subplots(2, 3, figsize=(9, 5), sharey=True)
        for axis, name in zip(axes.flat, labels):
            ticks = sorted({*values[name]})
            for k, setting in enumerate(settings):
                found = {}
                for kind in kinds:
                    changed = [other for other in labels if vars(kind.config)[other] != usual[other]]
                    if kind.setting == setting and changed in ([], [name]):
                        found[ticks.index(vars(kind.config)[name])] = np.array([row["loss"] for row in kind.rows])
                base = np.median(found[ticks.index(usual[name])])
                at = sorted(found)
                x = np.array(at) + 0.08 * (k - 1)  # beside each other
                medians = [np.median(found[place]) / base for place in at]
                low, high = [min(found[place]) / base for place in at], [max(found[place]) / base for place in at]
                color = (drawings.BLUE, drawings.ORANGE, drawings.BLACK)[k % 3]
                axis.plot(x, medians, "o-", color=color, markersize=4, linewidth=1, label=setting)
                axis.vlines(x, low, high, color=color, alpha=0.5)
            axis.plot(ticks.index(usual[name]), 1, "o", color=drawings.GREY, fillstyle="none", markersize=18)
            axis.set_xticks(range(len(ticks)), ["none" if value == 1e9 else f"{value:g}" for value in ticks])
            axis.set_xlabel(labels[name], fontsize=9)
            axis.set_yscale("log")
        for axis in axes[:, 0]:
            axis.set_ylabel("final loss over the usual one's", fontsize=9)
        plots.finish(figure, axes, file)

    return draw

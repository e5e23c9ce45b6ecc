"""Results: what is kept of a run, and how tables are read from what is kept.

What this file teaches: runs that differ in their seed alone are one kind, and a kind is what is compared: by the median
over its seeds, with the range beside it. A run that blows up counts as what it is, a final loss above the first one.
Read next: charts.py.
"""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

import data
import plots
import train
from paper.settings import setting_of

FIGURES = Path(__file__).parent / "figures"
RESULTS = Path(__file__).parent / "results.csv"


def label_of(config):
    """What a table calls a run: its tuner, its rate or σ, and what else of the tuner's own is not the default.

    >>> label_of(train.configure(tuner="linesearch", lr_max=100.0)), label_of(train.configure(sigma=1.5, beta=0.9))
    ('linesearch, lr max 100', 'CDAT σ = 1.5, beta 0.9')
    """
    words, plain = plots.labels([vars(config)]), train.configure(tuner=config.tuner)
    for name in train.options_of(train.PARTS["tuner"][config.tuner]):
        value = vars(config)[name]
        if name != plots.SHOWN.get(config.tuner) and value != vars(plain)[name]:
            words.append(f"{name.replace('_', ' ')} {value}".removesuffix(".0"))
    return ", ".join(words)


def row_of(config):
    """Where the results of a run stand: all that its numbers depend on, which is its name and the number of steps.

    >>> row_of(train.configure(tuner="greedy", steps=100))
    'digits-mlp-gd-greedy-steps100'
    """
    return f"{train.name_of(config)}-steps{config.steps}"


def unseeded(config):
    """The same run with the seed 0."""
    return SimpleNamespace(**vars(config) | {"seed": 0})


def summary(run, target):
    """A run as a row of numbers.

    Rates and products are geometric means: of the first and of the last ten steps, product of the second half.
    grad_norm is the largest; alignment and turn are medians over that half; positive is the share of measured steps
    at which uᵀHu > 0; sharpness_half is that of the middle, reach the first step at which the loss is at target.
    """
    history, seconds = run.history, run.facts["seconds"]
    half, rates, lam = len(history["step"]) // 2, history["learning_rate"], history["sharpness"]
    median = lambda values: np.nanmedian(values[half:]) if np.isfinite(values[half:]).any() else np.nan
    curved = history["curvature"][~np.isnan(history["curvature"])]
    there = np.flatnonzero(history["loss"] <= target)
    reach = there[0] if len(there) else np.inf
    return dict(loss_first=history["loss"][0], loss=plots.final_loss(history), reach=reach,
                reach_seconds=reach * seconds / len(history["step"]),
                rate_first=plots.geometric(rates[:10]), rate=plots.geometric(rates[-10:]),
                sharpness_first=plots.last_measured(lam[::-1]), sharpness_half=plots.last_measured(lam[: half + 1]),
                sharpness=plots.last_measured(lam), product=plots.geometric(plots.products(history)[half:]),
                grad_norm_first=history["grad_norm"][0],
                grad_norm=np.inf if plots.diverged(history) else history["grad_norm"].max(),
                alignment=median(history["alignment"]), turn=median(history["turn"]),
                positive=np.mean(curved > 0) if len(curved) else np.nan,
                test_loss=plots.last_measured(history["test_loss"]),
                test_accuracy=plots.last_measured(history["test_accuracy"]))  # fmt: skip


def read(file):
    """The rows of a file, dicts of numbers by the name of the run; ValueError where it is not what `write` leaves."""
    lines = [*csv.reader(file.read_text().splitlines())] if file.exists() else []
    rows = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            name, *cells = line
            rows[name] = dict(zip(lines[0][1:], map(float, cells), strict=True))
        except ValueError:
            raise ValueError(f"{file}: line {number} is not {len(lines[0]) - 1} numbers after a name") from None
    return rows


def write(file, rows):
    """The inverse of `read`, to four digits, in the order of the names; ValueError where columns differ."""
    if len({tuple(row) for row in rows.values()}) > 1:
        raise ValueError(f"{file}: its columns are not those of new results; move it away to start another")
    lines = [",".join([name, *(f"{value:.4g}" for value in row.values())]) for name, row in sorted(rows.items())]
    header = ",".join(["run", *next(iter(rows.values()), {})])
    data.write(file, lambda stream: stream.write("\n".join([header, *lines, ""]).encode()))


def kept(file, name, measure):
    """The row of that name beside a figure, from measure() where it is not there yet: a dict of numbers.

    A row does not know the code that made it: without its file all is measured anew.
    """
    file = file.with_suffix(".csv")
    rows = read(file)
    if name not in rows:
        new = {name: measure()}
        print(f"{file.name}: {name}", flush=True)
        with data.owned(file.parent):  # no other process may write between the two
            write(file, read(file) | new)
        rows = read(file)  # in its digits, so that the figure is the one that is drawn from them later
    return rows[name]


def rows_of(name, start=""):
    """The committed rows of a question whose names start like that."""
    rows = read(FIGURES / f"{name}.csv")
    return {key: row for key, row in rows.items() if key.startswith(start)}


class Kind(NamedTuple):
    """Runs that differ in their seed alone."""

    setting: str
    config: SimpleNamespace  # see train.configure, of seed 0
    label: str
    rows: list  # of dicts, from `summary` or beside the figure


def median(kind, column):
    """The median of a column over the seeds."""
    return float(np.median([row[column] for row in kind.rows]))


SEARCHED = ("constant", "schedule", "linesearch", "polyak", "hypergradient")


def tuned(kinds, searched=SEARCHED):
    """The kinds less those of a searched tuner that another of its kinds in the same setting beats."""
    best = {}
    for kind in sorted(kinds, key=lambda kind: -median(kind, "loss")):  # the best comes last and stays
        if kind.config.tuner in searched:
            best[kind.setting, kind.config.tuner] = kind
    return [kind for kind in kinds if best.get((kind.setting, kind.config.tuner), kind) is kind]


def kinds_of(configs, rows):
    """The kinds of runs among configs of which there are rows."""
    found = {}
    for config in configs:
        if row_of(config) in rows:
            kind = unseeded(config)
            new = Kind(setting_of(vars(kind)), kind, label_of(kind), [])
            found.setdefault(row_of(kind), new).rows.append(rows[row_of(config)])
    return list(found.values())


def spread(kind, column="loss"):
    """Median and range over the seeds; how many of them blew up, ending above where they began.

    >>> spread(Kind("", None, "", [dict(loss=loss, loss_first=4) for loss in (3.0, 1.0, 9.0)]))
    '3 (1 to 9), 1 of 3 blew up'
    """
    values = sorted(row[column] for row in kind.rows)
    text = f"{np.median(values):.3g} ({values[0]:.3g} to {values[-1]:.3g})".replace("inf", "∞")
    blown_up = sum(not row["loss"] <= row["loss_first"] for row in kind.rows) if column == "loss" else 0
    return text + f", {blown_up} of {len(values)} blew up" * bool(blown_up)


def markdown(columns, rows):
    """A table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows])


def table(kinds):
    """A line for each kind of run; the columns are medians over the seeds of what `summary` keeps."""
    columns = ["setting", "run", "final loss: median (range over seeds)", "rate", "sharpness", "ηλ"]
    numbers = lambda kind: [f"{median(kind, column):.3g}" for column in ("rate", "sharpness", "product")]
    return markdown(columns, [[kind.setting, kind.label, spread(kind), *numbers(kind)] for kind in kinds])


def best_of_each(kinds):
    """By setting, then by tuner (CDAT with each curvature): the kind that ends lowest."""
    best = {}
    for kind in kinds:
        of_setting = best.setdefault(kind.setting, {})
        tuner = kind.config.tuner.replace("cdat", "CDAT")
        if tuner == "CDAT":
            tuner += ", uᵀGu" if kind.config.curvature == "gauss-newton" else ", uᵀHu"
        if tuner not in of_setting or median(kind, "loss") < median(of_setting[tuner], "loss"):
            of_setting[tuner] = kind
    return best


def matrix(kinds, column="loss", ours="feedback"):
    """A line for each setting, a column for each tuner, the tuned setting of each; the lowest median of a line is bold.

    Below it, for each of the others, in how many settings ours ends below and above it.
    """
    best = best_of_each(kinds)
    tuners = list(dict.fromkeys(tuner for of_setting in best.values() for tuner in of_setting))
    lines = []
    for setting, of_setting in best.items():
        lowest = min(median(kind, column) for kind in of_setting.values())
        cell = lambda kind: f"**{spread(kind, column)}**" if median(kind, column) == lowest else spread(kind, column)
        lines.append([setting, *(cell(of_setting[tuner]) if tuner in of_setting else "" for tuner in tuners)])
    counts = []
    for tuner in tuners:
        both = [(median(of[ours], column), median(of[tuner], column)) for of in best.values() if {ours, tuner} <= {*of}]
        won, lost = sum(a < b for a, b in both), sum(a > b for a, b in both)
        counts += [f"{tuner} {won} ({lost})"] if tuner != ours else []
    wins = f"{ours} is below (above) in so many of the settings: {', '.join(counts)}."
    return "\n\n".join([markdown(["setting", *tuners], lines), wins])


def pairs(kinds, name):
    """A line for each setting: the tuned constant rate, then uᵀHu → uᵀGu for each value of an option of CDAT.

    Final losses, medians over the seeds; a number of crosses for that of the seeds which blew up.
    """
    found = {}
    for kind in kinds:
        cells, config = found.setdefault(kind.setting, {}), vars(kind.config)
        key = (config.get(name, 1), config["curvature"]) if "curvature" in config else "constant"  # greedy is σ = 1
        if key != "constant" or key not in cells or median(kind, "loss") < median(cells[key], "loss"):
            cells[key] = kind
    values = sorted({key[0] for cells in found.values() for key in cells if key != "constant"})
    crosses = lambda kind: "×" * sum(not row["loss"] <= row["loss_first"] for row in kind.rows)
    text = lambda kind: f"{median(kind, 'loss'):.3g}{crosses(kind)}" if kind else ""
    lines = []
    for setting, cells in found.items():
        both = [[text(cells.get((value, which))) for which in ("hessian", "gauss-newton")] for value in values]
        lines.append([setting, text(cells.get("constant")), *map(" → ".join, both)])
    return markdown(["setting", "constant, tuned", *(f"{name} {value:g}" for value in values)], lines)

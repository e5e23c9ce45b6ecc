"""Results: what is kept of a run, and how tables and verdicts are read from what is kept.

What this file teaches: runs that differ in their seed alone are one kind, and a kind is what is compared: by the median
over its seeds, with the range beside it. A run that blows up counts as what it is, a final loss above the first one.
Read next: experiments.py, which says which runs and which claims.
"""

import csv
import dataclasses
import re
from typing import NamedTuple

import numpy as np

import plots
import train


def label_of(config):
    """What a table calls a run: its tuner, its rate or σ, and what else of the tuner's own is not the default.

    >>> label_of(train.Config(tuner="polyak", lr_max=100.0)), label_of(train.Config(sigma=1.5, beta=0.9))
    ('polyak, lr max 100', 'CDAT σ = 1.5, beta 0.9')
    """
    shown = ("lr", "sigma") if config.tuner != "hypergradient" else ()
    own = [(name, getattr(config, name)) for name, field in train.FIELDS.items() if config.tuner in field.metadata["of"]
           and name not in shown and getattr(config, name) != field.default]  # fmt: skip
    return ", ".join(plots.labels([vars(config)]) + [f"{name.replace('_', ' ')} {value}".removesuffix(".0") for name, value in own])


def summary(config, history, target):
    """A run as a row of numbers. What varies along it is the median over its second half; reach: the first step at target."""
    half = len(history["step"]) // 2
    median = lambda values: np.nanmedian(values[half:]) if np.isfinite(values[half:]).any() else np.nan
    first = lambda values: next(iter(values[np.isfinite(values) & (values > 0)]), np.nan)
    gain = history["greedy_gain"][np.isfinite(history["greedy_gain"])]
    there = np.flatnonzero(history["loss"] <= target)
    reach = there[0] if len(there) else np.inf
    return dict(loss_first=history["loss"][0], loss=plots.final_loss(history), reach=reach,
                reach_seconds=reach * config["seconds"] / len(history["step"]),
                rate_first=first(history["learning_rate"]), rate=history["learning_rate"][-1],
                sharpness_first=first(history["sharpness"]), sharpness=train.last_measured(history["sharpness"]),
                product=median(history["learning_rate"] * history["sharpness"]),
                alignment=median(history["alignment"]), turn=median(history["turn"]),
                gain=np.mean(gain > 0) if len(gain) else np.nan,
                test_loss=train.last_measured(history["test_loss"]),
                test_accuracy=train.last_measured(history["test_accuracy"]))  # fmt: skip


def read(file):
    """The rows of a file, dicts of numbers by the name of the run."""
    rows = csv.DictReader(file.open()) if file.exists() else []
    return {row.pop("run"): {key: float(value) for key, value in row.items()} for row in rows}


def write(file, rows):
    """The inverse of `read`, to four digits, in the order of the names."""
    lines = [",".join([name, *(f"{value:.4g}" for value in row.values())]) for name, row in sorted(rows.items())]
    header = ",".join(["run", *next(iter(rows.values()), {})])
    file.write_text("\n".join([header, *lines]) + "\n")


class Kind(NamedTuple):
    """Runs that differ in their seed alone."""

    setting: str
    config: train.Config  # of the first seed
    label: str
    rows: list  # of dicts, from `summary`

    def median(self, column):
        return float(np.median([row[column] for row in self.rows]))

    def blown_up(self):
        return sum(not row["loss"] <= row["loss_first"] for row in self.rows)


def kinds(configs, rows):
    """The kinds of runs among configs of which there are rows."""
    found = {}
    for config in configs:
        if train.name_of(config) in rows:
            found.setdefault(dataclasses.replace(config, seed=0), []).append(rows[train.name_of(config)])
    return [Kind(plots.setting_of(vars(config)), config, label_of(config), rows) for config, rows in found.items()]


def spread(kind, column="loss"):
    """Median and range over the seeds; how many of them blew up, ending above where they began.

    >>> spread(Kind("", train.Config(), "", [dict(loss=loss, loss_first=4) for loss in (3.0, 1.0, 9.0)]))
    '3 (1 to 9), 1 of 3 blew up'
    """
    values = sorted(row[column] for row in kind.rows)
    text = f"{np.median(values):.3g} ({values[0]:.3g} to {values[-1]:.3g})".replace("inf", "∞")
    return text + f", {kind.blown_up()} of {len(values)} blew up" * bool(column == "loss" and kind.blown_up())


def markdown(columns, rows):
    """A table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows])


def table(kinds):
    """A line for each kind of run: loss is the mean of the last 5 steps; the rest as in `summary`."""
    columns = ["setting", "run", "final loss: median (range over seeds)", "rate", "sharpness", "ηλ"]
    return markdown(columns, [[kind.setting, kind.label, spread(kind), *(f"{kind.median(column):.3g}" for column in
                               ("rate", "sharpness", "product"))] for kind in kinds])  # fmt: skip


def matrix(kinds, column="loss", ours="feedback"):
    """A line for each setting, a column for each tuner, the tuned setting of each; the lowest median of a line is bold.

    Below it, for each of the others, in how many settings ours ends below and above it.
    """
    best = {}
    for kind in kinds:
        of_setting = best.setdefault(kind.setting, {})
        tuner = kind.label.split(",")[0] if kind.config.tuner == "cdat" else kind.config.tuner
        if tuner not in of_setting or kind.median("loss") < of_setting[tuner].median("loss"):
            of_setting[tuner] = kind
    tuners = list(dict.fromkeys(tuner for of_setting in best.values() for tuner in of_setting))
    lines = []
    for setting, of_setting in best.items():
        lowest = min(kind.median(column) for kind in of_setting.values())
        cell = lambda kind: f"**{spread(kind, column)}**" if kind.median(column) == lowest else spread(kind, column)
        lines.append([setting, *(cell(of_setting[tuner]) if tuner in of_setting else "" for tuner in tuners)])
    counts = []
    for tuner in tuners:
        both = [(of[ours].median(column), of[tuner].median(column)) for of in best.values() if {ours, tuner} <= {*of}]
        won, lost = sum(a < b for a, b in both), sum(a > b for a, b in both)
        counts += [f"{tuner} {won} : {lost}"] if tuner != ours else []
    return markdown(["setting", *tuners], lines) + f"\n\n{ours} ends below : above " + ", ".join(counts) + "."


def by_setting(kinds, label, column="loss", best=min):
    """By setting: the best over kinds of run, whose label starts with those words, of the median over the seeds."""
    found = {}
    for kind in kinds:
        if re.match(rf"{re.escape(label)}(?![\w.])", kind.label):
            found.setdefault(kind.setting, []).append(kind.median(column))
    return {setting: best(values) for setting, values in found.items()}


def below(kinds, label, other, factor=1.0, column="loss"):
    """Where one kind of run ends below factor × another: (setting, measured, whether)."""
    first, second = by_setting(kinds, label, column), by_setting(kinds, other, column)
    return [(setting, f"{first[setting]:.3g} against {second[setting]:.3g}", first[setting] < factor * second[setting])
            for setting in first if setting in second]  # fmt: skip


def within(kinds, label, column, low, high):
    """Where a column lies in a range."""
    values = by_setting(kinds, label, column, best=np.median)
    return [(setting, f"{value:.3g}", low <= value <= high) for setting, value in values.items()]


def ratio(kinds, label, column, low, high):
    """Where a column has changed along the run by a factor in a range."""
    last, first = by_setting(kinds, label, column, np.median), by_setting(kinds, label, column + "_first", np.median)
    factors = {setting: last[setting] / first[setting] for setting in last}
    return [(setting, f"× {factor:.2g}", low <= factor <= high) for setting, factor in factors.items()]


def falls(values):
    """Whether a list in the order of batch sizes falls with the batch size.

    >>> falls([1, 2, 2]), falls([2, 2, 2])
    (True, False)
    """
    return values == sorted(values) and values[0] < values[-1]

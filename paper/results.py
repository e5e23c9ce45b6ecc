"""Results: what is kept of a run, how tables are read from what is kept, and the verdict on each claim of the paper.

What this file teaches: runs that differ in their seed alone are one kind, and a kind is what is compared: by the median
over its seeds, with the range beside it. A run that blows up counts as what it is, a final loss above the first one.
A claim is measured where it can be, setting by setting, and holds in all of them, in some, or in none.

Read next: drawings.py.
"""

import csv
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

import data
import plots
import train
from paper import theory

FIGURES = Path(__file__).parent / "figures"


def label_of(config):
    """What a table calls a run: its tuner, its rate or σ, and what else of the tuner's own is not the default.

    >>> label_of(train.configure(tuner="polyak", lr_max=100.0)), label_of(train.configure(sigma=1.5, beta=0.9))
    ('polyak, lr max 100', 'CDAT σ = 1.5, beta 0.9')
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

    product, alignment and turn are medians over its second half, rate and sharpness the last values, gain the share of
    measured steps at which it is positive, reach the first step at which the loss is at target.
    """
    history, seconds = run.history, run.facts["seconds"]
    half = len(history["step"]) // 2
    median = lambda values: np.nanmedian(values[half:]) if np.isfinite(values[half:]).any() else np.nan
    first = lambda values: next(iter(values[np.isfinite(values) & (values > 0)]), np.nan)
    gain = history["greedy_gain"][np.isfinite(history["greedy_gain"])]
    there = np.flatnonzero(history["loss"] <= target)
    reach = there[0] if len(there) else np.inf
    return dict(loss_first=history["loss"][0], loss=plots.final_loss(history), reach=reach,
                reach_seconds=reach * seconds / len(history["step"]),
                rate_first=first(history["learning_rate"]), rate=history["learning_rate"][-1],
                sharpness_first=first(history["sharpness"]), sharpness=plots.last_measured(history["sharpness"]),
                product=median(history["learning_rate"] * history["sharpness"]),
                alignment=median(history["alignment"]), turn=median(history["turn"]),
                gain=np.mean(gain > 0) if len(gain) else np.nan,
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


class Kind(NamedTuple):
    """Runs that differ in their seed alone."""

    setting: str
    config: SimpleNamespace  # see train.configure, of seed 0
    label: str
    rows: list  # of dicts, from `summary`


def median(kind, column):
    """The median of a column over the seeds."""
    return float(np.median([row[column] for row in kind.rows]))


def kinds_of(configs, rows):
    """The kinds of runs among configs of which there are rows."""
    found = {}
    for config in configs:
        if row_of(config) in rows:
            kind = unseeded(config)
            new = Kind(plots.setting_of(vars(kind)), kind, label_of(kind), [])
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


def matrix(kinds, column="loss", ours="feedback"):
    """A line for each setting, a column for each tuner, the tuned setting of each; the lowest median of a line is bold.

    Below it, for each of the others, in how many settings ours ends below and above it.
    """
    best = {}
    for kind in kinds:
        of_setting = best.setdefault(kind.setting, {})
        tuner = kind.label.split(",")[0] if kind.config.tuner == "cdat" else kind.config.tuner
        if tuner not in of_setting or median(kind, "loss") < median(of_setting[tuner], "loss"):
            of_setting[tuner] = kind
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


# --------------------------------------------------------------------------------------------------------- claims

# What measures a claim takes kinds of runs and returns triples: a setting, the numbers in words, whether it holds.


def by_setting(kinds, label, column="loss", best=min):
    """By setting: the best over kinds of run, whose label starts with those words, of the median over the seeds."""
    found = {}
    for kind in kinds:
        if re.match(rf"{re.escape(label)}(?![\w.])", kind.label):
            found.setdefault(kind.setting, []).append(median(kind, column))
    return {setting: best(values) for setting, values in found.items()}


def below(kinds, label, other, factor=1.0):
    """Where one kind of run ends below factor × another."""
    first, second = by_setting(kinds, label), by_setting(kinds, other)
    return [(setting, f"{first[setting]:.3g} / {second[setting]:.3g}", first[setting] < factor * second[setting])
            for setting in first if setting in second]  # fmt: skip


def within(kinds, label, column, low, high):
    """Where a column lies in a range."""
    values = by_setting(kinds, label, column, np.median)
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


def best_sigmas(kinds):
    """Figure 7: the best σ of each batch size, for each β; whether it falls as the batch shrinks."""
    best = {}  # by β, then by batch size
    for kind in sorted(kinds, key=lambda kind: -median(kind, "loss")):  # the best comes last and stays
        best.setdefault(kind.config.beta, {})[kind.config.batch_size or np.inf] = kind.config.sigma
    found = []
    for beta, sigmas in sorted(best.items()):
        sigmas = dict(sorted(sigmas.items()))
        words = ", ".join(f"batch {size:g}: {sigma:g}" for size, sigma in sigmas.items())
        found.append((f"β = {beta:g}", words, falls([*sigmas.values()])))
    return found


def gains(kinds, word, grows=True):
    """Figure 18: the tuned constant rate's loss over that of CDAT σ = 2, by the values of what varies."""
    varied = ("samples", "width", "depth", "weight_decay")
    settings = [{name: vars(kind.config)[name] for name in varied} for kind in kinds]
    values = {name: [setting[name] for setting in settings] for name in varied}
    usual = {name: max(of_name, key=of_name.count) for name, of_name in values.items() if of_name}
    ratios = {}
    for value in sorted({setting[word] for setting in settings}):
        wanted = usual | {word: value}  # alike but for the tuner
        alike = [kind for kind, setting in zip(kinds, settings) if setting == wanted]
        constant, cdat = by_setting(alike, "constant"), by_setting(alike, "CDAT σ = 2")
        ratios |= {value: constant[setting] / cdat[setting] for setting in constant if setting in cdat}
    ordered = [*ratios.values()] == sorted(ratios.values(), reverse=not grows)
    text = ", ".join(f"{value:g}: × {ratio:.2g}" for value, ratio in ratios.items())
    return [(word.replace("_", " "), text, ordered)] if ratios else []


def model_of_figure_4(_):
    """Whether λ runs away in the model (6)."""
    lam = theory.below_edge(steps=1000).sharpness
    return [("model", f"λ from {lam[0]:.3g} to {lam[-1]:.3g} in 1000 steps", bool(lam[-1] > 10 * lam[0]))]


def model_of_figure_9(_):
    """Whether σ = 2 holds λ and y in the model (9), (10)."""
    on_edge, below = (theory.cdat_model(sigma) for sigma in (2, 1.9))
    ends, y = [float(path.sharpness[-1]) for path in (on_edge, below)], float(on_edge.y[-1])
    held = f"λ from 18 to {ends[0]:.3g} (σ = 2) and {ends[1]:.3g} (σ = 1.9) in 4000 steps"
    return [("model", held, ends[0] < 1.05 * 18),
            ("model", f"y ends at {y:.4f} (σ = 2)", abs(y) < 0.05)]  # fmt: skip


def logged_cost(_, tuner, low, high):
    """From figures/cost.txt: the time of a tuner's step in constant-rate steps."""
    text = (FIGURES / "cost.txt").read_text()
    rows = re.findall(rf"^\| (\w+) \| {tuner} \| [\d.]+ \| ([\d.]+) \|", text, re.MULTILINE)
    return [(family, f"× {time}", low <= float(time) <= high) for family, time in rows]


def verdicts(claims, kinds):
    """The verdicts on claims, pairs of a claim and the experiments it is measured on, in Markdown.

    kinds(name) lists the kinds of runs of an experiment. The claims come in the order of the paper's figures.
    """
    lines = []
    for claim, experiments in sorted(claims, key=lambda pair: int(pair[0].figure) if pair[0].figure.isdigit() else 99):
        found = claim.measure([kind for name in experiments for kind in kinds(name)], *claim.arguments)
        held = sum(holds for *_, holds in found)
        partly = f"holds partly ({held} of {len(found)})" if held else "does not hold"
        verdict = "holds" if held == len(found) else partly
        settings = [setting for setting, *_ in found]
        short = [setting.split(",")[0] for setting in settings]
        settings = short if len({*short}) == len(short) else settings
        measured = "; ".join(f"{setting}: {text}" for setting, (_, text, _) in zip(settings, found))
        if claim.measure is below:
            measured = f"{claim.arguments[0]} / {claim.arguments[1]} in {measured}"
        lines.append([claim.figure, claim.text, measured, verdict if found else "not run"])
    return markdown(["figure", "claim", "measured: median over the seeds", "verdict"], lines)

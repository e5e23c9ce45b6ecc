"""The claims: what measures each, and the table of verdicts.

What this file teaches: a claim is measured where it can be, setting by setting, and a verdict says on whose setting.
The paper's own come first, scaled down; then all others; then the paper's with the Gauss-Newton curvature.

What measures a claim takes kinds of runs and returns triples: a setting, the numbers in words, whether it holds. A
label is the beginning of a kind's, or a tuple of such. Of the tuners in results.SEARCHED it is given the best kind
alone. Read next: results.py.
"""

import re

import numpy as np

import plots
from paper import results, theory


def called(kind, label):
    """Whether a kind is of that label; "CDAT σ = 2" is not the beginning of "CDAT σ = 2.5"."""
    labels = (label,) if isinstance(label, str) else label
    return any(re.match(rf"{re.escape(label)}(?![\w.])", kind.label) for label in labels)


def by_setting(kinds, label, column="loss", best=min):
    """By setting: the best over kinds of that label of the median over the seeds."""
    found = {}
    for kind in kinds:
        if called(kind, label):
            found.setdefault(kind.setting, []).append(results.median(kind, column))
    return {setting: best(values) for setting, values in found.items()}


def below(kinds, label, other, factor=1.0):
    """Where one kind of run ends below factor × another."""
    first, second = by_setting(kinds, label), by_setting(kinds, other)
    return [(setting, f"{first[setting]:.3g} / {second[setting]:.3g}", first[setting] < factor * second[setting])
            for setting in first if setting in second]  # fmt: skip


def within(kinds, label, column, low, high):
    """Where a column lies in a range."""
    values = by_setting(kinds, label, column, np.median)
    return [(setting, f"{value:.3g}", low <= value <= high) for setting, value in values.items() if value == value]


def at_edge(kinds, label, low, high):
    """Where ηλ, over the edge of the optimizer, lies in a range."""
    edges = {kind.setting: plots.edge(vars(kind.config)) for kind in kinds}
    values = by_setting(kinds, label, "product", np.median)
    return [(setting, f"{value:.3g} ({edges[setting]:g})", low <= value / edges[setting] <= high)
            for setting, value in values.items() if value == value]  # fmt: skip


def always(kinds, label, column):
    """Where a share is 1 for each seed; the number is the least."""
    least = {}
    for kind in kinds:
        if called(kind, label):
            shares = [row[column] for row in kind.rows if np.isfinite(row[column])]
            least[kind.setting] = min([*shares, least.get(kind.setting, 1.0)])
    return [(setting, f"{value:.3g}", value == 1) for setting, value in least.items()]


def ratio(kinds, label, column, low, high, since="first"):
    """Where a column has changed by a factor in a range, since the start or since half the run."""
    last, first = (by_setting(kinds, label, name, np.median) for name in (column, f"{column}_{since}"))
    factors = {setting: last[setting] / first[setting] for setting in last}
    return [(setting, f"× {factor:.2g}", low <= factor <= high) for setting, factor in factors.items()
            if factor == factor]  # fmt: skip


def alike(kinds, label, other, column, factor):
    """Where a column of two kinds of run differs by at most a factor."""
    first, second = by_setting(kinds, label, column), by_setting(kinds, other, column)
    both = [(setting, first[setting], second[setting]) for setting in first if setting in second]
    return [(setting, f"{a:.3g} / {b:.3g}", 1 / factor <= a / b <= factor) for setting, a, b in both if a == a]


def less_above_edge(kinds, label, other):
    """Where ηλ is below the edge, or at least below that of the other kind."""
    edges = {kind.setting: plots.edge(vars(kind.config)) for kind in kinds}
    first, second = by_setting(kinds, label, "product", max), by_setting(kinds, other, "product", max)
    return [(setting, f"{a:.3g} / {second[setting]:.3g}", a <= max(edges[setting], second[setting]))
            for setting, a in first.items() if a == a and setting in second]  # fmt: skip


def survives(kinds, label):
    """Where no seed ends above the loss it began with."""
    lost = {}
    for kind in kinds:
        if called(kind, label):
            lost.setdefault(kind.setting, []).extend(not row["loss"] <= row["loss_first"] for row in kind.rows)
    return [(setting, f"{sum(of)} of {len(of)} blew up", not any(of)) for setting, of in lost.items()]


def averages_help(kinds, label):
    """Where the best kind of that label with moving averages ends below the best without."""
    plain = by_setting([kind for kind in kinds if vars(kind.config).get("beta") == 0], label)
    averaged = by_setting([kind for kind in kinds if vars(kind.config).get("beta")], label)
    return [(setting, f"{averaged[setting]:.3g} / {plain[setting]:.3g}", averaged[setting] < plain[setting])
            for setting in plain if setting in averaged]  # fmt: skip


def falls(values):
    """Whether a list in the order of batch sizes falls with the batch size.

    >>> falls([1, 2, 2]), falls([2, 2, 2])
    (True, False)
    """
    return values == sorted(values) and values[0] < values[-1]


def best_sigmas(kinds):
    """Figure 7: the best σ of each batch size, over all β, in each setting; whether it falls as the batch shrinks."""
    best = {}  # by setting, then by batch size
    for kind in sorted(kinds, key=lambda kind: -results.median(kind, "loss")):  # the best comes last and stays
        of_setting = best.setdefault(plots.setting_of(vars(kind.config) | {"batch_size": 0}), {})
        of_setting[kind.config.batch_size or np.inf] = kind.config
    found = []
    for setting, configs in best.items():
        configs = dict(sorted(configs.items()))
        words = [f"{size:g}: {config.sigma:g}" + f" (β {config.beta:g})" * bool(config.beta)
                 for size, config in configs.items()]  # fmt: skip
        text = "batch " + ", ".join(words).replace("inf", "all")
        found.append((setting, text, falls([config.sigma for config in configs.values()])))
    return found


def sweep(kinds, word):
    """Figure 18: the kinds by the values of what varies, all else as usual."""
    varied = ("samples", "width", "depth", "weight_decay")
    settings = [{name: vars(kind.config)[name] for name in varied} for kind in kinds]
    values = {name: [setting[name] for setting in settings] for name in varied}
    usual = {name: max(of_name, key=of_name.count) for name, of_name in values.items() if of_name}
    return {value: [kind for kind, setting in zip(kinds, settings) if setting == usual | {word: value}]
            for value in sorted({setting[word] for setting in settings})}  # fmt: skip


def gains(kinds, word, grows=True):
    """Figure 18: the loss of σ = 1 over that of σ = 2, by the values of what varies."""
    ratios = {}
    for value, alike in sweep(kinds, word).items():
        greedy, cdat = by_setting(alike, "greedy"), by_setting(alike, "CDAT σ = 2")
        ratios |= {value: greedy[setting] / cdat[setting] for setting in greedy if setting in cdat}
    ordered = [*ratios.values()] == sorted(ratios.values(), reverse=not grows)
    text = ", ".join(f"{value:g}: × {ratio:.2g}" for value, ratio in ratios.items())
    return [(word.replace("_", " "), text, ordered)] if ratios else []


def best_sigma_by(kinds, word, shifts):
    """Figure 18: the best σ by the values of what varies; whether it falls along them, or else stays."""
    best = {}
    for value, alike in sweep(kinds, word).items():
        best |= {value: min((results.median(kind, "loss"), vars(kind.config).get("sigma", 1.0)) for kind in alike)[1]}
    sigmas = [*best.values()]
    holds = falls(sigmas[::-1]) if best and shifts else len({*sigmas}) == 1
    return [(word, ", ".join(f"{value:g}: {sigma:g}" for value, sigma in best.items()), holds)] if best else []


def rate_above(kinds, label, other):
    """Where the rate ends above that of the other kind."""
    first, second = by_setting(kinds, label, "rate", max), by_setting(kinds, other, "rate", max)
    return [(setting, f"{a:.2g} / {second[setting]:.2g}", a > second[setting]) for setting, a in first.items()
            if a == a and setting in second]  # fmt: skip


def model_of_figure_4(_):
    """Whether λ runs away in the model (6)."""
    lam = theory.below_edge(steps=1000).sharpness
    return [("model", f"λ from {lam[0]:.3g} to {lam[-1]:.3g} in 1000 steps", bool(lam[-1] > 10 * lam[0]))]


def model_of_figure_9(_):
    """Whether σ = 2 holds λ and y in the model (9), (10)."""
    on_edge, below = (theory.cdat_model(sigma) for sigma in (2, 1.9))
    ends, y = [float(path.sharpness[-1]) for path in (on_edge, below)], float(on_edge.y[-1])
    held = f"λ from 18 to {ends[0]:.3g} (σ = 2) and {ends[1]:.3g} (σ = 1.9) in 4000 steps"
    return [("λ", held, ends[0] < 1.05 * 18),
            ("y", f"ends at {y:.4f} (σ = 2)", abs(y) < 0.05)]  # fmt: skip


def model_above_2(_):
    """Whether each σ > 2 drives λ below 0 in the model (9), (10), which no sharpness of a loss at a minimum is."""
    steps = {sigma: np.argmax(np.asarray(theory.cdat_model(sigma).sharpness) < 0) for sigma in (2.0625, 2.1, 2.5)}
    return [(f"σ = {sigma:g}", f"λ < 0 at step {step}", step > 0) for sigma, step in steps.items()]


def logged_cost(_, tuner, low, high):
    """From figures/cost.txt: the time of a tuner's step in constant-rate steps."""
    text = (results.FIGURES / "cost.txt").read_text()
    rows = re.findall(rf"^\| (\w+) \| {tuner} \| [\d.]+ \| ([\d.]+) \|", text, re.MULTILINE)
    return [(family, f"× {time}", low <= float(time) <= high) for family, time in rows]


def cell(claim, kinds):
    """What a claim comes to on some kinds of runs: the verdict, and what was measured."""
    found = claim.measure(results.tuned(kinds), *claim.arguments)
    held = sum(holds for *_, holds in found)
    verdict = "holds" if held == len(found) else f"{held} of {len(found)}" if held else "fails"
    settings = [setting for setting, *_ in found]
    short = [setting.split(",")[0] for setting in settings]
    settings = short if len({*short}) == len(short) else settings
    measured = "; ".join(f"{setting} {text}" for setting, (_, text, _) in zip(settings, found))
    return f"**{verdict}**: {measured}" if found else ""


def verdicts(claims, kinds, homes):
    """The verdicts on claims, pairs of a claim and the experiments it is measured on, in Markdown.

    kinds(name) lists the kinds of runs of an experiment, homes(name) what a setting of the paper is called in them. The
    claims come in the order of the paper's figures.
    """
    lines = []
    for claim, experiments in sorted(claims, key=lambda pair: int(re.match(r"\d+|", pair[0].figure)[0] or 99)):
        among = {results.row_of(kind.config): kind for name in experiments for kind in kinds(name)}
        groups = {"own": [], "elsewhere": [], "variant": []}
        for kind in among.values():
            config, home = vars(kind.config), plots.setting_of(vars(kind.config) | {"batch_size": 0})
            if all(config.get(name, value) == value for name, value in claim.only.items()):
                if config.get("curvature") != "gauss-newton":
                    groups["own" if home in homes(claim.own) else "elsewhere"].append(kind)
                if home in homes(claim.own) and config.get("curvature") != "hessian":
                    groups["variant"].append(kind)
        cells = [cell(claim, groups["own"])]
        if among:  # else it is measured on no run
            of_curvature = "CDAT" in str(claim.arguments) or "greedy" in str(claim.arguments)
            cells += [cell(claim, groups["elsewhere"]), cell(claim, groups["variant"]) if of_curvature else ""]
        lines.append([claim.figure, claim.text, *(text or "–" for text in [*cells, "", ""][:3])])
    return results.markdown(["figure", "claim", "the paper's setting", "elsewhere", "there with uᵀGu"], lines)

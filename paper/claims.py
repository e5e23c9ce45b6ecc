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
from paper import results, settings, theory
from paper.settings import setting_of

ASKED = "asked"  # in place of a figure's number: a question that is not the paper's


def called(kind, label):
    """Whether a kind is of that label; "CDAT σ = 2" is not the beginning of "CDAT σ = 2.5"."""
    labels = (label,) if isinstance(label, str) else label
    return any(re.match(rf"{re.escape(label)}(?![\w.])", kind.label) for label in labels)


def best(kinds, label):
    """By setting: of the kinds of that label the one that ends lowest."""
    found = {}
    for kind in sorted(kinds, key=lambda kind: -results.median(kind, "loss")):  # the best comes last and stays
        if called(kind, label):
            found[kind.setting] = kind
    return {kind.setting: found[kind.setting] for kind in kinds if kind.setting in found}  # in the order of the runs


def by_setting(kinds, label, column="loss"):
    """By setting: a column of the best kind of that label, the median over the seeds, where it was measured at all.

    It is nan, and no claim holds, where it was not measured for some seed, which ended before.
    """
    return {setting: results.median(kind, column) for setting, kind in best(kinds, label).items()
            if not np.isnan([row[column] for row in kind.rows]).all()}  # fmt: skip


def both(kinds, label, other, column="loss"):
    """(setting, the column of one kind, that of the other), where there are both."""
    first, second = by_setting(kinds, label, column), by_setting(kinds, other, column)
    return [(setting, first[setting], second[setting]) for setting in first if setting in second]


def below(kinds, label, other, factor=1.0):
    """Where one kind of run ends below factor × another."""
    return [(setting, f"{a:.3g} / {b:.3g}", a < factor * b) for setting, a, b in both(kinds, label, other)]


def within(kinds, label, column, low, high):
    """Where a column lies in a range."""
    return [(setting, f"{value:.3g}", low <= value <= high)
            for setting, value in by_setting(kinds, label, column).items()]  # fmt: skip


def at_edge(kinds, label, low, high):
    """Where ηλ, over the edge of the optimizer, lies in a range."""
    edges = {kind.setting: plots.edge(vars(kind.config)) for kind in kinds}
    return [(setting, f"{value:.3g} ({edges[setting]:g})", low <= value / edges[setting] <= high)
            for setting, value in by_setting(kinds, label, "product").items()]  # fmt: skip


def always(kinds, label, column):
    """Where a share is 1 for each seed; the number is the least."""
    found = []
    for setting, kind in best(kinds, label).items():
        shares = [row[column] for row in kind.rows if np.isfinite(row[column])]
        found += [(setting, f"{min(shares):.3g}", min(shares) == 1)] if shares else []
    return found


def ratio(kinds, label, column, low, high, since="first"):
    """Where a column has changed by a factor in a range, since the start or since half the run."""
    last, first = by_setting(kinds, label, column), by_setting(kinds, label, f"{column}_{since}")
    factors = {setting: last[setting] / first[setting] for setting in last if setting in first}
    return [(setting, f"× {factor:.2g}", low <= factor <= high) for setting, factor in factors.items()]


def alike(kinds, label, other, column, factor):
    """Where a column of two kinds of run differs by at most a factor."""
    return [(setting, f"{a:.3g} / {b:.3g}", 1 / factor <= a / b <= factor)
            for setting, a, b in both(kinds, label, other, column)]  # fmt: skip


def less_above_edge(kinds, label, other):
    """Where ηλ is below the edge, or at most half as far above it as that of the other kind."""
    edges = {kind.setting: plots.edge(vars(kind.config)) for kind in kinds}
    return [(setting, f"{a:.3g} / {b:.3g}", a <= edges[setting] + max(b - edges[setting], 0) / 2)
            for setting, a, b in both(kinds, label, other, "product")]  # fmt: skip


def rate_above(kinds, label, other):
    """Where the rate ends above that of the other kind."""
    return [(setting, f"{a:.2g} / {b:.2g}", a > b) for setting, a, b in both(kinds, label, other, "rate")]


def survives(kinds, label):
    """Where no seed ends above the loss it began with."""
    lost = {setting: [not row["loss"] <= row["loss_first"] for row in kind.rows]
            for setting, kind in best(kinds, label).items()}  # fmt: skip
    return [(setting, f"{sum(of)} of {len(of)} blew up", not any(of)) for setting, of in lost.items()]


def averages_help(kinds, label):
    """Where the best kind of that label with moving averages ends below the best without."""
    plain = by_setting([kind for kind in kinds if vars(kind.config).get("beta") == 0], label)
    averaged = by_setting([kind for kind in kinds if vars(kind.config).get("beta")], label)
    return [(setting, f"{averaged[setting]:.3g} / {plain[setting]:.3g}", averaged[setting] < plain[setting])
            for setting in plain if setting in averaged]  # fmt: skip


def falls(values):
    """Whether a list in the order of growing batches is smaller for smaller ones.

    >>> falls([1, 2, 2]), falls([2, 2, 2])
    (True, False)
    """
    return values == sorted(values) and values[0] < values[-1]


def best_sigmas(kinds):
    """Figure 7: the best σ of each batch size, over all β, in each setting; whether it falls as the batch shrinks."""
    found = {}  # by setting, then by batch size
    for kind in sorted(kinds, key=lambda kind: -results.median(kind, "loss")):  # the best comes last and stays
        of_setting = found.setdefault(setting_of(vars(kind.config) | {"batch_size": 0}), {})
        of_setting[kind.config.batch_size or np.inf] = kind.config
    verdicts = []
    for setting, configs in found.items():
        configs = dict(sorted(configs.items()))
        words = [f"{size:g}: {config.sigma:g}" + f" (β {config.beta:g})" * bool(config.beta)
                 for size, config in configs.items()]  # fmt: skip
        text = "batch " + ", ".join(words).replace("inf", "all")
        verdicts.append((setting, text, falls([config.sigma for config in configs.values()])))
    return verdicts


def more_on_large(kinds, label, other):
    """Figure 20: the loss of one kind over that of another, by batch size; whether it falls as the batch grows."""
    found = {}  # by what is trained: the ratios by batch size
    sizes = {kind.setting: kind.config.batch_size for kind in kinds}
    for setting, a, b in both(kinds, label, other):
        found.setdefault(setting.rsplit(", batch", 1)[0], {})[sizes[setting]] = a / b
    return [(trained, ", ".join(f"batch {size}: × {ratios[size]:.2g}" for size in sorted(ratios)),
             falls([-ratios[size] for size in sorted(ratios)])) for trained, ratios in found.items()]  # fmt: skip


def sweep(kinds, word):
    """Figure 18: the kinds by the values of what varies, all else as usual."""
    varied = ("samples", "width", "depth", "weight_decay")
    trained = [{name: vars(kind.config)[name] for name in varied} for kind in kinds]
    values = {name: [of_kind[name] for of_kind in trained] for name in varied}
    usual = {name: max(of_name, key=of_name.count) for name, of_name in values.items() if of_name}
    return {value: [kind for kind, of_kind in zip(kinds, trained) if of_kind == usual | {word: value}]
            for value in sorted({of_kind[word] for of_kind in trained})}  # fmt: skip


def gains(kinds, word, grows=True):
    """Figure 18: the loss of σ = 1 over that of σ = 2, by the values of what varies."""
    ratios = {value: a / b for value, same in sweep(kinds, word).items()
              for _, a, b in both(same, "greedy", "CDAT σ = 2")}  # fmt: skip
    ordered = [*ratios.values()] == sorted(ratios.values(), reverse=not grows)
    text = ", ".join(f"{value:g}: × {ratio:.2g}" for value, ratio in ratios.items())
    return [(word.replace("_", " "), text, ordered)] if len(ratios) > 1 else []


def best_sigma_by(kinds, word, shifts):
    """Figure 18: the best σ by the values of what varies: falls to slightly below 2 (ours: 1.9 to 2), or else stays."""
    sigmas = {}
    for value, same in sweep(kinds, word).items():
        (kind,) = best(same, ("greedy", "CDAT")).values()
        sigmas[value] = vars(kind.config).get("sigma", 1.0)
    values = [*sigmas.values()]
    if len(values) < 2:
        return []
    holds = falls(values[::-1]) and 1.9 <= values[-1] < 2 if shifts else len({*values}) == 1
    return [(word, ", ".join(f"{value:g}: {sigma:g}" for value, sigma in sigmas.items()), holds)]


def model_of_figure_4(_):
    """Whether λ runs away in the model (6)."""
    lam = theory.below_edge(steps=1000).sharpness
    return [("model", f"λ from {lam[0]:.3g} to {lam[-1]:.3g} in 1000 steps", bool(lam[-1] > 10 * lam[0]))]


def model_of_figure_9(_):
    """Whether σ = 2 holds y and σ = 1.9 lets λ grow slowly in the model (9), (10)."""
    y, lam = float(theory.cdat_model(2).y[-1]), theory.cdat_model(1.9).sharpness
    grows = f"λ from {lam[0]:.3g} to {lam[-1]:.3g} in 4000 steps"
    return [("σ = 2", f"y ends at {y:.4f}", abs(y) < 0.05), ("σ = 1.9", grows, bool(lam[0] < lam[-1] < 2 * lam[0]))]


def model_above_2(_):
    """Whether each σ > 2 drives λ below 0 in the model (9), (10), which no sharpness of a loss at a minimum is."""
    steps = {sigma: np.argmax(np.asarray(theory.cdat_model(sigma).sharpness) < 0) for sigma in (2.0625, 2.1, 2.5)}
    return [(f"σ = {sigma:g}", f"λ < 0 at step {step}", step > 0) for sigma, step in steps.items()]


def logged_cost(_, what, low, high, column=1):
    """A column of figures/cost.txt: of a tuner's step in constant-rate steps, or of a part of it in forward passes."""
    text = (results.FIGURES / "cost.txt").read_text()
    rows = re.findall(rf"^\| (\w+) \| {what} \|{' [0-9.]+ [|]' * column} ([0-9.]+) \|", text, re.MULTILINE)
    return [(family, f"× {cost}", low <= float(cost) <= high) for family, cost in rows]


def cell(claim, kinds):
    """What a claim comes to on some kinds of runs: the verdict, and what was measured."""
    found = [(setting, text, holds != setting.startswith(claim.but))
             for setting, text, holds in claim.measure(results.tuned(kinds), *claim.arguments)]  # fmt: skip
    held = sum(holds for *_, holds in found)
    verdict = "holds" if held == len(found) else f"{held} of {len(found)}" if held else "fails"
    names = [setting for setting, *_ in found]
    short = [name.split(",")[0] for name in names]
    names = short if len({*short}) == len(short) else names
    measured = "; ".join(f"{name} {text}" for name, (_, text, _) in zip(names, found))
    return f"**{verdict}**: {measured}" if found else "–"


def order(claim):
    """Where a claim stands in the table: by the number of its figure, others last."""
    number = claim.figure.split(",")[0]
    return int(number) if number.isdigit() else 99


def verdicts(experiments, kinds):
    """The verdicts on the claims of experiments, in Markdown; kinds(name) lists the kinds of runs of one."""
    claims = [(claim, (claim.on or name).split()) for name, its in experiments.items() for claim in its.claims]
    found = {name: kinds(name) for name in dict.fromkeys(name for _, names in claims for name in names)}
    lines = []
    for claim, names in sorted(claims, key=lambda pair: order(pair[0])):
        own, elsewhere, variant = [], [], []
        homes = settings.homes(claim.own)
        for kind in {results.row_of(kind.config): kind for name in names for kind in found[name]}.values():
            config, home = vars(kind.config), setting_of(vars(kind.config) | {"batch_size": 0})
            if any(config.get(name, value) != value for name, value in claim.only.items()):
                continue
            if config.get("curvature") != "gauss-newton":
                (own if home in homes else elsewhere).append(kind)
            if config.get("curvature") != "hessian" and home in homes:
                variant.append(kind)
        labels = [argument for argument in claim.arguments if isinstance(argument, (str, tuple))] or ("CDAT", "greedy")
        asked = any(called(kind, label) and "curvature" in vars(kind.config) for kind in variant for label in labels)
        cells = [cell(claim, own), "–", "–"]
        if claim.figure == ASKED:  # of runs that are in no log
            cells = ["–", cell(claim, elsewhere), "–"]
        elif elsewhere or own:  # else it is measured on no run
            cells[1:] = cell(claim, elsewhere), cell(claim, variant) if asked else "–"
        lines.append([claim.figure, claim.text, *cells])
    return results.markdown(["figure", "claim", "the paper's setting", "elsewhere", "there with uᵀGu"], lines)

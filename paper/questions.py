"""Questions: what the paper leaves open, asked at laptop size.

What this file teaches: to measure what no log holds. Where a question needs runs of its own, the function that draws it
trains them, and keeps a row of numbers a run in figures/NAME.csv: so it can be gone on with, is drawn anew at once, and
its verdict is measured from what is committed. Importing this file adds the entries to EXPERIMENTS.
Read next: terms.py, batches.py and graph.py, which ask.
"""

import functools

import numpy as np

import plots
from paper import batches, cost, drawings, graph, results, terms
from paper.claims import ASKED
from paper.experiments import (BOTH, CDAT, CONSTANT, EXPERIMENTS, FEEDBACK, GREEDY, NO_RUNS, Claim, Experiment,
                               cdat)  # fmt: skip
from paper.settings import SEEDS, on, setting_of

# ------------------------------------------------------------------------------------------------ a graph network


def graph_row(tuner, seed, steps):
    """What a run of graph.py ends with: as in results.summary."""
    rows, accuracy = graph.train(tuner, seed, steps)
    names = "loss", "learning_rate", "sharpness"
    history = {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}
    history["step"] = np.arange(len(rows))
    return dict(loss_first=rows[0]["loss"], loss=plots.final_loss(history),
                rate=plots.geometric(history["learning_rate"][-10:]),
                sharpness=plots.last_measured(history["sharpness"]),
                product=plots.geometric(plots.products(history)[len(rows) // 2 :]), test_accuracy=accuracy)  # fmt: skip


def on_a_graph(_, file, kinds=graph.TUNERS, seeds=SEEDS, steps=200):
    """What each tuner ends with on the graph: training loss, ηλ and test accuracy, a dot a seed."""
    columns = {"loss": "final training loss", "product": "ηλ, second half", "test_accuracy": "test accuracy"}
    figure, axes = drawings.subplots(1, 3, figsize=(10, 2.8), sharey=True)
    for y, (name, tuner) in enumerate(kinds.items()):
        same = [results.kept(file, f"{name}; seed {seed}", functools.partial(graph_row, tuner, seed, steps))
                for seed in seeds]  # fmt: skip
        color, _ = plots.look(name.split()[0].lower(), 0)
        for axis, column in zip(axes, columns):
            axis.plot([row[column] for row in same], [y] * len(same), "o", color=color, alpha=0.7, markersize=5)
            axis.plot(np.median([row[column] for row in same]), y, "|", color=color, markersize=14)
    for axis, title in zip(axes, columns.values()):
        axis.set_title(title, fontsize=9, loc="left")
    axes[0].set_yticks(range(len(kinds)), list(kinds))
    axes[0].set_xscale("log")
    axes[0].invert_yaxis()
    axes[1].axvline(2, color=drawings.ORANGE, linewidth=1, linestyle=(0, (6, 3)), zorder=0)
    axes[2].set_xlim(0.95, 1)
    plots.finish(figure, axes, file)


def best_on_a_graph(_, label):
    """Whether a tuner is at least as accurate as the constant rate that is most so, by medians over the seeds."""
    accuracy = {}  # by tuner, of each seed
    for key, row in results.rows_of("graph").items():
        accuracy.setdefault(key.split(";")[0], []).append(row["test_accuracy"])
    found = {name: np.median(values) for name, values in accuracy.items()}
    if label not in found:
        return []
    best = max(value for name, value in found.items() if name.startswith("constant"))
    return [("graph", f"{found[label]:.1%} / {best:.1%}", bool(found[label] >= best))]


# ------------------------------------------------------------------------------- does a low sharpness generalise?


def general(scale):
    """The tuners on more images, tested on all that are at hand."""
    return on(["mlp, 1024", "cnn, 1024"], scale, CONSTANT, GREEDY, cdat(2.0), FEEDBACK)


def at_level(run, level):
    """Test loss, test accuracy and sharpness at the first step whose loss is at most `level`; nan if there is none."""
    history, row = run.history, {"level": level}
    there = np.flatnonzero(history["loss"] <= level)
    for name in ("test_loss", "test_accuracy", "sharpness"):
        measured = np.isfinite(history[name])
        values = np.interp(history["step"], history["step"][measured], history[name][measured])
        row[name] = values[there[0]] if len(there) else np.nan
    return row


def at_one_loss(runs, file):
    """Test loss and accuracy against training loss; and at one training loss the test loss against the sharpness."""
    trained, rows = list(dict.fromkeys(setting_of(run.settings) for run in runs)), {}
    figure, axes = drawings.subplots(len(trained), 3, figsize=(10, 2.9 * len(trained)), squeeze=False)
    for row, setting in zip(axes, trained):
        same = [run for run in runs if setting_of(run.settings) == setting]
        best = drawings.tuned(same)
        level = 1.01 * max(min(run.history["loss"]) for run in best)  # which each tuner comes to with each seed
        for run in best:
            measured = np.isfinite(run.history["test_loss"])
            color = plots.COLORS[run.settings["tuner"]]
            for axis, name in zip(row, ("test_loss", "test_accuracy")):
                axis.plot(run.history["loss"][measured], run.history[name][measured], color=color, linewidth=1,
                          label=run.settings["name"])  # fmt: skip
        for run in same:
            there = at_level(run, level)
            rows[f"{setting.split(',')[0]}; {run.settings['run']}; seed {run.settings['seed']}"] = there
            row[2].plot(there["sharpness"], there["test_loss"], "o", color=plots.COLORS[run.settings["tuner"]],
                        markersize=5, alpha=0.7)  # fmt: skip
        for axis in row[:2]:
            axis.axvline(level, color=drawings.GREY, linewidth=0.8, zorder=0)
            axis.set(xscale="log", xlabel="training loss (time runs to the left)", xlim=(None, 0.6))
        row[0].set(ylabel=f"{setting.split(',')[0]}: test loss", ylim=(0.35, 0.6))
        row[1].set_ylabel("test accuracy")
        row[2].set(xscale="log", xlabel=f"sharpness at training loss {level:.2g}", ylabel="test loss there")
    results.write(file.with_suffix(".csv"), rows)
    plots.finish(figure, axes, file)


def flatter_is_better(_):
    """Whether at equal training loss runs of lower λ have lower test loss (ours: rank correlation above 0.5)."""
    found = []
    for setting in ("mlp", "cnn"):
        rows = results.rows_of("general", f"{setting};")
        if not rows:
            continue
        for words, these in ("", rows), (" without feedback", {k: v for k, v in rows.items() if "feedback" not in k}):
            lam, loss = np.array([[row["sharpness"], row["test_loss"]] for row in these.values()
                                  if np.isfinite(row["test_loss"])]).T  # fmt: skip
            ranks = [np.argsort(np.argsort(values)) for values in (lam, loss)]
            correlation = np.corrcoef(*ranks)[0, 1]
            found.append((setting + words, f"{correlation:.2f} of {len(lam)} runs", bool(correlation > 0.5)))
    return found


# ------------------------------------------------------------------------------------ what it costs, tuning included


def sooner(_, label):
    """Whether a tuner comes to where the tuned constant rate ends in fewer seconds than that and its grid."""
    rows, found = results.rows_of("seconds"), []
    for setting in dict.fromkeys(key.split("; ")[0] for key in rows):
        ours, constant = (rows[f"{setting}; {name}"]["reach"] for name in (label, "constant with its grid"))
        found.append((setting, f"{ours:.2g} s / {constant:.2g} s", ours < constant))
    return found


# ----------------------------------------------------------------------------------------------------- the entries

EXPERIMENTS |= {
    "terms": Experiment(
        "25 min", NO_RUNS, terms.terms,
        [Claim(ASKED, "above the edge, the sign of τ²/λ² − κ/(3λ) tells bounded swings from blow-ups under constant "
               "rates (ours: it is positive at 90 % of the former steps, at 10 % of the latter)", terms.sign_tells,
               ("constant",)),
         Claim(ASKED, "and under CDAT", terms.sign_tells, ("CDAT",)),
         Claim(ASKED, "under CDAT the sign of κ does, as it would were u the top eigenvector", terms.sign_tells,
               ("CDAT", "kappa")),
         Claim(ASKED, "τ and κ improve the prediction of the slope along v after a step of CDAT (error, in slopes "
               "before)", terms.terms_predict, ("CDAT",))],
        about="asked by readers: which terms of higher order hold training at the edge?", reads=True),
    "range": Experiment(
        "1 min", NO_RUNS, terms.stable_range,
        [Claim(ASKED, "simplified model: a range of σ above 2 is stable (for 4000 steps) with κ, or with more "
               "eigenvalues", terms.widest)],
        about="asked by the paper: what does its model lack, that σ = 2 alone is stable in it?"),
    "graph": Experiment(
        "4 min", NO_RUNS, on_a_graph,
        [Claim(ASKED, "on a graph network CDAT σ = 2 is at least as accurate as the best constant rate",
               best_on_a_graph, ("CDAT σ = 2",)),
         Claim(ASKED, "so is greedy", best_on_a_graph, ("greedy",)),
         Claim(ASKED, "so is the feedback rule", best_on_a_graph, ("feedback",))],
        about="asked by readers: how do the tuners do on a graph network? The worked example of a problem of your own"),
    "batches": Experiment(
        "60 min", NO_RUNS, batches.batches,
        [Claim(ASKED, "σ = 2 with n and d from the next batch ends at most 10 % (ours) above the best σ, whatever the "
               "batch", batches.two_batches_do),
         Claim(ASKED, "the best σ is 2/(1 + noise/batch), within 0.4 (ours, a step of the grid)", batches.noise_tells)],
        about="asked by readers: does the size of the batch say which σ to take?", reads=True),
    "seconds": Experiment(
        "with fig5", lambda scale: on(["resnet", "mixer", "nanolm", "vit", "mlp", "digits"], scale, CONSTANT,
                                      CDAT | BOTH, FEEDBACK),
        cost.against_seconds,
        [Claim(ASKED, "CDAT σ = 2 comes to where the tuned constant rate ends before that has paid for its grid",
               sooner, ("CDAT σ = 2",)),
         Claim(ASKED, "so it does with uᵀGu", sooner, ("CDAT σ = 2 uᵀGu",)),
         Claim(ASKED, "so does the feedback rule", sooner, ("feedback",))],
        about="asked by the paper's reviewers: what does a run cost in seconds, if a constant rate pays for its grid?"),
    "test": Experiment(
        "4 min", lambda scale: [dict(tuner=["constant", "greedy", "cdat", "feedback"], lr=0.1, seed=[0, 1, 2, 3])],
        drawings.at_equal_loss,
        about="asked by readers: do the tuners differ in test loss and accuracy at equal training loss?"),
    "others": Experiment(
        "6 min", lambda scale: on(["cnn", "rnn"], scale, CONSTANT, GREEDY, CDAT | BOTH),
        drawings.panels("loss", "learning_rate", "product"),
        about="asked by readers: does CDAT σ = 2 beat greedy and the tuned constant rate on a CNN and an RNN?"),
    "general": Experiment(
        "60 min", general, at_one_loss,
        [Claim(ASKED, "at equal training loss a lower sharpness goes with a lower test loss (ours: rank correlation "
               "above 0.5)", flatter_is_better)],
        about="asked by readers: at equal training loss, do tuners that keep λ low generalise better?"),
}  # fmt: skip

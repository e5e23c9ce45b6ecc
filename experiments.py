"""The paper's figures: each a list of runs, a figure, and the claim that it tests.

    python experiments.py --list
    python experiments.py fig15            runs what is not there yet, draws figures/fig15.png, prints the table
    python experiments.py fig15 --table    prints the table from the committed results, without running anything

What every run ended with is kept in figures/results.csv, a row a run, so that each number in the README can be
traced. Rates are tuned on grids with a factor of 2 between values, as in the paper.
"""

import argparse
import csv
import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

import plots
import train

RESULTS = Path(__file__).parent / "figures" / "results.csv"
COLUMNS = ("experiment", "run", "label", "seed", "status", "loss", "learning_rate", "sharpness", "product")


class Experiment(NamedTuple):
    claim: str  # what the paper says, or what is asked
    time: str  # on two cores
    runs: list  # dicts from flag to value or values, each as train.configurations takes it


def rates(first, count):
    """A grid with a factor of 2.

    >>> rates(0.1, 3)
    [0.1, 0.2, 0.4]
    """
    return [first * 2**k for k in range(count)]


SEEDS = [0, 1, 2]
EXPERIMENTS = {
    "defaults": Experiment(
        "CDAT σ = 2 beats a constant rate, and the greedy rule loses to it", "4 min",
        [{"tuner": ["constant", "linesearch", "greedy", "cdat"], "lr": 0.1, "seed": [0, 1, 2, 3]}],
    ),
    "edges": Experiment(
        "with a constant rate ηλ settles at the edge of the optimizer", "5 min",
        [{"tuner": "constant", "lr": 0.1, "seed": SEEDS},
         {"tuner": "constant", "optimizer": "momentum", "lr": 0.02, "seed": SEEDS},
         {"tuner": "constant", "optimizer": "rmsprop", "lr": 2e-5, "seed": SEEDS}],
    ),
    "fig2": Experiment(
        "on a linear model linesearch and greedy work well", "5 min",
        [{"model": "linear", "tuner": "constant", "lr": rates(0.0125, 6), "seed": SEEDS},
         {"model": "linear", "tuner": ["linesearch", "greedy"], "seed": SEEDS}],
    ),
    "fig15": Experiment(
        "η = σ/λ is poor at σ = 2 and good at σ = 3: alignment matters", "8 min",
        [{"tuner": ["exact", "cdat"], "sigma": 2.0, "seed": SEEDS}, {"tuner": "exact", "sigma": 3.0, "seed": SEEDS}],
    ),
}  # fmt: skip


def run(name):
    """Trains what is not there yet, draws the figure, and replaces the experiment's rows of the results."""
    configs = [config for given in EXPERIMENTS[name].runs for config in train.configurations(given | {"resume": True})]
    runs = []
    for k, config in enumerate(configs):
        print(f"[{k + 1}/{len(configs)}] {train.name_of(config)}", flush=True)
        runs.append((dataclasses.asdict(config), train.train(config)))
        status = plots.load_run(Path(config.out) / train.name_of(config))[0]["status"]
        runs[-1][0]["status"] = status
    plots.draw(runs, RESULTS.parent / f"{name}.png")
    labels = plots.labels([config for config, _ in runs])
    rows = [row for row in results() if row["experiment"] != name]
    for config, (settings, history), label in zip(configs, runs, labels):
        product = history["learning_rate"] * history["sharpness"]
        rows.append(dict(experiment=name, run=train.name_of(config), label=label, seed=config.seed,
                         status=settings["status"], loss=f"{train.final_loss(history):.6g}",
                         learning_rate=f"{history['learning_rate'][-1]:.4g}",
                         sharpness=f"{train.last_measured(history['sharpness']):.5g}",
                         product=f"{train.last_measured(product):.4g}"))  # fmt: skip
    with open(RESULTS, "w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def results():
    """The rows of the results, dicts of strings."""
    return list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []


def table(name):
    """A line a kind of run: its mean and range over the seeds, in Markdown.

    loss is the mean of the last 5 steps; the last ηλ that was measured is product.
    """
    groups = {}
    for row in results():
        if row["experiment"] == name:
            groups.setdefault(row["label"], []).append(row)
    lines = ["| run | loss: mean (range) | diverged | last rate | last sharpness | last product |", "|---|---|---|---|---|---|"]
    for label, rows in groups.items():
        loss = np.array([float(row["loss"]) for row in rows])
        mean = lambda column: f"{np.mean([float(row[column]) for row in rows]):.3g}"
        spread = f"{loss.mean():.3g} ({loss.min():.3g} to {loss.max():.3g})"
        diverged = sum(row["status"] == "diverged" for row in rows)
        lines.append(f"| {label} | {spread} | {diverged} of {len(rows)} | {mean('learning_rate')} | "
                     f"{mean('sharpness')} | {mean('product')} |")  # fmt: skip
    return "\n".join(lines)


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description="The paper's figures, from a laptop.", allow_abbrev=False)
    parser.add_argument("name", nargs="*", help="an experiment of --list, or all")
    parser.add_argument("--list", action="store_true", help="each experiment with its time and claim")
    parser.add_argument("--table", action="store_true", help="the table of the committed results, without running")
    options = parser.parse_args(argv)
    if options.list or not options.name:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:10} {experiment.time:>7}  {experiment.claim}")
    for name in EXPERIMENTS if options.name == ["all"] else options.name:
        if name not in EXPERIMENTS:
            sys.exit(print(f"experiments.py: no experiment {name!r}; there are {', '.join(EXPERIMENTS)}",
                           file=sys.stderr) or 2)  # fmt: skip
        if not options.table:
            run(name)
        print(table(name))


if __name__ == "__main__":
    main()

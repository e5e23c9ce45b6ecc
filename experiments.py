"""The paper's figures, each a list of runs and a drawing of them.

    python experiments.py --list           each figure with its claim and its time on two cores
    python experiments.py fig5             runs what has not been run yet, draws figures/fig5.png
    python experiments.py claims           the verdicts, from the committed results, without running anything
    python experiments.py fig5 --table     likewise a line for each kind of run
    python experiments.py fig5 --scale paper   the paper's data, networks and steps: for an accelerator

What this file teaches: an experiment is data. A setting says what is trained, a figure lists tuners on settings.
What every run ended with is kept in figures/results.csv, so that each number in the README can be traced.
Read next: results.py, which reads tables and verdicts from it; drawings.py, which draws.
"""

import argparse
import dataclasses
import re
import sys
import textwrap
import time
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

import cost
import drawings
import plots
import results
import train
from results import FIGURES

SEEDS = [0, 1, 2]

# ------------------------------------------------------------------------------------------------------- settings

LAPTOP = {
    "digits": {},
    "tanh": dict(activation="tanh"),
    "linear": dict(model="linear"),
    "mlp": dict(dataset="cifar10", samples=256, width=256, steps=300),
    "resnet": dict(dataset="cifar10", model="resnet", stem="imagenet", loss="ce", samples=128, width=8, steps=200),
    "mixer": dict(dataset="cifar10", model="mixer", patch=8, loss="ce", samples=128, steps=200),
    "nanolm": dict(dataset="shakespeare", model="transformer", loss="ce", optimizer="rmsprop", samples=32, width=32, steps=200),
    "vit": dict(dataset="imagenette", model="vit", patch=8, image_size=32, loss="ce", optimizer="rmsprop", samples=128,
                width=32, steps=200),
    "mnist": dict(dataset="mnist", samples=512, width=64, depth=2, steps=300),
    "batches": dict(samples=0, steps=600),
    "momentum": dict(optimizer="momentum", steps=600),
    "rmsprop": dict(optimizer="rmsprop", steps=600),
    "adam": dict(optimizer="adam", steps=600),
    "cnn": dict(dataset="cifar10", model="cnn", samples=128, steps=300),
    "rnn": dict(dataset="shakespeare", model="rnn", loss="ce", samples=128, width=64, steps=300),
}  # fmt: skip
SPARING = dict(sharpness_every=20, sharpness_tol=0.02, test_samples=256)  # what is measured must not cost more than training
LAPTOP |= {name: LAPTOP[name] | SPARING for name in ("mlp", "resnet", "mixer", "nanolm", "vit", "cnn", "rnn")}
LAPTOP |= {name: LAPTOP[name] | dict(no_sharpness=True) for name in ("mnist", "batches", "momentum", "rmsprop", "adam")}
PAPER = LAPTOP | {
    "linear": dict(dataset="cifar10", model="linear", samples=4096, steps=16384),
    "mlp": dict(dataset="cifar10", preset="mlp-fig15", samples=4096, steps=16384),
    "resnet": dict(dataset="cifar10", preset="resnet34", samples=4096, steps=16384, chunk_size=512),
    "mixer": dict(dataset="cifar10", preset="mixer-ti8", loss="ce", samples=4096, steps=16384, chunk_size=512),
    "nanolm": dict(dataset="shakespeare", preset="nanolm", loss="ce", optimizer="rmsprop", samples=2048, steps=8192),
    "vit": dict(dataset="imagenette", preset="vit-ti32", loss="ce", optimizer="rmsprop", samples=1024, steps=16384),
    "mnist": dict(dataset="mnist", samples=8192, width=256, depth=3, steps=16384),
    "batches": dict(dataset="cifar10", preset="resnet50", samples=0, steps=40000, sharpness_samples=4096),
}
SETTINGS = ["mlp", "resnet", "mixer", "nanolm", "vit"]  # of Figures 1, 3, 5 and 6: the paper's four, and an MLP


def rates(first, count):
    """A grid with a factor of 2.

    >>> rates(0.1, 3)
    [0.1, 0.2, 0.4]
    """
    return [first * 2**k for k in range(count)]


GRIDS = {  # the constant rates, chosen to bracket the best
    "digits": rates(0.025, 4), "tanh": rates(0.05, 3), "linear": rates(0.0125, 6), "mlp": rates(0.0025, 4),
    "resnet": rates(0.08, 3), "mixer": rates(0.16, 3), "nanolm": rates(8e-4, 3), "vit": rates(3.2e-4, 3),
    "mnist": rates(0.025, 5), "batches": rates(0.05, 4), "momentum": rates(0.0125, 4), "rmsprop": rates(1e-4, 5),
    "adam": rates(1e-3, 4), "cnn": rates(0.08, 4), "rnn": rates(0.16, 4),
}  # fmt: skip
PAPER_GRIDS = GRIDS | {"resnet": rates(5e-4, 9), "mixer": rates(5e-4, 9), "nanolm": rates(5e-4, 9),
                       "vit": rates(1e-5, 8), "linear": rates(1e-3, 3)}  # fmt: skip


def on(settings, scale, *tuners):
    """Runs as train.configurations takes them: each tuner, a dict of flags, in each setting, with all seeds.

    A tuner's lr may be a function of the setting's grid of constant rates.
    """
    table, grids = (PAPER, PAPER_GRIDS) if scale == "paper" else (LAPTOP, GRIDS)
    at = lambda name, tuner: {key: value(grids[name]) if callable(value) else value for key, value in tuner.items()}
    return [table[name] | {"seed": SEEDS} | at(name, tuner) for name in settings for tuner in tuners]


def cdat(*sigmas, **more):
    """CDAT at each σ, with more flags."""
    return dict(tuner="cdat", sigma=list(sigmas), **more)


CONSTANT = dict(tuner="constant", lr=lambda grid: grid)
LINESEARCH, GREEDY, CDAT, FEEDBACK = dict(tuner="linesearch"), dict(tuner="greedy"), cdat(2.0), dict(tuner="feedback")
WARM = dict(tuner="schedule", decay="constant", warmup=0.2)  # a constant rate, but for how it is entered
SEARCHES = [dict(tuner="linesearch", slope=slope, slack=slack, grow=grow, shrink=shrink) for shrink in (0.8, 0.9)
            for grow in (4.0, np.inf) for slope, slack in ((1e-4, 0.0), (0.5, 0.0), (0.0, 0.0), (0.0, 1e-3))]  # fmt: skip
SCHEDULES = [dict(tuner="schedule", lr=rates(0.4, 4), warmup=warmup, decay=decay)
             for warmup in (0.05, 0.2) for decay in ("constant", "cosine")]  # fmt: skip
POLYAK = [dict(tuner="polyak", lr_max=lr_max) for lr_max in (1.0, 100.0)]
HYPER = [dict(tuner="hypergradient", lr=lr, hyper_rate=rate) for lr in (0.01, 0.05) for rate in (0.01, 0.1)]


# ---------------------------------------------------------------------------------------------------- experiments


class Experiment(NamedTuple):
    """A figure: what is run for it, and how it is drawn."""

    claim: str  # what the paper says, or what is asked
    time: str  # on two cores, where no run is there yet
    runs: Callable  # runs(scale): dicts from flag to value or values
    draw: Callable  # draw(runs, file)


def everywhere(*tuners):
    """The runs of Figures 1 and 5, but only of some tuners."""

    def runs(scale):
        searches = SEARCHES if scale == "paper" else [LINESEARCH]
        given = on(SETTINGS, scale, CONSTANT, *searches, GREEDY, cdat(2.0, 1.9375, 2.0625, 2.5))
        return [flags for flags in given if flags["tuner"] in tuners]

    return runs


def mini(*tuners):
    """Tuners on mini-batches of two sizes."""
    return lambda scale: on(["batches"], scale, *(tuner | dict(batch_size=[64, 256]) for tuner in tuners))


def varied(scale):
    """Figure 18: one of width, depth, weight decay and samples at a time."""
    values = dict(width=[16, 64, 256], depth=[1, 2, 4], weight_decay=[0.0, 1e-3, 1e-2], samples=[256, 512, 1024])
    return on(["mnist"], scale, *(tuner | {name: value} for tuner in (CONSTANT, cdat(2.0, 1.0, 2.0625))
                                  for name, grid in values.items() for value in grid))  # fmt: skip


def rivals(scale):
    """feedback against others: in eight settings, under Adam, on mini-batches of two sizes."""
    warm = WARM | dict(warmup=0.05, lr=lambda grid: [2 * grid[-2], 8 * grid[-2]])
    others = (CONSTANT, warm, LINESEARCH, GREEDY, POLYAK[0], cdat(2.0, 1.9375, 2.0625), FEEDBACK)
    runs = on(["digits", "mnist", "mlp", "resnet", "mixer", "nanolm", "momentum", "rmsprop"], scale, *others)
    averaged = {"cdat": dict(beta=0.9), "feedback": dict(beta=0.9)}  # which Adam needs
    runs += on(["adam"], scale, *(tuner | averaged.get(tuner["tuner"], {}) for tuner in others))
    return runs + mini(*others)(scale)


EXPERIMENTS = {
    "defaults": Experiment(
        "CDAT σ = 2 ends lower than a constant rate, and the greedy rule higher", "5 min",
        lambda scale: [dict(tuner=["constant", "linesearch", "greedy", "cdat"], lr=0.1, seed=[0, 1, 2, 3])], plots.draw),
    "edges": Experiment(
        "a constant rate ends with ηλ at the edge of its optimizer: 2, and 3.8 for momentum", "3 min",
        lambda scale: on(["digits"], scale, dict(tuner="constant", lr=0.1), WARM | dict(lr=0.1),
                         dict(tuner="constant", lr=[0.1, 0.03], activation="tanh"),
                         dict(tuner="constant", lr=1e-4, optimizer="rmsprop"),
                         dict(tuner="constant", lr=0.05, optimizer="momentum"),
                         WARM | dict(lr=1.0, optimizer="momentum")),
        drawings.panels("loss", "sharpness", "product", searched=())),
    "tanh": Experiment(
        "the paper's story on the default data: an MLP that sharpens, with tanh in place of relu", "6 min",
        lambda scale: on(["tanh"], scale, CONSTANT, LINESEARCH, GREEDY, cdat(2.0, 1.9375, 2.0625, 2.5)),
        drawings.panels("loss", "learning_rate", "sharpness", "product")),
    "fig1": Experiment(
        "linesearch and greedy end above the tuned constant rate; linesearch may lead early", "11 min",
        everywhere("constant", "linesearch", "greedy"), drawings.panels("loss")),
    "searches": Experiment(
        "the linesearch over the paper's grid (`--shrink 0.8`), on the MLP of Figure 1", "8 min",
        lambda scale: on(["mlp"], scale, CONSTANT, *SEARCHES[:8]), plots.draw),
    "fig2": Experiment(
        "on a linear model linesearch and greedy work well", "1 min",
        lambda scale: on(["linear"], scale, CONSTANT, LINESEARCH, GREEDY), drawings.panels("loss", "product")),
    "fig3": Experiment(
        "under both η falls and λ rises with ηλ just below 2; a constant rate settles around 2", "with fig1",
        everywhere("constant", "linesearch", "greedy"), drawings.panels("learning_rate", "sharpness", "product", "grad_norm")),
    "fig4": Experiment(
        "(and 10) the simplified model: with y fixed below 0 nothing feeds back, and λ runs away", "1 min",
        lambda scale: [], drawings.figure_4),
    "fig5": Experiment(
        "σ = 2 beats σ = 1 and is on par with the constant rate or better; 2.0625 is better still; 2.5 diverges",
        "11 min", everywhere("constant", "greedy", "cdat"), drawings.panels("loss", "learning_rate")),
    "fig6": Experiment(
        "under CDAT λ does not rise, and ηλ sits slightly above 2", "with fig5",
        everywhere("constant", "greedy", "cdat"), drawings.panels("sharpness", "product", "grad_norm")),
    "fig7": Experiment(
        "the best σ falls with the batch size; the moving average smooths it", "6 min",
        lambda scale: on(["batches"], scale, cdat(0.8, 1.2, 1.6, 1.8, 2.0, 2.2, 2.4, beta=[0.0, 0.9],
                                                  batch_size=[8, 32, 128, 0])),
        drawings.heat("sigma", "batch_size", split="beta")),
    "fig8": Experiment(
        "(and 20, 21) on mini-batches (here of 64 and 256) CDAT gains little over constant rates and schedules", "2 min",
        mini(CONSTANT, *(dict(tuner="schedule", lr=rates(0.4, 4), decay=decay) for decay in ("cosine", "linear")),
             cdat(2.0, 1.6, 1.2, beta=[0.0, 0.9])),
        drawings.panels("loss", "learning_rate", searched=(*drawings.SEARCHED, "cdat"))),
    "fig9": Experiment(
        "(and 11) the simplified model of CDAT: σ = 2 holds y near 0, σ = 1.9 lets λ grow", "1 min",
        lambda scale: [], drawings.figure_9),
    "fig12": Experiment(
        "with linesearch and greedy u aligns with the top eigenvector", "with fig1",
        everywhere("constant", "linesearch", "greedy"), drawings.panels("alignment")),
    "fig13": Experiment(
        "Polyak's rate beats CDAT σ = 2 and σ = 2.0625 matches it; hypergradient is on par with a constant rate", "6 min",
        lambda scale: on(["digits", "mlp"], scale, CONSTANT, *POLYAK, *HYPER, cdat(2.0, 2.0625)),
        drawings.panels("loss", "learning_rate", "sharpness")),
    "fig14": Experiment(
        "on mini-batches linesearch and greedy do well", "1 min",
        mini(CONSTANT, LINESEARCH, GREEDY), drawings.panels("loss", "learning_rate")),
    "fig15": Experiment(
        "η = σ/λ is poor at σ = 2 and good at σ = 3: alignment matters", "9 min",
        lambda scale: on(["digits", "mlp"], scale, dict(tuner="exact", sigma=[2.0, 3.0]), CDAT),
        drawings.panels("loss", "learning_rate", "product")),
    "fig16": Experiment(
        "at each step the greedy rate lowers the loss more than the on-edge rate would: it wins each step and loses the race",
        "with fig5", everywhere("cdat"), drawings.panels("greedy_gain")),
    "fig17": Experiment(
        "under CDAT successive updates end up opposed", "with fig5",
        everywhere("constant", "greedy", "cdat"), drawings.panels("alignment", "turn")),
    "fig18": Experiment(
        "gains grow with width and depth and fade with weight decay", "7 min", varied, drawings.width_and_depth),
    "fig19": Experiment(
        "a tuned schedule can still beat CDAT", "9 min",
        lambda scale: on(["digits"], scale, CONSTANT, *SCHEDULES, cdat(2.0, 2.0625)), drawings.panels("loss", "learning_rate")),
    "test": Experiment(
        "asked by readers: do the tuners differ in test loss and accuracy at equal training loss?", "with defaults",
        lambda scale: [dict(tuner=["constant", "greedy", "cdat"], lr=0.1, seed=[0, 1, 2, 3])], drawings.at_equal_loss),
    "others": Experiment(
        "asked by readers: does CDAT σ = 2 beat greedy and the tuned constant rate on a CNN and an RNN?", "5 min",
        lambda scale: on(["cnn", "rnn"], scale, CONSTANT, GREEDY, CDAT), drawings.panels("loss", "learning_rate", "product")),
    "averages": Experiment(
        "ours: do the moving averages help where CDAT and feedback blow up, and what do they cost elsewhere?", "12 min",
        lambda scale: on([*SETTINGS[1:], "digits"], scale, CONSTANT, cdat(2.0, beta=[0.0, 0.9, 0.99]),
                         FEEDBACK | dict(beta=[0.0, 0.9])),
        drawings.panels("loss", "learning_rate")),
    "overlay": Experiment(
        "beyond the paper: does the model (4) predict the next sharpness of a real run?", "1 min",
        lambda scale: [], drawings.overlay),
    "feedback": Experiment(
        "ours: CDAT over the edge and back ends below CDAT σ = 2", "10 min", rivals, drawings.against("CDAT σ = 2")),
    "sensitivity": Experiment(
        "ours: the numbers of the feedback rule need no tuning", "6 min",
        lambda scale: on(["digits"], scale, *(FEEDBACK | dict(sigma_high=high, tolerance=tolerance, average=average, steps=600,
                                                              sharpness_every=600) for average in (0.8, 0.9, 0.95)
                                              for high in (2.25, 2.5, 3.0, 4.0) for tolerance in (0.0, 0.05, 0.2))),
        drawings.heat("sigma_high", "tolerance", split="average")),
    "alternatives": Experiment(
        "ours: does a simpler sign than the average of the loss do as well?", "3 min", lambda scale: [], drawings.alternatives),
    "resets": Experiment(
        "ours: a greedy step takes out what had grown along the steepest directions", "1 min", lambda scale: [], drawings.resets),
}  # fmt: skip
ALSO = {"fig10": "fig4", "fig11": "fig9", "fig20": "fig8", "fig21": "fig8"}  # figures that are panels of others here


def configs(name, scale="laptop", **flags):
    """The runs of an experiment, each a train.Config, once."""
    given = [run | flags for run in EXPERIMENTS[name].runs(scale)]
    return list(dict.fromkeys(config for run in given for config in train.configurations(run)))


# -------------------------------------------------------------------------------------------------------- results

RESULTS = FIGURES / "results.csv"
TARGETS = {  # by setting: the loss to which steps and time are counted, about what the tuned constant rate ends with
    "mlp, digits": 0.025, "mlp, mnist": 0.085, "mlp, cifar10": 0.3, "resnet, cifar10": 1.3, "mixer, cifar10": 0.01,
    "transformer, shakespeare, rmsprop": 0.05, "mlp, digits, momentum": 0.02, "mlp, digits, rmsprop": 0.02,
    "mlp, digits, adam": 0.005, "mlp, digits, batch 64": 0.055, "mlp, digits, batch 256": 0.055,
}  # fmt: skip
MATRICES = {"loss": "final training loss", "test_loss": "test loss", "reach": "steps to reach a loss (inf: never)",
            "reach_seconds": "seconds to reach it, with all that is logged and measured"}  # fmt: skip


def run(name, scale, data_dir, out):
    """Trains what is not there yet, keeps a row of numbers for each run, draws the figure, and returns its file."""
    runs, rows = [], {}
    todo = configs(name, scale, resume=True, data_dir=data_dir, out=out)
    for k, config in enumerate(todo):
        print(f"[{k + 1}/{len(todo)}] {train.name_of(config)}", flush=True)
        history = train.train(config)
        settings = dataclasses.asdict(config) | plots.read_settings(Path(config.out) / train.name_of(config))
        names = dict(run=train.name_of(dataclasses.replace(config, seed=0)), name=results.label_of(config))
        runs.append((settings | names, history))
        rows[train.name_of(config)] = results.summary(settings, history, TARGETS.get(plots.setting_of(settings), -np.inf))
    file = FIGURES / (f"{name}.png" if scale == "laptop" else f"{name}-{scale}.png")
    EXPERIMENTS[name].draw(runs, file)
    results.write(RESULTS, results.read(RESULTS) | rows)
    return file


def kinds(name, scale="laptop"):
    """The kinds of runs of an experiment of which there are results."""
    return results.kinds_of(configs(name, scale), results.read(RESULTS))


# ------------------------------------------------------------------------------------------------- the command line


def listing():
    """What there is to run, in Markdown, each with a link to its figure."""
    rows = [[f"[`{name}`](figures/{name}.png)", experiment.time, experiment.claim] for name, experiment in EXPERIMENTS.items()]
    return results.markdown(["`python experiments.py` …", "time", "claim or question"], rows)


def costs(tuner):
    """From figures/cost.txt: a step under one tuner in constant-rate steps, by model, and what a run costs beside its steps."""
    machine, _, steps, facts = (FIGURES / "cost.txt").read_text().strip().split("\n\n")
    cells = [line.strip("| ").split(" | ") for line in steps.splitlines()]
    table = results.markdown(["model", "FLOPs", "time", "memory"], [[row[0], *row[2:5]] for row in cells if row[1] == tuner])
    return "\n".join([f"{machine}:", "", table, "", *(f"- {fact}" for fact in facts.splitlines())])


def with_tables(text):
    """The text, with what stands between <!-- table: NAME --> (matrix, claims, list, cost) and <!-- end --> made anew."""
    makers = {"table": lambda name: results.table(kinds(name)), "matrix": lambda name: results.matrix(kinds(name)),
              "claims": lambda _: results.claims(kinds), "list": lambda _: listing(), "cost": costs}  # fmt: skip
    fill = lambda match: f"{match[1]}\n{makers[match[2]](match[3])}\n<!-- end -->"
    return re.sub(r"(<!-- (\w+): (\w+) -->)\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def readme():
    """Writes the tables of README.md anew."""
    file = Path(__file__).parent / "README.md"
    file.write_text(with_tables(file.read_text()))


COMMANDS = {"cost": cost.main, "claims": lambda: print(results.claims(kinds)), "readme": readme}


def fail(message):
    """One line on stderr, and the end."""
    train.fail(message, "experiments.py")


def one(name, options):
    """One experiment: run unless its table alone is asked for, and the table."""
    if not options.table:
        started = time.time()
        file = run(name, options.scale, options.data_dir, options.out)
        print(f"{file}, {(time.time() - started) / 60:.1f} min", flush=True)
    if found := kinds(name, options.scale):
        print(results.table(found))
    if found and name == "feedback":
        print(*(f"\n{about}:\n\n{results.matrix(found, column)}" for column, about in MATRICES.items()), sep="\n")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description="The paper's figures, from a laptop.", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="name", help="an experiment of --list, all, cost, claims or readme")
    parser.add_argument("--list", action="store_true", help="each experiment with its time and claim")
    parser.add_argument("--table", action="store_true", help="the table of the committed results, without running")
    parser.add_argument("--scale", choices=["laptop", "paper"], default="laptop", help="the paper's own settings, or smaller")
    parser.add_argument("--data-dir", default="datasets", help="folder that holds the data sets, or is to")
    parser.add_argument("--out", default="runs", help="folder of the run folders")
    parser.error = fail
    options = parser.parse_args(argv)
    if options.list or not options.names:
        for name, experiment in EXPERIMENTS.items():
            print(textwrap.fill(f"{name:12} {experiment.time:>13}  {experiment.claim}", 80, subsequent_indent=28 * " "))
    names = [ALSO.get(name, name) for name in options.names]
    for name in names:
        if name not in {*EXPERIMENTS, *COMMANDS, "all"}:
            fail(f"no experiment {name!r}; there are {', '.join([*EXPERIMENTS, *ALSO, *COMMANDS, 'all'])}")
    try:
        for name in EXPERIMENTS if "all" in names else names:
            COMMANDS[name]() if name in COMMANDS else one(name, options)
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here")
        sys.exit(130)


if __name__ == "__main__":
    main()

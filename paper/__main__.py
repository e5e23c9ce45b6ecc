"""The paper's figures, tables and verdicts, from a laptop. Run from the repository's root:

    python -m paper --list           each experiment with its time on two cores, and what is claimed or asked
    python -m paper fig5             runs what has not been run yet, draws paper/figures/fig5.png, prints the table
    python -m paper fig5 --table     the table alone, from the committed results
    python -m paper claims           the verdicts, likewise
    python -m paper readme           writes the tables in paper/README.md anew, likewise
    python -m paper charts           draws anew what takes final losses alone, likewise
    python -m paper fig5 --scale paper   the paper's data, networks and steps: for an accelerator
    python -m paper train --tuner exact  train.py with the tuners of rivals.py, too

What a run ended with is a row of results.csv, or of figures/NAME.csv where an experiment trains by itself.
Read next: experiments.py.
"""

import argparse
import os
import re
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np

import data
import plots
import train
from paper import claims, results
from paper.experiments import ALSO, configs, words
from paper.questions import EXPERIMENTS  # those of experiments.py, and its own
from paper.results import FIGURES, RESULTS
from paper.settings import setting_of

HERE = Path(__file__).parent
TARGETS = {  # by setting: the loss to which steps and time are counted, about what the tuned constant rate ends with
    "mlp, digits": 0.025, "mlp, mnist": 0.085, "mlp, cifar10": 0.3, "fixup resnet, cifar10": 1.3,
    "mixer, cifar10": 0.01,
    "transformer, shakespeare, rmsprop": 0.05, "mlp, digits, momentum": 0.02, "mlp, digits, rmsprop": 0.02,
    "mlp, digits, adam": 0.005, "mlp, digits, batch 64": 0.055, "mlp, digits, batch 256": 0.055,
}  # fmt: skip
MATRICES = {"loss": "final training loss", "test_loss": "test loss"}


def run(name, scale, data_dir, out):
    """Trains what is not there yet, keeps a row of numbers for each run, draws the figure, and returns its file."""
    runs, rows = [], {}
    todo, file = configs(name, scale, resume=True, data_dir=data_dir, out=out), figure_of(name, scale)
    if EXPERIMENTS[name].alone:
        draw(name, todo, file)
        return file
    for k, config in enumerate(todo):
        print(f"[{k + 1}/{len(todo)}] {train.name_of(config)}", file=sys.stderr, flush=True)
        train.train(config)
        done = plots.load_run(train.folder_of(config))
        names = dict(run=results.row_of(results.unseeded(config)), name=results.label_of(config))
        runs.append(done._replace(settings=done.settings | names))
        rows[results.row_of(config)] = results.summary(done, TARGETS.get(setting_of(done.settings), -np.inf))
    if rows:
        with data.owned(RESULTS.parent):  # no other process may write between the two
            results.write(RESULTS, results.read(RESULTS) | rows)
    more = dict(data_dir=data_dir) if EXPERIMENTS[name].reads else {}
    draw(name, kinds(name, scale) if EXPERIMENTS[name].chart else runs, file, **more)
    return file


def draw(name, runs, file, **more):
    """The figure of an experiment, which may train by itself: in full precision, as train.train does."""
    with jax.default_matmul_precision(train.MATMUL_PRECISION):
        EXPERIMENTS[name].draw(runs, file, **more)


def figure_of(name, scale="laptop"):
    """The file of an experiment's figure."""
    return FIGURES / (f"{name}.png" if scale == "laptop" else f"{name}-{scale}.png")


def kinds(name, scale="laptop"):
    """The kinds of runs of an experiment of which there are results."""
    file = figure_of(name, scale).with_suffix(".csv") if EXPERIMENTS[name].alone else RESULTS
    return results.kinds_of(configs(name, scale), results.read(file))


def verdicts():
    """The verdicts on all claims, in Markdown."""
    return claims.verdicts(EXPERIMENTS, kinds)


# ------------------------------------------------------------------------------------------ the tables of README.md


def listing():
    """What there is to run, in Markdown, each with a link to its figure."""
    rows = [[f"[`{name}`](figures/{name}.png)", experiment.time, words(experiment)]
            for name, experiment in EXPERIMENTS.items()]  # fmt: skip
    return results.markdown(["`python -m paper` …", "time", "claim or question"], rows)


def costs():
    """From figures/cost.txt: CDAT's step in constant-rate steps, by model, and what a run costs beside its steps."""
    machine, _, steps, facts = (FIGURES / "cost.txt").read_text().strip().split("\n\n")
    rows = {}  # by model
    for line in steps.splitlines():
        model, kind, *ratios = line.strip("| ").split(" | ")
        if kind.startswith("cdat"):
            rows.setdefault(model, {})[kind] = " / ".join(ratios[:3])
    lines = [[model, *ratios.values()] for model, ratios in rows.items()]
    table = results.markdown(["FLOPs / time / memory", *rows["mlp"]], lines)
    return "\n".join([f"{machine}:", "", table, "", *(f"- {fact}" for fact in facts.splitlines())])


def with_tables(text):
    """The text, with what stands between <!-- table: NAME --> (or matrix, claims, ...) and <!-- end --> made anew."""
    makers = {"table": lambda name: results.table(kinds(name)), "matrix": lambda name: results.matrix(kinds(name)),
              "tested": lambda name: results.matrix(kinds(name), "test_loss"),
              "sigma": lambda name: results.pairs(kinds(name), "sigma"),
              "every": lambda name: results.pairs(kinds(name), "every"),
              "claims": lambda _: verdicts(), "list": lambda _: listing(), "cost": lambda _: costs()}  # fmt: skip
    fill = lambda match: f"{match[1]}\n{makers[match[2]](match[3])}\n<!-- end -->"
    return re.sub(r"(<!-- (\w+): (\w+) -->)\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def readme():
    """Writes the tables of README.md anew."""
    text = with_tables((HERE / "README.md").read_text())
    data.write(HERE / "README.md", lambda stream: stream.write(text.encode()))


def charts():
    """Draws those figures anew that results.csv is enough for."""
    for name, experiment in EXPERIMENTS.items():
        if experiment.chart and kinds(name):
            draw(name, kinds(name), figure_of(name))


# ------------------------------------------------------------------------------------------------- the command line

COMMANDS = {"claims": lambda: print(verdicts()), "readme": readme, "charts": charts}


def fail(message):
    """One line on stderr, and the end."""
    train.fail(message, "paper")


def show_list():
    """What there is to run, for a terminal."""
    for name, experiment in EXPERIMENTS.items():
        text = f"{name:12} {experiment.time:>13}  {words(experiment)}"
        print(textwrap.fill(text, 80, subsequent_indent=28 * " "))


def one(name, options):
    """One experiment: run unless its table alone is asked for, and the table."""
    if not options.table:
        started = time.time()
        file = run(name, options.scale, options.data_dir, options.out)
        print(f"{file}, {(time.time() - started) / 60:.1f} min", file=sys.stderr, flush=True)
    found = kinds(name, options.scale)
    print(results.table(found) if found else f"{name} has no table")
    if found and name == "feedback":
        print(*(f"\n{about}:\n\n{results.matrix(found, column)}" for column, about in MATRICES.items()), sep="\n")


def main(argv):
    """The command line."""
    if argv[:1] == ["train"]:
        return train.main(argv[1:], "python -m paper train")
    parser = argparse.ArgumentParser(prog="python -m paper", description="The paper's figures, from a laptop.",
                                     allow_abbrev=False)  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="name",
                        help="an experiment, all, claims, readme or charts; or `train` and flags of train.py")
    parser.add_argument("--list", action="store_true", help="each experiment with its time and claim")
    parser.add_argument("--table", action="store_true", help="the table of the committed results, without running")
    parser.add_argument("--scale", choices=["laptop", "paper"], default="laptop", help="smaller, or the paper's")
    parser.add_argument("--data-dir", default="datasets", help="folder that holds the data sets, or is to")
    parser.add_argument("--out", default="runs", help="folder of the run folders")
    parser.error = fail
    options = parser.parse_args(argv)
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="replace")  # what a terminal cannot show ends no command
    names = [ALSO.get(name, name) for name in options.names]
    for name in names:
        if name not in {*EXPERIMENTS, *COMMANDS, "all"}:
            fail(f"no experiment {name!r}; --list shows what there is")
    try:
        if options.list or not names:
            show_list()
        for name in EXPERIMENTS if "all" in names else names:
            COMMANDS[name]() if name in COMMANDS else one(name, options)
    except BrokenPipeError:  # nobody reads on, as behind `| head`
        os._exit(1)
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", flush=True)
        os._exit(130)  # see train.run


if __name__ == "__main__":
    main(sys.argv[1:])

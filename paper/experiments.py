"""The experiments: what is trained, under which tuners, what is claimed of it and what measures that, and how it is
drawn.

What this file teaches: an experiment is data, and is written once. A setting says what is trained; an experiment lists
tuners on settings and the paper's claims about them. `python -m paper --list` shows them, `python -m paper fig5` runs
one. A new one is an entry of EXPERIMENTS. Read next: results.py, which measures the claims; drawings.py, which draws.
"""

from typing import Callable, NamedTuple

import numpy as np

import plots
import train
from paper import cost, drawings
from paper.results import (below, best_sigmas, gains, logged_cost, model_of_figure_4, model_of_figure_9, ratio,
                           within)  # fmt: skip

SEEDS = [0, 1, 2]

# ------------------------------------------------------------------------------------------------------- settings

LAPTOP = {
    "digits": {},
    "tanh": dict(activation="tanh"),
    "linear": dict(model="linear"),
    "mlp": dict(dataset="cifar10", samples=256, width=256, steps=300),
    "resnet": dict(dataset="cifar10", model="resnet", stem="imagenet", loss="ce", samples=128, width=8, steps=200),
    "mixer": dict(dataset="cifar10", model="mixer", patch=8, loss="ce", samples=128, steps=200),
    "nanolm": dict(dataset="shakespeare", model="transformer", loss="ce", optimizer="rmsprop", samples=32, width=32,
                   steps=200),
    "vit": dict(dataset="imagenette", model="vit", patch=8, image_size=32, loss="ce", optimizer="rmsprop", samples=128,
                test_samples=200, width=32, steps=200),
    "mnist": dict(dataset="mnist", samples=512, width=64, depth=2, steps=300),
    "batches": dict(samples=0, steps=600),
    "momentum": dict(optimizer="momentum", steps=600),
    "rmsprop": dict(optimizer="rmsprop", steps=600),
    "adam": dict(optimizer="adam", steps=600),
    "cnn": dict(dataset="cifar10", model="cnn", samples=128, steps=300),
    "rnn": dict(dataset="shakespeare", model="rnn", loss="ce", samples=128, width=64, steps=300),
}  # fmt: skip
SPARING = dict(sharpness_every=20, sharpness_tol=0.02, test_samples=256)  # so that training costs more than measuring
LAPTOP |= {name: SPARING | LAPTOP[name] for name in ("mlp", "resnet", "mixer", "nanolm", "vit", "cnn", "rnn")}
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
            for grow in (4.0, np.inf)
            for slope, slack in ((1e-4, 0.0), (0.5, 0.0), (0.0, 0.0), (0.0, 1e-3))]  # fmt: skip
SCHEDULES = [dict(tuner="schedule", lr=rates(0.4, 4), warmup=warmup, decay=decay)
             for warmup in (0.05, 0.2) for decay in ("constant", "cosine")]  # fmt: skip
POLYAK = [dict(tuner="polyak", lr_max=lr_max) for lr_max in (1.0, 100.0)]
HYPER = [dict(tuner="hypergradient", lr=lr, hyper_rate=rate) for lr in (0.01, 0.05) for rate in (0.01, 0.1)]


# ---------------------------------------------------------------------------------------------------- experiments


class Claim(NamedTuple):
    """A claim of the paper, and what measures it."""

    figure: str  # of the paper
    text: str
    measure: Callable  # of the kinds of runs, and of the arguments: see results.py
    arguments: tuple = ()
    on: str = ""  # the experiments on whose runs it is measured, where that is not its own alone


class Experiment(NamedTuple):
    """What is run, how it is drawn, and what is claimed of it."""

    time: str  # on two cores, where no run is there yet
    runs: Callable  # runs(scale): dicts from flag to value or values
    draw: Callable  # draw(runs, file)
    claims: tuple = ()
    about: str = ""  # what is asked where the paper claims nothing


def words(experiment):
    """What is asked and claimed.

    >>> words(Experiment("1 min", None, None, [Claim("1", "it rises", None)], about="ours"))
    'ours; it rises'
    """
    return "; ".join(filter(None, [experiment.about, *(claim.text for claim in experiment.claims)]))


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


NO_RUNS = lambda scale: []  # what such an experiment shows is in no log
CLASSICAL = everywhere("constant", "linesearch", "greedy")  # the runs of Figures 1, 3 and 12
CURVATURE = everywhere("constant", "greedy", "cdat")  # the runs of Figures 5, 6, 16 and 17

EXPERIMENTS = {
    "defaults": Experiment(
        "5 min", lambda scale: [dict(tuner=["constant", "linesearch", "greedy", "cdat"], lr=0.1, seed=[0, 1, 2, 3])],
        plots.draw, about="CDAT σ = 2 ends lower than a constant rate, and the greedy rule higher"),
    "edges": Experiment(
        "3 min", lambda scale: on(["digits"], scale, dict(tuner="constant", lr=0.1), WARM | dict(lr=0.1),
                                  dict(tuner="constant", lr=[0.1, 0.03], activation="tanh"),
                                  dict(tuner="constant", lr=1e-4, optimizer="rmsprop"),
                                  dict(tuner="constant", lr=0.05, optimizer="momentum"),
                                  WARM | dict(lr=1.0, optimizer="momentum")),
        drawings.panels("loss", "sharpness", "product", searched=()),
        about="a constant rate ends with ηλ at the edge of its optimizer: 2, and 3.8 for momentum"),
    "tanh": Experiment(
        "6 min", lambda scale: on(["tanh"], scale, CONSTANT, LINESEARCH, GREEDY, cdat(2.0, 1.9375, 2.0625, 2.5)),
        drawings.panels("loss", "learning_rate", "sharpness", "product"),
        about="the paper's story on the default data: an MLP that sharpens, with tanh in place of relu"),
    "fig1": Experiment(
        "11 min", CLASSICAL, drawings.panels("loss"), [
            Claim("1", "linesearch ends above the tuned constant rate", below, ("constant", "linesearch"), "fig1 tanh"),
            Claim("1", "so does the best linesearch of its grid", below, ("constant", "linesearch"), "searches"),
            Claim("1", "greedy ends above the tuned constant rate", below, ("constant", "greedy"), "fig1 tanh")]),
    "searches": Experiment(
        "8 min", lambda scale: on(["mlp"], scale, CONSTANT, *SEARCHES[:8]), plots.draw,
        about="the linesearch over the paper's grid (`--shrink 0.8`), on the MLP of Figure 1"),
    "fig2": Experiment(
        "1 min", lambda scale: on(["linear"], scale, CONSTANT, LINESEARCH, GREEDY),
        drawings.panels("loss", "product"), [
            Claim("2", "linear model: linesearch at most 10 % above the best constant rate", below,
                  ("linesearch", "constant", 1.1)),
            Claim("2", "linear model: greedy likewise", below, ("greedy", "constant", 1.1))]),
    "fig3": Experiment(
        "with fig1", CLASSICAL, drawings.panels("learning_rate", "sharpness", "product", "grad_norm"), [
            Claim("3", "greedy: η falls", ratio, ("greedy", "rate", 0, 1), "fig3 tanh"),
            Claim("3", "greedy: λ rises", ratio, ("greedy", "sharpness", 1, np.inf), "fig3 tanh"),
            Claim("3", "linesearch: λ rises", ratio, ("linesearch", "sharpness", 1, np.inf), "fig3 tanh"),
            Claim("3", "greedy: ηλ just below 2 (1.6 to 2)", within, ("greedy", "product", 1.6, 2), "fig3 tanh"),
            Claim("3", "a constant rate stabilises ηλ around 2 (1.7 to 2.3)", within,
                  ("constant", "product", 1.7, 2.3), "edges")]),
    "fig4": Experiment(
        "1 min", NO_RUNS, drawings.figure_4,
        [Claim("4", "simplified model: with y fixed below 0 λ runs away", model_of_figure_4)],
        about="Figures 4 and 10"),
    "fig5": Experiment(
        "11 min", CURVATURE, drawings.panels("loss", "learning_rate"), [
            Claim("5", "CDAT σ = 2 at most 5 % above the tuned constant rate", below,
                  ("CDAT σ = 2", "constant", 1.05), "fig5 tanh"),
            Claim("5", "CDAT σ = 2 always better than σ = 1, greedy", below, ("CDAT σ = 2", "greedy"), "fig5 tanh"),
            Claim("5", "σ = 2.0625 better still", below, ("CDAT σ = 2.0625", "CDAT σ = 2"), "fig5 tanh"),
            Claim("5", "σ = 2.5 generally diverges, or ends above σ = 2", below, ("CDAT σ = 2", "CDAT σ = 2.5"),
                  "fig5 tanh"),
            Claim("5", "η rises on its own under σ = 2", ratio, ("CDAT σ = 2", "rate", 1, np.inf), "fig5 tanh")]),
    "fig6": Experiment(
        "with fig5", CURVATURE, drawings.panels("sharpness", "product", "grad_norm"), [
            Claim("6", "λ does not rise under σ = 2", ratio, ("CDAT σ = 2", "sharpness", 0, 1.05), "fig6 tanh"),
            Claim("6", "ηλ sits slightly above 2 (2 to 2.6)", within, ("CDAT σ = 2", "product", 2, 2.6), "fig6 tanh")]),
    "fig7": Experiment(
        "6 min", lambda scale: on(["batches"], scale, cdat(0.8, 1.2, 1.6, 1.8, 2.0, 2.2, 2.4, beta=[0.0, 0.9],
                                                           batch_size=[8, 32, 128, 0])),
        drawings.heat("sigma", "batch_size", split="beta"),
        [Claim("7", "the best σ falls with the batch size", best_sigmas)]),
    "fig8": Experiment(
        "2 min", mini(CONSTANT, dict(tuner="schedule", decay=["cosine", "linear"], lr=rates(0.4, 4)),
                      cdat(2.0, 1.6, 1.2, beta=[0.0, 0.9])),
        drawings.panels("loss", "learning_rate", searched=(*drawings.SEARCHED, "cdat")), [
            Claim("8", "mini-batches: CDAT gains at most 20 % on the best constant rate", below,
                  ("constant", "CDAT", 1.2)),
            Claim("8", "mini-batches: the best schedule beats it", below, ("schedule", "CDAT"))],
        about="Figures 8, 20 and 21, at batches of 64 and 256"),
    "fig9": Experiment(
        "1 min", NO_RUNS, drawings.figure_9,
        [Claim("9", "simplified model: σ = 2 holds λ (within 5 %) and y near 0", model_of_figure_9)],
        about="Figures 9 and 11"),
    "fig12": Experiment(
        "with fig1", CLASSICAL, drawings.panels("alignment"),
        [Claim("12", "greedy aligns u with the top eigenvector (above 0.5)", within, ("greedy", "alignment", 0.5, 1),
               "fig12 tanh")]),
    "fig13": Experiment(
        "6 min", lambda scale: on(["digits", "mlp"], scale, CONSTANT, *POLYAK, *HYPER, cdat(2.0, 2.0625)),
        drawings.panels("loss", "learning_rate", "sharpness"), [
            Claim("13", "Polyak beats CDAT σ = 2", below, ("polyak", "CDAT σ = 2")),
            Claim("13", "σ = 2.0625 at most 10 % above Polyak", below, ("CDAT σ = 2.0625", "polyak", 1.1)),
            Claim("13", "hypergradient at most 10 % above the best constant rate", below,
                  ("hypergradient", "constant", 1.1))]),
    "fig14": Experiment(
        "1 min", mini(CONSTANT, LINESEARCH, GREEDY), drawings.panels("loss", "learning_rate"), [
            Claim("14", "mini-batches: linesearch at most 10 % above the best constant rate", below,
                  ("linesearch", "constant", 1.1)),
            Claim("14", "mini-batches: greedy likewise", below, ("greedy", "constant", 1.1))]),
    "fig15": Experiment(
        "9 min", lambda scale: on(["digits", "mlp"], scale, dict(tuner="exact", sigma=[2.0, 3.0]), CDAT),
        drawings.panels("loss", "learning_rate", "product"), [
            Claim("15", "η = 2/λ is poor: CDAT σ = 2 ends below", below, ("CDAT σ = 2", "exact σ = 2")),
            Claim("15", "η = 3/λ is good: at most 10 % above CDAT σ = 2", below, ("exact σ = 3", "CDAT σ = 2", 1.1))]),
    "fig16": Experiment(
        "with fig5", everywhere("cdat"), drawings.panels("greedy_gain"),
        [Claim("16", "at (nearly) each step the greedy rate lowers the loss most", within,
               ("CDAT σ = 2", "gain", 0.95, 1), "fig16 tanh")]),
    "fig17": Experiment(
        "with fig5", CURVATURE, drawings.panels("alignment", "turn"),
        [Claim("17", "successive updates end up opposed (cosine below −0.5)", within, ("CDAT σ = 2", "turn", -1, -0.5),
               "fig17 tanh")]),
    "fig18": Experiment(
        "7 min", varied, drawings.width_and_depth, [
            Claim("18", "gains grow with width", gains, ("width",)),
            Claim("18", "gains grow with depth", gains, ("depth",)),
            Claim("18", "gains fade with weight decay", gains, ("weight_decay", False))]),
    "fig19": Experiment(
        "9 min", lambda scale: on(["digits"], scale, CONSTANT, *SCHEDULES, cdat(2.0, 2.0625)),
        drawings.panels("loss", "learning_rate"),
        [Claim("19", "a tuned schedule beats CDAT σ = 2", below, ("schedule", "CDAT σ = 2"))]),
    "cost": Experiment(
        "9 min", NO_RUNS, cost.draw,
        [Claim("C.3", "a CDAT step takes 1.5 to 2.5 times that of a constant rate", logged_cost, ("cdat", 1.5, 2.5))]),
    "test": Experiment(
        "with defaults", lambda scale: [dict(tuner=["constant", "greedy", "cdat"], lr=0.1, seed=[0, 1, 2, 3])],
        drawings.at_equal_loss,
        about="asked by readers: do the tuners differ in test loss and accuracy at equal training loss?"),
    "others": Experiment(
        "5 min", lambda scale: on(["cnn", "rnn"], scale, CONSTANT, GREEDY, CDAT),
        drawings.panels("loss", "learning_rate", "product"),
        about="asked by readers: does CDAT σ = 2 beat greedy and the tuned constant rate on a CNN and an RNN?"),
    "averages": Experiment(
        "12 min", lambda scale: on([*SETTINGS[1:], "digits"], scale, CONSTANT, cdat(2.0, beta=[0.0, 0.9, 0.99]),
                                   FEEDBACK | dict(beta=[0.0, 0.9])),
        drawings.panels("loss", "learning_rate"),
        about="ours: do the moving averages help where CDAT and feedback blow up, and what do they cost elsewhere?"),
    "steep": Experiment(
        "2 min", NO_RUNS, drawings.steep,
        about="ours: of which eigenvectors does u consist at the edge, and what does the logged alignment see of it?"),
    "overlay": Experiment(
        "1 min", NO_RUNS, drawings.overlay,
        about="beyond the paper: does the model (4) predict the next sharpness of a real run?"),
    "feedback": Experiment(
        "10 min", rivals, drawings.against("CDAT σ = 2"),
        about="ours: CDAT over the edge and back ends below CDAT σ = 2"),
    "sensitivity": Experiment(
        "6 min", lambda scale: on(["digits"], scale, *(
            FEEDBACK | dict(sigma_high=high, tolerance=tolerance, average=average, steps=600, sharpness_every=600)
            for average in (0.8, 0.9, 0.95) for high in (2.25, 2.5, 3.0, 4.0) for tolerance in (0.0, 0.05, 0.2))),
        drawings.heat("sigma_high", "tolerance", split="average"),
        about="ours: the numbers of the feedback rule need no tuning"),
    "alternatives": Experiment(
        "3 min", NO_RUNS, drawings.alternatives,
        about="ours: does a simpler sign than the average of the loss do as well?"),
    "resets": Experiment(
        "1 min", NO_RUNS, drawings.resets,
        about="ours: a greedy step takes out what had grown along the steepest directions"),
}  # fmt: skip
ALSO = {"fig10": "fig4", "fig11": "fig9", "fig20": "fig8", "fig21": "fig8"}  # figures that are panels of others here



def configs(name, scale="laptop", **flags):
    """The runs of an experiment, as train.configure returns them, each once."""
    found = [config for run in EXPERIMENTS[name].runs(scale) for config in train.configurations(run | flags)]
    return list({train.name_of(config): config for config in found}.values())

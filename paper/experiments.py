"""The experiments: what is trained, under which tuners, what is claimed of it and what measures that, and how it is
drawn.

What this file teaches: an experiment is data, and is written once. It lists tuners on settings (settings.py) and the
paper's claims about them. `python -m paper --list` shows them, `python -m paper fig5` runs one. A new one is an entry
of EXPERIMENTS. Read next: claims.py, which measures the claims; charts.py, drawings.py and rules.py, which draw.
"""

from typing import Callable, NamedTuple

import numpy as np

import plots
import train
from paper import charts, cost, drawings, results, rivals, rules
from paper.claims import (alike, always, at_edge, averages_help, below, best_sigma_by, best_sigmas, gains,
                          less_above_edge, logged_cost, model_above_2, model_of_figure_4, model_of_figure_9,
                          more_on_large, rate_above, ratio, survives, within)  # fmt: skip
from paper.settings import CLASSICAL, EDGE, JUDGED, on, setting_of


def cdat(*sigmas, **more):
    """CDAT at each σ, with more flags."""
    return dict(tuner="cdat", sigma=list(sigmas), **more)


CONSTANT = dict(tuner="constant", lr=lambda grid: grid)
LINESEARCH, FEEDBACK = dict(tuner="linesearch"), dict(tuner="feedback")
BOTH = dict(curvature=["hessian", "gauss-newton"])  # the paper's, and a variant that it names
GREEDY, CDAT = dict(tuner="greedy"), cdat(2.0)
SIGMAS = cdat(2.0, 1.9375, 2.0625, 2.5)
WARM = dict(tuner="schedule", decay="constant", warmup=0.2)  # a constant rate, but for how it is entered
# Deviation: the paper's grid has --shrink 0.9, and --slope 0 with --slack 0, too.
SEARCHES = (dict(tuner="linesearch", slope=[1e-4, 0.5], grow=[4.0, np.inf]),
            dict(tuner="linesearch", slope=0.0, slack=1e-3, grow=[4.0, np.inf]))  # fmt: skip
SCHEDULES = dict(tuner="schedule", warmup=0.1, decay=["linear", "cosine"],
                 lr=lambda grid: [grid[1], 2 * grid[1], 4 * grid[1]])  # fmt: skip
POLYAK = dict(tuner="polyak", lr_max=[1.0, 100.0])
HYPER = dict(tuner="hypergradient", lr=[0.01, 0.05], hyper_rate=[0.01, 0.1])


# ---------------------------------------------------------------------------------------------------- experiments


class Claim(NamedTuple):
    """A claim of the paper, and what measures it."""

    figure: str  # of the paper
    text: str
    measure: Callable  # of the kinds of runs, and of the arguments: see claims.py
    arguments: tuple = ()
    own: list = []  # the paper's settings in this figure, as they are called in LAPTOP; all others are elsewhere
    on: str = ""  # the experiments on whose runs it is measured, where that is not its own alone
    only: dict = {}  # settings that these runs have, where they have them at all
    but: tuple = ()  # the networks of which the paper says the contrary: there it holds where that is measured


class Experiment(NamedTuple):
    """What is run, how it is drawn, and what is claimed of it."""

    time: str  # on two cores, where no run is there yet
    runs: Callable  # runs(scale): dicts from flag to value or values
    draw: Callable  # draw(runs, file), or a chart: draw(kinds, file), which needs results.csv alone
    claims: tuple = ()
    chart: bool = False
    about: str = ""  # what is asked where the paper claims nothing
    reads: bool = False  # whether draw loads data sets by itself, from data_dir
    alone: bool = False  # whether draw(configs, file) trains the runs by itself, and keeps their rows beside the figure


def words(experiment):
    """What is asked and claimed.

    >>> words(Experiment("1 min", None, None, [Claim("1", "it rises", None)], about="ours"))
    'ours; it rises'
    """
    return "; ".join(filter(None, [experiment.about, *(claim.text for claim in experiment.claims)]))


def edge(*tuners):
    """The runs of Figures 5 and 19: under Adam with moving averages, where σ = 1 is CDAT's, since greedy has none."""
    averaged = [cdat(1.0) | BOTH if tuner["tuner"] == "greedy" else tuner for tuner in tuners]
    averaged = [tuner | dict(beta=[0.9, 0.99]) if tuner["tuner"] == "cdat" else tuner for tuner in averaged]
    return lambda scale: on(EDGE[:3], scale, *tuners) + on(EDGE[3:], scale, *averaged)


def mini(settings, *tuners):
    """Tuners on mini-batches of two sizes."""
    sizes = {"layer": {"laptop": [16, 64], "paper": [256, 4096]}, "batches": {"laptop": [32, 128], "paper": [32, 128]}}
    return lambda scale: [run for name in settings for run in on(
        [name], scale, *(tuner | dict(batch_size=sizes[name.split(",")[0]][scale]) for tuner in tuners))]  # fmt: skip


def heats(scale):
    """Figure 7: a grid of σ, β and batch sizes."""
    sizes = {"laptop": [16, 64], "paper": [64, 256, 1024, 4096]}[scale]
    of_digits = cdat(*DIGIT_SIGMAS, batch_size=[8, 32, 128, 0])
    return [*on(["layer, momentum"], scale, cdat(*LAYER_SIGMAS, beta=[0.0, 0.9], batch_size=sizes)),
            *on(["batches, momentum", "batches"], scale, of_digits | dict(beta=[0.0, 0.9]), of_digits | VARIANT)]


def stochastic(scale):
    """Figures 8, 20 and 21: with momentum the grid of Figure 7, with Adam less."""
    grids = {"layer, momentum": LAYER_SIGMAS, "batches, momentum": DIGIT_SIGMAS, "layer, adam": [0.4, 1.0, 2.0],
             "batches, adam": [0.4, 1.0, 1.6, 2.0]}  # fmt: skip
    return [run for name, sigmas in grids.items()
            for run in mini([name], CONSTANT, COSINE, cdat(*sigmas, beta=[0.0, 0.9]))(scale)]  # fmt: skip


def varied(scale):
    """Figure 18: one of width, depth, weight decay and samples at a time."""
    values = dict(width=[16, 64, 256], depth=[1, 2, 4], weight_decay=[0.0, 1e-3, 1e-2], samples=[256, 512, 1024])
    tuners = GREEDY | BOTH, cdat(2.0, 1.9375, 2.0625), CDAT | VARIANT
    return on(["mnist"], scale, *(tuner | {name: value} for tuner in tuners
                                  for name, grid in values.items() for value in grid))  # fmt: skip


def tuning(scale):
    """All that is tuned of the rivals, on the first of the seeds that judge."""
    both = cdat(2.0, 1.9375, 2.0625) | BOTH
    ngn = dict(tuner="ngn", lr=lambda grid: [grid[1], 4 * grid[1], 16 * grid[1]])
    schedules = SCHEDULES | dict(lr=lambda grid: [grid[1], 2 * grid[1], 4 * grid[1], 8 * grid[1]])
    untuned = [dict(tuner=name) for name in rivals.LATER if name != "ngn"]
    others = CONSTANT, schedules, dict(tuner="linesearch", slope=[1e-4, 0.5]), POLYAK, ngn, *untuned, both
    runs = on(JUDGED, scale, *others) + on(JUDGED[-2:], scale, both | dict(beta=0.9))  # as momentum and Adam need it
    return [run | UNMEASURED | dict(seed=JUDGES[0]) for run in runs]


def judged(scale):
    """The feedback rule; and of each rival what came out best there, with all seeds."""
    rows, best = results.read(results.RESULTS), {}
    for config in configs("tuning", scale):
        key = setting_of(vars(config)), config.tuner, vars(config).get("curvature")
        loss = rows.get(results.row_of(config), {}).get("loss", np.inf)
        if key not in best or loss < best[key][0]:
            best[key] = loss, config
    tuned = [vars(config) | dict(seed=JUDGES) for _, config in best.values()]
    return [run | UNMEASURED | dict(seed=JUDGES) for run in on(JUDGED, scale, FEEDBACK)] + tuned


def longer(scale):
    """The feedback rule, the constant rate, the schedule and CDAT, as judged, with twice the steps."""
    kept = [run for run in judged(scale) if run["tuner"] in ("feedback", "constant", "schedule", "cdat")]
    return [run | dict(steps=2 * run["steps"], sharpness_every=100, seed=JUDGES[:3]) for run in kept]


def one_at_a_time(scale):
    """The feedback rule with one of its numbers changed, on three of the settings on which it was found."""
    values = dict(rise=[0.005, 0.02, 0.1], tolerance=[0.02, 0.1, 0.5], growth=[1.1, 1.5, 1e9],
                  sigma_high=[2.25, 3.0, 4.0], average=[0.9, 0.95, 0.98], sigma_low=[1.0, 1.5, 2.0])  # fmt: skip
    runs = on(["digits", "digits, adam", "mixer"], scale, *(FEEDBACK | {name: of} for name, of in values.items()))
    return [run | UNMEASURED | dict(steps=min(run.get("steps", 600), 600)) for run in runs]


DIGITS = ["digits, momentum", "rmsprop", "digits, adam"]
TEN = ["mlp", "fixup", "mixer", "nanolm", "vit", "digits", "tanh", *DIGITS]
JUDGES = [2, 3, 4, 5, 6]  # the seeds
UNMEASURED = dict(no_sharpness=True, sharpness_every=50)  # but for the test loss
NO_RUNS = lambda scale: []  # what such an experiment shows is in no log
VARIANT = dict(curvature="gauss-newton")
COSINE = SCHEDULES | dict(decay="cosine")
RESNET, FOUR = ["resnet", "resnet34"], [*EDGE, "resnet34"]
CLASSIC, FIVE = "fig1 classical tanh resnet34", "fig5 curvatures resnet34"  # the experiments with such runs
SIGMA_1, UHU = ("greedy", "CDAT σ = 1"), dict(curvature="hessian")
LAYER_SIGMAS, DIGIT_SIGMAS = [0.4, 0.6, 1.0, 1.4, 2.0], [0.4, 0.8, 1.0, 1.2, 1.6, 1.8, 2.0, 2.2]

EXPERIMENTS = {
    "defaults": Experiment(
        "4 min", lambda scale: [dict(tuner=["constant", "linesearch", "greedy", "cdat"], lr=0.1, seed=[0, 1, 2, 3])],
        plots.draw, about="CDAT σ = 2 ends lower than a constant rate, and the greedy rule higher"),
    "edges": Experiment(
        "4 min", lambda scale: on(["digits"], scale, dict(tuner="constant", lr=0.1), WARM | dict(lr=0.1),
                                  dict(tuner="constant", lr=[0.1, 0.03], activation="tanh"),
                                  dict(tuner="constant", lr=1e-4, optimizer="rmsprop"),
                                  dict(tuner="constant", lr=0.05, optimizer="momentum"),
                                  WARM | dict(lr=1.0, optimizer="momentum")),
        drawings.edges,
        about="a constant rate ends with ηλ at the edge of its optimizer: 2, and 3.8 for momentum"),
    "tanh": Experiment(
        "8 min", lambda scale: on(["tanh"], scale, CONSTANT, LINESEARCH, GREEDY, SIGMAS),
        drawings.panels("loss", "learning_rate", "sharpness", "product"),
        about="the paper's story on the default data: an MLP that sharpens, with tanh in place of relu"),
    "fig1": Experiment(
        "110 min", lambda scale: on(CLASSICAL, scale, CONSTANT, *SEARCHES, GREEDY | BOTH), drawings.panels("loss"),
        [Claim("1", "linesearch ends above the tuned constant rate", below, ("constant", "linesearch"), CLASSICAL,
               "fig1 classical"),
         Claim("1", "greedy ends above the tuned constant rate", below, ("constant", "greedy"), CLASSICAL,
               "fig1 classical")]),
    "classical": Experiment(
        "55 min", lambda scale: on(["fixup", "mlp", "tanh"], scale, CONSTANT, *SEARCHES, GREEDY | BOTH),
        drawings.panels("loss", "learning_rate", "sharpness", "product"),
        about="Figures 1, 3 and 12 on networks of ours: a ResNet with silent branches, MLPs with relu and with tanh"),
    "fig2": Experiment(
        "2 min", lambda scale: on(["linear"], scale, CONSTANT, LINESEARCH, GREEDY),
        drawings.panels("loss", "learning_rate"),
        [Claim("2", "linesearch does well, at most 10 % (ours) above the best constant rate", below,
               ("linesearch", "constant", 1.1), ["linear"]),
         Claim("2", "greedy likewise", below, ("greedy", "constant", 1.1), ["linear"])]),
    "fig3": Experiment(
        "with fig1", lambda scale: on(["resnet"], scale, CONSTANT, *SEARCHES, GREEDY | BOTH),
        drawings.panels("learning_rate", "sharpness", "product", "grad_norm"),
        [Claim("3", "greedy: η falls", ratio, ("greedy", "rate", 0, 1), RESNET, CLASSIC),
         Claim("3", "linesearch: η falls", ratio, ("linesearch", "rate", 0, 1), RESNET, CLASSIC),
         Claim("3", "greedy: λ rises", ratio, ("greedy", "sharpness", 1, np.inf), RESNET, CLASSIC),
         Claim("3", "linesearch: λ rises", ratio, ("linesearch", "sharpness", 1, np.inf), RESNET, CLASSIC),
         Claim("3", "greedy: ηλ just below the edge (ours: 0.75 to 1 of it)", at_edge, ("greedy", 0.75, 1), RESNET,
               CLASSIC),
         Claim("3", "linesearch likewise", at_edge, ("linesearch", 0.75, 1), RESNET, CLASSIC),
         Claim("3", "constant rate: ηλ settles around the edge (ours: at most 1.15 of it), or ends below", at_edge,
               ("constant", 0, 1.15), RESNET, CLASSIC + " edges"),
         Claim("3", "greedy: ‖g‖ grows less than 10 times", ratio, ("greedy", "grad_norm", 0, 10), RESNET, CLASSIC),
         Claim("3", "linesearch likewise", ratio, ("linesearch", "grad_norm", 0, 10), RESNET, CLASSIC)]),
    "fig4": Experiment(
        "1 min", NO_RUNS, drawings.figure_4,
        [Claim("4", "simplified model: with y fixed below 0 λ runs away (ours: tenfold)", model_of_figure_4)],
        about="Figures 4 and 10"),
    "fig5": Experiment(
        "60 min", edge(CONSTANT, GREEDY | BOTH, SIGMAS | BOTH), drawings.panels("loss", "learning_rate"),
        [Claim("5", "σ = 2 on par (ours: at most 5 % above) with the tuned constant rate", below,
               ("CDAT σ = 2", "constant", 1.05), FOUR, FIVE),
         Claim("5", "σ = 2 always better than σ = 1", below, ("CDAT σ = 2", SIGMA_1), FOUR, FIVE),
         Claim("5", "σ = 2.0625 better than 2; not on the Mixer", below, ("CDAT σ = 2.0625", "CDAT σ = 2"), FOUR, FIVE,
               but=("mixer",)),
         Claim("5", "σ = 2.5 generally diverges (ours: or ends above 2)", below, ("CDAT σ = 2", "CDAT σ = 2.5"), FOUR,
               FIVE),
         Claim("5", "η rises on its own under σ = 2; not on NanoLM", ratio, ("CDAT σ = 2", "rate", 1, np.inf), FOUR,
               FIVE, but=("transformer",)),
         Claim("5", "and above the constant rate; not on NanoLM", rate_above, ("CDAT σ = 2", "constant"), FOUR, FIVE,
               but=("transformer",))]),
    "curvatures": Experiment(
        "2 h", lambda scale: on(TEN, scale, CONSTANT, GREEDY | BOTH, SIGMAS | BOTH), charts.by_curvature("sigma"),
        [Claim("§3", "uᵀHu is positive at each measured step of each seed under greedy (its share)", always,
               (SIGMA_1, "positive"), FOUR, FIVE, UHU),
         Claim("§3", "so it is under CDAT σ = 2", always, ("CDAT σ = 2", "positive"), FOUR, FIVE, UHU)],
        about="with the Gauss-Newton curvature, which the paper names and does not show, CDAT is robust", chart=True),
    "every": Experiment(
        "80 min", lambda scale: on(TEN, scale, CONSTANT, CDAT | BOTH | dict(every=[1, 4, 16])),
        charts.by_curvature("every"),
        about="ours: what does a curvature at every 4th or 16th step alone save, and what does it cost?", chart=True),
    "fig6": Experiment(
        "with fig5", lambda scale: on(["resnet"], scale, CONSTANT, GREEDY | BOTH, SIGMAS | BOTH),
        drawings.panels("sharpness", "product", "grad_norm"),
        [Claim("6", "σ = 2: λ does not rise and falls slightly (ours: to between 0.5 and 1.05 of its start)", ratio,
               ("CDAT σ = 2", "sharpness", 0.5, 1.05), RESNET, FIVE),
         Claim("6", "σ = 2: ηλ slightly above the edge (ours: 1 to 1.3 of it)", at_edge, ("CDAT σ = 2", 1, 1.3), RESNET,
               FIVE),
         Claim("6", "σ = 2: the largest ‖g‖ is that of the constant rate (ours: within 3 times)", alike,
               ("CDAT σ = 2", "constant", "grad_norm", 3), RESNET, FIVE)]),
    "fig7": Experiment(
        "30 min", heats, charts.heat("sigma", "batch_size", split="beta"),
        [Claim("7", "the best σ is smaller for smaller batches", best_sigmas, (), ["layer, momentum"]),
         Claim("7", "at some batch sizes σ = 1 beats 2", below, ("CDAT σ = 1", "CDAT σ = 2"), ["layer, momentum"]),
         Claim("7", "averages are essential: the best σ with β = 0.9 ends below the best without (ours: by whatever)",
               averages_help, ("CDAT",), ["layer, momentum"])], chart=True),
    "fig8": Experiment(
        "30 min", stochastic, charts.against("constant"),
        [Claim("8, 20", "momentum: CDAT may beat the constant rate", below,
               ("CDAT", "constant"), ["layer, momentum"], only=dict(optimizer="momentum")),
         Claim("8, 20", "momentum: on large batches above all (the final loss over the constant rate's falls)",
               more_on_large, ("CDAT", "constant"), ["layer, momentum"], only=dict(optimizer="momentum")),
         Claim("8, 20", "momentum: on par with the schedules or worse (ours: at most 5 % below)", below,
               ("schedule", "CDAT", 1.05), ["layer, momentum"], only=dict(optimizer="momentum")),
         Claim("8, 21", "Adam: on par with the constant rate or worse (likewise)", below, ("constant", "CDAT", 1.05),
               ["layer, adam"], only=dict(optimizer="adam")),
         Claim("8, 21", "Adam: and with the schedules", below, ("schedule", "CDAT", 1.05), ["layer, adam"],
               only=dict(optimizer="adam"))],
        about="Figures 8, 20 and 21, with momentum and with Adam", chart=True),
    "fig9": Experiment(
        "1 min", NO_RUNS, drawings.figure_9,
        [Claim("9", "simplified model: σ = 2 holds y near 0 (ours: 0.05), and 1.9 lets λ grow slowly (ours: less than "
               "twofold)",
               model_of_figure_9),
         Claim("9", "simplified model: each σ > 2 diverges (ours: λ < 0)", model_above_2),
         Claim("9", "real runs at σ = 2.0625 do not (a failure of the model)", survives, ("CDAT σ = 2.0625",), FOUR,
               FIVE)],
        about="Figures 9 and 11"),
    "fig12": Experiment(
        "with fig1", lambda scale: on(CLASSICAL, scale, CONSTANT, *SEARCHES, GREEDY | BOTH),
        drawings.panels("sharpness", "product", "alignment"),
        [Claim("12", "greedy: λ keeps rising, in the second half too", ratio,
               ("greedy", "sharpness", 1, np.inf, "half"), CLASSICAL, "fig1 classical"),
         Claim("12", "linesearch likewise", ratio, ("linesearch", "sharpness", 1, np.inf, "half"), CLASSICAL,
               "fig1 classical"),
         Claim("12", "the constant rate's stabilises (ours: within 1.5 times, up or down)", ratio,
               ("constant", "sharpness", 1 / 1.5, 1.5, "half"), CLASSICAL, "fig1 classical"),
         Claim("12", "greedy: ηλ below the edge, or much less above it than the constant rate's (ours: half as far)",
               less_above_edge, ("greedy", "constant"), CLASSICAL, "fig1 classical"),
         Claim("12", "linesearch likewise", less_above_edge, ("linesearch", "constant"), CLASSICAL, "fig1 classical")]),
    "fig13": Experiment(
        "30 min", lambda scale: on(["resnet", "mlp", "digits"], scale, CONSTANT, POLYAK, HYPER,
                                  cdat(2.0, 2.0625) | BOTH),
        drawings.panels("loss", "learning_rate", "sharpness"),
        [Claim("13", "Polyak beats CDAT σ = 2", below, ("polyak", "CDAT σ = 2"), RESNET),
         Claim("13", "σ = 2.0625 matches Polyak (ours: at most 10 % above)", below, ("CDAT σ = 2.0625", "polyak", 1.1),
               RESNET),
         Claim("13", "hypergradient on par with the constant rate (ours: at most 10 % above)", below,
               ("hypergradient", "constant", 1.1), RESNET),
         Claim("13", "hypergradient sharpens ever on", ratio, ("hypergradient", "sharpness", 1, np.inf, "half"),
               RESNET)]),
    "fig14": Experiment(
        "5 min", mini(["layer", "batches"], CONSTANT, LINESEARCH, GREEDY | BOTH), drawings.panels("loss"),
        [Claim("14", "at medium batches linesearch does well (ours: at most 10 % above the constant rate)", below,
               ("linesearch", "constant", 1.1), ["layer"]),
         Claim("14", "greedy does well, likewise", below, ("greedy", "constant", 1.1), ["layer"]),
         Claim("14", "the two behave alike (ours: losses within 1.5 times)", alike,
               ("linesearch", "greedy", "loss", 1.5), ["layer"])]),
    "fig15": Experiment(
        "15 min", lambda scale: on(["mlp", "digits"], scale, CONSTANT, dict(tuner="exact", sigma=[2.0, 3.0]),
                                  CDAT | BOTH),
        drawings.panels("loss", "learning_rate", "product"),
        [Claim("15", "η = 2/λ is poor against the constant rate", below, ("constant", "exact σ = 2"), ["mlp"]),
         Claim("15", "η = 3/λ is good (ours: at most 5 % above it)", below, ("exact σ = 3", "constant", 1.05),
               ["mlp"])]),
    "fig16": Experiment(
        "6 min", lambda scale: on(["wide"], scale, cdat(1.0, 2.0) | BOTH), drawings.figure_16,
        [Claim("16", "along σ = 1 the greedy rate gains more in a step than the on-edge one (ours: in 95 % of steps)",
               within, ("CDAT σ = 1", "gain", 0.95, 1), ["wide"]),
         Claim("16", "along σ = 2 too", within, ("CDAT σ = 2", "gain", 0.95, 1), ["wide"])], alone=True),
    "fig17": Experiment(
        "with fig5", lambda scale: on(["resnet"], scale, CONSTANT, GREEDY | BOTH, SIGMAS | BOTH),
        drawings.panels("alignment", "turn"),
        [Claim("17", "σ = 2: updates end up opposed (ours: cosine below −0.5)", within,
               ("CDAT σ = 2", "turn", -1, -0.5), RESNET, FIVE),
         Claim("17", "greedy: they do not", within, ("greedy", "turn", -0.5, 1), RESNET, FIVE)]),
    "fig18": Experiment(
        "5 min", varied, charts.width_and_depth,
        [Claim("18", "gains of σ = 2 over σ = 1 grow with width", gains, ("width",), ["mnist"]),
         Claim("18", "they grow with depth", gains, ("depth",), ["mnist"]),
         Claim("18", "they fade with weight decay", gains, ("weight_decay", False), ["mnist"]),
         Claim("18", "the best σ falls slightly below 2 (ours: to 1.9 at least) with depth", best_sigma_by,
               ("depth", True), ["mnist"]),
         Claim("18", "it does not shift with the number of samples", best_sigma_by, ("samples", False), ["mnist"])],
        chart=True),
    "fig19": Experiment(
        "55 min", edge(CONSTANT, SCHEDULES, cdat(2.0, 2.0625, 2.5) | BOTH),
        drawings.panels("loss", "learning_rate"),
        [Claim("19", "a tuned schedule can beat CDAT σ = 2", below, ("schedule", "CDAT σ = 2"), EDGE)]),
    "resnet34": Experiment(
        "15 min on an H100", lambda scale: [run | dict(seed=0) for run in on(
            ["resnet34"], scale, CONSTANT, GREEDY, cdat(2.0, 2.0625) | BOTH)],
        drawings.panels("loss", "learning_rate", "sharpness", "product", "grad_norm", "turn"),
        about="the paper's ResNet34 on 2048 images, one seed: Figures 3, 5, 6 and 17 in its size"),
    "cost": Experiment(
        "9 min", NO_RUNS, cost.draw,
        [Claim("C.3", "a CDAT step takes about twice (ours: 1.5 to 2.5 times) the time of a constant-rate step "
               "(the paper: on ImageNet; here: eight small networks)", logged_cost, ("cdat", 1.5, 2.5)),
         Claim("C.3", "uᵀHu costs about 3 (ours: 2 to 4) evaluations of f in time", logged_cost,
               ("curvature", 2, 4, 2)),
         Claim("C.3", "and in memory, likewise (by the compiler's count)", logged_cost, ("curvature", 2, 4, 3))]),
    "averages": Experiment(
        "55 min", lambda scale: on([*EDGE, "mixer", "vit", "digits"], scale, CONSTANT,
                                   cdat(2.0, beta=[0.0, 0.9, 0.99]) | BOTH),
        drawings.panels("loss", "learning_rate", apart=("sigma", "beta")),
        [Claim("5", "with Adam the averages are necessary, on the full batch too", averages_help, ("CDAT σ = 2",),
               ["vit, adam"], only=dict(optimizer="adam"))],
        about="do the moving averages help where CDAT blows up, and what do they cost elsewhere?"),
    "capped": Experiment(
        "40 min", lambda scale: on(["resnet", "mixer"], scale, CONSTANT, CDAT | BOTH, CDAT | BOTH | dict(lr_max=1.0)) +
        on(["mlp", "fixup", "nanolm", "vit"], scale, CONSTANT, CDAT | VARIANT, CDAT | VARIANT | dict(lr_max=1.0)),
        drawings.panels("loss", "learning_rate", apart=("curvature", "lr_max")),
        about="ours: on a plateau, and at the end, the curvature vanishes; does a largest rate of 1 mend that?"),
    "steep": Experiment(
        "2 min", NO_RUNS, drawings.steep,
        about="ours: of which eigenvectors does u consist at the edge, and what does the logged alignment see of it?"),
    "overlay": Experiment(
        "1 min", NO_RUNS, drawings.overlay,
        about="beyond the paper: does the model (4) predict the next sharpness of a real run?"),
    "tuning": Experiment(
        "80 min", tuning, charts.against("constant"), chart=True,
        about="ours: the rivals of the feedback rule where it is judged, each over its grid, one seed"),
    "feedback": Experiment(
        "105 min", judged, charts.against("constant"), chart=True,
        about="ours: the feedback rule against each rival at its best, on settings that it was not found on"),
    "longer": Experiment(
        "45 min", longer, charts.against("constant"), chart=True,
        about="ours: does that hold with twice the steps?"),
    "sensitivity": Experiment(
        "15 min", one_at_a_time, charts.numbers(
            rise="a, added to σ in a step", tolerance="τ, the rise of the loss that resets σ",
            growth="c, the most by which η grows", sigma_high="σ_high", average="ρ, of the averages",
            sigma_low="σ_low"),
        chart=True, about="ours: the numbers of the feedback rule need no tuning"),
    "model": Experiment(
        "1 min", NO_RUNS, drawings.feedback_in_the_model,
        about="ours: does the simplified model predict what the feedback rule does?"),
    "alternatives": Experiment(
        "5 min", NO_RUNS, rules.alternatives,
        about="ours: do other ways to choose σ do as well as the feedback rule?"),
    "resets": Experiment(
        "1 min", NO_RUNS, rules.resets,
        about="ours: a greedy step takes out what had grown along the steepest directions"),
}  # fmt: skip
ALSO = {"fig10": "fig4", "fig11": "fig9", "fig20": "fig8", "fig21": "fig8"}  # figures that are panels of others here


def configs(name, scale="laptop", **flags):
    """The runs of an experiment, as train.configure returns them, each once."""
    found = [config for run in EXPERIMENTS[name].runs(scale) for config in train.configurations(run | flags)]
    return list({train.name_of(config): config for config in found}.values())

"""Facts about the reproduction: what a step costs by the compiler's count; each experiment can be run, drawn and
judged."""

import doctest
import itertools
import json
import signal
import traceback
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_train import ended, start

import data
import plots
import train
import tuners
from paper import __main__ as paper
from paper import batches, claims, cost, drawings, experiments, graph, questions, results, rivals, settings, terms
from paper.experiments import EXPERIMENTS, Claim, Experiment

# --- What the compiler counts, in a process of its own: it optimizes there as users have it, which takes a while.

MOST = {  # a step under CDAT in constant-rate steps, by the compiler's count: with uᵀHu, and with uᵀGu
    "linear": (1.5, 1.5), "mlp": (1.603, 1.55), "cnn": (2.1, 1.75), "rnn": (2.4, 1.75), "resnet": (2.3, 1.75),
    "mixer": (2.45, 1.75), "vit": (2.45, 1.75), "transformer": (2.45, 1.75),
}  # fmt: skip
STEPS = {"constant": dict(tuner="constant"), "hessian": dict(tuner="cdat"), "feedback": dict(tuner="feedback"),
         "gauss-newton": dict(tuner="cdat", curvature="gauss-newton")}  # fmt: skip
CHUNK = 300


def count():
    """Prints FLOPs: of each family's steps (and its weights), of the parts of the MLP's, and of these in chunks."""
    compiled = train.compiled

    def of_shapes(*args):  # parameters are shapes
        functions = compiled(*args)
        return functions._replace(init=lambda *numbers: jax.eval_shape(functions.init, *numbers))

    of_shapes.cache_info = compiled.cache_info
    train.compiled = of_shapes
    for family in "mixer", "vit", "transformer":  # one block is enough, for the compiler's sake
        cost.FAMILIES[family] = (family, dict(depth=1), *cost.FAMILIES[family][2:])
    cost.FAMILIES["rnn"] = ("rnn", {}, (8,), 64)
    found = {}
    for family in cost.FAMILIES:
        steps = {kind: cost.step_of(family, **flags) for kind, flags in STEPS.items()}
        found[family] = {kind: step.flops for kind, (step, _) in steps.items()}
        _, carry = steps["constant"]
        found[family]["weights"] = sum(leaf.size for leaf in jax.tree.leaves(carry.w))
    chunked = {kind: cost.step_of("mlp", chunk_size=CHUNK, **STEPS[kind])[0].flops for kind in ("constant", "hessian")}
    parts, of_chunk = cost.parts("mlp"), cost.parts("mlp", CHUNK)
    print(json.dumps(found | {"chunked": chunked, "parts": {name: part.flops for name, part in parts.items()},
                              "of a chunk": {name: part.flops for name, part in of_chunk.items()}}))  # fmt: skip


def counted(folder, environment):
    optimized = environment | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "False"}
    return ended(start(optimized, "-c", "import test_paper; test_paper.count()"))


# --- Each experiment, without training; the figures are drawn in a process of their own.

HISTORY = {
    "step": [0, 1, 2], "loss": [2.0, 1.0, 0.5], "learning_rate": [0.1, 0.2, 0.1], "grad_norm": [1.0, 0.5, 0.2],
    "turn": [np.nan, -0.5, -0.9], "sharpness": [20.0, np.nan, 21.0], "alignment": [0.5, np.nan, 0.6],
    "curvature": [5.0, np.nan, -1.0], "test_loss": [2.0, np.nan, 1.0], "test_accuracy": [0.1, np.nan, 0.5],
}  # fmt: skip
HISTORY = {name: np.array(column) for name, column in HISTORY.items()}
DIVERGED = HISTORY | {"loss": np.array([2.0, 10.0, np.inf])}
CLOSE_UPS = {"overlay": dict(first=1, steps=4), "resets": dict(first=1, steps=4),
             "alternatives": dict(steps=2, names=["gd"]), "seconds": dict(seconds_a_step=lambda settings: 1.0),
             "steep": dict(steps=2, count=3, sigmas=[2.0], width=4, depth=1),
             "range": dict(steps=5, models={"κ": (1.0, (0.1, 1.0))}),
             "terms": dict(settings={"tanh": (dict(steps=6, activation="tanh", samples=32, width=4), [0.1])},
                           edges=[2.0], seeds=[0]),
             "graph": dict(kinds={"greedy": tuners.greedy()}, seeds=[0], steps=10),
             "batches": dict(noisy={"mlp": (dict(samples=32, width=4, steps=4), [4])}, optimizers=["momentum"],
                             grid=[2.0], seeds=[0])}  # fmt: skip
FIGURES = [name for name in EXPERIMENTS if name != "cost"]  # which takes minutes
WITHOUT_RUNS = ("fig4", "fig9", "model", "overlay", "resets", "alternatives", "steep", "range", "terms", "graph",
                "batches")  # fmt: skip


def draw(name, file):
    """Draws the figure of an experiment, laid out but for the pixels: how many panels it has, how many are empty."""
    found, filled = experiments.configs(name), []
    two = list(dict.fromkeys(settings.setting_of(vars(config)) for config in found))[:2]  # each is a column
    runs = [plots.Run(vars(config) | {"run": results.row_of(config), "name": results.label_of(config)},
                      DIVERGED if k == 1 else HISTORY)
            for k, config in enumerate(found)
            if config.seed == 0 and settings.setting_of(vars(config)) in two]  # fmt: skip
    if EXPERIMENTS[name].chart:
        row = dict(loss=0.5, loss_first=2.0)
        runs = results.kinds_of(found, {results.row_of(config): row for config in found})
    if EXPERIMENTS[name].alone:
        few = dict(samples=32, width=4, depth=1, steps=4, sharpness_every=2)
        runs = train.configurations(few | dict(sigma=[1.0, 2.0], seed=[0, 1]))

    def save(figure, file, **_):
        figure.draw_without_rendering()
        file.touch()
        for axis in figure.axes:
            lines = [line for line in axis.lines if line.get_transform() == axis.transData]  # but that of the edge
            filled.append(bool(lines or axis.collections or axis.images or axis.patches))

    plots.Figure.savefig = save  # for good: this is a process of its own
    EXPERIMENTS[name].draw(runs, file, **CLOSE_UPS.get(name, {}))
    return {"panels": len(filled), "empty": filled.count(False)}


def draw_all(folder):
    """Prints what came of each figure: its panels, or how it failed."""
    found = {}
    for name in FIGURES:
        try:
            found[name] = draw(name, Path(folder, f"{name}.png"))
        except Exception:
            found[name] = {"failed": traceback.format_exc()}
    print(json.dumps(found))


def drawn(folder, environment):
    code = "import sys, test_paper; test_paper.draw_all(sys.argv[1])"
    no_room = "error:constrained_layout not applied"  # else a warning that nobody reads: a panel has no room
    return ended(start(environment, "-W", no_room, "-c", code, folder))


JOBS = counted, drawn


def test_runs_of_several_settings_are_columns_each_with_its_own_edge(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "finish", lambda figure, axes, file: figures.append(figure))
    runs = [plots.Run(vars(train.configure(optimizer=name)), HISTORY) for name in ("gd", "adam")]
    drawings.grid(runs, tmp_path / "figure.png", ["loss", "product"])
    loss, _, *products = figures[0].axes
    assert loss.get_title("left") == "mlp\ndigits" and loss.get_ylabel() == "training loss"
    assert [text.get_text() for axis in products for text in axis.texts] == ["edge 2", "edge 38"]


def test_every_run_of_every_experiment_has_a_row_of_its_own():
    rows = {}  # by the file that they are in
    for name, experiment in EXPERIMENTS.items():
        file = paper.figure_of(name).with_suffix(".csv") if experiment.alone else paper.RESULTS
        rows.setdefault(file, set()).update(results.row_of(config) for config in experiments.configs(name))
    assert len(rows[paper.RESULTS]) > 500
    assert all(names == set(results.read(file)) for file, names in rows.items())  # all that is committed, and no more


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """An experiment of two tuners with two seeds, with results of its own."""
    runs = lambda scale: [dict(tuner=["constant", "cdat"], samples=32, width=4, depth=1, steps=6, sharpness_every=5,
                               seed=[0, 1])]  # fmt: skip
    claim = Claim("1", "a", claims.below, ("CDAT σ = 2", "constant"), ["digits"])
    monkeypatch.setattr(paper, "FIGURES", tmp_path)
    monkeypatch.setattr(paper, "RESULTS", tmp_path / "results.csv")
    others = dict(EXPERIMENTS)
    EXPERIMENTS.clear()
    EXPERIMENTS["tiny"] = Experiment("0 min", runs, plots.draw, [claim])
    yield
    EXPERIMENTS.clear()
    EXPERIMENTS.update(others)  # in their order


def test_an_experiment_leaves_a_row_a_run_and_replaces_those_of_as_many_steps(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paper, "TARGETS", {"mlp, digits": 1e9})
    for _ in range(2):
        paper.main(["tiny", "--out", str(tmp_path / "runs")])
    rows = results.read(paper.RESULTS)
    assert len(rows) == 4 and (tmp_path / "tiny.png").exists()
    for name, row in rows.items():
        history = plots.load_run(tmp_path / "runs" / name.removesuffix("-steps6")).history
        assert row["loss"] == pytest.approx(history["loss"][-5:].mean(), 1e-3)
        assert row["sharpness_first"] == pytest.approx(history["sharpness"][0], 1e-3)
        assert row["rate"] == pytest.approx(plots.geometric(history["learning_rate"]), 1e-3)  # of six steps
        assert row["positive"] == np.mean(history["curvature"][[0, 5]] > 0)
        assert row["reach"] == 0  # the target is above the first loss
    assert "| CDAT σ = 2 |" in capsys.readouterr().out
    shorter = EXPERIMENTS["tiny"]._replace(runs=lambda scale: [dict(samples=32, width=4, depth=1, steps=3)])
    EXPERIMENTS["tiny"] = shorter
    paper.main(["tiny", "--out", str(tmp_path / "others")])
    assert len(results.read(paper.RESULTS)) == 5 and results.read(paper.RESULTS).items() >= rows.items()
    whole = paper.RESULTS.read_bytes()
    with data.owned(paper.RESULTS.parent), pytest.raises(SystemExit):  # of another experiment, which writes now
        paper.main(["tiny", "--out", str(tmp_path / "others")])
    assert "another process is at work" in capsys.readouterr().err and paper.RESULTS.read_bytes() == whole


def test_figure_16_trains_its_runs_by_itself_once_and_keeps_their_rows_beside_it(tiny, tmp_path, monkeypatch):
    runs = lambda scale: [dict(sigma=[1.0, 2.0], samples=32, width=4, depth=1, steps=4, sharpness_every=2)]
    EXPERIMENTS["tiny"] = Experiment("0 min", runs, drawings.figure_16, alone=True)
    paper.main(["tiny"])
    rows, whole = results.read(tmp_path / "tiny.csv"), (tmp_path / "tiny.csv").read_bytes()
    assert not paper.RESULTS.exists() and [kind.label for kind in paper.kinds("tiny")] == ["CDAT σ = 1", "CDAT σ = 2"]
    greedy, on_edge = (train.train(config) for config in experiments.configs("tiny", out=str(tmp_path)))
    for row, history in zip(rows.values(), (greedy, on_edge), strict=True):
        assert row["loss"] == pytest.approx(plots.final_loss(history), 1e-3)
        assert row["gain_0"] == pytest.approx(on_edge["loss"][1] - greedy["loss"][1], 1e-3)  # both from one point
    monkeypatch.setattr(drawings, "trained", None)  # nothing is trained again
    (tmp_path / "tiny.png").unlink()
    paper.main(["tiny"])
    assert (tmp_path / "tiny.png").exists() and (tmp_path / "tiny.csv").read_bytes() == whole


def test_train_is_the_command_line_of_train_py_with_the_rivals(tmp_path, capsys, monkeypatch):
    flags = "--tuner polyak --samples 32 --width 4 --depth 1 --steps 3 --no-plot --out".split()
    paper.main(["train", *flags, str(tmp_path)])
    assert "polyak" in capsys.readouterr().out
    monkeypatch.setattr(train, "train", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit):
        paper.main(["train", *flags, str(tmp_path)])
    assert "go on with: python -m paper train --tuner polyak" in capsys.readouterr().out.splitlines()[-1]


def write(losses):
    """Results of the tiny experiment: the final losses of both seeds of both tuners; all began at a loss of 9."""
    names = [results.row_of(config) for config in experiments.configs("tiny")]
    lines = [f"{name},9,{loss}" for name, loss in zip(names, losses, strict=True)]
    paper.RESULTS.write_text("\n".join(["run,loss_first,loss", *lines]) + "\n")


def test_a_verdict_holds_in_all_settings_in_some_or_in_none_the_papers_apart_from_others(tiny, monkeypatch, capsys):
    assert "| a | – | – | – |" in paper.verdicts()
    write([3, 5, 3, 4])
    paper.main(["claims"])
    assert "| **holds**: mlp 3.5 / 4 | – | – |" in capsys.readouterr().out
    write([3, 5, 3, "inf"])
    assert "| **fails**: mlp inf / 4 | – | – |" in paper.verdicts()
    both = Claim("1", "a", lambda kinds: [("a, x", "1", True), ("a, y", "2", False)] if kinds else [])
    excepted = both._replace(but=("a, y",))
    EXPERIMENTS["tiny"] = EXPERIMENTS["tiny"]._replace(claims=[both, excepted])
    assert "| – | **1 of 2**: a, x 1; a, y 2 | – |" in paper.verdicts()
    assert "| – | **holds**: a, x 1; a, y 2 | – |" in paper.verdicts()


def test_claims_come_in_the_order_of_the_figures_and_name_experiments_that_there_are():
    claims = [claim for experiment in EXPERIMENTS.values() for claim in experiment.claims]
    assert {name for claim in claims for name in claim.on.split()} <= set(EXPERIMENTS)
    asked = [claim for claim in claims if claim.figure == "asked"]
    report = (paper.HERE / "README.md").read_text()  # whose tables test_readme.py makes anew
    table = report.split("<!-- claims: all -->")[1].split("<!-- end -->")[0]
    figures = [line.split(" | ")[0].strip("| ") for line in table.strip().splitlines()[2:]]
    numbers = [int(figure.split(",")[0]) for figure in figures if figure[0].isdigit()]
    assert len(figures) == len(claims) > 50 and numbers == sorted(numbers)
    assert figures[len(numbers) :] == ["§3", "§3", "C.3", "C.3", "C.3", *len(asked) * ["asked"]]
    assert {name for claim in claims for name in claim.own} <= set(settings.LAPTOP)


def test_every_claim_can_be_measured_before_anything_has_run(monkeypatch):
    monkeypatch.setattr(paper, "kinds", lambda name: [])
    beside_figures = [claim for name in "terms range graph batches general seconds".split()
                      for claim in EXPERIMENTS[name].claims]  # fmt: skip
    measured_without_runs = 6 + len(beside_figures)  # three of the model, and the costs of a step and of a curvature
    claims = sum(len(experiment.claims) for experiment in EXPERIMENTS.values())
    assert paper.verdicts().count("| – | – | – |") == claims - measured_without_runs


@pytest.mark.parametrize("name", ["fig1", "classical", "fig2", "fig5", "fig8", "fig13", "fig14", "fig15", "resnet34"])
def test_the_constant_rates_bracket_the_best(name):
    losses = {}  # by setting, then by rate
    for kind in paper.kinds(name):
        if kind.config.tuner == "constant":
            losses.setdefault(kind.setting, {})[kind.config.lr] = results.median(kind, "loss")
    for setting, of_setting in losses.items():
        assert min(of_setting) < min(of_setting, key=of_setting.get) < max(of_setting), setting


def test_a_label_is_not_the_beginning_of_a_longer_number(tiny):
    write([3, 5, 3, 4])
    assert set(claims.by_setting(paper.kinds("tiny"), "CDAT σ = 2")) == {"mlp, digits"}
    assert claims.by_setting(paper.kinds("tiny"), "constant 0") == {}


def test_a_matrix_counts_wins_and_losses_and_what_blew_up(tiny):
    write([3, 5, 3, 11])
    text = results.matrix(paper.kinds("tiny"), ours="constant")
    assert "| **4 (3 to 5)** | 7 (3 to 11), 1 of 2 blew up |" in text and "CDAT, uᵀHu 1 (0)" in text


def test_both_curvatures_stand_side_by_side_and_a_claim_is_measured_with_each(tiny, monkeypatch):
    runs = lambda scale: [dict(tuner=["constant", "cdat"], seed=[0, 1], curvature=["hessian", "gauss-newton"], steps=6)]
    EXPERIMENTS["tiny"] = EXPERIMENTS["tiny"]._replace(runs=runs)
    write([3, 5, 2, 1, 11, 2])  # of CDAT: both curvatures with the first seed, then with the second
    assert "| mlp, digits | 4 | 6.5× → 1.5 |" in results.pairs(paper.kinds("tiny"), "sigma")
    assert "| **fails**: mlp 6.5 / 4 | – | **holds**: mlp 1.5 / 4 |" in paper.verdicts()
    of_hessian = EXPERIMENTS["tiny"].claims[0]._replace(only=dict(curvature="hessian"))
    EXPERIMENTS["tiny"] = EXPERIMENTS["tiny"]._replace(claims=[of_hessian])
    assert "| **fails**: mlp 6.5 / 4 | – | – |" in paper.verdicts()


def kind(label, setting="a", config=None, **columns):
    """A kind of runs of three seeds, each column a number or a list."""
    columns = {name: np.broadcast_to(values, 3) for name, values in ({"loss": 1} | columns).items()}
    rows = [{name: float(values[seed]) for name, values in columns.items()} for seed in range(3)]
    base = dict(tuner="cdat" if "CDAT" in label else label.split()[0], optimizer="gd", batch_size=0)
    return results.Kind(setting, SimpleNamespace(**base | (config or {})), label, rows)


MEASURED = [  # what measures a claim, its arguments, kinds of runs, what it says, whether the claim holds
    (claims.within, ("CDAT σ = 2", "turn", -1, -0.5), [kind("CDAT σ = 2", turn=[-0.9, -0.2, -0.6])], "-0.6", True),
    (claims.always, ("greedy", "positive"), [kind("greedy", positive=[1, 1, 1])], "1", True),
    (claims.always, ("greedy", "positive"), [kind("greedy", positive=[1, 0.9, 1])], "0.9", False),
    (claims.within, ("greedy", "turn", -1, 1), [kind("greedy", turn=[0, np.nan, 0])], "nan", False),
    (claims.within, ("CDAT σ = 2", "turn", 0, 1), [kind("CDAT σ = 2, beta 0.9", turn=-1, loss=2),
                                                   kind("CDAT σ = 2", turn=1)], "1", True),  # of the lower one
    (claims.ratio, ("greedy", "rate", 0, 1), [kind("greedy", rate=1, rate_first=4)], "× 0.25", True),
    (claims.ratio, ("greedy", "sharpness", 1, 9, "half"), [kind("greedy", sharpness=1, sharpness_half=2)], "× 0.5",
     False),
    (claims.at_edge, ("greedy", 0.75, 1), [kind("greedy", product=1.8)], "1.8 (2)", True),
    (claims.at_edge, ("greedy", 0.75, 1), [kind("greedy", config=dict(optimizer="momentum", momentum=0.9),
                                                product=1.8)], "1.8 (3.8)", False),
    (claims.alike, ("linesearch", "greedy", "loss", 2), [kind("linesearch", loss=1), kind("greedy", loss=3)], "1 / 3",
     False),
    (claims.less_above_edge, ("greedy", "constant"), [kind("greedy", product=2.4), kind("constant", product=3)],
     "2.4 / 3", True),
    (claims.less_above_edge, ("greedy", "constant"), [kind("greedy", product=2.4), kind("constant", product=1)],
     "2.4 / 1", False),
    (claims.survives, ("CDAT σ = 2",), [kind("CDAT σ = 2", loss=[1, np.inf, 1], loss_first=2)], "1 of 3 blew up",
     False),
    (claims.averages_help, ("CDAT",), [kind("CDAT σ = 2", config=dict(beta=0.0), loss=3),
                                       kind("CDAT σ = 1", config=dict(beta=0.9), loss=1)], "1 / 3", True),
    (claims.rate_above, ("CDAT σ = 2", "constant"), [kind("CDAT σ = 2", rate=3), kind("constant 0.1", rate=0.1)],
     "3 / 0.1", True),
]  # fmt: skip


@pytest.mark.parametrize("measure, arguments, kinds, text, holds", MEASURED)
def test_a_claim_is_measured_by_medians_over_the_seeds(measure, arguments, kinds, text, holds):
    assert measure(kinds, *arguments) == [("a", text, holds)]


def test_what_was_measured_for_no_seed_is_not_judged():
    assert claims.within([kind("greedy", turn=np.nan)], "greedy", "turn", -1, 1) == []
    assert claims.always([kind("greedy", positive=np.nan)], "greedy", "positive") == []


def test_the_best_sigma_is_found_by_batch_size_over_all_averages():
    of = lambda sigma, beta, size, loss: kind(f"CDAT σ = {sigma}", config=dict(
        sigma=sigma, beta=beta, batch_size=size, model="mlp"), loss=loss)  # fmt: skip
    kinds = [of(2.0, 0.0, 8, 3), of(1.0, 0.9, 8, 1), of(2.0, 0.0, 0, 1), of(1.0, 0.0, 0, 2)]
    assert claims.best_sigmas(kinds) == [("mlp", "batch 8: 1 (β 0.9), all: 2", True)]
    assert claims.best_sigmas(kinds[2:]) == [("mlp", "batch all: 2", False)]


def test_gains_and_best_sigmas_are_by_what_varies_all_else_as_usual():
    of = lambda label, width, depth, loss, sigma: kind(label, config=dict(
        width=width, depth=depth, samples=8, weight_decay=0.0, sigma=sigma), loss=loss)  # fmt: skip
    kinds = [of("greedy", 4, 1, 2, 1.0), of("greedy", 4, 2, 9, 1.0), of("greedy", 8, 1, 3, 1.0)]
    kinds += [of("CDAT σ = 2", 4, 1, 1, 2.0), of("CDAT σ = 2", 4, 2, 9.5, 2.0), of("CDAT σ = 2", 8, 1, 1, 2.0)]
    assert claims.gains(kinds, "width") == [("width", "4: × 2, 8: × 3", True)]
    assert claims.gains(kinds, "width", False) == [("width", "4: × 2, 8: × 3", False)]
    assert claims.best_sigma_by(kinds, "depth", True) == [("depth", "1: 2, 2: 1", False)]  # it falls too far
    assert claims.best_sigma_by(kinds[:1], "depth", False) == claims.gains(kinds[:1], "depth") == []
    assert claims.best_sigma_by(kinds, "width", False) == [("width", "4: 2, 8: 2", True)]


def test_of_a_searched_tuner_the_best_kind_alone_is_measured():
    kinds = [kind("constant 0.1", loss=2), kind("constant 0.2", loss=1), kind("greedy", loss=5)]
    assert results.tuned(kinds) == kinds[1:]


def test_an_unknown_experiment_is_one_line(capsys):
    with pytest.raises(SystemExit):
        paper.main(["fig99"])
    assert "'fig99'" in (message := capsys.readouterr().err) and message.count("\n") == 1


@pytest.mark.parametrize("module", [batches, claims, drawings, experiments, graph, results, rivals, settings])
def test_examples_in_docstrings_run(module):
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed


def test_a_file_of_results_that_is_not_what_was_written_is_one_line_and_stays_as_it_is(tmp_path):
    file, row = tmp_path / "results.csv", dict(loss=1.0, rate=0.5)
    results.write(file, {"a": row, "b": row})
    whole = file.read_text()
    assert results.read(file) == {"a": row, "b": row}
    for broken in (whole.replace("b,1,0.5", "b,1"), whole.replace("b,1,0.5", "<<<<<<< HEAD"), whole + "\n",
                   whole.replace("0.5\nb", "x\nb"), whole + "c,1,0.5,9\n"):  # fmt: skip
        file.write_text(broken)
        with pytest.raises(ValueError, match="results.csv: line . is not 2 numbers after a name"):
            results.read(file)
    file.write_text(whole)
    with pytest.raises(ValueError, match="columns"):
        results.write(file, results.read(file) | {"c": row | {"more": 1.0}})
    assert file.read_text() == whole


# --- Questions.


def test_n_and_d_from_another_batch_are_right_in_the_mean_and_on_the_full_batch_those_of_cdat():
    rng = np.random.default_rng(0)
    h, w, noise = rng.normal(size=(5, 5)), rng.normal(size=5), rng.normal(size=(10_000, 2, 5))
    h = h @ h.T
    f = lambda w, shift: w @ h @ w / 2 + shift @ w  # a batch shifts the gradient
    with jax.enable_x64(True):
        gradient = jax.jit(jax.vmap(jax.grad(f), (None, 0)))
        u = -gradient(w, noise[:, 0])
        two = jax.jit(jax.vmap(lambda shift, u: batches.two_batch(lambda w: f(w, shift), w, u)))
        n, d = np.array(two(noise[:, 1], u))
        n_same, d_same = np.array(two(noise[:, 0], u))
        whole = np.array(batches.two_batch(lambda w: f(w, np.zeros(5)), w, -h @ w))
    exact, error = (h @ w) @ (h @ w), 4 * n.std() / 100  # of a mean over 10,000
    assert abs(n.mean() - exact) < error and error < 0.1 * exact
    assert abs(n_same.mean() - exact - 5) < error  # of the same batch: tr Σ = 5 too much
    np.testing.assert_allclose(d, np.einsum("bi,ij,bj->b", u, h, u), rtol=1e-12)
    np.testing.assert_allclose(d, d_same)
    np.testing.assert_allclose(whole, [exact, h @ w @ h @ h @ w], rtol=1e-12)


def test_the_noise_of_a_batch_is_the_trace_of_the_covariance_of_the_gradients_of_samples():
    run, samples = batches.parts((("samples", 6), ("width", 2), ("depth", 1)), "gd")
    w = run.init(jax.random.key(0))[0]
    take = lambda *rows: jax.tree.map(lambda a: a[np.array(rows)], samples)
    flat = lambda g: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g)])
    each = np.array([flat(run.gradient(w, take(k))[1]) for k in range(6)])
    _, g = run.gradient(w, samples)
    pairs = [run.noise(w, g, take(*rows))[0] for rows in itertools.combinations(range(6), 2)]  # all batches of two
    assert 2 * np.mean(pairs) / (1 - 2 / 6) == pytest.approx(np.trace(np.cov(each.T)), 1e-4)


def test_steps_are_counted_by_what_the_loss_does_after_them():
    lam, tau, kappa = 4.0, 2.0, 3.0
    ahead = [[t, 0.6, 1.0, 0.1, lam, tau, kappa, 0.1 + lam * s + tau * s**2 / 2 + kappa * s**3 / 6]
             for t, s in ((0, -0.06), (5, -0.06), (10, -0.06))]  # fmt: skip
    losses = np.array([1.0] * 10 + [2.0, 19.0, 21.0])
    row = terms.counted(np.array(ahead), losses, ahead=8)
    assert row["held"] == 1 and row["lost"] == 2  # from step 5 on the loss reaches ten times that of step 5
    assert row["held_kappa"] == 1 and row["lost_s"] == 0 and row["error_4"] == pytest.approx(0, abs=1e-12)
    assert row["error_2"] > row["error_3"] > 0
    assert terms.counted(np.array(ahead[:2]), np.append(losses[:10], np.inf), ahead=8)["held"] == 1


def test_the_graph_network_stands_on_the_seven_files_alone():
    lines = Path(graph.__file__).read_text().splitlines()
    assert len(lines) <= 120 and not any("paper" in line for line in lines if line.startswith(("import", "from")))
    a = graph.neighbours(np.random.default_rng(0).normal(size=(30, 3)), k=4)
    degrees = (a > 0).sum(0)
    np.testing.assert_allclose(a, a.T)
    np.testing.assert_allclose(a * np.sqrt(np.outer(degrees, degrees)), a > 0)
    assert degrees.min() >= 5 and (np.diag(a) > 0).all()


def test_at_one_training_loss_runs_are_compared_at_the_first_step_that_has_it():
    history = {name: np.full(5, np.nan) for name in ("test_loss", "test_accuracy", "sharpness")}
    history |= {"step": np.arange(5), "loss": np.array([4.0, 3.0, 2.5, 1.9, 2.1])}
    for name, values in ("test_loss", [8, 4]), ("test_accuracy", [0.1, 0.5]), ("sharpness", [20, 40]):
        history[name][[0, 4]] = values
    found = questions.at_level(plots.Run({}, history), 2.0)
    between = {"level": 2, "test_loss": 5, "test_accuracy": 0.4, "sharpness": 35}  # two measurements
    assert found == pytest.approx(between)
    assert np.isnan([*questions.at_level(plots.Run({}, history), 1.0).values()][1:]).all()


def test_verdicts_of_questions_are_measured_from_the_rows_beside_the_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FIGURES", tmp_path)
    monkeypatch.setattr(batches, "NOISY", {"mlp": ({}, [4])})
    monkeypatch.setattr(batches, "STOCHASTIC", ["gd"])
    assert batches.two_batches_do([]) == batches.noise_tells([]) == questions.flatter_is_better([]) == []
    assert questions.best_on_a_graph([], "greedy") == terms.sign_tells([], "CDAT") == []
    assert terms.terms_predict([], "CDAT") == questions.sooner([], "greedy") == []
    for setting, reach in ("mlp", 2.0), ("rnn", np.inf):
        rows = {f"{setting}; constant with its grid": dict(reach=3.0), f"{setting}; greedy": dict(reach=reach)}
        results.write(tmp_path / "seconds.csv", results.rows_of("seconds") | rows)
    assert questions.sooner([], "greedy") == [("mlp", "2 s / 3 s", True), ("rnn", "inf s / 3 s", False)]
    name = lambda sigma, ahead: batches.row_name("mlp", "gd", 4, sigma, 0.0, ahead, 0)
    losses = {name(1.2, False): 1.0, name(2.0, False): 3.0, name(2.0, True): 1.05}
    losses |= {key.replace("β 0", "β 0.9"): loss + 1 for key, loss in losses.items()}
    results.write(tmp_path / "batches.csv", {key: dict(loss=loss, noise=4.0) for key, loss in losses.items()})
    assert batches.two_batches_do([]) == [("mlp gd", "4: × 1.1", True)]
    assert batches.noise_tells([]) == [("mlp gd", "4: 1 / 1.2", True)]  # 2 / (1 + 4 / 4)
    rows = {f"mlp; run {k}; seed 0": dict(test_loss=k, sharpness=k**2) for k in range(1, 5)}
    results.write(tmp_path / "general.csv", rows | {"mlp; feedback; seed 0": dict(test_loss=9, sharpness=0)})
    (whole, first), (without, second) = [row[1:] for row in questions.flatter_is_better([])]
    assert whole == "0.00 of 5 runs" and without == "1.00 of 4 runs" and (first, second) == (False, True)
    rows = {"greedy; seed 0": 0.9, "greedy; seed 1": 0.8, "constant 1; seed 0": 0.85, "constant 2; seed 0": 0.1}
    results.write(tmp_path / "graph.csv", {key: dict(test_accuracy=value) for key, value in rows.items()})
    assert questions.best_on_a_graph([], "greedy") == [("graph", "85.0% / 85.0%", True)]
    row = dict(held=9, held_s=9, held_kappa=1, lost=5, lost_s=0, lost_kappa=0, error_2=0.2, error_4=0.1)
    results.write(tmp_path / "terms.csv", {"tanh; CDAT σ = 2; seed 0": row})
    assert terms.sign_tells([], "CDAT") == [("tanh", "1 of 9, 0 of 5", True)]
    assert terms.sign_tells([], "CDAT", "kappa") == [("tanh", "0.11 of 9, 0 of 5", False)]
    assert terms.terms_predict([], "CDAT") == [("tanh", "0.2 → 0.1", True)]


# --- What came out of the two processes.


def printed(job):
    """What a process has printed last."""
    code, out, err = job.result()
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.fixture
def flops(aside):
    return printed(aside["counted"])


def test_a_step_at_a_constant_rate_costs_at_most_2_2_forward_passes(flops):
    forward, constant = flops["parts"]["forward"], flops["mlp"]["constant"]
    assert 2 * forward < constant <= 2.2 * forward


@pytest.mark.parametrize("family", cost.FAMILIES)
def test_a_curvature_shares_the_forward_pass_and_computes_equal_tangents_once(flops, family):
    constant, hessian, gauss_newton = (flops[family][kind] for kind in ("constant", "hessian", "gauss-newton"))
    assert 1.3 * constant < hessian <= MOST[family][0] * constant
    assert 1.3 * constant < gauss_newton <= MOST[family][1] * constant


@pytest.mark.parametrize("family", cost.FAMILIES)
def test_the_feedback_rule_costs_little_more_than_the_curvature_that_it_takes(flops, family):
    constant, feedback, gauss_newton = (flops[family][kind] for kind in ("constant", "feedback", "gauss-newton"))
    assert feedback <= max(1.501, MOST[family][1]) * constant
    assert 0 < feedback - gauss_newton <= 14 * flops[family]["weights"]  # 4 or 5 each; JAX 0.8 counts up to 14
    if jax.__version_info__ >= (0, 10):
        assert feedback <= 1.001 * gauss_newton


def test_chunks_cost_5_percent_more_in_a_gradient_step_and_a_forward_pass_more_in_a_cdat_step(flops):
    more = (2048 - 1) // CHUNK - 1  # the analysis counts the body of a loop once; the last chunk is beside the loop
    gradient, curvature = flops["of a chunk"]["gradient"], flops["of a chunk"]["curvature"]
    assert flops["chunked"]["constant"] + more * gradient <= 1.05 * flops["mlp"]["constant"]
    cdat = flops["chunked"]["hessian"] + more * (gradient + curvature)
    assert cdat <= flops["mlp"]["hessian"] + flops["parts"]["forward"]


@pytest.mark.parametrize("name", FIGURES)
def test_the_runs_of_an_experiment_are_configurations_at_both_scales_and_its_figure_is_drawn(aside, name):
    found = {scale: experiments.configs(name, scale) for scale in ("laptop", "paper")}
    assert bool(found["laptop"]) == bool(found["paper"]) == (name not in WITHOUT_RUNS)
    assert all(config.steps <= 2000 for config in found["laptop"])
    assert len(experiments.words(EXPERIMENTS[name])) > 20
    figure = printed(aside["drawn"])[name]
    assert "failed" not in figure, figure["failed"]
    assert figure["panels"] > 0 and figure["empty"] == 0

"""Facts about the reproduction: what a step costs by the compiler's count; each experiment can be run, drawn and
judged."""

import doctest

import numpy as np
import pytest

import data
import plots
import train
from paper import __main__ as paper
from paper import cost, experiments, results
from paper.experiments import EXPERIMENTS, Claim, Experiment


def test_a_step_at_a_constant_rate_costs_at_most_2_2_forward_passes_and_a_cdat_step_1_7_of_those(optimized):
    forward = cost.parts("mlp")["forward"].flops
    constant, cdat = (cost.step_of("mlp", tuner)[0].flops for tuner in ("constant", "cdat"))
    assert 2 * forward < constant <= 2.2 * forward
    assert 1.3 * constant < cdat <= 1.7 * constant  # the forward pass is shared by gradient and curvature


def test_chunks_cost_5_percent_more_in_a_gradient_step_and_a_forward_pass_more_in_a_cdat_step(optimized, size=300):
    forward = cost.parts("mlp")["forward"].flops
    chunk, trips = cost.parts("mlp", samples=size), (2048 - 1) // size  # each beside the last, smaller chunk

    def flops(tuner, *bodies):  # the analysis counts the body of a loop once
        chunked = cost.step_of("mlp", tuner, chunk_size=size)[0].flops
        return chunked + (trips - 1) * sum(chunk[body].flops for body in bodies)

    assert flops("constant", "gradient") <= 1.05 * cost.step_of("mlp", "constant")[0].flops
    assert flops("cdat", "gradient", "curvature") <= cost.step_of("mlp", "cdat")[0].flops + forward


# --- Each experiment, without training.

HISTORY = {
    "step": [0, 1, 2], "loss": [2.0, 1.0, 0.5], "learning_rate": [0.1, 0.2, 0.1], "grad_norm": [1.0, 0.5, 0.2],
    "turn": [np.nan, -0.5, -0.9], "sharpness": [20.0, np.nan, 21.0], "alignment": [0.5, np.nan, 0.6],
    "test_loss": [2.0, np.nan, 1.0], "test_accuracy": [0.1, np.nan, 0.5], "greedy_gain": [0.1, np.nan, -0.1],
}  # fmt: skip
HISTORY = {name: np.array(column) for name, column in HISTORY.items()}
DIVERGED = HISTORY | {"loss": np.array([2.0, 10.0, np.inf])}
CLOSE_UPS = {"overlay": dict(first=1, steps=4), "resets": dict(first=1, steps=4),
             "alternatives": dict(steps=2, names=["gd"]),
             "steep": dict(steps=2, count=3, sigmas=[2.0], width=4, depth=1)}  # fmt: skip
WITHOUT_RUNS = ("fig4", "fig9", *CLOSE_UPS)


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "cost"])  # which takes minutes
def test_the_runs_of_an_experiment_are_configurations_at_both_scales_and_its_figure_is_drawn(tmp_path, name):
    found = {scale: experiments.configs(name, scale) for scale in ("laptop", "paper")}
    assert bool(found["laptop"]) == bool(found["paper"]) == (name not in WITHOUT_RUNS)
    assert all(config.steps <= 2000 for config in found["laptop"])
    assert len(experiments.words(EXPERIMENTS[name])) > 20
    two = list(dict.fromkeys(plots.setting_of(vars(config)) for config in found["laptop"]))[:2]  # each is a column
    runs = [plots.Run(vars(config) | {"run": results.row_of(config), "name": results.label_of(config)},
                      DIVERGED if k == 1 else HISTORY)
            for k, config in enumerate(found["laptop"])
            if config.seed == 0 and plots.setting_of(vars(config)) in two]  # fmt: skip
    EXPERIMENTS[name].draw(runs, tmp_path / "figure.png", **CLOSE_UPS.get(name, {}))
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_every_run_of_every_experiment_has_a_row_of_its_own():
    rows = {results.row_of(config) for name in EXPERIMENTS for config in experiments.configs(name)}
    assert len(rows) > 500 and rows == set(results.read(paper.RESULTS))  # all that is committed, and no more


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """An experiment of two tuners with two seeds, with results of its own."""
    runs = lambda scale: [dict(tuner=["constant", "cdat"], samples=32, width=4, depth=1, steps=6, sharpness_every=5,
                               seed=[0, 1])]  # fmt: skip
    claim = Claim("1", "a", results.below, ("CDAT σ = 2", "constant"))
    monkeypatch.setattr(paper, "FIGURES", tmp_path)
    monkeypatch.setattr(paper, "RESULTS", tmp_path / "results.csv")
    for name in list(EXPERIMENTS):
        monkeypatch.delitem(EXPERIMENTS, name)
    monkeypatch.setitem(EXPERIMENTS, "tiny", Experiment("0 min", runs, plots.draw, [claim]))


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
        assert row["rate"] == pytest.approx(history["learning_rate"][-1], 1e-3)
        assert row["reach"] == 0  # the target is above the first loss
    assert "| CDAT σ = 2 |" in capsys.readouterr().out
    shorter = EXPERIMENTS["tiny"]._replace(runs=lambda scale: [dict(samples=32, width=4, depth=1, steps=3)])
    monkeypatch.setitem(EXPERIMENTS, "tiny", shorter)
    paper.main(["tiny", "--out", str(tmp_path / "others")])
    assert len(results.read(paper.RESULTS)) == 5 and results.read(paper.RESULTS).items() >= rows.items()
    whole = paper.RESULTS.read_bytes()
    with data.owned(paper.RESULTS.parent), pytest.raises(SystemExit):  # of another experiment, which writes now
        paper.main(["tiny", "--out", str(tmp_path / "others")])
    assert "another process is at work" in capsys.readouterr().err and paper.RESULTS.read_bytes() == whole


def write(losses):
    """Results of the tiny experiment: the final losses of both seeds of both tuners; all began at a loss of 9."""
    names = [results.row_of(config) for config in experiments.configs("tiny")]
    lines = [f"{name},9,{loss}" for name, loss in zip(names, losses, strict=True)]
    paper.RESULTS.write_text("\n".join(["run,loss_first,loss", *lines]) + "\n")


def test_a_verdict_holds_in_all_settings_in_some_or_in_none(tiny, monkeypatch, capsys):
    assert "not run" in paper.verdicts()
    write([3, 5, 3, 4])
    paper.main(["claims"])
    assert "CDAT σ = 2 / constant in mlp: 3.5 / 4 | holds |" in capsys.readouterr().out
    write([3, 5, 3, "inf"])
    assert "mlp: inf / 4 | does not hold |" in paper.verdicts()
    both = Claim("1", "a", lambda kinds: [("a, x", "1", True), ("a, y", "2", False)])
    monkeypatch.setitem(EXPERIMENTS, "tiny", EXPERIMENTS["tiny"]._replace(claims=[both]))
    assert "a, x: 1; a, y: 2 | holds partly (1 of 2)" in paper.verdicts()


def test_claims_come_in_the_order_of_the_figures_and_name_experiments_that_there_are():
    claims = [claim for experiment in EXPERIMENTS.values() for claim in experiment.claims]
    assert {name for claim in claims for name in claim.on.split()} <= set(EXPERIMENTS)
    figures = [line.split(" | ")[0].strip("| ") for line in paper.verdicts().splitlines()[2:]]
    assert len(figures) == len(claims) > 30 and figures[-1] == "C.3"
    assert figures[:-1] == sorted(figures[:-1], key=int)


def test_every_claim_can_be_measured_before_anything_has_run(monkeypatch):
    monkeypatch.setattr(paper, "kinds", lambda name: [])
    assert paper.verdicts().count("not run") > 25


def test_a_label_is_not_the_beginning_of_a_longer_number(tiny):
    write([3, 5, 3, 4])
    assert set(results.by_setting(paper.kinds("tiny"), "CDAT σ = 2")) == {"mlp, digits"}
    assert results.by_setting(paper.kinds("tiny"), "constant 0") == {}


def test_a_matrix_counts_wins_and_losses_and_what_blew_up(tiny):
    write([3, 5, 3, 11])
    text = results.matrix(paper.kinds("tiny"), ours="constant")
    assert "| **4 (3 to 5)** | 7 (3 to 11), 1 of 2 blew up |" in text and "CDAT σ = 2 1 (0)" in text


def test_an_unknown_experiment_is_one_line(capsys):
    with pytest.raises(SystemExit):
        paper.main(["fig99"])
    assert "'fig99'" in (message := capsys.readouterr().err) and message.count("\n") == 1


@pytest.mark.parametrize("module", [experiments, results])
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

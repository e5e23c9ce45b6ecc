"""Facts about the experiments: what a step costs by the compiler's own count, and that each of them can be run and drawn."""

import dataclasses

import numpy as np
import pytest

import cost
import experiments
import plots
import train


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

TINY_LOG = """step,loss,learning_rate,grad_norm,turn,sharpness,alignment,test_loss,test_accuracy,greedy_gain
0,2.0,0.1,1.0,nan,20.0,0.5,2.0,0.1,0.1
1,1.0,0.2,0.5,-0.5,nan,nan,nan,nan,nan
2,0.5,0.1,0.2,-0.9,21.0,0.6,1.0,0.5,-0.1
"""


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_the_runs_of_an_experiment_are_configurations_at_both_scales_and_its_figure_is_drawn(tmp_path, name):
    experiment = experiments.EXPERIMENTS[name]
    found = {scale: [c for given in experiment.runs(scale) for c in train.configurations(given)] for scale in ("laptop", "paper")}
    assert bool(found["laptop"]) == bool(found["paper"]) == (name not in ("fig4", "fig9", "overlay"))
    assert all(config.steps <= 2000 for config in found["laptop"])
    (tmp_path / "metrics.csv").write_text(TINY_LOG)
    history = plots.read_metrics(tmp_path / "metrics.csv")
    diverged = history | {"loss": np.array([2.0, 10.0, np.inf])}
    runs = [(dataclasses.asdict(config) | {"run": train.name_of(config), "label": plots.labels([vars(config)])[0], "status": "diverged" if k == 1 else "done"},
             diverged if k == 1 else history)
            for k, config in enumerate(found["laptop"]) if config.seed == 0]  # fmt: skip
    if name == "overlay":
        experiment.draw(runs, tmp_path / "figure.png", first=1, steps=4)
    else:
        experiment.draw(runs, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_an_experiment_leaves_a_row_for_each_run_and_replaces_its_own(tmp_path, monkeypatch, capsys):
    tiny = lambda scale: [dict(tuner=["constant", "cdat"], samples=32, width=4, depth=1, steps=6, sharpness_every=5)]
    monkeypatch.setattr(experiments, "FIGURES", tmp_path)
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results.csv")
    monkeypatch.setitem(experiments.EXPERIMENTS, "tiny", experiments.Experiment("a claim", "0 min", tiny, plots.draw))
    for _ in range(2):
        experiments.main(["tiny", "--out", str(tmp_path / "runs")])
    rows = experiments.results("tiny")
    assert [row["label"] for row in rows] == ["constant 0.1", "CDAT σ = 2"] and (tmp_path / "tiny.png").exists()
    for row in rows:
        history = plots.load_run(tmp_path / "runs" / row["run"])[1]
        assert float(row["loss"]) == pytest.approx(history["loss"][-5:].mean(), 1e-3)
        assert float(row["sharpness_first"]) == pytest.approx(history["sharpness"][0], 1e-3)
        assert float(row["rate"]) == pytest.approx(history["learning_rate"][-1], 1e-3)
    assert "| CDAT σ = 2 |" in capsys.readouterr().out


def write(file, rows):
    """Results of an experiment fig1 in two settings: (setting, label, loss of two seeds)."""
    lines = [",".join(experiments.COLUMNS)]
    for setting, label, *losses in rows:
        lines += [f"fig1,{setting},{label},{label},{seed},done,9,{loss}" + ",1" * 10 for seed, loss in enumerate(losses)]
    file.write_text("\n".join(lines) + "\n")


def test_a_verdict_holds_in_all_settings_in_some_or_in_none(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results.csv")
    claim = ("1", "a", lambda: experiments.below("fig1", "CDAT σ = 2", "constant"))
    monkeypatch.setattr(experiments, "CLAIMS", [claim])
    rows = [("a", "constant 0.1", 3, 5), ("a", "constant 0.2", 9, 9), ("a", "CDAT σ = 2", 3, 4), ("a", "CDAT σ = 2.5", 0, 0)]
    for second, verdict in (1, "| holds |"), (99, "| holds partly |"):
        write(tmp_path / "results.csv", [*rows, ("b", "constant 0.1", 3, 5), ("b", "CDAT σ = 2", second, second)])
        assert "a: 3.5 against 4" in experiments.claims() and verdict in experiments.claims()
    write(tmp_path / "results.csv", [("a", "constant 0.1", 3, 5), ("a", "CDAT σ = 2", 3, "inf")])
    assert "| does not hold |" in experiments.claims()


def test_an_unknown_experiment_is_one_line(capsys):
    with pytest.raises(SystemExit):
        experiments.main(["fig99"])
    assert "'fig99'" in (message := capsys.readouterr().err) and message.count("\n") == 1

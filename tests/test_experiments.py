"""Facts about the experiments: what a step costs by the compiler's own count, and that each of them can be run and drawn."""

import dataclasses

import numpy as np
import pytest

import cost
import experiments
import plots
import results
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


WITHOUT_RUNS = ("fig4", "fig9", "overlay", "resets", "alternatives")


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_the_runs_of_an_experiment_are_configurations_at_both_scales_and_its_figure_is_drawn(tmp_path, name):
    found = {scale: experiments.configs(name, scale) for scale in ("laptop", "paper")}
    assert bool(found["laptop"]) == bool(found["paper"]) == (name not in WITHOUT_RUNS)
    assert all(config.steps <= 2000 for config in found["laptop"])
    two = list(dict.fromkeys(plots.setting_of(vars(config)) for config in found["laptop"]))[:2]  # settings are many columns
    (tmp_path / "metrics.csv").write_text(TINY_LOG)
    history = plots.read_metrics(tmp_path / "metrics.csv")
    diverged = history | {"loss": np.array([2.0, 10.0, np.inf])}
    runs = [(dataclasses.asdict(config) | {"run": train.name_of(config), "name": results.label_of(config),
                                           "status": "diverged" if k == 1 else "done"}, diverged if k == 1 else history)
            for k, config in enumerate(found["laptop"]) if config.seed == 0 and plots.setting_of(vars(config)) in two]  # fmt: skip
    shorter = {"overlay": dict(first=1, steps=4), "resets": dict(first=1, steps=4), "alternatives": dict(steps=2, names=["gd"])}
    experiments.EXPERIMENTS[name].draw(runs, tmp_path / "figure.png", **shorter.get(name, {}))
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_every_run_of_every_experiment_has_a_name_of_its_own():
    configs = {config for name in experiments.EXPERIMENTS for config in experiments.configs(name)}
    assert len({train.name_of(config) for config in configs}) == len(configs) > 500


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """An experiment of two runs, with results of its own."""
    runs = lambda scale: [dict(tuner=["constant", "cdat"], samples=32, width=4, depth=1, steps=6, sharpness_every=5, seed=[0, 1])]
    monkeypatch.setattr(experiments, "FIGURES", tmp_path)
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results.csv")
    monkeypatch.setitem(experiments.EXPERIMENTS, "tiny", experiments.Experiment("a claim", "0 min", runs, plots.draw))


def test_an_experiment_leaves_a_row_for_each_run_and_replaces_its_own(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "TARGETS", {"mlp, digits": 1e9})
    for _ in range(2):
        experiments.main(["tiny", "--out", str(tmp_path / "runs")])
    rows = results.read(experiments.RESULTS)
    assert len(rows) == 4 and (tmp_path / "tiny.png").exists()
    for name, row in rows.items():
        history = plots.load_run(tmp_path / "runs" / name)[1]
        assert row["loss"] == pytest.approx(history["loss"][-5:].mean(), 1e-3)
        assert row["sharpness_first"] == pytest.approx(history["sharpness"][0], 1e-3)
        assert row["rate"] == pytest.approx(history["learning_rate"][-1], 1e-3)
        assert row["reach"] == 0  # the target is above the first loss
    assert "| CDAT σ = 2 |" in capsys.readouterr().out


def write(losses):
    """Results of the tiny experiment: the final losses of both seeds of both tuners; all began at a loss of 9."""
    names = [train.name_of(config) for config in experiments.configs("tiny")]
    lines = [f"{name},9,{loss}" for name, loss in zip(names, losses, strict=True)]
    experiments.RESULTS.write_text("\n".join(["run,loss_first,loss", *lines]) + "\n")


def test_a_verdict_holds_in_all_settings_in_some_or_in_none(tiny, monkeypatch):
    claim = ("1", "a", results.below, "tiny", "CDAT σ = 2", "constant")
    monkeypatch.setattr(results, "CLAIMS", [claim])
    verdicts = lambda: results.claims(experiments.kinds)
    assert "not run" in verdicts()
    write([3, 5, 3, 4])
    assert "CDAT σ = 2 / constant in mlp: 3.5 / 4 | holds |" in verdicts()
    write([3, 5, 3, "inf"])
    assert "mlp: inf / 4 | does not hold |" in verdicts()
    monkeypatch.setattr(results, "CLAIMS", [("1", "a", lambda kinds: [("a, x", "1", True), ("a, y", "2", False)], "")])
    assert "a, x: 1; a, y: 2 | holds partly (1 of 2)" in verdicts()


def test_every_claim_can_be_measured_before_anything_has_run():
    assert results.claims(lambda name: experiments.EXPERIMENTS[name] and []).count("not run") > 25


def test_a_label_is_not_the_beginning_of_a_longer_number(tiny):
    write([3, 5, 3, 4])
    assert set(results.by_setting(experiments.kinds("tiny"), "CDAT σ = 2")) == {"mlp, digits"}
    assert results.by_setting(experiments.kinds("tiny"), "constant 0") == {}


def test_a_matrix_counts_wins_and_losses_and_what_blew_up(tiny):
    write([3, 5, 3, 11])
    text = results.matrix(experiments.kinds("tiny"), ours="constant")
    assert "| **4 (3 to 5)** | 7 (3 to 11), 1 of 2 blew up |" in text and "CDAT σ = 2 1 (0)" in text


def test_an_unknown_experiment_is_one_line(capsys):
    with pytest.raises(SystemExit):
        experiments.main(["fig99"])
    assert "'fig99'" in (message := capsys.readouterr().err) and message.count("\n") == 1

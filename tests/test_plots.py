import json

import matplotlib
import numpy as np
import pytest

import plots

CONFIG = {"tuner": "cdat", "sigma": 2.0, "optimizer": "gd", "status": "done", "seed": 0}


def write_run(folder, config, rows):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.csv").write_text("step,loss,learning_rate,sharpness\n" + "".join(rows))
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", CONFIG, ["0,2.5,0.1,20.0\n", "1,2.25,0.1,nan\n"])


def test_a_run_is_read_back_as_its_settings_and_a_column_an_array(run):
    config, history = plots.load_run(run)
    assert config == CONFIG
    assert history["loss"].tolist() == [2.5, 2.25]
    np.testing.assert_array_equal(history["sharpness"], [20.0, np.nan])


def test_a_run_without_rows_has_empty_columns(tmp_path):
    run = write_run(tmp_path / "empty", CONFIG, [])
    assert plots.load_run(run)[1]["loss"].shape == (0,)


@pytest.mark.parametrize("optimizer, edge", [("gd", 2), ("rmsprop", 2), ("momentum", 3.8), ("adam", 38)])
def test_the_edge_is_that_of_the_optimizer_by_a_simulated_quadratic(optimizer, edge):
    config = {"optimizer": optimizer, "momentum": 0.9, "beta1": 0.9}
    assert plots.edge(config) == pytest.approx(edge)

    def end(product):  # |x| after 3000 steps on ½ λ x² with ηλ = product and a fixed preconditioner of 1
        x, m = 1.0, 0.0
        for _ in range(3000):
            m = {"momentum": 0.9 * m + x, "adam": 0.9 * m + 0.1 * x}.get(optimizer, x)
            x -= product * m
        return abs(x)

    assert end(0.99 * edge) < 1e-3 and end(1.01 * edge) > 10


def test_labels_name_the_tuner_and_only_what_differs():
    cdat = [{"tuner": "cdat", "sigma": sigma, "optimizer": "gd", "seed": 1} for sigma in (1.9375, 2.0)]
    assert plots.labels(cdat) == ["CDAT σ = 1.9375", "CDAT σ = 2"]
    both = [{"tuner": "greedy", "optimizer": o} for o in ("gd", "adam")]
    assert plots.labels(both) == ["greedy, gd", "greedy, adam"]
    sizes = [{"tuner": "constant", "lr": 0.1, "batch_size": size} for size in (0, 64)]
    assert plots.labels(sizes) == ["constant 0.1, batch 0", "constant 0.1, batch 64"]
    searches = [{"tuner": "linesearch", "slope": slope} for slope in (1e-4, 0.5)] + [{"tuner": "greedy", "slope": 0.1}]
    assert plots.labels(searches) == ["linesearch, slope 0.0001", "linesearch, slope 0.5", "greedy"]


@pytest.fixture
def figure(monkeypatch):
    """What was drawn last."""
    seen = {}
    monkeypatch.setattr(plots.plt, "close", lambda figure: seen.update(figure=figure))
    return lambda: seen["figure"]


def test_a_figure_of_one_setting_has_a_line_for_each_kind_of_run_its_band_and_its_edge(run, tmp_path, figure):
    config, history = plots.load_run(run)
    higher = history | {"loss": 2 * history["loss"]}
    other = {**config, "tuner": "greedy", "status": "diverged"}
    plots.draw([(config, history), ({**config, "seed": 1}, higher), (other, history)], tmp_path / "f.png")
    assert [text.get_text() for text in figure().legends[0].get_texts()] == ["CDAT σ = 2", "greedy"]
    loss, rate, sharpness, product = figure().axes
    assert loss.get_yscale() == rate.get_yscale() == "log"
    assert [text.get_text() for text in product.texts] == ["edge 2"]
    assert [line.get_marker() for line in loss.lines] == ["None", "x", "None"]  # where greedy diverged
    np.testing.assert_allclose(loss.lines[0].get_ydata(), 1.5 * history["loss"])  # the median of the seeds
    assert loss.collections[0].get_datalim(loss.transData).height == pytest.approx(5 - 2.25)  # from lowest to highest
    assert tuple(loss.lines[0].get_color()) == matplotlib.colors.to_rgb(plots.COLORS["cdat"])
    np.testing.assert_allclose(product.lines[0].get_ydata(), [2.0])  # ηλ where λ was measured
    assert (tmp_path / "f.png").read_bytes()[1:4] == b"PNG"


def test_a_run_whose_rates_are_all_zero_or_that_has_no_rows_is_drawn(run, tmp_path):
    config, history = plots.load_run(run)
    for nothing in (history | {"learning_rate": 0 * history["loss"]}, {key: values[:0] for key, values in history.items()}):
        plots.draw([(config, nothing)], tmp_path / "f.png")
        plots.draw([(config | {"status": "diverged"}, nothing)], tmp_path / "f.png")


def test_runs_of_several_settings_are_columns_each_with_its_own_edge(run, tmp_path, figure):
    config, history = plots.load_run(run)
    adam = {**config, "optimizer": "adam", "beta1": 0.9}
    plots.draw([(config, history), (adam, history)], tmp_path / "f.png")
    assert len(figure().axes) == 8
    assert [text.get_text() for axis in figure().axes[-2:] for text in axis.texts] == ["edge 2", "edge 38"]


def test_kinds_of_runs_of_one_tuner_have_shades_of_its_colour(run, tmp_path, figure):
    config, history = plots.load_run(run)
    plots.draw([({**config, "sigma": sigma}, history) for sigma in (2.0, 1.9, 2.1)], tmp_path / "f.png")
    lines = figure().axes[0].lines
    assert len({tuple(line.get_color()) for line in lines}) == len({line.get_linestyle() for line in lines}) == 3


def test_every_tuner_has_a_colour_of_its_own():
    import tuners

    assert set(tuners.TUNERS) <= set(plots.COLORS)
    assert len(set(plots.COLORS.values())) == len(plots.COLORS)


def test_the_command_line_overlays_runs_and_says_where(run, tmp_path, capsys):
    plots.main([str(run), str(run), "-o", str(tmp_path / "two.png")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "two.png")
    assert (tmp_path / "two.png").exists()


@pytest.mark.parametrize("broken", ["no config", "cut config", "no settings", "cut row", "no text", "not a folder"])
def test_a_broken_run_is_one_line_that_names_it(run, tmp_path, capsys, broken):
    if broken == "no config":
        (run / "config.json").unlink()
    elif broken == "cut config":
        (run / "config.json").write_text('{"tuner": "cd')
    elif broken == "no settings":
        (run / "config.json").write_text("{}")
    elif broken == "no text":
        (run / "metrics.csv").write_bytes(b"step,loss\n\xff")
    elif broken == "cut row":
        (run / "metrics.csv").write_text("step,loss,learning_rate,sharpness\n0,2.5,0.1,20.0\n1,2.")
    folder = run / "config.json" if broken == "not a folder" else run
    with pytest.raises(SystemExit) as end:
        plots.main([str(folder), "-o", str(tmp_path / "f.png")])
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1 and str(run) in message
    assert not (tmp_path / "f.png").exists()

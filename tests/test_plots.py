"""Facts about what is shown of logged runs: read back, told on the way, labelled, compared in a table, drawn."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb

import plots
import tuners

NAN = np.nan
SETTINGS = {"tuner": "cdat", "sigma": 2.0, "optimizer": "gd", "seed": 0, "steps": 6}
HISTORY = {
    "step": np.arange(6.0),
    "loss": np.array([8.0, 3, 1, 2, 1, 3]),
    "learning_rate": np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
    "sharpness": np.array([20.0, NAN, NAN, 2, NAN, NAN]),
    "test_accuracy": np.array([0.25, NAN, NAN, 0.5, NAN, NAN]),
}
FACTS = {"status": "done", "seconds": 7.4}


def run(settings={}, **columns):
    return plots.Run(SETTINGS | settings, HISTORY | columns, FACTS)


@pytest.fixture
def folder(tmp_path):
    """A run folder."""
    (tmp_path / "run").mkdir()
    columns = {f"history/{name}": column.astype(np.float32) for name, column in HISTORY.items()}
    np.savez(tmp_path / "run" / "checkpoint.npz", settings=json.dumps(SETTINGS), facts=json.dumps(FACTS), **columns)
    return tmp_path / "run"


def test_a_run_is_read_back_as_its_settings_its_facts_and_an_array_a_column_as_it_was_logged(folder):
    settings, history, facts = plots.load_run(folder)
    assert settings == SETTINGS and facts == FACTS and list(history) == list(HISTORY)
    for name, column in HISTORY.items():
        np.testing.assert_array_equal(history[name], column.astype(np.float32), strict=True)  # of that dtype, too


@pytest.mark.parametrize("optimizer, edge", [("gd", 2), ("rmsprop", 2), ("momentum", 3.8), ("adam", 38)])
def test_the_edge_is_that_of_the_optimizer_by_a_simulated_quadratic(optimizer, edge):
    assert plots.edge({"optimizer": optimizer, "momentum": 0.9, "beta1": 0.9}) == pytest.approx(edge)

    def end(product):  # |x| after 3000 steps on ½ λ x² with ηλ = product and a fixed preconditioner of 1
        x, m = 1.0, 0.0
        for _ in range(3000):
            m = {"momentum": 0.9 * m + x, "adam": 0.9 * m + 0.1 * x}.get(optimizer, x)
            x -= product * m
        return abs(x)

    assert end(0.99 * edge) < 1e-3 and end(1.01 * edge) > 10


def row(step, rate, sharpness=NAN):
    return dict(step=step, loss=np.float32(1.2345e-5), learning_rate=np.float32(rate), sharpness=np.float32(sharpness))


def test_the_line_on_a_terminal_renews_itself_within_eighty_columns_up_to_a_million_slow_steps(capsys, monkeypatch):
    seconds = iter([0, 15, 59880, 1e7, 1e7, 1e7])
    monkeypatch.setattr(plots.time, "time", lambda: next(seconds))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    report = plots.progress(1_000_000)
    report([])
    for done in 1, 500_001, 500_001, 500_001, 1_000_000:
        report([row(done - 1, 1.2345e-5, -1.0e-3)])
    start, first, soon, late, later, last = lines = capsys.readouterr().out.split("\r")[1:]
    assert {len(line.rstrip("\n")) for line in lines} == {79}
    assert [line[-1] == "\n" for line in lines] == [*5 * [False], True]
    assert start.strip() == "compiling ..."
    assert first.strip() == "1/1000000 loss 1.234e-05 rate 1.23e-05 product -1.23e-08"
    assert soon.startswith("500001/1000000") and last.startswith("1000000/1000000")
    monkeypatch.setenv("COLUMNS", "30")
    report([row(999_999, 1.0)])
    assert len(capsys.readouterr().out.strip("\r\n")) == 29
    times = [line.split(", ", 1)[1].strip() for line in (soon, late, later, last)]
    assert times == ["0:00:15 left", "16:38:00 left", "115 days, 17:46:", "0:00:00 left"]


def test_elsewhere_each_tenth_is_a_line_with_the_mean_rate_of_ten_steps_and_nothing_that_was_not_measured(capsys):
    report = plots.progress(1_000_000)
    measured = [row(190_000 + t, 99.0) for t in range(9)] + 4 * [row(200_000, 0.5, 4.0), row(200_001, 0.125, 8.0)]
    measured += [row(200_002, 8.0), row(200_003, 2.0)]
    for rows in [], [row(0, 0.5), row(100_000, 0.25)], measured, [row(250_000, 7.0)], [row(300_000, 7.0)]:
        report(rows)
    start, first, *later = lines = capsys.readouterr().out.splitlines()
    assert start == "compiling ..." and first.strip().endswith("rate 0.354") and max(map(len, lines)) <= 80
    assert [line.split("/")[0].strip() for line in later] == ["200004", "300001"]
    assert "rate 0.435    product 3.48" in later[0]  # (2⁻⁴ 8⁻⁴ 8 2)^(1/10), and that × 8
    assert "rate 7        product 56" in later[1]


def test_labels_name_the_tuner_and_only_what_differs():
    cdat = [{"tuner": "cdat", "sigma": sigma, "optimizer": "gd", "seed": 1} for sigma in (1.9375, 2.0)]
    assert plots.labels(cdat) == ["CDAT σ = 1.9375", "CDAT σ = 2"]
    both = [{"tuner": "greedy", "optimizer": o} for o in ("gd", "adam")]
    assert plots.labels(both) == ["greedy, gd", "greedy, adam"]
    sizes = [{"tuner": "constant", "lr": 0.1, "batch_size": size} for size in (0, 64)]
    assert plots.labels(sizes) == ["constant 0.1, batch 0", "constant 0.1, batch 64"]
    preset = [{"tuner": "greedy", "preset": preset} for preset in ("", "nanolm")]
    assert plots.labels(preset) == ["greedy", "greedy, nanolm"]
    longer = [{"tuner": "greedy", "steps": 9}, {"tuner": "cdat", "sigma": 2.0, "steps": 99}]
    assert plots.labels(longer) == ["greedy, steps 9", "CDAT σ = 2, steps 99"]
    searches = [{"tuner": "linesearch", "slope": slope} for slope in (1e-4, 0.5)] + [{"tuner": "greedy", "slope": 0.1}]
    assert plots.labels(searches) == ["linesearch, slope 0.0001", "linesearch, slope 0.5", "greedy"]


def test_the_table_has_means_of_the_last_steps_what_was_last_measured_a_star_and_what_diverged():
    better = run({"tuner": "constant", "lr": 0.1}, loss=HISTORY["loss"] / 4)
    worse = run({"tuner": "greedy", "seed": 1}, loss=np.array([9.0, 8, 7, 6, 5, NAN]))
    header, first, best, last, diverged = lines = plots.table([run(), better, worse])
    assert header.split() == "run loss raised rate sharpness product test time".split()
    assert first.split() == "CDAT σ = 2, seed 0 2 2 0.299 2 1.53 50.0% 7 s".split()
    assert best.split() == "constant 0.1, seed 0 * 0.5 2 0.299 2 1.53 50.0% 7 s".split()
    assert last.split() == "greedy, seed 1 inf 0 0.299 2 1.53 50.0% 7 s".split()
    assert diverged == "greedy, seed 1 diverged: its loss is not finite at step 5" and max(map(len, lines)) <= 80
    assert "*" not in "".join(plots.table([run()]) + plots.table([worse, worse]))


@pytest.fixture
def figure(monkeypatch, tmp_path):
    """The figure that `draw` makes of some runs; it is not rendered."""
    saved = []

    def save(figure, file, **_):
        file.touch()
        saved.append(figure)

    monkeypatch.setattr(plots.Figure, "savefig", save)
    return lambda *runs, **words: plots.draw(list(runs), tmp_path / "figure.png", **words) and saved[-1]


def test_a_figure_of_one_setting_has_a_line_for_each_kind_of_run_its_band_and_its_edge(figure):
    greedy = run({"tuner": "greedy"}, loss=np.array([9.0, 8, 7, 6, 5, NAN]))
    drawn = figure(run(), run({"seed": 1}, loss=2 * HISTORY["loss"]), greedy)
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["CDAT σ = 2", "greedy"]
    loss, rate, sharpness, product = drawn.axes
    assert loss.get_yscale() == rate.get_yscale() == "log"
    assert [text.get_text() for text in product.texts] == ["edge 2"]
    assert [line.get_marker() for line in loss.lines] == ["None", "x", "None"]  # where greedy diverged
    np.testing.assert_allclose(loss.lines[0].get_ydata(), 1.5 * HISTORY["loss"])  # the median of the seeds
    (band,) = loss.collections[0].get_paths()
    assert (band.vertices[:, 1].min(), band.vertices[:, 1].max()) == pytest.approx((1, 16))  # from lowest to highest
    assert tuple(loss.lines[0].get_color()) == to_rgb(plots.COLORS["cdat"])
    np.testing.assert_allclose(product.lines[0].get_ydata(), [2.0, 2.8, 2.4, 0.8, 1.0, 1.2])  # λ is 20, 14, 8, 2, 2, 2


def test_a_product_is_of_each_rate_as_where_rates_alternate_and_a_mean_is_geometric():
    step = np.arange(41.0)
    history = dict(step=step, learning_rate=np.where(step % 2, 1.0, 4.0), sharpness=np.where(step % 20, NAN, 1 + step))
    products = plots.products(history)
    np.testing.assert_allclose(products[:4], [4.0, 2.0, 12.0, 4.0])
    assert plots.geometric(products[[0, 1, 2, 3]]) == pytest.approx(384 ** (1 / 4))
    assert plots.geometric(np.array([NAN, 2.0, 8.0])) == pytest.approx(4) and plots.geometric(np.zeros(2)) == 0
    assert np.isnan(plots.products(history | {"sharpness": NAN * step})).all() and np.isnan(plots.geometric(NAN * step))


def test_numbers_on_a_log_axis_are_plain_and_a_line_that_leaves_a_panel_has_a_triangle_there(figure):
    figure_ = figure(run(loss=np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])))
    assert figure_.axes[0].yaxis.get_minor_formatter()(0.5) == "0.5"
    away = run(loss=np.array([1.0, 2.0, 3.0, 50.0, 60.0, 70.0]))
    (line, mark) = figure(away).axes[0].lines
    assert mark.get_marker() == "^" and mark.get_xdata() == [3] and mark.get_ydata() == [4.0]


@pytest.mark.parametrize("loss", [[1.0, 1.0], [1.0, NAN], []])
def test_a_run_whose_rates_are_all_zero_or_that_has_no_rows_is_drawn(loss, figure, recwarn):
    columns = {name: np.zeros(len(loss)) for name in HISTORY} | {"loss": np.array(loss)}
    assert len(figure(run(**columns)).axes) == 4 and not recwarn


def test_runs_of_several_settings_are_told_apart_by_their_labels_and_each_has_its_edge(figure):
    drawn = figure(run({"activation": "relu"}), run({"activation": "tanh", "optimizer": "adam", "beta1": 0.9}),
                   run({"activation": "tanh", "tuner": "greedy"}))  # fmt: skip
    labels = ["CDAT σ = 2, gd, relu", "CDAT σ = 2, adam, tanh", "greedy, gd, tanh"]
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == labels
    assert [text.get_text() for text in drawn.axes[-1].texts] == ["edge 2", "edge 38"]
    assert len(figure(run(), quantities=["loss"]).axes) == 1


def test_kinds_of_runs_of_one_tuner_have_shades_of_its_colour_and_a_new_tuner_has_one_that_is_free(figure):
    lines = figure(*(run({"sigma": sigma}) for sigma in (2.0, 1.9, 2.1))).axes[0].lines
    assert len({tuple(line.get_color()) for line in lines}) == len({line.get_linestyle() for line in lines}) == 3
    colors = {plots.look(tuner, 0)[0] for tuner in [*plots.COLORS, "a new one"]}
    assert set(plots.COLORS) <= set(tuners.TUNERS) and len(colors) == len(plots.COLORS) + 1


def test_a_run_that_took_no_step_or_ended_above_its_start_is_told_below_the_table():
    up, none = np.linspace(1, 9, len(HISTORY["loss"])), 0 * HISTORY["learning_rate"]
    assert plots.table([run(), run({"tuner": "greedy"}, loss=up, learning_rate=none)])[3:] == [
        "greedy ended above the loss it began with, 1", "greedy took no step in the end: its rate was 0"]  # fmt: skip


def test_what_was_measured_once_is_a_dot_and_many_kinds_of_runs_have_no_legend_over_the_panels(figure):
    once = np.where(np.arange(len(HISTORY["step"])) > 0, NAN, HISTORY["sharpness"])
    sharpness = figure(run(sharpness=once)).axes[2]
    assert [line.get_marker() for line in sharpness.lines] == ["o"]
    assert figure(*(run({"sigma": 1 + k / 80}) for k in range(80))).legends == []


def test_a_column_that_an_older_run_lacks_is_drawn_as_not_measured(figure):
    lines = figure(run(), run({"sigma": 1.9}, w_norm=HISTORY["loss"]), quantities=["w_norm"]).axes[0].lines
    assert sorted(len(line.get_ydata()) for line in lines) == [0, len(HISTORY["loss"])]


def test_a_name_may_have_any_characters_and_a_figure_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "figure.png"
    plots.draw([run({"name": name}) for name in ("$", r"\nonsense", "$x_$")], file)
    whole = file.read_bytes()

    def fails(figure, file, **_):
        file.write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(plots.Figure, "savefig", fails)
    with pytest.raises(OSError, match="no space"):
        plots.draw([run()], file)
    assert file.read_bytes() == whole and [*tmp_path.iterdir()] == [file]


def test_the_name_that_is_printed_is_that_of_the_figure_and_what_a_stream_cannot_show_is_replaced(folder, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    plots.main([str(folder), "-o", str(folder.parent / "f")])
    out.seek(0)
    text = out.read()
    assert "CDAT ? = 2" in text and text.splitlines()[-1] == f"figure: {folder.parent / 'f.png'}"
    assert (folder.parent / "f.png").exists()


def test_the_command_line_prints_the_table_of_what_are_runs_and_draws_them_without_pyplot(folder):
    code = "import sys, plots; plots.main(sys.argv[1:]); print({'matplotlib.pyplot', 'jax'} & {*sys.modules})"
    (folder.parent / "overlay.png").write_text("")
    words = "run", "run", "overlay.png", "nothing", "-o", "two.svg"
    out = subprocess.check_output([sys.executable, "-c", code, *words], cwd=folder.parent, text=True,
                                  env=os.environ | {"PYTHONPATH": str(Path(plots.__file__).parent)})  # fmt: skip
    assert out.splitlines() == [*plots.table(2 * [plots.load_run(folder)]), "figure: two.svg", "set()"]
    assert "<svg" in (folder.parent / "two.svg").read_text()


@pytest.mark.parametrize("broken", ["not a folder", "cut", "no settings", "no checkpoint"])
def test_a_broken_run_is_one_line_that_names_it(folder, tmp_path, capsys, broken):
    file = folder / "checkpoint.npz"
    if broken == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif broken == "no settings":
        np.savez(file, facts="{}", **HISTORY)
    elif broken == "no checkpoint":
        file.unlink()
    with pytest.raises(SystemExit) as end:
        plots.main([str(file if broken == "not a folder" else folder), "-o", str(tmp_path / "f.png")])
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1 and str(folder) in message
    assert not (tmp_path / "f.png").exists()

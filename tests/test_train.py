import concurrent.futures
import dataclasses
import json
import os
import socket
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest

import gd
import train

TINY = ["--samples", "64", "--width", "8", "--depth", "1", "--steps", "12", "--sharpness-every", "5", "--no-plot"]


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a tiny command line and returns what it printed, and the folder of runs."""

    def run(*flags):
        train.main([*TINY, "--out", str(tmp_path / "runs"), *map(str, flags)])
        return capsys.readouterr().out

    run.folder = tmp_path / "runs"
    return run


def refused(capsys, *flags):
    """The one line that a command line is refused with."""
    with pytest.raises(SystemExit) as end:
        train.main(list(flags))
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1 and message.startswith("train.py: ")
    return message


# ------------------------------------------------------------------------------------------------- command line


def test_flags_multiply_only_the_tuners_that_take_them():
    configs = train.configurations({"tuner": ["greedy", "constant", "cdat"], "lr": [0.1, 0.2], "seed": [0, 1]})
    kinds = [(config.tuner, config.lr, config.seed) for config in configs]
    assert kinds == [("greedy", 0.1, 0), ("greedy", 0.1, 1), ("constant", 0.1, 0), ("constant", 0.1, 1),
                     ("constant", 0.2, 0), ("constant", 0.2, 1), ("cdat", 0.1, 0), ("cdat", 0.1, 1)]  # fmt: skip


def test_each_run_of_a_product_has_a_folder_of_its_own():
    configs = train.configurations({"tuner": list(train.tuners.TUNERS), "lr": [0.1, 0.2], "sigma": [1.0, 2.0],
                                    "seed": [0, 1], "optimizer": ["gd", "adam"], "batch_size": [0, 32]})  # fmt: skip
    assert len({train.name_of(config) for config in configs}) == len(configs) == 2 * 2 * 2 * (2 * 3 + 2 * 2 + 4)


def test_neither_two_values_nor_a_value_and_its_rounding_share_a_folder_and_names_are_short():
    name = lambda lr: train.name_of(train.Config(tuner="constant", lr=lr)).removeprefix("digits-mlp-gd-constant-")
    assert name(0.2) != name(0.20000000001) and name(0.3) != name(0.1 + 0.2)
    assert [name(lr) for lr in (0.05, 0.02, 1e-5, 3.2e-4, 2.0, 100.0, 1e9)] == [
        "lr0.05", "lr0.02", "lr1e-05", "lr0.00032", "lr2", "lr100", "lr1000000000"]  # fmt: skip


def another(field):
    """A value that is not the default."""
    value, allowed = field.default, field.metadata["allowed"]
    if isinstance(allowed, tuple):
        return next(word for word in allowed if word != value)
    return not value if isinstance(value, bool) else value + type(value)(1)


def test_a_run_is_named_by_all_that_changes_its_numbers_but_its_length():
    plain = train.name_of(train.Config())
    same = {name for name, field in train.FIELDS.items() if train.name_of(train.Config(**{name: another(field)})) == plain}
    assert same == {"data_dir", "out", "resume", "overwrite", "log_every", "no_plot", "no_cache", "steps",
                    "distributed", "coordinator", "processes", "process"}  # fmt: skip


@pytest.mark.parametrize(
    "flags, culprit",
    [
        (["--tuner", "greedy", "--sigma", "2"], "--sigma"),
        (["--lr", "0.1"], "--lr"),
        (["--tuner", "constant", "--lr", "nan"], "--lr"),
        (["--tuner", "constant", "--lr", "0"], "--lr"),
        (["--sigma", "2", "-1"], "--sigma"),
        (["--beta", "1"], "--beta"),
        (["--steps", "0"], "--steps"),
        (["--steps", "1e3"], "--steps"),
        (["--ste", "5"], "--ste"),
        (["--tuner", "adam"], "--tuner"),
        (["--tuner"], "--tuner"),
        (["--preset", "resnet34", "--model", "mlp"], "--preset"),
        (["--preset", "mlp-fig15", "--width", "3"], "--width"),
        (["--model", "linear", "--depth", "3"], "--depth"),
        (["--model", "rnn"], "rnn"),
        (["--samples", "5000"], "5000 samples"),
        (["--batch-size", "2000"], "--batch-size"),
        (["--data-dir", "no/such/folder"], "no/such/folder"),
    ],
)
def test_bad_input_is_one_line_that_names_it_and_leaves_nothing_behind(capsys, tmp_path, flags, culprit):
    assert culprit in refused(capsys, "--out", str(tmp_path / "runs"), *flags)
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------ what is trained


def test_the_losses_are_those_of_their_formulas():
    logits, y = np.random.default_rng(0).normal(size=(5, 3)), np.array([0, 2, 1, 1, 0])
    with jax.enable_x64(True):
        onehot = np.eye(3)[y]
        assert float(train.mse(logits, y)) == pytest.approx(0.5 * np.mean(np.sum((logits - onehot) ** 2, 1)), abs=1e-14)
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        assert float(train.ce(logits, y)) == pytest.approx(-np.mean(np.log(p[range(5), y])), abs=1e-14)
        text, characters = np.stack([logits, logits]), np.stack([y, y])  # averaged over characters too
        assert float(train.ce(text, characters)) == pytest.approx(float(train.ce(logits, y)), abs=1e-14)


def test_cross_entropy_stays_finite_for_huge_logits():
    assert float(train.ce(np.array([[1e30, 0.0]], np.float32), np.array([1]))) == pytest.approx(1e30)


def test_the_objective_is_the_data_loss_plus_half_the_decay_of_all_leaves(run):
    run("--weight-decay", 0, "--tuner", "constant", "--steps", 1)
    run("--weight-decay", 0.5, "--tuner", "constant", "--steps", 1)
    plain, decayed = [train.plots.load_run(folder)[1] for folder in sorted(run.folder.iterdir())]
    w = train.models.mlp((8, 8, 1), 10, width=8, depth=1).init(jax.random.key(0))
    half_square = 0.5 * sum(float((np.asarray(leaf) ** 2).sum()) for leaf in jax.tree.leaves(w))
    assert decayed["loss"][0] - plain["loss"][0] == pytest.approx(0.5 * half_square, rel=1e-5)
    assert decayed["test_loss"][0] == plain["test_loss"][0]  # the decay belongs to training


def test_the_batch_of_a_step_depends_on_seed_and_step_and_an_epoch_takes_each_sample_once():
    config = train.Config(batch_size=3, seed=5)
    epoch = [train.rows_of(config, t, 11) for t in range(6)]
    assert len(set(np.concatenate(epoch[:3]))) == len(set(np.concatenate(epoch[3:]))) == 9  # 2 of 11 are left out
    assert not np.array_equal(epoch[0], epoch[3])
    train.shuffled.cache_clear()
    np.testing.assert_array_equal(train.rows_of(config, 4, 11), epoch[4])
    assert not np.array_equal(train.rows_of(dataclasses.replace(config, seed=6), 0, 11), epoch[0])


def test_the_log_says_how_many_samples_the_remainder_batch_drops(run):
    assert "drop 14 of 64" in run("--batch-size", 25, "--steps", 2)


def test_the_largest_seed_gives_parameters_and_batches(run):
    run("--seed", 2147483647, "--batch-size", 16, "--steps", 1)


def test_a_linesearch_tries_30_rates_on_mini_batches_and_1000_on_the_full_batch():
    for size, trials in (16, 30), (0, 1000):
        config = train.Config(tuner="linesearch", batch_size=size)
        assert train.numbers_of(config)["tuner"]["max_trials"] == trials


def test_matrix_products_have_the_precision_of_the_flag_during_a_run_alone(tmp_path):
    seen = []
    for precision in "float32", "tensorfloat32", "bfloat16":
        config = train.Config(samples=64, model="linear", steps=1, precision=precision, out=str(tmp_path))
        train.train(config, lambda rows: seen.append(jax.config.jax_default_matmul_precision))
    assert seen == ["float32", "tensorfloat32", "bfloat16"] and jax.config.jax_default_matmul_precision is None


# ------------------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("name", ["step", "look", "hessian", "test"])
def test_in_chunks_nothing_holds_the_activations_of_all_samples(name):
    config = train.Config()
    shape = jax.ShapeDtypeStruct((48, 8, 8, 1), "float32"), jax.ShapeDtypeStruct((48,), "int32")
    numbers = train.numbers_of(config)
    for size in 0, 16:
        names = "init", "step", "look", "hessian", "align", "test"
        compiled = dict(zip(names, train.functions("mlp", (("width", 7), ("depth", 1)), (8, 8, 1), 10, "mse", "gd", "cdat",
                                                   config.decay, size)))  # fmt: skip
        carry = jax.eval_shape(compiled["init"], 0, numbers)
        arguments = {"step": (carry, shape, None, numbers), "look": (carry.w, carry, shape, None, numbers),
                     "hessian": (carry.w, None, carry.w, shape, 0.1), "test": (carry.w, shape)}  # fmt: skip
        program = str(jax.make_jaxpr(compiled[name])(*arguments[name]))
        assert ("f32[48,7]" in program) == (size == 0) and ("f32[16,7]" in program) == (size == 16)


def test_chunks_leave_all_columns_as_they_are(tmp_path):
    config = train.Config(samples=64, width=8, depth=1, steps=12, sharpness_every=5, out=str(tmp_path))
    with jax.enable_x64(True):
        whole, chunked = (train.train(dataclasses.replace(config, chunk_size=size)) for size in (0, 24))
    for column in whole:
        rtol = 1e-6 if column == "test_accuracy" else 1e-9  # the one that is a mean in float32
        np.testing.assert_allclose(chunked[column], whole[column], rtol, 1e-12, err_msg=column)


# ------------------------------------------------------------------------------------------------- a run on disk


def test_the_same_seed_gives_the_same_bytes_whatever_the_log_interval(run):
    for out in ("a", "b", "c"):
        run("--out", run.folder / out, "--log-every", {"a": 1, "b": 5, "c": 100}[out], "--batch-size", 0, 16)
    for name in ("digits-mlp-gd-cdat-samples64-width8-depth1-sharpness_every5",
                 "digits-mlp-gd-cdat-samples64-width8-depth1-batch_size16-sharpness_every5"):  # fmt: skip
        files = [(run.folder / out / name / "metrics.csv").read_bytes() for out in "abc"]
        assert files[0] == files[1] == files[2] and files[0].count(b"\n") == 13


def test_a_row_a_step_and_nan_where_nothing_was_measured(run):
    run()
    (folder,) = run.folder.iterdir()
    config, history = train.plots.load_run(folder)
    assert list(history) == list(train.COLUMNS + train.MEASURED)
    assert history["step"].tolist() == list(range(12))
    for name in train.MEASURED:
        assert np.flatnonzero(np.isfinite(history[name])).tolist() == [0, 5, 10]
    assert np.isnan(history["turn"][0]) and np.all(np.abs(history["turn"][1:]) <= 1 + 1e-6)
    assert config["status"] == "done" and config["sigma"] == 2 and {"jax", "numpy", "device"} <= set(config)
    assert sorted(file.name for file in folder.iterdir()) == ["checkpoint.npz", "config.json", "metrics.csv"]


def test_logged_numbers_read_back_as_the_same_float32(run):
    config = train.Config(samples=64, width=8, depth=1, steps=1, out=str(run.folder))
    history = train.train(config)
    network = train.models.mlp((8, 8, 1), 10, width=8, depth=1)
    data = train.data.load("digits", samples=64)
    loss = lambda w: train.mse(network.apply(w, data.x), data.y) + 0.5 * np.float32(1e-5) * gd.dot(w, w)
    value = np.asarray(jax.jit(loss)(network.init(jax.random.key(0))))
    assert np.float32(history["loss"][0]) == pytest.approx(value, rel=1e-6)
    text = (run.folder / train.name_of(config) / "metrics.csv").read_text().splitlines()[1].split(",")[1]
    assert str(np.float32(text)) == text


def test_a_finished_run_is_shown_again_not_repeated(run):
    first = run("--tuner", "greedy")
    file = next(run.folder.glob("*greedy*/metrics.csv"))
    stamp = file.stat().st_mtime_ns
    again = run("--tuner", "greedy")
    assert file.stat().st_mtime_ns == stamp and "loss 0" not in again
    assert again.splitlines()[-1] == first.splitlines()[-1]
    run("--tuner", "greedy", "--overwrite")
    assert file.stat().st_mtime_ns > stamp


def test_a_folder_that_holds_another_run_is_refused_with_what_differs(run, capsys):
    run("--steps", 3)
    message = refused(capsys, *TINY, "--out", str(run.folder))
    assert "--steps 3" in message and "--overwrite" in message


def test_a_diverged_run_is_kept_reported_and_the_others_go_on(run):
    text = run("--tuner", "constant", "greedy", "--lr", 1e9, "--steps", 40, "--log-every", 4)
    config, history = train.plots.load_run(next(run.folder.glob("*constant*")))
    assert config["status"] == "diverged"
    assert np.isfinite(history["loss"][:-1]).all() and not np.isfinite(history["loss"][-1])
    assert f"constant 1e+09 diverged: its loss is not finite at step {len(history['loss']) - 1}" in text
    assert train.plots.load_run(next(run.folder.glob("*greedy*")))[0]["status"] == "done"


def test_what_is_reported_of_a_diverged_run_is_what_is_logged(run):
    reported = []
    config = train.Config(samples=64, width=8, depth=1, steps=40, tuner="constant", lr=1e9, out=str(run.folder))
    history = train.train(config, reported.extend)
    assert [row["step"] for row in reported] == history["step"].tolist() and len(reported) < 40


def test_a_sweep_over_numbers_traces_the_step_once(run, monkeypatch):
    traced = []
    make_step = gd.make_step
    monkeypatch.setattr(gd, "make_step", lambda *args: traced.append(args) or make_step(*args))
    train.functions.cache_clear()
    run("--tuner", "constant", "--lr", *[0.01 * 2**k for k in range(8)], "--steps", 3)
    assert len(traced) == 1 and len(list(run.folder.iterdir())) == 8


def test_a_user_without_a_home_trains_without_a_cache(run, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(jax.config, "update", lambda *_: pytest.fail("a cache was set up"))
    run("--steps", 1)


# --------------------------------------------------------------------------------------------- what a person sees


def test_the_line_on_a_terminal_renews_itself_within_eighty_columns_up_to_a_million_slow_steps(capsys, monkeypatch):
    small = {"loss": np.float32(1.2345e-5), "learning_rate": np.float32(1.2345e-5), "sharpness": np.float32(-1.0e-3)}
    seconds = iter([0, 0, 15, 59880, 1e7, 1e7])
    monkeypatch.setattr(train.time, "time", lambda: next(seconds))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    report = train.progress(train.Config(steps=1_000_000))
    for done in 1, 500_001, 500_001, 500_001, 1_000_000:
        report([{"step": done - 1, **small}])
    first, soon, late, later, last = lines = capsys.readouterr().out.split("\r")[1:]
    assert {len(line.rstrip("\n")) for line in lines} == {79} and [line[-1] == "\n" for line in lines] == [*4 * [False], True]
    assert first.strip() == "░░░░░     1/1000000 loss 1.234e-05 rate 1.23e-05 product -1.23e-08"
    assert soon.startswith("██░░░500001/1000000") and last.startswith("█████1000000/1000000")
    times = [line.split(", ")[1].strip() for line in (soon, late, later, last)]
    assert times == ["15 s left", "17 h left", "2778 h left", "0 s left"]


def test_huge_numbers_are_told_without_a_warning(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        text = run("--tuner", "constant", "--lr", 1e30, "--weight-decay", 1e30, "--sharpness-every", 1, "--steps", 3)
        assert "diverged" in text and "1e+60" in text
        config, history = train.plots.load_run(next(run.folder.iterdir()))
        history["learning_rate"][-1], history["sharpness"][-1] = np.inf, 0
        train.table([(config, history)])


def test_the_table_marks_the_best_run_and_warns_of_a_best_value_on_the_border(run):
    text = run("--tuner", "constant", "--lr", 0.001, 0.002, 0.004)
    lines = text.splitlines()
    assert [line for line in lines if " *" in line][0].startswith("constant 0.004")
    assert "constant with gd: the best --lr, 0.004, lies on the border of its grid; widen it" in lines


def test_runs_are_compared_by_the_mean_loss_of_their_last_five_steps():
    assert train.plots.final_loss({"loss": np.array([9.0, 1, 2, 3, 4, 5])}) == 3
    assert train.plots.final_loss({"loss": np.array([1.0, np.nan])}) == np.inf


def test_the_lines_of_a_run_fit_eighty_columns(run):
    text = run("--tuner", "constant", "linesearch", "greedy", "cdat",)
    assert max(len(line) for line in text.splitlines() if str(run.folder) not in line) <= 80


def test_figures_are_drawn_for_each_run_and_for_all(run, tmp_path):
    flags = [flag for flag in TINY if flag != "--no-plot"]
    train.main([*flags, "--tuner", "greedy", "cdat", "--out", str(run.folder)])
    assert len(list(run.folder.glob("*/figure.png"))) == 2 and (run.folder / "overlay.png").exists()


def test_the_figure_that_is_named_is_one_that_was_drawn(tmp_path, capsys):
    empty, full = (train.Config(samples=64, width=8, depth=1, steps=3, tuner=tuner, out=str(tmp_path)) for tuner in ("cdat", "greedy"))
    for config in empty, full:
        train.train(config)
    file = tmp_path / train.name_of(empty) / "metrics.csv"
    file.write_text(file.read_text().splitlines()[0] + "\n")  # as it is before the first rows are written
    train.show([empty, full])
    figure = capsys.readouterr().out.splitlines()[-1].removeprefix("figure: ")
    assert figure == str(tmp_path / train.name_of(full) / "figure.png") and os.path.exists(figure)


# -------------------------------------------------------------------------------------------------- sharpness


@pytest.mark.parametrize("optimizer", ["gd", "rmsprop", "adam"])
def test_logged_sharpness_is_the_dense_one_of_the_preconditioned_hessian(optimizer, tmp_path):
    with jax.enable_x64(True):
        config = train.Config(samples=32, model="mlp", width=1, depth=1, optimizer=optimizer, steps=31, beta=0.9,
                              sharpness_every=30, out=str(tmp_path))  # fmt: skip
        history = train.train(config)
        data = train.data.load("digits", samples=32)
        network = train.models.mlp((8, 8, 1), 10, width=1, depth=1)
        carry = gd.init_carry(network.init(jax.random.key(0)), gd.OPTIMIZERS[optimizer](), train.tuners.cdat(2, 0.9))
        loss = lambda w, _: train.mse(network.apply(w, data.x), data.y) + 0.5e-5 * gd.dot(w, w)
        step = jax.jit(gd.make_step(loss, gd.OPTIMIZERS[optimizer](), train.tuners.cdat(2.0, 0.9)))
        for _ in range(30):
            carry, _ = step(carry, None)
        flat, unravel = jax.flatten_util.ravel_pytree(carry.w)
        g = np.asarray(jax.jit(jax.grad(lambda v: loss(unravel(v), None)))(flat))
        state = [np.asarray(jax.flatten_util.ravel_pytree(part)[0]) for part in carry.optimizer]
        if optimizer == "gd":
            p = np.ones_like(g)
        elif optimizer == "rmsprop":
            nu = np.asarray(jax.flatten_util.ravel_pytree(carry.optimizer)[0])
            p = np.sqrt(0.999 * nu + 0.001 * g**2 + 1e-8)
        else:
            p = np.sqrt((0.999 * state[1] + 0.001 * g**2) / (1 - 0.999**31)) + 1e-8
        dense = np.asarray(jax.jit(jax.hessian(lambda v: loss(unravel(v), None)))(flat))
        top = np.linalg.eigvalsh(dense / np.sqrt(p)[:, None] / np.sqrt(p)[None])[-1]
        assert history["sharpness"][30] == pytest.approx(top, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["gd", "adam"])
def test_what_is_measured_at_a_step_is_what_numpy_finds_there(optimizer, tmp_path):
    """Sharpness of all samples, all else of the batch, both at w before the step, in a network of one hidden unit."""
    config = train.Config(samples=32, test_samples=50, width=1, depth=1, activation="tanh", optimizer=optimizer, batch_size=16,
                          weight_decay=0.01, sigma=1.0, beta=0.9, steps=10, log_every=1, sharpness_every=4,
                          sharpness_tol=1e-9, out=str(tmp_path))  # fmt: skip
    flat = lambda leaves: np.concatenate([leaf.ravel() for leaf in leaves])
    before = {}  # by step, the state from which it starts

    def keep(rows):  # the checkpoint on disk is still the one before this step
        if rows[0]["step"]:
            with np.load(train.folder_of(config) / "checkpoint.npz") as saved:
                before[int(saved["step"])] = [saved[f"arr_{k}"] for k in range(len(saved.files) - 1)]

    def network(w, x):
        return jax.numpy.tanh(x.reshape(-1, 64) @ w[1:65] + w[0])[:, None] * w[75:] + w[65:75]

    def f(w, x, y):
        return ((network(w, x) - jax.numpy.eye(10)[y]) ** 2).sum(1).mean() / 2 + 0.01 / 2 * w @ w

    with jax.enable_x64(True):
        history = train.train(config, keep)
        x, y, x_test, y_test, _ = train.data.load("digits", samples=32)
        derive = jax.jit(lambda w, x, y: (jax.grad(f)(w, x, y), jax.hessian(f)(w, x, y)))
        everywhere = lambda w: sum(np.asarray(derive(w, x[half], y[half])[1]) for half in (range(16), range(16, 32))) / 2
        for t in 4, 8:
            w, rows = flat(before[t][:4]), train.rows_of(config, t, 32)
            g, h = map(np.asarray, derive(w, x[rows], y[rows]))
            u, p = -g, np.ones(85)
            if optimizer == "adam":
                m, nu = 0.9 * flat(before[t][4:8]) + 0.1 * g, 0.999 * flat(before[t][8:12]) + 0.001 * g**2
                p = np.sqrt(nu / (1 - 0.999 ** (t + 1))) + 1e-8
                u = -m / (1 - 0.9 ** (t + 1)) / p
            scaled = lambda h: np.linalg.eigh(h / np.sqrt(p)[:, None] / np.sqrt(p))
            values, vectors = scaled(everywhere(w))
            eta = -g @ u / abs(u @ h @ u)
            few, labels = x_test[:50], y_test[:50]
            expected = {
                "loss": f(w, x[rows], y[rows]),
                "sharpness": values[-1],
                "alignment": abs(vectors[:, -1] @ (np.sqrt(p) * u)) / np.linalg.norm(np.sqrt(p) * u),
                "test_loss": f(w, few, labels) - 0.01 / 2 * w @ w,
                "test_accuracy": np.mean(np.argmax(network(w, few), 1) == labels),
                "greedy_gain": f(w + 2 * eta * u, x[rows], y[rows]) - f(w + eta * u, x[rows], y[rows]),
            }
            assert {name: history[name][t] for name in expected} == pytest.approx(jax.tree.map(float, expected), rel=1e-6)
            for other in h, everywhere(flat(before[t + 1][:4])):  # of the batch, or after the step: other numbers
                assert abs(scaled(other)[0][-1] / values[-1] - 1) > 0.001


@pytest.mark.parametrize("samples, standardize", [(0, False), (16, False), (16, True)])
def test_the_sharpness_of_a_linear_model_is_that_of_the_samples_asked_for_standardized_or_not(tmp_path, samples, standardize):
    config = train.Config(model="linear", samples=64, steps=1, sharpness_samples=samples, standardize=standardize,
                          sharpness_tol=1e-6, weight_decay=0.1, out=str(tmp_path))  # fmt: skip
    with jax.enable_x64(True):
        history = train.train(config)
    x = train.data.load("digits", samples=64).x.reshape(64, 64).astype(float)
    x = np.column_stack([(x - x.mean()) / x.std() if standardize else x, np.ones(64)])[: samples or 64]
    assert history["sharpness"][0] == pytest.approx(np.linalg.eigvalsh(x.T @ x / len(x))[-1] + 0.1, rel=1e-6)


def test_alignment_is_the_same_for_u_and_its_opposite_and_sees_the_preconditioner():
    u, scale, v = np.random.default_rng(0).normal(size=(3, 5))
    cos = abs(u / scale @ v) / np.linalg.norm(u / scale)
    with jax.enable_x64(True):
        for sign in 1, -1:
            assert float(train.alignment(sign * u, scale, v)) == pytest.approx(cos, rel=1e-12)


def test_settings_survive_the_way_through_config_json(run):
    run("--tuner", "linesearch", "--grow", "inf", "--steps", 2)
    there = json.loads(next(run.folder.glob("*/config.json")).read_text())
    assert there["grow"] == float("inf") and run("--tuner", "linesearch", "--grow", "inf", "--steps", 2)


def twenty_steps(model):
    """The losses of 20 CDAT steps, the rates, and the sharpness after them."""
    text = model in ("rnn", "transformer")
    config = train.Config(dataset="pydocs" if text else "digits", samples=64, loss="ce", model=model,
                          width=0 if model == "linear" else 8,
                          depth=1 if model not in ("linear", "rnn", "resnet") else 0)  # fmt: skip
    samples, _, classes, _, _ = train.placed(config)
    options, numbers = train.arguments(config, "model"), train.numbers_of(config)
    init, step, _, hessian, _, _ = train.functions(model, tuple(options.items()), samples[0].shape[1:], classes, config.loss,
                                                   config.optimizer, config.tuner, config.decay, 0)  # fmt: skip
    carry, rows = init(0, numbers), []
    for _ in range(20):
        carry, metrics = step(carry, samples, None, numbers)
        rows.append((float(metrics["loss"]), float(metrics["learning_rate"])))
    product = lambda v: hessian(carry.w, None, v, samples, config.weight_decay)
    return rows, train.sharpness.power_iteration(product, carry.u, tol=0.1, max_iters=20).value


@pytest.fixture(scope="module")
def trained():
    """Of each model; compiled two at a time, since that is what takes long."""
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        return dict(zip(train.models.MODELS, threads.map(twenty_steps, train.models.MODELS)))


@pytest.mark.parametrize("model", train.models.MODELS)
def test_every_model_trains_20_cdat_steps_and_has_a_finite_sharpness(model, trained):
    rows, top = trained[model]
    losses, rates = np.array(rows).T
    assert np.isfinite(losses).all() and (rates > 0).all()
    assert losses[-1] < losses[0], losses
    assert np.isfinite(top) and top > 0


# ------------------------------------------------------------------------------------ several devices, several machines

SHORT = ["--samples", "256", "--width", "32", "--steps", "50", "--sharpness-every", "10", "--no-plot", "--no-cache"]
CONSTANT = [*SHORT, "--tuner", "constant", "--lr", "0.05"]  # in float32
CDAT = [*SHORT, "--tuner", "cdat", "--batch-size", "64"]  # in float64


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """A folder with both runs."""
    folder = tmp_path_factory.mktemp("one")
    for x64, flags in (False, CONSTANT), (True, CDAT):
        with jax.enable_x64(x64):
            train.main([*flags, "--out", str(folder / str(x64))])
    return folder


def assert_same(folder, out, rel):
    """The runs in both folders took the same steps."""
    (expected,), (found,) = folder.iterdir(), out.iterdir()
    assert expected.name == found.name
    expected, found = train.plots.load_run(expected)[1], train.plots.load_run(found)[1]
    for column in "loss", "learning_rate", "grad_norm", "sharpness", "test_loss":
        np.testing.assert_allclose(found[column], expected[column], rtol=rel)


def test_four_devices_take_the_steps_of_one_and_the_batch_is_laid_over_as_many_as_divide_it(one_device, tmp_path):
    code = f"""
import jax, train
with jax.enable_x64(True): train.main({CDAT} + ["--out", "True"])
train.main({CONSTANT} + ["--out", "False"])
train.placed(train.Config(samples=250))
"""
    devices = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    more = {"XLA_FLAGS": devices, "PYTHONPATH": os.path.dirname(train.__file__)}
    data = ["datasets", tmp_path / "datasets"]
    os.symlink(os.path.join(os.path.dirname(train.__file__), data[0]), data[1])
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | more, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for line in "64 is laid over 4 of 4", "256 is laid over 4 of 4", "250 is laid over 2 of 4":
        assert f"the batch of {line} devices" in run.stdout
    assert_same(one_device / "False", tmp_path / "False", rel=1e-4)
    assert_same(one_device / "True", tmp_path / "True", rel=1e-6)


def test_two_processes_take_the_steps_of_one_and_the_first_alone_writes(one_device, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = ["--distributed", "--coordinator", address, "--processes", "2", "--process"]
    code = f"""
import sys, jax, train
with jax.enable_x64(True): train.main({[*CDAT, "--out", str(tmp_path / "True"), *flags]} + sys.argv[1:])
train.main({[*CONSTANT, "--out", str(tmp_path / "False")]})
"""
    path = {"PYTHONPATH": os.path.dirname(train.__file__)}
    both = [subprocess.Popen([sys.executable, "-c", code, str(k)], text=True, env=os.environ | path,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for k in range(2)]  # fmt: skip
    first, second = (process.communicate()[0] for process in both)
    assert "over 2 of 2 devices" in first and "CDAT" in first and "CDAT" not in second, (first, second)
    assert_same(one_device / "True", tmp_path / "True", rel=1e-6)
    assert_same(one_device / "False", tmp_path / "False", rel=1e-4)

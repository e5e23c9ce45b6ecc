"""Facts about a run: what is asked for, trained, measured and logged, alone and on several devices.

What happens to a run that is cut short, and how bad input is answered, is in test_survival.py.
"""

import contextlib
import importlib
import io
import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import typing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import DIRECTIONS, assert_devices_agree_where_f_is_the_mean, steps_on_two_devices

import train
from train import data, gd, models, plots, tuners

ROOT = Path(train.__file__).parent
TINY = "--samples 64 --width 8 --depth 1 --steps 12 --sharpness-every 5 --no-plot".split()


def tiny(**given):
    """The run of that command line, for `train.train`."""
    return train.configure(**dict(samples=64, width=8, depth=1, steps=12, sharpness_every=5) | given)


def refused(capsys, *flags, late=False):
    """The one line that a command line is refused with, before any step unless it is late."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train.main(list(flags))
    out, message = capsys.readouterr()
    assert end.value.code == 2 and message.count("\n") == 1 and message.startswith("train.py: ")
    assert ("compiling" in out) == late
    return message


@pytest.fixture
def run(tmp_path, capsys):
    """run(*flags): what the tiny command line prints; run.refused(*flags): what it is refused with; run.folder."""

    def run(*flags):
        capsys.readouterr()
        train.main([*run.flags, *map(str, flags)])
        return capsys.readouterr().out

    run.folder = tmp_path / "runs"
    run.flags = [*TINY, "--out", str(run.folder)]
    run.refused = lambda *flags, **late: refused(capsys, *run.flags, *map(str, flags), **late)
    return run


def one(folder):
    """The only run folder there."""
    (folder,) = [path for path in Path(folder).iterdir() if path.is_dir()]
    return folder


def held(folder):
    """The only run there."""
    return plots.load_run(one(folder))


def rows_of(folder):
    """How many rows the run there has; it may be running."""
    return sum(len(plots.load_run(file.parent).history["step"]) for file in Path(folder).glob("*/checkpoint.npz"))


# --- Processes (what runs them is in conftest.py).


def start(environment, *words, **how):
    """A Python process."""
    return subprocess.Popen([sys.executable, *map(str, words)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)  # fmt: skip


def ended(process):
    """Its exit code, and what it wrote to stdout and stderr."""
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


# --- The command line.


def test_flags_multiply_only_the_tuners_that_take_them_and_may_be_given_twice():
    given = train.parser().parse_args("--tuner greedy constant cdat --lr 0.1 --lr 0.2 --seed 0 1".split())
    kinds = [(config.tuner, vars(config).get("lr"), config.seed) for config in train.configurations(vars(given))]
    assert kinds == [("greedy", None, 0), ("greedy", None, 1), ("constant", 0.1, 0), ("constant", 0.1, 1),
                     ("constant", 0.2, 0), ("constant", 0.2, 1), ("cdat", None, 0), ("cdat", None, 1)]  # fmt: skip
    for words in [], ["host:1", "2", "0"]:  # the one flag whose words are one value
        (config,) = train.configurations(vars(train.parser().parse_args(["--distributed", *words])))
        assert config.distributed == words


def test_no_two_parts_nor_a_part_and_a_setting_have_an_option_of_one_name():
    taken = dict.fromkeys(train.SETTINGS, "setting")
    for part, factories in train.PARTS.items():
        names = {name for factory in factories.values() for name in train.options_of(factory)}
        twice = {name: taken[name] for name in names & taken.keys()}
        assert twice == {}, f"a {part} has them, too: rename one of the two"
        taken |= dict.fromkeys(names, part)


def test_a_help_may_have_a_percent_sign(monkeypatch, capsys):
    def sign(beta=0.9):
        """beta: 90 % of the last m"""

    monkeypatch.setitem(gd.OPTIMIZERS, "sign", sign)
    with pytest.raises(SystemExit):
        train.parser().parse_args(["--help"])
    assert "90 % of the last m" in " ".join(capsys.readouterr().out.split())


def test_each_run_has_a_folder_of_its_own_and_names_are_short():
    configs = train.configurations({"tuner": list(tuners.TUNERS), "lr": [0.1, 0.2], "sigma": [1.0, 2.0],
                                    "seed": [0, 1], "optimizer": ["gd", "adam"], "batch_size": [0, 32]})  # fmt: skip
    rates = [2 ** len({"lr", "sigma"} & set(train.options_of(tuner))) for tuner in tuners.TUNERS.values()]
    assert len({train.name_of(config) for config in configs}) == len(configs) == 8 * sum(rates)
    names = lambda *lrs: [train.name_of(train.configure(tuner="constant", lr=lr)).split("constant-")[1] for lr in lrs]
    assert len({*names(0.2, 0.20000000001, 0.3, 0.1 + 0.2)}) == 4  # a value and its rounding
    assert names(0.05, 0.02, 1e-5, 3.2e-4, 2.0, 100.0, 1e9) == [
        "lr0.05", "lr0.02", "lr1e-05", "lr0.00032", "lr2", "lr100", "lr1000000000"]  # fmt: skip


def another(value, words=()):
    """A value that is not the default."""
    if isinstance(value, float):
        return value * 0.9 if 0 < value < math.inf else 0.5
    beside = not value if isinstance(value, bool) else value + type(value)(1)
    return next((word for word in words if word != value), beside)


def test_a_run_is_named_by_all_that_changes_its_numbers_but_its_length():
    name = lambda **given: train.name_of(train.configure(**given))
    others = {setting: another(default, train.WORDS.get(setting, ()))
              for setting, (default, _) in train.SETTINGS.items() if setting != "distributed"}  # fmt: skip
    assert {setting for setting, value in others.items() if name(**{setting: value}) == name()} == {
        "data_dir", "out", "resume", "overwrite", "log_every", "no_plot", "steps"}  # fmt: skip
    assert name(distributed=[]) == name()
    for part, factories in train.PARTS.items():
        for word, factory in factories.items():
            for setting, option in train.options_of(factory).items():
                given = {part: word, setting: another(option.default, typing.get_args(option.annotation))}
                assert name(**given) != name(**{part: word}), given


def test_a_linesearch_tries_30_rates_on_mini_batches_and_1000_on_the_full_batch():
    for size, trials in (16, 30), (0, 1000):
        _, numbers = train.kind_and_numbers(train.configure(tuner="linesearch", batch_size=size))
        assert numbers["max_trials"] == trials


def test_compilations_are_kept_where_the_user_says_else_in_the_users_cache_or_nowhere(monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where a user has no home
    for mine, cache, kept in ("mine", "/c", "mine"), (None, "/c", "/c/stepping-on-the-edge"), (None, "", None):
        jax.config.update("jax_compilation_cache_dir", mine)
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        gd.set_up()
        assert jax.config.jax_compilation_cache_dir == kept
    jax.config.update("jax_compilation_cache_dir", before)


# --- What is trained, and logged.


def test_the_objective_is_the_data_loss_plus_half_the_decay_of_all_leaves(run):
    run("--tuner", "constant", "--steps", 1, "--weight-decay", 0)
    run("--tuner", "constant", "--steps", 1, "--weight-decay", 0.5)
    plain, decayed = [plots.load_run(folder).history for folder in sorted(run.folder.iterdir())]
    w = models.mlp((8, 8, 1), 10, width=8, depth=1).init(jax.random.key(0))
    half_square = 0.5 * sum(float((np.asarray(leaf) ** 2).sum()) for leaf in jax.tree.leaves(w))
    assert decayed["loss"][0] - plain["loss"][0] == pytest.approx(0.5 * half_square, rel=1e-5)
    assert decayed["test_loss"][0] == plain["test_loss"][0]  # the decay belongs to training


def test_matrix_products_are_float32_during_a_run_alone(tmp_path):
    seen = []
    train.train(tiny(steps=1, out=tmp_path), lambda rows: seen.append(jax.config.jax_default_matmul_precision))
    assert seen == ["float32", "float32"] and jax.config.jax_default_matmul_precision is None


def test_in_chunks_nothing_holds_the_activations_of_all_samples():
    many, numbers = (jax.ShapeDtypeStruct((48, 8, 8, 1), "float32"), jax.ShapeDtypeStruct((48,), "int32")), {}
    for size in 0, 16:
        config = train.configure(width=7, depth=1, chunk_size=size)
        kind, numbers = train.kind_and_numbers(config)
        functions = train.compiled(kind, (8, 8, 1), 10)
        carry = jax.eval_shape(functions.init, 0, numbers)
        for function, *arguments in [
            (functions.step, carry, many, None, numbers),
            (functions.hessian, carry.w, carry, carry.u, many, numbers),
            (functions.measure, carry.w, carry, 1.0, carry.u, many, None, many, numbers),
        ]:
            program = str(jax.make_jaxpr(function)(*arguments))
            assert ("f32[48,7]" in program) == (size == 0) and ("f32[16,7]" in program) == (size == 16)


def test_chunks_leave_all_columns_as_they_are(tmp_path):
    given = dict(model="linear", samples=64, steps=12, sharpness_every=5, out=tmp_path)
    with jax.enable_x64(True):
        whole, chunked = (train.train(train.configure(chunk_size=size, **given)) for size in (0, 24))
    for column in whole:
        rtol = 1e-6 if column == "test_accuracy" else 1e-9  # the one that is a mean in float32
        np.testing.assert_allclose(chunked[column], whole[column], rtol, 1e-12, err_msg=column)


def test_a_sweep_over_numbers_traces_the_step_once(tmp_path, monkeypatch):
    traced, make_step = [], gd.make_step
    monkeypatch.setattr(gd, "make_step", lambda *args: traced.append(args) or make_step(*args))
    flags = "--model linear --no-sharpness --steps 3 --no-plot --tuner constant --out".split()
    train.main([*flags, str(tmp_path), "--lr", *[str(0.01 * 2**k) for k in range(8)]])
    assert len(traced) == 1 and len(list(tmp_path.iterdir())) == 8


def test_the_same_seed_gives_the_same_bytes_whatever_the_log_interval(run):
    for out, every in {"a": 1, "b": 5, "c": 100}.items():
        run("--out", run.folder / out, "--log-every", every, "--batch-size", 0, 25, "--seed", 2147483647)  # the largest
    texts = [[file.read_bytes() for file in sorted(run.folder.glob(f"{out}/*/metrics.csv"))] for out in "abc"]
    assert texts[0] == texts[1] == texts[2] and [text.count(b"\n") for text in texts[0]] == [13, 13]


def test_a_row_a_step_nan_where_nothing_was_measured_and_numbers_that_read_back_as_the_same_float32(run):
    run()
    folder, (settings, history, facts) = one(run.folder), held(run.folder)
    assert sorted(file.name for file in folder.iterdir()) == ["checkpoint.npz", "config.json", "metrics.csv"]
    header, *rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    assert header == list(history) and header[0] == "step" and history["step"].tolist() == list(range(12))
    np.testing.assert_array_equal(np.float32(rows), np.float32([*history.values()]).T)
    assert all(str(np.float32(text)) == text for row in rows for text in row[1:])
    rest = set(header) - {"step", "loss", "learning_rate", "grad_norm", "turn"}
    assert rest >= {"sharpness", "alignment", "curvature", "test_loss", "test_accuracy"}
    assert all(np.flatnonzero(np.isfinite(history[name])).tolist() == [0, 5, 10] for name in rest)
    assert history["turn"][0] == 0 and np.all(np.abs(history["turn"][1:]) <= 1 + 1e-6)
    network, (x, y, *_) = models.mlp((8, 8, 1), 10, width=8, depth=1), data.load("digits", samples=64)
    loss = lambda w: train.WORDS["loss"]["mse"](network.apply(w, x), y) + 0.5 * np.float32(1e-5) * gd.dot(w, w)
    assert history["loss"][0] == pytest.approx(float(jax.jit(loss)(network.init(jax.random.key(0)))), rel=1e-6)
    assert settings["sigma"] == 2 and facts["status"] == "done" and facts["matmul_precision"] == "float32"
    assert {"seconds", "data", "jax", "numpy", "device"} <= set(facts)
    assert json.loads((folder / "config.json").read_text()) == settings | facts


def test_a_finished_run_is_shown_again_not_repeated_and_it_says_so(run):
    flags = "--tuner", "linesearch", "--grow", "inf"  # an infinite number survives the way through the files too
    first = run(*flags)
    file = one(run.folder) / "checkpoint.npz"
    stamp = file.stat().st_mtime_ns
    again = run(*flags)
    assert held(run.folder).settings["grow"] == math.inf
    assert file.stat().st_mtime_ns == stamp and "compiling" not in again
    assert "was run before; --overwrite repeats it" in again and "was run before" not in first
    assert again.splitlines()[-1] == first.splitlines()[-1]
    assert "was run before" not in run(*flags, "--overwrite") and file.stat().st_mtime_ns > stamp


def test_a_healthy_run_has_no_nan_that_the_debug_mode_of_jax_would_stop_at(tmp_path):
    given = dict(model="linear", samples=16, test_samples=16, steps=2, out=tmp_path)
    with jax.debug_nans(True):
        for no_sharpness in False, True:
            train.train(train.configure(no_sharpness=no_sharpness, **given))
        for tuner in tuners.TUNERS:
            rule = train.built(tuners.TUNERS[tuner], vars(train.configure(tuner=tuner)) | {"max_trials": 9})
            loss = tuners.Composed(lambda w, _: w, lambda z, w, _: jnp.sum(jnp.cosh(z)))
            step = jax.jit(gd.make_step(loss, gd.gd(), rule))
            carry = gd.init_carry(jnp.ones(2), gd.gd(), rule)
            for _ in range(3):
                carry, metrics = step(carry, None)
            assert metrics["loss"] < 2 * np.cosh(1)


def test_the_users_home_is_known_and_seconds_are_those_of_all_stretches(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run("--out", "~/there", "--steps", 6)
    file = one(tmp_path / "there") / "checkpoint.npz"
    with np.load(file) as saved:
        arrays = dict(saved)
    facts = json.loads(str(arrays["facts"])) | {"seconds": 1000.0}
    np.savez(file, **arrays | {"facts": json.dumps(facts)})
    run("--out", "~/there", "--resume")
    assert 1000 <= held(tmp_path / "there").facts["seconds"] < 1100


def test_what_a_stream_cannot_show_is_replaced(run, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        train.main([*run.flags, "--steps", "3"])
    out.seek(0)
    assert "CDAT ? = 2" in out.read()


def test_a_diverged_run_is_kept_as_it_was_reported_and_the_others_go_on(run):
    reported = []
    history = train.train(tiny(steps=40, tuner="constant", lr=1e9, log_every=4, out=run.folder), reported.extend)
    assert held(run.folder).facts["status"] == "diverged"
    assert [row["step"] for row in reported] == history["step"].tolist() and len(reported) < 40
    assert np.isfinite(history["loss"][:-1]).all() and not np.isfinite(history["loss"][-1])
    text = run("--tuner", "constant", "cdat", "--lr", 1e9, "--steps", 50)  # more steps of it are not taken
    assert f"constant 1e+09, steps 40 diverged: its loss is not finite at step {len(history['loss']) - 1}" in text
    assert plots.load_run(next(run.folder.glob("*cdat*"))).facts["status"] == "done"


def test_huge_numbers_are_told_without_a_warning(run, recwarn):
    text = run("--tuner", "constant", "--lr", 1e30, "--weight-decay", 1e30, "--steps", 3)
    assert "diverged" in text and "1e+60" in text
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


def test_the_lines_of_a_run_fit_eighty_columns_and_compiling_comes_first(run):
    lines = run("--tuner", "constant", "linesearch", "cdat").splitlines()
    assert max(len(line) for line in lines if str(run.folder) not in line) <= 80
    assert lines[1] == "compiling ..." and "loss" in lines[2] and "product" in lines[2]


def test_each_run_has_its_figure_each_command_its_overlay_and_the_one_that_is_named_exists(run, capsys, monkeypatch):
    tuners_of = lambda runs: " ".join(run.settings["tuner"] for run in runs)
    monkeypatch.setattr(plots, "draw", lambda runs, file: file.write_text(tuners_of(runs)) and file)
    run.flags.remove("--no-plot")
    for pair in ("cdat", "constant"), ("cdat", "linesearch"):
        run("--tuner", *pair)
    drawn = sorted(file.read_text() for file in run.folder.glob("**/*.png"))
    assert drawn == ["cdat", "cdat constant", "cdat linesearch", "constant", "linesearch"]
    configs = [tiny(tuner=tuner, out=run.folder) for tuner in ("cdat", "greedy")]  # the second has not begun
    train.show(configs)
    assert capsys.readouterr().out.splitlines()[-1] == f"figure: {train.folder_of(configs[0])}/figure.png"


def test_a_quantity_more_is_a_column_more_and_a_checkpoint_of_other_columns_is_refused(run, monkeypatch):
    compiled = train.compiled

    def with_one_more(*args):
        functions = compiled(*args)
        return functions._replace(measure=lambda w, *rest: functions.measure(w, *rest) | {"length": gd.norm(w)})

    for first, then in (with_one_more, compiled), (compiled, with_one_more):
        monkeypatch.setattr(train, "compiled", first)
        run("--out", run.folder / first.__name__, "--steps", 6)
        monkeypatch.setattr(train, "compiled", then)
        message = run.refused("--resume", "--out", run.folder / first.__name__)
        assert "checkpoint.npz: of other columns" in message and "--overwrite" in message
    length = held(run.folder / "with_one_more").history["length"]
    assert np.flatnonzero(np.isfinite(length)).tolist() == [0, 5]
    w = models.mlp((8, 8, 1), 10, width=8, depth=1).init(jax.random.key(0))
    assert length[0] == pytest.approx(float(gd.norm(w)), rel=1e-6)
    assert "length" in (one(run.folder / "with_one_more") / "metrics.csv").read_text().splitlines()[0].split(",")


def test_a_tuner_more_is_a_function_and_a_line_in_the_registry(tmp_path, capsys, monkeypatch):
    def ngn(c=1.0, lr_max=1.0):
        """Nonnegative Gauss-Newton.

        c: the rate where the gradient is short
        lr_max: no rate is longer
        """

        def rate(state, f, w, value, g, u):
            return jnp.minimum(c / (1 + c * gd.dot(g, g) / (2 * value)), lr_max), state

        return tuners.Tuner(lambda w: (), rate)

    monkeypatch.setitem(tuners.TUNERS, "ngn", ngn)
    monkeypatch.delitem(sys.modules, "train")
    new = importlib.import_module("train")
    flags = "--model linear --no-sharpness --steps 4 --no-plot --tuner ngn --c 0.5 1.0 --lr-max 0.7 --out"
    new.main([*flags.split(), str(tmp_path)])
    labels = {line.split("  ")[0].strip(" *") for line in capsys.readouterr().out.splitlines()[-2:]}
    folders = sorted(tmp_path.glob("digits-linear-gd-ngn-*lr_max0.7*"))
    assert labels == {"ngn, c 0.5", "ngn, c 1"} and ["c0.5" in folder.name for folder in folders] == [True, False]
    for c, folder in zip((0.5, 1.0), folders):
        history = plots.load_run(folder).history
        eta = np.minimum(c / (1 + c * history["grad_norm"] ** 2 / (2 * history["loss"])), 0.7)
        np.testing.assert_allclose(history["learning_rate"], eta, rtol=1e-5)
    text = " ".join(new.parser().format_help().split())
    assert "--c float" in text and all(part in text for part in ("ngn (1.0): the rate where the gradient is short",
                                       "ngn (1.0): no rate is longer", "linesearch (1.0): "))  # fmt: skip


# --- What is measured.


def logits(w, x):
    """A network of one hidden unit."""
    return jnp.tanh(x.reshape(-1, 64) @ w[1:65] + w[0])[:, None] * w[75:] + w[65:75]


@jax.jit
def f(w, x, y):
    return ((logits(w, x) - jnp.eye(10)[y]) ** 2).sum(1).mean() / 2 + 0.01 / 2 * w @ w


@jax.jit
def derivatives(w, x, y):
    return jax.grad(f)(w, x, y), jax.hessian(f)(w, x, y)


@pytest.mark.parametrize("optimizer, lr", [("gd", 0.05), ("rmsprop", 0.001), ("adam", 0.02)])
def test_what_is_measured_at_a_step_is_what_numpy_finds_there(optimizer, lr, tmp_path):
    """Sharpness of all samples, all else of the batch, both at w before the step."""
    config = train.configure(samples=32, test_samples=50, width=1, depth=1, activation="tanh", optimizer=optimizer,
                             batch_size=16, weight_decay=0.01, tuner="constant", lr=lr, steps=9, log_every=1,
                             sharpness_every=4, sharpness_tol=1e-7, out=tmp_path)  # fmt: skip
    flat = lambda leaves: np.concatenate([np.ravel(leaf) for leaf in leaves])
    ws = []  # before each step

    def keep(rows):  # what is on the disk then
        if rows:
            with np.load(train.folder_of(config) / "checkpoint.npz") as saved:
                ws.append(flat(saved[f"state/{k}"] for k in range(4)))

    with jax.enable_x64(True):
        network = models.mlp((8, 8, 1), 10, width=1, depth=1, activation="tanh")
        ws.append(flat(jax.tree.leaves(network.init(jax.random.key(0)))))
        history = train.train(config, keep)
        x, y, x_test, y_test, _ = data.load("digits", samples=32, test_samples=50)
        batches = [gd.batch(t, 32, 16) for t in range(9)]
        slopes = [jax.device_get(derivatives(w, x[rows], y[rows])) for w, rows in zip(ws, batches)]
        everywhere = lambda w: sum(derivatives(w, x[half], y[half])[1] for half in (slice(16), slice(16, 32))) / 2
        for t in 4, 8:
            w, rows, (g, h) = ws[t], batches[t], slopes[t]
            u, p = DIRECTIONS[optimizer](np.array([g for g, _ in slopes[: t + 1]]))
            scaled = lambda h: np.linalg.eigh(h / np.sqrt(p)[:, None] / np.sqrt(p))
            values, vectors = scaled(everywhere(w))
            expected = {
                "loss": f(w, x[rows], y[rows]),
                "grad_norm": np.linalg.norm(g),
                "sharpness": values[-1],
                "curvature": u @ h @ u / (u @ u),
                "alignment": abs(vectors[:, -1] @ (np.sqrt(p) * u)) / np.linalg.norm(np.sqrt(p) * u),
                "test_loss": f(w, x_test, y_test) - 0.01 / 2 * w @ w,
                "test_accuracy": np.mean(np.argmax(logits(w, x_test), 1) == y_test),
            }
            found = {name: history[name][t] for name in expected}
            assert found == pytest.approx(jax.tree.map(float, expected), rel=1e-6)
            for other in h, everywhere(ws[t + 1]):  # of the batch, or after the step: other numbers
                assert abs(scaled(other)[0][-1] / values[-1] - 1) > 0.001


@pytest.mark.parametrize("samples, standardize", [(0, False), (16, True)])
def test_the_sharpness_of_a_linear_model_is_that_of_the_samples_asked_for(tmp_path, samples, standardize):
    config = train.configure(model="linear", tuner="constant", samples=64, steps=1, sharpness_samples=samples,
                             standardize=standardize, sharpness_tol=1e-6, weight_decay=0.1, out=tmp_path)  # fmt: skip
    with jax.enable_x64(True):
        history = train.train(config)
    x = data.load("digits", samples=64).x.reshape(64, 64).astype(float)
    x = np.column_stack([(x - x.mean()) / x.std() if standardize else x, np.ones(64)])[: samples or 64]
    assert history["sharpness"][0] == pytest.approx(np.linalg.eigvalsh(x.T @ x / len(x))[-1] + 0.1, rel=1e-6)


def test_every_50_kinds_of_runs_all_programs_are_let_go(monkeypatch):
    cleared = []
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(width))
    train.compiled.cache_clear()
    for width in range(1, 121):
        kind, _ = train.kind_and_numbers(train.configure(width=width))
        for _ in range(2):  # the second time it is there
            train.compiled(kind, (8, 8, 1), 10)
    assert cleared == [50, 100]


def test_an_estimate_that_did_not_converge_is_not_logged_and_after_a_nan_the_next_is_found(tmp_path, monkeypatch):
    lobpcg, starts, tops = train.sharpness.lobpcg, [], []

    def at_times(product, v, tol):
        top = lobpcg(product, v, tol)
        nan = top._replace(value=math.nan, vector=jax.tree.map(lambda v: math.nan * v, top.vector), converged=False)
        starts.append(v)
        tops.append((top, top._replace(converged=False), nan, top)[len(tops)])
        return tops[-1]

    monkeypatch.setattr(train.sharpness, "lobpcg", at_times)
    history = train.train(tiny(steps=16, out=tmp_path))
    for column, steps in {"sharpness": [0, 15], "alignment": [0, 15], "test_loss": [0, 5, 10, 15]}.items():
        assert np.flatnonzero(np.isfinite(history[column])).tolist() == steps
    assert starts[2] is tops[1].vector


# --- Every model; several devices, several machines.


def small(model):
    """A network of a kind, as small as it comes, on what it reads: images, or else text."""
    takes = train.options_of(models.MODELS[model])
    # pydocs is another text under each Python, and on some of them the rnn's uᵀHu comes near 0.
    for dataset, count, cap in ("digits", 64, {}), ("pydocs", 24, {"lr_max": 1.0}):
        for sizes in {"width": 8, "depth": 1}, {"width": 8}:
            given = {name: size for name, size in sizes.items() if name in takes}
            samples = data.load(dataset, samples=count)
            with contextlib.suppress(ValueError):
                models.MODELS[model](samples.x.shape[1:], samples.classes, **given)
                return train.configure(model=model, loss="ce", **given, **cap), samples


def twenty_steps(model):
    """The losses and rates of 20 CDAT steps, and the largest |eigenvalue| after them by power iterations."""
    config, (x, y, _, _, classes) = small(model)
    kind, numbers = train.kind_and_numbers(config)
    functions = train.compiled(kind, x.shape[1:], classes)
    carry, rows = functions.init(0, numbers), []
    for _ in range(20):
        carry, metrics = functions.step(carry, (x, y), None, numbers)
        rows.append((float(metrics["loss"]), float(metrics["learning_rate"])))
    norm = lambda v: math.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(v)))
    v = jax.device_get(carry.u)
    for _ in range(10):  # in numpy, which compiles nothing for the shapes of a model
        v = jax.tree.map(lambda leaf: leaf / norm(v), v)
        v = jax.device_get(functions.hessian(carry.w, carry, v, (x, y), numbers))
    return rows, norm(v)


def every_model(folder, environment):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return dict(zip(models.MODELS, process.map(twenty_steps, models.MODELS)))


@pytest.mark.parametrize("model", models.MODELS)
def test_every_model_trains_20_cdat_steps_and_has_a_finite_sharpness(model, aside):
    rows, top = aside["every_model"].result()[model]
    losses, rates = np.array(rows).T
    assert np.isfinite(losses).all() and (rates > 0).all() and losses[-1] < losses[0], losses
    assert np.isfinite(top) and top > 0


SHORT = "--model linear --samples 256 --steps 30 --sharpness-every 10 --no-plot --out".split()
RUNS = {"mini": "--tuner cdat --batch-size 64".split(), "whole": "--tuner constant --lr 0.05".split()}
TAKE = "import sys, test_train; test_train.take_both(*sys.argv[1:])"
SHARE = "import test_train; test_train.share_a_batch()"


def take_both(folder, *more):
    """Both runs, the first in float64."""
    with jax.enable_x64(True):
        train.main([*SHORT, f"{folder}/mini", *RUNS["mini"], *more])
    train.main([*SHORT, f"{folder}/whole", *RUNS["whole"]])


def share_a_batch():
    """Prints what two devices take of halves of a batch, see `steps_on_two_devices`, in both modes of shard_map."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("devices",))
    batch, each = jax.sharding.PartitionSpec("devices"), jax.sharding.PartitionSpec("devices")

    def spread(fn, check_vma):
        own = lambda w, halves: fn(w, halves[0])[None]
        return jax.shard_map(own, mesh=mesh, in_specs=(jax.sharding.PartitionSpec(), batch), out_specs=each,
                             check_vma=check_vma)  # fmt: skip

    print(json.dumps([steps_on_two_devices(partial(spread, check_vma=check)) for check in (True, False)]))


def with_devices(environment, count):
    flags = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return environment | {"XLA_FLAGS": flags}


def four_devices(folder, environment):
    return folder, [ended(start(with_devices(environment, 4), "-c", TAKE, folder))]


def halves(folder, environment):
    return ended(start(with_devices(environment, 2), "-c", SHARE))


def two_processes(folder, environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [start(environment, "-c", TAKE, folder, "--distributed", address, 2, k) for k in range(2)]
    return folder, [ended(process) for process in both]


JOBS = every_model, two_processes, four_devices, halves


def test_four_devices_and_two_processes_take_the_steps_of_one_and_the_first_process_alone_writes(tmp_path, aside):
    take_both(tmp_path)
    for job, used in ("four_devices", 4), ("two_processes", 2):
        folder, ((code, out, err), *others) = aside[job].result()
        assert code == 0, err
        assert all(f"the batch of {size} is laid over {used} of {used} devices" in out for size in (64, 256))
        assert used == 4 or "waiting for the processes of 127.0.0.1:" in out
        assert "CDAT" in out and all("CDAT" not in out for _, out, _ in others)
        for name, rel in ("mini", 1e-6), ("whole", 1e-4):
            assert one(folder / name).name == one(tmp_path / name).name
            for column in "loss", "learning_rate", "grad_norm", "sharpness", "test_loss":
                found, expected = (held(place / name).history[column] for place in (folder, tmp_path))
                np.testing.assert_allclose(found, expected, rtol=rel)


def test_in_shard_map_two_devices_take_the_step_of_the_whole_batch_where_f_is_the_mean_over_them(aside):
    code, out, err = aside["halves"].result()
    assert code == 0, err
    for steps in json.loads(out):
        assert_devices_agree_where_f_is_the_mean(*steps)

"""Facts about a run: what is asked for, trained, measured and logged, alone or on several devices.

What happens to a run that is cut short, and how bad input is answered, is in test_survival.py.
"""

import contextlib
import importlib
import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import typing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import DIRECTIONS

import gd
import train
from train import data, models, plots, tuners

ROOT = Path(train.__file__).parent
TINY = "--samples 64 --width 8 --depth 1 --steps 12 --sharpness-every 5 --no-plot".split()


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a tiny command line and returns what it printed; run.folder is the folder of runs."""

    def run(*flags):
        train.main([*TINY, "--out", str(tmp_path / "runs"), *map(str, flags)])
        return capsys.readouterr().out

    run.folder = tmp_path / "runs"
    return run


def tiny(**given):
    """A run of the same size, for `train.train`."""
    return train.configure(**dict(samples=64, width=8, depth=1, steps=12, sharpness_every=5) | given)


def refused(capsys, *flags, late=False):
    """The one line that a command line is refused with, before any step unless it is late."""
    with pytest.raises(SystemExit) as end:
        train.main(list(flags))
    out, message = capsys.readouterr()
    assert end.value.code == 2 and message.count("\n") == 1 and message.startswith("train.py: ")
    assert ("compiling" in out) == late
    return message


def one(folder):
    """The only run folder there."""
    (folder,) = [path for path in Path(folder).iterdir() if path.is_dir()]
    return folder


def held(folder):
    """The only run there."""
    return plots.load_run(one(folder))


# ---- Processes take seconds to start: they run beside the tests of their file, which look at the results at its end.


@pytest.fixture(scope="module")
def aside(request, tmp_path_factory):
    """By name, the future of what each job(folder, environment) in JOBS of the test's file returns."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    with ThreadPoolExecutor(2) as threads:
        yield {
            job.__name__: threads.submit(job, tmp_path_factory.mktemp(job.__name__), environment)
            for job in request.module.JOBS
        }


@pytest.fixture(scope="module", autouse=True)
def begin(request):
    """They begin before the first test of the file, if a test that was picked looks at any."""
    if any(item.module is request.module and "aside" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("aside")


def python(code, *words, **how):
    """A process that runs some code."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **how)  # fmt: skip


def output(process):
    """What it printed, when it has ended well."""
    out = process.communicate()[0]
    assert process.returncode == 0, out
    return out


# ---- The command line


def test_flags_multiply_only_the_tuners_that_take_them():
    configs = train.configurations({"tuner": ["greedy", "constant", "cdat"], "lr": [0.1, 0.2], "seed": [0, 1]})
    kinds = [(config.tuner, vars(config).get("lr"), config.seed) for config in configs]
    assert kinds == [("greedy", None, 0), ("greedy", None, 1), ("constant", 0.1, 0), ("constant", 0.1, 1),
                     ("constant", 0.2, 0), ("constant", 0.2, 1), ("cdat", None, 0), ("cdat", None, 1)]  # fmt: skip


def test_a_flag_that_is_given_twice_has_the_values_of_both():
    given = train.parser().parse_args("--tuner constant --lr 0.1 --lr 0.2 0.4".split())
    assert [config.lr for config in train.configurations(vars(given))] == [0.1, 0.2, 0.4]


def test_each_run_of_a_product_has_a_folder_of_its_own():
    configs = train.configurations({"tuner": list(tuners.TUNERS), "lr": [0.1, 0.2], "sigma": [1.0, 2.0],
                                    "seed": [0, 1], "optimizer": ["gd", "adam"], "batch_size": [0, 32]})  # fmt: skip
    rates = [2 ** len({"lr", "sigma"} & set(train.options_of(tuner))) for tuner in tuners.TUNERS.values()]
    assert len({train.name_of(config) for config in configs}) == len(configs) == 8 * sum(rates)


def test_neither_two_values_nor_a_value_and_its_rounding_share_a_folder_and_names_are_short():
    def name(lr):
        return train.name_of(train.configure(tuner="constant", lr=lr)).removeprefix("digits-mlp-gd-constant-")

    assert name(0.2) != name(0.20000000001) and name(0.3) != name(0.1 + 0.2)
    assert [name(lr) for lr in (0.05, 0.02, 1e-5, 3.2e-4, 2.0, 100.0, 1e9)] == [
        "lr0.05", "lr0.02", "lr1e-05", "lr0.00032", "lr2", "lr100", "lr1000000000"]  # fmt: skip


def another(value, words=()):
    """A value that is not the default."""
    if words:
        return next(word for word in words if word != value)
    return not value if isinstance(value, bool) else value + type(value)(1)


def test_a_run_is_named_by_all_that_changes_its_numbers_but_its_length():
    plain, others = train.name_of(train.configure()), {"distributed": []}
    for name, (default, _) in train.SETTINGS.items():
        if name not in others:
            others[name] = another(default, train.WORDS.get(name, ()))
    same = {name for name, value in others.items() if train.name_of(train.configure(**{name: value})) == plain}
    assert same == {"data_dir", "out", "resume", "overwrite", "log_every", "no_plot", "steps", "distributed"}
    for part, factories in train.PARTS.items():
        for word, factory in factories.items():
            for name, option in train.options_of(factory).items():
                value = another(option.default, typing.get_args(option.annotation))
                given, chosen = {part: word, name: value}, {part: word}
                assert train.name_of(train.configure(**given)) != train.name_of(train.configure(**chosen)), name


def test_a_linesearch_tries_30_rates_on_mini_batches_and_1000_on_the_full_batch():
    for size, trials in (16, 30), (0, 1000):
        numbers = train.numbers_of(train.configure(tuner="linesearch", batch_size=size))
        assert numbers["max_trials"] == trials


def test_compilations_are_kept_where_the_user_says_or_in_the_users_cache_or_nowhere(monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    for given, environment, kept in (("mine", "/xdg", "mine"), (None, "/xdg", "/xdg/stepping-on-the-edge"), (None, "", None)):
        jax.config.update("jax_compilation_cache_dir", given)
        monkeypatch.setenv("XDG_CACHE_HOME", environment)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where a user has no home
        train.set_up(train.configure())
        assert jax.config.jax_compilation_cache_dir == kept
    jax.config.update("jax_compilation_cache_dir", before)


# ---- What is trained


def test_the_objective_is_the_data_loss_plus_half_the_decay_of_all_leaves(run):
    run("--tuner", "constant", "--steps", 1, "--weight-decay", 0)
    run("--tuner", "constant", "--steps", 1, "--weight-decay", 0.5)
    plain, decayed = [plots.load_run(folder).history for folder in sorted(run.folder.iterdir())]
    w = models.mlp((8, 8, 1), 10, width=8, depth=1).init(jax.random.key(0))
    half_square = 0.5 * sum(float((np.asarray(leaf) ** 2).sum()) for leaf in jax.tree.leaves(w))
    assert decayed["loss"][0] - plain["loss"][0] == pytest.approx(0.5 * half_square, rel=1e-5)
    assert decayed["test_loss"][0] == plain["test_loss"][0]  # the decay belongs to training


def test_the_largest_seed_gives_batches_and_the_log_says_how_many_samples_their_remainder_drops(run):
    text = run("--seed", 2147483647, "--batch-size", 25, "--steps", 1)
    assert np.isfinite(held(run.folder).history["loss"]).all()
    assert "batches of 25 drop 14 of 64 samples" in text


def test_matrix_products_are_float32_during_a_run_alone(tmp_path):
    seen = []
    train.train(tiny(steps=1, out=tmp_path), lambda rows: seen.append(jax.config.jax_default_matmul_precision))
    assert seen == ["float32", "float32"] and jax.config.jax_default_matmul_precision is None


def test_in_chunks_nothing_holds_the_activations_of_all_samples():
    numbers, key = train.numbers_of(train.configure()), 0
    many = jax.ShapeDtypeStruct((48, 8, 8, 1), "float32"), jax.ShapeDtypeStruct((48,), "int32")
    for size in 0, 16:
        kind = train.kind_of(train.configure(width=7, depth=1, chunk_size=size))
        functions = train.compiled(kind, (8, 8, 1), 10)
        carry = jax.eval_shape(functions.init, key, numbers)
        w, u = carry.w, carry.u
        arguments = {"step": (carry, many, None, numbers), "hessian": (w, carry, u, many, numbers),
                     "measure": (w, carry, 1.0, u, many, None, many, numbers)}  # fmt: skip
        for name, given in arguments.items():
            program = str(jax.make_jaxpr(getattr(functions, name))(*given))
            assert ("f32[48,7]" in program) == (size == 0) and ("f32[16,7]" in program) == (size == 16), name


def test_chunks_leave_all_columns_as_they_are(tmp_path):
    with jax.enable_x64(True):
        whole, chunked = (train.train(tiny(chunk_size=size, out=tmp_path)) for size in (0, 24))
    for column in whole:
        rtol = 1e-6 if column == "test_accuracy" else 1e-9  # the one that is a mean in float32
        np.testing.assert_allclose(chunked[column], whole[column], rtol, 1e-12, err_msg=column)


def test_a_sweep_over_numbers_traces_the_step_once(run, monkeypatch):
    traced = []
    make_step = gd.make_step
    monkeypatch.setattr(gd, "make_step", lambda *args: traced.append(args) or make_step(*args))
    run("--activation", "tanh", "--tuner", "constant", "--lr", *[0.01 * 2**k for k in range(8)], "--steps", 3)
    assert len(traced) == 1 and len(list(run.folder.iterdir())) == 8


# ---- The log


def test_the_same_seed_gives_the_same_bytes_whatever_the_log_interval(run):
    for out, every in {"a": 1, "b": 5, "c": 100}.items():
        run("--out", run.folder / out, "--log-every", every, "--batch-size", 0, 16)
    for name in ("digits-mlp-gd-cdat-samples64-sharpness_every5-width8-depth1",
                 "digits-mlp-gd-cdat-samples64-batch_size16-sharpness_every5-width8-depth1"):  # fmt: skip
        files = [(run.folder / out / name / "metrics.csv").read_bytes() for out in "abc"]
        assert files[0] == files[1] == files[2] and files[0].count(b"\n") == 13


def test_a_row_a_step_nan_where_nothing_was_measured_and_numbers_that_read_back_as_the_same_float32(run):
    run()
    settings, history, facts = held(run.folder)
    folder = one(run.folder)
    assert sorted(file.name for file in folder.iterdir()) == ["checkpoint.npz", "config.json", "metrics.csv"]
    header, *rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    assert header == list(history) and header[0] == "step" and history["step"].tolist() == list(range(12))
    rest = set(header) - {"step", "loss", "learning_rate", "grad_norm", "turn"}
    assert rest >= {"sharpness", "alignment", "greedy_gain", "test_loss", "test_accuracy"}
    assert {name: np.flatnonzero(np.isfinite(history[name])).tolist() for name in rest} == dict.fromkeys(rest, [0, 5, 10])
    assert np.isnan(history["turn"][0]) and np.all(np.abs(history["turn"][1:]) <= 1 + 1e-6)
    np.testing.assert_array_equal(np.float32(rows), np.float32([*history.values()]).T)
    assert all(str(np.float32(text)) == text for row in rows for text in row[1:])
    network, dataset = models.mlp((8, 8, 1), 10, width=8, depth=1), data.load("digits", samples=64)
    loss = lambda w: gd.mse(network.apply(w, dataset.x), dataset.y) + 0.5 * np.float32(1e-5) * gd.dot(w, w)
    assert history["loss"][0] == pytest.approx(float(jax.jit(loss)(network.init(jax.random.key(0)))), rel=1e-6)
    assert settings["sigma"] == 2 and facts["status"] == "done" and facts["matmul_precision"] == "float32"
    assert {"seconds", "data", "jax", "numpy", "device"} <= set(facts)
    assert json.loads((folder / "config.json").read_text()) == settings | facts


def test_an_infinite_setting_survives_the_way_through_the_files(run):
    flags = "--tuner", "linesearch", "--grow", "inf", "--steps", 2
    run(*flags)
    assert held(run.folder).settings["grow"] == math.inf and "is shown again" in run(*flags)


def test_a_finished_run_is_shown_again_not_repeated_and_it_says_so(run):
    first = run()
    file = one(run.folder) / "checkpoint.npz"
    stamp = file.stat().st_mtime_ns
    again = run()
    assert file.stat().st_mtime_ns == stamp and "loss 0" not in again
    assert "was run before and is shown again" in again and "was run before" not in first
    assert again.splitlines()[-1] == first.splitlines()[-1]
    assert "was run before" not in run("--overwrite") and file.stat().st_mtime_ns > stamp


def test_a_diverged_run_is_kept_reported_and_the_others_go_on(run):
    text = run("--tuner", "constant", "cdat", "--lr", 1e9, "--steps", 40, "--log-every", 4)
    _, history, facts = plots.load_run(next(run.folder.glob("*constant*")))
    assert facts["status"] == "diverged"
    assert np.isfinite(history["loss"][:-1]).all() and not np.isfinite(history["loss"][-1])
    assert f"constant 1e+09 diverged: its loss is not finite at step {len(history['loss']) - 1}" in text
    assert plots.load_run(next(run.folder.glob("*cdat*"))).facts["status"] == "done"


def test_what_is_reported_of_a_diverged_run_is_what_is_logged(tmp_path):
    reported = []
    history = train.train(tiny(steps=40, tuner="constant", lr=1e9, out=tmp_path), reported.extend)
    assert [row["step"] for row in reported] == history["step"].tolist() and len(reported) < 40


def test_huge_numbers_are_told_without_a_warning(run, recwarn):
    text = run("--tuner", "constant", "--lr", 1e30, "--weight-decay", 1e30, "--steps", 3)
    assert "diverged" in text and "1e+60" in text
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


def test_the_lines_of_a_run_fit_eighty_columns_and_compiling_comes_first(run):
    lines = run("--tuner", "constant", "linesearch", "cdat").splitlines()
    assert max(len(line) for line in lines if str(run.folder) not in line) <= 80
    assert lines[1] == "compiling ..." and "loss" in lines[2] and "product" in lines[2]


def test_each_run_has_its_figure_each_command_its_overlay_and_the_one_that_is_named_exists(run, capsys, monkeypatch):
    monkeypatch.setattr(plots, "draw", lambda runs, file: file.write_text(" ".join(run.settings["tuner"] for run in runs)))
    flags = [flag for flag in TINY if flag != "--no-plot"]
    for pair in ("cdat", "constant"), ("cdat", "linesearch"):
        train.main([*flags, "--tuner", *pair, "--out", str(run.folder)])
    drawn = sorted(file.read_text() for file in run.folder.glob("**/*.png"))
    assert drawn == ["cdat", "cdat constant", "cdat linesearch", "constant", "linesearch"]
    configs = [tiny(tuner=tuner, out=run.folder) for tuner in ("cdat", "greedy")]  # the second has not begun
    capsys.readouterr()
    train.show(configs)
    assert capsys.readouterr().out.splitlines()[-1] == f"figure: {train.folder_of(configs[0])}/figure.png"


# ---- Adding something


def test_a_quantity_more_is_a_column_more_and_a_checkpoint_of_other_columns_is_refused(run, capsys, monkeypatch):
    compiled = train.compiled

    def with_one_more(*args):
        functions = compiled(*args)
        return functions._replace(measure=lambda w, *rest: functions.measure(w, *rest) | {"length": gd.norm(w)})

    monkeypatch.setattr(train, "compiled", with_one_more)
    run("--steps", 6)
    length, folder = held(run.folder).history["length"], one(run.folder)
    assert np.flatnonzero(np.isfinite(length)).tolist() == [0, 5]
    w = models.mlp((8, 8, 1), 10, width=8, depth=1).init(jax.random.key(0))
    assert length[0] == pytest.approx(float(gd.norm(w)), rel=1e-6)
    assert "length" in (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    flags = [*TINY, "--resume", "--out"]
    monkeypatch.undo()
    assert "checkpoint.npz: of other columns" in refused(capsys, *flags, str(run.folder))
    run("--out", run.folder / "plain", "--steps", 6)
    monkeypatch.setattr(train, "compiled", with_one_more)
    assert "checkpoint.npz: of other columns" in refused(capsys, *flags, str(run.folder / "plain"))


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
    new.main([*TINY, "--tuner", "ngn", "--c", "0.5", "1.0", "--lr-max", "0.7", "--out", str(tmp_path)])
    assert {line.split("  ")[0].strip(" *") for line in capsys.readouterr().out.splitlines()[-2:]} == {"ngn, c 0.5", "ngn, c 1"}
    folders = sorted(tmp_path.glob("digits-mlp-gd-ngn-*lr_max0.7*"))
    assert [folder.name.count("-c0.5") for folder in folders] == [1, 0]
    for c, folder in zip((0.5, 1.0), folders):
        history = plots.load_run(folder).history
        eta = np.minimum(c / (1 + c * history["grad_norm"] ** 2 / (2 * history["loss"])), 0.7)
        np.testing.assert_allclose(history["learning_rate"], eta, rtol=1e-5)
    text = " ".join(new.parser().format_help().split())
    assert "--c float" in text and "ngn (1.0): the rate where the gradient is short" in text
    assert "ngn (1.0): no rate is longer" in text and "linesearch (1.0): " in text


# ---- What is measured


def logits(w, x):
    return jnp.tanh(x.reshape(-1, 64) @ w[1:65] + w[0])[:, None] * w[75:] + w[65:75]


@jax.jit
def f(w, x, y):
    return ((logits(w, x) - jnp.eye(10)[y]) ** 2).sum(1).mean() / 2 + 0.01 / 2 * w @ w


@jax.jit
def derivatives(w, x, y):
    return jax.grad(f)(w, x, y), jax.hessian(f)(w, x, y)


@pytest.mark.parametrize("optimizer, lr", [("gd", 0.1), ("rmsprop", 0.001), ("adam", 0.02)])
def test_what_is_measured_at_a_step_is_what_numpy_finds_there(optimizer, lr, tmp_path):
    """Sharpness of all samples, all else of the batch, both at w before the step, in a network of one hidden unit."""
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
            eta = -g @ u / abs(u @ h @ u)
            expected = {
                "loss": f(w, x[rows], y[rows]),
                "grad_norm": np.linalg.norm(g),
                "sharpness": values[-1],
                "alignment": abs(vectors[:, -1] @ (np.sqrt(p) * u)) / np.linalg.norm(np.sqrt(p) * u),
                "test_loss": f(w, x_test, y_test) - 0.01 / 2 * w @ w,
                "test_accuracy": np.mean(np.argmax(logits(w, x_test), 1) == y_test),
                "greedy_gain": f(w + 2 * eta * u, x[rows], y[rows]) - f(w + eta * u, x[rows], y[rows]),
            }
            assert {name: history[name][t] for name in expected} == pytest.approx(jax.tree.map(float, expected), rel=1e-6)
            for other in h, everywhere(ws[t + 1]):  # of the batch, or after the step: other numbers
                assert abs(scaled(other)[0][-1] / values[-1] - 1) > 0.001


@pytest.mark.parametrize("samples, standardize", [(0, False), (16, False), (16, True)])
def test_the_sharpness_of_a_linear_model_is_that_of_the_samples_asked_for_standardized_or_not(tmp_path, samples, standardize):
    config = train.configure(model="linear", tuner="constant", samples=64, steps=1, sharpness_samples=samples,
                             standardize=standardize, sharpness_tol=1e-6, weight_decay=0.1, out=tmp_path)  # fmt: skip
    with jax.enable_x64(True):
        history = train.train(config)
    x = data.load("digits", samples=64).x.reshape(64, 64).astype(float)
    x = np.column_stack([(x - x.mean()) / x.std() if standardize else x, np.ones(64)])[: samples or 64]
    assert history["sharpness"][0] == pytest.approx(np.linalg.eigvalsh(x.T @ x / len(x))[-1] + 0.1, rel=1e-6)


def test_an_estimate_that_did_not_converge_is_not_logged_and_one_that_is_nan_starts_no_other(tmp_path, monkeypatch):
    lobpcg, starts, tops = train.sharpness.lobpcg, [], []

    def at_times(product, v, tol):
        top = lobpcg(product, v, tol)
        nan = jax.tree.map(lambda v: math.nan * v, top.vector)
        starts.append(v)
        tops.append((top, top._replace(converged=False), top._replace(value=math.nan, vector=nan), top)[len(tops)])
        return tops[-1]

    monkeypatch.setattr(train.sharpness, "lobpcg", at_times)
    history = train.train(tiny(sharpness_every=3, out=tmp_path))
    for column in "sharpness", "alignment":
        assert np.flatnonzero(np.isfinite(history[column])).tolist() == [0, 9]
    assert np.flatnonzero(np.isfinite(history["test_loss"])).tolist() == [0, 3, 6, 9]
    assert starts[2] is tops[1].vector and starts[3] is tops[1].vector


def small(model):
    """A network of a kind, as small as it comes, on what it reads: images, or else text."""
    takes = train.options_of(models.MODELS[model])
    for dataset in "digits", "pydocs":
        for sizes in {"width": 8, "depth": 1}, {"width": 8}:
            given = {name: size for name, size in sizes.items() if name in takes}
            samples = data.load(dataset, samples=16)
            with contextlib.suppress(ValueError):
                models.MODELS[model](samples.x.shape[1:], samples.classes, **given)
                return train.configure(model=model, loss="ce", **given), samples


def twenty_steps(model):
    """The losses of 20 CDAT steps, the rates, and the sharpness after them."""
    config, (x, y, _, _, classes) = small(model)
    functions, numbers = train.compiled(train.kind_of(config), x.shape[1:], classes), train.numbers_of(config)
    carry, rows = functions.init(0, numbers), []
    for _ in range(20):
        carry, metrics = functions.step(carry, (x, y), None, numbers)
        rows.append((float(metrics["loss"]), float(metrics["learning_rate"])))
    product = lambda v: functions.hessian(carry.w, carry, v, (x, y), numbers)
    return rows, train.sharpness.lobpcg(product, carry.u, tol=0.1, max_iters=20).value


def every_model(folder, environment):
    """What `twenty_steps` returns, by model, from a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return dict(zip(models.MODELS, process.map(twenty_steps, models.MODELS)))


@pytest.mark.parametrize("model", models.MODELS)
def test_every_model_trains_20_cdat_steps_and_has_a_finite_sharpness(model, aside):
    rows, top = aside["every_model"].result()[model]
    losses, rates = np.array(rows).T
    assert np.isfinite(losses).all() and (rates > 0).all()
    assert losses[-1] < losses[0], losses
    assert np.isfinite(top) and top > 0


# ---- Processes of another precision, of several devices, on several machines

SHORT = "--samples 256 --width 8 --depth 1 --steps 30 --sharpness-every 10 --no-plot --out".split()
RUNS = {"mini": "--tuner cdat --batch-size 64".split(), "whole": "--tuner constant --lr 0.05".split()}


def take_both(folder, *more):
    """Both runs, the first in float64."""
    with jax.enable_x64(True):
        train.main([*SHORT, f"{folder}/mini", *RUNS["mini"], *more])
    train.main([*SHORT, f"{folder}/whole", *RUNS["whole"]])


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """A folder with both runs."""
    folder = tmp_path_factory.mktemp("one")
    take_both(folder)
    return folder


TAKE = "import sys, test_train; test_train.take_both(*sys.argv[1:])"


def four_devices(folder, environment):
    devices = environment.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    return folder, output(python(TAKE, folder, env=environment | {"XLA_FLAGS": devices}))


def two_processes(folder, environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [python(TAKE, folder, "--distributed", address, 2, k, env=environment) for k in range(2)]
    return folder, [output(process) for process in both]


def bfloat16(folder, environment):
    code = "import train; train.main('--model linear --steps 1 --no-sharpness --out .'.split())"
    output(python(code, cwd=folder, env=environment | {"JAX_DEFAULT_MATMUL_PRECISION": "bfloat16"}))
    return one(folder)


JOBS = every_model, four_devices, two_processes, bfloat16


def assert_same(folder, expected, rel):
    """The runs in both folders took the same steps."""
    assert one(folder).name == one(expected).name
    found, expected = held(folder).history, held(expected).history
    for column in "loss", "learning_rate", "grad_norm", "sharpness", "test_loss":
        np.testing.assert_allclose(found[column], expected[column], rtol=rel)


def test_four_devices_take_the_steps_of_one_and_the_batch_is_laid_over_all(one_device, aside):
    folder, out = aside["four_devices"].result()
    for size in 64, 256:
        assert f"the batch of {size} is laid over 4 of 4 devices" in out
    assert_same(folder / "mini", one_device / "mini", rel=1e-6)
    assert_same(folder / "whole", one_device / "whole", rel=1e-4)


def test_two_processes_take_the_steps_of_one_and_the_first_alone_writes(one_device, aside):
    folder, (first, second) = aside["two_processes"].result()
    assert "laid over 2 of 2 devices" in first and "CDAT" in first and "CDAT" not in second, (first, second)
    assert_same(folder / "mini", one_device / "mini", rel=1e-6)
    assert_same(folder / "whole", one_device / "whole", rel=1e-4)


def test_jaxs_own_variable_sets_the_precision_of_matrix_products_and_config_json_says_so(aside):
    folder = aside["bfloat16"].result()
    assert json.loads((folder / "config.json").read_text())["matmul_precision"] == "bfloat16"
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")

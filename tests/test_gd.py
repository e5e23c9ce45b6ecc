"""Facts about the step: directions as numpy computes them, chunks, devices, and what every optimizer and tuner keeps.

The tests of the last two sections run over the registries and the files: an entry more needs no line here.
"""

import ast
import doctest
import importlib
import re
import sys
import typing
from functools import partial
from inspect import getdoc, signature
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import DIRECTIONS, FULL, MINI, START, TRACES, assert_same_training, derivatives, flat, loss
from by_hand import momentum_by_hand, numbers_of, pytree, step_with, train, train_by_hand
from jax import jit

import data
import gd
import models
import sharpness
import tuners
from gd import OPTIMIZERS
from paper import rivals
from tuners import TUNERS

NUMBERS = {  # what an optimizer or tuner is tried with, where its defaults would leave an option idle
    "momentum": {"momentum": 0.8},
    "adam": {"beta1": 0.8, "eps": 1e-6},
    "linesearch": {"slope": 1e-3, "slack": 1e-3, "shrink": 0.7, "grow": 2.0, "lr_max": 0.9, "max_trials": 30},
    "cdat": {"sigma": 0.9, "beta": 0.9, "damping": 1e-6},
    "schedule": {"steps": 8, "warmup": 0.3},
    "polyak": {"f_min": 0.01, "lr_max": 0.2},
    "exact": {"sigma": 0.02},
    "feedback": {"rise": 0.1, "tolerance": 0.01, "growth": 1.3, "sigma_low": 1.4, "sigma_high": 1.9, "average": 0.8},
}

# --- The step and its directions.

VARIANTS = [
    ("gd", {}),
    ("momentum", {}),
    ("momentum", {"momentum": 0.5}),
    ("rmsprop", {}),
    ("rmsprop", {"beta2": 0.9, "eps": 0.01}),
    ("adam", {}),
    ("adam", {"beta1": 0.7, "beta2": 0.95, "eps": 0.01}),
]


@pytest.mark.parametrize("batches", [FULL, MINI], ids=["full", "mini"])
@pytest.mark.parametrize("name, numbers", VARIANTS)
def test_20_steps_are_those_of_plain_numpy(name, numbers, batches):
    lr = {"rmsprop": 0.01}.get(name, 0.1)
    theirs = train_by_hand(batches, partial(DIRECTIONS[name], **numbers), lambda past: lr)
    with jax.enable_x64(True):
        assert_same_training(train(batches, name, "constant", numbers, {"lr": lr}), theirs)


def test_metrics_are_measured_before_the_move_and_turn_is_a_cosine():
    rates = 0.3 * (1 - np.arange(20) / 20)
    theirs = train_by_hand(MINI, momentum_by_hand, lambda past: rates[len(past) - 1])
    with jax.enable_x64(True):
        ours = train(MINI, "momentum", "schedule", {}, {"lr": 0.3, "steps": 20, "warmup": 0.0}, decay="linear")
    length = np.linalg.norm
    for t, (now, eta, metrics) in enumerate(zip(theirs, rates, [record.metrics for record in ours], strict=True)):
        turn = now.u @ theirs[t - 1].u / length(now.u) / length(theirs[t - 1].u) if t else 0
        expected = {"loss": now.loss, "learning_rate": eta, "grad_norm": length(now.g), "turn": turn}
        assert metrics == pytest.approx(expected, rel=1e-8)


def test_the_losses_are_those_of_their_formulas_and_cross_entropy_stays_finite_for_huge_logits():
    logits, y = np.random.default_rng(0).normal(size=(5, 3)), np.array([0, 2, 1, 1, 0])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = {"mse": 0.5 * np.mean(np.sum((logits - np.eye(3)[y]) ** 2, 1)), "ce": -np.mean(np.log(p[range(5), y]))}
    with jax.enable_x64(True):
        for name, value in expected.items():
            of_images, of_texts = (jit(gd.LOSSES[name])(z, y) for z, y in ((logits, y), (logits[None], y[None])))
            assert [float(of_images), float(of_texts)] == pytest.approx(2 * [value], abs=1e-14)
    assert float(gd.ce(np.array([[1e30, 0.0]], np.float32), np.array([1]))) == pytest.approx(1e30)


# --- Batches, chunks and devices.


def test_the_batch_of_a_step_depends_on_seed_and_step_and_an_epoch_takes_each_sample_once():
    epochs = [gd.batch(t, 11, 3, seed=5) for t in range(6)]
    assert len(set(np.concatenate(epochs[:3]))) == len(set(np.concatenate(epochs[3:]))) == 9  # 2 of 11 are left out
    assert not np.array_equal(epochs[0], epochs[3])
    assert not np.array_equal(epochs[0], gd.batch(0, 11, 3, seed=2147483647))
    np.testing.assert_array_equal(gd.batch(4, 11, 3, seed=5), epochs[4])


@pytest.mark.parametrize("size", [0, 4, 5, 12, 100])
def test_chunks_leave_loss_gradient_curvature_and_hessian_product_as_they_are(size):
    value, g, h = derivatives(START, FULL[0])
    v = np.linspace(-1, 2, 5)
    with jax.enable_x64(True):
        chunked, vector = partial(gd.mean_over_chunks, size=size), pytree(v)
        product = lambda w, batch: sharpness.hvp(lambda w: loss(w, batch), w, vector)

        @jit
        def ours(w, batch):
            f = lambda w: chunked(loss)(w, batch)
            gradient = chunked(jax.value_and_grad(loss))(w, batch)
            return f(w), gradient, tuners.curvature(f, w, vector), chunked(product)(w, batch)

        chunked_value, (ours_value, ours_g), uhu, hv = ours(pytree(START), jax.tree.map(jnp.asarray, FULL[0]))
    close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
    close(ours_value, value), close(chunked_value, value), close(flat(ours_g), g)
    close(uhu, v @ h @ v), close(flat(hv), h @ v)


@pytest.mark.parametrize("pair", [("gd", "linesearch"), ("adam", "cdat")])
def test_20_steps_in_chunks_are_20_steps(pair):
    with jax.enable_x64(True):
        numbers = [NUMBERS.get(name, {}) for name in pair]
        assert_same_training(train(FULL, *pair, *numbers, chunk_size=5), train(FULL, *pair, *numbers), rtol=1e-11)


def test_a_batch_whose_arrays_differ_in_length_is_no_batch_of_chunks():
    mean = gd.mean_over_chunks(lambda w, batch: w * jnp.mean(batch[0]), 3)
    for other in (jnp.arange(20.0), jnp.ones(())):
        with pytest.raises(ValueError, match="equally long"):
            mean(1.0, (jnp.arange(7.0), other))


MEASURED = {"hessian": tuners.cdat(), "gauss-newton": tuners.cdat(curvature="gauss-newton"),
            "hessian product": rivals.exact(iterations=1)}  # fmt: skip


@pytest.mark.parametrize("tuner", MEASURED.values(), ids=MEASURED)
def test_memory_in_chunks_does_not_grow_with_the_samples(optimized, tuner):
    sizes = [64, 128, 128, 10]
    w = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in zip(sizes, sizes[1:])]

    def mlp(w, x):
        for layer in w:
            x = jnp.tanh(x @ layer)
        return x

    mlp_loss = tuners.Composed(mlp, lambda z, w, x: jnp.mean(z**2))

    def gradient_product_and_step(w, x):
        product = lambda w, x: sharpness.hvp(lambda w: mlp_loss(w, x), w, w)
        step = gd.make_step(mlp_loss, gd.gd(), tuner, 256)
        return step(gd.init_carry(w, gd.gd(), tuner), x), gd.mean_over_chunks(product, 256)(w, x)

    def peak(samples):
        x = jax.ShapeDtypeStruct((samples, 64), jnp.float32)
        return jit(gradient_product_and_step).lower(w, x).compile().memory_analysis().temp_size_in_bytes

    assert 0 < peak(4096) <= 1.3 * peak(512)


def test_a_batch_is_laid_over_as_many_devices_as_divide_it(monkeypatch):
    assert gd.over_devices(64) == (None, None)
    monkeypatch.setattr(jax, "devices", lambda: 4 * jax.local_devices())
    for size, used in (64, 4), (250, 2), (9, 3), (7, 1):
        split, whole = gd.over_devices(size)
        assert split.shard_shape((size, 5)) == (size // used, 5) and split.num_devices == used
        assert whole.shard_shape((size, 5)) == (size, 5) and whole.is_fully_replicated
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert gd.over_devices(8)[0].num_devices == 4
    with pytest.raises(ValueError, match="250 samples cannot be laid evenly over 4 devices"):
        gd.over_devices(250)


# --- What holds for every optimizer with one tuner, and for every tuner with one optimizer: they meet only in g and u.

PAIRS = [*((name, "cdat") for name in OPTIMIZERS), *(("momentum", name) for name in TUNERS if name != "cdat")]
VARIANTS_OF_CDAT = [("momentum", "cdat", {"curvature": "gauss-newton"}),
                    ("momentum", "feedback", {"curvature": "hessian"})]  # fmt: skip
every_pair = pytest.mark.parametrize("optimizer, tuner, words", [*((*pair, {}) for pair in PAIRS), *VARIANTS_OF_CDAT])


def start(optimizer, tuner, w, scale=1.0, words={}):
    """(carry, numbers), with floats `scale` times those above."""
    parts = (OPTIMIZERS, optimizer), (TUNERS, tuner)
    numbers = tuple(numbers_of(registry[name], NUMBERS.get(name, {})) for registry, name in parts)
    numbers = jax.tree.map(lambda x: scale * x if isinstance(x, float) else x, numbers)
    return gd.init_carry(w, OPTIMIZERS[optimizer](**numbers[0]), TUNERS[tuner](**numbers[1], **words)), numbers


@every_pair
def test_carry_and_scale_keep_structure_and_dtype(optimizer, tuner, words):
    kinds = partial(jax.tree.map, lambda a: (a.shape, a.dtype, a.weak_type))
    for x64, dtype in (False, "float32"), (True, "float64"), (True, "float32"):
        with jax.enable_x64(x64):
            carry, numbers = start(optimizer, tuner, pytree(START, dtype), words=words)
            batch = jax.tree.map(partial(jnp.asarray, dtype=dtype), FULL[0])
            after, metrics = jax.eval_shape(step_with(optimizer, tuner, **words), carry, batch, numbers)
            assert kinds(after) == kinds(carry)
            assert {leaf.dtype.name for leaf in jax.tree.leaves((carry.w, carry.u, metrics))} == {dtype}
            scale = jax.eval_shape(OPTIMIZERS[optimizer](**numbers[0]).scale, carry.optimizer)
            assert scale is None or kinds(scale) == kinds(carry.w)


@every_pair
def test_a_donated_carry_gives_the_same_bits_twice_and_other_numbers_need_no_compilation(optimizer, tuner, words):
    def run(scale=1.0):
        carry, numbers = start(optimizer, tuner, pytree(START), scale, words)
        logged = []
        for batch in MINI[:6]:
            buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(carry)]
            assert len(set(buffers)) == len(buffers)
            previous = carry
            carry, metrics = step_with(optimizer, tuner, **words)(carry, batch, numbers)
            assert previous.w["weight"].is_deleted()
            logged.append(metrics)  # read only after the carry beside it was given away
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((carry, logged))]

    TRACES.clear()
    with jax.enable_x64(True):
        once, again, other = run(), run(), run(0.9)
    assert once == again != other
    assert TRACES.total() <= 1  # none where another test came first


@every_pair
def test_vmap_of_scan_with_fixed_numbers_is_a_loop_with_numbers_as_arguments(optimizer, tuner, words):
    starts = np.stack([START, START[::-1]])

    def scanned(w, batches):
        carry, numbers = start(optimizer, tuner, w, words=words)
        step = gd.make_step(loss, OPTIMIZERS[optimizer](**numbers[0]), TUNERS[tuner](**numbers[1], **words))
        return jax.lax.scan(step, carry, batches)

    with jax.enable_x64(True):
        batches = jax.tree.map(lambda *a: jnp.stack(a), *MINI[:4])
        w = jax.tree.map(lambda *a: jnp.stack(a), *map(pytree, starts))
        carries, logs = jit(jax.vmap(scanned, (0, None)))(w, batches)
        for i, w in enumerate(starts):
            carry, numbers = start(optimizer, tuner, pytree(w), words=words)
            for t, batch in enumerate(MINI[:4]):
                carry, metrics = step_with(optimizer, tuner, **words)(carry, batch, numbers)
                for name, value in metrics.items():
                    np.testing.assert_allclose(logs[name][i, t], value, 1e-8, 1e-10)
            for together, alone in zip(jax.tree.leaves(carries), jax.tree.leaves(carry), strict=True):
                np.testing.assert_allclose(together[i], alone, 1e-8, 1e-10)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_states_keep_their_dtype_whatever_that_of_data_and_numbers_and_weak_types_compile_once(optimizer):
    with jax.enable_x64(True):
        numbers = {key: np.float64(value) for key, value in numbers_of(OPTIMIZERS[optimizer], {}).items()}
        direction, rule = OPTIMIZERS[optimizer](**numbers), TUNERS["greedy"]()
        step = jit(gd.make_step(lambda w, data: jnp.mean((data @ w["a"] - w["b"]) ** 2), direction, rule))
        w = {"a": jnp.full(3, 0.5, jnp.float32), "b": 1.0}  # the second is a Python number, of any precision
        carry = gd.init_carry(w, direction, rule)
        kinds = [(leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(carry)]
        for _ in range(3):
            carry, _ = step(carry, jnp.arange(6.0).reshape(2, 3))
        assert [(leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(carry)] == kinds
    assert carry.w["a"].dtype == "float32" and carry.w["b"].dtype == "float64" and step._cache_size() == 1


# --- What holds for every factory of all four registries, and for every file but train.py.

FACTORIES = [*data.DATASETS.values(), *models.MODELS.values(), *OPTIMIZERS.values(), *TUNERS.values()]
NO_OPTIONS = "folder", "shape", "classes", "steps", "max_trials"  # that a run has by itself


def options_of(factory):
    return {name: option for name, option in signature(factory).parameters.items() if name not in NO_OPTIONS}


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda factory: factory.__name__)
def test_an_option_has_a_default_among_what_is_allowed_and_a_line_of_help(factory):
    for name, option in options_of(factory).items():
        assert option.default is not option.empty
        assert option.default in (typing.get_args(option.annotation) or [option.default])
        assert re.search(rf"^{name}: \S", getdoc(factory), re.MULTILINE), name


def test_options_of_one_name_are_of_one_type():
    types = {}
    for factory in FACTORIES:
        for name, option in options_of(factory).items():
            assert types.setdefault(name, type(option.default)) is type(option.default), name


NEEDS = {"gd": "jax numpy", "tuners": "jax", "sharpness": "jax numpy", "models": "jax", "data": "numpy PIL",
         "plots": "numpy matplotlib", "paper/theory": "jax"}  # fmt: skip


@pytest.mark.parametrize("name", NEEDS)
def test_a_file_that_may_be_copied_out_alone_imports_no_other(name):
    tree = ast.parse((Path(gd.__file__).parent / f"{name}.py").read_text())
    imports = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    imports += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in imports} - sys.stdlib_module_names <= set(NEEDS[name].split())


@pytest.mark.parametrize("name", NEEDS)
def test_examples_in_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where they leave their files
    failed, attempted = doctest.testmod(importlib.import_module(name.replace("/", ".")))
    assert attempted >= 3 and failed == 0

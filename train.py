"""Train a network with a learning rate tuner, and watch the sharpness.

    python train.py --tuner cdat --sigma 2
    python train.py --tuner constant linesearch greedy cdat --lr 0.1

What this file teaches: how the parts compose. A loss is a model (models.py) on data (data.py); a step is an optimizer
(gd.py) and a tuner (tuners.py) on that loss; the sharpness (sharpness.py) is measured beside it. First the loop, then
what it calls; the command line comes last.

Every run is a folder runs/NAME. Its checkpoint.npz is the run, all else there is made from it. Read next: plots.py.
"""

import argparse
import contextlib
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

import data
import gd
import models
import plots
import sharpness
import tuners

# ------------------------------------------------------------------------------------------------------ the loop


def train(config, report=lambda rows: None, stopped=lambda: False):
    """One run (see `configure`): trained, continued from its checkpoint, or read back where it is done.

    Returns its history, a dict of one numpy array a column of metrics.csv. report(rows) is called as the first step
    begins, without rows, and with those of each log interval. Once stopped() is true the run is saved, and
    KeyboardInterrupt raised. ValueError and OSError, in one line, for what cannot be run.

    >>> train(configure(model="linear", tuner="greedy", samples=32, steps=3, out="a_folder"))["loss"].shape
    (3,)
    """
    held = held_run(config)
    if held and held.facts["status"] in OVER:
        return held.history
    dataset = data.load(config.dataset, config.data_dir, config.samples, config.test_samples, config.standardize,
                        **{name: vars(config)[name] for name in options_of(data.DATASETS[config.dataset])})  # fmt: skip
    n, size = len(dataset.x), config.batch_size or len(dataset.x)
    if size > n:
        raise ValueError(f"--batch-size is {size}; there are {n} training samples")
    jitted, numbers = compiled(kind_of(config), dataset.x.shape[1:], dataset.classes), numbers_of(config)
    if n % size:
        print(f"batches of {size} drop {n % size} of {n} samples in each epoch")
    split, whole = gd.over_devices(size)  # how a batch lies on the devices, and all else
    if split:
        print(f"the batch of {size} is laid over {split.mesh.size} of {jax.device_count()} devices")
    samples = jax.device_put((dataset.x, dataset.y), whole if config.batch_size else split)
    some = jax.tree.map(lambda a: a[: config.sharpness_samples or n], samples)  # that the sharpness is measured on
    held_out = jax.device_put((dataset.x_test, dataset.y_test), whole)
    indices_of = lambda t: jax.device_put(gd.batch(t, n, size, config.seed), split) if config.batch_size else None

    with jax.default_matmul_precision(MATMUL_PRECISION):
        carry = jitted.init(config.seed, numbers)
        v = jax.tree.map(jnp.ones_like, carry.w)  # where the first search for the top eigenvector starts
        # The columns of the log are the keys of what step and measure return, known without running them.
        columns = jax.eval_shape(jitted.step, carry, samples, indices_of(0), numbers)[1]
        columns |= jax.eval_shape(jitted.measure, carry.w, carry, 1.0, v, samples, indices_of(0), held_out, numbers)
    with owned(config), jax.default_matmul_precision(MATMUL_PRECISION):  # nothing that is refused leaves a folder
        history, state, facts = begin(config, columns, (carry, v), dataset)
        carry, v = jax.device_put(state, whole)
        started, waiting = time.time() - facts["seconds"], []
        report([])
        for t in range(len(history["step"]), config.steps):
            indices, w = indices_of(t), carry.w
            carry, metrics = jitted.step(carry, samples, indices, numbers)
            row = {"step": t, **metrics}
            if t % config.sharpness_every == 0:  # at w, before the step, whose direction u the new carry holds
                lam = math.nan
                if not config.no_sharpness:
                    product = lambda v: jitted.hessian(w, carry, v, some, numbers)
                    top = sharpness.lobpcg(product, v, config.sharpness_tol)
                    lam = top.value if top.converged else math.nan  # else it is not measured
                    v = top.vector if math.isfinite(top.value) else v
                row |= jitted.measure(w, carry, lam, v, samples, indices, held_out, numbers)
            waiting.append(row)
            last, stop = t + 1 == config.steps, stopped()
            if (t + 1) % config.log_every and not last and not stop:
                continue
            rows, waiting = jax.device_get(waiting), []  # here and in lobpcg alone the loop waits for the device
            finite = np.isfinite([row["loss"] for row in rows])
            rows = rows if finite.all() else rows[: finite.argmin() + 1]  # a diverged run ends with what shows it
            for name, column in history.items():
                new = np.array([row.get(name, np.nan) for row in rows], column.dtype)
                history[name] = np.concatenate([column, new])
            ending = "done" if last else "interrupted" if stop else "running"
            facts |= {"status": ending if finite.all() else "diverged", "seconds": round(time.time() - started, 1)}
            save(config, history, (carry, v), facts)
            report(rows)
            if facts["status"] == "interrupted":
                raise KeyboardInterrupt
            if facts["status"] == "diverged":
                break
    return {name: column.astype(float) for name, column in history.items()}


class Compiled(NamedTuple):
    """What is compiled for one kind of run.

    samples: (x, y) on the devices; indices: which of them are the batch of a step, None for all; numbers: `numbers_of`;
    w: the parameters before a step; carry: what the step handed on (gd.Carry), with its direction u and preconditioner
    P; λ, v: the top eigenpair at w, of P^(-1/2) H P^(-1/2) (22), which is H for gradient descent.
    """

    init: Callable  # init(seed, numbers) -> carry
    step: Callable  # step(carry, samples, indices, numbers) -> (carry, metrics), see gd.make_step
    hessian: Callable  # hessian(w, carry, v, samples, numbers) -> P^(-1/2) H P^(-1/2) v (22)
    measure: Callable  # measure(w, carry, λ, v, samples, indices, held_out, numbers) -> what else is logged


@functools.cache
def compiled(kind, shape, classes):
    """The functions of one kind of run (see `kind_of`), jitted; cached, so that the runs of a sweep share them.

    The carry is not donated to the step, since w is still measured after it. On ResNet34 donation would save 4 % of a
    step's memory, 11 % under Adam.
    """
    kind = SimpleNamespace(**dict(kind))
    network = built(models.MODELS[kind.model], vars(kind) | {"shape": shape, "classes": classes})
    optimizer_of = lambda numbers: built(gd.OPTIMIZERS[kind.optimizer], vars(kind) | numbers)
    tuner_of = lambda numbers: built(tuners.TUNERS[kind.tuner], vars(kind) | numbers)
    data_loss = lambda w, batch: gd.LOSSES[kind.loss](network.apply(w, batch[0]), batch[1])
    objective = lambda numbers: lambda w, batch: data_loss(w, batch) + 0.5 * numbers["weight_decay"] * gd.dot(w, w)
    in_chunks = functools.partial(gd.mean_over_chunks, size=kind.chunk_size)
    pick = lambda samples, indices: samples if indices is None else jax.tree.map(lambda a: a[indices], samples)

    def init(seed, numbers):
        return gd.init_carry(network.init(jax.random.key(seed)), optimizer_of(numbers), tuner_of(numbers))

    def step(carry, samples, indices, numbers):
        take = gd.make_step(objective(numbers), optimizer_of(numbers), tuner_of(numbers), kind.chunk_size)
        return take(carry, pick(samples, indices))

    def hessian(w, carry, v, samples, numbers):
        scale = optimizer_of(numbers).scale(carry.optimizer)  # P^(-1/2), None for the identity
        scaled = lambda v: v if scale is None else jax.tree.map(jnp.multiply, scale, v)
        product = lambda w, batch: sharpness.hvp(lambda w: objective(numbers)(w, batch), w, scaled(v))
        return scaled(in_chunks(product)(w, samples))

    def test(w, batch):
        right = jnp.argmax(network.apply(w, batch[0]), -1) == batch[1]
        return {"test_loss": data_loss(w, batch), "test_accuracy": jnp.mean(right.astype(jnp.float32))}

    def measure(w, carry, lam, v, samples, indices, held_out, numbers):
        """A column of metrics.csv for each key: a new quantity is a line here."""
        f = lambda w: in_chunks(objective(numbers))(w, pick(samples, indices))
        cos = sharpness.alignment(carry.u, v, optimizer_of(numbers).scale(carry.optimizer))
        return {
            "sharpness": tuners.scalar(lam, w),
            "alignment": jnp.where(jnp.isfinite(lam), cos, jnp.nan),
            "greedy_gain": tuners.greedy_gain(f, w, carry.u),
            **in_chunks(test)(w, held_out),
        }

    return Compiled(*map(jax.jit, (init, step, hessian, measure)))


# --------------------------------------------------------------------------------------------- a run on the disk

OVER = ("done", "diverged")  # the statuses of a run that needs no more steps; the others are running and interrupted


def folder_of(config):
    """Where a run is kept."""
    return Path(config.out) / name_of(config)


def held_run(config):
    """What the folder of a run holds of it, a plots.Run; None where there is nothing to go on from.

    Raises ValueError for what only --overwrite may replace, or only --resume may continue.
    """
    folder = folder_of(config)
    if config.overwrite or not (folder / "checkpoint.npz").exists():
        return None
    held, settings = plots.load_run(folder), settings_of(config)
    differ = [name for name in settings if held.settings.get(name) != settings[name]]
    stretches = "steps" not in inspect.signature(tuners.TUNERS[config.tuner]).parameters  # as a schedule does not
    longer = differ == ["steps"] and held.settings["steps"] < config.steps and stretches
    if longer and held.facts["status"] == "diverged":  # more steps would not be taken
        return held
    if longer and not config.resume:
        raise ValueError(f"{folder}: holds {held.settings['steps']} steps; give --resume to go on, or --overwrite")
    if longer:  # not over any more
        return held._replace(facts=held.facts | {"status": "running"})
    if differ:
        values = ", ".join(f"{dashed(name)} {held.settings.get(name)}" for name in differ)
        raise ValueError(f"{folder}: holds a run with {values}; give --overwrite to replace it, or another --out")
    if held.facts["status"] not in OVER and not config.resume:
        raise ValueError(f"{folder}: holds an unfinished run; give --resume to go on, or --overwrite")
    return held


def owned(config):
    """The folder of a run, for this process alone. Of several processes the first one writes; Windows has no lock."""
    free = jax.process_index() > 0 or os.name == "nt"
    return contextlib.nullcontext() if free else data.owned(folder_of(config))


def begin(config, columns, state, dataset):
    """(history, state, facts) to go on from: those of the checkpoint where there is one, else empty and as given."""
    held, file = held_run(config), folder_of(config) / "checkpoint.npz"  # once more, now that no one else writes
    multihost_utils.sync_global_devices(str(file))  # nor does process 0, while another still looks
    identity = hashlib.sha256(dataset.x.tobytes() + dataset.y.tobytes()).hexdigest()[:16]
    facts = dict(status="running", seconds=0.0, data=identity, jax=jax.__version__, numpy=np.__version__,
                 device=jax.devices()[0].device_kind, matmul_precision=MATMUL_PRECISION)  # fmt: skip
    history = {"step": np.empty(0, int)} | {name: np.empty(0, column.dtype) for name, column in columns.items()}
    if not held:
        if jax.process_index() == 0:  # under --overwrite: nothing is left of the old run
            for name in ("checkpoint.npz", "metrics.csv", "config.json", "figure.png"):
                file.with_name(name).unlink(missing_ok=True)
        return history, state, facts
    leaves, tree = jax.tree.flatten(state)
    with np.load(file) as saved:  # which load_run has found whole
        found = [saved[name] for name in saved.files if name.startswith("state/")]
    other = {"network or precision": [(a.shape, a.dtype) for a in leaves] != [(a.shape, a.dtype) for a in found],
             "data": held.facts["data"] != identity, "columns": held.history.keys() != history.keys()}  # fmt: skip
    if any(other.values()):
        what = " and ".join(name for name, differs in other.items() if differs)
        raise ValueError(f"{file}: of other {what}; give --overwrite to start again")
    history = {name: held.history[name].astype(column.dtype) for name, column in history.items()}
    return history, jax.tree.unflatten(tree, found), facts | {"seconds": held.facts["seconds"]}


def save(config, history, state, facts):
    """The run so far, as one file; once it stops also as metrics.csv and config.json, for people and other programs."""
    if jax.process_index() > 0:
        return
    folder, settings = folder_of(config), settings_of(config)
    arrays = {f"history/{name}": column for name, column in history.items()}
    arrays |= {f"state/{k}": leaf for k, leaf in enumerate(jax.tree.leaves(state))}
    texts = dict(settings=json.dumps(settings), facts=json.dumps(facts))
    data.write(folder / "checkpoint.npz", lambda stream: np.savez(stream, **texts, **arrays))
    if facts["status"] != "running":
        cells = [column.astype(str) for column in history.values()]  # with the digits that read back as the same number
        csv = "\n".join(map(",".join, [history, *zip(*cells), ""]))
        data.write(folder / "metrics.csv", lambda stream: stream.write(csv.encode()))
        text = json.dumps(settings | facts, indent=1)
        data.write(folder / "config.json", lambda stream: stream.write(text.encode()))


# ------------------------------------------------------------------------------------------------------ settings

SETTINGS = {  # what every run has, by flag: the default and the help
    "dataset": ("digits", "data set"),
    "data_dir": ("datasets", "folder that holds the data sets, or is to"),
    "samples": (1024, "training samples, balanced over the classes; 0 = all"),
    "test_samples": (0, "test samples; 0 = all"),
    "standardize": (False, "give each channel of the images mean 0 and deviation 1"),
    "model": ("mlp", "network"),
    "preset": ("", "a network of the paper, in its size"),
    "loss": ("mse", "mse = half the squared error, ce = cross-entropy"),
    "weight_decay": (1e-5, "c in the term c/2 |w|^2 of the loss"),
    "seed": (0, "seed of the parameters and of the mini-batches"),
    "optimizer": ("gd", "what gives the direction"),
    "tuner": ("cdat", "what sets the learning rate"),
    "batch_size": (0, "samples a step; 0 = all, full batch"),
    "chunk_size": (0, "samples in memory at a time; 0 = the whole batch"),
    "steps": (2000, "steps"),
    "sharpness_every": (100, "steps between two measurements of the sharpness and of what else is not of every step"),
    "sharpness_samples": (0, "training samples the sharpness is measured on; 0 = all"),
    "sharpness_tol": (1e-3, "its relative residual"),
    "no_sharpness": (False, "do not measure it"),
    "out": ("runs", "folder that holds the run folders"),
    "resume": (False, "go on from the checkpoint, if there is one"),
    "overwrite": (False, "run again what is there already"),
    "log_every": (100, "steps between two writes to disk"),
    "no_plot": (False, "draw no figure"),
    "distributed": (None, "one of several processes, named by HOST:PORT HOW_MANY WHICH or by a cluster"),
}
UNNAMED = ("data_dir", "out", "resume", "overwrite", "log_every", "no_plot", "distributed")  # change no number of a run
PARTS = {"dataset": data.DATASETS, "model": models.MODELS, "optimizer": gd.OPTIMIZERS, "tuner": tuners.TUNERS}
WORDS = {**PARTS, "preset": models.PRESETS, "loss": gd.LOSSES}
KNOWN = ("folder", "shape", "classes", "steps", "max_trials")  # arguments of factories that a run has by itself
# Else accelerators round matrix products to TF32 or bfloat16, and move the sharpness by more than its tolerance.
MATMUL_PRECISION = jax.config.jax_default_matmul_precision or "float32"


def options_of(factory):
    """The options of a factory: the parameters of its signature, by name."""
    return {name: option for name, option in inspect.signature(factory).parameters.items() if name not in KNOWN}


def configure(**given):
    """One run: a namespace of all settings and of the options of all that is chosen, as by default unless given."""
    settings = {name: default for name, (default, _) in SETTINGS.items()}
    if given.get("preset"):
        given |= models.PRESETS[given["preset"]][1]
    for part, factories in PARTS.items():
        chosen = options_of(factories[given.get(part, settings[part])])
        settings |= {name: option.default for name, option in chosen.items()}
    if unknown := given.keys() - settings:
        raise ValueError(f"{', '.join(map(dashed, unknown))} applies to nothing that was chosen")
    return SimpleNamespace(**settings | given)


def built(factory, values):
    """What a factory makes of its arguments among some values, by name."""
    return factory(**{name: values[name] for name in inspect.signature(factory).parameters})


def settings_of(config):
    """All that the numbers of a run depend on, by name."""
    return {name: value for name, value in vars(config).items() if name not in UNNAMED}


def numbers_of(config):
    """The numbers of optimizer and tuner. They enter the jitted functions as arguments: no value compiles anew."""
    takers = gd.OPTIMIZERS[config.optimizer], tuners.TUNERS[config.tuner]
    names = ["weight_decay", *(name for taker in takers for name in options_of(taker))]
    numbers = {name: vars(config)[name] for name in names if isinstance(vars(config)[name], float)}
    return numbers | {"steps": config.steps, "max_trials": 30 if config.batch_size else 1000}  # as in the paper


def kind_of(config):
    """What is compiled in, as pairs: runs of one kind differ only in numbers, in the seed, and in how they are run."""
    left_out = {"seed", *numbers_of(config)}
    return tuple((name, value) for name, value in settings_of(config).items() if name not in left_out)


def name_of(config):
    """The name of a run's folder: data set, model, optimizer, tuner, and each setting that is not the default.

    >>> name_of(configure(tuner="constant", lr=0.05, seed=3))
    'digits-mlp-gd-constant-seed3-lr0.05'
    """
    words = [config.dataset, config.preset or config.model, config.optimizer, config.tuner]
    plain = vars(configure(**{name: vars(config)[name] for name in (*PARTS, "preset")}))
    for name, value in settings_of(config).items():
        if value != plain[name] and name != "steps":
            words.append(name if value is True else f"{name}{value}".removesuffix(".0"))
    return "-".join(words)


# -------------------------------------------------------------------------------------------------- command line

RANGES = {  # by flag: the least value, the largest, and what else it may be; a number without a line may be any
    "samples": (0, 10**9), "test_samples": (0, 10**9), "image_size": (1, 1024), "width": (1, 65536), "depth": (1, 100),
    "patch": (1, 4096), "heads": (1, 1024), "attention_width": (0, 65536), "weight_decay": (0, 1e30),
    "seed": (0, 2147483647), "momentum": (0, 0.999999), "beta1": (0, 0.999999), "beta2": (0, 0.999999),
    "eps": (1e-30, 1e30), "lr": (1e-30, 1e30), "sigma": (1e-30, 1e30), "beta": (0, 0.999999), "damping": (0, 1e30),
    "sigma_high": (1, 1e30), "tolerance": (0, 1e30), "average": (0, 0.999999), "slope": (0, 0.999999),
    "slack": (0, 1e30), "shrink": (1e-6, 0.999999), "grow": (1.000001, 1e30, math.inf), "lr_max": (1e-30, 1e30),
    "iterations": (1, 1000), "warmup": (0, 0.999999), "hyper_rate": (0, 1), "batch_size": (0, 10**9),
    "chunk_size": (0, 10**9), "steps": (1, 10**9), "sharpness_every": (1, 10**9), "sharpness_samples": (0, 10**9),
    "sharpness_tol": (1e-30, 0.999999), "log_every": (1, 10**9),
}  # fmt: skip
# By flag: what takes it ("": every run), and for each of these its default, the words that it may be, and its help.
FLAGS = {name: {"": (default, WORDS.get(name), text)} for name, (default, text) in SETTINGS.items()}
for factories in PARTS.values():
    for taker, factory in factories.items():
        helps = dict(re.findall(r"^ +(\w+): (.+)$", factory.__doc__ or "", re.MULTILINE))
        for name, option in options_of(factory).items():
            words = typing.get_args(option.annotation)
            FLAGS.setdefault(name, {})[taker] = (option.default, words, helps.get(name, ""))
SINGLE = {*SETTINGS} - {*PARTS, "seed", "batch_size"}  # all other flags take several values: the runs are their product


def dashed(name):
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def fail(message, program="train.py"):
    """One line on stderr, and the end."""
    print(f"{program}:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def parser():
    """The command line. Only flags that were given end up in its result."""
    parser = argparse.ArgumentParser(usage="python train.py [--flag value ...]", description=__doc__.splitlines()[0],
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)  # fmt: skip
    parser.error = fail
    for name, takers in FLAGS.items():
        helps = []
        for taker, (default, words, text) in takers.items():  # all with words and a default of the same kind
            helps.append(f"{taker} ({default}): {text}" if taker else f"{text} ({default})")
        text = "; ".join(helps).removesuffix(" (None)").removesuffix(" ()").removesuffix(" (False)")
        if isinstance(default, bool):
            parser.add_argument(dashed(name), action="store_true", help=text)
        elif name == "distributed":
            parser.add_argument(dashed(name), nargs="*", metavar="WORD", help=text)
        else:
            metavar = f"{{{','.join(words)}}}" if words else type(default).__name__
            several = {} if name in SINGLE else {"nargs": "+", "action": "extend"}
            parser.add_argument(dashed(name), type=type(default), choices=words or None, help=text,
                                metavar=metavar if name in SINGLE else (metavar, ""), **several)  # fmt: skip
    return parser


def configurations(given):
    """The runs that flags ask for: the product of their values, each flag for what takes it.

    given is a dict from setting to a value, or to a list of values. Raises ValueError.

    >>> [vars(c).get("lr", c.tuner) for c in configurations({"tuner": ["constant", "cdat"], "lr": [0.1, 0.2]})]
    [0.1, 0.2, 'cdat']
    """
    values = {part: SETTINGS[part][0] for part in PARTS} | given
    if preset := given.get("preset"):
        values["model"] = models.PRESETS[preset][0]
        if given.get("model", values["model"]) not in (values["model"], [values["model"]]):
            raise ValueError(f"--model {given['model']} contradicts --preset {preset}, which is a {values['model']}")
    if given.get("resume") and given.get("overwrite"):
        raise ValueError("--resume contradicts --overwrite")
    runs, applied = {}, set()
    grid = [value if isinstance(value, list) and name not in SINGLE else [value] for name, value in values.items()]
    for choice in itertools.product(*grid):
        flags = dict(zip(values, choice))
        chosen = {"", *(flags[part] for part in PARTS if part != "model" or not preset)}  # a preset fixes its options
        flags = {name: value for name, value in flags.items() if chosen & FLAGS[name].keys()}
        applied |= set(flags)
        config = configure(**flags)
        check(config)
        runs[name_of(config)] = config  # once, where choices differ in nothing that applies
    for name in given.keys() - applied:
        takers = ", ".join(FLAGS[name])
        raise ValueError(f"{dashed(name)} applies to nothing that was chosen; it belongs to {takers}")
    return list(runs.values())


def check(config):
    """Raises ValueError for a number that is not allowed."""
    for name, value in vars(config).items():
        low, high, *others = RANGES.get(name, (-1e30, 1e30))
        if type(value) in (int, float) and not (low <= value <= high or value in others):
            allowed = " or ".join([f"{low:g} to {high:g}", *map(str, others)])
            raise ValueError(f"{dashed(name)} is {value}; it must be {allowed}")
    if 0 < config.samples < config.batch_size:
        raise ValueError(f"--batch-size is {config.batch_size}; there are {config.samples} training samples")


def set_up(config):
    """What JAX must know before it starts, unless its own variables say otherwise."""
    if "device_count" in os.environ.get("XLA_FLAGS", ""):  # CPU devices wait for each other in one pool of threads,
        os.environ.setdefault("NPROC", "64")  # as many as there are cores: too few, and they wait for ever
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "stepping-on-the-edge")
    if not jax.config.jax_compilation_cache_dir and cache.is_absolute():  # it is not where a user has no home
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if config.distributed is None:
        return
    try:
        address, count, which = config.distributed or (None, None, None)
        jax.distributed.initialize(address, count and int(count), which and int(which))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"--distributed takes HOST:PORT HOW_MANY WHICH, or nothing on a cluster: {error}") from None
    if jax.process_index() > 0:  # what belongs to no process alone is for the first one to say
        sys.stdout = open(os.devnull, "w")


def show(configs):
    """The table and the figures of all runs that have begun: one for each run, and one of all."""
    folders = [folder for folder in map(folder_of, configs) if (folder / "checkpoint.npz").exists()]
    runs = [plots.load_run(folder) for folder in folders]
    if not runs or jax.process_index() > 0:
        return
    print("\n".join(plots.table(runs)))
    if configs[0].no_plot:
        return
    for folder, run in zip(folders, runs):
        figure = folder / "figure.png"
        plots.draw([run], figure)
    if len(runs) > 1:  # the name is that of these runs alone, so that no other command draws over it
        names = "\n".join(folder.name for folder in folders)
        figure = Path(configs[0].out) / f"overlay-{hashlib.sha256(names.encode()).hexdigest()[:6]}.png"
        plots.draw(runs, figure)
    print(f"figure: {figure}")


def run(configs, stopped):
    """Trains one after the other, and shows what came of it."""
    set_up(configs[0])  # in what is not of one run alone they are all alike
    held = [held_run(config) for config in configs]  # every refusal comes before the first step
    for k, config in enumerate(configs):
        over = held[k] and held[k].facts["status"] in OVER
        shown = " was run before and is shown again; --overwrite repeats it" if over else ""
        print(f"[{k + 1}/{len(configs)}] {folder_of(config)}{shown}", flush=True)
        train(config, plots.progress(config.steps), stopped)
        if stopped():
            raise KeyboardInterrupt
    show(configs)


def main(words):
    """The command line, as a list of words."""
    interrupts = []  # Ctrl-C is noted, so that no step is cut in half; the second one acts at once

    def interrupt(*_):
        interrupts.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        configs = configurations(vars(parser().parse_args(words)))
        try:
            run(configs, stopped=lambda: bool(interrupts))
            sys.stdout.flush()
        except KeyboardInterrupt:
            print()
            show(configs)
            kept = [word for word in words if word not in ("--resume", "--overwrite")]
            print(f"interrupted; go on with: python train.py {shlex.join(kept)} --resume")
            sys.exit(130)
    except BrokenPipeError:  # nobody reads on, as behind `| head`
        os._exit(1)
    except (ValueError, OSError) as error:
        fail(error)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):
            raise
        fail("out of memory; --chunk-size 256 (or less) keeps that many samples in memory at a time")
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    main(sys.argv[1:])

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
import os
import re
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple, get_args

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


def train(config, report=lambda rows: None):
    """One run (see `configure`): trained, continued from its checkpoint, or read back where it is over.

    Returns its history, a dict of one numpy array a column of metrics.csv. report(rows) is called as the first step
    begins, without rows, and with those of each log interval, once they are on the disk: a run that was ended, by
    whatever, goes on from there. ValueError and OSError, in one line, for what cannot be run.

    >>> train(configure(model="linear", tuner="greedy", samples=32, steps=3, out="a_folder"))["loss"].shape
    (3,)
    """
    held, over = held_run(config)
    if over:
        return held.history
    dataset = data.load(config.dataset, config.data_dir, config.samples, config.test_samples, config.standardize,
                        **{name: vars(config)[name] for name in options_of(data.DATASETS[config.dataset])})  # fmt: skip
    kind, numbers = kind_and_numbers(config)
    jitted = compiled(kind, dataset.x.shape[1:], dataset.classes)
    samples, held_out, indices_of, whole = on_devices(config, dataset)
    some = jax.tree.map(lambda a: a[: config.sharpness_samples or None], samples)  # that the sharpness is measured on

    with jax.default_matmul_precision(MATMUL_PRECISION), contextlib.ExitStack() as stack:
        carry = jitted.init(config.seed, numbers)
        v = jax.tree.map(jnp.ones_like, carry.w)  # where the first search for the top eigenvector starts
        # The columns of the log are the keys of what step and measure return, known without running them.
        columns = jax.eval_shape(jitted.step, carry, samples, indices_of(0), numbers)[1]
        columns |= jax.eval_shape(jitted.measure, carry.w, carry, 1.0, v, samples, indices_of(0), held_out, numbers)
        if jax.process_index() == 0:  # of several processes the first one writes
            stack.enter_context(data.owned(folder_of(config)))
        history, state, facts = begin(config, columns, (carry, v), dataset)
        carry, v = jax.device_put(state, whole)
        started, waiting = time.time() - facts["seconds"], []
        report([])
        for t in range(len(history["step"]), config.steps):
            indices, w = indices_of(t), carry.w
            carry, metrics = jitted.step(carry, samples, indices, numbers)
            row = {"step": t, **metrics}
            if t % config.sharpness_every == 0:  # at w, before the step; carry.u is the direction just taken
                lam, found = 0.0, False
                if not config.no_sharpness:
                    product = lambda v: jitted.hessian(w, carry, v, some, numbers)
                    top = sharpness.lobpcg(product, v, config.sharpness_tol)
                    lam, v, found = top.value, top.vector, top.converged
                row |= jitted.measure(w, carry, lam, v, samples, indices, held_out, numbers)
                row |= {} if found else {"sharpness": np.nan, "alignment": np.nan}
            waiting.append(row)
            if (t + 1) % config.log_every == 0 or t + 1 == config.steps:
                rows, waiting = jax.device_get(waiting), []  # here and in lobpcg alone the loop waits for the device
                finite = np.isfinite([row["loss"] for row in rows])
                rows = rows if finite.all() else rows[: finite.argmin() + 1]  # a diverged run ends with what shows it
                facts["seconds"] = round(time.time() - started, 1)
                log(config, facts, history, rows, (carry, v))
                report(rows)
                if facts["status"] == "diverged":
                    break
    return history


def on_devices(config, dataset):
    """(samples, held_out, indices_of, whole): data on devices, the indices of a step's batch, how the carry lies."""
    n, size = len(dataset.x), config.batch_size or len(dataset.x)
    data.require(size <= n, f"--batch-size is {size}; there are {n} training samples")
    split, whole = gd.over_devices(size)
    if split:
        print(f"the batch of {size} is laid over {split.mesh.size} of {jax.device_count()} devices")
    samples = jax.device_put((dataset.x, dataset.y), whole if config.batch_size else split)
    held_out = jax.device_put((dataset.x_test, dataset.y_test), whole)
    indices_of = lambda t: jax.device_put(gd.batch(t, n, size, config.seed), split) if config.batch_size else None
    return samples, held_out, indices_of, whole


class Compiled(NamedTuple):
    """What is compiled for one kind of run: w are the parameters before a step, carry is what the step handed on."""

    init: Callable  # init(seed, numbers) -> carry, a gd.Carry
    step: Callable  # step(carry, samples, indices, numbers) -> (carry, metrics); indices: of the batch, None for all
    hessian: Callable  # hessian(w, carry, v, samples, numbers) -> P^(-1/2) H P^(-1/2) v (22), Hv for gradient descent
    measure: Callable  # measure(w, carry, λ, v, samples, indices, held_out, numbers) -> what else is logged, by column


@functools.cache
def compiled(kind, shape, classes):
    """The functions of one kind of run (`kind_and_numbers`), jitted; cached, so that the runs of a sweep share them."""
    if compiled.cache_info().misses % 50 == 0:  # the programs of some 130 kinds fill the memory maps of a process:
        jax.clear_caches()  # every 50 kinds all are let go
    kind = dict(kind)
    network = built(models.MODELS[kind["model"]], kind | {"shape": shape, "classes": classes})
    optimizer_of = lambda numbers: built(gd.OPTIMIZERS[kind["optimizer"]], kind | numbers)
    tuner_of = lambda numbers: built(tuners.TUNERS[kind["tuner"]], kind | numbers)
    outputs = lambda w, batch: network.apply(w, batch[0])
    data_loss = lambda z, batch: gd.LOSSES[kind["loss"]](z, batch[1])
    in_chunks = functools.partial(gd.mean_over_chunks, size=kind["chunk_size"])
    pick = lambda samples, indices: samples if indices is None else jax.tree.map(lambda a: a[indices], samples)

    def objective(numbers):
        decay = lambda w: 0.5 * numbers["weight_decay"] * gd.dot(w, w)
        return tuners.Composed(outputs, lambda z, w, batch: data_loss(z, batch) + decay(w))

    def init(seed, numbers):
        return gd.init_carry(network.init(jax.random.key(seed)), optimizer_of(numbers), tuner_of(numbers))

    def step(carry, samples, indices, numbers):
        take = gd.make_step(objective(numbers), optimizer_of(numbers), tuner_of(numbers), kind["chunk_size"])
        return take(carry, pick(samples, indices))

    def hessian(w, carry, v, samples, numbers):
        scale = optimizer_of(numbers).scale(carry.optimizer)  # P^(-1/2), None for the identity
        scaled = lambda v: v if scale is None else jax.tree.map(jnp.multiply, scale, v)
        product = lambda w, batch: sharpness.hvp(lambda w: objective(numbers)(w, batch), w, scaled(v))
        return scaled(in_chunks(product)(w, samples))

    def test(w, batch):
        z = outputs(w, batch)
        return {"test_loss": data_loss(z, batch), "test_accuracy": jnp.mean(jnp.argmax(z, -1) == batch[1])}

    def measure(w, carry, lam, v, samples, indices, held_out, numbers):
        f = lambda w: in_chunks(objective(numbers))(w, pick(samples, indices))
        return {  # a column of metrics.csv for each key: a new quantity is a line here
            "sharpness": tuners.scalar(lam, w),
            "alignment": sharpness.alignment(carry.u, v, optimizer_of(numbers).scale(carry.optimizer)),
            "curvature": tuners.curvature(f, w, carry.u) / gd.dot(carry.u, carry.u),  # whatever the tuner takes
            **in_chunks(test)(w, held_out),
        }

    # The carry is not donated: its w is measured after the step. Donation saves 4 % of ResNet34's, 11 % under Adam.
    return Compiled(*map(jax.jit, (init, step, hessian, measure)))


# --------------------------------------------------------------------------------------------- a run on the disk


def folder_of(config):
    """Where a run is kept."""
    return Path(config.out).expanduser() / name_of(config)


def held_run(config):
    """What a folder holds of a run, or None; and whether that run is over. ValueError for another or unfinished one."""
    folder, asked = folder_of(config), settings_of(config)
    if config.overwrite or not (folder / "checkpoint.npz").exists():
        return None, False
    held, options = plots.load_run(folder), inspect.signature(tuners.TUNERS[config.tuner]).parameters
    steps_matter = held.settings.get("steps", 0) > config.steps or "steps" in options  # else more are the same run
    differ = [name for name in asked if held.settings.get(name) != asked[name] and (steps_matter or name != "steps")]
    if differ:
        values = ", ".join(f"{dashed(name)} {held.settings.get(name)}" for name in differ)
        raise ValueError(f"{folder}: holds a run with {values}; give --overwrite to replace it, or another --out")
    taken = len(held.history["step"])
    over = taken == config.steps or plots.diverged(held.history)
    if not (over or config.resume):
        raise ValueError(f"{folder}: holds {taken} of {config.steps} steps; give --resume to go on, or --overwrite")
    return held, over


def begin(config, columns, state, dataset):
    """(history, state, facts) to go on from: those of the checkpoint where there is one, else empty and as given."""
    (held, _), file = held_run(config), folder_of(config) / "checkpoint.npz"  # once more, now that no one else writes
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
    same = {"network or precision": [(a.shape, a.dtype) for a in leaves] == [(a.shape, a.dtype) for a in found],
            "data": held.facts.get("data") == identity, "columns": held.history.keys() == history.keys()}  # fmt: skip
    other = " and ".join(name for name in same if not same[name])
    data.require(not other, f"{file}: of other {other}; give --overwrite to start again")
    return held.history, jax.tree.unflatten(tree, found), facts | {"seconds": held.facts["seconds"]}


def log(config, facts, history, rows, state):
    """Some rows join the history, in which nan is what a row does not have, and the run so far is written: one file."""
    for name, column in history.items():
        new = np.array([row.get(name, np.nan) for row in rows], column.dtype)
        history[name] = np.concatenate([column, new])
    done = len(history["step"]) == config.steps
    facts["status"] = "diverged" if plots.diverged(history) else "done" if done else "running"
    arrays = {f"history/{name}": column for name, column in history.items()}
    arrays |= {f"state/{k}": leaf for k, leaf in enumerate(jax.tree.leaves(state))}
    texts = dict(settings=json.dumps(settings_of(config)), facts=json.dumps(facts))
    if jax.process_index() == 0:
        data.write(folder_of(config) / "checkpoint.npz", lambda stream: np.savez(stream, **texts, **arrays))


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
    "batch_size": (0, "samples a step; 0 = all, full batch; each epoch leaves out a remainder that fills no batch"),
    "chunk_size": (0, "samples in memory at a time; 0 = the whole batch"),
    "steps": (2000, "steps"),
    "sharpness_every": (100, "steps between two measurements of the sharpness and of what else is not of every step"),
    "sharpness_samples": (0, "training samples the sharpness is measured on; 0 = all"),
    "sharpness_tol": (1e-3, "relative residual at which the sharpness is found"),
    "no_sharpness": (False, "do not measure the sharpness"),
    "out": ("runs", "folder that holds the run folders"),
    "resume": (False, "go on from the checkpoint, if there is one"),
    "overwrite": (False, "run again what is there already"),
    "log_every": (100, "steps between two writes to disk"),
    "no_plot": (False, "draw no figure"),
    "distributed": (None, "one of several processes, named by HOST:PORT HOW_MANY WHICH or by a cluster"),
}
UNNAMED = ("data_dir", "out", "resume", "overwrite", "log_every", "no_plot", "distributed")  # change no number of a run
PARTS = {"dataset": data.DATASETS, "model": models.MODELS, "optimizer": gd.OPTIMIZERS, "tuner": tuners.TUNERS}
SINGLE = {*SETTINGS} - {*PARTS, "seed", "batch_size"}  # all other flags take several values: the runs are their product
WORDS = {**PARTS, "preset": models.PRESETS, "loss": gd.LOSSES}
KNOWN = ("folder", "shape", "classes", "steps", "max_trials")  # arguments of factories that a run has by itself
RANGES = {  # by flag: the least number, the largest, and what else it may be; those without a line are not negative
    "seed": (0, 2147483647), "image_size": (1, 1024), "width": (1, 65536), "depth": (1, 100), "patch": (1, 4096),
    "heads": (1, 1024), "attention_width": (0, 65536), "log_every": (1, 1000), "sharpness_tol": (1e-30, 0.999999),
    "shrink": (1e-6, 0.999999), "grow": (1.000001, 1e30, np.inf),
    **dict.fromkeys(("steps", "sharpness_every", "every", "growth", "sigma_low", "sigma_high"), (1, 10**9)),
    **dict.fromkeys(("eps", "lr", "sigma", "lr_max"), (1e-30, 1e30)),
    **dict.fromkeys(("momentum", "beta1", "beta2", "beta", "average", "slope"), (0, 0.999999)),
}  # fmt: skip
# Else accelerators round matrix products to TF32 or bfloat16, and move the sharpness by more than its tolerance.
MATMUL_PRECISION = jax.config.jax_default_matmul_precision or "float32"


@functools.cache  # the tables of paper/ ask for it some million times
def options_of(factory):
    """The options of a factory: the parameters of its signature, by name."""
    return {name: option for name, option in inspect.signature(factory).parameters.items() if name not in KNOWN}


def dashed(name):
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def configure(**given):
    """One run: a namespace of the settings that apply to what is chosen, as by default unless given, or ValueError."""
    (config,) = configurations(given)
    return config


def configurations(given):
    """The runs that settings ask for, by name a value or a list of values: their product, each for what takes it."""
    values = [value if isinstance(value, list) and name not in SINGLE else [value] for name, value in given.items()]
    configs = [chosen(dict(zip(given, choice))) for choice in itertools.product(*values)]
    unused = ", ".join(dashed(name) for name in given if not any(name in vars(config) for config in configs))
    data.require(not unused, f"{unused} applies to nothing that was chosen; --help says what takes it")
    runs = {name_of(config): config for config in configs}  # one of those that differ in nothing that applies
    data.require(max(map(len, runs)) <= 255, "--out cannot hold a run with a name of so many settings: 255 letters")
    return [*runs.values()]


def chosen(given):
    """The run of one choice of settings, each as given where it applies; ValueError for what is not allowed."""
    plain = {name: default for name, (default, _) in SETTINGS.items()}
    fixed = models.PRESETS.get(given.get("preset"), {})
    parts = plain | given | fixed
    for part, factories in PARTS.items():
        plain |= {name: option.default for name, option in options_of(factories[parts[part]]).items()}
    plain |= fixed
    settings = plain | {name: value for name, value in given.items() if name in plain}
    ranges = RANGES | {"batch_size": (0, settings["samples"] or 10**9)}
    for name, value in settings.items():
        low, high, *others = ranges.get(name, (0, 1e30 if isinstance(value, float) else 10**9))
        if isinstance(value, (int, float)) and not (low <= value <= high or value in (plain[name], *others)):
            allowed = " or ".join([f"{low:.10g} to {high:.10g}", *map(str, others)])
            raise ValueError(f"{dashed(name)} is {value}; it must be {allowed}")
        if name in fixed and value != fixed[name]:
            raise ValueError(f"{dashed(name)} {value} contradicts --preset {given['preset']}, which has {fixed[name]}")
    data.require(not (settings["resume"] and settings["overwrite"]), "--resume contradicts --overwrite")
    return SimpleNamespace(**settings)


def built(factory, values):
    """What a factory makes of its arguments among some values, by name."""
    return factory(**{name: values[name] for name in inspect.signature(factory).parameters})


def settings_of(config):
    """All that the numbers of a run depend on, by name."""
    return {name: value for name, value in vars(config).items() if name not in UNNAMED}


def kind_and_numbers(config):
    """The kind of a run, all that is compiled in, as pairs; and the numbers that change without compiling anew."""
    names = {"weight_decay", *options_of(gd.OPTIMIZERS[config.optimizer]), *options_of(tuners.TUNERS[config.tuner])}
    numbers = {name: value for name, value in vars(config).items() if name in names and isinstance(value, float)}
    numbers |= {"steps": config.steps, "max_trials": 30 if config.batch_size else 1000}  # as in the paper
    kind = {name: value for name, value in settings_of(config).items() if name not in ("seed", *numbers)}
    return tuple(kind.items()), numbers


def name_of(config):
    """The name of a run's folder: data set, model, optimizer, tuner, and each setting that is not the default.

    >>> name_of(configure(tuner="constant", lr=0.05, seed=3))
    'digits-mlp-gd-constant-seed3-lr0.05'
    """
    words = [config.dataset, config.preset or config.model, config.optimizer, config.tuner]
    plain = chosen({name: vars(config)[name] for name in (*PARTS, "preset", "steps")})
    for name, value in settings_of(config).items():
        if value != vars(plain)[name]:
            words.append(name if value is True else f"{name}{value}".removesuffix(".0"))
    return "-".join(words)


# -------------------------------------------------------------------------------------------------- command line


def fail(message, program="train.py"):
    """One line on stderr, and the end."""
    print(f"{program}:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def parser(command="python train.py"):
    """The command line. Only flags that were given end up in its result."""
    parser = argparse.ArgumentParser(usage=f"{command} [--flag value ...]", description=__doc__.splitlines()[0],
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)  # fmt: skip
    parser.error = fail
    flags = {name: [(default, WORDS.get(name), f"{text} ({default})")] for name, (default, text) in SETTINGS.items()}
    for taker, factory in itertools.chain(*(factories.items() for factories in PARTS.values())):
        helps = dict(re.findall(r"^(\w+): (.+)$", inspect.getdoc(factory) or "", re.MULTILINE))
        for name, option in options_of(factory).items():
            text = f"{taker} ({option.default}): {helps.get(name, '')}"
            flags.setdefault(name, []).append((option.default, get_args(option.annotation), text))
    for name, takers in flags.items():
        default, words, _ = takers[0]  # which are of one kind for all
        text = re.sub(r" \((None|False|)\)$", "", "; ".join(text for _, _, text in takers)).replace("%", "%%")
        if isinstance(default, bool):
            parser.add_argument(dashed(name), action="store_true", help=text)
        elif name == "distributed":
            parser.add_argument(dashed(name), nargs="*", metavar="WORD", help=text)
        else:
            value = f"{{{','.join(words)}}}" if words else type(default).__name__
            many = {"metavar": value} if name in SINGLE else {"metavar": (value, ""), "nargs": "+", "action": "extend"}
            parser.add_argument(dashed(name), type=type(default), choices=words or None, help=text, **many)
    return parser


def show(configs):
    """The table and the figures of those runs that have begun, and each as text, for people and other programs."""
    folders = [folder for folder in map(folder_of, configs) if (folder / "checkpoint.npz").exists()]
    if folders and jax.process_index() == 0:
        names = "\n".join(folder.name for folder in folders)  # no other command draws over the figure of these runs
        overlay = folders[0].parent / f"overlay-{hashlib.sha256(names.encode()).hexdigest()[:6]}.png"
        plots.show(folders, None if configs[0].no_plot else overlay)
        for folder in folders:  # a row a step, in digits that read back as the same number, and beside it the rest
            settings, history, facts = plots.load_run(folder)
            columns = [column.astype(str) for column in history.values()]
            csv, rest = "\n".join(map(",".join, [history, *zip(*columns), ""])), json.dumps(settings | facts, indent=1)
            data.write(folder / "metrics.csv", lambda stream: stream.write(csv.encode()))
            data.write(folder / "config.json", lambda stream: stream.write(rest.encode()))


def run(configs, words, command):
    """Trains one after the other, and shows what came of it; at Ctrl-C also the words that go on from there."""
    began = time.time()
    try:
        over = [held_run(config)[1] for config in configs]  # every refusal comes before the first step
        for k, config in enumerate(configs):
            shown = " was run before; --overwrite repeats it" if over[k] else ""
            print(f"[{k + 1}/{len(configs)}] {folder_of(config)}{shown}", flush=True)
            train(config, plots.progress(config.steps))
        show(configs)
    except KeyboardInterrupt:
        print()
        with contextlib.suppress(KeyboardInterrupt):
            show(configs)
        files = [folder_of(config) / "checkpoint.npz" for config in configs]
        old = configs[0].overwrite and any(file.exists() and file.stat().st_mtime < began for file in files)
        again = [word for word in [*command.split(), *words] if word not in ("--resume", "--overwrite")]
        print("interrupted; go on with:", shlex.join([*again, "--overwrite" if old else "--resume"]), flush=True)
        os._exit(130)  # not sys.exit: after a compilation that was broken off JAX may crash as Python ends


def main(words, command="python train.py"):
    """The command line, as a list of words."""
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="replace")  # what a terminal cannot show ends no run
    try:
        configs = configurations(vars(parser(command).parse_args(words)))
        gd.set_up(configs[0].distributed)
        if jax.process_index() > 0:  # what belongs to no process alone is for the first one to say
            sys.stdout = open(os.devnull, "w")
        run(configs, words, command)
        sys.stdout.flush()
    except KeyboardInterrupt:  # before any run
        os._exit(130)
    except BrokenPipeError:  # nobody reads on, as behind `| head`
        os._exit(1)
    except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:  # of JAX: no memory left, a lost process
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])

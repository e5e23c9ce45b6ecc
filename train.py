"""Train a network with a learning rate tuner, and watch the sharpness.

    python train.py --tuner cdat --sigma 2
    python train.py --tuner constant linesearch greedy cdat --lr 0.1

What this file teaches: how the parts compose. A loss is a model (models.py) on data (data.py); a step is an
optimizer (gd.py) and a tuner (tuners.py) on that loss; the sharpness (sharpness.py) is measured beside it. The
loop is `train`: plain Python around one jitted step, which it never waits for between two log intervals.

Every run is a folder runs/NAME with config.json, metrics.csv, checkpoint.npz and figure.png. Read next: plots.py.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import data
import gd
import models
import plots
import sharpness
import tuners


def flag(default, help, allowed=None, of=(), names_run=True):
    """A field of Config and its flag. allowed: a tuple of words, or an interval such as "(0, 1]"; of: the tuners,
    optimizers, models or data sets that take it (none: all); names_run: whether it changes the numbers of a run."""
    return dataclasses.field(default=default, metadata=dict(help=help, allowed=allowed, of=of, names_run=names_run))


IMAGES = ("digits", "mnist", "cifar10", "cifar100", "imagenette")
LAYERED = ("mlp", "cnn", "resnet", "mixer", "vit", "transformer")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. The fields are the flags of the command line, in this order."""

    # what
    dataset: str = flag("digits", "data set", tuple(data.DATASETS))
    data_dir: str = flag("datasets", "folder that holds the data sets, or is to", names_run=False)
    samples: int = flag(1024, "training samples, balanced over the classes; 0 = all", "[0, 1e9]")
    test_samples: int = flag(0, "test samples; 0 = all", "[0, 1e9]")
    image_size: int = flag(224, "side of the square that is cropped", "[1, 1024]", of=("imagenette",))
    standardize: bool = flag(False, "give each channel mean 0 and deviation 1", of=IMAGES)
    model: str = flag("mlp", "network", tuple(models.MODELS))
    preset: str = flag("", "a network of the paper, in its size", tuple(models.PRESETS))
    width: int = flag(0, "units, or channels of the first stage; 0 = the model's own", "[0, 65536]", of=(*LAYERED, "rnn"))
    depth: int = flag(0, "layers or blocks (resnet: 10, 18, 34, 50); 0 = the model's own", "[0, 100]", of=LAYERED)
    norm: str = flag("none", "normalisation", tuple(models.NORMS), of=("resnet",))
    stem: str = flag("small", "first layers: one convolution, or those of ImageNet", ("small", "imagenet"), of=("resnet",))
    patch: int = flag(0, "side of a patch; 0 = the model's own", "[0, 4096]", of=("mixer", "vit"))
    activation: str = flag("relu", "between the layers", ("relu", "tanh"), of=("mlp",))
    loss: str = flag("mse", "mse = half the squared error, ce = cross-entropy", ("mse", "ce"))
    weight_decay: float = flag(1e-5, "c in the term c/2 |w|^2 of the loss", "[0, 1e30]")
    seed: int = flag(0, "seed of the parameters and of the mini-batches", "[0, 2147483647]")
    # how
    optimizer: str = flag("gd", "what gives the direction", tuple(gd.OPTIMIZERS))
    momentum: float = flag(0.9, "decay of its average", "[0, 1)", of=("momentum",))
    beta1: float = flag(0.9, "decay of the average of g", "[0, 1)", of=("adam",))
    beta2: float = flag(0.999, "decay of the average of g^2", "[0, 1)", of=("rmsprop", "adam"))
    eps: float = flag(1e-8, "what keeps the division finite", "[1e-30, 1e30]", of=("rmsprop", "adam"))
    tuner: str = flag("cdat", "what sets the learning rate", tuple(tuners.TUNERS))
    lr: float = flag(0.1, "learning rate", "(0, 1e30]", of=("constant", "schedule", "hypergradient"))
    sigma: float = flag(2.0, "scaling factor; for cdat 1 = greedy, 2 = on edge", "(0, 1e30]", of=("cdat", "exact"))
    beta: float = flag(0.0, "decay of its moving averages", "[0, 1)", of=("cdat", "feedback"))
    sigma_high: float = flag(2.5, "scaling factor while the loss behaves", "[1, 1e30]", of=("feedback",))
    tolerance: float = flag(0.05, "relative rise of the loss that resets it", "[0, 1e30]", of=("feedback",))
    average: float = flag(0.9, "decay of the loss's moving average", "[0, 1)", of=("feedback",))
    slope: float = flag(1e-4, "share of the predicted decrease", "[0, 1)", of=("linesearch",))
    slack: float = flag(0.0, "relative increase that is accepted", "[0, 1e30]", of=("linesearch",))
    shrink: float = flag(0.8, "factor after a failed trial", "(0, 1)", of=("linesearch",))
    grow: float = flag(4.0, "factor on the last rate; inf = start from --lr-max", "(1, 1e30] or inf", of=("linesearch",))
    lr_max: float = flag(1.0, "largest learning rate", "(0, 1e30]", of=("linesearch", "polyak"))
    warmup: float = flag(0.1, "fraction of the steps that warm up", "[0, 1)", of=("schedule",))
    decay: str = flag("cosine", "after the warm-up", ("constant", "linear", "cosine"), of=("schedule",))
    hyper_rate: float = flag(0.1, "learning rate of the learning rate", "[0, 1]", of=("hypergradient",))
    batch_size: int = flag(0, "samples a step; 0 = all, full batch", "[0, 1e9]")
    chunk_size: int = flag(0, "samples in memory at a time; 0 = the whole batch", "[0, 1e9]")
    steps: int = flag(2000, "steps", "[1, 1e9]", names_run=False)
    # measure
    sharpness_every: int = flag(100, "steps between two measurements", "[1, 1e9]")
    sharpness_samples: int = flag(0, "training samples it is measured on; 0 = all", "[0, 1e9]")
    sharpness_tol: float = flag(1e-3, "its relative residual", "(0, 1)")
    no_sharpness: bool = flag(False, "do not measure it")
    # run
    precision: str = flag("float32", "of matrix products", ("float32", "tensorfloat32", "bfloat16"))
    out: str = flag("runs", "folder that holds the run folders", names_run=False)
    resume: bool = flag(False, "go on from the checkpoint, if there is one", names_run=False)
    overwrite: bool = flag(False, "run again what is there already", names_run=False)
    log_every: int = flag(100, "steps between two writes to disk", "[1, 1e9]", names_run=False)
    no_plot: bool = flag(False, "draw no figure", names_run=False)
    no_cache: bool = flag(False, "keep no compiled programs in the user's cache folder", names_run=False)
    distributed: bool = flag(False, "one of several processes, which the flags below or a cluster name", names_run=False)
    coordinator: str = flag("", "address:port of process 0", names_run=False)
    processes: int = flag(0, "how many there are", "[0, 1e6]", names_run=False)
    process: int = flag(0, "which of them this is", "[0, 1e6]", names_run=False)


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
PARTS = ("dataset", "model", "optimizer", "tuner")  # what is chosen by name, and may take flags of its own
SEVERAL = ("optimizer", "tuner", "lr", "sigma", "beta", "batch_size", "seed")  # flags that take several values


# ---------------------------------------------------------------------------------------- command line to configs


def dashed(name):
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def fail(message, program="train.py"):
    """One line on stderr, and the end."""
    print(f"{program}:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def parser():
    """The command line, made from the fields of Config. Only flags that were given end up in its result."""
    parser = argparse.ArgumentParser(usage="python train.py [--flag value ...]", description=__doc__.splitlines()[0],
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)  # fmt: skip
    for name, field in FIELDS.items():
        of, allowed, text = field.metadata["of"], field.metadata["allowed"], field.metadata["help"]
        text = f"{', '.join(of)}: {text}" if of else text
        if field.type is bool:
            parser.add_argument(dashed(name), action="store_true", help=text)
            continue
        words = allowed if isinstance(allowed, tuple) else None
        parser.add_argument(dashed(name), type=field.type, choices=words, metavar=None if words else field.type.__name__,
                            nargs="+" if name in SEVERAL else None, help=f"{text} ({field.default})")  # fmt: skip
    parser.error = fail
    return parser


def check(config):
    """Raises ValueError for a value that is not allowed."""
    for name, field in FIELDS.items():
        value, allowed = getattr(config, name), field.metadata["allowed"]
        if isinstance(allowed, tuple) and value not in (*allowed, field.default):
            raise ValueError(f"{dashed(name)} is {value!r}; it must be one of {', '.join(allowed)}")
        if isinstance(allowed, str):
            interval, _, more = allowed.partition(" or ")
            low, high = map(float, interval[1:-1].split(","))
            at_end = (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")
            if not (low < value < high or at_end or str(value) == more):
                raise ValueError(f"{dashed(name)} is {value}; it must be in {allowed}")
    if 0 < config.samples < config.batch_size:
        raise ValueError(f"--batch-size is {config.batch_size}; there are {config.samples} training samples")


def configurations(given):
    """The runs that flags ask for: the product of their values, each flag for the parts that take it.

    given is a dict from field to a value, or to a list where the flag takes several. Raises ValueError.

    >>> [(c.tuner, c.lr, c.sigma) for c in configurations({"tuner": ["constant", "cdat"], "sigma": [1.0, 2.0]})]
    [('constant', 0.1, 2.0), ('cdat', 0.1, 1.0), ('cdat', 0.1, 2.0)]
    """
    values = {part: FIELDS[part].default for part in PARTS} | given
    if "preset" in given:
        values["model"] = models.PRESETS[given["preset"]][0]
        if given.get("model", values["model"]) != values["model"]:
            raise ValueError(f"--model {given['model']} contradicts --preset {given['preset']}, which is a {values['model']}")
    if given.get("resume") and given.get("overwrite"):
        raise ValueError("--resume contradicts --overwrite")
    if not given.get("distributed") and {"coordinator", "processes", "process"} & set(given):
        raise ValueError("--coordinator, --processes and --process apply under --distributed alone")
    runs, applied = [], set()
    of = lambda name: FIELDS[name].metadata["of"]  # the parts that take a flag; none: all do
    for choice in itertools.product(*(value if isinstance(value, list) else [value] for value in values.values())):
        flags = dict(zip(values, choice))
        takers = {flags[part] for part in PARTS if part != "model" or "preset" not in given}  # a preset fixes its options
        flags = {name: v for name, v in flags.items() if not of(name) or takers & set(of(name))}
        applied |= set(flags)
        runs.append(Config(**flags))  # more than once where the choices differ in nothing that applies
    unused = [name for name in given if name not in applied]
    if unused:
        raise ValueError(f"{dashed(unused[0])} applies to nothing that was chosen; it belongs to {', '.join(of(unused[0]))}")
    for config in runs:
        check(config)
    return list(dict.fromkeys(runs))


def name_of(config):
    """The name of a run's folder: data set, model, optimizer, tuner, and each setting that is not the default.

    >>> name_of(Config(tuner="constant", lr=0.05, seed=3))
    'digits-mlp-gd-constant-seed3-lr0.05'
    """
    words = [config.dataset, config.preset or config.model, config.optimizer, config.tuner]
    for name, field in FIELDS.items():
        value = getattr(config, name)
        if field.metadata["names_run"] and name not in (*PARTS, "preset") and value != field.default:
            words.append(name if value is True else f"{name}{value}".removesuffix(".0"))
    return "-".join(words)


# ------------------------------------------------------------------------------------ what is trained and measured


def mse(logits, y):
    """½‖z − onehot(y)‖², averaged over samples (and characters).

    >>> float(mse(jnp.array([[1.0, 0.0]]), jnp.array([1])))
    1.0
    """
    return 0.5 * jnp.mean(jnp.sum((logits - jax.nn.one_hot(y, logits.shape[-1], dtype=logits.dtype)) ** 2, -1))


def ce(logits, y):
    """−log softmax(z)[y], averaged over samples (and characters).

    >>> round(float(ce(jnp.zeros((1, 2)), jnp.array([1]))), 3)
    0.693
    """
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[..., None], -1))


LOSSES = {"mse": mse, "ce": ce}


def greedy_gain(f, w, u):
    """f(w + η_edge u) − f(w + η_greedy u): what the on-edge rate loses to the greedy one, in this one step.

    >>> float(greedy_gain(lambda w: 2 * w**2, jnp.array(1.0), jnp.array(-4.0)))  # from 2 to 0, or to 2 again
    2.0
    """
    slope = jax.jvp(f, (w,), (u,))[1]  # g·u
    eta = -slope / jnp.abs(tuners.curvature(f, w, u))  # (3); the rate on edge is twice that (7)
    return f(tuners.move(w, 2 * eta, u)) - f(tuners.move(w, eta, u))


def alignment(u, scale, v):
    """|cos∠(u, v)|. Where there is a preconditioner v lives in the coordinates P^(1/2) w, so u is taken there.

    >>> round(float(alignment(jnp.array([3.0, 4.0]), None, jnp.array([0.0, 1.0]))), 2)
    0.8
    """
    u = u if scale is None else jax.tree.map(jnp.divide, u, scale)
    return jnp.abs(gd.dot(u, v)) / gd.norm(u)


def arguments(config, part):
    """What the factory of the chosen part is called with, beside the shape of the data."""
    if part == "model" and config.preset:
        return models.PRESETS[config.preset][1]
    chosen, named = getattr(config, part), {"momentum": "beta", "hyper_rate": "rate"}  # where a flag says more
    values = {named.get(name, name): getattr(config, name) for name, field in FIELDS.items() if chosen in field.metadata["of"]}
    if part == "model":
        return {name: value for name, value in values.items() if value}  # 0 = the model's own
    more = {"schedule": {"steps": config.steps}, "linesearch": {"max_trials": 30 if config.batch_size else 1000}}
    return values | more.get(chosen, {})


def numbers_of(config):
    """The hyperparameters that are numbers. They enter the jitted functions as arguments: no value compiles anew."""
    numeric = lambda part: {name: v for name, v in arguments(config, part).items() if not isinstance(v, str)}
    return {"weight_decay": config.weight_decay, "optimizer": numeric("optimizer"), "tuner": numeric("tuner")}


@functools.cache
def functions(model, options, shape, classes, loss, optimizer, tuner, decay, chunk_size):
    """What is compiled for one kind of run, jitted: init, step, look, hessian, align, test.

    Cached by its arguments, so that the runs of a sweep share one compilation. samples are (x, y) on the devices, rows
    the batch of a step among them (None: all), numbers what `numbers_of` returns.
    """
    network = models.MODELS[model](shape, classes, **dict(options))
    words = {"decay": decay} if tuner == "schedule" else {}
    optimizer_of = lambda numbers: gd.OPTIMIZERS[optimizer](**numbers["optimizer"])
    tuner_of = lambda numbers: tuners.TUNERS[tuner](**numbers["tuner"], **words)
    data_loss = lambda w, batch: LOSSES[loss](network.apply(w, batch[0]), batch[1])
    objective = lambda weight_decay: lambda w, batch: data_loss(w, batch) + 0.5 * weight_decay * gd.dot(w, w)
    pick = lambda samples, rows: samples if rows is None else jax.tree.map(lambda a: a[rows], samples)

    def init(seed, numbers):
        return gd.init_carry(network.init(jax.random.key(seed)), optimizer_of(numbers), tuner_of(numbers))

    def step(carry, samples, rows, numbers):
        """(carry, metrics): see gd.make_step."""
        step = gd.make_step(objective(numbers["weight_decay"]), optimizer_of(numbers), tuner_of(numbers), chunk_size)
        return step(carry, pick(samples, rows))

    def look(w, carry, samples, rows, numbers):
        """Of the step that led from w to carry: P^(-1/2), and the gain of the greedy rate."""
        f = gd.mean_over_chunks(objective(numbers["weight_decay"]), chunk_size)
        gain = greedy_gain(lambda w: f(w, pick(samples, rows)), w, carry.u)
        return optimizer_of(numbers).scale(carry.optimizer), gain

    def hessian(w, scale, v, samples, weight_decay):
        """P^(-1/2) H P^(-1/2) v (22); scale is P^(-1/2), or None for the identity."""
        scaled = lambda v: v if scale is None else jax.tree.map(jnp.multiply, scale, v)
        product = lambda w, batch: sharpness.hvp(lambda w: objective(weight_decay)(w, batch), w, scaled(v))
        return scaled(gd.mean_over_chunks(product, chunk_size)(w, samples))

    def test(w, batch):
        right = jnp.argmax(network.apply(w, batch[0]), -1) == batch[1]
        return {"test_loss": data_loss(w, batch), "test_accuracy": jnp.mean(right.astype(jnp.float32))}

    test = gd.mean_over_chunks(test, chunk_size)
    return jax.jit(init), jax.jit(step, donate_argnums=0), jax.jit(look), jax.jit(hessian), jax.jit(alignment), jax.jit(test)


# --------------------------------------------------------------------------------------------- a run on the disk

COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "turn")  # of every step
MEASURED = ("sharpness", "alignment", "test_loss", "test_accuracy", "greedy_gain")  # nan where not measured


def folder_of(config):
    """Where a run is kept."""
    return Path(config.out) / name_of(config)


def finished(config):
    """Whether the run's folder holds it, done or diverged.

    Raises ValueError for a folder that holds what only --overwrite may replace, or only --resume may continue.
    """
    folder, metrics = folder_of(config), folder_of(config) / "metrics.csv"
    if config.overwrite or not (folder / "config.json").exists():
        return False
    held = dataclasses.asdict(Config()) | plots.read_settings(folder)
    matter = [name for name, field in FIELDS.items() if field.metadata["names_run"] or name == "steps"]
    differ = [name for name in matter if held[name] != getattr(config, name)]
    longer = differ == ["steps"] and type(held["steps"]) is int and held["steps"] < config.steps and config.tuner != "schedule"
    if differ and not (longer and config.resume):
        values = ", ".join(f"{dashed(name)} {held[name]}" for name in differ)
        raise ValueError(f"{folder}: holds a run with {values}; give --overwrite to replace it, or another --out")
    over = held["status"] in ("done", "diverged") and not longer
    if not over and not config.resume:
        raise ValueError(f"{folder}: holds an unfinished run; give --resume to go on, or --overwrite")
    if over:
        losses = plots.read_metrics(metrics).get("loss", [])
        whole = len(losses) == config.steps or not np.isfinite(losses[-1:]).all()  # to the end, or to where it diverged
        if not whole or not metrics.read_bytes().endswith(b"\n"):
            raise ValueError(f"{metrics}: broken, it lacks rows of a run that has ended; give --overwrite to start again")
    return over


def replace(file, write):
    """write(stream) to a temporary file, then rename it: the file is the new one or the old one, whole."""
    temporary = file.with_name("." + file.name)
    try:
        with open(temporary, "wb") as stream:
            write(stream)
        os.replace(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{file}: cannot be written, {error.strerror}; what was logged before is kept") from None


def save_config(config, folder, status, **more):
    """All settings, the status (running, done, diverged or interrupted), versions and the device."""
    about = dict(status=status, **more, jax=jax.__version__, numpy=np.__version__, device=jax.devices()[0].device_kind)
    text = json.dumps(dataclasses.asdict(config) | about, indent=1)
    replace(folder / "config.json", lambda stream: stream.write(text.encode()))


def append(folder, rows):
    """Whole rows at the end of metrics.csv, each number with the digits that read back as the same number."""
    lines = [",".join(str(row.get(name, np.nan)) for name in COLUMNS + MEASURED) + "\n" for row in rows]
    file = folder / "metrics.csv"
    whole = file.stat().st_size
    try:
        with open(file, "a") as stream:
            stream.write("".join(lines))
    except OSError as error:
        os.truncate(file, whole)
        raise OSError(f"{file}: cannot be written, {error.strerror}; what was logged before is kept") from None


def checkpoint(folder, t, state):
    """All that the rows from step t on depend on."""
    replace(folder / "checkpoint.npz", lambda stream: np.savez(stream, *jax.tree.leaves(state), step=t))


def begin(config, into, start):
    """(step, state) to go on from: the checkpoint under --resume where there is one, else the start.

    Files are read in the run's folder and begun in `into`.
    """
    file, metrics = folder_of(config) / "checkpoint.npz", folder_of(config) / "metrics.csv"
    first, state, kept = 0, start, [",".join(COLUMNS + MEASURED).encode() + b"\n"]
    if config.resume and file.exists():
        leaves, tree = jax.tree.flatten(start)
        try:
            with np.load(file) as saved:
                first, new = int(saved["step"]), [saved[f"arr_{k}"] for k in range(len(leaves))]  # as savez names them
        except Exception:  # a broken archive makes its readers raise whatever they like
            raise ValueError(f"{file}: broken, or not of this run; give --overwrite to start again") from None
        if [(a.shape, a.dtype) for a in leaves] != [(a.shape, a.dtype) for a in new]:
            raise ValueError(f"{file}: of another network or precision; give --overwrite to start again")
        state = jax.tree.unflatten(tree, new)
        kept = metrics.read_bytes().splitlines(keepends=True)[: first + 1]  # later rows are run again
        if len(kept) != first + 1 or not kept[-1].endswith(b"\n"):
            raise ValueError(f"{metrics}: broken, it lacks rows before the checkpoint; give --overwrite to start again")
    else:
        into.mkdir(parents=True, exist_ok=True)
        for old in ("config.json", "checkpoint.npz"):  # so that no moment pairs old files with new ones
            (into / old).unlink(missing_ok=True)
    replace(into / "metrics.csv", lambda stream: stream.write(b"".join(kept)))
    save_config(config, into, "running")
    return first, state


# ------------------------------------------------------------------------------------------------------- the run


def placed(config):
    """The data on the devices: training and test samples, how many classes, and the layouts of a batch and of the rest.

    A batch is laid over the largest number of devices that divides it; the compiler does the rest.
    """
    dataset = data.load(config.dataset, config.data_dir, config.samples, config.image_size, config.standardize)
    n, devices = len(dataset.x), jax.devices()
    if config.batch_size > n:
        raise ValueError(f"--batch-size is {config.batch_size}; there are {n} training samples")
    if config.batch_size and n % config.batch_size:
        print(f"batches of {config.batch_size} drop {n % config.batch_size} of {n} samples in each epoch")
    size, laid, everywhere = config.batch_size or n, None, None
    if len(devices) > 1:
        used = max(k for k in range(1, len(devices) + 1) if size % k == 0)
        print(f"the batch of {size} is laid over {used} of {len(devices)} devices")
        if used < len(devices) and jax.process_count() > 1:
            raise ValueError(f"--batch-size: {size} samples cannot be laid evenly over the {len(devices)} devices")
        mesh = jax.sharding.Mesh(np.array(devices[:used]), ("samples",))
        laid, everywhere = NamedSharding(mesh, PartitionSpec("samples")), NamedSharding(mesh, PartitionSpec())
    samples = jax.device_put((dataset.x, dataset.y), everywhere if config.batch_size else laid)
    few = config.test_samples or None
    held_out = jax.device_put((dataset.x_test[:few], dataset.y_test[:few]), everywhere)
    return samples, held_out, dataset.classes, laid, everywhere


@functools.lru_cache(maxsize=1)
def shuffled(seed, epoch, samples):
    """The order of the samples in an epoch; kept for the steps of it."""
    return np.random.default_rng((seed, epoch)).permutation(samples)


def rows_of(config, t, samples):
    """The rows of the batch of step t, from (seed, t) alone; None for the full batch. The remainder is dropped."""
    if not config.batch_size:
        return None
    epoch, k = divmod(t, samples // config.batch_size)
    return shuffled(config.seed, epoch, samples)[k * config.batch_size : (k + 1) * config.batch_size]


def prepare(config):
    """(start, advance, everywhere): where a run starts, how it takes a step, and how its state is laid over the devices.

    A state is what a step carries to the next, and v, where the power iteration starts. advance(t, state) -> (row, state)
    takes step t; the row is what is to be logged of it, numbers still on the device, for which it does not wait.
    """
    samples, held_out, classes, laid, everywhere = placed(config)
    init, step, look, hessian, align, test = functions(
        config.model, tuple(arguments(config, "model").items()), samples[0].shape[1:], classes, config.loss,
        config.optimizer, config.tuner, config.decay, config.chunk_size)  # fmt: skip
    numbers = numbers_of(config)

    def advance(t, state):
        carry, v = state
        rows = jax.device_put(rows_of(config, t, len(samples[0])), laid)
        measured = t % config.sharpness_every == 0
        w = jax.tree.map(jnp.copy, carry.w) if measured else None  # the step gives its carry away
        carry, metrics = step(carry, samples, rows, numbers)
        row = {"step": t, **metrics}
        if measured:
            scale, gain = look(w, carry, samples, rows, numbers)
            row |= {"greedy_gain": gain, **test(w, held_out)}
        if measured and not config.no_sharpness:
            some = jax.tree.map(lambda a: a[: config.sharpness_samples or None], samples)
            product = lambda v: hessian(w, scale, v, some, config.weight_decay)
            value, v, _, _ = sharpness.power_iteration(product, v, config.sharpness_tol)
            row |= {"sharpness": np.asarray(value, gain.dtype), "alignment": align(carry.u, scale, v)}
        return row, (carry, v)

    carry = init(config.seed, numbers)
    return (carry, jax.tree.map(jnp.ones_like, carry.w)), advance, everywhere


def train(config, report=lambda rows: None):
    """One run from its config: trained, continued from its checkpoint, or read back where it is done.

    Returns its history, a dict of one numpy array a column of metrics.csv. report(rows) is called at every log
    interval with its rows. Raises ValueError and OSError in one line for what cannot be run.

    >>> with tempfile.TemporaryDirectory() as out:
    ...     history = train(Config(model="linear", tuner="greedy", samples=32, steps=3, no_sharpness=True, out=out))
    >>> history["loss"].shape
    (3,)
    """
    folder = into = folder_of(config)
    if finished(config):
        return plots.read_metrics(folder / "metrics.csv")
    with contextlib.ExitStack() as stack:
        multihost_utils.sync_global_devices(folder.name)  # none writes while another still looks
        if jax.process_index() > 0:  # process 0 alone writes what stays
            into = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(jax.default_matmul_precision(config.precision))
        interrupted = []  # by Ctrl-C, which is noted, so that no step is cut in half; the second one acts at once
        before = signal.signal(signal.SIGINT, lambda *_: interrupted.append(signal.signal(signal.SIGINT, before)))
        stack.callback(signal.signal, signal.SIGINT, before)
        start, advance, everywhere = prepare(config)
        first, state = begin(config, into, start)
        state = jax.device_put(state, everywhere)
        started, waiting, finite = time.time(), [], []
        for t in range(first, config.steps):
            row, state = advance(t, state)
            waiting.append(row)
            if (t + 1) % config.log_every and t + 1 < config.steps and not interrupted:
                continue
            rows, waiting = jax.device_get(waiting), []  # here alone the loop waits for the device
            finite = np.isfinite([row["loss"] for row in rows])
            rows = rows if all(finite) else rows[: finite.argmin() + 1]  # a diverged run ends with the row that shows it
            append(into, rows)
            report(rows)
            if not all(finite):
                break
            checkpoint(into, t + 1, state)
            if interrupted and t + 1 < config.steps:
                save_config(config, into, "interrupted")
                raise KeyboardInterrupt
        save_config(config, into, "done" if all(finite) else "diverged", seconds=round(time.time() - started, 1))
        if interrupted:  # during the last step: the run is over, what was to follow is not begun
            raise KeyboardInterrupt
        return plots.read_metrics(into / "metrics.csv")


# ------------------------------------------------------------------------------------------- what a person sees


def progress(config):
    """A report for train: on a terminal one line that renews itself, else a line for each tenth of the run."""
    first, tenths, product = None, -1, math.nan

    def report(rows):
        nonlocal first, tenths, product
        last, done = rows[-1], rows[-1]["step"] + 1
        first = first or (time.time(), done)  # the first interval compiles: no pace to judge by
        left = (time.time() - first[0]) / max(done - first[1], 1) * (config.steps - done)
        left = f", {left:.0f} s left" if left < 9999 else f", {left / 3600:.0f} h left"
        for row in rows:
            product = float(row["learning_rate"]) * float(row["sharpness"]) if "sharpness" in row else product
        text = (f"{done:6d}/{config.steps} loss {last['loss']:<9.4g} rate {last['learning_rate']:<8.3g} "
                f"product {product:.3g}" + left * (done > first[1]))  # fmt: skip
        if sys.stdout.isatty():
            over = done == config.steps or not np.isfinite(last["loss"])
            print(f"\r{'█' * (5 * done // config.steps):░<5}{text}"[:80].ljust(80), end="\n" if over else "", flush=True)
        elif 10 * done // config.steps > tenths:
            tenths = 10 * done // config.steps
            print(text, flush=True)

    return report


def last_measured(values):
    """The last entry that is not nan."""
    return next((value for value in values[::-1] if np.isfinite(value)), math.nan)


def borders(runs):
    """A warning for each grid of three or more values whose best, in the mean over the seeds, lies on its border."""
    grids = {}  # (optimizer, tuner, field) -> value -> losses
    for (config, history), name in itertools.product(runs, ("lr", "sigma", "beta")):
        grid = grids.setdefault((config["optimizer"], config["tuner"], name), {})
        grid.setdefault(config[name], []).append(plots.final_loss(history))
    best = lambda grid: min(grid, key=lambda value: np.mean(grid[value]))
    return [f"{tuner} with {optimizer}: the best {dashed(name)}, {best(grid):g}, lies on the border of its grid; widen it"
            for (optimizer, tuner, name), grid in grids.items()
            if len(grid) > 2 and best(grid) in (min(grid), max(grid))]  # fmt: skip


@np.errstate(all="ignore")  # the rate of a diverged run may be infinite
def table(runs):
    """The results of runs, (config, history) pairs: a line a run, the best one marked, then warnings.

    The loss is the mean of the last 5; rate, sharpness and their product are those of the last step that was measured.
    """
    names = plots.labels([config for config, _ in runs])
    if len({config["seed"] for config, _ in runs}) > 1:
        names = [f"{name}, seed {config['seed']}" for name, (config, _) in zip(names, runs)]
    losses = [plots.final_loss(history) for _, history in runs]
    width = max(map(len, ["run", *names]))
    lines = [f"{'run':<{width}}  {'loss':>9} {'rate':>8} {'sharpness':>9} {'product':>7} {'accuracy':>8} {'time':>6}"]
    for name, loss, (config, history) in zip(names, losses, runs):
        last = max(np.flatnonzero(np.isfinite(history["sharpness"])), default=-1)
        rate, top = history["learning_rate"][last], history["sharpness"][last]
        mark = "*" if loss == min(losses) < math.inf and len(losses) > 1 else " "
        lines.append(f"{name:<{width}} {mark}{loss:9.4g} {rate:8.3g} {top:9.4g} {rate * top:7.3g} "
                     f"{last_measured(history['test_accuracy']):8.1%} {config.get('seconds', math.nan):4.0f} s")
    lines += [f"{name} diverged: its loss is not finite at step {history['step'][-1]:.0f}"
              for name, loss, (_, history) in zip(names, losses, runs) if loss == math.inf]  # fmt: skip
    return lines + borders(runs)


def show(configs):
    """The table and the figures of all runs that have begun: one for each run, and one of all."""
    if jax.process_index() > 0:
        return
    runs = {folder: plots.load_run(folder) for folder in map(folder_of, configs) if (folder / "config.json").exists()}
    runs = {folder: run for folder, run in runs.items() if len(run[1]["step"])}  # those of which a row is written
    if runs:
        print("\n".join(table(list(runs.values()))))
    if runs and not configs[0].no_plot:
        for folder, run in runs.items():
            plots.draw([run], figure := folder / "figure.png")
        if len(runs) > 1:
            plots.draw(list(runs.values()), figure := Path(configs[0].out) / "overlay.png")
        print(f"figure: {figure}")


def join(config):
    """Makes this process one of several. What belongs to none of them alone is for process 0 to say."""
    given = [config.coordinator or None, config.processes or None, config.process if config.processes else None]
    try:
        jax.distributed.initialize(*given)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"--distributed: {error}") from None
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")


def run(configs):
    """Trains one after the other, and shows what came of it."""
    first = configs[0]  # in what is not of one run alone they are all alike
    if "device_count" in os.environ.get("XLA_FLAGS", ""):  # CPU devices wait for each other in one pool of threads,
        os.environ.setdefault("NPROC", "64")  # as many as there are cores: too few, and they wait for ever
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "stepping-on-the-edge")
    if not first.no_cache and cache.is_absolute():  # it is not where a user has no home
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if first.distributed:
        join(first)
    for config in configs:
        finished(config)  # every refusal comes before the first step
    for k, config in enumerate(configs, 1):
        print(f"[{k}/{len(configs)}] {folder_of(config)}", flush=True)
        train(config, progress(config))
    show(configs)


def main(words):
    """The command line, as a list of words."""
    try:
        configs = configurations(vars(parser().parse_args(words)))
        try:
            run(configs)
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


if __name__ == "__main__":
    main(sys.argv[1:])

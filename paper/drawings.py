"""How the paper's figures are drawn, where plots.draw is not enough, and close-ups of a few steps.

What this file teaches: to compare tuners over their steps, each at its best setting, and to look inside a run.
A drawing is a function draw(runs, file) of plots.Run, whose setting "run" names a run but for its seed and whose
setting "name" is what tables call it. The close-ups take no runs: what they show is in no log, so they train by
themselves (`figure_16` takes configurations, and keeps a row a run beside the figure). The simplified model is in
theory.py. Read next: rules.py.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse.linalg import lobpcg_standard
from jax.flatten_util import ravel_pytree
from matplotlib import ticker
from matplotlib.figure import Figure

import data
import gd
import models
import plots
import sharpness
import train
import tuners
from paper import results, theory
from paper.settings import setting_of

plots.QUANTITIES |= {"turn": "cos∠(u now, u before)", "alignment": "alignment of u with\nthe top eigenvector"}
ORANGE, BLUE, PINK, GREY, BLACK = "#D55E00", "#0072B2", "#CC79A7", "#999999", "#000000"


def subplots(*shape, figsize, **more):
    """(figure, axes), without the state of pyplot."""
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(*shape, **more)


def median_loss(runs):
    """By kind of run: the median over the seeds of the final loss, inf where most diverged."""
    losses = {}
    for run in runs:
        losses.setdefault(run.settings["run"], []).append(plots.final_loss(run.history))
    return {kind: np.median(values) for kind, values in losses.items()}


def tuned(runs, searched=results.SEARCHED, apart=("sigma",)):
    """The runs less those of a tuner that another of its runs in the same setting beats.

    Runs of a tuner that is not searched are kept where they differ in the options in `apart`. σ = 1 is greedy.
    """
    losses, best, groups = median_loss(runs), {}, []
    for settings, *_ in runs:
        options = () if settings["tuner"] in searched else tuple(settings.get(name) for name in apart)
        groups.append((setting_of(settings), settings["tuner"], options))
        kind = settings["run"]
        best[groups[-1]] = min(best.get(groups[-1], kind), kind, key=losses.get)
    kept = []
    for run, group in zip(runs, groups):
        if run.settings["run"] == best[group]:
            tuner, name = run.settings["tuner"], run.settings["name"]
            if tuner in searched or len(apart) == 1:
                name = tuner.replace("cdat", "CDAT") if tuner in searched else name.split(",")[0]
            if name == "CDAT σ = 1":
                tuner = name = "greedy"
            if "gauss-newton" in name:
                tuner, name = "CDAT, uᵀGu", name.replace("curvature gauss-newton", "uᵀGu")
            name = name.replace("lr max 1", "η ≤ 1")
            kept.append(run._replace(settings=run.settings | {"name": name, "tuner": tuner}))
    return kept


def grid(runs, file, quantities):
    """Draw runs to a file, as plots.draw, but a column for each setting and a row for each quantity."""
    columns = {}
    for run in runs:
        columns.setdefault(setting_of(run.settings), []).append(run)
    if len(columns) == 1:
        return plots.draw(runs, file, quantities)
    shape = len(quantities), len(columns)
    figure, axes = subplots(*shape, figsize=(2.7 * shape[1], 0.7 + 1.9 * shape[0]), sharex="col", squeeze=False)
    for row, quantity in zip(axes, quantities):
        for axis, of_setting in zip(row, columns.values()):
            plots.panel(axis, quantity, of_setting)
        row[0].set_ylabel(plots.QUANTITIES.get(quantity, quantity.replace("_", " ")), fontsize=9)
    for axis, setting in zip(axes[0], columns):
        axis.set_title(setting.replace(", ", "\n", 1), fontsize=9, loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=9)
    return plots.finish(figure, axes, file)


def panels(*quantities, searched=results.SEARCHED, apart=("sigma",)):
    """The tuned runs over their steps, a column for each setting; with uᵀGu only if the curvature is in `apart`."""

    def draw(runs, file):
        if "curvature" not in apart:
            runs = [run for run in runs if run.settings.get("curvature") != "gauss-newton"]
        grid(tuned(runs, searched, apart), file, quantities)

    return draw


def edges(runs, file):
    """Loss, sharpness and ηλ of constant rates, of a lower one, and of those that are entered by a warm-up."""
    highest, named = {}, []  # constant rate by setting
    for settings, *_ in runs:
        if settings["tuner"] == "constant":
            setting = setting_of(settings)
            highest[setting] = max(highest.get(setting, 0), settings["lr"])
    for run in runs:
        lower = run.settings["lr"] < highest[setting_of(run.settings)]
        name = "a lower constant rate" if lower else "a constant rate"
        name = "entered by a warm-up" if run.settings["tuner"] == "schedule" else name
        named.append(run._replace(settings=run.settings | {"name": name}))
    grid(named, file, ("loss", "sharpness", "product"))


def at_equal_loss(runs, file):
    """Test loss and accuracy against training loss, so that runs are compared where they fit equally well."""
    figure, axes = subplots(1, 2, figsize=(9, 3.4))
    for settings, history, _ in tuned(runs):
        measured = np.isfinite(history["test_loss"])
        for axis, quantity in zip(axes, ("test_loss", "test_accuracy")):
            axis.plot(history["loss"][measured], history[quantity][measured], color=plots.COLORS[settings["tuner"]],
                      linewidth=1, label=settings["name"])  # fmt: skip
            axis.set(xscale="log", xlabel="training loss (time runs to the left)", ylabel=quantity.replace("_", " "))
    for axis in axes:
        axis.set_xlim(right=0.3)  # before that they differ in nothing
    axes[0].set(yscale="log", ylim=(None, 0.3))
    axes[1].set_ylim(0.9, 1)
    plots.finish(figure, axes, file)


# ------------------------------------------------------------------------------------------- the simplified model


def curves(file, models):
    """The simplified model: a column for each title, with its paths by label; rows η, λ, y and p.

    Of a path of more than a thousand steps means over a hundredth of them are shown.
    """
    figure, axes = subplots(4, len(models), sharex="col", figsize=(4.4 * len(models), 6.6))
    colors = {}  # by label, in both columns
    for column, (title, paths) in zip(axes.T, models.items()):
        for label, path in paths.items():
            color = colors.setdefault(label, plots.COLORS.get(label, (BLUE, ORANGE, "#009E73")[len(colors) % 3]))
            for axis, values in zip(column, (path.learning_rate, path.sharpness, path.y, path.p)):
                spans = np.array_split(np.asarray(values), len(values) if len(values) < 1000 else 100)
                steps = np.linspace(0, len(values) - 1, len(spans))
                axis.plot(steps, [span.mean() for span in spans], color=color, label=label, linewidth=1)
        for axis, name in zip(column, ("learning rate η", "sharpness λ", "y = ηλ − 2", "p = x²")):
            axis.set_ylabel(name, fontsize=9)
        column[0].set_title(title, fontsize=10)
        column[2].axhline(0, color=GREY, linewidth=0.8, zorder=0)
        column[2].set_ylim(-0.6, 0.6)
        column[3].set_yscale("log")
        column[3].set_ylim(bottom=max(1e-12, min(float(path.p.min()) for path in paths.values())))
        column[3].set_xlabel("step", fontsize=9)
    plots.finish(figure, axes, file)


def figure_4(_, file):
    """Figure 4: a constant rate (also with the new p in the λ update), and a rate held below the edge."""
    constant = {"as printed": theory.constant_rate(), "semi-implicit": theory.constant_rate(semi_implicit=True)}
    curves(file, {"constant rate": constant, "rate held below the edge": {"y = −0.1": theory.below_edge()}})


def figure_9(_, file):
    """Figure 9: CDAT at σ = 2 and 1.9, near the start and for long."""
    paths = lambda steps: {f"σ = {sigma:g}": theory.cdat_model(sigma, steps=steps) for sigma in (2, 1.9)}
    curves(file, {"first 400 steps": paths(400), "4000 steps": paths(4000)})


def feedback_in_the_model(_, file):
    """The feedback rule in the simplified model, beside CDAT at σ = 2; both see the λ of their own step."""
    paths = lambda steps: {"CDAT σ = 2": theory.cdat_model(2, steps=steps, lagged=False),
                           "feedback": theory.feedback_model(steps=steps)}  # fmt: skip
    with jax.enable_x64(True):  # in float32 p vanishes after some 3500 steps: nothing holds the rate, and it jumps
        curves(file, {"first 400 steps": paths(400), "4000 steps": paths(4000)})


# ------------------------------------------------------------------------------------------------------ close-ups


def problem(config):
    """(network, f, samples): what a run of that config trains, f(w, samples) its loss with weight decay."""
    dataset = data.load(config.dataset, config.data_dir, config.samples)
    known = {"shape": dataset.x.shape[1:], "classes": dataset.classes}
    network = train.built(models.MODELS[config.model], vars(config) | known)
    decay = lambda w: config.weight_decay / 2 * gd.dot(w, w)
    outputs, loss = lambda w, batch: network.apply(w, batch[0]), gd.LOSSES[config.loss]
    f = tuners.Composed(outputs, lambda z, w, batch: loss(z, batch[1]) + decay(w))
    return network, f, jax.device_put((dataset.x, dataset.y))


def trained(config):
    """The steps of gradient descent on the full batch, without end: yields (f, w, u, metrics), at w before the step."""
    network, f, samples = problem(config)
    optimizer, tuner = gd.gd(), train.built(tuners.TUNERS[config.tuner], vars(config))
    step = jax.jit(gd.make_step(f, optimizer, tuner))
    carry = gd.init_carry(network.init(jax.random.key(config.seed)), optimizer, tuner)
    while True:
        w = carry.w
        carry, metrics = step(carry, samples)
        yield lambda w: f(w, samples), w, carry.u, metrics


def follow(first, steps, **given):
    """Steps first to first + steps of a run of the default network: yields (t, f, w, u, top eigenvector, row)."""
    v = product = None
    for t, (f, w, u, metrics) in enumerate(itertools.islice(trained(train.configure(**given)), first + steps)):
        if t >= first:
            product = product or jax.jit(lambda w, v: sharpness.hvp(f, w, v))
            top = sharpness.lobpcg(functools.partial(product, w), w if v is None else v, tol=1e-4)
            v = top.vector
            yield t, f, w, u, v, {"step": t, **metrics, "sharpness": top.value}


def steep(_, file, steps=2000, count=20, sigmas=(2.0, 1.9375), **given):
    """The top of the spectrum at the end of two runs, and how much of the last direction lies within it."""
    figure, axes = subplots(1, 2, figsize=(9, 3.2))
    for sigma, color in zip(sigmas, (BLUE, BLACK)):
        config = train.configure(activation="tanh", sigma=sigma, **given)
        f, w, u, _ = next(itertools.islice(trained(config), steps, None))  # the step that starts at w of that number
        flat, unravel = ravel_pytree(w)
        product = jax.jit(lambda v: ravel_pytree(sharpness.hvp(f, w, unravel(v)))[0])
        block = jax.jit(jax.vmap(product, in_axes=1, out_axes=1))
        start = jax.random.normal(jax.random.key(0), (len(flat), count))
        values, vectors, _ = lobpcg_standard(block, start, m=200)
        u = ravel_pytree(u)[0]
        shares = np.cumsum(np.asarray(vectors.T @ u / jnp.linalg.norm(u)) ** 2)
        axes[0].plot(1 + np.arange(count), values, "o", color=color, markersize=4, label=f"CDAT σ = {sigma:g}")
        axes[1].plot(1 + np.arange(count), shares, "o-", color=color, markersize=4, linewidth=0.8)
        within = ", ".join(f"{k} {shares[k - 1]:.2%}" for k in (1, 2, 12) if k <= count)
        print(f"σ = {sigma:g}: eigenvalues {', '.join(f'{value:.3g}' for value in values[:13])}; share of ‖u‖² within "
              f"the first {within}; |cos| with the first {shares[0] ** 0.5:.2f}")  # fmt: skip
    axes[0].set(title="the largest eigenvalues of H", ylim=(0, None))
    axes[1].set(title="share of ‖u‖² along the first of them", ylim=(0, 1.05))
    for axis in axes:
        axis.set_xlabel("number of eigenvectors", fontsize=9)
        axis.title.set_fontsize(9)
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    plots.finish(figure, axes, file)


def overlay(_, file, first=100, steps=100, lr=0.1):
    """The sharpness of a real run at a constant rate, and what the model (4) makes of its a, b and x.

    λ swings with x from step to step, which the model leaves out: means of two neighbouring steps are compared.
    """
    measure, found = None, []
    for _, f, w, _, v, _ in follow(first, steps, tuner="constant", lr=lr):
        measure = measure or jax.jit(lambda w, v: theory.measure(f, w, v))
        found.append(jax.device_get(measure(w, v)))
    pairs = lambda values: (values[1:] + values[:-1]) / 2
    lam, x, _, a, b = np.array(found).T
    rise, fall = pairs(lr * a), pairs(lr * b * x**2)
    figure, axes = subplots(2, 1, figsize=(7, 4.6), sharex=True)
    t = first + np.arange(steps - 1)
    axes[0].plot(t, pairs(lam), color=BLACK, label="measured λ", linewidth=1.5)
    for share, style, name in ((0.5, "-", "model (4), b = ½‖∇λ‖²"), (1, "--", "model (4), b = ‖∇λ‖²")):
        change = (rise - share * fall)[:-1]
        predicted = lam[:2].mean() + np.append(0, np.cumsum(change))
        axes[0].plot(t, predicted, style, color=ORANGE, label=name, linewidth=1)
        print(f"{name}: mean change of λ a step {change.mean():.4f}, measured {np.diff(pairs(lam)).mean():.4f}; "
              f"correlation {np.corrcoef(change, np.diff(pairs(lam)))[0, 1]:.2f}")  # fmt: skip
    axes[1].plot(t, rise, color=BLUE, label="sharpening ηa", linewidth=1)
    axes[1].plot(t, fall, "--", color=PINK, label="feedback ηx²‖∇λ‖²", linewidth=1)
    for axis, name in zip(axes, ("sharpness λ", "change of λ in a step")):
        axis.set_ylabel(name, fontsize=9)
    axes[1].set_xlabel("step")
    plots.finish(figure, axes, file)


def greedy_gain(f, w, u):
    """f(w + η_edge u) − f(w + η_greedy u): what the rate on edge (7) loses to the greedy one (3), in this one step.

    >>> float(greedy_gain(lambda w: 2 * w**2, jnp.array(1.0), jnp.array(-4.0)))  # from 2 to 0, or to 2 again
    2.0
    """
    descent = jax.jvp(f, (w,), (u,))[1]  # g·u
    eta = -descent / jnp.abs(tuners.curvature(f, w, u))  # (3)
    return f(tuners.move(w, 2 * eta, u)) - f(tuners.move(w, eta, u))


def gains_along(config):
    """The row of a run: the greedy gain at each measured step, and the share of these steps at which it is positive."""
    history, gains, gain = {"loss": [], "learning_rate": []}, {}, None
    for t, (f, w, u, metrics) in enumerate(itertools.islice(trained(config), config.steps)):
        for name, column in history.items():
            column.append(metrics[name])
        if t % config.sharpness_every == 0:
            gain = gain or jax.jit(functools.partial(greedy_gain, f))
            gains[f"gain_{t}"] = float(gain(w, u))
    loss, rate = (np.array(column) for column in history.values())
    positive = [value > 0 for value in gains.values() if np.isfinite(value)]
    return dict(loss_first=loss[0], loss=plots.final_loss({"loss": loss}), rate=plots.geometric(rate[-10:]),
                sharpness=np.nan, product=np.nan, gain=np.mean(positive), **gains)  # fmt: skip


def figure_16(configs, file):
    """Figure 16: what an on-edge step loses on a greedy one from the same point, along runs of CDAT."""
    found = {}  # by σ, for each seed: the gains along its run
    for config in configs:
        row = results.kept(file, results.row_of(config), functools.partial(gains_along, config))
        if config.curvature == "hessian":
            gains = [value for name, value in row.items() if name.startswith("gain_")]
            found.setdefault(config.sigma, []).append(gains)
    figure, axis = subplots(figsize=(5.5, 3.4))
    for sigma, tuner in ((1.0, "greedy"), (2.0, "cdat")):
        gains, color = np.array(found[sigma]), plots.COLORS[tuner]
        steps = configs[0].sharpness_every * np.arange(gains.shape[1])
        axis.plot(steps, np.median(gains, axis=0), color=color, linewidth=1.3, label=f"along CDAT σ = {sigma:g}")
        axis.fill_between(steps, gains.min(axis=0), gains.max(axis=0), color=color, alpha=0.12, linewidth=0)
    axis.axhline(0, color=GREY, linewidth=0.8, zorder=0)
    axis.set_yscale("symlog", linthresh=0.01)  # it has both signs
    axis.set_xlabel("step", fontsize=9)
    axis.set_title("loss after an on-edge step − loss after a greedy one", fontsize=9, loc="left")
    plots.finish(figure, axis, file)

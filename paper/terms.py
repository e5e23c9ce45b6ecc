"""Which terms of higher order hold training at the edge? Asked of real runs, and of the simplified model.

What this file teaches: on the line along the top eigenvector v a loss is λt²/2 + τt³/6 + κt⁴/24, and a step a map of
one number. Just beyond ηλ = 2 its swings grow until the next terms stop them, or do not. With a constant rate, or any
other that does not look along the line, they stay bounded if

    τ²/λ² > κ/(3λ)

(a flip bifurcation: Chen and Bruna 2022; Gan 2026, arXiv:2606.15551). With a rate σ f'(t)/f''(t), as under CDAT where u
is along v, τ drops out, and they stay bounded if κ > 0: its curvature sees κ/2 where the slope sees κ/6.
Read next: batches.py.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

import plots
import sharpness
import train
import tuners
from paper import drawings, theory
from paper.results import kept, rows_of
from paper.settings import LAPTOP, SEEDS

SWINGS = {  # what is trained, by the name in the rows, and its constant rates
    "relu": (dict(steps=600), [0.05, 0.1, 0.2]),
    "tanh": (dict(steps=600, activation="tanh"), [0.05, 0.1, 0.2]),
    "cross-entropy": (dict(steps=600, loss="ce"), [0.4, 0.8, 1.6]),
    "CIFAR-10": (LAPTOP["mlp"], [0.005, 0.01, 0.02]),
}
EDGES = [1.9375, 2.0, 2.0625, 2.5]  # of CDAT


def swings(config, every=5, ahead=20):
    """A run, and at every so many of its steps what the terms of third and fourth order say of the next swing.

    s = −η g·v is where the step takes the weights along v. Among the steps above the edge, ηλ > 2: `held` are those in
    whose next 20 steps the loss stays below ten times what it is, `lost` the others, each with how many have
    τ²/λ² > κ/(3λ) and κ > 0. The errors are medians over them, of the slope along v after the step as predicted with
    terms up to H, τ and κ, in shares of the slope before.
    """
    top, found, losses = None, [], []
    for t, (f, w, u, metrics) in enumerate(itertools.islice(drawings.trained(config), config.steps)):
        losses.append(float(metrics["loss"]))
        if not np.isfinite(losses[-1]):
            break
        if t % every == 0:
            if top is None:  # f is the same at every step
                product, measure = compiled(f)
            start = jax.tree.map(jnp.ones_like, w) if top is None else top.vector
            top = sharpness.lobpcg(functools.partial(product, w), start, 1e-3)
            if not np.isfinite(top.value):
                break
            along, after = measure(w, u, metrics["learning_rate"], top.vector)
            found.append([t, float(metrics["learning_rate"]), *map(float, along), float(after)])
    return counted(np.array(found), np.array(losses), ahead)


def compiled(f):
    """product(w, v) -> Hv; measure(w, u, η, v) -> the derivatives of f along v at w, and its slope there at w + ηu."""

    def measure(w, u, eta, v):
        return theory.derivatives(f, w, v), jax.jvp(f, (tuners.move(w, eta, u),), (v,))[1]

    return jax.jit(lambda w, v: sharpness.hvp(f, w, v)), jax.jit(measure)


def counted(found, losses, ahead):
    """The row of `swings`."""
    t, eta, _, first, lam, tau, kappa, after = found.T
    above, s = eta * lam > 2, -eta * first
    predicted = np.cumsum([first, lam * s, tau * s**2 / 2, kappa * s**3 / 6], axis=0)[1:]
    errors = np.abs(predicted - after) / np.abs(first)
    beyond = losses[-1] if np.isfinite(losses[-1]) else np.inf  # what a run that ends goes on with
    padded = np.append(losses, np.full(ahead, beyond))
    lost = np.array([not max(padded[int(at) : int(at) + ahead]) <= 10 * padded[int(at)] for at in t])
    signs = {"s": tau**2 / lam**2 > kappa / (3 * lam), "kappa": kappa > 0}
    row = {"loss_first": losses[0], "loss": plots.final_loss({"loss": losses}), "steps": len(losses)}
    for name, these in ("held", above & ~lost), ("lost", above & lost):
        row |= {name: these.sum(), **{f"{name}_{sign}": (of & these).sum() for sign, of in signs.items()}}
    medians = np.median(errors[:, above], axis=1) if above.any() else np.full(3, np.nan)
    return row | dict(zip(("error_2", "error_3", "error_4"), medians))


CRITERIA = {  # where the next terms would keep a swing bounded: the runs and the sign asked, by a panel's title
    "constant rates: is τ²/λ² > κ/(3λ)?": ("constant", "s"),
    "CDAT: is τ²/λ² > κ/(3λ)?": ("CDAT", "s"),
    "CDAT: is κ > 0?": ("CDAT", "kappa"),
}


def terms(_, file, settings=SWINGS, edges=EDGES, seeds=SEEDS, **given):
    """How often each criterion holds above the edge, at steps that stay bounded and at those of blow-ups."""
    rows = {}
    for setting, (flags, rates) in settings.items():
        runs = {f"constant {lr:g}": dict(tuner="constant", lr=lr) for lr in rates}
        runs |= {f"CDAT σ = {sigma:g}": dict(tuner="cdat", sigma=sigma) for sigma in edges}
        for (label, tuner), seed in itertools.product(runs.items(), seeds):
            name, config = f"{setting}; {label}; seed {seed}", train.configure(**flags, **tuner, seed=seed, **given)
            rows[name] = kept(file, name, functools.partial(swings, config))
    figure, axes = drawings.subplots(1, len(CRITERIA), figsize=(9, 3.2), sharey=True)
    looks = {"bounded steps": ("held", "o", drawings.BLACK, -0.1, 0.9),
             "steps of a blow-up": ("lost", "X", drawings.ORANGE, 0.1, 0.0)}  # fmt: skip
    for axis, (title, (runs, sign)) in zip(axes, CRITERIA.items()):
        for words, (when, marker, color, shift, low) in looks.items():
            decisive = f"where {words} are, if it decides"
            axis.axhspan(low, low + 0.1, color=color, alpha=0.12, linewidth=0, label=decisive)
            for x, setting in enumerate(settings):
                share, count = share_of(rows, f"{setting}; {runs}", when, sign)
                axis.plot(x + shift, share, marker, color=color, label=f"{words}, and how many", markersize=7)
                if count:
                    side = "right" if shift < 0 else "left"
                    axis.text(x + 2.2 * shift, share, f"{count:g}", fontsize=7, ha=side, va="center")
        axis.set_xticks(range(len(settings)), settings, rotation=20)
        axis.set_xlim(-0.7, len(settings) - 0.3)
        axis.set_title(title, fontsize=9, loc="left")
    axes[0].set_ylabel("share of the steps\nthat say yes", fontsize=9)
    plots.finish(figure, axes, file)


def share_of(rows, start, when, sign):
    """(the share of the steps at which a sign is positive, nan of none; how many steps) in rows that start like that.

    when: "held", of the bounded steps, or "lost", of those of blow-ups; sign: "s", of τ²/λ² − κ/(3λ), or "kappa"
    """
    these = [row for name, row in rows.items() if name.startswith(start)]
    count = sum(row[when] for row in these)
    return sum(row[f"{when}_{sign}"] for row in these) / count if count else np.nan, count


def sign_tells(_, runs, sign="s"):
    """Whether a sign is positive, above the edge, at 90 % of the bounded steps and at 10 % of those of a blow-up."""
    found, rows = [], rows_of("terms")
    for setting in SWINGS:
        (held, bounded), (lost, blown) = (share_of(rows, f"{setting}; {runs}", when, sign) for when in ("held", "lost"))
        if bounded and blown:
            found.append((setting, f"{held:.2g} of {bounded:g}, {lost:.2g} of {blown:g}", held >= 0.9 and lost <= 0.1))
    return found


def terms_predict(_, runs):
    """Whether the slope after the step is predicted better with τ and κ than without: medians over the runs."""
    found = []
    for setting in SWINGS:
        rows = rows_of("terms", f"{setting}; {runs}").values()
        if rows:
            second, fourth = (np.nanmedian([row[name] for row in rows]) for name in ("error_2", "error_4"))
            found.append((setting, f"{second:.2g} → {fourth:.2g}", bool(fourth < second)))
    return found


# ------------------------------------------------------- what makes a range of σ stable in the simplified model?

MODELS = {  # κ, and the eigenvalues beside λ
    "as in the paper": (0.0, (0.1,)),
    "three eigenvalues": (0.0, (0.1, 1.0)),
    "five eigenvalues": (0.0, (0.1, 0.5, 1.0, 4.0)),
    "κ = −1": (-1.0, (0.1,)),
    "κ = 1": (1.0, (0.1,)),
    "κ = 1, five eigenvalues": (1.0, (0.1, 0.5, 1.0, 4.0)),
}


@functools.cache  # several tables and figures ask
def survival(kappa, nu, sigmas, steps=4000):
    """(the step at which the model leaves its valley, `steps` where it does not; the last λ), for each σ."""
    with jax.enable_x64(True):  # in float32 the step depends on the machine
        q, nu = jnp.full(len(nu), 4.0), jnp.array(nu)
        model = lambda sigma: theory.cdat_model(sigma, q=q, nu=nu, kappa=kappa, steps=steps, lagged=False)
        path = jax.device_get(jax.vmap(model)(jnp.array(sigmas)))
    out = ~(path.sharpness > 0) | ~(path.p < 1e6)
    return np.where(out.any(1), out.argmax(1), steps), path.sharpness[:, -1]


def stable_range(_, file, steps=4000, models=MODELS):
    """The steps that the simplified model stays in its valley, and the last λ, over σ."""
    sigmas = np.linspace(1.9, 2.6, 57)
    figure, axes = drawings.subplots(1, 2, figsize=(9, 3.4))
    looks = zip(models.items(), itertools.product("-:", (drawings.BLACK, drawings.BLUE, drawings.ORANGE)))
    for k, ((name, (kappa, nu)), (style, color)) in enumerate(looks):
        width = 3.5 - 0.5 * k  # the first ones lie below
        left, lam = survival(kappa, nu, tuple(sigmas), steps)
        axes[0].plot(sigmas, left, style, color=color, label=name, linewidth=width)
        axes[1].plot(sigmas[left == steps], lam[left == steps], style, color=color, linewidth=width)
    settled = sigmas[sigmas > 2]  # p = a/b, and a swing whose size stays: σ (λ + κp/6) = 2 (λ + κp/2)
    axes[1].plot(settled, 0.5 * (1 / settled - 1 / 6) / (1 - 2 / settled), ":", color=drawings.PINK,
                 label="κ = 1: where a swing keeps its size")  # fmt: skip
    axes[0].set(yscale="log", xlabel="σ", ylabel=f"steps before λ < 0\nor the swing runs off, of {steps}")
    axes[1].set(yscale="log", xlabel="σ", ylabel="λ at the end of these", ylim=(0.3, 60))
    plots.finish(figure, axes, file)


def widest(_):
    """Whether a range of σ above 2 stays in the valley for 4000 steps, for each form of the model."""
    sigmas = (2.0625, 2.125, 2.25, 2.5)
    found = []
    for name, (kappa, nu) in MODELS.items():
        left, _ = survival(kappa, nu, sigmas)
        text = ", ".join(f"{sigma:g}: {'stays' if step == 4000 else step}" for sigma, step in zip(sigmas, left))
        found.append((name, text, bool((left == 4000).sum() > 1)))
    return found

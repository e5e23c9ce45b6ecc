"""Rules: the feedback rule looked at closely, around its resets and beside other ways to choose σ. Not the paper's.

What this file teaches: to try a rule before it gets a name. `ruled` makes a tuner of any way to choose σ from the loss
and the direction. What these figures show is in no log, so they train by themselves. Read next: questions.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import gd
import plots
import train
import tuners
from paper import results
from paper.drawings import BLACK, GREY, ORANGE, PINK, follow, problem, subplots


def resets(_, file, first=120, steps=40):
    """A run of `feedback` around its resets, and the loss along u at one and at the step before."""
    rule = train.configure(tuner="feedback")
    run = list(follow(0, first + steps, tuner="feedback"))
    greedy, m = [], run[0][-1]["loss"]
    for *_, row in run:  # as in `feedback`
        m = rule.average * m + (1 - rule.average) * row["loss"]
        greedy.append(row["loss"] > (1 + rule.tolerance) * m)
    run, reset = run[first:], np.array(greedy[first:])
    column = lambda name: np.array([row[name] for *_, row in run], float)
    t, loss, eta, lam = map(column, ("step", "loss", "learning_rate", "sharpness"))
    f = run[0][1]
    figure, axes = subplots(2, 2, figsize=(9, 5.2))
    shown = ("training loss", loss), ("sharpness λ", lam), ("y = ηλ − 2", eta * lam - 2)
    for axis, (name, values) in zip(axes.flat, shown):
        axis.plot(t, values, color=plots.COLORS["feedback"], linewidth=1.2)
        axis.plot(t[reset], values[reset], "o", color=BLACK, markersize=4, label="reset, σ = 1")
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_xlabel("step", fontsize=9)
    axes[1, 0].axhline(0, color=ORANGE, linewidth=1, linestyle=(0, (6, 3)), zorder=0)
    along = jax.jit(jax.vmap(lambda s, w, u: f(tuners.move(w, s, u)), (0, None, None)))
    at = max(np.flatnonzero(reset), default=1)  # the last of them
    s = np.linspace(-0.1, 1.4, 51)  # in steps
    for k, color, style in ((at - 1, PINK, "--"), (at, BLACK, "-")):
        _, _, w, u, _, _ = run[k]
        axes[1, 1].plot(s, along(s * eta[k], w, u), style, color=color, linewidth=1.2,
                        label=f"from step {t[k]:.0f}" + ", reset" * bool(k == at))  # fmt: skip
        axes[1, 1].plot([0, 1], along(np.array([0, eta[k]]), w, u), "o", color=color, markersize=5)
    axes[1, 1].set_title("loss along u; dots: before the step and after", fontsize=9, loc="left")
    axes[1, 1].set_xlabel("distance, in steps", fontsize=9)
    plots.finish(figure, axes, file)


def ruled(scale, start, growth=1.5):
    """CDAT with uᵀGu and the cap of `feedback`; σ from scale(memory, value, u) -> (σ, memory), memory from start(w)."""

    def rate(state, f, w, value, g, u):
        memory, averages, eta_last = state
        sigma, memory = scale(memory, value, u)
        eta, averages = tuners.cdat(sigma, curvature="gauss-newton").rate(averages, f, w, value, g, u)
        eta = jnp.minimum(eta, growth * eta_last)
        return eta, (memory, averages, jnp.where(eta > 0, eta, eta_last))

    return tuners.Tuner(lambda w: (start(w), tuners.cdat().init(w), tuners.scalar(jnp.inf, w)), rate)


def alternatives(_, file, steps=600, names=("gd", "momentum", "rmsprop", "adam"), seeds=3):
    """The final loss under other ways to choose σ than `feedback`, all but one with uᵀGu, all but CDAT with its cap."""
    count, zeros = lambda w: jnp.zeros((), int), lambda w: jax.tree.map(jnp.zeros_like, w)

    def above_average(m, value, u):
        m = jnp.where(jnp.isinf(m), value, 0.9 * m + 0.1 * value)
        return jnp.where(value > 1.05 * m, 1.0, 2.5), m

    def turned(last, value, u):
        back = gd.dot(u, last) < -0.9 * gd.norm(u) * gd.norm(last)
        return jnp.where(back, 1.0, 2.5), u

    def cycle(sigma):  # sigma(t) at step t, whatever the loss
        return lambda t, value, u: (sigma(t), t + 1)

    rules = {
        "CDAT σ = 2": tuners.cdat(curvature="gauss-newton"),
        "feedback": tuners.feedback(),
        "feedback with uᵀHu": tuners.feedback(curvature="hessian"),
        "σ = 2.5; 1 where the loss is above average": ruled(above_average, lambda w: tuners.scalar(jnp.inf, w)),
        "σ = 2.5; 1 where u turned: cos < −0.9": ruled(turned, zeros),
        "σ = 2.5; 1 at each tenth step": ruled(cycle(lambda t: jnp.where(t % 10 == 9, 1.0, 2.5)), count),
        "σ from 1 to 3 in ten steps and again": ruled(cycle(lambda t: 1 + t % 10 * 2 / 9), count),
    }
    network, f, samples = problem(train.configure())
    stepped = functools.cache(lambda optimizer, tuner: jax.jit(gd.make_step(f, optimizer, tuner)))  # for all seeds

    def ends(optimizer, tuner, seed):
        """The final loss of a run."""
        step, carry = stepped(optimizer, tuner), gd.init_carry(network.init(jax.random.key(seed)), optimizer, tuner)
        history = []
        for _ in range(steps):
            carry, metrics = step(carry, samples)
            history.append(metrics["loss"])
        return {"loss": plots.final_loss({"loss": np.array(history)})}

    figure, axes = subplots(1, len(names), figsize=(9, 2.8), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names):
        optimizer = gd.OPTIMIZERS[name]()
        for row, (rule, tuner) in enumerate(rules.items()):
            same = [results.kept(file, f"{name}; {rule}; seed {seed}", functools.partial(ends, optimizer, tuner, seed))
                    for seed in range(seeds)]  # fmt: skip
            losses = np.array([of["loss"] for of in same])
            if row == 0:  # CDAT σ = 2
                base = np.median(losses)
            color = plots.COLORS["feedback" if row else "cdat"]
            axis.plot(losses / base, [row] * seeds, "o", color=color, alpha=0.6, markersize=4)
            axis.plot(np.median(losses) / base, row, "|", color=color, markersize=14)
        axis.axvline(1, color=GREY, linewidth=0.8, zorder=0)
        axis.set_yticks(range(len(rules)), rules)
        axis.set_xscale("log")
        axis.set_xlabel("final loss over\nthat of CDAT σ = 2", fontsize=9)
        axis.set_title(name, fontsize=9, loc="left")
    axes[0, 0].invert_yaxis()
    plots.finish(figure, axes, file)

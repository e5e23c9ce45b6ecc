"""A graph network on the digits: how to bring a problem of your own.

What this file teaches: gd.make_step, the tuners and the sharpness ask for no data set and no model of this repository,
only for a loss(w, batch). Here a batch is no array of samples: it is one graph, all of whose nodes are seen at once
while few of them have a label, as usual for graph networks. Nothing here but the seven files is imported.

    python -m paper.graph        trains it under each tuner, in a minute

Nodes are the 1797 digits, each joined to the ten whose pixels are nearest to its own; twenty a class have a label. The
network is that of Kipf and Welling (2017, arXiv:1609.02907), two layers that average over neighbours:

    z = Â relu(Â x W₁ + b₁) W₂ + b₂,   Â = D^(-1/2) (A + I) D^(-1/2), D the degrees in A + I

Read next: questions.py, which draws it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import data
import gd
import sharpness
import tuners


class Graph(NamedTuple):
    """All that a step is given."""

    a: Any  # Â, (nodes, nodes); a larger graph would take jax.experimental.sparse
    x: Any  # features, (nodes, pixels)
    y: Any  # classes, (nodes,)
    labelled: Any  # the nodes whose class is known: indices


def neighbours(x, k=10):
    """Â of the graph that joins each node to the k nearest ones.

    >>> neighbours(np.array([[0.0], [1.0], [5.0]]), k=1).round(2).tolist()
    [[0.5, 0.41, 0.0], [0.41, 0.33, 0.41], [0.0, 0.41, 0.5]]
    """
    squares = (x**2).sum(1)
    distances = squares[:, None] + squares - 2 * x @ x.T
    np.fill_diagonal(distances, np.inf)
    a = np.eye(len(x))
    np.put_along_axis(a, np.argsort(distances, axis=1)[:, :k], 1.0, axis=1)
    a = np.maximum(a, a.T)  # joined if one of the two is among the nearest of the other
    scale = a.sum(1) ** -0.5
    return scale[:, None] * a * scale


def load(labels=20):
    """The digits as a Graph, with so many labels a class; the other nodes are for the test."""
    digits = data.load("digits")  # whose classes take turns: the first ten are one of each
    x = np.concatenate([digits.x, digits.x_test]).reshape(-1, 64)
    y = np.concatenate([digits.y, digits.y_test])
    return Graph(np.float32(neighbours(x)), x, y, np.arange(10 * labels))


def init(key, width=32):
    """Parameters: two layers as pytrees."""
    keys, sizes = jax.random.split(key), (64, width, 10)
    return [{"kernel": jax.random.normal(key, (m, n)) * (2 / m) ** 0.5, "bias": jnp.zeros(n)}
            for key, m, n in zip(keys, sizes, sizes[1:])]  # fmt: skip


def apply(w, graph):
    """Logits of every node, (nodes, classes)."""
    z = jax.nn.relu(graph.a @ (graph.x @ w[0]["kernel"]) + w[0]["bias"])
    return graph.a @ (z @ w[1]["kernel"]) + w[1]["bias"]


def labelled_loss(z, w, graph):
    """Cross-entropy on the labelled nodes, and the weight decay."""
    return gd.ce(z[graph.labelled], graph.y[graph.labelled]) + 0.5 * 5e-4 * gd.dot(w, w)


LOSS = tuners.Composed(apply, labelled_loss)  # in two halves, for the Gauss-Newton curvature
TUNERS = {f"constant {lr:g}": tuners.constant(lr) for lr in (0.25, 0.5, 1.0, 2.0)}
TUNERS |= {"greedy": tuners.greedy(), "CDAT σ = 2": tuners.cdat(2.0), "feedback": tuners.feedback()}


def train(tuner, seed=0, steps=200):
    """The rows of a run: what the step measures, sharpness at every tenth step, and the test accuracy at the end."""
    graph = jax.tree.map(jnp.asarray, load())
    step = jax.jit(gd.make_step(LOSS, gd.gd(), tuner))
    product = jax.jit(lambda w, v: sharpness.hvp(lambda w: LOSS(w, graph), w, v))
    carry = gd.init_carry(init(jax.random.key(seed)), gd.gd(), tuner)
    v, rows = jax.tree.map(jnp.ones_like, carry.w), []
    for t in range(steps):
        w = carry.w
        carry, row = step(carry, graph)
        if t % 10 == 0:
            top = sharpness.lobpcg(lambda v: product(w, v), v, tol=1e-2)
            v, row["sharpness"] = top.vector, top.value
        rows.append(row)
    right = jnp.argmax(apply(carry.w, graph), -1) == graph.y
    unseen = jnp.ones(len(right), bool).at[graph.labelled].set(False)
    return jax.device_get(rows), float(jnp.mean(right[unseen]))


if __name__ == "__main__":
    for name, tuner in TUNERS.items():
        rows, accuracy = train(tuner)
        last = rows[-10]  # the last with a sharpness
        print(f"{name:13} loss {last['loss']:.4f}, rate {last['learning_rate']:.3g}, "
              f"sharpness {last['sharpness']:.3g}, test accuracy {accuracy:.1%}", flush=True)  # fmt: skip

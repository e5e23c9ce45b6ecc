"""Networks as pairs of pure functions, from a linear classifier to a transformer.

What this file teaches: a network needs no framework. It is a function `init` that draws parameters w, a nested dict or
list of arrays, and a function `apply` that maps w and a batch x to logits z; f(w) = loss(apply(w, x), y) goes as it
stands into `jax.grad`, or into a jvp of a jvp. The networks are those of Section 3 of arXiv:2407.06183, a cnn and an
rnn; PRESETS has the paper's sizes. No dropout anywhere.

    images   x (batch, height, width, channels), float in [0, 1]   z (batch, classes)
    text     x (batch, characters), int                            z (batch, characters, classes)

A factory takes the shape of one sample, the number of classes (for text, of characters) and options, each with a line
in its docstring that is also its flag's help. It writes `apply` and a spec: shape and start of every array of w.
Copying: this file needs JAX alone; for one network take all above "Networks" and what it calls. Read next: data.py.
"""

import math
from functools import partial
from typing import Callable, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp


class Model(NamedTuple):
    """A network: two pure functions."""

    init: Callable  # init(key) -> w, a pytree of parameters in the default float dtype
    apply: Callable  # apply(w, x) -> logits, in the dtype of w


class Normal(NamedTuple):
    """The spec of one array: its entries start from N(mean, variance)."""

    shape: tuple
    variance: float = 0.0
    mean: float = 0.0


def require(ok, message):
    """ValueError with this one-line message unless ok."""
    if not ok:
        raise ValueError(message)


def draw(spec, key):
    """w, an array for each Normal in the pytree `spec`; one long draw, cut up, compiles fastest."""
    leaves, tree = jax.tree.flatten(spec, is_leaf=lambda leaf: isinstance(leaf, Normal))
    sizes = [math.prod(n.shape) for n in leaves]
    require(sum(sizes) <= 2**31, f"{sum(sizes):.1g} parameters are too many; lower --width or --depth")
    noise = jax.lax.split(jax.random.normal(key, (sum(sizes),)), sizes)
    arrays = [n.mean + math.sqrt(n.variance) * e.reshape(n.shape) for n, e in zip(leaves, noise)]
    return tree.unflatten(arrays)


def check(factory, axes, shape, **options):
    """ValueError unless samples have so many axes, options are words of the signature or sizes, and patches fit."""
    model = factory.__name__
    sample = {3: "images (height, width, channels)", 1: "text (characters,)"}[axes]
    require(len(shape) == axes, f"{model} reads {sample}, not samples of shape {shape}")
    for name, value in options.items():
        words = get_args(factory.__annotations__.get(name))  # of a Literal; none for a size
        allowed = f"one of {[*words]}" if words else "1, 2, 3, ..."
        fits = value in words if words else value >= 1 and value % 1 == 0
        require(fits, f"{model}: {name} must be {allowed}, not {value!r}")
    patch = options.get("patch", 1)
    fits = all(side % patch == 0 for side in shape[:2])
    require(fits, f"{model}: patch must divide height and width {shape[:2]}, not be {patch}")


# ---- Layers: functions of their own parameters and of x


def dense_spec(fan_in, fan_out, gain=1.0):
    """Gain 2 keeps a signal's size through relu (He et al. 2015), 1 nearly through tanh (LeCun et al. 1998)."""
    return {"kernel": Normal((fan_in, fan_out), gain / fan_in), "bias": Normal((fan_out,))}


def dense(w, x):
    """(..., fan_in) -> (..., fan_out), in the dtype of w."""
    return x.astype(w["kernel"].dtype) @ w["kernel"] + w["bias"]


def layers_spec(sizes, gain=1.0):
    """Dense layers from sizes[0] inputs to sizes[-1] outputs, for `layers`."""
    return [dense_spec(fan_in, fan_out, gain) for fan_in, fan_out in zip(sizes, sizes[1:])]


def layers(w, x, act):
    """Dense layers with an activation between them: (..., sizes[0]) -> (..., sizes[-1])."""
    for layer in w[:-1]:
        x = act(dense(layer, x))
    return dense(w[-1], x)


def norm_spec(width, scale=1.0):
    """Scale and shift of each channel, for `layer_norm` and `group_norm`."""
    return {"scale": Normal((width,), mean=scale), "bias": Normal((width,))}


def normalise(x, axes, eps=1e-6):
    """Mean 0 and variance 1 over some axes."""
    x = x - x.mean(axes, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(axes, keepdims=True) + eps)


def layer_norm(w, x):
    """Mean 0 and variance 1 over the last axis, at each position alone (Ba et al. 2016)."""
    return normalise(x, -1) * w["scale"] + w["bias"]


def group_norm(w, x):
    """The same over all pixels of 16 channels, or of as many as divide 16 and c (Wu & He 2018)."""
    groups = x.reshape(*x.shape[:3], -1, math.gcd(16, x.shape[3]))
    return normalise(groups, (1, 2, 4)).reshape(x.shape) * w["scale"] + w["bias"]


NORMS = {"none": lambda w, x: x, "layer": layer_norm, "group": group_norm}


def conv_spec(size, c_in, c_out, gain=2.0, norm="none"):
    """A kernel and its norm, no bias of its own. A norm undoes a kernel's gain; for gain 0 it starts at 0 itself."""
    shape, fan_in = (size, size, c_in, c_out), size * size * c_in
    if norm == "none":
        return {"kernel": Normal(shape, gain / fan_in)}
    return {"kernel": Normal(shape, 2 / fan_in), **norm_spec(c_out, scale=1.0 if gain else 0.0)}


def conv(w, x, stride=1, norm="none"):
    """Convolution with zeros around x, then the norm: (batch, h, w, c_in) -> (.., h/stride, ..)."""
    x, axes = x.astype(w["kernel"].dtype), ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, w["kernel"], 2 * [stride], "SAME", dimension_numbers=axes)
    return NORMS[norm](w, x)


def patches(x, size):
    """Cut images into squares: (batch, h, w, c) -> (batch, h/size * w/size, size * size * c)."""
    batch, height, width, c = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, c)
    return x.swapaxes(2, 3).reshape(batch, -1, size * size * c)


def softmax(x):
    """Weights that sum to 1 over the last axis."""
    e = jnp.exp(x - jax.lax.stop_gradient(x.max(-1, keepdims=True)))
    # A power: of the quotient in jax.nn.softmax the compiler simplifies the two first-order tangents of a second
    # derivative (tuners.curvature) in two ways, sees no longer that they are one, and computes all after it twice.
    return e * e.sum(-1, keepdims=True) ** -1.0


def attention_spec(width, inner):
    """For `attention`: queries, keys and values are one kernel, side by side."""
    return {"qkv": dense_spec(width, 3 * inner), "out": dense_spec(inner, width)}


def attention(w, x, heads, causal=False):
    """softmax(q k' / sqrt(d)) v: each position averages those it attends to (Vaswani et al. 2017).

    (batch, positions, width) -> the same, in time and memory that grow as positions^2. If `causal`, position q sees
    only positions k <= q. Einsum letters: b batch, h head, d width of a head.
    """
    qkv = dense(w["qkv"], x).reshape(*x.shape[:2], 3, heads, -1)
    q, k, v = jnp.unstack(qkv, axis=2)  # (batch, positions, heads, d) each
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[2:], bool)), scores, -jnp.inf)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", softmax(scores), v)
    return dense(w["out"], mixed.reshape(*x.shape[:2], -1))  # heads side by side again


# ---- Networks, from easy to hard


def linear(shape, classes):
    """Logits linear in the pixels: f is convex, and tuners behave as in textbooks (Fig. 2).

    >>> model = linear((8, 8, 1), 10)
    >>> model.apply(model.init(jax.random.key(0)), jnp.ones((5, 8, 8, 1))).shape
    (5, 10)
    """
    check(linear, 3, shape, classes=classes)
    spec = dense_spec(math.prod(shape), classes)
    return Model(partial(draw, spec), lambda w, x: dense(w, x.reshape(len(x), -1)))


def mlp(shape, classes, width=128, depth=3, activation: Literal["relu", "tanh"] = "relu"):
    """Hidden layers, then a linear one (Figs. 15 and 16).

    width: units of a hidden layer
    depth: hidden layers
    activation: between the layers

    >>> w = mlp((8, 8, 1), 10).init(jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(w))
    42634
    """
    check(mlp, 3, shape, classes=classes, width=width, depth=depth, activation=activation)
    act, gain = {"relu": (jax.nn.relu, 2.0), "tanh": (jnp.tanh, 1.0)}[activation]  # with the gain of dense_spec
    spec = layers_spec([math.prod(shape), *depth * [width], classes], gain)
    return Model(partial(draw, spec), lambda w, x: layers(w, x.reshape(len(x), -1), act))


def cnn(shape, classes, width=16, depth=3):
    """3x3 convolutions of stride 2, doubling in channels; mean over pixels; dense layer.

    width: channels of the first stage, doubled in each later one
    depth: convolutions
    """
    check(cnn, 3, shape, classes=classes, width=width, depth=depth)
    sizes = [shape[2]] + [width * 2**i for i in range(depth)]
    convs = [{**conv_spec(3, m, n), "bias": Normal((n,))} for m, n in zip(sizes, sizes[1:])]

    def apply(w, x):
        for layer in w["convs"]:
            x = jax.nn.relu(conv(layer, x, stride=2) + layer["bias"])
        return dense(w["head"], x.mean((1, 2)))

    return Model(partial(draw, {"convs": convs, "head": dense_spec(sizes[-1], classes)}), apply)


def rnn(shape, classes, width=128):
    """A recurrent layer that predicts, at each character, the next (Elman 1990).

    h_t = tanh(e(x_t) + h_(t-1) W + b) from h = 0, where e(c) is a learned row for character c. The loop over the
    characters is unrolled: a long text is long to compile.

    width: units of a hidden layer
    """
    check(rnn, 1, shape, classes=classes, width=width)
    embed = Normal((classes, width), 1 / width)
    spec = {"embed": embed, "recur": dense_spec(width, width), "head": dense_spec(width, classes)}

    def apply(w, x):
        def step(h, e):  # (batch, width) each
            h = jnp.tanh(e + dense(w["recur"], h))
            return h, h

        e = w["embed"][x].swapaxes(0, 1)  # (characters, batch, width): scan runs along axis 0
        # Unrolled: a loop would carry both tangents of a second derivative, which are one (see tuners.curvature).
        _, h = jax.lax.scan(step, jnp.zeros_like(e[0]), e, unroll=True)
        return dense(w["head"], h.swapaxes(0, 1))

    return Model(partial(draw, spec), apply)


def resnet_block_spec(c_in, c, bottleneck, norm, shortcut="identity", plain=2.0, first=2.0, last=0.0):
    """The gains are `plain` in the shortcut, `first` and at the end `last` in the branch."""
    convs = [(3, c_in, c, first), (3, c, c, last)]  # size, channels in, channels out, gain
    if bottleneck:
        convs = [(1, c_in, c, first), (3, c, c, first), (1, c, 4 * c, last)]
    branch = [conv_spec(*numbers, norm) for numbers in convs]
    c_out = 4 * c if bottleneck else c
    if c_in == c_out and shortcut == "identity":
        return {"branch": branch}
    return {"branch": branch, "shortcut": conv_spec(1, c_in, c_out, plain, norm)}


def resnet_block(w, x, stride, norm):
    """relu(shortcut(x) + branch(x)), where the first 3x3 convolution takes the stride."""
    strides = (stride, 1) if len(w["branch"]) == 2 else (1, stride, 1)
    y = x
    for layer, s in zip(w["branch"], strides):
        y = conv(layer, jax.nn.relu(y), s, norm)  # relu(x) = x: it comes out of a relu
    if "shortcut" in w:
        x = conv(w["shortcut"], x, stride, norm)
    return jax.nn.relu(x + y)


def resnet(shape, classes, width=16, depth=10, norm: Literal["none", "layer", "group"] = "none",
           stem: Literal["small", "imagenet"] = "small", start: Literal["fixup", "lecun"] = "fixup",
           shortcut: Literal["identity", "projection"] = "identity"):  # fmt: skip
    """Blocks that each add a correction to what they are given (He et al. 2016).

    width: channels of the first stage, doubled in each later one
    depth: 10, 18 or 34, with two 3x3 convolutions a block; 50, with 1x1, 3x3 and 1x1
    norm: after every convolution; layer: over the channels of a pixel
    stem: small (3x3), or imagenet (7x7 with stride 2, then a max pool with stride 2)
    start: fixup (all branches silent), or lecun (none; without a norm all kernels from N(0, 1/fan-in))
    shortcut: identity where shapes allow it, or projection in every block; the paper's code has lecun and projection

    Silent branches make any depth start shallow: the last scale of a norm is zero (Goyal et al. 2017), or else the last
    kernel, and the m - 1 others are scaled by blocks^(-1 / (2m - 2)) (Fixup, Zhang et al. 2019; without its scalars).
    """
    check(resnet, 3, shape, classes=classes, width=width, norm=norm, stem=stem, start=start, shortcut=shortcut)
    stages = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
    require(depth in stages, f"resnet: depth must be one of {[*stages]}, not {depth!r}")
    imagenet, bottleneck = stem == "imagenet", depth == 50
    gains = {"plain": 1.0, "first": 1.0, "last": 1.0}
    if start == "fixup":  # whose factor is squared here: a gain is one of variances
        blocks = sum(stages[depth])
        gains = {"plain": 2.0, "first": 2 * blocks ** (-1 / 2 if bottleneck else -1), "last": 0.0}
    inner = [width * 2**stage for stage, n in enumerate(stages[depth]) for _ in range(n)]
    outer = [width] + [4 * c if bottleneck else c for c in inner]  # channels between blocks
    strides = [2 if now > before else 1 for before, now in zip(inner[:1] + inner, inner)]
    spec = {
        "stem": conv_spec(7 if imagenet else 3, shape[2], width, gains["plain"], norm),
        "blocks": [resnet_block_spec(a, c, bottleneck, norm, shortcut, **gains) for a, c in zip(outer, inner)],
        "head": dense_spec(outer[-1], classes),
    }

    def apply(w, x):
        x = jax.nn.relu(conv(w["stem"], x, 2 if imagenet else 1, norm))
        if imagenet:  # the largest value of each 3x3 window, every second pixel
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
        for block, stride in zip(w["blocks"], strides):
            x = resnet_block(block, x, stride, norm)
        return dense(w["head"], x.mean((1, 2)))

    return Model(partial(draw, spec), apply)


def stack_spec(depth, width, classes, mix, head_gain=0.0):
    """What mixer, vit and transformer share; published mixers and vits start with a head of 0."""
    norm, mlp = norm_spec(width), layers_spec([width, 4 * width, width])
    block = {"norms": [norm, norm], "mix": mix, "mlp": mlp}
    return {"blocks": depth * [block], "norm": norm, "head": dense_spec(width, classes, head_gain)}


def stack(w, x, mix, act):
    """`mix` works across positions, the MLP at each alone; x is only ever added to (pre-norm)."""
    for block in w["blocks"]:
        x = x + mix(block["mix"], layer_norm(block["norms"][0], x))
        x = x + layers(block["mlp"], layer_norm(block["norms"][1], x), act)
    return layer_norm(w["norm"], x)


def mixer(shape, classes, width=64, depth=2, patch=4):
    """MLP-Mixer: MLPs across patches and channels, by turns, of width / 2 and 4 * width (Tolstikhin et al. 2021).

    width: channels of a patch or a character
    depth: blocks
    patch: side of a patch
    """
    check(mixer, 3, shape, classes=classes, width=width, depth=depth, patch=patch)
    tokens = shape[0] * shape[1] // patch**2
    spec = stack_spec(depth, width, classes, layers_spec([tokens, math.ceil(width / 2), tokens]))
    spec["embed"] = dense_spec(patch * patch * shape[2], width)

    def mix(w, x):  # swapped to (batch, width, tokens), so that the layers act across tokens
        return layers(w, x.swapaxes(1, 2), jax.nn.gelu).swapaxes(1, 2)

    def apply(w, x):
        x = dense(w["embed"], patches(x, patch))
        return dense(w["head"], stack(w, x, mix, jax.nn.gelu).mean(1))

    return Model(partial(draw, spec), apply)


def vit(shape, classes, width=64, depth=2, patch=4, heads=4):
    """Vision transformer: attention among patches and a learned token, read for the class (Dosovitskiy et al. 2021).

    width: channels of a patch or a character
    depth: blocks
    patch: side of a patch
    heads: heads of an attention
    """
    check(vit, 3, shape, classes=classes, width=width, depth=depth, patch=patch, heads=heads)
    require(width % heads == 0, f"vit: heads must divide the width {width}, not be {heads}")
    tokens = 1 + shape[0] * shape[1] // patch**2
    spec = {
        "embed": dense_spec(patch * patch * shape[2], width),
        "token": Normal((width,)),
        "positions": Normal((tokens, width), 0.02**2),
        **stack_spec(depth, width, classes, attention_spec(width, width)),
    }

    def apply(w, x):
        x = dense(w["embed"], patches(x, patch))
        token = jnp.broadcast_to(w["token"], (len(x), 1, width))
        x = jnp.concatenate([token, x], axis=1) + w["positions"]
        return dense(w["head"], stack(w, x, partial(attention, heads=heads), jax.nn.gelu)[:, 0])

    return Model(partial(draw, spec), apply)


def transformer(shape, classes, width=64, depth=2, heads=4, attention_width=0):
    """Decoder-only transformer that predicts, at each character, the next.

    width: channels of a patch or a character
    depth: blocks
    heads: heads of an attention
    attention_width: channels of all heads of an attention together; 0 = as many as the width
    """
    inner = attention_width or width
    check(transformer, 1, shape, classes=classes, width=width, depth=depth, heads=heads, attention_width=inner)
    require(inner % heads == 0, f"transformer: heads must divide the width {inner}, not be {heads}")
    spec = {
        "embed": Normal((classes, width), 1 / width),
        "positions": Normal((*shape, width), 1 / width),
        **stack_spec(depth, width, classes, attention_spec(width, inner), head_gain=1.0),
    }

    def apply(w, x):
        x = w["embed"][x] + w["positions"][: x.shape[1]]
        return dense(w["head"], stack(w, x, partial(attention, heads=heads, causal=True), jax.nn.relu))

    return Model(partial(draw, spec), apply)


MODELS = {f.__name__: f for f in (linear, mlp, cnn, rnn, resnet, mixer, vit, transformer)}

PRESETS = {  # the paper's own
    "mlp-fig15": {"model": "mlp", "width": 256, "depth": 3},
    "mlp-fig16": {"model": "mlp", "width": 1024, "depth": 1},
    "resnet34": {"model": "resnet", "depth": 34, "width": 64, "norm": "none", "stem": "imagenet", "start": "lecun",
                 "shortcut": "projection"},
    "resnet50": {"model": "resnet", "depth": 50, "width": 64, "norm": "layer", "stem": "imagenet"},
    "mixer-ti8": {"model": "mixer", "width": 192, "depth": 12, "patch": 8},
    "vit-ti32": {"model": "vit", "width": 192, "depth": 12, "patch": 32, "heads": 3},
    "nanolm": {"model": "transformer", "width": 256, "depth": 6, "heads": 8, "attention_width": 32},  # of all heads
}

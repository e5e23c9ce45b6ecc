"""Facts about the networks: sizes as published, layers as numpy computes them, curvature, dtypes.

The oracles below are written in numpy alone, with loops where the shipped code has one call. The tests over NETWORKS
and MODELS hold for every entry of the registry: one more needs no line here.
"""

import math
from contextlib import suppress
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit

import models
from models import MODELS, PRESETS

IMAGE, TEXT, CLASSES = (8, 8, 3), (6,), 5
TINY = {  # a small instance of every model, and two of some
    "linear": ("linear", {}),
    "mlp": ("mlp", {"width": 7, "depth": 2}),
    "mlp-tanh": ("mlp", {"width": 7, "depth": 2, "activation": "tanh"}),
    "cnn": ("cnn", {"width": 2, "depth": 2}),
    "rnn": ("rnn", {"width": 5}),
    "resnet": ("resnet", {"width": 2, "stem": "imagenet"}),
    "resnet-group": ("resnet", {"width": 4, "norm": "group"}),
    "resnet-paper": ("resnet", {"width": 2, "stem": "imagenet", "start": "lecun", "shortcut": "projection"}),
    "mixer": ("mixer", {"width": 6, "depth": 1}),
    "vit": ("vit", {"width": 6, "depth": 1, "heads": 3}),
    "transformer": ("transformer", {"width": 6, "depth": 1, "heads": 2, "attention_width": 4}),
}
NETWORKS = TINY | {name: (name, {}) for name in MODELS if name not in TINY}  # the others as by default


def read_by(factory):
    """The shape of the samples that a model does not refuse."""
    shapes = []
    for shape in IMAGE, TEXT:
        with suppress(ValueError):
            MODELS[factory](shape, CLASSES)
            shapes.append(shape)
    (shape,) = shapes
    return shape


def build(name):
    """(model, x, one-hot targets) with a batch of 3."""
    factory, options = NETWORKS[name]
    shape, rng = read_by(factory), np.random.default_rng(1)
    x = rng.integers(CLASSES, size=(3, *TEXT)) if shape == TEXT else rng.uniform(size=(3, *IMAGE))
    y = np.eye(CLASSES)[rng.integers(CLASSES, size=x.shape if shape == TEXT else 3)]
    return MODELS[factory](shape, CLASSES, **options), jnp.asarray(x), jnp.asarray(y)


def anywhere(model, seed=2):
    """Parameters that are all random, so that no zero or one of the start hides a mistake."""
    rng = np.random.default_rng(seed)
    w = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), w)


@cache
def along_a_line(name):
    """(w, x, a function of t): loss, curvature along u and logits at w + tu, compiled together in float64."""
    with jax.enable_x64(True):
        model, x, y = build(name)
        w, u = anywhere(model, seed=2), anywhere(model, seed=3)

        def loss(t):
            z = model.apply(jax.tree.map(lambda w, u: w + t * u, w, u), x)
            return 0.5 * jnp.mean(jnp.sum((z - y) ** 2, -1)), z

        def at(t):
            slope = lambda t: jax.jvp(loss, (t,), (1.0,), has_aux=True)
            (value, _, z), (_, curvature, _) = jax.jvp(slope, (t,), (1.0,))
            return value, curvature, z

        compiled = jit(at).lower(0.0).compile()
    return w, x, compiled


def count(model):
    """Number of parameters, found without drawing any."""
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))


def of_preset(preset):
    """The name of its model, and the options."""
    options = dict(PRESETS[preset])
    return options.pop("model"), options


def shapes(preset, shape, classes):
    """(parameters, shape of the logits of two samples) of a preset, with nothing computed."""
    factory, options = of_preset(preset)
    model = MODELS[factory](shape, classes, **options)
    w = jax.eval_shape(model.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((2, *shape), jnp.int32 if len(shape) == 1 else jnp.float32)
    return count(model), jax.eval_shape(model.apply, w, x).shape


# ---- The same networks in numpy


def np_dense(w, x):
    return np.einsum("...i,ij->...j", x, w["kernel"]) + w["bias"]


def np_relu(x):
    return np.where(x > 0, x, 0)


def np_gelu(x):  # the tanh form, which the published ViT and mixer use
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def np_layer_norm(w, x):
    scaled = (x - x.mean(-1)[..., None]) / np.sqrt(x.var(-1)[..., None] + 1e-6)
    return scaled * w["scale"] + w["bias"]


def np_windows(x, size, stride, fill):
    """(batch, rows, columns, size, size, channels), "same" padding: what is odd in it goes to the bottom and right."""
    rows, cols = math.ceil(x.shape[1] / stride), math.ceil(x.shape[2] / stride)
    pads = [max((n - 1) * stride + size - m, 0) for n, m in zip((rows, cols), x.shape[1:3])]
    x = np.pad(x, [(0, 0), *[(p // 2, p - p // 2) for p in pads], (0, 0)], constant_values=fill)
    window = lambda i, j: x[:, i * stride : i * stride + size, j * stride : j * stride + size]
    return np.stack([np.stack([window(i, j) for j in range(cols)], 1) for i in range(rows)], 1)


def np_conv(kernel, x, stride=1):
    return np.einsum("bijklm,klmc->bijc", np_windows(x, kernel.shape[0], stride, 0.0), kernel)


def np_max_pool(x):
    return np_windows(x, 3, 2, -np.inf).max((3, 4))


def np_group_norm(w, x, size):
    out = np.empty_like(x)
    for n in range(len(x)):
        for c in range(0, x.shape[3], size):
            group = x[n, :, :, c : c + size]
            out[n, :, :, c : c + size] = (group - group.mean()) / np.sqrt(group.var() + 1e-6)
    return out * w["scale"] + w["bias"]


def np_patches(x, size):
    rows, cols = range(0, x.shape[1], size), range(0, x.shape[2], size)
    cut = [x[:, i : i + size, j : j + size].reshape(len(x), -1) for i in rows for j in cols]
    return np.stack(cut, axis=1)


def np_attention(w, x, heads, causal=False):
    inner = w["out"]["kernel"].shape[0]
    d = inner // heads
    mixed = np.zeros((*x.shape[:2], inner))
    for b, sample in enumerate(x):
        qkv = np_dense(w["qkv"], sample)
        for h in range(heads):
            q, k, v = (qkv[:, n * inner + h * d : n * inner + (h + 1) * d] for n in range(3))
            for t in range(len(sample)):
                seen = t + 1 if causal else len(sample)
                p = np.exp([q[t] @ k[s] / np.sqrt(d) for s in range(seen)])
                mixed[b, t, h * d : (h + 1) * d] = (p / p.sum()) @ v[:seen]
    return np_dense(w["out"], mixed)


def np_stack(w, x, mix, act):
    for block in w["blocks"]:
        x = x + mix(block["mix"], np_layer_norm(block["norms"][0], x))
        y = act(np_dense(block["mlp"][0], np_layer_norm(block["norms"][1], x)))
        x = x + np_dense(block["mlp"][1], y)
    return np_layer_norm(w["norm"], x)


def np_mlp(w, x, act=np_relu):
    x = x.reshape(len(x), -1)
    for layer in w[:-1]:
        x = act(np_dense(layer, x))
    return np_dense(w[-1], x)


def np_cnn(w, x):
    for layer in w["convs"]:
        x = np_relu(np_conv(layer["kernel"], x, 2) + layer["bias"])
    return np_dense(w["head"], x.mean((1, 2)))


def np_rnn(w, x):
    z = np.zeros((*x.shape, CLASSES))
    for b, text in enumerate(x):
        h = np.zeros(w["embed"].shape[1])
        for t, c in enumerate(text):
            h = np.tanh(w["embed"][c] + np_dense(w["recur"], h))
            z[b, t] = np_dense(w["head"], h)
    return z


def np_resnet(w, x, imagenet, norm=lambda layer, x: x):
    def conv(layer, x, stride):
        return norm(layer, np_conv(layer["kernel"], x, stride))

    x = np_relu(conv(w["stem"], x, 2 if imagenet else 1))
    x = np_max_pool(x) if imagenet else x
    for block, stride in zip(w["blocks"], (1, 2, 2, 2)):
        y = conv(block["branch"][1], np_relu(conv(block["branch"][0], x, stride)), 1)
        x = np_relu(y + (conv(block["shortcut"], x, stride) if "shortcut" in block else x))
    return np_dense(w["head"], x.mean((1, 2)))


def np_mixer(w, x):
    def mix(mlp, x):
        columns = [np_dense(mlp[1], np_gelu(np_dense(mlp[0], x[:, :, c]))) for c in range(6)]
        return np.stack(columns, axis=-1)

    x = np_dense(w["embed"], np_patches(x, 4))
    return np_dense(w["head"], np_stack(w, x, mix, np_gelu).mean(1))


def np_vit(w, x):
    x = np_dense(w["embed"], np_patches(x, 4))
    x = np.stack([np.vstack([w["token"], sample]) + w["positions"] for sample in x])
    x = np_stack(w, x, lambda w, x: np_attention(w, x, 3), np_gelu)
    return np_dense(w["head"], x[:, 0])


def np_transformer(w, x):
    x = w["embed"][x] + w["positions"]
    x = np_stack(w, x, lambda w, x: np_attention(w, x, 2, causal=True), np_relu)
    return np_dense(w["head"], x)


ORACLES = {
    "linear": lambda w, x: np_dense(w, x.reshape(len(x), -1)),
    "mlp": np_mlp,
    "mlp-tanh": lambda w, x: np_mlp(w, x, np.tanh),
    "cnn": np_cnn,
    "rnn": np_rnn,
    "resnet": partial(np_resnet, imagenet=True),
    "resnet-paper": partial(np_resnet, imagenet=True),
    "resnet-group": partial(np_resnet, imagenet=False, norm=lambda w, x: np_group_norm(w, x, min(16, x.shape[3]))),
    "mixer": np_mixer,
    "vit": np_vit,
    "transformer": np_transformer,
}


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_the_same_network_in_numpy(name):
    w, x, at = along_a_line(name)
    with jax.enable_x64(True):
        expected = ORACLES[name](jax.tree.map(np.asarray, w), np.asarray(x))
        np.testing.assert_allclose(at(0.0)[2], expected, rtol=1e-9, atol=1e-11)


def test_a_bottleneck_block_takes_its_stride_in_the_3x3_convolution():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        spec = models.resnet_block_spec(3, 2, bottleneck=True, norm="layer")
        w = anywhere(models.Model(partial(models.draw, spec), None))
        x = rng.uniform(size=(2, 5, 6, 3))
        y = x
        for layer, stride, act in zip(w["branch"], (1, 2, 1), (np_relu, np_relu, lambda y: y)):
            y = act(np_layer_norm(layer, np_conv(np.asarray(layer["kernel"]), y, stride)))
        short = np_conv(np.asarray(w["shortcut"]["kernel"]), x, 2)
        expected = np_relu(y + np_layer_norm(w["shortcut"], short))
        block = jit(partial(models.resnet_block, stride=2, norm="layer"))
        np.testing.assert_allclose(block(w, x), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("channels, size", [(32, 16), (12, 4), (3, 1)])
def test_group_norm_is_over_16_channels_or_what_divides_them(channels, size):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = rng.normal(3, 2, size=(2, 3, 4, channels))
        w = {"scale": rng.normal(size=channels), "bias": rng.normal(size=channels)}
        np.testing.assert_allclose(jit(models.group_norm)(w, x), np_group_norm(w, x, size), rtol=1e-9)


@pytest.mark.parametrize("name", ["rnn", "transformer"])
def test_a_character_changes_no_prediction_before_it_and_some_after(name):
    model, x, _ = build(name)
    apply, w = jit(model.apply), anywhere(model)
    before, after = (np.asarray(apply(w, x.at[:, 3].set(c))) for c in (0, 1))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (np.abs(before[:, 3:] - after[:, 3:]).max(-1) > 1e-6).all()
    shorter, whole = apply(w, x[:, :4]), apply(w, x)
    np.testing.assert_allclose(shorter, whole[:, :4], rtol=1e-4, atol=1e-5)


# ---- Sizes


def linear_size(m, n):
    return m * n + n


def attention_block_size(width, inner):
    norms = 2 * 2 * width
    return norms + linear_size(width, 3 * inner) + linear_size(inner, width) + mlp_size(width)


def mlp_size(width):
    return linear_size(width, 4 * width) + linear_size(4 * width, width)


def test_mlp_presets_have_the_sizes_of_figures_15_and_16():
    fig15 = linear_size(784, 256) + 2 * linear_size(256, 256) + linear_size(256, 10)
    assert shapes("mlp-fig15", (28, 28, 1), 10) == (fig15, (2, 10))
    fig16 = linear_size(3072, 1024) + linear_size(1024, 100)
    assert shapes("mlp-fig16", (32, 32, 3), 100) == (fig16, (2, 100))


REPORTED = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032}  # by torchvision, for 1000 classes of imagenet


@pytest.mark.parametrize("depth", REPORTED)
def test_imagenet_resnets_have_as_many_parameters_as_torchvision_reports(depth):
    for norm in ("layer", "group"):
        options = {"depth": depth, "width": 64, "norm": norm, "stem": "imagenet"}
        assert count(models.resnet((224, 224, 3), 1000, **options)) == REPORTED[depth]


def test_resnet_presets_have_the_imagenet_stem_and_resnet34_a_projection_in_each_block_and_no_normalisation():
    norms = 2 * (64 * 7 + 128 * 9 + 256 * 13 + 512 * 7)  # scale and shift of 1 + 6 convolutions of 64 channels, ...
    more = 3 * 64**2 + 3 * 128**2 + 5 * 256**2 + 2 * 512**2  # projections in the blocks that keep their shape
    for classes in (10, 1000):
        head34, head50 = (linear_size(width, 1000) - linear_size(width, classes) for width in (512, 2048))
        assert shapes("resnet34", (32, 32, 3), classes) == (REPORTED[34] - norms + more - head34, (2, classes))
        assert shapes("resnet50", (32, 32, 3), classes) == (REPORTED[50] - head50, (2, classes))


def test_resnet10_is_resnet18_less_the_second_block_of_each_stage():
    seconds = sum(2 * (9 * c * c + 2 * c) for c in (64, 128, 256, 512))
    model = models.resnet((224, 224, 3), 1000, width=64, norm="layer", stem="imagenet")
    assert count(model) == REPORTED[18] - seconds == 5_418_792


@pytest.mark.parametrize("stem, side", [("small", 4), ("imagenet", 1)])
def test_a_resnet_divides_the_side_by_8_after_a_small_stem_and_by_32_after_the_imagenet_one(stem, side):
    model = models.resnet((32, 32, 3), 10, width=4, stem=stem)
    w = jax.eval_shape(model.init, jax.random.key(0))
    jaxpr = jax.make_jaxpr(model.apply)(w, jnp.zeros((1, 32, 32, 3)))
    convs = [e for e in jaxpr.eqns if e.primitive.name == "conv_general_dilated"]
    assert convs[-1].outvars[0].aval.shape == (1, side, side, 32)


def test_mixer_preset_is_mixer_ti8():
    tokens = 4 * 4
    block = 2 * 2 * 192 + linear_size(tokens, 96) + linear_size(96, tokens) + mlp_size(192)
    total = linear_size(8 * 8 * 3, 192) + 12 * block + 2 * 192 + linear_size(192, 10)
    assert shapes("mixer-ti8", (32, 32, 3), 10) == (total, (2, 10))
    published = models.mixer((224, 224, 3), 1000, width=768, depth=12, patch=16)
    assert count(published) == 59_880_472  # Mixer-B/16, reported as 59M


def test_vit_preset_is_vit_ti32():
    tokens = 1 + 7 * 7
    embed = linear_size(32 * 32 * 3, 192) + 192 + tokens * 192
    total = embed + 12 * attention_block_size(192, 192) + 2 * 192 + linear_size(192, 10)
    assert shapes("vit-ti32", (224, 224, 3), 10) == (total, (2, 10))
    published = models.vit((224, 224, 3), 1000, width=768, depth=12, heads=12, patch=16)
    assert count(published) == 86_567_656  # ViT-B/16 of torchvision


def test_nanolm_preset_has_as_many_parameters_as_the_optax_example_reports():
    total = (65 + 64) * 256 + 6 * attention_block_size(256, 32) + 2 * 256 + linear_size(256, 65)
    assert shapes("nanolm", (64,), 65) == (total, (2, 64, 65))
    assert total == 3_408_513


@pytest.mark.parametrize(
    "preset, shape, scores", [("vit-ti32", (224, 224, 3), "3,50,50"), ("nanolm", (64,), "8,64,64")]
)
def test_attention_presets_have_as_many_heads_as_published(preset, shape, scores):
    factory, options = of_preset(preset)
    model = MODELS[factory](shape, 10, **options)
    w = jax.eval_shape(model.init, jax.random.key(0))
    x = jnp.zeros((2, *shape), int if len(shape) == 1 else float)
    jaxpr = str(jax.make_jaxpr(model.apply)(w, x))
    assert f"f32[2,{scores}] = exp" in jaxpr, "the softmax of (batch, heads, positions, positions)"


# ---- How parameters start


@pytest.fixture
def spec(monkeypatch):
    """A model's init gives the means and variances of its start in place of draws."""
    monkeypatch.setattr(models, "draw", lambda spec, key: spec)


@pytest.mark.parametrize("activation, gain", [("relu", 2.0), ("tanh", 1.0)])
def test_mlp_kernels_start_with_variance_gain_over_fan_in_and_biases_at_zero(spec, activation, gain):
    w = models.mlp((20, 20, 1), 100, width=300, depth=2, activation=activation).init(None)
    for layer, fan_in in zip(w, (400, 300, 300), strict=True):
        assert layer["kernel"].variance == pytest.approx(gain / fan_in)
        assert layer["kernel"].mean == layer["bias"].variance == layer["bias"].mean == 0


def test_a_deep_relu_mlp_keeps_the_size_of_its_signal():
    model = models.mlp((8, 8, 4), 256, width=256, depth=12)
    x = np.random.default_rng(0).normal(size=(64, 8, 8, 4))
    z = jit(lambda key: model.apply(model.init(key), x))(jax.random.key(0))
    assert 0.3 < float((z**2).mean()) / 2 < 3  # the last layer doubles it: no relu follows


def test_a_residual_branch_starts_silent_and_learns_from_the_first_step():
    x = np.random.default_rng(0).uniform(size=(2, 4, 4, 16))  # positive, as after a relu
    kinds = [(bottleneck, norm) for bottleneck in (False, True) for norm in ("none", "layer", "group")]

    def start(key, bottleneck, norm):
        spec = models.resnet_block_spec(16, 4 if bottleneck else 16, bottleneck, norm, first=0.5)
        block = models.draw(spec, key)
        z, pull = jax.vjp(lambda w: models.resnet_block(w, jnp.asarray(x), 1, norm), block)
        return z, pull(z)[0]["branch"][-1]["kernel" if norm == "none" else "scale"]

    for z, gradient in jit(lambda key: [start(key, *kind) for kind in kinds])(jax.random.key(0)):
        np.testing.assert_allclose(z, x, rtol=1e-6)
        assert np.abs(gradient).max() > 0.1


@pytest.mark.parametrize("depth, power", [(10, -1 / 2), (34, -1 / 2), (50, -1 / 4)])
def test_without_normalisation_the_kernels_of_a_branch_start_as_in_fixup(depth, power, spec):
    w = models.resnet((8, 8, 3), 3, depth=depth).init(None)
    for block in w["blocks"]:
        *first, last = (layer["kernel"] for layer in block["branch"])
        for kernel in first:
            he = 2 / math.prod(kernel.shape[:3])
            assert kernel.variance == pytest.approx(he * len(w["blocks"]) ** (2 * power))
        assert last.variance == 0 and last.mean == 0


@pytest.mark.parametrize("depth, norm", [(10, "none"), (50, "none"), (50, "layer")])
def test_no_branch_starts_silent_in_a_lecun_start_whose_kernels_have_a_gain_of_1(depth, norm, spec):
    w = models.resnet((8, 8, 3), 3, depth=depth, norm=norm, start="lecun", shortcut="projection").init(None)
    for block in w["blocks"]:
        for layer in [w["stem"], block["shortcut"], *block["branch"]]:
            if norm == "none":
                assert layer["kernel"].variance == pytest.approx(1 / math.prod(layer["kernel"].shape[:3]))
            else:
                assert layer["scale"].mean == 1


def test_heads_positions_and_characters_start_as_in_the_published_code(spec):
    for name, gain in (("mixer", 0), ("vit", 0), ("transformer", 1)):
        head = build(name)[0].init(None)["head"]
        assert head["kernel"].variance == gain / head["kernel"].shape[0]
        assert head["bias"].variance == head["bias"].mean == 0
    vit, nanolm, rnn = (build(name)[0].init(None) for name in ("vit", "transformer", "rnn"))
    assert vit["positions"].variance == pytest.approx(0.02**2) and vit["token"].variance == 0
    assert nanolm["positions"].variance == nanolm["embed"].variance == pytest.approx(1 / 6)
    assert rnn["embed"].variance == pytest.approx(1 / 5)


def test_draws_have_the_mean_and_variance_of_their_spec_and_do_not_repeat():
    spec = {"a": models.Normal((50, 40), 4.0), "b": [models.Normal((2000,), 0.01, 3.0)]}
    spec["c"] = models.Normal((3,), mean=1.0)
    w = jit(lambda key: models.draw(spec, key))(jax.random.key(0))
    a, b = np.asarray(w["a"]).ravel() / 2, (np.asarray(w["b"][0]) - 3) / 0.1
    for noise in (a, b):  # five standard errors each
        assert abs(noise.mean()) < 5 / math.sqrt(2000)
        assert abs(noise.var() - 1) < 5 * math.sqrt(2 / 2000)
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(2000)
    assert w["c"].tolist() == [1.0, 1.0, 1.0]


def test_a_key_gives_the_same_parameters_again_and_another_key_others_and_no_buffer_stands_twice():
    init = jit(build("mlp")[0].init)
    same, again, other = (jax.tree.leaves(init(jax.random.key(k))) for k in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(same, again))
    kernels = [(a, b) for a, b in zip(same, other) if a.ndim == 2]
    assert len(kernels) == 3 and all((a != b).all() for a, b in kernels)
    assert len({leaf.unsafe_buffer_pointer() for leaf in same}) == len(same) == 6


# ---- Curvature


@pytest.mark.parametrize("name", NETWORKS)
def test_curvature_by_a_jvp_of_a_jvp_is_the_second_difference_of_the_loss_along_a_line(name):
    _, _, at = along_a_line(name)
    with jax.enable_x64(True):
        (before, _), (now, curvature), (after, _) = (map(float, at(t)[:2]) for t in (-1e-4, 0.0, 1e-4))
    difference = (before - 2 * now + after) / 1e-8  # exact to about 1e-7
    assert abs(difference) > 0.01
    assert curvature == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_hessian_vector_product_has_the_structure_of_the_parameters(name):
    model, x, y = build(name)
    w = jax.eval_shape(model.init, jax.random.key(0))
    gradient = jax.grad(lambda w: jnp.sum((model.apply(w, x) - y) ** 2))
    assert w == jax.eval_shape(lambda w: jax.jvp(gradient, (w,), (w,))[1], w)


# ---- Dtypes and errors


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_have_the_dtype_of_the_parameters_whatever_that_of_the_images(name, x64):
    with jax.enable_x64(x64):
        model, x, _ = build(name)
        w = jax.eval_shape(model.init, jax.random.key(0))
        dtypes = ["float32", "float64"][: 1 + x64]
        assert {leaf.dtype.name for leaf in jax.tree.leaves(w)} == {dtypes[-1]}
        for dtype in dtypes:
            typed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), w)
            for given in dtypes if x.ndim == 4 else ["int32"]:
                assert jax.eval_shape(model.apply, typed, jax.ShapeDtypeStruct(x.shape, given)).dtype == dtype


@pytest.mark.parametrize(
    "factory, shape, options, given, allowed",
    [
        ("mlp", IMAGE, {"activation": "gelu"}, "'gelu'", "['relu', 'tanh']"),
        ("resnet", IMAGE, {"depth": 12}, "12", "[10, 18, 34, 50]"),
        ("resnet", IMAGE, {"norm": "batch"}, "'batch'", "['none', 'layer', 'group']"),
        ("resnet", IMAGE, {"stem": "big"}, "'big'", "['small', 'imagenet']"),
        ("resnet", IMAGE, {"start": "he"}, "'he'", "['fixup', 'lecun']"),
        ("resnet", IMAGE, {"shortcut": "none"}, "'none'", "['identity', 'projection']"),
        ("mixer", (8, 6, 3), {}, "4", "(8, 6)"),
        ("mixer", (6, 8, 3), {}, "4", "(6, 8)"),
        ("vit", (8, 6, 3), {}, "4", "(8, 6)"),
        ("vit", IMAGE, {"heads": 5}, "5", "64"),
        ("vit", IMAGE, {"heads": 0}, "heads", "1, 2, 3"),
        ("transformer", TEXT, {"heads": 5}, "5", "64"),
        ("transformer", TEXT, {"attention_width": -8}, "-8", "attention_width"),
        ("mlp", IMAGE, {"width": 0}, "width", "0"),
        ("mlp", IMAGE, {"depth": 1.5}, "depth", "1.5"),
        ("cnn", IMAGE, {"depth": 0}, "depth", "0"),
    ],
)
def test_an_option_that_does_not_fit_is_refused_in_one_line(factory, shape, options, given, allowed):
    with pytest.raises(ValueError) as error:
        MODELS[factory](shape, CLASSES, **options)
    message = str(error.value)
    assert "\n" not in message and message.startswith(factory)
    assert given in message and allowed in message


@pytest.mark.parametrize("name", MODELS)
def test_images_given_to_a_text_model_or_text_to_an_image_model_are_refused(name):
    other, reads = {TEXT: (IMAGE, "characters"), IMAGE: (TEXT, "height, width, channels")}[read_by(name)]
    with pytest.raises(ValueError, match=reads):
        MODELS[name](other, CLASSES)


def test_the_tiny_instances_read_what_their_models_are_made_for():
    assert [name for name in TINY if read_by(TINY[name][0]) == TEXT] == ["rnn", "transformer"]


def test_small_networks_have_as_many_parameters_as_a_hand_counts():
    assert count(MODELS["mlp"]((8, 8, 1), 10)) == (64 + 1 + 2 * 129) * 128 + 129 * 10
    assert count(MODELS["resnet"]((8, 8, 1), 10, width=4)) == 19470
    assert count(MODELS["vit"]((8, 8, 1), 10)) == 102218
    assert count(MODELS["transformer"]((16,), 65)) == 109505


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_names_a_model_and_options_it_has(name):
    factory, options = of_preset(name)
    MODELS[factory]((64,) if read_by(factory) == TEXT else (224, 224, 3), 10, **options)

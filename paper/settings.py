"""The settings: what is trained, at two scales, and the grids of its constant rates.

What this file teaches: what a reproduction changes. A setting is a dict of train.py's flags; LAPTOP has what two cores
train in minutes, PAPER the paper's own data, networks and steps. One of the paper's figures names the settings that it
shows, and their optimizers: CLASSICAL and EDGE. What is ours stands below, and is told apart in every table.
Read next: experiments.py.
"""

import train

SEEDS = [0, 1, 2]

CIFAR = dict(dataset="cifar10", sharpness_every=20, sharpness_tol=0.02, test_samples=256)  # training costs most
LAPTOP = {
    # The paper's four, scaled down; it has two of them with one optimizer for the classical tuners, another for CDAT.
    "resnet": CIFAR | dict(model="resnet", stem="imagenet", start="lecun", shortcut="projection", loss="ce",
                           samples=128, width=8, steps=400),
    "mixer": CIFAR | dict(model="mixer", patch=8, loss="ce", samples=128, steps=200),
    "nanolm": CIFAR | dict(dataset="shakespeare", model="transformer", loss="ce", optimizer="rmsprop", samples=32,
                           width=32, steps=200),
    "vit": CIFAR | dict(dataset="imagenette", model="vit", patch=8, image_size=32, loss="ce", optimizer="rmsprop",
                        samples=128, test_samples=200, width=32, steps=200),
    # Its others, scaled down.
    "linear": CIFAR | dict(model="linear", samples=512, steps=1000),
    "mlp": CIFAR | dict(samples=256, width=256, steps=300),
    "wide": CIFAR | dict(width=1024, depth=1, loss="ce", samples=512, steps=200, sharpness_every=10, no_sharpness=True),
    "mnist": dict(dataset="mnist", samples=512, width=64, depth=2, steps=300, no_sharpness=True),
    "layer": CIFAR | dict(model="resnet", stem="imagenet", norm="layer", loss="ce", samples=256, width=8, steps=300,
                          no_sharpness=True),
    # Ours.
    "digits": {},
    "tanh": dict(activation="tanh"),
    "fixup": CIFAR | dict(model="resnet", stem="imagenet", loss="ce", samples=128, width=8, steps=200),
    "batches": dict(samples=0, steps=600, no_sharpness=True),
    "rmsprop": dict(optimizer="rmsprop", steps=600, no_sharpness=True),
    "cnn": CIFAR | dict(model="cnn", samples=128, steps=300),
    "rnn": CIFAR | dict(dataset="shakespeare", model="rnn", loss="ce", samples=128, width=64, steps=300),
    # Ours, to judge a rule that was found on others: with seeds of their own, and nothing measured but the test loss.
    "pydocs, adam": CIFAR | dict(dataset="pydocs", model="transformer", loss="ce", optimizer="adam", samples=32,
                                 width=32, steps=200),
    "group": CIFAR | dict(model="resnet", stem="imagenet", norm="group", loss="ce", samples=128, width=8, steps=200),
    "mnist, ce": dict(dataset="mnist", samples=512, width=64, depth=2, loss="ce", steps=300),
    # Ours, for test losses: more images.
    "mlp, 1024": CIFAR | dict(samples=1024, test_samples=1000, width=256, steps=600),
    "cnn, 1024": CIFAR | dict(model="cnn", optimizer="momentum", samples=1024, test_samples=1000, steps=300,
                              sharpness_every=30, sharpness_samples=256),
    # For an accelerator, the paper's size of the network.
    "resnet34": CIFAR | dict(preset="resnet34", loss="ce", samples=2048, steps=1000, sharpness_every=50,
                             sharpness_samples=512),
}  # fmt: skip
PAPER = LAPTOP | {
    "resnet": dict(dataset="cifar10", preset="resnet34", loss="ce", samples=4096, steps=16384, chunk_size=512),
    "mixer": dict(dataset="cifar10", preset="mixer-ti8", loss="ce", samples=4096, steps=16384, chunk_size=512),
    "nanolm": dict(dataset="shakespeare", preset="nanolm", loss="ce", optimizer="rmsprop", samples=2048, steps=8192),
    "vit": dict(dataset="imagenette", preset="vit-ti32", loss="ce", optimizer="rmsprop", samples=1024, steps=16384),
    "linear": dict(dataset="cifar10", model="linear", samples=4096, steps=16384),
    "mlp": dict(dataset="cifar10", preset="mlp-fig15", samples=4096, steps=16384),
    "wide": dict(dataset="cifar100", preset="mlp-fig16", loss="ce", samples=4096, steps=1000),
    "mnist": dict(dataset="mnist", samples=8192, width=256, depth=3, steps=16384),
    "layer": dict(dataset="cifar10", preset="resnet50", loss="ce", samples=0, steps=40000, no_sharpness=True),
}
for table in LAPTOP, PAPER:  # the same with other optimizers
    for name, optimizer in ("mixer", "momentum"), ("vit", "adam"), ("digits", "momentum"), ("digits", "adam"):
        table[f"{name}, {optimizer}"] = table[name] | dict(optimizer=optimizer)
    for name in "digits, momentum", "digits, adam":
        table[name] |= dict(steps=600, no_sharpness=True)
    for name in "layer", "batches":
        for optimizer in "momentum", "adam":
            table[f"{name}, {optimizer}"] = table[name] | dict(optimizer=optimizer)
    for size in 64, 256:
        table[f"batches, {size}"] = table["batches"] | dict(batch_size=size)
CLASSICAL = ["resnet", "mixer", "nanolm", "vit"]  # the paper's four in Figures 1 and 12
EDGE = ["resnet", "mixer, momentum", "nanolm", "vit, adam"]  # in Figures 5 and 19
JUDGED = ["mnist", "mnist, ce", "rmsprop", "batches, 64", "batches, 256", "resnet", "group", "vit", "cnn", "rnn",
          "pydocs, adam", "mixer, momentum"]  # ours: where a rule is judged, after it was found on others


def rates(first, count):
    """A grid with a factor of 2.

    >>> rates(0.1, 3)
    [0.1, 0.2, 0.4]
    """
    return [first * 2**k for k in range(count)]


GRIDS = {  # the constant rates, chosen to bracket the best
    "resnet": rates(0.08, 4), "mixer": rates(0.16, 4), "mixer, momentum": rates(0.02, 4), "nanolm": rates(8e-4, 3),
    "vit": rates(3.2e-4, 4), "vit, adam": rates(0.004, 4), "linear": rates(5e-4, 4), "mlp": rates(0.0025, 4),
    "mnist": rates(0.025, 5), "layer": rates(0.05, 4), "layer, momentum": rates(0.00625, 5),
    "layer, adam": rates(5e-4, 5), "digits": rates(0.025, 4), "digits, momentum": rates(0.0125, 4),
    "digits, adam": rates(1e-3, 4), "tanh": rates(0.05, 3), "fixup": rates(0.04, 4), "batches": rates(0.05, 4),
    "batches, momentum": rates(0.016, 4), "batches, adam": rates(0.002, 4), "rmsprop": rates(1e-4, 5),
    "cnn": rates(0.08, 4), "rnn": rates(0.16, 4), "pydocs, adam": rates(0.002, 4), "group": rates(0.08, 4),
    "mnist, ce": rates(0.1, 4), "batches, 64": rates(0.05, 4), "batches, 256": rates(0.05, 4),
    "resnet34": rates(0.02, 5), "mlp, 1024": rates(0.0025, 4), "cnn, 1024": rates(0.01, 4),
}  # fmt: skip
PAPER_GRIDS = GRIDS | {
    "resnet": rates(5e-4, 9), "mixer": rates(5e-4, 9), "mixer, momentum": rates(2e-2, 8), "nanolm": rates(5e-4, 9),
    "vit": rates(1e-5, 8), "vit, adam": rates(2e-5, 8), "linear": rates(1e-3, 3)}  # fmt: skip


def on(settings, scale, *tuners):
    """Runs as train.configurations takes them: each tuner, a dict of flags, in each setting, with all seeds.

    A tuner's lr may be a function of the setting's grid of constant rates.
    """
    table, grids = (PAPER, PAPER_GRIDS) if scale == "paper" else (LAPTOP, GRIDS)
    at = lambda name, tuner: {key: value(grids[name]) if callable(value) else value for key, value in tuner.items()}
    return [table[name] | {"seed": SEEDS} | at(name, tuner) for name in settings for tuner in tuners]


def setting_of(settings):
    """What a run trains, in words, such as mlp, digits, adam, batch 64."""
    network = settings.get("preset") or settings.get("model")
    for name in "activation", "start", "norm":
        if settings.get(name) not in (None, "relu", "lecun", "none"):  # as in the paper
            network = f"{settings[name]} {network}"
    loss = settings.get("loss") if settings.get("model") == "mlp" else None
    batch = f"batch {settings['batch_size']}" if settings.get("batch_size") else None
    words = [network, settings.get("dataset"), loss, settings["optimizer"], batch]
    return ", ".join(word for word in words if word not in (None, "mse", "gd"))


def homes(names):
    """What settings are called in the results.

    >>> homes(["mixer, momentum"])
    {'mixer, cifar10, momentum'}
    """
    return {setting_of(vars(train.configure(**LAPTOP[name]))) for name in names}

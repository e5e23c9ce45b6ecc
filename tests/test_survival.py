"""What happens to a run: killed, interrupted, diverged, out of disk, resumed; and what bad input is answered."""

import errno
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import train

ROOT = Path(train.__file__).parent
TINY = ["--samples", "64", "--width", "8", "--depth", "1", "--sharpness-every", "40", "--no-plot"]
KILLS = int(os.environ.get("KILLS", 5))


def refused(capsys, *flags):
    """The one line that a command line is refused with."""
    with pytest.raises(SystemExit) as end:
        train.main(list(flags))
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1 and message.startswith("train.py: ")
    return message


def one(folder):
    """The only run folder there."""
    (run,) = [path for path in Path(folder).iterdir() if path.is_dir()]
    return run


def same_run(a, b):
    """The same rows, byte for byte, and the same parameters."""
    assert (one(a) / "metrics.csv").read_bytes() == (one(b) / "metrics.csv").read_bytes()
    with np.load(one(a) / "checkpoint.npz") as first, np.load(one(b) / "checkpoint.npz") as second:
        assert first.files == second.files
        for name in first.files:
            np.testing.assert_array_equal(first[name], second[name])


# ------------------------------------------------------------------------------------------- killed and resumed


def command(out, *flags):
    return [sys.executable, str(ROOT / "train.py"), *TINY, "--steps", "400", "--log-every", "20", "--out", out, *flags]


def rows(folder):
    return sum(file.read_bytes().count(b"\n") for file in Path(folder).glob("*/metrics.csv"))


def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(tmp_path):
    """One run is killed KILLS times, then left to end: at start-up, while it compiles, and at any time between two logs."""
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "True", "XDG_CACHE_HOME": str(tmp_path)}  # as users have it
    undisturbed = subprocess.Popen(command(whole), env=environment, stdout=subprocess.DEVNULL)
    draw = random.Random(0)
    for row in [0, 1, *sorted(draw.choices(range(2, 380), k=KILLS - 2))]:
        longest = 2.0 if row <= rows(killed) else 0.01  # seconds, of start-up and of an interval between two logs
        process = subprocess.Popen(command(killed, "--resume"), env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None and rows(killed) < row:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, longest))
        process.kill()
        process.wait()
    subprocess.run(command(killed, "--resume"), env=environment, check=True, capture_output=True)
    assert undisturbed.wait() == 0
    same_run(whole, killed)


def test_ctrl_c_saves_shows_the_table_and_says_how_to_go_on(tmp_path):
    process = subprocess.Popen(command(str(tmp_path / "a"), "--steps", "100000"), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    while rows(tmp_path / "a") < 50:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ""
    assert "CDAT σ = 2" in out and out.splitlines()[-1].startswith("interrupted; go on with: python train.py --samples")
    assert out.splitlines()[-1].endswith(" --resume")
    assert json.loads((one(tmp_path / "a") / "config.json").read_text())["status"] == "interrupted"
    with np.load(one(tmp_path / "a") / "checkpoint.npz") as saved:
        assert saved["step"] == rows(tmp_path / "a") - 1  # every row that was logged is behind the checkpoint


def interrupt(*_):
    raise KeyboardInterrupt


def test_ctrl_c_beside_a_broken_run_is_one_line(tmp_path, capsys, monkeypatch):
    flags = [*TINY, "--steps", "3", "--out", str(tmp_path)]
    train.main(flags)
    (one(tmp_path) / "metrics.csv").write_text("step,loss\n0\n")
    settings = one(tmp_path) / "config.json"
    settings.write_text(settings.read_text().replace('"done"', '"running"'))
    monkeypatch.setattr(train, "train", interrupt)
    assert "metrics.csv: broken" in refused(capsys, *flags, "--resume")


@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]])
def test_the_command_that_ctrl_c_prints_is_accepted_and_goes_on_with_the_same_run(tmp_path, capsys, monkeypatch, more):
    flags = [*TINY, "--out", str(tmp_path / "a b"), "--tuner", "greedy"]
    monkeypatch.setattr(train, "train", interrupt)
    with pytest.raises(SystemExit) as end:
        train.main([*flags, *more])
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].partition("train.py ")[2])
    (config,) = train.configurations(vars(train.parser().parse_args(words)))
    (plain,) = train.configurations(vars(train.parser().parse_args(flags)))
    assert end.value.code == 130 and config.resume and train.folder_of(config) == train.folder_of(plain)


def test_a_reader_that_reads_no_further_ends_the_command_without_a_word(tmp_path):
    process = subprocess.Popen(command(str(tmp_path), "--log-every", "1"), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout.readline().startswith("[1/1]")
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


def test_more_steps_on_resume_are_what_one_long_run_gives(tmp_path, capsys):
    for tuner in ("feedback", "linesearch"):
        a, b = str(tmp_path / tuner / "a"), str(tmp_path / tuner / "b")
        train.main([*TINY, "--tuner", tuner, "--batch-size", "16", "--steps", "100", "--out", a])
        train.main([*TINY, "--tuner", tuner, "--batch-size", "16", "--steps", "45", "--out", b])
        train.main([*TINY, "--tuner", tuner, "--batch-size", "16", "--steps", "100", "--out", b, "--resume"])
        same_run(a, b)


def test_steps_cannot_be_raised_under_a_schedule_nor_lowered(tmp_path, capsys):
    flags = [*TINY, "--out", str(tmp_path), "--tuner", "schedule", "--steps"]
    train.main([*flags, "4"])
    assert "--steps 4" in refused(capsys, *flags, "8", "--resume")
    assert "--steps 4" in refused(capsys, *flags, "2", "--resume")


def test_resume_starts_from_zero_where_there_is_nothing(tmp_path, capsys):
    train.main([*TINY, "--steps", "3", "--out", str(tmp_path), "--resume"])
    assert rows(tmp_path) == 4


def test_an_unfinished_run_is_neither_repeated_nor_continued_unasked(tmp_path, capsys):
    flags = [*TINY, "--steps", "3", "--out", str(tmp_path)]
    train.main(flags)
    settings = one(tmp_path) / "config.json"
    settings.write_text(settings.read_text().replace('"done"', '"running"'))
    assert "--resume" in refused(capsys, *flags)


def test_a_checkpoint_of_other_settings_is_refused_with_the_fields_that_differ(tmp_path, capsys):
    flags = [*TINY, "--steps", "3", "--out", str(tmp_path)]
    train.main(flags)
    settings = one(tmp_path) / "config.json"
    settings.write_text(settings.read_text().replace('"sigma": 2.0', '"sigma": 1.5').replace('"done"', '"running"'))
    assert "--sigma 1.5" in refused(capsys, *flags, "--resume")


# ------------------------------------------------------------------------------------------- broken files, full disk


@pytest.mark.parametrize("name", ["checkpoint.npz", "config.json", "metrics.csv"])
@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_file_cut_in_half_is_one_line_that_names_it_and_overwrite_starts_again(tmp_path, capsys, name, keep):
    flags = [*TINY, "--out", str(tmp_path), "--steps"]
    train.main([*flags, "6"])
    file = one(tmp_path) / name
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    message = refused(capsys, *flags, "9", "--resume")
    assert name in message and "broken" in message
    assert (one(tmp_path) / "checkpoint.npz").exists() and (one(tmp_path) / "metrics.csv").exists()
    train.main([*flags, "6", "--overwrite"])
    assert rows(tmp_path) == 7


def test_a_checkpoint_with_a_flipped_byte_is_one_line_whatever_its_reader_raises(tmp_path, capsys):
    flags = [*TINY, "--out", str(tmp_path), "--steps"]
    train.main([*flags, "6"])
    file = one(tmp_path) / "checkpoint.npz"
    whole = file.read_bytes()
    entry = whole.index(b"PK\x01\x02")  # of the archive's directory
    for offset, byte in (8, 1), (8, 64), (10, 99), (42, 255):  # encrypted, twice; an unknown compression; nowhere
        file.write_bytes(whole[: entry + offset] + bytes([byte]) + whole[entry + offset + 1 :])
        assert "checkpoint.npz: broken" in refused(capsys, *flags, "9", "--resume")
    file.write_bytes(whole)
    train.main([*flags, "9", "--resume"])


def test_a_checkpoint_of_another_precision_is_refused(tmp_path, capsys):
    flags = [*TINY, "--out", str(tmp_path), "--steps"]
    with jax.enable_x64(True):
        train.main([*flags, "4"])
    assert "checkpoint.npz: of another network or precision" in refused(capsys, *flags, "8", "--resume")


@pytest.mark.parametrize("status, lr", [("done", "0.1"), ("diverged", "1e9")])
def test_a_cut_metrics_file_of_a_finished_run_is_one_line_wherever_it_was_cut(tmp_path, capsys, status, lr):
    flags = [*TINY, "--out", str(tmp_path), "--steps", "40", "--tuner", "constant", "--lr", lr]
    train.main(flags)
    assert f'"{status}"' in (one(tmp_path) / "config.json").read_text()
    file = one(tmp_path) / "metrics.csv"
    whole = file.read_bytes()
    header, *others = whole.splitlines(keepends=True)
    for cut in whole[:-100], whole[:-1], b"".join([header, *others[:-1]]), header, header[:-20], b"":
        file.write_bytes(cut)
        message = refused(capsys, *flags)
        assert "metrics.csv: broken" in message, cut
    file.write_bytes(whole)
    train.main(flags)


def test_text_in_place_of_the_steps_is_one_line(tmp_path, capsys):
    flags = [*TINY, "--out", str(tmp_path), "--steps"]
    train.main([*flags, "3"])
    settings = one(tmp_path) / "config.json"
    settings.write_text(settings.read_text().replace('"steps": 3', '"steps": "three"'))
    for more in ["3"], ["6", "--resume"]:
        assert "--steps three" in refused(capsys, *flags, *more)


class FullDisk:
    """A file that takes half of what is written and then has no space left."""

    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, data):
        self.stream.write(data[: len(data) // 2])
        self.stream.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["metrics.csv", ".checkpoint.npz", ".config.json"])
def test_no_space_left_loses_no_row_that_was_logged_and_says_so(tmp_path, capsys, monkeypatch, name):
    flags = [*TINY, "--steps", "50", "--log-every", "10"]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    opened = []

    def full_at_the_third(file, *mode):
        opened.append(Path(file).name)
        stream = open(file, *mode)
        late = opened.count(name) > (2 if name != ".config.json" else 1) and "r" not in mode
        return FullDisk(stream) if late and Path(file).name == name else stream

    monkeypatch.setattr(train, "open", full_at_the_third, raising=False)
    message = refused(capsys, *flags, "--out", str(tmp_path / "full"))
    assert name.lstrip(".") in message and "No space left" in message and "is kept" in message
    whole, kept = [(one(tmp_path / out) / "metrics.csv").read_text() for out in ("whole", "full")]
    assert whole.startswith(kept) and kept.count("\n") == {"metrics.csv": 21, ".checkpoint.npz": 31}.get(name, 51)
    monkeypatch.undo()
    train.main([*flags, "--out", str(tmp_path / "full"), "--resume"])
    same_run(tmp_path / "whole", tmp_path / "full")


# ------------------------------------------------------------------------------------------------------ bad input

HUGE = {"cdat": ["sigma", "weight-decay"], "constant": ["lr"], "linesearch": ["slack", "grow", "lr-max"],
        "feedback": ["sigma-high", "tolerance"]}  # fmt: skip
BAD = [  # (flags, what the line must name)
    *[([f"--{name}", value], f"--{name}") for name in ("samples", "seed", "batch-size", "chunk-size", "steps", "log-every",
      "sharpness-every", "sharpness-samples", "width", "depth") for value in ("-1", "x", "1.5", "nan", "99999999999999")],
    *[([f"--{name}", value], f"--{name}") for name in ("sigma", "beta", "weight-decay", "sharpness-tol")
      for value in ("-0.1", "nan", "inf", "x", "")],
    *[(["--tuner", "linesearch", f"--{name}", value], f"--{name}") for name, value in (("slope", "1"), ("slack", "-1"),
      ("shrink", "1"), ("shrink", "0"), ("grow", "1"), ("grow", "nan"), ("lr-max", "0"), ("lr-max", "inf"))],
    *[(["--tuner", "schedule", f"--{name}", value], f"--{name}") for name, value in (("warmup", "1"), ("decay", "x"))],
    *[(["--optimizer", "adam", f"--{name}", "1"], f"--{name}") for name in ("beta1", "beta2")],
    *[(["--optimizer", name, "--eps", value], "--eps") for name in ("adam", "rmsprop") for value in ("0", "-1", "1e300")],
    *[(["--optimizer", "momentum", "--momentum", value], "--momentum") for value in ("1", "-0.1", "nan")],
    *[(["--tuner", "hypergradient", "--hyper-rate", value], "--hyper-rate") for value in ("1.1", "-1", "nan")],
    *[(["--tuner", "feedback", f"--{name}", value], f"--{name}") for name, value in (("sigma-high", "0.9"),
      ("sigma-high", "inf"), ("tolerance", "-1"), ("tolerance", "nan"), ("average", "1"), ("average", "-0.1"))],
    *[(["--tuner", tuner, f"--{name}", "1e300"], f"--{name}") for tuner, names in HUGE.items() for name in names],
    *[(["--dataset", "imagenette", "--image-size", value], "--image-size") for value in ("0", "1025", "x")],
    *[(["--model", "vit", "--patch", value], "patch") for value in ("-1", "3", "4097", "x")],
    *[(["--test-samples", value], "--test-samples") for value in ("-1", "x", "1.5")],
    *[([f"--{name}", value], f"--{name}") for name, value in (("coordinator", "host:1"), ("processes", "2"), ("process", "1"))],
    (["--model", "resnet", "--stem", "large"], "--stem"),
    (["--stem", "small"], "--stem"),
    (["--patch", "4"], "--patch"),
    (["--resume", "--overwrite"], "--resume contradicts --overwrite"),
    (["--seed", "2147483648"], "--seed"),
    (["--model", "cnn", "--depth", "101"], "--depth"),
    (["--model", "cnn", "--depth", "100"], "--depth"),
    (["--width", "65536", "--depth", "100"], "--depth"),
    (["--batch-size", "16", "2000"], "--batch-size is 2000"),
    (["--tuner", "constant", "--lr", "0.1", "0"], "--lr"),
    (["--seed", "0", "-1"], "--seed"),
    *[([f"--{name}", "x"], f"--{name}") for name in ("dataset", "model", "preset", "loss", "optimizer", "tuner", "norm",
      "activation", "precision")],
    (["--eps", "1e-8"], "--eps"),
    (["--momentum", "0.9"], "--momentum"),
    (["--lr", "0.1"], "--lr"),
    (["--tuner", "greedy", "cdat", "--lr", "0.1"], "--lr"),
    (["--tuner", "greedy", "--beta", "0.9"], "--beta"),
    (["--hyper-rate", "0.1"], "--hyper-rate"),
    (["--image-size", "64"], "--image-size"),
    (["--norm", "layer"], "--norm"),
    (["--model", "linear", "--width", "3"], "--width"),
    (["--model", "resnet", "--activation", "tanh"], "--activation"),
    (["--dataset", "pydocs", "--model", "rnn", "--standardize"], "--standardize"),
    (["--dataset", "pydocs"], "mlp"),
    (["--model", "transformer"], "transformer"),
    (["--model", "resnet", "--depth", "11"], "depth"),
    (["--preset", "resnet34", "--model", "cnn"], "--preset"),
    (["--preset", "resnet34", "--depth", "18"], "--depth"),
    (["--preset", "nanolm"], "transformer"),
    (["--preset", "vit-ti32"], "patch"),
    (["--samples", "1438"], "1438"),
    (["--batch-size", "1025"], "--batch-size"),
    (["--data-dir", "no/such"], "no/such"),
    (["--dataset", "cifar10", "--data-dir", __file__], __file__),
    (["--sigma"], "--sigma"),
    (["--steps", "3", "4"], "4"),
    (["--unknown"], "--unknown"),
    (["word"], "word"),
    (["--resum"], "--resum"),
    (["--out", __file__], __file__),
]  # fmt: skip


def test_at_least_eighty_bad_inputs_are_tried():
    assert len(BAD) >= 80


@pytest.mark.parametrize("flags, culprit", BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_is_one_line_that_names_the_culprit(capsys, tmp_path, flags, culprit):
    out = [] if "--out" in flags else ["--out", str(tmp_path / "runs")]
    assert culprit in refused(capsys, *out, *flags)
    assert not (tmp_path / "runs").exists()


def test_a_broken_data_file_is_one_line_that_names_it(capsys, tmp_path):
    (tmp_path / "digits.csv.gz").write_bytes(b"no digits")
    message = refused(capsys, "--data-dir", str(tmp_path), "--out", str(tmp_path / "runs"))
    assert str(tmp_path / "digits.csv.gz") in message and "broken" in message
    assert not (tmp_path / "runs").exists()


def test_five_bad_inputs_as_real_commands(tmp_path):
    lines = [["--lr", "0.1"], ["--sigma", "nan"], ["--tuner", "x"], ["--dataset", "pydocs"], ["--data-dir", "no/such"]]
    running = [subprocess.Popen([sys.executable, str(ROOT / "train.py"), *line], cwd=tmp_path, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for line in lines]  # fmt: skip
    for process, line in zip(running, lines):
        _, err = process.communicate()
        culprit = "mlp" if line[1] == "pydocs" else line[0] if line[1] != "no/such" else "no/such"
        assert process.returncode == 2 and err.count("\n") == 1 and culprit in err
    assert list(tmp_path.iterdir()) == []


def test_500_random_command_lines_give_configurations_or_one_clean_line(capsys):
    draw = random.Random(0)
    words = ["0", "1", "-1", "0.5", "2", "1e9", "nan", "inf", "x", "", "64", *train.models.MODELS, *train.models.PRESETS,
             *train.data.DATASETS, *train.gd.OPTIMIZERS, *train.tuners.TUNERS, "mse", "ce", "layer", "tanh"]  # fmt: skip
    kinds = {"good": 0, "bad": 0}
    for _ in range(500):
        line = []
        for name in draw.sample(list(train.FIELDS), draw.randint(1, 4)):
            field, allowed = train.FIELDS[name], train.FIELDS[name].metadata["allowed"]
            fitting = allowed if isinstance(allowed, tuple) else ["0.5", "1", "2"]
            count = draw.randint(1, 3) if name in train.SEVERAL else 1
            values = [draw.choice(fitting if draw.random() < 0.8 else words) for _ in range(count)]
            line += [train.dashed(name), *([] if isinstance(field.default, bool) else values)]
        try:
            configs = train.configurations(vars(train.parser().parse_args(line)))
            assert configs and all(isinstance(config, train.Config) for config in configs)
            assert len({train.name_of(config) for config in configs}) == len(configs)
            kinds["good"] += 1
        except SystemExit as end:
            message = capsys.readouterr().err
            assert end.code == 2 and message.count("\n") == 1, line
            kinds["bad"] += 1
        except ValueError as error:
            assert "\n" not in str(error) and "--" in str(error), line
            kinds["bad"] += 1
    assert min(kinds.values()) > 50  # both kinds are tried

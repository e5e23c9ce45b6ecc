"""What happens to a run: killed, interrupted, disturbed, out of disk, resumed; and what bad input is answered."""

import errno
import json
import os
import pickle
import random
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from test_train import ROOT, TINY, aside, begin, held, one, refused, tiny  # noqa: F401, two of them are fixtures

import train
from train import data, models, plots

KILLS = int(os.environ.get("KILLS", 5))


def same_run(a, b):
    """The same rows, parameters and what else a checkpoint has of them; the same metrics.csv, byte for byte."""
    assert (one(a) / "metrics.csv").read_bytes() == (one(b) / "metrics.csv").read_bytes()
    with np.load(one(a) / "checkpoint.npz") as first, np.load(one(b) / "checkpoint.npz") as second:
        assert first.files == second.files
        for name in set(first.files) - {"facts"}:  # the seconds differ
            np.testing.assert_array_equal(first[name], second[name])


def rewrite(folder, **new):
    """Changes members of the only checkpoint there; a dict changes settings or facts in part."""
    file = one(folder) / "checkpoint.npz"
    with np.load(file) as saved:
        members = {name: saved[name] for name in saved.files}
    for name, value in new.items():
        members[name] = json.dumps(json.loads(str(members[name])) | value) if isinstance(value, dict) else value
    with open(file, "wb") as stream:
        np.savez(stream, **members)


def stop(folder, **given):
    """A run that is stopped after its first step."""
    with pytest.raises(KeyboardInterrupt):
        train.train(tiny(out=folder, **given), stopped=lambda: True)


@pytest.fixture
def flags(tmp_path):
    """The tiny command line, with a folder of its own."""
    return [*TINY, "--out", str(tmp_path)]


# ---- Real processes


def command(out, *flags):
    line = [str(ROOT / "train.py"), *TINY, "--steps", "400", "--sharpness-every", "40", "--log-every", "20", "--out", str(out)]
    return [sys.executable, *line, *map(str, flags)]


def rows(folder):
    """How many rows the run there has, as long as it may be running."""
    return sum(len(plots.load_run(file.parent).history["step"]) for file in Path(folder).glob("*/checkpoint.npz"))


def wait_for(process, folder, count):
    while process.poll() is None and rows(folder) < count:
        time.sleep(0.005)


def killed(folder, environment):
    """One run KILLS times: at start-up, while it compiles, at any time between two logs; then it is left to end."""
    environment = environment | {"JAX_ENABLE_COMPILATION_CACHE": "True", "XDG_CACHE_HOME": str(folder)}  # as users have it
    undisturbed = subprocess.Popen(command(folder / "whole"), env=environment, stdout=subprocess.DEVNULL)
    draw, out, codes = random.Random(0), folder / "killed", []
    for row in [0, 1, *sorted(draw.choices(range(2, 380), k=KILLS - 2))]:
        longest = 2.0 if row <= rows(out) else 0.01  # seconds, of start-up and of an interval between two logs
        process = subprocess.Popen(command(out, "--resume"), env=environment, stdout=subprocess.DEVNULL)
        wait_for(process, out, row)
        time.sleep(draw.uniform(0, longest))
        process.kill()
        codes.append(process.wait())
    subprocess.run(command(out, "--resume"), env=environment, check=True, capture_output=True)
    assert undisturbed.wait() == 0
    return folder, codes


def interrupted(folder, environment):
    """An endless run, what a second one beside it was answered, and what it said on ctrl-c."""
    endless, pipes = ("--steps", 10**8), dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(command(folder, *endless), env=environment, **pipes)
    wait_for(process, folder, 50)
    beside = subprocess.run(command(folder, *endless, "--resume"), env=environment, **pipes)
    process.send_signal(signal.SIGINT)
    return folder, beside, process, *process.communicate(timeout=60)


def unread(folder, environment):
    """The exit code and errors of a run of which only the first line is read."""
    process = subprocess.Popen(command(folder, "--log-every", 1), env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout.readline().startswith("[1/1]")
    process.stdout.close()
    return process.stderr.read(), process.wait()


def bad_commands(folder, environment):
    """What stands in the folder after commands that cannot run, and what each of them is answered."""
    lines = [["--lr", "0.1"], ["--sigma", "nan"], ["--tuner", "x"], ["--data-dir", "no/such"]]
    running = [subprocess.Popen([sys.executable, str(ROOT / "train.py"), *line], cwd=folder, env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for line in lines]  # fmt: skip
    return {line[0]: (process.communicate()[1], process.returncode) for line, process in zip(lines, running)}, [*folder.iterdir()]


JOBS = killed, interrupted, unread, bad_commands


# ---- Resumed


@pytest.mark.parametrize("tuner", ["feedback", "linesearch"])
def test_more_steps_on_resume_are_what_one_long_run_gives_and_are_not_taken_unasked(tmp_path, capsys, tuner):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    flags = [*TINY, "--tuner", tuner, "--batch-size", "16", "--steps"]
    train.main([*flags, "12", "--out", a])
    train.main([*flags, "7", "--out", b])
    capsys.readouterr()
    assert "holds 7 steps; give --resume" in refused(capsys, *flags, "12", "--out", b)
    train.main([*flags, "12", "--out", b, "--resume"])
    same_run(a, b)


def test_steps_cannot_be_raised_under_a_schedule_nor_lowered(flags, capsys):
    flags += ["--tuner", "schedule", "--steps"]
    train.main([*flags, "4"])
    capsys.readouterr()
    assert "--steps 4" in refused(capsys, *flags, "8", "--resume")
    assert "--steps 4" in refused(capsys, *flags, "2", "--resume")


def test_resume_starts_from_zero_where_there_is_nothing(flags, tmp_path):
    train.main([*flags, "--steps", "3", "--resume"])
    assert rows(tmp_path) == 3


def test_a_run_in_a_thread_stops_when_it_is_told_to_and_is_neither_repeated_nor_continued_unasked(tmp_path, capsys):
    with ThreadPoolExecutor(1) as thread:
        thread.submit(train.train, tiny(out=tmp_path / "whole")).result()
        thread.submit(stop, tmp_path / "stopped").result()
    assert held(tmp_path / "stopped").facts["status"] == "interrupted" and rows(tmp_path / "stopped") == 1
    flags = [*TINY, "--out", str(tmp_path / "stopped")]
    assert "--resume" in refused(capsys, *flags)
    train.main([*flags, "--resume"])
    same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_checkpoint_of_other_settings_is_refused_with_the_fields_that_differ(flags, tmp_path, capsys):
    stop(tmp_path)
    rewrite(tmp_path, settings={"sigma": 1.5})
    assert "--sigma 1.5" in refused(capsys, *flags, "--resume")


def test_a_checkpoint_of_other_data_or_of_another_network_or_precision_is_refused(flags, tmp_path, capsys, monkeypatch):
    with jax.enable_x64(True):
        stop(tmp_path)
    assert "checkpoint.npz: of other network or precision; give --overwrite" in refused(capsys, *flags, "--resume")
    train.main([*flags, "--steps", "1", "--overwrite"])
    capsys.readouterr()
    load = data.load
    monkeypatch.setattr(data, "load", lambda *args, **options: load(*args, **options)._replace(y=np.zeros(64, np.int32)))
    assert "checkpoint.npz: of other data; give --overwrite" in refused(capsys, *flags, "--resume")
    monkeypatch.undo()
    rewrite(tmp_path, **{"state/0": np.zeros(3, np.float32)})
    assert "checkpoint.npz: of other network or precision; give --overwrite" in refused(capsys, *flags, "--resume")


def test_a_folder_has_one_owner_while_a_run_is_on(flags, tmp_path, capsys):
    at_work = []

    def meanwhile(rows):
        if not rows or rows[-1]["step"] < 11:
            for more in [], ["--resume"], ["--overwrite"]:
                at_work.append("another process is at work there" in refused(capsys, *flags, *more))

    history = train.train(tiny(out=tmp_path, log_every=5), meanwhile)
    assert at_work == [True, True, True] + 2 * [False, True, True]  # an unfinished run is refused without a look at the lock
    assert len(history["step"]) == rows(tmp_path) == 12


@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]])
def test_the_command_that_ctrl_c_prints_is_accepted_and_goes_on_with_the_same_run(tmp_path, capsys, monkeypatch, more):
    flags = [*TINY, "--out", str(tmp_path / "a b"), "--tuner", "greedy"]
    monkeypatch.setattr(train, "train", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as end:
        train.main([*flags, *more])
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].partition("train.py ")[2])
    (config,) = train.configurations(vars(train.parser().parse_args(words)))
    (plain,) = train.configurations(vars(train.parser().parse_args(flags)))
    assert end.value.code == 130 and config.resume and train.folder_of(config) == train.folder_of(plain)


def test_the_handler_of_ctrl_c_is_put_back(flags, capsys):
    before = signal.getsignal(signal.SIGINT)
    train.main([*flags, "--steps", "1"])
    refused(capsys, "--lr", "0.1", late=True)
    assert signal.getsignal(signal.SIGINT) is before


# ---- Broken files, a full disk


def test_whatever_is_done_to_the_exports_the_run_is_shown_and_resumed_as_if_nothing_had_been(flags, tmp_path, capsys):
    train.main([*flags, "--out", str(tmp_path / "whole")])
    flags = [*TINY, "--out", str(tmp_path / "run")]
    train.main([*flags, "--steps", "6"])
    table = capsys.readouterr().out.splitlines()[-1]
    for change in "cut", "deleted", "edited":
        for name in "metrics.csv", "config.json":
            file = one(tmp_path / "run") / name
            text = file.read_text() if file.exists() else ""
            file.write_text(text[:30] if change == "cut" else text.replace("2", "3"))
            if change == "deleted":
                file.unlink()
        train.main([*flags, "--steps", "6"])
        assert capsys.readouterr().out.splitlines()[-1] == table
    train.main([*flags, "--resume"])
    same_run(tmp_path / "whole", tmp_path / "run")
    assert json.loads((one(tmp_path / "run") / "config.json").read_text())["steps"] == 12


def test_whatever_is_wrong_in_a_checkpoint_is_one_line_that_names_it_and_overwrite_starts_again(flags, tmp_path, capsys):
    train.main([*flags, "--steps", "6"])
    capsys.readouterr()
    file = one(tmp_path) / "checkpoint.npz"
    whole = file.read_bytes()
    with np.load(file) as saved:
        members = {name: saved[name] for name in saved.files}

    def flipped(at, byte):
        return whole[:at] + bytes([byte]) + whole[at + 1 :]

    def archive(**changed):
        rewrite(tmp_path, **changed)
        content = file.read_bytes()
        file.write_bytes(whole)
        return content

    entry, state = whole.index(b"PK\x01\x02"), whole.index(b"state/0.npy") + 200
    broken = [whole[: len(whole) * k // 8] for k in range(8)] + [whole[:-1], b"text\n", pickle.dumps(members)]
    for at, byte in (8, 1), (8, 64), (10, 99), (42, 255):  # encrypted, twice; an unknown compression; nowhere
        broken.append(flipped(entry + at, byte))
    broken.append(archive(settings=np.array({"a": 1}, object)))
    broken.append(archive(settings="text"))
    broken.append(archive(settings={"steps": "three"}))
    broken += [flipped(state, whole[state] ^ 1)]
    for content in broken:
        file.write_bytes(content)
        for more in ["--steps", "6"], ["--resume"]:
            message = refused(capsys, *flags, *more)
            assert str(file) in message and "--overwrite" in message
        assert file.read_bytes() == content
    for name in "settings", "facts", "history/loss":
        pass
    train.main([*flags, "--overwrite"])
    assert rows(tmp_path) == 12


def test_ctrl_c_beside_a_broken_run_is_one_line(flags, tmp_path, capsys, monkeypatch):
    train.main([*flags, "--steps", "3"])
    capsys.readouterr()

    def breaks(*_):
        (one(tmp_path) / "checkpoint.npz").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", breaks)
    assert "checkpoint.npz: broken" in refused(capsys, *flags, "--steps", "3")


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


@pytest.mark.parametrize("name, when, kept", [("checkpoint.npz", 3, 6), ("metrics.csv", 1, 12), ("config.json", 1, 12)])
def test_no_space_left_loses_no_row_that_was_logged_and_says_so(tmp_path, capsys, monkeypatch, name, when, kept):
    flags = [*TINY, "--log-every", "3", "--out"]
    train.main([*flags, str(tmp_path / "whole")])
    capsys.readouterr()
    opened = []

    def full(file, *mode):
        opened.append(Path(file).name)
        stream = open(file, *mode)
        return FullDisk(stream) if opened.count("." + name) == when and opened[-1] == "." + name else stream

    monkeypatch.setattr(data, "open", full, raising=False)
    message = refused(capsys, *flags, str(tmp_path / "full"), late=True)
    assert f"{name}: cannot be written" in message and "No space left" in message and "is kept" in message
    assert rows(tmp_path / "full") == kept
    assert not list(tmp_path.glob(f"full/*/.{name}"))
    monkeypatch.undo()
    train.main([*flags, str(tmp_path / "full"), "--resume"])
    same_run(tmp_path / "whole", tmp_path / "full")


def test_a_run_that_is_killed_under_overwrite_before_its_first_log_leaves_no_old_run_to_be_shown(flags, tmp_path, capsys):
    def die(rows):
        raise SystemError

    train.main(flags)
    with pytest.raises(SystemError):
        train.train(tiny(out=tmp_path, overwrite=True), die)
    assert rows(tmp_path) == 0
    capsys.readouterr()
    train.main(flags)
    assert "was run before" not in capsys.readouterr().out and rows(tmp_path) == 12


# ---- Bad input

WHOLE = "samples seed batch-size chunk-size steps log-every sharpness-every sharpness-samples width depth".split()
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


@pytest.mark.parametrize("flags, culprit", BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_is_one_line_that_names_the_culprit_and_leaves_nothing_behind(capsys, tmp_path, flags, culprit):
    out = [] if "--out" in flags else ["--out", str(tmp_path / "runs")]
    assert culprit in refused(capsys, *out, *flags)
    assert not (tmp_path / "runs").exists()


def test_a_broken_data_file_is_one_line_that_names_it(capsys, tmp_path):
    (tmp_path / "digits.csv.gz").write_bytes(b"no digits")
    message = refused(capsys, "--data-dir", str(tmp_path), "--out", str(tmp_path / "runs"))
    assert str(tmp_path / "digits.csv.gz") in message and "broken" in message
    assert not (tmp_path / "runs").exists()


def test_500_random_command_lines_give_configurations_or_one_clean_line(capsys):
    draw, parser = random.Random(0), train.parser()
    words = ["0", "1", "-1", "0.5", "2", "1e9", "nan", "inf", "x", "", "64"] + [word for part in train.WORDS.values() for word in part]
    kinds = {"good": 0, "bad": 0}
    for _ in range(500):
        line = []
        for flag in draw.sample(parser._actions[1:], draw.randint(1, 4)):  # all but --help
            fitting = list(flag.choices or ["0.5", "1", "2"])
            count = 0 if flag.nargs == 0 else draw.randint(1, 3) if flag.nargs else 1
            line += flag.option_strings + [draw.choice(fitting if draw.random() < 0.8 else words) for _ in range(count)]
        try:
            configs = train.configurations(vars(parser.parse_args(line)))
            assert configs and len({train.name_of(config) for config in configs}) == len(configs)
            kinds["good"] += 1
        except SystemExit as end:
            message = capsys.readouterr().err
            assert end.code == 2 and message.count("\n") == 1, line
            kinds["bad"] += 1
        except ValueError as error:
            assert "\n" not in str(error) and "--" in str(error), line
            kinds["bad"] += 1
    assert min(kinds.values()) > 50  # both kinds are tried


# ---- What came of the processes


def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(aside):
    folder, codes = aside["killed"].result()
    assert -signal.SIGKILL in codes and any((folder / "stepping-on-the-edge").iterdir())
    same_run(folder / "whole", folder / "killed")


def test_ctrl_c_saves_shows_the_table_and_says_how_to_go_on_and_nobody_disturbs_the_run_before(aside):
    folder, beside, process, out, err = aside["interrupted"].result()
    assert beside.returncode == 2 and beside.stderr.count("\n") == 1 and "another process is at work there" in beside.stderr
    assert process.returncode == 130 and err == ""
    assert "CDAT σ = 2" in out and out.splitlines()[-1].startswith("interrupted; go on with: python train.py --samples")
    assert out.splitlines()[-1].endswith(" --resume")
    assert held(folder).facts["status"] == "interrupted"
    assert (one(folder) / "metrics.csv").read_bytes().count(b"\n") == rows(folder) + 1


def test_a_reader_that_reads_no_further_ends_the_command_without_a_word(aside):
    assert aside["unread"].result() == ("", 1)


def test_bad_commands_end_in_one_line_and_leave_nothing_behind(aside):
    answers, left = aside["bad_commands"].result()
    assert left == [] and len(answers) == 4
    for flag, (message, code) in answers.items():
        assert code == 2 and message.count("\n") == 1 and flag.replace("--data-dir", "no/such") in message

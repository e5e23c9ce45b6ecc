"""What happens to a run: killed, interrupted, disturbed, out of disk, resumed; and what bad input is answered."""

import errno
import io
import json
import os
import pickle
import random
import re
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


def changed(**new):
    """A checkpoint's bytes -> the same with other members: None leaves one out, a dict changes settings or facts in part."""

    def change(whole):
        with np.load(io.BytesIO(whole)) as saved:
            members = {name: saved[name] for name in saved.files} | new
        for name, value in new.items():
            if isinstance(value, dict):
                with np.load(io.BytesIO(whole)) as saved:
                    members[name] = json.dumps(json.loads(str(saved[name])) | value)
        stream = io.BytesIO()
        np.savez(stream, **{name: value for name, value in members.items() if value is not None})
        return stream.getvalue()

    return change


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
    file = one(tmp_path) / "checkpoint.npz"
    file.write_bytes(changed(settings={"sigma": 1.5})(file.read_bytes()))
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
    file = one(tmp_path) / "checkpoint.npz"
    file.write_bytes(changed(**{"state/0": np.zeros(3, np.float32)})(file.read_bytes()))
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


def flipped(at, byte, after=b"PK\x01\x02"):  # an entry of the archive's directory
    def flip(whole):
        k = whole.index(after) + at
        return whole[:k] + bytes([byte]) + whole[k + 1 :]

    return flip


BROKEN = {
    **{f"cut at {k}/8": lambda whole, k=k: whole[: len(whole) * k // 8] for k in range(8)},
    "the last byte cut": lambda whole: whole[:-1],
    "text": lambda whole: b"text\n",
    "a pickle": lambda whole: pickle.dumps({"settings": {}}),
    "encrypted": flipped(8, 1),
    "encrypted in another way": flipped(8, 64),
    "an unknown compression": flipped(10, 99),
    "an entry that lies nowhere": flipped(42, 255),
    "a pickle as settings": changed(settings=np.array({"a": 1}, object)),
    "text as settings": changed(settings="text"),
    "text as steps": changed(settings={"steps": "three"}),
    "no facts": changed(facts=None),
    "no status": changed(facts="{}"),
    "no loss": changed(**{"history/loss": None}),
    "no state": changed(**{"state/0": None}),
    "a flipped state": flipped(300, 99, b"state/0.npy"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_in_a_checkpoint_is_one_line_that_names_it_and_overwrite_starts_again(flags, tmp_path, capsys, name):
    train.main([*flags, "--steps", "6"])
    capsys.readouterr()
    file = one(tmp_path) / "checkpoint.npz"
    file.write_bytes(BROKEN[name](file.read_bytes()))
    for more in (["--resume"],) if name.endswith("state") else (["--steps", "6"], ["--resume"]):  # it is shown without
        message = refused(capsys, *flags, *more)
        assert str(file) in message and "--overwrite" in message
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
WRONG = [  # flags, of which the last is the culprit, and what each of its values is wrong for
    *[(f"--{name}", "-1 x 1.5 nan 99999999999999") for name in WHOLE],
    *[(f"--{name}", "-0.1 nan inf x ''") for name in ("sigma", "beta", "weight-decay", "sharpness-tol")],
    *[(f"--{name}", "x") for name in ("dataset", "model", "preset", "loss", "optimizer", "tuner", "norm", "activation")],
    *[(f"--{name}", "0") for name in ("width", "depth", "steps", "log-every", "sharpness-every", "sharpness-tol")],
    *[(f"--{name}", "1") for name in ("precision", "coordinator", "processes", "process", "no-cache", "unknown", "resum")],
    *[(f"--optimizer {name} --eps", "0 -1 1e300") for name in ("adam", "rmsprop")],
    ("--seed", "2147483648 '0 -1'"), ("--beta", "1"), ("--steps", "1e3"), ("--ste", "5"), ("--sigma", "'2 -1' 1e300"),
    ("--weight-decay", "1e300"), ("--test-samples", "-1 x 1.5"), ("--batch-size", "1025 '16 2000'"),
    ("--tuner linesearch --slope", "1"), ("--tuner linesearch --slack", "-1 1e300"),
    ("--tuner linesearch --shrink", "1 0"), ("--tuner linesearch --grow", "1 nan 1e300"),
    ("--tuner linesearch --lr-max", "0 inf 1e300"), ("--tuner constant --lr", "nan 0 1e300 '0.1 0'"),
    ("--tuner schedule --warmup", "1"), ("--tuner schedule --decay", "x"), ("--tuner exact --iterations", "0 1.5"),
    ("--tuner hypergradient --hyper-rate", "1.1 -1 nan"), ("--tuner feedback --sigma-high", "0.9 inf 1e300"),
    ("--tuner feedback --tolerance", "-1 nan 1e300"), ("--tuner feedback --average", "1 -0.1"),
    ("--optimizer momentum --momentum", "1 -0.1 nan"), ("--optimizer adam --beta1", "1"),
    ("--optimizer adam --beta2", "1"), ("--dataset imagenette --image-size", "0 1025 x"),
    ("--model resnet --stem", "large"), ("--model cnn --depth", "101 100"), ("--width 65536 --depth", "100"),
    # what applies to nothing that was chosen
    ("--tuner greedy --sigma", "2"), ("--tuner greedy --beta", "0.9"), ("--lr", "0.1"), ("--hyper-rate", "0.1"),
    ("--tuner greedy cdat --lr", "0.1"), ("--eps", "1e-8"), ("--momentum", "0.9"), ("--image-size", "64"),
    ("--norm", "layer"), ("--stem", "small"), ("--patch", "4"), ("--model linear --depth", "3"),
    ("--model linear --width", "3"), ("--model resnet --activation", "tanh"),
    ("--preset mlp-fig15 --width", "3"), ("--preset resnet34 --depth", "18"),
]  # fmt: skip
BAD = [(f"{flags} {value}", flags.split()[-1]) for flags, values in WRONG for value in re.findall(r"''|'.+?'|\S+", values)] + [
    ("--batch-size 16 2000", "--batch-size is 2000"), ("--samples 5000", "5000 samples"), ("--samples 1438", "1438"),
    ("--resume --overwrite", "--resume contradicts --overwrite"), ("--tuner", "--tuner"), ("--sigma", "--sigma"),
    ("--preset resnet34 --model mlp", "--preset"), ("--preset resnet34 --model cnn", "--preset"),
    ("--preset nanolm", "transformer"), ("--preset vit-ti32", "patch"), ("--dataset pydocs", "mlp"),
    ("--model rnn", "rnn"), ("--model transformer", "transformer"), ("--model resnet --depth 11", "depth"),
    *[(f"--model vit --patch {value}", "patch") for value in ("-1", "3", "4097", "x")],
    ("--dataset pydocs --model rnn --standardize", "--standardize"), ("--steps 3 4", "4"), ("word", "word"),
    ("--data-dir no/such/folder", "no/such/folder"), (f"--dataset cifar10 --data-dir {__file__}", __file__),
    (f"--out {__file__}", __file__), ("--distributed a b", "--distributed"), ("--distributed a:1 x 0", "--distributed"),
]  # fmt: skip


@pytest.mark.parametrize("line, culprit", BAD)
def test_bad_input_is_one_line_that_names_the_culprit_and_leaves_nothing_behind(capsys, tmp_path, line, culprit):
    assert culprit in refused(capsys, "--out", str(tmp_path / "runs"), *shlex.split(line))
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

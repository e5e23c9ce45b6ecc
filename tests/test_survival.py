"""What happens to a run: killed, interrupted, disturbed, out of disk, resumed; and what bad input is answered."""

import contextlib
import errno
import io
import itertools
import json
import os
import pickle
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_train import ROOT, ended, held, one, refused, run, start, tiny  # noqa: F401, run is a fixture
from test_train import rows_of as rows

import train
from train import data, plots

KILLS = int(os.environ.get("KILLS", 5))


def same_run(a, b):
    """The same rows, parameters and what else a checkpoint has of them; the same metrics.csv, byte for byte."""
    assert (one(a) / "metrics.csv").read_bytes() == (one(b) / "metrics.csv").read_bytes()
    with np.load(one(a) / "checkpoint.npz") as first, np.load(one(b) / "checkpoint.npz") as second:
        assert first.files == second.files
        for name in set(first.files) - {"facts"}:  # the seconds differ
            np.testing.assert_array_equal(first[name], second[name])


def stop(folder):
    """The tiny run, stopped after its first step."""

    def interrupt(rows):
        if rows:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(tiny(out=folder, log_every=1), interrupt)


# --- Real processes: what they did is looked at in the end.

SIZES = "--model linear --samples 64 --steps 400 --sharpness-every 40 --log-every 20 --no-plot --out".split()
LINE = ROOT / "train.py", *SIZES


def wait_for(process, folder, count):
    while process.poll() is None and rows(folder) < count:
        time.sleep(0.005)


def killed(folder, environment):
    """One run KILLS times: at start-up, while it compiles, at any time between two logs; then it is left to end."""
    as_users = {"JAX_ENABLE_COMPILATION_CACHE": "True", "XDG_CACHE_HOME": str(folder)}
    environment = environment | as_users  # a dict of its own: other jobs have the same environment
    undisturbed = start(environment, *LINE, folder / "whole")
    draw, out, codes = random.Random(0), folder / "killed", []
    for row in [0, 1, *sorted(draw.choices(range(2, 380), k=KILLS - 2))]:
        longest = 2.0 if row <= rows(out) else 0.01  # seconds, of start-up and of an interval between two logs
        process = start(environment, *LINE, out, "--resume")
        wait_for(process, out, row)
        time.sleep(draw.uniform(0, longest))
        process.kill()
        codes.append(ended(process)[0])
    return folder, codes, ended(start(environment, *LINE, out, "--resume")), ended(undisturbed)


def interrupted(folder, environment):
    """A run without end, of another precision, and a second one beside it."""
    endless = *LINE, folder, "--steps", 10**8
    process = start(environment | {"JAX_DEFAULT_MATMUL_PRECISION": "bfloat16"}, *endless)
    wait_for(process, folder, 50)
    beside = ended(start(environment, *endless, "--resume"))
    process.send_signal(signal.SIGINT)
    return folder, ended(process), beside


DEAF = """import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"""


def at_once(folder, environment):
    """Ctrl-C while data are loaded and all is compiled; and a run that was started where Ctrl-C is ignored."""
    pressed = []
    for k, seconds in enumerate((0.0, 0.5, 1.0)):
        process = start(environment, *LINE, folder / str(k), "--steps", 100_000)  # so that none ends before
        assert process.stdout.readline().startswith("[1/1]")
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        if process.poll() is None:  # JAX's own callback of the garbage collector lost it, with a word on stderr
            process.send_signal(signal.SIGINT)
        pressed.append(ended(process))
    deaf = start(environment, "-c", DEAF, *LINE, folder / "deaf")
    wait_for(deaf, folder / "deaf", 20)
    deaf.send_signal(signal.SIGINT)
    return pressed, ended(deaf)


def unread(folder, environment):
    """A run of which only the first line is read."""
    process = start(environment, *LINE, folder, "--log-every", 1)
    assert process.stdout.readline().startswith("[1/1]")
    process.stdout.close()
    with process.stderr as stderr:
        return stderr.read(), process.wait()


def bad(folder, environment):
    """Four commands that cannot run, and what they leave in the folder."""
    lines = "--lr 0.1", "--sigma nan", "--tuner polyak", "--data-dir no/such"  # a tuner of paper/, not of train.py
    running = [start(environment, ROOT / "train.py", *line.split(), cwd=folder) for line in lines]
    return dict(zip(lines, map(ended, running))), list(folder.iterdir())


JOBS = killed, interrupted, at_once, unread, bad


# --- Resumed.


@pytest.mark.parametrize("tuner", ["feedback", "linesearch"])
def test_more_steps_are_what_one_long_run_gives_and_are_not_taken_unasked(run, tmp_path, tuner):
    run.flags += ["--no-sharpness", "--tuner", tuner, "--batch-size", "16"]
    run("--out", tmp_path / "long")
    run("--steps", 7)
    assert "holds 7 of 12 steps; give --resume" in run.refused()
    run("--resume")
    same_run(tmp_path / "long", run.folder)


def test_steps_cannot_be_raised_under_a_schedule_nor_lowered(run):
    run.flags += ["--no-sharpness", "--tuner", "schedule"]
    run("--steps", 4)
    assert "--steps 4" in run.refused("--steps", 8, "--resume")
    assert "--steps 4" in run.refused("--steps", 2, "--resume")


def test_a_run_in_a_thread_stops_where_it_is_interrupted_and_goes_on_when_it_is_asked_to(run, tmp_path):
    with ThreadPoolExecutor(1) as thread:
        thread.submit(stop, run.folder).result()
        thread.submit(train.train, tiny(out=tmp_path / "whole")).result()
    run("--out", tmp_path / "whole")  # which exports it
    assert held(run.folder).facts["status"] == "running" and rows(run.folder) == 1
    assert "--resume" in run.refused()
    run("--resume")
    same_run(tmp_path / "whole", run.folder)


def test_a_folder_has_one_owner_while_a_run_is_on(run):
    at_work = []

    def meanwhile(rows):
        if not rows or rows[-1]["step"] < 11:
            for more in [], ["--resume"], ["--overwrite"]:
                at_work.append("another process is at work there" in run.refused(*more))

    history = train.train(tiny(out=run.folder, log_every=5), meanwhile)
    assert at_work == [True, True, True] + 2 * [False, True, True]  # that it is unfinished is seen before the lock is
    assert len(history["step"]) == rows(run.folder) == 12


@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]])
def test_the_command_that_ctrl_c_prints_goes_on_with_the_same_run(run, tmp_path, capsys, monkeypatch, more):
    run.flags = [*run.flags, "--out", str(tmp_path / "a b")]
    monkeypatch.setattr(train, "train", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as end:
        run(*more)
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].partition("train.py ")[2])
    (config,), (plain,) = (train.configurations(vars(train.parser().parse_args(line))) for line in (words, run.flags))
    assert end.value.code == 130 and config.resume and train.folder_of(config) == train.folder_of(plain)


def test_ctrl_c_ends_every_stage_at_once_with_the_command(run, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    for stage in "held_run", "train", "show":  # the last one also while it shows what an earlier one has ended
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(train, "show", interrupt)
            patch.setattr(train, stage, interrupt)
            run()
        assert end.value.code == 130 and "go on with: python train.py" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("names", [["cdat"], ["constant", "cdat"]])
def test_the_command_that_ctrl_c_prints_still_replaces_what_overwrite_had_not_come_to(run, capsys, monkeypatch, names):
    run("--tuner", *names)
    train_one = train.train

    def up_to_the_last(config, *rest):
        signal.raise_signal(signal.SIGINT) if config.tuner == names[-1] else train_one(config, *rest)

    monkeypatch.setattr(train, "train", up_to_the_last)
    with pytest.raises(SystemExit):
        run("--tuner", *names, "--overwrite")
    assert capsys.readouterr().out.splitlines()[-1].endswith(" --overwrite")


def test_ctrl_c_before_any_run_as_while_other_processes_are_waited_for_is_no_traceback(run, monkeypatch):
    monkeypatch.setattr(train.gd, "set_up", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 130


# --- Broken files, a full disk.


def test_whatever_is_done_to_the_exports_the_run_is_shown_and_resumed_as_if_nothing_were(run, tmp_path):
    run("--out", tmp_path / "whole")
    table = run("--steps", 6).splitlines()[-1]
    exports = [one(run.folder) / name for name in ("metrics.csv", "config.json")]
    for change in lambda text: text[:30], lambda text: text.replace("2", "3"), None:
        for file in exports:
            file.write_text(change(file.read_text())) if change else file.unlink()
        assert run("--steps", 6).splitlines()[-1] == table
    run("--resume")
    same_run(tmp_path / "whole", run.folder)
    assert json.loads(exports[1].read_text())["steps"] == 12


def flip(whole, at, byte, after=b"PK\x01\x02"):
    """Bytes with another one among them, by default in the first entry of an archive's directory."""
    at += whole.index(after)
    return whole[:at] + bytes([byte]) + whole[at + 1 :]


def change(whole, name, new):
    """The bytes of a checkpoint with another member, or without it where new(member) is None."""
    with np.load(io.BytesIO(whole)) as saved:
        members = {name: saved[name] for name in saved.files}
    members[name] = new(members[name])
    stream = io.BytesIO()
    np.savez(stream, **{name: value for name, value in members.items() if value is not None})
    return stream.getvalue()


BROKEN = {
    **{f"cut at {k}/8": lambda whole, k=k: whole[: len(whole) * k // 8] for k in range(8)},
    "the last byte cut": lambda whole: whole[:-1],
    "text": lambda whole: b"text\n",
    "a pickle": lambda whole: pickle.dumps({"settings": {}}),
    "encrypted": lambda whole: flip(whole, 8, 1),
    "encrypted in another way": lambda whole: flip(whole, 8, 64),
    "an unknown compression": lambda whole: flip(whole, 10, 99),
    "an entry that lies nowhere": lambda whole: flip(whole, 42, 255),
    "a pickle as settings": lambda whole: change(whole, "settings", lambda _: np.array({"a": 1}, object)),
    "text as settings": lambda whole: change(whole, "settings", lambda _: "text"),
    "text as steps": lambda whole: change(whole, "settings", lambda text: str(text).replace(" 6,", ' "six",')),
    "no facts": lambda whole: change(whole, "facts", lambda _: None),
    "no status": lambda whole: change(whole, "facts", lambda _: "{}"),
    "no loss": lambda whole: change(whole, "history/loss", lambda _: None),
    "no state": lambda whole: change(whole, "state/0", lambda _: None),
    "a flipped state": lambda whole: flip(whole, 300, 99, b"state/0.npy"),
}


def rewrite(folder, change):
    """Changes the bytes of the only checkpoint there, and returns its name."""
    file = one(folder) / "checkpoint.npz"
    file.write_bytes(change(file.read_bytes()))
    return str(file)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_one_line_that_names_it_and_overwrite_starts_again(run, name):
    run("--steps", 6)
    file = rewrite(run.folder, BROKEN[name])
    for more in [["--resume"]] + [["--steps", 6]] * ("state" not in name):  # which is not needed to show the run
        message = run.refused(*more)
        assert file in message and "--overwrite" in message
    run("--overwrite")
    assert rows(run.folder) == 12


def test_a_checkpoint_that_the_system_does_not_give_is_not_called_broken(run, monkeypatch):
    def fails(file, mode):
        if run.folder not in Path(file).parents:  # of a run of another test, which is on beside this one
            return open(file, mode)
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))

    run()
    monkeypatch.setattr(plots, "open", fails, raising=False)
    message = run.refused()
    assert "Permission denied" in message and "checkpoint.npz" in message and "--overwrite" not in message


@pytest.mark.parametrize("name, new, what", [
    ("settings", lambda text: str(text).replace('"sigma": 2.0', '"sigma": 1.5'), "--sigma 1.5"),
    ("state/0", lambda leaf: leaf.astype(float), "checkpoint.npz: of other network or precision"),
    ("state/0", lambda leaf: leaf[:1], "checkpoint.npz: of other network or precision"),
    (None, None, "checkpoint.npz: of other data"),
])  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(run, monkeypatch, name, new, what):
    stop(run.folder)
    load = data.load
    if name:
        rewrite(run.folder, lambda whole: change(whole, name, new))
    else:
        monkeypatch.setattr(data, "load", lambda *args: load(*args)._replace(y=np.zeros(64, np.int32)))
    message = run.refused("--resume")
    assert what in message and "--overwrite" in message


def test_ctrl_c_beside_a_broken_run_is_one_line(run, monkeypatch):
    def breaks(*_):
        rewrite(run.folder, lambda whole: b"")
        raise KeyboardInterrupt

    stop(run.folder)
    monkeypatch.setattr(train, "train", breaks)
    assert "checkpoint.npz: broken" in run.refused("--resume")


class FullDisk(io.FileIO):
    """A file that takes half of what is written and then has no space left."""

    def write(self, content):
        super().write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name, when, kept", [("checkpoint.npz", 3, 6), ("metrics.csv", 1, 12), ("config.json", 1, 12)])
def test_no_space_left_loses_no_row_that_was_logged_and_says_so(run, tmp_path, monkeypatch, name, when, kept):
    whole, opened = train.train(tiny(out=tmp_path / "whole")), []

    def full(file, mode):
        opened.append(file.name == f".{name}")
        return FullDisk(file, mode) if opened[-1] and sum(opened) == when else open(file, mode)

    monkeypatch.setattr(data, "open", full, raising=False)
    message = run.refused("--log-every", 3, late=True)
    assert f"{name}: cannot be written" in message and "No space left" in message and "is kept" in message
    assert rows(run.folder) == kept and not list(run.folder.glob(f"*/.{name}"))
    monkeypatch.undo()
    run("--resume")
    np.testing.assert_equal(held(run.folder).history, whole)
    assert held(run.folder).facts["status"] == "done"


def test_a_run_killed_under_overwrite_before_its_first_log_leaves_nothing_of_the_old_one(run):
    def die(rows):
        raise SystemError

    run()
    with pytest.raises(SystemError):
        train.train(tiny(out=run.folder, overwrite=True), die)
    assert [*one(run.folder).iterdir()] == [] and "was run before" not in run() and rows(run.folder) == 12


# --- Killed at every call to the file system.

FATE = SimpleNamespace(folder=None, left=0)


class Killed(BaseException):
    """What no handler of errors holds up; and clean-up can change no file any more."""


def call():
    FATE.left -= 1
    if FATE.left < 0:
        raise Killed


def audit(event, arguments):
    if FATE.folder and event in ("open", "os.rename", "os.remove", "os.mkdir") and FATE.folder in str(arguments[0]):
        call()


sys.addaudithook(audit)


class Counted(io.FileIO):
    """A file whose writes are calls too; the one that is killed leaves half of what it should have written."""

    def write(self, content):
        super().write(content[: len(content) // 2])
        if FATE.folder:
            call()
        return len(content) // 2 + super().write(content[len(content) // 2 :])


def prepare(folder, steps=0, **given):
    """What was there before: nothing, or a run of some steps, which ended or (negative) was killed after them."""
    if steps:
        train.train(tiny(steps=abs(steps), out=folder, no_sharpness=True, log_every=4, **given))
    if steps < 0:
        rewrite(folder, settings_with(f'"steps": {-steps}', '"steps": 12'))


def settings_with(old, new):
    """A change of the bytes of a checkpoint: other settings."""
    return lambda whole: change(whole, "settings", lambda text: str(text).replace(old, new))


BEFORE = {  # what was there, and the flags of the command that is killed
    "a first run": (dict(), []),
    "a resumed run": (dict(steps=-4), ["--resume"]),
    "the same, replaced": (dict(steps=12), ["--overwrite"]),
    "a shorter one, replaced": (dict(steps=8), ["--overwrite"]),
    "a longer one, replaced": (dict(steps=16), ["--overwrite"]),
    "another one, replaced": (dict(steps=12), ["--overwrite"]),
}


@pytest.mark.parametrize("name", BEFORE)
def test_killed_at_any_call_to_the_file_system_a_run_goes_on_to_the_same_bytes_or_says_what_to_do(
        name, run, tmp_path, monkeypatch, capsys):  # fmt: skip
    before, flags = BEFORE[name]
    run.flags += ["--no-sharpness", "--log-every", "4"]
    run("--out", tmp_path / "whole")
    prepare(tmp_path / "before", **before)
    if name.startswith("another"):
        rewrite(tmp_path / "before", settings_with('"sigma": 2.0', '"sigma": 1.5'))
    monkeypatch.setattr(data, "open", lambda file, mode: Counted(file, mode), raising=False)
    outcomes, k, over = Counter(), 0, False
    while not over:
        folder = tmp_path / f"killed-{k}"
        if (tmp_path / "before").exists():
            shutil.copytree(tmp_path / "before", folder)
        FATE.folder, FATE.left = str(folder), k
        try:
            run("--out", folder, *flags)
            over = True
        except Killed:
            pass
        FATE.folder = None
        try:
            run("--out", folder, "--resume")
            same_run(tmp_path / "whole", folder)
            outcomes["the same bytes"] += 1
        except SystemExit as end:
            message = capsys.readouterr().err
            assert end.code == 2 and message.count("\n") == 1 and "--overwrite" in message, message
            outcomes["one line"] += 1
        shutil.rmtree(folder)
        k += 1 if KILLS >= 100 else 190
    if KILLS >= 100:
        with capsys.disabled():
            print(f"\n{name}: killed at {sum(outcomes.values()) - 1} calls, {dict(outcomes)}")
    assert outcomes["the same bytes"] > 3


# --- Bad input.

WHOLE = "samples seed batch-size chunk-size steps log-every sharpness-every sharpness-samples width depth".split()
WRONG = [  # flags, of which the last is the culprit, and what each of its values is wrong for
    *[(f"--{name}", "-1 x 1.5 nan 99999999999999") for name in WHOLE],
    *[(f"--{name}", "-0.1 nan inf x ''") for name in ("sigma", "beta", "weight-decay", "sharpness-tol")],
    *[(f"--{name}", "x") for name in "dataset model preset loss optimizer tuner norm activation unknown".split()],
    *[(f"--{name}", "0") for name in ("width", "depth", "steps", "log-every", "sharpness-every", "sharpness-tol")],
    *[(f"--{name}", "1") for name in ("precision", "coordinator", "processes", "process", "no-cache", "resum")],
    *[(f"--optimizer {name} --eps", "0 -1 1e300") for name in ("adam", "rmsprop")],
    ("--seed", "2147483648"), ("--log-every", "1001"), ("--beta", "1"), ("--steps", "1e3"), ("--ste", "5"),
    ("--sigma", "1e300"), ("--weight-decay", "1e300"), ("--test-samples", "-1 x 1.5"), ("--batch-size", "1025"),
    ("--tuner linesearch --slope", "1"), ("--tuner linesearch --slack", "-1 1e300"),
    ("--tuner linesearch --shrink", "1 0"), ("--tuner linesearch --grow", "1 nan 1e300"),
    ("--tuner linesearch --lr-max", "0 inf 1e300"), ("--tuner constant --lr", "nan 0 1e300"),
    ("--tuner schedule --warmup", "1"), ("--tuner schedule --decay", "x"), ("--tuner exact --iterations", "0 1.5"),
    ("--tuner hypergradient --hyper-rate", "1.1 -1 nan"), ("--tuner feedback --sigma-high", "0.9 inf 1e300"),
    ("--tuner feedback --sigma-low", "0.9 nan 1e300"),
    ("--tuner feedback --tolerance", "-1 nan 1e300"), ("--tuner feedback --growth", "0.9 nan"),
    ("--tuner feedback --average", "1 -0.1"),
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
MANY = "slope slack shrink lr-max beta1 beta2 eps weight-decay sharpness-tol"
LONG = "--tuner linesearch --optimizer adam --seed 2147483647" + "".join(
    f" --{name} 0.12345678901234568" for name in MANY.split())  # fmt: skip
BAD = [(f"{flags} {value}", flags.split()[-1]) for flags, values in WRONG for value in values.split()] + [
    ("--seed 0 -1", "--seed"), ("--tuner constant --lr 0.1 0", "--lr"), ("--sigma 2 -1", "--sigma"),
    ("--batch-size 16 2000", "--batch-size is 2000"), ("--samples 5000", "5000 samples"), ("--samples 1438", "1438"),
    ("--resume --overwrite", "--resume contradicts --overwrite"), ("--tuner", "--tuner"), ("--sigma", "--sigma"),
    ("--preset resnet34 --model mlp", "--preset"), ("--preset resnet34 --model cnn", "--preset"),
    ("--preset nanolm", "transformer"), ("--preset vit-ti32", "patch"), ("--dataset pydocs", "mlp"),
    ("--model rnn", "rnn"), ("--model transformer", "transformer"), ("--model resnet --depth 11", "depth"),
    *[(f"--model vit --patch {value}", "patch") for value in ("-1", "3", "4097", "x")],
    ("--dataset pydocs --model rnn --standardize", "--standardize"), ("--steps 3 4", "4"), ("word", "word"),
    ("--data-dir no/such/folder", "no/such/folder"), (f"--dataset cifar10 --data-dir {__file__}", __file__),
    (f"--out {__file__}", __file__), (LONG, "name of so many settings"),
    ("--distributed a b", "--distributed"), ("--distributed a:1 x 0", "--distributed"),
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
    words = [*"0 1 -1 0.5 2 1e9 nan inf x 64".split(), "", *itertools.chain(*train.WORDS.values())]
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


# --- What came of the processes.


def test_ctrl_c_before_the_first_step_ends_at_once_with_the_command_and_where_it_is_ignored_nothing_ends(aside):
    pressed, deaf = aside["at_once"].result()
    for code, out, err in pressed:
        assert code == 130 and (err == "" or "in: <function _xla_gc_callback" in err)
        assert "go on with" in out.splitlines()[-1]
    assert deaf[0] == 0 and deaf[2] == "" and "CDAT" in deaf[1]


def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(aside):
    folder, codes, resumed, undisturbed = aside["killed"].result()
    assert -signal.SIGKILL in codes and resumed[0] == undisturbed[0] == 0 and resumed[2] == ""
    assert any((folder / "stepping-on-the-edge").iterdir())  # compilations are kept in the user's cache
    same_run(folder / "whole", folder / "killed")


def test_ctrl_c_saves_shows_the_table_and_says_how_to_go_on_and_no_second_process_disturbs_the_run(aside):
    folder, (code, out, err), beside = aside["interrupted"].result()
    assert beside[0] == 2 and beside[2].count("\n") == 1 and "another process is at work there" in beside[2]
    assert code == 130 and err == "" and "CDAT σ = 2" in out
    last = out.splitlines()[-1]
    assert last.startswith("interrupted; go on with: python train.py --model") and last.endswith(" --resume")
    facts = held(folder).facts
    assert facts["status"] == "running" and facts["matmul_precision"] == "bfloat16" and rows(folder) % 20 == 0


def test_a_reader_that_reads_no_further_ends_the_command_without_a_word(aside):
    assert aside["unread"].result() == ("", 1)


def test_commands_that_cannot_run_end_in_one_line_and_leave_nothing_behind(aside):
    answers, left = aside["bad"].result()
    for line, (code, _, err) in answers.items():
        assert code == 2 and err.count("\n") == 1 and line.replace("--data-dir ", "").split()[0] in err
    assert left == [] and len(answers) == 4

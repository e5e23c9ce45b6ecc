"""Facts about both READMEs: what they show can be typed, their numbers stand in the committed results, their links
lead on."""

import doctest
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import gd
import train
import tuners
from paper import __main__ as paper
from paper import rivals
from paper.experiments import ALSO, EXPERIMENTS

ROOT = Path(train.__file__).parent
TEXTS = {folder: (ROOT / folder / "README.md").read_text() for folder in (".", "paper")}
TEXT = "\n".join(TEXTS.values())
BLOCKS = [block.strip() for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)]
COMMANDS = [line for block in BLOCKS for line in block.splitlines()] + re.findall(r"`(python [^`]+)`", TEXT)
CODE = re.findall(r"```python\n(.*?)```", TEXTS["."], re.DOTALL)


def test_every_flag_they_name_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        paper.main(["--help"])
    helped = train.parser().format_help() + capsys.readouterr().out
    named = set(re.findall(r"--[a-z][a-z-]+", TEXT))
    assert len(named) > 20
    assert {flag for flag in named if not re.search(flag + r"\b", helped)} == set()


TRAINED = [found for c in COMMANDS for found in re.findall(r"python (train\.py|-m paper train)\b(.*)", c)]


@pytest.mark.parametrize("command, flags", TRAINED)
def test_every_training_command_parses(command, flags):
    words = shlex.split(flags)
    assert len(TRAINED) > 5
    if words != ["--help"]:
        configs = train.configurations(vars(train.parser().parse_args(words)))
        assert configs and (command != "train.py" or not {config.tuner for config in configs} & set(rivals.RIVALS))


def test_every_experiment_they_name_exists_and_every_experiment_is_named():
    names = {words.split()[0] for words in re.findall(r"python -m paper ([^`\n…]+)", TEXT)}
    assert len(names) > 4 and names <= {*EXPERIMENTS, *ALSO, *paper.COMMANDS, "train", "all", "--list"}
    assert set(EXPERIMENTS) <= set(re.findall(r"^\| \[`(\w+)`\]", TEXTS["paper"], re.MULTILINE))


def test_the_first_two_commands_are_what_the_ci_runs():
    first_two = ["pip install -r requirements.txt && python train.py --tuner cdat --sigma 2", "python -m pytest"]
    assert BLOCKS[0].splitlines() == first_two
    script = (ROOT / ".ci" / "run").read_text()
    listed = re.search(r"awk '([^']+)'", script)[1]
    lines = subprocess.run(["awk", listed, ROOT / "README.md"], capture_output=True, text=True, check=True).stdout
    assert lines.splitlines()[:2] == first_two


def test_the_tables_of_the_report_are_those_of_the_committed_results():
    assert paper.with_tables(TEXTS["paper"]) == TEXTS["paper"], "run: python -m paper readme"
    shown = re.findall(r"<!-- (\w+: \w+) -->\n(.*?)\n<!-- end -->", TEXTS["paper"], re.DOTALL)
    assert len(shown) > 4 and all(table.count("\n") > 2 for _, table in shown)


def test_their_links_and_figures_exist():
    for folder, text in TEXTS.items():
        targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("https://")]
        assert len(targets) > 5 and [target for target in targets if not (ROOT / folder / target).exists()] == []


def test_the_whole_thing_in_forty_lines_is_that_and_prints_what_the_readme_shows(capsys):
    assert len(CODE[0].splitlines()) <= 40
    exec(CODE[0], {})
    printed = capsys.readouterr().out.splitlines()
    shown = re.search(re.escape(CODE[0]) + r".*?```text\n(.*?)```", TEXTS["."], re.DOTALL)[1].splitlines()
    numbers = lambda line: [float(number) for number in re.findall(r"[\d.]+", line)]
    assert len(printed) == len(shown) == 3
    for ours, theirs in zip(printed, shown):  # later lines part ways from machine to machine
        assert numbers(ours) == pytest.approx(numbers(theirs), rel=0.2)
    assert numbers(printed[0]) == pytest.approx(numbers(shown[0]), rel=1e-3)


class Transformation(NamedTuple):
    """As optax.GradientTransformationExtraArgs is."""

    init: Callable
    update: Callable


def test_the_adapter_for_optax_as_it_is_pasted_gives_the_steps_of_make_step():
    scope = {"jax": jax, "optax": SimpleNamespace(GradientTransformationExtraArgs=Transformation)}
    exec(CODE[1], scope)
    assert len(CODE[1].splitlines()) <= 12
    loss = lambda w, b: jnp.sum((w["a"] ** 2 - b) ** 2)
    tuner, w = tuners.cdat(2.0, beta=0.9), {"a": jnp.array([0.1, 3.0])}
    scaled, carry = scope["scale_by_tuner"](tuner), gd.init_carry(w, gd.adam(), tuner)

    @jax.jit
    def step(w, adam, state):
        f = lambda w: loss(w, 1.0)
        value, grad = jax.value_and_grad(f)(w)
        updates, adam = gd.adam().direction(adam, grad)
        updates, state = scaled.update(updates, state, w, value=value, grad=grad, value_fn=f, batch="not used")
        return jax.tree.map(jnp.add, w, updates), adam, state, value

    adam, state, own = gd.adam().init(w), scaled.init(w), jax.jit(gd.make_step(loss, gd.adam(), tuner))
    for _ in range(50):
        w, adam, state, value = step(w, adam, state)
        carry, metrics = own(carry, 1.0)
        assert float(value) == pytest.approx(float(metrics["loss"]), rel=1e-4)
    assert value < 0.1


def test_examples_in_docstrings_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the example leaves its run
    failed, attempted = doctest.testmod(train)
    assert attempted and not failed


ALONE = {  # by file: something that it must be able to do
    "gd": "m.norm({'a': m.jnp.ones(4)})",
    "tuners": "m.cdat().init(m.jnp.ones(2))",
    "sharpness": "m.power_iteration(lambda v: 3 * v, m.jnp.ones(2))",
    "models": "m.mlp((8, 8, 1), 10).init(m.jax.random.key(0))",
    "data": "m.load('pydocs', samples=2).x.shape",
    "plots": "m.edge({'optimizer': 'gd'})",
    "paper/theory": "m.__doc__",
}


ONE_BY_ONE = """import importlib, json, sys
for name, (folder, expression) in json.loads(sys.argv[1]).items():
    sys.path[0] = folder
    print(name, eval(expression, {"m": importlib.import_module(name)}) is not None)
    del sys.modules[name]"""


def test_each_library_file_works_alone_in_an_empty_folder(tmp_path):
    tasks = {}
    for path, expression in ALONE.items():
        name = Path(path).name
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / f"{path}.py", tmp_path / name)
        tasks[name] = str(tmp_path / name), expression
    done = subprocess.run([sys.executable, "-c", ONE_BY_ONE, json.dumps(tasks)], cwd=tmp_path, text=True,
                          capture_output=True)  # fmt: skip
    assert done.stdout.splitlines() == [f"{name} True" for name in tasks], done.stderr

"""Facts about the README: what it shows can be typed, its numbers stand in the committed results, its links lead somewhere."""

import doctest
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import experiments
import train

ROOT = Path(train.__file__).parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = [block.strip() for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)]
COMMANDS = [line for block in BLOCKS for line in block.splitlines()] + re.findall(r"`(python [^`]+)`", TEXT)


def test_every_flag_it_names_is_in_the_help():
    helped = train.parser().format_help() + subprocess.run(
        [sys.executable, ROOT / "experiments.py", "--help"], capture_output=True, text=True, check=True).stdout  # fmt: skip
    named = set(re.findall(r"--[a-z][a-z-]+", TEXT))
    assert len(named) > 20
    assert {flag for flag in named if not re.search(flag + r"\b", helped)} == set()


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py" in c])
def test_every_training_command_parses(command):
    words = shlex.split(command.split("&& ")[-1])
    assert words[:2] == ["python", "train.py"]
    assert train.configurations(vars(train.parser().parse_args(words[2:])))


def test_every_experiment_it_names_exists():
    names = {words.split()[0] for words in re.findall(r"python experiments.py ([^`\n]+)", TEXT)}
    assert len(names) > 4 and names <= {*experiments.EXPERIMENTS, *experiments.COMMANDS, "all", "NAME", "--list"}


def test_its_first_two_commands_are_what_the_ci_runs():
    assert BLOCKS[0] == "pip install -r requirements.txt && python train.py --tuner cdat --sigma 2"
    assert BLOCKS[1] == "python -m pytest"
    script = (ROOT / ".ci" / "run").read_text()
    listed = re.search(r"awk '([^']+)'", script)[1]
    lines = subprocess.run(["awk", listed, ROOT / "README.md"], capture_output=True, text=True, check=True).stdout
    assert lines.splitlines()[:2] == BLOCKS[:2]


def test_its_tables_are_those_of_the_committed_results():
    assert len(experiments.results.read(experiments.RESULTS)) > 500
    assert experiments.with_tables(TEXT) == TEXT, "run: python experiments.py readme"
    shown = re.findall(r"<!-- (\w+: \w+) -->\n(.*?)\n<!-- end -->", TEXT, re.DOTALL)
    assert len(shown) > 4 and all(table.count("\n") > 2 for _, table in shown)


def test_its_links_and_figures_exist():
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", TEXT) if not target.startswith("https://")]
    assert len(targets) > 5 and [target for target in targets if not (ROOT / target).exists()] == []


def test_its_example_of_cdat_in_a_loop_of_ones_own_runs_and_lowers_the_loss():
    code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1]
    scope = {}
    exec(code, scope)
    assert scope["value"] < 0.1


@pytest.mark.parametrize("module", [train, experiments, experiments.results])
def test_examples_in_docstrings_run(module):
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed


ALONE = {  # by file: something that it must be able to do
    "gd": "m.norm({'a': m.jnp.ones(4)})",
    "tuners": "m.cdat().init(m.jnp.ones(2))",
    "sharpness": "m.power_iteration(lambda v: 3 * v, m.jnp.ones(2))",
    "models": "m.count(m.mlp((8, 8, 1), 10))",
    "data": "m.load('pydocs', samples=2).x.shape",
    "plots": "m.edge({'optimizer': 'gd'})",
    "theory": "m.__doc__",
}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Each library file at work in an empty folder of its own, all at the same time."""
    runs = {}
    for name, expression in ALONE.items():
        shutil.copy(ROOT / f"{name}.py", folder := tmp_path_factory.mktemp(name))
        code = f"import {name} as m; print({expression})"
        runs[name] = subprocess.Popen([sys.executable, "-c", code], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return runs


@pytest.mark.parametrize("name", ALONE)
def test_each_library_file_works_alone_in_an_empty_folder(started, name):
    out, error = started[name].communicate()
    assert started[name].returncode == 0 and out.strip(), error

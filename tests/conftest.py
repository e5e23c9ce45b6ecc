"""What holds for every test, and for every command that a test starts."""

import gc
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

import paper.rivals  # noqa: F401, so that they are in the registry whichever tests are run

ORDER = "gd tuners sharpness models data plots train".split()  # what tests no file of its own comes last
SETTINGS = {
    "jax_enable_compilation_cache": False,  # tests leave nothing in the user's cache folder, nor trust it
    "jax_disable_most_optimizations": True,  # most of the time goes into compilation; what analyses it sets this back
}
for name, value in SETTINGS.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)
if jax.__version_info__ < (0, 11):  # as much for the CPU's code generator; XLA ends a process over an unknown flag
    flags = "backend_optimization_level=0 cpu_use_fusion_emitters=false cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = " ".join(f"--xla_{flag}" for flag in flags.split())  # the last: to split costs more
signal.signal(signal.SIGINT, signal.default_int_handler)  # else commands of a suite in the background would ignore it
gc.set_threshold(100_000, 50, 100)  # tracing makes many small objects: looking through them took a seventh of the time


def pytest_collection_modifyitems(items):
    names = [f"test_{name}" for name in ORDER]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))


@pytest.fixture(autouse=True)
def alive(monkeypatch):
    """What ends a command at once at Ctrl-C ends no test."""
    monkeypatch.setattr(os, "_exit", sys.exit)


@pytest.fixture
def optimized():
    """Compilation as users have it, for what the compiler's own analysis is asked about."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


# --- Processes take seconds each: they run beside all tests, of which the last ones of a file look at what came out.


@pytest.fixture(scope="session")
def aside(request, tmp_path_factory):
    """By name, the futures of what each job(folder, environment) returns: of the JOBS of a file that is looked at."""
    paths = [str(folder) for folder in (Path(__file__).parents[1], Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    files = dict.fromkeys(item.module for item in request.session.items if "aside" in item.fixturenames)
    jobs = [job for file in files for job in file.JOBS]
    threads = ThreadPoolExecutor(1)  # the tests take one core, one job at a time the other
    yield {job.__name__: threads.submit(job, tmp_path_factory.mktemp(job.__name__), environment) for job in jobs}
    threads.shutdown(cancel_futures=True)  # a session that is stopped waits for the one that is on


@pytest.fixture(scope="session", autouse=True)
def begin(request):
    """They begin before the first test, if a test that was picked looks at any."""
    if any("aside" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("aside")

"""What holds for every test, and for every command that a test starts."""

import gc
import os

import jax
import pytest

SETTINGS = {
    "jax_enable_compilation_cache": False,  # tests leave nothing in the user's cache folder, nor trust it
    "jax_disable_most_optimizations": True,  # most of the time goes into compilation; what analyses it sets this back
}
for name, value in SETTINGS.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)
if jax.__version_info__ < (0, 11):  # the same for the CPU's code generator; XLA ends a process over a flag it does not know
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
gc.set_threshold(100_000, 50, 100)  # tracing makes many small objects: looking through them took a seventh of the time


@pytest.fixture
def optimized():
    """Compilation as users have it, for what the compiler's own analysis is asked about."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)

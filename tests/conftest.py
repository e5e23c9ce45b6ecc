"""What holds for every test, and for every command that a test starts."""

import os

import jax

os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # tests leave nothing in the user's cache folder, nor trust it
jax.config.update("jax_enable_compilation_cache", False)

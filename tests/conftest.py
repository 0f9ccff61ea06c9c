"""Puts the tests on eight virtual CPU devices, checks types, and offers float64 to who asks."""

import gc
import os
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little: without these a gradient of HOPE takes five times as long.
# The last two are for the version that they were tried with: others end the process over a flag
# that they do not know.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    * version("jaxlib").startswith("0.10.")
)

import jax
import pytest
from jaxtyping import install_import_hook

# What is imported from here on says which shapes and types it takes, and is held to that.
install_import_hook("hope_jax", "typed.checked")
jax.config.update("jax_num_cpu_devices", 8)
# Tracing makes many small objects that live: looking through them so often is a quarter of it.
gc.freeze()
gc.set_threshold(20_000, 10, 10)


@pytest.fixture
def x64():
    """Runs a test with 64-bit types, so that two forms can be told from their rounding."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)

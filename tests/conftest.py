"""Puts the tests on eight virtual CPU devices, and offers float64 to those that ask."""

import os
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little: without these a gradient of HOPE takes five times as long.
# The last is unknown to later versions, which end the process over it.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10.")
)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def x64():
    """Runs a test with 64-bit types, so that two forms can be told from their rounding."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)

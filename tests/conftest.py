"""Puts the tests on eight virtual CPU devices, and offers float64 to those that ask."""

import os
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little: without these a gradient of HOPE takes five times as long.
QUICK = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if version("jaxlib").startswith("0.10."):  # later ones end the process over an unknown flag
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK])

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def x64():
    """Runs a test with 64-bit types, so that two forms can be told from their rounding."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)

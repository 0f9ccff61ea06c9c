"""Optimizers as optax transforms: `import hope_jax.optimizers as hopt; tx = hopt.m3(1e-3)`."""

from hope_jax.optimizers.levels import LevelsConfig, every, levels, stretched
from hope_jax.optimizers.parameters import ParamInfo, describe
from hope_jax.optimizers.standard import AdamWConfig, MuonConfig, ScheduleConfig
from hope_jax.optimizers.table import OPTIMIZERS, OptimizerConfig, Rule

__all__ = [
    "OPTIMIZERS",
    "AdamWConfig",
    "LevelsConfig",
    "MuonConfig",
    "OptimizerConfig",
    "ParamInfo",
    "Rule",
    "ScheduleConfig",
    "describe",
    "every",
    "levels",
    "stretched",
]

"""Optimizers as optax transforms: `import hope_jax.optimizers as hopt; tx = hopt.m3(1e-3)`."""

from hope_jax.ops.linear import OBJECTIVES, linear
from hope_jax.optimizers.context import ContextSteeredConfig, context_steered, scale_by_context
from hope_jax.optimizers.delta import (
    DeltaMomentumConfig,
    GMConfig,
    delta_momentum,
    gm,
    scale_by_delta_momentum,
    scale_by_gm,
)
from hope_jax.optimizers.dgd import DGDConfig, GGDConfig, dgd, ggd, scale_by_proximal_step
from hope_jax.optimizers.dmgd import DMGDConfig, dmgd, scale_by_dmgd
from hope_jax.optimizers.levels import LevelsConfig, every, levels, stretched
from hope_jax.optimizers.m3 import (
    M3Config,
    M3PrintedConfig,
    m3,
    m3_printed,
    scale_by_m3,
    scale_by_m3_printed,
)
from hope_jax.optimizers.momentum import (
    FeatureMomentumConfig,
    OutputMomentumConfig,
    PreconditionedMomentumConfig,
    feature_momentum,
    orthogonalize,
    output_momentum,
    preconditioned_momentum,
    scale_by_feature_momentum,
    scale_by_output_momentum,
    scale_by_preconditioned_momentum,
)
from hope_jax.optimizers.parameters import ParamInfo, describe
from hope_jax.optimizers.regression import (
    AdamMemoryConfig,
    OuterMemoryConfig,
    adam_memory,
    outer_memory,
    scale_by_adam_memory,
    scale_by_outer_memory,
)
from hope_jax.optimizers.standard import (
    AdamWConfig,
    AdEMAMixConfig,
    LionConfig,
    MuonConfig,
    ScheduleConfig,
    SGDConfig,
)
from hope_jax.optimizers.state import load_state, save_state
from hope_jax.optimizers.table import OPTIMIZERS, OptimizerConfig, Rule

__all__ = [
    "OBJECTIVES",
    "OPTIMIZERS",
    "AdEMAMixConfig",
    "AdamMemoryConfig",
    "AdamWConfig",
    "ContextSteeredConfig",
    "DGDConfig",
    "DMGDConfig",
    "DeltaMomentumConfig",
    "FeatureMomentumConfig",
    "GGDConfig",
    "GMConfig",
    "LevelsConfig",
    "LionConfig",
    "M3Config",
    "M3PrintedConfig",
    "MuonConfig",
    "OptimizerConfig",
    "OuterMemoryConfig",
    "OutputMomentumConfig",
    "ParamInfo",
    "PreconditionedMomentumConfig",
    "Rule",
    "SGDConfig",
    "ScheduleConfig",
    "adam_memory",
    "context_steered",
    "delta_momentum",
    "describe",
    "dgd",
    "dmgd",
    "every",
    "feature_momentum",
    "ggd",
    "gm",
    "levels",
    "linear",
    "load_state",
    "m3",
    "m3_printed",
    "orthogonalize",
    "outer_memory",
    "output_momentum",
    "preconditioned_momentum",
    "save_state",
    "scale_by_adam_memory",
    "scale_by_context",
    "scale_by_delta_momentum",
    "scale_by_dmgd",
    "scale_by_feature_momentum",
    "scale_by_gm",
    "scale_by_m3",
    "scale_by_m3_printed",
    "scale_by_outer_memory",
    "scale_by_output_momentum",
    "scale_by_preconditioned_momentum",
    "scale_by_proximal_step",
    "stretched",
]

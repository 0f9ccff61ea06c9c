"""The table of optimizers, and the config that puts schedule, clipping and clock around one."""

from dataclasses import dataclass, field

import optax
from jaxtyping import ArrayLike, PyTree

from hope_jax.optimizers.context import ContextSteeredConfig
from hope_jax.optimizers.delta import DeltaMomentumConfig, GMConfig
from hope_jax.optimizers.dgd import DGDConfig, GGDConfig
from hope_jax.optimizers.dmgd import DMGDConfig
from hope_jax.optimizers.levels import LevelsConfig, levels, stretched
from hope_jax.optimizers.m3 import M3Config, M3PrintedConfig
from hope_jax.optimizers.momentum import (
    FeatureMomentumConfig,
    OutputMomentumConfig,
    PreconditionedMomentumConfig,
)
from hope_jax.optimizers.parameters import ParamInfo
from hope_jax.optimizers.regression import AdamMemoryConfig, OuterMemoryConfig
from hope_jax.optimizers.standard import (
    AdamWConfig,
    AdEMAMixConfig,
    LionConfig,
    MuonConfig,
    ScheduleConfig,
    SGDConfig,
    check_weight,
)

Rule = (
    AdamWConfig
    | MuonConfig
    | SGDConfig
    | LionConfig
    | AdEMAMixConfig
    | DGDConfig
    | GGDConfig
    | PreconditionedMomentumConfig
    | FeatureMomentumConfig
    | OutputMomentumConfig
    | DeltaMomentumConfig
    | GMConfig
    | DMGDConfig
    | AdamMemoryConfig
    | OuterMemoryConfig
    | ContextSteeredConfig
    | M3Config
    | M3PrintedConfig
)

OPTIMIZERS: dict[str, type[Rule]] = {
    "adamw": AdamWConfig,
    "muon": MuonConfig,
    "sgd": SGDConfig,
    "lion": LionConfig,
    "ademamix": AdEMAMixConfig,
    "dgd": DGDConfig,
    "ggd": GGDConfig,
    "preconditioned_momentum": PreconditionedMomentumConfig,
    "feature_momentum": FeatureMomentumConfig,
    "output_momentum": OutputMomentumConfig,
    "delta_momentum": DeltaMomentumConfig,
    "gm": GMConfig,
    "dmgd": DMGDConfig,
    "adam_memory": AdamMemoryConfig,
    "outer_memory": OuterMemoryConfig,
    "context_steered": ContextSteeredConfig,
    "m3": M3Config,
    "m3_printed": M3PrintedConfig,
}
"""Every optimizer by the `kind` of its config.

Of those that optax has, two are used around this table and not from it: Sophia, whose update needs
the loss as a function, and schedule-free, whose parameters are not those to evaluate. As
`optax.contrib.schedule_free` does, whatever wraps a transform wraps the aliases of this package.
"""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How the slow weights are trained.

    Attributes:
      rule: The optimizer, one of `OPTIMIZERS`.
      learning_rate: The highest of the schedule.
      schedule: How the rate runs.
      weight_decay: Times the learning rate; on matrices alone.
      clip: Gradients of a larger global norm are scaled down to it; None leaves them.
      levels: How often the levels of a continuum memory move; None moves all at every step.
    """

    rule: Rule = field(default_factory=AdamWConfig)
    learning_rate: float = 1e-3
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    weight_decay: float = 0.1
    clip: float | None = 1.0
    levels: LevelsConfig | None = None

    def __post_init__(self):
        check_weight({"learning_rate": self.learning_rate, "weight_decay": self.weight_decay})
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip must be above 0, or null for none, got {self.clip}")

    def build(
        self,
        steps: int,
        info: PyTree[ParamInfo] | None = None,
        *,
        learning_rate: ArrayLike | None = None,
    ) -> optax.GradientTransformation:
        """Makes the optimizer of a run.

        Args:
          steps: Steps of the whole run, for the schedule.
          info: What `parameters.describe` read from the model's parameters; None goes by the
            number of axes.
          learning_rate: In place of the config's; may be traced, so that one program serves many.
        """
        peak = self.learning_rate if learning_rate is None else learning_rate
        schedule = self.schedule.build(peak, steps)

        def rule(period: int) -> optax.GradientTransformation:
            rate = stretched(schedule, period)
            return self.rule.build(rate, weight_decay=self.weight_decay, info=info)

        clip = optax.identity() if self.clip is None else optax.clip_by_global_norm(self.clip)
        if self.levels is None:
            return optax.chain(clip, rule(1))
        return optax.chain(
            clip, levels(rule, self.levels.periods, reduce=self.levels.reduce, info=info)
        )

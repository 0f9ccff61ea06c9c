"""The optimizers that optax has, and the learning-rate schedules around every optimizer."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, ArrayLike, PyTree
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from hope_jax.optimizers.parameters import ParamInfo, decay_mask, matrix_labels, with_info

StateDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate runs over the steps of training.

    Attributes:
      kind: What follows the warmup: "cosine" falls all the way, "wsd" stays and falls in a line at
        the end, "constant" stays.
      warmup: Share of all steps in which the rate rises in a line, from the first step on.
      decay: Share of all steps in which "wsd" falls.
      floor: The last rate as a share of the highest.
    """

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: float = 0.05
    decay: float = 0.2
    floor: float = 0.1

    def __post_init__(self):
        if self.kind not in ("cosine", "wsd", "constant"):
            raise ValueError(f"kind must be cosine, wsd or constant, got {self.kind!r}")
        for name in ("warmup", "decay", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.kind == "wsd" and not 0 < self.decay <= 1 - self.warmup:
            raise ValueError(
                f"decay must lie in (0, 1 - warmup={1 - self.warmup:g}], got {self.decay}"
            )

    def build(self, peak: ArrayLike, steps: int) -> optax.Schedule:
        """Makes the schedule.

        Args:
          peak: The highest rate.
          steps: Steps of the whole run.

        Returns:
          The rate of step 0, 1, ..., never zero before the last step.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        rising = round(self.warmup * steps)

        def schedule(step):
            rise = jnp.minimum((step + 1) / (rising + 1), 1)
            if self.kind == "cosine":
                done = jnp.clip((step - rising) / max(steps - rising, 1), 0, 1)
                left = (1 + jnp.cos(jnp.pi * done)) / 2
            elif self.kind == "wsd":
                left = jnp.clip((steps - step) / (self.decay * steps), 0, 1)
            else:
                left = 1.0
            return peak * rise * (self.floor + (1 - self.floor) * left)

        return schedule


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """Adam with decoupled weight decay.

    Attributes:
      b1: Share of the first moment that survives a step.
      b2: Share of the second moment that survives a step.
      eps: Added to the root of the second moment.
      state_dtype: Of the first moment; None for the parameters' own.
    """

    kind: Literal["adamw"] = "adamw"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    state_dtype: StateDtype | None = None

    def __post_init__(self):
        check_shares({"b1": self.b1, "b2": self.b2})
        check_positive({"eps": self.eps})

    def build(
        self,
        learning_rate: optax.ScalarOrSchedule,
        *,
        weight_decay: float = 0.0,
        info: PyTree[ParamInfo] | None = None,
    ) -> optax.GradientTransformation:
        """Makes the optimizer, see `descend` for the arguments."""
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.state_dtype)
        return optax.chain(adam, descend(learning_rate, weight_decay=weight_decay, info=info))


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Momentum orthogonalised by Newton-Schulz; what is no matrix falls to AdamW.

    Attributes:
      momentum: Share of the momentum that survives a step.
      nesterov: Whether the gradient is weighed in once more.
      steps: Of Newton-Schulz.
      rms: Root mean square of a matrix's update before the learning rate. 0.2 is what AdamW has, so
        that one learning rate serves matrices and the rest.
      b1: Of the AdamW for the rest.
      b2: Of the AdamW for the rest.
      eps: Of the AdamW for the rest.
      state_dtype: Of momentum and first moment; None for the parameters' own.

    References:
      Jordan, "Muon", 2024. Liu et al., "Muon is scalable for LLM training", 2025.
    """

    kind: Literal["muon"] = "muon"
    momentum: float = 0.95
    nesterov: bool = True
    steps: int = 5
    rms: float = 0.2
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    state_dtype: StateDtype | None = None

    def __post_init__(self):
        check_shares({"momentum": self.momentum, "b1": self.b1, "b2": self.b2})
        check_positive({"steps": self.steps, "rms": self.rms, "eps": self.eps})

    def build(
        self,
        learning_rate: optax.ScalarOrSchedule,
        *,
        weight_decay: float = 0.0,
        info: PyTree[ParamInfo] | None = None,
    ) -> optax.GradientTransformation:
        """Makes the optimizer, see `descend` for the arguments."""

        def numbers(tree: PyTree) -> PyTree[MuonDimensionNumbers]:
            outward = MuonDimensionNumbers(-2, -1), MuonDimensionNumbers(-1, -2)
            return with_info(lambda i, _: outward[i.role == "memory_init"], tree, info=info)

        matrix = optax.chain(
            scale_by_muon(
                ns_steps=self.steps,
                beta=self.momentum,
                mu_dtype=self.state_dtype,
                nesterov=self.nesterov,
                weight_dimension_numbers=numbers,
            ),
            scale_by_shape(self.rms),
        )
        whole = with_adam_for_the_rest(
            matrix,
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            state_dtype=self.state_dtype,
            info=info,
        )
        return optax.chain(whole, descend(learning_rate, weight_decay=weight_decay, info=info))


@dataclass(frozen=True, kw_only=True)
class SGDConfig:
    """Gradient descent, with momentum or without.

    Attributes:
      momentum: Share of the momentum that survives a step; 0 for none.
      nesterov: Whether the gradient is weighed in once more.
      state_dtype: Of the momentum; None for the parameters' own.
    """

    kind: Literal["sgd"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    state_dtype: StateDtype | None = None

    def __post_init__(self):
        check_shares({"momentum": self.momentum})

    def build(
        self,
        learning_rate: optax.ScalarOrSchedule,
        *,
        weight_decay: float = 0.0,
        info: PyTree[ParamInfo] | None = None,
    ) -> optax.GradientTransformation:
        """Makes the optimizer, see `descend` for the arguments."""
        momentum = optax.identity()
        if self.momentum > 0:
            momentum = optax.trace(self.momentum, self.nesterov, self.state_dtype)
        return optax.chain(momentum, descend(learning_rate, weight_decay=weight_decay, info=info))


@dataclass(frozen=True, kw_only=True)
class LionConfig:
    """Lion: the sign of a momentum.

    Attributes:
      b1: Share of the momentum in the sign.
      b2: Share of the momentum that survives a step.
      state_dtype: Of the momentum; None for the parameters' own.
    """

    kind: Literal["lion"] = "lion"
    b1: float = 0.9
    b2: float = 0.99
    state_dtype: StateDtype | None = None

    def __post_init__(self):
        check_shares({"b1": self.b1, "b2": self.b2})

    def build(
        self,
        learning_rate: optax.ScalarOrSchedule,
        *,
        weight_decay: float = 0.0,
        info: PyTree[ParamInfo] | None = None,
    ) -> optax.GradientTransformation:
        """Makes the optimizer, see `descend` for the arguments."""
        lion = optax.scale_by_lion(self.b1, self.b2, mu_dtype=self.state_dtype)
        return optax.chain(lion, descend(learning_rate, weight_decay=weight_decay, info=info))


@dataclass(frozen=True, kw_only=True)
class AdEMAMixConfig:
    """Adam with a second, slow momentum.

    Attributes:
      b1: Share of the fast momentum that survives a step.
      b2: Share of the second moment that survives a step.
      b3: Share of the slow momentum that survives a step.
      slow: Weight of the slow momentum.
      eps: Added to the root of the second moment.
      state_dtype: Of the momenta; None for the parameters' own.
    """

    kind: Literal["ademamix"] = "ademamix"
    b1: float = 0.9
    b2: float = 0.95
    b3: float = 0.999
    slow: float = 5.0
    eps: float = 1e-8
    state_dtype: StateDtype | None = None

    def __post_init__(self):
        check_shares({"b1": self.b1, "b2": self.b2, "b3": self.b3})
        check_positive({"eps": self.eps})
        check_weight({"slow": self.slow})

    def build(
        self,
        learning_rate: optax.ScalarOrSchedule,
        *,
        weight_decay: float = 0.0,
        info: PyTree[ParamInfo] | None = None,
    ) -> optax.GradientTransformation:
        """Makes the optimizer, see `descend` for the arguments."""
        mix = optax.contrib.scale_by_ademamix(
            self.b1, self.b2, self.b3, self.slow, eps=self.eps, mu_dtype=self.state_dtype
        )
        return optax.chain(mix, descend(learning_rate, weight_decay=weight_decay, info=info))


def with_adam_for_the_rest(
    matrix: optax.GradientTransformation,
    *,
    b1: float = AdamWConfig.b1,
    b2: float = AdamWConfig.b2,
    eps: float = AdamWConfig.eps,
    state_dtype: StateDtype | None,
    info: PyTree[ParamInfo] | None,
) -> optax.GradientTransformation:
    """Gives matrices to a transform and all other parameters to Adam, as `parameters` says."""
    rest = optax.scale_by_adam(b1, b2, eps, mu_dtype=state_dtype)
    return optax.partition({"matrix": matrix, "rest": rest}, lambda tree: matrix_labels(tree, info))


def scale_by_shape(rms: float) -> optax.GradientTransformation:
    """Gives orthogonalised matrices one root mean square, whatever their shape.

    A matrix with singular values 1 has `1 / sqrt(max(in, out))`; it is brought to `rms`.

    References:
      Liu et al., "Muon is scalable for LLM training", 2025.
    """

    def scale(x: Array) -> Array:
        return x * (rms * max(x.shape[-2:]) ** 0.5)

    return optax.stateless(lambda updates, _: jax.tree.map(scale, updates))


def descend(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    info: PyTree[ParamInfo] | None = None,
) -> optax.GradientTransformation:
    """The end of every optimizer's chain: weight decay, and the one step downhill.

    Transforms named `scale_by_...` return what points uphill, as gradients do; this is the only
    place that turns it around.

    Args:
      learning_rate: A number or a schedule.
      weight_decay: Times the learning rate; acts on matrices alone, see `parameters`.
      info: Metadata of the parameters; None goes by the number of axes.

    Raises:
      ValueError: A rate is negative; when initialised, a parameter is not made of real numbers.
    """
    check_weight({"weight_decay": weight_decay})
    if isinstance(learning_rate, float | int):
        check_weight({"learning_rate": learning_rate})
    scale = optax.scale_by_learning_rate(learning_rate)

    def init(params: optax.Params) -> optax.OptState:
        _check_real(params)
        return scale.init(params)

    step = optax.GradientTransformation(init, scale.update)
    if weight_decay == 0:
        return step
    decay = optax.add_decayed_weights(weight_decay, lambda tree: decay_mask(tree, info))
    return optax.chain(decay, step)


def settings(rule: Any) -> dict[str, Any]:
    """The settings of a rule, as the keywords of the alias that it builds."""
    return {field.name: getattr(rule, field.name) for field in fields(rule) if field.name != "kind"}


def widened(x: Array) -> jnp.dtype:
    """The dtype that a number is computed in: float32, or its own where that holds more."""
    return jnp.promote_types(x.dtype, jnp.float32)


def zeros(params: optax.Params, dtype: StateDtype | None) -> optax.Params:
    """Buffers of their own, shaped as the parameters; of their dtype where none is given."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype or p.dtype), params)


def wide_zeros(params: optax.Params) -> optax.Params:
    """As `zeros`, in the dtype that numbers are computed in."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=widened(p)), params)


def check_shares(shares: Mapping[str, float | int]) -> None:
    """Raises ValueError unless every number lies in [0, 1)."""
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {share}")


def check_positive(numbers: Mapping[str, float | int]) -> None:
    """Raises ValueError unless every number is above 0, whole ones at least 1."""
    for name, number in numbers.items():
        if not number > 0:
            least = "at least 1" if isinstance(number, int) else "above 0"
            raise ValueError(f"{name} must be {least}, got {number}")


def check_weight(numbers: Mapping[str, float | int]) -> None:
    """Raises ValueError unless every number is at least 0."""
    for name, number in numbers.items():
        if not number >= 0:
            raise ValueError(f"{name} must be at least 0, got {number}")


def _check_real(params: optax.Params) -> None:
    """Refuses whole numbers, as the indices of sparse arrays are, and complex ones."""
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"parameters must be dense arrays of real numbers, got {x.dtype} for "
                f"{jax.tree_util.keystr(path)}"
            )


def divide(x: Array, by: Array | float) -> Array:
    """`x / by`, and `x` where `by` is 0 or below."""
    return x / jnp.where(by > 0, by, 1)

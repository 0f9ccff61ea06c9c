"""Lets a memory of gradients shape what an optimizer is given: the context-steered wrapper."""

from dataclasses import dataclass
from typing import Literal

import optax
from jaxtyping import PyTree

from hope_jax.optimizers.parameters import ParamInfo
from hope_jax.optimizers.regression import scale_by_outer_memory
from hope_jax.optimizers.standard import AdamWConfig, StateDtype, check_shares, descend


@dataclass(frozen=True, kw_only=True)
class ContextSteeredConfig:
    """Momentum of gradients that a memory has shaped, see `context_steered`.

    Attributes:
      context: The memory: "none", "adagrad", "adam", "outer".
      decay: Share of the momentum that survives a step.
      b2: Share of "adam"'s memory that survives a step.
      refresh: Steps between two inversions of "outer".
      state_dtype: Of the momentum; None for the parameters' own.
    """

    kind: Literal["context_steered"] = "context_steered"
    context: Literal["none", "adagrad", "adam", "outer"] = "adam"
    decay: float = 0.9
    b2: float = 0.95
    refresh: int = 1
    state_dtype: StateDtype | None = None

    def __post_init__(self):
        self.build(0.0)

    def build(
        self,
        learning_rate: optax.ScalarOrSchedule,
        *,
        weight_decay: float = 0.0,
        info: PyTree[ParamInfo] | None = None,
    ) -> optax.GradientTransformation:
        """Makes the optimizer, see `descend` for the arguments."""
        check_shares({"decay": self.decay})
        momentum = optax.chain(
            optax.trace(self.decay, accumulator_dtype=self.state_dtype),
            descend(learning_rate, weight_decay=weight_decay, info=info),
        )
        return context_steered(momentum, self.context, b2=self.b2, refresh=self.refresh, info=info)


def scale_by_context(
    context: str = ContextSteeredConfig.context,
    *,
    b2: float = ContextSteeredConfig.b2,
    refresh: int = ContextSteeredConfig.refresh,
    info: PyTree[ParamInfo] | None = None,
) -> optax.GradientTransformation:
    """Reads the gradient through a memory of the gradients so far.

        none     g
        adagrad  g / sqrt(H),          H <- H + g^2
        adam     g / (sqrt(H) + eps),  H <- b2 H + (1 - b2) g^2
        outer    g H^(-1/2),           H <- H + g^T g

    Args:
      context: One of these.
      b2: Of "adam".
      refresh: Of "outer", see `scale_by_outer_memory`.
      info: See `descend`.

    References:
      Behrouz et al., "Nested Learning", 2025, sections 4.2-4.5 and appendix C.
    """
    check_shares({"b2": b2})
    contexts = {
        "none": optax.identity(),
        "adagrad": optax.scale_by_rss(0.0, 1e-30),
        "adam": optax.scale_by_rms(b2, AdamWConfig.eps, eps_in_sqrt=False, bias_correction=True),
        "outer": scale_by_outer_memory(b1=0.0, refresh=refresh, info=info),
    }
    if context not in contexts:
        raise ValueError(f"context must be one of {', '.join(contexts)}, got {context!r}")
    return contexts[context]


def context_steered(
    inner: optax.GradientTransformation,
    context: str = ContextSteeredConfig.context,
    *,
    b2: float = ContextSteeredConfig.b2,
    refresh: int = ContextSteeredConfig.refresh,
    info: PyTree[ParamInfo] | None = None,
) -> optax.GradientTransformation:
    """Any optimizer, on what a memory makes of the gradients; see `scale_by_context`."""
    return optax.chain(scale_by_context(context, b2=b2, refresh=refresh, info=info), inner)

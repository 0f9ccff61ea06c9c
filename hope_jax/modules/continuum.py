"""The Continuum Memory System: a chain of feed-forward memories, each with its own pace."""

from dataclasses import dataclass
from math import sqrt
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from hope_jax.modules.layers import RMSNorm, normal, parameter
from hope_jax.shapes import Activations
from hope_jax.sharding import constrain

ACTIVATIONS = {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu}


@dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """One level: `W1 s(W2 x)`, or `W1 (s(W2 x) * W3 x)` where it is gated.

    Attributes:
      hidden: Hidden units.
      activation: s.
      gated: Whether a second projection multiplies the hidden units (SwiGLU with silu).
    """

    hidden: int
    activation: Literal["gelu", "relu", "silu"] = "silu"
    gated: bool = False

    def __post_init__(self):
        if self.hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {self.hidden}")


@dataclass(frozen=True, kw_only=True)
class ContinuumConfig:
    """Levels, fastest first.

    Attributes:
      variant: "sequential" chains the levels (eqs. 70, 73); "independent" lets each read the same
        input and sums what they say with learned softmax weights (eq. 74).
      levels: At least one. One level is the feed-forward network of a transformer.
    """

    variant: Literal["sequential", "independent"] = "sequential"
    levels: tuple[LevelConfig, ...]

    def __post_init__(self):
        if not self.levels:
            raise ValueError("levels must name at least one level, got none")

    def build(
        self, width: int, *, depth: int, epsilon: float, key: PRNGKeyArray
    ) -> "ContinuumMemory":
        """Makes the layer for a model of `width` and `depth` layers; `epsilon` is its norms'."""
        return ContinuumMemory(self, width, depth=depth, epsilon=epsilon, key=key)


class Level(nnx.Module):
    """A memory made of a feed-forward network: what it stores is in its weights."""

    def __init__(
        self,
        config: LevelConfig,
        width: int,
        *,
        index: int,
        branches: int,
        epsilon: float,
        key: PRNGKeyArray,
    ):
        self.activation = config.activation
        into, out = jax.random.split(key)
        count = 2 if config.gated else 1
        self.norm = RMSNorm(width, epsilon=epsilon)
        self.up = parameter(
            normal(into, (count, width, config.hidden), 1 / sqrt(width)),
            (None, "embed", "mlp"),
            "matrix",
        )
        self.down = parameter(
            normal(out, (config.hidden, width), 1 / sqrt(branches * config.hidden)),
            ("mlp", "embed"),
            "matrix",
        )
        for weight in (self.norm.scale, self.up, self.down):
            weight.set_metadata(level=index)

    def __call__(self, x: Activations) -> Activations:
        """Returns what the level recalls for each token."""
        hidden = jnp.einsum("BTD,PDF->BTPF", self.norm(x), self.up[...].astype(x.dtype))
        hidden = constrain(hidden, ("batch", "time", None, "mlp"))
        active = ACTIVATIONS[self.activation](hidden[:, :, 0])
        if hidden.shape[2] == 2:
            active = active * hidden[:, :, 1]
        return active @ self.down[...].astype(x.dtype)


class ContinuumMemory(nnx.Module):
    """Feed-forward memories at several paces, residual and normalised on the way in.

    References:
      Behrouz et al., "Nested Learning", 2025, section 7.1.
    """

    def __init__(
        self,
        config: ContinuumConfig,
        width: int,
        *,
        depth: int,
        epsilon: float,
        key: PRNGKeyArray,
    ):
        self.config = config
        count = len(config.levels)
        self.levels = nnx.List(
            Level(
                level,
                width,
                index=index,
                branches=2 * depth * count,
                epsilon=epsilon,
                key=one,
            )
            for index, (level, one) in enumerate(
                zip(config.levels, jax.random.split(key, count), strict=True)
            )
        )
        if config.variant == "independent":
            self.mixture = parameter(jnp.zeros(count), (None,), "vector")

    def __call__(self, x: Activations) -> Activations:
        """Adds what the levels recall to `x`."""
        if self.config.variant == "sequential":
            for level in self.levels:
                x = x + level(x)
        else:
            weights = jax.nn.softmax(self.mixture[...]).astype(x.dtype) * len(self.levels)
            x = x + sum(
                weight * level(x) for weight, level in zip(weights, self.levels, strict=True)
            )
        return constrain(x, ("batch", "time", "embed_out"))

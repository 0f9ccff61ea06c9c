"""Softmax attention as a sequence layer."""

from dataclasses import dataclass
from math import tau
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from hope_jax.modules.frame import head_width
from hope_jax.modules.layers import Output, Projections, join_heads
from hope_jax.modules.split import for_attention
from hope_jax.ops.attention import (
    AttentionMemory,
    empty_memory,
    positions_after,
    sliding_attention,
)
from hope_jax.ops.rotary import Frequencies, rotary_angles, rotary_projections
from hope_jax.shapes import Activations, Starts


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Rotary embedding for a longer context: positions are divided by a factor.

    Attributes:
      factor: By which the context grows.

    References:
      Chen et al., "Extending Context Window of Large Language Models via Positional
      Interpolation", 2023.
    """

    kind: Literal["linear"] = "linear"
    factor: float

    def __post_init__(self):
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1, got {self.factor}")

    def stretch(self, frequency: Frequencies) -> Frequencies:
        """Returns the frequencies, divided."""
        return frequency / self.factor


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Rotary embedding for a longer context: only slow pairs of features are slowed down.

    A pair that turns more than `high_frequency` times in the original context stays as it is, one
    that turns less than `low_frequency` times is divided by the factor, and those between are
    blended in proportion to their turns.

    Attributes:
      factor: By which the context grows.
      low_frequency: Turns in the original context.
      high_frequency: Turns in the original context.
      original_window: Tokens of the context before.

    References:
      Grattafiori et al., "The Llama 3 Herd of Models", 2024.
    """

    kind: Literal["llama3"] = "llama3"
    factor: float = 8.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_window: int = 8192

    def __post_init__(self):
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1, got {self.factor}")
        if not 0 < self.low_frequency < self.high_frequency:
            raise ValueError(
                "low_frequency must lie between 0 and high_frequency, "
                f"got {self.low_frequency} and {self.high_frequency}"
            )
        if self.original_window < 1:
            raise ValueError(f"original_window must be at least 1, got {self.original_window}")

    def stretch(self, frequency: Frequencies) -> Frequencies:
        """Returns the frequencies, divided where they are slow."""
        turns = self.original_window * frequency / tau
        fast = (turns - self.low_frequency) / (self.high_frequency - self.low_frequency)
        fast = np.clip(fast, 0.0, 1.0)
        return fast * frequency + (1 - fast) * frequency / self.factor


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Rotary softmax attention over a sliding window.

    Attributes:
      heads: Query heads.
      head_width: Features of each head; None for an equal share of the model's width.
      groups: Heads of keys and values, each shared by `heads / groups` query heads (GQA); None for
        as many as heads.
      window: How many tokens a token sees; a window of the training length is full attention.
      rotary_base: The longest wavelength of the rotary embedding, over 2 pi.
      rotary_scaling: How that embedding was stretched to a longer context; null if it was not.
    """

    kind: Literal["attention"] = "attention"
    heads: int = 4
    head_width: int | None = None
    groups: int | None = None
    window: int = 4096
    rotary_base: float = 10_000.0
    rotary_scaling: LinearScaling | Llama3Scaling | None = None

    def __post_init__(self):
        if self.heads < 1 or self.window < 1:
            raise ValueError(
                f"heads and window must be at least 1, got {self.heads} and {self.window}"
            )
        if self.head_width is not None and (self.head_width < 2 or self.head_width % 2):
            raise ValueError(
                f"head_width must be even, as features turn in pairs, got {self.head_width}"
            )
        if self.rotary_base <= 1:
            raise ValueError(f"rotary_base must be above 1, got {self.rotary_base}")
        if self.groups is not None and (self.groups < 1 or self.heads % self.groups):
            raise ValueError(f"groups must divide heads={self.heads}, got {self.groups}")

    def build(self, width: int, *, depth: int, key: PRNGKeyArray) -> "Attention":
        """Makes the layer for a model of `width` and `depth` layers."""
        return Attention(self, width, depth=depth, key=key)

    def flops(self, width: int, context: int) -> float:
        """FLOPs a token beside the projections: scores and sums over half the context's window."""
        seen = min(context, self.window)
        inner = self.heads * head_width(width, self.heads, self.head_width)
        return 4 * inner * (seen / 2 if context <= self.window else seen)


class Attention(nnx.Module):
    """Each token reads the values of earlier tokens whose keys resemble its query."""

    def __init__(self, config: AttentionConfig, width: int, *, depth: int, key: PRNGKeyArray):
        self.config = config
        groups = config.groups or config.heads
        head = head_width(width, config.heads, config.head_width)
        q, kv, out = jax.random.split(key, 3)
        self.query = Projections(1, width, config.heads * head, key=q)
        self.key_value = Projections(2, width, groups * head, key=kv)
        self.out = Output(config.heads * head, width, depth=depth, key=out)

    def initial_memory(self, batch: int, dtype: jnp.dtype) -> AttentionMemory:
        """What `memory=None` means."""
        groups = self.config.groups or self.config.heads
        head = self.key_value.weight.shape[-1] // groups
        return empty_memory(batch, self.config.window, groups, head, dtype)

    def __call__(
        self, x: Activations, memory: AttentionMemory | None = None, starts: Starts | None = None
    ) -> tuple[Activations, AttentionMemory]:
        """Returns what each token read, and the memory to go on with."""
        config = self.config
        scaling = config.rotary_scaling
        query, both = self.query.weight[...], self.key_value.weight[...]
        angle = rotary_angles(
            positions_after(memory, x.shape[1]),
            query.shape[-1] // config.heads,
            config.rotary_base,
            None if scaling is None else scaling.stretch,
        )
        projected = rotary_projections(x, query[0], both, angle, objective=self.query.learns_by)
        q, k, v = for_attention(*projected)
        y, memory = sliding_attention(q, k, v, memory, starts, window=config.window)
        return self.out(join_heads(y)), memory

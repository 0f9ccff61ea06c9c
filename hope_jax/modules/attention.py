"""Softmax attention as a sequence layer."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from hope_jax.modules.layers import Output, Projections, join_heads, split_heads
from hope_jax.ops.attention import AttentionMemory, empty_memory, sliding_attention
from hope_jax.shapes import Activations, Starts


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Rotary softmax attention over a sliding window.

    Attributes:
      heads: Query heads; they divide the model's width.
      groups: Heads that share keys and values (GQA); None for as many as heads.
      window: How many tokens a token sees; a window of the training length is full attention.
      rotary_base: The longest wavelength of the rotary embedding, over 2 pi.
    """

    kind: Literal["attention"] = "attention"
    heads: int = 4
    groups: int | None = None
    window: int = 4096
    rotary_base: float = 10_000.0

    def __post_init__(self):
        if self.heads < 1 or self.window < 1:
            raise ValueError(
                f"heads and window must be at least 1, got {self.heads} and {self.window}"
            )
        if self.groups is not None and (self.groups < 1 or self.heads % self.groups):
            raise ValueError(f"groups must divide heads={self.heads}, got {self.groups}")

    def build(self, width: int, *, depth: int, key: PRNGKeyArray) -> "Attention":
        """Makes the layer for a model of `width` and `depth` layers."""
        return Attention(self, width, depth=depth, key=key)

    def flops(self, width: int, context: int) -> float:
        """FLOPs a token beside the projections: scores and sums over half the context's window."""
        seen = min(context, self.window)
        return 4 * width * (seen / 2 if context <= self.window else seen)


class Attention(nnx.Module):
    """Each token reads the values of earlier tokens whose keys resemble its query."""

    def __init__(self, config: AttentionConfig, width: int, *, depth: int, key: PRNGKeyArray):
        self.config = config
        groups = config.groups or config.heads
        head = width // config.heads
        q, kv, out = jax.random.split(key, 3)
        self.query = Projections(1, width, width, key=q)
        self.key_value = Projections(2, width, groups * head, key=kv)
        self.out = Output(width, width, depth=depth, key=out)

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
        groups = config.groups or config.heads
        (q,) = self.query(x)
        k, v = self.key_value(x)
        q = split_heads(q, config.heads)
        k, v = split_heads(k, groups), split_heads(v, groups)
        y, memory = sliding_attention(
            q, k, v, memory, starts, window=config.window, rotary_base=config.rotary_base
        )
        return self.out(join_heads(y)), memory

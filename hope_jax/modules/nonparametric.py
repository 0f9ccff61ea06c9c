"""A memory without a matrix: the pairs themselves are stored, the last of them, and looked up."""

from dataclasses import dataclass
from math import log
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from hope_jax.modules.frame import Frame, head_width
from hope_jax.modules.layers import parameter
from hope_jax.modules.memory import unit
from hope_jax.ops.attention import AttentionMemory, empty_memory, sliding_attention
from hope_jax.shapes import Activations, Starts


@dataclass(frozen=True, kw_only=True)
class NonparametricConfig:
    """Pairs of keys and values in a bounded store, read by a softmax over the keys.

    Attributes:
      heads: Stores.
      head_width: Features of a head; None for width / heads.
      convolution: Tokens mixed by the causal convolution in front.
      window: Pairs that are stored; a new one takes the oldest one's place.
      sharpness: What the cosine of query and key is multiplied by before the softmax, at first.
    """

    kind: Literal["nonparametric"] = "nonparametric"
    heads: int = 4
    head_width: int | None = None
    convolution: int = 4
    window: int = 512
    sharpness: float = 8.0

    def __post_init__(self):
        for name in ("heads", "convolution", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sharpness <= 0:
            raise ValueError(f"sharpness must be above 0, got {self.sharpness}")
        if self.head_width is not None and (self.head_width < 2 or self.head_width % 2):
            raise ValueError(f"head_width must be even, got {self.head_width}")

    def build(self, width: int, *, depth: int, key: PRNGKeyArray) -> "NonparametricMemory":
        """Makes the layer for a model of `width` and `depth` layers."""
        return NonparametricMemory(self, width, depth=depth, key=key)

    def flops(self, width: int, context: int) -> float:
        """FLOPs a token beside the projections: scores and sums over half the context's window."""
        seen = min(context, self.window)
        inner = self.heads * head_width(width, self.heads, self.head_width)
        return 4 * inner * (seen / 2 if context <= self.window else seen)


class LayerMemory(NamedTuple):
    """What the layer carries from call to call.

    Attributes:
      convolution: The last inputs of the convolution.
      fast: The stored pairs.
    """

    convolution: Float[Array, "B P E"]
    fast: AttentionMemory


class NonparametricMemory(nnx.Module):
    """Answers a query with the mean of the stored values, weighted by how their keys resemble it.

        y_t = sum_s softmax_s(sharpness <q_t, k_s>) v_s,    s among the last `window` tokens

    That is kernel regression, which a matrix memory under the same loss approximates. Unlike
    attention it knows no positions: a pair is worth the same wherever it stands.

    References:
      Nadaraya, "On Estimating Regression", 1964; Watson, "Smooth Regression Analysis", 1964.
    """

    def __init__(self, config: NonparametricConfig, width: int, *, depth: int, key: PRNGKeyArray):
        self.config = config
        each = head_width(width, config.heads, config.head_width)
        self.frame = Frame(
            width,
            config.heads,
            each,
            inputs=("q", "k", "v"),
            gates={},
            convolution=config.convolution,
            depth=depth,
            key=key,
        )
        sharpness = np.full(config.heads, log(config.sharpness), np.float32)
        self.sharpness = parameter(jnp.asarray(sharpness), ("heads",), "vector")

    def initial_memory(self, batch: int, dtype: jnp.dtype) -> LayerMemory:
        """What `memory=None` means."""
        heads, each = self.frame.heads, self.frame.each
        past = jnp.zeros((batch, self.config.convolution - 1, 3 * heads * each), dtype)
        return LayerMemory(past, empty_memory(batch, self.config.window, heads, each, dtype))

    def __call__(
        self, x: Activations, memory: LayerMemory | None = None, starts: Starts | None = None
    ) -> tuple[Activations, LayerMemory]:
        """Returns what was recalled for each token, and the memory to go on with."""
        past, fast = (None, None) if memory is None else memory
        inputs, _, out_gate, past = self.frame.into(x, past, starts)
        q, k, v = unit(inputs["q"]), unit(inputs["k"]), inputs["v"]
        # The op divides by the root of the width, as attention does.
        scale = jnp.exp(self.sharpness[...])[:, None] * self.frame.each**0.5
        q = (q.astype(scale.dtype) * scale).astype(x.dtype)
        y, fast = sliding_attention(q, k, v, fast, starts, window=self.config.window)
        return self.frame.back(y, out_gate), LayerMemory(past, fast)

"""Titans' neural long-term memory (LMM) as a sequence layer."""

from dataclasses import dataclass
from math import sqrt
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from hope_jax.modules.frame import Frame, head_width, retention_bias
from hope_jax.modules.layers import normal, parameter
from hope_jax.modules.memory import unit
from hope_jax.modules.split import on_mesh
from hope_jax.ops.titans import TitansMemory, fresh_memory, titans
from hope_jax.shapes import Activations, Starts


@dataclass(frozen=True, kw_only=True)
class TitansConfig:
    """An MLP memory that learns by gradient descent with momentum and forgetting.

    Attributes:
      heads: Memories.
      head_width: Features of a head; None for width / heads.
      convolution: Tokens mixed by the causal convolution in front.
      expansion: Hidden units of the memory, as a multiple of the head's features.
      chunk: Tokens whose gradients are taken at the same state.
      form: The form of the op, "auto" for the fastest that fits.
    """

    kind: Literal["titans"] = "titans"
    heads: int = 4
    head_width: int | None = None
    convolution: int = 4
    expansion: int = 2
    chunk: int = 64
    form: str = "auto"

    def __post_init__(self):
        for name in ("heads", "convolution", "expansion", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def build(self, width: int, *, depth: int, key: PRNGKeyArray) -> "NeuralMemory":
        """Makes the layer for a model of `width` and `depth` layers."""
        return NeuralMemory(self, width, depth=depth, key=key)

    def flops(self, width: int, context: int) -> float:  # noqa: ARG002 (it does not matter here)
        """FLOPs a token beside the projections: forward, backward, write and read of the MLP."""
        each = head_width(width, self.heads, self.head_width)
        return self.heads * self.expansion * 20 * each * each


class LayerMemory(NamedTuple):
    """What the layer carries from call to call.

    Attributes:
      convolution: The last inputs of the convolution.
      fast: The memory's weights and their momentum.
    """

    convolution: Float[Array, "B P E"]
    fast: TitansMemory


class NeuralMemory(nnx.Module):
    """Slow projections around an MLP that memorises keys -> values while it reads.

    References:
      Behrouz et al., "Titans: Learning to Memorize at Test Time", 2025, section 3.
    """

    def __init__(self, config: TitansConfig, width: int, *, depth: int, key: PRNGKeyArray):
        self.config = config
        heads = config.heads
        each = head_width(width, heads, config.head_width)
        frame, one, two = jax.random.split(key, 3)
        zeros = np.zeros(heads, np.float32)
        self.frame = Frame(
            width,
            heads,
            each,
            inputs=("q", "k", "v"),
            gates={"retain": retention_bias(heads), "write": zeros, "momentum": zeros},
            convolution=config.convolution,
            depth=depth,
            key=frame,
        )
        hidden = config.expansion * each
        axes = ("heads", None, None)
        self.initial = nnx.List(
            [
                parameter(
                    normal(one, (heads, each, hidden), 1 / sqrt(hidden)), axes, "memory_init"
                ),
                parameter(normal(two, (heads, hidden, each), 1 / sqrt(each)), axes, "memory_init"),
            ]
        )

    def initial_memory(self, batch: int, dtype: jnp.dtype) -> LayerMemory:
        """What `memory=None` means."""
        inner = 3 * self.frame.heads * self.frame.each
        past = jnp.zeros((batch, self.config.convolution - 1, inner), dtype)
        return LayerMemory(past, fresh_memory(tuple(m[...] for m in self.initial), batch))

    def __call__(
        self, x: Activations, memory: LayerMemory | None = None, starts: Starts | None = None
    ) -> tuple[Activations, LayerMemory]:
        """Returns what was recalled for each token, and the memory to go on with."""
        past, fast = (None, None) if memory is None else memory
        inputs, gates, out_gate, past = self.frame.into(x, past, starts)

        def op(tokens, initial, fast, starts):
            inputs, gates = tokens
            return titans(
                unit(inputs["q"]),
                unit(inputs["k"]),
                inputs["v"],
                jax.nn.sigmoid(gates["retain"]),
                jax.nn.sigmoid(gates["write"]),
                jax.nn.sigmoid(gates["momentum"]),
                initial,
                fast,
                starts,
                chunk=self.config.chunk,
                form=self.config.form,
            )

        initial = tuple(matrix[...] for matrix in self.initial)
        y, fast = on_mesh(op, (inputs, gates), initial, fast, starts, fresh=fresh_memory)
        return self.frame.back(y, out_gate), LayerMemory(past, fast)

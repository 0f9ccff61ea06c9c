"""A matrix memory with slow projections as a sequence layer: FastKV and Gated DeltaNet."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from hope_jax.modules.frame import Frame, head_width, retention_bias
from hope_jax.modules.split import on_mesh
from hope_jax.ops.fastkv import FastKVMemory, empty_memory, fast_kv
from hope_jax.shapes import Activations, Starts


@dataclass(frozen=True, kw_only=True)
class AssociativeConfig:
    """FastKV: one matrix per head that learns keys -> values while it reads.

    Attributes:
      rule: How a token is written; "gated_delta" makes the layer Gated DeltaNet.
      feature_map: What keys and queries pass before they meet the memory.
      normalizer: Whether reads are divided by the sum of the keys' features.
      heads: Memories.
      head_width: Features of a head; None for width / heads.
      convolution: Tokens mixed by the causal convolution in front.
      chunk: Tokens computed in parallel; changes the cost, never the result.
      form: The form of the op, "auto" for the fastest that fits.
    """

    kind: Literal["associative"] = "associative"
    rule: Literal["hebbian", "delta", "gated_delta", "oja"] = "delta"
    feature_map: Literal["identity", "elu", "relu", "softmax"] = "identity"
    normalizer: bool = False
    heads: int = 4
    head_width: int | None = None
    convolution: int = 4
    chunk: int = 64
    form: str = "auto"

    def __post_init__(self):
        if min(self.heads, self.convolution, self.chunk) < 1:
            raise ValueError(
                "heads, convolution and chunk must be at least 1, got "
                f"{self.heads}, {self.convolution} and {self.chunk}"
            )

    def build(self, width: int, *, depth: int, key: PRNGKeyArray) -> "AssociativeMemory":
        """Makes the layer for a model of `width` and `depth` layers."""
        return AssociativeMemory(self, width, depth=depth, key=key)

    def flops(self, width: int, context: int) -> float:  # noqa: ARG002 (it does not matter here)
        """FLOPs a token beside the projections: recall, correct, write, read."""
        each = head_width(width, self.heads, self.head_width)
        return self.heads * 8 * each * each


class LayerMemory(NamedTuple):
    """What a matrix-memory layer carries from call to call.

    Attributes:
      convolution: The last inputs of the convolution.
      fast: The op's memory.
    """

    convolution: Float[Array, "B P E"]
    fast: FastKVMemory


class AssociativeMemory(nnx.Module):
    """Turns a sequence into keys, values and gates, and lets a rule remember it.

    The projections learn slowly and are parameters. The memory learns while it reads, so it
    is no attribute of this object: it comes in with the call and goes out with the result.
    """

    def __init__(self, config: AssociativeConfig, width: int, *, depth: int, key: PRNGKeyArray):
        self.config = config
        each = head_width(width, config.heads, config.head_width)
        bias = {"retain": retention_bias(config.heads), "write": np.zeros(config.heads, np.float32)}
        self.frame = Frame(
            width,
            config.heads,
            each,
            inputs=("q", "k", "v"),
            gates=bias,
            convolution=config.convolution,
            depth=depth,
            key=key,
        )

    def initial_memory(self, batch: int, dtype: jnp.dtype) -> LayerMemory:
        """What `memory=None` means."""
        heads, each = self.frame.heads, self.frame.each
        past = jnp.zeros((batch, self.config.convolution - 1, 3 * heads * each), dtype)
        return LayerMemory(
            past, empty_memory(batch, heads, each, each, normalizer=self.config.normalizer)
        )

    def __call__(
        self, x: Activations, memory: LayerMemory | None = None, starts: Starts | None = None
    ) -> tuple[Activations, LayerMemory]:
        """Returns what was recalled for each token, and the memory to go on with."""
        config = self.config
        past, fast = (None, None) if memory is None else memory
        inputs, gates, out_gate, past = self.frame.into(x, past, starts)

        def op(tokens, _, fast, starts):
            inputs, gates = tokens
            q, k = inputs["q"], inputs["k"]
            if config.feature_map == "identity":
                q, k = unit(q), unit(k)
            return fast_kv(
                q,
                k,
                inputs["v"],
                jax.nn.sigmoid(gates["retain"]),
                jax.nn.sigmoid(gates["write"]),
                fast,
                starts,
                rule=config.rule,
                feature_map=config.feature_map,
                normalizer=config.normalizer,
                chunk=config.chunk,
                form=config.form,
            )

        def fresh(heads, batch):
            each, normalizer = self.frame.each, config.normalizer
            return empty_memory(batch, heads.shape[0], each, each, normalizer=normalizer)

        def decay(tokens):
            return jax.nn.sigmoid(tokens[1]["retain"])

        y, fast = on_mesh(
            op,
            (inputs, gates),
            jnp.zeros(config.heads),
            fast,
            starts,
            fresh=fresh,
            decay=decay if config.rule == "hebbian" else None,
        )
        return self.frame.back(y, out_gate), LayerMemory(past, fast)


def unit(x: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
    """Scales the last axis to length one."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    length = jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return (wide * length).astype(x.dtype)

"""The frame around every matrix memory: projections in, short convolution, gated norm out."""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from hope_jax.modules.layers import (
    Convolution,
    Gates,
    Output,
    Projections,
    RMSNorm,
    split_heads,
)
from hope_jax.ops.norm import gated_norm
from hope_jax.shapes import Activations, Starts


def retention_bias(heads: int) -> Float[np.ndarray, " H"]:
    """Biases that let a fresh head remember for 1,000 to 10,000 tokens, spread over the heads.

    Retention is `sigmoid(bias + ...)`, and `bias = log(tokens)` makes it `1 - 1 / (1 + tokens)`.
    """
    return np.log(np.geomspace(1_000.0, 10_000.0, heads)).astype(np.float32)


def head_width(width: int, heads: int, wanted: int | None) -> int:
    """The features of one head: as asked, or an equal share of the model's width.

    Raises:
      ValueError: `heads` does not divide `width` and no head width was given.
    """
    if wanted is None and width % heads:
        raise ValueError(
            f"heads must divide width={width} where head_width is not given, got {heads}"
        )
    return wanted or width // heads


def shortness(each: int) -> float:
    """What short inputs of a head are divided by: the square root of its features."""
    return sqrt(each)


class Gate(NamedTuple):
    """The output gate before its SiLU, and the projections of which it is the last."""

    gate: Float[Array, "B T E"]
    projected: Float[Array, "B T N E"]


class Frame(nnx.Module):
    """Turns a sequence into per-head inputs and gates, and what was read back into a sequence.

    All projections are one matrix product; they pass a causal convolution and a SiLU. What the
    heads read is normalised, multiplied by the SiLU of a gate and projected to the model's width,
    as in Gated DeltaNet (Yang et al., 2025). Inputs named `short` are divided by `shortness`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        each: int,
        *,
        inputs: Sequence[str],
        gates: Mapping[str, Float[np.ndarray, " H"]],
        convolution: int,
        short: Sequence[str] = (),
        depth: int,
        key: PRNGKeyArray,
    ):
        self.heads, self.each = heads, each
        self.inputs, self.gate_names = tuple(inputs), tuple(gates)
        into, gate, mix, out = jax.random.split(key, 4)
        inner = heads * each
        self.project = Projections(len(inputs) + 1, width, inner, key=into)
        scales = [1 / shortness(each) if name in short else 1.0 for name in inputs]
        self.convolution = Convolution(scales, inner, convolution, key=mix)
        if gates:
            self.gates = Gates(jnp.stack([jnp.asarray(b) for b in gates.values()]), width, key=gate)
        self.norm = RMSNorm(each, axis=None)
        self.out = Output(inner, width, depth=depth, key=out)

    def into(
        self, x: Activations, memory: Array | None, starts: Starts | None
    ) -> tuple[dict[str, Float[Array, "B T H K"]], dict[str, Float[Array, "B T H"]], Gate, Array]:
        """Returns the inputs and gates by name, the output gate, and the convolution's memory."""
        projected = self.project(x)
        (*inputs, gate), memory = self.convolution(projected, memory, starts)
        heads = [split_heads(part, self.heads) for part in inputs]
        gates = self.gates(x) if self.gate_names else []
        named = dict(zip(self.inputs, heads, strict=True))
        named_gates = dict(zip(self.gate_names, gates, strict=True))
        return named, named_gates, Gate(gate, projected), memory

    def back(self, y: Float[Array, "B T H K"], gate: Gate) -> Activations:
        """Returns what the heads read, at the model's width."""
        scale, epsilon = self.norm.scale[...], self.norm.epsilon
        return self.out(gated_norm(y, gate.gate, scale, epsilon=epsilon, whole=gate.projected))

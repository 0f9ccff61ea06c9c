"""Self-referential Titans: a sequence layer that rewrites its own projections while it reads."""

from dataclasses import dataclass
from math import sqrt
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from hope_jax.modules.frame import Frame, head_width, retention_bias, shortness
from hope_jax.modules.layers import normal, parameter
from hope_jax.modules.split import on_mesh
from hope_jax.ops.selfref import (
    SelfReferentialMemory,
    Slow,
    fresh_memory,
    self_referential,
)
from hope_jax.shapes import Activations, Starts

PROJECTIONS = ("k", "v", "q", "eta", "alpha")
CLOSED = 40.0
"""The logit of a gate that is 1 in float32."""


@dataclass(frozen=True, kw_only=True)
class SelfModifyingTitansConfig:
    """The sequence layer of HOPE.

    Attributes:
      heads: Independent sets of memories.
      head_width: Features of a head; None for width / heads.
      convolution: Tokens mixed by the causal convolution in front.
      memory: "linear" memories are one matrix, "mlp" ones `x + W1 s(W2 x)` (eq. 89).
      expansion: Hidden units of an MLP memory, as a multiple of the head's features.
      frozen: Projections that are slow weights rather than memories, of k, v, q, eta, alpha.
      targets: "self": a memory generates its own targets (eq. 84); "value": v is the target.
      normalize_targets: Whether targets have unit length; without it memories blow up.
      objective: "dot" (eq. 92) or "l2" (eq. 93, its error frozen at the chunk's start), whose
        gradients grow with the window.
      dgd: Whether updates keep the `- eta k k^T` term of delta gradient descent; without it
        gradients grow with the window.
      momentum: Whether writes pass a damped momentum.
      anchor: Whether memories decay towards their initial states rather than to zero.
      decay: Whether they decay at all; without it retention is 1 and alpha no memory.
      read: "token" reads what earlier tokens wrote, "current" also the token's own write,
        "chunk" the state at the chunk's start (eq. 90).
      inner_gradient: "full" backpropagates through the updates, "stop" does not.
      chunk_memory: Tokens for which the main memory's state is held.
      chunk_projections: Tokens for which the other memories' states are held.
      write_max: The largest write strength; above 1 the memory's transition can turn negative,
        which state tracking needs.
      form: The form of the op, "auto" for the fastest that fits.
    """

    kind: Literal["self_modifying_titans"] = "self_modifying_titans"
    heads: int = 4
    head_width: int | None = None
    convolution: int = 4
    memory: Literal["linear", "mlp"] = "linear"
    expansion: int = 2
    frozen: tuple[Literal["k", "v", "q", "eta", "alpha"], ...] = ("q",)
    targets: Literal["self", "value"] = "self"
    normalize_targets: bool = True
    objective: Literal["dot", "l2"] = "dot"
    dgd: bool = True
    momentum: bool = False
    anchor: bool = True
    decay: bool = True
    read: Literal["token", "current", "chunk"] = "token"
    inner_gradient: Literal["full", "stop"] = "full"
    chunk_memory: int = 64
    chunk_projections: int = 64
    write_max: float = 1.0
    form: str = "auto"

    def __post_init__(self):
        for name in ("heads", "convolution", "expansion", "chunk_memory", "chunk_projections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.chunk_projections % self.chunk_memory:
            raise ValueError(
                f"chunk_memory must divide chunk_projections={self.chunk_projections}, "
                f"got {self.chunk_memory}"
            )
        if not 0 < self.write_max <= 2:
            raise ValueError(f"write_max must lie in (0, 2], got {self.write_max}")

    @property
    def adaptive(self) -> tuple[str, ...]:
        """The projections that are memories."""
        slow = self.frozen if self.decay else (*self.frozen, "alpha")
        return tuple(name for name in PROJECTIONS if name not in slow)

    def build(self, width: int, *, depth: int, key: PRNGKeyArray) -> "SelfModifyingTitans":
        """Makes the layer for a model of `width` and `depth` layers."""
        return SelfModifyingTitans(self, width, depth=depth, key=key)

    def flops(self, width: int, context: int) -> float:  # noqa: ARG002 (it does not matter here)
        """FLOPs a token beside the slow projections, counted on the token recurrence.

        Each adaptive memory reads the input, makes its target, recalls the key and writes.
        """
        each = head_width(width, self.heads, self.head_width)
        matrices = 2 * self.expansion if self.memory == "mlp" else 1
        wide = sum(name in self.adaptive for name in ("k", "v", "q")) + 1
        narrow = sum(name in self.adaptive for name in ("eta", "alpha"))
        return self.heads * matrices * (8 * wide * each * each + 8 * narrow * each)


class LayerMemory(NamedTuple):
    """What the layer carries from call to call.

    Attributes:
      convolution: The last inputs of the convolution.
      fast: The memories.
    """

    convolution: Float[Array, "B P E"]
    fast: SelfReferentialMemory


class SelfModifyingTitans(nnx.Module):
    """Memories that produce a token's key, value and gates, and learn from that token.

    What the outer optimizer trains is where the memories start, and the slow projections around
    them. Where the memories go from there is a value that comes in and goes out with the call.

    Memories learn at keys of unit length, and are read at inputs of about that length as well:
    what a gate's memory has learned then moves its logit by about 1 at most. At inputs as long as
    activations are, gates that write gates are chaotic: with 64 features the gradient of a fresh
    layer grows some twentyfold from 512 tokens to 4,096, and a tower of nine learns nothing. Where
    the memories of gates start counts for as much as if it met the inputs in full: tokens are told
    apart by it, and with less it would learn that more slowly.

    References:
      Behrouz et al., "Nested Learning", 2025, sections 8.1-8.3.
    """

    def __init__(
        self, config: SelfModifyingTitansConfig, width: int, *, depth: int, key: PRNGKeyArray
    ):
        self.config = config
        heads = config.heads
        each = head_width(width, heads, config.head_width)
        frame, initial = jax.random.split(key)
        inputs = ("x", *(name for name in ("q", "k", "v") if name in config.frozen))
        bias: dict[str, np.ndarray] = {
            "eta": np.zeros(heads, np.float32),
            "alpha": retention_bias(heads),
        }
        gates: dict[str, np.ndarray] = {
            name: bias
            for name, bias in bias.items()
            if name in config.frozen and (config.decay or name != "alpha")
        }
        if config.momentum:
            gates["beta"] = np.zeros(heads, np.float32)
        self.frame = Frame(
            width,
            heads,
            each,
            inputs=inputs,
            gates=gates,
            convolution=config.convolution,
            short=("x",),
            depth=depth,
            key=frame,
        )
        adaptive = config.adaptive
        outs = {"eta": 1, "alpha": 1}
        keys = jax.random.split(initial, len(adaptive) + 1)
        self.initial = nnx.Dict(
            {
                name: nnx.List(self._matrices(outs.get(name, each), each, key=one))
                for name, one in zip([*adaptive, "memory"], keys, strict=True)
            }
        )
        self.biases = nnx.Dict(
            {
                name: parameter(jnp.asarray(bias[name]), ("heads",), "vector")
                for name in ("eta", "alpha")
                if name in adaptive
            }
        )

    def _matrices(self, out: int, each: int, *, key: PRNGKeyArray) -> list[nnx.Param]:
        heads, hidden = self.config.heads, self.config.expansion * each
        scale = 0.1 if out == 1 else 1.0  # a fresh gate is its bias
        shapes = [(heads, out, each)]
        if self.config.memory == "mlp":
            shapes = [(heads, out, hidden), (heads, hidden, each)]
        return [
            parameter(
                normal(one, shape, scale / sqrt(shape[-1])), ("heads", None, None), "memory_init"
            )
            for one, shape in zip(jax.random.split(key, len(shapes)), shapes, strict=True)
        ]

    def _bias(self, name: str) -> Float[Array, " H"]:
        """The bias of an adaptive gate; a frozen one has it already."""
        return self.biases[name][...] if name in self.biases else jnp.zeros(self.config.heads)

    def _initial(self) -> dict[str, tuple[Array, ...]]:
        reach = dict.fromkeys(("eta", "alpha"), shortness(self.frame.each))
        return {
            name: (reach.get(name, 1.0) * outer[...], *(m[...] for m in inner))
            for name, (outer, *inner) in self.initial.items()
        }

    def initial_memory(self, batch: int, dtype: jnp.dtype) -> LayerMemory:
        """What `memory=None` means."""
        inner = self.frame.heads * self.frame.each * len(self.frame.inputs)
        past = jnp.zeros((batch, self.config.convolution - 1, inner), dtype)
        fast = fresh_memory(self._initial(), batch, momentum=self.config.momentum)
        return LayerMemory(past, fast)

    def __call__(
        self, x: Activations, memory: LayerMemory | None = None, starts: Starts | None = None
    ) -> tuple[Activations, LayerMemory]:
        """Returns what was recalled for each token, and the memories to go on with."""
        config = self.config
        past, fast = (None, None) if memory is None else memory
        inputs, gates, out_gate, past = self.frame.into(x, past, starts)

        def op(tokens, initial, fast, starts):
            inputs, gates = tokens
            matrices, biases = initial
            alpha = gates.get("alpha")
            if not config.decay:
                alpha = jnp.full(inputs["x"].shape[:3], CLOSED)
            slow = Slow(
                k=inputs.get("k"),
                v=inputs.get("v"),
                q=inputs.get("q"),
                eta=gates.get("eta"),
                alpha=alpha,
                beta=gates.get("beta"),
                eta_bias=biases[0],
                alpha_bias=biases[1],
            )
            return self_referential(
                inputs["x"],
                slow,
                matrices,
                fast,
                starts,
                objective=config.objective,
                dgd=config.dgd,
                anchor=config.anchor,
                normalize_targets=config.normalize_targets,
                targets=config.targets,
                read=config.read,
                inner_gradient=config.inner_gradient,
                chunk_memory=config.chunk_memory,
                chunk_projections=config.chunk_projections,
                write_max=config.write_max,
                form=config.form,
            )

        def fresh(initial, batch):
            return fresh_memory(initial[0], batch, momentum=config.momentum)

        initial = self._initial(), (self._bias("eta"), self._bias("alpha"))
        y, fast = on_mesh(op, (inputs, gates), initial, fast, starts, fresh=fresh)
        return self.frame.back(y, out_gate), LayerMemory(past, fast)

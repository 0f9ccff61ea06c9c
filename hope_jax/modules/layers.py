"""The small parts that every model is made of: parameters, norms, projections, convolution."""

from collections.abc import Iterator, Sequence
from functools import partial
from math import sqrt
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from hope_jax.modules.split import with_halo
from hope_jax.ops.convolution import mixed_parts
from hope_jax.ops.linear import dense
from hope_jax.ops.norm import add_norm, rms_norm
from hope_jax.shapes import Activations, Starts, Tokens
from hope_jax.sharding import constrain

Role = Literal["matrix", "vector", "embedding", "memory_init"]


def parameter(value: Array, axes: Sequence[str | None], role: Role) -> nnx.Param:
    """A slow weight, with what others must know of it as metadata.

    Args:
      value: Its initial value, float32.
      axes: The logical name of each axis (see `hope_jax.sharding`). Scanned layers stack copies
        in front: such a leaf has one axis more than names.
      role: What it is to an optimizer. In a "matrix" or a "memory_init" the last two axes are the
        matrix and those in front stack separate ones; a "vector" (norm, bias, gate) is neither
        decayed nor orthogonalised; an "embedding" maps ids.
    """
    return nnx.Param(value, axes=tuple(axes), role=role)


def normal(key: PRNGKeyArray, shape: Sequence[int], scale: float) -> Array:
    """Gaussian noise of standard deviation `scale`."""
    return scale * jax.random.normal(key, tuple(shape))


def learn_by(model: nnx.Module, objective: str):
    """Chooses what the weights of dense layers learn by; gates, norms and tables are left alone.

    Args:
      model: Each of its layers with an attribute `learns_by` is set.
      objective: One of `hope_jax.ops.linear.OBJECTIVES`; "dot", the default, is the loss.
    """
    modules: Iterator[tuple[Any, Any]] = nnx.iter_modules(model)
    for _, module in modules:
        if hasattr(module, "learns_by"):
            module.learns_by = objective


class RMSNorm(nnx.Module):
    """Divides by the root mean square over the last axis, then scales by a learned vector."""

    def __init__(self, width: int, *, axis: str | None = "embed", epsilon: float = 1e-6):
        self.epsilon = epsilon
        self.scale = parameter(jnp.ones(width), (axis,), "vector")

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalizes in float32, answers in the dtype of `x`."""
        return rms_norm(x, self.scale[...], epsilon=self.epsilon)

    def beside(
        self, x: Float[Array, "... D"], y: Float[Array, "... D"] | None = None
    ) -> tuple[Float[Array, "... D"], Float[Array, "... D"]]:
        """Returns a residual stream, with y added to it if there is one, and its norm."""
        return add_norm(x, y, self.scale[...], epsilon=self.epsilon)


class Projections(nnx.Module):
    """Several projections of one input, read in a single matrix product."""

    learns_by = "dot"

    def __init__(self, count: int, width: int, out: int, *, key: PRNGKeyArray):
        self.weight = parameter(
            normal(key, (count, width, out), 1 / sqrt(width)), (None, "embed", "heads"), "matrix"
        )

    def __call__(self, x: Activations) -> Float[Array, "B T count E"]:
        """Returns all projections."""
        return dense(x, self.weight[...], self.learns_by)


class Gates(nnx.Module):
    """One number for each head and gate, before its sigmoid."""

    def __init__(self, bias: Float[Array, "G H"], width: int, *, key: PRNGKeyArray):
        count, heads = bias.shape
        scale = 0.1 / sqrt(width)
        self.weight = parameter(
            normal(key, (count, width, heads), scale), (None, "embed", "heads"), "vector"
        )
        self.bias = parameter(bias, (None, "heads"), "vector")

    def __call__(self, x: Activations) -> list[Float[Array, "B T H"]]:
        """Returns one float32 array for each gate."""
        weight = self.weight[...].astype(x.dtype)
        accumulate = jnp.promote_types(x.dtype, jnp.float32)
        y = jnp.einsum("BTD,GDH->BTGH", x, weight, preferred_element_type=accumulate)
        y = y + self.bias[...]
        return [y[:, :, gate] for gate in range(y.shape[2])]


class Output(nnx.Module):
    """Brings what the heads read back to the model's width."""

    learns_by = "dot"

    def __init__(self, inner: int, width: int, *, depth: int, key: PRNGKeyArray):
        scale = 1 / sqrt(2 * depth * inner)
        self.weight = parameter(normal(key, (inner, width), scale), ("heads", "embed"), "matrix")

    def __call__(self, y: Float[Array, "B T E"]) -> Activations:
        """Projects; the sum over `depth` layers and two branches keeps the scale of one."""
        x = dense(y, self.weight[...], self.learns_by)
        return constrain(x, ("batch", "time", "embed_out"))


class Convolution(nnx.Module):
    """A causal depthwise convolution, SiLU and a scale for each part.

    Its last inputs are carried from call to call.
    """

    def __init__(self, scales: Sequence[float], width: int, window: int, *, key: PRNGKeyArray):
        self.scales, self.window = tuple(scales), window
        parts = len(self.scales)
        # Mixes neighbours from the start: what binds a value to the key before it.
        weight = normal(key, (window, parts * width), 1 / sqrt(window))
        self.weight = parameter(weight, (None, "heads"), "vector")

    def __call__(
        self,
        x: Float[Array, "B T N E"],
        memory: Float[Array, "B past inner"] | None = None,
        starts: Starts | None = None,
    ) -> tuple[list[Float[Array, "B T E"]], Float[Array, "B past inner"]]:
        """Mixes the first parts and hands on the others; returns also the inputs to go on with."""
        weight = self.weight[...].astype(x.dtype).reshape(self.window, len(self.scales), x.shape[3])
        if memory is not None:
            memory = memory.reshape(*memory.shape[:2], *weight.shape[1:])
        op = partial(mixed_parts, scales=self.scales)
        parts, memory = with_halo(op, x, weight, memory, starts)
        return parts, memory.reshape(*memory.shape[:2], self.weight.shape[1])


class Embedding(nnx.Module):
    """Turns token ids into vectors; the same table may score the next token."""

    def __init__(self, vocabulary: int, width: int, *, key: PRNGKeyArray):
        # A final norm leaves vectors of length sqrt(width): these give logits of deviation 1/2. On
        # the way in they are small beside what the blocks add, so that a tied table does not make
        # a fresh model sure that every token comes twice.
        table = normal(key, (vocabulary, width), 0.5 / sqrt(width))
        self.table = parameter(table, ("vocabulary", "embed"), "embedding")

    def __call__(self, tokens: Tokens, dtype: jnp.dtype) -> Activations:
        """Looks the rows up, and then rounds them: what they are owed is added up unrounded."""
        table = constrain(self.table[...], ("vocabulary", "embed_out"))
        return constrain(table[tokens].astype(dtype), ("batch", "time", "embed_out"))


def split_heads(x: Float[Array, "B T E"], heads: int) -> Float[Array, "B T H K"]:
    """Cuts the last axis into heads."""
    return x.reshape(*x.shape[:-1], heads, -1)


def join_heads(x: Float[Array, "B T H K"]) -> Float[Array, "B T E"]:
    """Undoes `split_heads`."""
    return x.reshape(*x.shape[:-2], -1)

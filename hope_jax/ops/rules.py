"""The rules by which a matrix memory learns, each given by what it minimises."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

Objective = Callable[
    [Float[Array, "V K"], Float[Array, " K"], Float[Array, " V"]], Float[Array, ""]
]


class Rule(NamedTuple):
    """One step of descent per token on how badly the memory holds the token.

        M_t = retain_t M_{t-1} - write_t grad L(M; k_t, v_t)

    A memory `M [V, K]` maps keys to values. The reference form takes the gradient by autodiff; the
    parallel forms rest on its being `grad L = E - v k^T`, where E says what the step erases.

    Attributes:
      objective: L, for one memory and one token.
      retains_first: Whether the gradient is taken at `retain_t M_{t-1}`, after forgetting, rather
        than at `M_{t-1}`.
      erases: E: "nothing" 0, "key" (M k) k^T, "value" v (v^T M).
    """

    objective: Objective
    retains_first: bool
    erases: Literal["nothing", "key", "value"]


def alignment(memory, key, value):
    """-<M k, v>: grows without end along what it is told; its gradient is -v k^T."""
    return -jnp.dot(memory @ key, value)


def recall_error(memory, key, value):
    """1/2 |M k - v|^2: how badly the key recalls the value; its gradient is (M k - v) k^T."""
    return jnp.sum((memory @ key - value) ** 2) / 2


def contained_alignment(memory, key, value):
    """-<M k, v> + 1/2 |M^T v|^2: its gradient is -v k^T + v (v^T M)."""
    return alignment(memory, key, value) + jnp.sum((value @ memory) ** 2) / 2


RULES = {
    "hebbian": Rule(alignment, False, "nothing"),
    "delta": Rule(recall_error, False, "key"),
    "gated_delta": Rule(recall_error, True, "key"),
    "oja": Rule(contained_alignment, False, "value"),
}
"""Every rule by name. To add one is a line here; the tests of `fast_kv` find it.

`hebbian` is linear attention with decay, `delta` the delta rule as Nested Learning prints it (what
it corrects is the memory before it forgets), `gated_delta` that of Gated DeltaNet (after), `oja`
Oja's rule: it keeps the memory bounded by shrinking what lies along the value.

References:
  Behrouz et al., "Nested Learning: The Illusion of Deep Learning Architecture", 2025, eqs. 64-67.
  Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule", 2025.
  Oja, "A simplified neuron model as a principal component analyzer", 1982.
"""

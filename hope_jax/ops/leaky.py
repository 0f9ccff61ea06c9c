"""Leaky averages of a sequence, the slow vector states of a continuum memory, as parallel scans."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def leaky_average(
    x: Float[Array, "B T D"],
    retain: Float[Array, " D"],
    memory: Float[Array, "B D"] | None = None,
    starts: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """Averages what was read, the recent more than the old.

        m_t = retain m_{t-1} + (1 - retain) x_t

    with m = 0 before the first token of a document. An associative scan: about 6 D FLOPs a token
    in log2(T) steps, in float32.

    Args:
      x: The tokens.
      retain: The share of the average that survives a token, in [0, 1].
      memory: The average after the tokens before; None for zero.
      starts: True where a token is the first of its document.

    Returns:
      The average after each token, in the dtype of `x`, and after the last one in float32 (float64
      if `x` is).
    """
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    retain = retain.astype(accumulate)
    kept = jnp.broadcast_to(retain, x.shape)
    if starts is not None:
        kept = jnp.where(starts[..., None], 0, kept)
    added = (1 - retain) * x.astype(accumulate)
    if memory is not None:
        added = added.at[:, 0].add(kept[:, 0] * memory.astype(accumulate))

    def then(early, late):
        return early[0] * late[0], late[0] * early[1] + late[1]

    _, averages = jax.lax.associative_scan(then, (kept, added), axis=1)
    return averages.astype(x.dtype), averages[:, -1]

"""A short causal convolution of each feature, which streams and keeps documents apart."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def causal_convolution(
    x: Float[Array, "B T D"],
    kernel: Float[Array, "window D"],
    memory: Float[Array, "B window-1 D"] | None = None,
    starts: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B window-1 D"]]:
    """Mixes each feature with its own recent past.

        y_t = sum_j kernel_j x_{t-j},    j = 0 .. window-1

    where tokens before the document's start, and before the stream's, count as zero. A sum of
    `window` shifted products, which XLA fuses into one pass: 2 window D FLOPs a token, and x and y
    moved once. It is summed in float32.

    Args:
      x: The tokens. One token costs no more than `window` products.
      kernel: `kernel[0]` weighs the token itself, `kernel[-1]` the oldest one seen.
      memory: The last window - 1 tokens of the stream, oldest first; None for none before.
      starts: True where a token is the first of its document.

    Returns:
      The mixed tokens and the memory to go on with, in which only tokens of the last document are
      left; both in the dtype of `x`.
    """
    past, time = kernel.shape[0] - 1, x.shape[1]
    if memory is None:
        memory = jnp.zeros((x.shape[0], past, x.shape[2]), x.dtype)
    tokens = jnp.concatenate([memory.astype(x.dtype), x], axis=1)
    document = None
    if starts is not None:
        document = jnp.cumsum(jnp.pad(starts, ((0, 0), (past, 0))), axis=1)
    y = jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
    for back in range(past + 1):
        there = slice(past - back, past - back + time)
        shifted = tokens[:, there]
        if document is not None:
            same = document[:, there] == document[:, past:]
            shifted = jnp.where(same[..., None], shifted, 0)
        y = y + kernel[back].astype(y.dtype) * shifted
    end = tokens[:, time:]
    if document is not None:
        same = document[:, time:] == document[:, -1:]
        end = jnp.where(same[..., None], end, 0)
    return y.astype(x.dtype), end

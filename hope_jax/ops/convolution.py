"""A short causal convolution of each feature, which streams and keeps documents apart."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hope_jax.ops.dispatch import Form, launch_refusal, pick, platform
from hope_jax.ops.pallas import convolution as kernels


def mixed_parts(
    x: Float[Array, "B T N E"],
    kernel: Float[Array, "window P E"],
    memory: Float[Array, "B window-1 P E"] | None = None,
    starts: Bool[Array, "B T"] | None = None,
    *,
    scales: tuple[float, ...] | None = None,
    form: str = "auto",
) -> tuple[list[Float[Array, "B T E"]], Float[Array, "B window-1 P E"]]:
    """Convolves the first P parts of x and passes them through SiLU; hands on the others.

    So the projections of a layer need not be taken apart before, and their gradients not be put
    together after.

    Args:
      x: Parts of the tokens.
      kernel: As for `causal_convolution`, of each part.
      memory: As there.
      starts: As there.
      scales: What each of the P parts is multiplied by; None for nothing.
      form: "auto", "pallas_triton" or "shifted", which "auto" takes for a single token.

    Returns:
      Each part, and the memory to go on with.
    """
    if form == "auto" and x.shape[1] == 1:
        form = "shifted"
    call = (x, kernel, memory, starts, scales or (1.0,) * kernel.shape[1])
    return pick(FORMS, form, *call)(*call)


def _shifted(x, kernel, memory, starts, scales):
    window, parts, features = kernel.shape
    joined = x[:, :, :parts].reshape(*x.shape[:2], -1)
    if memory is not None:
        memory = memory.reshape(*memory.shape[:2], parts * features)
    mixed, memory = causal_convolution(joined, kernel.reshape(window, -1), memory, starts)
    mixed = jnp.split(jax.nn.silu(mixed), parts, axis=-1)
    mixed = [part if by == 1 else by * part for by, part in zip(scales, mixed, strict=True)]
    rest = [x[:, :, part] for part in range(parts, x.shape[2])]
    return mixed + rest, memory.reshape(*memory.shape[:2], parts, features)


def _fused(x, kernel, memory, starts, scales):
    del memory
    batch, time = x.shape[:2]
    past, parts = kernel.shape[0] - 1, kernel.shape[1]
    index = jnp.broadcast_to(jnp.arange(time), (batch, time))
    begun = jnp.zeros_like(index) if starts is None else jnp.where(starts, index, 0)
    age = index - jax.lax.cummax(begun, axis=1)
    same = jnp.arange(past)[::-1] <= age[:, -1:]
    end = jnp.where(same[:, :, None, None], x[:, time - past :, :parts], 0)
    return _mixed(x, kernel, age, scales), end


def _refuses(x, kernel, memory, starts, scales):
    del starts, scales
    if memory is not None:
        return "the kernel begins without earlier tokens, got a memory"
    reason = launch_refusal()
    if reason is not None:
        return reason
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the kernel takes bfloat16 and float32, got {x.dtype}"
    return kernels.refusal(x.shape[1], x.shape[3], kernel.shape[0])


FORMS = {
    "pallas_triton": Form(_fused, _refuses, ("gpu",)),
    "shifted": Form(_shifted),
}


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mixed(x, kernel, age, scales):
    mixed = kernels.forward(x, kernel, age, scales, interpret=platform() != "gpu")
    return mixed + [x[:, :, part] for part in range(kernel.shape[1], x.shape[2])]


def _mixed_forward(x, kernel, age, scales):
    return _mixed(x, kernel, age, scales), (x, kernel, age)


def _mixed_backward(scales, residuals, slopes):
    x, kernel, age = residuals
    interpret = platform() != "gpu"
    dx, dkernel = kernels.backward(x, kernel, age, scales, slopes, interpret=interpret)
    return dx, dkernel, None


_mixed.defvjp(_mixed_forward, _mixed_backward)


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

"""The next-token loss, computed a few tokens at a time so that the logits never exist at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def next_token_loss(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "vocabulary D"],
    targets: Int[Array, "B T"],
    *,
    chunk: int = 256,
) -> Float[Array, "B T"]:
    """Scores each target by a linear softmax classifier.

        loss_t = log sum_w exp(e_w . h_t) - e_target(t) . h_t

    The products take the dtype of `hidden` and accumulate in float32. The logits of `chunk` tokens
    of each row exist at a time, and are computed again for the gradient: beyond its inputs and
    outputs either pass holds some arrays of `B * chunk * vocabulary` float32 numbers, the backward
    one also the float32 gradient of the unembedding. 2 D vocabulary FLOPs a token forward, 6 more
    backward.

    A chunk takes every N-th token of a row, so that a time axis which is split over devices stays
    split inside the loop; over the vocabulary there are only sums, so it may be split as well.
    Differentiable in reverse mode only; a second derivative keeps the logits.

    Args:
      hidden: What the model knows before it guesses, after the final norm.
      unembedding: One row for each word.
      targets: The words to guess, in 0..vocabulary-1 (not checked: one beyond has logit 0).
      chunk: The most tokens of a row whose logits exist at once. Any T will do.

    Returns:
      Negative log-likelihoods in nats, float32 (float64 if `hidden` is).

    Raises:
      ValueError: `chunk` is below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    time = targets.shape[1]
    count = max(1, -(-time // chunk))
    length = -(-time // count)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, length * count - time)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], length, count, *x.shape[2:]), 2, 0)

    losses = _losses(split(hidden), unembedding, split(targets))
    return jnp.moveaxis(losses, 0, 2).reshape(-1, length * count)[:, :time]


@jax.custom_vjp
def _losses(
    hidden: Float[Array, "N B C D"],
    unembedding: Float[Array, "vocabulary D"],
    targets: Int[Array, "N B C"],
) -> Float[Array, "N B C"]:
    return _forward(hidden, unembedding, targets)[0]


def _forward(hidden, unembedding, targets):
    words = unembedding.astype(hidden.dtype)

    def step(_, chunk):
        hidden, targets = chunk
        logits = _logits(hidden, words)
        partition = jax.nn.logsumexp(logits, axis=-1)
        # A sum, not a gather: the vocabulary may be split over devices.
        chosen = jnp.sum(jnp.where(_is_target(targets, logits), logits, 0), axis=-1)
        return None, (partition - chosen, partition)

    _, (losses, partitions) = jax.lax.scan(step, None, (hidden, targets))
    return losses, (hidden, unembedding, targets, partitions)


def _backward(residuals, slope):
    hidden, unembedding, targets, partitions = residuals
    words = unembedding.astype(hidden.dtype)

    def step(total, chunk):
        hidden, targets, partition, slope = chunk
        logits = _logits(hidden, words)
        errors = jnp.exp(logits - partition[..., None]) - _is_target(targets, logits)
        errors = (slope[..., None] * errors).astype(hidden.dtype)
        back = jnp.einsum("BCW,WD->BCD", errors, words)
        total = total + jnp.einsum(
            "BCW,BCD->WD", errors, hidden, preferred_element_type=total.dtype
        )
        return total, back

    total = jnp.zeros(unembedding.shape, partitions.dtype)
    total, back = jax.lax.scan(step, total, (hidden, targets, partitions, slope))
    return back, total.astype(unembedding.dtype), None


_losses.defvjp(_forward, _backward)


def _logits(hidden, words):
    accumulate = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("BCD,WD->BCW", hidden, words, preferred_element_type=accumulate)


def _is_target(targets, logits):
    return targets[..., None] == jnp.arange(logits.shape[-1])

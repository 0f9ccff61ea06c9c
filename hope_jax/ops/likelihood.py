"""The next-token loss, computed a few tokens at a time so that the logits never exist at once."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hope_jax.ops.dispatch import Form, launch_refusal, pick, platform
from hope_jax.ops.pallas import likelihood as kernels


def next_token_loss(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "vocabulary D"],
    targets: Int[Array, "B T"],
    *,
    chunk: int = 256,
    form: str = "auto",
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
      form: How logits are scored: "auto", "pallas_triton" or "xla".

    Returns:
      Negative log-likelihoods in nats, float32 (float64 if `hidden` is).

    Raises:
      ValueError: `chunk` is below 1, or the named form does not take the call.
    """
    split, join = _chunks(targets.shape[1], chunk)
    return join(_losses(split(hidden), unembedding, split(targets), form))


def weighted_loss(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "vocabulary D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int = 256,
    form: str = "auto",
) -> Float[Array, ""]:
    """The sum of `weights * next_token_loss(...)`.

    As what each loss counts for is known in the forward pass, that finds the gradient too, while
    the logits are there: 6 D vocabulary FLOPs a token in all where `next_token_loss` needs 8. What
    is kept until the backward pass are the gradients themselves.

    Args:
      hidden: As in `next_token_loss`.
      unembedding: As there.
      targets: As there.
      weights: What each loss counts for.
      chunk: As there.
      form: How logits become losses and errors: "auto", "pallas_triton" or "xla".

    Returns:
      The sum, in the dtype of the losses.

    Raises:
      ValueError: `chunk` is below 1, or the named form does not take the call.
    """
    split, _ = _chunks(targets.shape[1], chunk)
    return _weighted(split(hidden), unembedding, split(targets), split(weights), form)


def _chunks(time: int, chunk: int) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """How rows are cut into N chunks of every N-th token, `[N, B, C, ...]`, and put together."""
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    count = max(1, -(-time // chunk))
    length = -(-time // count)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, length * count - time)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], length, count, *x.shape[2:]), 2, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 2).reshape(-1, length * count)[:, :time]

    return split, join


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _losses(
    hidden: Float[Array, "N B C D"],
    unembedding: Float[Array, "vocabulary D"],
    targets: Int[Array, "N B C"],
    form: str,
) -> Float[Array, "N B C"]:
    return _forward(hidden, unembedding, targets, form)[0]


def _forward(hidden, unembedding, targets, form):
    words = unembedding.astype(hidden.dtype)

    def step(_, chunk):
        hidden, targets = chunk
        call = _logits(hidden, words), hidden, words, targets
        return None, pick(SCORES, form, *call)(*call)

    _, (losses, partitions) = jax.lax.scan(step, None, (hidden, targets))
    return losses, (hidden, unembedding, targets, partitions)


def _backward(form, residuals, slope):
    del form
    hidden, unembedding, targets, partitions = residuals
    words = unembedding.astype(hidden.dtype)

    def step(total, chunk):
        hidden, targets, partition, slope = chunk
        errors = _errors(_logits(hidden, words), targets, partition, slope).astype(hidden.dtype)
        return _push(total, errors, hidden, words)

    total = jnp.zeros(unembedding.shape, partitions.dtype)
    total, back = jax.lax.scan(step, total, (hidden, targets, partitions, slope))
    return back, total.astype(unembedding.dtype), None


_losses.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weighted(
    hidden: Float[Array, "N B C D"],
    unembedding: Float[Array, "vocabulary D"],
    targets: Int[Array, "N B C"],
    weights: Float[Array, "N B C"],
    form: str,
) -> Float[Array, ""]:
    return jnp.sum(weights * _losses(hidden, unembedding, targets, form))


def _weighted_forward(hidden, unembedding, targets, weights, form):
    words = unembedding.astype(hidden.dtype)

    def step(total, chunk):
        hidden, targets, weights = chunk
        call = _logits(hidden, words), hidden, words, targets, weights
        losses, errors = pick(FORMS, form, *call)(*call)
        total, back = _push(total, errors, hidden, words)
        return total, (losses, back)

    total = jnp.zeros(unembedding.shape, jnp.promote_types(hidden.dtype, jnp.float32))
    total, (losses, back) = jax.lax.scan(step, total, (hidden, targets, weights))
    return jnp.sum(weights * losses), (back, total.astype(unembedding.dtype), losses)


def _weighted_backward(form, residuals, slope):
    del form
    back, total, losses = ((slope * x).astype(x.dtype) for x in residuals)
    return back, total, None, losses


_weighted.defvjp(_weighted_forward, _weighted_backward)


def _logits(hidden, words):
    accumulate = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("BCD,WD->BCW", hidden, words, preferred_element_type=accumulate)


def _score(logits, hidden, words, targets):
    """The losses of a chunk, and the logarithms of its sums."""
    partition = jax.nn.logsumexp(logits, axis=-1)
    # Once more from the hidden states, which are far fewer numbers to read than the logits.
    wanted = words.at[targets].get(mode="fill", fill_value=0)
    chosen = jnp.sum(hidden.astype(logits.dtype) * wanted.astype(logits.dtype), axis=-1)
    return partition - chosen, partition


def _errors(logits, targets, partition, slope):
    """What is owed for a chunk's logits."""
    is_target = targets[..., None] == jnp.arange(logits.shape[-1])
    return slope[..., None] * (jnp.exp(logits - partition[..., None]) - is_target)


def _push(total, errors, hidden, words):
    """Adds a chunk's gradient of the words to `total`; returns also that of its hidden states."""
    back = jnp.einsum("BCW,WD->BCD", errors, words)
    total = total + jnp.einsum("BCW,BCD->WD", errors, hidden, preferred_element_type=total.dtype)
    return total, back


def _score_at_once(logits, hidden, words, targets):
    del hidden, words
    flat = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    found = kernels.scores(*flat, interpret=platform() != "gpu")
    return tuple(x.reshape(targets.shape) for x in found)


def _score_and_push(logits, hidden, words, targets, weights):
    losses, partition = _score(logits, hidden, words, targets)
    return losses, _errors(logits, targets, partition, weights).astype(hidden.dtype)


def _push_at_once(logits, hidden, words, targets, weights):
    del words
    weights = weights.astype(logits.dtype)
    flat = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), weights.reshape(-1)
    losses, errors = kernels.errors(*flat, hidden.dtype, interpret=platform() != "gpu")
    return losses.reshape(targets.shape), errors.reshape(logits.shape)


def _refuses(logits, *others):
    del others
    reason = launch_refusal()
    if reason is not None:
        return reason
    if logits.dtype != jnp.float32:
        return f"the kernel takes float32 logits, got {logits.dtype}"
    return None


SCORES = {
    "pallas_triton": Form(_score_at_once, _refuses, ("gpu",)),
    "xla": Form(_score),
}
FORMS = {
    "pallas_triton": Form(_push_at_once, _refuses, ("gpu",)),
    "xla": Form(_score_and_push),
}

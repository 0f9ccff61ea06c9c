"""A softmax classifier's losses and errors on a GPU, through Triton: each logit is read once.

A program has all logits of a token in registers. XLA reads them three times: for their maximum, for
the sum of their powers and for the errors. At 4 bytes read and 2 written a logit, 8,192 tokens of
32,000 words take an H100 (3.35 TB/s) at least 0.47 ms, and a fifth of that in exponentials.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

WORDS = 32_768
"""Logits for which a multiprocessor's registers have room."""


def refusal(words: int) -> str | None:
    """Says why the kernel does not take so many words, or None if it does."""
    if words > WORDS:
        return f"the kernel takes at most {WORDS} words, got {words}"
    return None


def errors(
    logits: Float[Array, "N words"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    dtype: jnp.dtype,
    *,
    interpret: bool,
) -> tuple[Float[Array, " N"], Float[Array, "N words"]]:
    """Scores the words of N tokens.

    Args:
      logits: float32.
      targets: The words that were wanted.
      weights: What each loss counts for.
      dtype: Of the errors.
      interpret: Whether to interpret the kernel instead of compiling it.

    Returns:
      The losses, and what is owed for the logits: `weights * (softmax - target)`.
    """
    like = jax.ShapeDtypeStruct(targets.shape, logits.dtype)
    out = like, jax.ShapeDtypeStruct(logits.shape, dtype)
    return _launch(_errors_kernel, "likelihood_errors", out, interpret, logits, targets, weights)


def scores(
    logits: Float[Array, "N words"], targets: Int[Array, " N"], *, interpret: bool
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Returns the losses of N tokens, and the logarithms of the sums of their powers.

    Args:
      logits: As for `errors`.
      targets: As there.
      interpret: As there.
    """
    like = jax.ShapeDtypeStruct(targets.shape, logits.dtype)
    return _launch(_scores_kernel, "likelihood", (like, like), interpret, logits, targets)


def _launch(kernel, name, out, interpret, logits, *of_tokens):
    count, words = logits.shape
    warps = min(max(pl.next_power_of_2(words) // 1024, 1), 32)
    return pl.pallas_call(
        kernel,
        out_shape=out,
        grid=count,
        interpret=interpret,
        name=name,
        compiler_params=triton.CompilerParams(num_warps=warps),
    )(logits, *of_tokens)


def _scores_kernel(logits, targets, losses, partitions):
    row = pl.program_id(0)
    *_, partition, chosen = _read(row, logits, targets[row])
    losses[row] = partition - chosen
    partitions[row] = partition


def _errors_kernel(logits, targets, weights, losses, errors):
    row = pl.program_id(0)
    target, weight = targets[row], weights[row]
    words, there, powers, total, partition, chosen = _read(row, logits, target)
    losses[row] = partition - chosen
    owed = powers * (weight / total) - jnp.where(words == target, weight, 0)
    triton.store(errors.at[row, words], owed.astype(errors.dtype), mask=there)


def _read(row, logits, target):
    """What words there are, their powers, the sum of these and its logarithm, the target's logit.

    Powers are those of the differences to the largest logit; a target that is no word has logit 0.
    """
    count = logits.shape[1]
    words = jnp.arange(pl.next_power_of_2(count))
    there = words < count
    numbers = triton.load(logits.at[row, words], mask=there, other=-jnp.inf)
    most = jnp.max(numbers)
    powers = jnp.exp(numbers - most)
    total = jnp.sum(powers)
    known = (target >= 0) & (target < count)
    chosen = jnp.where(known, logits[row, jnp.where(known, target, 0)], 0)
    return words, there, powers, total, most + jnp.log(total), chosen

"""Softmax attention over the last `window` tokens, with a ring of keys and values as memory."""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hope_jax.ops.dispatch import on_hopper, platform

_SCORES = 4096 * 4096
"""Scores of a row and head up to which all queries are taken at once."""

_BLOCK = 1024
"""Queries that are taken at once where there are more scores."""

_WIDEST, _WIDEST_ON_HOPPER = 128, 256
"""Features of a head that cuDNN takes."""

_APART = 64.0
"""Its square outweighs every score, and its multiples up to 32 are exact in half precision."""


class AttentionMemory(NamedTuple):
    """The last `window` keys and values; the token at position p lies in slot p modulo window.

    Attributes:
      keys: Keys as they came, rotated if they were.
      values: Their values.
      start: The position at which each row's document began.
      position: How many tokens have been read.
    """

    keys: Float[Array, "B W G K"]
    values: Float[Array, "B W G K"]
    start: Int[Array, " B"]
    position: Int[Array, ""]


def empty_memory(
    batch: int, window: int, groups: int, width: int, dtype: jnp.dtype
) -> AttentionMemory:
    """What was read before the first token: nothing."""
    return AttentionMemory(
        jnp.zeros((batch, window, groups, width), dtype),
        jnp.zeros((batch, window, groups, width), dtype),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros((), jnp.int32),
    )


def positions_after(memory: AttentionMemory | None, time: int) -> Int[Array, " T"]:
    """The positions of the next tokens."""
    position = jnp.zeros((), jnp.int32) if memory is None else memory.position
    return position + jnp.arange(time, dtype=jnp.int32)


def sliding_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    memory: AttentionMemory | None = None,
    starts: Bool[Array, "B T"] | None = None,
    *,
    window: int,
    block: int | None = None,
) -> tuple[Float[Array, "B T H K"], AttentionMemory]:
    """Reads the last `window` tokens of the same document, the current one included.

    Costs `4 H K min(T, window)` FLOPs a token. G divides H: heads in a group share keys and values.
    Where T is long, memory is linear in it: blocks of queries take turns, and their scores are
    computed again in the backward pass. (A fused kernel, where there is one for texts that begin
    with the call, does the same by itself.)

    Args:
      q: Queries, turned by their positions if these matter (see `hope_jax.ops.rotary`).
      k: Keys, likewise.
      v: Values.
      memory: What earlier calls left behind; None where nothing came before.
      starts: True where a document begins: it sees nothing before itself.
      window: How many tokens a token sees.
      block: Queries that are taken at once. None takes all, or 1,024 where these would have more
        than 4,096 x 4,096 scores in a row and head and no fused kernel is there for them.

    Returns:
      What each token read, and the memory after the last token.

    References:
      Vaswani et al., "Attention Is All You Need", 2017; Beltagy et al., "Longformer", 2020.
    """
    time = q.shape[1]
    positions = positions_after(memory, time)
    begin = _document_begin(positions, memory, starts, q.shape[0])
    fresh = memory is None
    if fresh:
        memory = empty_memory(q.shape[0], window, k.shape[2], k.shape[3], k.dtype)
    after = _remember(memory, k, v, begin[:, -1], window)
    before = 0 if fresh or time == 1 else window
    small = time * (before + time) <= _SCORES
    if fresh and block is None:
        if starts is None and (small or _implementation(q)):
            return _causal(q, k, v, window), after
        if starts is not None and _implementation(q, more=_digits(time)):
            return _causal_in_documents(q, k, v, begin, window), after
    block = block or (time if small else _BLOCK)
    if block < time:
        if not fresh:
            oldest = -(memory.position % window)
            k = jnp.concatenate([jnp.roll(memory.keys, oldest, axis=1), k], axis=1)
            v = jnp.concatenate([jnp.roll(memory.values, oldest, axis=1), v], axis=1)
        begin = begin - (positions[0] - before)
        return _in_blocks(q, k, v, begin, window=window, block=block), after

    if fresh:
        seen_k, seen_v, seen_at = k, v, positions
    elif time == 1:  # The ring already holds this token, and what it pushed out is out of sight.
        seen_k, seen_v = after.keys, after.values
        seen_at = _slots(after.position, window)
    else:
        seen_k = jnp.concatenate([memory.keys, k], axis=1)
        seen_v = jnp.concatenate([memory.values, v], axis=1)
        seen_at = jnp.concatenate([_slots(memory.position, window), positions])
    mask = (
        (seen_at >= 0)
        & (seen_at <= positions[:, None])
        & (seen_at > positions[:, None] - window)
        & (seen_at >= begin[:, :, None])
    )
    return _attend(q, seen_k, seen_v, mask), after


def _causal(q: Array, k: Array, v: Array, window: int, *, scale: float | None = None) -> Array:
    """Attention without documents or memory, by the fastest kernel there is."""
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        scale=scale,
        local_window_size=(window - 1, 0) if q.shape[1] > window else None,
        implementation=_implementation(q),
    )


def _causal_in_documents(
    q: Array, k: Array, v: Array, begin: Int[Array, "B T"], window: int
) -> Array:
    """`_causal` inside documents, told apart by further features of queries and keys.

    A kernel that takes a mask reads and differentiates one number for each pair of tokens, and
    cannot skip the future. Instead, the binary digits of the position at which a document began,
    as signs, and the negative of their number add 0 to the scores inside a document and at most
    `-2 _APART^2` to others, whose weight is then exactly 0. They come first, and what a tensor core
    sums of them before it meets the other features is exact.
    """
    batch, time, _, width = q.shape
    extra = _digits(time)
    digits = (time - 1).bit_length()
    signs = jnp.where((begin[..., None] >> jnp.arange(digits)) & 1, 1.0, -1.0)
    ones = jnp.ones((batch, time, 1))
    rest = jnp.zeros((batch, time, extra - digits - 1))

    def widen(x: Array, balance: float) -> Array:
        code = _APART * jnp.concatenate([signs, balance * ones, rest], axis=-1)
        code = jnp.broadcast_to(code[:, :, None], (*x.shape[:3], extra)).astype(x.dtype)
        return jnp.concatenate([code, x], axis=-1)

    v = jnp.pad(v, [(0, 0)] * 3 + [(extra, 0)])
    y = _causal(widen(q, -digits), widen(k, 1.0), v, window, scale=width**-0.5)
    return y[..., extra:]


def _digits(time: int) -> int:
    """Features that tell the documents of a row apart; a tensor core sums 16 at once."""
    return -(-((time - 1).bit_length() + 1) // 16) * 16


def _attend(q: Array, k: Array, v: Array, mask: Bool[Array, "B T S"]) -> Array:
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask[:, None], implementation=_implementation(q)
    )


def _in_blocks(
    q: Array, k: Array, v: Array, begin: Int[Array, "B T"], *, window: int, block: int
) -> Array:
    """Attention of one block of queries after the other.

    Args:
      q: Queries, at the positions of the last keys.
      k: Keys in the order of their positions.
      v: Values.
      begin: Where each query's document begins among the keys.
      window: How many keys a query sees.
      block: Queries in a block.
    """
    batch, time = q.shape[:2]
    count, before = -(-time // block), k.shape[1] - time
    reach = min(k.shape[1], window - 1 + block)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, count * block - time)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, block, *x.shape[2:]), 1, 0)

    @partial(jax.checkpoint, prevent_cse=False)
    def read(one: tuple[Array, Array, Array]) -> Array:
        index, q, begin = one
        first = before + index * block
        start = jnp.clip(first - window + 1, 0, k.shape[1] - reach)
        query, key = first + jnp.arange(block), start + jnp.arange(reach)
        seen = (key <= query[:, None]) & (key > query[:, None] - window)
        near_k = jax.lax.dynamic_slice_in_dim(k, start, reach, axis=1)
        near_v = jax.lax.dynamic_slice_in_dim(v, start, reach, axis=1)
        return _attend(q, near_k, near_v, seen & (key >= begin[:, :, None]))

    y = jnp.moveaxis(jax.lax.map(read, (jnp.arange(count), cut(q), cut(begin))), 0, 1)
    return y.reshape(batch, count * block, *y.shape[3:])[:, :time]


def _document_begin(
    positions: Int[Array, " T"],
    memory: AttentionMemory | None,
    starts: Bool[Array, "B T"] | None,
    batch: int,
) -> Int[Array, "B T"]:
    """The position at which each token's document began."""
    before = jnp.zeros(batch, jnp.int32) if memory is None else memory.start
    if starts is None:
        return jnp.broadcast_to(before[:, None], (batch, positions.shape[0]))
    marks = jnp.where(starts, positions, -1)
    return jnp.maximum(jax.lax.cummax(marks, axis=1), before[:, None])


def _slots(position: Int[Array, ""], window: int) -> Int[Array, " W"]:
    """The position held by each slot of a ring after `position` tokens; negative where none is."""
    slot = jnp.arange(window, dtype=jnp.int32)
    return position - 1 - (position - 1 - slot) % window


def _remember(
    memory: AttentionMemory, k: Array, v: Array, start: Int[Array, " B"], window: int
) -> AttentionMemory:
    time = k.shape[1]
    kept = min(time, window)
    slots = (memory.position + jnp.arange(time - kept, time, dtype=jnp.int32)) % window
    return AttentionMemory(
        memory.keys.at[:, slots].set(k[:, time - kept :]),
        memory.values.at[:, slots].set(v[:, time - kept :]),
        start,
        memory.position + time,
    )


def _implementation(q: Array, more: int = 0) -> Literal["cudnn"] | None:
    """CuDNN's fused attention takes half precision and head widths to 128 or 256 in steps of 8.

    Args:
      q: The queries.
      more: Features they will get.
    """
    half, width = q.dtype in (jnp.bfloat16, jnp.float16), q.shape[-1] + more
    widest = _WIDEST_ON_HOPPER if on_hopper() else _WIDEST
    fits = half and width <= widest and width % 8 == 0 and q.shape[1] > 1
    return "cudnn" if fits and platform() == "gpu" else None

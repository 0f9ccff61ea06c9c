"""Reading and writing with any model: prompts of any length in, sampled tokens out, memory carried.

Reading takes whole chunks at once and the rest token by token, writing takes blocks of steps that
stay on the device, so a model is compiled for a few shapes only, however long the text is.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from hope_jax.models.decoder import Decoder, Memory
from hope_jax.shapes import Starts, Tokens

Track = Callable[[Sequence[Any]], Iterable[Any]]

_NOTHING = -1


def read(
    model: Decoder,
    tokens: Tokens | np.ndarray,
    memory: Memory | None = None,
    starts: Starts | np.ndarray | None = None,
    *,
    chunk: int = 128,
    track: Track = iter,
) -> Memory:
    """Reads text of any length and returns what the model remembers of it.

    The same as `model(tokens, memory, starts)[1]`, at a device memory that does not grow with the
    text: whole chunks go in at once, the tokens left over one by one. Two shapes are compiled.

    Args:
      model: The model that reads.
      tokens: The text. It may stay on the host: it is moved chunk by chunk.
      memory: What earlier text left behind; it is copied, so it can be read from again. None is
        fresh memory.
      starts: True where a document begins. None where none does.
      chunk: How many tokens are read at once. It changes the speed and nothing else.
      track: Passes the chunks' beginnings on and may show how many are done.

    Returns:
      The memory after the last token.

    Raises:
      ValueError: `chunk` is less than 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    graphdef, params = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(params)
    memory = _own(graphdef, params, tokens.shape[0], memory)
    whole = tokens.shape[1] // chunk * chunk
    for t in track(range(0, whole, chunk)):
        memory = _read_chunk(
            graphdef, params, memory, *_slice(tokens, starts, slice(t, t + chunk), chunk)
        )
    if whole < tokens.shape[1]:
        left = tokens.shape[1] - whole
        memory = _read_tokens(
            graphdef, params, memory, *_slice(tokens, starts, slice(whole, None), chunk), left
        )
    return memory


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    key: Key[Array, ""] | Key[Array, " B"],
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: int | None = None,
    vocabulary: int | None = None,
    memory: Memory | None = None,
    chunk: int = 128,
    block: int = 64,
    track: Track = iter,
) -> list[list[int]]:
    """Continues each prompt by sampled tokens.

    Rows do not see each other: a row of a batch says what it would say alone with its own key,
    also when the prompts differ in length. Rows advance together, so the shortest prompt decides
    how much is read in chunks; longer ones go on reading while shorter ones write. A step costs
    the same at any length, and settings of the sampling are values: none of them compiles anew.

    Args:
      model: The model that writes.
      prompts: One list of tokens for each row, at least one token each. Nothing is added to them.
      key: One key for each row, or one from which row i gets `fold_in(key, i)`. Not used at
        temperature 0.
      max_tokens: The most tokens written for a row.
      temperature: Divides the logits. At 0 the likeliest token is taken.
      top_k: Sample among the k likeliest tokens. 0 is no limit.
      top_p: Sample among the fewest likeliest tokens that hold this share of the probability.
      stop: The token that ends a row. It is not returned. None never ends a row early.
      vocabulary: Tokens from here on are never written. None allows all that the model has, which
        may be more than its tokenizer knows.
      memory: What the text before the prompts left behind; it is copied. None is fresh memory.
      chunk: How many tokens of a prompt are read at once. It changes the speed and nothing else.
      block: How many steps the device takes before the host looks. The same holds.
      track: Passes the numbers of chunks and blocks on and may show how many are done.

    Returns:
      The new tokens of each row, without the prompt.

    Raises:
      ValueError: A prompt without a token, a token outside the vocabulary, or an impossible
        setting.
    """
    known = model.unembedding.shape[0]
    _check(prompts, known)
    check_sampling(max_tokens, temperature, top_k, top_p)
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    graphdef, params = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(params)
    padded, lengths = _pad(prompts, block)
    first = lengths.min()
    state = _Decoding(
        memory=read(model, padded[:, : first - 1], memory, chunk=chunk, track=track),
        last=jnp.asarray(padded[:, first - 1]),
        done=jnp.zeros(len(prompts), bool),
        position=jnp.asarray(first - 1, jnp.int32),
    )
    plan = _Plan(
        lengths=jnp.asarray(lengths, jnp.int32),
        end=jnp.asarray(lengths + max_tokens, jnp.int32),
        stop=jnp.asarray(_NOTHING if stop is None else stop, jnp.int32),
        vocabulary=jnp.asarray(known if vocabulary is None else vocabulary, jnp.int32),
        keys=key if key.ndim else _row_keys(key, np.arange(len(prompts))),
        temperature=jnp.asarray(temperature, jnp.float32),
        top_k=jnp.asarray(top_k, jnp.int32),
        top_p=jnp.asarray(top_p, jnp.float32),
    )
    written = [padded[:, :first]]
    for start in track(range(first, lengths.max() + max_tokens, block)):
        ahead = padded[:, start : start + block]
        ahead = np.pad(ahead, ((0, 0), (0, block - ahead.shape[1])))
        state, tokens = _write_block(graphdef, params, state, plan, ahead)
        written.append(np.asarray(tokens))
        if np.all(state.done):
            break
    rows = np.concatenate(written, axis=1)
    return [
        _until(row[start : start + max_tokens].tolist(), (_NOTHING, stop))
        for row, start in zip(rows, lengths, strict=True)
    ]


def draw(
    logits: Float[Array, "B vocabulary"],
    keys: Key[Array, " B"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int | Int[Array, ""] = 0,
    top_p: float | Float[Array, ""] = 1.0,
) -> Int[Array, " B"]:
    """Draws one token for each row from the softmax of `logits / temperature`.

    Args:
      logits: What the model says.
      keys: One key for each row.
      temperature: At 0 the likeliest token is taken, the first of equals.
      top_k: Draw among the k likeliest tokens. 0 is no limit.
      top_p: Draw among the fewest likeliest tokens, of those left by `top_k`, that hold this share
        of their probability.

    Returns:
      The tokens.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    vocabulary = logits.shape[-1]
    temperature = jnp.asarray(temperature, logits.dtype)
    top_k = jnp.where(jnp.asarray(top_k) > 0, top_k, vocabulary)
    scaled = logits / jnp.where(temperature > 0, temperature, 1)
    scaled = jax.lax.cond(
        (top_k < vocabulary) | (jnp.asarray(top_p) < 1),
        lambda: restrict(scaled, top_k, top_p),
        lambda: scaled,
    )
    drawn = jax.vmap(jax.random.categorical)(keys, scaled)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, -1)).astype(jnp.int32)


def restrict(
    logits: Float[Array, "B vocabulary"],
    top_k: int | Int[Array, ""],
    top_p: float | Float[Array, ""],
) -> Float[Array, "B vocabulary"]:
    """Sets all but the likeliest logits to minus infinity.

    First exactly `top_k` tokens are kept (of equals, those with the smaller number), then the
    fewest of them, from the likeliest on, whose share of the kept probability reaches `top_p`.

    References:
      Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020 (top-p).
    """
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    ranked = jnp.take_along_axis(logits, order, -1)
    ranked = jnp.where(jnp.arange(logits.shape[-1]) < top_k, ranked, -jnp.inf)
    shares = jax.nn.softmax(ranked, -1)
    likelier = jnp.cumsum(shares, -1) - shares
    # The likeliest token stays whatever the rounding; with top_p = 1 all stay.
    kept = (likelier < top_p) | (jnp.asarray(top_p) >= 1)
    ranked = jnp.where(kept.at[..., 0].set(True), ranked, -jnp.inf)
    return jnp.put_along_axis(logits, order, ranked, -1, inplace=False)


def check_sampling(max_tokens: int, temperature: float, top_k: int, top_p: float):
    """Checks settings of `generate`.

    Raises:
      ValueError: At the first that cannot be.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0 (no limit), got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


class _Decoding(NamedTuple):
    """What a step of writing takes over from the step before.

    Attributes:
      memory: What the model remembers of the tokens before `last`.
      last: The newest token of each row, not yet read.
      done: True where a row is complete.
      position: The index of `last` in its row, prompt included.
    """

    memory: Memory
    last: Int[Array, " B"]
    done: Bool[Array, " B"]
    position: Int[Array, ""]


class _Plan(NamedTuple):
    """What stays the same while rows are written.

    Attributes:
      lengths: The tokens in each prompt.
      end: The tokens in each row when `max_tokens` are written.
      stop: The token that ends a row, `_NOTHING` if none does.
      vocabulary: Tokens from here on are not drawn.
      keys: One key for each row.
      temperature: See `draw`, as for the others.
      top_k: See there.
      top_p: See there.
    """

    lengths: Int[Array, " B"]
    end: Int[Array, " B"]
    stop: Int[Array, ""]
    vocabulary: Int[Array, ""]
    keys: Key[Array, " B"]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]


@partial(jax.jit, static_argnames=("graphdef", "rows"))
def _initial_memory(graphdef: nnx.GraphDef, params: dict, rows: int) -> Memory:
    # A copy, since what is donated later must not be a parameter.
    return jax.tree.map(jnp.copy, nnx.merge(graphdef, params).initial_memory(rows))


@partial(jax.jit, static_argnames="graphdef", donate_argnames="memory")
def _read_chunk(graphdef, params, memory, tokens, starts):
    return nnx.merge(graphdef, params).hidden(tokens, memory, starts)[1]


@partial(jax.jit, static_argnames="graphdef", donate_argnames="memory")
def _read_tokens(graphdef, params, memory, tokens, starts, count):
    model, memory = nnx.merge(graphdef, params).for_steps(memory)

    def step(t, memory):
        token, start = _at(tokens, t), None if starts is None else _at(starts, t)
        return model.hidden(token, memory, start)[1]

    return model.after_steps(jax.lax.fori_loop(0, count, step, memory))


@partial(jax.jit, static_argnames="graphdef", donate_argnames="state")
def _write_block(
    graphdef: nnx.GraphDef,
    params: dict,
    state: _Decoding,
    plan: _Plan,
    ahead: Int[Array, "B steps"],
) -> tuple[_Decoding, Int[Array, "B steps"]]:
    """Takes up to `steps` steps, fewer if all rows are done; `ahead` holds the prompts' next."""
    model, memory = nnx.merge(graphdef, params).for_steps(state.memory)
    state = state._replace(memory=memory)

    def unfinished(loop):
        i, state, _ = loop
        return (i < ahead.shape[1]) & ~jnp.all(state.done)

    def step(loop):
        i, state, tokens = loop
        logits, memory = model(state.last[:, None], state.memory)
        position = state.position + 1
        keys = jax.vmap(jax.random.fold_in, (0, None))(plan.keys, position)
        settings = {"temperature": plan.temperature, "top_k": plan.top_k, "top_p": plan.top_p}
        logits = jnp.where(jnp.arange(logits.shape[-1]) < plan.vocabulary, logits[:, 0], -jnp.inf)
        drawn = draw(logits, keys, **settings)
        prompted = position < plan.lengths
        last = jnp.where(prompted, ahead[:, i], drawn)
        tokens = tokens.at[:, i].set(jnp.where(state.done, _NOTHING, last))
        stopped = ~prompted & (last == plan.stop)
        done = state.done | stopped | (position + 1 >= plan.end)
        return i + 1, _Decoding(memory, last, done, position), tokens

    tokens = jnp.full(ahead.shape, _NOTHING, jnp.int32)
    _, state, tokens = jax.lax.while_loop(unfinished, step, (0, state, tokens))
    return state._replace(memory=model.after_steps(state.memory)), tokens


def _own(graphdef: nnx.GraphDef, params: dict, rows: int, memory: Memory | None) -> Memory:
    """Returns a memory whose buffers may be given away."""
    if memory is None:
        return _initial_memory(graphdef, params, rows)
    return jax.tree.map(jnp.copy, memory)


_row_keys = jax.vmap(jax.random.fold_in, (None, 0))


def _pad(
    prompts: Sequence[Sequence[int]], room: int
) -> tuple[Int[np.ndarray, "B N"], Int[np.ndarray, " B"]]:
    """Returns the prompts as one array, with `room` behind the longest, and their lengths."""
    lengths = np.array([len(prompt) for prompt in prompts])
    padded = np.zeros((len(prompts), lengths.max() + room), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return padded, lengths


def _slice(tokens, starts, part: slice, width: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Cuts a part of the time axis and fills it up to `width`."""

    def cut(x, dtype):
        x = np.asarray(x[:, part], dtype)
        return np.pad(x, ((0, 0), (0, width - x.shape[1])))

    return cut(tokens, np.int32), None if starts is None else cut(starts, bool)


def _at(x: Array, t: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1)


def _until(tokens: list[int], ends: tuple[int | None, ...]) -> list[int]:
    """Cuts a list before the first of `ends`."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def _check(prompts: Sequence[Sequence[int]], vocabulary: int):
    """Raises ValueError at the first prompt that cannot be read."""
    if not prompts:
        raise ValueError("prompts must hold at least 1 prompt, got 0")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"a prompt must hold at least 1 token, prompt {row} holds 0")
        strange = [token for token in (min(prompt), max(prompt)) if not 0 <= token < vocabulary]
        if strange:
            raise ValueError(
                f"tokens must be in [0, {vocabulary}), prompt {row} holds {strange[0]}"
            )

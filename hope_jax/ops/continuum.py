"""A level of a continuum memory: a network whose weights move after every chunk that it reads."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from hope_jax.ops.dispatch import Form, launch_refusal, pick, platform
from hope_jax.ops.linear import apart
from hope_jax.ops.pallas import continuum as kernels

Activation = Literal["gelu", "relu", "silu"]
ACTIVATIONS = {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu}

TOGETHER = 512
"""Tokens whose chunks the form "together" solves at once where these are shorter."""

UNROLL = 8
"""Steps from group to group that are compiled one by one: kernels then read a group where it is,
which a loop would copy first."""

KEPT = "continuum_level"
"""What a policy of rematerialisation may keep: the values and, of the forms for accelerators, the
answers, what they teach, the deltas that groups of chunks begin with if they are not many, and what
joins chunks of a group. Without, the backward pass goes from group to group once more."""

LARGEST = 2
"""Deltas for each token and feature of an answer, up to which they are kept under that name."""

Matrices = tuple[Array, ...]
"""The layers of a network, each `[P, I, O]`: P projections of one input, whose outputs are
multiplied where there are two. Deltas have the batch in front."""


class Pace(NamedTuple):
    """How a level moves; learned numbers.

    Attributes:
      rate: The share of a chunk's whole step that is taken, in [0, 1].
      retain: What survives of the deltas at a move, in [0, 1].
      momentum: What survives of the momentum at a move, in [0, 1]; None without.
      outer_rate: The rate of the slower level that carries this one's initial deltas; None where
        none does.
      outer_retain: That level's retention.
    """

    rate: Float[Array, ""]
    retain: Float[Array, ""]
    momentum: Float[Array, ""] | None = None
    outer_rate: Float[Array, ""] | None = None
    outer_retain: Float[Array, ""] | None = None


class Lesson(NamedTuple):
    """What a level is taught by some pairs of tokens.

    Attributes:
      gradient: Of their losses, by layer.
      energy: The sum of |input|^2, by layer.
      error: The sum of |error|^2.
      pairs: How many they are.
    """

    gradient: Matrices
    energy: tuple[Float[Array, " B"], ...]
    error: Float[Array, " B"]
    pairs: Float[Array, " B"]


class Fast(NamedTuple):
    """What a level has learned in a sequence.

    Attributes:
      pending: What the chunk has taught so far.
      delta: What is added to its slow weights.
      momentum: Of the moves; None without.
      initial: What the deltas begin with after each chunk of the slower level that carries them;
        None where none does.
      outer: What that slower level's chunk has taught so far.
      writes: Moves made.
      gated: Moves left out because the chunk surprised too little.
      skipped: Moves left out because they were not finite.
    """

    pending: Lesson
    delta: Matrices
    momentum: Matrices | None
    initial: Matrices | None
    outer: Lesson | None
    writes: Int[Array, " B"]
    gated: Int[Array, " B"]
    skipped: Int[Array, " B"]


class LevelMemory(NamedTuple):
    """What a level carries from call to call.

    Attributes:
      position: How many tokens were read. It says where in their chunk the next one stands.
      last: The input of the last of them, which is the next one's key.
      fast: What was learned.
    """

    position: Int[Array, ""]
    last: Float[Array, "B I"]
    fast: Fast


class Setting(NamedTuple):
    """The keywords of `continuum_level`."""

    chunk: int
    outer: int | None
    activation: Activation
    dgd: bool
    surprise: float


def continuum_level(
    x: Float[Array, "B T I"],
    values: Float[Array, "B T V"],
    weights: Matrices,
    pace: Pace,
    memory: LevelMemory | None = None,
    starts: Bool[Array, "B T"] | None = None,
    *,
    chunk: int,
    outer: int | None = None,
    activation: Activation = "silu",
    dgd: bool = False,
    surprise: float = 0.0,
    form: str = "auto",
) -> tuple[Float[Array, "B T V"], LevelMemory]:
    """Reads `x` with a network that learns, chunk by chunk, to foretell `values`.

    The network N has slow weights theta and, for each sequence, deltas D that begin at zero:

        y_t = N(theta + D; x_t)
        L_t = 1/2 |N(theta + D; x_{t-1}) - values_t|^2          t - 1 in the chunk and document of t

    D is held during a chunk and moves after tokens chunk, 2 chunk, ... alone, by eq. 71:

        G = sum over the chunk of dL_t/dD  (+ sum D h_{t-1} h_{t-1}^T with `dgd`)
        D <- retain D - rate G / (1 + sum |h_{t-1}|^2)

    layer by layer, with h what goes into the layer. The denominator is that of the proximal step
    (eq. 57) for all keys of the chunk: none overshoots, however long. With momentum,
    `S <- momentum S - (1 - momentum) rate G / (1 + sum |h|^2)` takes the place of the last term.
    What decays is D, so that a level forgets towards its slow weights.

    Where a slower level carries this one's initial deltas (`outer`, eq. 72), these move after
    tokens outer, 2 outer, ... by the same rule on all the lessons since, with the slower level's
    rate and retention, and D begins with them again.

    A move that is not finite is left out and counted; so is one of a chunk whose root mean square
    error is below `surprise`. A document start sets D, momentum, initial deltas and pending lessons
    to zero before its token; the chunks' places stay.

    Deltas, lessons and momentum take (2, 3 with momentum, 4 and 5 with `outer`) times 4 bytes for
    each slow weight that moves and each sequence. FLOPs a token and moving weight: 2 to read with
    theta, 2 with D, 2 for G, and 4 more for each layer behind another. Inside, errors and lessons
    are float32 at least; products take their inputs in the type of `x`.

    Args:
      x: What the network reads.
      values: What it should have said one token before.
      weights: theta, first layer first; the last has one projection and is linear.
      pace: Rates and retentions.
      memory: What earlier tokens left behind; None for nothing. A call may begin and end anywhere.
      starts: True where a document starts.
      chunk: Tokens between two moves; at least 2, for a pair lies inside a chunk.
      outer: The chunk of the carrying level, a multiple of `chunk`; given exactly if the pace has
        its rate.
      activation: Between layers.
      dgd: Whether moves also erase D along the inputs they saw (delta gradient descent).
      surprise: See above; 0 lets every chunk write.
      form: "auto", "pallas_triton", "together", "chunked" or "reference".

    Returns:
      What was read, in the type of `x`, and the memory after the last token.

    Raises:
      ValueError: The chunks do not fit.

    References:
      Behrouz et al., "Nested Learning: The Illusion of Deep Learning Architecture", 2025, eqs.
      70-74; 54-57 for delta gradient descent.
    """
    _check(chunk, outer, pace)
    setting = Setting(chunk, outer, activation, dgd, surprise)
    call = (x, values, weights, pace, memory, starts, setting)
    forms = FORMS
    if form == "auto" and chunk > kernels.LONGEST:  # kernels for these would be slower
        forms = {name: form for name, form in FORMS.items() if name != "pallas_triton"}
    return pick(forms, form, *call)(*call)


def held_level(
    x: Float[Array, "B T I"],
    weights: Matrices,
    memory: LevelMemory | None = None,
    starts: Bool[Array, "B T"] | None = None,
    *,
    activation: Activation = "silu",
) -> tuple[Float[Array, "B T V"], LevelMemory]:
    """Reads `x` as `continuum_level` does and learns nothing; see `teach_level`.

    Args:
      x: What the network reads.
      weights: theta.
      memory: Whose deltas are read; None for zero.
      starts: True where a document starts: what was learned is forgotten before that token.
      activation: Between layers.

    Returns:
      What was read, and the memory after the last token.
    """
    setting = Setting(1, None, activation, dgd=False, surprise=0.0)
    slow = _product(weights[0].astype(x.dtype), x)
    if memory is None:
        memory = fresh_level(weights, 0, x.shape[0], x.dtype, momentum=False, outer=False)
        y, _ = _forward(setting, weights, None, None, x, slow)
        return y, memory._replace(position=memory.position + x.shape[1])
    opening = None if starts is None else jnp.cumsum(starts, -1) == 0
    y, _ = _forward(setting, weights, memory.fast.delta, opening, x, slow)
    fast = memory.fast if opening is None else _forget(memory.fast, opening[:, -1])
    return y, LevelMemory(memory.position + x.shape[1], memory.last, fast)


def teach_level(
    memory: LevelMemory,
    gradient: Matrices,
    loss: Float[Array, " B"],
    targets: Float[Array, " B"],
    pace: Pace,
    *,
    chunk: int,
    surprise: float = 0.0,
) -> LevelMemory:
    """Adds the gradient of any loss to what is pending, and moves where a chunk has ended.

    The step is `rate G / (1 + targets)`; nothing is foretold and nothing erased.

    Args:
      memory: After the tokens that the gradient is of.
      gradient: Of the sum of the losses of some targets, by the deltas.
      loss: That sum, which a move is gated by in place of the squared error.
      targets: How many they are.
      pace: Rate, retention and momentum.
      chunk: Tokens between two moves.
      surprise: A chunk whose mean loss is below its square writes nothing.
    """
    setting = Setting(chunk, None, "silu", dgd=False, surprise=surprise)
    energy = tuple(targets for _ in gradient)
    lesson = Lesson(gradient, energy, loss, targets)
    fast = memory.fast._replace(pending=jax.tree.map(jnp.add, memory.fast.pending, lesson))
    ends = memory.position % chunk == 0
    move = partial(_move, setting, pace, position=memory.position)
    return memory._replace(fast=jax.lax.cond(ends, move, lambda fast: fast, fast))


def fresh_level(
    weights: Matrices, width: int, batch: int, dtype: jnp.dtype, *, momentum: bool, outer: bool
) -> LevelMemory:
    """The memory before the first token.

    Args:
      weights: The slow weights that deltas are added to.
      width: Of what the network reads.
      batch: Sequences.
      dtype: Of what the network reads.
      momentum: Whether moves have one.
      outer: Whether a slower level carries the initial deltas.
    """

    def zeros() -> Matrices:
        return tuple(jnp.zeros((batch, *w.shape), _wide(w.dtype)) for w in weights)

    def row() -> Float[Array, " B"]:
        return jnp.zeros(batch, _wide(weights[0].dtype))

    def lesson() -> Lesson:
        return Lesson(zeros(), tuple(row() for _ in weights), row(), row())

    fast = Fast(
        lesson(),
        zeros(),
        zeros() if momentum else None,
        zeros() if outer else None,
        lesson() if outer else None,
        *(jnp.zeros(batch, jnp.int32) for _ in range(3)),
    )
    return LevelMemory(jnp.zeros((), jnp.int32), jnp.zeros((batch, width), dtype), fast)


def reference(
    x: Float[Array, "B T I"],
    values: Float[Array, "B T V"],
    weights: Matrices,
    pace: Pace,
    memory: LevelMemory | None,
    starts: Bool[Array, "B T"] | None,
    setting: Setting,
) -> tuple[Float[Array, "B T V"], LevelMemory]:
    """Follows the equations token by token; every inner gradient is taken by `jax.grad`."""
    memory = memory or _fresh(x, weights, pace)
    if starts is None:
        starts = jnp.zeros(x.shape[:2], bool)
    network = partial(_network, setting.activation)

    def lesson(delta, key, value):
        effective = jax.tree.map(jnp.add, weights, delta)
        inputs = network(effective, key)[1]

        def loss(delta):
            error = network(jax.tree.map(jnp.add, weights, delta), key)[0] - value
            return 0.5 * jnp.sum(error**2)

        def erased(delta):
            pairs = zip(delta, inputs, strict=True)
            return sum(0.5 * jnp.sum(jnp.einsum("PIO,I->PO", d, h) ** 2) for d, h in pairs)

        gradient = jax.grad(loss)(delta)
        if setting.dgd:
            gradient = jax.tree.map(jnp.add, gradient, jax.grad(erased)(delta))
        energy = tuple(jnp.sum(h**2) for h in inputs)
        return Lesson(gradient, energy, 2 * loss(delta), jnp.ones_like(energy[0]))

    def step(memory, token):
        x, value, start = token
        fast = _forget(memory.fast, ~start)
        y = jax.vmap(lambda d, x: network(jax.tree.map(jnp.add, weights, d), x)[0])(fast.delta, x)
        first = (memory.position % setting.chunk == 0) | start
        taught = jax.vmap(lesson)(fast.delta, memory.last, value)
        taught = jax.tree.map(lambda a: jnp.where(_rows(first, a), 0, a), taught)
        fast = fast._replace(pending=jax.tree.map(jnp.add, fast.pending, taught))
        position = memory.position + 1
        moved = _move(setting, pace, fast, position)
        ends = position % setting.chunk == 0
        fast = jax.tree.map(partial(jnp.where, ends), moved, fast)
        return LevelMemory(position, x, fast), y

    time_first = [jnp.moveaxis(array, 1, 0) for array in (x, values, starts)]
    memory, y = jax.lax.scan(step, memory, tuple(time_first))
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), memory


def chunked(
    x: Float[Array, "B T I"],
    values: Float[Array, "B T V"],
    weights: Matrices,
    pace: Pace,
    memory: LevelMemory | None,
    starts: Bool[Array, "B T"] | None,
    setting: Setting,
    *,
    together: int = 0,
    recall: Callable[..., Any] | None = None,
) -> tuple[Float[Array, "B T V"], LevelMemory]:
    """Goes from chunk to chunk; inside one all is matrix products.

    What does not depend on D is computed before the scan, and D is first read in the second chunk.
    A call that continues a memory is laid on a grid of tiles, each a part of a chunk and no longer
    than the call, with padding in front and behind that teaches nothing. The backward pass keeps
    the deltas at the beginnings of chunks and computes each chunk a second time.

    Chunks shorter than `together` tokens are solved several at a time where that can be done, see
    `_together`, by `recall` or, without one, `_recall`.
    """
    tokens = _Tokens(
        x=x,
        slow=None,
        values=values,
        starts=starts,
        pairs=jnp.ones(x.shape[:2], bool),
    )
    if memory is None:
        y, fast = _from_nothing(setting, pace, weights, tokens, together, recall or _recall)
        position = jnp.asarray(x.shape[1], jnp.int32)
    else:
        y, fast = _go_on(setting, pace, weights, _with_slow(weights, tokens), memory)
        position = memory.position + x.shape[1]
    return y.astype(x.dtype), LevelMemory(position, x[:, -1], fast)


def together(*call) -> tuple[Float[Array, "B T V"], LevelMemory]:
    """As `chunked`, and short chunks at once: fewer and larger steps, which accelerators want.

    Of chunks that are solved at once all moves are left out if one is not finite.
    """
    return chunked(*call, together=TOGETHER)


def fused(*call) -> tuple[Float[Array, "B T V"], LevelMemory]:
    """As `chunked`, and whole chunks in one launch of a kernel, see `ops.pallas.continuum`.

    What a move that is not finite leaves out are the columns where it is not; it counts as left
    out.
    """
    return chunked(*call, together=call[-1].chunk, recall=_recall_fused)


def _unfit(x, values, weights, pace, memory, starts, setting) -> str | None:
    """Says why the kernels do not take a call, or None if they do."""
    del starts
    reason = launch_refusal()
    if reason is not None:
        return reason
    if len(weights) > 1:
        return f"the kernels move one layer, got {len(weights)}"
    if pace.momentum is not None or setting.dgd or setting.outer or setting.surprise:
        return "the kernels take no momentum, outer, dgd or surprise"
    if memory is not None:
        return "the kernels begin with no memory"
    if platform() == kernels.PLATFORM and x.dtype != jnp.bfloat16:
        return f"the kernels are compiled for bfloat16, got {x.dtype}"
    return kernels.refusal(setting.chunk, x.shape[1], x.shape[2], values.shape[2])


FORMS = {
    "pallas_triton": Form(fused, _unfit, platforms=("gpu",)),
    "together": Form(together, platforms=("gpu", "tpu")),
    "chunked": Form(chunked),
    "reference": Form(reference),
}


class _Tokens(NamedTuple):
    """What a part of a sequence brings along.

    Attributes:
      x: What the network reads.
      slow: What the slow weights of the first layer make of it; None where that is not yet known.
      values: What should have been said one token before.
      starts: Document starts, or None.
      pairs: Whether a token and the one before it are of one chunk and of this call.
    """

    x: Float[Array, "B T I"]
    slow: Float[Array, "B T P O"] | None
    values: Float[Array, "B T V"]
    starts: Bool[Array, "B T"] | None
    pairs: Bool[Array, "#B T"]


def _from_nothing(setting, pace, weights, tokens, together, recall):
    """Reads a sequence from its beginning: the first chunk, whole ones, and the rest of one."""
    batch, time = tokens.x.shape[:2]
    size = min(setting.chunk, time)
    whole = time // setting.chunk
    fast = _fresh(tokens.x, weights, pace).fast
    joined = _joined(setting, weights, whole, together)
    if joined:
        done = whole // joined * joined
        part = _cut(tokens, 0, done * size)
        y, fast = _together(setting, pace, weights[0][0], fast, part, joined, recall)
    else:
        done = 1
        first = _with_slow(weights, _cut(tokens, 0, size))
        y, taught = _tile(setting, weights, None, first)
        fast = fast._replace(pending=taught)
        if not whole:
            return y, fast
        fast = _move(setting, pace, fast, jnp.asarray(size))
    answers = [y]
    nothing = jax.eval_shape(lambda: fast.pending)

    @partial(jax.checkpoint, prevent_cse=False)
    def step(carry, inputs):
        part, index = inputs
        # What is pending is zero and large: it is made here rather than carried.
        pending = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), nothing)
        fast, y = _read(setting, weights, Fast(pending, *carry), part)
        return _move(setting, pace, fast, (index + 1) * size)[1:], y

    rest = _with_slow(weights, _cut(tokens, done * size, time))
    if whole > done:
        parts = _cut(rest, 0, (whole - done) * size)
        parts = jax.tree.map(partial(_chunks, size=size), parts)
        carry, y = jax.lax.scan(step, fast[1:], (parts, jnp.arange(done, whole)))
        fast = Fast(fast.pending, *carry)
        answers.append(jnp.moveaxis(y, 0, 1).reshape(batch, -1, y.shape[-1]))
    if time % size:
        fast, y = _read(setting, weights, fast, _cut(rest, (whole - done) * size, time))
        answers.append(y)
    return jnp.concatenate(answers, 1), fast


def _with_slow(weights, tokens: _Tokens) -> _Tokens:
    """Adds what the slow weights make of tokens."""
    return tokens._replace(slow=_product(weights[0].astype(tokens.x.dtype), tokens.x))


def _joined(setting, weights, whole, together):
    """How many of `whole` chunks are solved at a time; 0 where the next is not linear in each."""
    if len(weights) > 1 or setting.outer is not None or setting.surprise:
        return 0
    if whole < 2 or not together:
        return 0
    return min(max(1, together // setting.chunk), whole)


class _Decays(NamedTuple):
    """What moves leave of each other, as tables over the chunks of a group.

    Attributes:
      carry: The share of the first deltas in those before chunk n, or after the last.
      swept: The share of the first momentum in them.
      later: The share of a move in the deltas n moves on.
      momentum: The share of a move in the momentum n moves on.
      momentum_carry: The share of the first momentum in the last.
    """

    carry: Float[Array, " N+1"]
    swept: Float[Array, " N+1"]
    later: Float[Array, " N"]
    momentum: Float[Array, " N"]
    momentum_carry: Float[Array, ""]


def _decays(pace: Pace, count: int) -> _Decays:
    steps = jnp.arange(count + 1)
    share = jnp.zeros(()) if pace.momentum is None else pace.momentum
    lasting = share**steps
    # The deltas n moves on see a move through each momentum since.
    between = steps[:, None] - steps
    kept = jnp.where(between >= 0, pace.retain ** jnp.maximum(between, 0), 0)
    return _Decays(
        carry=pace.retain**steps,
        swept=jnp.where(steps > 0, kept[:, 1:] @ lasting[1:], 0),
        later=(1 - share) * (kept @ lasting)[:-1],
        momentum=(1 - share) * lasting[:-1],
        momentum_carry=lasting[-1],
    )


class _Tables(NamedTuple):
    """What a group of chunks does with states and errors, worked out before; see `_Group`.

    Of many groups, each has an axis of them.

    Attributes:
      keys: Whether a token is the key of a pair.
      read: What is left of Z at each token.
      write: The shares of a pair's error in the move; zero where a token is no key.
      size: No less than any number of a token in `write h^T`, over what it teaches.
      lower: What pairs teach tokens of later chunks; None where the group is one chunk.
      decay: What is left of Z after the group.
      stay: Whether no document starts in it.
    """

    keys: Bool[Array, "B *G S"]
    read: Float[Array, "B *G S J"]
    write: Float[Array, "B *G S J"]
    size: Float[Array, "B *G S"]
    lower: Float[Array, "B *G R R"] | None
    decay: Float[Array, "B *G J J"]
    stay: Bool[Array, " B *G"]


class _Group(NamedTuple):
    """A group of chunks, or all of them side by side in time, as the recurrence meets them.

    A state Z is D, or D and the momentum. With `h` the inputs, theta the slow weights, tau the
    errors that a group teaches and the sums over J, a group answers and makes of the state

        y = h theta + sum read (h Z) + ((I + lower)^-1 - I) tau'    tau' = tau without the last term
        Z <- decay Z - h^T (write tau)

    Attributes:
      hidden: The inputs h.
      values: What should have been answered one token before.
      tables: The rest.
    """

    hidden: Float[Array, "B S I"]
    values: Float[Array, "B S O"]
    tables: _Tables


def _together(setting, pace, weight, fast: Fast, tokens: _Tokens, joined: int, recall):
    """Reads groups of `joined` chunks of a linear layer that has learned nothing yet.

    What D adds to the answer of token t is linear in the errors of earlier chunks. With g = 1, or 2
    where moves erase, `later` the decay from the move after a pair's chunk to t's chunk, e_s the
    error of pair s without D and A_s what D adds to the answer of its key:

        A_t = (what the group's first deltas and momentum add) - sum_s L_ts / g (e_s + g A_s)
        L_ts = g later step_s <h_t, h_s>     s in an earlier chunk, and the same document, as t

    so `A = A' + ((I + L)^-1 - I) (A' + e / g)` with A' the first part. The inverse is found for all
    groups at once, and two products with the state and one with the inverse are left from group to
    group, none with a state for the first and no move of the last unless its memory is asked for.
    That with theta is taken there too: what it reads is then copied out of the sequence but once,
    and what it answers never lies there.

    FLOPs a token: 2 I O with theta and 4 I O with states; for groups of S > C tokens 2 S (I + O)
    beside. The backward pass takes twice that, and keeps what it need not compute again then, see
    `KEPT`.
    """
    size, gain = joined * setting.chunk, _gain(setting)
    batch = len(tokens.x)
    weight, hidden = weight.astype(tokens.x.dtype), tokens.x
    if recall is _recall:
        hidden = _in_parts(hidden, tokens.x.shape[1] // size)
    parts = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[2:]), (hidden, tokens.starts))
    tables = _tables(setting, pace, joined, *parts)
    groups = _Group(
        hidden=hidden,
        values=tokens.values,
        tables=jax.tree.map(lambda a: a.reshape(batch, -1, *a.shape[1:]), tables),
    )
    if groups.tables.stay.shape[1] > 1:
        y, state, finite = recall(gain, weight, groups)
    else:
        (y, state, finite), _ = _recall_forward(gain, weight, groups)
    last = _group_at(groups, groups.tables.stay.shape[1] - 1)
    taught = _taught(gain, last, y[:, -size:], _slow(weight, last))
    state, end = _next(last, state, taught)
    writes = joined * (jnp.sum(finite, 0, dtype=jnp.int32) + end)
    state = tuple(z[:, None] for z in state)
    return y, fast._replace(
        delta=state[:1],
        momentum=None if fast.momentum is None else state[1:],
        writes=fast.writes + writes,
        skipped=fast.skipped + joined * groups.tables.stay.shape[1] - writes,
    )


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _in_parts(x: Float[Array, "B T I"], count: int) -> Float[Array, "B T I"]:
    """Returns x of parts that lie apart: products of these need no copies, and nothing the whole.

    Of more parts than are compiled one by one there is nothing to be had.
    """
    if count > UNROLL + 2:
        return x
    return jnp.concatenate(jax.lax.optimization_barrier(jnp.split(x, count, 1)), 1)


_in_parts.defvjp(lambda x, count: (_in_parts(x, count), None), lambda _count, _, slope: (slope,))


def _gain(setting):
    """How strongly what D adds is held against a pair: twice where moves erase."""
    return 2 if setting.dgd else 1


def _slow(weight: Float[Array, "I O"], group: _Group):
    """What the slow weights answer."""
    # Products of several groups with one matrix would be joined, for which XLA copies these.
    hidden, weight = jax.lax.optimization_barrier((group.hidden, weight))
    return jnp.einsum("BSI,IO->BSO", hidden, weight)


def _slow_backward(weight: Float[Array, "I O"], group: _Group, slope: Float[Array, "B S O"]):
    """The gradients of what they read, and of themselves."""
    hidden = group.hidden
    slope, weight = jax.lax.optimization_barrier((slope, weight))
    d_weight = jnp.einsum("BSI,BSO->IO", hidden, slope, preferred_element_type=_wide(slope.dtype))
    return jnp.einsum("BSO,IO->BSI", slope, weight), d_weight


def _answer(gain, group: _Group, mixing, state: tuple[Float[Array, "B I O"], ...], slow):
    """What a group answers from a state, which is empty before the first."""
    y = slow.astype(_wide(slow.dtype))
    if state:
        y = y + _weighted_sum(group.tables.read, [_product_with(z, group.hidden) for z in state])
    if mixing is not None:
        y = y + _mixed(mixing, _taught(gain, group, y, slow))
    return y.astype(slow.dtype)


def _taught(gain, group: _Group, y, slow):
    """By how much answers are wrong, over the gain and with what D adds whole; zero for no key."""
    error = y.astype(_wide(y.dtype)) - _earlier(group.values) / gain
    if gain > 1:
        error = error - (1 - 1 / gain) * slow
    return _where(group.tables.keys, error).astype(slow.dtype)


def _weighed(group: _Group) -> list[Float[Array, "B S I"]]:
    """The inputs, with their shares in the move.

    The sign is theirs: it would be read and written for the products.
    """
    return [_times(-w, group.hidden) for w in jnp.moveaxis(group.tables.write, -1, 0)]


def _next(group: _Group, state, taught):
    """The state after a group, and whether its move is finite; if it is not, it is left out."""
    largest = jnp.sum(jnp.abs(taught.astype(state[0].dtype)), -1)
    bound = jnp.sum(group.tables.size * largest, -1) + jnp.sum(group.tables.decay, (1, 2))
    finite = jnp.isfinite(bound)  # which is so before the products, and takes none of their bytes
    moves = [_moves(hidden, taught) for hidden in _weighed(group)]
    new = [kept + move for kept, move in zip(_mix(group.tables.decay, state), moves, strict=True)]
    return tuple(
        jnp.where(_rows(finite, a), a, jnp.where(_rows(group.tables.stay, b), b, 0))
        for a, b in zip(new, state, strict=True)
    ), finite


def _moves(hidden: Float[Array, "B S I"], rows: Float[Array, "B S O"]) -> Float[Array, "B I O"]:
    """Sums products over the tokens."""
    return jnp.einsum("BSI,BSO->BIO", hidden, rows)


def _product_with(state: Float[Array, "B I O"], hidden: Float[Array, "B S I"]):
    return jnp.einsum("BSI,BIO->BSO", hidden, state)


def _times(shares: Float[Array, "B S"], array: Float[Array, "B S N"]) -> Float[Array, "B S N"]:
    return (shares[..., None] * array).astype(array.dtype)


def _weighted_sum(shares: Float[Array, "B S J"], arrays) -> Any:
    return sum(w[..., None] * a for w, a in zip(jnp.moveaxis(shares, -1, 0), arrays, strict=True))


def _mix(decay: Float[Array, "B J J"], state) -> list[Any]:
    """`decay state`, term by term: as a product it would be rounded."""
    rows = jnp.moveaxis(decay, 0, 2)[..., None, None]
    return [sum(share * z for share, z in zip(row, state, strict=True)) for row in rows]


def _at(groups, index):
    """One of what the recurrence has stacked."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, 0, False), groups)


def _time_at(array: Float[Array, "B T N"], index, size: int) -> Float[Array, "B S N"]:
    """A group's part of what has them side by side in time."""
    return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis=1)


def _table_at(tables, index):
    """One group's of what has an axis of them."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, 1, False), tables)


def _group_at(groups: _Group, index) -> _Group:
    size = groups.tables.keys.shape[-1]
    return _Group(
        hidden=_time_at(groups.hidden, index, size),
        values=_time_at(groups.values, index, size),
        tables=_table_at(groups.tables, index),
    )


def _put(array: Float[Array, "B T N"], index, part: Float[Array, "B S N"]) -> Float[Array, "B T N"]:
    """Writes a group's part of what has them side by side in time: once, where it is to lie."""
    whole = jax.lax.dynamic_update_slice_in_dim(array, part, index * part.shape[1], axis=1)
    # All that goes on from the part would else compute it again, and write it again for itself.
    return jax.lax.optimization_barrier(whole)


def _in_time(array: Float[Array, "G B S N"]) -> Float[Array, "B T N"]:
    """Puts groups side by side in time."""
    return jnp.moveaxis(array, 0, 1).reshape(array.shape[1], -1, array.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recall(gain, weight: Float[Array, "I O"], groups: _Group):
    """What groups answer.

    Returns also the state before the last group's move, and which of the moves before it are
    finite. The backward pass keeps the states that groups begin with, in the type of what is read,
    and what groups teach.
    """
    return _recall_forward(gain, weight, groups)[0]


def _recall_forward(gain, weight, groups: _Group):
    mixing, hidden, lower = None, groups.hidden, groups.tables.lower
    if lower is not None:
        chunk = groups.tables.keys.shape[-1] - lower.shape[-1]
        inverse = _inverse_beside_one(lower.reshape(-1, *lower.shape[2:]), chunk)
        mixing = inverse.reshape(lower.shape).astype(hidden.dtype)
        mixing = checkpoint_name(mixing, KEPT)

    def answer(index, y, state):
        kept = tuple(z.astype(hidden.dtype) for z in state)
        group = _group_at(groups, index)
        slow = _slow(weight, group)
        part = _answer(gain, group, _table_at(mixing, index), kept, slow)
        y = _put(y, index, part)
        return kept, y, _taught(gain, group, _time_at(y, index, part.shape[1]), slow)

    def step(carry, _):
        # The index is carried, for one of an array would not be known where steps are unrolled.
        index, y, state = carry
        kept, y, taught = answer(index, y, state)
        state, finite = _next(_group_at(groups, index), state, taught)
        return (index + 1, y, state), (kept, taught, finite)

    last, count = groups.tables.stay.shape[1] - 1, groups.tables.read.shape[-1]
    room = jax.lax.empty((*hidden.shape[:2], weight.shape[1]), hidden.dtype)
    _, y, begin = answer(0, room, ())
    state = (jnp.zeros((len(hidden), *weight.shape), _wide(hidden.dtype)),) * count
    if not last:
        return (y, state, jnp.zeros((0, len(hidden)), bool)), None
    state, moved = _next(_group_at(groups, 0), state, begin)
    (_, y, state), (states, taught, finite) = jax.lax.scan(
        step, (1, y, state), length=last - 1, unroll=max(1, min(UNROLL, last - 1))
    )
    kept, y, end = answer(last, y, state)
    states = tuple(jnp.concatenate([a, b[None]]) for a, b in zip(states, kept, strict=True))
    if len(states) * hidden.shape[-1] <= LARGEST * groups.tables.keys.shape[-1]:
        states = checkpoint_name(states, KEPT)
    taught = jnp.concatenate([begin[None], taught, end[None]])
    finite = jnp.concatenate([moved[None], finite])
    y, taught, finite = (checkpoint_name(a, KEPT) for a in (y, taught, finite))
    return (y, state, finite), (weight, groups, mixing, states, taught, finite)


def _recall_backward(gain, kept, cotangents):
    weight, groups, mixing, states, taught, finite = kept
    d_y, d_state, _ = cotangents
    dtype, wide, size = d_y.dtype, d_state[0].dtype, groups.tables.keys.shape[-1]
    last = groups.tables.stay.shape[1] - 1

    def overlaps(array, others):
        """The gradient of shares of an array."""
        return jnp.stack([jnp.sum((array * one).astype(wide), -1) for one in others], -1)

    def unmix(index, d_taught, shares=()):
        """What is asked of a group before its chunks are joined, whole and in shares.

        Also what is asked of what it is taught, of `lower`, the inputs and the slow weights.
        """
        d_answer = _time_at(d_y, index, size)
        d_before, d_lower = (d_answer + d_taught).astype(dtype), None
        if mixing is not None:
            # The rest is kept apart from `d_y`, beside which it is small and would be rounded.
            d_taught = d_taught + _unmixed(_table_at(mixing, index), d_before)
            d_before = (d_answer + d_taught).astype(dtype)
            d_lower = -_lower_products(groups.tables.lower[:, 0], d_before, _at(taught, index))
        asked = [d_before, *(_times(share, d_before) for share in shares)]
        asked = jax.lax.optimization_barrier(asked)  # written in one pass, not in one for each
        d_slow = asked[0] if gain == 1 else (d_answer + d_taught / gain).astype(dtype)
        slow = _slow_backward(weight, _group_at(groups, index), d_slow)
        return asked, (d_taught.astype(dtype), d_lower, *slow)

    def answer(index, d_taught, d_state):
        group = _group_at(groups, index)
        shares = jnp.moveaxis(group.tables.read, -1, 0)
        (d_before, *d_read), found = unmix(index, d_taught, shares)
        d_taught, d_lower, d_hidden, d_weight = found
        d_seen = [jnp.einsum("BSO,BIO->BSI", d_before, z) for z in _at(states, index - 1)]
        d_hidden = d_hidden + _weighted_sum(group.tables.read, d_seen)
        more = [_moves(group.hidden, rows) for rows in d_read]
        d_state = tuple(a + b for a, b in zip(d_state, more, strict=True))
        return d_state, d_weight, (d_taught, d_lower, overlaps(group.hidden, d_seen), d_hidden)

    def move(index, d_state):
        group, moved = _group_at(groups, index), _at(finite, index)
        d_new = [jnp.where(_rows(moved, d), d, 0) for d in d_state]
        d_move = [d.astype(dtype) for d in d_new]
        pairs = zip(d_move, _weighed(group), strict=True)
        d_taught = sum(_product_with(d, hidden).astype(wide) for d, hidden in pairs)
        told = _at(taught, index)
        d_weighed = [jnp.einsum("BSO,BIO->BSI", told, d) for d in d_move]
        d_hidden = _weighted_sum(-group.tables.write, d_weighed)
        before = _at(states, jnp.maximum(index - 1, 0))
        d_decay = [[jnp.sum(d * z, (1, 2)) for z in before] for d in d_new]
        d_decay = jnp.stack([jnp.stack(row, -1) for row in d_decay], 1)
        older = _mix(jnp.swapaxes(group.tables.decay, 1, 2), d_new)
        still = [jnp.where(_rows(~moved & group.tables.stay, d), d, 0) for d in d_state]
        d_state = tuple(a + b for a, b in zip(older, still, strict=True))
        return d_state, d_taught, d_hidden, -overlaps(group.hidden, d_weighed), d_decay

    def step(carry, _):
        index, d_state, d_weight = carry
        d_state, d_taught, d_hidden, d_write, d_decay = move(index, d_state)
        d_state, slope, (d_taught, d_lower, d_read, more) = answer(index, d_taught, d_state)
        found = d_taught, (d_hidden + more).astype(dtype), d_lower, d_read, d_write, d_decay
        return (index - 1, d_state, d_weight + slope), found

    d_taught = jnp.zeros((len(d_y), size, d_y.shape[-1]), wide)
    d_state, slope, (d_taught, d_lower, d_read, d_hidden) = answer(last, d_taught, d_state)
    end = d_taught, d_hidden.astype(dtype), d_lower, d_read, jnp.zeros_like(d_read), None
    (_, d_state, slope), between = jax.lax.scan(
        step,
        (last - 1, d_state, slope),
        length=last - 1,
        reverse=True,
        unroll=max(1, min(UNROLL, last - 1)),
    )
    _, d_taught, d_hidden, d_write, d_decay = move(0, d_state)
    _, (d_taught, d_lower, more, d_weight) = unmix(0, d_taught)
    d_hidden, nothing = (d_hidden + more).astype(dtype), jnp.zeros_like(d_decay)
    begin = d_taught, d_hidden, d_lower, jnp.zeros_like(d_write), d_write, nothing
    end = *end[:-1], nothing
    d_taught, d_hidden = (
        jnp.concatenate([a, _in_time(b), c], 1)
        for a, b, c in zip(begin[:2], between[:2], end[:2], strict=True)
    )
    d_lower, d_read, d_write, d_decay = jax.tree.map(
        lambda a, b, c: jnp.moveaxis(jnp.concatenate([a[None], b, c[None]]), 0, 1),
        *(begin[2:], between[2:], end[2:]),
    )
    d_taught = d_taught / gain
    tables = _Tables(
        keys=_no_slope(groups.tables.keys),
        read=d_read,
        write=d_write,
        size=jnp.zeros_like(groups.tables.size),
        lower=d_lower,
        decay=d_decay,
        stay=_no_slope(groups.tables.stay),
    )
    slopes = _Group(hidden=d_hidden, values=-_later(d_taught), tables=tables)
    return (slope + d_weight).astype(weight.dtype), slopes


_recall.defvjp(_recall_forward, _recall_backward)


def _recall_fused(gain, weight, groups: _Group):
    """As `_recall` of groups that are one chunk, by a kernel; there is no gain."""
    del gain
    tables, count = groups.tables, groups.tables.stay.shape[1]
    place = jnp.arange(count)
    first, last = place == 0, place == count - 1  # without deltas, and whose move is not asked for

    def flat(table):
        return table.reshape(len(table), -1)

    tokens = kernels.Tokens(
        hidden=groups.hidden,
        values=groups.values,
        read=flat(jnp.where(first[:, None], 0, tables.read[..., 0])),
        write=flat(jnp.where(last[:, None], 0, tables.write[..., 0])),
        decay=jnp.where(last, 1, tables.decay[..., 0, 0]),
    )
    stay = tables.stay.astype(tokens.decay.dtype)
    y, state, finite = _read_fused(tokens, weight, flat(tables.size), stay)
    return y, (state,), finite.T[:-1]


@jax.custom_vjp
def _read_fused(tokens: kernels.Tokens, weight, size, stay):
    """What a level answers, its deltas after the last chunk, and which moves were finite."""
    return kernels.answer(tokens, weight, size, stay, keep=False, interpret=_interpret())[:3]


def _read_fused_forward(tokens, weight, size, stay):
    answer = kernels.answer(tokens, weight, size, stay, keep=True, interpret=_interpret())
    y, state, finite, before = jax.tree.map(lambda a: checkpoint_name(a, KEPT), answer)
    return (y, state, finite), (tokens, weight, stay, y, finite, before)


def _read_fused_backward(kept, cotangents):
    tokens, weight, stay, y, finite, before = kept
    d_y, d_state, _ = cotangents
    moved = jnp.repeat(finite, y.shape[1] // stay.shape[1], axis=1)
    tokens = tokens._replace(
        write=jnp.where(moved, tokens.write, 0), decay=jnp.where(finite, tokens.decay, stay)
    )
    d_answer, d_taught, d_after = kernels.unlearn(tokens, d_y, d_state, interpret=_interpret())
    d_hidden, d_write, d_decay = kernels.charge(
        tokens, weight, y, before, d_answer, d_after, interpret=_interpret()
    )
    d_weight = jnp.einsum("BTI,BTO->IO", tokens.hidden, d_answer, preferred_element_type=stay.dtype)
    d_tokens = kernels.Tokens(
        hidden=d_hidden,
        values=-_later(d_taught),
        read=jnp.zeros_like(tokens.read),  # ones and zeros
        write=jnp.where(moved, d_write, 0),
        decay=jnp.where(finite, d_decay, 0),
    )
    nothing = jnp.zeros((len(y), y.shape[1]), stay.dtype)
    return d_tokens, d_weight.astype(weight.dtype), nothing, jnp.zeros_like(stay)


_read_fused.defvjp(_read_fused_forward, _read_fused_backward)


def _interpret():
    return platform() != kernels.PLATFORM


def _no_slope(array: Bool[Array, "..."]) -> Any:
    return np.zeros(array.shape, jax.dtypes.float0)


def _lower_products(like: Float[Array, "B R R"], rows, columns) -> Float[Array, "B R R"]:
    """Products of the later tokens' rows and the earlier ones', of which `lower` has entries."""
    size, part = rows.shape[1], like.shape[1]
    product = partial(jnp.einsum, "BSO,BDO->BSD", preferred_element_type=like.dtype)
    if 2 * part > size:  # where products that nobody needs are cheaper than copies
        return product(rows, columns)[:, size - part :, :part]
    return product(rows[:, size - part :], columns[:, :part])


def _tables(setting, pace, joined: int, x: Float[Array, "B S I"], starts) -> _Tables:
    """Works out what does not depend on the state that a group begins with."""
    wide, chunk = _wide(x.dtype), setting.chunk
    batch, size = x.shape[:2]
    decays = _decays(pace, joined)
    keys = jnp.broadcast_to((jnp.arange(size) + 1) % chunk != 0, (batch, size))
    document = jnp.zeros((batch, size), jnp.int32)
    if starts is not None:
        document = jnp.cumsum(starts, -1)
        keys = keys & (document == jnp.repeat(document[:, chunk - 1 :: chunk], chunk, axis=1))
    square = jnp.sum(_where(keys, x).astype(wide) ** 2, -1)
    energy = jnp.repeat(square.reshape(batch, -1, chunk).sum(-1), chunk, axis=1)
    step = jnp.where(keys, _gain(setting) * pace.rate / (1 + energy), 0)

    reads, writes = [decays.carry], [decays.later]
    table = decays.carry[-1:, None]
    if pace.momentum is not None:
        reads, writes = [*reads, decays.swept], [*writes, decays.momentum]
        ends = [decays.carry[-1], decays.swept[-1], jnp.zeros(()), decays.momentum_carry]
        table = jnp.stack(ends).reshape(2, 2)
    stay = document[:, -1] == 0
    seen = jnp.where(document == 0, 1, 0)
    learned = jnp.where(document == document[:, -1:], step, 0)
    # Repeated, not looked up: the gradient of a look-up adds up one number after the other.
    read = jnp.stack([seen * jnp.repeat(share[:joined], chunk) for share in reads], -1)
    write = jnp.stack([learned * jnp.repeat(share[::-1], chunk) for share in writes], -1)
    return _Tables(
        keys=keys,
        # In a group of one chunk these are ones and zeros, whose gradient would be found in vain.
        read=read if joined > 1 else jax.lax.stop_gradient(read),
        write=write,
        size=jax.lax.stop_gradient(jnp.sum(jnp.abs(write), -1) * (1 + square)),
        lower=_lower(chunk, decays.later, x, step, document) if joined > 1 else None,
        decay=_rows(stay, table[None]) * table,
        stay=stay,
    )


def _lower(chunk: int, later, x, step, document) -> Float[Array, "B R R"]:
    """The matrix L of `_together`, without the first chunk's rows and the last one's columns.

    These are zero.
    """
    place = jnp.arange(x.shape[1] // chunk - 1)
    between = place[:, None] - place
    shares = jnp.where(between >= 0, later[jnp.maximum(between, 0)], 0)
    shares = jnp.repeat(jnp.repeat(shares, chunk, 0), chunk, 1)
    rows, columns = slice(chunk, None), slice(None, -chunk)
    lower = shares * _overlap(x[:, rows], x[:, columns]) * step[:, None, columns]
    return jnp.where(document[:, rows, None] == document[:, None, columns], lower, 0)


@jax.custom_vjp
def _overlap(rows: Float[Array, "B R I"], columns: Float[Array, "B R I"]) -> Float[Array, "B R R"]:
    """Products of tokens, in a wide type; the backward pass multiplies in theirs."""
    return jnp.einsum("BSI,BDI->BSD", rows, columns, preferred_element_type=_wide(rows.dtype))


def _overlap_backward(kept, slope):
    rows, columns = kept
    slope = slope.astype(rows.dtype)
    d_rows = jnp.einsum("BSD,BDI->BSI", slope, columns)
    return d_rows, jnp.einsum("BSD,BSI->BDI", slope, rows)


_overlap.defvjp(lambda *tokens: (_overlap(*tokens), tokens), _overlap_backward)


def _mixed(mixing: Float[Array, "B R R"], array: Float[Array, "B S N"]):
    """`mixing` times an array: nothing for the first chunk, and nothing of the last."""
    part, rest = mixing.shape[1], array.shape[1] - mixing.shape[1]
    if part > rest:  # where products with zeros are cheaper than a copy
        mixing = jnp.pad(mixing, ((0, 0), (rest, 0), (0, rest)))
        return jnp.einsum("BSD,BDN->BSN", mixing, array)
    product = jnp.einsum("BSD,BDN->BSN", mixing, array[:, :part])
    return jnp.pad(product, ((0, 0), (rest, 0), (0, 0)))


def _unmixed(mixing: Float[Array, "B R R"], array: Float[Array, "B S N"]):
    """The transpose of `_mixed`."""
    part, rest = mixing.shape[1], array.shape[1] - mixing.shape[1]
    if part > rest:
        mixing = jnp.pad(mixing, ((0, 0), (rest, 0), (0, rest)))
        return jnp.einsum("BSD,BSN->BDN", mixing, array)
    product = jnp.einsum("BSD,BSN->BDN", mixing, array[:, rest:])
    return jnp.pad(product, ((0, 0), (0, rest), (0, 0)))


def _inverse_beside_one(lower: Float[Array, "B R R"], chunk: int) -> Float[Array, "B R R"]:
    """`(I + L)^-1 - I` of a matrix L whose blocks of a chunk on and above the diagonal are zero.

    L and the result come without their first rows of blocks and last columns, which are zero. The
    corner of `[[A, 0], [B, D]]^-1` is `-D^-1 B A^-1`: stable, where the Neumann series is not.
    """
    size = lower.shape[-1]
    half = (size // chunk + 1) // 2 * chunk
    corner = lower[:, half - chunk :, :half]
    first = second = None
    if size > half:
        second = _inverse_beside_one(lower[:, half:, half:], chunk)
        corner = corner + _mixed(second, corner)
    if half > chunk:
        first = _inverse_beside_one(lower[:, : half - chunk, : half - chunk], chunk)
        more = jnp.einsum("BSD,BDE->BSE", corner[:, :, chunk:], first)
        corner = corner + jnp.pad(more, ((0, 0), (0, 0), (0, chunk)))
    result = -corner
    if second is not None:
        behind = jnp.pad(second, ((0, 0), (chunk, 0), (0, 0)))
        result = jnp.concatenate([result, behind], -1)
    if first is not None:
        above = jnp.pad(first, ((0, 0), (0, 0), (0, size - half + chunk)))
        result = jnp.concatenate([above, result], 1)
    return result


def _go_on(setting, pace, weights, tokens, memory):
    """Reads a sequence on from any place in a chunk, tile by tile."""
    batch, time = tokens.x.shape[:2]
    size = max(part for part in range(1, min(setting.chunk, time) + 1) if not setting.chunk % part)
    offset = memory.position % size
    count = -(-(time + size - 1) // size)
    before = memory.position - offset
    index = jnp.arange(count * size)
    live = (index >= offset) & (index < offset + time)
    pairs = live & ((before + index) % setting.chunk != 0)

    def lay(array):
        room = jnp.zeros((batch, count * size + 1, *array.shape[2:]), array.dtype)
        return jax.lax.dynamic_update_slice_in_dim(room, array, offset + 1, 1)

    def with_last(array, last):
        return jax.lax.dynamic_update_slice_in_dim(array, last[:, None], offset, 1)

    last = memory.last.astype(tokens.x.dtype)
    slow = _product(weights[0].astype(last.dtype), last[:, None])[:, 0]
    grid = _Tokens(
        with_last(lay(tokens.x), last),
        with_last(lay(tokens.slow), slow),
        lay(tokens.values),
        None if tokens.starts is None else lay(tokens.starts),
        jnp.broadcast_to(jnp.concatenate([jnp.zeros(1, bool), pairs]), (batch, len(index) + 1)),
    )
    tiles = jax.tree.map(lambda a: _tiles(a, size, count), grid)

    @partial(jax.checkpoint, prevent_cse=False)
    def step(fast, inputs):
        tile, tile_index = inputs
        if tile.starts is not None:  # that of the leading token was heeded in its own tile
            tile = tile._replace(starts=tile.starts.at[:, 0].set(False))
        fast, y = _read(setting, weights, fast, tile)
        position = before + (tile_index + 1) * size
        ends = (position % setting.chunk == 0) & (position <= memory.position + time)
        move = partial(_move, setting, pace, position=position)
        return jax.lax.cond(ends, move, lambda fast: fast, fast), y[:, 1:]

    fast, y = jax.lax.scan(step, memory.fast, (tiles, jnp.arange(count)))
    y = jnp.moveaxis(y, 0, 1).reshape(batch, count * size, -1)
    return jax.lax.dynamic_slice_in_dim(y, offset, time, 1), fast


def _read(setting, weights, fast: Fast, tokens: _Tokens):
    """Reads a part of a chunk; its lessons join those that are pending."""
    y, taught = _tile(setting, weights, fast.delta, tokens)
    if tokens.starts is not None:
        fast = _forget(fast, ~jnp.any(tokens.starts, -1))
    return fast._replace(pending=jax.tree.map(jnp.add, fast.pending, taught)), y


def _tile(setting, weights, delta: Matrices | None, tokens: _Tokens):
    """Reads tokens at one state of the deltas, None for zero: what they say and what they teach."""
    x, slow, values, starts, pairs = tokens
    opening = None
    if starts is not None:
        document = jnp.cumsum(starts, -1)
        opening = document == 0
        pairs = pairs & ~starts & (document == document[:, -1:])
    y, path = _forward(setting, weights, delta, opening, x, slow)
    # A token is the key of the pair that the next one closes.
    keys = jnp.pad(jnp.broadcast_to(pairs, x.shape[:2])[:, 1:], ((0, 0), (0, 1)))
    wide = _wide(x.dtype)
    error = jnp.where(keys[..., None], y.astype(wide) - _earlier(values).astype(wide), 0)
    gradient, energy = _backward(setting, weights, delta, opening, path, error, keys)
    taught = Lesson(
        gradient, energy, jnp.sum(error**2, (1, 2)), jnp.sum(keys, -1, dtype=energy[0].dtype)
    )
    return y, taught


class _Layer(NamedTuple):
    """A layer as tokens met it: its input, the way back from it, and what D added."""

    x: Float[Array, "B T I"]
    pull: Callable[[Array], tuple[Array]] | None
    added: Float[Array, "B T P O"] | None


def _forward(setting, weights, delta, opening, x, slow):
    """Runs the network; returns its output and the path through its layers."""
    path, z, pull = [], slow, None
    for layer, weight in enumerate(weights):
        if layer:
            x, pull = jax.vjp(partial(_activate, setting.activation), z)
            z = _product(weight.astype(x.dtype), x)
        added = None
        if delta is not None:
            added = _product(delta[layer].astype(x.dtype), x)
            added = added if opening is None else _where(opening, added)
            z = z + added
        path.append(_Layer(x, pull, added))
    return z[:, :, 0], path


def _backward(setting, weights, delta, opening, path, error, keys):
    """Takes the gradient of the pairs' losses by the effective weights, layer by layer."""
    gradients, energies = [], []
    dtype = path[0].x.dtype
    cotangent = error.astype(dtype)[:, :, None]
    for layer, (x, pull, added) in reversed(list(enumerate(path))):
        taught = cotangent
        if setting.dgd and added is not None:
            taught = taught + _where(keys, added)
        gradient = jnp.einsum("BTI,BTPO->BPIO", x, taught, preferred_element_type=_wide(dtype))
        gradients.append(gradient)
        energies.append(jnp.sum(_where(keys, x).astype(_wide(dtype)) ** 2, (1, 2)))
        if pull is not None:
            back = jnp.einsum("BTPO,PIO->BTI", cotangent, weights[layer].astype(dtype))
            if delta is not None:
                more = jnp.einsum("BTPO,BPIO->BTI", cotangent, delta[layer].astype(dtype))
                back = back + (more if opening is None else _where(opening, more))
            (cotangent,) = pull(back)
    return tuple(gradients[::-1]), tuple(energies[::-1])


def _move(setting, pace, fast: Fast, position) -> Fast:
    """Moves the deltas at the end of a chunk, `position` tokens after the first."""
    change = _step(pace.rate, fast.pending)
    momentum = fast.momentum
    if momentum is not None:
        share = pace.momentum
        momentum = tuple(share * s + (1 - share) * c for s, c in zip(momentum, change, strict=True))
        change = momentum
    delta = tuple(pace.retain * d + c for d, c in zip(fast.delta, change, strict=True))
    initial, outer = fast.initial, fast.outer
    if initial is not None:
        outer = jax.tree.map(jnp.add, outer, fast.pending)
        carried = _step(pace.outer_rate, outer)
        carried = tuple(pace.outer_retain * i + c for i, c in zip(initial, carried, strict=True))
        again = position % setting.outer == 0
        initial, delta = (
            jax.tree.map(partial(jnp.where, again), carried, old) for old in (initial, delta)
        )
        outer, momentum = jax.tree.map(lambda a: jnp.where(again, 0, a), (outer, momentum))
    surprised = fast.pending.error >= setting.surprise**2 * fast.pending.pairs
    finite = _finite((delta, initial))
    writes = surprised & finite

    def keep(new, old):
        return jax.tree.map(lambda a, b: jnp.where(_rows(writes, a), a, b), new, old)

    return Fast(
        jax.tree.map(jnp.zeros_like, fast.pending),
        keep(delta, fast.delta),
        keep(momentum, fast.momentum),
        keep(initial, fast.initial),
        keep(outer, fast.outer),
        fast.writes + writes,
        fast.gated + (finite & ~surprised),
        fast.skipped + ~finite,
    )


def _step(rate, lesson: Lesson) -> Matrices:
    """The change that a lesson asks for."""
    scales = (rate / (1 + energy) for energy in lesson.energy)
    return tuple(-_rows(s, g) * g for s, g in zip(scales, lesson.gradient, strict=True))


def _finite(matrices) -> Bool[Array, " B"]:
    sums = [jnp.sum(m, tuple(range(1, m.ndim))) for m in jax.tree.leaves(matrices)]
    return jnp.isfinite(sum(sums))


def _forget(fast: Fast, kept: Bool[Array, " B"]) -> Fast:
    """Sets rows to zero; what was counted stays."""

    def keep(tree):
        return jax.tree.map(lambda a: jnp.where(_rows(kept, a), a, 0), tree)

    return fast._replace(
        pending=keep(fast.pending),
        delta=keep(fast.delta),
        momentum=keep(fast.momentum),
        initial=keep(fast.initial),
        outer=keep(fast.outer),
    )


def _network(activation, weights, x):
    """Runs the network on one vector; returns its output and every layer's input."""
    inputs = []
    for layer, weight in enumerate(weights):
        inputs.append(x)
        x = jnp.einsum("PIO,I->PO", weight, x)
        x = x[0] if layer == len(weights) - 1 else _activate(activation, x)
    return x, inputs


def _activate(activation, z):
    """Joins the projections of a layer into its hidden units."""
    first, *factor = apart(z, -2)
    active = ACTIVATIONS[activation](first)
    return active * factor[0] if factor else active


def _product(weight, x):
    """Multiplies tokens by matrices of all sequences, or of each."""
    return jnp.einsum("BTI,PIO->BTPO" if weight.ndim == 3 else "BTI,BPIO->BTPO", x, weight)


def _fresh(x, weights, pace):
    options = {"momentum": pace.momentum is not None, "outer": pace.outer_rate is not None}
    return fresh_level(weights, x.shape[-1], x.shape[0], x.dtype, **options)


def _cut(tokens, start, stop):
    return jax.tree.map(lambda a: a[:, start:stop], tokens)


def _chunks(array, size):
    """Cuts `[B, T, ...]` into `[N, B, C, ...]`."""
    return jnp.moveaxis(array.reshape(len(array), -1, size, *array.shape[2:]), 1, 0)


def _tiles(array, size, count):
    """Cuts a grid into tiles that begin with the last token of the tile before."""
    first = array[:, : count * size].reshape(len(array), count, size, *array.shape[2:])[:, :, :1]
    rest = array[:, 1:].reshape(len(array), count, size, *array.shape[2:])
    return jnp.moveaxis(jnp.concatenate([first, rest], 2), 1, 0)


def _earlier(array: Float[Array, "B S N"]):
    """Shifts tokens to the one before; nothing for the last."""
    return jnp.pad(array[:, 1:], ((0, 0), (0, 1), (0, 0)))


def _later(array: Float[Array, "B S N"]):
    """Shifts tokens to the one behind; nothing for the first."""
    return jnp.pad(array[:, :-1], ((0, 0), (1, 0), (0, 0)))


def _where(mask, array):
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (array.ndim - mask.ndim)), array, 0)


def _rows(row, like):
    return row.reshape(row.shape[0], *(1,) * (like.ndim - 1))


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _check(chunk, outer, pace):
    if chunk < 2:
        raise ValueError(f"chunk must be at least 2, got {chunk}")
    if outer is not None and outer % chunk:
        raise ValueError(f"outer must be a multiple of chunk {chunk}, got {outer}")
    if (outer is None) != (pace.outer_rate is None):
        raise ValueError("outer must be given exactly if pace has outer_rate")

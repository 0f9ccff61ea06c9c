"""What a kernel computes for one chunk of one head: matrix memories learn it, and it is undone.

Only matrix products, elementwise arithmetic and reductions of two-dimensional values, without a
slice, a concatenation or a one-dimensional array, so that the same code lowers through Triton and
through Mosaic. Vectors over tokens are columns `[C, 1]`.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

GATE_ROWS = 16
"""Rows of the matrix that holds the gates' memories: eta, alpha, and zeros up to a tile."""

SMALLEST = 1e-30
"""Retention below this is taken for it: its logarithm has to be finite."""

Values = dict[str, Array]
"""Arrays by the name of a memory (k, v, q, gates, memory) or of what a token brings."""


class Plan(NamedTuple):
    """What is computed; fixed when a kernel is traced.

    Attributes:
      memories: The matrix memories, of k, v, q and memory.
      gates: Which gates (eta, alpha) are memories; they are rows 0 and 1 of one matrix, "gates".
      objective: "dot" or "l2".
      erases: What a token erases along its key: "nothing", "state" (M_{t-1} k) or "retained"
        (alpha M_{t-1} k).
      anchor: Whether states are distances to the origin, which then decay.
      normalize: Whether targets are normalized.
      targets: "self" or "value".
      read: "token", "current" or "chunk".
      write_max: The largest write of an adaptive gate.
      chunk: Tokens in a chunk.
      segmented: Whether chunks contain document starts or padding.
      holds: Whether the state a token projects with may differ from that of its chunk's start.
      operand: What the operands of matrix products are rounded to; sums are in float32. With
        float32 operands `jax.default_matmul_precision` says whether they may be rounded to tf32.
    """

    memories: tuple[str, ...]
    gates: tuple[str, ...]
    objective: Literal["dot", "l2"]
    erases: Literal["nothing", "state", "retained"]
    anchor: bool
    normalize: bool
    targets: Literal["self", "value"]
    read: Literal["token", "current", "chunk"]
    write_max: float
    chunk: int
    segmented: bool
    holds: bool
    operand: jnp.dtype

    @property
    def names(self) -> tuple[str, ...]:
        """All matrices that learn."""
        return self.memories + (("gates",) if self.gates else ())


class Lesson(NamedTuple):
    """A chunk, computed as far as its reads and its last state need it.

    Attributes:
      held: What tokens project with, rounded to operands.
      start: The states at the chunk's start, rounded to operands.
      key: Keys; `key_scale` is their length's inverse, None for keys that came with the tokens.
      key_scale: See `key`.
      value: Values.
      query: Queries; `query_scale` as for keys.
      query_scale: See `query`.
      write: The write gate, zero for tokens that are not live.
      erase: What multiplies the erased, zero for tokens that are not live.
      alpha: The retention gate.
      log_retain: Its logarithm, zero for tokens that are not live.
      before: What is left of the chunk's first state when a token arrives.
      after: What is left of a token's write at the chunk's end.
      through: What is left of the chunk's first state at its end.
      decay: Weights of the writes of earlier tokens (columns) when a token (row) arrives.
      overlap: `decay * K K^T`.
      inverse: (I + erase overlap)^-1.
      scale: The inverse lengths of the targets, by memory.
      target: The targets, by memory.
      found: What a token finds under its key of the chunk's first state and the origin.
      delta: What each token adds in front of its key.
    """

    held: Values
    start: Values
    key: Array
    key_scale: Array | None
    value: Array | None
    query: Array | None
    query_scale: Array | None
    write: Array
    erase: Array | None
    alpha: Array
    log_retain: Array
    before: Array
    after: Array
    through: Array
    decay: Array
    overlap: Array | None
    inverse: Array | None
    scale: Values
    target: Values
    found: Values
    delta: Values


def learn(
    plan: Plan,
    tokens: Values,
    live: Bool[Array, "C 1"] | None,
    states: Values,
    held: Values,
    origins: Values | None,
    bias: Float[Array, "1 G"] | None,
) -> Lesson:
    """Computes what each token of a chunk adds to each memory.

    Args:
      plan: What to compute.
      tokens: x, and what slow projections say: q, k, v `[C, K]`, eta, alpha `[C, 1]`.
      live: False for tokens that take no part.
      states: The states at the chunk's start (distances to the origin with an anchor).
      held: The states that tokens project with, likewise.
      origins: The origins, as operands; None where nothing needs them.
      bias: Added to the gates that memories make.

    Returns:
      The lesson.
    """
    matrices = {
        name: _round(plan, held[name] + origins[name] if plan.anchor else held[name])
        for name in plan.names
    }
    start = {name: _round(plan, states[name]) for name in plan.names}
    x = tokens.get("x")
    key, key_scale = _project(plan, "k", x, tokens, matrices)
    key = _round(plan, key)
    query, query_scale = _project(plan, "q", x, tokens, matrices)
    value = _dot(plan, x, matrices["v"], 1, 1) if "v" in plan.memories else tokens["v"]
    value = _round(plan, value)
    write, alpha, log_retain = _gates(plan, x, tokens, matrices, bias, live)

    row, column = _grid(plan.chunk)
    total = jnp.sum(jnp.where(row >= column, log_retain.T, 0), 1, keepdims=True)
    last = jnp.sum(log_retain, 0, keepdims=True)
    decay = jnp.where(row > column, jnp.exp(total - log_retain - total.T), 0)
    before, after = jnp.exp(total - log_retain), jnp.exp(last - total)
    erase = overlap = inverse = None
    if plan.erases != "nothing":
        erase = write if plan.erases == "state" else write * alpha
        overlap = decay * _dot(plan, key, key, 1, 1)
        inverse = _unit_lower_inverse(plan, _round(plan, erase * overlap))
    return Lesson(
        matrices, start, key, key_scale, value, query, query_scale,
        write, erase, alpha, log_retain, before, after, jnp.exp(last), decay, overlap, inverse,
        {}, {}, {}, {},
    )  # fmt: skip


def recite(
    plan: Plan, lesson: Lesson, states: Values, origins: Values | None
) -> tuple[Values, Float[Array, "C V"]]:
    """Teaches each memory, one after the other, and reads the one that is read.

    A memory is done before the next begins, so that little has to be held at a time.

    Args:
      plan: What to compute.
      lesson: What `learn` returned.
      states: The states at the chunk's start.
      origins: The origins, as operands.

    Returns:
      The states after the chunk, and what was read.
    """
    ends = {}
    for name in plan.names:
        teach(plan, lesson, name, origins)
        delta = lesson.delta[name]
        push = _dot(plan, lesson.after * delta, lesson.key, 0, 0)
        ends[name] = lesson.through * states[name] + push
    return ends, _read(plan, lesson, origins)


def _read(plan, lesson, origins):
    query, name = lesson.query, "memory"
    if plan.read == "chunk":
        return _dot(plan, query, lesson.held[name], 1, 1)
    carry, weights = _reach(plan, lesson)
    shares = weights * _dot(plan, query, lesson.key, 1, 1)
    y = carry * _dot(plan, query, lesson.start[name], 1, 1)
    if plan.anchor:
        y += _dot(plan, query, origins[name], 1, 1)
    return y + _dot(plan, shares, lesson.delta[name])


class Slopes(NamedTuple):
    """The gradients of a chunk.

    Attributes:
      tokens: Of what the tokens brought, by name.
      states: Of the states at the chunk's start, by way of the recurrence alone.
      held: Of the matrices that tokens project with.
      origins: Of the origins, beside what `held` hands on; None without an anchor.
      bias: Of the gates' bias, None without gates that learn.
    """

    tokens: Values
    states: Values
    held: Values
    origins: Values | None
    bias: Array | None


def unlearn(
    plan: Plan,
    tokens: Values,
    live: Bool[Array, "C 1"] | None,
    states: Values,
    origins: Values | None,
    lesson: Lesson,
    dy: Float[Array, "C V"],
    after: Values,
) -> Slopes:
    """Hands gradients back through a chunk.

    Args:
      plan: What was computed.
      tokens: As for `learn`.
      live: As for `learn`.
      states: As for `learn`.
      origins: As for `learn`.
      lesson: What `learn` returned.
      dy: The gradient of what was read, zero for tokens that are not live.
      after: The gradients of the states after the chunk.

    Returns:
      The gradients of everything before it.
    """
    square = jnp.zeros((plan.chunk, plan.chunk), jnp.float32)
    slope = _Slope(
        dk=0, dv=0, dq=0, dwrite=0, derase=0, dbefore=0, dafter=0, dthrough=0,
        dlower=0, decayed=square, dcurrent=None, held=dict.fromkeys(plan.names, 0),
        states={}, origins=dict.fromkeys(plan.names, 0) if plan.anchor else None,
    )  # fmt: skip
    teach(plan, lesson, "memory", origins)
    from_read = _unread(plan, slope, lesson, origins, _round(plan, dy))
    for name in ("memory", *(name for name in plan.names if name != "memory")):
        if name != "memory":
            teach(plan, lesson, name, origins)
        extra = from_read if name == "memory" else None
        _unteach(plan, slope, lesson, name, states, origins, after[name], extra)
    if plan.erases != "nothing":
        row, column = _grid(plan.chunk)
        dlower = jnp.where(row > column, slope.dlower, 0)
        slope.derase += jnp.sum(dlower * lesson.overlap, 1, keepdims=True)
        dlower = lesson.erase * dlower
        slope.decayed += dlower * lesson.overlap
        dlower = _round(plan, dlower * lesson.decay)
        slope.dk += _dot(plan, dlower, lesson.key) + _dot(plan, dlower, lesson.key, 0, 0)
    return _unproject(plan, slope, tokens, live, lesson)


class _Slope:
    """Gradients under way; sums grow as the lesson is undone."""

    def __init__(self, **sums):
        self.__dict__.update(sums)


def _dot(plan, a, b, left=1, right=0):
    """Multiplies operands, contracting axis `left` of a with axis `right` of b."""
    return jax.lax.dot_general(
        _round(plan, a), _round(plan, b), (((left,), (right,)), ((), ())),
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _round(plan, x):
    return x.astype(plan.operand)


def _grid(size):
    row = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    return row, jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)


def _project(plan, name, x, tokens, matrices):
    """A unit key or query from its memory, or the one that came with the tokens."""
    if name not in plan.memories:
        return tokens[name], None
    raw = _dot(plan, x, matrices[name], 1, 1)
    scale = jax.lax.rsqrt(jnp.sum(raw * raw, 1, keepdims=True) + 1e-6)
    return raw * scale, scale


def _gates(plan, x, tokens, matrices, bias, live):
    """The write gate, the retention gate and the logarithm of that."""
    if plan.gates:
        logits = _dot(plan, x, matrices["gates"], 1, 1) + bias
    if "eta" in plan.gates:
        write = plan.write_max * jax.nn.sigmoid(_column(logits, 0))
    else:
        write = tokens["eta"]
    if "alpha" in plan.gates:
        logit = _column(logits, 1)
        alpha = jax.nn.sigmoid(logit)
        log_retain = jnp.minimum(logit, 0) - jnp.log1p(jnp.exp(-jnp.abs(logit)))
    else:
        alpha = jnp.maximum(tokens["alpha"], SMALLEST)
        log_retain = jnp.log(alpha)
    if live is None:
        return write, alpha, log_retain
    return jnp.where(live, write, 0), alpha, jnp.where(live, log_retain, 0)


def _column(matrix, index):
    column = jax.lax.broadcasted_iota(jnp.int32, matrix.shape, 1)
    return jnp.sum(jnp.where(column == index, matrix, 0), 1, keepdims=True)


def _unit_lower_inverse(plan, lower):
    """Inverts `I + lower` by merging blocks of 1, 2, 4, ...: exact block substitution.

    Where `T` holds the inverses of the diagonal blocks, the corner below two neighbours is
    `-T2 L21 T1`, which is `-T L T` with all but these corners of L masked. The highest bit in
    which row and column differ tells to which merge an entry of L belongs. A merge fills zeros
    only, so that the inverse can be kept as an operand without adding up rounding.
    """
    row, column = _grid(plan.chunk)
    differ = jnp.bitwise_xor(row, column)
    inverse = _round(plan, jnp.where(differ == 0, 1.0, 0.0)) - jnp.where(differ == 1, lower, 0)
    size = 2
    while size < plan.chunk:
        corners = jnp.where((differ >= size) & (differ < 2 * size), lower, 0)
        inverse -= _round(plan, _dot(plan, _dot(plan, inverse, corners), inverse))
        size *= 2
    return inverse


def teach(plan, lesson, name, origins):
    """Adds to the lesson what one memory makes of it."""
    target, scale = lesson.value, None
    if plan.targets == "self":
        target = _dot(plan, lesson.value, lesson.held[name], 1, 1)
        if plan.normalize:
            scale = _inverse_length(name, target)
            target = target * scale
    elif plan.normalize:
        target = target.astype(jnp.float32)
        scale = _inverse_length(name, target)
        target = target * scale
    if plan.objective == "l2":
        error = target - _dot(plan, lesson.key, lesson.held[name], 1, 1)
    else:
        error = target
    delta = lesson.write * error
    if plan.erases != "nothing":
        found = lesson.before * _dot(plan, lesson.key, lesson.start[name], 1, 1)
        if plan.anchor:
            found += _dot(plan, lesson.key, origins[name], 1, 1)
        delta = _dot(plan, lesson.inverse, delta - lesson.erase * found)
        lesson.found[name] = found
    lesson.scale[name], lesson.target[name], lesson.delta[name] = scale, target, delta


def _inverse_length(name, target):
    """What normalizes a target: unit length, and `s / sqrt(1 + s^2)` for the numbers of gates."""
    square = target * target
    if name == "gates":
        return jax.lax.rsqrt(1 + square)
    return jax.lax.rsqrt(jnp.sum(square, 1, keepdims=True) + 1e-6)


def _reach(plan, lesson):
    """What a query still finds of the chunk's first state, and of each token's write."""
    if plan.read == "token":
        return lesson.before, lesson.decay
    row, column = _grid(plan.chunk)
    own = jnp.exp(lesson.log_retain)
    return lesson.before * own, jnp.where(row == column, 1, own * lesson.decay)


def _unread(plan, slope, lesson, origins, dy):
    """Undoes the read; returns the gradient of what the tokens added to the memory."""
    query, name = lesson.query, "memory"
    if plan.read == "chunk":
        slope.dq = _dot(plan, dy, lesson.held[name])
        slope.held[name] = _dot(plan, dy, query, 0, 0)
        slope.states[name] = 0
        return None
    carry, weights = _reach(plan, lesson)
    overlap = _dot(plan, query, lesson.key, 1, 1)
    dshares = _dot(plan, dy, lesson.delta[name], 1, 1)
    doverlap = _round(plan, dshares * weights)
    back = _dot(plan, dy, lesson.start[name])
    dcarry = jnp.sum(back * query, 1, keepdims=True)
    slope.dq = _dot(plan, doverlap, lesson.key) + carry * back
    slope.dk += _dot(plan, doverlap, query, 0, 0)
    slope.states[name] = _dot(plan, carry * dy, query, 0, 0)
    if plan.anchor:
        slope.dq += _dot(plan, dy, origins[name])
        slope.origins[name] = _dot(plan, dy, query, 0, 0)
    shares = weights * overlap
    if plan.read == "token":
        slope.dbefore += dcarry
        slope.decayed += dshares * shares
    else:
        slope.dcurrent = dcarry * carry, dshares * shares
    return _dot(plan, shares, dy, 0, 0)


def _unteach(plan, slope, lesson, name, states, origins, after, from_read):
    """Undoes what one memory learned."""
    key, delta, after_rounded = lesson.key, lesson.delta[name], _round(plan, after)
    spread = _dot(plan, key, after_rounded, 1, 1)
    slope.dafter += jnp.sum(delta * spread, 1, keepdims=True)
    slope.dk += _dot(plan, lesson.after * delta, after_rounded)
    slope.dthrough += jnp.sum(jnp.sum(after * states[name], 1, keepdims=True), 0, keepdims=True)
    dstate = lesson.through * after + slope.states.get(name, 0)
    ddelta = lesson.after * spread
    if from_read is not None:
        ddelta += from_read
    if plan.erases != "nothing":
        ddelta = _dot(plan, lesson.inverse, ddelta, 0, 0)
        slope.dlower -= _dot(plan, ddelta, delta, 1, 1)
        slope.derase -= jnp.sum(ddelta * lesson.found[name], 1, keepdims=True)
        dfound = -lesson.erase * ddelta
        back = _dot(plan, dfound, lesson.start[name])
        slope.dbefore += jnp.sum(back * key, 1, keepdims=True)
        slope.dk += lesson.before * back
        dstate += _dot(plan, lesson.before * dfound, key, 0, 0)
        if plan.anchor:
            slope.dk += _dot(plan, dfound, origins[name])
            slope.origins[name] += _dot(plan, dfound, key, 0, 0)
    slope.states[name] = dstate
    _untarget(plan, slope, lesson, name, ddelta)


def _untarget(plan, slope, lesson, name, ddelta):
    """Undoes one memory's targets and errors."""
    key, target, scale = lesson.key, lesson.target[name], lesson.scale[name]
    error = target
    if plan.objective == "l2":
        error = target - _dot(plan, key, lesson.held[name], 1, 1)
    slope.dwrite += jnp.sum(ddelta * error, 1, keepdims=True)
    derror = lesson.write * ddelta
    if plan.objective == "l2":
        slope.dk -= _dot(plan, derror, lesson.held[name])
        slope.held[name] -= _dot(plan, derror, key, 0, 0)
    if scale is None:
        dtarget = derror
    elif name == "gates":
        dtarget = derror * scale * scale * scale
    else:
        dtarget = scale * (derror - target * jnp.sum(derror * target, 1, keepdims=True))
    if plan.targets == "value":
        slope.dv += dtarget
        return
    dtarget = _round(plan, dtarget)
    slope.dv += _dot(plan, dtarget, lesson.held[name])
    slope.held[name] += _dot(plan, dtarget, lesson.value, 0, 0)


def _undecay(plan, slope, lesson):
    """The gradient of the logarithm of each token's retention, from all the products it is in."""
    row, column = _grid(plan.chunk)
    spans = _dot(plan, jnp.where(row < column, 1.0, 0.0), slope.decayed)
    later = (slope.dbefore * lesson.before).T
    within = jnp.where(row < column, later, 0)
    earlier = spans + (slope.dafter * lesson.after).T
    if slope.dcurrent is not None:
        carried, shares = slope.dcurrent
        within += jnp.where(row <= column, carried.T, 0)
        earlier += _dot(plan, jnp.where(row <= column, 1.0, 0.0), shares)
    within += jnp.where(row > column, earlier, 0)
    return jnp.sum(within, 1, keepdims=True) + slope.dthrough * lesson.through


def _unproject(plan, slope, tokens, live, lesson):
    """Undoes gates and projections."""
    dlog = _undecay(plan, slope, lesson)
    if plan.erases == "state":
        slope.dwrite += slope.derase
    elif plan.erases == "retained":
        slope.dwrite += slope.derase * lesson.alpha
        dlog += slope.derase * lesson.erase
    if live is not None:
        dlog = jnp.where(live, dlog, 0)
        slope.dwrite = jnp.where(live, slope.dwrite, 0)

    x, dx, dtokens = tokens.get("x"), 0, {}
    given = {"k": (slope.dk, lesson.key, lesson.key_scale), "v": (slope.dv, None, None)}
    given["q"] = (slope.dq, lesson.query, lesson.query_scale)
    for name, (gradient, unit, scale) in given.items():
        if name not in plan.memories:
            dtokens[name] = gradient
            continue
        if unit is not None:
            gradient -= unit * jnp.sum(gradient * unit, 1, keepdims=True)
            gradient = gradient * scale
        gradient = _round(plan, gradient)
        dx += _dot(plan, gradient, lesson.held[name])
        slope.held[name] += _dot(plan, gradient, x, 0, 0)
    dbias = None
    if plan.gates:
        dlogits = _ungate(plan, slope, lesson, dlog)
        dbias = jnp.sum(dlogits, 0, keepdims=True)
        dx += _dot(plan, dlogits, lesson.held["gates"])
        slope.held["gates"] += _dot(plan, dlogits, x, 0, 0)
    if "eta" not in plan.gates:
        dtokens["eta"] = slope.dwrite
    if "alpha" not in plan.gates:
        dtokens["alpha"] = dlog / lesson.alpha
    if x is not None:
        dtokens["x"] = dx
    return Slopes(dtokens, slope.states, slope.held, slope.origins, dbias)


def _ungate(plan, slope, lesson, dlog):
    """Undoes the sigmoids of the gates that are memories."""
    column = jax.lax.broadcasted_iota(jnp.int32, (plan.chunk, GATE_ROWS), 1)
    dlogits = jnp.zeros((plan.chunk, GATE_ROWS), jnp.float32)
    if "eta" in plan.gates:
        dlogit = slope.dwrite * lesson.write * (1 - lesson.write / plan.write_max)
        dlogits = jnp.where(column == 0, dlogit, dlogits)
    if "alpha" in plan.gates:
        dlogits = jnp.where(column == 1, dlog * (1 - lesson.alpha), dlogits)
    return dlogits

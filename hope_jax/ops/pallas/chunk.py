"""What a kernel computes for one chunk of one head: matrix memories learn it, and it is undone.

Only matrix products, elementwise arithmetic and reductions of two-dimensional values, without a
slice or a concatenation, so that the same code lowers through Triton and through Mosaic. Vectors
over tokens are columns `[C, 1]`. Matrices of memories are read where they lie each time they are
needed: registers do not hold them all.

Undoing comes in three parts. `prepare` and `recall` compute whatever does not depend on the
gradient of the state after the chunk, for all chunks at once. `unlearn`, `charge` and `blame` go
from the last chunk to the first, each memory for itself: what all are told is undone in sums.
`answer` is what tokens then gain, again for all chunks at once.
"""

from collections.abc import Callable, Mapping
from functools import partial, reduce
from itertools import chain
from operator import add
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

GATE_ROWS = 16
"""Rows of the matrix that holds the gates' memories: eta, alpha, and zeros up to a tile."""

SMALLEST = 1e-30
"""Retention below this is taken for it: its logarithm has to be finite."""

LABELS = {"k": "key", "v": "value", "q": "query"}
"""What tokens say, by the memory that may say it."""

Values = dict[str, Array]
"""Arrays by the name of a memory (k, v, q, gates, memory) or of what a token brings."""


def momentum_of(name: str) -> str:
    """The name of a matrix's momentum among the states."""
    return "momentum_" + name


def hidden_of(name: str) -> str:
    """The name of the matrix that leads to the hidden units of a memory that is an MLP."""
    return "hidden_" + name


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
      group: Chunks for which tokens project with one state; see `chunks_of`.
      momentum: Whether writes pass a damped momentum, a second state of every memory; tokens bring
        what it keeps, "beta". Does not go with erasing what is retained.
      hidden: Hidden units of memories that are MLPs, which `deep` takes; 0 for linear ones. Gates
        of MLPs are memories of their own, of `GATE_ROWS` outputs, of which the first counts.
      repeats: How often a layer of an MLP may see one key; see `deep.weigh`.
      undone: Whether `jax.vjp` undoes what is computed; products and inverses then have rules of
        their own, which a forward kernel cannot be traced with.
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
    group: int = 1
    momentum: bool = False
    hidden: int = 0
    repeats: int = 1
    undone: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All matrices that learn."""
        if self.hidden:
            both = ((name, hidden_of(name)) for name in self.memories + self.gates)
            return tuple(chain.from_iterable(both))
        return self.memories + (("gates",) if self.gates else ())

    @property
    def momenta(self) -> tuple[str, ...]:
        """The names of their momenta."""
        return tuple(map(momentum_of, self.names)) if self.momentum else ()

    @property
    def consults(self) -> bool:
        """Whether what tokens bring to a chunk depends on the state at its start."""
        adaptive = len(self.names) > 1
        return adaptive or self.targets == "self" or self.objective == "l2" or self.read == "chunk"

    def chunks_of(self, name: str) -> int:
        """Chunks for which tokens hold on to one state of a memory; one for that which is read."""
        return 1 if name == "memory" else self.group

    @property
    def steps(self) -> bool:
        """Whether all a token adds is in proportion to a write gate that memories make.

        The gradient of its logarithm is then what is owed along what was added, one sum instead
        of the small difference of two.
        """
        return self.erases == "state" and "eta" in self.gates


class Memories(NamedTuple):
    """Where the matrices of a chunk are read, as functions of their name.

    Attributes:
      state: The state at the chunk's start (its distance to the origin with an anchor), or the
        momentum under its own name.
      held: What tokens project with.
      origin: Where states return to after a document start; None if nothing needs it.
    """

    state: Callable[[str], Array]
    held: Callable[[str], Array]
    origin: Callable[[str], Array] | None


class Place(NamedTuple):
    """Where the documents of a chunk lie.

    Attributes:
      number: The number of document starts in the chunk up to the token; -1 for padding.
      last: The number of the last token that is not padding, -1 if there is none.
      early: The number of document starts in earlier chunks of the group; None for groups of one.
    """

    number: Int[Array, "C 1"]
    last: Int[Array, ""]
    early: Int[Array, ""] | None

    @property
    def live(self) -> Bool[Array, "C 1"]:
        """False for padding."""
        return self.number >= 0

    @property
    def open(self) -> Bool[Array, "C 1"]:
        """Whether the token's document began before the chunk."""
        return self.number == 0

    def holding(self, name: str) -> Bool[Array, "C 1"]:
        """Whether the token's document began before the chunks that hold one state of a memory."""
        if self.early is None or name == "memory":
            return self.open
        # Nothing has the number -2, for padding has -1: one comparison says both.
        return self.number == -2 * self.early


class Sweep(NamedTuple):
    """How much momentum keeps, and how much of that states gain.

    States gain a write bit by bit. All that they gain of it in the chunk counts as added at once,
    where what is erased cancels most of it in the solve; what has yet to come is taken back.

    Attributes:
      found: What a token (row) finds under its key of each write (column), as an operand; the one
        thing that `prepare` does not note.
      lasting: What the momentum has of the write of token s (column) after token t (row).
      carried: What it then has of the chunk's first momentum.
      mass: All that states gain of a token's write in the chunk, but for their decay.
      spread: What the state has of the write of token s (column) when token t (row) arrives, less
        what it would have if all came at once.
      swept: What it then has of the chunk's first momentum.
      ending: What the last state has of a token's write, less the same.
      gained: What the last state has of the first momentum.
      left: What the last momentum has of a token's write.
      remains: What the last momentum has of the first.
    """

    found: Array | None
    lasting: Array
    carried: Array
    mass: Array
    spread: Array
    swept: Array
    ending: Array
    gained: Array
    left: Array
    remains: Array


class Weights(NamedTuple):
    """How much is left of what.

    Attributes:
      arrival: The logarithm of what is left of the document's first state when a token arrives.
      departure: The same when it leaves.
      before: What is left of the chunk's first state when a token arrives.
      inherit: What the token then sees of the origin; None if nothing, or all with an anchor.
      after: What is left of a token's write at the chunk's end.
      through: What is left of the chunk's first state at its end.
      restore: What the last state has of the origin, beside distances; None if nothing.
      decay: Weights of the writes of earlier tokens (columns) when a token (row) arrives.
    """

    arrival: Array
    departure: Array
    before: Array
    inherit: Array | None
    after: Array
    through: Array
    restore: Array | None
    decay: Array


class Lesson(NamedTuple):
    """What the tokens of a chunk say, and how it weighs.

    Attributes:
      key: Keys; `key_scale` is their length's inverse, None for keys that came with the tokens.
      key_scale: See `key`.
      value: Values.
      query: Queries; `query_scale` as for keys.
      query_scale: See `query`.
      write: What multiplies the written: the write gate, damped with momentum; zero for padding.
      erase: What multiplies the erased, zero for padding; None if nothing is erased. With momentum
        always the write gate.
      retain: The retention gate, None where it is not needed any more; `forget` is one minus it,
        where a memory makes it.
      forget: See `retain`.
      weights: What is left of states and writes.
      inverse: (I + erase decay K K^T)^-1; None if nothing is erased.
      sweep: The momentum's weights, None without.
    """

    key: Array
    key_scale: Array | None
    value: Array
    query: Array
    query_scale: Array | None
    write: Array
    erase: Array | None
    retain: Array | None
    forget: Array | None
    weights: Weights
    inverse: Array | None
    sweep: Sweep | None


def attend(
    plan: Plan,
    tokens: Values,
    place: Place | None,
    memories: Memories,
    bias: Float[Array, "1 G"] | None,
) -> Lesson:
    """Lets tokens project and weighs them.

    Args:
      plan: What to compute.
      tokens: x, and what slow projections say: q, k, v `[C, K]`, eta, alpha, beta `[C, 1]`.
      place: Where documents lie; None if the plan is not segmented.
      memories: The memories.
      bias: Added to the gates that memories make.

    Returns:
      The lesson.
    """
    key, key_scale = _project(plan, "k", tokens, place, memories)
    query, query_scale = _project(plan, "q", tokens, place, memories)
    value = tokens["v"] if "v" in tokens else consult(plan, place, memories, "v", tokens["x"])
    logits = None
    if bias is not None:
        answers = consult(plan, place, memories, "gates", tokens["x"]) + bias
        logits = [column_of(answers, row) for row in range(2)]
    write, retain, forget, log_retain = open_gates(plan, tokens, place, logits)
    weights = weigh(plan, place, memories, log_retain)

    erase = inverse = None
    key = _round(plan, key)
    if plan.erases != "nothing":
        erase = write if plan.erases == "state" else write * retain
        inverse = solve(plan, key, erase, weights.decay)
    sweep = None
    if plan.momentum:
        sweep = sweep_of(plan, place, tokens["beta"], key, weights.decay, weights.after)
        write, erase = (1 - tokens["beta"]) * write, write
    return Lesson(
        key, key_scale, _round(plan, value), _round(plan, query), query_scale,
        write, erase, retain, forget, weights, inverse, sweep,
    )  # fmt: skip


def weigh(plan: Plan, place: Place | None, memories: Memories, log_retain: Array) -> Weights:
    """Weighs what is left, given the logarithms of what survives each token."""
    arrival, departure, _ = _passed(plan, place, log_retain)
    left = _left_undone if plan.undone else _left
    before, after, through, decay = left(plan, False, place, log_retain)
    if plan.undone:  # Their difference is all that is asked for, and then exact.
        arrival, departure = jnp.zeros_like(log_retain), log_retain
    inherit = restore = None
    if place is not None:
        if not plan.anchor and memories.origin is not None:
            inherit = jnp.where(place.open, 0, before)
            restore = jnp.where(place.last > 0, through, 0)
        before = jnp.where(place.open, before, 0)
        through = jnp.where(place.last > 0, 0, through)
    return Weights(arrival, departure, before, inherit, after, through, restore, decay)


def solve(plan: Plan, key: Array, erase: Array, decay: Array) -> Array:
    """`Lesson.inverse` of keys."""
    overlap = decay * dot(plan, key, key, 1, 1)
    return (_inverse_undone if plan.undone else _unit_lower_inverse)(plan, erase * overlap)


def consult(plan, place, memories, name, rows):
    """Reads a memory as tokens hold it: since their document began, the origin."""
    y = dot(plan, rows, memories.held(name), 1, 1)
    if place is None:
        return y
    fresh = 0
    if memories.origin is not None:
        fresh = dot(plan, rows, memories.origin(name), 1, 1)
    return jnp.where(place.holding(name), y, fresh)


def teach(plan, lesson, place, memories, name):
    """Computes one memory's targets, their scale, what each token writes, and what it adds.

    Both are in front of its key. With momentum it adds all that will come of what it writes.
    """
    target, scale = lesson.value.astype(jnp.float32), None
    if plan.targets == "self":
        target = consult(plan, place, memories, name, lesson.value)
    if plan.normalize:
        scale = scale_of(target, name == "gates")
        target = target * scale
    written = lesson.write * _error(plan, place, memories, name, lesson.key, target)
    return target, scale, written, absorb(plan, lesson, memories, name, written)


def scale_of(target: Array, gate: bool) -> Array:
    """What scales targets: rows to unit length, or each number of a gate's to less than 1."""
    square = target * target
    if gate:
        return jax.lax.rsqrt(square + 1)
    return jax.lax.rsqrt(jnp.sum(square, 1, keepdims=True) + 1e-6)


def absorb(plan: Plan, lesson: Lesson, memories: Memories, name: str, written: Array) -> Array:
    """What each token adds to a matrix in front of its key, given what it writes."""
    delta = written if lesson.sweep is None else lesson.sweep.mass * written
    if plan.erases != "nothing":
        before, inherit = lesson.weights.before, lesson.weights.inherit
        found = _inherited(plan, before, inherit, memories, name, lesson.key)
        if lesson.sweep is not None:
            found += _swept(plan, lesson.sweep.swept, memories, name, lesson.key)
            found += dot(plan, lesson.sweep.found, written)
        delta = dot(plan, lesson.inverse, delta - lesson.erase * found)
    return delta


def advance(plan, lesson, memories, name, state, written, delta):
    """The state of one memory after the chunk; with momentum all but what that had at its start."""
    weights = lesson.weights
    state, added = weights.through * state, weights.after * delta
    if lesson.sweep is not None:
        added += lesson.sweep.ending * written
    state += dot(plan, added, lesson.key, 0, 0)
    if weights.restore is not None:
        state += weights.restore * memories.origin(name)
    return state


def advance_momentum(plan, lesson, momentum, written):
    """The momentum of one memory after the chunk."""
    left = dot(plan, lesson.sweep.left * written, lesson.key, 0, 0)
    return lesson.sweep.remains * momentum + left


def read(plan, lesson, place, memories, written, delta):
    """Reads the memory that is read; for `written` and `delta` see `teach`."""
    if plan.read == "chunk":
        return consult(plan, place, memories, "memory", lesson.query)
    return ask(plan, lesson, memories, "memory", lesson.query, written, delta)


def ask(plan, lesson, memories, name, rows, written, delta):
    """Multiplies each token's row by the matrix of a memory as the token finds it."""
    before, inherit, weights = _reach(plan, lesson)
    overlap = dot(plan, rows, lesson.key, 1, 1)
    y = _inherited(plan, before, inherit, memories, name, rows)
    y += dot(plan, weights * overlap, delta)
    if lesson.sweep is not None:
        swept, spread = _reach_of_momentum(plan, lesson)
        y += _swept(plan, swept, memories, name, rows)
        y += dot(plan, spread * overlap, written)
    return y


def notes(plan: Plan, restores: bool) -> dict[str, str]:
    """The names of what `prepare` and `recall` note for `unlearn`, and what each is.

    Args:
      plan: What is computed.
      restores: Whether states, not distances, return to an origin at a document start.

    Returns:
      By name: "key" or "value" for rows of so many features, "gates" for rows of `GATE_ROWS`,
      "pairs" for rows of as many numbers as there are tokens, "state" for a matrix like a state,
      "column", or "number".
    """
    kinds = {"pull": "key", "dquery": "key", "through": "number"}
    kinds |= dict.fromkeys(("write", "arrival", "departure", "before", "after"), "column")
    if "alpha" in plan.gates:
        kinds["forget"] = "column"
    if plan.erases == "retained":
        kinds |= {"retain": "column", "erase": "column"}
    if plan.momentum:
        kinds |= {"erase": "column", "pull_write": "key", "lasting": "pairs", "spread": "pairs"}
        kinds |= dict.fromkeys(("carried", "mass", "swept", "ending", "left"), "column")
        kinds |= dict.fromkeys(("gained", "remains"), "number")
    kinds |= {label: "key" for name, label in LABELS.items() if name in plan.memories}
    if "k" in plan.memories:
        kinds["key_scale"] = "column"
    for name in plan.names:
        like = "gates" if name == "gates" else "value"
        kinds["delta_" + name] = like
        if plan.targets == "self":
            kinds["target_" + name] = like
        if plan.normalize and name != "gates":
            kinds["scale_" + name] = "column"
    if plan.read != "chunk":
        kinds |= {"ddelta": "value", "dkey": "key", "dstate": "state", "dlog": "column"}
        if plan.momentum:
            kinds |= {"dwritten": "value", "dmomentum": "state", "dlog_momentum": "column"}
    if restores:
        kinds |= {"inherit": "column", "restore": "number"}
        if plan.read != "chunk":
            kinds["weight"] = "column"
    return kinds


def prepare(plan: Plan, lesson: Lesson, note: Callable[[str, Array], None]) -> None:
    """Notes what `unlearn` has to know of what tokens said to all memories.

    Args:
      plan: What was computed.
      lesson: What `attend` returned.
      note: Called with names and values.
    """
    names = [label for name, label in LABELS.items() if name in plan.memories]
    names += [name + "_scale" for name in ("key", "query") if name in names]
    names += ["write", "arrival", "departure", "before", "after", "through"]
    names += ["forget"] if "alpha" in plan.gates else []
    names += ["retain", "erase"] if plan.erases == "retained" else []
    names += ["inverse"] if plan.erases != "nothing" else []
    names += ["inherit", "restore"] if lesson.weights.restore is not None else []
    names += ["erase"] if plan.momentum else []
    told = lesson._asdict() | lesson.weights._asdict()
    for name in names:
        note(name, told[name])
    pull = _settled(plan, lesson, lesson.weights.after * lesson.key)
    note("pull", pull)
    if lesson.sweep is not None:
        for name in Sweep._fields[1:]:
            note(name, getattr(lesson.sweep, name))
        note("pull_write", _unwritten(plan, lesson, lesson.sweep.ending * lesson.key, pull))


def recollect(
    plan: Plan, tokens: Values, notes: Mapping[str, Array], place: Place | None
) -> Lesson:
    """Puts together from notes what `recall` has to know of a lesson.

    Args:
      plan: What was computed.
      tokens: As for `attend`.
      notes: What `prepare` noted.
      place: Where documents lie.
    """
    said, noted = _said(tokens, notes), notes.get
    arrival, departure = notes["arrival"], notes["departure"]
    weights = Weights(
        arrival, departure, notes["before"], noted("inherit"), notes["after"], notes["through"],
        noted("restore"), _decay(plan, place, arrival, departure),
    )  # fmt: skip
    lesson = Lesson(
        said["k"], noted("key_scale"), said["v"], said["q"], noted("query_scale"),
        notes["write"], _erase(plan, notes) if plan.erases != "nothing" else None,
        noted("retain"), noted("forget"), weights, noted("inverse"), None,
    )  # fmt: skip
    if not plan.momentum:
        return lesson
    parts = [notes[name].astype(jnp.float32) for name in Sweep._fields[1:]]
    found = found_of(plan, lesson.key, notes["spread"])
    return lesson._replace(sweep=Sweep(found, *parts))


def recall(
    plan: Plan,
    lesson: Lesson,
    place: Place | None,
    memories: Memories,
    name: str,
    dy: Float[Array, "C V"] | None,
    note: Callable[[str, Array], None],
) -> None:
    """Notes what `unlearn` has to know of what one memory learned.

    Args:
      plan: What was computed.
      lesson: What `attend` or `recollect` returned.
      place: Where documents lie.
      memories: The memories.
      name: Which memory.
      dy: The gradient of what was read; for "memory" alone.
      note: Called with names and values.
    """
    target, scale, written, delta = teach(plan, lesson, place, memories, name)
    note("delta_" + name, delta)
    if plan.targets == "self":
        note("target_" + name, target)
    if scale is not None and name != "gates":
        note("scale_" + name, scale)
    if name == "memory":
        _unread(plan, lesson, place, memories, written, delta, _round(plan, dy), note)


def _settled(plan, lesson, ddelta):
    """The gradient of writes from that of what tokens added: all erasing undone."""
    if plan.erases == "nothing":
        return ddelta
    return dot(plan, lesson.inverse, ddelta, 0, 0)


def _unwritten(plan, lesson, dwritten, owed):
    """The gradient of writes but for `Sweep.mass` times what is owed along what tokens add."""
    if plan.erases == "nothing":
        return dwritten
    return dwritten - dot(plan, lesson.sweep.found, lesson.erase * owed, 0, 0)


def _unread(plan, lesson, place, memories, written, delta, dy, note):
    """Undoes the read."""
    query, name = lesson.query, "memory"

    def unask(dquery):
        note("dquery", _unscale(dquery, query, lesson.query_scale))

    if plan.read == "chunk":
        unask(unconsult(plan, place, memories, name, dy))
        return
    before, inherit, weights = _reach(plan, lesson)
    note("dstate", dot(plan, before * dy, query, 0, 0))
    dquery = before * dot(plan, dy, memories.state(name))
    if inherit is not None:
        dquery += inherit * dot(plan, dy, memories.origin(name))
        note("weight", inherit)
    decayed = jnp.sum(dquery * query, 1, keepdims=True)
    if plan.anchor:
        dquery += dot(plan, dy, memories.origin(name))

    overlap = dot(plan, query, lesson.key, 1, 1)
    shares = weights * overlap
    dshares = dot(plan, dy, delta, 1, 1)
    row, column = _grid(plan.chunk)
    spans = jnp.where(row > column, dshares * shares, 0)
    dlog = _undecay(plan, place, decayed, None, None, spans)
    if plan.read == "current":
        dlog += decayed + jnp.sum(spans, 1, keepdims=True)
    doverlap, late = dshares * weights, None
    if lesson.sweep is not None:
        swept, spread = _reach_of_momentum(plan, lesson)
        asked = dot(plan, dy, memories.state(momentum_of(name)))
        dspread = dot(plan, dy, written, 1, 1)
        note("dmomentum", dot(plan, swept * dy, query, 0, 0))
        dquery, doverlap = dquery + swept * asked, doverlap + dspread * spread
        late = spread * overlap
        dswept = jnp.sum(asked * query, 1, keepdims=True)
        decayed, dlog_momentum = _unread_momentum(plan, lesson, place, dspread * overlap, dswept)
        note("dlog_momentum", dlog_momentum)
        dlog += decayed
    note("dlog", dlog)
    doverlap = _round(plan, doverlap)
    unask(dquery + dot(plan, doverlap, lesson.key))
    note("dkey", dot(plan, doverlap, query, 0, 0))
    owed = _settled(plan, lesson, dot(plan, shares, dy, 0, 0))
    note("ddelta", owed)
    if late is not None:
        note("dwritten", _unwritten(plan, lesson, dot(plan, late, dy, 0, 0), owed))


def _unread_momentum(plan, lesson, place, dspread, dswept):
    """The gradients of the logarithms of retention and of what momentum keeps, from the read."""
    sweep, dlasting, dcarried, dlog = lesson.sweep, 0, 0, 0
    if plan.read == "current":
        own, dlasting, dcarried = _own(lesson.weights), dspread, dswept
        dspread, dswept = own * dspread, own * dswept
        dlog = jnp.sum(dspread * sweep.spread, 1, keepdims=True) + dswept * sweep.swept
    decayed, carried, lasting = _unsweep(
        plan, lesson.weights.decay, sweep.lasting, sweep.carried, sweep.mass,
        dspread, dswept, dlasting, dcarried,
    )  # fmt: skip
    dlog += _undecay(plan, place, None, None, None, decayed)
    return dlog, _undecay(plan, place, carried, None, None, lasting, own=True)


def push_back(plan: Plan, notes: Mapping[str, Array], key: Array, after: Array) -> Array:
    """Hands the gradient of the only state through a chunk in which nothing is consulted.

    Args:
      plan: What was computed.
      notes: What `prepare` noted.
      key: Keys.
      after: The gradient of the state after the chunk.

    Returns:
      The gradient of the state before it.
    """
    state = notes["through"] * after + notes["dstate"]
    if plan.erases == "nothing":
        return state
    owed = _owed(plan, notes, "memory", after)
    return state - dot(plan, notes["before"] * _erase(plan, notes) * owed, key, 0, 0)


class Erased(NamedTuple):
    """What a memory owes for what tokens erased.

    Attributes:
      found: What is owed along what tokens found.
      came: The part of it that decays.
      pairs: What is owed to each token (row) along what each (column) added.
    """

    found: Array
    came: Array
    pairs: Array


class Swept(NamedTuple):
    """What a memory owes by way of momentum, for the attributes of `Sweep` of these names.

    Attributes:
      write: The gradient of the damped write gate.
      log: Of the logarithm of what tokens say to momentum, by way of the read.
      ending: Of `Sweep.ending`.
      gained: Of `Sweep.gained`.
      left: Of the logarithm of `Sweep.left`.
      remains: Of the logarithm of `Sweep.remains`.
      swept: Of `Sweep.swept`; None if nothing is erased.
      pairs: What is owed to each token (row) along what each (column) wrote; None likewise.
    """

    write: Array
    log: Array
    ending: Array
    gained: Array
    left: Array
    remains: Array
    swept: Array | None
    pairs: Array | None


class Share(NamedTuple):
    """What a memory owes to what all memories are told, or what several owe together.

    Attributes:
      key: The gradient of keys, but for what `Erased.pairs` add to it.
      value: The gradient of values.
      write: The gradient of what multiplies the written, with `Plan.steps` of the logarithm of the
        write gate.
      log: The gradient of the logarithm of retention by way of the read.
      after: The gradient of the logarithm of what is left of writes at the chunk's end.
      through: The same of the first state, `[1, 1]`.
      erased: What is owed for erasing; None if nothing is erased.
      swept: What is owed for momentum, None without.
    """

    key: Array
    value: Array
    write: Array
    log: Array
    after: Array
    through: Array
    erased: Erased | None
    swept: Swept | None


class Change(NamedTuple):
    """What gradients of one memory's matrices gain; None is nothing.

    Attributes:
      held: Of what tokens hold.
      origin: Of where states return to, or are distances to.
    """

    held: Array | None
    origin: Array | None


def unlearn(
    plan: Plan,
    tokens: Values,
    notes: Mapping[str, Array],
    place: Place | None,
    memories: Memories,
    name: str,
    after: Float[Array, "V K"],
    after_momentum: Float[Array, "V K"] | None,
    dy: Float[Array, "C V"] | None,
) -> tuple[Share, Array, Array | None, Change]:
    """Hands the gradient of one memory's last state back through a chunk.

    What tokens said to all memories is undone by `charge`, and where that came from memories by
    `blame` and `answer`.

    Args:
      plan: What was computed.
      tokens: As for `attend`.
      notes: What `prepare` noted.
      place: Where documents lie.
      memories: The memories.
      name: Which memory.
      after: The gradient of its state after the chunk.
      after_momentum: The gradient of its momentum after the chunk, None without.
      dy: The gradient of what was read; None unless the chunk's start is read.

    Returns:
      What the memory owes; the gradient of its first state by way of the recurrence; that of its
      first momentum; the others.
    """
    said = _said(tokens, notes)
    key, delta = said["k"], notes["delta_" + name]
    owed = owing = _owed(plan, notes, name, after)
    late = None
    if plan.momentum:
        late = _owed_late(plan, notes, name, key, after, after_momentum)
        owing = late + notes["mass"] * owed
    dvalue, asked = _untarget(plan, notes, name, said, owing), []
    if plan.targets == "self":
        asked.append((dvalue, said["v"]))
        dvalue = unconsult(plan, place, memories, name, dvalue)
    if name == "q":
        asked.append((notes["dquery"], tokens["x"]))
    if name == "memory" and dy is not None:
        asked.append((dy, said["q"]))
    along = delta
    if plan.momentum or not plan.steps:
        along = _error(plan, place, memories, name, key, _target(plan, notes, name, said))
    dwrite = jnp.sum(owing * along, 1, keepdims=True)

    pushed = notes["after"] * dot(plan, delta, after)
    dafter = jnp.sum(key * pushed, 1, keepdims=True)
    dthrough = notes["through"] * _total(after * memories.state(name).astype(jnp.float32))
    if "restore" in notes and memories.origin is not None:
        origin = memories.origin(name).astype(jnp.float32)
        dthrough += notes["restore"] * _total(after * origin)
    dkey, dlog = pushed, jnp.zeros_like(dwrite)
    if plan.objective == "l2":
        derror = -notes["write"] * owing
        asked.append((derror, key))
        dkey += unconsult(plan, place, memories, name, derror)
    if name == "memory" and "dkey" in notes:
        dkey, dlog = dkey + notes["dkey"], notes["dlog"]
    erased = None
    if plan.erases != "nothing":
        decaying, resting = _unfound(plan, notes, memories, name, owed)
        came = jnp.sum(key * decaying, 1, keepdims=True)
        found = jnp.sum(key * (decaying + resting), 1, keepdims=True)
        dkey -= _erase(plan, notes) * (decaying + resting)
        erased = Erased(found, came, dot(plan, owed, delta, 1, 1))
    share = Share(dkey, dvalue, dwrite, dlog, dafter, dthrough, erased, None)
    state, change = _settle(plan, notes, place, name, key, after, owed, asked)
    if late is None:
        return share, state, None, change
    written = notes["write"] * along
    swept, dkey, found, momentum = _unlearn_momentum(
        plan, notes, memories, name, key, written, owed, after, after_momentum
    )
    share = share._replace(key=share.key + dkey, swept=swept._replace(write=dwrite))
    if erased is not None:
        share = share._replace(erased=erased._replace(found=_plus(erased.found, found)))
    if plan.steps:
        dstep = jnp.sum(late * written + owed * delta, 1, keepdims=True)
        share = share._replace(write=dstep)
    return share, state, momentum, change


def _owed_late(plan, notes, name, key, after, after_momentum):
    """The gradient of each token's write by way of what came late; `_owed` is of what it adds."""
    late = dot(plan, notes["pull_write"], after, 1, 1)
    late += dot(plan, notes["left"] * key, after_momentum, 1, 1)
    return late + notes["dwritten"] if name == "memory" and "dwritten" in notes else late


def _unlearn_momentum(plan, notes, memories, name, key, written, owed, after, after_momentum):
    """What a memory owes for its momentum, to keys, for what they found, and of the first one."""
    momentum = memories.state(momentum_of(name))
    raised = dot(plan, written, after)
    kept = notes["left"] * dot(plan, written, after_momentum)
    dkey, found, dswept, pairs = notes["ending"] * raised + kept, None, None, None
    first = notes["remains"] * after_momentum + notes["gained"] * after
    nothing = dlog = jnp.zeros_like(notes["write"])
    if name == "memory" and "dmomentum" in notes:
        first, dlog = first + notes["dmomentum"], notes["dlog_momentum"]
    if plan.erases != "nothing":
        erase = _erase(plan, notes)
        asked = dot(plan, owed, momentum)
        dswept = -erase * jnp.sum(key * asked, 1, keepdims=True)
        asked *= notes["swept"]
        dkey -= erase * asked
        found, pairs = jnp.sum(key * asked, 1, keepdims=True), dot(plan, owed, written, 1, 1)
        first -= dot(plan, notes["swept"] * erase * owed, key, 0, 0)
    momentum = momentum.astype(jnp.float32)
    swept = Swept(
        write=nothing,
        log=dlog,
        ending=jnp.sum(key * raised, 1, keepdims=True),
        gained=_total(after * momentum),
        left=jnp.sum(key * kept, 1, keepdims=True),
        remains=notes["remains"] * _total(after_momentum * momentum),
        swept=dswept,
        pairs=pairs,
    )
    return swept, dkey, found, first


def charge(
    plan: Plan, tokens: Values, notes: Mapping[str, Array], place: Place | None, share: Share
) -> Values:
    """Undoes what tokens said to memories as far as it is in proportion to what is owed.

    Args:
      plan: What was computed.
      tokens: As for `attend`.
      notes: What `prepare` noted.
      place: Where documents lie.
      share: What all memories owe.

    Returns:
      The gradients of what memories answered to tokens, under the memories' names (k, v, gates),
      and of what came with the tokens instead (k, v, eta, alpha).
    """
    key = _said(tokens, notes)["k"]
    dkey, dwrite, dlog = share.key, share.write, share.log
    dafter, derase, dbefore, dbeta, spans = share.after, 0.0, None, None, None
    if plan.momentum:
        dwrite = dwrite if plan.steps else (1 - tokens["beta"]) * dwrite
    if share.erased is not None:
        found, came, pairs = share.erased
        erase = _erase(plan, notes)
        pairs *= _decay(plan, place, notes["arrival"], notes["departure"])
        whole = pairs
        if share.swept is not None and share.swept.pairs is not None:
            whole = pairs + notes["spread"] * share.swept.pairs
        dkey -= erase * dot(plan, whole, key)
        dkey -= dot(plan, erase * whole, key, 0, 0)
        overlap = dot(plan, key, key, 1, 1)
        spans = pairs * overlap
        derase = -found - jnp.sum(spans if whole is pairs else whole * overlap, 1, keepdims=True)
        dbefore, spans = -erase * came, -erase * spans
    if plan.momentum:
        decayed, ended, dbeta = _charge_momentum(plan, tokens, notes, place, key, share.swept)
        spans, dafter = _plus(spans, decayed), dafter + ended
    dlog += _undecay(plan, place, dbefore, dafter, share.through, spans)
    if plan.erases == "state" and not plan.steps:
        dwrite += derase
    elif plan.erases == "retained":
        dwrite += derase * notes["retain"]
        dlog += derase * _erase(plan, notes)
    if place is not None:
        dlog, dwrite = jnp.where(place.live, dlog, 0), jnp.where(place.live, dwrite, 0)
        dbeta = None if dbeta is None else jnp.where(place.live, dbeta, 0)
    slopes = {"k": _unscale(dkey, key, notes.get("key_scale")), "v": share.value}
    if plan.gates:
        dstep = dwrite if plan.steps else _gate(plan, notes) * dwrite
        slopes["gates"] = _ungate(plan, notes, dstep, dlog)
    if "eta" not in plan.gates:
        slopes["eta"] = dwrite
    if "alpha" not in plan.gates:
        slopes["alpha"] = dlog / jnp.maximum(tokens["alpha"], SMALLEST)
    if dbeta is not None:
        slopes["beta"] = dbeta
    return slopes


def _charge_momentum(plan, tokens, notes, place, key, swept):
    """Undoes what tokens said to momentum.

    Returns:
      What the logarithms of decays and of what is left at the chunk's end gain; the gradient of
      what tokens say.
    """
    after, lasting, carried = notes["after"], notes["lasting"], notes["carried"]
    decay = _decay(plan, place, notes["arrival"], notes["departure"])
    ended = jnp.sum(lasting * swept.ending.T, 1, keepdims=True) - notes["mass"] * swept.ending
    ended += swept.gained * carried
    dspread, dswept = jnp.zeros_like(decay), jnp.zeros_like(after)
    if plan.erases != "nothing":
        dspread = -_erase(plan, notes) * swept.pairs * dot(plan, key, key, 1, 1)
        dswept = swept.swept
    decayed, carried, lasting = _unsweep(
        plan, decay, lasting, carried, notes["mass"], dspread, dswept,
        after * swept.ending.T, after * swept.gained,
    )  # fmt: skip
    dlog = swept.log + _undecay(plan, place, carried, swept.left, swept.remains, lasting, own=True)
    dbeta = dlog / jnp.maximum(tokens["beta"], SMALLEST) - _gate(plan, notes) * swept.write
    return decayed, after * ended, dbeta


def blame(plan: Plan, place: Place | None, name: str, slope: Array, x: Array) -> Change:
    """Hands the gradient of what a memory answered to tokens x to what they held of it."""
    held = fresh = None
    if place is None:
        held = dot(plan, slope, x, 0, 0)
    else:
        holding = place.holding(name)
        held = dot(plan, jnp.where(holding, slope, 0), x, 0, 0)
        fresh = dot(plan, jnp.where(holding, 0, slope), x, 0, 0)
    return Change(held, _plus(held, fresh) if plan.anchor else fresh)


def answer(
    plan: Plan,
    tokens: Values,
    notes: Mapping[str, Array],
    place: Place | None,
    memories: Memories,
    slopes: Values,
) -> Values:
    """Hands the gradients of what tokens said to the tokens.

    Args:
      plan: What was computed.
      tokens: As for `attend`.
      notes: What `prepare` noted.
      place: Where documents lie.
      memories: The memories.
      slopes: What `charge` returned.

    Returns:
      The gradients of the tokens but for queries that came with them, which `prepare` noted.
    """
    dtokens = {name: slope for name, slope in slopes.items() if name not in plan.names}
    if "x" in tokens:
        asked = {name: slope for name, slope in slopes.items() if name in plan.names}
        if "q" in plan.memories:
            asked["q"] = notes["dquery"]
        gains = [unconsult(plan, place, memories, *of_one) for of_one in asked.items()]
        dtokens["x"] = reduce(add, gains)
    return dtokens


def _said(tokens, notes):
    return {n: notes[label] if label in notes else tokens.get(n) for n, label in LABELS.items()}


def _owed(plan, notes, name, after):
    """The gradient of each token's write, from that of the last state and of what was read."""
    owed = dot(plan, notes["pull"], after, 1, 1)
    return owed + notes["ddelta"] if name == "memory" and "ddelta" in notes else owed


def _erase(plan, notes):
    return notes["erase"] if plan.erases == "retained" or plan.momentum else notes["write"]


def _gate(plan, notes):
    return notes["erase"] if plan.momentum else notes["write"]


def _target(plan, notes, name, said):
    if plan.targets == "self":
        return notes["target_" + name].astype(jnp.float32)
    target = said["v"].astype(jnp.float32)
    return target * notes["scale_" + name] if plan.normalize else target


def _untarget(plan, notes, name, said, owed):
    """The gradient of one memory's targets before they were scaled."""
    dtarget = notes["write"] * owed
    if plan.normalize:
        target = _target(plan, notes, name, said)
        if name == "gates":
            rest = jnp.maximum(1 - target * target, 0)  # a rounded target may be longer than 1
            dtarget = dtarget * rest * jnp.sqrt(rest)
        else:
            dtarget -= target * jnp.sum(dtarget * target, 1, keepdims=True)
            dtarget *= notes["scale_" + name]
    return dtarget


def _unfound(plan, notes, memories, name, owed):
    """What is owed along the states that tokens found: those that decay, and the others."""
    decaying, resting = dot(plan, notes["before"] * owed, memories.state(name)), 0
    if plan.anchor:
        resting = dot(plan, owed, memories.origin(name))
    elif "inherit" in notes:
        decaying += dot(plan, notes["inherit"] * owed, memories.origin(name))
    return decaying, resting


def _unsweep(plan, decay, lasting, carried, mass, dspread, dswept, dlasting, dcarried):
    """Hands gradients of what states have of momentum to decays and to what momentum has.

    Returns:
      The gradients of the logarithms of `decay`, `carried` and `lasting`.
    """
    ddecay = dot(plan, dspread, lasting, 1, 1) - dspread * mass.T + dswept * carried.T
    dlasting += dot(plan, decay, dspread, 0, 0)
    dcarried += _upright(plan, jnp.sum(decay * dswept, 0, keepdims=True))
    return decay * ddecay, dcarried * carried, dlasting * lasting


def _undecay(plan, place, dbefore, dafter, dthrough, spans, own=False):
    """The gradient of the logarithm of each token's retention, from all the products it is in.

    Only the products that it is in are summed: where it is nearly zero they are, too, and the
    difference of two large sums would not be. `own` products have the token's own retention.
    """
    row, column = _grid(plan.chunk)
    later, earlier = row <= column if own else row < column, row > column
    if place is not None:
        same = place.number == place.number.T
        later, earlier = later & same, earlier & same
    within = 0
    if dbefore is not None:
        within += jnp.where(later, dbefore.T, 0)
    if dafter is not None:
        within += jnp.where(earlier, dafter.T, 0)
    if spans is not None:
        spans = dot(plan, jnp.where(row <= column if own else row < column, 1.0, 0.0), spans)
        within += jnp.where(row > column, spans, 0)
    dlog = jnp.sum(within, 1, keepdims=True)
    if place is not None and dthrough is not None:
        dthrough = jnp.where(place.number == place.last, dthrough, 0)
    return dlog if dthrough is None else dlog + dthrough


def _unscale(slope, unit, scale):
    """Undoes that rows were scaled to unit length; `scale` is None where they were not."""
    if scale is None:
        return slope
    return scale * (slope - unit * jnp.sum(slope * unit, 1, keepdims=True))


def _ungate(plan, notes, dstep, dlog):
    """Undoes the sigmoids of the gates that are memories."""
    column = jax.lax.broadcasted_iota(jnp.int32, (plan.chunk, GATE_ROWS), 1)
    dlogits = jnp.zeros((plan.chunk, GATE_ROWS), jnp.float32)
    if "eta" in plan.gates:
        dlogit = dstep * (1 - _gate(plan, notes) / plan.write_max)
        dlogits = jnp.where(column == 0, dlogit, dlogits)
    if "alpha" in plan.gates:
        dlogits = jnp.where(column == 1, dlog * notes["forget"], dlogits)
    return dlogits


def _settle(plan, notes, place, name, key, after, owed, asked):
    """Gradients of one memory's matrices; it answered `asked`, pairs of (gradient, rows)."""
    state = notes["through"] * after
    if name == "memory" and "dstate" in notes:
        state += notes["dstate"]
    held = origin = None
    for slope, rows in asked:
        change = blame(plan, place, name, slope, rows)
        held, origin = _plus(held, change.held), _plus(origin, change.origin)
    if plan.erases != "nothing":
        owed = -_erase(plan, notes) * owed
        state += dot(plan, notes["before"] * owed, key, 0, 0)
        if plan.anchor:
            origin = _plus(origin, dot(plan, owed, key, 0, 0))
        elif "inherit" in notes:
            origin = _plus(origin, dot(plan, notes["inherit"] * owed, key, 0, 0))
    if "restore" in notes:
        origin = _plus(origin, notes["restore"] * after)
    return state, Change(held, origin)


def _total(x):
    return jnp.sum(jnp.sum(x, 1, keepdims=True), 0, keepdims=True)


def _plus(a, b):
    return b if a is None else a if b is None else a + b


def unconsult(plan, place, memories, name, dy):
    """The gradient of the rows with which a matrix was consulted."""
    if place is None:
        return dot(plan, dy, memories.held(name))
    drows = dot(plan, dy, memories.held(name))
    fresh = 0 if memories.origin is None else dot(plan, dy, memories.origin(name))
    return jnp.where(place.holding(name), drows, fresh)


def dot(plan, a, b, left=1, right=0):
    """Multiplies operands, contracting axis `left` of a with axis `right` of b."""
    return (_dot_undone if plan.undone else _dot)(plan, left, right, a, b)


def _dot(plan, left, right, a, b):
    return jax.lax.dot_general(
        a.astype(plan.operand), b.astype(plan.operand), (((left,), (right,)), ((), ())),
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _dot_in_full(plan, left, right, a, b):
    """Multiplies operands of which rounding takes nothing that float32 would have kept."""
    if plan.operand == jnp.float32:
        return _dot(plan, left, right, a, b)
    a_rest, b_rest = (x - x.astype(plan.operand) for x in (a, b))
    pairs = (a, b), (a, b_rest), (a_rest, b)
    return reduce(add, (_dot(plan, left, right, *pair) for pair in pairs))


def _undone(product):
    """A product of float32 for `jax.vjp`: its gradients are such products and float32, too."""
    rule = jax.custom_vjp(product, nondiff_argnums=(0, 1, 2))

    def forward(plan, left, right, a, b):
        return product(plan, left, right, a, b), (a, b)

    def backward(plan, left, right, operands, slope):
        a, b = operands
        of_a = (left, 1 - right, slope, b) if left else (1 - right, 1, b, slope)
        of_b = (0, 1 - left, slope, a) if right else (1 - left, 0, a, slope)
        return product(plan, *of_a), product(plan, *of_b)

    rule.defvjp(forward, backward)
    return rule


_dot_undone, _dot_in_full_undone = map(_undone, (_dot, _dot_in_full))


def _round(plan, x):
    return x if plan.undone else x.astype(plan.operand)


def _grid(size):
    row = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    return row, jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)


def _project(plan, name, tokens, place, memories):
    """A unit key or query from its memory, or the one that came with the tokens."""
    if name not in plan.memories:
        return tokens[name], None
    raw = consult(plan, place, memories, name, tokens["x"])
    scale = jax.lax.rsqrt(jnp.sum(raw * raw, 1, keepdims=True) + 1e-6)
    return raw * scale, scale


def open_gates(plan, tokens, place, logits):
    """The write gate, the retention gate, one minus that (None if given), its logarithm.

    Args:
      plan: What to compute.
      tokens: What they bring where it is no memory that makes a gate.
      place: Where documents lie.
      logits: Of the write and the retention gate, where memories make them.
    """
    write = plan.write_max * jax.nn.sigmoid(logits[0]) if "eta" in plan.gates else tokens["eta"]
    if "alpha" in plan.gates:
        logit = logits[1]
        retain, forget = jax.nn.sigmoid(logit), jax.nn.sigmoid(-logit)
        log_retain = jnp.minimum(logit, 0) - jnp.log1p(jnp.exp(-jnp.abs(logit)))
    else:
        retain, forget = jnp.maximum(tokens["alpha"], SMALLEST), None
        log_retain = jnp.log(retain)
    if place is not None:
        write, log_retain = (jnp.where(place.live, gate, 0) for gate in (write, log_retain))
    return write, retain, forget, log_retain


def column_of(matrix, index):
    """One column of a matrix."""
    column = jax.lax.broadcasted_iota(jnp.int32, matrix.shape, 1)
    return jnp.sum(jnp.where(column == index, matrix, 0), 1, keepdims=True)


def _upright(plan, row):
    """A row of numbers as a column."""
    down, across = _grid(plan.chunk)
    return jnp.sum(jnp.where(down == across, row, 0), 1, keepdims=True)


def _passed(plan, place, log):
    """Sums up logarithms of gates: to a token, with its own, and in the last document."""
    row, column = _grid(plan.chunk)
    same = row >= column
    if place is not None:
        same = same & (place.number == place.number.T)
    departure = jnp.sum(jnp.where(same, log.T, 0), 1, keepdims=True)
    arrival = departure - log
    ending = log if place is None else jnp.where(place.number == place.last, log, 0)
    return arrival, departure, jnp.sum(ending, 0, keepdims=True)


def found_of(plan, key, spread):
    """`Sweep.found` of keys."""
    return _round(plan, spread * dot(plan, key, key, 1, 1))


def sweep_of(plan, place, beta, key, decay, after):
    """Weighs what momentum keeps and what states gain of it; `found` only for given keys."""
    log = jnp.log(jnp.maximum(beta, SMALLEST))
    if place is not None:
        log = jnp.where(place.live, log, 0)
    parts = (_left_undone if plan.undone else _left)(plan, True, place, log)
    carried, left, remains, lasting = parts
    if place is not None:
        carried = jnp.where(place.open, carried, 0)
        remains = jnp.where(place.last > 0, 0, remains)
    mass = _upright(plan, jnp.sum(lasting, 0, keepdims=True))
    in_full = _dot_in_full_undone if plan.undone else _dot_in_full
    spread = in_full(plan, 1, 0, decay, lasting) - decay * mass.T
    return Sweep(
        found=None if key is None else found_of(plan, key, spread),
        lasting=lasting,
        carried=carried,
        mass=mass,
        spread=spread,
        swept=jnp.sum(decay * carried.T, 1, keepdims=True),
        ending=_upright(plan, jnp.sum(lasting * after, 0, keepdims=True)) - after * mass,
        gained=jnp.sum(after * carried, 0, keepdims=True),
        left=left,
        remains=remains,
    )


def _left(plan, own, place, log):
    """What tokens leave of what, given logarithms of the part.

    Args:
      plan: What to compute.
      own: Whether a token counts for what it finds itself.
      place: Where documents lie.
      log: The logarithms.

    Returns:
      What tokens find of the first state of their document or chunk; what is left of a token at the
      end, zero in documents before the last, and of the first state of the last document; what is
      left of token s (column) at token t (row) of the same document.
    """
    arrival, departure, last = _passed(plan, place, log)
    found, after = departure if own else arrival, jnp.exp(last - departure)
    if place is not None:
        after = jnp.where(place.number == place.last, after, 0)
    return jnp.exp(found), after, jnp.exp(last), _decay(plan, place, found, departure, own)


_left_undone = jax.custom_vjp(_left, nondiff_argnums=(0, 1))
"""`_left` for `jax.vjp`, with gradients of logarithms as `_undecay` sums them."""


def _left_forward(plan, own, place, log):
    left = _left(plan, own, place, log)
    return left, (place, left)


def _left_backward(plan, own, residuals, slopes):
    place, left = residuals
    found, after, through, pairs = (part * slope for part, slope in zip(left, slopes, strict=True))
    plan = plan._replace(undone=False)
    return None, _undecay(plan, place, found, after, through, pairs, own)


_left_undone.defvjp(_left_forward, _left_backward)


def _decay(plan, place, arrival, departure, own=False):
    """What is left of the write of token s (column) when token t (row) arrives."""
    row, column = _grid(plan.chunk)
    seen = row >= column if own else row > column
    if place is not None:
        seen = seen & (place.number == place.number.T)
    return jnp.where(seen, jnp.exp(jnp.where(seen, arrival - departure.T, 0)), 0)


def _unit_lower_inverse(plan, lower):
    """Inverts `I + lower` by merging blocks of 1, 2, 4, ...: exact block substitution.

    Where `T` holds the inverses of the diagonal blocks, the corner below two neighbours is
    `-T2 L21 T1`, which is `-T L T` with all but these corners of L masked. The highest bit in
    which row and column differ tells to which merge an entry of L belongs. A merge fills zeros
    only, so that the inverse can be kept as an operand without adding up rounding.
    """
    row, column = _grid(plan.chunk)
    differ, lower = jnp.bitwise_xor(row, column), lower.astype(plan.operand)
    one = jnp.where(differ == 0, 1.0, 0.0).astype(plan.operand)
    inverse, size = one - jnp.where(differ == 1, lower, 0), 2
    while size < plan.chunk:
        corners = jnp.where((differ >= size) & (differ < 2 * size), lower, 0)
        merged = _dot(plan, 1, 0, _dot(plan, 1, 0, inverse, corners), inverse)
        inverse -= merged.astype(plan.operand)
        size *= 2
    return inverse


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _inverse_undone(plan, lower):
    """`_unit_lower_inverse` in float32 for `jax.vjp`, which needs no second inverse."""
    return _unit_lower_inverse(plan, lower).astype(jnp.float32)


def _inverse_forward(plan, lower):
    inverse = _inverse_undone(plan, lower)
    return inverse, inverse


def _inverse_backward(plan, inverse, slope):
    row, column = _grid(plan.chunk)
    owed = _dot(plan, 1, 1, _dot(plan, 0, 0, inverse, slope), inverse)
    return (jnp.where(row > column, -owed, 0),)


_inverse_undone.defvjp(_inverse_forward, _inverse_backward)


def _error(plan, place, memories, name, key, target):
    """What a memory's inner objective pulls it to, given its targets."""
    if plan.objective == "dot":
        return target
    return target - consult(plan, place, memories, name, key)


def _inherited(plan, before, inherit, memories, name, rows):
    """What tokens find of the chunk's first state and of the origin."""
    y = before * dot(plan, rows, memories.state(name), 1, 1)
    if plan.anchor:
        return y + dot(plan, rows, memories.origin(name), 1, 1)
    if inherit is not None:
        y += inherit * dot(plan, rows, memories.origin(name), 1, 1)
    return y


def _swept(plan, swept, memories, name, rows):
    """What tokens find of the chunk's first momentum."""
    return swept * dot(plan, rows, memories.state(momentum_of(name)), 1, 1)


def _reach_of_momentum(plan, lesson):
    """What a read sees of the chunk's first momentum, and of writes."""
    sweep = lesson.sweep
    if plan.read == "token":
        return sweep.swept, sweep.spread
    row, column = _grid(plan.chunk)
    own = _own(lesson.weights)
    late = sweep.lasting - jnp.where(row == column, sweep.mass, 0)
    return own * sweep.swept + sweep.carried, own * sweep.spread + late


def _reach(plan, lesson):
    """What a read sees: of the chunk's first state, of the origin, and of earlier writes."""
    weights = lesson.weights
    if plan.read == "token":
        return weights.before, weights.inherit, weights.decay
    row, column = _grid(plan.chunk)
    own = _own(weights)
    inherit = None if weights.inherit is None else own * weights.inherit
    return own * weights.before, inherit, jnp.where(row == column, 1, own * weights.decay)


def _own(weights):
    """What a token itself retains."""
    return jnp.exp(weights.departure - weights.arrival)

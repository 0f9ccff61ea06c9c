"""Runs matrix memories over a sequence on a GPU, through Triton or, where `hopper.takes`, Mosaic.

Forward, one program for each row and head goes through the whole sequence, so that the scan over
chunks is one launch. The states lie in memory that it alone writes, and which the caches hold:
registers would overflow. With fewer programs than multiprocessors the rest of the chip idles:
batch x heads should be at least their number. Backward, each memory of a head has a program of its
own: for all chunks at once, and where gradients go from chunk to chunk in a launch for each.

Where they are fewer, the rows of a memory, its values' features, are shared out to several programs
if none needs another's (`split_of`): whatever keys and gates alone decide each computes again, and
what has values' features it reads and writes for its own rows. Memories that tokens consult are not
split: every program would need, chunk by chunk, all keys, values and gates that they answer. Nor is
their time, for what a chunk makes of such states is no associative product.

Cost for each token of a head of five adaptive memories (k, v, memory, eta, alpha), with 64
features, chunks of 64 and bfloat16 (a product of two 64 x 64 matrices is 8,192 FLOPs a token):

    forward    34 products, 0.27 MFLOPs;    0.4 kB read and written, as much again for `backward`
    prepare    14 products, 0.12 MFLOPs;    1.0 kB
    recall     23 products, 0.19 MFLOPs;    3.0 kB
    unlearn    36 products, 0.29 MFLOPs;    9 kB, most of it in the second cache
    answer      2 products, 0.02 MFLOPs;    1.1 kB

The arithmetic of a batch of 8 x 4,096 tokens with 16 heads is 0.5 ms of an H100 and the traffic
from memory 1.2 ms. What is measured there is 1.5 ms forward (1.7 with what `backward` needs), 0.8,
0.8 and, with `answer`, 5.9 ms. A launch of `unlearn` takes 90 us. Its programs have all 255
registers a thread, so that one fits a multiprocessor, in four waves; a warp then issues an
instruction every 9.6 cycles, of which it waits 3.1 for memory, 1.4 at barriers and 1.3 for
instructions. With half the warps two fit, which takes 103 us; with matrices and notes all read
before anything is computed, the same. Neither gradients of tokens summed in float32, nor programs
numbered so that a multiprocessor has those of one memory alone (120 us), nor all memories stacked
into one matrix of 256 rows helped. `hopper_backward` does: 1.4 ms on an H200, sums of origins
included.

With momentum, a second state of every memory that lies beside the first, it is

    forward    49 products, 0.40 MFLOPs;    0.4 kB read and written, and 0.8 kB for `backward`
    prepare    19 products, 0.16 MFLOPs;    1.4 kB
    recall     43 products, 0.35 MFLOPs;    4.3 kB
    unlearn    63 products, 0.52 MFLOPs;    14 kB
    answer      2 products, 0.02 MFLOPs;    1.1 kB
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array

from hope_jax.ops.dispatch import on_hopper
from hope_jax.ops.pallas import chunk as chunks
from hope_jax.ops.pallas import hopper, hopper_backward, hopper_forward, hopper_prepare, walk
from hope_jax.ops.pallas.chunk import Change, Plan, Values
from hope_jax.ops.pallas.walk import Gradients, Sequence, View

PLATFORM = "gpu"


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
      warps: Warps of a program.
      stages: Depth of the software pipeline of loads.
      interpret: Whether to interpret the kernel instead of compiling it.
    """

    warps: int = 4
    stages: int = 1
    interpret: bool = False


ROUNDING = (None, "default", "fastest", "bfloat16", "high", "bfloat16_3x", "tensorfloat32")
"""Values of `jax.default_matmul_precision` with which float32 operands are rounded to tf32."""

KIB = {
    (64, 64, "bfloat16"): (64, 64, 64, 64),
    (64, 128, "bfloat16"): (192, 160, 112, 88),
    (64, 64, "tf32"): (112, 48, 80, 48),
    (32, 128, "tf32"): (math.inf, math.inf, 80, 80),
    (32, 64, "float32"): (112, 112, 52, 52),
    (64, 64, "float32"): (math.inf, math.inf, 96, 96),
    (32, 128, "float32"): (math.inf, math.inf, 176, 176),
}
"""Shared memory that the largest launch asks for, by tokens of a chunk, features and operands:
where tokens consult memories on Hopper and before it, then where they do not, likewise."""

KIB_WITH_MOMENTUM = {
    (64, 64, "bfloat16"): (72, math.inf, 72, math.inf),
    (64, 128, "bfloat16"): (192, math.inf, 192, math.inf),
    (64, 64, "tf32"): (128, math.inf, 128, math.inf),
    (32, 64, "float32"): (120, math.inf, 120, math.inf),
}
"""The same for memories with momentum. Before Hopper they spill most of their registers."""

HOPPER_KIB = 227

MULTIPROCESSORS = 132
"""Those of an H100."""

TILE = 16
"""The fewest rows of a product on tensor cores."""

WIDE = 128
"""The fewest features of values that are shared out to several programs."""


def fits(plan: Plan, dtype: jnp.dtype, widest: int) -> bool:
    """Says whether the GPU's shared memory holds what a program needs at once.

    What that is was read off kernels compiled for compute capabilities 8.0 and 9.0, with all
    memories and with one. It is infinite for what compiles in minutes or spills most of its
    registers; so do chunks of 128 tokens. The GPU is jax's first; kernels that run elsewhere are
    judged as for a Hopper GPU.

    Memories that are MLPs do not fit: `deep` spills most of their registers. One of them with 128
    hidden units, 64 features, chunks of 64 and momentum, 8 x 4,096 bfloat16 tokens with 16 heads,
    took 12.6 ms forward and 70 with backward on an H100, where XLA's form takes 10.5 and 43; with
    64 hidden units 7.5 and 41 against 7.4 and 37. Five of them that make keys, values and gates
    took 29.7 forward against 49, and did not lower with backward, where XLA takes 215. (Measured
    once, by a script that was not kept.)

    Args:
      plan: What to compute.
      dtype: Of the tokens.
      widest: The features of keys or of values, whichever are more.
    """
    if plan.hidden:
        return False
    device = jax.devices()[0]
    old, room = False, HOPPER_KIB
    if device.platform == PLATFORM:
        old = getattr(device, "compute_capability", "").startswith(("7.", "8."))
        room = getattr(device, "shared_memory_per_block_optin", 1024 * room) / 1024
    operand = jnp.dtype(dtype).name
    if operand == "float32" and jax.default_matmul_precision.value in ROUNDING:
        operand = "tf32"
    needs = [
        kib[old + 2 * (not plan.consults)]
        for (chunk, width, kind), kib in (KIB_WITH_MOMENTUM if plan.momentum else KIB).items()
        if plan.chunk <= chunk and widest <= width and kind == operand
    ]
    return min(needs, default=math.inf) <= room


def split_of(plan: Plan, batch: int, heads: int, values: int) -> int:
    """Says how many programs share out the rows of a head's memory in launches along time.

    As many as multiprocessors can run at once, each with a tile of rows at least. Just one where
    rows depend on one another, through what tokens consult or through the length of a target, and
    with momentum, whose gradients go back in other launches; and for fewer than `WIDE` features,
    which it slows down: what a part computes is then mostly what the others do, too. One row of
    4,096 tokens with 16 heads, the delta rule in bfloat16 on an H100: with 128 features and 8 parts
    forward 1.62 -> 1.13 ms, with backward 2.97 -> 1.77; with 64 features and 4 parts 0.66 -> 1.21
    and 1.04 -> 1.38. The GPU is jax's first; elsewhere it is as for an H100.

    Args:
      plan: What to compute.
      batch: Rows of the batch.
      heads: Heads.
      values: Features of values, the rows of a memory.
    """
    if plan.consults or plan.normalize or plan.momentum or values < WIDE:
        return 1
    room = getattr(jax.devices()[0], "core_count", MULTIPROCESSORS) // (batch * heads)
    return max((s for s in (2, 4, 8) if s <= min(room, values // TILE)), default=1)


def forward(
    plan: Plan, sequence: Sequence, *, keep: bool, launch: Launch
) -> tuple[Array, Values, Values | None, Values | None]:
    """Reads a sequence and lets the memories learn it.

    Args:
      plan: What to compute.
      sequence: What to read.
      keep: Whether to keep the states at the chunks' starts for `backward`.
      launch: How.

    Returns:
      What was read `[B, T, H, V]`; the states after the last token; what the last live token
      projected with (None unless the plan holds); the states at the chunks' starts
      `[B, H, N, V, K]`, as operands (None unless kept).
    """
    like = _like_tokens(sequence)
    batch, time, heads, keys = like.shape
    if on_hopper() and hopper.takes(plan, keys, sequence.states["memory"].shape[2]):
        y, states, starts = hopper_forward.forward(plan, sequence, keep=keep)
        return y, states, None, starts
    states = jax.tree.map(_like, sequence.states)
    starts = {
        name: jax.ShapeDtypeStruct(
            (batch, heads, time // plan.chunk, *state.shape[2:]), plan.operand
        )
        for name, state in sequence.states.items()
    }
    values = sequence.states["memory"].shape[2]
    out = (
        jax.ShapeDtypeStruct((batch, time, heads, values), like.dtype),
        states,
        _learning(plan, states) if plan.holds else None,
        starts if keep else None,
    )
    split, specs = split_of(plan, batch, heads, values), _sequence_specs(sequence)
    columns, rows = partial(_part, split, -1), partial(_part, split, -2)
    tokens = {name: columns(spec) if name == "v" else spec for name, spec in specs.tokens.items()}
    states, held, origins = jax.tree.map(rows, (specs.states, specs.held, specs.origins))
    return pl.pallas_call(
        partial(_forward_kernel, plan, _view(plan, launch)),
        out_shape=out,
        grid=(heads, batch, split),
        in_specs=[specs._replace(tokens=tokens, states=states, held=held, origins=origins)],
        out_specs=(columns(_by_token(out[0])), *jax.tree.map(lambda a: rows(_by_head(a)), out[1:])),
        name="memory_forward",
        **_how(launch),
    )(sequence)


def backward(
    plan: Plan,
    sequence: Sequence,
    starts: Values,
    dy: Array,
    dstates: Values,
    dheld: Values | None,
    *,
    launch: Launch,
) -> tuple[Values, Values, Values | None, Values | None, Array | None]:
    """Hands gradients back through a sequence.

    After `prepare` and `recall` for all chunks at once: where nothing that tokens bring depends on
    states, as for fixed keys and values, the recurrence of the states' gradient, then the rest for
    all chunks at once. Otherwise the rest needs the recurrence and is needed by it: `_unlearn`, or
    on a Hopper GPU, for the plans it takes, `hopper_backward.unlearn`.

    Args:
      plan: What was computed.
      sequence: What was read.
      starts: The states at the chunks' starts.
      dy: The gradient of what was read.
      dstates: The gradient of the states after the last token.
      dheld: The gradient of what the last live token projected with, None unless the plan holds.
      launch: How.

    Returns:
      The gradients of the tokens, of the states before them, of what the first chunk held (None
      unless the plan holds), and, per row of the batch, `[B, H, ...]`, of the origins (None
      without) and of the bias (None without).
    """
    if on_hopper() and hopper.takes(plan, _keys(sequence), dy.shape[-1]):
        noted, notes = hopper_prepare.prepare(plan, sequence, starts, dy), {}
        given = {"q": noted.pop("dquery")}
        gradients, slopes = hopper_backward.unlearn(plan, sequence, noted, starts, dstates)
        origins = gradients.origins
    else:
        notes = _prepare(plan, sequence, starts, dy, launch)
        given = {} if "q" in plan.memories else {"q": notes.pop("dquery")}
        weight = notes.pop("weight", 1)
        if not plan.consults and not plan.momentum and sequence.origins is None:
            dstates, afters = _push_back(plan, sequence, notes, dstates, launch)
            dtokens = _unlearn_at_once(plan, sequence, notes, starts, afters, launch)
            return dtokens | given, dstates, None, None, None
        call = (plan, sequence, notes, starts, dy, dstates, dheld, launch)
        gradients, slopes = _unlearn(*call)
        origins = walk.read_by_origin(plan, sequence, notes, weight, dy, gradients.origins)
    dbias = jnp.sum(slopes["gates"], (2, 3))[..., None, :] if plan.gates else None
    dtokens = _answer(plan, sequence, notes, starts, slopes, launch)
    return dtokens | given, gradients.states, gradients.held, origins, dbias


def _prepare(plan, sequence, starts, dy, launch):
    """Runs `chunk.prepare` on all chunks, then `chunk.recall` on all memories of all chunks."""
    batch, time, heads, values = dy.shape
    keys, count, learning = _keys(sequence), time // plan.chunk, len(plan.names)
    restores = plan.segmented and not plan.anchor and sequence.origins is not None
    place, column = (batch, heads, count), (plan.chunk,)
    out = walk.shapes_of_notes(plan, place, keys, values, column, restores)
    recalled = ("ddelta", "dkey", "dstate", "dlog", "dquery", "weight")
    recalled += ("dwritten", "dmomentum", "dlog_momentum")
    recalled += tuple(
        kind + name for kind in ("delta_", "target_", "scale_") for name in plan.names
    )
    told = {name: shape for name, shape in out.items() if name not in recalled}
    learned = {name: shape for name, shape in out.items() if name in recalled}
    passing = {}
    if plan.erases != "nothing":
        square = (*place, plan.chunk, plan.chunk)
        passing["inverse"] = jax.ShapeDtypeStruct(square, plan.operand)
    if "q" in plan.memories:
        passing["query_scale"] = jax.ShapeDtypeStruct((*place, *column), jnp.float32)
    by_head = partial(jax.tree.map, _by_head)
    specs = [_sequence_specs(sequence), by_head(starts)]
    told = pl.pallas_call(
        partial(_prepare_kernel, plan, _view(plan, launch)),
        out_shape=told | passing,
        grid=(heads, batch, count),
        in_specs=specs,
        out_specs=by_head(told | passing),
        name="memory_prepare",
        **_how(launch),
    )(sequence, starts)
    to = by_head(learned)
    if "q" not in plan.memories:
        learned["dquery"] = _like(sequence.tokens["q"])
        to["dquery"] = _by_token(learned["dquery"])
    learned = pl.pallas_call(
        partial(_recall_kernel, plan, _view(plan, launch)),
        out_shape=learned,
        grid=(heads, batch, count * learning),
        in_specs=[*specs, _by_token(dy), by_head(told)],
        out_specs=to,
        name="memory_recall",
        **_how(launch),
    )(sequence, starts, dy, told)
    return {name: note for name, note in told.items() if name not in passing} | learned


def _unlearn(plan, sequence, notes, starts, dy, dstates, dheld, launch):
    """Runs `chunk.unlearn` and `chunk.charge` from the last chunk to the first.

    The memories of a head are programs of their own. Through what tokens say to all of them each
    needs what the others owe for a chunk before it goes on with the next; so every chunk is a
    launch, which begins with what the last one left. Twice the warps hold what a program needs with
    fewer spilled registers.
    """
    operands = sequence, notes, starts, dy
    widths = _keys(sequence), dy.shape[-1]
    batch, time, heads, _ = dy.shape
    count, learning = time // plan.chunk, len(plan.names)
    by_head = partial(jax.tree.map, _by_head)

    def zeros(shapes, *axes):
        front = (batch, heads, *axes)
        return jax.tree.map(lambda shape: jnp.zeros(front + shape.shape, shape.dtype), shapes)

    def chunk(i, left):
        kernel = partial(_unlearn_kernel, plan, _view(plan, launch))
        first = 1 + len(jax.tree.leaves(operands))
        places = range(len(jax.tree.leaves(left)))
        return pl.pallas_call(
            kernel,
            out_shape=jax.tree.map(_like, left),
            grid=(heads, batch, learning),
            in_specs=[
                pl.BlockSpec((1,), lambda *_: (0,)),
                _sequence_specs(sequence),
                *by_head((notes, starts)),
                _by_token(dy),
                *by_head(left),
            ],
            out_specs=by_head(left),
            input_output_aliases={first + place: place for place in places},
            name="memory_unlearn",
            **_how(launch._replace(warps=2 * launch.warps)),
        )(jnp.reshape(i, 1), *operands, *left)

    nothing = jax.tree.map(jnp.zeros_like, _learning(plan, sequence.states))
    gradients = Gradients(dstates, dheld, None if sequence.origins is None else nothing)
    dues = zeros(walk.shapes_of_share(plan, *widths), 2, learning)
    left = gradients, dues, zeros(walk.shapes_of_slopes(plan, *widths), count)
    gradients, _, slopes = jax.lax.fori_loop(0, count + 1, chunk, left)
    return gradients, slopes


def _answer(plan, sequence, notes, starts, slopes, launch):
    """Runs `chunk.answer` on all chunks."""
    tokens = {name: _like(a) for name, a in sequence.tokens.items() if name != "q"}
    batch, heads, count = starts["memory"].shape[:3]
    return pl.pallas_call(
        partial(_answer_kernel, plan, _view(plan, launch)),
        out_shape=tokens,
        grid=(heads, batch, count),
        in_specs=[
            _sequence_specs(sequence), *jax.tree.map(_by_head, (notes, starts, slopes)),
        ],
        out_specs=jax.tree.map(_by_token, tokens),
        name="memory_answer",
        **_how(launch),
    )(sequence, notes, starts, slopes)  # fmt: skip


def _push_back(plan, sequence, notes, dstates, launch):
    """The gradient of the state before the first token, and of the states after each chunk."""
    state, through = dstates["memory"], notes["through"]
    out = _like(state), _like(notes["dstate"])
    needed = ("through", "dstate", "pull", "ddelta", "before", "write", "erase")
    notes = {name: notes[name] for name in needed if name in notes}
    key, view = sequence.tokens["k"], _view(plan, launch)
    batch, heads, values, _ = state.shape
    count, split = through.shape[2], split_of(plan, batch, heads, values)
    columns, rows = partial(_part, split, -1), partial(_part, split, -2)
    specs, rows_of_head = jax.tree.map(_by_head, notes), rows(_by_head(state))
    specs |= {"dstate": rows(specs["dstate"]), "ddelta": columns(specs["ddelta"])}

    def kernel(notes, key, after, before, afters):
        def chunk(i, after):
            n = count - 1 - i
            afters[n] = after.astype(afters.dtype)
            noted = {name: walk.as_column(ref[view.item(n)]) for name, ref in notes.items()}
            return chunks.push_back(plan, noted, key[view.rows(n)], after)

        before[...] = jax.lax.fori_loop(0, count, chunk, after[...])

    before, afters = pl.pallas_call(
        kernel,
        out_shape=out,
        grid=(heads, batch, split),
        in_specs=[specs, _by_token(key), rows_of_head],
        out_specs=(rows_of_head, specs["dstate"]),
        name="memory_push_back",
        **_how(launch),
    )(notes, key, state)
    return {"memory": before}, {"memory": afters}


def _unlearn_at_once(plan, sequence, notes, starts, afters, launch):
    """Runs `chunk.unlearn` on all chunks, the gradients of the states after them being known."""
    tokens = {name: _like(a) for name, a in sequence.tokens.items() if name != "q"}
    heads, count = starts["memory"].shape[1:3]
    batch = starts["memory"].shape[0]

    def kernel(sequence, notes, starts, afters, dtokens):
        n, view = pl.program_id(2), _view(plan, launch)
        after = afters["memory"][n].astype(jnp.float32)
        page = _look(plan, view, sequence, starts, n, notes)
        share, *_ = chunks.unlearn(plan, *page, "memory", after, None, None)
        slopes = chunks.charge(plan, *page[:3], share)
        walk.answer(plan, view, page, n, slopes, dtokens)

    by_head = partial(jax.tree.map, _by_head)
    return pl.pallas_call(
        kernel,
        out_shape=tokens,
        grid=(heads, batch, count),
        in_specs=[_sequence_specs(sequence), by_head(notes), by_head(starts), by_head(afters)],
        out_specs=jax.tree.map(_by_token, tokens),
        name="memory_unlearn",
        **_how(launch),
    )(sequence, notes, starts, afters)


def _how(launch):
    params = triton.CompilerParams(num_warps=launch.warps, num_stages=launch.stages)
    return {"compiler_params": params, "interpret": launch.interpret}


def _view(plan, launch):
    """A program sees all tokens and chunks of its head."""
    return View(
        rows=lambda n: (pl.ds(n * plan.chunk, plan.chunk), ...),
        item=lambda n: (n, ...),
        number=lambda ref, n: ref[n],
        fence=(lambda: None) if launch.interpret else triton.debug_barrier,
    )


def _keys(sequence):
    return _like_tokens(sequence).shape[-1]


def _learning(plan, states):
    """The states without their momenta."""
    return {name: states[name] for name in plan.names}


def _like(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _like_tokens(sequence):
    return next(array for array in sequence.tokens.values() if array.ndim == 4)


def _by_token(array):
    """One head's tokens of one row: `[B, T, H, K]` is seen as `[T, K]`."""
    block = (None, array.shape[1], None, *array.shape[3:])
    return pl.BlockSpec(block, lambda h, b, *_: (b, 0, h, *[0] * (array.ndim - 3)))


def _by_head(array):
    """What one head of one row has for itself: `[B, H, ...]` is seen as `[...]`."""
    return pl.BlockSpec(
        (None, None, *array.shape[2:]), lambda h, b, *_: (b, h, *[0] * (array.ndim - 2))
    )


def _part(split, axis, spec) -> Any:
    """Shares out an axis of a head's blocks to the programs along the grid's last axis."""
    block, of_head = list(spec.block_shape), spec.index_map
    block[axis] //= split

    def index(h, b, part):
        place = list(of_head(h, b))
        place[axis] = part
        return tuple(place)

    return pl.BlockSpec(tuple(block), index)


def _sequence_specs(sequence):
    def by_row(array):
        return pl.BlockSpec(
            (None, *array.shape[1:]), lambda _h, b, *_: (b, *[0] * (array.ndim - 1))
        )

    def shared(array):
        return pl.BlockSpec((None, *array.shape[1:]), lambda h, *_: (h, *[0] * (array.ndim - 1)))

    return Sequence(
        jax.tree.map(_by_token, sequence.tokens),
        jax.tree.map(by_row, sequence.segments),
        jax.tree.map(by_row, sequence.last),
        jax.tree.map(by_row, sequence.early),
        jax.tree.map(lambda array: pl.BlockSpec(array.shape, lambda *_: (0,)), sequence.live),
        jax.tree.map(_by_head, sequence.states),
        jax.tree.map(_by_head, sequence.held),
        jax.tree.map(shared, sequence.origins),
        jax.tree.map(shared, sequence.bias),
    )


def _forward_kernel(plan, view, sequence, y, ends, ends_held, starts):
    """The kernel that reads a sequence."""

    def chunk(n, _):
        walk.forward(plan, view, sequence, n, y, ends, ends_held, starts)
        return 0

    walk.begin_forward(plan, view, sequence, ends, ends_held)
    jax.lax.fori_loop(0, y.shape[0] // plan.chunk, chunk, 0)


def _prepare_kernel(plan, view, sequence, starts, notes):
    """The kernel that takes notes of what is said in a chunk."""
    n = pl.program_id(2)
    page = _look(plan, view, sequence, starts, n)
    walk.prepare(plan, sequence, page, walk.taker(plan, view, notes, n))


def _recall_kernel(plan, view, sequence, starts, dy, told, notes):
    """The kernel that takes notes of what a memory learns from a chunk."""
    learning = len(plan.names)
    n = jax.lax.div(pl.program_id(2), learning)

    def memory(name):
        page = _look(plan, view, sequence, starts, n, told)
        lesson = chunks.recollect(plan, *page[:3])
        walk.recall(plan, view, page, dy, n, name, lesson, walk.taker(plan, view, notes, n))

    for place, name in enumerate(plan.names):
        pl.when(jax.lax.rem(pl.program_id(2), learning) == place)(partial(memory, name))


def _answer_kernel(plan, view, sequence, notes, starts, slopes, dtokens):
    """The kernel that hands tokens of a chunk what they gain."""
    n = pl.program_id(2)
    said = {name: walk.as_column(ref[n]) for name, ref in slopes.items()}
    page = _look(plan, view, sequence, starts, n, notes)
    walk.answer(plan, view, page, n, said, dtokens)


def _look(plan, view, sequence, starts, n, notes=None):
    def opening(name):
        return starts[name][walk.opened(plan, name, n)]

    return walk.look_back(plan, view, sequence, n, lambda name: starts[name][n], opening, notes)


def _unlearn_kernel(
    plan, view, number, sequence, notes, starts, dy,
    _gradients, _dues, _slopes, gradients, dues, slopes,
):  # fmt: skip
    """The kernel that hands gradients back through chunks, one number of a launch for each.

    `dues` are what memories owe for what tokens said in this chunk and in the one of the launch
    before. A memory that was asked in that one undoes there what it answered; "memory", which was
    not, undoes what came with the tokens.
    """
    done, count = number[0], dy.shape[0] // plan.chunk
    n, late = count - 1 - done, jnp.minimum(count - done, count - 1)

    def collect(name):
        said = [x for x in slopes if x == name or (name == "memory" and x not in plan.names)]
        if not said:
            return Change(None, None)
        owed = [_share(dues, (done + 1) & 1, place) for place in range(len(plan.names))]
        whole = jax.tree.map(lambda *shares: sum(shares), *owed)
        page = _look(plan, view, sequence, starts, late, notes)
        slope = chunks.charge(plan, *page[:3], whole)
        for x in said:
            rows = slopes[x].at[late]
            rows[...] = slope[x].reshape(rows.shape).astype(rows.dtype)
        if name not in slopes:
            return Change(None, None)
        return chunks.blame(plan, page.place, name, slope[name], page.tokens["x"])

    def memory(place, name):
        state, answers = gradients.states[name][...], collect(name)
        owed = partial(walk.owed, plan, sequence, gradients, name, n, state, answers.held)
        answered = Change(None, answers.origin)

        def last():
            walk.settle(plan, view, gradients, name, *owed(), [answered])

        def chunk():
            page = _look(plan, view, sequence, starts, n, notes)
            after, held = owed()
            share, state, change = walk.unlearn(plan, view, page, gradients, dy, n, name, after)
            walk.settle(plan, view, gradients, name, state, held, [answered, change])
            for ref, part in zip(jax.tree.leaves(dues), jax.tree.leaves(share), strict=True):
                rows = ref.at[done & 1, place]
                rows[...] = part.reshape(rows.shape).astype(rows.dtype)

        pl.when(n < 0)(last)
        pl.when(n >= 0)(chunk)

    for place, name in enumerate(plan.names):
        pl.when(pl.program_id(2) == place)(partial(memory, place, name))


def _share(dues, parity, place):
    """What a memory owed in a launch."""
    rows = jax.tree.map(lambda ref: walk.as_column(ref[parity, place]), dues)
    return jax.tree.map(lambda part: part.astype(jnp.float32), rows)

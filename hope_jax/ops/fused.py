"""Matrix memories in one kernel launch: its gradient, padding, document starts, carried memory."""

import functools
from functools import partial
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from hope_jax.ops.dispatch import launch_refusal, platform
from hope_jax.ops.pallas.chunk import Plan, Values, momentum_of
from hope_jax.ops.pallas.walk import Sequence

READ = "memories_read"
"""The name for rematerialisation policies of what one launch reads and keeps for `backward`."""


class Carried(NamedTuple):
    """What earlier tokens left behind.

    Attributes:
      position: How many tokens were read; None for memories to which chunks mean nothing, so that
        every call begins one.
      states: The memories, `[B, H, V, K]` by name, and their momenta.
      held: What the next token projects with, likewise; None without a position.
    """

    position: Int[Array, ""] | None
    states: Values
    held: Values | None


def remember(
    machine: ModuleType,
    plan: Plan,
    tokens: Values,
    origins: Values | None,
    bias: Float[Array, "H 1 G"] | None,
    carried: Carried | None,
    starts: Bool[Array, "B T"] | None,
) -> tuple[Float[Array, "B T H V"], Carried]:
    """Reads tokens with memories that learn them, in one launch.

    Tokens are laid on the memories' grid of chunks, with padding around them. With padding or
    document starts a chunk costs a little more: tokens may project with two states.

    Args:
      machine: Whose kernels, `pallas.gpu` or `pallas.tpu`. Elsewhere they are interpreted.
      plan: What to compute; `segmented` and `holds` are found out here.
      tokens: x, k, v, q `[B, T, H, K]`, eta, alpha `[B, T, H]`; those the plan asks for.
      origins: Where states begin, return to and decay to, `[H, V, K]`; None for zero.
      bias: Of the gates that are memories.
      carried: What earlier tokens left behind; None for the origins, at the start of a chunk.
      starts: Document starts.

    Returns:
      What was read, in the dtype of the tokens, and what is left behind.
    """
    time, grid = next(iter(tokens.values())).shape[1], plan.chunk * plan.group
    call = tokens, origins, bias, carried, starts
    if carried is None or carried.position is None or time % grid:
        return _remember(machine, plan, *call)
    # Whole chunks from the start of one need neither padding nor a second state to project with.
    states = {name: carried.states[name] for name in plan.names}
    same = jax.tree.map(lambda a, b: jnp.all(a == b), states, carried.held)
    return jax.lax.cond(
        functools.reduce(jnp.logical_and, jax.tree.leaves(same), carried.position % grid == 0),
        partial(_remember, machine, plan, begins_chunk=True),
        partial(_remember, machine, plan),
        *call,
    )


def _remember(machine, plan, tokens, origins, bias, carried, starts, begins_chunk=False):
    """`remember`, where the first token may be known to begin a chunk."""
    batch, time = next(iter(tokens.values())).shape[:2]
    group = plan.chunk * plan.group
    offset, room = 0, time
    if carried is None:
        carried = _fresh(plan, origins, batch)
    elif carried.position is not None and not begins_chunk:
        offset, room = carried.position % group, time + group - 1
    count = -(-room // plan.chunk)
    whole = room == time == count * plan.chunk
    plan = plan._replace(
        segmented=not whole or starts is not None,
        holds=carried.position is not None and (not whole or plan.group > 1),
    )
    segments = last = early = live = None
    if plan.holds:
        ends = offset, offset + time - 1
        live = jnp.stack([jnp.asarray(end // plan.chunk, jnp.int32) for end in ends])
    if plan.segmented:
        segments, last, early = _segments(plan, count, offset, batch, time, starts)
    padded = {name: _pad(array, offset, count * plan.chunk) for name, array in tokens.items()}
    states = _from_origin(plan, carried.states, origins, -1)
    held = _from_origin(plan, carried.held, origins, -1) if plan.holds else None
    sequence = Sequence(padded, segments, last, early, live, states, held, origins, bias)
    y, ends, held = _scan(machine, plan, sequence)

    if not whole:
        y = jax.lax.dynamic_slice_in_dim(y, offset, time, 1)
    ends = _from_origin(plan, ends, origins, 1)
    if carried.position is None:
        return y, Carried(None, ends, None)
    after = {name: ends[name] for name in plan.names}
    if plan.holds:
        held = _from_origin(plan, held, origins, 1)
        after = _next_held(plan, sequence, offset + time, ends, held)
    return y, Carried(carried.position + time, ends, after)


def refusal(machine: ModuleType, plan: Plan, dtype: jnp.dtype, *widths: int) -> str | None:
    """Says why the kernels do not take a call, or None if they do.

    Args:
      machine: As for `remember`.
      plan: What to compute.
      dtype: Of the tokens.
      *widths: Features of keys and of values.

    Returns:
      One sentence, or None.
    """
    reason = launch_refusal()
    if reason is not None:
        return reason
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"the kernels take bfloat16 and float32, got {dtype}"
    if plan.chunk not in (16, 32, 64, 128):
        return f"the kernels take chunks of 16, 32, 64 or 128 tokens, got {plan.chunk}"
    if any(width not in (16, 32, 64, 128) for width in widths):
        got = " and ".join(map(str, widths))
        return f"the kernels take heads of 16, 32, 64 or 128 features, got {got}"
    if plan.hidden % 8:
        return f"the kernels take MLPs with a multiple of 8 hidden units, got {plan.hidden}"
    if not machine.fits(plan, dtype, max(widths)):
        count = len(plan.names) // (2 if plan.hidden else 1)
        memories = f"{count} {'memories' if count > 1 else 'memory'}"
        memories += f" with {plan.hidden} hidden units" if plan.hidden else ""
        memories += " with momentum" if plan.momentum else ""
        return (
            f"on-chip memory does not hold chunks of {plan.chunk} tokens with {max(widths)} "
            f"features of {memories} in {dtype}"
        )
    return None


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(machine, plan, sequence):
    y, ends, held, _ = _forward(machine, plan, sequence, keep=False)
    return y, ends, held


def _scan_forward(machine, plan, sequence):
    learned = _forward(machine, plan, sequence, keep=True)
    y, ends, held, starts = jax.tree.map(lambda a: checkpoint_name(a, READ), learned)
    return (y, ends, held), (sequence, starts)


def _scan_backward(machine, plan, residuals, cotangents):
    sequence, starts = residuals
    dtokens, dstates, dheld, dorigins, dbias = machine.backward(
        plan, _rounded(plan, sequence), starts, *cotangents, launch=_launch(machine)
    )
    dorigins, dbias = jax.tree.map(lambda array: jnp.sum(array, 0), (dorigins, dbias))
    return (Sequence(dtokens, None, None, None, None, dstates, dheld, dorigins, dbias),)


_scan.defvjp(_scan_forward, _scan_backward)


def _forward(machine, plan, sequence, keep):
    return machine.forward(plan, _rounded(plan, sequence), keep=keep, launch=_launch(machine))


def _launch(machine):
    return machine.Launch(interpret=platform() != machine.PLATFORM)


def _rounded(plan, sequence):
    origins = jax.tree.map(lambda array: array.astype(plan.operand), sequence.origins)
    return sequence._replace(origins=origins)


def _fresh(plan, origins, batch):
    """Memories that have read nothing."""
    states = {
        name: jnp.broadcast_to(origins[name], (batch, *origins[name].shape)) for name in plan.names
    }
    learning = plan.names if plan.momentum else ()
    momenta = {momentum_of(name): jnp.zeros_like(states[name]) for name in learning}
    return Carried(jnp.zeros((), jnp.int32), states | momenta, states)


def _from_origin(plan, states, origins, sign):
    """States as distances to their origins (-1) and back (1); as they are without an anchor."""
    if not plan.anchor:
        return states
    return {
        name: state + sign * origins[name] if name in origins else state
        for name, state in states.items()
    }


def _next_held(plan, sequence, time, ends, held):
    """What the token after the last one, which is number `time` on the grid, projects with."""
    after = {}
    for name, kept in held.items():
        if plan.segmented:
            began = sequence.last[:, sequence.live[1]]
            if sequence.early is not None and plan.chunks_of(name) > 1:
                began += sequence.early[:, sequence.live[1]]
            kept = jnp.where(began[:, None, None, None] > 0, sequence.origins[name], kept)
        ended = time % (plan.chunk * plan.chunks_of(name)) == 0
        after[name] = jnp.where(ended, ends[name], kept)
    return after


def _pad(array, offset, time):
    if array.shape[1] == time:
        return array
    room = jnp.zeros((array.shape[0], time, *array.shape[2:]), array.dtype)
    return jax.lax.dynamic_update_slice_in_dim(room, array, offset, 1)


def _segments(plan, count, offset, batch, time, starts):
    """Numbers the documents of each chunk; see `Sequence`."""
    index = jnp.arange(count * plan.chunk)
    live = ((index >= offset) & (index < offset + time)).reshape(count, plan.chunk)
    if starts is None:
        starts = jnp.zeros((batch, time), bool)
    starts = _pad(starts, offset, count * plan.chunk).reshape(batch, count, plan.chunk)
    number = jnp.where(live, jnp.cumsum(starts, -1, dtype=jnp.int32), -1)
    early = None
    if plan.group > 1:
        begun = jnp.sum(starts, -1, dtype=jnp.int32)
        begun = jnp.pad(begun, ((0, 0), (0, -count % plan.group))).reshape(batch, -1, plan.group)
        early = (jnp.cumsum(begun, -1) - begun).reshape(batch, -1)[:, :count]
    return number.reshape(batch, -1), jnp.max(number, -1), early

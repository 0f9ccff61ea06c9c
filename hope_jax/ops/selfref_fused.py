"""Lays `self_referential` on the fused kernels: what they take, what they refuse, and why."""

import jax.numpy as jnp

from hope_jax.ops.fused import Carried, refusal, remember
from hope_jax.ops.pallas.chunk import GATE_ROWS, Plan, hidden_of, momentum_of

GATES = ("eta", "alpha")


def run(machine, x, views, biases, initial, memory, starts, setting):
    """Computes the op with the kernels of a machine; other arguments as for the other forms.

    Returns:
      What was read, and the position, state, momentum and held matrices left behind.
    """
    plan = plan_of(x, views, setting, _hidden(initial))
    tokens = {"x": x} if plan.gates or len(plan.memories) > 1 else {}
    given = {"k": views.key, "v": views.value, "q": views.query}
    tokens |= {name: array.astype(x.dtype) for name, array in given.items() if array is not None}
    gates = {"eta": views.write, "alpha": views.retain, "beta": views.momentum}
    tokens |= {name: a.astype(jnp.float32) for name, a in gates.items() if a is not None}
    bias = None
    if plan.gates:
        bias = _rows([bias[:, None, None] for bias in biases])[:, None, :, 0]
    carried, position = None, jnp.asarray(x.shape[1], jnp.int32)
    if memory is not None:
        position += memory.position
        states = _together(memory.state)
        if plan.momentum:
            momenta = _together(memory.momentum)
            states |= {momentum_of(name): momenta[name] for name in plan.names}
        carried = Carried(memory.position, states, _together(memory.held))
    y, after = remember(machine, plan, tokens, _together(initial), bias, carried, starts)
    state, held = (_apart(states, initial) for states in after[1:])
    momentum = None
    if plan.momentum:
        momenta = {name: after.states[momentum_of(name)] for name in plan.names}
        momentum = _apart(momenta, initial)
    return y.astype(x.dtype), (position, state, momentum, held)


def refuses(machine, x, views, biases, initial, memory, starts, setting):
    """Says why the kernels do not take a call, or None if they do."""
    del biases, memory, starts
    kinds = {tuple(m.shape[-2] for m in matrices[1:]) for matrices in initial.values()}
    if len(kinds) > 1:
        return "the kernels take memories of one kind and width, got linear ones and MLPs mixed"
    if setting.inner_gradient == "stop":
        return "the kernels differentiate the inner updates, got inner_gradient=stop"
    plan = plan_of(x, views, setting, _hidden(initial))
    if plan.hidden and plan.group > 1:
        return "the kernels take MLPs with one chunk size, got two"
    outer, inner = initial["memory"][0], initial["memory"][-1]
    return refusal(machine, plan, x.dtype, inner.shape[-1], outer.shape[-2])


def plan_of(x, views, setting, hidden=0):
    """What the kernels are to compute; memories that are MLPs have hidden units."""
    adaptive = {"k": views.key, "v": views.value, "q": views.query}
    gates = {"eta": views.write, "alpha": views.retain}
    narrow = x.dtype == jnp.bfloat16
    memories = (*(name for name, array in adaptive.items() if array is None), "memory")
    gates = tuple(name for name, array in gates.items() if array is None)
    alone = len(memories + gates) == 1
    return Plan(
        memories=memories,
        gates=gates,
        objective=setting.objective,
        erases="state" if setting.dgd else "nothing",
        anchor=setting.anchor,
        normalize=setting.normalize_targets,
        targets=setting.targets,
        read=setting.read,
        write_max=setting.write_max,
        chunk=setting.chunk_memory,
        segmented=False,
        holds=False,
        operand=jnp.dtype(jnp.bfloat16 if narrow else jnp.float32),
        group=1 if alone else setting.chunk_projections // setting.chunk_memory,
        momentum=views.momentum is not None,
        hidden=hidden,
        repeats=setting.repeats,
    )


def _hidden(initial):
    """The hidden units of memories, 0 of linear ones."""
    return initial["memory"][1].shape[-2] if len(initial["memory"]) == 2 else 0


def _together(matrices):
    """Matrices by their names in the kernels: gates have rows up to a tile.

    Those of linear memories share one matrix.
    """
    joined = {n: m[0].astype(jnp.float32) for n, m in matrices.items() if n not in GATES}
    if _hidden(matrices):
        joined |= {n: _rows([m[0]]) for n, m in matrices.items() if n in GATES}
        return joined | {hidden_of(n): m[1].astype(jnp.float32) for n, m in matrices.items()}
    if len(joined) == len(matrices):
        return joined
    width = joined["memory"].shape[-1]
    shape = (*joined["memory"].shape[:-2], 1, width)
    rows = [matrices[n][0] if n in matrices else jnp.zeros(shape) for n in GATES]
    return joined | {"gates": _rows(rows)}


def _apart(states, like):
    if _hidden(like):
        outer = {n: states[n][..., :1, :] if n in GATES else states[n] for n in like}
        return {name: (outer[name], states[hidden_of(name)]) for name in like}
    parts = {name: (states[name],) for name in like if name not in GATES}
    for row, name in enumerate(GATES):
        if name in like:
            parts[name] = (states["gates"][..., row : row + 1, :],)
    return {name: parts[name] for name in like}


def _rows(rows):
    """Stacks the rows of eta and alpha, with zeros up to a tile."""
    stacked = jnp.concatenate([row.astype(jnp.float32) for row in rows], -2)
    padding = [(0, 0)] * stacked.ndim
    padding[-2] = (0, GATE_ROWS - len(rows))
    return jnp.pad(stacked, padding)

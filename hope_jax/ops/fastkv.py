"""FastKV: a matrix memory per head that learns `key -> value` by a fixed rule while it is read."""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hope_jax.ops.dispatch import Form, pick
from hope_jax.ops.fused import Carried, refusal, remember
from hope_jax.ops.pallas import gpu, tpu
from hope_jax.ops.pallas.chunk import Plan
from hope_jax.ops.recurrence import Path, advance, factor, follow, read, read_transposed
from hope_jax.ops.rules import RULES

FEATURE_MAPS = {
    "identity": lambda x: x,
    "elu": lambda x: jax.nn.elu(x) + 1,
    "relu": jax.nn.relu,
    "softmax": jax.nn.softmax,
}
"""What keys and queries may go through (phi in the paper); `elu` is elu(x) + 1."""


class FastKVMemory(NamedTuple):
    """What the tokens so far left behind, in float32.

    Attributes:
      state: M, from keys to values.
      normalizer: z, the weight of all keys held; None without a normalizer.
    """

    state: Float[Array, "B H V K"]
    normalizer: Float[Array, "B H K"] | None


def fast_kv(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    retain: Float[Array, "B T H"],
    write: Float[Array, "B T H"],
    memory: FastKVMemory | None = None,
    starts: Bool[Array, "B T"] | None = None,
    *,
    rule: str = "delta",
    feature_map: str = "identity",
    normalizer: bool = False,
    chunk: int = 64,
    form: str = "auto",
) -> tuple[Float[Array, "B T H V"], FastKVMemory]:
    """Reads `q` from a memory that learns `k -> v` on the way, its own token included.

        M_t = retain_t M_{t-1} - write_t grad L(M; phi(k_t), v_t)       L as in `rules.RULES`
        y_t = M_t phi(q_t)

    and with a normalizer, which is a Hebbian memory of the constant 1,

        z_t = retain_t z_{t-1} + write_t phi(k_t),    y_t = M_t phi(q_t) / (z_t . phi(q_t) + 1e-6)

    A document start empties M and z before its token. All forms compute this function, for any T
    and any split of the sequence into calls.

    Args:
      q: Queries.
      k: Keys. The delta rules contract only if `write |phi(k)|^2 <= 2`: normalize them. Oja's does
        if `write |v|^2 <= 2 retain`.
      v: Values.
      retain: The share of the memory that survives the token (alpha in the paper), 0 to 1.
      write: The size of the step (eta in the paper).
      memory: What earlier tokens left behind; None for nothing.
      starts: True where a token is the first of its document.
      rule: A name in `rules.RULES`.
      feature_map: A name in `FEATURE_MAPS`.
      normalizer: Whether to divide by the weight of what was read. Not with "identity", for that
        weight has to be positive.
      chunk: The most tokens that a parallel form takes at once. It changes the cost alone.
      form: "reference", "chunked", "associative", or "auto" for the fastest that fits; a single
        token takes the reference, which is then the cheapest.

    Returns:
      What each token read, in the dtype of `v`, and the memory after the last token. Inside,
      everything is float32 (float64 for float64 values).

    Raises:
      ValueError: An option is unknown or out of range, or the form refuses.

    References:
      Behrouz et al., "Nested Learning: The Illusion of Deep Learning Architecture", 2025,
      eqs. 64-67.
    """
    _check(rule, feature_map, normalizer, chunk, memory)
    accumulate = jnp.promote_types(v.dtype, jnp.float32)
    dtype = v.dtype
    q, k, v, retain, write = (x.astype(accumulate) for x in (q, k, v, retain, write))
    q, k = FEATURE_MAPS[feature_map](q), FEATURE_MAPS[feature_map](k)
    if memory is None:
        memory = empty_memory(k.shape[0], k.shape[2], v.shape[3], k.shape[3], normalizer=normalizer)
    if form == "auto" and q.shape[1] == 1:
        form = "reference"

    call = q, k, v, retain, write, memory.state.astype(accumulate), starts, rule, chunk, dtype
    y, state = pick(FORMS, form, *call)(*call)
    if memory.normalizer is None:
        return y.astype(dtype), FastKVMemory(state, None)
    weight = memory.normalizer[..., None, :].astype(accumulate)
    ones = jnp.ones_like(v[..., :1])
    call = q, k, ones, retain, write, weight, starts, "hebbian", chunk, dtype
    total, weight = pick(FORMS, form, *call)(*call)
    return (y / (total + 1e-6)).astype(dtype), FastKVMemory(state, weight[..., 0, :])


def empty_memory(
    batch: int, heads: int, values: int, keys: int, *, normalizer: bool = False
) -> FastKVMemory:
    """The memory before the first token; `values` and `keys` are the widths of a head."""
    weight = jnp.zeros((batch, heads, keys), jnp.float32) if normalizer else None
    return FastKVMemory(jnp.zeros((batch, heads, values, keys), jnp.float32), weight)


def _check(rule, feature_map, normalizer, chunk, memory):
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule}")
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, got {feature_map}")
    if normalizer and feature_map == "identity":
        raise ValueError(
            "normalizer needs a feature map that is never negative (elu, relu, softmax), "
            "got identity"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if memory is not None and (memory.normalizer is not None) != normalizer:
        has = "none" if memory.normalizer is None else "one"
        raise ValueError(f"memory must hold a normalizer exactly if normalizer=True, got {has}")


def _reference(q, k, v, retain, write, state, starts, rule, chunk, dtype):  # noqa: ARG001
    """Token by token, the gradient by autodiff.

    About 8 V K FLOPs a token and head, in T sequential steps; each moves the state out and in.
    """
    objective, retains_first, _ = RULES[rule]
    gradient = jax.vmap(jax.vmap(jax.grad(objective)))
    if starts is None:
        starts = jnp.zeros(q.shape[:2], bool)

    def step(state, token):
        q, k, v, retain, write, start = token
        state = jnp.where(start[:, None, None, None], 0, state)
        kept = retain[..., None, None] * state
        slope = gradient(kept if retains_first else state, k, v)
        state = kept - write[..., None, None] * slope
        return state, jnp.einsum("BHVK,BHK->BHV", state, q)

    tokens = (jnp.moveaxis(x, 1, 0) for x in (q, k, v, retain, write, starts))
    state, y = jax.lax.scan(step, state, tuple(tokens))
    return jnp.moveaxis(y, 0, 1), state


def _chunked(*call):
    """Chunk after chunk, the tokens of one in parallel.

    A token and head cost about 4 C K + 4 C V + 4 V K FLOPs where nothing is erased; an erasing rule
    adds C^2 + 2 C K + 2 C V + 2 V K. T / C sequential steps of some ten kernels, whose C x C, C x K
    and V x K float32 arrays pass through memory.
    """
    return _in_chunks(_one_by_one, *call)


def _associative(*call):
    """All chunks in parallel, but for a tree of log2(T / C) steps.

    A chunk maps the state M at its start to `M A + B`, A and B known without M. Composing
    neighbours, (A, B) then (C, D) is (A C, B C + D), finds the state at the start of every chunk;
    then all tokens are read at once. Where nothing is erased A is a number. Keys for which the
    rule contracts keep every product of As within 1, so the tree rounds no worse than the chain.

    A token and head cost what they do in chunks; an erasing rule adds 4 K (K + V) for A and B and
    4 K^2 (K + V) / C for the tree. A, B and state of all chunks exist at once, in float32.
    """
    return _in_chunks(_in_a_tree, *call)


def _in_chunks(through, q, k, v, retain, write, state, starts, rule, chunk, dtype):  # noqa: ARG001
    """Cuts the call into chunks, factors all of them, and goes `through` them for y and state."""
    _, retains_first, erases = RULES[rule]
    time = q.shape[1]
    count = max(1, -(-time // chunk))
    padding = -time % count
    q, k, v, write = (_split(x, count, padding) for x in (q, k, v, write))
    retain = _split(retain, count, padding, fill=1)
    if starts is not None:
        starts = _split(starts[..., None], count, padding)
    keys, values, look = (v, k, read_transposed) if erases == "value" else (k, v, read)

    erase = None if erases == "nothing" else retain * write if retains_first else write
    steps = factor(keys, retain, erase, starts=starts)
    state = jnp.swapaxes(state, -1, -2) if erases == "value" else state
    y, state = through(look, steps, write[..., None] * values, q, state)
    state = jnp.swapaxes(state, -1, -2) if erases == "value" else state
    y = jnp.moveaxis(y, (0, 3), (1, 2)).reshape(y.shape[1], -1, y.shape[2], y.shape[4])
    return y[:, :time], state


def _one_by_one(look, steps, writes, q, state):
    def step(state, chunk):
        steps, writes, q = chunk
        path = follow(steps, state, writes)
        return advance(steps, path)[0], look(steps, path, q, own=True)

    state, y = jax.lax.scan(step, state, (steps, writes, q))
    return y, state


def _in_a_tree(look, steps, writes, q, state):
    decay, gain, recalls = _effects(steps, writes)

    def then(early, late):
        return _decayed(early[0], late[0]), _decayed(early[1], late[0]) + late[1]

    gain = gain.at[0].add(_decayed(state, decay[0]))
    _, ends = jax.lax.associative_scan(then, (decay, gain))
    states = jnp.concatenate([state[None], ends[:-1]])
    recalled = None
    if recalls is not None:
        inherited, own = recalls
        recalled = jnp.einsum("...VK,...CK->...CV", states, inherited) + own
    return look(steps, Path(states, writes, None, None, recalled), q, own=True), ends[-1]


def _effects(steps, writes):
    """What a chunk does to the state at its start, M -> M A + B.

    It is what the chunk does to the identity without writes, and to zero with them: both go
    through the chunk as one memory of K + V rows.

    Returns:
      A (a number where nothing is erased), B, and (P, R) such that the tokens recall M P + R for
      their own keys (None where nothing is erased).
    """
    batch, values, width = writes.shape[:-2], writes.shape[-1], steps.keys.shape[-1]
    if steps.erase is None:
        nothing = jnp.zeros((*batch, values, width), writes.dtype)
        gain, _ = advance(steps, follow(steps, nothing, writes))
        return steps.after.carry[..., -1, None, None], gain, None
    rows = jnp.eye(width + values, width, dtype=writes.dtype)
    pushes = jnp.pad(writes, [(0, 0)] * (writes.ndim - 1) + [(width, 0)])
    path = follow(steps, jnp.broadcast_to(rows, (*batch, *rows.shape)), pushes)
    ends, _ = advance(steps, path)
    inherited, own = jnp.split(path.recalled, [width], -1)  # pyrefly: ignore[bad-argument-type]
    recalls = inherited, own
    return ends[..., :width, :], ends[..., width:, :], recalls


def _decayed(state, decay):
    if decay.shape[-1] == 1:
        return decay * state
    return jnp.einsum("...VK,...KJ->...VJ", state, decay, precision="highest")


def _split(x, count, padding, fill=0):
    """Pads the time axis and cuts it into chunks, which come first: [N, B, H, C, ...]."""
    width = [(0, 0)] * x.ndim
    width[1] = (0, padding)
    x = jnp.pad(x, width, constant_values=fill)
    x = x.reshape(x.shape[0], count, -1, *x.shape[2:])
    return jnp.moveaxis(x, (1, 3), (0, 2))


def _fused(machine, q, k, v, retain, write, state, starts, rule, chunk, dtype):
    """The whole scan in one kernel launch; see `ops.pallas` for what it costs."""
    tokens = {name: x.astype(dtype) for name, x in (("q", q), ("k", k), ("v", v))}
    tokens |= {"eta": write, "alpha": retain}
    carried = Carried(None, {"memory": state}, None)
    y, carried = remember(machine, _plan(rule, chunk, dtype), tokens, None, None, carried, starts)
    return y, carried.states["memory"]


def _unfit(machine, q, k, v, retain, write, state, starts, rule, chunk, dtype):  # noqa: ARG001
    if RULES[rule].erases == "value":
        return f"the kernels take rules that erase along keys, got {rule}"
    return refusal(machine, _plan(rule, chunk, dtype), dtype, k.shape[-1], v.shape[-1])


def _plan(rule, chunk, dtype):
    return Plan(
        memories=("memory",),
        gates=(),
        objective="dot",
        erases=_erases(rule),
        anchor=False,
        normalize=False,
        targets="value",
        read="current",
        write_max=1.0,
        chunk=chunk,
        segmented=False,
        holds=False,
        operand=jnp.dtype(dtype),
    )


def _erases(rule) -> Literal["nothing", "state", "retained"]:
    if RULES[rule].erases == "nothing":
        return "nothing"
    return "retained" if RULES[rule].retains_first else "state"


FORMS = {
    "pallas_triton": Form(partial(_fused, gpu), partial(_unfit, gpu), ("gpu",)),
    "pallas_tpu": Form(partial(_fused, tpu), partial(_unfit, tpu), ("tpu",)),
    "chunked": Form(_chunked),
    "associative": Form(_associative),
    "reference": Form(_reference),
}
"""The forms of `fast_kv`, fastest first.

Each takes `(q, k, v, retain, write, state, starts, rule, chunk, dtype)`, arrays in float32 or
wider, features already mapped, `dtype` what the values came in, and returns `(y, state)`.
"""

"""FastKV: a matrix memory per head that learns `key -> value` by a fixed rule while it is read."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hope_jax.ops.dispatch import Form, pick
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
    feature_map: Literal["identity", "elu", "relu", "softmax"] = "identity",
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
        memory = empty_memory(*k.shape[::2], v.shape[3], k.shape[3], normalizer=normalizer)
    if form == "auto" and q.shape[1] == 1:
        form = "reference"

    call = q, k, v, retain, write, memory.state.astype(accumulate), starts, rule, chunk
    y, state = pick(FORMS, form, *call)(*call)
    if not normalizer:
        return y.astype(dtype), FastKVMemory(state, None)
    weight = memory.normalizer[..., None, :].astype(accumulate)
    call = q, k, jnp.ones_like(v[..., :1]), retain, write, weight, starts, "hebbian", chunk
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


def _reference(q, k, v, retain, write, state, starts, rule, chunk):  # noqa: ARG001
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
    """In chunks; what each does to the state is computed for all at once, then applied in turn.

    See `_in_chunks`. T / C steps in sequence, each a product of the state with a K x K matrix
    (2 V K^2 FLOPs, or V K where nothing is erased).
    """
    return _in_chunks(_one_by_one, *call)


def _associative(*call):
    """In chunks, whose effects are composed in a tree: log2(T / C) steps in sequence.

    See `_in_chunks`. About 4 (V + K) K^2 FLOPs a chunk for the tree (2 V K where nothing is
    erased) against 2 V K^2 in turn, and memory for twice as many states.
    """
    return _in_chunks(_as_a_tree, *call)


def _in_chunks(states_of, q, k, v, retain, write, state, starts, rule, chunk):
    """Runs a form in which the tokens of a chunk are parallel, and the chunks but for their states.

    A chunk maps the state M at its start to `M A + B`, A and B known without M. `states_of` finds
    the state at the start of every chunk from these; then all tokens are read at once.

    A token and head cost about 4 C K + 4 C V + 4 V K FLOPs where nothing is erased; an erasing rule
    adds C^2 + 2 C (V + 2 K) + 2 K (V + 2 K). All intermediates pass through memory: some ten C x C
    and three K x (V + K) float32 arrays a chunk.
    """
    _, retains_first, erases = RULES[rule]
    time = q.shape[1]
    count = max(1, -(-time // chunk))
    padding = -time % count
    q, k, v, write = (_split(x, count, padding) for x in (q, k, v, write))
    retain = _split(retain, count, padding, fill=1)
    if starts is not None:
        starts = _split(starts[..., None], count, padding)
    by_value = erases == "value"
    keys, values = (v, k) if by_value else (k, v)
    state = jnp.swapaxes(state, -1, -2) if by_value else state

    erase = None if erases == "nothing" else retain * write if retains_first else write
    steps = factor(keys, retain, erase, starts=starts)
    writes = write[..., None] * values
    decay, gain, recall = _effects(steps, writes)
    states, state = states_of(decay, gain, state)
    recalled = None if recall is None else recall(states)
    path = Path(states, writes, None, None, recalled)
    y = (read_transposed if by_value else read)(steps, path, q, own=True)
    y = jnp.moveaxis(y, (0, 3), (1, 2)).reshape(y.shape[1], -1, y.shape[2], y.shape[4])
    return y[:, :time], jnp.swapaxes(state, -1, -2) if by_value else state


def _effects(steps, writes):
    """What a chunk does to the state at its start, M -> M A + B.

    It is what the chunk does to the identity without writes, and to zero with them.

    Returns:
      A (a scalar where nothing is erased), B, and what recalls for the keys given that state (None
      where nothing is erased).
    """
    *batch, values = writes[..., 0, :].shape
    width = steps.keys.shape[-1]
    if steps.erase is None:
        nothing = jnp.zeros((*batch, values, width), writes.dtype)
        gain, _ = advance(steps, follow(steps, nothing, writes))
        return steps.after.carry[..., -1, None, None], gain, None
    probe = jnp.eye(width + values, width, dtype=writes.dtype)
    probe = jnp.broadcast_to(probe, (*batch, *probe.shape))
    pushes = jnp.pad(writes, [(0, 0)] * (writes.ndim - 1) + [(width, 0)])
    path = follow(steps, probe, pushes)
    end, _ = advance(steps, path)

    def recall(state):
        inherited = jnp.einsum("...VK,...CK->...CV", state, path.recalled[..., :width])
        return inherited + path.recalled[..., width:]

    return end[..., :width, :], end[..., width:, :], recall


def _one_by_one(decay, gain, state):
    """Returns the state at the start of every chunk, and after the last."""

    def step(state, effect):
        decay, gain = effect
        return _decayed(state, decay) + gain, state

    state, states = jax.lax.scan(step, state, (decay, gain))
    return states, state


def _as_a_tree(decay, gain, state):
    """The same as `_one_by_one`, composing neighbours: (A, B) then (C, D) is (A C, B C + D)."""

    def then(early, late):
        return _decayed(early[0], late[0]), _decayed(early[1], late[0]) + late[1]

    gain = gain.at[0].add(_decayed(state, decay[0]))
    _, states = jax.lax.associative_scan(then, (decay, gain))
    return jnp.concatenate([state[None], states[:-1]]), states[-1]


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


FORMS = {
    "chunked": Form(_chunked),
    "associative": Form(_associative),
    "reference": Form(_reference),
}
"""The forms of `fast_kv`, fastest first.

Each takes `(q, k, v, retain, write, state, starts, rule, chunk)`, arrays in one floating dtype,
features already mapped, and returns `(y, state)`.
"""

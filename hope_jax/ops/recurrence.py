"""The exact algebra of one matrix memory inside a chunk: products and one triangular solve.

A memory `M [V, K]` maps keys to values. Token t forgets, erases along its key, and writes:

    S_t = momentum_t S_{t-1} + w_t k_t^T                                 (w_t k_t^T alone without)
    M_t = A + retain_t (M_{t-1} - A) - erase_t (M_{t-1} k_t) k_t^T + S_t

`w_t` is the write vector, its step size included. `A` is the origin if the memory is anchored
and zero if it is not. A document start sets M to the origin and S to zero before its token.
A token that is not live changes neither M nor S.

Inside a chunk every M_t is a sum over what was there at the chunk's start and the rank-one
terms of its tokens, with weights that depend on the gates alone:

    M_t = carry_t M + origin_t O + momentum_t S
          + sum_{s<=t} (writes_ts w_s - erases_ts erase_s r_s) k_s^T,     r_s = M_{s-1} k_s

so `(I + L) R = what the first three terms and the writes give for K`, with
`L_ts = erases_{t-1,s} erase_s (k_t . k_s)`. The factor of that system depends on keys and gates
alone: `factor` computes it once for all memories that share them, `follow` solves for one
memory, and then `read`, `read_transposed` and `advance` are matrix products.

    steps = factor(keys, retain, erase)                     # once per chunk
    path = follow(steps, state, writes)                     # once per memory
    y = read(steps, path, queries, own=True)                # M_t q_t; own=False: M_{t-1} q_t
    state, momentum = advance(steps, path)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hope_jax.ops.triangular import unit_lower_inverse, unit_lower_solve


class Weights(NamedTuple):
    """What the state at each token consists of.

    Attributes:
      carry: The share of the chunk's first state.
      origin: The share of the origin, None if it is nowhere needed.
      momentum: The share of the chunk's first momentum, None without momentum.
      writes: The share of the write of token s (column) at token t (row).
      erases: The same for what token s erased; the same array without momentum.
    """

    carry: Float[Array, "*batch C"]
    origin: Float[Array, "*batch C"] | None
    momentum: Float[Array, "*batch C"] | None
    writes: Float[Array, "*batch C C"]
    erases: Float[Array, "*batch C C"]


class Factor(NamedTuple):
    """What the keys and gates of a chunk do to any memory that has them.

    Attributes:
      keys: The keys.
      erase: The erase gate, None if nothing is erased; then nothing has to be solved either.
      before: Weights of M_{t-1} as token t finds it, so after a document start at t.
      after: Weights of M_t.
      lower: L above, None if nothing is erased.
      inverse: (I + L)^-1, None if nothing is erased.
      momentum_carry: The share of the first momentum in the last, None without momentum.
      momentum_writes: The share of each write in the last momentum, None without momentum.
    """

    keys: Float[Array, "*batch C K"]
    erase: Float[Array, "*batch C"] | None
    before: Weights
    after: Weights
    lower: Float[Array, "*batch C C"] | None
    inverse: Float[Array, "*batch C C"] | None
    momentum_carry: Float[Array, "*batch"] | None
    momentum_writes: Float[Array, "*batch C"] | None


class Path(NamedTuple):
    """The way of one memory through a chunk.

    Attributes:
      state: M at the chunk's start.
      writes: The write vectors w, step size included.
      momentum: S at the chunk's start, None without momentum.
      origin: The origin O; None stands for zero.
      recalled: R, row t is M_{t-1} k_t; None if nothing is erased.
    """

    state: Float[Array, "*batch V K"]
    writes: Float[Array, "*batch C V"]
    momentum: Float[Array, "*batch V K"] | None
    origin: Float[Array, "*#batch V K"] | None
    recalled: Float[Array, "*batch C V"] | None


@jax.custom_vjp
def decays(gate: Float[Array, "*batch C"]) -> Float[Array, "*batch C C"]:
    """Multiplies up what passes from token s to token t.

        G[t, s] = gate_{s+1} ... gate_t  for s <= t,  0 above the diagonal

    Products inside the triangle, no quotients and no logarithms, so that values and gradients
    are exact for gates of exactly 0 and 1: `d gate_j = sum_s (G^T dG)[j, s] G[j-1, s]`.

    Args:
      gate: What survives each token.

    Returns:
      G.
    """
    size = gate.shape[-1]
    passed = jnp.tril(jnp.ones((size, size), bool), -1)
    factors = jnp.where(passed, gate[..., :, None], jnp.ones((), gate.dtype))
    return jnp.tril(jax.lax.cumprod(factors, axis=factors.ndim - 2))


def _decays_forward(gate):
    products = decays(gate)
    return products, products


def _decays_backward(products, cotangent):
    later = jnp.einsum("...CJ,...CD->...JD", products, cotangent, precision="highest")
    return (jnp.sum(later * _previous(products), -1),)


decays.defvjp(_decays_forward, _decays_backward)


def factor(
    keys: Float[Array, "*batch C K"],
    retain: Float[Array, "*batch C"],
    erase: Float[Array, "*batch C"] | None,
    momentum: Float[Array, "*batch C"] | None = None,
    starts: Bool[Array, "*#batch C"] | None = None,
    live: Bool[Array, "*#batch C"] | None = None,
    *,
    anchor: bool = False,
) -> Factor:
    """Turns the keys and gates of a chunk into the weights and the solve that memories share.

    Args:
      keys: The keys k.
      retain: What survives each token.
      erase: The step in front of `M_{t-1} k k^T`; None erases nothing.
      momentum: What survives of the momentum; None for memories that have none.
      starts: True where a document starts. Broadcasts against the gates.
      live: False for padding: tokens that neither forget, erase nor write, whatever their
        gates say, so that calls may begin and end inside a chunk.
      anchor: Whether the distance to the origin decays, instead of the state.

    Returns:
      The factor, for `follow`, `read`, `read_transposed` and `advance`.
    """
    retain, erase, momentum = _silence(retain, erase, momentum, live)
    kept = decays(retain)
    first = jnp.arange(retain.shape[-1]) == 0
    same = opening = None
    if starts is not None:
        segment = jnp.cumsum(starts, -1)
        first = first | starts
        same = segment[..., :, None] == segment[..., None, :]
        opening = segment == 0
        kept = _zero(kept, same)

    columns = None if live is None else live[..., None, :]
    since = jnp.sum(kept * jnp.where(first, retain, 0)[..., None, :], -1)
    kept = _zero(kept, columns)
    writes, swept, momentum_carry, momentum_writes = kept, None, None, None
    if momentum is not None:
        lasting = _zero(decays(momentum), same)
        carried = _zero(momentum[..., :1] * lasting[..., :, 0], opening)
        lasting = _zero(lasting, columns)
        momentum_carry, momentum_writes = carried[..., -1], lasting[..., -1, :]
        swept = jnp.sum(kept * carried[..., None, :], -1)
        writes = jnp.einsum("...CS,...SD->...CD", kept, lasting, precision="highest")

    after = _weights(since, swept, writes, kept, opening, anchor)
    writes_before = _zero(_previous(writes), same)
    before = _weights(
        jnp.where(first, 1, _shift(since)),
        None if swept is None else _shift(swept),
        writes_before,
        writes_before if momentum is None else _zero(_previous(kept), same),
        opening,
        anchor,
    )
    lower = inverse = None
    if erase is not None:
        overlap = jnp.einsum("...CK,...SK->...CS", keys, keys)
        lower = before.erases * overlap * erase[..., None, :]
        inverse = jax.lax.stop_gradient(unit_lower_inverse(lower))
    return Factor(keys, erase, before, after, lower, inverse, momentum_carry, momentum_writes)


def follow(
    steps: Factor,
    state: Float[Array, "*batch V K"],
    writes: Float[Array, "*batch C V"],
    momentum: Float[Array, "*batch V K"] | None = None,
    origin: Float[Array, "*#batch V K"] | None = None,
) -> Path:
    """Solves for what each token finds under its key, which is what it erases.

    Args:
      steps: The factor of the chunk's keys and gates.
      state: M at the chunk's start.
      writes: The write vectors, step size included: `(1 - momentum) write u` or `write u`.
      momentum: S at the chunk's start; given exactly if the factor has momentum.
      origin: Where document starts and the anchor lead to; None stands for zero.

    Returns:
      The path, for `read`, `read_transposed` and `advance`.

    Raises:
      ValueError: The factor has momentum and the memory has none, or the reverse.
    """
    if (momentum is None) != (steps.momentum_carry is None):
        has = "none" if momentum is None else "one"
        raise ValueError(f"momentum must be given exactly if the factor has one, got {has}")
    path = Path(state, writes, momentum, origin, None)
    if steps.erase is None:
        return path
    overlap = jnp.einsum("...CK,...SK->...CS", steps.keys, steps.keys)
    found = _inherited(steps.before, path, steps.keys, "...VK,...CK->...CV")
    found = found + jnp.einsum("...CS,...SV->...CV", steps.before.writes * overlap, writes)
    return path._replace(recalled=unit_lower_solve(steps.lower, steps.inverse, found))


def read(
    steps: Factor, path: Path, queries: Float[Array, "*batch C K"], *, own: bool
) -> Float[Array, "*batch C V"]:
    """Reads `M q` for every token's query.

    Args:
      steps: The factor.
      path: The memory's way through the chunk.
      queries: One query per token.
      own: True reads M_t, which has the token's own write; False reads M_{t-1}.

    Returns:
      What each token recalls.
    """
    weights = steps.after if own else steps.before
    overlap = jnp.einsum("...CK,...SK->...CS", queries, steps.keys)
    y = _inherited(weights, path, queries, "...VK,...CK->...CV")
    for share, vectors in _terms(steps, path, weights):
        y = y + jnp.einsum("...CS,...SV->...CV", share * overlap, vectors)
    return y


def read_transposed(
    steps: Factor, path: Path, queries: Float[Array, "*batch C V"], *, own: bool
) -> Float[Array, "*batch C K"]:
    """Reads `M^T q` for every token's query: the same memory from the side of its values.

    Args:
      steps: The factor.
      path: The memory's way through the chunk.
      queries: One query per token, of the values' width.
      own: True reads M_t, which has the token's own write; False reads M_{t-1}.

    Returns:
      What each token recalls.
    """
    weights = steps.after if own else steps.before
    y = _inherited(weights, path, queries, "...VK,...CV->...CK")
    for share, vectors in _terms(steps, path, weights):
        overlap = jnp.einsum("...CV,...SV->...CS", queries, vectors)
        y = y + jnp.einsum("...CS,...SK->...CK", share * overlap, steps.keys)
    return y


def advance(
    steps: Factor, path: Path
) -> tuple[Float[Array, "*batch V K"], Float[Array, "*batch V K"] | None]:
    """Returns the state and the momentum (None without) after the chunk's last token."""
    after = steps.after
    state = after.carry[..., -1, None, None] * path.state
    if after.origin is not None and path.origin is not None:
        state = state + after.origin[..., -1, None, None] * path.origin
    if after.momentum is not None and path.momentum is not None:
        state = state + after.momentum[..., -1, None, None] * path.momentum
    for share, vectors in _terms(steps, path, after):
        state = state + _outer(share[..., -1, :], vectors, steps.keys)
    if path.momentum is None or steps.momentum_carry is None:
        return state, None
    momentum = steps.momentum_carry[..., None, None] * path.momentum
    return state, momentum + _outer(steps.momentum_writes, path.writes, steps.keys)


def _weights(since, swept, writes, erases, opening, anchor):
    """Splits the decay since a segment began by whose decay it is: the state's or the origin's."""
    carry, origin = _zero(since, opening), None
    if anchor:
        origin = 1 - carry
    elif opening is not None:
        origin = _zero(since, ~opening)
    swept = None if swept is None else _zero(swept, opening)
    return Weights(carry, origin, swept, writes, erases)


def _inherited(weights, path, queries, equation):
    """Reads what a token still has of the chunk's first state, of the origin and momentum."""
    y = weights.carry[..., None] * jnp.einsum(equation, path.state, queries)
    if weights.origin is not None and path.origin is not None:
        y = y + weights.origin[..., None] * jnp.einsum(equation, path.origin, queries)
    if weights.momentum is not None:
        y = y + weights.momentum[..., None] * jnp.einsum(equation, path.momentum, queries)
    return y


def _terms(steps, path, weights):
    """Pairs each kind of share with the vectors that tokens put in front of their keys."""
    if steps.erase is None:
        return [(weights.writes, path.writes)]
    erased = steps.erase[..., None] * path.recalled
    if weights.momentum is None:
        return [(weights.writes, path.writes - erased)]
    return [(weights.writes, path.writes), (weights.erases, -erased)]


def _outer(shares, vectors, keys):
    return jnp.einsum("...CV,...CK->...VK", shares[..., None] * vectors, keys)


def _silence(retain, erase, momentum, live):
    """Opens what keeps and closes what changes at tokens that are not live."""
    if live is None:
        return retain, erase, momentum
    retain = jnp.where(live, retain, 1)
    erase = None if erase is None else jnp.where(live, erase, 0)
    return retain, erase, None if momentum is None else jnp.where(live, momentum, 1)


def _zero(values, mask):
    """Keeps values where the mask, if there is one, is True."""
    return values if mask is None else jnp.where(mask, values, 0)


def _previous(matrix):
    """Moves rows one token later: what held after t-1 is what token t finds."""
    return jnp.pad(matrix[..., :-1, :], [(0, 0)] * (matrix.ndim - 2) + [(1, 0), (0, 0)])


def _shift(vector):
    return jnp.pad(vector[..., :-1], [(0, 0)] * (vector.ndim - 1) + [(1, 0)])

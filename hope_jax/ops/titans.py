"""Titans' neural memory: a linear map or an MLP that learns `key -> value` while it is read."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hope_jax.ops.selfref import SelfReferentialMemory, Setting, Views, learn_and_read


class TitansMemory(NamedTuple):
    """What the memory knows after some tokens.

    Attributes:
      position: How many tokens were read. It says where in their chunk the next one stands.
      state: The matrices, `[B, H, out, in]`.
      momentum: Their momenta: the surprise that is not yet forgotten.
      held: The matrices that the next token's surprise is measured at: the state at the start of
        its chunk, or the initial one if a document started since.
    """

    position: Int[Array, ""]
    state: tuple[Array, ...]
    momentum: tuple[Array, ...]
    held: tuple[Array, ...]


def titans(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    retain: Float[Array, "B T H"],
    write: Float[Array, "B T H"],
    momentum: Float[Array, "B T H"],
    initial: tuple[Array, ...],
    memory: TitansMemory | None = None,
    starts: Bool[Array, "B T"] | None = None,
    *,
    chunk: int,
    form: str = "auto",
) -> tuple[Float[Array, "B T H V"], TitansMemory]:
    """Reads `q` from a memory that is trained on `k -> v` by gradient descent with momentum.

        S_t = momentum_t S_{t-1} - (1 - momentum_t) step_t grad L(Mbar; k_t, v_t)
        M_t = M_0 + retain_t (M_{t-1} - M_0) + S_t,     L = 1/2 |M(k_t) - v_t|^2
        y_t = M_t(q_t)

    with Mbar the state at the start of the token's chunk, which is what makes a chunk parallel.
    One matrix is a linear memory, two are the MLP `M(x) = x + W1 silu(W2 x)`. The token's own
    write is read, as in the paper: its surprise is measured before, its answer given after.

    Three things are ours, for without them the state runs away or dies:
      - the damping `(1 - momentum)`;
      - the step of a layer, `write / (1 + chunk write |its input|^2)`. A key that repeats in a
        chunk is corrected by the same surprise up to `chunk` times over, and this keeps the sum
        of the corrections below one;
      - what decays is the distance to the initial state. An MLP whose layers have both decayed to
        zero has no gradient and never learns again. (Start at zero, and it is the paper's decay.)

    Args:
      q: Queries, of unit length.
      k: Keys, of unit length.
      v: Values; as wide as the keys for an MLP.
      retain: The share of the memory that survives the token (1 - alpha in the paper).
      write: The size of the gradient step (theta in the paper).
      momentum: The share of the past surprise that survives the token (eta in the paper).
      initial: The state before the first token, `(W,)` with W `[H, V, K]`, or `(W1, W2)` with W1
        `[H, V, F]` and W2 `[H, F, K]`.
      memory: What earlier tokens left behind; None for the initial state. A call may begin and end
        anywhere inside a chunk.
      starts: True where a document starts: the memory is the initial one before that token.
      chunk: Tokens for which the surprise is measured at one state; a part of what is computed.
      form: "auto" or one of `hope_jax.ops.selfref.FORMS`.

    Returns:
      What each token read, in the type of `v`, and the memory after the last token. Inside, all is
      float32 at least.

    Raises:
      ValueError: The chunk or the shape of a matrix does not fit.

    References:
      Behrouz et al., "Titans: Learning to Memorize at Test Time", 2025, eqs. 8-15.
    """
    _check(k, v, initial, chunk)
    accumulate = jnp.promote_types(v.dtype, jnp.float32)
    q, k, write = (array.astype(accumulate) for array in (q, k, write))
    if len(initial) == 1:
        write = write / (1 + chunk * write * jnp.sum(k**2, -1))
    views = Views(k, v, q, write, retain, momentum)
    setting = Setting(
        objective="l2",
        dgd=False,
        anchor=True,
        normalize_targets=False,
        targets="value",
        read="current",
        inner_gradient="full",
        chunk_memory=chunk,
        chunk_projections=chunk,
        write_max=1.0,
        repeats=chunk,
    )
    carried = None
    if memory is not None:
        position, *parts = memory
        carried = SelfReferentialMemory(position, *({"memory": part} for part in parts))
    nothing = jnp.zeros(k.shape[2], accumulate)
    given = views, (nothing, nothing), {"memory": initial}, carried, starts, setting
    y, after = learn_and_read(q.astype(v.dtype), *given, form)
    parts = [matrices["memory"] for matrices in after[1:] if matrices is not None]
    return y.astype(v.dtype), TitansMemory(after.position, *parts)


def fresh_memory(initial: tuple[Array, ...], batch: int) -> TitansMemory:
    """The memory before the first token."""
    state = tuple(jnp.broadcast_to(matrix, (batch, *matrix.shape)) for matrix in initial)
    momentum = tuple(jnp.zeros_like(matrix) for matrix in state)
    return TitansMemory(jnp.zeros((), jnp.int32), state, momentum, state)


def _check(k, v, initial, chunk):
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    heads, keys, values = k.shape[2], k.shape[3], v.shape[3]
    shapes = [matrix.shape for matrix in initial]
    linear = shapes == [(heads, values, keys)]
    deep = len(shapes) == 2 and keys == values
    deep = deep and shapes == [(heads, values, shapes[1][1]), (heads, shapes[1][1], keys)]
    if not linear and not deep:
        raise ValueError(
            "initial must be one matrix [H, V, K], or [H, V, F] and [H, F, K] with V = K, for "
            f"H={heads}, K={keys}, V={values}, got {shapes}"
        )

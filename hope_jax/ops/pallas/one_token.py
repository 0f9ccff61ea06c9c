"""One token on a GPU, through Triton: memories learn it where they lie, each read and written once.

A program has one head of one row. It reads what that token projects with and the matrices that
learn, and writes these; what later tokens project with it writes only where a chunk ends. For a
head of three memories of 64 x 64 that is 98 kB read and 49 kB written, beside initial states that
the second cache holds, for 0.1 MFLOPs: 64 rows of 16 heads take an H100 (3.35 TB/s) at least 45 us,
and 75 us with momentum, which is another 49 kB read and written.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from hope_jax.ops.pallas.chunk import Plan, momentum_of

NUMBERS = 1024
"""How many numbers of a matrix each warp has."""

WIDEST = 128
"""Features of keys or values with which a program's matrices fit its registers."""

GATES = ("eta", "alpha")

Matrices = dict[str, Array]


class Token(NamedTuple):
    """What a token brings; None where a memory has to say it.

    Attributes:
      x: What memories read.
      key: Its unit key.
      value: Its value.
      query: Its unit query.
      write: Its write gate.
      retain: Its retention.
      momentum: What survives of the momentum; None without.
      starts: Not zero where a document begins; None where none does.
    """

    x: Float[Array, "B H K"]
    key: Float[Array, "B H K"] | None
    value: Float[Array, "B H V"] | None
    query: Float[Array, "B H K"] | None
    write: Float[Array, "B H"] | None
    retain: Float[Array, "B H"] | None
    momentum: Float[Array, "B H"] | None
    starts: Int[Array, " B"] | None


def refusal(keys: int, values: int) -> str | None:
    """Says why the kernel does not take keys and values of so many features, or None."""
    if any(width & (width - 1) or width > WIDEST for width in (keys, values)):
        return f"the kernel takes powers of 2 up to {WIDEST} features, got {keys} and {values}"
    return None


def step(
    plan: Plan,
    state: Matrices,
    held: Matrices,
    position: Int[Array, ""],
    token: Token,
    initial: Matrices,
    biases: tuple[Float[Array, " H"], Float[Array, " H"]],
    *,
    interpret: bool,
) -> tuple[Matrices, Matrices, Float[Array, "B H V"]]:
    """Reads one token of each row.

    Args:
      plan: What to compute. Memories and gates have a matrix each, of one row for a gate.
      state: The matrices that learn, `[B, H, V, K]`, and their momenta.
      held: The matrices that the token projects with.
      position: How many tokens were read.
      token: What it brings.
      initial: The initial matrices, `[H, V, K]`.
      biases: Of the write and the retention gate, where memories make these.
      interpret: Whether to interpret the kernel instead of compiling it.

    Returns:
      The matrices after the token, those that the next one projects with, and what was read.
    """
    *rows, values, keys = state["memory"].shape
    like = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), (state, held))
    y = jax.ShapeDtypeStruct((*rows, values), token.x.dtype)
    warps = min(16, max(1, values * keys // NUMBERS))
    run = pl.pallas_call(
        partial(_kernel, plan),
        out_shape=(*like, y),
        grid=tuple(rows),
        input_output_aliases={i: i for i in range(len(jax.tree.leaves(like)))},
        interpret=interpret,
        name="memory_token",
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
    )
    return run(state, held, position[None], token, initial, biases)


def _kernel(plan, state, held, position, token, initial, biases, after, next_held, y):
    row, head = pl.program_id(0), pl.program_id(1)
    start = None if token.starts is None else token.starts[row] != 0
    x, key, value, query, write, retain, momentum = (
        None if ref is None else ref[row, head] for ref in token[:-1]
    )

    def present(matrices, name):
        matrix = matrices[name][row, head]
        return matrix if start is None else jnp.where(start, initial[name][head], matrix)

    known = {name: present(held, name) for name in held}
    recall = lambda name, x: _product(known[name], x)  # noqa: E731
    key = _unit(recall("k", x)) if key is None else key
    value = recall("v", x) if value is None else value
    query = _unit(recall("q", x)) if query is None else query
    if write is None:
        write = plan.write_max * jax.nn.sigmoid(jnp.sum(recall("eta", x)) + biases[0][head])
    if retain is None:
        retain = jax.nn.sigmoid(jnp.sum(recall("alpha", x)) + biases[1][head])

    for name in held:
        error = recall(name, value) if plan.targets == "self" else value
        if plan.normalize:
            error = error / jnp.sqrt(1 + error**2) if name in GATES else _unit(error)
        if plan.objective == "l2":
            error -= recall(name, key)
        matrix, kept = present(state, name), None
        if momentum is not None:
            swung = state[momentum_of(name)][row, head]
            swung = swung if start is None else jnp.where(start, 0, swung)
            kept = momentum * swung + ((1 - momentum) * write * error)[:, None] * key[None]
            after[momentum_of(name)][row, head] = kept
            error = jnp.zeros_like(error)
        if plan.erases == "state":
            error -= _product(matrix, key)
        origin = initial[name][head] if plan.anchor else 0
        learned = origin + retain * (matrix - origin) + (write * error)[:, None] * key[None]
        learned = learned if kept is None else learned + kept
        after[name][row, head] = learned
        if name == "memory":
            seen = {"token": matrix, "current": learned, "chunk": known[name]}[plan.read]
            y[row, head] = _product(seen, query)
        ends = (position[0] + 1) % (plan.chunk * plan.chunks_of(name)) == 0
        _hold(ends, start, next_held[name].at[row, head], learned, known[name])


def _hold(ends, start, ref, learned, known):
    """Writes what later tokens project with where it changes."""

    @pl.when(ends)
    def _():
        ref[...] = learned

    if start is not None:

        @pl.when(start & ~ends)
        def _():
            ref[...] = known


def _product(matrix, x):
    return jnp.sum(matrix * x[None], axis=1)


def _unit(x):
    return x / jnp.sqrt(jnp.sum(x**2) + 1e-6)

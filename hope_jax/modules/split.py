"""Runs memories on a mesh: each device with rows, heads and, if need be, tokens of its own."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from hope_jax.shapes import Starts
from hope_jax.sharding import RULES, constrain, pieces, spec

Tree = Any  # a pytree of arrays
Op = Callable[[Tree, Tree, Tree, Starts | None], tuple[Array, Tree]]
HEADS = "heads_of_all_time"


def on_mesh(
    op: Op,
    tokens: Tree,
    initial: Tree,
    memory: Tree,
    starts: Starts | None,
    *,
    fresh: Callable[[Tree, int], Tree],
    decay: Callable[[Tree], Float[Array, "B T H"]] | None = None,
) -> tuple[Array, Tree]:
    """Calls `op` with each device's share; without a mesh of several devices, just calls it.

    Rows are shared over `data` and `fsdp`, heads over `tensor`: nothing is sent, and kernels run.
    With a `sequence` axis of S devices, which hold T / S tokens each, memories still meet all
    tokens in order. Exactly, by the first of these that fits:

      - `decay` is given and S divides T: two passes over a device's own tokens, the first only
        for what they leave behind. Of that, S states per head are gathered, and a scan over them
        finds what each device's tokens begin with. About 1.5 times the work.
      - S divides the heads: tokens and heads change places (an all-to-all of what goes in and of
        what comes out, (S - 1) / S^2 of it from each device), so that a device has some heads and
        all tokens. No work is added.
      - S divides T: heads pass through the devices one behind the other, (H + S - 1) / H times
        the work, and each hands on its state: H + S - 2 sends of one head's.
      - Otherwise, as for single tokens of few heads, all S devices do the same.

    Args:
      op: From tokens, initial states, memory and starts to outputs `[B, T, H, V]` and memory.
        Reading in pieces must be the same as reading at once.
      tokens: Arrays `[B, T, H, ...]`.
      initial: Arrays `[H, ...]`.
      memory: Arrays `[B, H, ...]` and scalars; None for no token before.
      starts: Document starts.
      fresh: Of `initial` and the rows: the memory that None means.
      decay: Of the tokens: the share of the memory that survives each, for a memory to which
        tokens add what does not depend on it. None for others.

    Returns:
      What the tokens read, and the memory after the last.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return op(tokens, initial, memory, starts)
    batch, time, heads = jax.tree.leaves(tokens)[0].shape[:3]
    through = partial(_whole, op)
    # Where they come from: the split of a projection into its parts is not to be moved as well.
    tokens = jax.tree.map(lambda x: constrain(x, _named(("batch", "time", "heads"), x)), tokens)
    names: tuple[str | None, str] = None, HEADS
    length = pieces("time", mesh)
    if length > 1 and time % length == 0 and time >= length:
        if decay is not None:
            through, names = partial(_scanned, op, fresh, decay), ("time", "heads")
        elif heads % pieces(HEADS, mesh):
            through, names = partial(_piped, op, fresh), ("time", "heads")
    when, who = names

    def lay(axes: tuple[str | None, ...], tree: Tree) -> Tree:
        return jax.tree.map(lambda x: spec(_named(axes, x), x.shape, mesh), tree)

    kept = lay(("batch", who), jax.eval_shape(lambda initial: fresh(initial, batch), initial))
    into = (
        lay(("batch", when, who), tokens),
        lay((who,), initial),
        lay(("batch", who), memory),
        lay(("batch", when), starts),
    )
    shape = batch, time, heads, 1
    out = spec(("batch", when, who, None), shape, mesh), kept
    run = jax.shard_map(through, in_specs=into, out_specs=out, check_vma=False)
    y, memory = run(tokens, initial, memory, starts)
    return constrain(y, ("batch", "time", "heads", None)), memory


def for_attention(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Lays `[B, T, H, K]` out for attention on a mesh with a `sequence` axis of S devices.

    Where S divides the heads of keys, tokens and heads change places as in `on_mesh`. Otherwise
    queries stay where they are and every device gathers the keys and values of all tokens.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or pieces("time", mesh) == 1:
        return q, k, v
    if k.shape[2] % pieces(HEADS, mesh) == 0:
        names = ("batch", None, HEADS, None)
        return constrain(q, names), constrain(k, names), constrain(v, names)
    whole = ("batch", None, "heads", None)
    return constrain(q, ("batch", "time", "heads", None)), constrain(k, whole), constrain(v, whole)


def with_halo(
    op: Callable[[Array, Array, Array | None, Starts | None], tuple[list[Array], Array]],
    x: Float[Array, "B T N E"],
    weight: Float[Array, "window P E"],
    memory: Float[Array, "B past P E"] | None,
    starts: Starts | None,
) -> tuple[list[Float[Array, "B T E"]], Float[Array, "B past P E"]]:
    """Calls a convolution whose memory are its last inputs, each device with tokens of its own.

    Where tokens of a row are split over devices, each takes the last inputs of the device before it
    for its memory; no other token is sent.

    Args:
      op: From inputs, weights, memory and starts to N outputs and memory.
      x: Inputs.
      weight: Weights.
      memory: The inputs before; None for none.
      starts: Document starts.

    Returns:
      The outputs, and the memory after the last token.
    """
    mesh = jax.sharding.get_abstract_mesh()
    past = weight.shape[0] - 1
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return op(x, weight, memory, starts)
    length = pieces("time", mesh)
    if length > 1 and (x.shape[1] % length or x.shape[1] // length < past):
        return op(x, weight, memory, starts)
    if memory is None and length > 1:
        memory = jnp.zeros((x.shape[0], past, *weight.shape[1:]), x.dtype)
    axis = RULES["time"]

    def local(x, weight, memory, starts):
        if length == 1:
            return op(x, weight, memory, starts)
        index = jax.lax.axis_index(axis)
        _, own = op(x, weight, None, starts)
        onward = [(here, here + 1) for here in range(length - 1)]
        before = jnp.where(index == 0, memory, jax.lax.ppermute(own, axis, onward))
        y, end = op(x, weight, before, starts)
        return y, jax.lax.psum(jnp.where(index == length - 1, end, 0), axis)

    def lay(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
        return spec(axes, shape, mesh)

    batch, _, count, features = x.shape
    names = "batch", "time", None, "heads"
    into = lay(names, x.shape)
    kernel = lay((None, None, "heads"), weight.shape)
    kept = lay(("batch", None, None, "heads"), (batch, past, *weight.shape[1:]))
    marks = None if starts is None else lay(("batch", "time"), starts.shape)
    out = lay(("batch", "time", "heads"), (*x.shape[:2], features))
    run = jax.shard_map(
        local,
        in_specs=(into, kernel, None if memory is None else kept, marks),
        out_specs=([out] * count, kept),
        check_vma=False,
    )
    return run(x, weight, memory, starts)


def _named(axes, x):
    """Names for all axes of an array, of which the first ones have some."""
    return (axes + (None,) * x.ndim)[: x.ndim]


def _whole(op, tokens, initial, memory, starts):
    return op(tokens, initial, memory, starts)


def _scanned(op, fresh, decay, tokens, initial, memory, starts):
    """Finds what each device begins with by a scan over what all tokens before leave behind."""
    axis = RULES["time"]
    batch = jax.tree.leaves(tokens)[0].shape[0]
    nothing = fresh(initial, batch)
    gates = decay(tokens)
    share = jnp.prod(gates, axis=1)
    if starts is not None:
        share = jnp.where(jnp.any(starts, axis=1)[:, None], 0, share)
    _, own = op(tokens, initial, None, starts)

    def shaped(share, like):
        return share.reshape(share.shape + (1,) * (like.ndim - share.ndim))

    def through(begin, device):
        share, own = device
        end = jax.tree.map(lambda a, b: shaped(share, a) * a + b, begin, own)
        return end, begin

    # One device after the other: the compiler of jax 0.11 breaks down on the gradient of an
    # associative scan in here, and these are a few sums.
    first = nothing if memory is None else memory
    last, begins = jax.lax.scan(through, first, jax.lax.all_gather((share, own), axis))
    index = jax.lax.axis_index(axis)
    begin = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 0, False), begins)
    y, _ = op(tokens, initial, begin, starts)
    return y, last


def _piped(op, fresh, tokens, initial, memory, starts):
    """Sends one head after the other through the devices, which hold the tokens in order."""
    axis = RULES["time"]
    index, length = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    batch, _, heads = jax.tree.leaves(tokens)[0].shape[:3]
    first = fresh(initial, batch) if memory is None else memory
    blank = jax.tree.map(jnp.zeros_like, _head(first, 0, 1))

    def step(handed, number):
        head = jnp.clip(number - index, 0, heads - 1)
        begin = jax.tree.map(partial(jnp.where, index == 0), _head(first, head, 1), handed)
        y, end = op(_head(tokens, head, 2), _head(initial, head, 0), begin, starts)
        onward = [(here, here + 1) for here in range(length - 1)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, onward), end), (y, end)

    _, found = jax.lax.scan(step, blank, jnp.arange(heads + length - 1))
    # This device met its first head in step `index`, and one in each step from there on.
    y, end = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, heads), found)
    y = jnp.moveaxis(y[:, :, :, 0], 0, 2)
    end = jax.tree.map(lambda x: jnp.moveaxis(x[:, :, 0], 0, 1) if x.ndim > 1 else x[-1], end)
    last = index == length - 1
    return y, jax.tree.map(lambda x: jax.lax.psum(jnp.where(last, x, 0), axis), end)


def _head(tree, number, axis):
    """One head of every array; numbers belong to all of them."""
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, number, 1, axis) if x.ndim else x, tree
    )

"""What an optimizer must know of a parameter besides its numbers: which of them are matrices.

The one rule of this project, used by every optimizer that treats matrices apart from the rest:

- A parameter of role "matrix" or "memory_init" is a stack of matrices: its last two axes are the
  matrix, (in, out) for a "matrix" and (out, in) for the initial state of a memory, and all axes in
  front (scanned layers, fused projections, heads) only stack separate ones. Initial states of
  memories count: they are linear maps, and their gradient is a sum of outer products as any other
  layer's is. A matrix with a side of 1 is a vector.
- An "embedding" is not a matrix: its rows are moved by the tokens that occur, one by one. A
  "vector" (norm, bias, gate, convolution) is not one either. Both fall to AdamW.
- Weight decay acts on the role "matrix" alone. Initial states mean something where they are, norms
  and biases are not weights of a sum, and decayed embeddings make the gradients of the first layer
  grow.
- A parameter without metadata, outside this project: two axes are a matrix (in, out), all else is
  a vector, as in optax.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PyTree

Role = Literal["matrix", "vector", "embedding", "memory_init"]


@dataclass(frozen=True)
class ParamInfo:
    """The metadata of one parameter; a leaf to `jax.tree`.

    Attributes:
      axes: Logical names of the last axes. Axes in front of them stack scanned layers.
      role: What the parameter is, see the head of this file.
      level: The level of the continuum memory that it belongs to; None moves at every step.
    """

    axes: tuple[str | None, ...]
    role: Role
    level: int | None = None


def describe(variables: PyTree) -> PyTree[ParamInfo]:
    """Reads the metadata of variables that were made with `axes`, `role` and maybe `level`.

    Args:
      variables: A tree whose leaves have `get_metadata()`, as `nnx.Variable` has.

    Returns:
      The same tree of `ParamInfo`.
    """

    def read(variable: Any) -> ParamInfo:
        metadata = variable.get_metadata()
        return ParamInfo(tuple(metadata["axes"]), metadata["role"], metadata.get("level"))

    return jax.tree.map(read, variables, is_leaf=lambda x: hasattr(x, "get_metadata"))


def with_info(
    function: Callable[..., Any], tree: PyTree, *rest: PyTree, info: PyTree[ParamInfo] | None
) -> PyTree:
    """Maps `function(info, leaf, *leaves)` over trees shaped like parameters.

    The metadata is found by path, so that trees from which `optax.partition` took leaves pass.

    Args:
      function: Its first argument is the leaf's `ParamInfo`.
      tree: Parameters, gradients or a part of them.
      *rest: Trees with a subtree for each leaf of `tree`.
      info: The metadata of all parameters; None goes by the number of axes.

    Raises:
      ValueError: `info` knows nothing of a parameter.
    """
    known = None if info is None else dict(jax.tree_util.tree_leaves_with_path(info))

    def call(path: tuple[Any, ...], leaf: Array, *leaves: PyTree) -> Any:
        if known is None:
            shape = jnp.shape(leaf)
            return function(
                ParamInfo((None,) * len(shape), "matrix" if len(shape) == 2 else "vector"),
                leaf,
                *leaves,
            )
        if path not in known:
            raise ValueError(
                f"info must describe every parameter, got none for {jax.tree_util.keystr(path)}"
            )
        return function(known[path], leaf, *leaves)

    return jax.tree_util.tree_map_with_path(call, tree, *rest)


def is_matrix(info: ParamInfo, x: Array) -> bool:
    """Whether a parameter is a stack of matrices."""
    return info.role in ("matrix", "memory_init") and x.size > 0 and min(x.shape[-2:]) > 1


def matrix_labels(tree: PyTree, info: PyTree[ParamInfo] | None) -> PyTree[str]:
    """Labels every parameter "matrix" or "rest", for `optax.partition`."""
    return with_info(lambda i, x: "matrix" if is_matrix(i, x) else "rest", tree, info=info)


def decay_mask(tree: PyTree, info: PyTree[ParamInfo] | None) -> PyTree[bool]:
    """Says for every parameter whether weight decay acts on it."""
    return with_info(lambda i, _: i.role == "matrix", tree, info=info)


def to_matrices(info: ParamInfo, x: Array) -> Num[Array, "... out in"]:
    """Views a parameter as matrices that map inputs to outputs.

    What is no matrix becomes rows (1, in), one for each vector of an embedding and for each layer
    of a scanned vector, so that rules of matrices apply to everything.
    """
    if is_matrix(info, x):
        return x if info.role == "memory_init" else jnp.swapaxes(x, -1, -2)
    if info.role == "embedding":
        return x[..., None, :]
    stack = x.shape[: x.ndim - len(info.axes)]
    return x.reshape(*stack, 1, -1) if x.size else x.reshape(*stack, 1, 0)


def from_matrices(
    info: ParamInfo, matrices: Float[Array, "... out in"], like: Array
) -> Float[Array, "..."]:
    """Undoes `to_matrices` for a parameter shaped as `like`."""
    if is_matrix(info, like) and info.role != "memory_init":
        return jnp.swapaxes(matrices, -1, -2)
    return matrices.reshape(like.shape)


def each(
    results: int,
    function: Callable[..., tuple],
    tree: PyTree,
    *rest: PyTree,
    info: PyTree[ParamInfo] | None = None,
) -> tuple[PyTree, ...]:
    """As `with_info`, for a function with several results: returns one tree for each of them."""
    rows = with_info(lambda *args: _Row(function(*args)), tree, *rest, info=info)
    return tuple(jax.tree.map(lambda row, i=i: row.of[i], rows) for i in range(results))


@dataclass(frozen=True)
class _Row:
    """The results for one leaf, which `jax.tree` takes for a leaf."""

    of: tuple

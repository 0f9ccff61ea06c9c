"""Optimizer states in files of their own, so that an optimizer can be carried to another run."""

import os
from pathlib import Path

import jax
import numpy as np
import optax
from jaxtyping import Array
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file


def save_state(path: str | os.PathLike[str], state: optax.OptState) -> None:
    """Writes an optimizer's state to one safetensors file, whole or not at all.

    Args:
      path: Of the file; one that is there is replaced when the new one is complete.
      state: A tree of arrays that this process can read; split ones are joined.
    """
    path = Path(path)
    draft = path.with_name(path.name + ".part")
    # One by one, contiguous and in host memory; the paths in the state are the names.
    save_file({name: np.array(x, order="C") for name, x in _named(state).items()}, draft)
    os.replace(draft, path)


def load_state(path: str | os.PathLike[str], like: optax.OptState) -> optax.OptState:
    """Reads what `save_state` wrote.

    Args:
      path: Of the file.
      like: The state of a new optimizer, `tx.init(params)`, or its shapes,
        `jax.eval_shape(tx.init, params)`. Arrays are laid out as those in it.

    Raises:
      ValueError: The file is no whole safetensors file, or is of another optimizer or model.
    """
    try:
        arrays = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    slots = _named(like)
    for what, names in (("lacks", slots.keys() - arrays), ("has also", arrays.keys() - slots)):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise ValueError(f"{path} is of another optimizer or model: it {what} {some}")
    for name, slot in slots.items():
        found, wanted = (f"{x.dtype}{list(x.shape)}" for x in (arrays[name], slot))
        if found != wanted:
            raise ValueError(
                f"{path} is of another optimizer or model: {name} is {found}, not {wanted}"
            )
    leaves = [jax.device_put(arrays[name], slot.sharding) for name, slot in slots.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _named(state: optax.OptState) -> dict[str, Array]:
    paths = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}

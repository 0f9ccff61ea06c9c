"""Memories in files of their own, so that what was read once can be gone on from anywhere."""

import hashlib
import os
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hope_jax.models.adapt import Reading, fresh
from hope_jax.models.decoder import Decoder, Memory

VERSION = "1"


def save_memory(path: str | os.PathLike[str], model: Decoder, memory: Memory | Reading) -> None:
    """Writes a memory to one safetensors file, whole or not at all.

    Args:
      path: Of the file; one that is there is replaced when the new one is complete.
      model: Whose memory it is; the file knows it again by its settings and parameters.
      memory: What `hope_jax.read` or the model returned.
    """
    path = Path(path)
    draft = path.with_name(path.name + ".part")
    arrays = {name: np.array(leaf, order="C") for name, leaf in _named(memory).items()}
    about = {
        "version": VERSION,
        "model": fingerprint(model),
        "rows": str(_rows(memory)),
        "kind": "reading" if isinstance(memory, Reading) else "memory",
    }
    save_file(arrays, draft, metadata=about)
    os.replace(draft, path)


def load_memory(path: str | os.PathLike[str], model: Decoder) -> Memory | Reading:
    """Reads what `save_memory` wrote.

    Args:
      path: Of the file.
      model: The model that the memory is for.

    Raises:
      ValueError: The file cannot be read, is no memory, or one of another model or version.
    """
    try:
        with safe_open(path, "numpy") as file:
            about = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"memory {str(path)!r} cannot be read: {error}") from error
    if "version" not in about or "kind" not in about:
        raise ValueError(f"{path} is no memory of a hope_jax model")
    if about["version"] != VERSION:
        raise ValueError(f"{path} must be a memory of version {VERSION}, got {about['version']}")
    if about["model"] != fingerprint(model):
        raise ValueError(f"{path} is the memory of another model: of other settings or parameters")
    make = partial(fresh, model, int(about["rows"]), reading=about["kind"] == "reading")
    like = jax.eval_shape(make)
    found = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    wanted = {name: (leaf.shape, leaf.dtype) for name, leaf in _named(like).items()}
    if found != wanted:
        raise ValueError(f"{path} is damaged: its arrays are not those of the model's memory")
    leaves = [jax.numpy.asarray(arrays[name]) for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def fingerprint(model: Decoder) -> str:
    """A short name for a model's settings and every number in it."""
    digest = hashlib.blake2b(repr(model.config).encode(), digest_size=16)
    for name, leaf in _named(nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])).items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()


def _rows(memory: Memory | Reading) -> int:
    """How many sequences a memory is of: leaves are `[layers, B, ...]` or `[layers]`."""
    tower = memory.memory if isinstance(memory, Reading) else memory
    return next(leaf.shape[1] for leaf in jax.tree.leaves(tower) if leaf.ndim > 1)


def _named(tree: object) -> dict[str, jax.Array | jax.ShapeDtypeStruct]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}

"""Where arrays lie on a mesh of devices; the only file that names mesh axes."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocabulary": ("tensor",),
}
"""Logical axis -> the mesh axes that split it. A name that is not here is never split."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The shape of the mesh; one axis may be -1 and takes the devices that are left.

    Attributes:
      data: Copies of the model; each reads its share of the batch.
      fsdp: Parameters and optimizer state are split this often, the batch as well.
      tensor: Heads, hidden units and the vocabulary are split this often.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = self.data, self.fsdp, self.tensor
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ValueError(
                "mesh axes must be at least 1, and one of them may be -1 (the rest), got "
                f"data={self.data} fsdp={self.fsdp} tensor={self.tensor}"
            )

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """Lays the devices out.

        Args:
          devices: All of them by default.

        Raises:
          ValueError: The sizes do not multiply to the number of devices.
        """
        devices = jax.devices() if devices is None else devices
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        fixed = int(np.prod([size for size in sizes.values() if size != -1]))
        free = len(devices) // fixed if -1 in sizes.values() else 1
        shape = [free if size == -1 else size for size in sizes.values()]
        if int(np.prod(shape)) != len(devices):
            asked = " ".join(f"{name}={size}" for name, size in sizes.items())
            raise ValueError(
                f"mesh {asked} must multiply to the number of devices, got {len(devices)} devices"
            )
        return jax.make_mesh(
            tuple(shape), tuple(sizes), axis_types=(AxisType.Auto,) * len(shape), devices=devices
        )


def use(mesh: Mesh) -> AbstractContextManager:
    """Makes `mesh` the one that `constrain` and `named` speak of."""
    return jax.set_mesh(mesh)


def spec(
    names: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Which mesh axes split each axis of an array.

    An axis whose length the mesh does not divide stays whole: a vocabulary of 257 or two heads
    on a mesh with `tensor=4` cost memory, not an error. (A batch must divide; `data` checks.)

    Args:
      names: Logical names, one for each of the last axes; axes in front of them stay whole.
      shape: The array's shape.
      mesh: Concrete or abstract.
    """
    names = (None,) * (len(shape) - len(names)) + tuple(names)
    parts: list[tuple[str, ...] | None] = []
    for name, length in zip(names, shape, strict=True):
        axes = tuple(axis for axis in RULES.get(name or "", ()) if axis in mesh.shape)
        pieces = int(np.prod([mesh.shape[axis] for axis in axes]))
        parts.append(axes if pieces > 1 and length % pieces == 0 else None)
    return PartitionSpec(*parts)


def named(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """`spec` as a sharding that `jax.jit` and `jax.device_put` take."""
    return NamedSharding(mesh, spec(names, shape, mesh))


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Keeps an activation split as `names` say; does nothing where no mesh is in use."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))

"""Where arrays lie on a mesh of devices; the only file that names mesh axes."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import gcd, prod

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "time": ("sequence",),
    "embed": ("fsdp", "sequence"),
    "heads": ("tensor",),
    "heads_of_all_time": ("tensor", "sequence"),
    "mlp": ("tensor",),
    "vocabulary": ("tensor",),
}
"""Logical axis -> the mesh axes that split it. A name that is not here is never split."""

STATE_BYTES = 16
"""Of a parameter while it is trained: itself, its gradient and two moments, in float32."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The shape of the mesh; one axis may be -1 and takes the devices that are left.

    Attributes:
      data: Copies of the model; each reads its share of the batch.
      fsdp: Parameters and optimizer state are split this often, the batch as well.
      tensor: Heads, hidden units and the vocabulary are split this often.
      sequence: The tokens of each row are split this often, parameters and optimizer state too.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self):
        sizes = self._sizes().values()
        if list(sizes).count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ValueError(
                "mesh axes must be at least 1, and one of them may be -1 (the rest), got "
                f"{_listed(self._sizes())}"
            )

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """Lays the devices out.

        Args:
          devices: All of them by default.

        Raises:
          ValueError: The sizes do not multiply to the number of devices.
        """
        devices = jax.devices() if devices is None else devices
        sizes = self._sizes()
        fixed = prod(size for size in sizes.values() if size != -1)
        free = len(devices) // fixed if -1 in sizes.values() else 1
        shape = [free if size == -1 else size for size in sizes.values()]
        if prod(shape) != len(devices):
            raise ValueError(
                f"mesh {_listed(sizes)} must multiply to the number of devices, "
                f"got {len(devices)} devices"
            )
        return jax.make_mesh(
            tuple(shape), tuple(sizes), axis_types=(AxisType.Auto,) * len(shape), devices=devices
        )

    def _sizes(self) -> dict[str, int]:
        return {
            "data": self.data, "fsdp": self.fsdp, "tensor": self.tensor, "sequence": self.sequence,
        }  # fmt: skip


def automatic(
    devices: int, *, parameters: int, batch: int, window: int, heads: int, memory: int | None
) -> tuple[MeshConfig, str]:
    """Chooses a mesh.

    As many devices as possible take rows of the batch; the state of training is split only as
    often as it has to be to fill a quarter of a device, since copies need the least
    communication. Devices that no row is left for split the rows, or else the heads.

    Args:
      devices: How many there are.
      parameters: The size of the model.
      batch: Rows of a batch.
      window: Tokens of a row.
      heads: Of the sequence layers.
      memory: Bytes of a device; None where state may take all it needs.

    Returns:
      The mesh, and a sentence that says why.

    Raises:
      ValueError: Neither rows, tokens nor heads can be shared by all devices.
    """
    rows = gcd(devices, batch)
    rest = devices // rows
    reason = f"{rows} devices share {batch} rows"
    axes = {}
    if rest > 1:
        splits = {"sequence": window, "tensor": heads}
        axis = next((name for name, size in splits.items() if size % rest == 0), None)
        if axis is None:
            raise ValueError(
                f"mesh auto finds no layout: of {devices} devices {rows} share {batch} rows, and "
                f"the other factor {rest} divides neither {window} tokens nor {heads} heads"
            )
        axes = {axis: rest}
        reason += f", {rest} the {'tokens' if axis == 'sequence' else 'heads'} of each"
    state = STATE_BYTES * parameters / rest
    fsdp = 1
    if memory is not None:
        splits = [n for n in range(1, rows + 1) if rows % n == 0]
        fsdp = next((n for n in splits if state / n <= memory / 4), rows)
    reason += (
        f"; {STATE_BYTES * parameters / 2**30:.1f} GiB of training state, split "
        f"{fsdp * rest} times, are {state / fsdp / 2**30:.2f} GiB a device"
    )
    if memory is not None:
        reason += f" of {memory / 2**30:.0f} GiB"
    mesh = MeshConfig(data=rows // fsdp, fsdp=fsdp, **axes)
    return mesh, f"mesh auto is {_listed(mesh._sizes())}: {reason}"


def use(mesh: Mesh) -> AbstractContextManager:
    """Makes `mesh` the one that `constrain` and `named` speak of."""
    return jax.set_mesh(mesh)


def spec(
    names: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Which mesh axes split each axis of an array.

    An axis is split by as many of the first of its mesh axes as divide its length: a vocabulary of
    257 or two heads on a mesh with `tensor=4` cost memory, not an error. (A batch must divide, and
    so must the tokens of a row; `data` checks.)

    Args:
      names: Logical names, one for each of the last axes; axes in front of them stay whole.
      shape: The array's shape.
      mesh: Concrete or abstract.
    """
    names = (None,) * (len(shape) - len(names)) + tuple(names)
    parts: list[tuple[str, ...] | None] = []
    for name, length in zip(names, shape, strict=True):
        axes = [axis for axis in RULES.get(name or "", ()) if axis in mesh.shape]
        while length % prod(mesh.shape[axis] for axis in axes):
            axes.pop()
        parts.append(tuple(axes) or None)
    return PartitionSpec(*parts)


def named(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """`spec` as a sharding that `jax.jit` and `jax.device_put` take."""
    return NamedSharding(mesh, spec(names, shape, mesh))


def pieces(name: str, mesh: Mesh | AbstractMesh) -> int:
    """Into how many pieces a mesh cuts a logical axis that it divides."""
    return prod(mesh.shape.get(axis, 1) for axis in RULES.get(name, ()))


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Keeps an activation split as `names` say; does nothing where no mesh is in use."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))


def _listed(sizes: dict[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in sizes.items())

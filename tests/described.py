"""Lowers functions for GPUs that are described rather than there."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType


def mesh_of(kind):
    """A mesh of one GPU of a kind, as "NVIDIA H100"."""
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    return AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)


def lowered_for(kind, function, *arguments):
    """The text of what a GPU of a kind would run for a call."""
    with jax.sharding.use_abstract_mesh(mesh_of(kind)):
        traced = jax.jit(function).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

"""One program on any mesh: what is split over devices computes what one device does."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_models import MODELS, VOCABULARY
from toy_run import compiled_once

from hope_jax import sharding
from hope_jax.modules.memory import AssociativeConfig
from hope_jax.shapes import Batch
from hope_jax.sharding import MeshConfig
from hope_jax.training import step

ROWS, WINDOW = 8, 32
MESHES = {
    "8x1": MeshConfig(data=8),
    "4x2": MeshConfig(data=4, fsdp=2),
    "2x2x2": MeshConfig(data=2, fsdp=2, tensor=2),
    "1x8": MeshConfig(data=1, fsdp=8),
    "sequence": MeshConfig(data=2, sequence=4),
    "tensor and sequence": MeshConfig(data=2, tensor=2, sequence=2),
}


@pytest.fixture(autouse=True, scope="module")
def _compiled_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


def batch_of(number: int) -> Batch:
    """Rows in which some documents start, on the mesh in use."""
    random = np.random.default_rng(number)
    tokens = random.integers(VOCABULARY, size=(ROWS, WINDOW + 1)).astype(np.int32)
    batch = Batch(tokens, random.random(tokens.shape) < 0.1)
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(
        lambda x: jax.device_put(x, sharding.named(("batch", None), x.shape, mesh)), batch
    )


def losses_on(mesh: MeshConfig, config, devices: int, steps: int) -> list[float]:
    """Trains a model for some steps."""
    with sharding.use(mesh.build(jax.devices()[:devices])):
        model, tx = step.outline(partial(config.build, seed=0)), optax.adamw(1e-3)
        abstract = step.abstract_state(model, tx)
        state = step.initial_state(model, tx, 0, abstract)
        take = step.compile_train_step(model.graphdef, tx, 1, abstract, batch_of(0))
        losses = []
        for number in range(steps):
            state, report = take(state, batch_of(number))
            losses.append(float(report["loss"]))
    return losses


@pytest.mark.parametrize("mesh", MESHES)
def test_hope_trains_on_a_mesh_as_on_one_device(mesh):
    config = MODELS["hope"]
    one = losses_on(MeshConfig(), config, devices=1, steps=20)
    eight = losses_on(MESHES[mesh], config, devices=8, steps=20)
    assert len(set(one)) == 20
    np.testing.assert_allclose(eight, one, rtol=1e-5)

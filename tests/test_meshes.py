"""One program on any mesh: what is split over devices computes what one device does."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from small_models import MODELS, SWIGLU, VOCABULARY
from toy_run import compiled_once

from hope_jax import config, runs, sharding
from hope_jax.data import DataConfig
from hope_jax.shapes import Batch
from hope_jax.sharding import MeshConfig, automatic
from hope_jax.training import step

ROWS, WINDOW = 8, 16
HOPE = replace(
    MODELS["hope"], continuum=SWIGLU, mixer=replace(MODELS["hope"].mixer, chunk_memory=8)
)
MESHES = {
    "8x1": MeshConfig(data=8),
    "4x2": MeshConfig(data=4, fsdp=2),
    "2x2x2": MeshConfig(data=2, fsdp=2, tensor=2),
    "1x8": MeshConfig(data=1, fsdp=8),
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


def losses_on(mesh: MeshConfig, devices: int) -> list[float]:
    """Trains HOPE for 20 steps."""
    with sharding.use(mesh.build(jax.devices()[:devices])):
        model, tx = step.outline(partial(HOPE.build, seed=0)), optax.adamw(1e-3)
        abstract = step.abstract_state(model, tx)
        state = step.initial_state(model, tx, 0, abstract)
        take = step.compile_train_step(model.graphdef, tx, 1, abstract, batch_of(0))
        losses = []
        for number in range(20):
            state, report = take(state, batch_of(number))
            losses.append(float(report["loss"]))
    return losses


@pytest.fixture(scope="module")
def alone():
    """The losses of one device."""
    return losses_on(MeshConfig(), devices=1)


@pytest.mark.parametrize("mesh", MESHES)
def test_hope_trains_on_a_mesh_as_on_one_device(mesh, alone):
    assert len(set(alone)) == 20
    np.testing.assert_allclose(losses_on(MESHES[mesh], devices=8), alone, rtol=1e-5)


SPLITS = {
    "a scan over what devices leave behind": MODELS["fastkv_hope"],
    "heads in place of tokens": replace(
        MODELS["gated_deltanet"], mixer=replace(MODELS["gated_deltanet"].mixer, heads=4)
    ),
    "head after head through the devices": HOPE,
    "all keys on every device": MODELS["hope_attention"],
}


@pytest.mark.parametrize("how", SPLITS)
def test_tokens_split_over_devices_are_read_as_on_one(how):
    model = replace(SPLITS[how], layers=1)
    random = np.random.default_rng(0)
    tokens = random.integers(VOCABULARY, size=(2, 24)).astype(np.int32)
    starts = random.random(tokens.shape) < 0.1
    graphdef, params = nnx.split(model.build(seed=0), nnx.Param)
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(params))

    def energy(params, pieces):
        """Reads piece after piece; some function of all outputs, and the outputs."""
        memory, found = None, []
        for piece in pieces:
            read = nnx.merge(graphdef, params)
            logits, memory = read(
                jnp.asarray(tokens[:, piece]), memory, jnp.asarray(starts[:, piece])
            )
            found.append(logits)
        logits = jnp.concatenate(found, 1)
        return jnp.mean(jnp.sin(logits) ** 2), logits

    def call(mesh, devices, *pieces):
        with sharding.use(mesh.build(jax.devices()[:devices])):
            both = jax.jit(partial(jax.value_and_grad(energy, has_aux=True), pieces=pieces))
            return jax.tree.map(np.asarray, both(params))

    (_, whole), slopes = call(MeshConfig(), 1, slice(0, 24))
    mesh = MeshConfig(data=2, sequence=4)
    (_, split), found = call(mesh, 8, slice(0, 16), slice(16, 24))
    np.testing.assert_allclose(split, whole, rtol=1e-4, atol=1e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(slopes), strict=True
    ):
        np.testing.assert_allclose(a, b, 1e-3, 1e-6, err_msg=jax.tree_util.keystr(path))


def test_state_is_split_over_the_sequence_as_well():
    with sharding.use(MeshConfig(data=1, fsdp=2, sequence=4).build()):
        params = step.abstract_params(step.outline(partial(HOPE.build, seed=0)))
    table = params["embedding"]["table"]
    assert table.sharding.shard_shape(table.shape) == (VOCABULARY, 16 // 8)


def test_an_axis_of_one_device_is_named_like_others():
    """Else what is computed on the axis alone is summed over it, in bfloat16 to XLA's dismay."""
    mesh = MeshConfig(data=8).build()
    assert sharding.spec(("batch", "time", None), (8, 4, 3), mesh) == PartitionSpec(
        ("data", "fsdp"), ("sequence",), None
    )
    assert sharding.spec(("batch",), (7,), mesh) == PartitionSpec(None)


def choose(devices, **sizes):
    given = {"parameters": 10**8, "batch": 64, "window": 4096, "heads": 16, "memory": 16 * 2**30}
    return automatic(devices, **given | sizes)


@pytest.mark.parametrize(
    ("devices", "sizes", "expected"),
    [
        (1, {}, MeshConfig(data=1)),
        (8, {}, MeshConfig(data=8)),
        (8, {"parameters": 10**9}, MeshConfig(data=2, fsdp=4)),
        (64, {"parameters": 10**11}, MeshConfig(data=1, fsdp=64)),
        (8, {"parameters": 10**11, "memory": None}, MeshConfig(data=8)),
        (8, {"batch": 2}, MeshConfig(data=2, sequence=4)),
        (8, {"batch": 2, "window": 127}, MeshConfig(data=2, tensor=4)),
    ],
)
def test_an_automatic_mesh_shares_rows_first_and_state_as_far_as_it_must(devices, sizes, expected):
    mesh, reason = choose(devices, **sizes)
    assert mesh == expected
    assert reason.startswith(f"mesh auto is data={expected.data} fsdp={expected.fsdp} ")


def test_an_automatic_mesh_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="factor 4 divides neither 127 tokens nor 3 heads"):
        choose(8, batch=2, window=127, heads=3)


def test_an_experiment_may_leave_the_mesh_to_the_devices():
    experiment = config.load("configs/quickstart.yaml", ["mesh=auto", "data.batch=4"])
    mesh, reason = runs.lay_out(experiment)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 1, "sequence": 2}
    assert "4 devices share 4 rows, 2 the tokens of each" in reason


def test_parts_of_a_batch_that_the_devices_cannot_share_are_refused():
    given = ["data.batch=16", "training.accumulate=4"]
    with pytest.raises(ValueError, match=r"8 devices .* must divide the 4 rows of each of"):
        runs.lay_out(config.load("configs/quickstart.yaml", given))


def test_a_device_holds_less_of_the_state_the_more_devices_there_are():
    held = []
    for count in (1, 2, 4, 8):
        with sharding.use(MeshConfig(data=1, fsdp=count).build(jax.devices()[:count])):
            state = step.abstract_state(
                step.outline(partial(HOPE.build, seed=0)), optax.adamw(1e-3)
            )
        leaves = jax.tree.leaves((state.params, state.opt_state))
        held.append(sum(np.prod(x.sharding.shard_shape(x.shape)) for x in leaves))
    assert held == sorted(held, reverse=True)
    assert held[3] < 0.4 * held[0]


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"batch": 3}, r"batch must be divisible by 2, .*\(data x fsdp\), got 3"),
        ({"window": 30}, r"window must be divisible by 4, .*\(sequence\), got 30"),
    ],
)
def test_what_a_mesh_does_not_divide_is_refused_before_anything_is_read(sizes, reason):
    data = DataConfig(**{"batch": 4, "window": 32} | sizes)
    with (
        sharding.use(MeshConfig(data=2, sequence=4).build()),
        pytest.raises(ValueError, match=reason),
    ):
        data.abstract()


def test_sizes_that_do_not_multiply_to_the_devices_are_refused():
    with pytest.raises(ValueError, match="sequence=3 must multiply to the number of devices"):
        MeshConfig(data=2, sequence=3).build()


def test_a_kernel_is_launched_by_each_device_for_its_own_rows_and_heads():
    options = {"heads": 2, "head_width": 16, "chunk_memory": 16, "chunk_projections": 16}
    mixer = replace(HOPE.mixer, **options)
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=(2, 16)).astype(np.int32)

    def read(form):
        model = replace(HOPE, layers=1, mixer=replace(mixer, form=form)).build(seed=0)
        graphdef, params = nnx.split(model, nnx.Param)
        params = jax.tree.map(np.asarray, nnx.to_pure_dict(params))
        return jax.jit(lambda params: nnx.merge(graphdef, params)(jnp.asarray(tokens))[0])(params)

    whole = read("chunked")
    with sharding.use(MeshConfig(data=2, tensor=2).build(jax.devices()[:4])):
        np.testing.assert_allclose(read("pallas_triton"), whole, rtol=1e-4, atol=1e-4)

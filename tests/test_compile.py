"""What a compiled program costs: read from its text, and from the TPU compiler if it is there."""

import json
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from hope_jax import __main__ as command_line
from hope_jax import compile_hlo, compile_steps, sharding
from hope_jax.config import ConfigError
from hope_jax.ops.fastkv import fast_kv
from hope_jax.ops.selfref import Slow, self_referential
from hope_jax.ops.titans import titans
from hope_jax.sharding import MeshConfig

SMALL = """
model:
  mixer: {kind: self_modifying_titans, heads: 2, chunk_memory: 16, chunk_projections: 16}
  continuum: {levels: [{hidden: 128}]}
  width: 128
  layers: 2
  dtype: bfloat16
  remat: full
data: {window: 64, batch: 8}
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(f"{SMALL}\ntraining: {{folder: {tmp_path}}}\n")
    return path


def compiled_text(function, *arguments) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_a_collective_in_a_loop_counts_as_often_as_the_loop_runs():
    mesh = MeshConfig(data=8).build()

    def loop(x):
        def body(x, _):
            return jax.lax.psum(x, "data") / 8 + 1, None

        return jax.lax.scan(body, x, None, length=5)[0]

    with sharding.use(mesh):
        spec = PartitionSpec("data")
        mapped = jax.shard_map(loop, in_specs=spec, out_specs=spec, check_vma=False)
        traffic = compile_hlo.read(compiled_text(mapped, jnp.ones((8, 1024))))
    (found,) = traffic.collectives
    assert found == ("all-reduce", 1024 * 4, 8, 5)
    assert found.wire == 5 * 2 * 4096 * 7 / 8
    assert traffic.unknown_loops == 0


def test_a_loop_without_a_known_end_is_counted_once_and_told():
    def loop(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: 2 * x, x)

    assert compile_hlo.read(compiled_text(loop, jnp.ones(4))).unknown_loops == 1


def test_a_pass_over_an_array_reads_and_writes_it_once():
    traffic = compile_hlo.read(compiled_text(lambda x: jnp.sin(x) + 1, jnp.ones((512, 512))))
    assert traffic.memory == 2 * 512 * 512 * 4


def test_a_loop_over_rows_reads_the_rows_and_not_the_matrix_each_time():
    def rows(x):
        return jax.lax.scan(lambda total, row: (total + jnp.sin(row), None), x[0], x)[0]

    traffic = compile_hlo.read(compiled_text(rows, jnp.ones((64, 4096))))
    assert traffic.memory < 10 * 64 * 4096 * 4


def test_an_asynchronous_collective_counts_once():
    text = """
%start (p: f32[4,8]) -> f32[16,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %g = f32[16,8]{1,0} all-gather(%p), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
}

%done (q: f32[4,8]) -> f32[16,8] {
  %q = f32[4,8]{1,0} parameter(0)
  ROOT %h = f32[16,8]{1,0} all-gather(%q), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (x: f32[4,8]) -> f32[16,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %a = f32[16,8]{1,0} fusion(%x), kind=kCustom, calls=%start
  ROOT %b = f32[16,8]{1,0} fusion(%x), kind=kCustom, calls=%done
}
"""
    assert compile_hlo.read(text).collectives == [("all-gather", 16 * 8 * 4, 4, 1)]


def test_an_unknown_topology_is_answered_with_the_choices(small, capsys):
    assert command_line.main(["compile", str(small), "topology=v5e:3x3"]) == 2
    assert "topology=v5e:3x3 is no choice; choices: v4: 2x2x1" in capsys.readouterr().err


def test_a_missing_compiler_is_told(monkeypatch):
    monkeypatch.setattr(compile_steps, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'hope_jax\[tpu\]'"):
        compile_steps.described_devices("v5e:2x2")


needs_compiler = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="needs the TPU compiler: pip install 'hope_jax[tpu]'"
)


@needs_compiler
def test_the_steps_of_hope_compile_for_a_tpu_that_is_not_there(small, capsys):
    given = ["compile", str(small), "topology=v5e:2x2", "mesh={data: 1, fsdp: 4}"]
    assert command_line.main(given) == 0
    shown = capsys.readouterr().out
    assert "train step: fits" in shown
    assert "eval step: fits" in shown
    report = json.loads((small.parent / "small" / "compile" / "v5e-2x2.json").read_text())
    train = report["steps"]["train"]
    memory = train["memory"]
    assert report["devices"] == 4
    # Initial memories are split by heads alone, so each device has all of them.
    whole = 4 * report["parameters"]
    assert whole / 4 <= memory["parameters"] < whole / 2
    assert train["memory"]["optimizer"] == pytest.approx(
        2 * train["memory"]["parameters"], rel=0.01
    )
    assert {"all-gather", "reduce-scatter"} <= {one["kind"] for one in train["collectives"]}
    assert 0 < train["mfu"] < 1


def on_tpu(topology, function, *arguments) -> str:
    """Compiles for one chip of a topology; returns the program's text."""
    mesh = MeshConfig().build(compile_steps.described_devices(topology)[:1])
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding.named([None] * x.ndim, x.shape, mesh)
        ),
        arguments,
    )
    with sharding.use(mesh):
        return compiled_text(function, *placed)


@needs_compiler
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize(
    ("heads", "width", "dtype", "projections", "momentum"),
    [
        (16, 64, jnp.bfloat16, 64, True),
        (32, 64, jnp.bfloat16, 64, False),
        (16, 128, jnp.float32, 256, False),
    ],
    ids=["150m, momentum", "1.3b", "wide float32, two chunks"],
)
def test_memory_kernels_compile_for_a_tpu(topology, heads, width, dtype, projections, momentum):
    def loss(x, q, initial, bias, starts):
        beta = x[..., 1].astype(jnp.float32) if momentum else None
        slow = Slow(None, None, q, None, None, beta, bias, bias)
        y, _ = self_referential(
            x, slow, initial, None, starts, chunk_memory=64, chunk_projections=projections,
            form="pallas_tpu",
        )  # fmt: skip
        k = q / jnp.linalg.norm(q.astype(jnp.float32), axis=-1, keepdims=True)
        gate = jax.nn.sigmoid(x[..., 0].astype(jnp.float32))
        z, _ = fast_kv(q, k.astype(dtype), x, gate, gate, None, starts, chunk=64, form="pallas_tpu")
        return jnp.sum(y.astype(jnp.float32) ** 2) + jnp.sum(z.astype(jnp.float32) ** 2)

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    tokens = shape(1, 4096, heads, width, dtype=dtype)
    rows = dict.fromkeys(("k", "v", "memory"), width) | {"eta": 1, "alpha": 1}
    initial = {name: (shape(heads, count, width),) for name, count in rows.items()}
    starts = shape(1, 4096, dtype=bool)
    text = on_tpu(
        topology, jax.grad(loss, (0, 1, 2, 3)), tokens, tokens, initial, shape(heads), starts
    )
    assert text.count('custom_call_target="tpu_custom_call"') == 6


@needs_compiler
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize(
    ("width", "hidden", "dtype"), [(64, 128, jnp.float32), (64, 256, jnp.bfloat16)]
)
def test_kernels_of_memories_that_are_mlps_compile_for_a_tpu(topology, width, hidden, dtype):
    def loss(x, initial, starts):
        gate = jax.nn.sigmoid(x[..., 0].astype(jnp.float32))
        slow = Slow(None, None, x, None, None, None, gate[0, 0], gate[0, 0])
        y, _ = self_referential(
            x, slow, initial, None, starts, chunk_memory=64, chunk_projections=64,
            form="pallas_tpu",
        )  # fmt: skip
        memory = initial["memory"]
        z, _ = titans(x, x, x, gate, gate, gate, memory, None, starts, chunk=64, form="pallas_tpu")
        return jnp.sum(y.astype(jnp.float32) ** 2) + jnp.sum(z.astype(jnp.float32) ** 2)

    shape, heads = jax.ShapeDtypeStruct, 16
    rows = dict.fromkeys(("k", "v", "memory"), width) | {"eta": 1, "alpha": 1}
    inner = shape((heads, hidden, width), jnp.float32)
    initial = {
        name: (shape((heads, count, hidden), jnp.float32), inner) for name, count in rows.items()
    }
    tokens, starts = shape((1, 1024, heads, width), dtype), shape((1, 1024), bool)
    text = on_tpu(topology, jax.grad(loss, (0, 1)), tokens, initial, starts)
    assert text.count('custom_call_target="tpu_custom_call"') == 4


@needs_compiler
def test_what_does_not_fit_is_told_by_the_exit_status(small, capsys):
    large = ["data.window=1048576", "data.batch=64", "only=eval", "model.dtype=float32"]
    assert command_line.main(["compile", str(small), "topology=v5e:1x1", *large]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out

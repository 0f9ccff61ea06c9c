"""The kernels, interpreted: the same function as the reference, in values and all gradients."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from described import lowered_for

from hope_jax import sharding
from hope_jax.ops.fastkv import FastKVMemory, fast_kv
from hope_jax.ops.pallas import gpu
from hope_jax.ops.pallas.chunk import Plan
from hope_jax.ops.selfref import SelfReferentialMemory, Slow, self_referential

KERNEL = "pallas_triton"
TPU = "pallas_tpu"
GATES = ("eta", "alpha")


def normals(seed):
    keys = iter(jax.random.split(jax.random.key(seed), 40))
    return lambda *shape: jax.random.normal(next(keys), shape)


def self_referential_call(
    time=37, position=None, starts=None, frozen=("q",), correlated=0.0, gate=1.0, batch=2, heads=2,
    group=1, width=16, chunk=16, dtype=jnp.float32, momentum=False, **options,
):  # fmt: skip
    """Everything that has a gradient, and the op as a function of it."""
    normal = normals(0)
    names = ("k", "v", "q", *GATES)
    x = normal(batch, time, heads, width) + correlated * normal(1, 1, heads, width)
    slow = {
        name: gate * normal(batch, time, heads, *(() if name in GATES else (width,)))
        for name in names
        if name in frozen
    }
    initial = {
        name: (normal(heads, 1 if name in GATES else width, width) / 4,)
        for name in (*names, "memory")
        if name not in frozen
    }
    biases = {"eta_bias": normal(heads), "alpha_bias": 3 + normal(heads)}
    states = None
    if position is not None:
        states = [
            {name: (normal(batch, *m.shape) / 4,) for name, (m,) in initial.items()}
            for _ in range(3 if momentum else 2)
        ]
    if momentum:
        slow["beta"] = gate * normal(batch, time, heads)
    given = dict.fromkeys((*names, "beta"))

    def op(x, slow, initial, biases, states, form):
        memory = None
        if states is not None:
            state, held, *momenta = states
            memory = SelfReferentialMemory(
                jnp.int32(position), state, momenta[0] if momenta else None, held
            )
        slow = Slow(**{**given, **slow, **biases})
        y, memory = self_referential(
            x, slow, initial, memory, starts, chunk_memory=chunk,
            chunk_projections=group * chunk, form=form, **options,
        )  # fmt: skip
        return y, memory.state, memory.momentum, memory.held

    return op, (x.astype(dtype), slow, initial, biases, states)


def fast_kv_call(time=37, starts=None, memory=False, gates=None, keys=16, values=16, **options):
    batch, heads = 2, 2
    normal = normals(1)
    q, k = normal(batch, time, heads, keys), normal(batch, time, heads, keys)
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    v = normal(batch, time, heads, values)
    retain, write = jax.nn.sigmoid(normal(batch, time, heads) + 2), jax.nn.sigmoid(q[..., 0])
    if gates is not None:
        cycle = np.resize(np.asarray(gates, np.float32), (batch, time, heads))
        retain, write = jnp.asarray(cycle), jnp.asarray(cycle[:, ::-1])
    state = normal(batch, heads, values, keys) if memory else None

    def op(q, k, v, retain, write, state, form):
        memory = None if state is None else FastKVMemory(state, None)
        y, memory = fast_kv(q, k, v, retain, write, memory, starts, chunk=16, form=form, **options)
        return y, memory.state

    return op, (q, k, v, retain, write, state)


def values_and_gradients(op, form, arguments):
    out, pull = jax.vjp(lambda *a: op(*a, form), *arguments)
    leaves, tree = jax.tree.flatten(out)
    normal = normals(2)
    cotangents = [normal(*leaf.shape).astype(leaf.dtype) for leaf in leaves]
    return out, pull(tree.unflatten(cotangents))


def computed(op, arguments, form):
    return jax.jit(partial(values_and_gradients, op, form))(arguments)


def assert_same(op, arguments, tolerance, kernel=KERNEL):
    expected = computed(op, arguments, "reference")
    got = computed(op, arguments, kernel)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(got), strict=True
    ):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-3)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"


def starts_of(time, share=0.15, batch=2):
    return jnp.asarray(np.random.default_rng(0).random((batch, time)) < share)


SELF_REFERENTIAL = {
    "whole chunks": {"time": 32},
    "shorter than a chunk": {"time": 5, "group": 2, "batch": 1, "heads": 1},
    "odd length, starts in chunks": {"starts": starts_of(37)},
    "goes on inside a chunk, momentum, l2, no anchor": {
        "momentum": True,
        "position": 5,
        "starts": starts_of(37),
        "objective": "l2",
        "anchor": False,
    },
    "momentum, whole chunks": {"momentum": True, "time": 32, "batch": 1, "heads": 1},
    "goes on at a chunk's start": {"position": 32, "time": 16},
    "correlated tokens": {"correlated": 5.0, "time": 48, "group": 2},
    "gates at their bounds, momentum": {
        "momentum": True,
        "frozen": ("q", *GATES),
        "gate": 100.0,
        "write_max": 2.0,
    },
    "everything adapts, own writes are read, three chunks project with one state": {
        "momentum": True,
        "frozen": (),
        "read": "current",
        "group": 3,
        "time": 62,
        "position": 21,
        "starts": starts_of(62, 0.03),
    },
    "nothing adapts": {
        "frozen": ("k", "v", "q", *GATES),
        "starts": starts_of(37),
        "position": 5,
        "group": 2,
    },
    "chunk's start is read, l2, literal": {
        "read": "chunk",
        "objective": "l2",
        "anchor": False,
        "normalize_targets": False,
        "group": 2,
        "time": 45,
        "position": 53,
        "starts": starts_of(45, 0.05),
    },
    "no erasing, values as targets, momentum": {
        "momentum": True,
        "dgd": False,
        "frozen": ("q", *GATES),
        "targets": "value",
    },
}

FAST_KV = {
    "delta": {"rule": "delta", "starts": starts_of(37), "memory": True},
    "gated delta": {"rule": "gated_delta", "memory": True, "keys": 32},
    "hebbian": {"rule": "hebbian", "starts": starts_of(37), "values": 32},
    "gates of 0 and 1": {
        "rule": "gated_delta",
        "gates": (1, 0, 1, 1, 1, 0, 0),
        "memory": True,
    },
    "whole chunks": {"rule": "delta", "time": 32},
}


@pytest.mark.parametrize("case", SELF_REFERENTIAL)
def test_self_referential_kernel_is_the_reference(case):
    assert_same(*self_referential_call(**SELF_REFERENTIAL[case]), 1e-4)


def test_what_memories_of_gates_say_may_be_long():
    op, (x, slow, initial, *rest) = self_referential_call(dgd=False)
    long = {name: (1e4 * m if name in GATES else m,) for name, (m,) in initial.items()}
    assert_same(op, (x, slow, long, *rest), 1e-2)  # logits of 1e4 are themselves 1e-3 off


def test_parts_of_whole_chunks_are_read_as_one():
    _, (x, slow, initial, biases, _) = self_referential_call(time=64, batch=1, heads=1)
    slow = Slow(**{**dict.fromkeys(("k", "v", "q", *GATES, "beta")), **slow, **biases})

    @jax.jit
    def read(x, q, memory):
        return self_referential(
            x, slow._replace(q=q), initial, memory, chunk_memory=16, chunk_projections=16,
            form=KERNEL,
        )  # fmt: skip

    whole, end = read(x, slow.q, None)
    memory, parts = None, []
    for part, q in zip(jnp.split(x, 2, 1), jnp.split(slow.q, 2, 1), strict=True):
        y, memory = read(part, q, memory)
        parts.append(y)
    found = jnp.concatenate(parts, 1), memory
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, (whole, end))


@pytest.mark.parametrize("case", FAST_KV)
def test_fast_kv_kernel_is_the_reference(case):
    assert_same(*fast_kv_call(**FAST_KV[case]), 1e-4)


@pytest.mark.parametrize(
    ("case", "shape"),
    [
        ("goes on inside a chunk, momentum, l2, no anchor", {"chunk": 64, "width": 64}),
        (
            "everything adapts, own writes are read, three chunks project with one state",
            {"chunk": 64, "width": 128, "dtype": jnp.bfloat16},
        ),
        ("chunk's start is read, l2, literal", {}),
        ("no erasing, values as targets, momentum", {}),
        ("delta", {}),
        ("hebbian", {}),
    ],
)
def test_kernels_can_be_lowered_for_a_gpu_where_there_is_none(case, shape):
    if case in SELF_REFERENTIAL:
        op, arguments = self_referential_call(**SELF_REFERENTIAL[case], **shape)
    else:
        op, arguments = fast_kv_call(**FAST_KV[case])
    run = partial(values_and_gradients, op, KERNEL)
    assert "triton" in lowered_for("NVIDIA A100", run, arguments)


@pytest.mark.parametrize(
    "case",
    ["momentum, whole chunks", "chunk's start is read, l2, literal"],
)
def test_self_referential_tpu_kernel_is_the_reference(case):
    assert_same(*self_referential_call(**SELF_REFERENTIAL[case]), 1e-4, TPU)


@pytest.mark.parametrize("case", ["delta", "gated delta"])
def test_fast_kv_tpu_kernel_is_the_reference(case):
    assert_same(*fast_kv_call(**FAST_KV[case]), 1e-4, TPU)


@pytest.mark.parametrize("time", [48, 160])
def test_bfloat16_tokens_keep_two_digits(time):
    op, arguments = self_referential_call(time=time)
    arguments = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(a.dtype), arguments)
    expected = computed(op, arguments, "reference")
    x, slow, *rest = arguments
    rounded = (x.astype(jnp.bfloat16), jax.tree.map(lambda a: a.astype(jnp.bfloat16), slow), *rest)
    got = computed(op, rounded, KERNEL)
    assert got[0][0].dtype == jnp.bfloat16
    assert got[0][1]["memory"][0].dtype == jnp.float32
    named = jax.tree_util.tree_leaves_with_path(expected)
    for (path, a), b in zip(named, jax.tree.leaves(got), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        where = jax.tree_util.keystr(path)
        # Of few tokens the parts of this one, a sum over all of them, nearly cancel.
        tolerance = 4e-2 if time == 48 and "eta_bias" in where else 2e-2
        assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(a), where


def test_what_is_written_and_erased_with_momentum_cancels_before_it_is_rounded():
    op, (x, slow, initial, biases, _) = self_referential_call(
        time=256, batch=1, heads=1, chunk=64, width=32, correlated=3.0, momentum=True
    )
    rest = initial, biases | {"alpha_bias": jnp.full(1, 6.0)}, None
    narrow = x.astype(jnp.bfloat16), slow | {"q": slow["q"].astype(jnp.bfloat16)}
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), narrow)
    _, got, *_ = jax.jit(partial(op, form=KERNEL))(*narrow, *rest)
    _, expected, *_ = jax.jit(partial(op, form="chunked"))(*wide, *rest)
    got, expected = got["memory"][0], expected["memory"][0]
    assert jnp.linalg.norm(got - expected) < 1e-2 * jnp.linalg.norm(expected)


def test_gradient_agrees_with_finite_differences():
    op, arguments = self_referential_call(time=20, batch=1, starts=starts_of(20, batch=1))
    weight = normals(3)(1, 20, 2, 16)

    @jax.jit
    def loss(arguments):
        return jnp.sum(op(*arguments, KERNEL)[0] * weight)

    slopes = jax.jit(jax.grad(loss))(arguments)
    direction = jax.tree.map(lambda a: normals(a.size)(*a.shape), arguments)
    step = 1e-3
    ahead, behind = (
        loss(jax.tree.map(lambda a, d, s=sign: a + s * step * d, arguments, direction))
        for sign in (1, -1)
    )
    along = sum(
        jnp.sum(a * b) for a, b in zip(*map(jax.tree.leaves, (slopes, direction)), strict=True)
    )
    np.testing.assert_allclose((ahead - behind) / (2 * step), along, rtol=5e-3)


@pytest.mark.parametrize(
    ("chunk", "gradient", "reason"),
    [(16, "stop", "inner updates, got inner_gradient=stop"), (24, "full", "chunks of .* got 24")],
)
def test_what_the_kernel_does_not_take_is_an_error_that_says_why(chunk, gradient, reason):
    _, (x, slow, initial, biases, _) = self_referential_call(time=16)
    slow = Slow(**{**dict.fromkeys(("k", "v", *GATES, "beta")), **slow, **biases})
    with pytest.raises(ValueError, match=reason):
        self_referential(
            x, slow, initial, chunk_memory=chunk, chunk_projections=chunk,
            inner_gradient=gradient, form=KERNEL,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "precision", "width", "fits"),
    [
        (jnp.bfloat16, None, 128, True),
        (jnp.float32, None, 64, True),
        (jnp.float32, "highest", 64, False),
        (jnp.float32, None, 128, False),
    ],
)
def test_memories_that_do_not_fit_on_chip_are_refused(dtype, precision, width, fits):
    op, (x, *rest) = self_referential_call(chunk=64, width=width, dtype=dtype, momentum=True)

    def shape():
        with jax.default_matmul_precision(precision):
            return jax.eval_shape(lambda x: op(x, *rest, KERNEL)[0], x)

    if fits:
        assert shape().shape == x.shape
    else:
        with pytest.raises(ValueError, match=r"with \d+ features of 4 memories with momentum"):
            shape()


def test_an_older_gpu_has_less_on_chip_memory(monkeypatch):
    plan = Plan(
        memories=("k", "v", "memory"), gates=(), objective="dot", erases="state", anchor=True,
        normalize=True, targets="self", read="token", write_max=1.0, chunk=64, segmented=False,
        holds=False, operand=jnp.dtype(jnp.bfloat16),
    )  # fmt: skip
    device = SimpleNamespace(
        platform="gpu", compute_capability="8.9", shared_memory_per_block_optin=101376
    )
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert [gpu.fits(plan, plan.operand, width) for width in (64, 128)] == [True, False]
    assert not gpu.fits(plan._replace(momentum=True), plan.operand, 16)


def test_a_mesh_of_several_devices_is_refused():
    normal = normals(5)
    arrays = [normal(8, 16, 1, 16) for _ in range(3)] + [normal(8, 16, 1) for _ in range(2)]
    with (
        sharding.use(sharding.MeshConfig().build()),
        pytest.raises(ValueError, match="not split over devices, got a mesh of 8"),
    ):
        fast_kv(*arrays, chunk=16, form=KERNEL)

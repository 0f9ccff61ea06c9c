"""Self-referential memories: the forms are one function, it is the written one, and it stays."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.modules.self_reference import SelfModifyingTitansConfig
from hope_jax.ops.fastkv import fast_kv
from hope_jax.ops.selfref import ADAPTIVE, GATES, SelfReferentialMemory, Slow, self_referential

close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
LONG = {"xla_backend_optimization_level": 1}  # what runs for seconds is worth more compiling


def random_call(
    *,
    adaptive=ADAPTIVE,
    deep=(),
    momentum=False,
    carried=False,
    starts=False,
    gates="open",
    tokens="random",
    batch=2,
    time=13,
    heads=2,
    width=4,
    hidden=5,
    seed=0,
    **options,
):
    """Arrays `(x, slow, initial, memory)` and options of one random call."""
    random = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape))  # noqa: E731
    gate = {"open": 1.0, "bounds": 1e4}[gates]

    def projected(name):
        drawn = (
            gate * normal(batch, time, heads)
            if name in GATES
            else normal(batch, time, heads, width)
        )
        return None if name in adaptive else drawn

    def matrices(name, *batch):
        outputs = 1 if name in GATES else width
        if name in deep:
            return 0.6 * normal(*batch, heads, outputs, hidden), normal(
                *batch, heads, hidden, width
            )
        return (0.6 * normal(*batch, heads, outputs, width),)

    names = (*adaptive, "memory")
    x = normal(batch, time, heads, width)
    if tokens == "alike":
        x = x[:, :1] + 0.01 * x
    slow = Slow(
        *(projected(name) for name in ADAPTIVE),
        gate * normal(batch, time, heads) if momentum else None,
        gate * normal(heads),
        2 + gate * normal(heads),
    )
    memory = None
    if carried:
        state, rate, held = ({name: matrices(name, batch) for name in names} for _ in range(3))
        memory = SelfReferentialMemory(jnp.int32(3), state, rate if momentum else None, held)
    where = jnp.asarray(random.random((batch, time)) < 0.15) if starts else None
    return (x, slow, {name: matrices(name) for name in names}, memory), {"starts": where} | options


def outputs_and_gradients(arrays, form, **options):
    """Values of everything that comes out, and gradients of everything real that goes in."""

    def loss(arrays):
        x, slow, initial, memory = arrays
        if memory is not None:
            memory = SelfReferentialMemory(jnp.int32(3), *memory)
        y, memory = self_referential(x, slow, initial, memory, form=form, **options)
        leaves = jax.tree.leaves((y, memory[1:]))
        return sum(jnp.sum(jnp.sin(leaf + i)) for i, leaf in enumerate(leaves)), (y, memory)

    x, slow, initial, memory = arrays
    arrays = (x, slow, initial, None if memory is None else tuple(memory[1:]))
    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return outputs, gradients


C1_1 = {"chunk_memory": 1, "chunk_projections": 1}
C1_16 = {"chunk_memory": 1, "chunk_projections": 16}
C2_4 = {"chunk_memory": 2, "chunk_projections": 4}
C4_4 = {"chunk_memory": 4, "chunk_projections": 4}
C16_16 = {"chunk_memory": 16, "chunk_projections": 16}
C16_64 = {"chunk_memory": 16, "chunk_projections": 64}
C64_64 = {"chunk_memory": 64, "chunk_projections": 64}

CASES = {
    "all adaptive": {**C4_4, "starts": True},
    "all adaptive, damped, carried": {**C2_4, "momentum": True, "starts": True, "carried": True},
    "stopped": {**C4_4, "adaptive": ("k", "eta"), "inner_gradient": "stop", "momentum": True},
    "all frozen": {**C1_1, "adaptive": ()},
    "all frozen, one long chunk": {**C64_64, "adaptive": (), "time": 70, "batch": 1, "heads": 1},
    "k": {**C16_16, "adaptive": ("k",), "momentum": True, "time": 7},
    "k, long": {**C16_64, "adaptive": ("k",), "time": 70, "batch": 1, "starts": True},
    "v": {**C1_16, "adaptive": ("v",), "objective": "l2", "time": 17},
    "q": {**C2_4, "adaptive": ("q",), "deep": ("q",), "carried": True},
    "eta": {**C4_4, "adaptive": ("eta",), "anchor": False, "starts": True, "carried": True},
    "alpha": {**C4_4, "adaptive": ("alpha",), "deep": ("alpha",), "momentum": True},
    "deep": {
        **C2_4,
        "adaptive": ("eta",),
        "deep": ("eta", "memory"),
        "objective": "l2",
        "momentum": True,
        "starts": True,
        "carried": True,
    },
    "deep, not anchored": {
        **C4_4,
        "adaptive": ("v",),
        "deep": ("v", "memory"),
        "anchor": False,
        "starts": True,
        "read": "current",
    },
    "deep, stopped": {
        **C4_4,
        "adaptive": ("k",),
        "deep": ("k", "memory"),
        "objective": "l2",
        "inner_gradient": "stop",
    },
    "deep beside linear": {**C4_4, "adaptive": ("k", "v"), "deep": ("k",), "read": "chunk"},
    "no delta term": {
        **C4_4,
        "adaptive": ("k",),
        "deep": ("memory",),
        "dgd": False,
        "read": "chunk",
        "starts": True,
        "carried": True,
    },
    "not anchored, damped, own write": {
        **C2_4,
        "adaptive": ("k",),
        "anchor": False,
        "momentum": True,
        "starts": True,
        "carried": True,
        "read": "current",
    },
    "values as they are": {
        **C4_4,
        "adaptive": ("k",),
        "targets": "value",
        "normalize_targets": False,
        "objective": "l2",
        "write_max": 2.0,
    },
    "gates at their bounds": {
        **C4_4,
        "adaptive": ("k",),
        "momentum": True,
        "gates": "bounds",
        "starts": True,
    },
    "keys that are alike": {**C16_16, "adaptive": ("k", "v"), "tokens": "alike", "time": 33},
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CASES)
def test_chunks_equal_the_recurrence_in_values_and_all_gradients(case):
    arrays, options = random_call(**CASES[case])
    expected = outputs_and_gradients(arrays, "reference", **options)
    got = outputs_and_gradients(arrays, "chunked", **options)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    jax.tree.map(close, got, expected)


@pytest.mark.parametrize(
    "case",
    [{}, {"adaptive": ("v", "eta"), "deep": ("v", "eta", "memory")}],
    ids=["linear", "deep"],
)
def test_reads_teach_every_initial_state_and_every_bias(case):
    (x, slow, initial, _), options = random_call(momentum=True, **case, **C4_4)

    def loss(slow, initial):
        return jnp.sum(self_referential(x, slow, initial, **options)[0] ** 2)

    for path, leaf in jax.tree.leaves_with_path(jax.jit(jax.grad(loss, (0, 1)))(slow, initial)):
        assert (leaf != 0).any(), jax.tree_util.keystr(path)


@pytest.mark.parametrize("deep", [(), ("memory",)], ids=["linear", "deep"])
def test_chunks_equal_the_recurrence_in_float32(deep):
    arrays, options = random_call(adaptive=("k",), deep=deep, time=40, **C16_16)
    expected = outputs_and_gradients(arrays, "reference", **options)
    got = outputs_and_gradients(arrays, "chunked", **options)
    scale = lambda tree: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))  # noqa: E731
    for part, expected_part in zip(got, expected, strict=True):
        tolerance = 1e-5 * scale(expected_part)
        jax.tree.map(partial(close, rtol=1e-4, atol=tolerance), part, expected_part)


def written_once_more(x, slow, initial, *, starts, chunk_memory, chunk_projections, **options):
    """The equations of the page in plain loops over rows, heads and tokens."""
    unit = lambda x: x / jnp.sqrt(x @ x + 1e-6)  # noqa: E731
    sigmoid = lambda x: 1 / (1 + jnp.exp(-x))  # noqa: E731
    stop = jax.lax.stop_gradient if options["inner_gradient"] == "stop" else lambda x: x
    l2, anchor, delta = options["objective"] == "l2", options["anchor"], options["dgd"]

    def run(name, layers, x):
        if len(layers) == 1:
            return layers[0] @ x
        z = layers[1] @ x
        return (0 if name in GATES else x) + layers[0] @ (z * sigmoid(z))

    def loss(layers, name, key, target):
        y = run(name, layers, key)
        return (y - target) @ (y - target) / 2 if l2 else -(y @ target)

    def head(row, h):
        zero = {name: tuple(m[h] for m in layers) for name, layers in initial.items()}
        state, reads = zero, []
        momentum = jax.tree.map(jnp.zeros_like, zero)
        held = {}
        for t in range(x.shape[1]):
            for name in zero:
                chunk = chunk_memory if name == "memory" else chunk_projections
                if t % chunk == 0:
                    held[name] = state[name]
            if starts is not None and starts[row, t]:
                state, held = zero, dict(zero)
                momentum = jax.tree.map(jnp.zeros_like, zero)
            said = {
                name: run(name, held[name], x[row, t, h])
                if getattr(slow, name) is None
                else jnp.atleast_1d(getattr(slow, name)[row, t, h])
                for name in ADAPTIVE
            }
            key, value, query = unit(said["k"]), said["v"], unit(said["q"])
            eta = options["write_max"] * sigmoid(said["eta"][0] + slow.eta_bias[h])
            alpha = sigmoid(said["alpha"][0] + slow.alpha_bias[h])
            beta = 0.0 if slow.beta is None else sigmoid(slow.beta[row, t, h])
            after, moved = {}, {}
            for name in zero:
                target = value if options["targets"] == "value" else run(name, held[name], value)
                if options["normalize_targets"]:
                    target = target / jnp.sqrt(1 + target**2) if name in GATES else unit(target)
                gradient = jax.grad(loss)(*stop((held[name],)), name, stop(key), stop(target))
                inputs = [stop(key)]
                if len(zero[name]) == 2:
                    z = stop(held[name][1]) @ stop(key)
                    inputs = [z * sigmoid(z), stop(key)]
                after[name], moved[name] = [], []
                for i, k in enumerate(inputs):
                    m, m0, s = state[name][i], zero[name][i], momentum[name][i]
                    step = eta / (1 + eta * (k @ k)) if len(inputs) == 2 else eta
                    damping = 1.0 if slow.beta is None else 1 - beta
                    s = beta * s - damping * step * gradient[i]
                    base = m0 if anchor else 0 * m0
                    m = base + alpha * (m - base) - delta * step * jnp.outer(m @ k, k) + s
                    after[name].append(m)
                    moved[name].append(s)
            seen = {"token": state, "current": after, "chunk": held}[options["read"]]
            reads.append(run("memory", seen["memory"], query))
            state, momentum = after, moved
        return jnp.stack(reads), state

    heads = [[head(row, h) for h in range(x.shape[2])] for row in range(x.shape[0])]
    y = jnp.stack([jnp.stack([y for y, _ in row], 1) for row in heads])
    states = [jax.tree.map(lambda *m: jnp.stack(m), *(state for _, state in row)) for row in heads]
    return y, jax.tree.map(lambda *m: jnp.stack(m), *states)


DEFAULTS = {
    "objective": "dot",
    "dgd": True,
    "anchor": True,
    "normalize_targets": True,
    "targets": "self",
    "read": "token",
    "inner_gradient": "full",
    "write_max": 1.0,
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "case",
    [
        {},
        {
            "adaptive": ("v", "alpha"),
            "starts": True,
            "objective": "l2",
            "momentum": True,
            "anchor": False,
            "read": "current",
        },
        {"adaptive": ("eta",), "deep": ("eta", "memory"), "momentum": True},
        {
            "adaptive": ("k",),
            "deep": ("k",),
            "objective": "l2",
            "inner_gradient": "stop",
            "read": "chunk",
        },
        {"adaptive": ("k",), "targets": "value", "dgd": False, "write_max": 2.0},
    ],
    ids=str,
)
def test_recurrence_is_the_written_equation(case):
    arrays, options = random_call(batch=1, heads=1, time=5, **C2_4, **case)
    if options["starts"] is not None:
        options["starts"] = np.array([[0, 1, 0, 1, 0]], bool)
    weights = jax.random.normal(jax.random.key(9), (1, 5, 1, 4))

    def loss(form, arrays):
        y, state = form(*arrays)
        return jnp.sum(weights * y), (y, state)

    def reference(x, slow, initial):
        starts = jax.tree.map(jnp.asarray, options["starts"])
        given = options | {"starts": starts, "form": "reference"}
        y, memory = self_referential(x, slow, initial, **given)
        return y, memory.state

    def by_hand(x, slow, initial):
        y, state = written_once_more(x, slow, initial, **(DEFAULTS | options))
        return y, {name: tuple(layers) for name, layers in state.items()}

    got, expected = (
        jax.jit(jax.value_and_grad(partial(loss, form), has_aux=True))(arrays[:3])
        for form in (reference, by_hand)
    )
    jax.tree.map(close, got, expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "case",
    [
        {"adaptive": ("k", "v", "alpha"), "momentum": True},
        {"adaptive": ("k",), "deep": ("k", "memory"), "objective": "l2", "anchor": False},
    ],
    ids=["linear", "deep"],
)
def test_reading_in_pieces_changes_nothing(case):
    (x, slow, initial, _), options = random_call(**case, starts=True, **C2_4)
    starts = options.pop("starts")
    read = jax.jit(partial(self_referential, **options))
    whole, end = jax.jit(partial(self_referential, form="chunked", **options))(
        x, slow, initial, None, starts
    )

    for split in (1,) * 13, (1, 2, 2, 5, 3), (5, 3, 5):
        memory, pieces = None, []
        for stop, length in zip(np.cumsum(split), split, strict=True):
            cut = lambda a: a[:, stop - length : stop] if a.ndim > 1 else a  # noqa: E731
            y, memory = read(*jax.tree.map(cut, (x, slow)), initial, memory, cut(starts))
            pieces.append(y)
        close(jnp.concatenate(pieces, 1), whole)
        jax.tree.map(close, memory, end)


@pytest.mark.parametrize("form", ["reference", "chunked"])
@pytest.mark.parametrize(
    "case",
    [
        {"adaptive": ("k", "v", "eta"), "momentum": True},
        {"adaptive": ("k",), "deep": ("k", "memory"), "objective": "l2", "anchor": False},
    ],
    ids=["linear", "deep"],
)
def test_reads_depend_on_no_later_token_and_on_none_before_the_document(case, form):
    arrays, options = random_call(**case, carried=True, read="current", **C2_4)
    x, slow, initial, memory = arrays
    options["starts"] = jnp.zeros((2, 13), bool).at[0, 6].set(True)

    def loss(x, slow, memory):
        memory = SelfReferentialMemory(jnp.int32(3), *memory)
        y, _ = self_referential(x, slow, initial, memory, form=form, **options)
        return jnp.sum(jnp.sin(y[:, 6:10]))

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(x, slow, tuple(memory[1:]))
    tokens = [leaf for leaf in jax.tree.leaves(gradients[:2]) if leaf.ndim > 1]
    by_token = sum(jnp.abs(leaf).reshape(2, 13, -1).sum(-1) for leaf in tokens)
    assert (by_token[:, 10:] == 0).all()
    assert (by_token[:, 6:10] > 0).all()
    assert (by_token[0, :6] == 0).all()
    assert (by_token[1, :6] > 0).all()
    for leaf in jax.tree.leaves(gradients[2]):
        assert (leaf[0] == 0).all()
    assert any((leaf[1] != 0).any() for leaf in jax.tree.leaves(gradients[2]))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ({}, jnp.float32),
        ({}, jnp.bfloat16),
        ({"momentum": True}, jnp.float32),
        ({"momentum": True}, jnp.bfloat16),
        ({"adaptive": ("k", "alpha"), "deep": ("k", "alpha", "memory")}, jnp.bfloat16),
    ],
    ids=["float32", "bfloat16", "damped-float32", "damped-bfloat16", "deep-bfloat16"],
)
def test_a_hundred_thousand_tokens_leave_norms_where_they_were(case, dtype):
    """Rows: random, constant, and a few tokens in endless repetition."""
    width, length, pieces = 16, 5000, 20
    (x, slow, initial, _), options = random_call(
        batch=3, heads=1, time=length, width=width, hidden=width, **case
    )
    options |= {"chunk_memory": 64, "chunk_projections": 64, "form": "chunked"}
    initial = jax.tree.map(lambda m: m / m.shape[-1] ** 0.5, initial)
    slow = slow._replace(eta_bias=jnp.zeros(1), alpha_bias=jnp.full(1, 4.6))
    repeated = jnp.tile(x[2:, :10], (1, length // 10, 1, 1))
    x = jnp.concatenate([x[:1], jnp.broadcast_to(x[1:2, :1], x[1:2].shape), repeated])
    x, slow = jax.tree.map(lambda a: a.astype(dtype), (x, slow))

    def piece(memory, key):
        own = x.at[0].set(jax.random.normal(key, x.shape[1:], dtype))
        y, memory = self_referential(own, slow, initial, memory, **options)
        norms = {
            name: sum(jnp.sum(m**2, (1, 2, 3)) for m in layers) ** 0.5
            for name, layers in memory.state.items()
        }
        return memory, (norms, jnp.isfinite(y).all())

    @partial(jax.jit, compiler_options=LONG)
    def stream(keys):
        _, fresh = self_referential(x[:, :1], *jax.tree.map(first, (slow,)), initial, **options)
        return jax.lax.scan(piece, fresh, keys)[1]

    first = lambda a: a[:, :1] if a.ndim > 1 else a  # noqa: E731
    norms, finite = stream(jax.random.split(jax.random.key(1), pieces))
    assert finite.all()
    for name, layers in initial.items():
        begin = sum(jnp.sum(m**2) for m in layers) ** 0.5
        assert (norms[name] < 10 * begin).all(), name
        assert (norms[name] > begin / 10).all(), name


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("chunk", [1, 16])
def test_with_everything_frozen_it_is_the_delta_rule(chunk):
    (x, slow, initial, _), options = random_call(adaptive=(), starts=True)
    initial = jax.tree.map(jnp.zeros_like, initial)
    y, memory = self_referential(
        x, slow, initial, None, options["starts"], chunk_memory=chunk, chunk_projections=chunk,
        anchor=False, targets="value", normalize_targets=False, read="current", form="chunked",
    )  # fmt: skip
    unit = lambda x: x / jnp.sqrt(jnp.sum(x**2, -1, keepdims=True) + 1e-6)  # noqa: E731
    expected, end = fast_kv(
        unit(slow.q), unit(slow.k), slow.v, jax.nn.sigmoid(slow.alpha + slow.alpha_bias),
        jax.nn.sigmoid(slow.eta + slow.eta_bias), None, options["starts"], rule="delta",
        form="reference",
    )  # fmt: skip
    close(y, expected, rtol=1e-6, atol=1e-6)
    close(memory.state["memory"][0], end.state, rtol=1e-6, atol=1e-6)


def test_bfloat16_inputs_leave_float32_memories():
    arrays, options = random_call(adaptive=("k", "alpha"), **C4_4)
    expected, _ = self_referential(*arrays, **options)
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), arrays[:2])
    y, memory = self_referential(*low, *arrays[2:], **options)
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(memory[1:]))
    close(y.astype(jnp.float32), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "l1"}, "objective must be one of dot, l2, got l1"),
        ({"read": "late"}, "read must be one of token, chunk, current, got late"),
        ({"chunk_memory": 3}, "chunk_projections must be a multiple of chunk_memory 3, got 4"),
        ({"targets": "value"}, "targets must be self for adaptive eta or alpha"),
        ({"form": "fast"}, "must be one of auto, .*chunked, pallas_token, reference, got fast"),
        ({"initial": {}}, r"initial must have what slow leaves out, \['eta', 'memory'\], got"),
        ({"initial": {"eta": (jnp.zeros((2, 4, 4)),)}}, r"initial\[eta\] must have 1 outputs"),
        ({"initial": {"memory": (jnp.zeros((2, 4, 3)),)}}, r"initial\[memory\] must lead from"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_clear_error(change, message):
    (x, slow, initial, _), options = random_call(adaptive=("eta",), **C4_4)
    change = dict(change)
    initial = {**initial, **change["initial"]} if change.get("initial") else initial
    initial = {} if change.pop("initial", None) == {} else initial
    with pytest.raises(ValueError, match=message):
        # Unwrapped, for what checks types in these tests would be the first to see it.
        inspect.unwrap(self_referential)(x, slow, initial, **(options | change))


def test_the_first_tokens_of_a_long_text_have_no_exploding_gradient():
    layer = SelfModifyingTitansConfig(heads=1).build(64, depth=1, key=jax.random.key(0))
    x, slope = jax.random.normal(jax.random.key(1), (2, 1, 4096, 64))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(layer(x)[0] * slope)))(x)
    sizes = jnp.linalg.norm(gradient[0], axis=-1)
    assert sizes[:64].mean() < 20 * sizes[-64:].mean()


def test_where_gates_start_makes_up_for_short_inputs():
    layer = SelfModifyingTitansConfig(heads=2).build(32, depth=1, key=jax.random.key(0))
    states = layer.initial_memory(1, jnp.dtype("float32")).fast.state
    for name, (matrix,) in states.items():
        times = 4 if name in GATES else 1  # the root of 16 features
        np.testing.assert_array_equal(matrix[0], times * layer.initial[name][0][...])

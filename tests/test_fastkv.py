"""Every rule of FastKV is its equation in every form, streams, and keeps apart what it should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.ops.fastkv import FEATURE_MAPS, FORMS, FastKVMemory, empty_memory, fast_kv
from hope_jax.ops.rules import RULES

BATCH, HEADS, KEYS, VALUES = 2, 2, 4, 3
WEIGHED = {"rule": "hebbian", "feature_map": "softmax", "normalizer": True}
CASES = {rule: {"rule": rule} for rule in RULES} | {"weighed": WEIGHED}
FAST = [name for name in FORMS if name != "reference" and FORMS[name].platforms is None]

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
fast_forms = pytest.mark.parametrize("form", FAST)
jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)  # Compilation is what these tests wait for.


def random_call(time, case, seed=0):
    """Arguments of `fast_kv`: correlated keys and values, some gates at 0 or 1, with starts."""
    random = np.random.default_rng(seed)

    def vectors(width):
        x = random.normal(size=(BATCH, time, HEADS, width)) + random.normal(size=width)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def gate(low):
        x = random.uniform(low, 1, size=(BATCH, time, HEADS))
        return np.where(random.random(x.shape) < 0.15, np.round(x - low / 2), x)

    state = random.normal(size=(BATCH, HEADS, VALUES, KEYS))
    weight = random.random((BATCH, HEADS, KEYS)) if case.get("normalizer") else None
    starts = random.random((BATCH, time)) < 2 / time
    arrays = vectors(KEYS), vectors(KEYS), vectors(VALUES), gate(0.8), gate(0.0)
    return jax.tree.map(jnp.asarray, (*arrays, FastKVMemory(state, weight), starts))


def by_hand(q, k, v, retain, write, memory, starts, rule):
    """The rules written out a second time; with a normalizer where the memory has one."""
    state = np.array(memory.state)
    weight = np.zeros(k.shape[:1] + k.shape[2:]) if memory[1] is None else np.array(memory[1])
    y = np.zeros(v.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        a, w, key, value = retain[b, t, h], write[b, t, h], k[b, t, h], v[b, t, h]
        old, held = (0 * m[b, h] if starts[b, t] else m[b, h] for m in (state, weight))
        told = {
            "hebbian": np.outer(value, key),
            "delta": np.outer(value - old @ key, key),
            "gated_delta": np.outer(value - a * old @ key, key),
            "oja": np.outer(value, key) - np.outer(value, value) @ old,
        }
        state[b, h] = a * old + w * told[rule]
        weight[b, h] = a * held + w * key
        y[b, t, h] = state[b, h] @ q[b, t, h]
        if memory.normalizer is not None:
            y[b, t, h] /= weight[b, h] @ q[b, t, h] + 1e-6
    return y, FastKVMemory(state, None if memory.normalizer is None else weight)


def run(case, form, chunk=4):
    return jit(functools.partial(fast_kv, form=form, chunk=chunk, **case))


def close(found, expected, tolerance):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "case", [*CASES.values(), *(WEIGHED | {"feature_map": m} for m in ("elu", "relu"))]
)
def test_the_reference_is_the_equation(case):
    call = random_call(9, case)
    features = FEATURE_MAPS[case.get("feature_map", "identity")]
    q, k, *rest = call
    expected = by_hand(*jax.tree.map(np.asarray, (features(q), features(k), *rest)), case["rule"])
    close(run(case, "reference")(*call), expected, 1e-11)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "time", "chunk"),
    [("hebbian", 9, 1), ("delta", 9, 1), ("hebbian", 128, 64), ("delta", 128, 64)]
    + [(name, 37, 16) for name in CASES],
)
def test_forms_equal_the_reference_in_values_and_all_gradients(name, time, chunk):
    *arrays, memory, starts = random_call(time, CASES[name])

    def values_and_gradients(form):
        def loss(arrays, memory):
            out = fast_kv(*arrays, memory, starts, chunk=chunk, form=form, **CASES[name])
            return sum(jnp.sum(jnp.sin(3 * leaf)) for leaf in jax.tree.leaves(out)), out

        return jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(arrays, memory)

    expected = values_and_gradients("reference")
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(expected))
    for form in FAST:
        close(values_and_gradients(form), expected, 1e-9)


@every_case
def test_any_split_of_the_stream_changes_nothing(case):
    *arrays, memory, starts = random_call(15, case)
    expected = run(case, "reference")(*arrays, memory, starts)
    single = run(case, "auto")
    for form in FAST:
        read = run(case, form, chunk=6)
        close(read(*arrays, memory, starts), expected, 2e-5)
        for reader, cuts in ((read, [5, 10]), (single, list(range(1, 15)))):
            carried, parts = memory, []
            for part in zip(*(jnp.split(x, cuts, 1) for x in (*arrays, starts)), strict=True):
                y, carried = reader(*part[:-1], carried, part[-1])
                parts.append(y)
            close((jnp.concatenate(parts, 1), carried), expected, 2e-5)


@pytest.mark.parametrize("case", [CASES["delta"], CASES["oja"], WEIGHED])
@fast_forms
def test_nothing_crosses_time_backwards_a_start_or_a_row(case, form):
    *arrays, memory, _ = random_call(12, case)
    start, late = 6, 8
    starts = jnp.zeros((BATCH, 12), bool).at[0, start].set(True)

    def row(arrays, memory):
        y, _ = fast_kv(*arrays, memory, starts, chunk=4, form=form, **case)
        return y[0].sum((1, 2))

    to_arrays, to_memory = jit(jax.jacrev(row, (0, 1)))(arrays, memory)
    for slope in to_arrays:
        assert (slope[:, 1] == 0).all()
        by_token = jnp.abs(slope[:, 0]).reshape(12, 12, -1).sum(-1)
        assert (jnp.triu(by_token, 1) == 0).all()
        assert (by_token[start:, :start] == 0).all()
        assert by_token[start - 1].any()
        assert by_token[late].any()
    for slope in jax.tree.leaves(to_memory):
        assert (slope[:, 1] == 0).all()
        assert (slope[start:] == 0).all()
        assert (slope[start - 1] != 0).any()


@pytest.mark.parametrize("rule", ["delta", "gated_delta"])
def test_a_delta_rule_replaces_what_a_key_recalls(rule):
    keys = jnp.eye(KEYS)[jnp.array([0, 1, 2, 0])][None, :, None]
    values = jax.random.normal(jax.random.key(0), (1, 4, 1, VALUES))
    gate = jnp.ones((1, 4, 1))
    _, memory = run({"rule": rule}, "auto")(keys, keys, values, gate, gate)
    close(memory.state[0, 0, :, :3].T, values[0, jnp.array([3, 1, 2]), 0], 1e-6)


@pytest.mark.parametrize("rule", ["delta", "oja"])
@pytest.mark.usefixtures("x64")
def test_one_token_repeated_2000_times_leaves_every_form_exact(rule):
    token = jax.tree.map(lambda x: x.astype(jnp.float32), random_call(1, {})[:5])
    q, k, v, _, write = (jnp.repeat(x, 2000, 1) for x in token)
    call = q, k, v, jnp.full_like(write, 0.999), jnp.full_like(write, 0.9)
    exact = run({"rule": rule}, "reference")(*(x.astype(jnp.float64) for x in call))
    for form in FAST:
        close(run({"rule": rule}, form, 64)(*call), exact, 2e-5)


def test_bfloat16_values_come_back_as_bfloat16_from_a_float32_memory():
    arrays = [x.astype(jnp.bfloat16) for x in random_call(9, WEIGHED)[:5]]
    y, memory = run(WEIGHED, "chunked")(*arrays)
    exact, _ = run(WEIGHED, "reference")(*(x.astype(jnp.float32) for x in arrays))
    assert y.dtype == jnp.bfloat16
    assert memory.state.dtype == memory.normalizer.dtype == jnp.float32
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "gamma"}, "rule must be one of hebbian, delta, gated_delta, oja, got gamma"),
        ({"feature_map": "exp"}, "feature_map must be one of identity, elu, .*, got exp"),
        ({"normalizer": True}, "normalizer needs a feature map that is never negative"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"form": "quick"}, "form must be one of auto, .*chunked, .*, got quick"),
        ({"feature_map": "relu", "normalizer": True}, "memory must hold a normalizer exactly if"),
    ],
)
def test_a_bad_option_is_named_with_the_choices(options, message):
    *arrays, _, starts = random_call(3, {})
    empty = empty_memory(BATCH, HEADS, VALUES, KEYS)
    with pytest.raises(ValueError, match=message):
        fast_kv(*arrays, empty, starts, **options)

"""Every rule of FastKV is its equation in every form, streams, and keeps what it should apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.ops.fastkv import FEATURE_MAPS, FORMS, FastKVMemory, empty_memory, fast_kv
from hope_jax.ops.rules import RULES

BATCH, HEADS, KEYS, VALUES = 2, 2, 4, 3
POSITIVE = {rule: "identity" if rule.endswith("delta") else "softmax" for rule in RULES}

every_rule = pytest.mark.parametrize("rule", RULES)
every_form = pytest.mark.parametrize("form", FORMS)
fast_forms = pytest.mark.parametrize("form", [form for form in FORMS if form != "reference"])


def random_call(time, seed=0):
    """Arguments of `fast_kv`: keys and values correlated, gates also at 0 and 1, with starts."""
    random = np.random.default_rng(seed)

    def vectors(width):
        x = random.normal(size=(BATCH, time, HEADS, width)) + random.normal(size=width)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def gate(low):
        x = random.uniform(low, 1, size=(BATCH, time, HEADS))
        return np.where(random.random(x.shape) < 0.15, np.round(x - low / 2), x)

    memory = FastKVMemory(
        random.normal(size=(BATCH, HEADS, VALUES, KEYS)), random.random((BATCH, HEADS, KEYS))
    )
    starts = random.random((BATCH, time)) < 2 / time
    call = vectors(KEYS), vectors(KEYS), vectors(VALUES), gate(0.8), gate(0.0), memory, starts
    return jax.tree.map(jnp.asarray, call)


def equation(q, k, v, retain, write, memory, starts, rule):
    """The rules, written out for numpy."""
    state, weight = map(np.array, memory)
    y = np.zeros(v.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        a, w, key, value = retain[b, t, h], write[b, t, h], k[b, t, h], v[b, t, h]
        old = np.zeros_like(state[b, h]) if starts[b, t] else state[b, h]
        old_weight = np.zeros_like(key) if starts[b, t] else weight[b, h]
        write_of = {
            "hebbian": lambda: np.outer(value, key),
            "delta": lambda: np.outer(value - old @ key, key),
            "gated_delta": lambda: np.outer(value - a * old @ key, key),
            "oja": lambda: np.outer(value, key) - np.outer(value, value) @ old,
        }
        state[b, h] = a * old + w * write_of[rule]()
        weight[b, h] = a * old_weight + w * key
        y[b, t, h] = state[b, h] @ q[b, t, h]
        if POSITIVE[rule] != "identity":
            y[b, t, h] /= weight[b, h] @ q[b, t, h] + 1e-6
    return y, state, weight


def options(rule):
    """Rules that suit a normalizer are tested with one."""
    return {
        "rule": rule,
        "feature_map": POSITIVE[rule],
        "normalizer": POSITIVE[rule] != "identity",
    }


def fit(memory, rule):
    return memory if options(rule)["normalizer"] else memory._replace(normalizer=None)


@functools.partial(jax.jit, static_argnames=("rule", "chunk", "form"))
def values_and_gradients(call, *, rule, chunk, form):
    """Everything that comes out, and the gradient of some function of it in everything put in."""
    *arrays, memory, starts = call

    def loss(arrays, memory):
        out = fast_kv(*arrays, memory, starts, chunk=chunk, form=form, **options(rule))
        leaves = jax.tree.leaves(out)
        return sum(jnp.sum(jnp.sin(3 * leaf)) for leaf in leaves), out

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(arrays, memory)


@functools.partial(jax.jit, static_argnames=("rule", "chunk", "form"))
def outputs(call, *, rule, chunk=4, form="chunked"):
    return fast_kv(*call, chunk=chunk, form=form, **options(rule))


def fitted(call, rule):
    *arrays, memory, starts = call
    return (*arrays, fit(memory, rule), starts)


@pytest.mark.usefixtures("x64")
@every_rule
def test_the_reference_is_the_equation(rule):
    q, k, v, retain, write, memory, starts = random_call(9)
    y, after = outputs(
        (q, k, v, retain, write, fit(memory, rule), starts), rule=rule, form="reference"
    )
    q, k = (FEATURE_MAPS[POSITIVE[rule]](x) for x in (q, k))
    call = jax.tree.map(np.asarray, (q, k, v, retain, write, memory, starts))
    expected = equation(*call, rule)
    np.testing.assert_allclose(y, expected[0], rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(after.state, expected[1], rtol=1e-11, atol=1e-11)
    if after.normalizer is not None:
        np.testing.assert_allclose(after.normalizer, expected[2], rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("x64")
@every_rule
@fast_forms
@pytest.mark.parametrize(("time", "chunk"), [(9, 1), (37, 16), (11, 64), (128, 64)])
def test_forms_equal_the_reference_in_values_and_all_gradients(rule, form, time, chunk):
    call = fitted(random_call(time), rule)
    found = values_and_gradients(call, rule=rule, chunk=chunk, form=form)
    expected = values_and_gradients(call, rule=rule, chunk=chunk, form="reference")
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), found, expected
    )
    assert all((jnp.abs(leaf) > 0).any() for leaf in jax.tree.leaves(found[1]))

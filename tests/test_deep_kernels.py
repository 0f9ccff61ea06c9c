"""Kernels for memories that are MLPs, interpreted: the reference's values and all its gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from test_kernels import GATES, TPU, assert_same, normals, self_referential_call, starts_of

from hope_jax.ops.titans import titans


def call(hidden=32, **options):
    """`self_referential_call` with an MLP for each memory."""
    op, (x, slow, initial, biases, states) = self_referential_call(**options)
    normal = normals(3)

    def widen(matrices):
        (m,) = matrices
        *front, out, width = m.shape
        return normal(*front, out, hidden) / hidden**0.5, normal(*front, hidden, width) / 4

    deep = {name: widen(m) for name, m in initial.items()}
    if states is not None:
        states = [{name: widen(m) for name, m in state.items()} for state in states]
    return op, (x, slow, deep, biases, states)


def titans_call(time, starts, hidden=32, width=16):
    normal, batch, heads = normals(4), 2, 2
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    q, k, v = (normal(batch, time, heads, width) for _ in range(3))
    gates = [jax.nn.sigmoid(normal(batch, time, heads) + shift) for shift in (3, 0, 0)]
    initial = normal(heads, width, hidden) / 4, normal(heads, hidden, width) / 4

    def op(q, k, v, gates, initial, form):
        y, memory = titans(q, k, v, *gates, initial, None, starts, chunk=16, form=form)
        return y, memory[1:]

    return op, (unit(q), unit(k), v, gates, initial)


CASES = {
    "goes on inside a chunk, odd length, starts, momentum": {
        "heads": 1,
        "momentum": True,
        "position": 5,
        "starts": starts_of(20),
        "time": 20,
    },
    "goes on inside a chunk, l2, no anchor": {
        "batch": 1,
        "position": 21,
        "time": 20,
        "starts": starts_of(20, batch=1),
        "objective": "l2",
        "anchor": False,
    },
    "gates at their bounds, momentum": {
        "batch": 1,
        "time": 20,
        "momentum": True,
        "frozen": ("q", *GATES),
        "gate": 100.0,
        "write_max": 2.0,
    },
    "everything adapts, correlated tokens, goes on at a chunk's start, own writes are read": {
        "batch": 1,
        "heads": 1,
        "position": 16,
        "time": 32,
        "frozen": (),
        "correlated": 5.0,
        "read": "current",
        "hidden": 64,
    },
    "chunk's start is read, values as targets, nothing is erased": {
        "batch": 1,
        "time": 5,
        "read": "chunk",
        "frozen": ("q", *GATES),
        "targets": "value",
        "normalize_targets": False,
        "dgd": False,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_kernel_is_the_reference(case):
    assert_same(*call(**CASES[case]), 1e-4, TPU)


def test_titans_kernel_is_the_reference():
    assert_same(*titans_call(starts=starts_of(20), time=20), 1e-4, TPU)


def test_bfloat16_tokens_keep_two_digits():
    op, arguments = call(time=32, batch=1, heads=1, dtype=jnp.bfloat16)
    assert_same(op, arguments, 2e-2, TPU)


@pytest.mark.parametrize(
    ("form", "change", "reason"),
    [
        ("pallas_triton", {}, "on-chip memory does not hold chunks of 16 tokens with 16 features "
         "of 5 memories with 32 hidden units"),
        (TPU, {"hidden": 4096, "width": 128}, "of 5 memories with 4096 hidden units"),
        (TPU, {"hidden": 20}, "a multiple of 8 hidden units, got 20"),
        (TPU, {"group": 2}, "MLPs with one chunk size, got two"),
    ],
)  # fmt: skip
def test_what_the_kernels_do_not_take_is_an_error_that_says_why(form, change, reason):
    op, arguments = call(**change)
    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(partial(op, form=form), *arguments)


def test_memories_of_two_kinds_are_refused():
    op, (x, slow, deep, *rest) = call()
    linear = self_referential_call()[1][2]
    with pytest.raises(ValueError, match="memories of one kind and width"):
        jax.eval_shape(partial(op, form=TPU), x, slow, deep | {"k": linear["k"]}, *rest)

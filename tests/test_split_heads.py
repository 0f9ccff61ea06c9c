"""Heads shared out to several programs: where, and that it is the same function."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernels import KERNEL, assert_same, computed, fast_kv_call, starts_of
from test_kernels import self_referential_call as self_referential

from hope_jax.ops import fastkv
from hope_jax.ops.pallas import gpu

PLAN = fastkv._plan("delta", 16, jnp.float32)


@pytest.fixture(autouse=True)
def narrow_ones_too(monkeypatch):
    monkeypatch.setattr(gpu, "WIDE", 32)


@pytest.mark.parametrize(
    ("heads", "values", "split"),
    [
        ((1, 1), 16, 1), ((1, 1), 32, 2), ((1, 1), 64, 4), ((1, 1), 128, 8),
        ((1, 16), 128, 8), ((1, 17), 128, 4), ((2, 16), 64, 4), ((2, 33), 64, 2),
        ((1, 67), 64, 1), ((8, 16), 64, 1), ((4, 64), 128, 1),
    ],
)  # fmt: skip
def test_few_heads_are_split_as_far_as_multiprocessors_go(heads, values, split):
    assert gpu.split_of(PLAN, *heads, values) == split


def test_narrow_heads_are_not_split(monkeypatch):
    monkeypatch.setattr(gpu, "WIDE", 128)
    assert [gpu.split_of(PLAN, 1, 16, values) for values in (64, 128)] == [1, 8]


@pytest.mark.parametrize(
    "change",
    [
        {"memories": ("k", "memory")}, {"gates": ("eta",)}, {"targets": "self"},
        {"objective": "l2"}, {"read": "chunk"}, {"normalize": True}, {"momentum": True},
    ],
)  # fmt: skip
def test_heads_whose_rows_need_one_another_are_not_split(change):
    assert gpu.split_of(PLAN._replace(**change), 1, 1, 128) == 1


def grids_of(monkeypatch, op, arguments):
    """The grids of an op's launches, by name."""
    grids, launch = {}, gpu.pl.pallas_call

    def spy(kernel, *, name, grid, **how):
        grids[name] = grid
        return launch(kernel, name=name, grid=grid, **how)

    monkeypatch.setattr(gpu.pl, "pallas_call", spy)
    jax.eval_shape(partial(computed, op, form=KERNEL), arguments)
    return grids


@pytest.mark.parametrize(("multiprocessors", "split"), [(15, 2), (16, 4), (3, 1)])
def test_launches_along_time_have_programs_for_parts_of_heads(monkeypatch, multiprocessors, split):
    monkeypatch.setattr(gpu, "MULTIPROCESSORS", multiprocessors)
    grids = grids_of(monkeypatch, *fast_kv_call(values=64))
    assert grids == {
        "memory_forward": (2, 2, split),
        "memory_push_back": (2, 2, split),
        "memory_prepare": (2, 2, 3),
        "memory_recall": (2, 2, 3),
        "memory_unlearn": (2, 2, 3),
    }


def test_a_split_head_of_frozen_projections_is_the_reference():
    call = self_referential(
        frozen=("k", "v", "q", "eta", "alpha"), targets="value", normalize_targets=False,
        position=5, starts=starts_of(37), width=32,
    )  # fmt: skip
    assert_same(*call, 1e-4)


@pytest.mark.parametrize("rule", ["delta", "gated_delta", "hebbian"])
def test_parts_of_a_head_are_the_reference(rule):
    call = fast_kv_call(rule=rule, starts=starts_of(37), memory=True, values=64)
    assert gpu.split_of(PLAN, 2, 2, 64) == 4
    assert_same(*call, 1e-4)


def test_parts_of_a_head_are_what_one_program_computes(monkeypatch):
    op, (*tokens, retain, write, state) = fast_kv_call(
        rule="gated_delta", starts=starts_of(37), memory=True, values=32
    )
    arguments = *(x.astype(jnp.bfloat16) for x in tokens), retain, write, state
    parts = computed(op, arguments, KERNEL)
    monkeypatch.setattr(gpu, "MULTIPROCESSORS", 1)
    whole = computed(op, arguments, KERNEL)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), parts, whole)

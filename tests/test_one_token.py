"""The kernel for single tokens: the function of the recurrence, with memories changed in place."""

import re
from functools import partial

import jax
import pytest
from described import lowered_for
from test_selfref import C1_1, C2_4, C4_4, close, outputs_and_gradients, random_call

from hope_jax.ops.selfref import self_referential

KERNEL = "pallas_token"
CASES = {
    "all adaptive": {**C2_4, "carried": True, "starts": True, "time": 8, "momentum": True},
    "gates, read from the chunk's start": {
        **C4_4,
        "adaptive": ("eta", "alpha"),
        "anchor": False,
        "normalize_targets": False,
        "objective": "l2",
        "read": "chunk",
        "starts": True,
    },
    "nothing erased, own writes are read": {
        **C4_4,
        "adaptive": ("k", "q"),
        "dgd": False,
        "read": "current",
        "targets": "value",
        "write_max": 2.0,
        "carried": True,
    },
    "all frozen, stopped": {**C1_1, "adaptive": (), "inner_gradient": "stop"},
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CASES)
def test_it_equals_the_recurrence_in_values_and_all_gradients(case):
    arrays, options = random_call(**{"time": 6, **CASES[case]})
    expected = outputs_and_gradients(arrays, "reference", **options)
    got = outputs_and_gradients(arrays, KERNEL, **options)
    jax.tree.map(close, got, expected)


def lowered(time=1, form="auto", **options):
    """The program for a GPU that is not there."""
    arrays, options = random_call(time=time, carried=True, starts=True, **options, **C4_4)
    return lowered_for("NVIDIA H100", partial(self_referential, form=form, **options), *arrays)


def test_a_gpu_runs_it_for_one_token_and_changes_every_memory_where_it_lies():
    text = lowered(adaptive=("k", "v", "eta"), momentum=True)
    call = next(line for line in text.splitlines() if "memory_token" in line)
    aliases = re.findall(r"output_tuple_indices = \[(\d+)\],\s*operand_index = (\d+)", call)
    assert sorted(aliases, key=lambda pair: int(pair[0])) == [(str(i), str(i)) for i in range(12)]


@pytest.mark.parametrize("options", [{"time": 2}, {"deep": ("memory",)}], ids=str)
def test_several_tokens_and_deep_memories_are_for_other_forms(options):
    assert "memory_token" not in lowered(**options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"deep": ("memory",)}, "the kernel takes linear memories, got an MLP"),
        ({"width": 12}, "the kernel takes powers of 2 up to 128 features, got 12 and 12"),
    ],
    ids=str,
)
def test_what_it_does_not_take_it_refuses(options, reason):
    arrays, options = random_call(**options, **C4_4)
    with pytest.raises(ValueError, match=f"form {KERNEL} refuses: {reason}"):
        self_referential(*arrays, form=KERNEL, **options)

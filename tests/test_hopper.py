"""What a Hopper GPU runs instead, interpreted with its barriers and copies."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from described import lowered_for
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # public from jax 0.11 on
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from test_kernels import KERNEL, computed, self_referential_call, values_and_gradients

from hope_jax.ops.pallas import gpu, hopper_backward, hopper_forward, hopper_prepare

CASES = {
    "one document": {"time": 256, "batch": 1, "heads": 1},
    "documents begin inside chunks, own writes are read": {
        "time": 128,
        "starts": jnp.zeros((2, 128), bool).at[0, jnp.array([0, 70, 71])].set(True),
        "read": "current",
    },
}


def call(**options):
    """The op at the size that is made for Hopper, with arguments rounded to bfloat16."""
    op, arguments = self_referential_call(width=64, chunk=64, gate=0.5, **options)
    x, slow, *rest = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(a.dtype), arguments)
    narrow = (x.astype(jnp.bfloat16), jax.tree.map(lambda a: a.astype(jnp.bfloat16), slow), *rest)
    return op, (x, slow, *rest), narrow


@pytest.mark.parametrize("case", CASES)
def test_memories_are_undone_as_the_reference_does(case, monkeypatch):
    op, exact, narrow = call(**CASES[case])
    expected = computed(op, exact, "reference")

    def simulated(run):
        watched = InterpretGPUParams(detect_races=True)
        return lambda *arguments, **options: run(*arguments, **options, interpret=watched)

    monkeypatch.setattr(gpu, "on_hopper", lambda: True)
    for module, name in (
        (hopper_forward, "forward"),
        (hopper_prepare, "prepare"),
        (hopper_backward, "unlearn"),
    ):
        monkeypatch.setattr(module, name, simulated(getattr(module, name)))
    got = computed(op, narrow, KERNEL)
    assert not gpu_callbacks.get_races().races_found
    named = jax.tree_util.tree_leaves_with_path(expected)
    for (path, a), b in zip(named, jax.tree.leaves(got), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-6)
        assert error < 2e-2, f"{jax.tree_util.keystr(path)}: {error:.3g}"


@pytest.mark.parametrize("case", CASES)
def test_it_can_be_lowered_where_there_is_no_gpu(case):
    op, _, narrow = call(**CASES[case])
    lowered = lowered_for("NVIDIA H100", partial(values_and_gradients, op, KERNEL), narrow)
    assert "mosaic_gpu" in lowered
    assert all(f"memory_{name}" in lowered for name in ("forward", "prepare", "unlearn"))


@pytest.mark.parametrize(("time", "taken"), [(128, True), (100, False)])
def test_a_stream_of_whole_chunks_takes_them_too(time, taken):
    op, _, narrow = call(position=64, time=time)
    lowered = lowered_for("NVIDIA H100", partial(op, form=KERNEL), *narrow)
    assert ("mosaic_gpu" in lowered) == taken

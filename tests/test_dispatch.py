"""Dispatch takes the fastest form that fits, and says why when it does not."""

import logging

import jax
import pytest
from jax.sharding import AxisType

from hope_jax.ops.dispatch import Form, pick, platform


def fast():
    """Runs on a machine that is not here."""


def narrow():
    """Runs anywhere, for short calls."""


def slow():
    """Runs anywhere."""


def too_long(length):
    return f"length must be at most 4, got {length}" if length > 4 else None


FORMS = {
    "fast": Form(fast, too_long, ("tpu",)),
    "narrow": Form(narrow, too_long),
    "slow": Form(slow),
}


def test_auto_takes_the_first_form_of_this_platform_that_fits():
    assert pick(FORMS, "auto", 3) is narrow
    assert pick(FORMS, "auto", 5) is slow


def test_the_reason_of_a_fallback_is_logged_once(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            pick(FORMS, "auto", 77)
    said = [record.message for record in caplog.records]
    assert said == ["form narrow refuses: length must be at most 4, got 77; taking a slower one"]


def test_a_form_of_another_platform_is_no_fallback_to_log(caplog):
    with caplog.at_level(logging.WARNING):
        pick(FORMS, "auto", 2)
    assert not caplog.records


def test_a_forced_form_runs_on_any_platform_and_its_refusal_is_an_error():
    assert pick(FORMS, "fast", 3) is fast
    with pytest.raises(ValueError, match="form fast refuses: length must be at most 4, got 5"):
        pick(FORMS, "fast", 5)


def test_an_unknown_form_lists_the_choices():
    with pytest.raises(ValueError, match="one of auto, fast, narrow, slow, got quick"):
        pick(FORMS, "quick", 3)


def test_when_nothing_fits_every_reason_comes_back():
    forms = {name: FORMS[name] for name in ("fast", "narrow")}
    everything = "no form fits on cpu: fast: made for tpu; narrow: length must be at most 4, got 9"
    with pytest.raises(ValueError, match=everything):
        pick(forms, "auto", 9)


def test_the_mesh_in_use_decides_the_platform(monkeypatch):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert platform() == "tpu"
    assert pick(FORMS, "auto", 3) is fast

    def traced(x):
        assert platform() == "cpu"
        return x

    with jax.set_mesh(mesh):
        jax.jit(traced)(1.0)
    spec = jax.sharding.PartitionSpec()
    jax.shard_map(traced, mesh=mesh, in_specs=spec, out_specs=spec)(1.0)

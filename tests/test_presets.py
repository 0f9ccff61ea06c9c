"""Presets behave as they are named, and the rule that scales a continuum is the written one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.modules.continuum import (
    PRESETS,
    ContinuumConfig,
    LevelConfig,
    SpreadConfig,
    auto_scale,
)
from hope_jax.ops.continuum import Pace, continuum_level

WIDTH, CHUNK = 6, 8


def behaviour(preset):
    """The error of a map after three chunks that teach it, and what is left of it 40 chunks on."""
    random = np.random.default_rng(0)
    pace = PRESETS[preset]
    momentum = jnp.asarray(pace["momentum"]) if pace["momentum"] else None
    pace = Pace(jnp.asarray(pace["rate"]), jnp.asarray(pace["retain"]), momentum)
    x = jnp.asarray(random.normal(size=(1, 3 * CHUNK, WIDTH)), jnp.float32)
    wanted = jnp.asarray(random.normal(size=(WIDTH, WIDTH)), jnp.float32)
    values = jnp.roll(x @ wanted, 1, axis=1)
    weights = (jnp.zeros((1, WIDTH, WIDTH)),)
    _, memory = continuum_level(x, values, weights, pace, chunk=CHUNK)
    learned = memory.fast.delta[0][0, 0]
    nothing = jnp.zeros((1, 40 * CHUNK, WIDTH))
    _, memory = continuum_level(nothing, nothing, weights, pace, memory, chunk=CHUNK)
    kept = jnp.vdot(memory.fast.delta[0][0, 0], learned) / jnp.vdot(learned, learned)
    return float(jnp.linalg.norm(learned - wanted) / jnp.linalg.norm(wanted)), float(kept)


def test_presets_differ_in_how_fast_they_learn_and_how_long_they_keep():
    error, kept = zip(*map(behaviour, ("fast_adapt", "balanced", "high_retention")), strict=True)
    assert error[0] < error[1] - 0.05 < error[2] - 0.1
    assert kept[0] < 0.1 < kept[1] < 0.6 < 0.8 < kept[2]


def test_a_spread_takes_the_numbers_of_its_preset():
    for preset, pace in PRESETS.items():
        spread = SpreadConfig(levels=2, lowest_frequency=64, hidden=4, preset=preset)
        assert spread.build()[1] == LevelConfig(hidden=4, chunk=64, **pace)


def test_continua_scale_with_what_there_is_to_read():
    chunks = lambda settings: [level.chunk for level in settings.levels]  # noqa: E731
    assert chunks(auto_scale(1_000, hidden=8)) == [64]
    assert chunks(auto_scale(100_000, hidden=8)) == [64, 256, 1024]
    assert chunks(auto_scale(10**12, hidden=8)) == [64, 256, 1024, 4096, 16384, 65536]
    assert chunks(auto_scale(100_000, 10, hidden=8)) == [64]
    two = auto_scale(100_000, 2, hidden=8, objective="next_token")
    assert chunks(two) == [64, 256]
    assert (two.replay, two.replay_ratio) == (16, 0.5)
    assert auto_scale(100_000, 2, hidden=8).replay == 0
    slowest = two.levels[-1]
    np.testing.assert_allclose(slowest.retain ** (100_000 / slowest.chunk), 0.5, rtol=1e-6)
    np.testing.assert_allclose(two.levels[0].retain ** 64, 0.5, rtol=1e-6)
    assert isinstance(two, ContinuumConfig)
    with pytest.raises(ValueError, match="tasks must be at least 1, got 0"):
        auto_scale(1000, 0, hidden=8)


def test_scaled_continua_are_made_and_read():
    layer = auto_scale(10_000, hidden=4).build(6, depth=1, epsilon=1e-6, key=jax.random.key(0))
    y, _ = layer(jnp.ones((1, 70, 6)))
    assert np.isfinite(y).all()

"""The continuum of every variant: causal, the same in any split, rows and documents apart."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hope_jax import config
from hope_jax.modules.continuum import ContinuumConfig, LevelConfig, SpreadConfig
from hope_jax.modules.layers import learn_by
from hope_jax.ops.linear import dense, dense_beside
from hope_jax.sharding import MeshConfig, named, use

WIDTH, TIME, ROWS = 12, 19, 2
SPREAD = {"spread": SpreadConfig(levels=2, lowest_frequency=8, hidden=6)}

VARIANTS = {
    "sequential": ContinuumConfig(
        levels=(
            LevelConfig(hidden=6, chunk=3, momentum=0.5),
            LevelConfig(hidden=5, activation="gelu"),
            LevelConfig(hidden=6, chunk=5, depth=2, gated=True),
        ),
        adapt="all",
        dgd=True,
    ),
    "nested": ContinuumConfig(
        variant="nested", spread=SpreadConfig(levels=3, lowest_frequency=32, hidden=6)
    ),
    "independent": ContinuumConfig(variant="independent", **SPREAD),
    "headwise": ContinuumConfig(variant="headwise", **SPREAD),
    "leaky": ContinuumConfig(variant="leaky", **SPREAD),
    "flow": ContinuumConfig(variant="flow", **SPREAD),
    "next_token": ContinuumConfig(objective="next_token", **SPREAD),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


def build(name, depth=1):
    return VARIANTS[name].build(WIDTH, depth=depth, epsilon=1e-6, key=jax.random.key(0))


def draw(time=TIME):
    x = jax.random.normal(jax.random.key(1), (ROWS, time, WIDTH))
    starts = np.zeros((ROWS, time), bool)
    starts[0, 9] = starts[1, [8, 14, 15]] = True
    return x, jnp.asarray(starts)


@every_variant
def test_any_split_is_reading_whole(name):
    layer, (x, starts) = build(name), draw()
    whole, end = jax.jit(layer)(x, None, starts)
    call = jax.jit(lambda x, memory, starts: layer(x, memory, starts))
    memory, pieces, at = layer.initial_memory(ROWS, jnp.dtype("float32")), [], 0
    for part in (7, 1, 1, 1, 7, 1, 1):
        cut = slice(at, at + part)
        y, memory = call(x[:, cut], memory, starts[:, cut])
        pieces.append(y)
        at += part
    chex.assert_trees_all_close(jnp.concatenate(pieces, 1), whole, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(memory, end, rtol=1e-4, atol=1e-5)


@every_variant
def test_no_token_sees_the_future_another_row_or_another_document(name):
    layer, (x, starts) = build(name), draw()
    slope = jax.jit(jax.grad(lambda x, t, starts: jnp.sum(layer(x, None, starts)[0][0, t] ** 2)))
    for t in (0, 7, 12, 17):
        gradient = slope(x, t, jnp.zeros_like(starts))
        np.testing.assert_array_equal(gradient[0, t + 1 :], 0)
        np.testing.assert_array_equal(gradient[1], 0)
        within = slope(x, t, starts)
        np.testing.assert_array_equal(within[0, : 9 * (t >= 9)], 0)
    if name != "next_token":
        assert np.abs(gradient[0, :8]).max() > 0


@every_variant
def test_initial_states_and_paces_receive_gradients(name):
    layer, (x, _) = build(name), draw(66 if name == "nested" else TIME)
    graph, params = nnx.split(layer, nnx.Param)
    loss = lambda params: jnp.sum(jnp.sin(nnx.merge(graph, params)(x)[0]))  # noqa: E731
    gradients = jax.jit(jax.grad(loss))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.all(np.isfinite(leaf))
        assert np.all(leaf != 0) or leaf.ndim > 1, jax.tree_util.keystr(path)
        assert np.any(leaf != 0), jax.tree_util.keystr(path)


def test_rows_and_hidden_units_over_a_mesh_are_the_same():
    layer, (x, starts) = build("sequential"), draw()
    x, starts = jnp.tile(x, (2, 1, 1)), jnp.tile(starts, (2, 1))
    alone, _ = jax.jit(layer)(x, None, starts)
    mesh = MeshConfig(data=4, tensor=2).build()
    with use(mesh):
        rows = [jax.device_put(a, named(("batch", None), a.shape[:2], mesh)) for a in (x, starts)]
        graph, params = nnx.split(layer, nnx.Param)
        split = jax.jit(lambda params, x, starts: nnx.merge(graph, params)(x, None, starts))
        y, memory = split(params, *rows)
        chex.assert_trees_all_close(y, alone, rtol=1e-4, atol=1e-5)
        (delta, *_) = memory[0].fast.delta
        assert "data" in str(delta.sharding.spec)


def test_a_level_without_a_chunk_is_a_feed_forward_network():
    settings = ContinuumConfig(levels=(LevelConfig(hidden=6, depth=2), LevelConfig(hidden=5)))
    layer = settings.build(WIDTH, depth=1, epsilon=1e-6, key=jax.random.key(0))
    x, starts = draw()
    y, memory = layer(x, None, starts)
    assert memory == (None, None)
    by_token, _ = jax.vmap(lambda x: layer(x[:, None]), in_axes=1, out_axes=1)(x)
    np.testing.assert_allclose(y, by_token[:, :, 0], rtol=1e-5, atol=1e-6)


def test_view_and_first_level_share_a_norm_and_have_scales_of_their_own():
    layer, (x, _) = build("nested"), draw()
    for key, norm in enumerate((layer.norm, layer.levels[0].norm)):
        norm.scale[...] = jax.random.uniform(jax.random.key(key), WIDTH, minval=0.5, maxval=2.0)
    graph, params = nnx.split(layer, nnx.Param)

    def loss(params, x, objective):
        layer = nnx.merge(graph, params)
        learn_by(layer, objective)
        return jnp.sum(jnp.sin(layer(x)[0]))

    # To weights that learn by another objective inputs matter, so that those are scaled there.
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    (one, (slopes, d_x)), (two, (others, d_again)) = run(params, x, "dot"), run(params, x, "l2")
    np.testing.assert_allclose(one, two, rtol=1e-5)
    np.testing.assert_allclose(d_x, d_again, rtol=1e-4, atol=1e-5)
    for norms in (slopes, others), (slopes["levels"][0], others["levels"][0]):
        chex.assert_trees_all_close(*(n["norm"] for n in norms), rtol=1e-4, atol=1e-5)


def test_two_products_of_one_input_have_the_gradients_of_two():
    random = jax.random.split(jax.random.key(0), 3)
    shapes = (ROWS, 5, WIDTH), (WIDTH, 4), (2, WIDTH, 3)
    call = [jax.random.normal(key, shape) for key, shape in zip(random, shapes, strict=True)]

    def slopes(products):
        loss = lambda *call: sum(jnp.sum(jnp.sin(y)) for y in products(*call))  # noqa: E731
        return jax.grad(loss, argnums=(0, 1, 2))(*call)

    apart = slopes(lambda x, first, second: (dense(x, first, "dot"), dense(x, second, "dot")))
    chex.assert_trees_all_close(slopes(dense_beside), apart, rtol=1e-5, atol=1e-5)


def test_a_self_modifying_level_has_a_matrix_of_its_own_for_every_token():
    settings = ContinuumConfig(levels=(LevelConfig(hidden=6, rank=2),))
    layer = settings.build(WIDTH, depth=1, epsilon=1e-6, key=jax.random.key(0))
    (level,), (x, _) = layer.levels, draw()
    y, _ = layer(x)
    for row, t in ((0, 3), (1, 17)):
        token = level.norm(x)[row, t]
        hidden = jax.nn.silu(token @ level.up[0])
        changed = level.down[...]
        for reads, says in zip(level.reads[...], level.says[...], strict=True):
            changed = changed + jnp.outer(token @ reads, token @ says) / np.sqrt(6)
        np.testing.assert_allclose(y[row, t], x[row, t] + hidden @ changed, rtol=1e-4, atol=1e-5)
    plain = ContinuumConfig(levels=(LevelConfig(hidden=6),))
    plain = plain.build(WIDTH, depth=1, epsilon=1e-6, key=jax.random.key(0))
    assert np.abs(y - plain(x)[0]).max() > 1e-2


@pytest.mark.parametrize("adapt", ["output", "all"])
def test_deltas_are_as_large_as_they_are_said_to_be(adapt):
    levels = (LevelConfig(hidden=6, chunk=3), LevelConfig(hidden=7, chunk=6, momentum=0.5))
    settings = ContinuumConfig(levels=levels, adapt=adapt)
    layer = settings.build(WIDTH, depth=1, epsilon=1e-6, key=jax.random.key(0))
    for level, memory, copies in zip(
        levels, layer.initial_memory(1, jnp.dtype("float32")), (2, 3), strict=True
    ):
        moving = (1 if adapt == "output" else 2) * WIDTH * level.hidden
        matrices = [leaf.size for leaf in jax.tree.leaves(memory.fast) if leaf.ndim > 1]
        assert sum(matrices) == copies * moving


def test_deltas_cost_flops_and_static_levels_none():
    static = ContinuumConfig(levels=(LevelConfig(hidden=6),))
    assert static.flops(WIDTH) == 0
    moving = ContinuumConfig(levels=(LevelConfig(hidden=6, chunk=4),))
    assert moving.flops(WIDTH) == 4 * WIDTH * 6


def test_a_number_of_levels_is_spread_down_to_the_lowest_frequency():
    spread = SpreadConfig(levels=4, lowest_frequency=4096, hidden=8)
    assert [level.chunk for level in spread.build()] == [64, 256, 1024, 4096]
    assert not any(level.gated for level in spread.build())
    assert all(level.gated for level in replace(spread, gated=True).build())
    short = {"spread": {"levels": 3, "lowest_frequency": 512, "hidden": 8}}
    parsed = config.parse(ContinuumConfig, short)
    assert [level.chunk for level in parsed.levels] == [32, 128, 512]
    assert parsed.spread is None
    for wrong, message in (
        ({"levels": 0}, "levels must be at least 1, got 0"),
        ({"lowest_frequency": 100}, "multiple of 16, at least twice that, for 3 levels, got 100"),
        ({"lowest_frequency": 16}, "multiple of 16, at least twice that, for 3 levels, got 16"),
    ):
        with pytest.raises(config.ConfigError, match=message):
            config.parse(ContinuumConfig, {"spread": short["spread"] | wrong})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": ()}, "levels must name at least one level, got none"),
        (SPREAD | {"levels": (LevelConfig(hidden=4),)}, "must not both be given"),
        (SPREAD | {"surprise": -1.0}, "surprise must be at least 0, got -1.0"),
        (SPREAD | {"replay": 2}, "replay must come with objective next_token, got local"),
        (SPREAD | {"objective": "next_token", "replay": -1}, "replay must be at least 0"),
        (SPREAD | {"objective": "next_token", "dgd": True}, "objective must be local"),
        (
            {"variant": "nested", "levels": (LevelConfig(hidden=4),) * 2},
            "every level must have a chunk in a nested continuum",
        ),
        (
            {
                "variant": "nested",
                "levels": (LevelConfig(hidden=4, chunk=4), LevelConfig(hidden=4, chunk=6)),
            },
            "must be a multiple of the one before, which is 4, in a nested continuum, got 6",
        ),
        (
            {
                "objective": "next_token",
                "levels": (LevelConfig(hidden=4, chunk=6), LevelConfig(hidden=4, chunk=4)),
            },
            "multiples of the shortest, which is 4, with objective next_token, got 6",
        ),
        ({"levels": (LevelConfig(hidden=4, chunk=4, rate=1.0),)}, "rate must be below 1, got 1.0"),
    ],
)
def test_levels_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ContinuumConfig(**settings)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"chunk": 1}, "chunk must be at least 2, or null for none, got 1"),
        ({"rank": -1}, "rank must be at least 0, got -1"),
        ({"rank": 1, "chunk": 4}, "rank must be 0 for a level that learns in chunks, got 1"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"rate": 0.0}, "rate must be above 0, got 0.0"),
        ({"retain": 1.0}, "retain must lie between 0 and 1, got 1.0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
    ],
)
def test_a_level_that_cannot_be_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        LevelConfig(hidden=4, **setting)


def test_features_must_be_shared_out_evenly():
    with pytest.raises(ValueError, match="must divide width=13 in a headwise continuum, got 2"):
        VARIANTS["headwise"].build(13, depth=1, epsilon=1e-6, key=jax.random.key(0))


def test_compile_time_is_flat_in_chunks():
    layer = build("sequential")
    x, _ = draw(120)
    equations = lambda x: len(str(jax.make_jaxpr(lambda x: layer(x)[0])(x)).splitlines())  # noqa: E731
    assert equations(x) == equations(x[:, :60])

"""A level that learns in context: its forms are one function, and that is the written one."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.ops.continuum import KEPT, Pace, continuum_level, fresh_level

TIME, ROWS, WIDTH = 19, 2, 3
close = partial(chex.assert_trees_all_close, rtol=1e-9, atol=1e-9)
pytestmark = pytest.mark.usefixtures("x64")

SHAPES = {
    "linear": ((1, WIDTH, WIDTH),),
    "mlp": ((1, WIDTH, 4), (1, 4, WIDTH)),
    "deep_gated": ((2, WIDTH, 4), (1, 4, 5), (1, 5, WIDTH)),
}
OPTIONS = {
    "plain": {"chunk": 4},
    "erasing": {"chunk": 4, "dgd": True},
    "nested": {"chunk": 2, "outer": 6},
    "surprised": {"chunk": 4, "surprise": 1.6},
}
MOMENTUM = ("erasing", "nested")


def random_call(shapes="mlp", options="plain", *, starts=True, time=TIME):
    """The arrays of a call: x, values, weights, pace, and document starts."""
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape))  # noqa: E731
    x, values = normal(ROWS, time, WIDTH), normal(ROWS, time, WIDTH)
    weights = tuple(0.5 * normal(*shape) for shape in SHAPES[shapes])
    outer = options == "nested"
    pace = Pace(
        rate=jnp.asarray(0.9),
        retain=jnp.asarray(0.8),
        momentum=jnp.asarray(0.6) if options in MOMENTUM else None,
        outer_rate=jnp.asarray(0.7) if outer else None,
        outer_retain=jnp.asarray(0.95) if outer else None,
    )
    where = jnp.asarray(random.random((ROWS, time)) < 0.15) if starts else None
    return (x, values, weights, pace), where


@cache
def compiled(options, form="auto"):
    return jax.jit(partial(continuum_level, form=form, **OPTIONS[options]))


def call(arrays, starts, options, form="auto"):
    return compiled(options, form)(*arrays, None, starts)


def carried(arrays, options, position):
    """Some memory after `position` tokens."""
    x, _, weights, pace = arrays
    options = {"momentum": pace.momentum is not None, "outer": pace.outer_rate is not None}
    memory = fresh_level(weights, WIDTH, ROWS, x.dtype, **options)
    random = np.random.default_rng(1)
    memory = jax.tree.map(
        lambda a: jnp.asarray(0.2 * np.abs(random.normal(size=a.shape))).astype(a.dtype), memory
    )
    return memory._replace(position=jnp.int32(position))


CASES = [
    ("linear", "plain", None, False),
    ("linear", "plain", None, True),
    ("linear", "erasing", None, False),
    ("linear", "erasing", None, True),
    ("linear", "nested", 5, True),
    ("mlp", "plain", None, True),
    ("mlp", "erasing", None, False),
    ("mlp", "erasing", 5, True),
    ("mlp", "nested", None, True),
    ("mlp", "surprised", 3, True),
    ("deep_gated", "plain", 0, False),
    ("deep_gated", "erasing", 3, True),
]


@pytest.mark.parametrize(("shapes", "options", "position", "starts"), CASES)
def test_forms_are_the_reference_in_values_and_gradients(
    shapes, options, position, starts, monkeypatch
):
    linear = shapes == "linear"  # twelve groups of a chunk, six of two or three of four, and a rest
    size = 4 if options == "plain" else 16 if starts else 8
    monkeypatch.setattr("hope_jax.ops.continuum.TOGETHER", size)
    arrays, where = random_call(shapes, options, starts=starts, time=51 if linear else TIME)
    memory = None if position is None else carried(arrays, options, position)
    slope = jnp.asarray(np.random.default_rng(2).normal(size=arrays[1].shape))

    def floats(tree):
        return [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)]

    def loss(arrays, memory, form):
        y, after = continuum_level(*arrays, memory, where, form=form, **OPTIONS[options])
        return jnp.sum(y * slope) + sum(jnp.sum(jnp.sin(a)) for a in floats(after)), (y, after)

    both = {}
    other = "together" if linear else "chunked"
    for form in ("reference", other):
        gradient = jax.grad(loss, argnums=(0, 1), has_aux=True, allow_int=True)
        slopes, result = jax.jit(partial(gradient, form=form))(arrays, memory)
        both[form] = result, floats(slopes)
    close(both[other], both["reference"])
    assert all(np.abs(slope).max() > 0 for slope in both[other][1][:3])


@pytest.mark.parametrize("options", ["plain", "erasing"])
def test_chunks_that_are_solved_together_are_chunks_one_by_one(options, monkeypatch):
    arrays, where = random_call("linear", options, time=23)  # two groups, a chunk, three tokens
    monkeypatch.setattr("hope_jax.ops.continuum.TOGETHER", 11)
    reference = call(arrays, where, options, "reference")
    close(call(arrays, where, options, "together"), reference)
    close(call(arrays, where, options, "chunked"), reference)
    spoiled = (arrays[0], arrays[1].at[0, 5].set(jnp.inf), *arrays[2:])
    fast = call(spoiled, None, options, "together")[1].fast
    assert fast.skipped.tolist() == [2, 0]
    assert fast.writes.tolist() == [3, 5]
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(fast))


def test_the_backward_pass_need_not_go_from_group_to_group_again(monkeypatch):
    monkeypatch.setattr("hope_jax.ops.continuum.TOGETHER", 16)
    arrays, where = random_call("linear", "plain", time=48)

    def products(policy):
        @partial(jax.checkpoint, policy=policy)
        def loss(arrays):
            y, _ = continuum_level(*arrays, None, where, form="together", chunk=4)
            return jnp.sum(jnp.sin(y))

        return str(jax.make_jaxpr(jax.grad(loss))(arrays)).count("dot_general")

    policies = jax.checkpoint_policies
    kept, least = products(policies.save_only_these_names(KEPT)), products(lambda *_, **__: True)
    assert kept - least <= 3  # the slow weights' answers, the tokens' overlaps, and decays
    assert products(policies.nothing_saveable) - least > 9


def test_the_reference_is_the_equation_by_hand():
    """Two chunks of a linear level without and with every term, written out in numpy."""
    for options in ("plain", "erasing"):
        (x, values, weights, pace), _ = random_call("linear", options, starts=False, time=9)
        y, after = call((x, values, weights, pace), None, options, "reference")
        theta = np.asarray(weights[0][0]).T
        for row in range(ROWS):
            delta, momentum = np.zeros_like(theta), np.zeros_like(theta)
            for first in (0, 4):
                gradient, energy = 0, 0
                for t in range(first, first + 4):
                    np.testing.assert_allclose(y[row, t], (theta + delta) @ x[row, t], rtol=1e-9)
                for t in range(first + 1, first + 4):
                    key, value = np.asarray(x[row, t - 1]), np.asarray(values[row, t])
                    gradient += np.outer((theta + delta) @ key - value, key)
                    gradient += np.outer(delta @ key, key) * (options == "erasing")
                    energy += key @ key
                change = -0.9 * gradient / (1 + energy)
                if options == "erasing":
                    change = momentum = 0.6 * momentum + 0.4 * change
                delta = 0.8 * delta + change
            np.testing.assert_allclose(after.fast.delta[0][row, 0], delta.T, rtol=1e-9)
            np.testing.assert_allclose(y[row, 8], (theta + delta) @ x[row, 8], rtol=1e-9)


@pytest.mark.parametrize("options", OPTIONS)
def test_any_split_is_reading_whole(options):
    arrays, where = random_call("mlp", options)
    whole, end = call(arrays, where, options)
    read = compiled(options)
    x, values, weights, pace = arrays
    for parts in ((5, 1, 13), (1,) * TIME):
        at, memory, pieces = 0, carried(arrays, options, 0), []
        memory = jax.tree.map(jnp.zeros_like, memory)
        for part in parts:
            cut = slice(at, at + part)
            y, memory = read(x[:, cut], values[:, cut], weights, pace, memory, where[:, cut])
            pieces.append(y)
            at += part
        close((jnp.concatenate(pieces, 1), memory), (whole, end))


def test_deltas_move_after_every_chunk_and_at_no_other_token():
    arrays, _ = random_call("mlp", "plain", starts=False)
    x, values, weights, pace = arrays
    memory = jax.tree.map(jnp.zeros_like, carried(arrays, "plain", 0))
    for t in range(TIME):
        before = memory.fast.delta
        _, memory = compiled("plain")(x[:, [t]], values[:, [t]], weights, pace, memory)
        changed = [bool(jnp.any(a != b)) for a, b in zip(before, memory.fast.delta, strict=True)]
        assert changed == [(t + 1) % 4 == 0] * 2
        assert memory.fast.writes.tolist() == [(t + 1) // 4] * ROWS


def test_the_carrying_level_restarts_deltas_after_its_own_chunk():
    arrays, _ = random_call("mlp", "nested", starts=False)
    for time in (6, 12, 18):
        part = (arrays[0][:, :time], arrays[1][:, :time], *arrays[2:])
        fast = call(part, None, "nested")[1].fast
        close(fast.delta, fast.initial)
        assert all(jnp.any(d != 0) for d in fast.delta)
    fast = call((arrays[0][:, :14], arrays[1][:, :14], *arrays[2:]), None, "nested")[1].fast
    assert all(jnp.any(a != b) for a, b in zip(fast.delta, fast.initial, strict=True))


def test_a_move_that_is_not_finite_is_left_out_and_counted():
    arrays, _ = random_call("mlp", "plain", starts=False)
    spoiled = arrays[1].at[0, 5].set(jnp.nan)
    for form in ("chunked", "reference"):
        fast = call((arrays[0], spoiled, *arrays[2:]), None, "plain", form)[1].fast
        assert fast.skipped.tolist() == [1, 0]
        assert fast.writes.tolist() == [3, 4]
        assert all(jnp.all(jnp.isfinite(d)) for d in fast.delta)


def test_a_chunk_that_does_not_surprise_writes_nothing():
    arrays, _ = random_call("mlp", "plain", starts=False)
    none = jax.jit(partial(continuum_level, chunk=4, surprise=1e6))(*arrays)[1].fast
    assert none.writes.tolist() == [0, 0]
    assert none.gated.tolist() == [4, 4]
    close(none.delta, jax.tree.map(jnp.zeros_like, none.delta))
    some = call(arrays, None, "surprised")[1].fast
    assert 0 < int(some.writes.sum()) < 8
    assert (some.writes + some.gated).tolist() == [4, 4]


def test_what_does_not_fit_is_refused():
    arrays, _ = random_call("mlp", "plain")
    with pytest.raises(ValueError, match="chunk must be at least 2, got 1"):
        continuum_level(*arrays, chunk=1)
    with pytest.raises(ValueError, match="outer must be a multiple of chunk 4, got 6"):
        continuum_level(*arrays, chunk=4, outer=6)
    with pytest.raises(ValueError, match="outer must be given exactly if"):
        continuum_level(*arrays, chunk=4, outer=8)

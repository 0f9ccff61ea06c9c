"""The outer clock: a level moves in its steps and in no other, whatever optimizer is inside."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from small_models import MODELS, VOCABULARY

import hope_jax.optimizers as hopt
from hope_jax.optimizers.parameters import ParamInfo
from hope_jax.shapes import Batch
from hope_jax.training.step import TrainState, outline, train_step

PERIODS = (1, 2, 4)


def some_params():
    names = ("free", "fast", "middle", "slow")
    return {
        name: {
            "w": jax.random.normal(jax.random.key(i), (2, 8, 4)).at[0, 0, 0].set(-0.0),
            "b": jnp.full((2, 4), -0.0, jnp.float32),
        }
        for i, name in enumerate(names)
    }


def some_info():
    levels = {"free": None, "fast": 0, "middle": 1, "slow": 2}
    return {
        name: {
            "w": ParamInfo((None, None), "matrix", level),
            "b": ParamInfo((None,), "vector", level),
        }
        for name, level in levels.items()
    }


def some_grads(step):
    keys = iter(jax.random.split(jax.random.key(100 + step), 8))
    return jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), some_params())


def clock(rule=None, reduce="mean"):
    rule = rule or hopt.MuonConfig()
    return hopt.levels(
        lambda _: rule.build(1e-2, weight_decay=0.1, info=some_info()),
        PERIODS,
        reduce=reduce,
        info=some_info(),
    )


def run(tx, steps, params=None, state=None, start=0):
    params = some_params() if params is None else params
    state = tx.init(params) if state is None else state

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    history = [(params, state)]
    for i in range(start, start + steps):
        params, state = step(params, state, some_grads(i))
        history.append((params, state))
    return history


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", hopt.OPTIMIZERS)
def test_a_level_moves_in_its_steps_and_otherwise_keeps_every_bit(name):
    history = run(clock(hopt.OPTIMIZERS[name]()), 8)
    period = {"free": 1, "fast": 1, "middle": 2, "slow": 4}
    for step, ((before, old), (after, new)) in enumerate(pairwise(history)):
        for level in period:
            moves = (step + 1) % period[level] == 0
            assert moves == (bits(before[level]["w"]) != bits(after[level]["w"]))
            assert moves or bits(before[level]) == bits(after[level])
        for p, state in old.inner_states.items():
            if p > 1 and (step + 1) % p:
                inner = new.inner_states[p].inner_state
                assert bits(state.inner_state.inner) == bits(inner.inner)
                assert int(inner.count) == (step + 1) % p


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_a_level_is_its_optimizer_on_the_reduced_gradients(reduce):
    tx = hopt.levels(
        lambda _: optax.sgd(0.1, momentum=0.9), PERIODS, reduce=reduce, info=some_info()
    )
    got = run(tx, 8)[-1][0]
    for level, period in {"free": 1, "fast": 1, "middle": 2, "slow": 4}.items():
        params = some_params()[level]
        inner = optax.sgd(0.1, momentum=0.9)
        state = inner.init(params)
        for start in range(0, 8, period):
            some = [some_grads(i)[level] for i in range(start, start + period)]
            total = jax.tree.map(lambda *g: sum(g) / (period if reduce == "mean" else 1), *some)
            updates, state = inner.update(total, state, params)
            params = optax.apply_updates(params, updates)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got[level], params
        )


def test_with_one_period_it_is_the_optimizer_inside():
    rule = hopt.AdamWConfig()
    tx = hopt.levels(lambda _: rule.build(1e-2), (1, 1, 1), info=some_info())
    assert bits(run(tx, 3)[-1][0]) == bits(run(rule.build(1e-2), 3)[-1][0])


def test_going_on_in_the_middle_of_a_period_is_not_stopping():
    tx = clock()
    whole = run(tx, 7)[-1]
    params, state = jax.device_get(run(tx, 3)[-1])
    again = run(tx, 4, params, state, start=3)[-1]
    assert bits(whole) == bits(again)


def test_no_buffer_is_shared_and_a_donating_step_lives():
    tx = clock()
    params = some_params()
    state = tx.init(params)
    leaves = [x for x in jax.tree.leaves((params, state)) if x.size]
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    for i in range(5):
        params, state = step(params, state, some_grads(i))
    assert step._cache_size() == 1
    expected = run(tx, 5)[-1][0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, expected
    )
    # One accumulator for each parameter of a slow level, none for the others.
    slow = {p: s.inner_state.total for p, s in state.inner_states.items() if p > 1}
    assert optax.tree.size(slow) == optax.tree.size(params) // 2


def test_split_over_devices_it_is_the_same():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    params = some_params()
    with jax.set_mesh(mesh):
        for level in params.values():
            level["w"] = jax.device_put(level["w"], sharding)
        tx = clock()
        state = tx.init(params)
        slow = state.inner_states[4].inner_state.total["slow"]["w"]
        assert slow.sharding.is_equivalent_to(sharding, 3)
        split = run(tx, 5, params, state)[-1][0]
    alone = run(clock(), 5)[-1][0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), split, alone)


def test_a_gradient_that_is_not_finite_does_not_move_a_resting_level():
    tx = clock()
    params = some_params()
    grads = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert bits(optax.apply_updates(params, updates)["slow"]) == bits(params["slow"])


@pytest.mark.parametrize("name", ["adamw", "muon", "m3"])
def test_a_frozen_level_keeps_every_bit_and_has_no_state(name):
    rule = hopt.OPTIMIZERS[name]()
    inner = lambda _: rule.build(1e-2, weight_decay=0.1, info=some_info())  # noqa: E731
    frozen = hopt.levels(inner, (1, None, 2), info=some_info())
    moving = hopt.levels(inner, (1, 2, 2), info=some_info())
    (before, _), *_, (after, state) = run(frozen, 2)
    assert bits(before["middle"]) == bits(after["middle"])
    for level in ("free", "fast", "slow"):
        assert bits(before[level]) != bits(after[level])
    paths = jax.tree_util.tree_leaves_with_path(state)
    assert not any("middle" in jax.tree_util.keystr(path) for path, _ in paths)
    assert len(jax.tree.leaves(state)) < len(jax.tree.leaves(moving.init(some_params())))


def test_accumulated_gradients_move_levels_in_the_same_steps():
    model = outline(partial(MODELS["hope_attention"].build, seed=0))
    info = hopt.describe(model.variables)
    tx = hopt.levels(lambda _: optax.sgd(0.1, momentum=0.9), (2, 3), info=info)
    tokens = jax.random.randint(jax.random.key(0), (6, 4, 9), 0, VOCABULARY)
    ends = []
    for accumulate in (1, 2):
        params = nnx.to_pure_dict(nnx.split(model.build(), nnx.Param)[1])
        state = TrainState(
            jnp.int32(0), params, tx.init(params), jax.random.key(0), *[jnp.int32(0)] * 2
        )
        step = jax.jit(partial(train_step, model.graphdef, tx, accumulate))
        for index, window in enumerate(tokens):
            before = state.params["blocks"]["continuum"]["levels"]
            state, _ = step(state, Batch(window, jnp.zeros(window.shape, bool)))
            after = state.params["blocks"]["continuum"]["levels"]
            for level, period in enumerate((2, 3)):
                moved = bits(before[level]) != bits(after[level])
                assert moved == ((index + 1) % period == 0)
        ends.append(state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *ends)


def test_a_schedule_is_read_at_the_steps_in_which_a_level_moves():
    assert [hopt.stretched(lambda step: step, 4)(moves) for moves in range(3)] == [3, 7, 11]
    schedule = hopt.ScheduleConfig(kind="constant", warmup=1.0)
    config = hopt.OptimizerConfig(
        rule=hopt.AdamWConfig(),
        learning_rate=1.0,
        schedule=schedule,
        weight_decay=0.0,
        levels=hopt.LevelsConfig(periods=PERIODS),
    )
    tx = config.build(8, some_info())
    params = some_params()
    state = tx.init(params)
    ones = jax.tree.map(jnp.ones_like, params)
    for _ in range(4):
        updates, state = tx.update(ones, state, params)
    np.testing.assert_allclose(updates["slow"]["b"], -4 / 9, rtol=1e-5)


def test_what_cannot_be_is_refused_with_the_rule():
    with pytest.raises(ValueError, match="period must be at least 1, got 0"):
        hopt.LevelsConfig(periods=(1, 0))
    with pytest.raises(ValueError, match="period must be at least 1, got -2"):
        hopt.every(optax.sgd(0.1), -2)
    with pytest.raises(ValueError, match="reduce must be mean or sum, got 'max'"):
        hopt.levels(lambda _: optax.sgd(0.1), (1, 2), reduce="max")
    tx = hopt.levels(lambda _: optax.sgd(0.1), (1, 2), info=some_info())
    with pytest.raises(ValueError, match="got 2 entries and a parameter of level 2"):
        tx.init(some_params())

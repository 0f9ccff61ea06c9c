"""What every optimizer of the table promises, whatever its rule."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.sparse import BCOO
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hope_jax.optimizers as hopt
from hope_jax.optimizers.parameters import ParamInfo

STEPS = 100
# Rates for problems of size 1. Some steps are as long as the gradient, some a sum of ten steps of
# length 1, matrices get a root mean square of 0.2, AdaGrad's steps shrink.
RATES = {
    **dict.fromkeys(("sgd", "dgd", "ggd", "delta_momentum", "gm"), 0.3),
    **dict.fromkeys(("preconditioned_momentum", "context_steered", "feature_momentum"), 0.03),
    **dict.fromkeys(("muon", "output_momentum", "m3"), 0.3),
    "outer_memory": 1.0,
    "m3_printed": 0.05,
}
# The printed form of M3 never forgets its first gradients: it goes down, but does not arrive.
MODEST = ("m3_printed",)
# Rules that are the same for every number of a parameter, whatever its shape.
BY_ELEMENT = ("adamw", "sgd", "lion", "ademamix", "dgd", "ggd", "adam_memory")
every_optimizer = pytest.mark.parametrize("name", hopt.OPTIMIZERS)

INFO = {
    "stack": ParamInfo((None, None), "matrix"),
    "tall": ParamInfo((None, None), "matrix"),
    "memory": ParamInfo(("heads", None, None), "memory_init"),
    "embedding": ParamInfo((None, None), "embedding"),
    "norm": ParamInfo((None,), "vector"),
    "column": ParamInfo((None, None), "matrix"),
    "scalar": ParamInfo((), "vector"),
    "empty": ParamInfo((None, None), "matrix"),
}
SHAPES = {
    "stack": (3, 4, 6),
    "tall": (9, 4),
    "memory": (2, 4, 4),
    "embedding": (7, 4),
    "norm": (3, 4),
    "column": (5, 1),
    "scalar": (),
    "empty": (0, 4),
}


def draw(seed, dtype=jnp.float32, names=tuple(SHAPES)):
    keys = dict(zip(SHAPES, jax.random.split(jax.random.key(seed), len(SHAPES)), strict=True))
    return {name: jax.random.normal(keys[name], SHAPES[name], dtype) for name in names}


BEST = jax.tree.map(np.asarray, draw(100))
SHARP = jax.tree.map(np.asarray, draw(101))


def quadratic(params):
    """Convex, smallest at a point that is not zero, curved from 0.1 to 1."""
    return sum(
        jnp.sum((0.1 + 0.9 * jax.nn.sigmoid(2 * SHARP[name])) * (x - BEST[name]) ** 2) / 2
        for name, x in params.items()
    )


def make(name, info=INFO, **settings):
    """The optimizer, with a rate that falls to zero within STEPS."""
    peak = RATES.get(name, 0.1)
    rule = hopt.OPTIMIZERS[name](**settings)
    return rule.build(lambda step: peak * jnp.maximum(1 - step / STEPS, 0), info=info)


def stepper(tx, loss=quadratic, donate=False):
    def step(params, state, scale=1.0):
        grads = jax.tree.map(lambda g: (g * scale).astype(g.dtype), jax.grad(loss)(params))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    return jax.jit(step, donate_argnums=(0, 1) if donate else ())


class Shared:
    """One optimizer, compiled once, for all tests that need no other."""

    def __init__(self, name):
        tx = make(name)
        self.init, self.step = jax.jit(tx.init), stepper(tx)


shared = functools.cache(Shared)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@every_optimizer
def test_it_descends_from_five_starts_and_compiles_once(name):
    tx = shared(name)
    step = tx.step
    for seed in range(5):
        params = draw(seed)
        state = tx.init(params)
        first = quadratic(params)
        for _ in range(STEPS):
            params, state, _ = step(params, state, 1.0)
        assert quadratic(params) < (0.8 if name in MODEST else 0.06) * first
    assert step._cache_size() == 1


@every_optimizer
def test_its_first_updates_point_downhill(name):
    tx = shared(name)
    step = tx.step
    params = draw(0)
    state = tx.init(params)
    for _ in range(3):
        slopes = jax.grad(quadratic)(params)
        _, state, updates = step(params, state, 1.0)
        for key, update in updates.items():
            assert jnp.vdot(update, slopes[key]) < 0 or not update.size, key


@every_optimizer
def test_tiny_huge_and_zero_gradients_move_by_finite_amounts(name):
    tx = shared(name)
    step = tx.step
    for scale in (0.0, 1e-6, 1e6):
        params = draw(0)
        state = tx.init(params)
        for factor in (scale, 1.0, scale, 0.0, scale):
            params, state, _ = step(params, state, factor)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((params, state)))
    params = draw(0)
    _, _, updates = step(params, tx.init(params), 0.0)
    assert not any(x.any() for x in jax.tree.leaves(updates))


@every_optimizer
def test_gradients_that_are_mostly_zero_move_by_finite_amounts_and_sparse_arrays_are_refused(name):
    params = draw(0, names=("tall", "embedding"))
    tx = make(name)
    update, state = jax.jit(tx.update), tx.init(params)
    for row, factor in enumerate((1e-6, 1.0, 1e6)):
        grads = {k: jnp.zeros(x.shape).at[row].set(factor) for k, x in params.items()}
        updates, state = update(grads, state, params)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    bcoo = {"w": BCOO.fromdense(jnp.eye(3))}
    with pytest.raises(ValueError, match="must be dense arrays of real numbers, got int32 for"):
        hopt.OPTIMIZERS[name]().build(0.1).init(bcoo)


@every_optimizer
def test_a_schedule_gives_each_step_its_rate(name):
    params = draw(0, names=("tall", "norm"))
    rates = (0.2, 0.05)
    config = hopt.OPTIMIZERS[name]()
    alone = [config.build(rate, info=INFO) for rate in rates]
    whole = config.build(lambda step: jnp.array(rates)[step], info=INFO)
    all_of_them = [whole, *alone]

    @jax.jit
    def step(grads, states):
        moved = [tx.update(grads, one, params) for tx, one in zip(all_of_them, states, strict=True)]
        return [update for update, _ in moved], [one for _, one in moved]

    states = [tx.init(params) for tx in all_of_them]
    for t in range(2):
        (scheduled, *constant), states = step(draw(t + 1, names=("tall", "norm")), states)
        for key, update in scheduled.items():
            np.testing.assert_allclose(update, constant[t][key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in hopt.OPTIMIZERS if name not in BY_ELEMENT])
def test_a_stack_is_moved_as_its_separate_matrices(name):
    tx = shared(name)
    params = draw(0)
    state = tx.init(params)
    for _ in range(10):
        params, state, _ = tx.step(params, state, 1.0)

    apart, info = {}, {}
    for key in ("stack", "memory", "norm"):
        apart[key] = list(draw(0)[key])
        axes = INFO[key].axes[-apart[key][0].ndim :]
        info[key] = [dataclasses.replace(INFO[key], axes=axes)] * len(apart[key])

    def loss(params):
        return quadratic({key: jnp.stack(parts) for key, parts in params.items()})

    tx = make(name, info)
    step, state = stepper(tx, loss), jax.jit(tx.init)(apart)
    for _ in range(10):
        apart, state, _ = step(apart, state, 1.0)
    for key, parts in apart.items():
        np.testing.assert_allclose(jnp.stack(parts), params[key], rtol=1e-3, atol=1e-3)


@every_optimizer
def test_saved_and_loaded_it_goes_on_as_if_nothing_had_happened(name, tmp_path):
    tx = shared(name)
    step = tx.step
    params = draw(0)
    state = tx.init(params)
    for i in range(14):
        if i == 5:
            hopt.save_state(tmp_path / "state.safetensors", state)
            kept = params
        params, state, _ = step(params, state, 1.0)
    again = hopt.load_state(tmp_path / "state.safetensors", tx.init(kept))
    for _ in range(5, 14):
        kept, again, _ = step(kept, again, 1.0)
    assert bits((params, state)) == bits((kept, again))


@every_optimizer
def test_bfloat16_parameters_and_states_stay_so(name):
    fields = {field.name for field in dataclasses.fields(hopt.OPTIMIZERS[name])}
    settings = {"state_dtype": "bfloat16"} if "state_dtype" in fields else {}
    params = draw(0, names=("stack", "norm"))
    if settings:
        slots = jax.tree.leaves(jax.eval_shape(make(name, **settings).init, params))
        small = {x.shape for x in slots if x.dtype == jnp.bfloat16}
        assert {SHAPES["stack"], SHAPES["norm"]} <= small

    tx = make(name, **settings)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    step, state, first = stepper(tx), jax.jit(tx.init)(params), quadratic(params)
    types = [x.dtype for x in jax.tree.leaves(state)]
    for _ in range(STEPS // 2):
        params, state, updates = step(params, state, 1.0)
    assert {x.dtype for x in jax.tree.leaves((params, updates))} == {jnp.dtype(jnp.bfloat16)}
    assert [x.dtype for x in jax.tree.leaves(state)] == types
    assert step._cache_size() == 1
    assert quadratic(params) < 0.5 * first or name in MODEST


@every_optimizer
def test_split_over_devices_donated_and_without_shared_buffers_it_is_the_same(name):
    alone = shared(name)
    params = draw(0)
    state = alone.init(params)
    for _ in range(4):
        params, state, _ = alone.step(params, state, 1.0)

    axes = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=axes, devices=jax.devices()[:4])
    cut = {"stack": PartitionSpec(None, "fsdp"), "norm": PartitionSpec(None, ("data", "fsdp"))}
    tx = make(name)
    with jax.set_mesh(mesh):
        split = {
            key: jax.device_put(x, NamedSharding(mesh, cut.get(key, PartitionSpec())))
            for key, x in draw(0, names=("stack", "norm", "embedding")).items()
        }
        other = tx.init(split)
        leaves = [x for x in jax.tree.leaves((split, other)) if x.size]
        buffers = [x.addressable_shards[0].data.unsafe_buffer_pointer() for x in leaves]
        assert len(set(buffers)) == len(buffers)
        step = stepper(tx, donate=True)
        for _ in range(4):
            split, other, _ = step(split, other, 1.0)
    for key, x in split.items():
        np.testing.assert_allclose(x, params[key], rtol=1e-3, atol=1e-3)


@every_optimizer
def test_it_learns_a_small_network_without_metadata(name):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (64, 8))
    y = jnp.sin(2 * x @ jax.random.normal(keys[1], (8, 3)) / 3)
    params = {
        "w1": jax.random.normal(keys[2], (8, 16)) / 3,
        "b1": jnp.zeros(16, jnp.float32),
        "w2": jax.random.normal(keys[3], (16, 3)) / 4,
    }

    def loss(params):
        hidden = jnp.tanh(hopt.linear(x, params["w1"], objective="dot") + params["b1"])
        return jnp.mean(jnp.square(hidden @ params["w2"] - y))

    tx = make(name, info=None)
    step, state, first = stepper(tx, loss), jax.jit(tx.init)(params), loss(params)
    for _ in range(STEPS):
        params, state, _ = step(params, state, 1.0)
    assert loss(params) < (0.8 if name in MODEST else 0.5) * first


@every_optimizer
def test_weight_decay_acts_on_matrices_alone(name):
    tx = hopt.OPTIMIZERS[name]().build(0.1, weight_decay=0.5, info=INFO)
    params = draw(0, names=("stack", "memory", "embedding", "norm"))
    grads = jax.tree.map(jnp.zeros_like, params)
    updates = jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(grads, params)
    for key, update in updates.items():
        share = -0.05 if INFO[key].role == "matrix" else 0.0
        np.testing.assert_allclose(update, share * params[key], rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="params"):
        jax.eval_shape(lambda g: tx.update(g, tx.init(g)), grads)


@every_optimizer
def test_its_config_is_what_the_table_says_and_refuses_negative_rates(name):
    config = hopt.OPTIMIZERS[name]()
    assert config.kind == name
    with pytest.raises(ValueError, match=r"learning_rate must be at least 0, got -0\.1"):
        config.build(-0.1)
    with pytest.raises(ValueError, match="weight_decay must be at least 0, got -1"):
        config.build(0.1, weight_decay=-1.0)
    for field in dataclasses.fields(config):
        if isinstance(field.default, float):
            with pytest.raises(ValueError, match=f"{field.name} must .*, got -1"):
                dataclasses.replace(config, **{field.name: -1.0})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: hopt.M3Config(period=0), "period must be at least 1, got 0"),
        (lambda: hopt.DMGDConfig(depth=0), "depth must lie in 1 to 4, got 0"),
        (lambda: hopt.DMGDConfig(hidden=0), "hidden must be at least 1, got 0"),
        (lambda: hopt.scale_by_dmgd(shared="all"), "shared must be coordinates or rows, got 'all'"),
        (lambda: hopt.OuterMemoryConfig(refresh=0), "refresh must be at least 1, got 0"),
        (lambda: hopt.scale_by_gm(objective="l3"), "must be one of dot, l2, huber.*, got 'l3'"),
        (lambda: hopt.ggd(0.1, objective="l3"), "must be one of dot, l2, huber.*, got 'l3'"),
        (
            lambda: hopt.feature_momentum(0.1, feature_map="x"),
            "feature_map must be one of identity",
        ),
        (lambda: hopt.scale_by_context("x"), "context must be one of none, adagrad"),
        (lambda: hopt.OptimizerConfig(clip=0.0), "clip must be above 0"),
        (lambda: hopt.ScheduleConfig(warmup=2.0), r"warmup must lie in \[0, 1\], got 2.0"),
        (lambda: hopt.ScheduleConfig().build(1.0, 0), "steps must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_compiled(config, message):
    with pytest.raises(ValueError, match=message):
        config()


def test_parameters_that_the_metadata_forgets_are_named():
    tx = hopt.OptimizerConfig(rule=hopt.MuonConfig()).build(10, {"norm": INFO["norm"]})
    with pytest.raises(ValueError, match=r"info must describe every parameter.*\['column'\]"):
        tx.init(draw(0))


def test_a_state_of_another_optimizer_or_a_broken_file_is_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    params = draw(0)
    hopt.save_state(path, make("adamw").init(params))
    with pytest.raises(ValueError, match="is of another optimizer or model"):
        hopt.load_state(path, make("muon").init(params))
    with pytest.raises(ValueError, match=r"'tall'.* is float32\[9, 4\], not float32\[4, 4\]"):
        hopt.load_state(path, make("adamw").init({**params, "tall": jnp.zeros((4, 4))}))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        hopt.load_state(path, make("adamw").init(params))


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_schedules_rise_stay_and_fall(kind):
    schedule = hopt.ScheduleConfig(kind=kind, warmup=0.1, decay=0.3, floor=0.1).build(2.0, 100)
    rates = np.array([schedule(step) for step in range(101)])
    assert rates.max() == pytest.approx(2.0)
    assert rates[0] == pytest.approx(2.0 / 11)
    assert (np.diff(rates[:11]) > 0).all()
    assert rates[100] == pytest.approx(2.0 if kind == "constant" else 0.2)
    assert (np.diff(rates[11:]) <= 1e-6).all()
    if kind == "wsd":
        np.testing.assert_allclose(rates[10:71], 2.0, rtol=1e-6)


def test_gradients_are_clipped_before_the_rule():
    rule = hopt.SGDConfig(momentum=0.0)
    constant = hopt.ScheduleConfig(kind="constant", warmup=0.0)
    config = hopt.OptimizerConfig(
        rule=rule, learning_rate=1.0, weight_decay=0.0, clip=0.5, schedule=constant
    )
    tx = config.build(10, INFO)
    params = draw(0)
    updates, _ = tx.update(draw(1), tx.init(params), params)
    assert optax.tree.norm(updates) == pytest.approx(0.5, rel=1e-5)

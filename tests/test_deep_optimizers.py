"""Deep optimizers are their equations, and contain the optimizers that they claim to contain."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_models import CONTINUUM, MODELS, VOCABULARY

import hope_jax.optimizers as hopt
from hope_jax.modules import layers
from hope_jax.ops.orthogonal import newton_schulz
from hope_jax.optimizers.parameters import ParamInfo

# Three gradients of a 2 x 2 weight (out, in), and the metadata that says so.
G = np.array([[[1.0, 2.0], [-0.5, 0.3]], [[0.4, -1.0], [0.7, 0.1]], [[-0.2, 0.6], [1.5, -0.8]]])
OUT_IN = ParamInfo((None, None), "memory_init")


def updates_of(tx, gradients):
    """What a transform makes of a sequence of gradients, starting anew."""
    params = gradients[0]
    state = tx.init(params)
    step = jax.jit(tx.update)
    made = []
    for gradient in gradients:
        update, state = step(gradient, state, params)
        made.append(update)
    return made


def random_gradients(steps=6, shape=(4, 6), seed=0):
    keys = jax.random.split(jax.random.key(seed), steps)
    return [{"w": jax.random.normal(key, shape), "b": jax.random.normal(key, (5,))} for key in keys]


def same(ours, theirs, gradients=None, tolerance=1e-6):
    gradients = random_gradients() if gradients is None else gradients
    for a, b in zip(updates_of(ours, gradients), updates_of(theirs, gradients), strict=True):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b
        )


def by_hand(tx, expected, tolerance=1e-12):
    for made, wanted in zip(updates_of(tx, list(jnp.asarray(G))), expected, strict=True):
        np.testing.assert_allclose(made, wanted, rtol=tolerance, atol=tolerance)


# Delta and generalised gradient descent


@pytest.mark.usefixtures("x64")
def test_exact_delta_gradient_descent_solves_its_problem():
    w, x, u = jnp.asarray(G[0]), jnp.array([0.3, -0.9]), jnp.array([0.5, 1.1])
    rate, length = 0.7, float(np.linalg.norm(x))

    # The minimum over W of 1/2 |W x - u|^2 + 1/(2 rate) |W - w|^2, by its normal equations.
    wanted = (w / rate + jnp.outer(u, x)) @ np.linalg.inv(np.eye(2) / rate + np.outer(x, x))

    def loss(stored):  # its slope along the output is -u
        return -jnp.vdot(u, hopt.linear(x[None], stored, objective="l2")[0])

    stored = w.T
    tx = hopt.dgd(rate, key_norm=length)
    updates, _ = tx.update(jax.grad(loss)(stored), tx.init(stored), stored)
    np.testing.assert_allclose((stored + updates).T, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("objective", ["dot", "l2", "huber"])
def test_the_layer_has_the_gradient_of_loss_and_memory(objective):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (3, 5, 4))
    w = jax.random.normal(keys[1], (4, 2))
    target = jax.random.normal(keys[2], (3, 5, 2))

    def loss(x, w, layer):
        return jnp.mean(jnp.sum(jnp.sin(layer(x, w) - target), axis=-1))

    def mine(x, w):
        return loss(x, w, lambda x, w: hopt.linear(x, w, objective=objective))

    def plain(x, w):
        return loss(x, w, jnp.matmul)

    # The same in other words: backpropagation asks for outputs u, token by token.
    asked = -15 * jax.grad(lambda y: loss(x, w, lambda *_: y))(x @ w)
    error = {
        "dot": -asked,
        "l2": x @ w - asked,
        "huber": jnp.clip(x @ w - asked, -1, 1),
    }[objective]
    np.testing.assert_allclose(mine(x, w), plain(x, w), rtol=1e-12)
    dx, dw = jax.grad(mine, argnums=(0, 1))(x, w)
    np.testing.assert_allclose(dx, jax.grad(plain)(x, w), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(dw, jnp.einsum("bti,bto->io", x, error) / 15, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_delta_gradient_descent_is_descent_on_the_loss_and_what_the_layer_says():
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = jax.random.normal(keys[0], (7, 4)), jax.random.normal(keys[1], (4, 2))

    def loss(w, layer):
        return jnp.mean(jnp.sum((layer(x, w) - 1.0) ** 2, axis=-1))

    def both(w):
        return loss(w, jnp.matmul) + jnp.mean(jnp.sum((x @ w) ** 2, axis=-1)) / 2

    np.testing.assert_allclose(
        jax.grad(loss)(w, hopt.linear), jax.grad(both)(w), rtol=1e-12, atol=1e-12
    )


@pytest.mark.usefixtures("x64")
def test_delta_gradient_descent_stops_where_it_says_what_it_is_asked():
    keys = jax.random.split(jax.random.key(0), 2)
    x, target = jax.random.normal(keys[0], (3, 4)), jax.random.normal(keys[1], (3, 2))

    def loss(w):
        return jnp.mean(jnp.sum((hopt.linear(x, w) - target) ** 2, axis=-1)) / 2

    w = jnp.zeros((4, 2))
    tx = hopt.dgd(0.5, key_norm=2.5)

    def step(_, carry):
        w, state = carry
        update, state = tx.update(jax.grad(loss)(w), state)
        return w + update, state

    w, _ = jax.lax.fori_loop(0, 5000, step, (w, tx.init(w)))
    # Where y = -dloss/dy = target - y: half way.
    np.testing.assert_allclose(x @ w, target / 2, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_the_layer_in_parts_of_a_batch_is_the_layer():
    x, w = jax.random.normal(jax.random.key(0), (8, 4)), jnp.ones((4, 2))

    def loss(w, x, share):
        return jnp.sum(jnp.cos(hopt.linear(x, w, share=share))) / 8

    parts = sum(jax.grad(loss)(w, x[i : i + 2], 1 / 8) for i in range(0, 8, 2))
    np.testing.assert_allclose(parts, jax.grad(loss)(w, x, None), rtol=1e-12)


def test_the_layer_takes_any_objective_and_names_those_it_knows():
    x, w = jnp.ones((3, 4)), jnp.ones((4, 2))

    def cubic(prediction, target):
        return jnp.sum((prediction - target) ** 3)

    slope = jax.grad(lambda w: jnp.sum(hopt.linear(x, w, objective=cubic)))(w)
    np.testing.assert_allclose(slope, 3 * (4 + 3) ** 2 * np.ones((4, 2)), rtol=1e-6)
    with pytest.raises(ValueError, match="objective must be one of dot, l2, huber"):
        hopt.linear(x, w, objective="l1")


@pytest.mark.usefixtures("x64")
def test_dense_layers_of_a_model_learn_by_the_objective_that_it_is_told():
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (2, 3, 4))
    layer = layers.Projections(2, 4, 5, key=keys[1])

    def loss(weight):
        merged = nnx.merge(nnx.graphdef(layer), {"weight": weight})
        return sum(jnp.mean(jnp.sum(jnp.sin(y), axis=-1)) for y in merged(x))

    def both(weight):  # in other words: descent on the loss and on what the layer says
        said = jnp.einsum("BTD,PDE->BTPE", x, weight)
        each = jnp.sum(jnp.sin(said), axis=(2, 3)) + jnp.sum(said**2, axis=(2, 3)) / 2
        return jnp.mean(each)

    weight = layer.weight[...].astype(jnp.float64)
    plain = jax.grad(loss)(weight)
    layers.learn_by(layer, "l2")
    np.testing.assert_allclose(
        jax.grad(loss)(weight), jax.grad(both)(weight), rtol=1e-12, atol=1e-12
    )
    layers.learn_by(layer, "dot")
    assert (jax.grad(loss)(weight) == plain).all()


def test_a_model_can_learn_by_delta_gradient_descent_and_says_the_same():
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, VOCABULARY)
    config = dataclasses.replace(MODELS["transformer"], continuum=CONTINUUM)
    slopes, said = {}, {}
    for objective in ("dot", "l2"):
        model = dataclasses.replace(config, objective=objective).build(seed=0)
        graphdef, params = nnx.split(model, nnx.Param)
        info = hopt.describe(nnx.to_pure_dict(params, lambda variable: variable))

        def loss(params, graphdef=graphdef):
            return jnp.mean(nnx.merge(graphdef, params)(tokens)[0] ** 2)

        said[objective], slopes[objective] = jax.jit(jax.value_and_grad(loss))(
            nnx.to_pure_dict(params)
        )
    assert said["dot"] == said["l2"]
    # What has no input of its own to forget is moved by the loss alone, as ever.
    same = jax.tree.map(lambda a, b: bool(jnp.allclose(a, b, 1e-4, 1e-6)), *slopes.values())
    assert jax.tree.map(lambda i: i.role != "matrix", info) == same


def test_dot_is_gradient_descent_and_the_delta_step_follows_its_schedule():
    same(hopt.ggd(0.3, objective="dot"), optax.sgd(0.3))
    same(
        hopt.dgd(lambda step: 0.1 * (step + 1), key_norm=2.0),
        optax.sgd(lambda step: 0.1 * (step + 1) / (1 + 0.4 * (step + 1))),
    )


def test_without_layers_delta_gradient_descent_says_that_it_is_gradient_descent(caplog):
    hopt.dgd(0.1)
    assert "moves by plain gradient descent" in caplog.text


# Momentum with something before and something behind


@pytest.mark.usefixtures("x64")
def test_preconditioned_momentum_is_its_equation():
    tx = hopt.scale_by_preconditioned_momentum(0.9, preconditioner="diagonal", b2=0.8, eps=1e-3)
    m, v, expected = 0, 0, []
    for t, g in enumerate(G):
        v = 0.8 * v + 0.2 * g**2
        m = 0.9 * m + g / (np.sqrt(v / (1 - 0.8 ** (t + 1))) + 1e-3)
        expected.append(m)
    by_hand(tx, expected)


@pytest.mark.usefixtures("x64")
def test_preconditioned_momentum_takes_a_function_of_matrices():
    inverse = np.linalg.inv(np.array([[2.0, 0.5], [0.5, 1.0]]))
    tx = hopt.scale_by_preconditioned_momentum(
        0.5, preconditioner=lambda g: jnp.asarray(inverse) @ g, info=OUT_IN
    )
    first = inverse @ G[0]
    by_hand(tx, [first, first / 2 + inverse @ G[1], first / 4 + inverse @ (G[1] / 2 + G[2])])


@pytest.mark.parametrize(
    "tx",
    [
        hopt.scale_by_preconditioned_momentum(0.9, preconditioner="none"),
        hopt.scale_by_feature_momentum(0.9, feature_map="identity"),
        hopt.scale_by_output_momentum(0.9, nonlinearity="identity"),
        hopt.scale_by_delta_momentum(0.9, erase=0.0),
        hopt.scale_by_gm(0.9, write=1.0, objective="dot"),
        hopt.context_steered(optax.trace(0.9), "none"),
    ],
)
def test_momentum_is_contained(tx):
    same(tx, optax.trace(0.9))


@pytest.mark.usefixtures("x64")
def test_feature_momentum_sums_mapped_gradients():
    by_hand(
        hopt.scale_by_feature_momentum(0.5, feature_map="sign"),
        [
            np.sign(G[0]),
            np.sign(G[0]) / 2 + np.sign(G[1]),
            np.sign(G[0]) / 4 + np.sign(G[1]) / 2 + np.sign(G[2]),
        ],
    )
    unit = np.tanh(G / np.sqrt(np.mean(G**2, axis=(1, 2), keepdims=True)))
    by_hand(
        hopt.scale_by_feature_momentum(0.5, feature_map="tanh"),
        [unit[0], unit[0] / 2 + unit[1], unit[0] / 4 + unit[1] / 2 + unit[2]],
    )


@pytest.mark.usefixtures("x64")
def test_output_momentum_reads_through_its_nonlinearity():
    sums = [G[0], G[0] / 2 + G[1], G[0] / 4 + G[1] / 2 + G[2]]
    by_hand(hopt.scale_by_output_momentum(0.5, nonlinearity="sign"), [np.sign(m) for m in sums])
    for made, m in zip(
        updates_of(hopt.scale_by_output_momentum(0.5), list(jnp.asarray(G))), sums, strict=True
    ):
        left, _, right = np.linalg.svd(m)
        core = left.T @ np.asarray(made) @ right.T
        np.testing.assert_allclose(core, np.diag(np.diag(core)), atol=1e-9)
        assert 0.7 <= np.diag(core).min() <= np.diag(core).max() <= 1.2


@pytest.mark.usefixtures("x64")
def test_muon_is_contained():
    gradients = [{"w": g["w"]} for g in random_gradients()]

    def theirs(m):
        m = m / jnp.linalg.norm(m)
        for _ in range(5):
            square = m.T @ m
            m = 3.4445 * m + m @ (-4.7750 * square + 2.0315 * square @ square)
        return m

    same(
        hopt.scale_by_output_momentum(0.95, nonlinearity=theirs),
        optax.contrib.scale_by_muon(
            nesterov=False,
            weight_dimension_numbers=lambda tree: jax.tree.map(
                lambda _: optax.contrib.MuonDimensionNumbers(), tree
            ),
        ),
        gradients,
    )
    same(
        hopt.scale_by_m3(b1=0.9, slow=0.0, damping=1e9),
        hopt.scale_by_output_momentum(0.9),
        gradients,
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (hopt.AdamWConfig(), optax.adamw(0.1, b2=0.95, weight_decay=0.0)),
        (hopt.SGDConfig(), optax.sgd(0.1, 0.9)),
        (hopt.LionConfig(), optax.lion(0.1, weight_decay=0.0)),
        (hopt.AdEMAMixConfig(b3=0.99, slow=3.0), optax.contrib.ademamix(0.1, 0.9, 0.95, 0.99, 3.0)),
    ],
)
def test_what_optax_has_is_that_of_optax(ours, theirs):
    same(ours.build(0.1), theirs)


def test_what_wraps_optimizers_in_optax_wraps_ours():
    weight, rate = {"w": jnp.ones((4, 4))}, 0.1
    tx = optax.contrib.schedule_free(hopt.delta_momentum(rate, decay=0.0), rate)
    state, params = tx.init(weight), weight
    for _ in range(200):
        updates, state = jax.jit(tx.update)(params, state, params)
        params = optax.apply_updates(params, updates)
    assert optax.tree.norm(optax.contrib.schedule_free_eval_params(state, params)) < 0.5


def test_the_muon_of_the_table_is_that_of_optax():
    config = hopt.MuonConfig(nesterov=False)
    theirs = optax.contrib.muon(
        0.1, nesterov=False, adam_b2=config.b2, consistent_rms=config.rms, beta=config.momentum
    )
    same(config.build(0.1), theirs)


# Delta momentum and its generalisation


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("erase", [0.3, 1.0])
def test_delta_momentum_is_its_equation(erase):
    m, expected = np.zeros((2, 2)), []
    for g in G:
        m = m @ (0.9 * np.eye(2) - erase * g.T @ g / np.sum(g * g)) + g
        expected.append(m)
    by_hand(hopt.scale_by_delta_momentum(0.9, erase=erase, info=OUT_IN), expected)


@pytest.mark.usefixtures("x64")
def test_delta_momentum_knows_which_side_is_which_and_takes_what_is_no_matrix_as_rows():
    keys = jax.random.split(jax.random.key(0), 3)
    out_in = [jax.random.normal(key, (2, 3, 5)) for key in keys]
    ours = hopt.scale_by_delta_momentum(0.9, info={"w": ParamInfo((None,) * 2, "memory_init")})
    other = hopt.scale_by_delta_momentum(0.9, info={"w": ParamInfo((None,) * 2, "matrix")})
    rows = hopt.scale_by_delta_momentum(0.9, info={"w": ParamInfo((None,) * 2, "embedding")})
    one = hopt.scale_by_delta_momentum(0.9, info={"w": ParamInfo((None,), "vector")})
    made = updates_of(ours, [{"w": g} for g in out_in])
    turned = updates_of(other, [{"w": g.mT} for g in out_in])
    by_rows = updates_of(rows, [{"w": g} for g in out_in])
    single = updates_of(one, [{"w": g[1, 2]} for g in out_in])
    m = np.zeros(5)
    for step, g in enumerate(np.asarray(out_in)[:, 1, 2]):
        np.testing.assert_allclose(turned[step]["w"].mT, made[step]["w"], rtol=1e-9, atol=1e-12)
        m = 0.9 * m - 0.9 * (m @ g) * g / (g @ g) + g
        np.testing.assert_allclose(single[step]["w"], m, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(by_rows[step]["w"][1, 2], m, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(3, 5, 2), (3, 2, 5)])
def test_delta_momentum_is_the_l2_case_of_generalised_momentum(shape):
    gradients = [{"w": jnp.asarray(g)} for g in np.random.default_rng(0).normal(size=(6, *shape))]
    info = {"w": ParamInfo((None, None), "matrix")}
    same(
        hopt.scale_by_gm(0.9, write=1.0, objective="l2", info=info),
        hopt.scale_by_delta_momentum(0.9, erase=1.0, info=info),
        gradients,
        tolerance=1e-9,
    )


@pytest.mark.usefixtures("x64")
def test_generalised_momentum_takes_an_objective():
    m, expected = np.zeros((2, 2)), []
    for g in G:
        square = np.sum(g * g)
        error = np.clip(m @ g.T / square - np.eye(2), -1, 1)
        m = 0.9 * m - 0.7 * error @ g
        expected.append(m)
    by_hand(hopt.scale_by_gm(0.9, write=0.7, objective="huber", info=OUT_IN), expected)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_delta_momenta_scale_with_the_gradient(scale):
    for tx in (hopt.scale_by_delta_momentum(), hopt.scale_by_gm()):
        small = updates_of(tx, random_gradients())
        large = updates_of(tx, jax.tree.map(lambda g: g * scale, random_gradients()))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a * scale, b, rtol=1e-4), small, large)


@pytest.mark.parametrize("turn", [0.1, 0.3, 1.0])
def test_delta_momentum_finds_a_moving_valley_before_momentum_does(turn):
    # The toy of fig. 4 in our words: curvature changes with time, here by turning.
    best = jnp.array([1.0, -1.0])

    def loss(w, t):
        along, across = (
            (jnp.cos(turn * t), jnp.sin(turn * t)),
            (-jnp.sin(turn * t), jnp.cos(turn * t)),
        )
        return ((w - best) @ jnp.array(along)) ** 2 / 2 + 0.3 * (
            (w - best) @ jnp.array(across)
        ) ** 2 / 2

    def steps_to_arrive(momentum, rate):
        def step(carry, t):
            w, state = carry
            update, state = momentum.update(jax.grad(loss)(w, t), state)
            return (w - rate * update, state), jnp.linalg.norm(w - best)

        w = jnp.array([-2.0, 2.0])
        _, distance = jax.lax.scan(step, (w, momentum.init(w)), jnp.arange(300.0))
        away = ~(distance < 1e-2)
        return jnp.max(jnp.where(away, jnp.arange(300) + 1, 0))

    rates = jnp.geomspace(1e-3, 3.0, 25)

    def at_best(momentum):
        return int(jnp.min(jax.jit(jax.vmap(lambda rate: steps_to_arrive(momentum, rate)))(rates)))

    assert at_best(hopt.scale_by_delta_momentum(0.9)) < 0.5 * at_best(optax.trace(0.9)) < 150


# Deep momentum


@pytest.mark.usefixtures("x64")
def test_deep_momentum_of_one_number_is_its_equation():
    for objective in ("l2", "dot"):
        w, v, expected = 0.0, 0.0, []
        for t, g in enumerate(G):
            v = 0.8 * v + 0.2 * np.mean(g**2)
            u = g / np.sqrt(v / (1 - 0.8 ** (t + 1)))
            slope = np.mean(((w * u - u) if objective == "l2" else -u) * u)
            w = 0.9 * w - 0.3 * slope / max(abs(slope), 1)
            expected.append(w * u)
        tx = hopt.scale_by_dmgd(1, decay=0.9, rate=0.3, b2=0.8, objective=objective)
        by_hand(tx, expected, tolerance=1e-5)  # the network is float32


@pytest.mark.usefixtures("x64")
def test_deep_momentum_of_rows_is_its_equation():
    w, v, expected = np.zeros((2, 2)), 0.0, []
    for t, g in enumerate(G):
        v = 0.8 * v + 0.2 * np.mean(g**2)
        u = g / np.sqrt(v / (1 - 0.8 ** (t + 1)))
        size = np.sqrt(np.mean(u**2, axis=1, keepdims=True))
        k = u / size
        slope = k.T @ (k @ w - k) / 2
        w = 0.9 * w - 0.3 * slope / max(np.linalg.norm(slope), 1)
        expected.append(k @ w * size)
    tx = hopt.scale_by_dmgd(1, decay=0.9, rate=0.3, b2=0.8, shared="rows", info=OUT_IN)
    by_hand(tx, expected, tolerance=1e-5)


@pytest.mark.parametrize("shared", ["coordinates", "rows"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_deep_momentum_learns_what_gradients_are_like_and_stays_small(depth, shared):
    direction = jax.random.normal(jax.random.key(0), (16, 12))
    tx = hopt.scale_by_dmgd(depth, shared=shared)

    def step(state, key):
        noisy = direction + 0.1 * jax.random.normal(key, direction.shape)
        update, state = tx.update(noisy, state)
        return state, jnp.vdot(update, direction) / jnp.vdot(direction, direction)

    first = tx.init(direction)
    state, along = jax.lax.scan(step, first, jax.random.split(jax.random.key(1), 300))
    assert along[0] > 0
    assert 0.6 < along[-50:].min() < along[-50:].max() < 1.1

    sizes = [layer.size for layer in jax.tree.leaves(state.networks)]
    assert sum(sizes) <= 2 * 16 * 12 + 2 * 64
    moved = optax.tree.norm(optax.tree.sub(state.networks, first.networks))
    assert moved <= hopt.DMGDConfig.rate / (1 - hopt.DMGDConfig.decay)


def test_deep_momentum_never_forgets_how_to_learn():
    tx = hopt.scale_by_dmgd(3, decay=0.5)
    state = tx.init(jnp.zeros((4, 4)))
    for _ in range(50):  # nothing to learn from: all that was learned fades
        _, state = jax.jit(tx.update)(jnp.zeros((4, 4)), state)
    first = tx.init(jnp.zeros((4, 4)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.networks, first.networks
    )


# Regressions


def test_adam_is_contained():
    same(
        hopt.scale_by_adam_memory(b1=0.9, b2=0.99, eps=1e-8),
        optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-8),
    )
    same(
        hopt.scale_by_adam_memory(b1=0.9, b2=0.99, eps=1e-3),
        optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-3),
    )


def test_momentum_is_the_memory_that_answers_with_the_sum_of_squares():
    same(
        hopt.scale_by_adam_memory(target="sum", b1=0.9, eps=1e-9),
        optax.ema(0.9),
    )


@pytest.mark.usefixtures("x64")
def test_the_element_wise_memory_is_the_optimum_of_its_regression():
    fade, eps = 0.8, 1e-2
    weights = 0.2 * fade ** np.arange(2, -1, -1) / (1 - fade**3)
    squares = np.einsum("t,tij->ij", weights, G**2)
    answer = 1 + squares

    def regression(m):
        errors = jnp.einsum("t,tij->", weights, (m * G - answer) ** 2)
        return errors + eps * jnp.sum(jnp.sqrt(squares) * m**2)

    tx = hopt.scale_by_adam_memory(target=lambda h: 1 + h, b1=fade, b2=fade, eps=eps)
    best = updates_of(tx, list(jnp.asarray(G)))[-1]
    np.testing.assert_allclose(jax.grad(regression)(best), 0, atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_outer_memory_is_its_equation():
    m, h, expected = 0, 0, []
    for t, g in enumerate(G):
        m = 0.9 * m + 0.1 * g
        h = h + g.T @ g
        values, vectors = np.linalg.eigh(h)
        expected.append(m / (1 - 0.9 ** (t + 1)) @ vectors @ np.diag(values**-0.5) @ vectors.T)
    by_hand(hopt.scale_by_outer_memory(b1=0.9, eps=1e-12, info=OUT_IN), expected, 1e-9)


def test_outer_memory_of_a_wide_matrix_is_that_of_the_tall_one_turned():
    tx = hopt.scale_by_outer_memory()
    wide = updates_of(tx, [g["w"] for g in random_gradients()])
    tall = updates_of(tx, [g["w"].T for g in random_gradients()])
    for one, other in zip(wide, tall, strict=True):
        np.testing.assert_allclose(one, other.T, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_adagrad_is_contained():
    diagonal = [{"w": jnp.diag(g["b"]), "b": g["b"]} for g in random_gradients()]
    adagrad = optax.scale_by_rss(initial_accumulator_value=0.0, eps=0.0)
    same(hopt.scale_by_outer_memory(b1=0.0, eps=1e-14), adagrad, diagonal)
    same(hopt.scale_by_outer_memory(b1=0.0, largest=1), adagrad)
    same(hopt.scale_by_context("adagrad"), adagrad)
    same(hopt.scale_by_context("outer"), hopt.scale_by_outer_memory(b1=0.0))
    same(hopt.scale_by_context("adam", b2=0.9), optax.scale_by_adam(b1=0.0, b2=0.9))


def test_outer_memory_uses_the_shorter_side_and_refreshes_when_due():
    wide, tall = jnp.ones((3, 2, 7)), jnp.ones((3, 7, 2))
    state = hopt.scale_by_outer_memory().init({"wide": wide, "tall": tall})
    info = {"wide": ParamInfo((None, None), "matrix"), "tall": ParamInfo((None, None), "matrix")}
    tx = hopt.scale_by_outer_memory(refresh=3, info=info)
    state = tx.init({"wide": wide, "tall": tall})
    assert state.outer["wide"].shape == state.outer["tall"].shape == (3, 2, 2)
    fresh = []
    for i in range(10):
        key = jax.random.key(i)
        gradient = {"wide": jax.random.normal(key, wide.shape), "tall": tall}
        old = state.root["wide"]
        _, state = jax.jit(tx.update)(gradient, state)
        fresh.append(bool((state.root["wide"] != old).any()))
    assert fresh == [True, True, True, True, False, False, True, False, False, True]


# M3


@pytest.mark.usefixtures("x64")
def test_m3_is_its_equation():
    gradients = [*G, *G[::-1]]
    m1, m2, v, o2, held, expected = 0, 0, 0, 0, [], []
    for t, g in enumerate(gradients):
        held.append(g)
        m1 = 0.9 * m1 + 0.1 * g
        v = 0.8 * v + 0.2 * g**2
        o = np.asarray(newton_schulz(jnp.asarray(m1))) + 0.5 * o2
        d = o / (np.sqrt(v) + 0.3 * np.sqrt(np.mean(v)))
        expected.append(d * np.linalg.norm(o) / np.linalg.norm(d))
        if (t + 1) % 2 == 0:
            m2 = 0.7 * m2 + 0.3 * np.mean(held, axis=0)
            o2, held = np.asarray(newton_schulz(jnp.asarray(m2))), []
    tx = hopt.scale_by_m3(b1=0.9, b2=0.8, b3=0.7, slow=0.5, period=2, damping=0.3)
    for made, wanted in zip(updates_of(tx, list(jnp.asarray(gradients))), expected, strict=True):
        np.testing.assert_allclose(made, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_printed_m3_is_algorithm_1():
    gradients = [*G, *G[::-1]]
    m1, m2, v, o2, held, expected = 0, 0, 0, 0, [], []
    for t, g in enumerate(gradients):
        if t > 0 and t % 2 == 0:
            m2 = m2 + 0.7 * np.sum(held, axis=0)
            o2, held = np.asarray(newton_schulz(jnp.asarray(m2))), []
        held.append(g)
        m1 = m1 + 0.9 * g
        v = v + 0.8 * g**2
        o1 = np.asarray(newton_schulz(jnp.asarray(m1)))
        expected.append((o1 + 0.5 * o2) / (np.sqrt(v) + 1e-3))
    tx = hopt.scale_by_m3_printed(b1=0.9, b2=0.8, b3=0.7, slow=0.5, period=2, eps=1e-3)
    for made, wanted in zip(updates_of(tx, list(jnp.asarray(gradients))), expected, strict=True):
        np.testing.assert_allclose(made, wanted, rtol=1e-5, atol=1e-6)


def test_m3_does_not_depend_on_the_scale_of_gradients():
    gradients = [{"w": g["w"]} for g in random_gradients(10)]
    for a, b in zip(
        updates_of(hopt.scale_by_m3(period=4), gradients),
        updates_of(hopt.scale_by_m3(period=4), jax.tree.map(lambda g: 1e-6 * g, gradients)),
        strict=True,
    ):
        np.testing.assert_allclose(a["w"], b["w"], rtol=1e-3, atol=1e-4)


def test_m3_orthogonalises_the_slow_momentum_once_in_a_period():
    gradients = [{"w": g["w"]} for g in random_gradients(9)]
    tx = hopt.scale_by_m3(period=4)
    state = tx.init(gradients[0])
    changed = []
    for gradient in gradients:
        old = state.direction["w"]
        _, state = jax.jit(tx.update)(gradient, state)
        changed.append(bool((state.direction["w"] != old).any()))
    assert changed == [False, False, False, True] * 2 + [False]


def test_matrices_of_a_model_are_orthogonalised_and_the_rest_is_not():
    info = {
        "table": ParamInfo((None, None), "embedding"),
        "weight": ParamInfo((None, None), "matrix"),
        "state": ParamInfo(("heads", None, None), "memory_init"),
        "gate": ParamInfo((None, None), "vector"),
    }
    shapes = {"table": (9, 4), "weight": (2, 4, 8), "state": (2, 3, 4, 4), "gate": (4, 8)}
    params = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}
    for name in ("muon", "m3", "output_momentum"):
        state = hopt.OPTIMIZERS[name]().build(0.1, info=info).init(params)
        groups = state[0].inner_states
        matrices, rest = (
            {
                jax.tree_util.keystr(path[-1:])
                for path, x in jax.tree_util.tree_leaves_with_path(groups[label])
                if x.ndim >= 2
            }
            for label in ("matrix", "rest")
        )
        assert matrices == {"['weight']", "['state']"}
        assert rest == {"['table']", "['gate']"}

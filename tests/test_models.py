"""What every model promises: causality, streaming, isolation, a sane start, and that it learns."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_models import MODELS, VOCABULARY

from hope_jax.ops.likelihood import next_token_loss

TIME = 22
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def models():
    return {name: config.build(seed=3) for name, config in MODELS.items()}


def draw(seed=0, batch=2, time=TIME):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, (batch, time))
    starts = np.zeros((batch, time), bool)
    starts[0, 9] = True  # inside a chunk
    starts[-1, [8, 14, 15]] = True  # at a chunk's border, and a document of one token
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(starts)


def logits_of(model, x, starts=None):
    """Logits as a function of the embedded tokens, so that they can be differentiated by them."""
    return model.tower(x, None, starts)[0] @ model.unembedding.T


@every_model
def test_no_token_sees_the_future(models, name):
    model = models[name]
    x = jax.random.normal(jax.random.key(1), (1, TIME, 16))
    slope = jax.jit(jax.grad(lambda x, t: jnp.sum(logits_of(model, x)[:, t] ** 2)))
    for t in (0, 7, 12, TIME - 2):
        gradient = slope(x, t)
        np.testing.assert_array_equal(gradient[:, t + 1 :], 0)
        assert np.abs(gradient[:, : t + 1]).max(-1).min() > 0


@every_model
def test_no_token_sees_another_document(models, name):
    model = models[name]
    x = jax.random.normal(jax.random.key(1), (1, TIME, 16))
    starts = jnp.zeros((1, TIME), bool).at[0, 9].set(True)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(logits_of(model, x, starts)[:, 9:] ** 2)))(x)
    np.testing.assert_array_equal(gradient[:, :9], 0)
    assert np.abs(gradient[:, 9]).max() > 0


@every_model
@pytest.mark.parametrize("with_starts", [False, True], ids=["one_document", "documents"])
@pytest.mark.parametrize("parts", [(13, 9), (3, 8, 1, 10), (1,) * TIME], ids=str)
def test_streaming_equals_reading_whole(models, name, parts, with_starts):
    model = models[name]
    tokens, starts = draw()
    starts = starts if with_starts else None
    call = jax.jit(lambda tokens, memory, starts: model(tokens, memory, starts))
    whole, end = call(tokens, None, starts)
    memory, pieces, at = model.initial_memory(2), [], 0
    for part in parts:
        cut = slice(at, at + part)
        logits, memory = call(tokens[:, cut], memory, None if starts is None else starts[:, cut])
        pieces.append(logits)
        at += part
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(memory, end, rtol=1e-4, atol=1e-4)


@every_model
def test_no_memory_means_the_initial_memory(models, name):
    model = models[name]
    tokens, starts = draw()
    fresh, end = model(tokens, None, starts)
    given, end_again = model(tokens, model.initial_memory(2), starts)
    np.testing.assert_allclose(given, fresh, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(end_again, end, rtol=1e-5, atol=1e-5)


@every_model
def test_rows_of_a_batch_do_not_meet(models, name):
    model = models[name]
    tokens, starts = draw()
    before, _ = model(tokens, None, starts)
    after, _ = model(tokens.at[0].set((tokens[0] + 1) % VOCABULARY), None, starts)
    np.testing.assert_array_equal(after[1], before[1])
    assert np.abs(after[0] - before[0]).max() > 0


def mean_loss(model, tokens):
    hidden, _ = model.hidden(tokens[:, :-1])
    return next_token_loss(hidden, model.unembedding, tokens[:, 1:]).mean()


@every_model
def test_a_fresh_model_is_as_uncertain_as_a_uniform_guess(models, name):
    tokens, _ = draw(batch=64)
    loss = mean_loss(models[name], tokens)
    np.testing.assert_allclose(loss, np.log(VOCABULARY), rtol=0.05)


@every_model
def test_every_parameter_receives_a_gradient(models, name):
    graph, params = nnx.split(models[name], nnx.Param)
    tokens, _ = draw(batch=4)
    gradients = jax.grad(lambda p: mean_loss(nnx.merge(graph, p), tokens))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        size = np.abs(leaf).reshape(leaf.shape[0], -1).max(-1)
        assert np.all(np.isfinite(leaf)), jax.tree_util.keystr(path)
        assert np.all(size > 0) or "embedding" in jax.tree_util.keystr(path), (
            f"{jax.tree_util.keystr(path)} got no gradient in some layer: {size}"
        )


@every_model
def test_bfloat16_stays_close_to_float32(models, name):
    tokens, _ = draw()
    half = replace(MODELS[name], dtype="bfloat16").build(seed=3)
    logits, _ = half(tokens)
    reference, _ = models[name](tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, reference, atol=0.12)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_no_gradient(models, remat):
    tokens, _ = draw()

    def gradient(model):
        graph, params = nnx.split(model, nnx.Param)
        return jax.jit(jax.grad(lambda p: mean_loss(nnx.merge(graph, p), tokens)))(params)

    again = gradient(replace(MODELS["hope"], remat=remat).build(seed=3))
    chex.assert_trees_all_close(again, gradient(models["hope"]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["hope", "hope_mlp", "gated_deltanet"])
def test_a_model_learns_a_batch_by_heart(models, name):
    graph, params = nnx.split(models[name], nnx.Param)
    tokens, _ = draw(batch=4, time=17)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(carry, _):
        params, state = carry
        loss, slope = jax.value_and_grad(lambda p: mean_loss(nnx.merge(graph, p), tokens))(params)
        updates, state = optimizer.update(slope, state)
        return (optax.apply_updates(params, updates), state), loss

    _, losses = jax.lax.scan(step, (params, optimizer.init(params)), length=250)
    assert losses[-1] < 0.1, f"loss after 250 steps: {losses[-1]}"


def test_compile_time_is_flat_in_depth():
    def equations(layers):
        model = replace(MODELS["hope"], layers=layers).build()
        return len(str(jax.make_jaxpr(lambda t: model(t)[0])(draw()[0])).splitlines())

    assert equations(8) == equations(2)


def test_parameters_are_counted_without_making_them(models):
    for name, model in models.items():
        made = sum(leaf.size for leaf in jax.tree.leaves(nnx.split(model, nnx.Param)[1]))
        assert MODELS[name].parameters() == made


def test_a_vocabulary_must_be_known_before_building():
    with pytest.raises(ValueError, match="vocabulary must be set"):
        replace(MODELS["hope"], vocabulary=None).build()


@pytest.mark.parametrize("name", ["hope", "hope_mlp", "titans", "gated_deltanet", "fastkv_hope"])
def test_a_fresh_memory_lasts(name):
    layer = MODELS[name].mixer.build(16, depth=1, key=jax.random.key(0))
    if hasattr(layer, "biases"):  # nothing is written, so that only forgetting is seen
        layer.biases["eta"][...] = jnp.full(2, -30.0)
    else:
        at = layer.frame.gate_names.index("write")
        layer.frame.gates.bias[...] = layer.frame.gates.bias[...].at[at].set(-30.0)
    before = layer.initial_memory(1, jnp.float32)
    x = jax.random.normal(jax.random.key(1), (1, 50, 16))

    def of_interest(state):  # the gates' own memories say how to forget: they stay as they are
        return state["memory"] if isinstance(state, dict) else state

    def mark(state):
        marked = jax.tree.map(lambda m: m + 1.0, of_interest(state))
        return state | {"memory": marked} if isinstance(state, dict) else marked

    after = jax.jit(lambda memory: of_interest(layer(x, memory)[1].fast.state))
    marked = before._replace(fast=before.fast._replace(state=mark(before.fast.state)))
    pairs = zip(jax.tree.leaves(after(before)), jax.tree.leaves(after(marked)), strict=True)
    for plain, kept in pairs:
        assert 0.9 <= np.min(kept - plain) <= np.max(kept - plain) < 1


def test_where_nothing_decays_there_is_no_anchor():
    x = jax.random.normal(jax.random.key(1), (1, TIME, 16))

    def output(**options):
        config = replace(MODELS["hope"].mixer, **options)
        return jax.jit(config.build(16, depth=1, key=jax.random.key(3)).__call__)(x)[0]

    kept, again = (output(decay=False, anchor=anchor) for anchor in (True, False))
    np.testing.assert_allclose(kept, again, rtol=1e-5, atol=1e-6)
    decayed, other = (output(anchor=anchor) for anchor in (True, False))
    assert np.abs(decayed - other).max() > 1e-5 < np.abs(decayed - kept).max()

"""What every model promises: causality, streaming, isolation, a sane start, and that it learns."""

from dataclasses import replace
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_models import MODELS, VOCABULARY

from hope_jax.modules.layers import Embedding
from hope_jax.ops.likelihood import next_token_loss

TIME = 22
every_model = pytest.mark.parametrize("name", MODELS)


@cache
def built(name):
    return MODELS[name].build(seed=3)


@cache
def reader(name):
    """The model as one compiled function, for all tests that call it."""
    model = built(name)
    return jax.jit(lambda tokens, memory, starts: model(tokens, memory, starts))


def draw(seed=0, batch=2, time=TIME):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, (batch, time))
    starts = np.zeros((batch, time), bool)
    starts[0, 9] = True  # inside a chunk
    starts[-1, [8, 14, 15]] = True  # at a chunk's border, and a document of one token
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(starts)


def slope(name):
    """The gradient of what tokens say, those that `seen` picks, with respect to what is read."""
    model = built(name)

    @jax.jit
    @jax.grad
    def run(x, starts, seen):
        logits = model.tower(x, None, starts)[0] @ model.unembedding.T
        return jnp.sum(jnp.where(seen[:, None], logits, 0) ** 2)

    return partial(run, jax.random.normal(jax.random.key(1), (1, TIME, 16)))


@every_model
def test_no_token_sees_the_future_or_another_document(name):
    run, places, starts = slope(name), np.arange(TIME), np.zeros((1, TIME), bool)
    for t in (0, 7, 12, TIME - 2):
        gradient = run(starts, places == t)
        np.testing.assert_array_equal(gradient[:, t + 1 :], 0)
        assert np.abs(gradient[:, : t + 1]).max(-1).min() > 0
    gradient = run(starts | (places == 9), places >= 9)
    np.testing.assert_array_equal(gradient[:, :9], 0)
    assert np.abs(gradient[:, 9]).max() > 0


@pytest.mark.parametrize("name", ["hope", "transformer", "titans", "gated_deltanet"])
def test_no_token_sees_the_future_where_documents_are_not_told_apart(name):
    run, places = slope(name), np.arange(TIME)
    for t in (0, 7, 12, TIME - 2):
        gradient = run(None, places == t)
        np.testing.assert_array_equal(gradient[:, t + 1 :], 0)
        assert np.abs(gradient[:, : t + 1]).max(-1).min() > 0


@every_model
@pytest.mark.parametrize("with_starts", [False, True], ids=["one_document", "documents"])
def test_streaming_equals_reading_whole(name, with_starts):
    tokens, starts = draw()
    starts = starts if with_starts else None
    call = reader(name)
    whole, end = call(tokens, None, starts)
    # Few lengths, for each is compiled: a chunk and a bit, less than a chunk, one token.
    for parts in ((9, 3, 9, 1), (3, 9, 1, 9), (1,) * TIME):
        memory, pieces, at = built(name).initial_memory(2), [], 0
        for part in parts:
            cut = slice(at, at + part)
            logits, memory = call(
                tokens[:, cut], memory, None if starts is None else starts[:, cut]
            )
            pieces.append(logits)
            at += part
        np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, rtol=1e-4, atol=1e-4)
        chex.assert_trees_all_close(memory, end, rtol=1e-4, atol=1e-4)


@every_model
def test_no_memory_means_the_initial_memory(name):
    tokens, starts = draw()
    fresh, end = reader(name)(tokens, None, starts)
    given, end_again = reader(name)(tokens, built(name).initial_memory(2), starts)
    np.testing.assert_allclose(given, fresh, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(end_again, end, rtol=1e-5, atol=1e-5)


@every_model
def test_rows_of_a_batch_do_not_meet(name):
    tokens, starts = draw()
    before, _ = reader(name)(tokens, None, starts)
    after, _ = reader(name)(tokens.at[0].set((tokens[0] + 1) % VOCABULARY), None, starts)
    np.testing.assert_array_equal(after[1], before[1])
    assert np.abs(after[0] - before[0]).max() > 0


@every_model
def test_a_fresh_model_is_as_uncertain_as_a_uniform_guess(name):
    losses = []
    for seed in range(32):
        tokens, _ = draw(seed)
        logits, _ = reader(name)(tokens, None, None)
        scores = jax.nn.log_softmax(logits[:, :-1])
        losses.append(-jnp.take_along_axis(scores, tokens[:, 1:, None], -1))
    np.testing.assert_allclose(jnp.mean(jnp.stack(losses)), np.log(VOCABULARY), rtol=0.05)


def teacher(model):
    """The parameters, and a compiled function of them: mean loss of four rows, and gradients."""
    graph, params = nnx.split(model, nnx.Param)
    tokens, _ = draw(batch=4)

    def mean_loss(params):
        model = nnx.merge(graph, params)
        hidden, _ = model.hidden(tokens[:, :-1])
        return next_token_loss(hidden, model.unembedding, tokens[:, 1:]).mean()

    return params, jax.jit(jax.value_and_grad(mean_loss))


@cache
def taught(name):
    return teacher(built(name))


@every_model
def test_every_parameter_receives_a_gradient(name):
    params, learn = taught(name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(learn(params)[1]):
        size = np.abs(leaf).reshape(leaf.shape[0], -1).max(-1)
        assert np.all(np.isfinite(leaf)), jax.tree_util.keystr(path)
        assert np.all(size > 0) or "embedding" in jax.tree_util.keystr(path), (
            f"{jax.tree_util.keystr(path)} got no gradient in some layer: {size}"
        )


@every_model
def test_bfloat16_stays_close_to_float32(name):
    tokens, _ = draw()
    half = replace(MODELS[name], dtype="bfloat16").build(seed=3)
    logits, _ = jax.jit(half.__call__)(tokens)
    reference, _ = reader(name)(tokens, None, None)
    assert logits.dtype == jnp.float32
    off = np.sqrt(np.mean((logits - reference) ** 2) / np.mean(reference**2))
    assert off < 2**-4  # the largest difference alone is a matter of luck


def test_every_occurrence_of_a_word_counts_in_half_precision():
    graphdef, params = nnx.split(Embedding(3, 4, key=jax.random.key(0)), nnx.Param)
    tokens = jnp.ones((2, 1024), jnp.int32)

    def total(params):
        rows = nnx.merge(graphdef, params)(tokens, jnp.dtype("bfloat16"))
        return jnp.sum(rows.astype(jnp.float32))

    slope = jax.grad(total)(params)["table"][...]
    np.testing.assert_array_equal(slope, np.repeat([[0.0], [tokens.size], [0.0]], 4, axis=1))


@pytest.mark.parametrize(
    ("name", "dtype", "unroll"),
    [
        ("hope", "bfloat16", False),
        ("hope", "float32", True),
        ("attention_in_context", "float32", True),
    ],
)
def test_a_model_laid_out_for_steps_says_the_same(name, dtype, unroll):
    tokens, starts = draw()
    model = replace(MODELS[name], dtype=dtype, unroll=unroll).build(seed=3)
    memory = jax.jit(model.hidden)(tokens[:, :5], model.initial_memory(2))[1]

    @jax.jit
    def laid_out(tokens, memory, starts):
        steps, memory = model.for_steps(memory)
        assert steps.unembedding.dtype == dtype
        logits, memory = steps(tokens, memory, starts)
        return logits, model.after_steps(memory)

    step = jax.jit(model.__call__)
    tolerance = 0 if dtype == "bfloat16" else 1e-5
    for t in range(5, 10):
        now = tokens[:, [t]], memory, starts[:, [t]]
        logits, memory = step(*now)
        same = partial(chex.assert_trees_all_close, rtol=tolerance, atol=tolerance)
        same(laid_out(*now), (logits, memory))


@pytest.mark.parametrize(("remat", "unroll"), [("dots", False), ("full", True)])
def test_neither_rematerialisation_nor_unrolled_layers_change_a_gradient(remat, unroll):
    params, learn = taught("hope")
    same, again = teacher(replace(MODELS["hope"], remat=remat, unroll=unroll).build(seed=3))
    chex.assert_trees_all_close(again(same)[1], learn(params)[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["hope", "hope_mlp", "gated_deltanet"])
def test_a_model_learns_a_batch_by_heart(name):
    params, learn = taught(name)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)

    @jax.jit
    def move(params, slope, state):
        updates, state = optimizer.update(slope, state)
        return optax.apply_updates(params, updates), state

    for _ in range(250):
        loss, slope = learn(params)
        if loss < 0.1:
            return
        params, state = move(params, slope, state)
    pytest.fail(f"loss after 250 steps: {loss}")


def test_compile_time_is_flat_in_depth():
    def equations(layers):
        model = replace(MODELS["hope"], layers=layers).build()
        return len(str(jax.make_jaxpr(lambda t: model(t)[0])(draw()[0])).splitlines())

    assert equations(8) == equations(2)


def test_parameters_are_counted_without_making_them():
    for name in MODELS:
        made = sum(leaf.size for leaf in jax.tree.leaves(nnx.split(built(name), nnx.Param)[1]))
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
    before = layer.initial_memory(1, jnp.dtype("float32"))
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

"""The chunked loss is the cross-entropy of the whole logits, at a fraction of their memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from described import lowered_for
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hope_jax.ops.likelihood import next_token_loss, weighted_loss
from hope_jax.ops.pallas import likelihood as kernels


def whole(hidden, unembedding, targets):
    log_probabilities = jax.nn.log_softmax(hidden @ unembedding.T)
    return -jnp.take_along_axis(log_probabilities, targets[..., None], -1)[..., 0]


def random_call(batch=2, time=37, width=8, words=13, dtype=None, seed=0):
    random = np.random.default_rng(seed)
    hidden = jnp.asarray(random.normal(size=(batch, time, width)), dtype)
    unembedding = jnp.asarray(random.normal(size=(words, width)))
    targets = jnp.asarray(random.integers(0, words, size=(batch, time)))
    weights = jnp.asarray(random.normal(size=(batch, time)))
    return hidden, unembedding, targets, weights


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("chunk", [1, 16, 36, 37, 64])
def test_chunks_change_neither_losses_nor_gradients(chunk):
    hidden, unembedding, targets, weights = random_call()

    def loss(function, hidden, unembedding):
        return jnp.sum(weights * function(hidden, unembedding, targets))

    def chunked(*call):
        return next_token_loss(*call, chunk=chunk)

    np.testing.assert_allclose(
        chunked(hidden, unembedding, targets), whole(hidden, unembedding, targets), rtol=1e-12
    )
    gradients = jax.grad(loss, argnums=(1, 2))
    for found, expected in zip(
        gradients(chunked, hidden, unembedding), gradients(whole, hidden, unembedding), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("chunk", [16, 64])
def test_a_weighted_sum_has_the_value_and_gradients_of_the_losses(chunk):
    hidden, unembedding, targets, weights = random_call()

    def at_once(hidden, unembedding, weights):
        return 3 * weighted_loss(hidden, unembedding, targets, weights, chunk=chunk)

    def one_by_one(hidden, unembedding, weights):
        return 3 * jnp.sum(weights * whole(hidden, unembedding, targets))

    for found, expected in zip(
        jax.tree.leaves(jax.value_and_grad(at_once, (0, 1, 2))(hidden, unembedding, weights)),
        jax.tree.leaves(jax.value_and_grad(one_by_one, (0, 1, 2))(hidden, unembedding, weights)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_second_derivatives_are_those_of_the_whole_loss():
    hidden, unembedding, targets, weights = random_call(time=7)

    def slope(function, hidden):
        inner = jax.grad(lambda words: jnp.sum(weights * function(hidden, words, targets)))
        return jnp.sum(jnp.sin(inner(unembedding)))

    def chunked(*call):
        return next_token_loss(*call, chunk=3)

    found, expected = (jax.grad(slope, argnums=1)(f, hidden) for f in (chunked, whole))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


def test_bfloat16_hidden_states_are_summed_in_float32():
    hidden, unembedding, targets, weights = random_call(
        time=40, width=256, words=300, dtype=jnp.bfloat16
    )
    rounded = unembedding.astype(jnp.bfloat16)
    exact = whole(hidden.astype(jnp.float32), rounded.astype(jnp.float32), targets)
    losses, back = jax.vjp(
        lambda *call: next_token_loss(*call, targets, chunk=16), hidden, unembedding
    )
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, exact, rtol=1e-5, atol=1e-4)
    weights = weights.astype(jnp.float32)
    slopes = back(weights)
    assert [slope.dtype for slope in slopes] == [jnp.bfloat16, jnp.float32]
    at_once = jax.grad(lambda *call: weighted_loss(*call, targets, weights, chunk=16), (0, 1))
    for found, expected in zip(at_once(hidden, unembedding), slopes, strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(
            found.astype(jnp.float32), expected.astype(jnp.float32), rtol=1e-2, atol=1e-4
        )


def test_huge_logits_stay_finite():
    hidden, unembedding, targets, _ = random_call()
    call = (1e4 * hidden, unembedding)
    losses, back = jax.vjp(lambda *call: next_token_loss(*call, targets, chunk=16), *call)
    slopes = back(jnp.ones_like(losses))
    assert all(jnp.isfinite(x).all() for x in (losses, *slopes))


@pytest.mark.parametrize("at_once", [False, True])
def test_memory_does_not_grow_with_time(at_once):
    def temporaries(time):
        hidden, unembedding, targets, weights = random_call(batch=1, time=time, words=2000)

        def loss(*call):
            if at_once:
                return weighted_loss(*call, targets, weights, chunk=64)
            return next_token_loss(*call, targets, chunk=64).sum()

        loss = jax.grad(loss, (0, 1))
        compiled = jax.jit(loss).lower(hidden, unembedding).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(128), temporaries(2048)
    logits_of_all = 4 * 2048 * 2000
    assert long < logits_of_all / 4
    assert long - short < logits_of_all / 16


def test_words_and_rows_may_lie_on_different_devices():
    mesh = jax.make_mesh((2, 2, 2), ("rows", "time", "words"), axis_types=(AxisType.Auto,) * 3)
    hidden, unembedding, targets, _ = random_call(batch=2, time=32, words=16)
    expected = whole(hidden, unembedding, targets)

    def put(x, *axes):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    call = put(hidden, "rows", "time"), put(unembedding, "words"), put(targets, "rows", "time")
    compiled = jax.jit(lambda *call: next_token_loss(*call, chunk=8)).lower(*call).compile()
    np.testing.assert_allclose(compiled(*call), expected, rtol=1e-5, atol=1e-5)
    assert "all-gather" not in compiled.as_text()


KERNEL = "pallas_triton"


def gradients_of_a_weighted_sum(form, hidden, unembedding, targets, weights):
    def loss(hidden, unembedding, weights):
        return weighted_loss(hidden, unembedding, targets, weights, chunk=4, form=form)

    return jax.value_and_grad(loss, (0, 1, 2))(hidden, unembedding, weights)


@pytest.mark.parametrize("chunk", [128, 8192])
@pytest.mark.parametrize("words", [16, 257, 1000, 1024])
def test_the_kernel_scores_as_float64_does(words, chunk, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    hidden, unembedding, targets, weights = random_call(time=9, words=words)
    weights = weights.at[0, 3].set(0)
    found = gradients_of_a_weighted_sum(KERNEL, hidden, unembedding, targets, weights)
    assert (found[1][0][0, 3] == 0).all()
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (hidden, unembedding, weights)]
        whole_sum = jax.value_and_grad(
            lambda h, e, w: jnp.sum(w * whole(h, e, targets)), argnums=(0, 1, 2)
        )
        expected = jax.tree.map(np.asarray, whole_sum(*wide))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [128, 8192])
def test_the_kernel_scores_each_target_and_leaves_gradients_as_they_are(chunk, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    hidden, unembedding, targets, weights = random_call(time=9, words=300)
    targets = targets.at[0, 0].set(300)

    def run(form):
        def loss(hidden, unembedding):
            losses = next_token_loss(hidden, unembedding, targets, chunk=4, form=form)
            return jnp.sum(weights * losses), losses

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(hidden, unembedding)

    chex.assert_trees_all_close(run(KERNEL), run("xla"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 1e4])
def test_the_kernel_rounds_where_xla_does_and_does_not_overflow(size, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 128)
    call = random_call(time=9, words=300, dtype=jnp.bfloat16)
    call = size * call[0], *call[1:]
    expected, found = (gradients_of_a_weighted_sum(form, *call) for form in ("xla", KERNEL))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert jnp.isfinite(b).all()
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("lowest", [-3e38, -jnp.inf])
def test_the_kernel_takes_logits_of_any_size(lowest, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 128)
    logits = jnp.full((2, 300), lowest).at[0, 299].set(-1e4).at[1, :3].set(jnp.asarray([9e3, 0, 0]))
    targets, weights = jnp.asarray([299, 300]), jnp.asarray([2.0, 3.0])
    losses, errors = kernels.errors(logits, targets, weights, logits.dtype, interpret=True)
    np.testing.assert_array_equal(losses, [0, 9e3])
    np.testing.assert_array_equal(errors, jnp.zeros_like(logits).at[1, 0].set(3))
    found, partitions = kernels.scores(logits, targets, interpret=True)
    np.testing.assert_array_equal(found, losses)
    np.testing.assert_array_equal(partitions, [-1e4, 9e3])


def test_the_kernel_runs_where_every_device_has_words_of_all_kinds():
    mesh = jax.make_mesh((8, 1), ("rows", "words"), axis_types=(AxisType.Auto,) * 2)
    call = random_call(batch=8, time=8)

    def of_own_rows(*call):
        return weighted_loss(*call, form=KERNEL)[None]

    rows = PartitionSpec("rows")
    run = jax.shard_map(
        of_own_rows,
        in_specs=(rows, PartitionSpec(), rows, rows),
        out_specs=rows,
        axis_names={"rows"},
        check_vma=False,
    )
    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(lambda *call: jnp.sum(run(*call)), (0, 1)))(*call)
    expected = jax.grad(weighted_loss, (0, 1))(*call)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_gpu_takes_the_kernel():
    call = random_call(words=1000)
    text = lowered_for("NVIDIA H100", jax.value_and_grad(weighted_loss), *call)
    assert "likelihood_errors" in text


def test_the_kernel_says_what_it_does_not_take():
    def differentiate(*call):
        jax.eval_shape(jax.grad(lambda *call: weighted_loss(*call, form=KERNEL)), *call)

    with (
        jax.set_mesh(jax.make_mesh((8,), ("words",), axis_types=(AxisType.Auto,))),
        pytest.raises(ValueError, match="not split over devices, got a mesh of 8"),
    ):
        differentiate(*random_call())
    with jax.enable_x64(True), pytest.raises(ValueError, match="float32 logits, got float64"):
        differentiate(*random_call())


def test_a_chunk_of_nothing_is_an_error():
    *call, _ = random_call()
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        next_token_loss(*call, chunk=0)

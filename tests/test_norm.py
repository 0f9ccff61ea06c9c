"""Norms with a sum before or a gate behind them: the equation, and kernels with its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from described import lowered_for
from jax.sharding import AxisType

from hope_jax.ops.norm import FEWEST, add_norm, gated_norm, rms_norm

KERNEL, EPSILON = "pallas_triton", 1e-3

WIDTHS = pytest.mark.parametrize(("rows", "width"), [(1500, 64), (258, 384)])


def random_call(rows, width, dtype=jnp.float32):
    """Two arrays, of which some rows are near zero, what their answers are owed, and a scale."""
    random = np.random.default_rng(width)
    arrays = random.normal(size=(4, 1, rows, width))
    arrays[:, :, ::7] *= 0.01
    return [jnp.asarray(x, dtype) for x in arrays], jnp.asarray(random.normal(size=width))


def by_hand(x, scale):
    return scale * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPSILON)


def sum_and_norm(x, y, scale, form):
    return add_norm(x, y, scale, epsilon=EPSILON, form=form)


def norm_alone(x, y, scale, form):
    return (y, add_norm(x, None, scale, epsilon=EPSILON, form=form)[1])


def stream_and_norm(x, y, scale, form):
    del y
    return add_norm(x, None, scale, epsilon=EPSILON, form=form)


def gated(x, y, scale, form):
    out = gated_norm(x.reshape(*x.shape[:2], 1, -1), y, scale, epsilon=EPSILON, form=form)
    return out, jnp.zeros_like(out)


def gated_by_a_part(x, y, scale, form):
    """Two heads a token, and a gate that is the last of three parts."""
    heads, gate = x.reshape(1, -1, 2, x.shape[2]), y.reshape(1, -1, 2 * x.shape[2])
    whole = jnp.stack([jnp.ones_like(gate), jnp.zeros_like(gate), gate], axis=2)
    out = gated_norm(heads, whole[:, :, -1], scale, epsilon=EPSILON, whole=whole, form=form)
    return out.reshape(x.shape), jnp.zeros_like(x)


OPS = pytest.mark.parametrize(
    "op", [sum_and_norm, stream_and_norm, norm_alone, gated, gated_by_a_part]
)


def values_and_gradients(op, x, y, owed, scale, form):
    out, back = jax.vjp(lambda *call: op(*call, form), x, y, scale)
    return *out, *back(tuple(owed))


def test_the_op_is_its_equation():
    (x, y, *_), scale = random_call(6, 5)
    total, normed = add_norm(x, y, scale, epsilon=EPSILON)
    np.testing.assert_array_equal(total, x + y)
    expected = by_hand(np.asarray(x + y, np.float64), np.asarray(scale))
    np.testing.assert_allclose(normed, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(rms_norm(x + y, scale, epsilon=EPSILON), normed)
    stream, normed = add_norm(x, None, scale, epsilon=EPSILON)
    np.testing.assert_array_equal(stream, x)
    np.testing.assert_allclose(normed, by_hand(np.asarray(x), scale), rtol=1e-5, atol=1e-6)
    heads = x.reshape(1, 2, 3, 5)
    gate = y.reshape(1, 2, 15)
    expected = by_hand(np.asarray(heads), scale).reshape(gate.shape) * jax.nn.silu(gate)
    np.testing.assert_allclose(gated_norm(heads, gate, scale, epsilon=EPSILON), expected, atol=1e-6)


@OPS
@WIDTHS
def test_kernels_have_the_values_and_gradients_of_float64(op, rows, width):
    (x, y, *owed), scale = random_call(rows, width)
    found = values_and_gradients(op, x, y, owed, scale, KERNEL)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), (x, y, owed, scale))
        expected = jax.tree.map(np.asarray, values_and_gradients(op, *wide, "xla"))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@OPS
def test_kernels_round_once(op):
    (x, y, *owed), scale = random_call(512, 256, jnp.bfloat16)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (x, y, owed, scale))
    if op is sum_and_norm:  # the sum is what is normalized, as everybody else reads it
        total = (x + y).astype(jnp.float32)
        wide = total, jnp.zeros_like(total), *wide[2:]
    found = values_and_gradients(op, x, y, owed, scale, KERNEL)
    expected = values_and_gradients(op, *wide, "xla")
    for a, b in zip(found[:-1], expected[:-1], strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-7, atol=2**-8)
    assert found[-1].dtype == jnp.float32
    np.testing.assert_allclose(found[-1], expected[-1], rtol=1e-4, atol=2e-2)


def test_what_is_normalized_is_the_sum_as_it_is_answered():
    (x, y, *_), scale = random_call(8, 1024, jnp.bfloat16)
    total, normed = sum_and_norm(x, y, scale, KERNEL)
    np.testing.assert_array_equal(normed, stream_and_norm(total, y, scale, KERNEL)[1])


def test_kernels_keep_what_a_loop_over_models_gives_them_apart():
    (x, y, *_), scale = random_call(64, 64)
    x, y = x.reshape(2, 32, 64), y.reshape(2, 32, 64)

    def both(form):
        return jax.vmap(lambda x, y: sum_and_norm(x, y, scale, form))(x, y)

    for a, b in zip(both(KERNEL), both("xla"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", [sum_and_norm, gated_by_a_part])
@pytest.mark.parametrize("rows", [FEWEST - 2, FEWEST])
def test_a_gpu_takes_kernels_for_many_rows(op, rows):
    x = jax.ShapeDtypeStruct((1, rows, 64), jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((64,), jnp.float32)
    run = lambda *call: values_and_gradients(op, *call, "auto")  # noqa: E731
    text = lowered_for("NVIDIA H100", run, x, x, (x, x), scale)
    name = "add_norm" if op is sum_and_norm else "gated_norm"
    assert (f'"{name}_backward"' in text) == (rows == FEWEST)


@pytest.mark.parametrize(
    ("rows", "width", "dtype", "said"),
    [
        (8, 96, jnp.float32, "a power of two or a multiple of 128, got 96"),
        (8, 32, jnp.float32, "64 to 4096 features"),
        (8, 8192, jnp.float32, "64 to 4096 features"),
        (8, 64, jnp.float16, "bfloat16 and float32, got float16"),
    ],
)
def test_kernels_say_what_they_do_not_take(rows, width, dtype, said):
    (x, y, *_), scale = random_call(rows, width, dtype)
    for op in (sum_and_norm, gated):
        with pytest.raises(ValueError, match=said):
            op(x, y, scale, KERNEL)


def test_kernels_take_one_dtype_on_one_device():
    (x, y, *_), scale = random_call(8, 64)
    with pytest.raises(ValueError, match="arrays of one dtype, got bfloat16 and float32"):
        sum_and_norm(x.astype(jnp.bfloat16), y, scale, KERNEL)
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="not split over devices"):
        sum_and_norm(x, y, scale, KERNEL)

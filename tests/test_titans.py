"""Titans' neural memory: the forms are one function, it is the written one, and it stays."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.ops.titans import TitansMemory, fresh_memory, titans

close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
LONG = {"xla_backend_optimization_level": 1}  # what runs for seconds is worth more compiling


def unit(x):
    return x / jnp.sqrt(jnp.sum(x**2, -1, keepdims=True) + 1e-6)


def random_call(*, deep=True, starts=False, carried=False, bounds=False, time=13, batch=2, heads=2):
    """The op's arrays by name, starts among them."""
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape))  # noqa: E731
    values, hidden, width = (4, 5, 4) if deep else (3, None, 4)

    def matrices(*front):
        if deep:
            return normal(*front, values, hidden), normal(*front, hidden, width)
        return (normal(*front, values, width),)

    def gate():
        drawn = jax.nn.sigmoid(normal(batch, time, heads))
        return drawn.at[:, 4].set(0.0).at[:, 5].set(1.0) if bounds else drawn

    tokens = {
        "q": unit(normal(batch, time, heads, width)),
        "k": unit(normal(batch, time, heads, width)),
        "v": normal(batch, time, heads, values),
        "retain": gate(),
        "write": gate(),
        "momentum": gate(),
    }
    initial = matrices(heads)
    parts = tuple(matrices(batch, heads) for _ in range(3)) if carried else None
    where = jnp.asarray(random.random((batch, time)) < 0.2) if starts else None
    return tokens, initial, parts, where


def carry(parts):
    return None if parts is None else TitansMemory(jnp.int32(3), *parts)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("chunk", [1, 4, 16])
@pytest.mark.parametrize(
    "case",
    [{"starts": True, "carried": True}, {"deep": False, "starts": True, "carried": True},
     {"bounds": True}],
    ids=["deep", "linear", "gates at their bounds"],
)  # fmt: skip
def test_chunks_equal_the_recurrence_in_values_and_all_gradients(case, chunk):
    tokens, initial, parts, starts = random_call(**case)

    def loss(form, tokens, initial, parts):
        y, memory = titans(
            **tokens, initial=initial, memory=carry(parts), starts=starts, chunk=chunk, form=form
        )
        leaves = jax.tree.leaves((y, memory[1:]))
        return sum(jnp.sum(jnp.sin(leaf + i)) for i, leaf in enumerate(leaves)), (y, memory)

    got, expected = (
        jax.jit(jax.value_and_grad(partial(loss, form), (0, 1, 2), has_aux=True))(
            tokens, initial, parts
        )
        for form in ("chunked", "reference")
    )
    jax.tree.map(close, got, expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("deep", [True, False])
def test_recurrence_is_the_written_equation(deep):
    chunk = 3
    tokens, initial, _, _ = random_call(deep=deep, time=7)

    def run(layers, x):
        if len(layers) == 1:
            return layers[0] @ x
        return x + layers[0] @ jax.nn.silu(layers[1] @ x)

    @jax.jit
    @jax.grad
    def surprise(layers, key, value):
        return jnp.sum((run(layers, key) - value) ** 2) / 2

    y, memory = jax.jit(partial(titans, chunk=chunk, form="reference"))(**tokens, initial=initial)
    for row in range(2):
        for h in range(2):
            state = held = origin = [matrix[h] for matrix in initial]
            momentum = [jnp.zeros_like(matrix) for matrix in state]
            for t in range(7):
                held = state if t % chunk == 0 else held
                q, k, v, retain, write, rate = (array[row, t, h] for array in tokens.values())
                gradient = surprise(held, k, v)
                inputs = [jax.nn.silu(held[1] @ k), k] if deep else [k]
                for i, x in enumerate(inputs):
                    step = write / (1 + chunk * write * (x @ x))
                    momentum[i] = rate * momentum[i] - (1 - rate) * step * gradient[i]
                parts = zip(origin, state, momentum, strict=True)
                state = [m0 + retain * (m - m0) + s for m0, m, s in parts]
                close(y[row, t, h], run(state, q))
            jax.tree.map(close, [m[row, h] for m in memory.state], state)
            jax.tree.map(close, [m[row, h] for m in memory.momentum], momentum)


@pytest.mark.usefixtures("x64")
def test_reading_in_pieces_changes_nothing():
    tokens, initial, _, starts = random_call(starts=True)
    read = jax.jit(partial(titans, chunk=4))
    whole, end = read(**tokens, initial=initial, starts=starts)
    for split in (1,) * 13, (1, 2, 2, 5, 3), (5, 3, 5):
        memory, pieces = fresh_memory(initial, 2), []
        for stop, length in zip(np.cumsum(split), split, strict=True):
            piece = jax.tree.map(lambda a: a[:, stop - length : stop], (tokens, starts))
            y, memory = read(**piece[0], initial=initial, memory=memory, starts=piece[1])
            pieces.append(y)
        close(jnp.concatenate(pieces, 1), whole)
        jax.tree.map(close, memory, end)


@pytest.mark.parametrize("form", ["chunked", "reference"])
def test_nothing_passes_a_document_start_or_comes_from_later_tokens(form):
    tokens, initial, parts, _ = random_call(carried=True)
    starts = jnp.zeros((2, 13), bool).at[:, 6].set(True)

    def loss(tokens, parts):
        y, _ = titans(
            **tokens, initial=initial, memory=carry(parts), starts=starts, chunk=4, form=form
        )
        return jnp.sum(jnp.sin(y[:, 6:10]))

    gradients, memory_gradients = jax.jit(jax.grad(loss, (0, 1)))(tokens, parts)
    by_token = sum(jnp.abs(g).reshape(2, 13, -1).sum(-1) for g in gradients.values())
    assert (by_token[:, :6] == 0).all()
    assert (by_token[:, 10:] == 0).all()
    assert (by_token[:, 6:10] > 0).all()
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(memory_gradients))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_hundred_thousand_tokens_leave_norms_where_they_were(dtype):
    """Rows: random, constant, and a few tokens in endless repetition; strong writes."""
    width, length, pieces = 16, 5000, 20
    one, two, three = jax.random.split(jax.random.key(2), 3)
    outer = jax.random.normal(one, (1, width, 32)) / 32**0.5
    initial = (outer, jax.random.normal(two, (1, 32, width)) / width**0.5)

    def piece(memory, key):
        drawn = jax.random.normal(key, (2, 3, length, 1, width))
        first = jnp.broadcast_to(drawn[:, 1:2, :1], drawn[:, 1:2].shape)
        tiled = jnp.tile(drawn[:, 2:, :10], (1, 1, length // 10, 1, 1))
        k, v = jnp.concatenate([drawn[:, :1], first, tiled], 1)
        gates = (jnp.full((3, length, 1), gate, dtype) for gate in (0.99, 0.9, 0.5))
        k, v = unit(k).astype(dtype), v.astype(dtype)
        y, memory = titans(k, k, v, *gates, initial, memory, chunk=64)
        norm = sum(jnp.sum(m**2, (1, 2, 3)) for m in memory.state) ** 0.5
        return memory, (norm, jnp.isfinite(y).all())

    stream = jax.jit(
        lambda keys: jax.lax.scan(piece, fresh_memory(initial, 3), keys)[1], compiler_options=LONG
    )
    norms, finite = stream(jax.random.split(three, pieces))
    begin = sum(jnp.sum(m**2) for m in initial) ** 0.5
    assert finite.all()
    assert (norms < 10 * begin).all()
    assert (norms > begin / 10).all()


def test_bfloat16_inputs_leave_float32_memories():
    tokens, initial, _, _ = random_call()
    call = jax.jit(partial(titans, chunk=4))
    expected, _ = call(**tokens, initial=initial)
    low = {name: array.astype(jnp.bfloat16) for name, array in tokens.items()}
    y, memory = call(**low, initial=initial)
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(memory[1:]))
    close(y.astype(jnp.float32), expected, rtol=0.05, atol=0.05)


def test_what_does_not_fit_is_one_clear_error():
    tokens, initial, _, _ = random_call()
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        titans(**tokens, initial=initial, chunk=0)
    with pytest.raises(ValueError, match=r"initial must be one matrix \[H, V, K\], or"):
        titans(**tokens, initial=initial[:1], chunk=4)

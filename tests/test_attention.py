"""Sliding attention against its definition, whole and in pieces, near and far from the start."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from described import mesh_of

from hope_jax.ops import attention
from hope_jax.ops.rotary import rotary_angles, rotate


@partial(jax.jit, static_argnames=("window", "base", "block"))
def sliding_attention(q, k, v, memory=None, starts=None, *, window, base=10_000.0, block=None):
    """With queries and keys that turn, as in a layer."""
    positions = attention.positions_after(memory, q.shape[1])
    angle = rotary_angles(positions, q.shape[-1], base)
    q, k = rotate(q, angle), rotate(k, angle)
    return attention.sliding_attention(q, k, v, memory, starts, window=window, block=block)


def draw(time, heads=4, groups=2, width=6, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(2, time, n, width) for n in (heads, groups, groups)]
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def turn(x, position, base):
    """Rotates complex numbers, in float64: another way to write the rotary embedding."""
    half = x.shape[-1] // 2
    frequency = base ** (-np.arange(half) * 2.0 / x.shape[-1])
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * position * frequency)
    return np.concatenate([turned.real, turned.imag], -1)


def by_definition(q, k, v, starts, window, base):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    y = np.zeros_like(q)
    for b, t, h in np.ndindex(*q.shape[:3]):
        g = h // (q.shape[2] // k.shape[2])
        first = max(0, t - window + 1, *np.flatnonzero(starts[b, : t + 1]))
        query = turn(q[b, t, h], t, base)
        keys = np.stack([turn(k[b, s, g], s, base) for s in range(first, t + 1)])
        weights = np.exp(keys @ query / np.sqrt(q.shape[-1]))
        y[b, t, h] = weights / weights.sum() @ v[b, first : t + 1, g]
    return y


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("window", [1, 5, 64])
@pytest.mark.parametrize("with_starts", [False, True])
def test_attention_is_what_its_definition_says(window, with_starts, block):
    q, k, v = draw(13)
    starts = np.zeros((2, 13), bool)
    if with_starts:
        starts[0, 4], starts[1, [7, 8]] = True, True
    starting = jnp.asarray(starts) if with_starts else None
    y, _ = sliding_attention(q, k, v, None, starting, window=window, base=50.0, block=block)
    expected = by_definition(q, k, v, starts, window, 50.0)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("parts", [(13,), (1, 12), (6, 7), (2, 9, 1, 1)], ids=str)
@pytest.mark.parametrize("window", [1, 5, 64])
def test_a_ring_of_keys_remembers_the_window(window, parts, block):
    q, k, v = draw(13)
    starts = jnp.zeros((2, 13), bool).at[0, 4].set(True)
    whole, end = sliding_attention(q, k, v, None, starts, window=window)
    memory, pieces, at = None, [], 0
    for part in parts:
        cut = slice(at, at + part)
        y, memory = sliding_attention(
            q[:, cut], k[:, cut], v[:, cut], memory, starts[:, cut], window=window, block=block
        )
        pieces.append(y)
        at += part
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, rtol=1e-5, atol=1e-5)
    for again, once in zip(memory, end, strict=True):
        np.testing.assert_allclose(again, once, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("carried", [False, True])
def test_blocks_of_queries_have_the_gradient_of_all_at_once(carried):
    q, k, v = draw(13)
    starts = jnp.zeros((2, 13), bool).at[0, 7].set(True)
    memory = sliding_attention(q, k, v, window=6)[1] if carried else None

    def loss(q, k, v, memory, block):
        y, memory = sliding_attention(q, k, v, memory, starts, window=6, block=block)
        return jnp.sum(jnp.sin(y)) + jnp.sum(memory.keys * memory.values)

    once, blocks = (
        jax.grad(loss, argnums=(0, 1, 2, 3), allow_int=True)(q, k, v, memory, block)
        for block in (None, 4)
    )
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(blocks), strict=True):
        if a.dtype == q.dtype:
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("window", [5, 64])
def test_documents_told_apart_by_features_are_those_of_a_mask(window):
    q, k, v = draw(13)
    starts = jnp.zeros((2, 13), bool).at[0, [4, 5, 10]].set(True).at[1, 0].set(True)
    angle = rotary_angles(jnp.arange(13), q.shape[-1], 10_000.0)
    begin = jax.lax.cummax(jnp.where(starts, jnp.arange(13), 0), axis=1)

    def by_features(q, k, v):
        q, k = rotate(q, angle), rotate(k, angle)
        return attention._causal_in_documents(q, k, v, begin, window)

    def by_mask(q, k, v):
        return sliding_attention(q, k, v, None, starts, window=window)[0]

    def with_gradients(read):
        y, pull = jax.vjp(read, q, k, v)
        late = jnp.zeros_like(y).at[0, 10:].set(1)
        return y, pull(jnp.sin(jnp.arange(y.size)).reshape(y.shape)), pull(late)

    found, expected = (jax.jit(partial(with_gradients, f))() for f in (by_features, by_mask))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)
    _, dk, dv = found[2]
    assert not dk[0, :10].any()
    assert not dv[0, :10].any()


@pytest.mark.parametrize(
    ("kind", "width", "fused"),
    [("NVIDIA A100", 112, True), ("NVIDIA A100", 128, False), ("NVIDIA H100", 128, True),
     ("NVIDIA H100", 256, False), ("NVIDIA H100", 60, False)],
)  # fmt: skip
def test_heads_with_room_for_more_features_are_fused_in_documents(kind, width, fused):
    q = jnp.zeros((1, 4096, 1, width), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh_of(kind)):
        found = attention._implementation(q, more=attention._digits(4096))
    assert found == ("cudnn" if fused else None)


@pytest.mark.parametrize("documents", [False, True])
def test_memory_grows_with_the_text_and_not_with_its_square(documents):
    def bytes_used(time):
        def loss(q, k, v, starts):
            starts = starts if documents else None
            return jnp.sum(sliding_attention(q, k, v, None, starts, window=time)[0])

        shapes = [jax.ShapeDtypeStruct((1, time, 1, 8), jnp.float32)] * 3
        starts = jax.ShapeDtypeStruct((1, time), bool)
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes, starts).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_used(16384) < 2.5 * bytes_used(8192)


def test_angles_stay_exact_ten_million_tokens_away():
    positions = np.array([0, 5, 4095, 4096, 10_000_019], np.int32)
    angle = np.asarray(rotary_angles(jnp.asarray(positions), 8, 10_000.0), np.float64)
    exact = positions[:, None].astype(np.float64) * 10_000.0 ** (-np.arange(0, 8, 2) / 8.0)
    np.testing.assert_allclose(np.exp(1j * angle), np.exp(1j * exact), atol=5e-3)

"""The solve and the in-chunk algebra equal what they replace, in values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.ops import recurrence
from hope_jax.ops.triangular import unit_lower_inverse, unit_lower_solve

close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)


def random_lower(size, batch=(2,), scale=0.3):
    return jnp.tril(scale * jax.random.normal(jax.random.key(size), (*batch, size, size)), -1)


@pytest.mark.parametrize("size", [1, 2, 7, 15, 16, 17, 33, 64, 100])
@pytest.mark.usefixtures("x64")
def test_inverse_and_its_gradient_equal_a_dense_inverse(size):
    lower = random_lower(size, scale=0.5 / size**0.5)
    weights = jax.random.normal(jax.random.key(0), lower.shape)

    def dense(lower):
        return jnp.linalg.inv(jnp.eye(size) + jnp.tril(lower, -1))

    @partial(jax.jit, static_argnums=0)
    def both(inverse, lower):
        value, back = jax.vjp(inverse, lower)
        return value, *back(weights)

    jax.tree.map(close, both(unit_lower_inverse, lower), both(dense, lower))


@pytest.mark.parametrize("size", [1, 16, 37])
@pytest.mark.usefixtures("x64")
def test_solve_sends_its_gradient_to_the_matrix_and_the_right_side(size):
    lower = random_lower(size, scale=0.5 / size**0.5)
    right = jax.random.normal(jax.random.key(1), (2, size, 3))

    def ours(lower, right):
        return jnp.sum(jnp.sin(unit_lower_solve(lower, unit_lower_inverse(lower), right)))

    def dense(lower, right):
        return jnp.sum(jnp.sin(jnp.linalg.solve(jnp.eye(size) + jnp.tril(lower, -1), right)))

    for gradient, expected in zip(
        *(jax.jit(jax.grad(f, (0, 1)))(lower, right) for f in (ours, dense)), strict=True
    ):
        close(gradient, expected)


def test_inverse_survives_keys_that_are_all_the_same():
    size = 128
    lower = jnp.tril(jnp.full((size, size), 0.999), -1)
    inverse = unit_lower_inverse(lower)
    expected = np.linalg.inv(np.eye(size) + np.tril(np.full((size, size), 0.999), -1))
    np.testing.assert_allclose(inverse, expected, atol=2e-5)


@pytest.mark.parametrize("gate", ["random", "zeros", "ones", "mixed"])
@pytest.mark.usefixtures("x64")
def test_decays_are_exact_products_also_at_the_bounds(gate):
    values = jax.random.uniform(jax.random.key(3), (9,))
    values = {
        "random": values,
        "zeros": jnp.zeros(9),
        "ones": jnp.ones(9),
        "mixed": values.at[jnp.array([2, 6])].set(0.0).at[4].set(1.0),
    }[gate]
    weights = jax.random.normal(jax.random.key(4), (9, 9))

    def loop(gate):
        return jnp.stack(
            [
                jnp.stack(
                    [jnp.prod(gate[s + 1 : t + 1]) if s <= t else 0 * gate[0] for s in range(9)]
                )
                for t in range(9)
            ]
        )

    @partial(jax.jit, static_argnums=0)
    def both(decays, gate):
        value, back = jax.vjp(decays, gate)
        return value, *back(weights)

    jax.tree.map(close, both(recurrence.decays, values), both(loop, values))


TOKENS = 11
SWITCHES = ["erase", "momentum", "starts", "padding", "anchor", "origin"]
CASES = [
    (),
    ("erase",),
    ("erase", "momentum"),
    ("erase", "anchor", "origin"),
    ("erase", "starts"),
    ("erase", "starts", "origin"),
    ("momentum", "starts", "padding"),
    ("erase", "momentum", "starts", "padding", "anchor", "origin"),
    ("erase", "momentum", "starts", "padding", "origin"),
]


def random_chunk(case, seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 20))
    normal = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    gate = lambda: jax.random.uniform(next(keys), (2, TOKENS)).at[:, 6].set(0.0).at[:, 7].set(1.0)  # noqa: E731
    live = np.arange(TOKENS) % 10 != 0 if "padding" in case else np.ones(TOKENS, bool)
    arrays = {
        "keys": normal(2, TOKENS, 4),
        "retain": gate(),
        "erase": gate() * 0.3 if "erase" in case else None,
        "writes": normal(2, TOKENS, 3),
        "state": normal(2, 3, 4),
        "rate": gate() if "momentum" in case else None,
        "momentum": normal(2, 3, 4) if "momentum" in case else None,
        "origin": normal(3, 4) if "origin" in case else None,
        "queries": normal(2, TOKENS, 4),
        "left": normal(2, TOKENS, 3),
    }
    starts = jnp.array([[1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]], bool)
    return arrays, (starts & live) if "starts" in case else None, live


def by_products(arrays, starts, live, case):
    steps = recurrence.factor(
        arrays["keys"], arrays["retain"], arrays["erase"], arrays["rate"], starts,
        jnp.asarray(live) if "padding" in case else None, anchor="anchor" in case,
    )  # fmt: skip
    path = recurrence.follow(
        steps, arrays["state"], arrays["writes"], arrays["momentum"], arrays["origin"]
    )
    y = [recurrence.read(steps, path, arrays["queries"], own=own) for own in (False, True)]
    y += [recurrence.read_transposed(steps, path, arrays["left"], own=own) for own in (False, True)]
    return [*y, *recurrence.advance(steps, path)]


def token_by_token(arrays, starts, live, case):
    state = arrays["state"]
    momentum = jnp.zeros_like(state) if arrays["momentum"] is None else arrays["momentum"]
    origin = jnp.zeros_like(state) if arrays["origin"] is None else arrays["origin"] + 0 * state
    anchor = origin if "anchor" in case else jnp.zeros_like(state)
    y = [[], [], [], []]
    scale = lambda gate, x: gate[:, None, None] * x  # noqa: E731
    for t in range(TOKENS):
        if starts is not None:
            state = jnp.where(starts[:, t, None, None], origin, state)
            momentum = jnp.where(starts[:, t, None, None], 0, momentum)
        k, q, left = arrays["keys"][:, t], arrays["queries"][:, t], arrays["left"][:, t]
        y[0].append(jnp.einsum("BVK,BK->BV", state, q))
        y[2].append(jnp.einsum("BVK,BV->BK", state, left))
        if live[t]:
            written = jnp.einsum("BV,BK->BVK", arrays["writes"][:, t], k)
            rate = jnp.zeros(2) if arrays["rate"] is None else arrays["rate"][:, t]
            momentum = scale(rate, momentum) + written
            erase = jnp.zeros(2) if arrays["erase"] is None else arrays["erase"][:, t]
            erased = jnp.einsum("B,BVK,BK,BJ->BVJ", erase, state, k, k)
            state = anchor + scale(arrays["retain"][:, t], state - anchor) - erased + momentum
        y[1].append(jnp.einsum("BVK,BK->BV", state, q))
        y[3].append(jnp.einsum("BVK,BV->BK", state, left))
    final = momentum if arrays["momentum"] is not None else None
    return [*(jnp.stack(part, 1) for part in y), state, final]


@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.usefixtures("x64")
def test_products_equal_the_recurrence_in_values_and_all_gradients(case):
    arrays, starts, live = random_chunk(case)

    def loss(form, arrays):
        outputs = form(arrays, starts, live, case)
        return sum(jnp.sum(jnp.sin(y + i)) for i, y in enumerate(outputs) if y is not None), outputs

    (_, outputs), gradient = jax.jit(jax.value_and_grad(partial(loss, by_products), has_aux=True))(
        arrays
    )
    (_, expected), expected_gradient = jax.jit(
        jax.value_and_grad(partial(loss, token_by_token), has_aux=True)
    )(arrays)
    jax.tree.map(close, outputs, expected)
    jax.tree.map(close, gradient, expected_gradient)

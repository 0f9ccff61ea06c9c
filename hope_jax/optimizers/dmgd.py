"""Deep momentum: a small network that learns, step by step, to turn gradients into updates."""

from dataclasses import dataclass, replace
from functools import partial
from math import prod, sqrt
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from hope_jax.ops.linear import OBJECTIVES
from hope_jax.optimizers.parameters import (
    ParamInfo,
    each,
    from_matrices,
    is_matrix,
    to_matrices,
    with_info,
)
from hope_jax.optimizers.standard import check_positive, check_shares, descend, divide, settings

TOGETHER = 1 << 23
"""Coordinates whose hidden units are computed at once."""

Network = tuple[Float[Array, "... _into _out"], ...]


@dataclass(frozen=True, kw_only=True)
class DMGDConfig:
    """Deep momentum gradient descent, see `dmgd`.

    Attributes:
      depth: Layers of the network, 1 to 4.
      hidden: Its hidden units.
      shared: Who shares a network: the "coordinates" of a matrix, each a network input of its own,
        or its "rows" (out), of as many inputs as the layer has.
      objective: What the network minimises in (its output, the gradient).
      decay: Share of what it learned that survives a step (alpha).
      rate: Size of its step (eta).
      b2: Share of the gradients' mean square that survives a step.
      seed: Of its first weights.
    """

    kind: Literal["dmgd"] = "dmgd"
    depth: int = 2
    hidden: int = 8
    shared: Literal["coordinates", "rows"] = "coordinates"
    objective: Literal["dot", "l2", "huber"] = "l2"
    decay: float = 0.99
    rate: float = 0.1
    b2: float = 0.95
    seed: int = 0

    def __post_init__(self):
        self.build(0.0)

    def build(
        self,
        learning_rate: optax.ScalarOrSchedule,
        *,
        weight_decay: float = 0.0,
        info: PyTree[ParamInfo] | None = None,
    ) -> optax.GradientTransformation:
        """Makes the optimizer, see `descend` for the arguments."""
        return dmgd(learning_rate, **settings(self), weight_decay=weight_decay, info=info)


class DMGDState(NamedTuple):
    """State of `scale_by_dmgd`.

    Attributes:
      count: Steps so far.
      square: Mean of g^2 over a matrix and over time, one number for each matrix.
      networks: In the place of a parameter its network's layers, stacked over its matrices.
    """

    count: Int[Array, ""]
    square: PyTree[Float[Array, " N"]]
    networks: PyTree[Network]


def scale_by_dmgd(
    depth: int = DMGDConfig.depth,
    *,
    hidden: int = DMGDConfig.hidden,
    shared: str = DMGDConfig.shared,
    objective: str = DMGDConfig.objective,
    decay: float = DMGDConfig.decay,
    rate: float = DMGDConfig.rate,
    b2: float = DMGDConfig.b2,
    seed: int = DMGDConfig.seed,
    info: PyTree[ParamInfo] | None = None,
) -> optax.GradientTransformation:
    """Momentum that is a network m from gradients to updates, and learns what gradients are like.

        u = g / sqrt(mean g^2),    k = the coordinates or the rows of u, each of mean square 1
        m <- m_0 + alpha (m - m_0) - eta d/dm mean_k objective(m(k), k)
        update = m(u)

    The network is bias-free with tanh between its layers. Its last layer starts at zero, so m_0
    says nothing, as momentum does at first, and the first write makes it say something that points
    where the gradients do. It forgets towards m_0, not to zero, where a deep network could not
    learn. The step is clipped to norm 1, so that no gradient can throw the network off: its weights
    stay within eta / (1 - alpha) of m_0.

    Every matrix (of a stack, too) has one network, shared by its coordinates (layers of at most
    `hidden x hidden`) or its rows (`in x hidden`; at depth 1 `in x in`). What is no matrix, and an
    embedding, shares by coordinates. At depth 1 with coordinates it is momentum of one number.

    Args:
      depth: Layers, 1 to 4.
      hidden: Units between layers.
      shared: "coordinates" or "rows".
      objective: One of `hope_jax.ops.linear.OBJECTIVES`; "l2" learns to reproduce gradients that
        keep coming, "dot" amplifies them.
      decay: alpha.
      rate: eta.
      b2: Share of the mean square of gradients that survives a step.
      seed: Of m_0.
      info: See `descend`.

    References:
      Behrouz et al., "Nested Learning", 2025, equation 50.
    """
    check_shares({"decay": decay, "b2": b2})
    check_positive({"hidden": hidden, "rate": rate})
    if not 1 <= depth <= 4:
        raise ValueError(f"depth must lie in 1 to 4, got {depth}")
    if shared not in ("coordinates", "rows"):
        raise ValueError(f"shared must be coordinates or rows, got {shared!r}")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")

    def by_rows(one: ParamInfo, x: Array) -> bool:
        return shared == "rows" and is_matrix(one, x)

    def stacked(one: ParamInfo, x: Array) -> tuple[int, ...]:
        *stack, out, into = jax.eval_shape(partial(to_matrices, _whole(one)), x).shape
        return prod(stack), out, into

    def first(one: ParamInfo, x: Array) -> Network:
        features = stacked(one, x)[-1] if by_rows(one, x) else 1
        widths = (features, *[hidden] * (depth - 1), features)
        return _first_network(stacked(one, x)[0], widths, seed)

    def init(params: optax.Params) -> DMGDState:
        return DMGDState(
            jnp.zeros((), jnp.int32),
            with_info(lambda i, x: jnp.zeros(stacked(i, x)[0]), params, info=info),
            with_info(first, params, info=info),
        )

    def update(updates, state, params=None):
        del params
        count = state.count + 1

        def one(info: ParamInfo, g: Array, square: Array, network: Network) -> tuple:
            matrices = to_matrices(_whole(info), g)
            view = matrices.shape
            matrices = matrices.astype(jnp.float32).reshape(stacked(info, g))
            square = b2 * square + (1 - b2) * jnp.sum(matrices**2, axis=(-2, -1)) / max(
                prod(matrices.shape[-2:]), 1
            )
            unit = divide(matrices, jnp.sqrt(square / (1 - b2**count))[:, None, None])
            network, read = learn(by_rows(info, g), unit, network, first(info, g))
            update = from_matrices(_whole(info), read.reshape(view), g)
            return update.astype(g.dtype), square, network

        updates, square, networks = each(3, one, updates, state.square, state.networks, info=info)
        return updates, DMGDState(count, square, networks)

    def learn(
        rows: bool, unit: Float[Array, "N out in"], network: Network, start: Network
    ) -> tuple[Network, Float[Array, "N out in"]]:
        """Moves the network of each matrix by one step, and reads it."""
        answer = _answer_rows if rows else _answer_coordinates

        def one(unit: Array, network: Network, start: Network) -> tuple[Network, Array]:
            size = jnp.sqrt(jnp.mean(unit**2, axis=-1, keepdims=True)) if rows else 1.0
            keys = divide(unit, size)
            count = keys.shape[0] if rows else keys.size

            def loss(network: Network) -> Array:
                return OBJECTIVES[objective](answer(network, keys), keys) / count

            slope = jax.grad(loss)(network)
            clip = jnp.maximum(optax.tree.norm(slope), 1)
            network = jax.tree.map(
                lambda m, m0, d: m0 + decay * (m - m0) - rate * d / clip, network, start, slope
            )
            return network, answer(network, keys) * size

        if unit.size == 0:
            return network, unit
        if rows:
            return jax.vmap(one)(unit, network, start)
        # Hidden units of coordinates are as many times larger than the gradient: some at a time.
        together = min(max(TOGETHER // unit[0].size, 1), len(unit))
        return jax.lax.map(lambda args: one(*args), (unit, network, start), batch_size=together)

    return optax.GradientTransformation(init, update)


def dmgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    depth: int = DMGDConfig.depth,
    hidden: int = DMGDConfig.hidden,
    shared: str = DMGDConfig.shared,
    objective: str = DMGDConfig.objective,
    decay: float = DMGDConfig.decay,
    rate: float = DMGDConfig.rate,
    b2: float = DMGDConfig.b2,
    seed: int = DMGDConfig.seed,
    weight_decay: float = 0.0,
    info: PyTree[ParamInfo] | None = None,
) -> optax.GradientTransformation:
    """See `scale_by_dmgd` and `descend`."""
    momentum = scale_by_dmgd(
        depth,
        hidden=hidden,
        shared=shared,
        objective=objective,
        decay=decay,
        rate=rate,
        b2=b2,
        seed=seed,
        info=info,
    )
    return optax.chain(momentum, descend(learning_rate, weight_decay=weight_decay, info=info))


def _whole(info: ParamInfo) -> ParamInfo:
    """Takes an embedding for one matrix, not for many rows, each with a network of its own."""
    return replace(info, role="memory_init") if info.role == "embedding" else info


def _first_network(count: int, widths: tuple[int, ...], seed: int) -> Network:
    """m_0, the same for each of `count` matrices: random hidden layers and an output of zero."""
    keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
    *layers, last = [
        jax.random.normal(key, (into, out)) / sqrt(max(into, 1))
        for key, into, out in zip(keys, widths, widths[1:], strict=False)
    ]
    one = (*layers, jnp.zeros_like(last))
    return tuple(jnp.tile(layer, (count, 1, 1)) for layer in one)


def _answer_rows(network: Network, keys: Float[Array, "out in"]) -> Float[Array, "out in"]:
    for depth, layer in enumerate(network):
        keys = (jnp.tanh(keys) if depth else keys) @ layer
    return keys


def _answer_coordinates(network: Network, keys: Float[Array, "out in"]) -> Float[Array, "out in"]:
    units = keys[None]
    for depth, layer in enumerate(network):
        units = jnp.tensordot(layer.T, jnp.tanh(units) if depth else units, axes=1)
    return units[0]

"""One step of training: the loss, its gradient, and an update that is skipped if not finite."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from hope_jax.ops.likelihood import next_token_loss, weighted_loss
from hope_jax.shapes import Batch, Tokens
from hope_jax.sharding import RULES, constrain, named, spec

Params = dict[str, Any]


class TrainState(NamedTuple):
    """Everything that a step changes, and all that a run needs to go on.

    Attributes:
      step: Steps taken, those with a skipped update included. The data's position as well.
      params: The slow weights, a nested dict.
      opt_state: The optimizer's.
      key: For randomness in the steps to come.
      skipped: Updates left out so far because the loss or the gradient was not finite.
      streak: Updates left out in a row until now.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    key: PRNGKeyArray
    skipped: Int[Array, ""]
    streak: Int[Array, ""]


class Outline(NamedTuple):
    """A model that was not allocated.

    Attributes:
      graphdef: The model without its parameters: `nnx.merge(graphdef, params)` is the model.
      variables: Its parameters, a nested dict of `nnx.Param` that hold shapes and metadata.
      build: Makes the model.
    """

    graphdef: nnx.GraphDef
    variables: Params
    build: Callable[[], nnx.Module]


def outline(build: Callable[[], nnx.Module]) -> Outline:
    """Finds out what `build` would make.

    Args:
      build: Makes the model; each parameter has its logical axis names as metadata `axes`.
    """
    graphdef, variables = nnx.split(nnx.eval_shape(build), nnx.Param)
    return Outline(graphdef, nnx.to_pure_dict(variables, lambda variable: variable), build)


def abstract_params(model: Outline) -> Params:
    """The shapes of a model's parameters, and their shardings on the mesh in use."""
    mesh = jax.sharding.get_mesh()

    def lay(variable: nnx.Param) -> jax.ShapeDtypeStruct:
        sharding = named(variable.get_metadata("axes"), variable.shape, mesh)
        return jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding)

    return jax.tree.map(lay, model.variables, is_leaf=_is_variable)


def abstract_state(model: Outline, tx: optax.GradientTransformation) -> TrainState:
    """The shapes of a run's state, and their shardings on the mesh in use.

    What the optimizer keeps for a parameter, in the parameter's shape, lies where that lies.
    """
    everywhere = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())

    def lay(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = abstract_params(model)
    shapes = jax.eval_shape(lambda params: _begin(params, tx, 0), params)
    by_path = dict(jax.tree_util.tree_leaves_with_path(params))

    def lay_slot(path: tuple[Any, ...], slot: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # A slot's path ends with its parameter's, also where an optimizer has but some of them.
        ends = (by_path.get(path[start:]) for start in range(len(path)))
        param = next((end for end in ends if end is not None), None)
        if param is None or param.shape != slot.shape:
            return lay(slot, everywhere)
        return lay(slot, param.sharding)

    opt_state = jax.tree_util.tree_map_with_path(lay_slot, shapes.opt_state)
    state = jax.tree.map(lambda x: lay(x, everywhere), shapes._replace(params=(), opt_state=()))
    return state._replace(params=params, opt_state=opt_state)


def initial_state(
    model: Outline,
    tx: optax.GradientTransformation,
    seed: int,
    like: TrainState,
    params: Params | None = None,
) -> TrainState:
    """Makes the state of a new run, split from the start: no device ever holds the whole.

    Args:
      model: What to train.
      tx: The optimizer.
      seed: Of the state's key; the model's own seed is in `model.build`.
      like: From `abstract_state`.
      params: What to begin with, which is donated; None for what `model.build` makes.
    """

    def create(params: Params | None) -> TrainState:
        if params is None:
            params = nnx.to_pure_dict(nnx.split(model.build(), nnx.Param)[1])
        return _begin(params, tx, seed)

    shardings = jax.tree.map(lambda x: x.sharding, like)
    return jax.jit(create, donate_argnums=0, out_shardings=shardings)(params)


def _begin(params: Params, tx: optax.GradientTransformation, seed: int) -> TrainState:
    # One zero for each counter: a buffer that is shared cannot be donated.
    step, skipped, streak = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(step, params, tx.init(params), jax.random.key(seed), skipped, streak)


def _is_variable(x: object) -> bool:
    return isinstance(x, nnx.Variable)


def losses(
    graphdef: nnx.GraphDef, params: Params, batch: Batch
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """The one loss of training and evaluation.

    Returns:
      Nats per target, and how much each target counts.
    """
    call = _read(graphdef, params, batch)
    nats = _on_own_tokens(next_token_loss, *call)
    return nats, jnp.ones_like(nats) if batch.weights is None else batch.weights


def _weighted_sum(
    graphdef: nnx.GraphDef, params: Params, batch: Batch, weights: Float[Array, "B T"]
) -> Float[Array, ""]:
    """The sum of `weights` times the `losses`; its gradient costs less than theirs."""
    call = _read(graphdef, params, batch)
    sums = _on_own_tokens(lambda *call: weighted_loss(*call)[None, None], *call, weights)
    return jnp.sum(sums)


def _read(
    graphdef: nnx.GraphDef, params: Params, batch: Batch
) -> tuple[Float[Array, "B T D"], Float[Array, "vocabulary D"], Tokens]:
    """Returns what scores the targets, and the targets."""
    model = nnx.merge(graphdef, params)
    inputs, starts, targets = batch.shifted()
    hidden, _ = model.hidden(inputs, starts=starts)
    return hidden, model.unembedding, targets


def _on_own_tokens(
    loss: Callable[..., Array],
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "vocabulary D"],
    *of_tokens: Array,
) -> Array:
    """Calls a loss so that every device goes through the chunks of its own tokens.

    The gradient of the unembedding is then summed over devices once, and not for each chunk.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return loss(hidden, unembedding, *of_tokens)
    tokens = spec(("batch", "time"), of_tokens[0].shape, mesh)
    return jax.shard_map(
        loss,
        in_specs=(tokens, PartitionSpec(), *(tokens for _ in of_tokens)),
        out_specs=tokens,
        axis_names={*RULES["batch"], *RULES["time"]},
        check_vma=False,
    )(hidden, unembedding, *of_tokens)


def train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    accumulate: int,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, dict[str, Array]]:
    """Takes one step on the mean loss of the batch's targets.

    Where the loss or a gradient is not finite, parameters and optimizer stay as they are, and
    `skipped` and `streak` count it; nothing waits for the host to look.

    Args:
      graphdef: The model.
      tx: The optimizer.
      accumulate: Parts of the batch that are computed one after another; divides the rows.
      state: Where training stands.
      batch: What to read.

    Returns:
      The next state, and scalars: loss (nats per target), grad_norm, skipped, streak.
    """
    loss, grads = _mean_gradient(graphdef, state.params, batch, accumulate)
    norm = optax.tree.norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)

    def keep(new, old):
        return jnp.where(finite, new, old)

    state = TrainState(
        step=state.step + 1,
        params=jax.tree.map(keep, params, state.params),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        key=state.key,
        skipped=state.skipped + ~finite,
        streak=jnp.where(finite, 0, state.streak + 1),
    )
    report = {"loss": loss, "grad_norm": norm, "skipped": state.skipped, "streak": state.streak}
    return state, report


def eval_step(
    graphdef: nnx.GraphDef, params: Params, batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums the loss over a batch; returns nats, and the weight of the targets they are for."""
    nats, weights = losses(graphdef, params, batch)
    return jnp.sum(nats * weights), jnp.sum(weights)


def _mean_gradient(
    graphdef: nnx.GraphDef, params: Params, batch: Batch, accumulate: int
) -> tuple[Float[Array, ""], Params]:
    """Loss and gradient of the mean over all targets, one part of the batch at a time."""
    rows, width = batch.tokens.shape
    weights = jnp.ones((rows, width - 1)) if batch.weights is None else batch.weights
    whole = batch, weights / jnp.sum(weights)

    def loss(params: Params, part: tuple[Batch, Array]) -> Float[Array, ""]:
        return _weighted_sum(graphdef, params, *part)

    if accumulate == 1:
        return jax.value_and_grad(loss)(params, whole)

    def split(x: Array) -> Array:
        # Every part takes some rows of each device, so that none of them has to move.
        parts = jnp.moveaxis(x.reshape(rows // accumulate, accumulate, *x.shape[1:]), 1, 0)
        return constrain(parts, (None, "batch", None))

    def add(sums, part):
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss)(params, part)), None

    parts = jax.tree.map(split, whole)
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(jax.value_and_grad(loss), params, first)
    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), parts)[0]


def compile_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    accumulate: int,
    state: TrainState,
    batch: Batch,
) -> jax.stages.Compiled:
    """Compiles `train_step` for a whole run, ahead of it.

    Args:
      graphdef: See `train_step`.
      tx: See `train_step`.
      accumulate: See `train_step`.
      state: Shapes and shardings of the states.
      batch: Shapes and shardings of the batches.

    Returns:
      A function of a state, which it donates, and a batch.
    """
    everywhere = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(
        partial(train_step, graphdef, tx, accumulate),
        donate_argnums=0,
        out_shardings=(shardings, everywhere),
    )
    return step.lower(state, batch).compile()


def compile_eval_step(graphdef: nnx.GraphDef, params: Params, batch: Batch) -> jax.stages.Compiled:
    """Compiles `eval_step` ahead of a run; takes shapes and shardings."""
    everywhere = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
    step = jax.jit(partial(eval_step, graphdef), out_shardings=everywhere)
    return step.lower(params, batch).compile()

"""Trains one model on several tasks, rates and seeds at once, in one program."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from hope_jax.data.synthetic_labels import Labelled
from hope_jax.models.decoder import Decoder, ModelConfig
from hope_jax.optimizers import OptimizerConfig, ParamInfo, describe
from hope_jax.training.step import outline

Params = Any  # {"model": ..., "decoder": ...}


class Replica(NamedTuple):
    """One run.

    Attributes:
      task: Its number among those that are trained on.
      rate: The highest learning rate of its schedule.
      seed: Decides where its parameters start; the order of examples is the same for all.
    """

    task: int
    rate: float
    seed: int


class Recipe(NamedTuple):
    """How each run is trained.

    Attributes:
      optimizer: Its learning rate is replaced by the replicas'.
      steps: Of a run.
      every: Steps between evaluations.
      batch: Examples of a step.
    """

    optimizer: OptimizerConfig
    steps: int
    every: int
    batch: int


class Splits(NamedTuple):
    """The examples of tasks, stacked in front: all tasks are of one size.

    Attributes:
      train: What is trained on.
      judged: The other splits by name.
    """

    train: Labelled
    judged: dict[str, Labelled]


class Sums(NamedTuple):
    """What was right in a split.

    Attributes:
      nats: Of all labels together.
      labels: How many of each there are.
      right: How many of each were said.
      strings: Examples with a label.
      whole: Those in which all labels were right.
    """

    nats: Float[Array, "..."]
    labels: Float[Array, "... symbols"]
    right: Float[Array, "... symbols"]
    strings: Float[Array, "..."]
    whole: Float[Array, "..."]


def judge(logits: Float[Array, "B T symbols"], examples: Labelled) -> Sums:
    """Compares what a model says with labels; the likeliest symbol is its answer."""
    labels, weights = examples.labels, examples.weights
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    right = (jnp.argmax(logits, -1) == labels) & (weights > 0)
    kinds = jax.nn.one_hot(labels, logits.shape[-1])
    asked = jnp.any(weights > 0, -1)
    whole = asked & jnp.all(right | (weights == 0), -1)
    return Sums(
        nats=jnp.sum(nats * weights),
        labels=jnp.einsum("BTN,BT->N", kinds, weights),
        right=jnp.einsum("BTN,BT->N", kinds, right * weights),
        strings=jnp.sum(asked * 1.0),
        whole=jnp.sum(whole * 1.0),
    )


def shares(sums: Sums) -> dict[str, float]:
    """Names what sums come to.

    Returns:
      loss (nats of a label), accuracy, macro (the mean accuracy over the symbols that occur as
      labels) and strings (the share of examples in which all labels are right).
    """
    labels, right = (np.asarray(x, np.float64) for x in (sums.labels, sums.right))
    there = labels > 0
    return {
        "loss": float(sums.nats / labels.sum()),
        "accuracy": float(right.sum() / labels.sum()),
        "macro": float(np.mean(right[there] / labels[there])),
        "strings": float(sums.whole / sums.strings),
    }


class Learner:
    """A model that says labels: after each input or, with a decoder, all at the last one."""

    def __init__(self, config: ModelConfig, *, length: int, summary: bool):
        """Allocates nothing.

        Args:
          config: The model, with a vocabulary.
          length: Tokens of an example, which a decoder is made for.
          summary: Whether there is a decoder.
        """
        self.config, self._length, self._summary = config, length, summary
        model = outline(partial(config.build, seed=0))
        self._graphdef = model.graphdef
        self.info: PyTree[ParamInfo] = {"model": describe(model.variables)}
        if summary:
            matrix = ParamInfo((None, None), "matrix")
            vector = ParamInfo((None, None), "vector")
            self.info["decoder"] = {"places": vector, "up": matrix, "down": matrix}

    def init(self, seed: Int[Array, ""]) -> Params:
        """Makes the parameters of a seed."""
        model = self.config.build(seed=seed)
        params = {"model": nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])}
        if self._summary:
            width, ids = self.config.width, self.config.known_vocabulary()
            shapes = {"places": (self._length, width), "up": (width, width), "down": (width, ids)}
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), 3)
            params["decoder"] = {
                name: jax.random.normal(key, shape) / width**0.5
                for key, (name, shape) in zip(keys, shapes.items(), strict=True)
            }
        return params

    def logits(
        self, params: Params, inputs: Int[Array | np.ndarray, "B T"]
    ) -> Float[Array, "B T symbols"]:
        """What the model says."""
        model: Decoder = nnx.merge(self._graphdef, params["model"])
        if not self._summary:
            return model(jnp.asarray(inputs))[0]
        last = model.hidden(jnp.asarray(inputs))[0][:, -1:].astype(jnp.float32)
        decoder = params["decoder"]
        return jax.nn.gelu((last + decoder["places"]) @ decoder["up"]) @ decoder["down"]


def train(
    learner: Learner,
    recipe: Recipe,
    splits: Splits,
    replicas: Sequence[Replica],
    *,
    progress: Callable[[int, str], None],
) -> list[dict[str, Any]]:
    """Trains all replicas on examples that a step draws from those of its task.

    Args:
      learner: The model.
      recipe: How it is trained.
      splits: From what, and what it is judged by: before the first step, on the way, at the end.
      replicas: At least one.
      progress: Told the step now and then, and what is new to show.

    Returns:
      For each replica the curves of what `shares` says by split, and the last of it.
    """
    programs = _Programs(learner, recipe)
    tasks = jnp.array([replica.task for replica in replicas])
    rates = jnp.array([replica.rate for replica in replicas], jnp.float32)
    state = programs.begin(jnp.array([replica.seed for replica in replicas]))
    splits = jax.tree.map(jnp.asarray, splits)
    steps, curves = [0], [_judge(programs, state[0], splits, tasks)]
    for first in range(0, recipe.steps, recipe.every):
        numbers = jnp.arange(first, min(first + recipe.every, recipe.steps))
        state, losses = programs.advance(state, splits.train, tasks, rates, numbers)
        steps.append(int(numbers[-1]) + 1)
        curves.append(_judge(programs, state[0], splits, tasks))
        progress(steps[-1], f"loss {np.min(losses):.3f} to {np.max(losses):.3f}")
    return [
        {
            "steps": steps,
            "curves": {
                split: {name: [one[i][split][name] for one in curves] for name in last}
                for split, last in curves[-1][i].items()
            },
            "found": curves[-1][i],
        }
        for i in range(len(replicas))
    ]


class _Programs:
    """What is compiled for a model and a recipe."""

    def __init__(self, learner: Learner, recipe: Recipe):
        def build(rate: float | Array) -> optax.GradientTransformation:
            return recipe.optimizer.build(recipe.steps, learner.info, learning_rate=rate)

        def loss(params: Params, batch: Labelled) -> Float[Array, ""]:
            logits = learner.logits(params, batch.inputs)
            nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            return jnp.sum(nats * batch.weights) / jnp.sum(batch.weights)

        def begin(seed: Array) -> tuple[Params, optax.OptState]:
            params = learner.init(seed)
            return params, build(0.0).init(params)

        def advance(state, examples: Labelled, tasks: Array, rates: Array, numbers: Array):
            def one(state, task: Array, rate: Array, rows: Array):
                params, inner = state
                batch = jax.tree.map(lambda x: x[task, rows], examples)
                cost, grads = jax.value_and_grad(loss)(params, batch)
                updates, inner = build(rate).update(grads, inner, params)
                return (optax.apply_updates(params, updates), inner), cost

            def step(state, number: Array):
                key = jax.random.fold_in(jax.random.key(0), number)
                rows = jax.random.randint(key, (recipe.batch,), 0, examples.inputs.shape[1])
                return jax.vmap(one, (0, 0, 0, None))(state, tasks, rates, rows)

            state, costs = jax.lax.scan(step, state, numbers)
            return state, costs[-1]

        def score(params: Params, examples: Labelled, tasks: Array) -> Sums:
            count = examples.inputs.shape[1]
            size = max(n for n in range(1, recipe.batch + 1) if count % n == 0)
            rows = jnp.arange(count).reshape(-1, size)

            def some(rows: Array) -> Sums:
                def one(params: Params, task: Array) -> Sums:
                    batch = jax.tree.map(lambda x: x[task, rows], examples)
                    return judge(learner.logits(params, batch.inputs), batch)

                return jax.vmap(one)(params, tasks)

            return jax.tree.map(lambda x: jnp.sum(x, 0), jax.lax.map(some, rows))

        self.begin = jax.jit(jax.vmap(begin))
        self.advance = jax.jit(advance, donate_argnums=0)
        self.score = jax.jit(score)


def _judge(
    programs: _Programs, params: Params, splits: Splits, tasks: Int[Array, " R"]
) -> list[dict[str, dict[str, float]]]:
    """For each replica what `shares` says of each split."""
    sums = {name: programs.score(params, part, tasks) for name, part in splits.judged.items()}
    host = jax.device_get(sums)
    return [
        {name: shares(Sums(*(x[i] for x in part))) for name, part in host.items()}
        for i in range(len(tasks))
    ]

"""Language models as tasks of a comparison: the model and the data of any config."""

from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hope_jax import config
from hope_jax.comparison.problem import CHANGEABLE, Batches, Params, Problem, Sums, check
from hope_jax.config import ConfigError, Experiment
from hope_jax.optimizers import describe
from hope_jax.shapes import Batch
from hope_jax.training.step import losses, outline


@dataclass(frozen=True, kw_only=True)
class LanguageTask:
    """Next-token prediction, with the model and the data of a config.

    Judged by nats per token on the validation split, where that was lowest along a run; the test
    split is read with the same parameters.

    Attributes:
      config: A YAML file; of its settings, those of model and data count.
      overrides: Each `dotted.key=value`.
      at_once: Runs that train in one program, each with its own copy of all activations. One by
        one is best for models that keep the device busy. cuDNN's attention cannot be mapped: on a
        GPU, models with attention in half precision train one by one.
    """

    kind: Literal["language"] = "language"
    name: str | None = None
    config: str
    overrides: tuple[str, ...] = ()
    at_once: int = 1
    steps: int = 300
    every: int = 75
    goal: float | None = None

    def __post_init__(self):
        check(self)
        if self.at_once < 1:
            raise ValueError(f"at_once must be at least 1, got {self.at_once}")
        try:
            _ = self.experiment
        except ConfigError as error:
            raise ValueError(str(error)) from error

    @cached_property
    def experiment(self) -> Experiment:
        """What the config says."""
        return config.load(self.config, self.overrides)

    def identity(self) -> dict[str, Any]:
        """See `Task`."""
        free = (*CHANGEABLE, "config", "overrides")
        own = {key: value for key, value in asdict(self).items() if key not in free}
        data = asdict(self.experiment.data)
        for name in ("workers", "prefetch", "cache"):
            data.pop(name)
        return {**own, "model": asdict(self.experiment.model), "data": data}

    def build(self) -> Problem:
        """See `Task`; call it with a mesh in use, and go on using it."""
        experiment = self.experiment
        with config.blame("data"):
            data = experiment.data.build()
        model = outline(partial(experiment.model.build, seed=0))
        graphdef, symbolic = model.graphdef, experiment.data.source.kind == "recall"

        def init(seed: Int[Array, ""]) -> Params:
            made = experiment.model.build(seed=seed)
            return nnx.to_pure_dict(nnx.split(made, nnx.Param)[1])

        def loss(params: Params, batch: Batch) -> Float[Array, ""]:
            nats, weights = losses(graphdef, params, batch)
            return jnp.sum(nats * weights) / jnp.sum(weights)

        def measure(params: Params, batch: Batch) -> Sums:
            nats, weights = losses(graphdef, params, batch)
            found = {"loss": (jnp.sum(nats * weights), jnp.sum(weights))}
            if symbolic:  # few symbols: all their logits fit
                inputs, starts, targets = batch.shifted()
                logits, _ = nnx.merge(graphdef, params)(inputs, None, starts)
                right = jnp.argmax(logits, -1) == targets
                found["accuracy"] = jnp.sum(right * weights), jnp.sum(weights)
            return found

        def train() -> Batches:
            with closing(data.train(0)) as batches:
                yield from batches

        def evaluate(split: str) -> Batches:
            with closing(data.valid(split)) as batches:
                yield from batches

        about = {
            "parameters": experiment.model.parameters(),
            "tokens": experiment.data.batch * experiment.data.window,
        }
        words = data.info("test").words if "test" in data.splits else None
        return Problem(
            init=init,
            loss=loss,
            measure=measure,
            train=train,
            evaluate=evaluate,
            info=describe(model.variables),
            keep_best=True,
            at_once=self.at_once,
            about=about | ({"test_words": words} if words else {}),
        )

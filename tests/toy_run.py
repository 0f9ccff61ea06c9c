"""A run that is small enough to be trained a dozen times in a test, and its pieces."""

import itertools
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from hope_jax import processes, sharding
from hope_jax.shapes import Batch
from hope_jax.sharding import MeshConfig
from hope_jax.training import RunError, TrainingConfig, loop
from hope_jax.training.step import Outline, outline

VOCABULARY, WINDOW, ROWS = 16, 8, 8


class ToyModel(nnx.Module):
    """Guesses the next token from the last one."""

    def __init__(self, width: int, *, key: jax.Array):
        keys = jax.random.split(key)
        table, mix = (
            jax.random.normal(k, s)
            for k, s in zip(keys, ((VOCABULARY, width), (width,) * 2), strict=True)
        )
        self.table = nnx.Param(0.3 * table, axes=("vocabulary", "embed"), role="embedding")
        self.mix = nnx.Param(0.3 * mix, axes=("embed", "mlp"), role="matrix")

    @property
    def unembedding(self):
        return self.table[...]

    def hidden(self, tokens, memory=None, starts=None):  # noqa: ARG002
        return jnp.tanh(self.table[...][tokens] @ self.mix[...]), memory


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    width: int = 8
    vocabulary: int = VOCABULARY

    def build(self, *, seed: int = 0) -> ToyModel:
        return ToyModel(self.width, key=jax.random.key(seed))

    def flops_per_token(self, context: int) -> float:  # noqa: ARG002
        return 2.0 * self.width**2


@dataclass(frozen=True, kw_only=True)
class ToyExperiment:
    training: TrainingConfig
    model: ToyConfig = field(default_factory=ToyConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    seed: int = 0
    name: str = "toy"


class ToyTokenizer(NamedTuple):
    fingerprint: str = "toy"


class ToyData:
    """Counts upwards, and now and then not; a step's batch depends on the step alone.

    Attributes:
      spoiled: Steps (the first is 0) whose batch has a weight that is not a number.
      read: The steps whose batches were asked for.
    """

    splits = ("train", "valid")

    def __init__(self, *, fingerprint: str = "toy", size: int = 100, spoiled=()):
        self.tokenizer, self.size = ToyTokenizer(fingerprint), size
        self.spoiled, self.read = spoiled, []

    def info(self, split):  # noqa: ARG002
        return (self.size,)

    def train(self, start_step):
        for step in itertools.count(start_step):
            self.read.append(step)
            yield self.batch(step, self.spoiled)

    def valid(self):
        yield from (self.batch(10**6 + i) for i in range(2))

    @staticmethod
    def batch(step, spoiled=()):
        random = np.random.default_rng(step)
        first = random.integers(VOCABULARY, size=(ROWS, 1))
        noise = random.integers(VOCABULARY, size=(ROWS, WINDOW + 1))
        counted = first + np.arange(WINDOW + 1)
        tokens = np.where(random.random(noise.shape) < 0.1, noise, counted) % VOCABULARY
        weights = np.full((ROWS, WINDOW), np.nan if step in spoiled else 1.0, np.float32)
        batch = Batch(tokens.astype(np.int32), np.zeros(tokens.shape, bool), weights)
        mesh = jax.sharding.get_mesh()
        return jax.tree.map(
            lambda x: jax.device_put(x, sharding.named(("batch", None), x.shape, mesh)), batch
        )


@contextmanager
def compiled_once(folder: Path):
    """Keeps what XLA compiled, as each run compiles the same small programs again."""
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield


def optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-2))


def toy_outline(experiment: ToyExperiment) -> Outline:
    return outline(partial(experiment.model.build, seed=experiment.seed))


def train(
    folder: Path,
    *,
    data: ToyData | None = None,
    tx=None,
    devices: int = 1,
    mesh=None,
    sample=None,
    model: ToyConfig = ToyConfig(),
    name: str = "toy",
    **training,
) -> dict:
    """Trains the toy in `folder/name`."""
    settings = {"steps": 12, "evaluate_every": 5, "save_every": 4, "log_every": 1} | training
    config = TrainingConfig(folder=str(folder), **settings)
    experiment = ToyExperiment(training=config, model=model, mesh=mesh or MeshConfig(), name=name)
    with sharding.use(experiment.mesh.build(jax.devices()[:devices])):
        return loop.run(
            experiment, toy_outline(experiment), tx or optimizer(), data or ToyData(), sample=sample
        )


if __name__ == "__main__":
    folder, steps, save_every, *distributed = sys.argv[1:]
    try:
        processes.join(distributed[0] if distributed else None)
        train(
            Path(folder), steps=int(steps), save_every=int(save_every), devices=jax.device_count()
        )
    except RunError as error:
        processes.fail(error, 1)

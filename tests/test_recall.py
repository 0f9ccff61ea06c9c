"""HOPE learns to recall what its memories alone can tell it. Minutes a seed: `pytest -m slow`."""

from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from hope_jax import config
from hope_jax.modules import self_reference
from hope_jax.optimizers import describe
from hope_jax.training.step import losses, outline

CONFIG = Path(__file__).parent.parent / "configs" / "recall.yaml"
# The other tests compile without optimization (see conftest.py); this one computes more.
FAST = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


def accuracy(seed: int, steps: int) -> float:
    """Trains for `steps` of the config's schedule; returns the share of right answers, held out."""
    experiment = config.load(CONFIG, [f"seed={seed}", f"data.seed={seed}"])
    data = experiment.data.build()
    model = outline(lambda: experiment.model.build(seed=seed))
    tx = experiment.optimizer.build(experiment.training.steps, describe(model.variables))
    params = nnx.to_pure_dict(nnx.split(experiment.model.build(seed=seed), nnx.Param)[1])

    def mean_loss(params, batch):
        nats, weights = losses(model.graphdef, params, batch)
        return jnp.sum(nats * weights) / jnp.sum(weights)

    def step(params, state, batch):
        updates, state = tx.update(jax.grad(mean_loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    def right(params, batch):
        decoder = nnx.merge(model.graphdef, params)
        logits, _ = decoder(batch.tokens[:, :-1], None, batch.starts[:, :-1])
        hits = jnp.argmax(logits, -1) == batch.tokens[:, 1:]
        return jnp.stack([jnp.sum(hits * batch.weights), jnp.sum(batch.weights)])

    step = jax.jit(step, donate_argnums=(0, 1), compiler_options=FAST)
    state = tx.init(params)
    with closing(data.train(0)) as batches:
        for _ in range(steps):
            params, state = step(params, state, next(batches))
    with closing(data.valid()) as batches:
        hits, asked = sum(map(jax.jit(lambda batch: right(params, batch)), batches))
    return float(hits / asked)


STEPS = config.load(CONFIG).training.steps


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hope_recalls_the_latest_value_of_a_key(seed):
    assert accuracy(seed, STEPS) >= 0.95


@pytest.mark.slow
def test_without_its_memories_hope_guesses(monkeypatch):
    def forgetful(x, *_, **__):
        return jnp.zeros_like(x), None

    monkeypatch.setattr(self_reference, "self_referential", forgetful)
    chance = 1 / config.load(CONFIG).data.source.value_symbols
    assert accuracy(0, STEPS) < 2 * chance

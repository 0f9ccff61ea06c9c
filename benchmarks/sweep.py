"""Trains configs at several learning rates and seeds at once, and records the best of each.

    python benchmarks/sweep.py NAME=CONFIG [NAME=CONFIG ...] rates=1e-3,2e-3 seeds=0,1 \
        out=benchmarks/results/wikitext2.json [dotted.key=value ...]

Every rate and seed of a config trains in one program: the parameters are stacked in front and the
step is mapped over them, so all read the same batches in the same order; a seed decides where the
parameters start. Each replica keeps the parameters of its best validation loss. The rate is chosen
by that loss (mean over seeds), and the test split is read once, by the chosen replicas. Speed is
that of one replica alone, timed over whole training steps after two for warm-up.
"""

import sys
import time
from contextlib import closing
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from record import append, record
from tqdm import trange

from hope_jax import config, sharding
from hope_jax.optimizers import describe
from hope_jax.training.step import losses, outline


def main():
    names, options, overrides = {}, {}, []
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        if value.endswith(".yaml"):
            names[key] = value
        elif key in ("rates", "seeds", "out", "every"):
            options[key] = value
        else:
            overrides.append(argument)
    if not names:
        raise SystemExit(__doc__)
    rates = [float(rate) for rate in options.get("rates", "1e-3,2e-3,4e-3").split(",")]
    seeds = [int(seed) for seed in options.get("seeds", "0,1").split(",")]
    every = int(options.get("every", 100))
    records, table = [], []
    for name, path in names.items():
        experiment = config.load(path, overrides)
        with sharding.use(experiment.mesh.build(jax.devices()[:1])):
            found, row = sweep(name, experiment, rates, seeds, every)
        records += found
        table.append(row)
        if "out" in options:
            append(options["out"], found)
    print("\n" + "\n".join(table))


def sweep(name, experiment, rates, seeds, every):
    """Trains all replicas of a config; returns records and a line for people."""
    data = experiment.data.build()
    steps = experiment.training.steps
    build = partial(experiment.model.build, seed=experiment.seed)
    model = outline(build)
    synthetic = experiment.data.source.kind == "recall"
    info = describe(model.variables)
    tx = replace(experiment.optimizer, learning_rate=1.0).build(steps, info)

    @jax.jit
    def initial(seeds):
        def one(seed):
            made = experiment.model.build(seed=seed)
            return nnx.to_pure_dict(nnx.split(made, nnx.Param)[1])

        return jax.vmap(one)(seeds)

    def mean_loss(params, batch):
        nats, weights = losses(model.graphdef, params, batch)
        return jnp.sum(nats * weights) / jnp.sum(weights)

    def step(params, state, rate, batch):
        loss, gradient = jax.value_and_grad(mean_loss)(params, batch)
        updates, state = tx.update(gradient, state, params)
        updates = jax.tree.map(lambda u: rate * u, updates)
        return optax.apply_updates(params, updates), state, loss

    def each(function, *stacked):
        if experiment.model.mixer.kind == "attention":  # cuDNN's masks cannot be mapped
            return jax.lax.map(lambda one: function(*one), stacked)
        return jax.vmap(function)(*stacked)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step_all(params, state, rates, batch):
        return each(lambda *one: step(*one, batch), params, state, rates)

    @jax.jit
    def score_all(params, batch):
        def one(params):
            nats, weights = losses(model.graphdef, params, batch)
            right = jnp.zeros(())
            if synthetic:
                decoder = nnx.merge(model.graphdef, params)
                logits, _ = decoder(batch.tokens[:, :-1], None, batch.starts[:, :-1])
                right = jnp.sum(weights * (jnp.argmax(logits, -1) == batch.tokens[:, 1:]))
            return jnp.sum(nats * weights), jnp.sum(weights), right

        return jax.lax.map(one, params)  # one after the other: valid batches may be large

    @partial(jax.jit, donate_argnums=2)
    def keep_best(params, loss, best):
        better = loss < best[0]
        pick = lambda new, old: jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)  # noqa: E731
        return jnp.where(better, loss, best[0]), jax.tree.map(pick, params, best[1])

    def score(params, split):
        with closing(data.valid(split)) as batches:
            sums = [score_all(params, batch) for batch in batches]
        return np.sum(jax.device_get(sums), axis=0, dtype=np.float64)

    replicas = [(rate, seed) for rate in rates for seed in seeds]
    params = initial(jnp.array([seed for _, seed in replicas]))
    state = jax.jit(jax.vmap(tx.init))(params)
    all_rates = jnp.array([rate for rate, _ in replicas])
    best = jnp.full(len(replicas), jnp.inf), jax.tree.map(jnp.copy, params)
    curve = []
    with closing(data.train(0)) as batches:
        bar = trange(steps, desc=name, mininterval=10)
        for number in bar:
            params, state, _ = step_all(params, state, all_rates, next(batches))
            if (number + 1) % every == 0 or number + 1 == steps:
                nats, targets, right = score(params, "valid")
                valid = nats / targets
                best = keep_best(params, jnp.asarray(valid, jnp.float32), best)
                shown = right / targets if synthetic else valid
                curve.append([number + 1, *shown.round(4).tolist()])
                bar.set_postfix_str(" ".join(f"{v:.3f}" for v in shown))

    valid = np.array(best[0], np.float64).reshape(len(rates), len(seeds))
    chosen = int(np.argmin(np.nan_to_num(valid, nan=np.inf).mean(1)))
    nats, targets, right = score(best[1], "test")
    mine = slice(chosen * len(seeds), (chosen + 1) * len(seeds))
    test, words = nats[mine], data.info("test").words
    alone = jax.tree.map(lambda x: x[0], best[1])
    seconds, tokens = speed(step, tx, alone, data)
    count = experiment.model.parameters()
    notes = {
        "rates": rates,
        "seeds": seeds,
        "chosen_rate": rates[chosen],
        "best_valid_loss": valid.round(4).tolist(),
        "steps": steps,
        "tokens_trained": steps * tokens,
        "vocabulary": experiment.model.vocabulary,
    }
    per_token = np.exp(test / targets[mine])
    values = {
        "test_perplexity": (per_token.mean(), "perplexity per token"),
        "test_perplexity_spread": (
            np.ptp(per_token),
            "perplexity per token, highest less lowest seed",
        ),
        "parameters": (count, "parameters"),
        "tokens_per_second": (tokens / seconds, "tokens/s in training, one replica"),
    }
    if synthetic:
        accuracy = right[mine] / targets[mine]
        values["test_accuracy"] = (accuracy.mean(), "share of answers")
        notes["test_accuracy_by_seed"] = accuracy.round(4).tolist()
    if words:
        values["test_word_perplexity"] = (np.exp(test / words).mean(), "perplexity per word")
    records = [record(f"{name}/{key}", value, unit, notes) for key, (value, unit) in values.items()]
    line = " ".join(f"{key}={float(value):.5g}" for key, (value, _) in values.items())
    what = "accuracy" if synthetic else "loss"
    print(f"{name} valid {what} by step and replica: {curve}")
    return records, f"{name}: rate={rates[chosen]:g} {line} valid={valid.round(4).tolist()}"


def speed(step, tx, params, data):
    """Seconds a step and tokens in it, for one replica."""
    one = jax.jit(step, donate_argnums=(0, 1))
    state = jax.jit(tx.init)(params)
    with closing(data.train(0)) as batches:
        batch = next(batches)
        for _ in range(2):
            params, state, loss = one(params, state, 1e-3, batch)
        jax.block_until_ready(loss)
        start, count = time.perf_counter(), 20
        for _ in range(count):
            params, state, loss = one(params, state, 1e-3, batch)
        jax.block_until_ready(loss)
    rows, width = batch.tokens.shape
    return (time.perf_counter() - start) / count, rows * (width - 1)


if __name__ == "__main__":
    main()

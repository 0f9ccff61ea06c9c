"""Tokens that a small HOPE trains on per CPU-second: python benchmarks/cpu.py [--out PATH].

Width 128, 2 layers, bytes, 4 rows of 256, 512 and 1024 tokens; whole steps, AdamW included.
CPU-seconds are summed over all cores, so that a busy machine changes them little.
"""

import argparse
import os
import time
from dataclasses import replace
from functools import partial

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from hope_jax import config, sharding
from hope_jax.optimizers import describe
from hope_jax.records import append, record
from hope_jax.shapes import Batch
from hope_jax.training import step

ROWS = 4


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="a JSON file to add the records to")
    given = parser.parse_args()
    records = []
    experiment = config.load("configs/quickstart.yaml")
    model = replace(experiment.model, vocabulary=257)
    with sharding.use(experiment.mesh.build(jax.devices()[:1])):
        for time_steps in (256, 512, 1024):
            rate = tokens_per_cpu_second(model, experiment.optimizer, time_steps)
            print(f"T={time_steps}: {rate:,.0f} tokens per CPU-second")
            notes = f"{model.parameters():,} parameters, B={ROWS}, float32"
            name = f"cpu/train/hope/T{time_steps}"
            records.append(record(name, rate, "tokens per CPU-second", notes))
    if given.out:
        append(given.out, records)


def tokens_per_cpu_second(model, optimizer, time_steps, count=10):
    """Trains on random bytes; compilation and two steps for warm-up are not counted."""
    outline = step.outline(partial(model.build, seed=0))
    tx = optimizer.build(1000, describe(outline.variables))
    abstract = step.abstract_state(outline, tx)
    state = step.initial_state(outline, tx, 0, abstract)
    tokens = np.random.default_rng(0).integers(0, 256, (ROWS, time_steps + 1), np.int32)
    batch = jax.device_put(Batch(tokens, np.zeros(tokens.shape, bool)))
    advance = step.compile_train_step(outline.graphdef, tx, 1, abstract, batch)
    for _ in range(2):
        state, _ = advance(state, batch)
    jax.block_until_ready(state)
    start = time.process_time()
    for _ in range(count):
        state, _ = advance(state, batch)
    jax.block_until_ready(state)
    return count * ROWS * time_steps / (time.process_time() - start)


if __name__ == "__main__":
    main()

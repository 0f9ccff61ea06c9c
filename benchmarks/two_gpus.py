"""Two GPUs of one host against one of them: python benchmarks/two_gpus.py [--out PATH].

First the speed: HOPE of 382 million parameters in bfloat16 with the same rows on each device, whole
steps, AdamW included. Then the losses: HOPE of two such layers in float32, 20 steps of the same
batches on one device and on two, which share rows alone, or state as well. Most of the time is
compilation. `--tiny` tries it on two virtual CPU devices.
"""

import argparse
import os
import sys
import time
from functools import partial

import jax
import numpy as np

from hope_jax import config, sharding
from hope_jax.optimizers import describe
from hope_jax.records import append, record
from hope_jax.shapes import Batch
from hope_jax.sharding import MeshConfig
from hope_jax.training import step

MESHES = {
    "one": (1, MeshConfig()),
    "two, rows shared": (2, MeshConfig(data=2)),
    "two, state shared": (2, MeshConfig(data=1, fsdp=2)),
}
TINY = ["model.width=64", "model.layers=1", "model.mixer.heads=2", "data.window=64"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="a JSON file to add the records to")
    parser.add_argument("--rows", type=int, default=8, help="rows of 4,096 tokens on each device")
    parser.add_argument("--steps", type=int, default=10, help="steps to time")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    given = parser.parse_args()
    if jax.device_count() < 2:
        sys.exit(f"two devices are needed, got {jax.device_count()}")
    records = [*speeds(given.tiny, given.rows, given.steps), *losses(given.tiny)]
    if given.out:
        append(given.out, records)


def losses(tiny: bool) -> list[dict]:
    """Trains on the same batches on each mesh; the largest relative difference of a loss."""
    sizes = TINY if tiny else ["model.layers=2", "data.window=512"]
    experiment = config.load(
        "configs/hope_380m.yaml", [*sizes, "model.dtype=float32", "model.vocabulary=32000"]
    )
    found = {}
    with jax.default_matmul_precision("highest"):
        for name in MESHES:
            found[name], _ = run(experiment, name, rows=4, steps=20)
    one = np.array(found.pop("one"))
    records = []
    for name, values in found.items():
        worst = float(np.max(np.abs(np.array(values) / one - 1)))
        print(f"losses on {name}: at most {worst:.1e} from those on one device, relative")
        notes = f"20 steps, float32, {experiment.model.parameters():,} parameters"
        records.append(record(f"two_gpus/losses/{name}", worst, "relative difference", notes))
    return records


def speeds(tiny: bool, rows: int, steps: int) -> list[dict]:
    """Times steps with the same rows on each device."""
    experiment = config.load("configs/hope_380m.yaml", TINY if tiny else [])
    rates = {}
    for name in ("one", "two, rows shared"):
        devices = MESHES[name][0]
        _, seconds = run(experiment, name, rows=rows * devices, steps=steps)
        rates[name] = rows * devices * experiment.data.window / seconds
        print(f"{name}: {rates[name]:,.0f} tokens/s ({rates[name] / rates['one']:.3f} x one)")
    notes = f"{experiment.model.parameters():,} parameters, {rows} rows a device, {steps} steps"
    return [
        record(f"two_gpus/train/hope_380m/{name}", rate, "tokens/s", notes)
        for name, rate in rates.items()
    ]


def run(experiment, name, *, rows, steps):
    """Trains for two steps and then `steps` more; returns the losses of all, seconds of a step."""
    count, mesh = MESHES[name]
    with sharding.use(mesh.build(jax.devices()[:count])):
        outline = step.outline(partial(experiment.model.build, seed=0))
        tx = experiment.optimizer.build(1000, describe(outline.variables))
        abstract = step.abstract_state(outline, tx)
        state = step.initial_state(outline, tx, 0, abstract)
        batches = [batch(rows, experiment.data.window, number) for number in range(4)]
        began = time.perf_counter()
        advance = step.compile_train_step(outline.graphdef, tx, 1, abstract, batches[0])
        print(f"{name}: compiled in {time.perf_counter() - began:.0f} s", flush=True)
        reports = []
        for number in range(steps + 2):
            if number == 2:
                jax.block_until_ready(state)
                began = time.perf_counter()
            state, report = advance(state, batches[number % 4])
            reports.append(report["loss"])
        jax.block_until_ready(state)
        seconds = (time.perf_counter() - began) / steps
    return [float(loss) for loss in reports], seconds


def batch(rows, window, seed):
    """Random tokens, the same on every mesh."""
    tokens = np.random.default_rng(seed).integers(0, 32000, (rows, window + 1), np.int32)
    starts = np.zeros(tokens.shape, bool)
    place = sharding.named(("batch", None), tokens.shape, jax.sharding.get_mesh())
    return jax.tree.map(lambda x: jax.device_put(x, place), Batch(tokens, starts))


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    main()

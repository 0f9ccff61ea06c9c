"""Times whole models on this machine: training, reading, decoding, and what they need of memory.

python benchmarks/speed.py [MODEL ...] [--only train,forward,decode,memory] [--out RECORDS.json]

A MODEL is the name of a config, as hope_150m. `train` takes whole steps of the project's own train
step, AdamW included, on random tokens of one document; `forward` reads long rows and scores them;
`decode` writes with `hope_jax.models.generate`; `memory` says what a training step of 32 rows
holds. The last three are those of hope_150m. `--profile FOLDER` also traces two steps of training
and prints where their time went; `--tiny` takes models of a few thousand parameters, for a look
at this script without an accelerator.
"""

import argparse
import time
from functools import partial

import jax
import numpy as np
import trace_summary
from flax import nnx

from hope_jax import config, sharding
from hope_jax.models.generate import generate
from hope_jax.optimizers import describe
from hope_jax.records import append, record
from hope_jax.shapes import Batch
from hope_jax.training import step
from hope_jax.training.metrics import peak_flops

MODELS = ("transformer_150m", "gated_deltanet_150m", "hope_150m")
ROWS = {"150m": 32, "380m": 16, "760m": 16, "1.3b": 8}
"""The most rows of a batch for training, by size; halved until the step fits."""

FAST = ("model.remat=none", "model.unroll=true")
"""Settings for one GPU, where the configs' own are for many devices with little memory."""

TINY = (
    "model.width=32", "model.layers=2", "model.mixer.heads=2", "data.window=64",
    "model.vocabulary=512", "data.tokenizer={kind: bytes}", "model.dtype=float32",
)  # fmt: skip


def load(name, options, *settings):
    """The experiment of a config, with other settings."""
    tiny = TINY if options.tiny else ()
    return config.load(f"configs/{name}.yaml", [*settings, *tiny, *options.set])


class Training:
    """A compiled train step with what it needs."""

    def __init__(self, experiment, rows, documents=0):
        self.model, self.window = experiment.model, experiment.data.window
        outline = step.outline(partial(self.model.build, seed=0))
        tx = experiment.optimizer.build(1000, describe(outline.variables))
        like = step.abstract_state(outline, tx)
        self.begin = partial(step.initial_state, outline, tx, 0, like)
        random = np.random.default_rng(0)
        ids = random.integers(0, self.model.vocabulary, (rows, self.window + 1), np.int32)
        starts = random.random(ids.shape) < 1 / documents if documents else None
        self.batch = jax.device_put(Batch(ids, starts))
        self.rows, self.tokens = rows, rows * self.window
        self.step = step.compile_train_step(outline.graphdef, tx, 1, like, self.batch)

    def gib(self):
        """What the step holds at its peak: the state, its results and what lies between."""
        sizes = self.step.memory_analysis()
        held = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
        return (held + sizes.output_size_in_bytes - sizes.alias_size_in_bytes) / 2**30

    def seconds(self, steps, trace=None):
        """Mean time of a step, warm, and the last loss."""
        state = self.begin()
        for _ in range(3):
            state, found = self.step(state, self.batch)
        jax.block_until_ready(state)
        begin = time.perf_counter()
        for _ in range(steps):
            state, found = self.step(state, self.batch)
        jax.block_until_ready(state)
        spent = (time.perf_counter() - begin) / steps
        if trace:
            with jax.profiler.trace(trace):
                for _ in range(2):
                    state, found = self.step(state, self.batch)
                jax.block_until_ready(state)
        return spent, float(found["loss"])


def fitting(experiment, options, rows):
    """A train step of as many rows as there is memory for, at most `rows`."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", float("inf"))
    while True:
        run = Training(experiment, rows, options.documents)
        if rows == 1 or options.rows or run.gib() * 2**30 < 0.93 * limit:
            return run
        rows //= 2


def train(name, options):
    """Returns the records of training a model."""
    experiment = load(name, options, *FAST)
    rows = options.rows or next(n for size, n in ROWS.items() if name.endswith(size))
    begin = time.perf_counter()
    run = fitting(experiment, options, rows)
    compiling = time.perf_counter() - begin
    trace = options.profile and f"{options.profile}/{name}"
    seconds, loss = run.seconds(options.steps, trace)
    if trace:
        print(trace_summary.table(trace, steps=2))
    rate = run.tokens / seconds
    flops = 3 * run.model.flops_per_token(run.window) * rate
    peak = peak_flops(jax.devices()[0].device_kind)
    share = f" (MFU {flops / peak:.3f})" if peak else ""
    documents = f", documents of {options.documents} tokens" if options.documents else ""
    notes = (
        f"{run.model.parameters():,} parameters, B={run.rows} T={run.window} {run.model.dtype}, "
        f"remat {run.model.remat}{', unrolled' * run.model.unroll}{documents}, "
        f"{1e3 * seconds:.1f} ms a step, {flops / 1e12:.0f} TFLOP/s{share}, {run.gib():.1f} GiB, "
        f"loss {loss:.2f}, compiled in {compiling:.0f} s"
    )
    return [record(f"train/{name}", rate, "tokens/s", notes)]


def forward(name, options):
    """Returns the record of reading and scoring long rows."""
    rows, length = (1, 128) if options.tiny else (8, 16384)  # 128 heads, for 132 multiprocessors
    model = load(name, options, "model.unroll=true").model.build()
    graphdef, params = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(params)
    ids = np.random.default_rng(0).integers(0, 256, (rows, length + 1), np.int32)
    batch = jax.device_put(Batch(ids, None))
    run = step.compile_eval_step(graphdef, params, batch)
    seconds = mean_seconds(lambda: run(params, batch), options.steps)
    notes = f"B={rows}, with the loss, {1e3 * seconds:.1f} ms"
    return [record(f"forward/{name}/T{length}", rows * length / seconds, "tokens/s", notes)]


def decode(name, options):
    """Returns the records of writing one row, and 64."""
    model = load(name, options, "model.unroll=true").model.build()
    few, many = (60, 252) if options.tiny else (188, 700)
    records = []
    for rows in (1, 64):
        write = partial(generate, model, [[1] * 8] * rows, key=jax.random.key(0))
        seconds = {}
        for count in (few, many):  # their difference has no prompt and no setting up in it
            write(max_tokens=count)
            begin = time.perf_counter()
            write(max_tokens=count)
            seconds[count] = time.perf_counter() - begin
        each = (seconds[many] - seconds[few]) / (many - few)
        notes = f"sampled at temperature 1, {1e3 * each:.3f} ms a step"
        records.append(record(f"decode/{name}/b{rows}", rows / each, "tokens/s", notes))
    return records


def memory(name, options):
    """Returns the record of what a training step holds, with the config's own settings."""
    run = Training(load(name, options), 2 if options.tiny else 32)
    notes = f"B={run.rows} T={run.window}, remat {run.model.remat}, by the compiler's account"
    return [record(f"memory/{name}/T{run.window}/b{run.rows}", run.gib(), "GiB", notes)]


def mean_seconds(call, count):
    """Mean time of calls that are queued one behind the other, warm."""
    jax.block_until_ready([call() for _ in range(2)])
    begin = time.perf_counter()
    jax.block_until_ready([call() for _ in range(count)])
    return (time.perf_counter() - begin) / count


PARTS = {"train": train, "forward": forward, "decode": decode, "memory": memory}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=MODELS, help="names of configs")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by comma")
    parser.add_argument("--rows", type=int, default=0, help="of a training batch; 0 by size")
    parser.add_argument("--steps", type=int, default=16, help="timed steps")
    parser.add_argument("--documents", type=int, default=0, help="their mean length; 0 for one")
    parser.add_argument("--set", action="append", default=[], help="a setting, KEY=VALUE")
    parser.add_argument("--profile", help="a folder for traces of training")
    parser.add_argument("--out", help="a JSON file to append records to")
    parser.add_argument("--tiny", action="store_true", help="small models, for a CPU")
    options = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}", flush=True)
    lines = []
    with sharding.use(sharding.MeshConfig().build([device])):
        for part in options.only.split(","):
            for name in options.models if part == "train" else ("hope_150m",):
                try:
                    records = PARTS[part](name, options)
                except jax.errors.JaxRuntimeError as failure:  # what others cost is still told
                    print(f"{part}/{name} FAILED {str(failure)[:300]}", flush=True)
                    continue
                for one in records:
                    lines.append(
                        f"{one['name']:30} {one['value']:12,.1f} {one['unit']:9} {one['notes']}"
                    )
                    print(lines[-1], flush=True)
                if options.out:
                    append(options.out, records)
    print("\n".join(["=" * 40, *lines]))


if __name__ == "__main__":
    main()

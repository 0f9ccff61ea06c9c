"""Times every optimizer on a model's training step, and checks Newton-Schulz on this machine.

python benchmarks/optimizer_step.py [CONFIG] [--only muon,m3] [--rows 8] [--steps 24] [--out FILE]

For each optimizer: milliseconds of a whole training step on random tokens, milliseconds of the
optimizer's part alone (update and apply, parameters donated), bytes of state for each parameter.
Those of M3 are also given as shares of Muon's: a whole step is to cost at most 1.15 of one.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hope_jax.optimizers as hopt
from hope_jax import config, sharding
from hope_jax.ops.orthogonal import newton_schulz
from hope_jax.records import append, record
from hope_jax.shapes import Batch
from hope_jax.training import step

SPECTRA = {
    "geometric": lambda n: np.geomspace(1, 1e-3, n),
    "one small": lambda n: np.r_[np.ones(n - 1), 1e-3],
    "half small": lambda n: np.r_[np.ones(n - n // 2), 1e-3 * np.ones(n // 2)],
}


def milliseconds(run, state, steps):
    """Mean time of `state = run(state)` after three runs to warm up."""
    for _ in range(3):
        state = run(state)
    jax.block_until_ready(state)
    start = time.perf_counter()
    for _ in range(steps):
        state = run(state)
    jax.block_until_ready(state)
    return 1e3 * (time.perf_counter() - start) / steps


def alone(tx, params, steps):
    """Milliseconds of the optimizer's part on random gradients, and its bytes per parameter."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    grads = [1e-3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    grads = jax.tree.unflatten(structure, grads)
    params = jax.tree.map(jnp.zeros_like, grads)

    @partial(jax.jit, donate_argnums=0)
    def update(state):
        params, slots = state
        updates, slots = tx.update(grads, slots, params)
        return optax.apply_updates(params, updates), slots

    slots = jax.jit(tx.init)(params)
    size = sum(x.nbytes for x in jax.tree.leaves(slots)) / optax.tree.size(params)
    return milliseconds(update, (params, slots), steps), size


def whole(model, tx, tokens, steps):
    """Milliseconds of a training step."""
    like = step.abstract_state(model, tx)
    compiled = step.compile_train_step(model.graphdef, tx, 1, like, tokens)
    state = step.initial_state(model, tx, 0, like)
    return milliseconds(lambda state: compiled(state, tokens)[0], state, steps)


def check_newton_schulz(rows, columns):
    """Yields the smallest and largest singular value that come out, for hard spectra."""
    random = np.random.default_rng(0)
    left = np.linalg.qr(random.normal(size=(rows, rows)))[0]
    right = np.linalg.qr(random.normal(size=(columns, columns)))[0][:, :rows]
    for name, spectrum in SPECTRA.items():
        for dtype in ("float32", "bfloat16"):
            x = jnp.asarray((left * spectrum(rows)) @ right.T, dtype)
            made = np.asarray(jax.jit(newton_schulz)(x), np.float64)
            values = np.linalg.svd(made, compute_uv=False)
            yield f"{name} {rows}x{columns} {dtype}", values.min(), values.max()


def main(path, names, rows, steps, out):
    """Prints a line for each figure and appends the records to `out`."""
    records = []
    for name, low, high in check_newton_schulz(512, 2048):
        print(f"newton_schulz {name}: singular values in [{low:.3f}, {high:.3f}]", flush=True)
        records += [
            record(f"newton_schulz/{name}/smallest", low, "singular value"),
            record(f"newton_schulz/{name}/largest", high, "singular value"),
        ]
    experiment = config.load(path)
    window = experiment.data.window
    with sharding.use(sharding.MeshConfig().build(jax.devices()[:1])):
        model = step.outline(partial(experiment.model.build, seed=0))
        info = hopt.describe(model.variables)
        params = step.abstract_params(model)
        ids = jax.random.randint(jax.random.key(0), (rows, window + 1), 0, 256)
        tokens = Batch(ids, None)
        print(f"{path}: {optax.tree.size(params):,} parameters, {rows} x {window} tokens")
        times = {}
        for name in names:
            tx = hopt.OptimizerConfig(rule=hopt.OPTIMIZERS[name]()).build(1000, info)
            part, size = alone(tx, params, steps)
            total = whole(model, tx, tokens, steps)
            times[name] = {"step": total, "alone": part}
            print(
                f"{name:24} {total:9.2f} ms a step  {part:8.2f} ms alone  {size:5.1f} B", flush=True
            )
            label = f"optimizer_step/{experiment.name}/{rows}x{window}"
            records += [
                record(f"{label}/{name}/step", total, "ms"),
                record(f"{label}/{name}/alone", part, "ms"),
                record(f"{label}/{name}/state", size, "bytes per parameter"),
            ]
        if {"m3", "muon"} <= times.keys():
            for what, time_of_m3 in times["m3"].items():
                share = time_of_m3 / times["muon"][what]
                print(f"m3 of muon, {what}: {share:.3f}")
                records.append(record(f"{label}/m3/{what}_of_muon", share, "of Muon's"))
    if out:
        append(out, records)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?", default="configs/transformer_150m.yaml")
    parser.add_argument("--only", default=",".join(hopt.OPTIMIZERS))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", default="")
    given = parser.parse_args()
    main(given.config, given.only.split(","), given.rows, given.steps, given.out)

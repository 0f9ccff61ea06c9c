"""Times every form of FastKV: python benchmarks/fast_kv_forms.py B T H D C [RULE ...]."""

import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
from record import append, record

from hope_jax.ops.dispatch import platform
from hope_jax.ops.fastkv import FORMS, fast_kv
from hope_jax.ops.rules import RULES


def milliseconds(run, arrays, repeats=20):
    """The median of single calls, compiled and warm."""
    jax.block_until_ready(run(*arrays))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times)[repeats // 2]


def arguments(batch, length, heads, width):
    """bfloat16 queries, unit keys and values; float32 gates, retention near 1."""
    keys = jax.random.split(jax.random.key(0), 5)
    shape = batch, length, heads, width
    q, k, v = (jax.random.normal(key, shape) for key in keys[:3])
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    retain, write = (jax.nn.sigmoid(jax.random.normal(key, shape[:3])) for key in keys[3:])
    return *(x.astype(jnp.bfloat16) for x in (q, k, v)), 0.99 + 0.01 * retain, write


def main(batch, length, heads, width, chunk, *rules):
    arrays = arguments(*map(int, (batch, length, heads, width)))
    records = []
    for rule in rules or RULES:
        for name, form in FORMS.items():
            if form.platforms is not None and platform() not in form.platforms:
                continue
            op = partial(fast_kv, rule=rule, form=name, chunk=int(chunk))
            loss = lambda *call, op=op: op(*call)[0].astype(jnp.float32).sum()  # noqa: E731
            runs = {"fwd": op, "fwd_bwd": jax.value_and_grad(loss, range(5))}
            for pass_name, run in runs.items():
                spent = milliseconds(jax.jit(run), arrays)
                notes = f"B={batch} T={length} H={heads} d={width} C={chunk}"
                records.append(record(f"fast_kv/{rule}/{name}/{pass_name}", spent, "ms", notes))
                print(f"{rule:12} {name:12} {pass_name:8} {spent:9.2f} ms", flush=True)
    append("benchmarks/results/fast_kv_forms.json", records)


if __name__ == "__main__":
    main(*sys.argv[1:])

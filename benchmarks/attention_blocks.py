"""Times attention by blocks of queries: python benchmarks/attention_blocks.py B H K T [T ...]."""

import sys
import time
from functools import partial

import jax
import jax.numpy as jnp

from hope_jax.ops.attention import sliding_attention
from hope_jax.records import append, record

BLOCKS = (256, 512, 1024, 2048, None)
"""Queries that are taken at once; None is all of them."""


def milliseconds(run, arrays, repeats=20):
    """The median of single calls, compiled and warm."""
    jax.block_until_ready(run(*arrays))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times)[repeats // 2]


def loss(starts, block, q, k, v):
    y, _ = sliding_attention(q, k, v, None, starts, window=q.shape[1], block=block)
    return y.astype(jnp.float32).sum()


def main(batch, heads, width, *lengths):
    records = []
    for length in map(int, lengths):
        shape = int(batch), length, int(heads), int(width)
        keys = jax.random.split(jax.random.key(0), 3)
        q, k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
        starts = jnp.arange(length)[None] % 1500 == 0
        starts = jnp.broadcast_to(starts, shape[:2])
        for block in BLOCKS:
            run = jax.jit(jax.value_and_grad(partial(loss, starts, block or length), (0, 1, 2)))
            space = run.lower(q, k, v).compile().memory_analysis().temp_size_in_bytes / 2**20
            if space > 40_000:
                print(f"T={length} block={block}: {space:.0f} MiB, not run", flush=True)
                continue
            spent = milliseconds(run, (q, k, v))
            notes = f"B={batch} H={heads} K={width} T={length}, {space:.0f} MiB of scratch"
            records.append(record(f"attention/block={block}/fwd_bwd", spent, "ms", notes))
            print(f"T={length:6} block={block!s:5} {spent:9.2f} ms {space:9.0f} MiB", flush=True)
    append("benchmarks/results/attention_blocks.json", records)


if __name__ == "__main__":
    main(*sys.argv[1:])

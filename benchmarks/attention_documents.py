"""Errors of attention in documents against float32: python benchmarks/attention_documents.py.

A GPU's fused kernel tells documents apart by features of queries and keys; heads of 128 features
have no room for more but on Hopper GPUs. Its values and gradients should be as near to the truth as
those of one document, and what documents owe each other 0.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.ops.attention import sliding_attention

ROWS, TIME, HEADS = 2, 1024, 4


def read(starts, dtype, q, k, v):
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    y, _ = sliding_attention(q, k, v, None, starts, window=TIME)
    return y.astype(jnp.float32)


def with_gradients(starts, dtype, weight, q, k, v):
    y, pull = jax.vjp(partial(read, starts, dtype), q, k, v)
    return y, *pull(weight)


def main():
    for width in (64, 128):
        print(f"heads of {width} features")
        compare(width)


def compare(width):
    random = np.random.default_rng(0)
    shape = ROWS, TIME, HEADS, width
    *tokens, weight = (jnp.asarray(random.standard_normal(shape), jnp.float32) for _ in range(4))
    tokens = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in tokens]
    documents = jnp.asarray(random.random((ROWS, TIME)) < 1 / 100)
    for name, starts in (("one document", None), ("documents", documents)):
        with jax.default_matmul_precision("highest"):
            truth = jax.jit(partial(with_gradients, starts, jnp.float32, weight))(*tokens)
        found = jax.jit(partial(with_gradients, starts, jnp.bfloat16, weight))(*tokens)
        for what, a, b in zip(("y", "dq", "dk", "dv"), truth, found, strict=True):
            error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a))
            print(f"{name:12} {what:2} relative error {error:.1e}")
    last = int(np.flatnonzero(documents[0])[-1])
    of_last = weight * (jnp.arange(TIME) >= last)[:, None, None]
    _, *slopes = jax.jit(partial(with_gradients, documents, jnp.bfloat16, of_last))(*tokens)
    over = max(float(jnp.abs(x[0, :last]).max()) for x in slopes)
    print(f"largest gradient over a document's start: {over}")


if __name__ == "__main__":
    main()

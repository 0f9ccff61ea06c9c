"""Checks and times every form of the memory ops on this machine's accelerator.

python benchmarks/ops.py [OP ...] [--out RECORDS.json] [--only PART,...] [--batch 8 --time 4096 ...]

Parts: time (each form, forward and forward + backward), launch (the kernels alone, launched in
several ways), check (errors of values and gradients against the float64 reference). The table
comes last. Records are appended to RECORDS.json.
"""

import argparse
import time
from functools import partial
from math import inf, isfinite
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.ops import fastkv, fused, selfref
from hope_jax.ops.dispatch import platform
from hope_jax.ops.pallas import gpu
from hope_jax.records import append, record

OPS = ("self_referential", "momentum", "delta", "gated_delta")
"""`momentum` is `self_referential` with it."""

GATES = ("eta_bias", "alpha_bias", "beta", "retain", "write")
"""Arguments that are float32 everywhere and no operands of products."""

SHAPE = {"batch": 8, "time": 4096, "heads": 16, "width": 64}
"""What is timed; records of another shape say in their names what differs, as B1."""

KERNELS = {"gpu": "pallas_triton", "cpu": "pallas_triton"}


def inputs(op, batch, length, heads, width, seed=0, correlated=False):
    """Arguments of an op in float32 with gates like those of a fresh model, as a dict of arrays."""
    keys = iter(jax.random.split(jax.random.key(seed), 16))
    normal = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    tokens = lambda: normal(batch, length, heads, width)  # noqa: E731
    if op not in ("self_referential", "momentum"):
        unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
        k = tokens() + (3 * normal(1, 1, heads, width) if correlated else 0)
        retain = jax.nn.sigmoid(normal(batch, length, heads) + 5)
        write = jax.nn.sigmoid(normal(batch, length, heads))
        return {"q": unit(tokens()), "k": unit(k), "v": tokens(), "retain": retain, "write": write}
    x = tokens() + (3 * normal(1, 1, heads, width) if correlated else 0)
    shapes = {"k": width, "v": width, "memory": width, "eta": 1, "alpha": 1}
    scale = {"eta": 0.1, "alpha": 0.1}
    initial = {
        name: (scale.get(name, 1.0) * normal(heads, out, width) / width**0.5,)
        for name, out in shapes.items()
    }
    biases = {"eta_bias": jnp.zeros(heads), "alpha_bias": jnp.full(heads, 5.0)}
    beta = {"beta": normal(batch, length, heads)} if op == "momentum" else {}
    return {"x": x, "q": tokens(), "initial": initial, **biases, **beta}


def call(op, form, chunk, arrays, starts=None):
    """Runs an op; returns what was read and the last state."""
    if op not in ("self_referential", "momentum"):
        rule = {"delta": "delta", "gated_delta": "gated_delta", "hebbian": "hebbian"}[op]
        arrays = [arrays[name] for name in ("q", "k", "v", "retain", "write")]
        y, memory = fastkv.fast_kv(*arrays, None, starts, rule=rule, chunk=chunk, form=form)
        return y, memory.state
    slow = selfref.Slow(
        None, None, arrays["q"], None, None, arrays.get("beta"),
        arrays["eta_bias"], arrays["alpha_bias"],
    )  # fmt: skip
    y, memory = selfref.self_referential(
        arrays["x"], slow, arrays["initial"], None, starts,
        chunk_memory=chunk, chunk_projections=chunk, form=form,
    )  # fmt: skip
    return y, memory.state


def narrow(arrays, dtype):
    """Casts what a model computes in its compute dtype; gates and parameters stay float32."""
    return {
        name: a if name in (*GATES, "initial") else jax.tree.map(lambda x: x.astype(dtype), a)
        for name, a in arrays.items()
    }


# --- errors ---------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("op", "form", "chunk"))
def values_and_gradients(op, form, chunk, arrays, starts):
    """What was read, the last state, and the gradients of all arguments, by name.

    What is owed for what was read are numbers of bfloat16, the same whatever is computed in.
    """
    (y, state), pull = jax.vjp(lambda arrays: call(op, form, chunk, arrays, starts), arrays)
    weight = np.random.default_rng(1).standard_normal(y.shape).astype(jnp.bfloat16)
    ends = jax.tree.map(lambda s: jnp.full_like(s, 0.1), state)
    return {"y": y, "state": state} | pull((jnp.asarray(weight, y.dtype), ends))[0]


def exactly(op, chunk, arrays, starts):
    """The same by the reference, in float64."""
    jax.config.update("jax_enable_x64", True)
    arrays = jax.tree.map(lambda a: np.asarray(a, np.float64), arrays)
    truth = values_and_gradients(op, "reference", chunk, arrays, starts)
    jax.config.update("jax_enable_x64", False)
    return jax.tree.map(np.asarray, truth)


def errors(truth, got):
    """Relative errors in norm by the names of leaves; what is not finite is infinitely wrong."""
    truth, got = (jax.tree_util.tree_leaves_with_path(tree) for tree in (truth, got))
    found = {}
    for (path, a), (_, b) in zip(truth, got, strict=True):
        error = np.linalg.norm(a - np.asarray(b, np.float64)) / max(np.linalg.norm(a), 1e-30)
        found[jax.tree_util.keystr(path)] = error if isfinite(error) else inf
    return found


def moves(op, chunk, arrays, starts, truth, bits):
    """How far the reference moves, by names of leaves, when what kernels multiply is rounded.

    Of only the arguments, to so many bits of a fraction; the furthest of a few times. Rounding in
    other units, it goes between numbers that arguments may already be rounded to.
    """

    def round_in(unit, array):
        array = np.asarray(array, np.float32) / np.float32(unit)
        return np.asarray(jax.lax.reduce_precision(array, 8, bits)) * np.float32(unit)

    found = []
    for unit in (0.7, 0.8, 0.9):
        nudged = {
            name: a if name in GATES else jax.tree.map(partial(round_in, unit), a)
            for name, a in arrays.items()
        }
        found.append(errors(truth, exactly(op, chunk, nudged, starts)))
    return {name: max(one[name] for one in found) for name in found[0]}


CHECKS = [
    # op, dtype, matmul precision, (B, T, H, d), chunk, what
    ("self_referential", "bfloat16", None, (2, 333, 2, 64), 64, "starts"),
    ("self_referential", "bfloat16", None, (2, 320, 2, 64), 64, "starts, whole chunks"),
    ("self_referential", "bfloat16", None, (1, 256, 1, 64), 64, "correlated"),
    ("self_referential", "float32", None, (1, 256, 1, 64), 64, ""),
    ("self_referential", "float32", "highest", (1, 96, 1, 16), 16, "starts"),
    ("momentum", "bfloat16", None, (2, 333, 2, 64), 64, "starts"),
    ("momentum", "bfloat16", None, (1, 256, 1, 64), 64, "correlated"),
    ("momentum", "float32", None, (1, 256, 1, 64), 64, ""),
    ("momentum", "float32", "highest", (1, 96, 1, 16), 16, "starts"),
    ("delta", "bfloat16", None, (2, 333, 2, 64), 64, "starts"),
    ("delta", "float32", None, (2, 256, 2, 64), 64, "correlated"),
    ("gated_delta", "bfloat16", None, (1, 320, 2, 128), 64, ""),
]


BITS = {("bfloat16", None): 7, ("float32", None): 10, ("float32", "highest"): 23}
"""Bits of a fraction in operands of products, by dtype and precision; those of tf32 are 10."""


def check(rows, records, forms, ops):
    """Compares the kernel with the float64 reference; the XLA form's error stands beside it.

    So does how far the reference itself moves where that error is when only its arguments are
    rounded as the operands of products are. Memories that make their keys from what they have read
    make much of little: kernels, which round keys, values and states too, were off by 0.2 to 1.6
    times as much (interpreted, in bfloat16). None of their roundings makes most of it, and those of
    keys and values, which are the forward pass, make as much as any. The largest is often the error
    of a gate's bias. What that is owed is a sum over tokens of which 3 to 50 % is left: relative to
    its summands the largest error seen was 9e-3.
    """
    for op, dtype, precision, shape, chunk, what in [one for one in CHECKS if one[0] in ops]:
        arrays = narrow(inputs(op, *shape, correlated=what == "correlated"), dtype)
        starts = None
        if what.startswith("starts"):
            starts = jnp.asarray(np.random.default_rng(2).random(shape[:2]) < 0.02)
        truth = exactly(op, chunk, arrays, starts)
        moved = moves(op, chunk, arrays, starts, truth, BITS[dtype, precision])
        for form in forms or (KERNELS[platform()], "chunked"):
            begin = time.perf_counter()
            with jax.default_matmul_precision(precision):
                try:
                    found = errors(truth, values_and_gradients(op, form, chunk, arrays, starts))
                    where = max(found, key=found.get)
                    error, y = found[where], found["['y']"]
                    aside = f"rounded arguments alone {moved[where]:.1e}"
                    text = f"y {y:.1e}  worst {error:.1e} {where} ({aside})"
                    label = "/".join(filter(None, ("error", op, dtype, precision, what, form)))
                    notes = f"(B, T, H, d) = {shape}, C={chunk}; {where}, by {aside}; "
                    notes += f"of what is read {y:.1e}"
                    records.append(record(label, error, "largest relative error", notes))
                except Exception as failure:
                    text = "FAILED " + repr(failure)[:300]
            spent = time.perf_counter() - begin
            name = f"{op} {dtype} {precision or ''} {shape} C={chunk} {what}"
            row = f"{name:72} {form:14} {text}  ({spent:.0f} s)"
            print(row, flush=True)
            rows.append(row)


# --- times ----------------------------------------------------------------------------------------


def milliseconds(compiled, arrays, inner=10, repeats=11):
    """The median over repeats of the mean of calls that were queued together; warm."""
    jax.block_until_ready([compiled(*arrays) for _ in range(3)])
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready([compiled(*arrays) for _ in range(inner)][-1])
        times.append(1e3 * (time.perf_counter() - begin) / inner)
    return sorted(times)[repeats // 2]


def timed(jobs):
    """Yields the milliseconds or the failures of jobs `(label, run, shapes)`."""
    for label, run, shapes in jobs:
        begin = spent = time.perf_counter()
        try:
            compiled = jax.jit(run).lower(*shapes).compile()
            spent = time.perf_counter()
            result = milliseconds(compiled, jax.tree.map(some, shapes))
        except Exception as failure:
            result = failure
        yield label, result, spent - begin


def some(shape):
    """An array of such a shape: numbers that keep every op finite."""
    if jnp.issubdtype(shape.dtype, jnp.floating):
        noise = jax.random.normal(jax.random.key(0), shape.shape, jnp.float32)
        return jax.nn.sigmoid(noise + 2).astype(shape.dtype)
    return jnp.zeros(shape.shape, shape.dtype)


def passes(op, form, chunk, starts):
    """The forward pass, and the forward with the backward pass to all arguments."""

    def loss(arrays):
        return jnp.sum(call(op, form, chunk, arrays, starts)[0].astype(jnp.float32) ** 2)

    forward = lambda arrays: call(op, form, chunk, arrays, starts)[0]  # noqa: E731
    return {"fwd": forward, "fwd_bwd": jax.value_and_grad(loss)}


def time_forms(rows, records, shape, forms, ops):
    """Times whole ops as a model calls them."""
    kernel = KERNELS[platform()]
    batch, length, heads, width = shape
    sizes = zip("BTHd", shape, SHAPE.values(), strict=True)
    other = "".join(f"/{axis}{size}" for axis, size, usual in sizes if size != usual)
    cases = [("self_referential", "bfloat16", 64, ""), ("delta", "bfloat16", 64, "")]
    cases += [("self_referential", "bfloat16", 64, "starts"), ("gated_delta", "bfloat16", 64, "")]
    cases += [("momentum", "bfloat16", 64, "")]
    jobs = []
    for op, dtype, chunk, what in [case for case in cases if case[0] in ops]:
        arrays = narrow(inputs(op, *shape), dtype)
        starts = None
        if what == "starts":
            starts = jnp.asarray(np.random.default_rng(2).random((batch, length)) < 1 / 500)
        for form in forms or (kernel, "chunked"):
            if what and form != kernel:
                continue
            for name, run in passes(op, form, chunk, starts).items():
                note = f"B={batch} T={length} H={heads} d={width} C={chunk} {dtype} {form} {what}"
                official = form == kernel and not what
                label = f"op/{op}/{name}{other}"
                label += "" if official else f"/{form}{what and '/'}{what}"
                jobs.append(((label, note), run, (arrays,)))
    for (label, note), result, compiling in timed(jobs):
        if isinstance(result, Exception):
            rows.append(f"{label} {note} FAILED {result!r}"[:400])
        else:
            rows.append(f"{label:36} {result:9.3f} ms  {note} (compiled in {compiling:.0f} s)")
            records.append(record(label, result, "ms", note))
        print(rows[-1], flush=True)


def launches(rows, shape, ops):
    """Times the launches through Triton alone, in several ways and over several shapes."""
    batch, length, heads, width = shape
    cases = [
        # op, shape, chunk, warps, stages
        ("self_referential", shape, 64, 4, 1),
        ("self_referential", shape, 64, 8, 1),
        ("self_referential", shape, 32, 4, 1),
        ("momentum", shape, 64, 4, 1),
        ("momentum", shape, 32, 4, 1),
        ("delta", shape, 64, 4, 1),
        ("delta", (batch, length, heads // 2, 2 * width), 64, 8, 1),
    ]
    jobs = []
    for op, dims, chunk, warps, stages in [case for case in cases if case[0] in ops]:
        label = f"{op:18} {dims!s:20} C={chunk} warps={warps} stages={stages}"
        try:
            arrays = narrow(inputs(op, *dims), "bfloat16")
            plan, sequence = caught(op, chunk, arrays)
            parts = launch_parts(plan, sequence, gpu.Launch(warps, stages))
            jobs += [((label, name), run, shapes) for name, (run, shapes) in parts.items()]
        except Exception as failure:
            rows.append(f"{label} FAILED {failure!r}"[:400])
            print(rows[-1], flush=True)
    found = {}
    for (label, name), result, compiling in timed(jobs):
        text = f"{name} {result!r}"[:200]
        if not isinstance(result, Exception):
            text = f"{name} {result:.3f} ({compiling:.0f} s)"
        print(label, text, flush=True)
        found.setdefault(label, []).append(text)
    rows += [f"{label}  {'  '.join(texts)}" for label, texts in found.items()]


def launch_parts(plan, sequence, launch):
    """The launches of an op by name, each with the shapes of its arguments."""
    keep = partial(gpu.forward, plan, keep=True, launch=launch)
    y, ends, _, starts = jax.eval_shape(keep, sequence)
    prepare = partial(gpu._prepare, plan, launch=launch)
    notes = jax.eval_shape(prepare, sequence, starts, y)
    notes = {name: array for name, array in notes.items() if name not in ("dquery", "weight")}
    parts = {
        "fwd": (partial(gpu.forward, plan, keep=False, launch=launch), (sequence,)),
        "fwd+keep": (keep, (sequence,)),
        "prepare": (prepare, (sequence, starts, y)),
    }
    if plan.consults:

        def unlearn(*arrays):
            return gpu._unlearn(plan, *arrays, None, launch)

        return parts | {"unlearn": (unlearn, (sequence, notes, starts, y, ends))}
    push = partial(gpu._push_back, plan, launch=launch)
    afters = jax.eval_shape(push, sequence, notes, ends)[1]
    unlearn = partial(gpu._unlearn_at_once, plan, launch=launch)
    parts["push_back"] = push, (sequence, notes, ends)
    return parts | {"unlearn": (unlearn, (sequence, notes, starts, afters))}


def caught(op, chunk, arrays):
    """The plan, and the shapes of the sequence, that an op hands to its kernel."""
    found = []
    scan = fused._scan

    def spy(machine, plan, sequence):
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), fused._rounded(plan, sequence)
        )
        found.append((plan, shapes))
        return scan(machine, plan, sequence)

    fused._scan = spy
    try:
        jax.eval_shape(lambda arrays: call(op, KERNELS[platform()], chunk, arrays), arrays)
    finally:
        fused._scan = scan
    return found[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ops", nargs="*", default=OPS, help=", ".join(OPS))
    parser.add_argument("--out", help="a JSON file to append records to")
    parser.add_argument("--only", default="time,launch,check", help="parts, by comma")
    parser.add_argument("--forms", default="", help="forms to look at, by comma")
    for name, value in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    shape = options.batch, options.time, options.heads, options.width
    device = jax.devices()[0]
    rows = [f"{device.device_kind} x {len(jax.devices())}, jax {jax.__version__}"]
    records = []
    parts, forms = options.only.split(","), tuple(filter(None, options.forms.split(",")))
    if "time" in parts:
        time_forms(rows, records, shape, forms, options.ops)
    if "launch" in parts and platform() == "gpu":
        with mock.patch.object(gpu, "on_hopper", return_value=False):
            launches(rows, shape, options.ops)
    if "check" in parts:
        check(rows, records, forms, options.ops)
    if options.out:
        append(options.out, records)
    print("\n" + "=" * 40 + "\n" + "\n".join(rows))


if __name__ == "__main__":
    main()

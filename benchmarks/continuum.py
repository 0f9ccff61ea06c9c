"""What learning in context costs in training, and whether it helps: records for the README.

python benchmarks/continuum.py cost                  # step time of a HOPE of 150M parameters
python benchmarks/continuum.py stream                # by number of levels and lowest frequency
python benchmarks/continuum.py forgetting            # domain A, then B, then A
"""

import argparse
import sysconfig
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import trace_summary
from flax import nnx

from hope_jax.models.adapt import Reading, freeze, learn, norms, repeat
from hope_jax.models.decoder import Decoder, ModelConfig
from hope_jax.modules.continuum import ContinuumConfig, LevelConfig
from hope_jax.modules.memory import AssociativeConfig
from hope_jax.modules.self_reference import SelfModifyingTitansConfig
from hope_jax.ops import continuum as op
from hope_jax.ops.likelihood import next_token_loss
from hope_jax.records import append, record

WINDOW = 2048
BLOCK = 131072
"""Bytes of a stream: a whole number of what every setting learns at once, so each compiles once."""


def cost(arguments):
    """Times training steps with static levels and with the same levels learning in context."""
    chunks = (64, 256, 1024, 4096)
    static = tuple(LevelConfig(hidden=hidden, gated=True) for hidden in arguments.hidden)
    moving = tuple(replace(x, chunk=c) for x, c in zip(static, chunks, strict=True))
    settings = {
        "static": ContinuumConfig(levels=static),
        "output": ContinuumConfig(levels=moving),
        "all": ContinuumConfig(levels=moving, adapt="all"),
    }
    shape = arguments.rows, arguments.window + 1
    tokens = np.random.default_rng(0).integers(0, 32000, shape).astype(np.int32)
    starts = np.zeros(shape, bool)
    starts[:, :: arguments.window // 3] = True
    found, base = [], None
    for name in arguments.settings:
        model = ModelConfig(
            mixer=SelfModifyingTitansConfig(heads=arguments.width // 64),
            continuum=settings[name],
            width=arguments.width,
            layers=arguments.layers,
            vocabulary=32000,
            dtype="bfloat16",
            remat=arguments.remat,
            unroll=arguments.unroll,
        )
        step, state = training_step(model.build(), optax.adamw(1e-4))
        state, _ = step(state, tokens, starts)
        jax.block_until_ready(state)
        times = []
        for _ in range(arguments.steps):
            begin = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, tokens, starts))
            times.append(time.perf_counter() - begin)
        if arguments.profile:
            with jax.profiler.trace(f"{arguments.profile}/{name}"):
                state, _ = jax.block_until_ready(step(state, tokens, starts))
            print(trace_summary.table(f"{arguments.profile}/{name}"))
        best = 1e3 * min(times)
        base = base or best
        notes = {
            "parameters": model.parameters(),
            "rows": arguments.rows,
            "window": arguments.window,
            "hidden": arguments.hidden,
            "gated": True,
            "together": arguments.together,
            "remat": arguments.remat,
            "unroll": arguments.unroll,
            "times_static": round(best / base, 3),
            "delta_megabytes_a_sequence": delta_bytes(model) / 1e6,
            "peak_gigabytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
            / 1e9,
        }
        found.append(show(record(f"continuum/cost/{name}", best, "ms/step", notes)))
        del state
    return found


def stream(arguments):
    """Scores long streams with every number of levels and lowest frequency, clock on and off."""
    texts = domains(arguments)
    found = []
    for seed in range(arguments.seeds):
        static = trained(arguments, static_levels(arguments), seed)
        for number, lowest in [(0, 0), *((n, f) for f in arguments.lowest for n in (1, 2, 4))]:
            chunks = [lowest // 2 ** (number - 1 - i) for i in range(number)]
            for domain, tokens in texts.items():
                name = f"continuum/stream/next_token/{domain}/{number}_levels_{lowest}/seed_{seed}"
                begin = time.perf_counter()
                losses = next_token_losses(static, chunks, tokens, arguments)
                seconds = time.perf_counter() - begin
                bits = float(losses.mean() / np.log(2))
                found.append(show(record(name, bits, "bits/byte", {"seconds": seconds})))
        if arguments.local:
            lowest = arguments.lowest[0]
            levels = tuple(
                LevelConfig(hidden=arguments.hidden, chunk=lowest // 2 ** (3 - i)) for i in range(4)
            )
            moving = trained(arguments, levels, seed)
            for clock, model in (("on", moving), ("off", freeze(moving, range(4)))):
                for domain, tokens in texts.items():
                    name = f"continuum/stream/local/{domain}/clock_{clock}_{lowest}/seed_{seed}"
                    bits = float(held_losses(model, None, tokens).mean() / np.log(2))
                    found.append(show(record(name, bits, "bits/byte")))
    return found


def forgetting(arguments):
    """Learns domain A, then B, and scores unseen A with nothing but the deltas left of each."""
    texts = domains(arguments)
    first, second = texts["wikitext2"], texts["stdlib"]
    half = len(first) // 2
    settings = {"fast": [64], "fast_and_slow": [64, 512, 4096]}
    found = []
    for seed in range(arguments.seeds):
        static = trained(arguments, static_levels(arguments), seed)
        for name, chunks in settings.items():
            model = with_chunks(static, chunks, arguments, slow_retain=0.998)
            _, after_first = learn(model, first[None, :half])
            _, after_both = learn(model, second[None, :half], after_first)
            for moment, reading in (
                ("nothing", None),
                ("A", after_first),
                ("A_then_B", after_both),
            ):
                memory = None if reading is None else deltas_alone(model, reading)
                bits = float(held_losses(model, memory, first[half:]).mean() / np.log(2))
                sizes = {} if reading is None else norms(reading)
                notes = {level: float(size.mean()) for level, size in sizes.items()}
                title = f"continuum/forgetting/{name}/A_after_{moment}/seed_{seed}"
                found.append(show(record(title, bits, "bits/byte", {"delta_lengths": notes})))
    return found


def training_step(model: Decoder, optimizer):
    """A compiled step `(state, tokens, starts) -> (state, loss)`, and the first state."""
    graph, params = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(params)

    def loss(params, tokens, starts):
        model = nnx.merge(graph, params)
        hidden, _ = model.hidden(tokens[:, :-1], None, None if starts is None else starts[:, :-1])
        return jnp.mean(next_token_loss(hidden, model.unembedding, tokens[:, 1:]))

    @partial(jax.jit, donate_argnums=0)
    def step(state, tokens, starts=None):
        params, slots = state
        value, slope = jax.value_and_grad(loss)(params, tokens, starts)
        updates, slots = optimizer.update(slope, slots, params)
        return (optax.apply_updates(params, updates), slots), value

    return step, (params, jax.jit(optimizer.init)(params))


def trained(arguments, levels: tuple[LevelConfig, ...], seed: int) -> Decoder:
    """Trains a byte model on the first domain."""
    config = ModelConfig(
        mixer=AssociativeConfig(heads=arguments.width // 64, rule="gated_delta"),
        continuum=ContinuumConfig(levels=levels),
        width=arguments.width,
        layers=arguments.layers,
        vocabulary=256,
        dtype="bfloat16",
    )
    text = np.frombuffer((arguments.data / "train.txt").read_bytes(), np.uint8)
    random = np.random.default_rng(seed)
    rate = optax.cosine_onecycle_schedule(arguments.train_steps, 3e-3, 0.05)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.1))
    model = config.build(seed=seed)
    graph, _ = nnx.split(model, nnx.Param)
    step, state = training_step(model, optimizer)
    value, begin = None, time.perf_counter()
    for _ in range(arguments.train_steps):
        places = random.integers(0, len(text) - WINDOW - 1, arguments.rows)
        rows = text[places[:, None] + np.arange(WINDOW + 1)].astype(np.int32)
        state, value = step(state, rows)
    print(f"trained to {float(value):.3f} nats in {time.perf_counter() - begin:.0f} s", flush=True)
    return nnx.merge(graph, state[0])


def with_chunks(model: Decoder, chunks: list[int], arguments, slow_retain: float = 0.98) -> Decoder:
    """The same parameters, with the last levels learning the next token, fastest first."""
    levels = model.config.continuum.levels
    still = len(levels) - len(chunks)
    moving = [
        replace(
            level,
            chunk=chunk,
            rate=arguments.rate,
            retain=0.98 if chunk == chunks[0] else slow_retain,
        )
        for level, chunk in zip(levels[still:], chunks, strict=True)
    ]
    continuum = ContinuumConfig(levels=(*levels[:still], *moving), objective="next_token")
    config = replace(model.config, continuum=continuum)
    graph, _ = nnx.split(nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0))), nnx.Param)
    return nnx.merge(graph, nnx.to_pure_dict(nnx.split(model, nnx.Param)[1]))


def next_token_losses(model, chunks, tokens, arguments):
    """Nats for each byte, read as one stream; no chunks leave the clock off."""
    if not chunks:
        return held_losses(model, None, tokens)
    losses, _ = learn(with_chunks(model, chunks, arguments), tokens[None])
    return losses[0, 1 : 1 + (len(tokens) - 1) // WINDOW * WINDOW]  # those that `held_losses` has


def held_losses(model, memory, tokens):
    """Nats for each byte, window after window, whatever memory a window begins with carried on."""
    graph, params = nnx.split(model, nnx.Param)

    @partial(jax.jit, donate_argnums=1)
    def score(params, memory, tokens):
        model = nnx.merge(graph, params)
        hidden, memory = model.hidden(tokens[:, :-1], memory)
        return next_token_loss(hidden, model.unembedding, tokens[:, 1:])[0], memory

    memory = model.initial_memory(1) if memory is None else memory
    memory = jax.tree.map(jnp.array, memory)
    losses = []
    for start in range(0, len(tokens) - 1 - WINDOW + 1, WINDOW):
        part, memory = score(params, memory, tokens[None, start : start + WINDOW + 1])
        losses.append(part)
    return np.concatenate(jax.device_get(losses))


def deltas_alone(model, reading: Reading):
    """A fresh memory but for the deltas that a reading left."""
    fresh = model.initial_memory(1)
    return repeat(fresh._replace(continuum=reading.memory.continuum), 1)


def domains(arguments) -> dict[str, np.ndarray]:
    """The bytes of WikiText-2's test split, and of the standard library as a shifted domain."""
    wiki = (arguments.data / "test.txt").read_bytes()
    folder = Path(sysconfig.get_paths()["stdlib"])
    source = b"".join(path.read_bytes() for path in sorted(folder.glob("[a-m]*.py")))
    return {
        name: np.frombuffer(text[: arguments.bytes], np.uint8).astype(np.int32)
        for name, text in (("wikitext2", wiki), ("stdlib", source))
    }


def static_levels(arguments) -> tuple[LevelConfig, ...]:
    return (LevelConfig(hidden=arguments.hidden),) * 4


def delta_bytes(config: ModelConfig) -> int:
    """What the levels of one sequence carry, in all layers."""
    memory = jax.eval_shape(lambda: config.build().initial_memory(1)).continuum
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(memory))


def show(one: dict) -> dict:
    print(f"{one['name']:<64} {one['value']:10.4f} {one['unit']} {one['notes']}", flush=True)
    return one


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("cost", "stream", "forgetting"))
    parser.add_argument("--out", default="benchmarks/results/continuum.json")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--hidden", type=int, nargs="+")
    parser.add_argument("--window", type=int, default=4096, help="of a training step in `cost`")
    parser.add_argument("--steps", type=int, default=8, help="that are timed in `cost`")
    parser.add_argument("--profile", help="a folder for traces of `cost`")
    parser.add_argument("--remat", default="none", help="of the model in `cost`")
    parser.add_argument(
        "--unroll",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="its layers, in `cost`",
    )
    parser.add_argument("--together", type=int, default=op.TOGETHER, help="see `ops.continuum`")
    parser.add_argument(
        "--settings", nargs="+", default=["static", "output"], help="static, output, all"
    )
    parser.add_argument("--data", type=Path, default=Path("data/wikitext2"))
    parser.add_argument("--bytes", type=int, default=BLOCK, help="of each stream")
    parser.add_argument("--train-steps", type=int, default=600)
    parser.add_argument("--rate", type=float, default=0.3, help="of `next_token` moves")
    parser.add_argument("--lowest", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--local", action="store_true", help="train a model with `local` too")
    arguments = parser.parse_args()
    op.TOGETHER = arguments.together
    large = arguments.what == "cost"
    arguments.width = arguments.width or (1024 if large else 384)
    arguments.layers = arguments.layers or (9 if large else 4)
    hidden = arguments.hidden or ([128, 512, 1024, 1152] if large else [384])
    arguments.hidden = hidden if large else hidden[0]
    run = {"cost": cost, "stream": stream, "forgetting": forgetting}[arguments.what]
    append(arguments.out, run(arguments))


if __name__ == "__main__":
    main()

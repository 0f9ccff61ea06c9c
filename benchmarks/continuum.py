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
    base = None
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
        begin, step = training(model, optax.adamw(1e-4))
        step = jax.jit(step, donate_argnums=0)
        state, _ = step(jax.jit(begin)(0), tokens, starts)
        jax.block_until_ready(state)
        times = []
        for _ in range(arguments.steps):
            then = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, tokens, starts))
            times.append(time.perf_counter() - then)
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
        yield record(f"continuum/cost/{name}", best, "ms/step", notes)
        del state


def stream(arguments):
    """Scores long streams with every number of levels and lowest frequency, clock on and off."""
    texts = domains(arguments)
    tokens = np.stack([*texts.values()])
    static = trained(arguments, static_levels(arguments))
    for number, lowest in [(0, 0), *((n, f) for f in arguments.lowest for n in (1, 2, 3, 4))]:
        chunks = [lowest // 2 ** (number - 1 - i) for i in range(number)]
        bits = [next_token_bits(model, chunks, tokens, arguments) for model in static]
        for domain, own in zip(texts, np.transpose(bits), strict=True):
            title = f"continuum/stream/next_token/{domain}/{number}_levels_{lowest}"
            yield of_seeds(title, own, arguments)
    if arguments.local:
        lowest = arguments.lowest[0]
        levels = static_levels(arguments)
        chunks = (lowest // 2 ** (len(levels) - 1 - i) for i in range(len(levels)))
        moving = [replace(level, chunk=c) for level, c in zip(levels, chunks, strict=True)]
        models = trained(arguments, tuple(moving))
        frozen = [freeze(model, range(len(levels))) for model in models]
        for clock, some in (("on", models), ("off", frozen)):
            bits = [held_bits(model, None, tokens) for model in some]
            for domain, own in zip(texts, np.transpose(bits), strict=True):
                title = f"continuum/stream/local/{domain}/clock_{clock}_{lowest}"
                yield of_seeds(title, own, arguments)


def forgetting(arguments):
    """Learns domain A, then B, and scores unseen A with nothing but the deltas left of each."""
    texts = domains(arguments)
    first, second = (texts[name][None] for name in ("wikitext2", "stdlib"))
    half = first.shape[1] // 2
    static = trained(arguments, static_levels(arguments))
    for name, chunks in {"fast": [64], "fast_and_slow": [64, 512, 4096]}.items():
        bits, lengths = {}, {}
        for model in static:
            model = with_chunks(model, chunks, arguments, slow_retain=0.998)
            _, after_first = learn(model, first[:, :half])
            _, after_both = learn(model, second[:, :half], after_first)
            left = {"nothing": None, "A": after_first, "A_then_B": after_both}
            for moment, reading in left.items():
                memory = None if reading is None else deltas_alone(model, reading)
                bits.setdefault(moment, []).append(held_bits(model, memory, first[:, half:])[0])
                sizes = {} if reading is None else norms(reading)
                lengths[moment] = {level: float(size.mean()) for level, size in sizes.items()}
        for moment, own in bits.items():
            title = f"continuum/forgetting/{name}/A_after_{moment}"
            notes = {"delta_lengths_of_last_seed": lengths[moment]}
            yield of_seeds(title, np.array(own), arguments, notes)


def training(config: ModelConfig, optimizer: optax.GradientTransformation):
    """Functions `seed -> state` and `(state, tokens, starts) -> (state, loss)`, not compiled."""
    graph = outline(config)

    def begin(seed):
        params = nnx.to_pure_dict(nnx.split(config.build(seed=seed), nnx.Param)[1])
        return params, optimizer.init(params)

    def loss(params, tokens, starts):
        model = nnx.merge(graph, params)
        hidden, _ = model.hidden(tokens[:, :-1], None, None if starts is None else starts[:, :-1])
        return jnp.mean(next_token_loss(hidden, model.unembedding, tokens[:, 1:]))

    def step(state, tokens, starts=None):
        params, slots = state
        value, slope = jax.value_and_grad(loss)(params, tokens, starts)
        updates, slots = optimizer.update(slope, slots, params)
        return (optax.apply_updates(params, updates), slots), value

    return begin, step


def trained(arguments, levels: tuple[LevelConfig, ...]) -> list[Decoder]:
    """Trains byte models on the first domain, one for each seed, all in one program."""
    config = ModelConfig(
        mixer=AssociativeConfig(heads=arguments.width // 64, rule="gated_delta"),
        continuum=ContinuumConfig(levels=levels),
        width=arguments.width,
        layers=arguments.layers,
        vocabulary=256,
        dtype="bfloat16",
    )
    text = np.frombuffer((arguments.data / "train.txt").read_bytes(), np.uint8)
    randoms = [np.random.default_rng(seed) for seed in range(arguments.seeds)]
    rate = optax.cosine_onecycle_schedule(arguments.train_steps, 3e-3, 0.05)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.1))
    begin, step = (jax.vmap(function) for function in training(config, optimizer))
    step = jax.jit(step, donate_argnums=0)
    then = time.perf_counter()
    state, losses = jax.jit(begin)(jnp.arange(arguments.seeds)), None
    for _ in range(arguments.train_steps):
        last = len(text) - WINDOW - 1
        places = np.stack([random.integers(0, last, arguments.rows) for random in randoms])
        rows = text[places[..., None] + np.arange(WINDOW + 1)].astype(np.int32)
        state, losses = step(state, rows)
    print(f"trained to {losses} nats in {time.perf_counter() - then:.0f} s", flush=True)
    graph = outline(config)
    return [
        nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state[0]))
        for i in range(arguments.seeds)
    ]


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
    graph = outline(replace(model.config, continuum=continuum))
    return nnx.merge(graph, nnx.to_pure_dict(nnx.split(model, nnx.Param)[1]))


def next_token_bits(model, chunks, tokens, arguments):
    """Bits for a byte of each row, read as one stream; no chunks leave the clock off."""
    if not chunks:
        return held_bits(model, None, tokens)
    losses, _ = learn(with_chunks(model, chunks, arguments), tokens)
    scored = (tokens.shape[1] - 1) // WINDOW * WINDOW  # by `held_bits`
    return losses[:, 1 : 1 + scored].mean(1) / np.log(2)


def held_bits(model, memory, tokens):
    """Bits for a byte of each row, by windows, whatever the memory of the first carried on."""
    graph, params = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(params)
    memory = model.initial_memory(len(tokens)) if memory is None else memory
    memory = jax.tree.map(jnp.array, memory)
    losses = []
    for start in range(0, tokens.shape[1] - WINDOW, WINDOW):
        part, memory = score(graph, params, memory, tokens[:, start : start + WINDOW + 1])
        losses.append(part)
    return np.concatenate(jax.device_get(losses), axis=1).mean(1) / np.log(2)


@partial(jax.jit, static_argnames="graph", donate_argnames="memory")
def score(graph, params, memory, tokens):
    """Nats for each token behind the first, and the memory to go on with."""
    model = nnx.merge(graph, params)
    hidden, memory = model.hidden(tokens[:, :-1], memory)
    return next_token_loss(hidden, model.unembedding, tokens[:, 1:]), memory


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
    return (LevelConfig(hidden=arguments.hidden, gated=True),) * 4


def outline(config: ModelConfig) -> nnx.GraphDef:
    """What a model is beside its parameters."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0))), nnx.Param)[0]


def of_seeds(title: str, bits: np.ndarray, arguments, notes: dict | None = None) -> dict:
    """A record of the mean over seeds."""
    levels = {"hidden": arguments.hidden, "gated": True}
    notes = {"seeds": bits.round(5).tolist(), **levels, **(notes or {})}
    return record(title, bits.mean(), "bits/byte", notes)


def delta_bytes(config: ModelConfig) -> int:
    """What the levels of one sequence carry, in all layers."""
    memory = jax.eval_shape(lambda: config.build().initial_memory(1)).continuum
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(memory))


def show(one: dict):
    print(f"{one['name']:<64} {one['value']:10.4f} {one['unit']} {one['notes']}", flush=True)


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
    parser.add_argument("--seeds", type=int, default=3, help="of `stream` and `forgetting`")
    parser.add_argument("--local", action="store_true", help="train a model with `local` too")
    arguments = parser.parse_args()
    op.TOGETHER = arguments.together
    large = arguments.what == "cost"
    arguments.width = arguments.width or (1024 if large else 384)
    arguments.layers = arguments.layers or (9 if large else 4)
    hidden = arguments.hidden or ([128, 256, 512, 1920] if large else [256])
    arguments.hidden = hidden if large else hidden[0]
    run = {"cost": cost, "stream": stream, "forgetting": forgetting}[arguments.what]
    for one in run(arguments):
        show(one)
        append(arguments.out, [one])


if __name__ == "__main__":
    main()

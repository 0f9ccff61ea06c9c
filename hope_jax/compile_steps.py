"""Compiles the steps of an experiment for TPUs that are not there, and says what they will cost."""

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import prod
from typing import Any, Literal, NamedTuple

import jax
from jax.experimental import topologies

from hope_jax import compile_hlo, config, runs, sharding
from hope_jax.config import ConfigError, Experiment
from hope_jax.optimizers import describe
from hope_jax.training.metrics import PEAKS, replace
from hope_jax.training.step import abstract_state, compile_eval_step, compile_train_step, outline

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What libtpu has to be told where there is no TPU."""

FLAT = "1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"
DEEP = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
)  # fmt: skip


class Chip(NamedTuple):
    """A generation of TPUs.

    Attributes:
      capacity: Bytes of memory that a program may use, as the compiler says.
      bandwidth: Bytes that memory moves in a second.
      links: Bytes that all links of a chip to other chips send in a second.
      peak: FLOP/s in bfloat16.
      shapes: How many chips there are in each direction, for the machines to choose from.
    """

    capacity: float
    bandwidth: float
    links: float
    peak: float
    shapes: tuple[str, ...]


CHIPS = {
    "v4": Chip(30.75 * 2**30, 1228e9, 300e9, PEAKS["TPU v4"], DEEP[:8]),
    "v5e": Chip(15.75 * 2**30, 819e9, 200e9, PEAKS["TPU v5e"], FLAT),
    "v5p": Chip(95.74 * 2**30, 2765e9, 600e9, PEAKS["TPU v5"], ("1x1x1", *DEEP)),
    "v6e": Chip(31.25 * 2**30, 1640e9, 448e9, PEAKS["TPU v6"], FLAT),
}
"""Bandwidths from the data sheets at cloud.google.com/tpu/docs."""

RECOMPUTED = {"none": 0, "dots": 0, "full": 1}
"""Forward passes that the backward one computes again, by `model.remat`."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What to compile for.

    Attributes:
      topology: A generation and a shape, as v5e:16x16.
      only: One of the steps; None compiles both.
    """

    topology: str = ""
    only: Literal["train", "eval"] | None = None


def run(path: str, overrides: Sequence[str]) -> bool:
    """Compiles, prints a table and writes JSON into the run's folder; returns whether all fits.

    Args:
      path: A config file.
      overrides: Those of `Target` and of the experiment.

    Raises:
      ConfigError: A setting is wrong, or libtpu is missing.
    """
    jax.config.update("jax_platforms", "cpu")
    names = tuple(f"{name}=" for name in Target.__dataclass_fields__)
    mine = [override for override in overrides if override.startswith(names)]
    target = config.arguments(Target, mine)
    experiment = config.load(path, [one for one in overrides if one not in mine])
    report: dict[str, Any] = {"config": path, "overrides": list(overrides)}
    report |= examine(experiment, target)
    name = f"{target.topology.replace(':', '-')}.json"
    file = experiment.folder / "compile" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    replace(file, json.dumps(report, indent=1) + "\n")
    print(f"{table(report)}\nwritten to {file}")
    return report["fits"]


def described_devices(topology: str) -> list[jax.Device]:
    """The devices of a machine that is not there.

    Args:
      topology: See `Target`.

    Raises:
      ConfigError: It is unknown, or libtpu is missing.
    """
    generation, _, shape = topology.partition(":")
    if generation not in CHIPS or shape not in CHIPS[generation].shapes:
        choices = "; ".join(f"{name}: {' '.join(chip.shapes)}" for name, chip in CHIPS.items())
        raise ConfigError(f"topology={topology} is no choice; choices: {choices}")
    if find_spec("libtpu") is None:
        raise ConfigError("topology needs the TPU compiler: pip install 'hope_jax[tpu]'")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # One host's chips and, where a chip has two cores, both as one device.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if generation == "v4" else {}
    if prod(map(int, shape.split("x"))) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(topologies.get_topology_desc(topology, "tpu", **options).devices)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"topology={topology}: {str(error).splitlines()[0]}") from error


def examine(experiment: Experiment, target: Target) -> dict[str, Any]:
    """Compiles the steps of an experiment; returns what is known of them, as JSON has it."""
    devices = described_devices(target.topology)
    chip = CHIPS[target.topology.partition(":")[0]]
    with config.blame("mesh"):
        mesh, why = runs.lay_out(experiment, devices, memory=int(chip.capacity))
    with sharding.use(mesh), _uncached():
        model = outline(partial(experiment.model.build, seed=experiment.seed))
        tx = experiment.optimizer.build(experiment.training.steps, describe(model.variables))
        state = abstract_state(model, tx)
        with config.blame("data"):
            read, scored = experiment.data.abstract(), experiment.data.abstract(weighted=True)
        accumulate = experiment.training.accumulate
        compilers = {
            "train": lambda: compile_train_step(model.graphdef, tx, accumulate, state, read),
            "eval": lambda: compile_eval_step(model.graphdef, state.params, scored),
        }
        parts = {
            "train": {"parameters": state.params, "optimizer": state._replace(params={})},
            "eval": {"parameters": state.params},
        }
        steps = {
            name: {
                **_try(compilers[name], chip, parts[name] | {"batch": read}),
                "flops": _flops(experiment, name, len(devices)),
            }
            for name in ([target.only] if target.only else ["train", "eval"])
        }
    tokens = experiment.data.batch * experiment.data.window
    for step in steps.values():
        if step["fits"]:
            step |= _roofline(step, chip, tokens)
    return {
        "topology": target.topology,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "mesh_reason": why,
        "parameters": experiment.model.parameters(),
        "batch": experiment.data.batch,
        "window": experiment.data.window,
        "jax": jax.__version__,
        "fits": all(step["fits"] for step in steps.values()),
        "steps": steps,
    }


def table(report: dict[str, Any]) -> str:
    """A report as people read it."""
    mesh = " ".join(f"{name}={size}" for name, size in report["mesh"].items())
    lines = [
        f"{report['config']}: {report['parameters']:,} parameters, {report['batch']} rows of "
        f"{report['window']:,} tokens, on {report['devices']} x {report['topology']} as {mesh}",
        *([report["mesh_reason"]] if report["mesh_reason"] else []),
    ]
    for name, step in report["steps"].items():
        verdict = "fits" if step["fits"] else f"DOES NOT FIT: {step['error']}"
        lines += ["", f"{name} step: {verdict} (compiled in {step['compile_seconds']:.0f} s)"]
        lines += [f"  {k:<24}{v / 2**30:9.3f} GiB a device" for k, v in step["memory"].items()]
        flops = step["flops"]
        lines += [
            f"  {'FLOPs of the model':<24}{flops['model'] / 1e12:9.3f} T a device and step",
            f"  {'with recomputation':<24}{flops['executed'] / 1e12:9.3f} T",
        ]
        if step["fits"]:
            lines += _speed(step)
    return "\n".join(lines)


def _speed(step: dict[str, Any]) -> list[str]:
    shown = [f"  {'memory traffic':<24}{step['bytes'] / 1e9:9.3f} GB a device and step"]
    for one in step["collectives"][:12]:
        size = f"{one['bytes'] / 1e6:.3f} MB"
        shown.append(f"  {one['kind']:<24}{size:>13} x {one['count']}, {one['partners']} devices")
    if len(step["collectives"]) > 12:
        rest = sum(one["wire"] for one in step["collectives"][12:])
        shown.append(f"  {'smaller collectives':<24}{rest / 1e6:9.3f} MB sent")
    if step["unknown_loops"]:
        shown.append(f"  {step['unknown_loops']} loops of unknown length were counted once")
    seconds = step["seconds"]
    bound = max((n for n in seconds if n != "step"), key=seconds.__getitem__)
    each = ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in seconds.items())
    shown.append(f"  at best: {each}; bound by {bound}")
    shown.append(f"  at best: {step['tokens_per_second']:,.0f} tokens/s, MFU {step['mfu']:.1%}")
    return shown


def _try(
    compiler: Callable[[], jax.stages.Compiled], chip: Chip, parts: dict[str, Any]
) -> dict[str, Any]:
    """Compiles a step: its memory and traffic, or why it does not fit."""
    memory = {name: _bytes(tree) for name, tree in parts.items()}
    start = time.perf_counter()
    try:
        compiled = compiler()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = {
            "fits": False,
            "error": str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: "),
            "memory": memory | _needed(str(error)) | {"capacity": chip.capacity},
        }
        return found | {"compile_seconds": time.perf_counter() - start}
    seconds = time.perf_counter() - start
    stats: Any = compiled.memory_analysis()
    program, temporary = stats.generated_code_size_in_bytes, stats.temp_size_in_bytes
    new = stats.output_size_in_bytes - stats.alias_size_in_bytes
    total = stats.argument_size_in_bytes + new + temporary + program
    memory |= {"activations, gradients": temporary + new, "program": program, "total": total}
    traffic = compile_hlo.read(compiled.as_text() or "")
    return {
        "fits": total <= chip.capacity,
        "error": "its parts together are larger than the memory",
        "memory": memory | {"capacity": chip.capacity},
        "compile_seconds": seconds,
        "bytes": traffic.memory,
        "collectives": [one._asdict() | {"wire": one.wire} for one in traffic.collectives],
        "unknown_loops": traffic.unknown_loops,
    }


@contextmanager
def _uncached() -> Iterator[None]:
    """A program for a machine that is not there cannot be read back from jax's cache."""
    name = "jax_enable_compilation_cache"
    before = getattr(jax.config, name)
    jax.config.update(name, False)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _needed(error: str) -> dict[str, float]:
    """What the compiler says that it would need."""
    said = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds|Used ([\d.]+)([KMGT]?) of", error)
    if said is None:
        return {}
    number, unit = [group for group in said.groups() if group is not None]
    return {"total": float(number) * 1024.0 ** " KMGT".index(unit or " ")}


def _bytes(tree: Any) -> int:
    """Bytes that a device holds of arrays which are shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _flops(experiment: Experiment, name: str, devices: int) -> dict[str, float]:
    """FLOPs of a device in a step, counted from the settings: a program counts a loop once."""
    window = experiment.data.window
    forward = experiment.data.batch * window * experiment.model.flops_per_token(window) / devices
    if name == "eval":
        return {"model": forward, "executed": forward}
    again = RECOMPUTED[experiment.model.remat]
    return {"model": 3 * forward, "executed": (3 + again) * forward}


def _roofline(step: dict[str, Any], chip: Chip, tokens: int) -> dict[str, Any]:
    """The least time that a step can take, where what can go on at once does."""
    seconds = {
        "compute": step["flops"]["executed"] / chip.peak,
        "memory": step["bytes"] / chip.bandwidth,
        "network": sum(one["wire"] for one in step["collectives"]) / chip.links,
    }
    longest = max(seconds.values())
    return {
        "seconds": seconds | {"step": longest},
        "mfu": step["flops"]["model"] / chip.peak / longest,
        "tokens_per_second": tokens / longest,
        "error": None,
    }

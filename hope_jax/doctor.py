"""Looks at the machine and the installation: what is there, and what is wrong with it."""

import importlib
import os
import pkgutil
import platform
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from packaging.requirements import Requirement

import hope_jax
from hope_jax import ops
from hope_jax.ops.dispatch import Form
from hope_jax.training.metrics import peak_flops

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "numpy")
OPTIONAL = {"datasets": "datasets", "pyarrow": "parquet", "wandb": "wandb"}
"""Packages that some settings need, and the extra that installs each."""


def versions() -> dict[str, Any]:
    """What a result depends on besides its settings: for summary.json."""
    found = {name: _version(name) for name in PACKAGES}
    return {
        "versions": {
            "hope_jax": hope_jax.__version__,
            "python": platform.python_version(),
            **found,
        },
        "commit": commit(),
    }


@cache
def commit() -> str | None:
    """The commit of the checkout, with a plus where files differ from it; None without one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        run = {"capture_output": True, "text": True, "check": True, "timeout": 10}
        head = subprocess.run([*git, "rev-parse", "HEAD"], **run).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], **run).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return head + "+" * bool(changed)


def examine() -> tuple[list[str], list[str]]:
    """Looks at everything.

    Returns:
      What there is, line by line; and what is wrong, each with what to do.
    """
    wrong = [*_unmet(), *_unwritable()]
    try:
        devices = jax.devices()
    except RuntimeError as error:
        devices = []
        wrong.append(f"jax finds no device: {str(error).splitlines()[0]}")
    if devices and devices[0].platform == "cpu":
        wrong += _idle_accelerators()
    return [*_packages(), *_devices(devices), *_kernels(devices)], wrong


def _packages() -> Iterator[str]:
    about = versions()
    yield f"hope_jax {hope_jax.__version__} (commit {about['commit'] or 'unknown'})"
    yield f"Python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPUs"
    yield ", ".join(f"{name} {_version(name) or 'missing'}" for name in PACKAGES)
    for name, extra in OPTIONAL.items():
        yield f"{name} {_version(name) or f'missing (optional: pip install hope_jax[{extra}])'}"


def _devices(devices: list[jax.Device]) -> Iterator[str]:
    for device in devices:
        memory = (device.memory_stats() or {}).get("bytes_limit")
        peak = peak_flops(device.device_kind)
        parts = [f"device {device.id}: {device.platform} {device.device_kind}"]
        parts += [f"{memory / 2**30:.0f} GiB"] if memory else []
        parts += [f"{peak / 1e12:.0f} TFLOP/s in bfloat16"] if peak else []
        yield ", ".join(parts)


def _kernels(devices: list[jax.Device]) -> Iterator[str]:
    """The forms of each op, fastest first; those of other platforms in brackets."""
    here = devices[0].platform if devices else None
    for name, forms in sorted(_forms().items()):
        shown = [
            form if entry.platforms is None or here in entry.platforms else f"({form})"
            for form, entry in forms.items()
        ]
        yield f"op {name}: {', '.join(shown)}"


def _forms() -> dict[str, dict[str, Form]]:
    """Every table of forms in `hope_jax.ops`, by its module, and by its name but for `FORMS`."""
    tables = {}
    for module in pkgutil.iter_modules(ops.__path__):
        loaded = importlib.import_module(f"hope_jax.ops.{module.name}")
        for name, table in vars(loaded).items():
            if isinstance(table, dict) and any(isinstance(x, Form) for x in table.values()):
                suffix = "" if name == "FORMS" else f" ({name.lower().replace('_', ' ')})"
                tables[module.name + suffix] = table
    return tables


def _unmet() -> Iterator[str]:
    """Requirements of the package that the installation does not meet."""
    try:
        wanted = metadata.requires("hope_jax") or []
    except metadata.PackageNotFoundError:
        yield "hope_jax is not installed: pip install -e . in its folder"
        return
    for text in wanted:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            yield f"{requirement} is needed, {found or 'nothing'} is installed: pip install -e ."


def _unwritable() -> Iterator[str]:
    here = Path.cwd()
    if not os.access(here, os.W_OK):
        yield f"{here} cannot be written, so no run can be kept here: cd elsewhere"
    free = shutil.disk_usage(here).free
    if free < 2**30:
        yield f"{here} has {free / 2**20:.0f} MiB left: a run may need more"


def _idle_accelerators() -> Iterator[str]:
    """Accelerators of the machine that jax does not use."""
    wish = os.environ.get("JAX_PLATFORMS")
    why = f"JAX_PLATFORMS={wish} keeps it away" if wish else "install hope_jax[{}]"
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        yield f"there is an NVIDIA GPU and jax uses the CPU: {why.format('cuda')}"
    if Path("/dev/accel0").exists() or (Path("/dev/vfio").exists() and _version("libtpu")):
        yield f"there is a TPU and jax uses the CPU: {why.format('tpu')}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

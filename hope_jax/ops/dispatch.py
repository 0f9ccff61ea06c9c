"""Chooses, among the forms of an op, the fastest one that fits the call and the machine."""

import functools
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

_log = logging.getLogger(__name__)


class Form(NamedTuple):
    """One way to compute an op; all forms of an op compute the same function.

    Attributes:
      run: The implementation.
      refusal: Called with what `pick` is given: says in one sentence why this form cannot take the
        call, or None if it can. It must look at shapes, dtypes and options only, never at values.
        None for a form that takes every call.
      platforms: Where it is compiled ("cpu", "gpu", "tpu"); None for everywhere.
    """

    run: Callable[..., Any]
    refusal: Callable[..., str | None] | None = None
    platforms: tuple[str, ...] | None = None


def platform() -> str:
    """What the function being traced will be compiled for: "cpu", "gpu" or "tpu".

    It is the platform of the mesh in use (`jax.set_mesh`, or the one around a `jax.shard_map`) and
    without one that of jax's default backend. The mesh is a part of jit's cache key, so one
    function serves both platforms, and a mesh of described devices selects the forms of a machine
    that is not there (ahead-of-time compilation for a TPU from a CPU host).
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_hopper() -> bool:
    """Whether the function being traced will be compiled for a Hopper GPU (H100, H200, GH200)."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return platform() == "gpu" and re.search(r"\bG?H\d+", device.device_kind) is not None


def launch_refusal() -> str | None:
    """Says why a kernel cannot be launched on the mesh in use, or None if it can.

    XLA does not split a launch: on several devices it belongs into a `jax.shard_map` over all axes
    but those of one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    left = [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]
    if any(mesh.shape[axis] > 1 for axis in left):
        return f"a launch is not split over devices, got a mesh of {mesh.size}"
    return None


def pick(forms: Mapping[str, Form], form: str, *call: Any) -> Callable[..., Any]:
    """Chooses a form when the op is traced.

    A form asked for by name may belong to another platform: a kernel that finds itself elsewhere
    (see `platform`) runs interpreted, which is how it is tested without its machine.

    Args:
      forms: The op's forms by name, fastest first.
      form: One of the names, or "auto" for the first that fits. Where a faster form of this
        platform refuses, its reason is logged, each reason once.
      *call: What the refusals judge: the op's arrays and options.

    Returns:
      The `run` of the chosen form.

    Raises:
      ValueError: The name is unknown, the named form refuses, or no form fits (then with every
        reason).
    """
    if form != "auto":
        if form not in forms:
            raise ValueError(f"form must be one of auto, {', '.join(forms)}, got {form}")
        reason = _refusal(forms[form], call)
        if reason is not None:
            raise ValueError(f"form {form} refuses: {reason}")
        return forms[form].run
    here = platform()
    reasons = {}
    for name, candidate in forms.items():
        if candidate.platforms is not None and here not in candidate.platforms:
            reasons[name] = f"made for {' and '.join(candidate.platforms)}"
            continue
        reason = _refusal(candidate, call)
        if reason is None:
            return candidate.run
        reasons[name] = reason
        _log_once(f"form {name} refuses: {reason}; taking a slower one")
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ValueError(f"no form fits on {here}: {listed}")


def _refusal(form: Form, call: tuple[Any, ...]) -> str | None:
    return None if form.refusal is None else form.refusal(*call)


@functools.cache
def _log_once(message: str) -> None:
    _log.warning(message)

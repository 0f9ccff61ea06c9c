"""Nested Learning and HOPE in JAX: models that learn while they read.

    import hope_jax
    experiment = hope_jax.config.load("configs/quickstart.yaml", ["model.layers=2"])
    model = experiment.model.build(seed=0)
    logits, memory = model(tokens, memory=None, starts=None)
    memory = hope_jax.read(model, text, memory)  # of any length; see `models.adapt` for the rest

The parts are modules that are imported when they are first named: `config`, `data`, `evaluation`,
`models`, `modules`, `ops`, `optimizers`, `runs`, `sharding`, `shapes` and `training`.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "config",
    "consolidate",
    "data",
    "evaluation",
    "load_memory",
    "models",
    "modules",
    "ops",
    "optimizers",
    "read",
    "runs",
    "save_memory",
    "shapes",
    "sharding",
    "training",
]

_MEMORIES = {
    "consolidate": "adapt",
    "load_memory": "memory_file",
    "read": "adapt",
    "save_memory": "memory_file",
}


def __getattr__(name: str) -> Any:
    if name in _MEMORIES:
        return getattr(importlib.import_module(f"hope_jax.models.{_MEMORIES[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"hope_jax.{name}")
    raise AttributeError(f"module 'hope_jax' has no attribute {name!r}")

"""Nested Learning and HOPE in JAX: models that learn while they read.

    import hope_jax
    experiment = hope_jax.config.load("configs/quickstart.yaml", ["model.layers=2"])
    model = experiment.model.build(seed=0)
    logits, memory = model(tokens, memory=None, starts=None)

The parts are modules that are imported when they are first named: `config`, `data`, `evaluation`,
`models`, `modules`, `ops`, `optimizers`, `runs`, `sharding`, `shapes` and `training`.
"""

import importlib
from types import ModuleType

__version__ = "0.1.0"
__all__ = [
    "config",
    "data",
    "evaluation",
    "models",
    "modules",
    "ops",
    "optimizers",
    "runs",
    "shapes",
    "sharding",
    "training",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"hope_jax.{name}")
    raise AttributeError(f"module 'hope_jax' has no attribute {name!r}")

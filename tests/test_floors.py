"""Imports point down, each part of the world is met on its own floor, and the face is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("hope_jax/**/*.py")])

BELOW = {
    "shapes": "",
    "sharding": "shapes",
    "ops": "shapes",
    "data": "shapes sharding",
    "modules": "shapes sharding ops",
    "optimizers": "shapes ops",
    "training": "shapes sharding ops",
    "models": "shapes sharding ops modules",
    "evaluation": "shapes sharding ops data models",
    "config": "shapes sharding ops data modules optimizers training models evaluation",
    "comparison": "shapes sharding data optimizers training models evaluation config records",
    "suites": "sharding data optimizers training models evaluation comparison config records",
}
"""What each floor may import. Files that are not named here are front doors and may import all."""

WORLD = {
    "shapes": "",
    "sharding": "flax numpy",
    "ops": "numpy",
    "data": "numpy grain absl sentencepiece datasets pyarrow zstandard tqdm",
    "modules": "flax numpy",
    "optimizers": "optax numpy safetensors",
    "training": "flax numpy optax orbax tqdm matplotlib tensorboardX wandb",
    "models": "flax numpy safetensors",
    "evaluation": "flax numpy tqdm matplotlib lm_eval",
    "config": "yaml pydantic",
    "comparison": "flax numpy optax matplotlib tqdm",
    "suites": "flax numpy optax matplotlib tqdm",
}
"""Which packages each floor may import; jax and jaxtyping are everywhere."""

ONLY_IN = {
    "orbax": "hope_jax/training/checkpoint.py",
    "grain": "hope_jax/data/",
    "sentencepiece": "hope_jax/data/",
    "lm_eval": "hope_jax/evaluation/harness",
}


def floor(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "hope_jax" else parts[0]


def imports(file):
    """Full dotted names of everything imported anywhere in a file."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_every_folder_is_a_floor():
    folders = {path.parent.name for path in ROOT.glob("hope_jax/*/*.py")}
    assert folders <= BELOW.keys()
    assert BELOW.keys() == WORLD.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down_and_out_where_they_may(file):
    here = floor(file)
    for name in imports(file):
        top, *rest = name.split(".")
        if top in sys.stdlib_module_names:
            continue
        if top in ONLY_IN:
            assert file.relative_to(ROOT).as_posix().startswith(ONLY_IN[top]), name
        if here not in BELOW:
            continue
        if top == "hope_jax":
            assert rest, f"{name}: import the part that is meant"
            assert rest[0] == here or rest[0] in BELOW[here].split(), name
        else:
            assert top in ("jax", "jaxtyping") or top in WORLD[here].split(), name


def test_the_face_is_light():
    heavy = ["grain", "orbax", "sentencepiece", "datasets", "matplotlib", "tensorboardX"]
    program = f"import hope_jax, sys; print(*(name for name in {heavy} if name in sys.modules))"
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == []

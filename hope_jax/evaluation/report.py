"""What is left of an evaluation: a table on the screen and a JSON file in the run's folder."""

import json
import math
import re
from pathlib import Path
from typing import Any

from hope_jax.evaluation.subject import Results


def table(results: Results) -> str:
    """Lays numbers out in a column and puts words and texts below."""
    numbers = {name: value for name, value in results.items() if isinstance(value, int | float)}
    width = max(map(len, numbers), default=0)
    lines = [f"{name:<{width}}  {_number(value):>14}" for name, value in numbers.items()]
    lines += [f"{name}  {value}" for name, value in results.items() if isinstance(value, str)]
    for value in results.values():
        for i, text in enumerate(value if isinstance(value, list) else []):
            lines += [f"--- {i + 1} ---", text]
    return "\n".join(lines)


def write(folder: Path, content: dict[str, Any]) -> Path:
    """Writes JSON, whole or not at all; a number that JSON lacks becomes null.

    Args:
      folder: Made where it is missing.
      content: With the entries `task`, `step` and `date`, which name the file.

    Returns:
      The file.
    """
    moment = re.sub(r"[^0-9]", "", content["date"].partition("+")[0])
    path = folder / f"{content['task']}-{content['step']}-{moment}.json"
    folder.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(_plain(content), indent=2, ensure_ascii=False) + "\n", "utf-8")
    return partial.replace(path)


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

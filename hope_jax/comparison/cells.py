"""What commands of many runs share: a JSON file for each, named after all that it depends on."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hope_jax.records import origin
from hope_jax.training import metrics


def path(folder: Path, front: str, settings: Any) -> Path:
    """The file of a run with settings, as JSON has them, in a folder; `front` begins its name."""
    text = json.dumps(settings, sort_keys=True)
    return folder / f"{front}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def write(file: Path, found: Mapping[str, Any]):
    """Writes what a run found and where, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    metrics.replace(file, json.dumps({**found, **origin()}) + "\n")


def read(file: Path) -> dict[str, Any]:
    """Reads what a run found."""
    return json.loads(file.read_text("utf-8"))


def whence(found: Mapping[str, Any]) -> dict[str, Any]:
    """The origin of what a run found, as records have it."""
    return {name: found.get(name, "unknown") for name in origin()}


@contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[int, str], None]]:
    """Shows a bar, moved by the number of steps that are done and what is new to show."""
    with tqdm(total=total, desc=label, mininterval=1.0) as bar:

        def tell(done: int, shown: str):
            if shown:
                bar.set_postfix_str(shown, refresh=False)
            bar.update(done - bar.n)

        yield tell


def check(named: Mapping[str, Sequence[Any]], name: str):
    """Checks what is combined into runs.

    Args:
      named: For each setting the names of its entries; those of `rates` are numbers.
      name: Of the folder that results go to.

    Raises:
      ValueError: A setting is empty, or has an entry twice, a rate or the name cannot be.
    """
    for setting, entries in named.items():
        if not entries:
            raise ValueError(f"{setting} must have at least one entry, got none")
        twice = next((x for x in entries if entries.count(x) > 1), None)
        if twice is not None:
            raise ValueError(f"{setting} must be different from each other, got {twice} twice")
    for rate in named.get("rates", ()):
        if not rate > 0:
            raise ValueError(f"rates must be above 0, got {rate}")
    if not name or name != Path(name).name:
        raise ValueError(f"name must be that of a folder, without slashes, got {name!r}")

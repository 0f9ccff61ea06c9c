"""Records of measurements: every figure with its machine, date, commit and command."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import jax


def record(name: str, value: float, unit: str, notes: object = "") -> dict:
    """Describes one figure that was just measured by the running command.

    Args:
      name: What was measured, by parts with slashes between them.
      value: The figure.
      unit: Of the value.
      notes: Anything that JSON can hold.
    """
    return {
        "name": name,
        "value": float(value),
        "unit": unit,
        **origin(),
        "command": " ".join(["python", *_command()]),
        "notes": notes,
    }


def origin() -> dict[str, str]:
    """Says where what is measured now comes from: device, date and commit."""
    return {
        "device": jax.devices()[0].device_kind,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
    }


def append(path: str | Path, records: list[dict]):
    """Adds records to a JSON file; those of the same name and device are replaced.

    Args:
      path: Of the file; it and its folder are made where they are missing.
      records: From `record`.
    """
    path = Path(path)
    old = json.loads(path.read_text("utf-8")) if path.exists() else []
    new = {(one["name"], one["device"]) for one in records}
    kept = [one for one in old if (one["name"], one["device"]) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept + records, indent=1) + "\n", "utf-8")


def _command() -> list[str]:
    file, *arguments = sys.argv
    front = Path(file).name == "__main__.py"
    return ["-m", Path(file).parent.name, *arguments] if front else sys.argv


def _commit() -> str:
    """What the variable COMMIT says, for copies of a checkout; else the checkout's commit."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()

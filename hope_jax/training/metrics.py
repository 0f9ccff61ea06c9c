"""What a run tells while it goes: speed, metrics files, a progress bar, a picture of the loss."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

from hope_jax.training import RunError, together

Values = Mapping[str, float | int | None]
"""Numbers by name; None where there is none."""

TIMINGS = ("seconds", "tokens_per_second", "mfu", "goodput", "input_wait", "straggler")
"""The fields of metrics.jsonl that two runs of the same experiment do not share.

`seconds` since training began; `tokens_per_second` and `mfu` of the steps alone; `goodput` is the
share of the time since the program took up the run, compilation included, in which it took steps
and did not wait for a batch; `input_wait` and `straggler` are seconds a step: what the process that
waits longest waits for batches, and how much longer the slowest process's host is busy between
steps than the fastest's.
"""

PEAKS: dict[str, float] = {
    "TPU7x": 2307e12,
    "TPU v6": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bfloat16 FLOP/s of one device (V100: float16); the first name that the device's contains.

From the vendors' data sheets: cloud.google.com/tpu/docs (v4 to TPU7x), nvidia.com/data-center (SXM
figures without sparsity, where the sheet does not say PCIe), and the GeForce whitepapers.
"""


def peak_flops(kind: str) -> float | None:
    """The most that a device can do in bfloat16, whatever the model computes in.

    Args:
      kind: The device's name, `jax.Device.device_kind`.

    Returns:
      FLOP/s; None for one that is not in `PEAKS`, as a CPU.
    """
    return next((peak for name, peak in PEAKS.items() if name in kind), None)


class Meter:
    """Measures how fast training goes, without the time that something else took."""

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        tokens: int,
        flops: float,
        peak: float | None,
        began: float | None = None,
    ):
        """Starts now.

        Args:
          clock: Seconds.
          tokens: Read by each step.
          flops: Of one step.
          peak: FLOP/s of all devices together, if known.
          began: When the program took up the run; None for now.
        """
        self._clock, self._tokens, self._flops, self._peak = clock, tokens, flops, peak
        self._start = self._last = clock()
        self._began = self._start if began is None else began
        self._away = self._away_since = 0.0
        self._waited = self._waited_since = self._busy_since = 0.0
        self._steps = self._steps_since = 0

    def step(self):
        """Counts a step that has ended."""
        self._steps += 1
        self._steps_since += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside is not training."""
        start = self._clock()
        try:
            yield
        finally:
            self._away += self._clock() - start
            self._away_since += self._clock() - start

    @contextmanager
    def busy(self, *, waits: bool = False) -> Iterator[None]:
        """What happens inside keeps the host from the next step; `waits` for a batch, perhaps."""
        start = self._clock()
        try:
            yield
        finally:
            took = self._clock() - start
            self._busy_since += took
            if waits:
                self._waited += took
                self._waited_since += took

    def since_last(self) -> Values:
        """Returns `TIMINGS` of the steps since the last call; all processes call it at once."""
        now, steps = self._clock(), max(self._steps_since, 1)
        speed = self._speed(self._steps_since, now - self._last - self._away_since)
        busy = self._busy_since / steps
        wait, most, least = together.largest(self._waited_since / steps, busy, -busy)
        self._last, self._steps_since, self._away_since = now, 0, 0.0
        self._waited_since = self._busy_since = 0.0
        spread = {"input_wait": wait, "straggler": most + least}
        return {"seconds": now - self._start, **speed, "goodput": self._goodput(now), **spread}

    def overall(self) -> Values:
        """Returns the timings of all steps in this process."""
        now = self._clock()
        seconds = now - self._start
        speed = self._speed(self._steps, seconds - self._away)
        wait = self._waited / max(self._steps, 1)
        return {"seconds": seconds, **speed, "goodput": self._goodput(now), "input_wait": wait}

    def _goodput(self, now: float) -> float | None:
        useful = now - self._start - self._away - self._waited
        return useful / (now - self._began) if now > self._began else None

    def _speed(self, steps: int, seconds: float) -> Values:
        rate = steps / seconds if steps and seconds > 0 else None
        return {
            "tokens_per_second": rate and rate * self._tokens,
            "mfu": rate and self._peak and rate * self._flops / self._peak,
        }


class Report:
    """Writes metrics.jsonl, TensorBoard events and the progress bar of one run."""

    def __init__(self, folder: Path, *, step: int, steps: int, name: str, wandb: str | None):
        """Goes on after `step`: what an interrupted run wrote of later ones is taken back.

        Args:
          folder: The run's.
          step: Steps taken before.
          steps: Steps to take in all.
          name: The run's.
          wandb: The project to report to as well (needs the extra `wandb`).
        """
        self._wandb = _open_wandb(wandb, folder, name) if wandb else None
        self._path = folder / "metrics.jsonl"
        kept = [line for line in read(self._path) if line["step"] <= step]
        replace(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")
        # Written here and not by a SummaryWriter's thread, which a full disk ends unseen.
        self._events = EventsWriter(str(folder / "events"), f".{step}")
        self._event(step + 1, session_log=SessionLog(status=SessionLog.START))
        # On a terminal a bar; into a file, a line now and then.
        self._live = sys.stderr.isatty()
        self._bar = tqdm(
            total=steps, initial=step, unit="step", desc=name, disable=not self._live, smoothing=0.1
        )

    def train(self, step: int, values: Values, *, write: bool):
        """Takes the metrics of one step.

        Args:
          step: Steps taken.
          values: By name.
          write: Whether they go into the files, not only onto the bar.
        """
        self._bar.update(step - self._bar.n)
        if write:
            self._record(step, "train", values)
            shown = _show(values)
            self._bar.set_postfix_str(shown, refresh=False)
            if not self._live:
                print(f"step {step}/{self._bar.total}  {shown}", file=sys.stderr, flush=True)

    def evaluate(self, step: int, split: str, values: Values):
        """Takes the results of an evaluation."""
        self._record(step, split, values)
        self._events.flush()
        self.say(f"step {step}  {split}: {_show(values)}")

    def text(self, step: int, text: str):
        """Takes a sample of what the model writes."""
        self._event(step, summary=summary.text("sample", text))
        self.say(f"step {step}  sample: {text}")

    def say(self, line: str):
        """Prints a line above the bar."""
        tqdm.write(line, file=sys.stderr)

    def close(self):
        """Finishes the files.

        Raises:
          OSError: The disk is full, say.
        """
        self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file.close()
        self._events.close()

    def _event(self, step: int, **what: Any):
        self._events.write_event(Event(wall_time=time.time(), step=step, **what))

    def _record(self, step: int, split: str, values: Values):
        line = {"step": step, "split": split, **{k: _finite(v) for k, v in values.items()}}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        numbers = {k: v for k, v in line.items() if isinstance(v, float | int) and k != "step"}
        for key, value in numbers.items():
            self._event(step, summary=summary.scalar(f"{split}/{key}", value))
        if self._wandb is not None:
            self._wandb.log({f"{split}/{key}": value for key, value in numbers.items()}, step=step)


class Silence:
    """The `Report` of a process that leaves it to another one."""

    def train(self, step: int, values: Values, *, write: bool):
        """Does nothing."""

    def evaluate(self, step: int, split: str, values: Values):
        """Does nothing."""

    def text(self, step: int, text: str):
        """Does nothing."""

    def say(self, line: str):
        """Does nothing."""

    def close(self):
        """Does nothing."""


def read(path: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl; a line that a crash left half-written ends it."""
    lines = []
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines


def draw(lines: list[dict[str, Any]], path: Path):
    """Draws the loss of each split over the steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for split in dict.fromkeys(line["split"] for line in lines):
        points = [(line["step"], line["loss"]) for line in lines if line["split"] == split]
        points = [(step, loss) for step, loss in points if loss is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True), label=split, marker="." if len(points) < 30 else ""
            )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _show(values: Values) -> str:
    forms = {
        "loss": "loss {:.4f}",
        "perplexity": "perplexity {:.2f}",
        "tokens_per_second": "{:,.0f} tok/s",
        "mfu": "MFU {:.1%}",
    }
    shown = [form.format(values[k]) for k, form in forms.items() if values.get(k) is not None]
    if values.get("skipped"):
        shown.append(f"{values['skipped']:.0f} skipped")
    return ", ".join(shown)


def _finite(value: float | int | None) -> float | int | None:
    return value if value is not None and math.isfinite(value) else None


def replace(path: Path, text: str):
    """Writes a file at once, so that a crash leaves the old one or the new one."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, "utf-8")
    beside.replace(path)


def _open_wandb(project: str, folder: Path, name: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise RunError(
            f"training.wandb={project} needs the package wandb: pip install 'hope_jax[wandb]'"
        ) from error
    return wandb.init(project=project, name=name, id=name, resume="allow", dir=str(folder))

"""The training loop: reads batches, takes steps, evaluates, saves, and reports on the way."""

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from math import exp
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from hope_jax.shapes import Batch
from hope_jax.training import RunError, metrics, together
from hope_jax.training.checkpoint import Checkpoints, steps, what_is_left
from hope_jax.training.step import (
    Outline,
    Params,
    TrainState,
    abstract_state,
    compile_train_step,
    eval_step,
    initial_state,
)


@runtime_checkable
class Batches(Protocol):
    """Batches in order, read ahead of time."""

    def __next__(self) -> Batch: ...

    def __iter__(self) -> "Batches": ...

    def close(self) -> None:
        """Stops to read."""
        ...


@runtime_checkable
class Data(Protocol):
    """What the loop asks of the data.

    Attributes:
      tokenizer: Has a `fingerprint`.
      splits: The names of the splits.
    """

    tokenizer: Any
    splits: tuple[str, ...]

    def info(self, split: str) -> tuple[int, ...]:
        """How much a split holds."""
        ...

    def train(self, start_step: int) -> Batches:
        """Reads the batches of training without end, from the one after `start_step` batches on."""
        ...

    def valid(self) -> Batches:
        """Reads each window of the validation split once."""
        ...


Sample = Callable[[nnx.Module], str]

WARM = 5
"""Steps after which the profiler's trace begins, if there is one."""


def run(
    experiment: Any,
    model: Outline,
    tx: optax.GradientTransformation,
    data: Data,
    *,
    sample: Sample | None = None,
    about: dict[str, Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Trains until the end, or until SIGTERM or SIGINT; goes on from the run's newest checkpoint.

    Call it with a mesh in use (`hope_jax.sharding.use`).

    Args:
      experiment: A frozen dataclass with the fields name, seed, model and training.
      model: What to train, see `hope_jax.training.step.outline`.
      tx: The optimizer.
      data: What to read.
      sample: Writes a text with the model, after every evaluation.
      about: Further entries for summary.json.
      clock: Seconds, for the timings.

    Returns:
      What is in summary.json.

    Raises:
      RunError: Too many steps were not finite (see `TrainingConfig.patience`), a file could not be
        read or written, the newest checkpoint is of other data, or another process is lost.
      CheckpointError: A checkpoint cannot be written, or none of those there can be read.
      OtherModelError: The newest checkpoint is of another model.
    """
    training = experiment.training
    folder = Path(training.folder) / experiment.name
    finished = read_summary(folder) if steps(folder / "checkpoints") else {}
    if finished.get("steps", 0) >= training.steps:
        print(f"{folder} is finished: it took {finished['steps']} steps", file=sys.stderr)
        return finished
    try:
        with (
            interrupts() as stop,
            Run(experiment, model, tx, data, sample, clock) as current,
        ):
            while current.step < training.steps and not stop.is_set():
                current.advance()
                if together.must_stop(current.step):
                    stop.set()
                last = current.step == training.steps
                if last or is_due(current.step, training.evaluate_every):
                    current.evaluate()
                if is_due(current.step, training.save_every) and current.is_sound():
                    current.save()
            current.save()
        return current.summarise(about or {})
    except (OSError, jax.errors.JaxRuntimeError, ValueError) as error:
        reason = together.lost(error) or (error if isinstance(error, OSError) else None)
        if reason is None:
            raise
        left = what_is_left(folder / "checkpoints")
        raise RunError(f"{folder} stopped: {reason}; of the checkpoints {left}") from error


class Run:
    """A run between two starts of the program: its state, its files and its clock."""

    def __init__(
        self,
        experiment: Any,
        model: Outline,
        tx: optax.GradientTransformation,
        data: Data,
        sample: Sample | None,
        clock: Callable[[], float],
    ):
        """Restores the newest checkpoint or begins, and compiles; takes what `run` takes."""
        training, began = experiment.training, clock()
        self._experiment, self._model, self._data = experiment, model, data
        self._sample = sample
        self.folder = Path(training.folder) / experiment.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._checkpoints = Checkpoints(self.folder / "checkpoints", keep=training.keep)
        abstract = abstract_state(model, tx)
        news = self._restore(abstract, partial(initial_state, model, tx, experiment.seed, abstract))
        self.step, self._streak = int(self._state.step), int(self._state.streak)
        self._saved = self._first = self.step
        self._tracing = False
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._loss: tuple[int, float] | None = None

        self._batches = data.train(self.step)
        self._batch = next(self._batches)
        start = clock()
        self._train_step = compile_train_step(
            model.graphdef, tx, training.accumulate, abstract, self._batch
        )
        everywhere = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
        self._eval_step = jax.jit(partial(eval_step, model.graphdef), out_shardings=everywhere)
        self._compile_seconds = clock() - start
        rows, width = self._batch.tokens.shape
        self._tokens = rows * (width - 1)
        devices = jax.sharding.get_mesh().devices
        peak = metrics.peak_flops(devices.flat[0].device_kind)
        self._meter = metrics.Meter(
            clock,
            tokens=self._tokens,
            # A backward pass costs two forward ones.
            flops=3 * self._tokens * experiment.model.flops_per_token(width - 1),
            peak=peak and peak * devices.size,
            began=began,
        )
        self._report = metrics.Silence()
        if together.is_first():
            self._report = metrics.Report(
                self.folder,
                step=self.step,
                steps=training.steps,
                name=experiment.name,
                wandb=training.wandb,
            )
        for line in news:
            self._report.say(line)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object):
        self._batches.close()
        self._end_trace()
        try:
            # To wait for a save is to wait for the other processes, which may be lost.
            if kind is None or jax.process_count() == 1:
                self._checkpoints.close()
        finally:
            # Where something went wrong before, that is what the user has to hear of.
            with suppress(OSError) if kind else nullcontext():
                self._report.close()

    def advance(self):
        """Starts a step; while the device works on it, takes in what the step before gave."""
        self._trace()
        with self._meter.busy(), jax.transfer_guard("disallow"):
            self._state, values = self._train_step(self._state, self._batch)
        self.step += 1
        before, self._pending = self._pending, (self.step, values)
        with self._meter.busy(waits=True):
            self._batch = next(self._batches)
        self._settle(before)

    def _trace(self):
        """Begins and ends the profiler's trace of some steps."""
        steps, taken = self._experiment.training.profile, self.step - self._first
        if not steps or taken not in (WARM, WARM + steps):
            return
        self._settle_all()
        with self._meter.pause():
            if taken == WARM:
                jax.profiler.start_trace(self.folder / "profile")
                self._tracing = True
            else:
                self._end_trace()

    def _end_trace(self):
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            self._report.say(f"traced steps lie in {self.folder / 'profile'}")

    def _validate(self) -> float:
        """Nats per target of the validation split."""
        with closing(self._data.valid()) as batches:
            sums = [self._eval_step(self._state.params, batch) for batch in batches]
        nats, targets = np.array(jax.device_get(sums), np.float64).sum(axis=0).tolist()
        return nats / targets

    def is_sound(self) -> bool:
        """Whether the last step was finite: only then a checkpoint may push out an older one."""
        self._settle_all()
        return self._streak == 0

    def evaluate(self):
        """Computes the loss on the validation split, and lets the model write."""
        self._settle_all()
        with self._meter.pause():
            if "valid" in self._data.splits:
                loss = self._validate()
                self._loss = self.step, loss
                perplexity = exp(min(loss, 700))
                self._report.evaluate(self.step, "valid", {"loss": loss, "perplexity": perplexity})
            if self._sample is not None:
                model = nnx.merge(self._model.graphdef, self._state.params)
                self._report.text(self.step, self._sample(model))

    def save(self):
        """Starts to write a checkpoint of the last step, unless there is one."""
        self._settle_all()
        if self._saved == self.step:
            return
        at, loss = self._loss or (None, None)
        about = {
            "step": self.step,
            "data": self._fingerprint(),
            "streak": self._streak,
            "config": asdict(self._experiment),
        }
        with self._meter.pause():
            self._checkpoints.save(self._state, about, loss=loss if at == self.step else None)
        self._saved = self.step

    def summarise(self, about: dict[str, Any]) -> dict[str, Any]:
        """Writes loss.png and summary.json, after the run was closed; returns the latter."""
        lines = metrics.read(self.folder / "metrics.jsonl")
        if lines and together.is_first():
            metrics.draw(lines, self.folder / "loss.png")
        train = [line for line in lines if line["split"] == "train"]
        valid = [line for line in lines if line["split"] == "valid" and line["loss"] is not None]
        best = min(valid, key=lambda line: line["loss"], default={})
        mesh = jax.sharding.get_mesh()
        summary = {
            "name": self._experiment.name,
            "steps": self.step,
            "finished": self.step >= self._experiment.training.steps,
            "parameters": sum(x.size for x in jax.tree.leaves(self._state.params)),
            "tokens": self.step * self._tokens,
            "train_loss": train[-1]["loss"] if train else None,
            "valid_loss": valid[-1]["loss"] if valid else None,
            "valid_perplexity": valid[-1]["perplexity"] if valid else None,
            "best_valid_loss": best.get("loss"),
            "best_step": best.get("step"),
            "skipped": int(self._state.skipped),
            **self._meter.overall(),
            "compile_seconds": self._compile_seconds,
            "device": mesh.devices.flat[0].device_kind,
            "devices": mesh.size,
            "processes": jax.process_count(),
            "mesh": dict(mesh.shape),
            **about,
        }
        if together.is_first():
            metrics.replace(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def _restore(
        self, abstract: TrainState, create: Callable[[Params | None], TrainState]
    ) -> list[str]:
        """Sets the state; returns what the user has to know of it."""
        restored = self._checkpoints.restore(abstract)
        if restored is None:
            given = self._checkpoints.given(abstract.params)
            self._state = create(given)
            return [f"{self.folder} begins with the parameters it was given"] if given else []
        for name, now in self._fingerprint().items():
            if restored.about["data"].get(name) != now:
                raise RunError(
                    f"{self.folder} was trained with another {name}: bring that back, or start "
                    "another run with name=..."
                )
        self._state = restored.state
        news = [f"{reason}; it now lies in {aside}" for aside, reason in restored.broken.items()]
        return [*news, f"{self.folder} goes on after step {int(self._state.step)}"]

    def _fingerprint(self) -> dict[str, Any]:
        """What must not change while a run goes on, besides its settings."""
        sizes = {split: list(self._data.info(split)) for split in self._data.splits}
        return {"tokenizer": self._data.tokenizer.fingerprint, "corpus": sizes}

    def _settle_all(self):
        """Waits for the last step."""
        pending, self._pending = self._pending, None
        self._settle(pending)

    def _settle(self, pending: tuple[int, dict[str, jax.Array]] | None):
        """Takes in what a step gave."""
        if pending is None:
            return
        step, found = pending
        found = {name: value.item() for name, value in jax.device_get(found).items()}
        self._streak = found["streak"]
        values = {name: found[name] for name in ("loss", "grad_norm", "skipped")}
        self._meter.step()
        training = self._experiment.training
        write = is_due(step, training.log_every) or step == training.steps
        if write:
            values |= {"tokens": step * self._tokens, **self._meter.since_last()}
        self._report.train(step, values, write=write)
        if self._streak >= training.patience:
            raise RunError(self._diverged(step))

    def _diverged(self, step: int) -> str:
        self._checkpoints.close()
        good = self._checkpoints.last_good()
        left = f"the last good checkpoint is {good}" if good else "there is no checkpoint before"
        first = step - self._streak + 1
        return f"loss or gradient were not finite in steps {first} to {step}; {left}"


def read_summary(folder: Path) -> dict[str, Any]:
    """Reads the summary.json of a run; nothing where there is none."""
    path = folder / "summary.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def is_due(step: int, every: int) -> bool:
    """Whether something happens after this step; never with `every` 0."""
    return every > 0 and step % every == 0


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Turns the first SIGTERM or SIGINT into an event; a second one acts as ever.

    Several processes have to stop after the same step: see `together.must_stop`.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield stop  # only the main thread may set handlers
        return
    before: dict[int, Any] = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)
    }

    def request(number: int, _: object):
        stop.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

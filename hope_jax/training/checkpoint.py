"""Checkpoints of a run: written in the background, complete or absent, restored on any mesh."""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from hope_jax.training import together
from hope_jax.training.step import Params, TrainState

_log = logging.getLogger(__name__)
# What goes wrong in orbax is raised as well; its threads log it at length, some ten times.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
_SEAL = "sizes.json"
"""Written into a complete checkpoint: what is shorter than that was damaged later."""

_GIVEN = "0"
"""The checkpoint with parameters that a run was given: before the first step, and nothing else."""

_DELETED = ".deleted"
"""Ends the name of what is being deleted, so that a crash leaves no half of a checkpoint."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which one and what is left."""


class OtherModelError(ValueError):
    """A checkpoint is sound, but of another model than the one at hand."""


class Restored(NamedTuple):
    """What a checkpoint held.

    Attributes:
      state: The state, on the devices that were asked for.
      about: What was said of it when it was saved: config, tokenizer, data and so on.
      broken: Checkpoints that could not be read, where they lie now, with the reason.
    """

    state: TrainState
    about: dict[str, Any]
    broken: dict[Path, str]


class Checkpoints:
    """The checkpoints of one run, `folder/STEP` each: the last few and the best one."""

    def __init__(self, folder: Path, *, keep: int):
        """Changes nothing yet.

        Args:
          folder: Theirs alone.
          keep: How many of the last ones stay. The best by validation loss stays as well.
        """
        self.folder = folder.absolute()
        self._keep = keep
        self._saving: ocp.AsyncResponse[None] | None = None

    def restore(self, state: TrainState) -> Restored | None:
        """Reads the newest complete checkpoint of a step taken, before the first `save`.

        Damaged ones are moved into the folder `broken` beside this one, if one is left to go on
        from.

        Args:
          state: Shapes and shardings of what is to come.

        Returns:
          None where there is no checkpoint at all.

        Raises:
          CheckpointError: There are checkpoints and none can be read.
          OtherModelError: The newest is another model's.
        """
        self._sweep()
        broken: dict[Path, str] = {}
        found = None
        for path in reversed(steps(self.folder)):
            try:
                about = read_about(path)
                if about.get("given"):
                    continue
                found = found or (_load(path, state), about)
            except CheckpointError as error:
                broken[path] = str(error)
        if broken and not found:
            reasons = "; ".join(broken.values())
            raise CheckpointError(f"no checkpoint in {self.folder} can be read: {reasons}")
        moved = {_move_aside(path): reason for path, reason in broken.items()}
        together.wait("after checkpoints were read")
        return Restored(*found, moved) if found else None

    def given(self, params: Params) -> Params | None:
        """Reads what `give` wrote, if it did.

        Args:
          params: Shapes and shardings of what is to come.

        Raises:
          CheckpointError: It is damaged.
          OtherModelError: It is another model's.
        """
        path = self.folder / _GIVEN
        if not path.is_dir() or not read_about(path).get("given"):
            return None
        return _load_params(path, params)

    def save(self, state: TrainState, about: dict[str, Any], *, loss: float | None = None):
        """Copies the state and writes it in the background; waits for an earlier save first.

        Args:
          state: May be donated as soon as this returns.
          about: JSON that is kept beside it.
          loss: On validation, by which the best is known.

        Raises:
          CheckpointError: This or the save before it could not be written.
        """
        with self._reporting():
            self._finish()
            self._saving = ocp.save_checkpointables_async(
                str(self.folder / str(int(state.step))),
                {"params": state.params, "training": _rest(state)},
                custom_metadata={**about, "loss": loss},
            )

    def close(self):
        """Waits until everything is written.

        Raises:
          CheckpointError: The last save could not be written.
        """
        with self._reporting():
            self._finish()

    def last_good(self) -> Path | None:
        """The newest checkpoint whose last step was finite."""
        for path in reversed(steps(self.folder)):
            if read_about(path).get("streak") == 0:
                return path
        return None

    def _finish(self):
        """Waits for the save under way, and tidies up after it."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        saving.result()
        together.wait("after a checkpoint was written")
        if together.is_first():
            self._tidy()
        together.wait("after older checkpoints were deleted")

    def _tidy(self):
        """Notes how large the newest checkpoint's files are, and deletes older ones."""
        complete = steps(self.folder)
        _seal(complete[-1])
        for path in set(complete[: -self._keep]) - {_best(complete)}:
            path.rename(path.with_name(f"{path.name}{_DELETED}"))
        self._sweep()

    def _sweep(self):
        """Deletes what a save or a deletion left that was not finished."""
        if not together.is_first():
            return
        for pattern in (f"*{_DELETED}", "*.orbax-checkpoint-tmp*"):
            for path in self.folder.glob(pattern):
                _remove(path)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._sweep()
            reason = f"could not save a checkpoint in {self.folder}: {_first_line(error)}"
            raise CheckpointError(f"{reason}; {what_is_left(self.folder)}") from error


def _remove(path: Path):
    """Deletes a folder into which a save that has failed may still be writing."""
    for _ in range(20):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.1)


def give(folder: Path, params: Params, about: dict[str, Any]):
    """Gives a run parameters to begin with: writes them as its checkpoint 0.

    Args:
      folder: The run's checkpoints.
      params: Of the run's model.
      about: JSON that is kept beside them: data and config as of any checkpoint.

    Raises:
      CheckpointError: The checkpoint could not be written.
    """
    path = folder.absolute() / _GIVEN
    try:
        about = {**about, "step": 0, "streak": 0, "loss": None, "given": True}
        ocp.save_checkpointables(str(path), {"params": params}, custom_metadata=about)
        _seal(path)
    except Exception as error:
        raise CheckpointError(f"could not save {path}: {_first_line(error)}") from error


def steps(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if path.name.isdigit()), key=_step)


def what_is_left(folder: Path) -> str:
    """Says where a run can go on."""
    complete = steps(folder)
    return f"the last complete one is {complete[-1]}" if complete else "there is none before"


def best(folder: Path) -> Path:
    """The checkpoint with the least loss on validation.

    Raises:
      CheckpointError: None was saved after a validation.
    """
    found = _best(steps(folder))
    if found is None:
        raise CheckpointError(f"no checkpoint in {folder} has a validation loss")
    return found


def restore_params(run: Path, params: Params) -> tuple[Params, Path]:
    """Reads parameters and nothing else.

    Args:
      run: A checkpoint, or a run folder for the newest checkpoint in it that is complete.
      params: Shapes and shardings of what is to come.

    Returns:
      The parameters, and the checkpoint that they are from.

    Raises:
      CheckpointError: There is no checkpoint that can be read.
      OtherModelError: The checkpoint is another model's.
    """
    run = run.absolute()
    found = [run] if run.name.isdigit() else steps(run / "checkpoints")
    broken = []
    for path in reversed(found):
        try:
            read_about(path)
            return _load_params(path, params), path
        except CheckpointError as error:
            _log.warning("%s", error)
            broken.append(str(error))
    raise CheckpointError("; ".join(broken) or f"{run} is neither a run folder nor a checkpoint")


def read_about(path: Path) -> dict[str, Any]:
    """Reads what was said of a checkpoint when it was saved, and looks whether it is all there.

    Raises:
      CheckpointError: It is damaged.
    """
    try:
        sizes = json.loads((path / _SEAL).read_text("utf-8")) if (path / _SEAL).exists() else {}
        about = json.loads((path / "_CHECKPOINT_METADATA").read_text("utf-8"))["custom_metadata"]
        found = _sizes(path)
        for name, size in sizes.items():
            if found.get(name) != size:
                there = f"{found[name]} bytes" if name in found else "missing"
                raise ValueError(f"{name} is {there}, not {size} bytes")
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {_first_line(error)}") from error
    return about


def _load(path: Path, state: TrainState) -> TrainState:
    params = _load_params(path, state.params)
    with _reading(path):
        rest = ocp.load_checkpointables(str(path), {"training": _rest(state)})["training"]
    return TrainState(params=params, **rest)


def _rest(state: TrainState) -> dict[str, Any]:
    """All but the parameters, which are kept apart so that they can be read alone."""
    return {name: value for name, value in state._asdict().items() if name != "params"}


def _load_params(path: Path, params: Params) -> Params:
    _compare(path, params)
    with _reading(path):
        return ocp.load_checkpointables(str(path), {"params": params})["params"]


def _compare(path: Path, params: Params):
    """Raises an error if the parameters have other names or shapes than the checkpoint's."""
    with _reading(path):
        found = _shapes(ocp.checkpointables_metadata(str(path)).metadata["params"])
    wanted = _shapes(params)
    different = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if different:
        name = different[0]
        more = f" ({len(different) - 1} more differ)" if len(different) > 1 else ""
        raise OtherModelError(
            f"checkpoint {path} is another model's: {name} is {found.get(name, 'absent')} there "
            f"and {wanted.get(name, 'absent')} here{more}"
        )


def _best(checkpoints: list[Path]) -> Path | None:
    """The one with the least validation loss; the older one of equals."""
    losses = {}
    for path in checkpoints:
        with suppress(CheckpointError):
            loss = read_about(path)["loss"]
            if loss is not None and isfinite(loss):
                losses[path] = loss
    return min(losses, key=losses.__getitem__, default=None)


def _seal(path: Path):
    if not (path / _SEAL).exists():
        beside = path / f"{_SEAL}.tmp"
        beside.write_text(json.dumps(_sizes(path)), "utf-8")
        beside.replace(path / _SEAL)


def _sizes(path: Path) -> dict[str, int]:
    files = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(_SEAL)]
    return {str(file.relative_to(path)): file.stat().st_size for file in files}


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: hasattr(x, "shape"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves
    }


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns whatever a damaged checkpoint raises into one sentence."""
    logging.disable(logging.CRITICAL)  # the libraries below log each damaged array at length
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {_first_line(error)}") from error
    finally:
        logging.disable(logging.NOTSET)


def _move_aside(path: Path) -> Path:
    """Makes room for a new checkpoint of the same step, without deleting anything."""
    folder = path.parent.parent / "broken"
    folder.mkdir(exist_ok=True)
    taken = len(list(folder.glob(f"{path.name}-*")))
    aside = folder / f"{path.name}-{taken}"
    return path.rename(aside) if together.is_first() else aside


def _step(path: Path) -> int:
    return int(path.name)


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]

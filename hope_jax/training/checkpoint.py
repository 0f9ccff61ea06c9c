"""Checkpoints of a run: written in the background, complete or absent, restored on any mesh."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from hope_jax.training.step import Params, TrainState

_log = logging.getLogger(__name__)
_SEAL = "sizes.json"
"""Written into a complete checkpoint: what is shorter than that was damaged later."""

_policies = ocp.training.preservation_policies


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
        """Reads what there is; nothing is made before the first `save`.

        Args:
          folder: Theirs alone.
          keep: How many of the last ones stay. The best by validation loss stays as well.
        """
        self.folder = folder.absolute()
        self._keep = keep
        self._manager: ocp.training.Checkpointer | None = None

    def restore(self, state: TrainState) -> Restored | None:
        """Reads the newest complete checkpoint, before the first `save`.

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
        broken: dict[Path, str] = {}
        found = None
        for path in reversed(steps(self.folder)):
            try:
                about = read_about(path)
                found = found or (_load(path, state), about)
            except CheckpointError as error:
                broken[path] = str(error)
        if broken and not found:
            reasons = "; ".join(broken.values())
            raise CheckpointError(f"no checkpoint in {self.folder} can be read: {reasons}")
        moved = {_move_aside(path): reason for path, reason in broken.items()}
        return Restored(*found, moved) if found else None

    def save(self, state: TrainState, about: dict[str, Any], *, loss: float | None = None):
        """Copies the state and writes it in the background; waits for an earlier save first.

        Args:
          state: May be donated as soon as this returns.
          about: JSON that is kept beside it.
          loss: On validation, by which the best is known.

        Raises:
          CheckpointError: This or the save before it could not be written.
        """
        step = int(state.step)
        with self._reporting():
            manager = self._open()
            manager.wait()
            self._seal()
            manager.save_checkpointables_async(
                step,
                {"params": state.params, "training": state._replace(params=None)._asdict()},
                custom_metadata=about,
                metrics=None if loss is None else {"loss": loss},
            )

    def close(self):
        """Waits until everything is written.

        Raises:
          CheckpointError: The last save could not be written.
        """
        if self._manager is not None:
            manager, self._manager = self._manager, None
            with self._reporting():
                manager.close()
                self._seal()

    def last_good(self) -> Path | None:
        """The newest checkpoint whose last step was finite."""
        for path in reversed(steps(self.folder)):
            if read_about(path).get("streak") == 0:
                return path
        return None

    def _open(self) -> ocp.training.Checkpointer:
        if self._manager is None:
            self._manager = ocp.training.Checkpointer(
                self.folder,
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=_policies.AnyPreservationPolicy(
                    [
                        _policies.LatestN(self._keep),
                        _policies.BestN(
                            n=1,
                            get_metric_fn=lambda metrics: -metrics["loss"],
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                cleanup_tmp_directories=True,
            )
        return self._manager

    def _seal(self):
        """Notes the size of every file of the checkpoints that were completed."""
        for path in steps(self.folder):
            if not (path / _SEAL).exists():
                beside = path / f"{_SEAL}.tmp"
                beside.write_text(json.dumps(_sizes(path)), "utf-8")
                beside.replace(path / _SEAL)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            complete = steps(self.folder)
            left = f"the last complete one is {complete[-1]}" if complete else "there is none yet"
            raise CheckpointError(
                f"could not save a checkpoint in {self.folder}: {_first_line(error)}; {left}"
            ) from error


def steps(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if path.name.isdigit()), key=_step)


def best(folder: Path) -> Path:
    """The checkpoint with the least loss on validation.

    Raises:
      CheckpointError: None was saved after a validation.
    """
    losses = {}
    for path in steps(folder):
        metrics = path / "metrics" / "metrics"
        if metrics.exists():
            with _reading(path):
                losses[json.loads(metrics.read_text("utf-8"))["loss"]] = path
    if not losses:
        raise CheckpointError(f"no checkpoint in {folder} has a validation loss")
    return losses[min(losses)]


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
        metrics = path / "metrics" / "metrics"
        if metrics.exists():
            json.loads(metrics.read_text("utf-8"))
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
    rest = state._replace(params=None)._asdict()
    with _reading(path):
        rest = ocp.load_checkpointables(path, {"training": rest})["training"]
    return TrainState(**{**rest, "params": params})


def _load_params(path: Path, params: Params) -> Params:
    _compare(path, params)
    with _reading(path):
        return ocp.load_checkpointables(path, {"params": params})["params"]


def _compare(path: Path, params: Params):
    """Raises an error if the parameters have other names or shapes than the checkpoint's."""
    with _reading(path):
        found = _shapes(ocp.checkpointables_metadata(path).metadata["params"])
    wanted = _shapes(params)
    different = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if different:
        name = different[0]
        more = f" ({len(different) - 1} more differ)" if len(different) > 1 else ""
        raise OtherModelError(
            f"checkpoint {path} is another model's: {name} is {found.get(name, 'absent')} there "
            f"and {wanted.get(name, 'absent')} here{more}"
        )


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
    return path.rename(folder / f"{path.name}-{taken}")


def _step(path: Path) -> int:
    return int(path.name)


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]

"""Opens what training left behind: a run's settings, tokenizer and data, and a model from it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from hope_jax import config, sharding
from hope_jax.config import ConfigError, Experiment
from hope_jax.data import Data, Tokenizer, load_tokenizer
from hope_jax.data.packing import Stream
from hope_jax.evaluation.score import whole_rows
from hope_jax.evaluation.subject import Subject, TaskError
from hope_jax.models.decoder import Decoder
from hope_jax.training.checkpoint import best, read_about, restore_params, steps
from hope_jax.training.step import abstract_params, outline

Which = Literal["latest", "best"] | int


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which checkpoint of a run is meant.

    Attributes:
      checkpoint: "latest" is the newest that is complete, "best" that of the least loss on
        validation, a number that after so many steps.
    """

    checkpoint: Which = "latest"


class Run(NamedTuple):
    """A run folder.

    Attributes:
      folder: Where it lies.
      experiment: What was trained.
      tokenizer: What its ids mean.
      checkpoint: One of its checkpoints if that was named, else None.
    """

    folder: Path
    experiment: Experiment
    tokenizer: Tokenizer
    checkpoint: Path | None = None


def find(path: Path) -> Run:
    """Reads what a run says of itself.

    Args:
      path: A run folder, or a checkpoint in it.

    Raises:
      ConfigError: It is neither, or the run is damaged.
    """
    is_checkpoint = path.name.isdigit() and path.parent.name == "checkpoints"
    folder = path.parent.parent if is_checkpoint else path
    if not path.exists() or not (folder / "config.yaml").is_file():
        raise ConfigError(f"{path} is neither a run folder nor a checkpoint in one")
    try:
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    experiment = config.load(folder / "config.yaml")
    if tokenizer.vocabulary != experiment.data.tokenizer.vocabulary:
        raise ConfigError(
            f"{folder} must have a tokenizer of {experiment.data.tokenizer.vocabulary} ids, "
            f"got one of {tokenizer.vocabulary}"
        )
    return Run(folder, experiment, tokenizer, path if is_checkpoint else None)


def lay_out(
    experiment: Experiment,
    devices: Sequence[jax.Device] | None = None,
    *,
    memory: int | None = None,
) -> tuple[Mesh, str | None]:
    """Builds the mesh of an experiment.

    Args:
      experiment: Its `mesh` may be "auto".
      devices: All of them by default.
      memory: Bytes of a device; None asks the device.

    Returns:
      The mesh, and why it was chosen if it was.

    Raises:
      ValueError: The devices cannot be laid out so.
    """
    devices = jax.devices() if devices is None else devices
    if isinstance(experiment.mesh, sharding.MeshConfig):
        mesh = experiment.mesh.build(devices)
        _check_parts(experiment, mesh)
        return mesh, None
    if memory is None:
        memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    chosen, reason = sharding.automatic(
        len(devices),
        parameters=experiment.model.parameters(),
        batch=experiment.data.batch // experiment.training.accumulate,
        window=experiment.data.window,
        heads=experiment.model.mixer.heads,
        memory=memory,
    )
    return chosen.build(devices), reason


def _check_parts(experiment: Experiment, mesh: Mesh):
    parts, share = experiment.training.accumulate, sharding.pieces("batch", mesh)
    rows = experiment.data.batch // parts
    if parts > 1 and rows % share:
        raise ValueError(
            f"{share} devices (data x fsdp) must divide the {rows} rows of each of "
            f"training.accumulate={parts} parts of data.batch={experiment.data.batch}"
        )


def mesh(experiment: Experiment) -> Mesh:
    """The mesh that a run was trained on; where it does not fit the devices, all share it all."""
    try:
        return lay_out(experiment)[0]
    except ValueError:
        return sharding.MeshConfig(data=1, fsdp=-1).build()


def load(run: Run, which: Which = "latest") -> tuple[Decoder, Path]:
    """Loads a model; call it with a mesh in use.

    Args:
      run: From `find`.
      which: See `Choice`, where `run` names none.

    Returns:
      The model, and the checkpoint that it is from. A newest one that is damaged is passed over
      with a warning.

    Raises:
      CheckpointError: No checkpoint can be read.
      ConfigError: There is no such checkpoint, or it was trained with another tokenizer.
      OtherModelError: The checkpoint is not of the model that the settings say.
    """
    model = outline(partial(run.experiment.model.build, seed=run.experiment.seed))
    params, checkpoint = restore_params(_choose(run, which), abstract_params(model))
    known = read_about(checkpoint)["data"]["tokenizer"]
    if known != run.tokenizer.fingerprint:
        raise ConfigError(f"{checkpoint} was trained with another tokenizer than {run.folder} has")
    return nnx.merge(model.graphdef, params), checkpoint


def subject(run: Run, model: Decoder) -> Subject:
    """Joins a model with its run; the data is read when a task first asks for it."""
    settings = run.experiment.data

    @cache
    def data() -> Data:
        rows = replace(settings, batch=whole_rows(settings.batch))
        return rows.build(tokenizer=run.tokenizer)

    def stream(split: str) -> Stream:
        try:
            return data().documents(split)
        except (ImportError, OSError, ValueError) as error:
            raise TaskError(str(error)) from error

    return Subject(
        model=model,
        tokenizer=run.tokenizer,
        stream=stream,
        window=settings.window,
        isolate=settings.isolate_documents,
        folder=run.folder / "eval",
    )


def _choose(run: Run, which: Which) -> Path:
    """The folder to restore from."""
    checkpoints = run.folder / "checkpoints"
    if run.checkpoint is not None:
        if which != "latest":
            raise ConfigError(f"checkpoint={which} must not be given with {run.checkpoint}")
        return run.checkpoint
    if which == "latest":
        return run.folder
    if which == "best":
        return best(checkpoints)
    there = [path.name for path in steps(checkpoints)]
    if str(which) not in there:
        raise ConfigError(f"checkpoint={which} is no choice; choices: {', '.join(there)}")
    return checkpoints / str(which)

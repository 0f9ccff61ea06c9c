"""Brings published models into run folders, and runs out as published models."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from flax import nnx
from tqdm import tqdm

from hope_jax import config, runs, sharding
from hope_jax.config import ConfigError, Experiment
from hope_jax.data import DataConfig
from hope_jax.data.tokenizer import SentencePiece, SentencePieceConfig
from hope_jax.models import pretrained
from hope_jax.models.decoder import Decoder
from hope_jax.models.pretrained import Dtype, Stacking
from hope_jax.training import TrainingConfig
from hope_jax.training.checkpoint import CheckpointError, OtherModelError, give, steps

PIECES = "tokenizer.model"
"""The file of a published SentencePiece tokenizer."""

WINDOW = 2048
"""Tokens that an imported run trains on and is evaluated with at once, if it is not said."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """What is published of a run.

    Attributes:
      checkpoint: See `runs.Choice`.
      dtype: What numbers are stored in; None for what the model computes in.
    """

    checkpoint: runs.Which = "latest"
    dtype: Dtype | None = None


def bring_in(source: Path, folder: Path, overrides: Sequence[str]) -> Experiment:
    """Makes a run of a published Llama, which can be evaluated, and trained from there.

    Args:
      source: The published folder: config.json, safetensors, tokenizer.model.
      folder: The run's.
      overrides: `levels` and `split` of `Stacking`, and any settings of the run.

    Returns:
      The run's settings.

    Raises:
      ConfigError: A file is missing, damaged or of another model, a setting is wrong, or the folder
        holds a run.
    """
    if steps(folder / "checkpoints"):
        raise ConfigError(f"{folder} must not hold a run, got one with checkpoints")
    names = tuple(f"{name}=" for name in asdict(Stacking()))
    stacking = config.arguments(Stacking, [x for x in overrides if x.startswith(names)])
    rest = [override for override in overrides if not override.startswith(names)]
    with config.blame(str(source)):
        model = pretrained.describe(source, stacking)
        tokenizer = _tokenizer(source / PIECES)
        experiment = Experiment(
            model=model,
            data=DataConfig(
                tokenizer=SentencePieceConfig(
                    vocabulary=tokenizer.vocabulary, model=str(folder / PIECES)
                ),
                window=min(model.mixer.window, WINDOW),  # pyrefly: ignore[missing-attribute]
            ),
            training=TrainingConfig(folder=str(folder.parent)),
            name=folder.name,
        )
    experiment = config.change(experiment, rest)
    if experiment.folder != folder:
        raise ConfigError(f"name and training.folder must be those of {folder}")
    with sharding.use(sharding.MeshConfig(data=1, fsdp=-1).build()):
        with config.blame(str(source)):
            decoder = pretrained.load(
                source, experiment.model, stacking.split, seed=experiment.seed, track=_track("read")
            )
        tokenizer.save(folder)
        config.dump(experiment, folder / "config.yaml")
        _give(experiment, decoder, tokenizer)
    return experiment


def bring_out(path: Path, folder: Path, overrides: Sequence[str]) -> Path:
    """Publishes a run as a Llama, with its tokenizer if that is of SentencePiece.

    Args:
      path: A run folder, or a checkpoint in it.
      folder: Where it goes.
      overrides: Of `Release`.

    Returns:
      The checkpoint that was published.

    Raises:
      ConfigError: There is no such run, it is no Llama, or the folder is not empty.
    """
    release = config.arguments(Release, overrides)
    run = runs.find(path)
    with sharding.use(runs.mesh(run.experiment)):
        try:
            model, checkpoint = runs.load(run, release.checkpoint)
        except (CheckpointError, OtherModelError) as error:
            raise ConfigError(str(error)) from error
        with config.blame(str(path)):
            dtype = release.dtype or run.experiment.model.dtype
            pretrained.save(
                model, folder, dtype=dtype, bos=run.tokenizer.bos, track=_track("write")
            )
    if (run.folder / PIECES).is_file():
        (folder / PIECES).write_bytes((run.folder / PIECES).read_bytes())
    return checkpoint


def _tokenizer(path: Path) -> SentencePiece:
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path.name}: a run needs a SentencePiece tokenizer, other kinds (a "
            "tokenizer.json alone) cannot be read"
        )
    return SentencePiece(path.read_bytes(), name=path.name)


def _give(experiment: Experiment, model: Decoder, tokenizer: SentencePiece):
    about = {"data": {"tokenizer": tokenizer.fingerprint}, "config": asdict(experiment)}
    params = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
    try:
        give(experiment.folder / "checkpoints", params, about)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error


def _track(what: str) -> partial[Iterable]:
    return partial(tqdm, desc=what, leave=False, delay=1, disable=None)

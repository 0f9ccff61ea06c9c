"""Brings published models into run folders, and runs out as published models."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from flax import nnx
from tqdm import tqdm

from hope_jax import config, runs, sharding
from hope_jax.config import ConfigError, Experiment
from hope_jax.data import DataConfig, Tokenizer
from hope_jax.data.tokenizer import (
    BytePairs,
    BytePairsConfig,
    SentencePiece,
    SentencePieceConfig,
    TokenizerConfig,
)
from hope_jax.models import pretrained
from hope_jax.models.decoder import Decoder
from hope_jax.models.pretrained import Dtype, Stacking
from hope_jax.training import TrainingConfig
from hope_jax.training.checkpoint import CheckpointError, OtherModelError, give, steps

TOKENIZERS = {"tokenizer.model": "tokenizer.model", "byte_pairs.json": "tokenizer.json"}
"""The tokenizer's file in a run, and its name in a published folder."""

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
      source: The published folder: config.json, safetensors, and tokenizer.model (SentencePiece) or
        tokenizer.json (byte pairs).
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
        chosen, tokenizer = _tokenizer(source, folder)
        experiment = Experiment(
            model=model,
            data=DataConfig(
                tokenizer=chosen,
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
    """Publishes a run as a Llama, with its tokenizer if others know its kind.

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
    for ours, theirs in TOKENIZERS.items():
        if (run.folder / ours).is_file():
            (folder / theirs).write_bytes((run.folder / ours).read_bytes())
    return checkpoint


def _tokenizer(source: Path, folder: Path) -> tuple[TokenizerConfig, Tokenizer]:
    """Reads a published tokenizer; its file will lie in `folder`."""
    pieces, pairs = source / "tokenizer.model", source / "tokenizer.json"
    if pieces.is_file():
        tokenizer = SentencePiece(pieces.read_bytes(), name=pieces.name)
        file = str(folder / "tokenizer.model")
        return SentencePieceConfig(vocabulary=tokenizer.vocabulary, model=file), tokenizer
    if not pairs.is_file():
        raise FileNotFoundError("there is neither a tokenizer.model nor a tokenizer.json")
    settings = json.loads((source / "config.json").read_text("utf-8"))
    bos = settings.get("bos_token_id")
    tokenizer = BytePairs(pairs.read_bytes(), bos=-1 if bos is None else bos, name=pairs.name)
    file = str(folder / "byte_pairs.json")
    return BytePairsConfig(file=file, vocabulary=tokenizer.vocabulary, bos=tokenizer.bos), tokenizer


def _give(experiment: Experiment, model: Decoder, tokenizer: Tokenizer):
    about = {"data": {"tokenizer": tokenizer.fingerprint}, "config": asdict(experiment)}
    params = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
    try:
        give(experiment.folder / "checkpoints", params, about)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error


def _track(what: str) -> partial[Iterable]:
    return partial(tqdm, desc=what, leave=False, delay=1, disable=None)

"""Trains what a config describes: python train.py CONFIG [dotted.key=value ...]."""

import argparse
import sys
from functools import partial

import jax

from hope_jax import config, doctor, processes, runs, sharding
from hope_jax.data import load_tokenizer
from hope_jax.evaluation import Sample
from hope_jax.evaluation.subject import TaskError
from hope_jax.optimizers import describe
from hope_jax.training import RunError, loop, together
from hope_jax.training.checkpoint import CheckpointError, OtherModelError, steps
from hope_jax.training.step import outline

ERRORS = config.ConfigError, CheckpointError, OtherModelError, RunError, TaskError


def main(path: str, *overrides: str):
    """Begins a run, or goes on with it where its folder has a checkpoint."""
    experiment = config.load(path, overrides)
    folder, training = experiment.folder, experiment.training
    if together.is_first():
        config.claim(experiment)
    with config.blame("mesh"):
        mesh, why = runs.lay_out(experiment)
    if why and together.is_first():
        print(why, file=sys.stderr)
    with sharding.use(mesh):
        with config.blame("data"):
            known = load_tokenizer(folder) if steps(folder / "checkpoints") else None
            data = experiment.data.build(tokenizer=known)
        if known is None and together.is_first():
            data.tokenizer.save(folder)
        model = outline(partial(experiment.model.build, seed=experiment.seed))
        optimizer = experiment.optimizer.build(training.steps, describe(model.variables))
        with config.blame("training"):
            writer = Sample(prompt=training.prompt, max_tokens=max(training.sample_tokens, 1))
        writes = training.sample_tokens and jax.process_count() == 1
        sample = partial(writer.text, tokenizer=data.tokenizer) if writes else None
        about = doctor.versions()
        summary = loop.run(experiment, model, optimizer, data, sample=sample, about=about)
    state = "finished" if summary["finished"] else "stopped, the same command goes on"
    if together.is_first():
        print(f"{state} after step {summary['steps']}; the run lies in {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Settings and their defaults: python -m hope_jax settings"
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, see configs/")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings to change")
    parser.add_argument("--distributed", metavar="auto|HOST:PORT,COUNT,INDEX", help=processes.HELP)
    given = parser.parse_args()
    try:
        with config.blame("--distributed"):
            processes.join(given.distributed)
        main(given.config, *given.overrides)
    except ERRORS as error:
        processes.fail(error, 2 if isinstance(error, config.ConfigError) else 1)

"""Trains configs at several learning rates and seeds at once, and records the best of each.

    python benchmarks/sweep.py NAME=CONFIG [NAME=CONFIG ...] rates=1e-3,2e-3 seeds=0,1 \
        [every=100] [at_once=6] [out=benchmarks/results/wikitext2.json] [dotted.key=value ...]

Models instead of optimizers, with the machinery of `python -m hope_jax compare`: all rates and
seeds of a config read the same batches in the same order, `at_once` of them in one program (all by
default; models with attention one by one, as cuDNN's masks cannot be mapped); a seed decides where
the parameters start. Each run keeps the parameters of its best validation loss. The rate is chosen
by that loss (mean over seeds), and of the test split the figures of that rate count. Speed is that
of one run alone.
"""

import sys
from functools import cache, partial

import jax
import numpy as np
from tqdm import tqdm

from hope_jax import config, sharding
from hope_jax.comparison.language import LanguageTask
from hope_jax.comparison.replicas import Programs, Replica, speed, train
from hope_jax.records import append, record


def main():
    names, options, overrides = {}, {}, []
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        if value.endswith(".yaml"):
            names[key] = value
        elif key in ("rates", "seeds", "out", "every", "at_once"):
            options[key] = value
        else:
            overrides.append(argument)
    if not names:
        raise SystemExit(__doc__)
    rates = [float(rate) for rate in options.get("rates", "1e-3,2e-3,4e-3").split(",")]
    seeds = [int(seed) for seed in options.get("seeds", "0,1").split(",")]
    every, at_once = int(options.get("every", 100)), int(options.get("at_once", 0))
    records, table = [], []
    for name, path in names.items():
        experiment = config.load(path, overrides)
        alone = experiment.model.mixer.kind == "attention"
        task = LanguageTask(
            config=path,
            overrides=tuple(overrides),
            steps=experiment.training.steps,
            every=every,
            at_once=at_once or (1 if alone else len(rates) * len(seeds)),
        )
        with sharding.use(experiment.mesh.build(jax.devices()[:1])):
            values, notes = sweep(name, task, rates, seeds)
        records += [record(f"{name}/{key}", *value, notes) for key, value in values.items()]
        figures = " ".join(f"{key}={float(value):.5g}" for key, (value, _) in values.items())
        table.append(f"{name}: rate={notes['chosen_rate']:g} {figures} {notes['best_valid_loss']}")
        if "out" in options:
            append(options["out"], records)
    print("\n" + "\n".join(table))


def sweep(name, task, rates, seeds):
    """Trains all runs of a task; returns figures with their units, and notes."""
    problem, optimizer = task.build(), task.experiment.optimizer
    programs = cache(partial(Programs, problem))
    replicas = [Replica(rate, seed) for rate in rates for seed in seeds]
    with tqdm(total=task.steps, desc=name, mininterval=10) as bar:

        def progress(step, shown):
            bar.update(step - bar.n)
            if shown:
                bar.set_postfix_str(shown)

        runs = train(
            problem,
            optimizer,
            replicas,
            steps=task.steps,
            every=task.every,
            programs=programs,
            progress=progress,
        )
    valid = np.array([run["judged"]["loss"] for run in runs]).reshape(len(rates), len(seeds))
    chosen = int(np.argmin(np.nan_to_num(valid, nan=np.inf).mean(1)))
    mine = runs[chosen * len(seeds) : (chosen + 1) * len(seeds)]
    seconds = speed(problem, optimizer, replicas[0], steps=task.steps, programs=programs)
    about = problem.about
    perplexity = np.exp([run["test"]["loss"] for run in mine])
    values = {
        "test_perplexity": (perplexity.mean(), "perplexity per token"),
        "test_perplexity_spread": (
            np.ptp(perplexity),
            "perplexity per token, highest less lowest seed",
        ),
        "parameters": (about["parameters"], "parameters"),
        "tokens_per_second": (
            about["tokens"] / seconds["step_seconds"],
            "tokens/s in training, one replica",
        ),
    }
    notes = {
        "rates": rates,
        "seeds": seeds,
        "chosen_rate": rates[chosen],
        "best_valid_loss": valid.round(4).tolist(),
        "steps": task.steps,
        "tokens_trained": task.steps * about["tokens"],
        "vocabulary": task.experiment.model.vocabulary,
    }
    if "accuracy" in mine[0]["test"]:
        accuracy = np.array([run["test"]["accuracy"] for run in mine])
        values["test_accuracy"] = (accuracy.mean(), "share of answers")
        notes["test_accuracy_by_seed"] = accuracy.round(4).tolist()
    if "test_words" in about:
        nats = np.array([run["test_sums"]["loss"] for run in mine])
        values["test_word_perplexity"] = (
            np.exp(nats / about["test_words"]).mean(),
            "perplexity per word",
        )
    for replica, run in zip(replicas, runs, strict=True):
        curve = [round(loss, 4) for loss in run["valid"]["loss"]]
        print(f"{name} rate={replica.rate:g} seed={replica.seed} valid loss by evaluation: {curve}")
    return values, notes


if __name__ == "__main__":
    main()

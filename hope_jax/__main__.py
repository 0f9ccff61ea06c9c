"""The command line: python -m hope_jax COMMAND ...; --help lists the commands."""

import argparse
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPTS = {
    "train": "train what a config describes, or go on with it: CONFIG [key=value ...]",
    "eval": "ask a trained run: RUN TASK [key=value ...]; eval --help lists tasks",
}
"""Commands that are files beside the package."""


def main(arguments: list[str]) -> int:
    """Runs a command; returns the exit status."""
    if arguments and arguments[0] in SCRIPTS:
        return script(*arguments)
    given = parser().parse_args(arguments)
    if given.run is doctor:
        return doctor(given)  # imports little, as it is asked when something is wrong
    from hope_jax.config import ConfigError

    try:
        return given.run(given)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """What the command line may be."""
    whole = argparse.ArgumentParser(
        prog="python -m hope_jax", description="Nested Learning in JAX."
    )
    commands = whole.add_subparsers(metavar="COMMAND", required=True)
    for name, about in SCRIPTS.items():
        commands.add_parser(name, help=about)
    about = "print devices, versions, kernels, and what is wrong with the set-up"
    commands.add_parser("doctor", help=about, description=about).set_defaults(run=doctor)
    about = "print every setting of a config: its type or choices, and its default"
    known = commands.add_parser("settings", help=about, description=about)
    known.set_defaults(run=settings)
    known.add_argument(
        "of", choices=["train", "compare", "suite", "continual"], nargs="?", default="train"
    )
    about = "print how large the models of configs are, without making them: CONFIG ..."
    sizes = commands.add_parser("sizes", help=about, description=about)
    sizes.set_defaults(run=print_sizes)
    sizes.add_argument("configs", metavar="CONFIG", nargs="+")
    about = "compare optimizers on tasks, and go on where it was: CONFIG [key=value ...]"
    comparison = commands.add_parser("compare", help=about, description=about)
    comparison.set_defaults(run=compare)
    comparison.add_argument("config", metavar="CONFIG", help="a YAML file, see configs/compare_*")
    comparison.add_argument("overrides", metavar="key=value", nargs="*", help="settings to change")
    about = "train models on made-up tasks, and go on where it was: CONFIG [key=value ...]"
    suites = commands.add_parser("suite", help=about, description=about)
    suites.set_defaults(run=suite)
    suites.add_argument("config", metavar="CONFIG", help="a YAML file, see configs/suite_*")
    suites.add_argument("overrides", metavar="key=value", nargs="*", help="settings to change")
    about = "learn classes group by group, and tell what is forgotten: CONFIG [key=value ...]"
    classes = commands.add_parser("continual", help=about, description=about)
    classes.set_defaults(run=continual)
    classes.add_argument("config", metavar="CONFIG", help="a YAML file, see configs/continual_*")
    classes.add_argument("overrides", metavar="key=value", nargs="*", help="settings to change")
    add_exchange(commands)
    about = "learn the tokenizer of a config, or find it: CONFIG FOLDER [key=value ...]"
    tokenizer = commands.add_parser("tokenizer", help=about, description=about)
    tokenizer.set_defaults(run=make_tokenizer)
    tokenizer.add_argument("config", metavar="CONFIG", help="a YAML file, see configs/")
    tokenizer.add_argument("folder", metavar="FOLDER", help="where the tokenizer goes")
    tokenizer.add_argument("overrides", metavar="key=value", nargs="*", help="settings to change")
    about = "compile the steps of a config for TPUs that are not there, and say what they cost"
    steps = commands.add_parser("compile", help=about, description=about)
    steps.set_defaults(run=compile_steps)
    steps.add_argument("config", metavar="CONFIG", help="a YAML file, see configs/")
    steps.add_argument(
        "overrides",
        metavar="key=value",
        nargs="+",
        help="topology=v5e:16x16 (also v4, v5p, v6e), only=train|eval, and settings to change",
    )
    return whole


def add_exchange(commands: Any):
    """Adds the commands that read and write published models."""
    about = "make a run of a published Llama: LLAMA RUN [levels=N split=copies|depth|units ...]"
    bring = commands.add_parser("import", help=about, description=about)
    bring.set_defaults(run=import_llama)
    bring.add_argument("llama", metavar="LLAMA", help="a folder as it was published")
    bring.add_argument("folder", metavar="RUN", help="the run folder to make")
    changes = "levels=, split= and settings of the run to change"
    bring.add_argument("overrides", metavar="key=value", nargs="*", help=changes)
    about = "publish a run as a Llama: RUN FOLDER [checkpoint=latest|best|STEP dtype=DTYPE]"
    export = commands.add_parser("export", help=about, description=about)
    export.set_defaults(run=export_llama)
    export.add_argument("source", metavar="RUN", help="a run folder, or a checkpoint in it")
    export.add_argument("folder", metavar="FOLDER", help="where it goes")
    export.add_argument("overrides", metavar="key=value", nargs="*", help="what is published")


def script(name: str, *arguments: str) -> int:
    """Runs a file of the checkout as if it had been called itself."""
    path = Path(__file__).parents[1] / f"{name}.py"
    if not path.exists():
        print(f"error: {path} is missing: call it from a checkout of hope_jax", file=sys.stderr)
        return 2
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")
    return 0


def doctor(_: argparse.Namespace) -> int:
    """Prints what there is; returns 1 if something is wrong."""
    from hope_jax.doctor import examine

    there, wrong = examine()
    print("\n".join(there))
    print("\n".join(f"wrong: {line}" for line in wrong) or "nothing is wrong with the set-up")
    return 1 if wrong else 0


def settings(given: argparse.Namespace) -> int:
    """Prints all settings."""
    from hope_jax import config
    from hope_jax.comparison.compare import Comparison
    from hope_jax.suites.classes import Continual
    from hope_jax.suites.suite import Suite

    every = {"train": config.Experiment, "compare": Comparison, "suite": Suite}
    print("\n".join(config.settings({**every, "continual": Continual}[given.of])))
    return 0


def print_sizes(given: argparse.Namespace) -> int:
    """Prints a line for each config."""
    from hope_jax import config

    print(f"{'config':32} {'parameters':>15} {'FLOPs a token':>15} {'window':>8}")
    for path in given.configs:
        experiment = config.load(path)
        model, window = experiment.model, experiment.data.window
        flops = model.flops_per_token(window)
        print(f"{path:32} {model.parameters():15,} {flops:15,.0f} {window:8,}")
    return 0


def compare(given: argparse.Namespace) -> int:
    """Compares optimizers."""
    from hope_jax.comparison.compare import load, run

    return _report(load, run, given)


def suite(given: argparse.Namespace) -> int:
    """Trains models on made-up tasks."""
    from hope_jax.suites.suite import load, run

    return _report(load, run, given)


def continual(given: argparse.Namespace) -> int:
    """Learns classes group by group."""
    from hope_jax.suites.classes import load, run

    return _report(load, run, given)


def _report(load: Callable, run: Callable, given: argparse.Namespace) -> int:
    """Runs what was not run before, and says where the report lies."""
    try:
        folder = run(load(given.config, given.overrides))
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on", file=sys.stderr)
        return 130
    print(f"report: {folder / 'report.html'}")
    return 0


def make_tokenizer(given: argparse.Namespace) -> int:
    """Writes the tokenizer into a folder."""
    from hope_jax import config

    experiment = config.load(given.config, given.overrides)
    with config.blame("data"):
        tokenizer = experiment.data.build_tokenizer()
        tokenizer.save(given.folder)
    print(f"{tokenizer.vocabulary} ids ({tokenizer.fingerprint}), written to {given.folder}")
    return 0


def compile_steps(given: argparse.Namespace) -> int:
    """Compiles ahead of time; returns 1 if something does not fit."""
    from hope_jax import compile_steps as command

    return 0 if command.run(given.config, given.overrides) else 1


def import_llama(given: argparse.Namespace) -> int:
    """Makes a run folder."""
    from hope_jax.exchange import bring_in

    model = bring_in(Path(given.llama), Path(given.folder), given.overrides).model
    print(f"{model.parameters():,} parameters, levels: {len(model.continuum.levels)}")
    print(f"evaluate: eval.py {given.folder} ...; train: train.py {given.folder}/config.yaml ...")
    return 0


def export_llama(given: argparse.Namespace) -> int:
    """Writes a published model."""
    from hope_jax.exchange import bring_out

    checkpoint = bring_out(Path(given.source), Path(given.folder), given.overrides)
    print(f"{checkpoint} is published in {given.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

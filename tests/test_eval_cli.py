"""eval.py asks a trained run, writes down what it found, and says in one line what is wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hope_jax import config, runs, sharding
from hope_jax.data import DataConfig
from hope_jax.data.sources import TextConfig
from hope_jax.data.tokenizer import SymbolsConfig
from hope_jax.evaluation import Perplexity
from hope_jax.models.decoder import ModelConfig
from hope_jax.modules.attention import AttentionConfig
from hope_jax.modules.continuum import ContinuumConfig, LevelConfig
from hope_jax.training import TrainingConfig, loop

ROOT = Path(__file__).parents[1]
TEXT = "".join(f"{i} times {i} is {i * i}.\n\n" for i in range(200))


sys.path.insert(0, str(ROOT))
import eval as front  # noqa: E402
import train as training  # noqa: E402


def train(folder):
    """A run of four steps with checkpoints after the second and the fourth."""
    corpus = folder / "corpus.txt"
    corpus.write_text(TEXT)
    experiment = config.Experiment(
        model=ModelConfig(
            mixer=AttentionConfig(heads=2, window=32),
            continuum=ContinuumConfig(levels=(LevelConfig(hidden=32, gated=True),)),
            width=16,
            layers=1,
        ),
        data=DataConfig(
            source=TextConfig(train=str(corpus), document="blank_line"),
            window=32,
            batch=8,
            cache=str(folder / "cache"),
        ),
        training=TrainingConfig(
            steps=4, evaluate_every=2, save_every=2, sample_tokens=9, folder=str(folder)
        ),
    )
    config.dump(experiment, folder / "tiny.yaml")
    training.main(str(folder / "tiny.yaml"))
    return experiment.folder, loop.read_summary(experiment.folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def evaluate(*arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, ROOT / "eval.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def results(run):
    return [json.loads(path.read_text()) for path in sorted((run / "eval").glob("*"))]


def test_perplexity_is_what_training_measured(run, trained):
    done = evaluate(run, "perplexity", "split=valid", "batch=3")
    assert done.returncode == 0, done.stderr
    (found,) = results(run)
    numbers = found["results"]
    assert numbers["nats_per_token"] == pytest.approx(trained[1]["valid_loss"], rel=1e-5)
    assert f"{numbers['perplexity']:.4f}" in done.stdout
    assert found["settings"]["batch"] == 3
    assert Path(found["checkpoint"]) == (run / "checkpoints" / "4").absolute()
    assert str(next((run / "eval").glob("perplexity-4-*.json"))) in done.stdout


def test_a_sample_is_printed_and_kept(run):
    done = evaluate(run, "sample", "prompt=7: 12", "max_tokens=5", "checkpoint=2", "temperature=0")
    assert done.returncode == 0, done.stderr
    (found,) = results(run)
    assert found["results"]["texts"][0].startswith("7: 12")
    assert found["results"]["texts"][0] in done.stdout
    assert found["checkpoint"].endswith("/2")


def load(path, *, which="latest"):
    run = runs.find(path)
    with sharding.use(runs.mesh(run.experiment)):
        return runs.load(run, which)[1].name


def test_the_checkpoint_is_the_one_that_is_asked_for(run):
    assert load(run) == "4"
    assert load(run, which=2) == "2"
    assert load(run / "checkpoints" / "2") == "2"
    assert load(run, which="best") == "4"
    about = run / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
    about.write_text(re.sub(r'("loss": *)\d', r"\g<1>0", about.read_text()))
    assert load(run, which="best") == "2"


def test_a_damaged_checkpoint_is_passed_over(run):
    shutil.rmtree(run / "checkpoints" / "4" / "params")
    assert load(run) == "2"


def test_a_file_of_ones_own_needs_no_corpus(run, tmp_path):
    found = runs.find(run)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    shutil.rmtree(Path(found.experiment.data.cache))
    with sharding.use(runs.mesh(found.experiment)):
        model, _ = runs.load(found)
        numbers = Perplexity(file=str(text)).run(runs.subject(found, model))
    assert numbers["bytes"] == len(TEXT)


def spoil_tokenizer(run):
    SymbolsConfig(symbols=9).build().save(run)


def spoil_alike(run):
    SymbolsConfig(symbols=256).build().save(run)


def spoil_model(run):
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("width: 16", "width: 24"))


def spoil_checkpoints(run):
    shutil.rmtree(run / "checkpoints")


def spoil_corpus(run):
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("corpus.txt", "nowhere.txt"))


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (shutil.rmtree, ["perplexity"], "neither a run folder nor a checkpoint"),
        (spoil_checkpoints, ["perplexity"], "neither a run folder nor a checkpoint"),
        (spoil_tokenizer, ["sample"], "must have a tokenizer of 257 ids, got one of 10"),
        (spoil_alike, ["sample"], "trained with another tokenizer"),
        (spoil_model, ["sample"], "is another model's"),
        (spoil_corpus, ["perplexity"], "nowhere.txt"),
        (None, ["perplexty"], "task=perplexty is no choice; did you mean perplexity?"),
        (None, ["perplexity", "splt=test"], "splt=test is no setting; did you mean split?"),
        (None, ["perplexity", "split=tests"], "did you mean test? choices: train, valid, test"),
        (None, ["perplexity", "batch=0"], "batch must be at least 1, got 0"),
        (None, ["perplexity", "batch"], "must have the form"),
        (None, ["perplexity", "file=nowhere.txt"], "'nowhere.txt' cannot be read"),
        (None, ["sample", "prompt="], "prompt must hold at least 1 token, got ''"),
        (None, ["sample", "checkpoint=3"], "checkpoint=3 is no choice; choices: 2, 4"),
        (None, ["sample", "checkpoint=last"], "checkpoint=last is no choice; did you mean"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(run, spoil, arguments, message, capsys):
    if spoil is not None:
        spoil(run)
    before = sorted(run.parent.rglob("*"))
    with pytest.raises(front.ERRORS) as error:
        front.main(str(run), *arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(run.parent.rglob("*")) == before
    assert capsys.readouterr().out == ""


def test_an_error_ends_the_program_with_2(tmp_path):
    done = evaluate(tmp_path / "nowhere", "sample")
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: {tmp_path}/nowhere is neither a run folder nor a checkpoint in one\n"
    )


def test_help_lists_every_task():
    done = evaluate("--help")
    assert "perplexity" in done.stdout
    assert "top_p=1.0" in done.stdout

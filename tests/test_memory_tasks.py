"""The command line reads texts into memories, goes on from them, and draws what they do."""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax import config
from hope_jax.data import DataConfig
from hope_jax.data.sources import TextConfig
from hope_jax.evaluation.memory import likeness
from hope_jax.models.decoder import BlockMemory, ModelConfig
from hope_jax.modules.continuum import ContinuumConfig, LevelConfig
from hope_jax.modules.memory import AssociativeConfig
from hope_jax.ops.continuum import fresh_level
from hope_jax.training import TrainingConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
import eval as front
import train as training

TEXT = "".join(f"{i} times {i} is {i * i}.\n\n" for i in range(60))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run for each objective, of two steps."""
    folder = tmp_path_factory.mktemp("runs")
    corpus = folder / "corpus.txt"
    corpus.write_text(TEXT)
    levels = (
        LevelConfig(hidden=16, chunk=8),
        LevelConfig(hidden=16, chunk=32),
        LevelConfig(hidden=16),
    )
    for objective in ("local", "next_token"):
        experiment = config.Experiment(
            model=ModelConfig(
                mixer=AssociativeConfig(heads=2, chunk=8),
                continuum=ContinuumConfig(levels=levels, objective=objective),
                width=16,
                layers=1,
            ),
            data=DataConfig(
                source=TextConfig(train=str(corpus), document="blank_line"),
                window=32,
                batch=8,
                cache=str(folder / "cache"),
            ),
            training=TrainingConfig(steps=2, sample_tokens=0, folder=str(folder)),
            name=objective,
        )
        config.dump(experiment, folder / f"{objective}.yaml")
        training.main(str(folder / f"{objective}.yaml"))
    return folder


def ask(run, *arguments):
    """Runs eval.py; returns what it found."""
    before = set((run / "eval").glob("*-2-*.json"))
    front.main(str(run), *arguments)
    (written,) = set((run / "eval").glob("*-2-*.json")) - before
    return json.loads(written.read_text())["results"]


@pytest.mark.parametrize("objective", ["local", "next_token"])
def test_what_was_read_is_gone_on_from(runs, objective, tmp_path):
    run, out = runs / objective, tmp_path / "memory.safetensors"
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text(TEXT[:500])
    second.write_text(TEXT[500:700])
    found = ask(run, "read", f"file={first}", f"out={out}")
    assert found["tokens"] == 501
    assert found["level_0"] > 0 < found["level_1"]
    again = tmp_path / "again.safetensors"
    assert ask(run, "read", f"file={second}", f"out={again}", f"memory={out}")["tokens"] == 200
    fresh = ask(run, "perplexity", f"file={second}", "context=stream")
    after = ask(run, "perplexity", f"file={second}", "context=stream", f"memory={out}")
    assert after["tokens"] == fresh["tokens"]
    assert after["nats_per_token"] != fresh["nats_per_token"]
    if objective == "next_token":
        ask(run, "perplexity", f"file={second}", f"memory={out}", "batch=3")
        learned = ask(run, "perplexity", f"file={second}", "context=learn", f"memory={out}")
        assert learned["tokens"] == fresh["tokens"]
        assert learned["nats_per_token"] not in (fresh["nats_per_token"], after["nats_per_token"])
        written = ask(run, "sample", "prompt=7 times", f"memory={out}", "max_tokens=4", "batch=2")
        assert all(text.startswith("7 times") for text in written["texts"])


def test_a_memory_is_refused_in_one_line(runs, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "m.safetensors"
    text.write_text(TEXT[:100])
    ask(runs / "local", "read", f"file={text}", f"out={out}")
    for arguments, message in (
        (["perplexity", f"memory={out}"], "of another model"),
        (["sample", f"memory={out}"], "of another model"),
        (["read", f"file={text}", f"out={out}", f"memory={out}"], "of another model"),
        (["sample", "memory=nowhere"], "'nowhere' cannot be read"),
        (["read", f"file={text}"], "file and out must be given"),
        (["read", f"file={text}", f"out={tmp_path}/no/m"], "must lie in a folder that is there"),
        (["perplexity", "context=learn", f"memory={out}"], "of another model"),
        (["memory", "points=0"], "points must be at least 1, got 0"),
    ):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(front.ERRORS, match=message) as error:
            front.main(str(runs / "next_token"), *arguments)
        assert "\n" not in str(error.value)
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("objective", ["local", "next_token"])
def test_memories_are_drawn(runs, objective):
    run = runs / objective
    found = ask(run, "memory", "split=train", "tokens=100", "points=10")
    assert found["level_0_writes"] == 12
    assert found["level_1_writes"] == 3
    assert found["level_0_skipped"] == found["level_0_gated"] == 0
    page = Path(found["page"]).read_text()
    assert page.count("data:image/png;base64,") == 3
    lines = json.loads((run / "eval" / "memory-lengths.json").read_text())
    assert lines["places"] == list(range(10, 101, 10))
    np.testing.assert_array_equal(np.array(lines["level 1"][:3]) > 0, False)
    assert all(np.array(lines["level 1"][3:]) > 0)


def test_likeness_is_one_with_itself_and_zero_without_common_features():
    def level(rows):
        memory = fresh_level(
            (jnp.zeros((1, 3, 4)),), 3, 1, jnp.dtype("float32"), momentum=False, outer=False
        )
        memory = memory._replace(fast=memory.fast._replace(delta=(rows[None, None, None],)))
        return memory._replace(position=memory.position[None])

    first, second = np.zeros((3, 4)), np.zeros((3, 4))
    first[:, 0], second[:, 1:] = 1.0, 2.0
    grid = likeness(BlockMemory(None, (level(first), None, level(second))))["likeness"]
    np.testing.assert_allclose(grid, np.eye(2), atol=1e-6)

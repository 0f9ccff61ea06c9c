"""A run that is stopped, in whatever way, goes on as if it had not been."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from toy_run import ToyData, ToyExperiment, compiled_once, optimizer, toy_outline, train

from hope_jax import sharding
from hope_jax.sharding import MeshConfig
from hope_jax.training import RunError, TrainingConfig, checkpoint, metrics, step

TOY = Path(__file__).with_name("toy_run.py")


@pytest.fixture(autouse=True, scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "compiled"
    with compiled_once(folder):
        yield folder


def state_of(run: Path) -> dict:
    """Everything in the newest checkpoint of a run."""
    experiment = ToyExperiment(training=TrainingConfig())
    with sharding.use(MeshConfig().build(jax.devices()[:1])):
        abstract = step.abstract_state(toy_outline(experiment), optimizer())
        state = checkpoint.Checkpoints(run / "checkpoints", keep=9).restore(abstract).state
    return jax.device_get(state._replace(key=jax.random.key_data(state.key)))


def assert_same_run(one: Path, other: Path):
    """Parameters, optimizer, counters, keys and metrics are equal bit for bit."""
    one_state, other_state = state_of(one), state_of(other)
    assert jax.tree.structure(one_state) == jax.tree.structure(other_state)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one_state), jax.tree.leaves(other_state), strict=True
    ):
        np.testing.assert_array_equal(a, b, jax.tree_util.keystr(path))
    lines = [
        [{k: v for k, v in line.items() if k not in metrics.TIMINGS} for line in lines]
        for lines in (metrics.read(one / "metrics.jsonl"), metrics.read(other / "metrics.jsonl"))
    ]
    assert lines[0] == lines[1]


class Interrupted(ToyData):
    """Sends a signal to this process when the batch of a step is read."""

    def __init__(self, step: int, number: int, **options):
        super().__init__(**options)
        self.step, self.number = step, number

    def train(self, start_step):
        for at, batch in enumerate(super().train(start_step), start_step):
            if at == self.step:
                signal.raise_signal(self.number)
            yield batch


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [3, 9])
def test_a_signal_saves_and_the_next_start_goes_on_bit_for_bit(tmp_path, number, at):
    spoiled = (2, 8)
    whole = ToyData(spoiled=spoiled)
    train(tmp_path, name="whole", data=whole)

    first, second = Interrupted(at, number, spoiled=spoiled), ToyData(spoiled=spoiled)
    stopped = train(tmp_path, name="parts", data=first)
    resumed = train(tmp_path, name="parts", data=second)

    assert not stopped["finished"]
    assert stopped["steps"] == at
    assert resumed["finished"]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert second.read[0] == at, "no batch is read twice, none is left out"
    assert second.read[-1] == whole.read[-1]


def test_what_was_written_after_the_last_checkpoint_is_taken_back(tmp_path):
    train(tmp_path, name="whole")

    class Fails(ToyData):
        def train(self, start_step):
            yield from itertools.islice(super().train(start_step), 7)
            raise OSError("the disk is gone")

    with pytest.raises(RunError, match=r"parts stopped: the disk is gone; .*/4$"):
        train(tmp_path, name="parts", data=Fails())
    written = metrics.read(tmp_path / "parts" / "metrics.jsonl")
    assert written[-1]["step"] > 4, "there is something to take back"
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "spl')  # as a crash may leave it
    train(tmp_path, name="parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def start(folder: Path, compiled: Path, *, steps: int) -> subprocess.Popen:
    """Trains the toy in another process, with a checkpoint after every step."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": str(TOY.parents[1]),
    }
    command = [sys.executable, str(TOY), str(folder), str(steps), "1"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen, file: Path, lines: int):
    """Waits until a process has written so many lines, or ended."""
    deadline = time.monotonic() + 120
    while len(metrics.read(file)) < lines and process.poll() is None:
        assert time.monotonic() < deadline, "the process writes nothing"
        time.sleep(0.002)


def test_a_run_that_is_killed_three_times_ends_as_one_that_is_not(tmp_path, compiled):
    steps, kills = 60, 3
    reference = start(tmp_path / "whole", compiled, steps=steps)
    chance = random.Random(0)
    file = tmp_path / "parts" / "toy" / "metrics.jsonl"
    for kill in range(kills):
        process = start(tmp_path / "parts", compiled, steps=steps)
        wait_for(process, file, 10 + 15 * kill)
        time.sleep(chance.uniform(0, 0.1))  # a save takes about that long, and is always going on
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    last = start(tmp_path / "parts", compiled, steps=steps)
    for process in (reference, last):
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert "goes on after step" in said
    assert not (tmp_path / "parts" / "toy" / "broken").exists(), "a kill damages no checkpoint"
    assert_same_run(tmp_path / "whole" / "toy", tmp_path / "parts" / "toy")


def test_a_process_that_is_terminated_exits_with_success(tmp_path, compiled):
    process = start(tmp_path, compiled, steps=100_000)
    wait_for(process, tmp_path / "toy" / "metrics.jsonl", 3)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    lines = metrics.read(tmp_path / "toy" / "metrics.jsonl")
    saved = checkpoint.steps(tmp_path / "toy" / "checkpoints")[-1]
    assert int(saved.name) == max(line["step"] for line in lines)

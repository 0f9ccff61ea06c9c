"""Several processes train one model as one process does, end together, and go on together."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_cli import SMALL
from test_cli import train as train_alone
from test_resume import assert_same_run
from toy_run import compiled_once, train

from hope_jax import processes
from hope_jax.sharding import MeshConfig
from hope_jax.training import checkpoint, metrics

ROOT = Path(__file__).parents[1]
TOY = Path(__file__).with_name("toy_run.py")


@pytest.fixture(autouse=True, scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "compiled"
    with compiled_once(folder):
        yield folder


@pytest.fixture
def start(compiled):
    """Starts a command in several processes of one device each; ends them after the test."""
    started = []

    def begin(count: int, *command: object) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "PYTHONPATH": str(ROOT),
        }
        for index in range(count):
            words = [sys.executable, *map(str, command), f"{address},{count},{index}"]
            started.append(
                subprocess.Popen(
                    words, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT
                )
            )
        return started[-count:]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def end(group: list[subprocess.Popen], seconds: float = 120) -> list[str]:
    """Waits until all have ended well; returns what they said."""
    said = [process.communicate(timeout=seconds)[1] for process in group]
    assert [process.returncode for process in group] == [0] * len(group), "\n".join(said)
    return said


def wait_for(step: int, file: Path, group: list[subprocess.Popen]):
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in metrics.read(file)):
        assert all(process.poll() is None for process in group), group[0].stderr.read()
        assert time.monotonic() < deadline, "the processes write nothing"
        time.sleep(0.01)


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in metrics.read(run / "metrics.jsonl")]


def test_four_processes_that_read_a_share_each_train_as_one(tmp_path, start):
    (tmp_path / "corpus.txt").write_text(
        "".join(f"{i} times {i} is {i * i}.\n\n" for i in range(300))
    )
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.format(folder=tmp_path))
    settings = ["training.steps=20", "training.evaluate_every=10", "training.save_every=0"]
    mesh = "mesh={data: 2, fsdp: 2}"
    group = start(4, "train.py", path, "name=four", mesh, *settings, "--distributed")
    train_alone(path, "name=one", "mesh={data: 1, fsdp: -1}", *settings, "training.sample_tokens=0")
    said = end(group)

    one, four = (losses_of(tmp_path / "runs" / name) for name in ("one", "four"))
    np.testing.assert_allclose(four, one, rtol=1e-5)
    assert len(four) == 22, "one process writes, and all lines are there"
    assert "step 20" in said[0]
    assert not any("step 20" in other for other in said[1:])

    # Their checkpoint is one like any other: eight devices of one process go on from it.
    longer = ["training.steps=22", "training.sample_tokens=0", "mesh={data: 1, fsdp: -1}"]
    train_alone(path, "name=four", *settings, *longer)
    train_alone(path, "name=one", *settings, *longer)
    one, four = (losses_of(tmp_path / "runs" / name) for name in ("one", "four"))
    np.testing.assert_allclose(four[-3:], one[-3:], rtol=1e-5)


def test_a_lost_process_ends_the_other_and_together_they_go_on_bit_for_bit(tmp_path, start):
    file = tmp_path / "parts" / "toy" / "metrics.jsonl"
    toy = TOY, tmp_path / "parts", 400, 4

    group = start(2, *toy)
    wait_for(10, file, group)
    group[1].kill()
    killed = time.monotonic()
    said = group[0].communicate(timeout=60)[1]
    assert time.monotonic() - killed < 60
    assert group[0].returncode not in (0, None)
    assert "another process is lost" in said or "distributed service" in said, said

    group = start(2, *toy)
    wait_for(int(checkpoint.steps(tmp_path / "parts/toy/checkpoints")[-1].name) + 10, file, group)
    group[1].send_signal(signal.SIGTERM)  # as a machine that is about to be taken away
    end(group)
    saved = checkpoint.steps(tmp_path / "parts/toy/checkpoints")[-1]
    assert int(saved.name) == max(line["step"] for line in metrics.read(file)) < 400

    # One process with two devices adds the same two numbers.
    train(tmp_path / "whole", steps=int(saved.name) + 5, devices=2, save_every=0)
    toy = TOY, tmp_path / "parts", int(saved.name) + 5, 0
    assert "goes on after step" in end(start(2, *toy))[0]
    assert_same_run(tmp_path / "whole" / "toy", tmp_path / "parts" / "toy")


def test_two_processes_go_on_from_what_eight_devices_of_one_wrote(tmp_path, start):
    train(tmp_path / "one", steps=4, devices=8, mesh=MeshConfig(data=2, fsdp=4))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    group = start(2, TOY, tmp_path / "two", 6, 0)
    train(tmp_path / "one", steps=6, devices=2, save_every=0)
    end(group)
    assert_same_run(tmp_path / "one" / "toy", tmp_path / "two" / "toy")


@pytest.mark.parametrize("how", ["soon", "host,2,0", "host:1,2", "host:1,2,2"])
def test_a_wrong_way_to_meet_is_told(how):
    with pytest.raises(ValueError, match=r"HOST:PORT,COUNT,INDEX|below COUNT=2"):
        processes.join(how)

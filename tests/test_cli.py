"""The front doors: what a user types, and what comes back."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from toy_run import compiled_once

from hope_jax import __main__ as command_line
from hope_jax import config, doctor, runs, sharding
from hope_jax.data import load_tokenizer
from hope_jax.training import checkpoint, metrics

ROOT = Path(__file__).parents[1]

SMALL = """
model:
  mixer: {{kind: attention, heads: 2, window: 32}}
  continuum: {{levels: [{{hidden: 32, gated: true}}]}}
  width: 16
  layers: 1
data:
  source: {{kind: text, train: {folder}/corpus.txt, document: blank_line}}
  window: 16
  batch: 8
  cache: {folder}/cache
training:
  steps: 6
  evaluate_every: 3
  save_every: 2
  log_every: 1
  sample_tokens: 5
  folder: {folder}/runs
"""


@pytest.fixture(autouse=True, scope="module")
def _compiled_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture
def small(tmp_path):
    """A config file beside its corpus."""
    (tmp_path / "corpus.txt").write_text(
        "".join(f"{i} times {i} is {i * i}.\n\n" for i in range(300))
    )
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.format(folder=tmp_path))
    return path


def type_in(*words: object) -> subprocess.CompletedProcess:
    """Calls Python as a user would, in the repository."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


def train(*words: object):
    """Calls train.py in this process."""
    runpy.run_path(str(ROOT / "train.py"))["main"](*map(str, words))


def test_training_from_the_command_line_leaves_a_whole_run_folder(small, capfd):
    given = type_in("train.py", small, "training.steps=4", "seed=3")
    assert given.returncode == 0, given.stderr
    run = small.parent / "runs" / "small"
    assert given.stdout.splitlines()[-1] == f"finished after step 4; the run lies in {run}"
    assert "step 4  sample: " in given.stderr
    experiment = config.load(run / "config.yaml")
    assert (experiment.training.steps, experiment.seed, experiment.model.vocabulary) == (4, 3, 257)
    assert load_tokenizer(run).vocabulary == 257
    assert [path.name for path in checkpoint.steps(run / "checkpoints")] == ["2", "4"]
    summary = json.loads((run / "summary.json").read_text())
    wanted = "parameters tokens train_loss valid_loss tokens_per_second mfu device versions commit"
    assert set(wanted.split()) <= set(summary)
    assert summary["parameters"] == experiment.model.parameters()
    assert {"loss.png", "metrics.jsonl", "tokenizer.json"} <= {path.name for path in run.iterdir()}

    train(small, "training.steps=6", "seed=3")
    assert "goes on after step 4" in capfd.readouterr().err
    assert metrics.read(run / "metrics.jsonl")[-1]["step"] == 6


def test_hope_in_two_parts_is_hope_in_one_bit_for_bit(small):
    hope = [
        "model.mixer={kind: self_modifying_titans, heads: 2, chunk_memory: 4}",
        "data.tokenizer={kind: sentencepiece, vocabulary: 280}",
        "optimizer.schedule={kind: constant, warmup: 0}",
        "training.sample_tokens=0",
    ]
    train(small, *hope, "name=whole")
    train(small, *hope, "name=parts", "training.steps=3")
    train(small, *hope, "name=parts")
    found = []
    for name in ("whole", "parts"):
        run = runs.find(small.parent / "runs" / name)
        lines = metrics.read(run.folder / "metrics.jsonl")
        timeless = [{k: v for k, v in x.items() if k not in metrics.TIMINGS} for x in lines]
        with sharding.use(runs.mesh(run.experiment)):
            model, path = runs.load(run)
        assert path.name == "6"
        found.append((timeless, [np.asarray(x) for x in jax.tree.leaves(nnx.state(model))]))
    (lines, params), (others, other_params) = found
    assert len(lines) == 8
    assert lines == others
    for a, b in zip(params, other_params, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.widht=3"], "model.widht=3 is no setting; did you mean width?"),
        (["data.source.train=nowhere.txt"], "data: "),
        (["data.window=100000"], "data: split 'train' must hold a window of 100001 tokens"),
        (["data.batch=3"], "data: batch must be divisible by 8"),
        (["mesh.data=3"], "mesh: mesh data=3"),
        (
            ["data.tokenizer={kind: sentencepiece, vocabulary: 60000}"],
            "data: tokenizer vocabulary must be at most",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_computed(small, overrides, says):
    with pytest.raises(config.ConfigError) as error:
        train(small, *overrides)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not (small.parent / "runs" / "small" / "checkpoints").exists()


def test_an_error_is_one_line_and_a_status(small):
    given = type_in("-m", "hope_jax", "train", small, "training.steps=many")
    assert given.returncode == 2
    assert given.stdout == ""
    assert given.stderr == f"error: {small}: training.steps=many must be a whole number\n"


def test_another_config_than_the_runs_is_refused(small):
    train(small, "training.steps=2")
    with pytest.raises(config.ConfigError, match=r"was trained with model.width=16 \(now 32\)"):
        train(small, "training.steps=2", "model.width=32")


def test_the_command_line_lists_its_commands(capsys):
    with pytest.raises(SystemExit) as status:
        command_line.main(["--help"])
    assert status.value.code == 0
    listed = capsys.readouterr().out
    for command in ("train", "eval", "doctor", "settings", "sizes", "tokenizer"):
        assert f"\n    {command}" in listed


def test_sizes_are_counted_without_a_model(small, capsys):
    assert command_line.main(["sizes", str(small)]) == 0
    _, line = capsys.readouterr().out.splitlines()
    assert line.split()[1] == f"{config.load(small).model.parameters():,}"


def test_a_tokenizer_is_made_into_a_folder(small, tmp_path, capsys):
    pieces = "data.tokenizer={kind: sentencepiece, vocabulary: 280}"
    assert command_line.main(["tokenizer", str(small), str(tmp_path / "made"), pieces]) == 0
    assert load_tokenizer(tmp_path / "made").vocabulary == 280
    assert "280 ids" in capsys.readouterr().out


def test_every_setting_is_printed(capsys):
    assert command_line.main(["settings"]) == 0
    assert "training.steps: a whole number = 1000" in capsys.readouterr().out


def test_the_doctor_names_devices_versions_and_kernels(capsys):
    command_line.main(["doctor"])
    said = capsys.readouterr().out
    for part in ("jax 0.", "device 7: cpu", "op fastkv: ", "Python 3."):
        assert part in said


def test_the_doctor_says_what_is_wrong_and_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_version", {"jax": "0.1.0"}.get)
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["jax>=0.10.2,<0.13", "flax>=0.12"])
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**20}))
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.chdir(tmp_path)
    _, wrong = doctor.examine()
    assert wrong == [
        "jax<0.13,>=0.10.2 is needed, 0.1.0 is installed: pip install -e .",
        "flax>=0.12 is needed, nothing is installed: pip install -e .",
        f"{tmp_path} has 1 MiB left: a run may need more",
        "there is an NVIDIA GPU and jax uses the CPU: install hope_jax[cuda]",
    ]


def test_importing_the_package_is_light():
    heavy = ["jax", "grain", "orbax", "sentencepiece", "matplotlib", "pydantic"]
    code = f"import hope_jax, sys; print([name for name in {heavy} if name in sys.modules])"
    assert type_in("-c", code).stdout == "[]\n"
    code = "import hope_jax, sys; hope_jax.config; print('orbax' in sys.modules)"
    assert type_in("-c", code).stdout == "False\n"

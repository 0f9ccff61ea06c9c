"""The training step and the loop around it, on a toy: what they compute, skip and refuse."""

import json
import math
import resource
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from toy_run import (
    ToyConfig,
    ToyData,
    ToyExperiment,
    ToyModel,
    compiled_once,
    optimizer,
    toy_outline,
    train,
)

from hope_jax import sharding
from hope_jax.shapes import Batch
from hope_jax.sharding import MeshConfig
from hope_jax.training import RunError, TrainingConfig, checkpoint, metrics, step


@pytest.fixture(autouse=True, scope="module")
def _compiled_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture
def laid_out(tmp_path):
    """The toy on one device: its outline, optimizer and state."""
    experiment = ToyExperiment(training=TrainingConfig(folder=str(tmp_path)))
    with sharding.use(MeshConfig().build(jax.devices()[:1])):
        model, tx = toy_outline(experiment), optimizer()
        state = step.initial_state(model, tx, 0, step.abstract_state(model, tx))
        yield model, tx, state


def take_step(laid_out, batch, accumulate=1):
    model, tx, state = laid_out
    return jax.jit(step.train_step, static_argnums=(0, 1, 2))(
        model.graphdef, tx, accumulate, state, batch
    )


def lines_of(run: Path) -> list[dict]:
    """The metrics of a run, without what depends on the clock."""
    lines = metrics.read(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in metrics.TIMINGS} for line in lines]


def weights_of(run: Path) -> dict:
    path = checkpoint.steps(run / "checkpoints")[-1]
    with sharding.use(MeshConfig().build(jax.devices()[:1])):
        model = toy_outline(ToyExperiment(training=TrainingConfig()))
        return checkpoint.restore_params(path, step.abstract_params(model))[0]


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_a_batch_in_parts_gives_the_gradient_of_the_whole(laid_out, accumulate):
    batch = ToyData.batch(0)
    uneven = batch._replace(weights=jax.random.uniform(jax.random.key(1), batch.weights.shape))

    whole, expected = take_step(laid_out, uneven)
    parts, found = take_step(laid_out, uneven, accumulate)

    assert found["loss"] == pytest.approx(float(expected["loss"]), rel=1e-6)
    assert found["grad_norm"] == pytest.approx(float(expected["grad_norm"]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(parts.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_without_weights_every_target_counts_once(laid_out):
    batch = ToyData.batch(0)
    _, plain = take_step(laid_out, batch._replace(weights=None))
    _, equal = take_step(laid_out, batch._replace(weights=3 * batch.weights))
    assert plain["loss"] == pytest.approx(float(equal["loss"]), rel=1e-6)


def test_a_target_of_weight_zero_does_not_count(laid_out):
    batch = ToyData.batch(0)
    other = Batch(batch.tokens.at[:, -1].add(1) % 16, batch.starts, batch.weights)
    blind = batch.weights.at[:, -1].set(0)
    first, one = take_step(laid_out, batch._replace(weights=blind))
    second, two = take_step(laid_out, other._replace(weights=blind))
    assert one["loss"] == two["loss"]
    assert jax.tree.all(jax.tree.map(np.array_equal, first.params, second.params))


def test_a_step_that_is_not_finite_moves_only_the_counters(laid_out):
    *_, before = laid_out
    after, report = take_step(laid_out, ToyData.batch(0, spoiled=(0,)))
    assert math.isnan(report["loss"])
    assert (after.step, after.skipped, after.streak) == (1, 1, 1)
    for part in ("params", "opt_state"):
        same = jax.tree.map(np.array_equal, getattr(after, part), getattr(before, part))
        assert jax.tree.all(same), part
    healed, _ = take_step((*laid_out[:2], after), ToyData.batch(1))
    assert (healed.step, healed.skipped, healed.streak) == (2, 1, 0)
    assert not np.array_equal(healed.params["mix"], after.params["mix"])


def test_training_learns_and_reports(tmp_path):
    summary = train(tmp_path, steps=150, evaluate_every=50, save_every=0, log_every=10)
    run = tmp_path / "toy"
    assert summary["valid_loss"] < 1.0 < math.log(16)
    assert summary == json.loads((run / "summary.json").read_text())
    assert summary["parameters"] == 16 * 8 + 8 * 8
    assert summary["tokens"] == 150 * 8 * 8
    assert summary["finished"]
    assert summary["mfu"] is None
    assert summary["tokens_per_second"] > 0
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list(run.glob("events.out.tfevents.*"))
    train_steps = [line["step"] for line in lines_of(run) if line["split"] == "train"]
    assert train_steps == list(range(10, 151, 10))
    valid = [(line["step"], line["loss"]) for line in lines_of(run) if line["split"] == "valid"]
    assert [at for at, _ in valid] == [50, 100, 150]
    assert valid[-1][1] == summary["valid_loss"] == min(loss for _, loss in valid)


def test_the_model_writes_at_every_evaluation(tmp_path):
    asked = []
    train(tmp_path, steps=10, evaluate_every=5, sample=lambda model: asked.append(model) or "a b")
    assert len(asked) == 2
    assert all(isinstance(model, ToyModel) for model in asked)
    assert not np.array_equal(asked[0].mix[...], asked[1].mix[...])


def test_a_run_compiles_its_step_once_and_moves_nothing_unasked(tmp_path, monkeypatch):
    compiled, traced = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    hidden = ToyModel.hidden
    monkeypatch.setattr(ToyModel, "hidden", lambda *a, **k: traced.append(1) or hidden(*a, **k))

    seen = []

    class Watched(ToyData):
        def train(self, start_step):
            for batch in super().train(start_step):
                seen.append(len(compiled))
                yield batch

    with jax.transfer_guard_host_to_device("disallow"):
        train(tmp_path, data=Watched(), steps=30, evaluate_every=10, save_every=0)
    assert len(traced) == 2, "the train step and the evaluation are traced once each"
    first_evaluation = seen[10]
    assert seen[2] == first_evaluation, "no step but the first compiles"
    assert len(set(seen[12:])) == 1, "nothing compiles after the first evaluation"


def test_a_batch_that_was_left_on_the_host_is_refused(tmp_path):
    class OnHost(ToyData):
        @staticmethod
        def batch(number, spoiled=()):
            return jax.tree.map(np.asarray, ToyData.batch(number, spoiled))

    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(tmp_path, data=OnHost(), steps=2)


def test_eight_devices_train_as_one(tmp_path):
    meshes = [MeshConfig(), MeshConfig(data=2, fsdp=4), MeshConfig(data=2, fsdp=2, tensor=2)]
    train(tmp_path, steps=10, name="one")
    one = [line["loss"] for line in lines_of(tmp_path / "one")]
    for mesh in meshes:
        train(tmp_path, steps=10, name=f"fsdp={mesh.fsdp}", devices=8, mesh=mesh)
        eight = [line["loss"] for line in lines_of(tmp_path / f"fsdp={mesh.fsdp}")]
        np.testing.assert_allclose(eight, one, rtol=1e-5)


def test_no_device_ever_holds_a_whole_matrix_that_the_mesh_splits():
    experiment = ToyExperiment(training=TrainingConfig(), model=ToyConfig(width=64))
    with sharding.use(MeshConfig(data=1, fsdp=4, tensor=2).build()):
        model, tx = toy_outline(experiment), optimizer()
        state = step.initial_state(model, tx, 0, step.abstract_state(model, tx))
        slots = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (64, 64)]
        assert len(slots) == 2
        for x in [state.params["mix"], *slots]:
            assert {shard.data.shape for shard in x.addressable_shards} == {(16, 32)}


def test_a_few_steps_that_are_not_finite_are_left_out(tmp_path):
    summary = train(tmp_path, data=ToyData(spoiled=(5, 6)), steps=12, patience=3)
    assert summary["skipped"] == 2
    assert summary["valid_loss"] < math.log(16)
    losses = {line["step"]: line["loss"] for line in lines_of(tmp_path / "toy")}
    assert losses[6] is None, "what JSON has for a number that is none"


def test_too_many_of_them_stop_the_run_at_a_checkpoint_before(tmp_path):
    with pytest.raises(RunError, match=r"steps 7 to 9; .*toy/checkpoints/6$"):
        train(tmp_path, data=ToyData(spoiled=range(6, 100)), steps=50, patience=3, save_every=1)
    assert checkpoint.steps(tmp_path / "toy" / "checkpoints")[-1].name == "6"


def test_the_last_checkpoints_and_the_best_one_stay(tmp_path):
    worse = optax.scale(0.5)  # uphill, so that the first evaluation is the best
    train(tmp_path, tx=worse, steps=12, evaluate_every=2, save_every=2, keep=2)
    kept = [path.name for path in checkpoint.steps(tmp_path / "toy" / "checkpoints")]
    assert kept == ["2", "10", "12"]


def test_a_finished_run_is_left_alone_and_can_be_made_longer(tmp_path, capfd):
    first = train(tmp_path, steps=6)
    before = (tmp_path / "toy" / "metrics.jsonl").read_bytes()
    assert train(tmp_path, steps=6) == first
    assert "toy is finished" in capfd.readouterr().err
    assert (tmp_path / "toy" / "metrics.jsonl").read_bytes() == before
    assert train(tmp_path, steps=8)["steps"] == 8


def damage(path: Path):
    """Cuts the largest file of a checkpoint in half."""
    files = [file for file in path.rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)


def test_a_truncated_checkpoint_falls_back_to_the_one_before(tmp_path, capfd):
    model = ToyConfig(width=64)
    train(tmp_path, model=model, steps=8, name="whole")
    train(tmp_path, model=model, steps=12, name="whole")
    train(tmp_path, model=model, steps=8, name="cut")
    damage(tmp_path / "cut" / "checkpoints" / "8")

    train(tmp_path, model=model, steps=12, name="cut")

    said = capfd.readouterr().err
    assert "checkpoints/8 is damaged" in said
    assert "goes on after step 4" in said
    assert (tmp_path / "cut" / "broken" / "8-0").is_dir(), "nothing is deleted"
    losses = [
        [x["loss"] for x in lines_of(tmp_path / n) if x["step"] > 8] for n in ("whole", "cut")
    ]
    assert losses[0] == losses[1]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path):
    train(tmp_path, steps=4, keep=1)
    damage(tmp_path / "toy" / "checkpoints" / "4")
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint .* can be read.*4 is dam"):
        train(tmp_path, steps=8)
    assert (tmp_path / "toy" / "checkpoints" / "4").is_dir()


def test_a_full_disk_says_so_and_leaves_the_checkpoint_before(tmp_path, capfd, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = ToyConfig(width=128)

    class FillsUp(ToyData):
        def train(self, start_step):
            for number, batch in enumerate(super().train(start_step), start_step):
                if number == 6:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
                yield batch

    try:
        with pytest.raises(checkpoint.CheckpointError, match=r"could not save.*last .*/4$"):
            train(tmp_path, data=FillsUp(), model=model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Traceback" not in caplog.text + capfd.readouterr().err, "one error is enough"
    assert [p.name for p in (tmp_path / "toy" / "checkpoints").iterdir()] == ["4"]
    train(tmp_path, model=model)
    train(tmp_path, model=model, name="free")
    assert lines_of(tmp_path / "toy") == lines_of(tmp_path / "free")


def test_a_checkpoint_of_another_model_is_refused_in_one_line(tmp_path):
    train(tmp_path, steps=4)
    with pytest.raises(checkpoint.OtherModelError) as error:
        train(tmp_path, steps=8, model=ToyConfig(width=9))
    assert "mix is (8, 8) there and (9, 9) here (1 more differ)" in str(error.value)
    assert "\n" not in str(error.value)
    assert (tmp_path / "toy" / "checkpoints" / "4").is_dir()


@pytest.mark.parametrize(
    ("data", "what"), [({"fingerprint": "other"}, "tokenizer"), ({"size": 99}, "corpus")]
)
def test_other_data_than_the_checkpoints_is_refused(tmp_path, data, what):
    train(tmp_path, steps=4)
    with pytest.raises(RunError, match=f"was trained with another {what}"):
        train(tmp_path, steps=8, data=ToyData(**data))


@pytest.mark.parametrize("order", [(8, 1), (1, 8)])
def test_a_checkpoint_is_restored_on_another_mesh_bit_for_bit(tmp_path, order):
    model, tx = ToyConfig(width=64), optimizer()
    states = []
    meshes = {8: MeshConfig(data=1, fsdp=4, tensor=2), 1: MeshConfig()}
    for devices in order:
        mesh = meshes[devices]
        experiment = ToyExperiment(training=TrainingConfig(), model=model)
        with sharding.use(mesh.build(jax.devices()[:devices])):
            abstract = step.abstract_state(toy_outline(experiment), tx)
            checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=1)
            restored = checkpoints.restore(abstract)
            if restored is None:
                state = step.initial_state(toy_outline(experiment), tx, 0, abstract)
                checkpoints.save(state, {"streak": 0})
                checkpoints.close()
            else:
                state = restored.state
                assert state.params["mix"].sharding == abstract.params["mix"].sharding
            states.append(jax.device_get(state._replace(key=jax.random.key_data(state.key))))
    assert jax.tree.all(jax.tree.map(np.array_equal, *states))


def test_only_parameters_are_read_for_an_evaluation(tmp_path):
    train(tmp_path, steps=8)
    with sharding.use(MeshConfig().build(jax.devices()[:1])):
        model = toy_outline(ToyExperiment(training=TrainingConfig()))
        wanted = step.abstract_params(model)
        newest, path = checkpoint.restore_params(tmp_path / "toy", wanted)
        older, _ = checkpoint.restore_params(tmp_path / "toy" / "checkpoints" / "4", wanted)
        assert path.name == "8"
        assert not np.array_equal(newest["mix"], older["mix"])
        with pytest.raises(checkpoint.CheckpointError, match="neither a run folder nor"):
            checkpoint.restore_params(tmp_path, wanted)


def test_speed_leaves_out_what_was_not_training():
    now = [2.0]
    meter = metrics.Meter(lambda: now[0], tokens=100, flops=1e12, peak=1e12, began=0.0)
    for seconds in (1.0, 3.0):
        now[0] += seconds
        meter.step()
    with meter.pause():
        now[0] += 50
    first = meter.since_last()
    assert (first["seconds"], first["tokens_per_second"], first["mfu"]) == (54.0, 50.0, 0.5)
    assert first["goodput"] == 4 / 56
    assert meter.since_last()["tokens_per_second"] is None, "no step, no speed"
    with meter.busy(waits=True):
        now[0] += 1
    meter.step()
    assert meter.since_last()["input_wait"] == 1.0
    whole = meter.overall()
    assert (whole["seconds"], whole["tokens_per_second"], whole["mfu"]) == (55.0, 60.0, 0.6)
    assert (whole["goodput"], whole["input_wait"]) == (4 / 57, 1 / 3)


def test_some_steps_are_traced_if_asked(tmp_path):
    train(tmp_path, steps=8, profile=2, evaluate_every=0, save_every=0)
    assert list((tmp_path / "toy" / "profile").rglob("*.xplane.pb"))
    train(tmp_path, steps=12, profile=100, evaluate_every=0, save_every=0)
    assert len(list((tmp_path / "toy" / "profile").rglob("*.xplane.pb"))) == 1, "too few steps"


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_name(kind, peak):
    assert metrics.peak_flops(kind) == peak


@pytest.mark.parametrize(
    ("setting", "value"), [("steps", 0), ("keep", 0), ("save_every", -1), ("profile", -1)]
)
def test_settings_of_training_have_bounds(setting, value):
    with pytest.raises(ValueError, match=f"{setting} must be at least .*got {value}"):
        TrainingConfig(**{setting: value})


def test_a_run_may_report_to_weights_and_biases(tmp_path, monkeypatch):
    sent = []

    class Fake:
        def init(self, **options):
            sent.append(options)
            return self

        def log(self, values, step):
            sent.append((step, *values))

        def finish(self):
            sent.append("finished")

    monkeypatch.setitem(sys.modules, "wandb", Fake())
    train(tmp_path, steps=2, evaluate_every=0, wandb="mine")
    assert sent[0]["project"] == "mine"
    assert sent[0]["id"] == "toy", "a run that goes on stays one run"
    assert sent[1][:2] == (1, "train/loss")
    assert "valid/perplexity" in sent[-2]
    assert sent[-1] == "finished"

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RunError, match=r"pip install 'hope_jax\[wandb\]'"):
        train(tmp_path, steps=4, wandb="mine")


def test_signals_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    train(tmp_path, steps=2)
    assert signal.getsignal(signal.SIGTERM) is before

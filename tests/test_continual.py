"""Classes come group by group: nothing of later ones is seen, and what is lost is told."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from hope_jax.__main__ import main
from hope_jax.config import ConfigError
from hope_jax.data.cifar import CifarConfig
from hope_jax.data.intents import Classes, IntentsConfig, split
from hope_jax.evaluation.intents import summary
from hope_jax.models.decoder import ModelConfig
from hope_jax.modules.attention import AttentionConfig
from hope_jax.modules.continuum import ContinuumConfig, LevelConfig
from hope_jax.optimizers import OptimizerConfig, ScheduleConfig
from hope_jax.suites import classes
from hope_jax.suites.classes import Continual, DigitsConfig, Entrant, run
from hope_jax.suites.continual import Classifier, Method, plan

DATA = Path(__file__).parents[2] / "shared" / "data" / "intents"
FINE, REPLAY, ALL = (
    Method(name="fine"),
    Method(name="replay", replay=3),
    Method(name="all", everything=True),
)
MODEL = ModelConfig(
    mixer=AttentionConfig(heads=1, window=8),
    continuum=ContinuumConfig(levels=(LevelConfig(hidden=8),)),
    width=8,
    layers=1,
)
TRAIN = DigitsConfig(examples=400).load()[0]


def small(folder, **settings):
    return Continual(
        **{
            "data": DigitsConfig(examples=500, noise=0.1),
            "models": (Entrant(name="mlp"),),
            "methods": (FINE, Method(name="ewc", strength=3000.0), REPLAY, ALL),
            "groups": 2,
            "steps": 40,
            "batch": 16,
            "seeds": (0,),
            "optimizer": OptimizerConfig(
                weight_decay=0.0, schedule=ScheduleConfig(kind="constant", warmup=0.0)
            ),
            "folder": str(folder),
            **settings,
        }
    )


def found(folder):
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("cells/*/*/*")}


def test_a_matrix_is_summed_up_as_published():
    matrix = np.array([[0.9, 0.0, 0.0], [0.5, 0.8, 0.0], [0.6, 0.2, 1.0]])
    expected = {"average": 0.6, "learned": 0.9, "forgetting": 0.45, "backward": -0.45}
    assert summary(matrix) == pytest.approx(expected)
    # Group 0 was best after its own training; had it been best later, that would count.
    matrix[1, 0] = 1.0
    assert summary(matrix)["forgetting"] == pytest.approx(0.5)
    assert summary(matrix)["backward"] == pytest.approx(-0.45)
    oracle = summary(np.ones((4, 4)))
    assert oracle == {"average": 1, "learned": 1, "forgetting": 0, "backward": 0}


def test_classes_are_dealt_out_by_seed():
    groups = [split(TRAIN.labels, 3, seed) for seed in (0, 0, 1)]
    assert sorted(np.concatenate(groups[0]).tolist()) == [*range(10)]
    assert [len(group) for group in groups[0]] == [4, 3, 3]
    assert [x.tolist() for x in groups[0]] == [x.tolist() for x in groups[1]]
    assert [x.tolist() for x in groups[0]] != [x.tolist() for x in groups[2]]


@pytest.mark.parametrize("method", [FINE, REPLAY, ALL], ids=lambda method: method.name)
def test_a_batch_has_what_its_method_may_see(method):
    groups = split(TRAIN.labels, 3, 0)
    one = plan(TRAIN, groups, method, steps=50, batch=8, seed=0)
    for number, mine in enumerate(groups):
        labels = TRAIN.labels[one.rows[number]]
        before = np.concatenate([*groups[:number], np.zeros(0, int)])
        assert np.isin(labels, np.concatenate([before, mine])).all()
        assert np.isin(TRAIN.labels[one.curvature[number]], mine).all()
        old = np.isin(labels, before)
        share = {"fine": 0.0, "replay": 0.5 * (number > 0), "all": len(before) / 10}[method.name]
        assert old.mean() == pytest.approx(share, abs=0.01 if method is not ALL else 0.5)
        if method is ALL and number:
            assert 0 < old.mean() < 1
        if method is REPLAY:
            assert len(np.unique(one.rows[number][old])) == 3 * len(before)
        seen = np.isin(np.arange(10), np.concatenate([before, mine]))
        np.testing.assert_array_equal(one.allowed[number], np.tile(seen, (10, 1)))
    told = plan(TRAIN, groups, method, steps=1, batch=8, seed=0, known_task=True)
    for mine in groups:
        np.testing.assert_array_equal(
            told.allowed[0, mine], np.tile(np.isin(np.arange(10), mine), (len(mine), 1))
        )


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return run(small(tmp_path_factory.mktemp("continual")))


def test_fine_tuning_forgets_and_replay_and_everything_less(learned):
    methods = found(learned)
    for one in methods.values():
        assert one["matrix"][0][1] == 0  # classes that were not seen are never answered
    assert methods["fine"]["learned"] > 0.6
    assert methods["fine"]["forgetting"] > 0.6
    assert methods["replay"]["forgetting"] < methods["fine"]["forgetting"] - 0.1
    assert methods["all"]["average"] > methods["replay"]["average"]


def test_parameters_that_mattered_are_held_where_groups_are_told(tmp_path):
    settings = small(tmp_path, known_task=True, groups=5, methods=small(tmp_path).methods[:2])
    methods = found(run(settings))
    assert methods["ewc"]["forgetting"] < methods["fine"]["forgetting"] - 0.03
    assert methods["ewc"]["learned"] > 0.7


def test_a_fresh_model_guesses(tmp_path):
    slow = OptimizerConfig(learning_rate=1e-9, weight_decay=0.0)
    told = small(tmp_path, optimizer=slow, steps=1, methods=(FINE,), known_task=True, name="told")
    (one,) = found(run(told)).values()
    assert np.mean(one["matrix"]) == pytest.approx(1 / 5, abs=0.1)
    untold = replace(told, known_task=False, name="untold")
    (one,) = found(run(untold)).values()
    assert np.mean(one["matrix"][1]) == pytest.approx(1 / 10, abs=0.07)


def test_an_optimizer_that_forgets_is_another_one(learned, tmp_path):
    again = found(run(small(tmp_path, methods=(FINE,), reset=True)))["fine"]["matrix"]
    before = found(learned)["fine"]["matrix"]
    assert again[0] == before[0]
    assert again[1] != before[1]


def test_a_finished_run_is_never_made_again(learned, monkeypatch):
    calls = []
    monkeypatch.setattr(classes, "learn", lambda *args, **_: calls.append(args))
    before = found(learned)
    run(small(learned.parent))
    assert calls == []
    assert found(learned) == before


def test_the_report_needs_nothing_else(learned):
    page = (learned / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r"(src|href)=.(?!data:)", page)
    records = json.loads((learned / "records.json").read_text())
    assert "continual/mlp/fine/forgetting" in {one["name"] for one in records}


def test_a_decoder_reads_texts_up_to_their_end(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    lengths = random.integers(1, 6, 64).astype(np.int32)
    inputs = random.integers(97, 123, (64, 6)).astype(np.int32)
    labels = np.arange(64, dtype=np.int32) % 4
    inputs[np.arange(64), lengths - 1] = labels  # the last byte says it
    some = Classes(inputs, lengths, labels)

    classifier = Classifier(replace(MODEL, vocabulary=256), symbols=256, length=6, classes=4)
    params = classifier.init(jax.numpy.asarray(0))
    logits = jax.jit(classifier.logits)
    spoiled = np.where(np.arange(6) < lengths[:, None], inputs, 7)
    np.testing.assert_array_equal(logits(params, inputs, lengths), logits(params, spoiled, lengths))

    monkeypatch.setattr(IntentsConfig, "load", lambda _: (some, some))
    settings = small(
        tmp_path,
        data=IntentsConfig(dataset="clinc150"),
        models=(Entrant(name="attention", model=MODEL),),
        methods=(ALL,),
        steps=60,
        optimizer=OptimizerConfig(learning_rate=0.02, weight_decay=0.0),
    )
    assert found(run(settings))["all"]["average"] > 0.9


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the intents are not in {DATA}")
@pytest.mark.parametrize(
    ("dataset", "sizes"), [("clinc150", (15000, 4500, 150)), ("banking77", (10003, 3080, 77))]
)
def test_intents_are_as_many_as_published(dataset, sizes):
    train, test = IntentsConfig(dataset=dataset, folder=str(DATA)).load()
    assert (len(train.labels), len(test.labels), len(np.unique(train.labels))) == sizes
    assert set(np.unique(test.labels)) == set(range(sizes[2]))
    assert train.lengths.min() >= 1
    assert train.inputs.shape[1] == 96


@pytest.fixture
def photographs(tmp_path):
    """CIFAR-100's files with images of four classes; returns the labels and the bytes."""
    random = np.random.default_rng(0)
    labels = np.arange(64) % 4 * 33
    images = random.integers(0, 80, (64, 3, 32, 32), np.uint8)
    images[np.arange(64), labels % 3, 8:16] += labels[:, None, None].astype(np.uint8)
    rows = [
        bytes([7, label]) + image.tobytes() for label, image in zip(labels, images, strict=True)
    ]
    for name in ("train.bin", "test.bin"):
        (tmp_path / name).write_bytes(b"".join(rows))
    return labels, images


def test_photographs_are_read_as_they_were_published(photographs, tmp_path):
    labels, images = photographs
    data = CifarConfig(folder=str(tmp_path))
    train, test = data.load()
    np.testing.assert_array_equal(train.labels, labels)
    np.testing.assert_array_equal(test.inputs, train.inputs)
    assert (train.inputs.shape, set(train.lengths)) == ((64, 3072), {3072})
    np.testing.assert_array_equal(train.inputs[5, :6], images[5, :, 0, :2].T.ravel())
    np.testing.assert_array_equal(train.inputs[5, 96:99], images[5, :, 1, 0])
    small = replace(data, shrink=8).load()[0].inputs
    np.testing.assert_allclose(small[5, 3:6], images[5, :, :8, 8:16].mean((1, 2)), atol=0.51)


def test_photographs_are_learned(photographs, tmp_path):  # noqa: ARG001
    data = CifarConfig(folder=str(tmp_path), shrink=8)
    (one,) = found(run(small(tmp_path, data=data, methods=(ALL,), name="photographs"))).values()
    assert one["average"] > 0.8


def test_what_is_no_photograph_is_an_error(tmp_path):
    data = CifarConfig(folder=str(tmp_path))
    with pytest.raises(ConfigError, match=r"train.bin': get it from https://www.cs.toronto.edu"):
        run(small(tmp_path, data=data))
    (tmp_path / "train.bin").write_bytes(bytes(3073))
    with pytest.raises(ValueError, match=r"must hold images of 3074 bytes, .* got 3073 bytes"):
        data.load()
    with pytest.raises(ValueError, match="shrink must be 1, 2, 4 or 8, got 3"):
        replace(data, shrink=3)


def test_what_cannot_be_is_an_error(tmp_path, capsys):
    clinc = IntentsConfig(dataset="clinc150", folder=str(tmp_path))
    missing = small(tmp_path, data=clinc, models=(Entrant(name="attention", model=MODEL),))
    with pytest.raises(ConfigError, match=r"clinc150.json': get it from https://github.com/clinc"):
        run(missing)
    with pytest.raises(ConfigError, match="groups must be at most 10, got 11"):
        run(small(tmp_path, groups=11))
    with pytest.raises(ValueError, match="models must have a model for text"):
        small(tmp_path, data=IntentsConfig(dataset="clinc150"))
    path = tmp_path / "bad.yaml"
    path.write_text("data: {kind: digits, examples: 5}\nmodels: [{name: mlp}]\n")
    assert main(["continual", str(path)]) == 2
    assert "examples must be at least 100, got 5" in capsys.readouterr().err

"""Comparisons are fair, go on where they were, and report what their runs found."""

import json
import re
from dataclasses import replace

import jax
import numpy as np
import pytest

import hope_jax.optimizers as hopt
from hope_jax.__main__ import main
from hope_jax.comparison import compare
from hope_jax.comparison.compare import Comparison, Contender
from hope_jax.comparison.digits import DigitsTask, draw
from hope_jax.comparison.report import rank
from hope_jax.comparison.toys import SequenceTask, ValleyTask

SGD = Contender(rule=hopt.SGDConfig(momentum=0.0), name="sgd")
ADAMW = Contender(rule=hopt.AdamWConfig())
VALLEY = ValleyTask(steps=12, every=4)


def small(folder, **settings):
    return Comparison(
        **{
            "tasks": (VALLEY,),
            "optimizers": (SGD, ADAMW),
            "rates": (0.1, 0.5),
            "seeds": (0, 1),
            "schedule": hopt.ScheduleConfig(kind="constant", warmup=0.0),
            "clip": None,
            "folder": str(folder),
            **settings,
        }
    )


def read(folder):
    return {
        path.relative_to(folder): json.loads(path.read_text())
        for path in folder.glob("cells/**/*.json")
    }


def test_each_replica_is_the_run_that_it_would_be_alone(tmp_path):
    folder = compare.run(small(tmp_path))
    problem, sgd = VALLEY.build(), jax.jit(jax.grad(VALLEY.build().loss))
    found = {
        (run["rate"], run["seed"]): run for path, run in read(folder).items() if "sgd" in path.parts
    }
    assert found.keys() == {(rate, seed) for rate in (0.1, 0.5) for seed in (0, 1)}
    for (rate, seed), run in found.items():
        params = jax.jit(problem.init)(seed)
        losses = []
        for t in range(13):
            losses.append(float(jax.jit(problem.measure)(params, 0)["loss"][0]))
            params = jax.tree.map(lambda p, g: p - rate * g, params, sgd(params, t))
        np.testing.assert_allclose(run["valid"]["loss"], losses[::4], rtol=1e-5)
        assert run["judged"]["loss"] == run["test"]["loss"] == run["valid"]["loss"][-1]


def test_groups_of_runs_find_what_all_at_once_find(monkeypatch, tmp_path):
    folder = compare.run(small(tmp_path))
    build = ValleyTask.build
    monkeypatch.setattr(ValleyTask, "build", lambda task: build(task)._replace(at_once=1))
    compare._prepare.cache_clear()
    other = compare.run(small(tmp_path, name="one_by_one"))
    alone, together = read(other), read(folder)
    assert alone.keys() == together.keys()
    for path, run in together.items():
        np.testing.assert_allclose(alone[path]["train"], run["train"], rtol=1e-4)
        np.testing.assert_allclose(alone[path]["valid"]["loss"], run["valid"]["loss"], rtol=1e-4)


def test_a_finished_cell_is_never_run_again(monkeypatch, tmp_path):
    folder = compare.run(small(tmp_path))
    before = {path: (folder / path).stat().st_mtime_ns for path in read(folder)}
    trained = []
    train = compare.train
    monkeypatch.setattr(
        compare, "train", lambda *args, **more: trained.append(args[2]) or train(*args, **more)
    )
    compare.run(small(tmp_path))
    assert not trained
    lost = min(path for path in before if "adamw" in path.parts)
    (folder / lost).unlink()
    more = small(tmp_path, rates=(0.1, 0.5, 0.9))
    compare.run(more)
    # Only the new rate of one, and the new rate and what was lost of the other.
    assert [len(replicas) for replicas in trained] == [2, 3]
    after = {path: (folder / path).stat().st_mtime_ns for path in read(folder)}
    assert all(after[path] == time for path, time in before.items() if path != lost)
    # Another setting that counts is another cell; one that does not is the same.
    trained.clear()
    compare.run(replace(more, tasks=(replace(VALLEY, goal=0.5),)))
    assert not trained
    compare.run(replace(more, tasks=(replace(VALLEY, turn=0.2),)))
    assert [len(replicas) for replicas in trained] == [6, 6]


def test_the_report_needs_nothing_else_and_records_are_whole(tmp_path):
    folder = compare.run(small(tmp_path, tasks=(replace(VALLEY, goal=0.5),)))
    page = (folder / "report.html").read_text()
    assert (folder / "valley.png").read_bytes().startswith(b"\x89PNG")
    assert page.count("data:image/png;base64,") == 1
    assert not re.search(r"(src|href)=.(?!data:)", page)
    for text in ("sgd", "adamw", "steps to 0.5", "ms a step", "state, bytes a parameter"):
        assert text in page
    records = json.loads((folder / "records.json").read_text())
    by_name = {one["name"]: one for one in records}
    state = by_name["compare/valley/adamw/state"]
    assert state["value"] == pytest.approx((2 * 2 * 4 + 2 * 4) / 2)
    assert state.keys() == {"name", "value", "unit", "device", "date", "commit", "command", "notes"}


def result(loss, test, steps=(0, 5, 10)):
    return {
        "judged": {"loss": loss},
        "test": {"loss": test},
        "valid_steps": list(steps),
        "valid": {"loss": [4.0, loss + 1, loss]},
        "step_seconds": 0.5,
    }


def test_the_best_rate_is_that_of_the_least_mean_validation_loss_whatever_the_test_says():
    runs = {
        ("t", "a", compare.Replica(rate, seed)): result(loss, 10 - loss)
        for rate, losses in {0.1: (1.0, 3.0), 0.2: (1.5, 1.6), 0.4: (None, 1.0)}.items()
        for seed, loss in enumerate(losses)
        for loss in [np.inf if loss is None else loss]
    }
    runs |= {("t", "b", compare.Replica(0.1, seed)): result(1.2, 0.0) for seed in (0, 1)}
    a, b = rank("t", runs, None)
    assert (a.rate, a.edge, a.valid.tolist()) == (0.2, "", [1.5, 1.6])
    assert a.match == 5.0
    assert b.match == 5.0
    # With a goal, the fewest steps to stay below it win.
    a, _ = rank("t", runs, 2.5)
    assert a.rate == 0.2
    assert a.to_goal.tolist() == [5.0, 10.0]


def test_delta_momentum_reaches_the_optimum_of_the_turning_valley_before_momentum(tmp_path):
    comparison = small(
        tmp_path,
        tasks=(ValleyTask(condition=10.0, turn=0.1, goal=0.0025, steps=150),),
        optimizers=(
            Contender(rule=hopt.SGDConfig(momentum=0.9), name="momentum"),
            Contender(rule=hopt.DeltaMomentumConfig()),
        ),
        rates=(0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.4, 0.8, 1.2, 1.6, 2.4),
        seeds=(0, 1, 2),
    )
    folder = compare.run(comparison)
    records = json.loads((folder / "records.json").read_text())
    steps = {
        one["name"].split("/")[-2]: one["value"]
        for one in records
        if one["name"].endswith("/steps_to_goal")
    }
    assert steps["delta_momentum"] < 0.5 * steps["momentum"] < 100


def test_tasks_in_sequence_share_no_input_and_all_count():
    task = SequenceTask(tasks=2, size=2, hidden=8, out=3, steps=10)
    problem = task.build()
    params = jax.jit(problem.init)(0)
    for name in ("first", "second"):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(params)), name
    early, late = (jax.jit(jax.grad(problem.loss))(params, t)["first"] for t in (0, 5))
    np.testing.assert_allclose(early.T @ late, 0, atol=1e-6)
    silent = jax.tree.map(np.zeros_like, params)
    total, count = jax.jit(problem.measure)(silent, 0)["loss"]
    assert total / count == pytest.approx(1.0, abs=0.2)


def test_digits_are_legible_and_drawn_once():
    one, again = (draw(64, (0, 3), noise=0.0) for _ in range(2))
    np.testing.assert_array_equal(one.images, again.images)
    assert one.images.shape == (64, 16, 16)
    ink = (one.images > 0).sum((1, 2))
    assert {
        ink[one.labels == label].min() == ink[one.labels == label].max() for label in range(10)
    } == {True}
    assert 40 <= ink.min() < ink.max() <= 80
    assert set(np.unique(one.images[one.images > 0] >= 0.5)) == {True}
    assert len(set(one.labels.tolist())) == 10


@pytest.mark.parametrize(("model", "accuracy"), [("mlp", 0.7), ("vit", 0.3)])
def test_digits_are_learned(model, accuracy, tmp_path):
    task = DigitsTask(model=model, width=16, layers=1, noise=0.1, steps=100, every=50)
    folder = compare.run(
        small(tmp_path, tasks=(task,), optimizers=(ADAMW,), rates=(0.01,), seeds=(0,))
    )
    (run,) = read(folder).values()
    assert run["test"]["accuracy"] > accuracy
    assert run["judged"]["loss"] == min(run["valid"]["loss"])


LANGUAGE = """
tasks:
  - kind: language
    config: {config}
    steps: 3
    every: 2
optimizers: [{{rule: {{kind: adamw}}}}, {{rule: {{kind: m3}}, scale: 2}}]
rates: [0.01, 0.02]
seeds: [0, 1]
folder: {folder}
"""

MODEL = """
model:
  mixer: {kind: associative, heads: 2, rule: gated_delta, chunk: 8}
  continuum: {levels: [{hidden: 16}]}
  width: 16
  layers: 1
data:
  source: {kind: recall, keys: 4, overwrites: 1, key_symbols: 8, value_symbols: 8, held_out: 8}
  tokenizer: {kind: symbols, symbols: 16}
  window: 19
  batch: 4
"""


def test_language_models_are_compared_from_the_command_line(tmp_path, capsys):
    (tmp_path / "model.yaml").write_text(MODEL)
    path = tmp_path / "compare_tiny.yaml"
    path.write_text(LANGUAGE.format(config=tmp_path / "model.yaml", folder=tmp_path))
    assert main(["compare", str(path)]) == 0
    assert "report.html" in capsys.readouterr().out
    runs = read(tmp_path / "compare_tiny")
    assert len(runs) == 8
    for run in runs.values():
        assert run["valid_steps"] == [0, 2, 3]
        assert run["judged"]["loss"] == min(run["valid"]["loss"])
        assert 0 <= run["test"]["accuracy"] <= 1
        assert run["about"]["parameters"] > 0


def test_settings_of_comparisons_are_listed_with_those_of_every_task(capsys):
    assert main(["settings", "compare"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "tasks.0[digits].model: mlp or vit = mlp" in said
    assert "optimizers.0.rule[m3].period: a whole number = 8" in said
    assert "rates: a list of a number" in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizers=[{rule: {kind: adamx}}]", r"kind=adamx is no choice; .*choices: adamw, muon"),
        ("optimizers=[]", "optimizers must have at least one entry"),
        ("optimizers=[{rule: {kind: m3, period: 0}}]", "period must be at least 1, got 0"),
        ("optimizers=[{rule: {kind: dmgd, depth: 0}}]", "depth must lie in 1 to 4, got 0"),
        ("optimizers=[{rule: {kind: sgd}}, {rule: {kind: sgd}}]", "got sgd twice"),
        ("rates=[-0.1]", r"rates must be above 0, got -0\.1"),
        ("seeds=[]", "seeds must have at least one entry"),
        ("tasks=[{kind: valley, columns: 3}]", "columns even"),
        ("tasks=[{kind: valley, steps: 0}]", "steps must be at least 1, got 0"),
        ("tasks=[{kind: sequence, steps: 7}]", "steps must be a multiple of tasks=5, got 7"),
        ("tasks=[{kind: digits, width: 6}]", "width must be a multiple of 4, got 6"),
        ("tasks=[{kind: language, config: no.yaml}]", "no.yaml: there is no such file"),
        ("tasks=[{kind: chess}]", "kind=chess is no choice"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(override, message, capsys):
    assert main(["compare", "configs/compare_toys.yaml", override]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert said.count("\n") == 1

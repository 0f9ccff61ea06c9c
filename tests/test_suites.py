"""A suite judges fairly, trains each run as if it were alone, goes on where it was, and reports."""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.__main__ import main
from hope_jax.data.synthetic import RecallConfig
from hope_jax.data.synthetic_formal import PERIODS, FormalConfig, WordsConfig
from hope_jax.data.synthetic_labels import draw
from hope_jax.data.synthetic_mad import SIZES, MadConfig
from hope_jax.evaluation.page import Section, write_sections
from hope_jax.models.decoder import ModelConfig
from hope_jax.modules.attention import AttentionConfig
from hope_jax.modules.continuum import ContinuumConfig, LevelConfig
from hope_jax.optimizers import OptimizerConfig
from hope_jax.suites import suite as command
from hope_jax.suites.suite import Entrant, Suite, run
from hope_jax.suites.train import Learner, judge, shares

TASKS = [
    *(FormalConfig(language=one, held_out=40) for one in PERIODS),
    *(WordsConfig(group=one, held_out=40) for one in ("s5", "a5")),
    *(MadConfig(task=one, held_out=40) for one in SIZES),
    RecallConfig(held_out=40),
]
MODEL = ModelConfig(
    mixer=AttentionConfig(heads=1, window=16),
    continuum=ContinuumConfig(levels=(LevelConfig(hidden=8),)),
    width=8,
    layers=1,
    tie=False,
)
SHORT = ((2, 6), (7, 9))
PARITY = FormalConfig(language="parity", bins=SHORT, examples=64, held_out=24)


def small(folder, **settings):
    return Suite(
        **{
            "tasks": (PARITY, replace(PARITY, language="a_n_b_n")),
            "models": (Entrant(name="attention", model=MODEL),),
            "rates": (0.003, 0.01),
            "seeds": (0, 1),
            "optimizer": OptimizerConfig(weight_decay=0.0),
            "steps": 6,
            "every": 3,
            "batch": 8,
            "folder": str(folder),
            **settings,
        }
    )


def found(folder):
    paths = sorted(folder.glob("cells/**/*.json"))
    return {path.relative_to(folder): json.loads(path.read_text()) for path in paths}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.about.title)
def test_what_knows_all_scores_one_and_what_guesses_scores_chance(task):
    random = np.random.default_rng(0)
    for split in task.about.tests:
        examples = draw(task, split)
        symbols = task.about.symbols
        oracle = 9.0 * np.eye(symbols, dtype=np.float32)[examples.labels]
        assert shares(judge(jnp.asarray(oracle), examples))[task.about.score] == 1.0
        asked = np.unique(examples.labels[examples.weights > 0])
        guess = random.normal(size=oracle.shape).astype(np.float32)
        guess[..., np.setdiff1d(np.arange(symbols), asked)] = -9.0
        said = shares(judge(jnp.asarray(guess), examples))[task.about.score]
        answers = examples.weights.sum() if task.about.score == "accuracy" else 40
        chance = task.about.chance
        assert abs(said - chance) < 4 * (chance / answers) ** 0.5 + 0.03


def test_a_string_counts_only_if_all_of_it_is_right():
    examples = draw(PARITY, "bin1")
    logits = 9.0 * np.eye(4, dtype=np.float32)[examples.labels]
    last = int(examples.weights[0].sum()) - 1
    logits[0, last] = logits[0, last, ::-1]
    one = shares(judge(jnp.asarray(logits), examples))
    assert one["strings"] == pytest.approx(23 / 24)
    assert one["accuracy"] == pytest.approx(1 - 1 / examples.weights.sum())
    logits[1, -1 if examples.weights[1, -1] == 0 else 0] *= -1  # nothing is asked there, or it is
    again = shares(judge(jnp.asarray(logits), examples))
    assert again["strings"] == pytest.approx((23 if examples.weights[1, -1] == 0 else 22) / 24)


def test_macro_accuracy_is_the_mean_over_labels():
    examples = draw(replace(PARITY, language="aa_star"), "bin0")
    logits = np.zeros((*examples.labels.shape, 4), np.float32)
    logits[..., 0] = 1.0  # only one of two labels is ever right
    one = shares(judge(jnp.asarray(logits), examples))
    assert one["macro"] == 0.5
    share = 1 - examples.labels.sum() / examples.weights.sum()
    assert one["accuracy"] == pytest.approx(share)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run(small(tmp_path_factory.mktemp("suite")))


def test_fresh_models_score_chance(trained):
    for run_found in found(trained).values():
        for split in ("bin0", "bin1"):
            assert run_found["curves"][split]["strings"][0] < 0.3
        assert run_found["curves"]["bin1"]["loss"][0] == pytest.approx(np.log(4), abs=0.8)
        assert run_found["steps"] == [0, 3, 6]


def test_runs_that_train_together_are_those_that_train_alone(trained, tmp_path):
    together = found(trained)
    second = small(tmp_path).tasks[1]
    alone = small(tmp_path, tasks=(second,), rates=(0.01,), seeds=(1,), every=4)
    ((path, one),) = found(run(alone)).items()
    assert (len(together), one["steps"]) == (8, [0, 4, 6])
    losses = [found["curves"]["valid"]["loss"][::2] for found in (one, together[path])]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert losses[0][1] < losses[0][0]


def test_a_finished_run_is_never_made_again(monkeypatch, trained):
    counts = []
    train = command.train
    monkeypatch.setattr(
        command, "train", lambda *args, **more: counts.append(len(args[3])) or train(*args, **more)
    )
    whole = small(trained.parent)
    run(whole)
    assert counts == []
    lost = [path for path in trained.glob("cells/**/*.json") if "parity" in path.parts][:1]
    lost[0].unlink()
    before = found(trained)
    run(whole)
    assert counts == [1]
    assert {path: one for path, one in found(trained).items() if path in before} == before


def test_programs_are_of_one_size_and_not_too_large(tmp_path):
    tasks = (*small(tmp_path).tasks, MadConfig(task="compression"))
    sizes = [len(some) for some in command._programs(small(tmp_path, tasks=tasks), tmp_path)]
    assert sizes == [8, 4]
    some = command._programs(small(tmp_path, tasks=tasks, at_once=3), tmp_path)
    assert [len(part) for part in some] == [3, 3, 2, 2, 2]


def test_a_decoder_sees_the_last_state_alone():
    learner = Learner(replace(MODEL, vocabulary=16), length=5, summary=True)
    params = learner.init(jnp.asarray(0))
    inputs = jnp.array([[1, 2, 3, 4, 5]])
    logits = learner.logits(params, inputs)
    assert logits.shape == (1, 5, 16)
    assert jax.tree.structure(learner.info) == jax.tree.structure(params)
    moved = jnp.abs(learner.logits(params, inputs.at[0, 1].set(9)) - logits).max(-1)
    assert jnp.all(moved > 0)  # places before the change see it too


def test_the_report_needs_nothing_else_and_records_are_whole(trained):
    page = (trained / "report.html").read_text()
    assert (trained / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert not re.search(r"(src|href)=.(?!data:)", page)
    for text in ("parity", "a_n_b_n", "attention", "best of all runs", "a guess"):
        assert text in page
    records = json.loads((trained / "records.json").read_text())
    names = {one["name"] for one in records}
    assert "suite/parity/attention/bin1" in names
    assert len(names) == 4
    assert all(len(one["notes"]["seeds"]) == 2 for one in records)


def test_pages_show_texts_as_they_are(tmp_path):
    section = Section("<h>", "a & b", (), [("x", "y"), ("1 < 2\nsmall", "")])
    page = write_sections(tmp_path / "new", "page", "<t>", "", [section]).read_text()
    assert "<td>1 &lt; 2<br><small>small</small></td><td></td>" in page
    assert "<h2>&lt;h&gt;</h2><p>a &amp; b</p><table><tr><th>x</th>" in page
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


def test_a_suite_that_cannot_be_is_an_error(tmp_path, capsys):
    with pytest.raises(ValueError, match="parity twice"):
        small(tmp_path, tasks=(PARITY, replace(PARITY, seed=1)))
    with pytest.raises(ValueError, match="rates must be above 0, got 0"):
        small(tmp_path, rates=(0.0,))
    path = tmp_path / "bad.yaml"
    path.write_text("tasks: [{kind: formal, language: french}]\nmodels: []\nrates: [1]\n")
    assert main(["suite", str(path)]) == 2
    assert "language=french is no choice" in capsys.readouterr().err


def test_an_interruption_says_how_it_goes_on(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupted)
    assert main(["suite", "configs/suite_words.yaml"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "line"),
    [("suite", "tasks.0[words].group: s5 or a5"), ("continual", "data[cifar100].shrink")],
)
def test_settings_of_suites_are_listed(what, line, capsys):
    assert main(["settings", what]) == 0
    assert line in capsys.readouterr().out

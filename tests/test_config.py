"""Config files become dataclasses, or one line that names the key, the value and what would do."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from hope_jax import config
from hope_jax.config import ConfigError

SMALL = """
model:
  mixer: {kind: attention, heads: 2, window: 32}
  continuum:
    levels:
      - {hidden: 32}
      - {hidden: 16, gated: true}
  width: 16
  layers: 1
data:
  source: {kind: text, train: corpus.txt}
  window: 32
  batch: 8
optimizer:
  learning_rate: 1e-3
training: {steps: 10}
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_a_file_gives_an_experiment_with_the_defaults_of_the_classes(small):
    experiment = config.load(small)
    assert experiment.name == "small"
    assert experiment.model.mixer.heads == 2
    assert experiment.optimizer.learning_rate == 0.001
    assert experiment.training.log_every == type(experiment.training)().log_every
    assert experiment.folder == Path("runs/small")


def test_the_vocabulary_comes_from_the_tokenizer(small):
    assert config.load(small).model.vocabulary == 257
    wider = config.load(small, ["model.vocabulary=320"])
    assert wider.model.vocabulary == 320
    pieces = ["data.tokenizer={kind: sentencepiece, vocabulary: 1000}"]
    assert config.load(small, pieces).model.vocabulary == 1000


def test_overrides_reach_into_mappings_and_lists(small):
    overrides = [
        "model.continuum.levels.1.hidden=48",
        "optimizer.schedule.kind=wsd",
        "training={steps: 7, keep: 3}",
        "model.mixer.kind=attention",
        "training.wandb=no",
        "name=other",
        "optimizer.clip=null",
    ]
    experiment = config.load(small, overrides)
    assert [level.hidden for level in experiment.model.continuum.levels] == [32, 48]
    assert experiment.optimizer.schedule.kind == "wsd"
    assert (experiment.training.steps, experiment.training.keep) == (7, 3)
    assert experiment.training.wandb == "no", "no is a word, not false"
    assert experiment.optimizer.clip is None
    assert experiment.name == "other"


def test_a_written_experiment_is_read_back_equal(small, tmp_path):
    experiment = config.load(small, ["training.prompt='1e5'", "optimizer.learning_rate=3e-4"])
    config.dump(experiment, tmp_path / "written.yaml")
    assert config.load(tmp_path / "written.yaml") == experiment


def test_layers_with_an_objective_of_their_own_take_whole_batches(small):
    assert config.load(small, ["model.objective=l2"]).model.objective == "l2"
    with pytest.raises(ConfigError, match=r"accumulate must be 1 .*model.objective=l2, got 2"):
        config.load(small, ["model.objective=l2", "training.accumulate=2"])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.widht=3", "model.widht=3 is no setting; did you mean width? choices: mixer,"),
        ("modle.width=3", "modle={width: 3} is no setting; did you mean model? choices: model,"),
        ("model.width=big", "model.width=big must be a whole number"),
        ("model.width=1.5", "model.width=1.5 must be a whole number"),
        ("model.width=true", "model.width=true must be a whole number"),
        ("optimizer.clip=high", "optimizer.clip=high must be a number or null"),
        ("data.isolate_documents=maybe", "data.isolate_documents=maybe must be true or false"),
        ("model.dtype=float16", "model.dtype=float16 is no choice; did you mean bfloat16?"),
        ("model.mixer.kind=atention", "model.mixer.kind=atention is no choice; did you mean atten"),
        ("model.mixer={heads: 2}", "model.mixer.kind is missing; choices: self_modifying_titans"),
        ("model.mixer=attention", "model.mixer=attention must be a mapping of settings"),
        (
            "model.mixer.rule=oja",
            "model.mixer.rule=oja is a setting of kind associative, not of attention: replace the "
            "whole section, as in model.mixer='{kind: attention}'",
        ),
        (
            "model.mixer.kind=associative",
            "model.mixer.window=32 is a setting of kind attention, not of associative: replace the "
            "whole section, as in model.mixer='{kind: associative}'",
        ),
        ("model.continuum.levels.2.hidden=1", "2 must be an index below 2, the length of the list"),
        ("model.continuum.levels.a.hidden=1", "a must be an index below 2, the length of the list"),
        ("model.continuum.levels.0.hiden=1", "model.continuum.levels.0.hiden=1 is no setting; did"),
        ("data.split.3.by=x", "there is no list to index; give the whole list"),
        ("training.steps=0", "training: steps must be at least 1, got 0"),
        ("training.steps.more=0", "'training.steps.more=0': 10 has no setting more"),
        ("training.accumulate=3", "training.accumulate must divide data.batch=8, got 3"),
        ("model.vocabulary=100", "model.vocabulary must be at least 257, which the tokenizer has"),
        ("model.mixer.heads=3", "heads must divide width=16"),
        ("name=a/b", "name must be that of a folder, without slashes, got 'a/b'"),
        ("model.width", "override 'model.width' must have the form dotted.key=value"),
        ("=3", "override '=3' must have the form dotted.key=value"),
        ("model.width=[1", "override 'model.width=[1' is no YAML: "),
        ("data.source={kind: text}", "data.source.train is missing"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(small, override, says):
    with pytest.raises(ConfigError) as error:
        config.load(small, [override])
    assert says in str(error.value)
    assert str(error.value).startswith(f"{small}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must be a mapping of settings, got null"),
        ("- a", "must be a mapping of settings, got [a]"),
        ("model: {a: 1", "is no YAML: expected ',' or '}', but got '<stream end>' (line 1"),
        ("seed: 1\nseed: 2", "is no YAML: key seed stands twice (line 2, column 1)"),
        ("seed: 1", "model is missing"),
        ("model: {width: 3}", "model.mixer is missing"),
    ],
)
def test_a_file_that_is_none_is_named_in_one_line(tmp_path, text, says):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        config.load(path)
    assert str(error.value).startswith(f"{path}: {says}")
    assert "\n" not in str(error.value)


def test_a_missing_file_comes_with_the_nearest_that_is_there(small):
    with pytest.raises(ConfigError, match=r"smal\.yaml: there is no such file; did you mean .*sma"):
        config.load(small.with_name("smal.yaml"))


@dataclass(frozen=True, kw_only=True)
class Square:
    kind: Literal["square"] = "square"
    side: float = 1.0
    colour: str = "red"


@dataclass(frozen=True, kw_only=True)
class Circle:
    kind: Literal["circle", "disc"] = "circle"
    radius: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Drawing:
    shape: Square | Circle = field(default_factory=lambda: Square(side=5.0, colour="blue"))
    more: tuple[Square | Circle, ...] = ()
    paths: str | tuple[str, ...] = ()
    frame: Square | None = None


def test_a_mapping_is_laid_over_the_default_of_its_field():
    assert config.parse(Drawing, {"shape": {"side": 2}}).shape == Square(side=2.0, colour="blue")
    fresh = config.parse(Drawing, {"shape": {"kind": "circle"}})
    assert fresh.shape == Circle(), "the default of another class says nothing"
    assert config.parse(Drawing, None) == Drawing(), "a section may be left empty"


def test_unions_lists_and_whole_numbers_for_floats():
    value = {"more": [{"kind": "disc", "radius": 2}, {"kind": "square"}], "frame": {"side": 3}}
    drawing = config.parse(Drawing, value | {"paths": ["a", "b"]})
    assert drawing.more == (Circle(kind="disc", radius=2.0), Square())
    assert isinstance(drawing.more[0].radius, float)
    assert drawing.frame == Square(side=3.0)
    assert drawing.paths == ("a", "b")
    assert config.parse(Drawing, {"paths": "a"}).paths == "a"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (
            {"more": [{"kind": "disc"}, {"kind": "cube"}]},
            "more.1.kind=cube is no choice; choices: ",
        ),
        ({"more": [{"side": 3}]}, "more.0.kind is missing; choices: square, circle, disc"),
        ({"more": {"kind": "disc"}}, "more={kind: disc} must be a list of"),
        ({"paths": [1]}, "paths.0=1 must be text"),
        ({"frame": 3}, "frame=3 must be a mapping of settings"),
    ],
)
def test_what_is_wrong_inside_a_list_is_found(value, says):
    with pytest.raises(ConfigError) as error:
        config.parse(Drawing, value)
    assert str(error.value).startswith(says)


@pytest.fixture
def begun(small, tmp_path):
    """A run that has a checkpoint."""
    experiment = config.load(small, [f"training.folder={tmp_path}/runs"])
    folder = config.claim(experiment)
    (folder / "checkpoints" / "5").mkdir(parents=True)
    return experiment


def test_a_run_goes_on_with_its_settings_and_no_others(begun):
    assert config.claim(begun) == begun.folder
    other = replace(begun, seed=3, model=replace(begun.model, width=32))
    with pytest.raises(ConfigError) as error:
        config.claim(other)
    assert "was trained with model.width=16 (now 32), seed=0 (now 3)" in str(error.value)
    assert "name=..." in str(error.value)
    assert config.load(begun.folder / "config.yaml") == begun, "nothing is overwritten"


def test_a_run_may_be_made_longer_or_moved_to_another_mesh(begun):
    longer = replace(begun, training=replace(begun.training, steps=20, keep=5))
    moved = replace(longer, mesh=replace(begun.mesh, data=1, fsdp=-1))
    config.claim(moved)
    assert config.load(begun.folder / "config.yaml") == moved


def test_a_run_without_a_checkpoint_may_change(begun):
    (begun.folder / "checkpoints" / "5").rmdir()
    config.claim(replace(begun, seed=3))
    assert config.load(begun.folder / "config.yaml").seed == 3


def test_every_setting_is_listed_with_its_choices_and_default():
    listed = dict(line.split(": ", 1) for line in config.settings(config.Experiment))
    assert listed["seed"] == "a whole number = 0"
    assert listed["model.dtype"].startswith("float32 or bfloat16 = float32")
    assert listed["model.mixer[attention].heads"].startswith("a whole number")
    assert listed["model.continuum.levels.0.hidden"].startswith("a whole number")
    assert listed["training.prompt"] == "text or null = null"

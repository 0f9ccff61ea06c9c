"""Every config of the project loads, and is as large as its name says."""

from pathlib import Path

import pytest

from hope_jax import config
from hope_jax.comparison.compare import load
from hope_jax.suites.classes import load as load_continual
from hope_jax.suites.suite import load as load_suite

ALL = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
COMPARISONS = [path for path in ALL if path.stem.startswith("compare_")]
SUITES = [path for path in ALL if path.stem.startswith("suite_")]
CONTINUAL = [path for path in ALL if path.stem.startswith("continual_")]
CONFIGS = [path for path in ALL if path not in (*COMPARISONS, *SUITES, *CONTINUAL)]
NOMINAL = {"150m": 150e6, "380m": 380e6, "760m": 760e6, "1.3b": 1.3e9}
FAMILIES = ["fastkv_hope", "gated_deltanet", "hope", "hope_attention", "titans", "transformer"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_says_what_it_is(path, tmp_path):
    experiment = config.load(path)
    config.dump(experiment, tmp_path / "written.yaml")
    assert config.load(tmp_path / "written.yaml") == experiment
    assert path.read_text("utf-8").startswith("# "), "its head says what it trains, what to expect"
    assert experiment.model.vocabulary == experiment.data.vocabulary


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_a_comparison_loads_and_says_what_it_is(path):
    comparison = load(str(path))
    assert path.read_text("utf-8").startswith("# ")
    assert len(comparison.seeds) >= 3
    assert len(comparison.rates) >= 5


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_a_suite_loads_and_says_what_it_is(path):
    suite = load_suite(str(path))
    assert path.read_text("utf-8").startswith("# ")
    assert len(suite.models) > 1


@pytest.mark.parametrize("path", CONTINUAL, ids=lambda path: path.stem)
def test_continual_learning_loads_and_says_what_it_is(path):
    settings = load_continual(str(path))
    assert path.read_text("utf-8").startswith("# ")
    assert len(settings.seeds) >= 3


@pytest.mark.parametrize("size", NOMINAL)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_has_the_size_of_its_name(family, size):
    path = Path(__file__).parent.parent / "configs" / f"{family}_{size}.yaml"
    count = config.load(path).model.parameters()
    print(f"{path.stem}: {count:,} parameters")
    assert count == pytest.approx(NOMINAL[size], rel=0.03)

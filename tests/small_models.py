"""One small configuration of every model, for the tests that hold for all of them."""

from dataclasses import replace

from hope_jax.models.decoder import ModelConfig
from hope_jax.modules.attention import AttentionConfig
from hope_jax.modules.continuum import ContinuumConfig, LevelConfig
from hope_jax.modules.memory import AssociativeConfig
from hope_jax.modules.self_reference import SelfModifyingTitansConfig
from hope_jax.modules.titans import TitansConfig

VOCABULARY = 31

CONTINUUM = ContinuumConfig(levels=(LevelConfig(hidden=24), LevelConfig(hidden=16)))
INDEPENDENT = replace(CONTINUUM, variant="independent")
IN_CONTEXT = ContinuumConfig(
    levels=(LevelConfig(hidden=12, chunk=4, momentum=0.5), LevelConfig(hidden=16))
)
SWIGLU = ContinuumConfig(levels=(LevelConfig(hidden=24, gated=True),))


def _model(mixer, continuum=SWIGLU, **options):
    return ModelConfig(
        mixer=mixer, continuum=continuum, width=16, layers=2, vocabulary=VOCABULARY, **options
    )


def _hope(**options):
    sizes = {"heads": 2, "chunk_memory": 4, "chunk_projections": 8}
    return SelfModifyingTitansConfig(**(sizes | options))


MODELS = {
    "hope": _model(_hope(), CONTINUUM),
    "hope_mlp": _model(_hope(memory="mlp", momentum=True, frozen=()), CONTINUUM),
    "hope_l2_current": _model(_hope(objective="l2", read="current"), INDEPENDENT, tie=False),
    "hope_attention": _model(AttentionConfig(heads=2, window=11), CONTINUUM),
    "transformer": _model(AttentionConfig(heads=4, groups=2, window=64)),
    "titans": _model(TitansConfig(heads=2, chunk=4)),
    "gated_deltanet": _model(AssociativeConfig(heads=2, rule="gated_delta", chunk=4)),
    "fastkv_hope": _model(
        AssociativeConfig(heads=2, rule="hebbian", feature_map="elu", normalizer=True, chunk=4),
        CONTINUUM,
    ),
    "attention_in_context": _model(AttentionConfig(heads=2, window=11), IN_CONTEXT),
}

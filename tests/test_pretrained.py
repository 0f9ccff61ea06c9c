"""Published Llamas: what transformers computes with them, levels made of them, and the way back."""

import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from llama_fixtures import FOLDER, LLAMAS, TOKENS, build, logits
from safetensors.numpy import load_file, save_file
from small_models import MODELS

from hope_jax import __main__ as command_line
from hope_jax import config, exchange, runs, sharding
from hope_jax.data.tokenizer import SentencePieceConfig
from hope_jax.models import pretrained
from hope_jax.models.pretrained import Stacking
from hope_jax.modules.attention import LinearScaling, Llama3Scaling

ROOT = Path(__file__).parents[1]
ONE = Stacking()
STACKINGS = [
    Stacking(levels=3, split="copies"),
    Stacking(levels=2, split="depth"),
    Stacking(levels=4, split="units"),
]


def load(folder, stacking=ONE):
    """Reads a model that computes in float32."""
    described = replace(pretrained.describe(folder, stacking), dtype="float32")
    return pretrained.load(folder, described, stacking.split)


def answer(model, tokens):
    graphdef, params = nnx.split(model, nnx.Param)
    tokens = jnp.asarray(tokens, jnp.int32)
    return jax.jit(lambda params: nnx.merge(graphdef, params)(tokens)[0])(params)


def leaves(model):
    return pretrained._leaves(nnx.to_pure_dict(nnx.split(model, nnx.Param)[1]))


def tensors(folder):
    """All published tensors of a folder, as bytes with their type and shape."""
    files = [path for path in folder.glob("*.safetensors") if path.name != "expected.safetensors"]
    found = {name: x for path in files for name, x in load_file(path).items()}
    return {name: (x.dtype, x.shape, x.tobytes()) for name, x in found.items()}


@pytest.fixture
def llama(tmp_path):
    """A copy of a published Llama, to be damaged."""
    return Path(shutil.copytree(FOLDER / "llama3", tmp_path / "llama"))


def edit(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("name", LLAMAS)
def test_logits_are_those_of_transformers(name):
    expected = load_file(FOLDER / name / "expected.safetensors")
    assert expected["tokens"].shape == (1, TOKENS)
    found = answer(load(FOLDER / name), expected["tokens"])
    np.testing.assert_allclose(found, expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("stacking", STACKINGS, ids=lambda s: s.split)
def test_levels_made_of_a_network_say_what_it_said(stacking):
    tokens = load_file(FOLDER / "llama3" / "expected.safetensors")["tokens"]
    whole = answer(load(FOLDER / "llama3"), tokens)
    model = load(FOLDER / "llama3", stacking)
    found = answer(model, tokens)
    assert len(model.config.continuum.levels) == stacking.levels
    if stacking.split == "units":
        np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5)
    else:
        np.testing.assert_array_equal(found, whole)


def test_depth_and_copies_put_the_network_where_they_say():
    def speaking(stacking):
        model = leaves(load(FOLDER / "llama3", stacking))
        down = [model[f"blocks.continuum.levels.{i}.down"] for i in range(stacking.levels)]
        return np.stack([np.any(x != 0, axis=(1, 2)) for x in down]).tolist()

    assert speaking(Stacking(levels=3)) == [[False] * 2, [False] * 2, [True] * 2]
    assert speaking(Stacking(levels=2, split="depth")) == [[True, False], [False, True]]


@pytest.mark.parametrize("stacking", [ONE, *STACKINGS], ids=lambda s: f"{s.levels}-{s.split}")
@pytest.mark.parametrize("name", LLAMAS)
def test_there_and_back_is_the_same_bit_for_bit(name, stacking, tmp_path):
    model = load(FOLDER / name, stacking)
    pretrained.save(model, tmp_path / "out", dtype=LLAMAS[name]["dtype"], bos=1)
    assert tensors(tmp_path / "out") == tensors(FOLDER / name)
    again = pretrained.describe(tmp_path / "out", stacking)
    assert again == pretrained.describe(FOLDER / name, stacking)


def test_large_models_are_cut_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "SHARD_BYTES", 20_000)
    pretrained.save(load(FOLDER / "tied"), tmp_path / "out", dtype="bfloat16")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {
        path.name for path in (tmp_path / "out").glob("*.safetensors")
    }
    assert len(set(index["weight_map"].values())) > 1
    assert tensors(tmp_path / "out") == tensors(FOLDER / "tied")


def test_independent_levels_that_learned_come_out_as_one_network(tmp_path):
    model = load(FOLDER / "llama3", Stacking(levels=2, split="units"))
    continuum = model.blocks.continuum
    continuum.mixture[...] = continuum.mixture[...].at[:, 0].add(0.7)
    continuum.levels[1].norm.scale[...] = continuum.levels[1].norm.scale[...] * 1.5
    tokens = load_file(FOLDER / "llama3" / "expected.safetensors")["tokens"]
    pretrained.save(model, tmp_path / "out", dtype="float32")
    found = answer(load(tmp_path / "out"), tokens)
    np.testing.assert_allclose(found, answer(model, tokens), rtol=0, atol=1e-5)
    assert np.abs(found - answer(load(FOLDER / "llama3"), tokens)).max() > 0.1


def test_a_transformer_of_our_own_is_a_llama(tmp_path):
    model = MODELS["transformer"].build(seed=3)
    pretrained.save(model, tmp_path / "out", dtype="float32", bos=30)
    again = load(tmp_path / "out")
    assert again.config == model.config
    for name, x in leaves(model).items():
        np.testing.assert_array_equal(leaves(again)[name], x)


def test_a_chain_of_unequal_levels_has_the_size_of_the_one_that_speaks(tmp_path):
    small = MODELS["transformer"]
    (level,) = small.continuum.levels
    levels = (replace(level, hidden=8), level)
    model = replace(small, continuum=replace(small.continuum, levels=levels)).build()
    down = model.blocks.continuum.levels[0].down
    down[...] = 0 * down[...]
    pretrained.save(model, tmp_path / "out", dtype="float32")
    assert load(tmp_path / "out").config == small


def test_a_mesh_holds_its_parts_of_the_same_model():
    alone = leaves(load(FOLDER / "llama3", STACKINGS[2]))
    with sharding.use(sharding.MeshConfig(data=1, fsdp=4, tensor=2).build()):
        spread = leaves(load(FOLDER / "llama3", STACKINGS[2]))
    for name, x in spread.items():
        np.testing.assert_array_equal(x, alone[name])
    shards = spread["blocks.continuum.levels.3.down"].addressable_shards
    assert {shard.data.shape for shard in shards} == {(2, 5, 8)}


def test_what_a_llama_has_not_begins_as_in_a_fresh_model():
    described = pretrained.describe(FOLDER / "llama3", Stacking(levels=2))
    fast, slow = described.continuum.levels
    continuum = replace(described.continuum, levels=(replace(fast, chunk=4), slow))
    described = replace(described, continuum=continuum)
    found = leaves(pretrained.load(FOLDER / "llama3", described, "copies", seed=5))
    fresh = leaves(described.build(seed=5))
    own = {name for name in fresh if name not in pretrained._rows(described, "copies")}
    assert own
    for name in own:
        np.testing.assert_array_equal(found[name], fresh[name])


def test_both_spellings_of_a_rotary_embedding_are_read(llama):
    settings = json.loads((llama / "config.json").read_text())
    rope = settings.pop("rope_parameters")
    described = pretrained.describe(llama, Stacking())
    assert described.mixer.rotary_scaling == Llama3Scaling(original_window=32)
    settings["rope_theta"], rope["type"] = rope.pop("rope_theta"), rope.pop("rope_type")
    (llama / "config.json").write_text(json.dumps(settings | {"rope_scaling": rope}))
    assert pretrained.describe(llama, Stacking()) == described
    edit(llama, rope_scaling={"type": "linear", "factor": 2})
    assert pretrained.describe(llama, Stacking()).mixer.rotary_scaling == LinearScaling(factor=2.0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model_type": "mistral"}, "model_type must be llama, got 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
        ({"attention_bias": True}, "attention_bias must be False, got True: projections have no"),
        ({"mlp_bias": True}, "mlp_bias must be False, got True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be None"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "the rope type 'yarn' is not"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "factor must be a number, got None"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
        ({"num_attention_heads": 0}, "heads and window must be at least 1, got 0"),
        ({"hidden_size": "32"}, "hidden_size must be a whole number, got '32'"),
        ({"num_key_value_heads": 3}, "groups must divide heads=4, got 3"),
        ({"intermediate_size": 48}, "mlp.gate_proj.weight must be (48, 32), got (40, 32)"),
        ({"num_hidden_layers": 3}, "tensor model.layers.2.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 1}, "is none of the model that config.json describes"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)
def test_other_models_are_refused_with_the_reason(llama, settings, says):
    edit(llama, **settings)
    with pytest.raises(ValueError) as error:  # noqa: PT011  what it says is looked at below
        load(llama)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_not_as_they_should_be_are_refused(llama):
    def refused(says):
        with pytest.raises((ValueError, OSError)) as error:
            load(llama)
        assert says in str(error.value)

    for stacking, says in [
        (Stacking(levels=3, split="units"), "levels must divide the 40 hidden units, got 3"),
        (Stacking(levels=3, split="depth"), "levels must be at most the 2 blocks, got 3"),
    ]:
        with pytest.raises(ValueError, match=says):
            load(llama, stacking)
    shard = next(llama.glob("model-00002*"))
    save_file({name: x.astype(np.int32) for name, x in load_file(shard).items()}, shard)
    refused("must be F32, BF16 or F16, got I32")
    shard.write_bytes(shard.read_bytes()[:-8])
    refused(f"{shard.name} is damaged")
    shard.unlink()
    refused(shard.name)
    index = llama / "model.safetensors.index.json"
    index.write_text("[]")
    refused(f"{index.name} must hold a mapping")
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    refused("must name files of its folder, got '../model.safetensors'")
    index.unlink()
    (llama / "pytorch_model.bin").touch()
    refused("weights in pickle files can run code and are never read")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("titans", "a Llama's mixer must be attention, that of this model is titans"),
        ("hope_attention", "level 0 of a Llama must have gated=True, got False"),
    ],
)
def test_what_is_no_llama_is_not_published(model, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        pretrained.save(MODELS[model].build(), tmp_path / "out", dtype="float32")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"objective": "next_token"},
            "the continuum of a Llama must have objective=local",
        ),
        ({"variant": "headwise"}, "a Llama's levels are no headwise continuum"),
    ],
)
def test_a_continuum_of_another_kind_is_not_published(changes, says, tmp_path):
    small = MODELS["transformer"]
    model = replace(small, continuum=replace(small.continuum, **changes)).build()
    with pytest.raises(ValueError, match=says):
        pretrained.save(model, tmp_path / "out", dtype="float32")


def test_levels_that_are_no_single_network_are_not_published(tmp_path):
    model = load(FOLDER / "float32", Stacking(levels=3, split="copies"))
    down = model.blocks.continuum.levels[0].down
    down[...] = down[...].at[1, 0, 0].set(1.0)
    with pytest.raises(ValueError, match=r"levels \[0, 2\] of block 1 all say something"):
        pretrained.save(model, tmp_path / "out", dtype="float32")
    model = load(FOLDER / "float32")
    model.norm.scale[...] = model.norm.scale[...].at[0].set(1e6)
    with pytest.raises(ValueError, match=r"model.norm.weight has numbers .* float16"):
        pretrained.save(model, tmp_path / "out", dtype="float16")
    assert not [*tmp_path.iterdir()]
    (tmp_path / "note").touch()
    with pytest.raises(ValueError, match="must be empty or missing"):
        pretrained.save(model, tmp_path, dtype="float32")


@pytest.fixture
def published(tmp_path):
    """A Llama with a tokenizer, beside the corpus that it was learned from."""
    text = "".join(f"{i} times {i} is {i * i}.\n\n" for i in range(300))
    (tmp_path / "corpus.txt").write_text(text)
    tokenizer = SentencePieceConfig(vocabulary=280).build([text])
    model = replace(MODELS["transformer"], vocabulary=288).build(seed=1)
    pretrained.save(model, tmp_path / "llama", dtype="bfloat16", bos=tokenizer.bos)
    tokenizer.save(tmp_path / "tokenizer")
    shutil.copy(tmp_path / "tokenizer" / "tokenizer.model", tmp_path / "llama")
    return tmp_path / "llama"


def test_an_imported_run_is_evaluated_trained_and_published(published, tmp_path, capsys):
    run = tmp_path / "runs" / "mine"
    settings = ["levels=2", "data.window=16", "data.batch=8", "model.dtype=float32"]
    assert command_line.main(["import", str(published), str(run), *settings]) == 0
    assert "levels: 2" in capsys.readouterr().out
    assert command_line.main(["import", str(published), str(run)]) == 2
    assert "must not hold a run" in capsys.readouterr().err
    out = str(tmp_path / "same")
    assert command_line.main(["export", str(run), out, "dtype=bfloat16"]) == 0
    assert tensors(tmp_path / "same") == tensors(published)
    assert {path.name for path in published.iterdir()} == {
        path.name for path in (tmp_path / "same").iterdir()
    }
    file = tmp_path / "corpus.txt"
    runpy.run_path(str(ROOT / "eval.py"))["main"](str(run), "perplexity", f"file={file}")
    assert "perplexity of" in capsys.readouterr().out

    train = runpy.run_path(str(ROOT / "train.py"))["main"]
    path, source = str(run / "config.yaml"), f"{{kind: text, train: {file}, document: blank_line}}"
    chosen = [f"data.source={source}", f"data.cache={tmp_path}/cache", "training.sample_tokens=0"]
    with pytest.raises(config.ConfigError, match=r"was imported with model.tie=true \(now false\)"):
        train(path, "model.tie=false")
    # A learning rate of zero, so that one sees what training began with.
    train(path, *chosen, "training.steps=1", "optimizer.learning_rate=0.0")
    assert "begins with the parameters it was given" in capsys.readouterr().err
    found = runs.find(run)
    with sharding.use(runs.mesh(found.experiment)):
        model, checkpoint = runs.load(found)
    assert checkpoint.name == "1"
    for name, x in leaves(load(published, Stacking(levels=2))).items():
        np.testing.assert_array_equal(leaves(model)[name], x)


def test_byte_pairs_come_along(published, tmp_path):
    (published / "tokenizer.model").unlink()
    shutil.copy(FOLDER / "tokenizers" / "gpt2.json", published / "tokenizer.json")
    with pytest.raises(config.ConfigError, match=r"model\.vocabulary must be at least 340"):
        exchange.bring_in(published, tmp_path / "run", [])
    model = replace(MODELS["transformer"], vocabulary=400).build(seed=1)
    pretrained.save(model, tmp_path / "larger", dtype="float32", bos=1)
    shutil.copy(published / "tokenizer.json", tmp_path / "larger")
    exchange.bring_in(tmp_path / "larger", tmp_path / "run", [])
    exchange.bring_out(tmp_path / "run", tmp_path / "out", [])
    for path in (tmp_path / "larger").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    edit(tmp_path / "larger", bos_token_id=None)
    with pytest.raises(config.ConfigError, match="bos must be a special token"):
        exchange.bring_in(tmp_path / "larger", tmp_path / "again", [])


def test_what_an_import_lacks_is_said_in_a_line(published, tmp_path):
    for settings, says in [
        (["split=width"], "split=width is no choice"),
        (["model.widht=3"], "model.widht=3 is no setting"),
        (["name=other"], "name and training.folder must be those of"),
        (["model.mixer={kind: titans, heads: 2}"], "must have a parameter"),
    ]:
        with pytest.raises(config.ConfigError, match=says):
            exchange.bring_in(published, tmp_path / "run", settings)
    (published / "tokenizer.model").unlink()
    with pytest.raises(config.ConfigError, match=r"there is neither a tokenizer\.model nor"):
        exchange.bring_in(published, tmp_path / "run", [])
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LLAMAS)
def test_transformers_agrees_with_what_is_read_and_written(name, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    tokens = np.random.default_rng(7).integers(0, 64, (2, TOKENS))
    build(name, seed=11).save_pretrained(tmp_path / "theirs")
    model = load(tmp_path / "theirs", Stacking(levels=2, split="units"))
    found = answer(model, tokens)
    np.testing.assert_allclose(found, logits(tmp_path / "theirs", tokens), rtol=0, atol=1e-4)
    pretrained.save(model, tmp_path / "ours", dtype="float32", bos=1)
    np.testing.assert_allclose(found, logits(tmp_path / "ours", tokens), rtol=0, atol=1e-4)

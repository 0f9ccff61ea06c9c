"""What a model learned while it read: exact in any split, saved, merged, or forgotten."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import MODELS, VOCABULARY

import hope_jax
from hope_jax.models.adapt import (
    Reading,
    consolidate,
    freeze,
    fresh,
    learn,
    norms,
    read,
    repeat,
    reset,
    settle,
)
from hope_jax.models.memory_file import load_memory, save_memory
from hope_jax.modules.continuum import ContinuumConfig, LevelConfig

close = partial(chex.assert_trees_all_close, rtol=2e-4, atol=2e-5)
IN_CONTEXT = ContinuumConfig(
    levels=(LevelConfig(hidden=12, chunk=4, momentum=0.5), LevelConfig(hidden=8, chunk=8)),
    adapt="all",
)
LOCAL = replace(MODELS["attention_in_context"], continuum=IN_CONTEXT, layers=1)
NEXT = replace(
    LOCAL,
    continuum=ContinuumConfig(
        levels=(
            LevelConfig(hidden=12, chunk=4, rate=1.0, momentum=0.5),
            LevelConfig(hidden=8),
            LevelConfig(hidden=8, chunk=8, rate=1.0),
        ),
        objective="next_token",
        adapt="all",
    ),
)
TIME = 21


def text(seed=0, rows=2, time=TIME):
    return np.random.default_rng(seed).integers(0, VOCABULARY, (rows, time)).astype(np.int32)


@pytest.fixture(scope="module")
def local():
    return LOCAL.build(seed=1)


@pytest.fixture(scope="module")
def foretelling():
    return NEXT.build(seed=1)


def deltas(memory):
    tower = memory.memory if isinstance(memory, Reading) else memory
    return [None if level is None else level.fast.delta for level in tower.continuum]


def test_reading_is_calling_the_model(local):
    tokens = text()
    memory = read(local, tokens[:, :9], chunk=4)
    close(read(local, tokens[:, 9:], memory), local(jnp.asarray(tokens))[1])


def test_any_split_learns_and_scores_the_same(foretelling):
    tokens = text()
    whole, end = learn(foretelling, tokens)
    for parts in ((5, 3, 13), (1, 1, 19)):
        reading, pieces, at = None, [], 0
        for part in parts:
            losses, reading = learn(foretelling, tokens[:, at : at + part], reading)
            pieces.append(losses)
            at += part
        close(np.concatenate(pieces, 1), whole)
        close(reading, end)
    close(settle(foretelling, reading), settle(foretelling, end))


def test_scores_before_and_at_a_token_do_not_see_it(foretelling):
    tokens = text(rows=1)
    whole, _ = learn(foretelling, tokens)
    for t in (3, 4, 7, 12):
        changed = tokens.copy()
        changed[:, t + 1 :] = (changed[:, t + 1 :] + 1) % VOCABULARY
        losses, _ = learn(foretelling, changed)
        np.testing.assert_array_equal(losses[:, : t + 1], whole[:, : t + 1])
        other = tokens.copy()
        other[:, t] = (other[:, t] + 1) % VOCABULARY
        losses, _ = learn(foretelling, other)
        np.testing.assert_array_equal(losses[:, :t], whole[:, :t])
        if t < 12:
            assert np.abs(losses[:, t + 1 :] - whole[:, t + 1 :]).max() > 0


def test_rows_do_not_teach_each_other(foretelling):
    tokens = text()
    whole, _ = learn(foretelling, tokens)
    tokens[0] = (tokens[0] + 1) % VOCABULARY
    other, _ = learn(foretelling, tokens)
    np.testing.assert_allclose(other[1], whole[1], rtol=1e-6, atol=1e-6)
    assert np.abs(other[0] - whole[0]).max() > 0


def test_a_move_is_the_mean_gradient_of_the_chunk(foretelling):
    """Written again with `jax.grad` of the plain model by its parameters."""
    from flax import nnx

    tokens = text(rows=1)
    _, reading = learn(foretelling, tokens[:, :8])
    graph, params = nnx.split(foretelling, nnx.Param)
    params = nnx.to_pure_dict(params)

    def loss(down, first, last):
        levels = params["blocks"]["continuum"]["levels"]
        levels = levels | {2: levels[2] | {"down": levels[2]["down"] + down}}
        own = params | {"blocks": params["blocks"] | {"continuum": {"levels": levels}}}
        memory = read(foretelling, tokens[:, :first]) if first else None
        tower = None if memory is None else settle(foretelling, memory)
        logits, _ = nnx.merge(graph, own)(jnp.asarray(tokens[:, first:last]), tower)
        said = jax.nn.log_softmax(logits[0, :-1])
        return -jnp.sum(said[jnp.arange(last - first - 1), tokens[0, first + 1 : last]])

    zero = jnp.zeros_like(params["blocks"]["continuum"]["levels"][2]["down"])
    total = jax.grad(loss)(zero, 0, 4) + jax.grad(loss)(zero, 4, 8)
    close(reading.memory.continuum[2].fast.delta[-1][:, 0, 0], -total / (1 + 6))


def test_levels_move_after_their_own_chunks_and_at_no_other_token(foretelling):
    tokens, reading = text(), None
    before = [np.zeros(()), None, np.zeros(())]
    for t in range(17):
        _, reading = learn(foretelling, tokens[:, [t]], reading)
        now = norms(reading)
        assert now.keys() == {0, 2}
        for level, chunk in ((0, 4), (2, 8)):
            assert np.any(now[level] != before[level]) == ((t + 1) % chunk == 0)
            before[level] = now[level]


def test_learning_a_text_again_makes_it_likelier(foretelling):
    tokens = np.tile(text(rows=1, time=16), (1, 12))
    losses, _ = learn(foretelling, tokens)
    held, _ = learn(freeze(foretelling, [0, 2]), tokens)
    assert losses[:, -16:].mean() < held[:, -16:].mean() - 0.1


def test_replayed_chunks_are_learned_again():
    replaying = replace(NEXT, continuum=replace(NEXT.continuum, replay=2, replay_steps=2))
    tokens = text(time=16)
    with_replay = learn(replaying.build(seed=1), tokens)[1]
    without = learn(NEXT.build(seed=1), tokens)[1]
    np.testing.assert_array_equal(with_replay.stored[1], tokens[:, 12:16])
    np.testing.assert_array_equal(with_replay.stored[0], tokens[:, 8:12])
    assert not np.allclose(norms(with_replay)[0], norms(without)[0], rtol=1e-3)
    nothing = replace(NEXT.continuum, replay=2, replay_ratio=0.0)
    same = learn(replace(NEXT, continuum=nothing).build(seed=1), tokens)[1]
    close(same.memory, without.memory)


def test_a_document_start_forgets_and_its_chunk_teaches_nothing(foretelling):
    tokens, starts = text(), np.zeros((2, TIME), bool)
    starts[0, 10] = True
    _, reading = learn(foretelling, tokens[:, :16], None, starts[:, :16])
    sizes = norms(reading)
    assert sizes[0][0, 0] < sizes[0][0, 1]
    alone, _ = learn(foretelling, tokens[:, :12], None, starts[:, :12])
    changed = tokens[:, :12].copy()
    changed[0, :10] = (changed[0, :10] + 1) % VOCABULARY
    other, _ = learn(foretelling, changed, None, starts[:, :12])
    np.testing.assert_array_equal(other[0, 11:], alone[0, 11:])


def test_merged_deltas_answer_as_before(local):
    tokens = jnp.asarray(text(rows=1))
    memory = read(local, tokens)
    more = jnp.asarray(text(1, rows=1, time=3))
    before, _ = local(more, memory)
    model, merged = consolidate(local, memory, [1])
    close(model(more, merged)[0], before)
    assert not np.any(norms(merged)[1])
    close(norms(merged)[0], norms(memory)[0])
    half, left = consolidate(local, memory, [0, 1], share=0.5)
    close(half(more, left)[0], before)
    close(norms(left)[1], norms(memory)[1] / 2)
    assert np.abs(model(tokens)[0] - local(tokens)[0]).max() > 1e-4


def test_one_level_forgets_and_the_others_stay(local):
    memory = read(local, text())
    emptied = reset(memory, [0])
    assert not np.any(norms(emptied)[0])
    np.testing.assert_array_equal(norms(emptied)[1], norms(memory)[1])
    np.testing.assert_array_equal(emptied.continuum[0].position, memory.continuum[0].position)


def test_a_frozen_level_is_its_slow_weights_exactly(local):
    tokens = jnp.asarray(text())
    frozen = freeze(local, [0, 1])
    still = replace(IN_CONTEXT, levels=tuple(replace(x, chunk=None) for x in IN_CONTEXT.levels))
    static = replace(LOCAL, continuum=still).build(seed=1)
    logits, memory = frozen(tokens)
    np.testing.assert_array_equal(logits, static(tokens)[0])
    assert memory.continuum == (None, None)
    assert np.any(local(tokens)[0] != logits)


@pytest.mark.parametrize("name", ["local", "foretelling"])
def test_a_saved_memory_is_the_memory(name, request, tmp_path):
    model = request.getfixturevalue(name)
    memory = hope_jax.read(model, text())
    save_memory(tmp_path / "m.safetensors", model, memory)
    again = load_memory(tmp_path / "m.safetensors", model)
    chex.assert_trees_all_equal(again, memory)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_memory_of_something_else_is_refused(local, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_memory(path, local, read(local, text()))
    with pytest.raises(ValueError, match="of another model"):
        load_memory(path, LOCAL.build(seed=2))
    with pytest.raises(ValueError, match="of another model"):
        load_memory(path, replace(LOCAL, norm_epsilon=1e-5).build(seed=1))
    monkeypatch.setattr("hope_jax.models.memory_file.VERSION", "2")
    with pytest.raises(ValueError, match="must be a memory of version 2, got 1"):
        load_memory(path, local)
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot be read"):
        load_memory(path, local)
    with pytest.raises(ValueError, match="cannot be read"):
        load_memory(tmp_path / "nowhere", local)


def test_one_memory_serves_several_rows(local):
    tokens = text(rows=1)
    memory = repeat(read(local, tokens), 2)
    chex.assert_trees_all_close(memory, read(local, np.repeat(tokens, 2, 0)), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="must be of 1 or 3 sequences, got 2"):
        repeat(memory, 3)


def test_what_cannot_be_is_refused(local, foretelling):
    with pytest.raises(ValueError, match="objective must be next_token, got local"):
        learn(local, text())
    with pytest.raises(ValueError, match=r"learn in context, \[0, 2\], got 1"):
        reset(fresh(foretelling, 1, reading=False), [1])
    with pytest.raises(ValueError, match=r"levels must lie in \[0, 2\), got 2"):
        freeze(local, [2])

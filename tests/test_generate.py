"""Generation says what repeated whole readings would say, row by row, compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import MODELS
from toy_model import Toy, toy

from hope_jax.models.generate import draw, generate, read, restrict

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11], [3, 3, 3, 3]]
KEYS = jax.random.split(jax.random.key(1), len(PROMPTS))


@jax.jit
def whole(params, tokens):
    model = nnx.merge(nnx.graphdef(toy()), params)
    return model(tokens[None])[0][0]


def greedy(model, prompt, count):
    """The argmax of a whole reading, again for every token; zeros behind it do not matter."""
    tokens = np.zeros(32, np.int32)
    tokens[: len(prompt)] = prompt
    for end in range(len(prompt), len(prompt) + count):
        tokens[end] = whole(nnx.state(model), tokens)[end - 1].argmax()
    return tokens[len(prompt) : end + 1].tolist()


def close(actual, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected
    )


def test_greedy_tokens_are_the_argmax_of_whole_readings():
    written = generate(toy(), PROMPTS, key=KEYS, max_tokens=9, temperature=0, chunk=2, block=4)
    assert written == [greedy(toy(), prompt, 9) for prompt in PROMPTS]


@pytest.mark.parametrize("name", ["hope", "hope_attention"])
def test_a_real_model_writes_the_argmax_of_whole_readings(name):
    # Rounding may not decide: the unembedding is as large as that of a trained model.
    model = MODELS[name].build(seed=3)
    model.embedding.table[...] *= 10
    prompts = [PROMPTS[0] * 2, PROMPTS[2]]
    written = generate(model, prompts, key=KEYS[:2], max_tokens=7, temperature=0, chunk=2, block=8)
    graphdef, params = nnx.split(model)

    @jax.jit
    def likeliest(tokens):
        return nnx.merge(graphdef, params)(tokens[None])[0][0].argmax(-1)

    for prompt, row in zip(prompts, written, strict=True):
        text = np.zeros(24, np.int32)
        text[: len(prompt) + len(row)] = prompt + row
        assert row == likeliest(text)[len(prompt) - 1 :][:7].tolist()


def test_a_row_says_in_a_batch_what_it_says_alone():
    options = {"max_tokens": 12, "temperature": 1.3, "top_k": 9, "top_p": 0.9, "stop": 5}
    together = generate(toy(), PROMPTS, key=KEYS, **options)
    alone = [
        generate(toy(), [prompt], key=KEYS[i : i + 1], **options)[0]
        for i, prompt in enumerate(PROMPTS)
    ]
    assert together == alone
    assert len(set(map(tuple, together))) == len(PROMPTS)


def test_one_key_gives_row_i_its_own():
    rows = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), np.arange(4))
    written = generate(toy(), [[1]] * 4, key=jax.random.key(3), max_tokens=8)
    assert written == generate(toy(), [[1]] * 4, key=rows, max_tokens=8)
    assert len(set(map(tuple, written))) == 4


@pytest.mark.parametrize(("chunk", "block"), [(1, 1), (3, 7), (5, 64), (128, 2)])
def test_chunks_and_blocks_change_nothing(chunk, block):
    prompts = [prompt + PROMPTS[0] + PROMPTS[0] for prompt in PROMPTS]
    options = {"key": KEYS, "max_tokens": 10, "stop": 2}
    assert generate(toy(), prompts, chunk=chunk, block=block, **options) == generate(
        toy(), prompts, **options
    )


def test_writing_goes_on_from_a_memory_and_leaves_it_untouched():
    text = np.array([PROMPTS[0], PROMPTS[0][::-1]])
    memory = read(toy(), text[:, :-1])
    before = jax.tree.map(np.array, memory)
    options = {"key": KEYS[:2], "max_tokens": 6, "temperature": 0}
    onwards = generate(toy(), text[:, -1:].tolist(), memory=memory, **options)
    assert onwards == generate(toy(), text.tolist(), **options)
    close(memory, before)


def until(row, stop):
    return row[: row.index(stop)] if stop in row else row


def test_a_stop_token_ends_its_own_row_and_is_not_returned():
    options = {"key": KEYS, "max_tokens": 30, "block": 8}
    free = generate(toy(), PROMPTS, **options)
    stop = free[2][4]
    stopped = generate(toy(), PROMPTS, stop=stop, **options)
    assert stopped == [until(row, stop) for row in free]
    assert len(stopped[2]) <= 4


def test_a_stop_token_in_a_prompt_ends_nothing():
    prompts = [[1, 2, 6, 4], [6]]
    free = generate(toy(), prompts, key=KEYS[:2], max_tokens=9)
    assert free[0][0] != 6
    stopped = generate(toy(), prompts, key=KEYS[:2], max_tokens=9, stop=6)
    assert stopped == [until(row, 6) for row in free]


@pytest.mark.parametrize("time", [1, 4, 9, 12])
@pytest.mark.parametrize("marked", [False, True])
def test_reading_in_chunks_is_reading_at_once(time, marked):
    tokens = np.random.default_rng(0).integers(0, 17, (3, time))
    starts = np.random.default_rng(1).random((3, time)) < 0.3 if marked else None
    _, expected = toy()(
        jnp.asarray(tokens), None, starts if starts is None else jnp.asarray(starts)
    )
    close(read(toy(), tokens, starts=starts, chunk=4), expected)
    middle = time // 2
    early, late = (None, None) if starts is None else (starts[:, :middle], starts[:, middle:])
    memory = read(toy(), tokens[:, :middle], starts=early, chunk=4)
    close(read(toy(), tokens[:, middle:], memory, late, chunk=4), expected)


def test_length_and_settings_compile_nothing_new():
    model = Toy()
    generate(model, [[1] * 9, [2] * 7], key=KEYS[:2], max_tokens=3, chunk=4, block=8)
    Toy.traces = 0
    generate(model, [[1] * 40, [2] * 30], key=KEYS[:2], max_tokens=300, chunk=4, block=8)
    options = {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "stop": 1}
    generate(Toy(seed=1), [[4], [5]], key=KEYS[:2], max_tokens=1, chunk=4, block=8, **options)
    assert Toy.traces == 0


def test_tokens_that_the_tokenizer_does_not_know_are_never_written():
    options = {"key": KEYS, "max_tokens": 40, "temperature": 3.0}
    assert max(max(row) for row in generate(toy(), PROMPTS, **options)) > 11
    written = generate(toy(), PROMPTS, vocabulary=12, **options)
    assert max(max(row) for row in written) < 12


def test_progress_is_told_chunk_by_chunk_and_block_by_block():
    seen = []

    def track(steps):
        seen.append(len(steps))
        return iter(steps)

    options = {"key": KEYS[:1], "max_tokens": 9, "chunk": 4, "block": 4}
    generate(toy(), [[1] * 14], track=track, **options)
    assert seen == [3, 3]


def test_done_rows_stop_the_device():
    prompts = [[1], [2]]
    written = generate(toy(), prompts, key=KEYS[:2], max_tokens=10**9, temperature=5.0, stop=9)
    assert all(len(row) < 10**4 for row in written)


def frequencies(logits, count=20_000, **options):
    keys = jax.random.split(jax.random.key(0), count)
    drawn = jax.jit(lambda logits: draw(logits, keys, **options))(jnp.tile(logits, (count, 1)))
    return np.bincount(drawn, minlength=len(logits)) / count


SHARES = np.array([0.1, 0.4, 0.05, 0.25, 0.2])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, SHARES),
        ({"temperature": 0.5}, SHARES**2 / (SHARES**2).sum()),
        ({"temperature": 0}, [0, 1, 0, 0, 0]),
        ({"top_k": 1}, [0, 1, 0, 0, 0]),
        ({"top_k": 3}, np.array([0, 0.4, 0, 0.25, 0.2]) / 0.85),
        ({"top_k": 99}, SHARES),
        ({"top_p": 0.39}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.41}, np.array([0, 0.4, 0, 0.25, 0]) / 0.65),
        ({"top_p": 0.86}, np.array([0.1, 0.4, 0, 0.25, 0.2]) / 0.95),
        # 0.4 of the 0.85 that the three likeliest hold is 0.47, so 0.6 asks for two of them.
        ({"top_k": 3, "top_p": 0.6}, np.array([0, 0.4, 0, 0.25, 0]) / 0.65),
        # The temperature comes first: squared shares are .01 .16 .0025 .0625 .04 of .275.
        ({"temperature": 0.5, "top_p": 0.58}, [0, 1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should_be(options, expected):
    np.testing.assert_allclose(frequencies(np.log(SHARES), **options), expected, atol=0.015)


@pytest.mark.parametrize(
    ("vocabulary", "top_k", "top_p", "kept"),
    [(7, 2, 1.0, 2), (7, 7, 1.0, 7), (7, 7, 0.5, 4), (4, 4, 0.5, 2), (4, 2, 0.5, 1)],
)
def test_equal_logits_keep_exactly_as_many_as_asked(vocabulary, top_k, top_p, kept):
    left = restrict(jnp.zeros((3, vocabulary)), top_k, top_p)
    np.testing.assert_array_equal(jnp.isfinite(left).sum(-1), kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "at least 1 prompt"),
        ({"prompts": [[1], []]}, "prompt 1 holds 0"),
        ({"prompts": [[1], [17]]}, r"\[0, 17\), prompt 1 holds 17"),
        ({"prompts": [[-1]]}, "prompt 0 holds -1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"chunk": 0}, "chunk"),
        ({"block": 0}, "block"),
    ],
)
def test_impossible_arguments_are_named(change, message):
    arguments = {"prompts": [[1]], "key": KEYS[:1], "max_tokens": 3} | change
    with pytest.raises(ValueError, match=message):
        generate(toy(), **arguments)

"""The lm-evaluation-harness asks a run, and gets what the model says."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_model import Toy, ToyConfig

from hope_jax.data.tokenizer import BytesConfig
from hope_jax.evaluation import Harness
from hope_jax.evaluation.subject import Subject, TaskError
from hope_jax.models.generate import generate

THERE = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not THERE, reason="lm_eval is not installed")
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
{more}
"""


def subject():
    model = Toy(ToyConfig(vocabulary=257))
    return Subject(model, BytesConfig().build(), lambda _: None, 8)


def model(batch=2):
    from hope_jax.evaluation.harness_model import HarnessModel

    return HarnessModel(subject(), batch)


def requests(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


def direct(context, text):
    """The log-likelihood of a text, byte by byte, and whether each byte is the likeliest."""
    tokens = [256, *(context + text).encode()]
    logits = subject().model(jnp.array([tokens[:-1]]))[0][0]
    said = np.asarray(jax.nn.log_softmax(logits))
    count = len(text.encode())
    places = np.arange(len(tokens) - 1)[-count:]
    targets = np.array(tokens[1:])[-count:]
    return said[places, targets].sum(), bool(np.all(said[places].argmax(-1) == targets))


@needs_harness
def test_likelihoods_are_those_of_the_text_behind_its_context():
    asked = [("one two", " three"), ("", "four"), ("x" * 90, " y"), ("é", "ñ"), ("a b", " c")]
    (likeliest,) = generate(
        subject().model,
        [[256, *b"go on"]],
        key=jax.random.key(0),
        max_tokens=1,
        temperature=0,
        vocabulary=128,
    )
    asked.append(("go on", chr(likeliest[0])))
    found = model().loglikelihood(requests(*asked))
    for one, (nats, greedy) in zip(asked, found, strict=True):
        expected = direct(*one)
        np.testing.assert_allclose(nats, expected[0], rtol=1e-4)
        assert greedy == expected[1]


@needs_harness
def test_a_space_at_the_end_of_a_context_is_scored():
    (found,) = model().loglikelihood(requests(("one ", "two")))
    np.testing.assert_allclose(found[0], direct("one", " two")[0], rtol=1e-4)


@needs_harness
def test_rolling_likelihoods_are_of_whole_texts():
    texts = ["a text of some words", "another, é", "long " * 30]
    found = model().loglikelihood_rolling(requests(*((text,) for text in texts)))
    np.testing.assert_allclose(found, [direct("", text)[0] for text in texts], rtol=1e-4)


@needs_harness
def test_generation_ends_where_it_should():
    plain = {"max_gen_toks": 12, "until": []}
    contexts = ["one", "two words", "three"]
    whole = model().generate_until(requests(*((text, plain) for text in contexts)))
    for context, text in zip(contexts, whole, strict=True):
        (tokens,) = generate(
            subject().model,
            [[256, *context.encode()]],
            key=jax.random.key(0),
            max_tokens=12,
            temperature=0,
            stop=256,
        )
        assert text == BytesConfig().build().decode(tokens)
    end = whole[0][3]
    (cut,) = model().generate_until(requests(("one", {**plain, "until": [end, "never"]})))
    assert cut == whole[0][: whole[0].index(end)]


def interrupt_after(count, monkeypatch):
    """Interrupts a model once after so many batches; returns the list of how many rows each had."""
    from hope_jax.evaluation.harness_model import HarnessModel

    judge, calls = HarnessModel._judge, []

    def interrupted(self, tokens, scored):
        if len(calls) == count and not monkeypatch.happened:
            monkeypatch.happened = True
            raise KeyboardInterrupt
        calls.append(int(np.sum(scored.any(-1))))
        return judge(self, tokens, scored)

    monkeypatch.happened = False
    monkeypatch.setattr(HarnessModel, "_judge", interrupted)
    return calls


@needs_harness
def test_tasks_of_local_files_are_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rows = [{"q": f"{i} and", "choices": ["one", "two"], "gold": i % 2} for i in range(6)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    choice = "doc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: gold"
    text = "doc_to_text: ''\ndoc_to_target: '{{q}}'\nmetric_list: [{metric: word_perplexity}]"
    for name, kind, more in (
        ("mine", "multiple_choice", choice),
        ("mine_rolling", "loglikelihood_rolling", text),
    ):
        settings = TASK.format(name=name, file=file, kind=kind, more=more)
        (tmp_path / f"{name}.yaml").write_text(settings)
    task = Harness(tasks="mine, mine_rolling", include=str(tmp_path), batch=4)
    calls = interrupt_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        task.run(subject()._replace(folder=tmp_path))
    found = task.run(subject()._replace(folder=tmp_path))
    assert calls == [4, 4, 4, 4, 2]  # each of six questions' two answers and of six texts once
    assert "mine/acc" in (tmp_path / "harness.html").read_text()
    right = [
        int(np.argmax([direct(row["q"], f" {one}")[0] for one in row["choices"]])) == row["gold"]
        for row in rows
    ]
    assert found["mine/acc"] == pytest.approx(np.mean(right))
    nats = sum(direct("", row["q"])[0] for row in rows)
    assert found["mine_rolling/word_perplexity"] == pytest.approx(np.exp(-nats / 12), rel=1e-3)
    with pytest.raises(TaskError, match="tasks must be known to the harness, got nothing_such"):
        Harness(tasks="mine,nothing_such", include=str(tmp_path)).run(subject())


def test_a_harness_that_is_missing_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(TaskError, match="task harness needs lm_eval: pip install"):
        Harness(tasks="piqa").run(subject())


def test_settings_that_cannot_be_are_errors():
    with pytest.raises(TaskError, match="tasks must name at least 1 task"):
        Harness().run(subject())
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        Harness(tasks="piqa", limit=0)

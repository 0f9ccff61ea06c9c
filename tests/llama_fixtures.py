"""Makes tiny Llamas and tokenizers with transformers, and writes down what they compute.

Run by hand, where torch, transformers and safetensors are installed (no other test needs them):

    python tests/llama_fixtures.py

It writes `tests/llama/NAME` for every entry of `LLAMAS`: `config.json` and safetensors as
transformers publishes them, and `expected.safetensors` with `tokens` and the `logits` for them.
`tests/test_pretrained.py` reads them. `tests/llama/tokenizers/NAME.json` are tokenizers, and
`expected.json` has the ids of some texts for each; `tests/test_byte_pairs.py` reads those. What
lies there was made with transformers 5.23.0, tokenizers 0.23.3 and torch 2.13.0.
"""

import json
import shutil
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "llama"
TOKENS = 40
"""Longer than the original context of any stretched rotary embedding below."""

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

LLAMAS = {
    "tied": {
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "dtype": "bfloat16",
    },
    "llama3": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-3,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "dtype": "bfloat16",
        "shard": "20KB",
    },
    "linear": {
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        "dtype": "float16",
    },
    "float32": {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "dtype": "float32",
    },
}
"""Settings beside `SIZES`; `shard` is the size above which a file is cut."""


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts a text."""

TEXTS = [
    "",
    " ",
    "The model's levels don't, and they'll WE'LL not: 12345 tokens, 3.14159!",
    "  two  spaces \t\n\n  tab\r\nline\n\n\n",
    "def f(x):\n    return x**2  # a square\n",
    "caf\u00e9 cafe\u0301 日本語 Ελληνικά 🎉🏽",
    "\u00b2 \u2167 \u0661\u0662\u0663 \u00bd \u00a0\u2028\u3000 \x1c\x1d a\x85b \0",
    "<|begin_of_text|>not special<|end|>",
    "aaaaaaaaaaaaaaaaaaaa 00000000000",
]


def tokenizers():
    """Byte pairs learned from the texts, cut as Llama 3, SmolLM and GPT-2 cut them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cutters = {
        "llama3": [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
        "digits": [pre_tokenizers.Digits(individual_digits=True), plain],
        "gpt2": [plain],
    }
    for name, steps in cutters.items():
        made = Tokenizer(models.BPE(ignore_merges=name == "llama3"))
        made.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else plain
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=["<|begin_of_text|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        made.train_from_iterator(TEXTS * 2, trainer)
        yield name, made


def build(name: str, seed: int = 0):
    """Makes a Llama whose numbers are large enough for every setting to be seen in its logits."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {**SIZES, **LLAMAS[name]}
    settings.pop("shard", None)
    dtype = getattr(torch, settings["dtype"])
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            draw = torch.randn_like(weight)
            if weight.ndim == 1:
                weight.copy_(1 + 0.3 * draw)
            elif "embed_tokens" in path:
                weight.copy_(0.3 * draw)
            else:
                weight.copy_(draw * 1.5 / weight.shape[1] ** 0.5)
    return model.to(dtype)


def logits(folder: Path, tokens):
    """What transformers computes in float32 with published files."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.as_tensor(tokens)).logits.numpy()


def main():
    """Writes all."""
    import numpy as np
    from safetensors.numpy import save_file

    for number, (name, settings) in enumerate(LLAMAS.items()):
        folder = FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        model = build(name, seed=number)
        model.save_pretrained(folder, max_shard_size=settings.get("shard", "5GB"))
        (folder / "generation_config.json").unlink(missing_ok=True)
        tokens = np.random.default_rng(number).integers(0, SIZES["vocab_size"], (1, TOKENS))
        found = logits(folder, tokens)
        save_file({"tokens": tokens, "logits": found}, folder / "expected.safetensors")
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{name}: {size:,} bytes, logits deviate by {found.std():.2f}", file=sys.stderr)

    folder = FOLDER / "tokenizers"
    folder.mkdir(exist_ok=True)
    expected = {}
    for name, made in tokenizers():
        (folder / f"{name}.json").write_text(made.to_str())
        made.encode_special_tokens = True
        expected[name] = [[text, made.encode(text).ids] for text in TEXTS]
    (folder / "expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    main()

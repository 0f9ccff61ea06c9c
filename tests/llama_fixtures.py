"""Makes tiny Llamas with the transformers library, and writes down what they compute.

Run by hand, where torch, transformers and safetensors are installed (no other test needs them):

    python tests/llama_fixtures.py

It writes `tests/llama/NAME` for every entry of `LLAMAS`: `config.json` and safetensors as
transformers publishes them, and `expected.safetensors` with `tokens` and the `logits` for them.
`tests/test_pretrained.py` reads them. The files there were made with transformers 5.23.0 and torch
2.13.0.
"""

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


if __name__ == "__main__":
    main()

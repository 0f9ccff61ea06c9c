"""Corpora, tokenizers and batches: all that lies between a text file and the device.

`DataConfig.build` gives a `Data`, whose `train` and `valid` give batches.
"""

from hope_jax.data.pipeline import Batches, Data, DataConfig
from hope_jax.data.tokenizer import Tokenizer
from hope_jax.data.tokenizer import load as load_tokenizer

__all__ = ["Batches", "Data", "DataConfig", "Tokenizer", "load_tokenizer"]

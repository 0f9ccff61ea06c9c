"""CIFAR-100 as it is published for C programs: 32 x 32 colour photographs of a hundred things."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int, UInt8

from hope_jax.data.intents import Classes

SIDE, COLOURS = 32, 3
RECORD = 2 + COLOURS * SIDE * SIDE
"""Bytes of an image: its coarse and its fine label, then red, green and blue, row by row."""

WHERE = "https://www.cs.toronto.edu/~kriz/cifar.html, the binary version (cifar-100-binary.tar.gz)"


@dataclass(frozen=True, kw_only=True)
class CifarConfig:
    """Images as sequences: pixel by pixel, row by row, of each its red, green and blue.

    Attributes:
      folder: Where train.bin and test.bin lie. Nothing that could run, such as a pickle, is read.
      shrink: The side of the squares of pixels whose mean is one; 1, 2, 4 or 8.

    References:
      Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; Zenke et al.,
      "Continual Learning Through Synaptic Intelligence", 2017, for splitting it.
    """

    kind: Literal["cifar100"] = "cifar100"
    folder: str = "data/cifar-100-binary"
    shrink: int = 1

    def __post_init__(self):
        if self.shrink not in (1, 2, 4, 8):
            raise ValueError(f"shrink must be 1, 2, 4 or 8, got {self.shrink}")

    @property
    def symbols(self) -> int:
        """Ids of the inputs."""
        return 256

    def load(self) -> tuple[Classes, Classes]:
        """Reads the training and the test part.

        Raises:
          FileNotFoundError: A file is missing; the message says where to get it.
          ValueError: A file is not what was published.
        """
        folder = Path(self.folder).expanduser()
        train, test = (self._read(folder / name) for name in ("train.bin", "test.bin"))
        return train, test

    def _read(self, path: Path) -> Classes:
        if not path.is_file():
            raise FileNotFoundError(f"CIFAR-100 needs the file {str(path)!r}: get it from {WHERE}")
        content = np.fromfile(path, np.uint8)
        if not content.size or content.size % RECORD or content[1::RECORD].max() > 99:
            raise ValueError(
                f"{path} must hold images of {RECORD} bytes, the second below 100, "
                f"got {content.size} bytes"
            )
        records = content.reshape(-1, RECORD)
        inputs = self._sequence(records[:, 2:])
        lengths = np.full(len(inputs), inputs.shape[1], np.int32)
        return Classes(inputs, lengths, records[:, 1].astype(np.int32))

    def _sequence(self, pixels: UInt8[np.ndarray, "N bytes"]) -> Int[np.ndarray, "N T"]:
        step, side = self.shrink, SIDE // self.shrink
        squares = pixels.reshape(-1, COLOURS, side, step, side, step)
        means = squares.astype(np.float32).mean((3, 5)).round().astype(np.int32)
        return np.moveaxis(means, 1, -1).reshape(len(pixels), -1)

"""Benchmark (f): a batch from the cache of decoded images, and from one of `datasets`.

    python -m experiments.benchmarks.decoded_images

`HubImages` keeps decoded images as bytes in one memory-mapped file. `datasets` would keep them as
well, in the Arrow table that `Dataset.map` writes, under a fingerprint of its own; this fetches the
same random batches from either, in turns.
"""

import argparse

import datasets
import numpy as np
import torch
from torch import Tensor

from dcpc.training.data import PixelSet
from experiments.benchmarks.timing import describe_machine, interleaved_medians

SHAPE = (1, 28, 28)


def arrow_table(pixels: np.ndarray) -> datasets.Dataset:
    """The images as `Dataset.map` caches them, with batches as tensors."""
    features = datasets.Features({"pixels": datasets.Array3D(SHAPE, "uint8")})
    table = datasets.Dataset.from_dict({"pixels": list(pixels)}, features=features)
    return table.with_format("torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_images", type=int, default=20_000)
    parser.add_argument("--batch_size", type=int, default=256)
    options = parser.parse_args()
    pixels = np.random.default_rng(0).integers(0, 256, (options.num_images, *SHAPE), np.uint8)
    table = arrow_table(pixels)
    images = PixelSet(
        torch.from_numpy(pixels),
        torch.zeros(options.num_images, dtype=torch.long),
        torch.arange(options.num_images),
    )

    def rows() -> list[int]:
        return torch.randint(options.num_images, (options.batch_size,)).tolist()

    def arrow() -> Tensor:
        return table[rows()]["pixels"].float() / 255

    assert torch.allclose(table[[3, 1]]["pixels"].float() / 255, images.__getitems__([3, 1])[0])
    ours, theirs = interleaved_medians(lambda: images.__getitems__(rows()), arrow)
    print(describe_machine())
    print(
        f"a batch of {options.batch_size} images: memory-mapped {ours:.2f} ms, Arrow "
        f"{theirs:.2f} ms, {theirs / ours:.0f} times"
    )


if __name__ == "__main__":
    main()

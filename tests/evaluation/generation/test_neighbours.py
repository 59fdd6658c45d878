from __future__ import annotations

import pytest
import torch

from dcpc.errors import DataError, OptionError
from dcpc.evaluation import nearest_neighbours


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 100])
def test_neighbours_are_those_of_a_loop_over_all_pairs(chunk_size: int) -> None:
    samples, data = torch.rand(5, 1, 2, 3), torch.rand(23, 1, 2, 3)
    found = nearest_neighbours(samples, data, num_neighbours=3, chunk_size=chunk_size)
    for row, sample in enumerate(samples):
        distances = [float((sample - datum).square().sum().sqrt()) for datum in data]
        order = sorted(range(23), key=distances.__getitem__)[:3]
        assert found.indices[row].tolist() == order
        assert found.distances[row].tolist() == pytest.approx([distances[i] for i in order])


def test_a_copy_of_a_datum_has_distance_zero() -> None:
    data = torch.rand(300, 784)
    found = nearest_neighbours(data[40:42], data)
    assert found.indices.tolist() == [[40], [41]]
    assert found.distances.tolist() == [[0.0], [0.0]]


def test_data_of_another_shape_and_too_many_neighbours_are_refused() -> None:
    with pytest.raises(DataError, match="the same shape"):
        nearest_neighbours(torch.rand(2, 3), torch.rand(5, 4))
    with pytest.raises(OptionError, match="between 1 and the number of data, 5, got 6"):
        nearest_neighbours(torch.rand(2, 3), torch.rand(5, 3), num_neighbours=6)

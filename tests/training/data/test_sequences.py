"""Sequences of bouncing images and sequences to be memorised, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dcpc.errors import OptionError
from dcpc.training import ImageData
from dcpc.training.data import BouncingDigits, DigitsData, LabelledSet, StoredSequences


class Crosses(ImageData):
    """Numbered 2 x 3 images in [-1, 1]: image `n` is white at one pixel and grey by its number."""

    intensity_range = (-1.0, 1.0)

    def load(self) -> tuple[Tensor, Tensor]:
        images = torch.arange(20.0).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 3).clone() / 40
        images[:, :, 0, 0] = 1.0
        return images, torch.arange(20)

    def image_set(self, images: Tensor, labels: Tensor, rows: Tensor) -> LabelledSet:
        return super().image_set(2 * images - 1, labels, rows)


def bouncing(**options: object) -> BouncingDigits:
    images = Crosses(batch_size=4, num_held_out=5)
    data = BouncingDigits(images, **{"num_frames": 6, "canvas_size": 7, **options})
    data.setup("fit")
    return data


def test_sequences_have_their_shape_and_their_images_labels():
    data = bouncing(sequences_per_image=2)
    assert (len(data.training_set), len(data.held_out_set)) == (30, 10)
    frames, labels, index = data.training_set.first(30)
    assert frames.shape == (30, 6, 1, 7, 7)
    assert torch.equal(labels, data.training_set.all_labels())
    assert torch.equal(labels[:15], labels[15:])
    assert index.tolist() == list(range(30))
    assert data.intensity_range == (-1.0, 1.0)


def test_held_out_sequences_are_of_images_that_are_not_trained_on():
    data = bouncing()
    training, held_out = (
        set(s.all_labels().tolist()) for s in (data.training_set, data.held_out_set)
    )
    assert len(training | held_out) == 20
    assert not training & held_out


def test_the_image_is_where_the_truth_says_and_black_is_around_it():
    data = bouncing()
    frames, labels, index = data.held_out_set.first(5)
    position = data.held_out_set.truth(index)["position"]
    assert position.shape == (5, 6, 2)
    light = (frames[:, :, 0] + 1) / 2
    # Bilinear placing keeps the light, and puts its centre where the image's centre is.
    grey = labels.reshape(-1, 1, 1) / 40
    torch.testing.assert_close(light.sum((-1, -2)), (1 + 5 * grey[..., 0]).expand(5, 6))
    cells = torch.stack(torch.meshgrid(torch.arange(7.0), torch.arange(7.0), indexing="ij"), -1)
    centre = torch.einsum("ntij,ijd->ntd", light, cells) / light.sum((-1, -2)).unsqueeze(-1)
    corner = position + 5 * grey * torch.tensor([0.6, 1.2]) / (1 + 5 * grey)
    torch.testing.assert_close(centre, corner, atol=1e-5, rtol=0)
    inside = [
        (cells[..., d] > position[..., d, None, None] - 1)
        & (cells[..., d] < position[..., d, None, None] + extent)
        for d, extent in enumerate((2, 3))
    ]
    assert not bool(light[~(inside[0] & inside[1])].any())


def test_motions_have_the_speed_and_turn_around_at_the_walls():
    position = bouncing(num_frames=30, speed=0.9, sequences_per_image=20).held_out_set.position
    way = torch.tensor([5.0, 4.0])
    assert bool(((position >= 0) & (position <= way)).all())
    steps = position.diff(dim=1)
    # Away from walls a step has the speed; at a wall it is shorter.
    clear = ((position > 0.9) & (position < way - 0.9)).all(-1)[:, :-1]
    assert bool(clear.any())
    torch.testing.assert_close(
        steps[clear].norm(dim=-1), torch.full_like(steps[clear][:, 0], 0.9), atol=1e-5, rtol=0
    )
    assert float(steps.norm(dim=-1).max()) <= 0.9 + 1e-5
    # The size of every component is that of the first step but where it meets a wall.
    sizes = steps.abs()
    assert bool((sizes <= sizes.max(1, keepdim=True).values + 1e-5).all())


def test_directions_and_first_positions_are_uniform():
    position = bouncing(speed=0.01, sequences_per_image=400).training_set.position.double()
    start, step = position[:, 0] / torch.tensor([5.0, 4.0]), position[:, 1] - position[:, 0]
    count = len(start)
    for axis in range(2):
        ordered = start[:, axis].sort().values
        gap = (ordered - torch.arange(count) / count).abs().max()
        assert float(gap) < 1.95 / math.sqrt(count)  # Kolmogorov and Smirnov, one in a thousand
    angle = torch.atan2(step[:, 0], step[:, 1])
    assert float(angle.cos().mean().abs()) < 4 * math.sqrt(0.5 / count)
    assert float(angle.sin().mean().abs()) < 4 * math.sqrt(0.5 / count)


def test_sequences_are_the_seeds():
    first, again, other = (bouncing(seed=seed).training_set for seed in (0, 0, 1))
    assert torch.equal(first.first(15)[0], again.first(15)[0])
    assert not torch.equal(first.position, other.position)
    assert torch.equal(first.__getitems__([7, 2])[0], first.first(15)[0][[7, 2]])
    assert not torch.equal(first.position[:5], bouncing().held_out_set.position)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 1}, "data.num_frames"),
        ({"canvas_size": 3}, r"data.canvas_size must be larger .* 2 x 3 pixels, got 3"),
        ({"sequences_per_image": 0}, "data.sequences_per_image"),
        ({"speed": -1.0}, "data.speed"),
        ({"speed": math.nan}, "data.speed"),
        ({"seed": -1}, "data.seed"),
    ],
)
def test_impossible_motions_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        bouncing(**options)


def stored(**options: object) -> StoredSequences:
    data = StoredSequences(DigitsData(), **{"num_sequences": 5, "num_frames": 4, **options})
    data.setup("fit")
    return data


def test_stored_sequences_are_of_training_images_none_twice():
    data = stored()
    frames, labels, _ = data.training_set.first(5)
    assert frames.shape == (5, 4, 1, 8, 8)
    images, image_labels, _ = data.images.training_set.first(1500)
    same = (frames.reshape(20, 1, -1) == images.reshape(1, 1500, -1)).all(-1)
    assert bool((same.sum(1) >= 1).all())
    rows = same.float().argmax(1)
    assert len(set(rows.tolist())) == 20
    assert torch.equal(labels, image_labels[rows.reshape(5, 4)[:, 0]])
    assert data.held_out_set is data.training_set


def test_more_sequences_begin_with_fewer():
    few, many = (stored(num_sequences=n).training_set.first(3)[0] for n in (3, 7))
    assert torch.equal(few, many)
    assert not torch.equal(few, stored(num_sequences=3, seed=1).training_set.first(3)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sequences": 0}, "data.num_sequences"),
        ({"num_frames": 1}, "data.num_frames"),
        ({"num_sequences": 400}, r"need 1600 images, but there are 1500 .* store fewer"),
        ({"batch_size": 0}, "data.batch_size"),
    ],
)
def test_impossible_memories_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        stored(**options)

"""A bouncing picture: what is placed where, against copies, averages and a simulated bounce."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from torch import Tensor

from dcpc import DCPC
from dcpc.errors import DCPCError
from dcpc.models import BouncingDigit
from dcpc.models.bouncing_digit import place, reflect

pytestmark = pytest.mark.usefixtures("float64")

SIZES = {"latent_size": 3, "patch_shape": [1, 2, 3], "frames_shape": [4, 1, 6, 7]}


def copied(patch: Tensor, row: int, column: int, size: tuple[int, int]) -> Tensor:
    """The patch on a black frame, at whole pixels, cut off at the frame's edges."""
    frame = torch.zeros(*patch.shape[:-2], *size)
    for a in range(patch.shape[-2]):
        for b in range(patch.shape[-1]):
            if 0 <= row + a < size[0] and 0 <= column + b < size[1]:
                frame[..., row + a, column + b] = patch[..., a, b]
    return frame


@pytest.mark.parametrize(("row", "column"), [(0, 0), (4, 4), (1, 3), (-1, 2), (5, 6)])
def test_at_whole_pixels_a_patch_is_copied(row, column):
    patch = torch.rand(2, 2, 3)
    placed = place(patch, torch.tensor([float(row), float(column)]), (6, 7))
    assert torch.equal(placed, copied(patch, row, column, (6, 7)))


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_between_pixels_neighbouring_copies_are_averaged(share):
    patch = torch.rand(1, 2, 3)
    placed = place(patch, torch.tensor([1.0 + share, 2.0]), (6, 7))
    above, below = (copied(patch, row, 2, (6, 7)) for row in (1, 2))
    torch.testing.assert_close(placed, (1 - share) * above + share * below)
    placed = place(patch, torch.tensor([1.0, 2.0 + share]), (6, 7))
    left, right = (copied(patch, 1, column, (6, 7)) for column in (2, 3))
    torch.testing.assert_close(placed, (1 - share) * left + share * right)


def test_every_patch_goes_to_its_positions():
    patches = torch.rand(5, 1, 1, 2, 3)
    position = torch.stack([torch.randint(0, 4, (5, 4)), torch.randint(0, 4, (5, 4))], -1)
    placed = place(patches, position.double(), (6, 7))
    assert placed.shape == (5, 4, 1, 6, 7)
    for n in range(5):
        for t in range(4):
            row, column = position[n, t].tolist()
            assert torch.equal(placed[n, t], copied(patches[n, 0], row, column, (6, 7)))


def test_a_point_is_reflected_as_one_that_turns_around_at_the_walls():
    way, step = 5, 0.25  # a whole number of steps between the walls, so that each is reached
    for start, direction in ((1.0, 1), (3.5, -1)):
        where, heading = start, direction
        for count in range(200):
            u = torch.tensor(start + direction * step * count)
            assert float(reflect(u, way)) == pytest.approx(where, abs=1e-12), count
            if not 0 <= where + heading * step <= way:
                heading = -heading
            where += heading * step


def test_the_density_is_that_of_the_priors_and_of_pixels_around_the_placed_patch():
    torch.manual_seed(0)
    model = BouncingDigit(**SIZES, speed=0.7, jitter_scale=0.2).double()
    frames = torch.rand(5, 4, 1, 6, 7)
    problem = DCPC(model, num_particles=6).bind(frames)
    state = problem.init()
    u = state.latents
    assert {name: value.shape[2:] for name, value in u.items()} == {
        "z": (3,),
        "start": (2,),
        "velocity": (2,),
        "jitter": (3, 2),
    }
    normal = torch.distributions.Normal
    way = torch.tensor([4.0, 4.0])
    expected = normal(0.0, 1.0).log_prob(u["z"]).sum(-1)
    expected += normal(way / 2, 0.35 * way).log_prob(u["start"]).sum(-1)
    expected += normal(0.0, 0.7).log_prob(u["velocity"]).sum(-1)
    expected += normal(0.0, 0.2).log_prob(u["jitter"]).sum((-1, -2))
    patch, where = model.patch(u["z"]), u["start"]
    scale = 0.05 + 0.25
    for t in range(4):
        if t:
            where = where + u["velocity"] + u["jitter"][..., t - 1, :]
        row, column = reflect(where, way).unbind(-1)
        for k in range(6):
            for n in range(5):
                # Bilinear: the mean of copies at the four whole pixels around.
                top, left = math.floor(row[k, n]), math.floor(column[k, n])
                down, right = float(row[k, n]) - top, float(column[k, n]) - left
                mean = sum(
                    share_y * share_x * copied(patch[k, n], top + y, left + x, (6, 7))
                    for y, share_y in ((0, 1 - down), (1, down))
                    for x, share_x in ((0, 1 - right), (1, right))
                )
                expected[k, n] += normal(mean, scale).log_prob(frames[n, t]).sum().detach()
    torch.testing.assert_close(problem.log_joint(state), expected.detach())


def test_it_draws_sequences_and_tells_positions_between_the_walls():
    model = BouncingDigit(**SIZES, speed=3.0)
    nodes = pyro.poutine.trace(model).get_trace(num_sequences=7).nodes
    assert nodes["frames"]["value"].shape == (7, 4, 1, 6, 7)
    position = nodes["position"]["value"]
    assert position.shape == (7, 4, 2)
    assert bool(((position >= 0) & (position <= 4)).all())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"latent_size": 0}, "latent_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"speed": 0.0}, "speed"),
        ({"jitter_scale": -1.0}, "jitter_scale"),
        ({"min_scale": math.inf}, "min_scale"),
        ({"patch_shape": [2, 3]}, "patch_shape"),
        ({"frames_shape": [1, 6, 7]}, "frames_shape"),
        ({"frames_shape": [1, 1, 6, 7]}, "frames_shape"),
        ({"frames_shape": [4, 3, 6, 7]}, "frames_shape"),
        ({"frames_shape": [4, 1, 2, 7]}, "frames_shape"),
    ],
)
def test_impossible_sizes_are_refused(options, name):
    with pytest.raises(DCPCError, match=name):
        BouncingDigit(**{**SIZES, **options})

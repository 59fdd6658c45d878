"""Recordings: the numbers of what was recorded, to the last bit, from fewer operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcpc import kernels
from dcpc.graphs.recording import NotRecordable, Recording, record
from dcpc.graphs.stages import Stages

pytestmark = pytest.mark.usefixtures("float64")


def recorded(function, moving, settled=None, *, is_exact: bool = True) -> Recording:
    return record(function, {} if settled is None else settled, moving, is_exact=is_exact)


def both(function, moving, settled=None):
    """A function's result and its recording's, from the same random numbers."""
    recording = recorded(function, moving, settled)
    torch.manual_seed(1)
    expected = function({} if settled is None else settled, moving)
    torch.manual_seed(1)
    return recording({} if settled is None else settled, moving), expected


def score(log_density):
    """Value and gradient of a log-density of one tensor."""

    def function(settled, moving):
        with torch.enable_grad():
            u = moving["u"].detach().requires_grad_()
            value = log_density(settled, u)
            (gradient,) = torch.autograd.grad(value.sum(), u)
        return {"value": value.detach(), "score": gradient}

    return function


def normal(loc: Tensor, scale: Tensor | float, u: Tensor) -> Tensor:
    return torch.distributions.Normal(loc, scale, validate_args=False).log_prob(u).sum(-1)


def student(loc: Tensor, u: Tensor) -> Tensor:
    return -2.0 * torch.log1p(((u - loc) / 1.5).square() / 3.0).sum(-1)


LOG_DENSITIES = {
    "normal": lambda s, u: normal(s["loc"], 2.0, u),
    "scale": lambda s, u: normal(s["loc"], u[:, :1].exp(), u),
    "student": lambda s, u: student(s["loc"], u),
    "poisson": lambda s, u: (u.flip(-1) * s["loc"] - u.exp()).sum(-1),
    "matrix": lambda s, u: -(u @ s["matrix"]).square().sum(-1),
    "kernel": lambda s, u: kernels.continuous_bernoulli_log_prob(s["loc"].sigmoid(), u).sum(-1),
    "stacked": lambda s, u: torch.stack([u.square().sum(-1), u.sin().sum(-1)], -1).sum(-1),
    "solve": lambda s, u: (
        -torch.linalg.solve_triangular(
            s["matrix"].tril().mT + 3 * torch.eye(5), u, upper=True, left=False
        )
        .square()
        .sum(-1)
    ),
}


@pytest.mark.parametrize("name", LOG_DENSITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
def test_a_recorded_score_is_that_of_autograd_bit_for_bit(name, dtype):
    torch.manual_seed(0)
    settled = {"loc": torch.randn(5, dtype=dtype), "matrix": torch.randn(5, 5, dtype=dtype)}
    torch.set_default_dtype(dtype)
    moving = {"u": torch.randn(37, 5)}
    got, expected = both(score(LOG_DENSITIES[name]), moving, settled)
    assert torch.equal(got["value"], expected["value"])
    assert torch.equal(got["score"], expected["score"])


def test_a_recording_takes_other_values_of_the_same_shapes():
    function = score(LOG_DENSITIES["scale"])
    first, second = ({"u": torch.randn(7, 5)} for _ in range(2))
    settled = {"loc": torch.zeros(5)}
    recording = recorded(function, first, settled)
    other = {"loc": torch.ones(5)}
    expected = function(other, second)
    assert torch.equal(recording(other, second)["score"], expected["score"])


def test_random_numbers_are_those_that_torch_would_draw():
    def function(settled, moving):
        noise = torch.randn_like(moving["u"])
        return noise, torch.rand_like(noise) + noise, torch.randn_like(moving["u"])

    got, expected = both(function, {"u": torch.zeros(20, 3)})
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_changes_in_place_of_tensors_of_the_closure_are_seen():
    parameter = torch.nn.Parameter(torch.tensor(2.0))
    recording = recorded(lambda settled, moving: moving["u"] * parameter, {"u": torch.ones(3)})
    with torch.no_grad():
        parameter.mul_(3.0)
    assert torch.equal(recording({}, {"u": torch.ones(3)}), torch.full((3,), 6.0))


def test_inputs_that_come_out_again_are_the_same_tensors():
    moving = {"u": torch.ones(3)}
    recording = recorded(lambda settled, moving: (moving["u"], moving["u"] + 1), moving)
    assert recording({}, moving)[0] is moving["u"]


def write_below_a_view(fresh: Tensor) -> Tensor:
    view = fresh[:2]
    fresh.mul_(2.0)
    return view


def write_through_a_view(fresh: Tensor) -> Tensor:
    fresh[:2].mul_(2.0)
    return fresh


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda settled, moving: moving["u"] if moving["u"].sum() > 0 else -moving["u"], "values"),
        (lambda settled, moving: moving["u"].add_(1.0), "in place"),
        (lambda settled, moving: write_below_a_view(moving["u"].exp()), "in place"),
        (lambda settled, moving: write_through_a_view(moving["u"].exp()), "in place"),
        (lambda settled, moving: moving["u"].exp().lt_(1.0), "in place"),
        (
            lambda settled, moving: moving["u"].float().exp().mul_(torch.ones(3).double()),
            "in place",
        ),
        (lambda settled, moving: moving["u"].exp().normal_(), "in place"),
        (lambda settled, moving: torch.bernoulli(moving["u"]), "random"),
    ],
)
def test_what_a_graph_cannot_do_is_refused_by_name(function, why):
    with pytest.raises(NotRecordable, match=why):
        recorded(function, {"u": torch.ones(3)})


def test_writes_into_values_that_nothing_else_looks_at_are_recorded():
    """As derivatives write, those of `logsumexp` for one."""

    def function(settled, moving):
        fresh = moving["u"].exp()
        before = fresh + 1.0
        fresh.mul_(moving["u"]).add_(before)
        return before, fresh * 2.0

    first, second = {"u": torch.randn(3)}, {"u": torch.randn(3)}
    recording, kept = recorded(function, first), second["u"].clone()
    expected = function({}, second)
    assert all(torch.equal(a, b) for a, b in zip(recording({}, second), expected, strict=True))
    assert torch.equal(second["u"], kept)


def test_what_is_constant_over_an_axis_is_computed_once_for_it():
    def function(settled, moving):
        spread = settled["scale"].expand(100, 50)
        return moving["u"] / spread.exp(), spread.exp() + 1.0

    moving, settled = {"u": torch.randn(100, 50)}, {"scale": torch.randn(100, 1)}
    recording = recorded(function, moving, settled, is_exact=False)
    sizes = {
        str(n.target): n.meta["like"].numel
        for n in recording.graph.nodes
        if n.op == "call_function"
    }
    assert sizes["aten.exp.default"] == 100
    for got, expected in zip(recording(settled, moving), function(settled, moving), strict=True):
        torch.testing.assert_close(got, expected)


def count(recording: Recording, name: str) -> int:
    return sum(name in str(node.target) for node in recording.graph.nodes)


def metropolis(settled, moving):
    """A step whose both ends are evaluated, and an evaluation of where it has led."""

    def evaluate(u: Tensor) -> Tensor:
        return (u.relu() @ settled["matrix"]).square().sum(-1)

    u = moving["u"]
    proposal = u + torch.randn_like(u)
    accepted = torch.rand_like(u[:, 0]).log() < evaluate(proposal) - evaluate(u)
    u = torch.where(accepted.unsqueeze(-1), proposal, u)
    return u, evaluate(u)


def test_rows_that_were_evaluated_at_both_ends_are_not_evaluated_anew():
    moving, settled = {"u": torch.randn(30, 4)}, {"matrix": torch.randn(4, 6)}
    recording = recorded(metropolis, moving, settled)
    assert count(recording, "mm") == 2
    got, expected = both(metropolis, moving, settled)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_choice_of_proposals_in_another_order_of_memory_is_evaluated_as_it_was():
    def function(settled, moving):
        def evaluate(u: Tensor) -> Tensor:
            return (u.contiguous().view(-1, 4) @ settled["matrix"]).view(6, 5, -1).sum(-1)

        u = moving["u"]
        proposal = moving["by_cell"].exp().permute(1, 0, 2)
        accepted = torch.rand_like(u[..., 0]).log() < evaluate(proposal) - evaluate(u)
        u = torch.where(accepted.unsqueeze(-1), proposal, u)
        return u, evaluate(u)

    moving = {"u": torch.randn(6, 5, 4), "by_cell": torch.randn(5, 6, 4)}
    settled = {"matrix": torch.randn(4, 3)}
    assert count(recorded(function, moving, settled), "mm") == 2
    got, expected = both(function, moving, settled)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_choices_between_columns_are_no_choices_between_rows():
    def function(settled, moving):
        first, second = moving["u"], moving["u"] + 1.0
        chosen = torch.where(moving["u"][:1] > 0, first, second)
        return first @ settled["matrix"], second @ settled["matrix"], chosen @ settled["matrix"]

    moving, settled = {"u": torch.randn(6, 6)}, {"matrix": torch.randn(6, 6)}
    got, expected = both(function, moving, settled)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_choice_that_rows_are_mixed_after_is_made_before():
    def function(settled, moving):
        first, second = moving["u"], moving["u"] + 1.0
        chosen = torch.where(moving["u"][:, :1] > 0, first, second)
        return first.mT @ first, second.mT @ second, chosen.mT @ chosen, chosen.sum(0)

    got, expected = both(function, {"u": torch.randn(6, 4)})
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_stages_give_what_the_whole_gives_and_compute_nothing_twice():
    def function(settled, moving):
        whole = moving["u"].exp()
        return {"a": whole.sum(0)}, {"b": whole + torch.randn_like(whole)}, {"c": whole.sum(1)}

    moving = {"u": torch.randn(5, 3)}
    recording = recorded(function, moving)
    torch.manual_seed(1)
    expected = function({}, moving)
    torch.manual_seed(1)
    run = Stages(recording).start()
    got = [run.stage(index, [moving["u"]]) for index in range(3)]
    for one, other in zip(got, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
def test_what_cancels_is_not_computed(dtype):
    def function(settled, moving):
        u, zero = moving["u"], torch.zeros_like(settled["loc"])
        single = u.unsqueeze(-1).sum(-1) - zero
        return (-single).neg(), 2.0 * (-0.5 * (4.0 * single)), u.t().t() @ settled["matrix"].t()

    settled = {"loc": torch.zeros(4, dtype=dtype), "matrix": torch.randn(5, 4, dtype=dtype)}
    moving = {"u": torch.randn(6, 4, dtype=dtype)}
    got, expected = both(function, moving, settled)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    recording = recorded(function, moving, settled)
    assert [count(recording, name) for name in ("mul", "neg", "sub", "sum")] == [1, 0, 0, 0]
    assert count(recording, "aten.t.") == 1


def test_products_of_numbers_that_round_are_taken_one_by_one():
    def function(settled, moving):
        return 0.1 * (0.7 * moving["u"]), 3 * (moving["index"] * 2), moving["index"] * 0.5 + 1

    moving = {"u": torch.randn(1000), "index": torch.arange(1000)}
    got, expected = both(function, moving)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert [x.dtype for x in got] == [x.dtype for x in expected]


def test_sums_over_one_element_keep_their_type():
    def function(settled, moving):
        bad = moving["u"] > 0
        return bad.sum(0), moving["u"].amax(), moving["u"].sum(0), moving["u"].mean(0)

    got, expected = both(function, {"u": torch.randn(1, 4)})
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert [x.dtype for x in got] == [x.dtype for x in expected]


def affine(settled, moving):
    hidden = torch.nn.functional.linear(moving["u"], settled["weight"], settled["bias"])
    return (hidden @ settled["weight"] + 1.0), hidden + settled["row"]


def test_a_vector_is_added_within_a_product():
    settled = {"weight": torch.randn(5, 4), "bias": torch.randn(5), "row": torch.randn(7, 5)}
    moving = {"u": torch.randn(7, 4)}
    recording = recorded(affine, moving, settled, is_exact=False)
    assert [count(recording, name) for name in ("addmm", "aten.mm")] == [1, 1]
    for got, expected in zip(recording(settled, moving), affine(settled, moving), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_product_of_one_number_may_lose_its_axes_before_something_is_added():
    moving = {"u": torch.randn(1, 3), "v": torch.randn(3, 1), "w": torch.randn(())}

    def function(settled, moving):
        return {"sum": (moving["u"] @ moving["v"]).view(()) + moving["w"]}

    recording = recorded(function, moving, is_exact=False)
    expected = sum(moving["u"][0, i] * moving["v"][i, 0] for i in range(3)) + moving["w"]
    torch.testing.assert_close(recording({}, moving)["sum"], expected)


@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_matrix_that_is_solved_with_often_is_inverted_once(upper, transposed):
    def function(settled, moving):
        matrix = settled["matrix"].triu() if upper else settled["matrix"].tril()
        there, back = (matrix.mT, matrix) if transposed else (matrix, matrix.mT)
        first = torch.linalg.solve_triangular(
            there, moving["u"], upper=upper != transposed, left=False
        )
        second = torch.linalg.solve_triangular(back, first, upper=upper == transposed, left=False)
        return first, second

    settled = {"matrix": torch.randn(4, 4) + 6.0 * torch.eye(4)}
    for rows, is_inverted in ((9, True), (3, False)):
        moving = {"u": torch.randn(rows, 4)}
        recording = record(function, settled, moving, is_exact=False, inverts=True)
        assert count(recording, "solve") == (1 if is_inverted else 2)
        for got, expected in zip(
            recording(settled, moving), function(settled, moving), strict=True
        ):
            torch.testing.assert_close(got, expected)
    assert count(record(function, settled, moving, is_exact=True, inverts=True), "solve") == 2


def test_both_triangles_of_a_matrix_are_inverted_each_on_its_own():
    def function(settled, moving):
        matrix, u = settled["matrix"], moving["u"]
        upper = torch.linalg.solve_triangular(matrix, u, upper=True, left=False)
        return upper, torch.linalg.solve_triangular(matrix, u, upper=False, left=False)

    settled = {"matrix": torch.randn(3, 3) + 4.0 * torch.eye(3)}
    moving = {"u": torch.randn(20, 3)}
    recording = record(function, settled, moving, is_exact=False, inverts=True)
    for got, expected in zip(recording(settled, moving), function(settled, moving), strict=True):
        torch.testing.assert_close(got, expected)


def by_cell(settled, moving):
    """Values by particle and cell, and by their rows."""
    rows = moving["u"].flatten(0, 1) @ settled["matrix"]
    return {"rows": rows.sum()}, {"u": rows.unflatten(0, moving["u"].shape[:2]) + moving["u"]}


def test_a_run_goes_on_with_particles_that_were_resampled():
    settled, moving = {"matrix": torch.randn(3, 3)}, {"u": torch.randn(4, 5, 3)}
    run = Stages(recorded(by_cell, moving, settled)).start()
    run.stage(0, [settled["matrix"], moving["u"]])
    ancestors = torch.randint(4, (4, 5))
    children = {"u": moving["u"].gather(0, ancestors.unsqueeze(-1).expand(4, 5, 3))}
    assert run.take(ancestors)
    got = run.stage(1, [settled["matrix"], children["u"]])
    torch.testing.assert_close(got, by_cell(settled, children)[1])


def test_a_run_whose_values_are_not_by_particle_does_not_go_on():
    def function(settled, moving):
        columns = moving["u"].mT.exp()
        return {"a": columns.sum()}, {"b": columns}

    run = Stages(recorded(function, {"u": torch.randn(4, 3)})).start()
    run.stage(0, [torch.randn(4, 3)])
    assert not run.take(torch.randint(4, (4,)))

"""Every model of the zoo, divided by every backend, against plain Pyro and hand-written graphs."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from oracles import perturbation_graph, plain_log_factors
from zoo import CASES, Case

from dcpc.divide import Arguments, divide, prior_particles, read_sites
from dcpc.divide.graph import SCHEDULES

pytestmark = pytest.mark.usefixtures("float64")

K = 5
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
backends = pytest.mark.parametrize("backend", ["graph", "vmap", "loop"])


def divided(case: Case, backend: str = "auto", schedule: str = "coloured"):
    """A division, shared by the tests; it depends on nothing but the case."""
    model, args, kwargs = case.build()
    read_sites(model, args, kwargs)  # creates the model's parameters anew
    return _divided(case.name, backend, schedule)


@cache
def _divided(name: str, backend: str, schedule: str):
    case = next(case for case in CASES if case.name == name)
    model, args, kwargs = case.build()
    arguments = Arguments(args, kwargs)
    sites = read_sites(model, args, kwargs)
    division = divide(model, arguments, sites, K, schedule=SCHEDULES[schedule], backend=backend)
    torch.manual_seed(5)
    latents = {name: torch.randn(K, *sites[name].unconstrained_shape) for name in division.latents}
    return division, arguments, latents, (model, args, kwargs)


@cases
def test_graph_read_off_the_program_equals_the_one_written_by_hand(case):
    division, *_ = divided(case)
    assert {name: set(latents) for name, latents in division.graph.depends.items()} == case.depends


@cases
def test_graph_written_by_hand_equals_perturbation_of_the_plain_model(case):
    division, _, _, (model, args, kwargs) = divided(case)
    shapes = {name: division.sites[name].unconstrained_shape for name in division.latents}
    assert perturbation_graph(model, shapes, args, kwargs) == case.depends


@cases
def test_every_model_of_the_zoo_is_captured_as_a_graph(case):
    division, *_ = divided(case)
    assert division.program.name == "graph"


@cases
@pytest.mark.parametrize("backend", ["vmap", "loop"])
def test_perturbation_inside_the_package_finds_the_same_graph(case, backend):
    if backend == "vmap" and case.name.startswith("buffer_write"):
        pytest.skip("vmap refuses in-place writes into a plain buffer")
    division, *_ = divided(case, backend)
    assert {name: set(latents) for name, latents in division.graph.depends.items()} == case.depends


@cases
@backends
def test_log_factors_equal_those_of_an_ordinary_trace(case, backend):
    if backend == "vmap" and case.name.startswith("buffer_write"):
        pytest.skip("vmap refuses in-place writes into a plain buffer")
    division, arguments, latents, (model, args, kwargs) = divided(case, backend)
    factors = division.log_factors(latents, arguments.tensors)
    for k in range(K):
        plain = plain_log_factors(model, {n: u[k] for n, u in latents.items()}, args, kwargs)
        assert set(plain) == set(factors)
        for name, expected in plain.items():
            torch.testing.assert_close(factors[name][k], expected, rtol=1e-10, atol=1e-10)


@cases
def test_unit_log_density_is_the_joint_up_to_a_constant_in_its_value(case):
    division, arguments, latents, (model, args, kwargs) = divided(case)
    for group in division.groups:
        value = group.pack(latents)
        moved = group.unpack(value + torch.randn_like(value))
        with torch.no_grad():
            before = group.log_density(value, latents, arguments.tensors)
            after = group.log_density(group.pack({**latents, **moved}), latents, arguments.tensors)
        for position, unit in enumerate(group.units):
            only = {**latents, **{name: moved[name] for name in unit.sites}}
            for k in range(K):
                joint = [
                    sum(
                        float(v.sum())
                        for v in plain_log_factors(
                            model, {n: u[k] for n, u in where.items()}, args, kwargs
                        ).values()
                    )
                    for where in (latents, only)
                ]
                change = (after - before)[k, ..., position].sum()
                assert float(change) == pytest.approx(joint[1] - joint[0], rel=1e-9, abs=1e-9)


@cases
@backends
def test_score_is_the_finite_difference_of_the_joint(case, backend):
    if backend == "vmap" and case.name.startswith("buffer_write"):
        pytest.skip("vmap refuses in-place writes into a plain buffer")
    if backend != "graph" and case.name == "detached":
        pytest.skip("a detach in the model hides the gradient from autograd")
    division, arguments, latents, (model, args, kwargs) = divided(case, backend)
    step = 1e-6
    for group in division.groups:
        value = group.pack(latents)
        score = group.unpack(group.evaluate(value, latents, arguments.tensors).score)
        for name, gradient in score.items():
            for index in range(min(6, gradient[0].numel())):
                ends = []
                for sign in (1, -1):
                    u = {n: v[0].clone() for n, v in latents.items()}
                    u[name].view(-1)[index] += sign * step
                    factors = plain_log_factors(model, u, args, kwargs)
                    ends.append(sum(float(v.sum()) for v in factors.values()))
                expected = (ends[0] - ends[1]) / (2 * step)
                got = float(gradient[0].reshape(-1)[index])
                assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)


@cases
def test_plates_are_independent_where_they_are_and_only_there(case):
    division, *_ = divided(case)
    got = {unit.name: tuple(plate.name for plate in unit.plates) for unit in division.units}
    assert got == case.plates
    assert tuple(plate.name for plate in division.population) == case.population


@cases
def test_elements_of_a_units_plates_have_their_own_log_densities(case):
    """Moving one element changes the log-density of that element only."""
    division, arguments, latents, _ = divided(case)
    for group in division.groups:
        value = group.pack(latents)
        assert value.shape == (K, *group.plate_shape, len(group.units), group.size)
        with torch.no_grad():
            before = group.log_density(value, latents, arguments.tensors)
            assert before.shape == value.shape[:-1]
            for cell in range(before[0].numel()):
                mask = torch.zeros(before[0].numel(), dtype=torch.bool)
                mask[cell] = True
                mask = mask.reshape(before[0].shape)
                moved = torch.where(mask[..., None], value + 1.0, value)
                after = group.log_density(moved, latents, arguments.tensors)
                changed = ((after - before).abs() > 1e-9).any(0)
                assert not bool((changed & ~mask).any())
                assert bool(changed[mask].all())


@cases
def test_packing_and_unpacking_are_inverse(case):
    division, _, latents, _ = divided(case)
    for group in division.groups:
        for name, u in group.unpack(group.pack(latents)).items():
            assert torch.equal(u, latents[name])


@cases
@pytest.mark.parametrize("schedule", ["coloured", "sequential"])
def test_every_latent_moves_exactly_once_and_neighbours_never_together(case, schedule):
    division, *_ = divided(case, schedule=schedule)
    moved = [name for group in division.groups for unit in group.units for name in unit.sites]
    assert sorted(moved) == sorted(division.latents)
    for group in division.groups:
        names = {name for unit in group.units for name in unit.sites}
        for latents in case.depends.values():
            assert len(latents & names) <= 1


@cases
def test_markov_blanket_is_all_that_the_log_density_reads(case):
    """Redrawing every latent outside the blanket leaves the unit's log-density as it is."""
    division, arguments, latents, _ = divided(case)
    for group in division.groups:
        value = group.pack(latents)
        for position, unit in enumerate(group.units):
            other = {
                name: u if name in unit.blanket or name in unit.sites else torch.randn_like(u)
                for name, u in latents.items()
            }
            with torch.no_grad():
                before = group.log_density(value, latents, arguments.tensors)[..., position]
                after = group.log_density(
                    group.pack({**other, **{n: latents[n] for n in unit.sites}}),
                    other,
                    arguments.tensors,
                )[..., position]
            torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


@cases
def test_prior_particles_have_the_shape_of_the_latents(case):
    division, arguments, _, (model, _, _) = divided(case)
    particles = prior_particles(model, division.sites, arguments, 7)
    for name in division.latents:
        assert particles[name].shape == (7, *division.sites[name].unconstrained_shape)
        assert not torch.equal(particles[name][0], particles[name][1])

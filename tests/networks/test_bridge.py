"""The bridge from networks to the engine: one relaxation, two programs."""

from __future__ import annotations

import math
from dataclasses import replace

import pyro
import pytest
import torch
from oracles import condition_gaussian
from torch import Tensor, nn

from dcpc import DCPC
from dcpc.errors import OptionError
from dcpc.networks import (
    CrossEntropyNode,
    FactorizedGaussianNode,
    FunctionNode,
    MultivariateGaussianNode,
    PredictiveCodingNetwork,
    PyroNetwork,
    SquaredErrorNode,
    relax,
    sgd,
)


def network(output: nn.Module) -> PredictiveCodingNetwork:
    torch.manual_seed(0)
    hidden = FactorizedGaussianNode(5)
    nn.init.normal_(hidden.logvar, std=0.3)
    full = MultivariateGaussianNode(3)
    nn.init.normal_(full.raw_scale, std=0.3)
    return PredictiveCodingNetwork(
        nn.Linear(4, 5), hidden, nn.Tanh(), nn.Linear(5, 3), full, nn.Linear(3, 2), output
    ).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 4, dtype=torch.double, generator=generator)
    y = nn.functional.one_hot(torch.arange(6) % 2, 2).double()
    return x, y


@pytest.mark.parametrize("output", [SquaredErrorNode, CrossEntropyNode])
def test_preset_pc_relaxes_the_program_as_relax_does_the_network(output: type[nn.Module]) -> None:
    ours, (x, y), step_size = network(output(2)), data(), 0.05
    ours.init(x)
    ours.nodes[-1].clamp(y)
    engine = DCPC(PyroNetwork(ours), num_particles=1, algorithm="pc", step_size=step_size)
    state = engine.init(x, y)
    first = {f"z{i}": ours.nodes[i].value.detach().clone().unsqueeze(0) for i in (1, 2)}
    state = replace(state, latents=first)
    for _ in range(5):
        state, _ = engine.sweep(state, x, y)
        relax(ours, 1, sgd(step_size))
        for i in (1, 2):
            torch.testing.assert_close(
                state.latents[f"z{i}"][0], ours.nodes[i].value, rtol=1e-12, atol=1e-12
            )


def test_the_energy_is_minus_the_log_density() -> None:
    ours, (x, y) = network(SquaredErrorNode(2)), data()
    torch.manual_seed(3)
    trace = pyro.poutine.trace(PyroNetwork(ours)).get_trace(x, y)
    trace.compute_log_prob()
    log_joint = sum(trace.nodes[f"z{i}"]["log_prob"] for i in (1, 2, 3))
    ours.init(x)
    for i in (1, 2, 3):
        ours.nodes[i].init(trace.nodes[f"z{i}"]["value"])
    constant = 0.5 * (5 + 3 + 2) * math.log(2 * math.pi)
    torch.testing.assert_close(ours.energy(), -log_joint - constant)


def test_preset_dcpc_samples_the_posterior_of_a_linear_network() -> None:
    torch.manual_seed(0)
    hidden = MultivariateGaussianNode(3)
    nn.init.normal_(hidden.raw_scale, std=0.5)
    above, below = nn.Linear(4, 3), nn.Linear(3, 2)
    linear = PredictiveCodingNetwork(above, hidden, below, SquaredErrorNode(2)).double()
    x, y = (rows[:3] for rows in data())
    engine = DCPC(PyroNetwork(linear), num_particles=256)
    posterior = engine.run(x, y, num_sweeps=60, keep_every=2, seed=0, progress=False)
    with torch.no_grad():
        covariance, means = hidden.scale_tril @ hidden.scale_tril.T, above(x)
        for row, (mean, target) in enumerate(zip(means, y - below.bias, strict=True)):
            mean, covariance_left, log_evidence = condition_gaussian(
                mean, covariance, below.weight, torch.ones(2, dtype=torch.double), target
            )
            found = posterior.history["z1"][:, :, row].reshape(-1, 3)
            deviations = covariance_left.diagonal().sqrt()
            # Five standard errors of a mean, were half of the 256 x 30 draws independent.
            assert float(((found.mean(0) - mean) / deviations).abs().max()) < 0.08
            assert float((found.std(0) / deviations - 1.0).abs().max()) < 0.08
            error = float(posterior.log_evidence[row]) - log_evidence
            assert abs(error) < 5.0 * float(posterior.log_evidence_se[row]) + 0.02


def test_nodes_that_are_no_random_variables_are_refused() -> None:
    with pytest.raises(OptionError, match="node 1, a FunctionNode, is no random variable"):
        PyroNetwork(PredictiveCodingNetwork(FunctionNode(lambda z, u: z.sum(1), 2)))
    middle = PredictiveCodingNetwork(CrossEntropyNode(2), SquaredErrorNode(2))
    with pytest.raises(OptionError, match="node 1, a CrossEntropyNode"):
        PyroNetwork(middle)

"""Standardised coordinates: the density of `e` is that of `z`, by torch's own formulas."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.reparam import LocScaleReparam
from scipy import stats
from torch import Tensor
from torch.distributions import transforms

from dcpc import DCPC
from dcpc.distributions import SharedScaleNormal
from dcpc.divide.model import log_factors
from dcpc.divide.sites import read_sites
from dcpc.divide.supports import draw, log_density, transform_of
from dcpc.divide.supports.standardised import standardised
from dcpc.errors import ModelError, OptionError
from dcpc.reparam import NonCentred

pytestmark = pytest.mark.usefixtures("float64")

LOC = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64)
SCALE = torch.tensor([0.2, 1.0, 4.0], dtype=torch.float64)
TRIL = torch.tensor([[0.7, 0, 0], [-0.4, 1.5, 0], [2.0, 0.3, 0.2]], dtype=torch.float64)
MANY = torch.stack([TRIL, 2 * TRIL])

ELEMENTWISE = {
    "normal": lambda: dist.Normal(LOC, SCALE),
    "laplace": lambda: dist.Laplace(LOC, SCALE),
    "soft laplace": lambda: dist.SoftLaplace(LOC, SCALE),
    "asymmetric laplace": lambda: dist.AsymmetricLaplace(LOC, SCALE, torch.tensor(2.0)),
    "cauchy": lambda: dist.Cauchy(LOC, SCALE),
    "student": lambda: dist.StudentT(torch.tensor(3.0), LOC, SCALE),
    "gumbel": lambda: dist.Gumbel(LOC, SCALE),
    "log-normal": lambda: dist.LogNormal(LOC, SCALE),
    "shifted tanh": lambda: dist.TransformedDistribution(
        dist.Normal(LOC, SCALE), [transforms.TanhTransform(), transforms.AffineTransform(2.0, 3.0)]
    ),
    "joint": lambda: dist.Normal(LOC, SCALE).to_event(1),
    "joint log-normal": lambda: dist.LogNormal(LOC, SCALE).to_event(1),
}
MULTIVARIATE = {
    "multivariate": lambda: dist.MultivariateNormal(LOC, scale_tril=TRIL),
    "covariance": lambda: dist.MultivariateNormal(LOC, TRIL @ TRIL.T),
    "of its own each": lambda: dist.MultivariateNormal(LOC.expand(2, 3), scale_tril=MANY),
    "shared": lambda: SharedScaleNormal(LOC.expand(2, 3), TRIL),
}


@pytest.mark.parametrize("name", ELEMENTWISE | MULTIVARIATE)
def test_the_density_of_an_error_is_that_of_its_value_and_the_jacobian(name: str) -> None:
    fn = (ELEMENTWISE | MULTIVARIATE)[name]()
    held = standardised(fn)
    assert held is not None
    e = 0.4 * torch.randn(fn.shape())
    z = transform_of(held)(e)
    density, rest = log_density(held, e)
    assert rest is None
    assert density.shape == fn.batch_shape
    whole = torch.autograd.functional.jacobian(transform_of(held), e)
    log_det = torch.linalg.slogdet(whole.reshape(e.numel(), e.numel())).logabsdet
    total = fn.log_prob(z).sum() + log_det
    torch.testing.assert_close(density.sum(), total)
    torch.testing.assert_close(transform_of(held).inv(z), e)
    torch.testing.assert_close(held.log_prob(z), fn.log_prob(z))
    assert held.expand(torch.Size([4, *fn.batch_shape])).batch_shape == (4, *fn.batch_shape)


def test_the_density_of_a_normal_error_depends_on_no_parent() -> None:
    loc = torch.zeros(3, requires_grad=True)
    held = standardised(dist.Normal(loc, 2.0 * loc.exp()))
    density, _ = log_density(held, torch.ones(3))
    assert not density.requires_grad
    torch.testing.assert_close(density, dist.Normal(0.0, 1.0).log_prob(torch.ones(3)))


@pytest.mark.parametrize("name", ["normal", "cauchy", "student", "log-normal", "shared"])
def test_draws_of_errors_give_draws_of_values(name: str) -> None:
    fn = (ELEMENTWISE | MULTIVARIATE)[name]()
    held = standardised(fn)
    many = held.expand(torch.Size([20_000, *fn.batch_shape]))
    ours = transform_of(many)(draw(many)).reshape(20_000, -1)[:, -1]
    theirs = fn.sample((20_000,)).reshape(20_000, -1)[:, -1]
    assert stats.ks_2samp(ours.numpy(), theirs.numpy()).pvalue > 1e-4


@pytest.mark.parametrize(
    "fn",
    [
        dist.Gamma(2.0, 3.0),
        dist.Dirichlet(torch.ones(3)),
        dist.Normal(0.0, 1.0).mask(torch.tensor(True)),
        dist.TransformedDistribution(
            dist.Normal(torch.zeros(3), 1.0).to_event(1), [transforms.StickBreakingTransform()]
        ),
        dist.LowRankMultivariateNormal(LOC, TRIL[:, :1], SCALE),
        dist.MixtureOfDiagNormals(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2)),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_other_families_have_no_errors(fn: object) -> None:
    assert standardised(fn) is None


def hierarchy(y: Tensor) -> None:
    """Every kind of site that has an error, each with a parent, and some that have none."""
    mu = pyro.sample("mu", dist.StudentT(4.0, 1.0, 2.0))
    tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(mu, 0.3))
    tril = torch.eye(2) + 0.5 * torch.ones(2, 2).tril(-1)
    pair = pyro.sample("pair", dist.MultivariateNormal(mu.expand(2), scale_tril=tril))
    with pyro.plate("rows", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta * pair[0], scale + pair[1].square()), obs=y)


def test_a_joint_density_is_that_of_pyros_own_reparameterisation() -> None:
    y = torch.tensor([0.3, -1.0, 2.0])
    e = {"mu": torch.randn(()), "tau": torch.randn(()), "scale": torch.randn(())}
    e |= {"pair": torch.randn(2), "theta": torch.randn(3)}

    @pyro.poutine.reparam(config={"mu": LocScaleReparam(0.0), "theta": LocScaleReparam(0.0)})
    def by_pyro(y: Tensor) -> None:
        hierarchy(y)

    ours = NonCentred(hierarchy, ["mu", "theta"])
    sites = read_sites(ours, (y,), {})
    assert [name for name, site in sites.items() if site.is_standardised] == ["mu", "theta"]
    found = log_factors(ours, e, (y,), {}, sites)
    renamed = {f"{n}_decentered" if n in ("mu", "theta") else n: u for n, u in e.items()}
    expected = log_factors(by_pyro, renamed, (y,), {}, read_sites(by_pyro, (y,), {}))
    for name, value in found.items():
        there = f"{name}_decentered" if name in ("mu", "theta") else name
        torch.testing.assert_close(value, expected[there], msg=name)


def test_an_error_is_its_own_prior_and_what_hangs_below_it() -> None:
    y = torch.zeros(3)
    units = {u.name: u for u in DCPC(NonCentred(hierarchy), num_particles=2, blocks=()).units(y)}
    assert all(not unit.parents for unit in units.values())
    assert units["mu"].children == {"y"}
    centred = {u.name: u for u in DCPC(hierarchy, num_particles=2, blocks=()).units(y)}
    assert centred["mu"].children == {"scale", "pair", "theta"}
    assert centred["theta"].parents == {"mu", "tau"}
    assert {n: u.size for n, u in units.items()} == {n: u.size for n, u in centred.items()}


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (["nowhere"], r"\['nowhere'\] are no latents"),
        (["tau"], "site 'tau' cannot be held non-centred: Gamma"),
    ],
)
def test_sites_without_errors_are_refused_by_name(sites: list[str], message: str) -> None:
    with pytest.raises((ModelError, OptionError), match=message):
        DCPC(NonCentred(hierarchy, sites), num_particles=2).bind(torch.zeros(3))


def test_densities_that_handlers_scale_or_mask_stay_as_they_are() -> None:
    @pyro.poutine.scale(scale=2.0)
    def scaled(y: Tensor) -> None:
        hierarchy(y)

    def masked(y: Tensor) -> None:
        with pyro.poutine.mask(mask=torch.tensor(False)):
            hierarchy(y)

    for model in (scaled, masked):
        sites = read_sites(NonCentred(model), (torch.zeros(3),), {})
        assert not any(site.is_standardised for site in sites.values())
    with pytest.raises(ModelError, match="'mu' cannot be held non-centred: a handler"):
        DCPC(NonCentred(scaled, ["mu"]), num_particles=2).bind(torch.zeros(3))

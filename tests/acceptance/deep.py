"""Generative networks with fixed weights: the posterior of their latents."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import Gamma, Poisson
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional

from tests.acceptance.case import Program, Reference, bits
from tests.acceptance.conjugate import grid_posterior
from tests.acceptance.ensemble import ensemble_posterior

Values = Mapping[str, Tensor]


def _fixed(module: nn.Module, seed: int, gain: float) -> nn.Module:
    """A network whose weights are drawn from a seed and made larger."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in module.parameters():
            parameter.data.copy_(gain * torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    return module


# -- variational autoencoder ---------------------------------------------------------------------


class Decoder(nn.Module):
    def __init__(self, z_dim, hidden_dim, num_pixels):
        super().__init__()
        self.fc1 = nn.Linear(z_dim, hidden_dim)
        self.fc21 = nn.Linear(hidden_dim, num_pixels)
        self.softplus = nn.Softplus()
        self.sigmoid = nn.Sigmoid()

    def forward(self, z):
        return self.sigmoid(self.fc21(self.softplus(self.fc1(z))))


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.z_dim = 2
        self.decoder = _fixed(Decoder(2, 4, 6), seed=0, gain=2.0)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = torch.zeros(x.shape[0], self.z_dim, dtype=x.dtype, device=x.device)
            z_scale = torch.ones(x.shape[0], self.z_dim, dtype=x.dtype, device=x.device)
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            loc_img = self.decoder.forward(z)
            pyro.sample(
                "obs",
                dist.Bernoulli(loc_img, validate_args=False).to_event(1),
                obs=x.reshape(-1, 6),
            )
            return loc_img


IMAGES = bits(1, 3, 2, 3)


def _vae() -> Reference:
    decoder = VAE().decoder.double()
    axis = torch.linspace(-6, 6, 241)
    mean, spread = [], []
    for image in IMAGES.flatten(1).double():

        def log_density(at: Values, image: Tensor = image) -> Tensor:
            z = torch.stack([at["0"], at["1"]], -1)
            with torch.no_grad():
                logits = decoder.fc21(functional.softplus(decoder.fc1(z)))
            likelihood = torch.distributions.Bernoulli(logits=logits).log_prob(image).sum(-1)
            return likelihood - 0.5 * (z**2).sum(-1)

        found = grid_posterior(log_density, {"0": axis, "1": axis})
        mean.append(torch.stack([found.mean["0"], found.mean["1"]]))
        spread.append(torch.stack([found.std["0"], found.std["1"]]))
    return Reference({"latent": torch.stack(mean)}, {"latent": torch.stack(spread)})


# -- deep Markov model ---------------------------------------------------------------------------


class Emitter(nn.Module):
    def __init__(self, input_dim, z_dim, emission_dim):
        super().__init__()
        self.lin_z_to_hidden = nn.Linear(z_dim, emission_dim)
        self.lin_hidden_to_hidden = nn.Linear(emission_dim, emission_dim)
        self.lin_hidden_to_input = nn.Linear(emission_dim, input_dim)
        self.relu = nn.ReLU()

    def forward(self, z_t):
        h1 = self.relu(self.lin_z_to_hidden(z_t))
        h2 = self.relu(self.lin_hidden_to_hidden(h1))
        return torch.sigmoid(self.lin_hidden_to_input(h2))


class GatedTransition(nn.Module):
    def __init__(self, z_dim, transition_dim):
        super().__init__()
        self.lin_gate_z_to_hidden = nn.Linear(z_dim, transition_dim)
        self.lin_gate_hidden_to_z = nn.Linear(transition_dim, z_dim)
        self.lin_proposed_mean_z_to_hidden = nn.Linear(z_dim, transition_dim)
        self.lin_proposed_mean_hidden_to_z = nn.Linear(transition_dim, z_dim)
        self.lin_sig = nn.Linear(z_dim, z_dim)
        self.lin_z_to_loc = nn.Linear(z_dim, z_dim)
        self.relu = nn.ReLU()
        self.softplus = nn.Softplus()

    def forward(self, z_t_1):
        gate = torch.sigmoid(self.lin_gate_hidden_to_z(self.relu(self.lin_gate_z_to_hidden(z_t_1))))
        hidden = self.relu(self.lin_proposed_mean_z_to_hidden(z_t_1))
        proposed_mean = self.lin_proposed_mean_hidden_to_z(hidden)
        loc = (1 - gate) * self.lin_z_to_loc(z_t_1) + gate * proposed_mean
        scale = self.softplus(self.lin_sig(self.relu(proposed_mean)))
        return loc, scale


class DMM(nn.Module):
    def __init__(self):
        super().__init__()
        self.emitter = _fixed(Emitter(3, 1, 4), seed=1, gain=1.5)
        self.trans = _fixed(GatedTransition(1, 3), seed=2, gain=1.0)
        self.trans.lin_z_to_loc.weight.data = torch.eye(1)
        self.trans.lin_z_to_loc.bias.data = torch.zeros(1)
        self.z_0 = nn.Parameter(torch.zeros(1))

    def model(self, mini_batch, mini_batch_mask, annealing_factor=1.0):
        T_max = mini_batch.size(1)
        pyro.module("dmm", self)
        z_prev = self.z_0.expand(mini_batch.size(0), self.z_0.size(0))
        with pyro.plate("z_minibatch", len(mini_batch)):
            for t in pyro.markov(range(1, T_max + 1)):
                z_loc, z_scale = self.trans(z_prev)
                with pyro.poutine.scale(scale=annealing_factor):
                    z_t = pyro.sample(
                        f"z_{t}",
                        dist.Normal(z_loc, z_scale).mask(mini_batch_mask[:, t - 1 : t]).to_event(1),
                    )
                emission_probs_t = self.emitter(z_t)
                pyro.sample(
                    f"obs_x_{t}",
                    dist.Bernoulli(emission_probs_t)
                    .mask(mini_batch_mask[:, t - 1 : t])
                    .to_event(1),
                    obs=mini_batch[:, t - 1, :],
                )
                z_prev = z_t


NOTES = bits(2, 2, 4, 3)
NOTES[1, 3] = 0.0
NOTES_MASK = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 0]]).bool()


def _dmm() -> Reference:
    """Forward and backward over a grid of the state, for each sequence."""
    dmm = DMM().double()
    axis = torch.linspace(-12, 12, 961).double()
    with torch.no_grad():
        loc, scale = (value[:, 0] for value in dmm.trans(axis[:, None]))
        first, first_scale = (value[0] for value in dmm.trans(dmm.z_0))
        chances = dmm.emitter(axis[:, None])
    normal = torch.distributions.Normal
    move = normal(loc[:, None], scale[:, None]).log_prob(axis)
    means, spreads = torch.zeros(4, 2).double(), torch.ones(4, 2).double()
    for i, length in enumerate(NOTES_MASK.sum(1).tolist()):
        emit = torch.distributions.Bernoulli(chances[:, None]).log_prob(NOTES[i].double()).sum(-1)
        forward = [normal(first, first_scale).log_prob(axis) + emit[:, 0]]
        for t in range(1, length):
            forward.append((forward[-1][:, None] + move).logsumexp(0) + emit[:, t])
        backward = [torch.zeros_like(axis)]
        for t in range(length - 1, 0, -1):
            backward.append((move + emit[:, t] + backward[-1]).logsumexp(1))
        for t in range(length):
            weight = (forward[t] + backward[length - 1 - t]).softmax(0)
            means[t, i] = weight @ axis
            spreads[t, i] = (weight @ (axis - means[t, i]) ** 2).sqrt()
    return Reference(
        {f"z_{t + 1}": means[t, : 2 if t < 3 else 1, None] for t in range(4)},
        {f"z_{t + 1}": spreads[t, : 2 if t < 3 else 1, None] for t in range(4)},
    )


def _about_notes(z: Values) -> Values:
    """Without the last state of the shorter sequence, which is masked out."""
    return {f"z_{t}": z[f"z_{t}"][..., : 2 if t < 4 else 1, :] for t in range(1, 5)}


# -- sparse gamma deep exponential family --------------------------------------------------------


class SparseGammaDEF:
    def __init__(self):
        self.top_width, self.mid_width, self.bottom_width, self.image_size = 2, 2, 1, 3
        self.alpha_z = torch.tensor(0.5)
        self.beta_z = torch.tensor(0.5)
        self.alpha_w = torch.tensor(0.5)
        self.beta_w = torch.tensor(0.5)

    def model(self, x):
        x_size = x.size(0)
        with pyro.plate("w_top_plate", self.top_width * self.mid_width):
            w_top = pyro.sample("w_top", Gamma(self.alpha_w, self.beta_w))
        with pyro.plate("w_mid_plate", self.mid_width * self.bottom_width):
            w_mid = pyro.sample("w_mid", Gamma(self.alpha_w, self.beta_w))
        with pyro.plate("w_bottom_plate", self.bottom_width * self.image_size):
            w_bottom = pyro.sample("w_bottom", Gamma(self.alpha_w, self.beta_w))
        with pyro.plate("data", x_size):
            z_top = pyro.sample(
                "z_top", Gamma(self.alpha_z, self.beta_z).expand([self.top_width]).to_event(1)
            )
            w_top = (
                w_top.reshape(self.top_width, self.mid_width)
                if w_top.dim() == 1
                else w_top.reshape(-1, self.top_width, self.mid_width)
            )
            mean_mid = torch.matmul(z_top, w_top)
            z_mid = pyro.sample("z_mid", Gamma(self.alpha_z, self.beta_z / mean_mid).to_event(1))
            w_mid = (
                w_mid.reshape(self.mid_width, self.bottom_width)
                if w_mid.dim() == 1
                else w_mid.reshape(-1, self.mid_width, self.bottom_width)
            )
            mean_bottom = torch.matmul(z_mid, w_mid)
            z_bottom = pyro.sample(
                "z_bottom", Gamma(self.alpha_z, self.beta_z / mean_bottom).to_event(1)
            )
            w_bottom = (
                w_bottom.reshape(self.bottom_width, self.image_size)
                if w_bottom.dim() == 1
                else w_bottom.reshape(-1, self.bottom_width, self.image_size)
            )
            mean_obs = torch.matmul(z_bottom, w_bottom)
            pyro.sample("obs", Poisson(mean_obs).to_event(1), obs=x)


SPARSE = torch.tensor([[3.0, 0, 1], [6.0, 1, 2]])


def _about_family(z: Values) -> Values:
    """What does not change when units swap: logarithms of the products and of the expectation."""
    w_top = z["w_top"].reshape(*z["w_top"].shape[:-1], 2, 2)
    mean_mid = (z["z_top"][..., None] * w_top[..., None, :, :]).sum(-2)
    mean_bottom = (z["z_mid"] * z["w_mid"][..., None, :]).sum(-1)
    expected = z["z_bottom"] * z["w_bottom"][..., None, :]
    return {
        "log of the mid layer's mean": mean_mid.sum(-1).log(),
        "log of the bottom layer's mean": mean_bottom.log(),
        "log expectation": expected.sum(-1).log(),
    }


def _sparse_gamma() -> Reference:
    def log_gamma(value: Tensor, rate: Tensor | float) -> Tensor:
        rate = torch.as_tensor(rate, dtype=value.dtype)
        return (0.5 * rate.log() - 0.5 * value.log() - rate * value).sum()

    def log_density(z: Values) -> Tensor:
        total = sum(log_gamma(z[name], 0.5) for name in ("w_top", "w_mid", "w_bottom", "z_top"))
        mid = z["z_top"] @ z["w_top"].reshape(2, 2)
        total = total + log_gamma(z["z_mid"], 0.5 / mid)
        bottom = z["z_mid"] @ z["w_mid"].reshape(2, 1)
        total = total + log_gamma(z["z_bottom"], 0.5 / bottom)
        expected = z["z_bottom"] @ z["w_bottom"].reshape(1, 3)
        return total + (SPARSE.double() * expected.log() - expected).sum()

    shapes = {
        "w_top": (4,),
        "w_mid": (2,),
        "w_bottom": (3,),
        "z_top": (2, 2),
        "z_mid": (2, 2),
        "z_bottom": (2, 1),
    }
    sites = {name: (shape, constraints.positive) for name, shape in shapes.items()}
    return ensemble_posterior(log_density, sites, _about_family)


# -- conditional autoencoder ---------------------------------------------------------------------


class Conditional(nn.Module):
    """A prior from the input's network, pixels of the output, the rest of which are masked."""

    def __init__(self):
        super().__init__()
        self.prior_net = _fixed(nn.Linear(3, 2), seed=5, gain=1.0)
        self.generation_net = _fixed(Decoder(1, 4, 4), seed=6, gain=2.0)

    def model(self, xs, ys):
        pyro.module("generation_net", self)
        with pyro.plate("data"):
            loc, log_scale = self.prior_net(xs).chunk(2, -1)
            zs = pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
            loc = self.generation_net(zs)
            hidden = ys == -1
            pyro.sample(
                "y",
                dist.Bernoulli(loc[~hidden].reshape(len(xs), -1), validate_args=False).to_event(1),
                obs=ys[~hidden].reshape(len(xs), -1),
            )


QUADRANTS = torch.tensor([[1.0, 0, 1], [0.0, 0, 1]])
REST = torch.tensor([[1.0, -1, 0, 1], [0.0, -1, 1, 1]])


def _conditional() -> Reference:
    network = Conditional().double()
    axis = torch.linspace(-8, 8, 3201).double()
    with torch.no_grad():
        p = network.generation_net(axis[:, None])[:, [0, 2, 3]]
        loc, log_scale = network.prior_net(QUADRANTS.double()).chunk(2, -1)
    y = REST[:, [0, 2, 3]].double()
    likelihood = functional.binary_cross_entropy(
        p.expand(2, -1, -1), y[:, None].expand(-1, len(axis), -1), reduction="none"
    ).sum(-1)
    weight = (-0.5 * ((axis - loc) / log_scale.exp()) ** 2 - likelihood).softmax(1)
    mean = (weight * axis).sum(1, keepdim=True)
    spread = (weight * (axis - mean) ** 2).sum(1, keepdim=True).sqrt()
    return Reference({"z": mean}, {"z": spread})


def programs() -> list[Program]:
    """The rows of this family."""
    return [
        Program("vae", "vae/vae.py", VAE().model, (IMAGES,), "grid", _vae),
        Program(
            "cvae",
            "cvae/cvae.py",
            Conditional().model,
            (QUADRANTS, REST),
            "grid",
            _conditional,
        ),
        Program(
            "dmm",
            "dmm.py",
            DMM().model,
            (NOTES, NOTES_MASK),
            "forward and backward on a grid",
            _dmm,
            quantities=_about_notes,
        ),
        Program(
            "sparse gamma DEF",
            "sparse_gamma_def.py",
            SparseGammaDEF().model,
            (SPARSE,),
            "Hamiltonian ensemble",
            _sparse_gamma,
            quantities=_about_family,
            remark="shapes and rates of .5 instead of .1 and .3",
        ),
    ]

"""Mixtures, topics, and other programs whose discrete latents say which component a datum is of."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.autoname import named
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex
from torch import Tensor, nn
from torch.distributions import constraints

from tests.acceptance.case import Program, Reference
from tests.acceptance.conjugate import (
    assignments,
    count,
    dirichlet_evidence,
    dirichlet_moments,
    grid_posterior,
    mixture,
)

# -- a toy mixture: A -> B -> C, where B is hidden ---------------------------------------------


@config_enumerate
def toy_mixture(prior, obs, num_obs):
    p_A = pyro.sample("p_A", dist.Beta(1, 1))
    p_B = pyro.sample("p_B", dist.Beta(torch.ones(2), torch.ones(2)).to_event(1))
    p_C = pyro.sample("p_C", dist.Beta(torch.ones(2), torch.ones(2)).to_event(1))
    with pyro.plate("data_plate", num_obs):
        A = pyro.sample("A", dist.Bernoulli(p_A.expand(num_obs)), obs=obs["A"])
        B = pyro.sample(
            "B",
            dist.Bernoulli(Vindex(p_B)[A.type(torch.long)]),
            infer={"enumerate": "parallel"},
        )
        pyro.sample("C", dist.Bernoulli(Vindex(p_C)[B.type(torch.long)]), obs=obs["C"])


TOY = {
    "A": torch.tensor([1.0, 1, 0, 1, 1, 0, 1, 1]),
    "C": torch.tensor([1.0, 1, 0, 1, 0, 0, 1, 1]),
}


def _toy_mixture() -> Reference:
    size = len(TOY["A"])
    b = assignments([2] * size)
    a, c = (TOY[name].long().expand(len(b), -1) for name in "AC")
    unit = torch.ones(2).double()
    moments, total = {}, torch.zeros(len(b)).double()
    for name, counts in {
        "p_A": count([1 - a], [2]),
        "p_B": count([a, 1 - b], [2, 2]),
        "p_C": count([b, 1 - c], [2, 2]),
    }.items():
        evidence = dirichlet_evidence(unit, counts)
        total = total + evidence.reshape(len(b), -1).sum(1)
        moments[name] = tuple(m[..., 0] for m in dirichlet_moments(unit + counts))
    return mixture(total, moments, {"B": (b, 2)})


# -- latent Dirichlet allocation -----------------------------------------------------------------


def topics(data=None, args=None, batch_size=None):
    with pyro.plate("topics", args.num_topics):
        topic_weights = pyro.sample("topic_weights", dist.Gamma(1.0 / args.num_topics, 1.0))
        topic_words = pyro.sample(
            "topic_words", dist.Dirichlet(torch.ones(args.num_words) / args.num_words)
        )
    with pyro.plate("documents", args.num_docs) as ind:
        if data is not None:
            with pyro.util.ignore_jit_warnings():
                assert data.shape == (args.num_words_per_doc, args.num_docs)
            data = data[:, ind]
        doc_topics = pyro.sample("doc_topics", dist.Dirichlet(topic_weights))
        with pyro.plate("words", args.num_words_per_doc):
            word_topics = pyro.sample(
                "word_topics", dist.Categorical(doc_topics), infer={"enumerate": "parallel"}
            )
            data = pyro.sample("doc_words", dist.Categorical(topic_words[word_topics]), obs=data)
    return topic_weights, topic_words, data


WORDS = torch.tensor([[0, 1], [0, 2], [0, 2]])  # (words per document, documents)
SIZES = SimpleNamespace(num_topics=2, num_words=3, num_docs=2, num_words_per_doc=3)


def _about_topics(z: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What does not change when topics swap their names."""
    topic, weights = z["word_topics"], z["topic_weights"]
    return {
        "total weight": weights.sum(-1),
        "overlap of topics": z["topic_words"].prod(-2).sum(-1),
        "one topic for words 1 and 2 of the first document": 1.0
        * (topic[..., 0, 0] == topic[..., 1, 0]),
        "one topic for the documents' first words": 1.0 * (topic[..., 0, 0] == topic[..., 0, 1]),
    }


def _topics() -> Reference:
    """Assignments of words to topics and a grid of log-weights; the rest is conjugate."""
    axis = torch.linspace(-12.0, 2.6, 120).double()
    log_weights = torch.cartesian_prod(axis, axis)
    weights = log_weights.exp()  # (G, topics)
    gamma = torch.distributions.Gamma(torch.tensor(0.5).double(), 1.0)
    prior = (gamma.log_prob(weights) + log_weights).sum(1)
    topic = assignments([2] * WORDS.numel())  # (M, words * documents)
    log_weight = torch.zeros(len(weights), len(topic)).double() + prior[:, None]
    by_document = topic.reshape(-1, *WORDS.shape)
    for document in range(WORDS.shape[1]):
        counts = count([by_document[:, :, document]], [2])
        log_weight = log_weight + dirichlet_evidence(weights[:, None], counts)
    words = count([topic, WORDS.flatten().expand(len(topic), -1)], [2, 3])
    third = torch.full((3,), 1 / 3).double()
    log_weight = log_weight + dirichlet_evidence(third, words).sum(1)
    joint = log_weight.flatten().softmax(0).reshape(log_weight.shape)
    concentration = third + words
    total = concentration.sum(-1)  # (M, topics)
    mean = (concentration / total[..., None]).prod(1).sum(-1)
    every = concentration[..., :, None] * concentration[..., None, :]
    pairs = every + torch.diag_embed(concentration)
    square = (pairs / (total * (total + 1))[..., None, None]).prod(1).sum((-1, -2))
    by_topics, by_weights = joint.sum(0), joint.sum(1)
    same = [1.0 * (by_document[:, 0, 0] == other) for other in by_document[:, [1, 0], [0, 1]].T]
    first = [(by_weights * weights.sum(1)).sum(), (by_topics * mean).sum()]
    second = [(by_weights * weights.sum(1) ** 2).sum(), (by_topics * square).sum()]
    first += [(by_topics * s).sum() for s in same]
    second += [(by_topics * s).sum() for s in same]
    names = list(_about_topics(_EXAMPLE))
    return Reference(
        dict(zip(names, first, strict=True)),
        {n: (b - a**2).sqrt() for n, a, b in zip(names, first, second, strict=True)},
    )


_EXAMPLE = {
    "word_topics": torch.zeros(3, 2),
    "topic_weights": torch.zeros(2),
    "topic_words": torch.zeros(2, 3),
}


# -- a Gaussian mixture, as in the tutorial ------------------------------------------------------


@config_enumerate
def gaussian_mixture(data):
    weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(data)):
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)


POINTS = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])


def _about_components(z: Mapping[str, Tensor]) -> dict[str, Tensor]:
    assignment = z["assignment"]
    together = assignment[..., 0] == assignment[..., 1]
    return {
        "sum of locs": z["locs"].sum(-1),
        "product of weights": z["weights"].prod(-1),
        "log scale": z["scale"].log(),
        "one component for points 1 and 2": together.to(z["scale"].dtype),
    }


def _gaussian_mixture() -> Reference:
    """All assignments, a grid of the log-scale; locations are Gaussian given both."""
    data, z = POINTS.double(), assignments([2] * len(POINTS))
    axis = torch.linspace(-5, 6, 2201).double()
    noise = (2 * axis).exp()[:, None, None]  # (G, M, components)
    member = torch.stack([(z == k).double() for k in range(2)], 1)  # (M, components, points)
    number, total, square = member.sum(2), member @ data, member @ data**2
    precision = 0.01 + number / noise
    mean = total / noise / precision
    evidence = -0.5 * (number * noise.log() + (precision / 0.01).log())
    evidence = evidence - 0.5 * (square / noise - precision * mean**2)
    half = torch.full((2,), 0.5).double()
    log_weight = evidence.sum(2) + dirichlet_evidence(half, number) - axis[:, None] ** 2 / 8
    weight = log_weight.flatten().softmax(0).reshape(log_weight.shape)
    a, b = (half + number).unbind(1)
    size = a + b
    product = a * b / (size * (size + 1))
    square = product * (a + 1) * (b + 1) / ((size + 2) * (size + 3))
    sums = mean.sum(2)
    together = (z[:, 0] == z[:, 1]).double()
    moments = {
        "sum of locs": (sums, sums**2 + (1 / precision).sum(2)),
        "product of weights": (product, square),
        "log scale": (axis[:, None], axis[:, None] ** 2),
        "one component for points 1 and 2": (together, together),
    }
    first = {name: (weight * m).sum() for name, (m, _) in moments.items()}
    second = {name: (weight * s).sum() for name, (_, s) in moments.items()}
    return Reference(first, {name: (second[name] - first[name] ** 2).sqrt() for name in first})


# -- the same with names made by `pyro.contrib.autoname` ----------------------------------------


def named_mixture(data, k):
    latent = named.Object("latent")
    latent.probs.param_(torch.tensor([0.6, 0.4]), constraint=constraints.simplex)
    latent.locs.param_(torch.tensor([0.5, 2.0]))
    latent.scales.param_(torch.ones(k), constraint=constraints.positive)
    latent.local = named.List()
    for x in data:
        local = latent.local.add()
        i = local.id.sample_(dist.Categorical(latent.probs))
        local.x.sample_(dist.Normal(latent.locs[i], latent.scales[i]), obs=x)


NAMED = torch.tensor([0.0, 1.0, 2.0, 4.0])


def _named_mixture() -> Reference:
    locs, probs = torch.tensor([0.5, 2.0]).double(), torch.tensor([0.6, 0.4]).double()
    share = (probs.log() - 0.5 * (NAMED.double()[:, None] - locs) ** 2).softmax(1)
    return Reference(probabilities={f"latent.local[{i}].id": share[i] for i in range(len(NAMED))})


# -- a Dirichlet process by stick breaking, truncated -------------------------------------------


def dirichlet_process(data, truncation):
    def mix_weights(beta):
        left = (1 - beta).cumprod(-1)
        return nn.functional.pad(beta, (0, 1), value=1) * nn.functional.pad(left, (1, 0), value=1)

    with pyro.plate("beta_plate", truncation - 1):
        beta = pyro.sample("beta", dist.Beta(1, 1.1))
    with pyro.plate("lambda_plate", truncation):
        rate = pyro.sample("lambda", dist.Gamma(3, 0.05))
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Categorical(mix_weights(beta)))
        pyro.sample("obs", dist.Poisson(rate[z]), obs=data)


COUNTS = torch.tensor([5.0, 8.0, 60.0, 110.0])


def _dirichlet_process() -> Reference:
    """All assignments; sticks (Beta) and rates (Gamma) are conjugate given them."""
    z = assignments([3] * len(COUNTS))
    numbers = torch.stack([(z == k).sum(1) for k in range(3)], 1).double()
    sums = torch.stack([((z == k) * COUNTS).sum(1) for k in range(3)], 1).double()
    after = numbers.flip(1).cumsum(1).flip(1) - numbers
    sticks = torch.stack([numbers, after], -1)[:, :2]
    prior = torch.tensor([1.0, 1.1]).double()
    shape, rate = 3 + sums, 0.05 + numbers
    log_weight = dirichlet_evidence(prior, sticks).sum(1)
    log_weight = log_weight + (torch.lgamma(shape) - shape * rate.log()).sum(1)
    beta = tuple(m[..., 0] for m in dirichlet_moments(prior + sticks))
    gamma = (shape / rate, shape * (shape + 1) / rate**2)
    return mixture(log_weight, {"beta": beta, "lambda": gamma}, {"z": (z, 3)})


# -- semi-supervised autoencoders: a class and a style -------------------------------------------


class SemiSupervised(nn.Module):
    """Style z, class y, pixels x; the decoder is given."""

    def __init__(self) -> None:
        super().__init__()
        self.z_dim, self.output_size = 1, 3
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.decoder = nn.Sequential(
                nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 5), nn.Sigmoid()
            )
            for parameter in self.decoder.parameters():
                parameter.data.mul_(3.0)

    def model(self, xs, ys=None):
        pyro.module("ss_vae", self)
        batch_size = xs.size(0)
        options = {"dtype": xs.dtype, "device": xs.device}
        with pyro.plate("data"):
            prior_loc = torch.zeros(batch_size, self.z_dim, **options)
            prior_scale = torch.ones(batch_size, self.z_dim, **options)
            zs = pyro.sample("z", dist.Normal(prior_loc, prior_scale).to_event(1))
            alpha_prior = torch.ones(batch_size, self.output_size, **options) / (
                1.0 * self.output_size
            )
            ys = pyro.sample("y", dist.OneHotCategorical(alpha_prior), obs=ys)
            loc = self.decoder(torch.cat([zs, ys], -1))
            pyro.sample("x", dist.Bernoulli(loc, validate_args=False).to_event(1), obs=xs)
            return loc


PIXELS = torch.tensor([[1.0, 0, 1, 0, 1], [0.9, 0.2, 0.1, 0.6, 0.0]])


def _semi_supervised() -> Reference:
    decoder = SemiSupervised().decoder.double()
    axis = torch.linspace(-7, 7, 1401).double()
    z = axis[:, None, None].expand(-1, 3, -1)
    y = torch.eye(3).double().expand(len(axis), -1, -1)
    with torch.no_grad():
        p = decoder(torch.cat([z, y], -1))  # (G, classes, pixels)
    means, spreads, shares = [], [], []
    for x in PIXELS.double():
        likelihood = (x * p.log() + (1 - x) * (1 - p).log()).sum(-1)
        weight = (likelihood - 0.5 * axis[:, None] ** 2).flatten().softmax(0).reshape(-1, 3)
        mean = (weight.sum(1) * axis).sum()
        means.append(mean)
        spreads.append((weight.sum(1) * (axis - mean) ** 2).sum().sqrt())
        shares.append(weight.sum(0))
    return Reference(
        {"z": torch.stack(means)[:, None]},
        {"z": torch.stack(spreads)[:, None]},
        probabilities={"y": torch.stack(shares)},
    )


class SingleCell(nn.Module):
    """Two layers of style, a cell's type and size, and zero-inflated counts of genes."""

    def __init__(self, scale_factor=1.0) -> None:
        super().__init__()
        self.scale_factor = scale_factor
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.z2_decoder = nn.Linear(3, 2)
            self.x_decoder = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 6))
            self.z2_decoder.weight.data.mul_(2.0)

    def model(self, x, y=None):
        pyro.module("scanvi", self)
        theta = pyro.param(
            "inverse_dispersion", 10.0 * x.new_ones(3), constraint=constraints.positive
        )
        with pyro.plate("batch", len(x)), pyro.poutine.scale(scale=self.scale_factor):
            z1 = pyro.sample("z1", dist.Normal(0, x.new_ones(1)).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(2)), obs=y)
            loc, scale = self.z2_decoder(torch.cat([z1, y], -1)).split(1, -1)
            z2 = pyro.sample("z2", dist.Normal(loc, nn.functional.softplus(scale)).to_event(1))
            size = pyro.sample("l", dist.LogNormal(2.0, x.new_ones(1)).to_event(1))
            gate_logits, mu = self.x_decoder(z2).split(3, -1)
            logits = (size * mu.softmax(-1) + 5e-3).log() - (theta + 5e-3).log()
            x_dist = dist.ZeroInflatedNegativeBinomial(
                gate_logits=gate_logits, total_count=theta, logits=logits
            )
            pyro.sample("x", x_dist.to_event(1), obs=x)


CELLS = torch.tensor([[3.0, 0, 7], [0.0, 2, 2]])


def _single_cell() -> Reference:
    """Each cell on a grid of its two styles and its log-size, summed over its types."""
    cell = SingleCell().double()
    normal, softplus = torch.distributions.Normal, nn.functional.softplus

    def density(at: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """`(G, types)`."""
        z1, z2, size = (at[name][:, None, None] for name in ("z1", "z2", "log l"))
        y = torch.eye(2).double().expand(len(z1), -1, -1)
        with torch.no_grad():
            loc, scale = cell.z2_decoder(torch.cat([z1.expand(-1, 2, -1), y], -1)).split(1, -1)
            gate, mu = cell.x_decoder(z2).split(3, -1)
        logits = (size.exp() * mu.softmax(-1) + 5e-3).log() - torch.tensor(10.005).double().log()
        log_count = (
            torch.lgamma(10 + x)
            - torch.lgamma(x + 1)
            - torch.lgamma(torch.tensor(10.0).double())
            - 10 * softplus(logits)
            - x * softplus(-logits)
        )
        open_gate = log_count + nn.functional.logsigmoid(-gate)
        zero = torch.logaddexp(open_gate, nn.functional.logsigmoid(gate))
        likelihood = torch.where(x == 0, zero, open_gate).sum(-1)
        return (
            likelihood
            + normal(loc, softplus(scale)).log_prob(z2)[..., 0]
            + normal(0.0, 1.0).log_prob(z1)[..., 0]
            + normal(2.0, 1.0).log_prob(size)[..., 0]
        )

    axes = {
        "z1": torch.linspace(-4.5, 4.5, 46),
        "z2": torch.linspace(-7, 7, 141),
        "log l": torch.linspace(-2, 6, 60),
    }
    each = [
        grid_posterior(
            lambda at, x=x: density(at, x).logsumexp(1),
            axes,
            lambda at, x=x: {"y": density(at, x).softmax(1)},
        )
        for x in CELLS.double()
    ]

    def gather(field: str, name: str) -> Tensor:
        return torch.stack([getattr(one, field)[name] for one in each])[:, None]

    return Reference(
        {name: gather("mean", name) for name in axes},
        {name: gather("std", name) for name in axes},
        probabilities={"y": torch.stack([one.probabilities["y"] for one in each])},
    )


def _about_cells(z: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"z1": z["z1"], "z2": z["z2"], "log l": z["l"].log()}


# -- Bayesian networks that are all discrete -----------------------------------------------------


@config_enumerate
def plated_network():
    """Two parents and a plate of children, with indices that `Vindex` broadcasts."""
    gen = torch.Generator().manual_seed(1)
    p = pyro.param("p", torch.rand(5, 4, 3, 2, generator=gen), constraint=constraints.simplex)
    x = pyro.sample("x", dist.Categorical(torch.ones(4)))
    y = pyro.sample("y", dist.Categorical(torch.ones(3)))
    with pyro.plate("z_plate", 5):
        p_xy = Vindex(p)[..., x, y, :]
        z = pyro.sample("z", dist.Categorical(p_xy))
        pyro.sample("seen", dist.Normal(z.float(), 1.0), obs=torch.tensor([0.0, 2, 1, -1, 0.5]))


def _plated_network() -> Reference:
    p = torch.rand(5, 4, 3, 2, generator=torch.Generator().manual_seed(1)).double()
    p = p / p.sum(-1, keepdim=True)
    seen = torch.tensor([0.0, 2, 1, -1, 0.5]).double()
    joint, values = [], list(itertools.product(range(4), range(3), *[range(2)] * 5))
    for x, y, *z in values:
        states = torch.tensor(z)
        own = p[torch.arange(5), x, y, states].log() - 0.5 * (seen - states) ** 2
        joint.append(own.sum())
    table = torch.tensor(values)
    discrete = {"x": (table[:, 0], 4), "y": (table[:, 1], 3), "z": (table[:, 2:], 2)}
    return mixture(torch.stack(joint), {}, discrete)


@config_enumerate
def mixed_plates(data):
    """Components by features, and data by features: two plates that cross."""
    data_plate = pyro.plate("data_plate", 4, dim=-1)
    feature_plate = pyro.plate("feature_plate", 3, dim=-2)
    component_plate = pyro.plate("component_plate", 2, dim=-1)
    with feature_plate, component_plate:
        p = pyro.sample("p", dist.Dirichlet(torch.ones(2)))
    with data_plate:
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.7, 0.3])))
        with feature_plate as vdx:
            pc = Vindex(p)[vdx[..., None], c, :]
            pyro.sample("x", dist.Categorical(pc), obs=data)


FEATURES = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 1], [0, 0, 1, 0]])


def _mixed_plates() -> Reference:
    c = assignments([2] * 4)
    counts = torch.stack([count([c, row.expand(len(c), -1)], [2, 2]) for row in FEATURES], 1)
    unit = torch.ones(2).double()
    prior = torch.tensor([0.7, 0.3]).double().log()[c].sum(1)
    evidence = dirichlet_evidence(unit, counts).sum((1, 2))
    return mixture(prior + evidence, {"p": dirichlet_moments(unit + counts)}, {"c": (c, 2)})


def programs() -> list[Program]:
    """The rows of this family."""
    exact = "enumeration of the assignments, conjugate given them"
    tutorial = "tutorial"
    return [
        Program(
            "toy mixture",
            "toy_mixture_model_discrete_enumeration.py",
            toy_mixture,
            (None, TOY, 8),
            exact,
            _toy_mixture,
        ),
        Program(
            "lda",
            "lda.py",
            topics,
            (WORDS, SIZES),
            "enumeration of the assignments, grid of the topics' weights",
            _topics,
            num_particles=1500,
            num_sweeps=150,
            quantities=_about_topics,
        ),
        Program(
            "gaussian mixture",
            f"{tutorial} gmm",
            gaussian_mixture,
            (POINTS,),
            "enumeration of the assignments, grid of the scale",
            _gaussian_mixture,
            num_particles=2000,
            num_sweeps=100,
            quantities=_about_components,
        ),
        Program(
            "named mixture",
            "contrib/autoname/mixture.py",
            named_mixture,
            (NAMED, 2),
            "closed form",
            _named_mixture,
        ),
        Program(
            "Dirichlet process",
            f"{tutorial} dirichlet_process_mixture",
            dirichlet_process,
            (COUNTS, 3),
            exact,
            _dirichlet_process,
            num_particles=6000,
            num_sweeps=80,
        ),
        Program(
            "ss_vae",
            "vae/ss_vae_M2.py",
            SemiSupervised().model,
            (PIXELS,),
            "grid of the style, classes summed",
            _semi_supervised,
        ),
        Program(
            "scanvi",
            "scanvi/scanvi.py",
            SingleCell().model,
            (CELLS,),
            "grid of styles and size, types summed",
            _single_cell,
            quantities=_about_cells,
        ),
        Program(
            "plated network",
            f"{tutorial} enumeration",
            plated_network,
            (),
            "enumeration",
            _plated_network,
        ),
        Program(
            "crossed plates",
            f"{tutorial} enumeration",
            mixed_plates,
            (FEATURES,),
            exact,
            _mixed_plates,
        ),
    ]

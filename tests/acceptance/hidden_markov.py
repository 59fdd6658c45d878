"""Hidden Markov models of Pyro's examples: music in zeros and ones, with ragged lengths.

The examples learn from chorales; here there are a few short sequences, and two states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import Tensor, nn
from torch.distributions import constraints

from tests.acceptance.case import Program, Reference
from tests.acceptance.conjugate import (
    assignments,
    count,
    dirichlet_evidence,
    dirichlet_moments,
    mixture,
)

STATES = 2
TONES = 2


def one_by_one(sequences, lengths):
    """Sequences in a loop, each of its own length."""
    num_tones = sequences.shape[-1]
    with poutine.mask(mask=True):
        probs_x = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(STATES) + 0.1).to_event(1))
        probs_y = pyro.sample(
            "probs_y", dist.Beta(0.1, 0.9).expand([STATES, num_tones]).to_event(2)
        )
    tones_plate = pyro.plate("tones", num_tones, dim=-1)
    for i in pyro.plate("sequences", len(sequences)):
        length = lengths[i]
        sequence = sequences[i, :length]
        x = 0
        for t in pyro.markov(range(length)):
            x = pyro.sample(
                f"x_{i}_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"}
            )
            with tones_plate:
                pyro.sample(f"y_{i}_{t}", dist.Bernoulli(probs_y[x.squeeze(-1)]), obs=sequence[t])


def batched(sequences, lengths, batch_size=None, include_prior=True):
    """Sequences in a plate, the ends of the shorter ones masked."""
    num_sequences, max_length, num_tones = map(int, sequences.shape)
    assert lengths.shape == (num_sequences,)
    assert lengths.max() <= max_length
    with poutine.mask(mask=include_prior):
        probs_x = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(STATES) + 0.1).to_event(1))
        probs_y = pyro.sample(
            "probs_y", dist.Beta(0.1, 0.9).expand([STATES, num_tones]).to_event(2)
        )
    tones_plate = pyro.plate("tones", num_tones, dim=-1)
    with pyro.plate("sequences", num_sequences, batch_size, dim=-2) as batch:
        lengths = lengths[batch]
        x = 0
        for t in pyro.markov(range(lengths.max())):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(
                    f"x_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"}
                )
                with tones_plate:
                    pyro.sample(
                        f"y_{t}", dist.Bernoulli(probs_y[x.squeeze(-1)]), obs=sequences[batch, t]
                    )


def autoregressive(sequences, lengths, batch_size=None):
    """Every tone depends on itself one step before as well."""
    num_sequences, _, num_tones = map(int, sequences.shape)
    with poutine.mask(mask=True):
        probs_x = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(STATES) + 0.1).to_event(1))
        probs_y = pyro.sample(
            "probs_y", dist.Beta(0.1, 0.9).expand([STATES, 2, num_tones]).to_event(3)
        )
    tones_plate = pyro.plate("tones", num_tones, dim=-1)
    with pyro.plate("sequences", num_sequences, batch_size, dim=-2) as batch:
        lengths = lengths[batch]
        x, y = 0, 0
        for t in pyro.markov(range(lengths.max())):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(
                    f"x_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"}
                )
                with tones_plate as tones:
                    y = pyro.sample(
                        f"y_{t}", dist.Bernoulli(probs_y[x, y, tones]), obs=sequences[batch, t]
                    ).long()


def factorial(sequences, lengths, batch_size=None):
    """Two chains side by side, which meet in the tones."""
    num_sequences, _, num_tones = map(int, sequences.shape)
    rows = dist.Dirichlet(0.9 * torch.eye(STATES) + 0.1).to_event(1)
    with poutine.mask(mask=True):
        probs_w = pyro.sample("probs_w", rows)
        probs_x = pyro.sample("probs_x", rows)
        probs_y = pyro.sample(
            "probs_y", dist.Beta(0.1, 0.9).expand([STATES, STATES, num_tones]).to_event(3)
        )
    tones_plate = pyro.plate("tones", num_tones, dim=-1)
    with pyro.plate("sequences", num_sequences, batch_size, dim=-2) as batch:
        lengths = lengths[batch]
        w, x = 0, 0
        for t in pyro.markov(range(lengths.max())):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                w = pyro.sample(
                    f"w_{t}", dist.Categorical(probs_w[w]), infer={"enumerate": "parallel"}
                )
                x = pyro.sample(
                    f"x_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"}
                )
                with tones_plate as tones:
                    pyro.sample(
                        f"y_{t}", dist.Bernoulli(probs_y[w, x, tones]), obs=sequences[batch, t]
                    )


def dynamic_network(sequences, lengths, batch_size=None):
    """Two chains, of which the second depends on the first."""
    num_sequences, _, num_tones = map(int, sequences.shape)
    rows = dist.Dirichlet(0.9 * torch.eye(STATES) + 0.1)
    with poutine.mask(mask=True):
        probs_w = pyro.sample("probs_w", rows.to_event(1))
        probs_x = pyro.sample("probs_x", rows.expand_by([STATES]).to_event(2))
        probs_y = pyro.sample(
            "probs_y", dist.Beta(0.1, 0.9).expand([STATES, STATES, num_tones]).to_event(3)
        )
    tones_plate = pyro.plate("tones", num_tones, dim=-1)
    with pyro.plate("sequences", num_sequences, batch_size, dim=-2) as batch:
        lengths = lengths[batch]
        w = x = torch.tensor(0, dtype=torch.long)
        for t in pyro.markov(range(lengths.max())):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                w = pyro.sample(
                    f"w_{t}", dist.Categorical(probs_w[w]), infer={"enumerate": "parallel"}
                )
                x = pyro.sample(
                    f"x_{t}",
                    dist.Categorical(Vindex(probs_x)[w, x]),
                    infer={"enumerate": "parallel"},
                )
                with tones_plate as tones:
                    pyro.sample(
                        f"y_{t}", dist.Bernoulli(probs_y[w, x, tones]), obs=sequences[batch, t]
                    )


class TonesGenerator(nn.Module):
    """Logits of the tones, from the state and the tones one step before."""

    def __init__(self, num_tones: int) -> None:
        super().__init__()
        self.num_tones = num_tones
        self.x_to_hidden = nn.Linear(STATES, 4)
        self.y_to_hidden = nn.Linear(2 * num_tones, 4)
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.hidden_to_logits = nn.Linear(4, num_tones)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        one_hot = y.new_zeros((*x.shape[:-1], STATES)).scatter_(-1, x, 1)
        convolved = self.relu(self.conv(y.reshape(-1, 1, self.num_tones)))
        convolved = convolved.reshape((*y.shape[:-1], -1))
        hidden = self.relu(self.x_to_hidden(one_hot) + self.y_to_hidden(convolved))
        return self.hidden_to_logits(hidden)


def tones_generator() -> TonesGenerator:
    """A generator whose tones tell the states apart."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = TonesGenerator(TONES)
        for parameter in network.parameters():
            parameter.data.mul_(2.0)
    return network


class NeuralEmission:
    """A program that keeps its network to itself."""

    def __init__(self) -> None:
        self.network = tones_generator()

    def __call__(self, sequences, lengths, batch_size=None):
        num_sequences, _, num_tones = map(int, sequences.shape)
        pyro.module("tones_generator", self.network)
        with poutine.mask(mask=True):
            probs_x = pyro.sample(
                "probs_x", dist.Dirichlet(0.9 * torch.eye(STATES) + 0.1).to_event(1)
            )
        with pyro.plate("sequences", num_sequences, batch_size, dim=-2) as batch:
            lengths = lengths[batch]
            x = 0
            y = torch.zeros(num_tones)
            for t in pyro.markov(range(lengths.max())):
                with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                    x = pyro.sample(
                        f"x_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"}
                    )
                    with pyro.plate(f"tones_{t}", num_tones, dim=-1):
                        y = pyro.sample(
                            f"y_{t}",
                            dist.Bernoulli(logits=self.network(x, y)),
                            obs=sequences[batch, t],
                        )


def raftery(sequences, lengths, batch_size=None):
    """Second order, with the transitions as a mixture of two matrices, all of them parameters."""
    num_sequences, _, num_tones = map(int, sequences.shape)
    rows = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    probs_x1 = pyro.param("probs_x1", rows, constraint=constraints.simplex)
    probs_x2 = pyro.param("probs_x2", rows.flip(0), constraint=constraints.simplex)
    share = pyro.param("share", torch.tensor(0.4), constraint=constraints.unit_interval)
    probs_x = share * probs_x1 + (1.0 - share) * probs_x2.unsqueeze(-2)
    probs_y = pyro.param(
        "probs_y", torch.tensor([[0.2, 0.6], [0.7, 0.3]]), constraint=constraints.unit_interval
    )
    tones_plate = pyro.plate("tones", num_tones, dim=-1)
    with pyro.plate("sequences", num_sequences, batch_size, dim=-2) as batch:
        lengths = lengths[batch]
        current, previous = torch.tensor(0), torch.tensor(0)
        for t in pyro.markov(range(lengths.max()), history=2):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                probs = Vindex(probs_x)[previous, current]
                previous, current = (
                    current,
                    pyro.sample(f"x_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"}),
                )
                with tones_plate:
                    pyro.sample(
                        f"y_{t}",
                        dist.Bernoulli(probs_y[current.squeeze(-1)]),
                        obs=sequences[batch, t],
                    )


class SummedOut:
    """The states summed out by `DiscreteHMM`, so that only their transitions are latent."""

    def __init__(self) -> None:
        self.network = tones_generator()

    def __call__(self, sequences, lengths, batch_size=None):
        num_sequences = len(sequences)
        pyro.module("tones_generator", self.network)
        with poutine.mask(mask=True):
            probs_x = pyro.sample(
                "probs_x", dist.Dirichlet(0.9 * torch.eye(STATES) + 0.1).to_event(1)
            )
        with pyro.plate("sequences", num_sequences, batch_size, dim=-1) as batch:
            lengths = lengths[batch]
            y = sequences[batch, : lengths.max()]
            x = torch.arange(STATES).unsqueeze(-1)
            t = torch.arange(y.size(1))
            start = torch.full((STATES,), -float("inf"))
            start[0] = 0
            tones = dist.Bernoulli(logits=self.network(x, y.unsqueeze(-2))).to_event(1)
            tones = tones.mask((t < lengths.unsqueeze(-1)).unsqueeze(-1))
            pyro.sample("y", dist.DiscreteHMM(start, probs_x.log(), tones), obs=y)


# -- oracles ---------------------------------------------------------------------------------


class Paths:
    """All paths of one chain per sequence, and what is counted along them.

    Attributes:
        cells: `(i, t)` of every state.
        value: By chain, states `(M, cells)` in each assignment.
    """

    def __init__(self, lengths: Tensor, num_chains: int = 1) -> None:
        self.lengths = lengths
        self.cells = [(i, t) for i, length in enumerate(lengths.tolist()) for t in range(length)]
        joint = assignments([STATES] * (num_chains * len(self.cells)))
        self.value = joint.split(len(self.cells), 1)

    def before(self, chain: int, lag: int = 1) -> Tensor:
        """The states some steps before, zero before the start, `(M, cells)`."""
        value = self.value[chain]
        columns = [
            value[:, self.cells.index((i, t - lag))] if t >= lag else torch.zeros_like(value[:, 0])
            for i, t in self.cells
        ]
        return torch.stack(columns, 1)

    def tone(self, sequences: Tensor, tone: int, lag: int = 0) -> Tensor:
        """A tone, or its value some steps before, `(M, cells)`."""
        row = [int(sequences[i, t - lag, tone]) if t >= lag else 0 for i, t in self.cells]
        return torch.tensor(row).expand(len(self.value[0]), -1)

    def tones(self, sequences: Tensor, scope: list[Tensor], lag: int = 0) -> Tensor:
        """Counts `(M, *states, tones, 2)` of ones and zeros under each combination of states."""
        counts = []
        for tone in range(sequences.shape[-1]):
            off = 1 - self.tone(sequences, tone)
            extra = [self.tone(sequences, tone, lag)] if lag else []
            every = [*scope, *extra, off]
            counts.append(count(every, [STATES] * len(scope) + [2] * (len(extra) + 1)))
        return torch.stack(counts, -2)

    def latents(self, **chains: int) -> dict[str, tuple[Tensor, int]]:
        """The states by site, `(M, sequences, 1)`, where all sequences are in one plate."""
        found = {}
        for name, chain in chains.items():
            for t in range(int(self.lengths.max())):
                columns = [
                    self.value[chain][:, self.cells.index((i, t))]
                    if (i, t) in self.cells
                    else torch.zeros(len(self.value[chain]), dtype=torch.long)
                    for i in range(len(self.lengths))
                ]
                found[f"{name}_{t}"] = (torch.stack(columns, 1).unsqueeze(-1), STATES)
        return found


# Few data, so that no two modes are far apart: their weights would take many particles to tell.
SEQUENCES = torch.tensor([[[1.0, 0], [0, 1], [0, 1]], [[0.0, 1], [0, 1], [0, 0]]])
LENGTHS = torch.tensor([3, 2])
STICKY = 0.9 * torch.eye(STATES, dtype=torch.float64) + 0.1
RARE = torch.tensor([0.1, 0.9], dtype=torch.float64)  # of a one and of a zero


def unseen(lengths: Tensor, *chains: str) -> dict[str, Tensor]:
    """By site, the elements beyond the end of their sequence."""
    return {
        f"{chain}_{t}": (t >= lengths).unsqueeze(-1)
        for chain in chains
        for t in range(int(lengths.max()))
    }


def _rows(prior: Tensor, counts: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    evidence = dirichlet_evidence(prior, counts).flatten(1).sum(1)
    return evidence, dirichlet_moments(prior + counts)


def _chances(counts: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    evidence, (first, second) = _rows(RARE, counts)
    return evidence, (first[..., 0], second[..., 0])


def _single(by_sequence: bool = False) -> Reference:
    paths = Paths(LENGTHS)
    x = paths.value[0]
    move, rows = _rows(STICKY, count([paths.before(0), x], [STATES] * 2))
    tones, chances = _chances(paths.tones(SEQUENCES, [x]))
    discrete = paths.latents(x=0)
    if by_sequence:
        discrete = {f"x_{i}_{t}": (x[:, k], STATES) for k, (i, t) in enumerate(paths.cells)}
    return mixture(move + tones, {"probs_x": rows, "probs_y": chances}, discrete)


def _autoregressive() -> Reference:
    paths = Paths(LENGTHS)
    x = paths.value[0]
    move, rows = _rows(STICKY, count([paths.before(0), x], [STATES] * 2))
    counts = paths.tones(SEQUENCES, [x], lag=1)
    tones, chances = _chances(counts)
    return mixture(move + tones, {"probs_x": rows, "probs_y": chances}, paths.latents(x=0))


def _pair(coupled: bool) -> Reference:
    paths = Paths(LENGTHS, num_chains=2)
    w, x = paths.value
    move_w, rows_w = _rows(STICKY, count([paths.before(0), w], [STATES] * 2))
    scope = [w, paths.before(1), x] if coupled else [paths.before(1), x]
    move_x, rows_x = _rows(STICKY, count(scope, [STATES] * len(scope)))
    tones, chances = _chances(paths.tones(SEQUENCES, [w, x]))
    both, either = w + x, (w - x).abs()
    moments = {
        "probs_y, equal states": tuple(m.diagonal(dim1=1, dim2=2).mT for m in chances),
        "probs_y, states apart": _sum(*([m[:, a, 1 - a] for m in chances] for a in range(2))),
        "w + x": (both.double(), (both**2).double()),
        "w apart from x": (either.double(), either.double()),
    }
    if not coupled:
        moments["probs_w + probs_x"] = _sum(rows_w, rows_x)
    return mixture(move_w + move_x + tones, moments, {})


def _sum(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Moments of the sum of two quantities that are independent given the states."""
    return first[0] + second[0], first[1] + second[1] + 2 * first[0] * second[0]


def _about_pairs(z: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What stays nearly the same when the two chains swap their roles."""
    cells = [(i, t) for i, length in enumerate(LENGTHS.tolist()) for t in range(length)]
    w = torch.stack([z[f"w_{t}"][..., i, 0] for i, t in cells], -1)
    x = torch.stack([z[f"x_{t}"][..., i, 0] for i, t in cells], -1)
    on = z["probs_y"]
    found = {
        "probs_y, equal states": torch.stack([on[..., a, a, :] for a in range(2)], -2),
        "probs_y, states apart": on[..., 0, 1, :] + on[..., 1, 0, :],
        "w + x": w + x,
        "w apart from x": (w - x).abs(),
    }
    if z["probs_x"].dim() == z["probs_w"].dim():
        found["probs_w + probs_x"] = z["probs_w"] + z["probs_x"]
    return found


def _emissions(own_tones: bool) -> Tensor:
    """`log p(y_it | x_it = k, ...)`, `(sequences, T, STATES)`."""
    network = tones_generator().double()
    y = SEQUENCES.double()
    before = y if own_tones else torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)
    with torch.no_grad():
        per_state = [network(torch.full((*y.shape[:2], 1), k), before) for k in range(STATES)]
    logits = torch.stack(per_state, -2)
    return torch.distributions.Bernoulli(logits=logits).log_prob(y.unsqueeze(-2)).sum(-1)


def _neural(own_tones: bool) -> Reference:
    paths, table = Paths(LENGTHS), _emissions(own_tones)
    x = paths.value[0]
    move, rows = _rows(STICKY, count([paths.before(0), x], [STATES] * 2))
    tones = sum(table[i, t][x[:, k]] for k, (i, t) in enumerate(paths.cells))
    discrete = {} if own_tones else paths.latents(x=0)
    return mixture(move + tones, {"probs_x": rows}, discrete)


def _raftery() -> Reference:
    paths = Paths(LENGTHS)
    x, last, last_but_one = paths.value[0], paths.before(0), paths.before(0, lag=2)
    rows = torch.tensor([[0.8, 0.2], [0.3, 0.7]]).double()
    move = 0.4 * rows + 0.6 * rows.flip(0).unsqueeze(-2)
    on = torch.tensor([[0.2, 0.6], [0.7, 0.3]]).double()
    log_weight = move[last_but_one, last, x].log().sum(1)
    for tone in range(TONES):
        y = paths.tone(SEQUENCES, tone).bool()
        log_weight = log_weight + torch.where(y, on[x, tone], 1 - on[x, tone]).log().sum(1)
    return mixture(log_weight, {}, paths.latents(x=0))


def _one_by_one() -> Reference:
    return _single(by_sequence=True)


def _batched() -> Reference:
    return _single()


def _factorial() -> Reference:
    return _pair(coupled=False)


def _network() -> Reference:
    return _pair(coupled=True)


def _neural_emission() -> Reference:
    return _neural(own_tones=False)


def _summed_out() -> Reference:
    return _neural(own_tones=True)


MANY = {"num_particles": 2000, "num_sweeps": 400}


def programs() -> list[Program]:
    """The rows of this family."""
    data = (SEQUENCES, LENGTHS)
    exact = "enumeration of the states, conjugate given them"
    ends: Mapping[str, Tensor] = unseen(LENGTHS, "x")
    return [
        Program("hmm 0", "hmm.py", one_by_one, data, exact, _one_by_one, **MANY),
        Program("hmm 1", "hmm.py", batched, data, exact, _batched, unseen=ends, **MANY),
        Program(
            "hmm 2", "hmm.py", autoregressive, data, exact, _autoregressive, unseen=ends, **MANY
        ),
        Program(
            "hmm 3", "hmm.py", factorial, data, exact, _factorial, quantities=_about_pairs, **MANY
        ),
        Program(
            "hmm 4",
            "hmm.py",
            dynamic_network,
            data,
            exact,
            _network,
            quantities=_about_pairs,
            **MANY,
        ),
        Program(
            "hmm 5", "hmm.py", NeuralEmission(), data, exact, _neural_emission, unseen=ends, **MANY
        ),
        Program("hmm 6", "hmm.py", raftery, data, "enumeration", _raftery, unseen=ends),
        Program(
            "hmm 7",
            "hmm.py",
            SummedOut(),
            data,
            exact,
            _summed_out,
            remark="states one-hot in the network, which the original leaves out",
        ),
    ]

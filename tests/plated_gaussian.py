"""Linear-Gaussian Pyro programs over plates, written down twice.

* `PlatedGaussian.program` runs one in Pyro, by broadcasting;
* `PlatedGaussian.exact` sums its Gaussian factors into one precision matrix, element by element,
  over the names of plates. Nothing there knows of axes, and nothing imports the package under test.

The two have nothing in common but the numbers. Every unknown is Gaussian in unconstrained space
(some latents are log-normal), so that moments and the evidence are known to rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

Assignment = dict[str, int]
Event = tuple[int, ...]
Key = tuple[str, tuple[tuple[str, int], ...], Event]
"""One number of a site: its name, the elements of its plates by name, the index in its event."""

LOG_TWO_PI = math.log(2 * math.pi)


# -- what a program is made of -------------------------------------------------------------------


@dataclass
class PlateSpec:
    """A plate; `dim` is None until Pyro allocates it, where the program leaves that to Pyro."""

    name: str
    size: int
    dim: int | None = None
    explicit: bool = False
    sizeless: bool = False


@dataclass
class Link:
    """How a site's mean depends on an earlier site: `covariate * W f(parent)`.

    Attributes:
        parent: The earlier site.
        weights: Matrix `W`, from the parent's event to the child's, both flattened.
        reduce: For every plate of the parent that does not hold the child, what becomes of its
            elements: `("sum",)`, `("pick", j)`, `("group", plate, elements)`, `("alias", plate)`
            or `("event",)`.
        rolled: A shared plate, whose element i looks at the parent's element i - 1; or None.
        covariate: Plates of the child, and a number for each of their elements; or None.
    """

    parent: SiteSpec
    weights: list[list[float]]
    reduce: dict[str, tuple]
    rolled: str | None = None
    covariate: tuple[tuple[str, ...], dict[tuple[int, ...], float]] | None = None

    def terms(self, child: SiteSpec, at: Assignment, row: int) -> Iterator[tuple[float, Key]]:
        """Coefficients and numbers of the parent that enter one number of the child's mean."""
        factor = 1.0
        if self.covariate is not None:
            names, values = self.covariate
            factor = values[tuple(at[name] for name in names)]
        choices = []
        for plate in self.parent.plates:
            how = self.reduce.get(plate.name, ("same",))
            if how[0] == "same" and plate.name == self.rolled:
                choices.append([(at[plate.name] - 1) % plate.size])
            elif how[0] == "same":
                choices.append([at[plate.name]])
            elif how[0] == "sum":
                choices.append(list(range(plate.size)))
            elif how[0] == "pick":
                choices.append([how[1]])
            elif how[0] == "group":
                choices.append([how[2][at[how[1]]]])
            elif how[0] == "alias":
                choices.append([at[how[1]]])
            else:
                choices.append([row])
        from_event = any(how[0] == "event" for how in self.reduce.values())
        for chosen in itertools.product(*choices):
            where = dict(zip([p.name for p in self.parent.plates], chosen, strict=True))
            if from_event:
                yield factor * self.weights[row][row], self.parent.key(where, ())
                continue
            for column, event in enumerate(self.parent.event_indices()):
                if self.weights[row][column] != 0.0:
                    yield factor * self.weights[row][column], self.parent.key(where, event)


@dataclass
class SiteSpec:
    """A sample statement `name ~ Normal(offset + links, sigma)`, or its log-normal.

    Numbers by element are keyed by the element's plates in the order of `plates`.

    Attributes:
        plates: Vectorised plates around it, in the order in which they are entered.
        event: Shape of the event.
        sigma: By plate element.
        noise: Covariance of a multivariate normal event, divided by `sigma ** 2`; None for
            independent entries.
        data: Observed numbers by plate element and event index; None for a latent.
        missing: Plate elements that `obs_mask` takes out; their values are unknowns.
        masked: Numbers that a mask takes out, by plate element and event index.
        mask_with: `handler`, `distribution` or `entries` (inside the event).
        scale: By plate element; None for none.
    """

    name: str
    plates: tuple[PlateSpec, ...]
    event: Event
    offset: dict[tuple[int, ...], list[float]]
    sigma: dict[tuple[int, ...], float]
    links: list[Link] = field(default_factory=list)
    noise: list[list[float]] | None = None
    lognormal: bool = False
    data: dict[tuple[tuple[int, ...], Event], float] | None = None
    missing: set[tuple[int, ...]] | None = None
    masked: set[tuple[tuple[int, ...], Event]] = field(default_factory=set)
    mask_with: str = ""
    scale: dict[tuple[int, ...], float] | None = None
    deterministic: bool = False

    @property
    def is_latent(self) -> bool:
        return self.data is None

    def elements(self) -> Iterator[tuple[int, ...]]:
        return itertools.product(*(range(plate.size) for plate in self.plates))

    def event_indices(self) -> list[Event]:
        return list(itertools.product(*(range(size) for size in self.event)))

    def at(self, element: tuple[int, ...]) -> Assignment:
        return {plate.name: i for plate, i in zip(self.plates, element, strict=True)}

    def key(self, at: Assignment, event: Event) -> Key:
        return self.name, tuple(sorted((p.name, at[p.name]) for p in self.plates)), event

    def unknown_name(self) -> str:
        """Name of the latent site in Pyro that holds the unknowns."""
        return self.name if self.missing is None else f"{self.name}_unobserved"


@dataclass
class With:
    """Sites and further blocks inside vectorised plates."""

    plates: tuple[PlateSpec, ...]
    body: list[Any]


@dataclass
class Loop:
    """A sequential plate: the body once for every element."""

    name: str
    bodies: list[list[Any]]


@dataclass(frozen=True)
class Exact:
    """The posterior `N(mean, covariance)` of the unknowns, in unconstrained space.

    Attributes:
        keys: The unknowns.
        precision: `(D, D)`.
        linear: `(D,)`: the log-joint is `constant + linear u - u precision u / 2`.
        constant: See `linear`.
        has_prior: Whether the prior is proper and normalised.
    """

    keys: list[Key]
    precision: Tensor
    linear: Tensor
    constant: float
    has_prior: bool

    @property
    def covariance(self) -> Tensor:
        return torch.linalg.inv(self.precision)

    @property
    def mean(self) -> Tensor:
        return torch.linalg.solve(self.precision, self.linear)

    @property
    def log_evidence(self) -> float:
        log_det = float(torch.linalg.slogdet(self.precision).logabsdet)
        fit = 0.5 * float(self.linear @ self.mean)
        return self.constant + fit - 0.5 * log_det + 0.5 * len(self.keys) * LOG_TWO_PI

    def log_joint(self, u: Tensor) -> Tensor:
        """Of particles `(K, D)`."""
        return self.constant + u @ self.linear - 0.5 * ((u @ self.precision) * u).sum(-1)


# -- numbers laid out as Pyro has them -----------------------------------------------------------


def position(plates: Sequence[PlateSpec], element: Sequence[int], batch_dims: int) -> tuple:
    """Index of a plate element in a tensor with so many batch dimensions."""
    index = [0] * batch_dims
    for plate, i in zip(plates, element, strict=True):
        index[plate.dim] = i
    return tuple(index)


def lay_out(
    plates: Sequence[PlateSpec], values: Mapping[tuple[int, ...], Any], event: Event = ()
) -> Tensor:
    """A tensor `(*batch, *event)` of numbers by plate element."""
    batch_dims = max((-plate.dim for plate in plates), default=0)
    shape = [1] * batch_dims
    for plate in plates:
        shape[plate.dim] = plate.size
    first = torch.as_tensor(next(iter(values.values())))
    dtype = torch.float64 if first.is_floating_point() else first.dtype
    result = torch.zeros((*shape, *event), dtype=dtype)
    for element, value in values.items():
        result[position(plates, element, batch_dims)] = torch.as_tensor(value).reshape(event)
    return result


# -- the program in Pyro ---------------------------------------------------------------------------


@dataclass
class PlatedGaussian:
    """A program.

    Attributes:
        seed: What it was drawn with, if at random.
        kinds: Words for what is in it, to group failures by.
        nodes: The program.
        plates: Its vectorised plates by name.
        passing: How data reach the model: `positional`, `keywords`, `dictionary` or `closure`.
        conditioned: Whether data are given by `pyro.condition`.
        scale: Of the whole model; None for none.
        objects: Whether plates are created once and entered by name.
    """

    seed: int
    kinds: set[str]
    nodes: list[Any]
    plates: dict[str, PlateSpec]
    passing: str
    conditioned: bool
    scale: float | None
    objects: bool

    @property
    def sites(self) -> list[SiteSpec]:
        return list(_sites(self.nodes))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is data, by name: observations, masks, covariates, groups."""
        result = {}
        for site in self.sites:
            if site.data is not None:
                rows = {e: [site.data[e, i] for i in site.event_indices()] for e in site.elements()}
                result[site.name] = lay_out(site.plates, rows, site.event)
            if site.missing is not None:
                seen = {element: element not in site.missing for element in site.elements()}
                result[f"{site.name}_seen"] = lay_out(site.plates, seen)
            if site.mask_with:
                by_entry = site.mask_with == "entries"
                chosen = {
                    e: [(e, i) not in site.masked for i in site.event_indices()]
                    for e in site.elements()
                }
                if not by_entry:
                    chosen = {element: flags[0] for element, flags in chosen.items()}
                event = site.event if by_entry else ()
                result[f"{site.name}_mask"] = lay_out(site.plates, chosen, event)
            for number, link in enumerate(site.links):
                if link.covariate is not None:
                    names, values = link.covariate
                    plates = [self._plate(site, name) for name in names]
                    result[f"{site.name}_covariate{number}"] = lay_out(plates, values)
                for how in link.reduce.values():
                    if how[0] == "group":
                        result[f"{site.name}_group{number}"] = torch.tensor(how[2])
        return result

    def build(self) -> tuple[Callable, tuple, dict]:
        """The model and its arguments."""
        data = self.tensors()
        given = {
            s.name: data[s.name] for s in self.sites if s.data is not None and s.missing is None
        }
        hidden = set(given) if self.conditioned else set()
        if self.passing == "positional":
            names = list(data)

            def model(*args):
                return self.program(dict(zip(names, args, strict=True)), hidden)

            args, kwargs = tuple(data.values()), {}
        elif self.passing == "keywords":

            def model(**kwargs):
                return self.program(kwargs, hidden)

            args, kwargs = (), data
        elif self.passing == "dictionary":

            def model(batch):
                return self.program(batch, hidden)

            args, kwargs = (data,), {}
        else:

            def model():
                return self.program(data, hidden)

            args, kwargs = (), {}
        if self.scale is not None:
            model = poutine.scale(model, scale=self.scale)
        if self.conditioned:
            model = poutine.condition(model, data=given)
        return model, args, kwargs

    def program(self, data: Mapping[str, Tensor], hidden: set[str]) -> None:
        """Runs the program; observed sites in `hidden` are left for `pyro.condition`."""
        created = {}
        if self.objects:
            created = {name: _plate(plate) for name, plate in self.plates.items()}
        self._run(self.nodes, {}, data, hidden, created)

    def _run(self, nodes, env, data, hidden, created) -> None:
        for node in nodes:
            if isinstance(node, SiteSpec):
                env[node.name] = self._sample(node, env, data, hidden)
            elif isinstance(node, Loop):
                for i in pyro.plate(node.name, len(node.bodies)):
                    self._run(node.bodies[i], env, data, hidden, created)
            else:
                with ExitStack() as stack:
                    for plate in node.plates:
                        stack.enter_context(created[plate.name] if created else _plate(plate))
                    self._run(node.body, env, data, hidden, created)

    def _sample(self, site: SiteSpec, env, data, hidden) -> Tensor:
        loc = self._mean(site, env, data)
        sigma = _compact(site, {e: s for e, s in site.sigma.items()})
        if isinstance(sigma, Tensor) and site.event:
            sigma = sigma.reshape((*sigma.shape, *(1,) * len(site.event)))
        if any(plate.sizeless for plate in site.plates):
            ones = lay_out(site.plates, {e: 1.0 for e in site.elements()})
            loc = loc + torch.zeros_like(ones).reshape((*ones.shape, *(1,) * len(site.event)))
        if site.noise is not None:
            fn = dist.MultivariateNormal(
                loc, scale_tril=torch.tensor(site.noise, dtype=torch.float64) * sigma
            )
        elif site.lognormal:
            fn = dist.LogNormal(loc, sigma)
        else:
            fn = dist.Normal(loc, sigma)
        mask = data.get(f"{site.name}_mask")
        if site.mask_with == "entries":
            fn = fn.mask(mask)
        if site.event and site.noise is None:
            fn = fn.to_event(len(site.event))
        if site.mask_with == "distribution":
            fn = fn.mask(mask)
        obs = None if site.data is None or site.name in hidden else data[site.name]
        with ExitStack() as stack:
            if site.scale is not None:
                stack.enter_context(poutine.scale(scale=_compact(site, site.scale)))
            if site.mask_with == "handler":
                stack.enter_context(poutine.mask(mask=mask))
            if site.missing is not None:
                seen = data[f"{site.name}_seen"]
                value = pyro.sample(site.name, fn, obs=obs, obs_mask=seen)
            else:
                value = pyro.sample(site.name, fn, obs=obs)
        return value.log() if site.lognormal else value

    def _mean(self, site: SiteSpec, env, data) -> Tensor:
        offset = _compact(site, site.offset, site.event)
        if isinstance(offset, float):
            offset = torch.full(site.event, offset) if site.event else torch.tensor(offset)
        loc = offset
        for number, link in enumerate(site.links):
            loc = loc + self._linked(site, number, link, env[link.parent.name], data)
        if site.deterministic:
            loc = pyro.deterministic(f"{site.name}_mean", loc, event_dim=len(site.event))
        return loc

    def _linked(self, site: SiteSpec, number: int, link: Link, z: Tensor, data) -> Tensor:
        """The link's term of the mean, by broadcasting."""
        parent = link.parent
        simple = not parent.event and not site.event and not link.reduce and link.rolled is None
        if simple:
            term = link.weights[0][0] * z
        else:
            batch = z.shape[: z.dim() - len(parent.event)]
            rank = max([len(batch)] + [-plate.dim for plate in (*site.plates, *parent.plates)])
            z = z.reshape(*(1,) * (rank - len(batch)), *batch, -1)
            weights = torch.tensor(link.weights, dtype=torch.float64)
            dims = {plate.name: plate.dim - 1 for plate in (*parent.plates, *site.plates)}
            if link.rolled is not None:
                z = z.roll(1, dims[link.rolled])
            for name, how in link.reduce.items():
                if how[0] == "sum":
                    z = z.sum(dims[name], keepdim=True)
                elif how[0] == "pick":
                    z = z.narrow(dims[name], how[1], 1)
            for name, how in link.reduce.items():
                if how[0] == "group":
                    z = z.index_select(dims[name], data[f"{site.name}_group{number}"])
                    z = z.transpose(dims[name], dims[how[1]])
                elif how[0] == "alias":
                    z = z.transpose(dims[name], dims[how[1]])
                elif how[0] == "event":
                    z = z.transpose(dims[name], -1) * weights.diagonal()
                    weights = None
            if weights is not None:
                z = z @ weights.T
            kept = max((-plate.dim for plate in site.plates), default=0)
            while z.dim() - 1 > kept and z.shape[0] == 1:
                z = z.squeeze(0)
            term = z.reshape((*z.shape[:-1], *site.event))
        if link.covariate is not None:
            covariate = data[f"{site.name}_covariate{number}"]
            term = covariate.reshape((*covariate.shape, *(1,) * len(site.event))) * term
        return term

    @staticmethod
    def _plate(site: SiteSpec, name: str) -> PlateSpec:
        return next(plate for plate in site.plates if plate.name == name)

    # -- the same, in linear algebra ------------------------------------------------------------

    def exact(self, cell: Assignment | None = None) -> Exact:
        """The posterior, of all elements or of those of one population cell.

        Raises:
            AssertionError: A factor of the cell looks at an unknown outside of it.
        """
        inside = set((cell or {}).items())
        keys: list[Key] = []
        known: dict[Key, float] = {}
        for site in self.sites:
            for element in site.elements():
                at = site.at(element)
                for event in site.event_indices():
                    if site.data is None or (site.missing is not None and element in site.missing):
                        keys.append(site.key(at, event))
                    else:
                        known[site.key(at, event)] = site.data[element, event]
        keys = [key for key in keys if inside <= set(key[1])]
        index = {key: i for i, key in enumerate(keys)}
        gaussian = _Gaussian(len(keys))
        has_prior = True
        for site in self.sites:
            for element in site.elements():
                at = site.at(element)
                if not inside <= set(at.items()):
                    continue
                rows = [
                    self._residual(site, at, row, event, index, known)
                    for row, event in enumerate(site.event_indices())
                ]
                scale = 1.0 if site.scale is None else site.scale[element]
                scale *= 1.0 if self.scale is None else self.scale
                out = [(element, event) in site.masked for event in site.event_indices()]
                unknown = site.key(at, site.event_indices()[0]) in index
                unknown = unknown or bool(site.missing)
                has_prior = has_prior and not (unknown and (any(out) or scale != 1.0))
                gaussian.add(site, rows, out, site.sigma[element], scale)
                if site.lognormal:
                    for event, gone in zip(site.event_indices(), out, strict=True):
                        gaussian.linear[index[site.key(at, event)]] += 1.0 - scale * (not gone)
        return Exact(keys, gaussian.precision, gaussian.linear, gaussian.constant, has_prior)

    def _residual(self, site, at, row, event, index, known) -> tuple[float, dict[int, float]]:
        """Value minus mean of one number, as a constant and coefficients of the unknowns."""
        constant = -site.offset[tuple(at[p.name] for p in site.plates)][row]
        coefficients: dict[int, float] = {}
        terms = [(1.0, site.key(at, event))]
        for link in site.links:
            terms += [(-weight, key) for weight, key in link.terms(site, at, row)]
        for weight, key in terms:
            if key in index:
                coefficients[index[key]] = coefficients.get(index[key], 0.0) + weight
            else:
                constant += weight * known[key]
        return constant, coefficients

    def unconstrained(self, values: Mapping[str, Tensor], keys: Sequence[Key]) -> Tensor:
        """Unknowns `(K, D)` out of particles `(K, *batch, *event)` by Pyro's names."""
        by_name = {site.name: site for site in self.sites}
        columns = []
        for name, at, event in keys:
            columns.append(
                values[by_name[name].unknown_name()][self.index(by_name[name], at, event, values)]
            )
        return torch.stack(columns, -1)

    def index(self, site: SiteSpec, at, event: Event, values: Mapping[str, Tensor]) -> tuple:
        """Where one number of a site is in its particles `(K, *batch, *event)`."""
        batch_dims = values[site.unknown_name()].dim() - 1 - len(site.event)
        element = [dict(at)[plate.name] for plate in site.plates]
        return (slice(None), *position(site.plates, element, batch_dims), *event)


class _Gaussian:
    """A log-density `constant + linear u - u precision u / 2` that factors are added to."""

    def __init__(self, size: int) -> None:
        self.precision = torch.zeros(size, size, dtype=torch.float64)
        self.linear = torch.zeros(size, dtype=torch.float64)
        self.constant = 0.0

    def add(self, site, rows, out, sigma: float, scale: float) -> None:
        """A site's element: residuals by entry of the event, and which entries are masked out."""
        count = len(rows)
        if site.noise is None:
            inverse = [[float(i == j) for j in range(count)] for i in range(count)]
            log_det = 0.0
        else:
            tril = torch.tensor(site.noise, dtype=torch.float64)
            inverse = torch.linalg.inv(tril @ tril.T).tolist()
            log_det = float(tril.diagonal().log().sum())
        for i in range(count):
            if not out[i]:
                log_scale = math.log(sigma) + log_det / count
                self.constant -= scale * (0.5 * LOG_TWO_PI + log_scale)
            for j in range(count):
                if out[i] or out[j] or inverse[i][j] == 0.0:
                    continue
                weight = scale * inverse[i][j] / sigma**2
                (a, left), (b, right) = rows[i], rows[j]
                self.constant -= 0.5 * weight * a * b
                for p, x in left.items():
                    self.linear[p] -= 0.5 * weight * x * b
                    for q, y in right.items():
                        self.precision[p, q] += weight * x * y
                for q, y in right.items():
                    self.linear[q] -= 0.5 * weight * y * a


def _plate(plate: PlateSpec):
    dim = plate.dim if plate.explicit else None
    return pyro.plate(plate.name, None if plate.sizeless else plate.size, dim=dim)


def _compact(site: SiteSpec, values: Mapping[tuple[int, ...], Any], event: Event = ()):
    """A Python number where all elements have the same, otherwise a tensor."""
    flat = [x for v in values.values() for x in (v if isinstance(v, list) else [v])]
    if all(x == flat[0] for x in flat):
        return flat[0]
    return lay_out(site.plates, values, event)


def _sites(nodes) -> Iterator[SiteSpec]:
    for node in nodes:
        if isinstance(node, SiteSpec):
            yield node
        elif isinstance(node, With):
            yield from _sites(node.body)
        else:
            for body in node.bodies:
                yield from _sites(body)

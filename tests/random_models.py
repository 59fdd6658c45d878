"""Random linear-Gaussian Pyro programs over plates, with their exact posteriors.

`random_model(seed)` draws a program (see `plated_gaussian.py`): plates (free, with dims,
sequential, without a size), latents and observed sites above, within and beside them, scales,
masks, missing entries, ways to pass data. Draws are repeated until a Gibbs sampler, coordinate by
coordinate, would mix fast; where a sampler errs, it is then wrong, not slow.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from plated_gaussian import (
    Event,
    Exact,
    Link,
    Loop,
    PlatedGaussian,
    PlateSpec,
    SiteSpec,
    With,
)
from torch import Tensor

MAX_UNKNOWNS = 120
MAX_GIBBS_RATE = 0.9


class _Collision(Exception):
    """Two plates that Pyro would give the same dim."""


class _Draw:
    """Draws a program from beginning to end; a site may look at all sites before it."""

    def __init__(self, seed: int, attempt: int) -> None:
        self.rng = random.Random(f"{seed} {attempt}")
        self.seed = seed
        self.kinds: set[str] = set()
        self.earlier: list[SiteSpec] = []
        self.count = itertools.count()
        self.entered: list[PlateSpec] = []
        rng = self.rng
        number = rng.choice([0, 1, 1, 2, 2, 2, 3, 3])
        equal = rng.random() < 0.4
        size = rng.choice([2, 3])
        self.plates = {
            name: PlateSpec(name, size if equal else rng.choice([1, 2, 2, 3, 3, 4, 5]))
            for name in rng.sample(["rows", "columns", "sheets", "units", "groups"], number)
        }
        self.objects = rng.random() < 0.5
        if number and rng.random() < (0.6 if self.objects else 0.3):
            for plate, dim in zip(
                self.plates.values(), rng.sample([-1, -2, -3], number), strict=True
            ):
                plate.dim, plate.explicit = dim, True
            self.kinds.add("dims")
        elif number > 1:
            self.kinds.add("free")
        for plate in self.plates.values():
            plate.sizeless = rng.random() < 0.08
            if plate.sizeless:
                self.kinds.add("sizeless")
        self.population: list[PlateSpec] = []
        if number and rng.random() < 0.35:
            self.population = rng.sample(
                list(self.plates.values()), rng.choice([1, 1, 2]) if number > 1 else 1
            )
            self.kinds.add("population")

    # -- structure --------------------------------------------------------------------------------

    def model(self) -> PlatedGaussian:
        rng = self.rng
        if self.objects:
            self.kinds.add("objects" if len(self.plates) > 1 else "flat")
            nodes = self.blocks()
        else:
            nodes = self.nested()
        scale = None
        if rng.random() < 0.05:
            scale = rng.choice([0.5, 2.0])
            self.kinds.add("model scale")
        passing = rng.choice(["positional", "keywords", "dictionary", "closure"])
        conditioned = rng.random() < 0.15
        if conditioned:
            self.kinds.add("condition")
        return PlatedGaussian(
            self.seed, self.kinds, nodes, self.plates, passing, conditioned, scale, self.objects
        )

    def enter(self, *plates: PlateSpec) -> None:
        """Allocates dims as Pyro does: the first free one from the right."""
        for plate in plates:
            taken = {other.dim for other in self.entered}
            if plate.dim is None:
                plate.dim = next(-i for i in range(1, 9) if -i not in taken)
            elif plate.dim in taken:
                raise _Collision
            self.entered.append(plate)

    def leave(self, *plates: PlateSpec) -> None:
        for plate in plates:
            self.entered.remove(plate)

    def nested(self) -> list[Any]:
        """Plates within plates, each created where it is entered; the population outermost."""
        outer = self.rng.sample(self.population, len(self.population))
        inner = [plate for plate in self.plates.values() if plate not in outer]
        self.enter(*outer)
        nodes = self.level(self.rng.sample(inner, len(inner)))
        self.leave(*outer)
        for plate in reversed(outer):
            nodes = [With((plate,), nodes)]
        return nodes

    def level(self, plates: list[PlateSpec]) -> list[Any]:
        rng = self.rng
        nodes: list[Any] = self.latents(
            rng.choice([0, 1, 1, 2]) if plates else rng.choice([1, 1, 2])
        )
        if rng.random() < 0.1 and not self.kinds & {"sequential"}:
            nodes.append(self.loop())
        while plates:
            inside = rng.choice([1, 1, 2]) if len(plates) > 1 else 1
            mine, plates = plates[:inside], plates[inside:]
            nodes.append(
                self.block(
                    mine, lambda rest=plates: self.level(rest) if rng.random() < 0.7 else None
                )
            )
            if self.block_took:
                plates = []
        if rng.random() < 0.3:
            nodes += self.latents(1)
        nodes += self.observed(
            rng.choice([0, 1, 1, 2]) if nodes and self.entered else rng.choice([0, 1])
        )
        return nodes

    block_took = False

    def block(self, plates: list[PlateSpec], body: Callable) -> With:
        self.enter(*plates)
        nodes = body()
        self.block_took = nodes is not None
        if nodes is None:
            nodes = self.latents(self.rng.choice([1, 1, 2])) + self.observed(
                self.rng.choice([0, 1, 1])
            )
        self.leave(*plates)
        return With(tuple(plates), nodes)

    def blocks(self) -> list[Any]:
        """Plates that are created once, and entered again and again, in any order."""
        rng, nodes = self.rng, []
        for _ in range(rng.choice([2, 3, 3, 4]) if self.plates else 1):
            rest = [p for p in self.plates.values() if p not in self.population]
            chosen = rng.sample(rest, rng.randint(0, len(rest))) + self.population
            rng.shuffle(chosen)
            self.enter(*chosen)
            body: list[Any] = self.latents(rng.choice([0, 1, 1, 2]))
            if rng.random() < 0.08 and "sequential" not in self.kinds:
                body.append(self.loop())
            body += self.observed(rng.choice([0, 0, 1, 1]))
            self.leave(*chosen)
            nodes += [With(tuple(chosen), body)] if chosen else body
        return nodes

    def loop(self) -> Loop:
        """A sequential plate, with the same statements for each element."""
        self.kinds.add("sequential")
        before, state, bodies = list(self.earlier), self.rng.getstate(), []
        made = []
        number = next(self.count)
        for i in range(2 + self.seed % 2):
            self.rng.setstate(state)
            self.earlier = list(before)
            self.suffix, self.count = f"_{i}", itertools.count(number + 1)
            bodies.append(self.latents(self.rng.choice([1, 2])) + self.observed(1))
            made += self.earlier[len(before) :]
        self.suffix, self.earlier = "", before + made
        return Loop(f"loop{number}", bodies)

    suffix = ""

    # -- sites ------------------------------------------------------------------------------------

    def latents(self, number: int) -> list[SiteSpec]:
        return [self.site("z") for _ in range(number)]

    def observed(self, number: int) -> list[SiteSpec]:
        return [self.site("x") for _ in range(number) if any(s.is_latent for s in self.earlier)]

    def chance(self, probability: float, kind: str) -> bool:
        """A feature that is in the program or not."""
        result = self.rng.random() < probability
        if result:
            self.kinds.add(kind)
        return result

    def by_element(self, site: SiteSpec, draw: Callable[[], Any]) -> dict[tuple[int, ...], Any]:
        """One draw for all elements, or one each."""
        if self.rng.random() < 0.5:
            value = draw()
            return {element: value for element in site.elements()}
        return {element: draw() for element in site.elements()}

    def site(self, letter: str) -> SiteSpec:
        rng, latent = self.rng, letter == "z"
        event = self.event(latent)
        name = f"{letter}{next(self.count)}{self.suffix}"
        site = SiteSpec(name, tuple(self.entered), event, {}, {})
        size = math.prod(event)
        if rng.random() < 0.5:
            constant = round(rng.gauss(0, 1), 2)
            site.offset = {element: [constant] * size for element in site.elements()}
        else:
            site.offset = {e: [rng.gauss(0, 1) for _ in range(size)] for e in site.elements()}
        site.sigma = self.by_element(site, lambda: rng.uniform(0.5, 1.5))
        self.link(site, latent)
        if len(event) == 1 and self.chance(0.15, "multivariate normal"):
            site.noise = [
                [1.0 if i == j else (rng.uniform(-0.5, 0.5) if j < i else 0.0) for j in range(size)]
                for i in range(size)
            ]
            site.sigma = {element: site.sigma[next(site.elements())] for element in site.elements()}
        elif latent and self.chance(0.15, "log-normal"):
            site.lognormal = True
        site.deterministic = self.chance(0.15, "deterministic")
        if latent:
            if self.chance(0.07, "scaled prior"):
                site.scale = self.by_element(site, lambda: rng.choice([0.5, 2.0]))
            if site.plates and not site.noise and self.chance(0.03, "masked prior"):
                self.mask(site, "handler", 0.3)
        else:
            self.observe(site)
        self.earlier.append(site)
        return site

    def event(self, latent: bool) -> Event:
        rng = self.rng
        sizes = [plate.size for plate in self.plates.values()] + [1, 2, 3]
        kind = rng.random()
        if kind < 0.6:
            return ()
        self.kinds.add("event")
        if kind < 0.95 or not latent:
            return (rng.choice(sizes),)
        return (2, rng.choice([1, 2, 3]))

    def observe(self, site: SiteSpec) -> None:
        rng = self.rng
        site.data = {
            (element, event): rng.gauss(0, 1.5)
            for element in site.elements()
            for event in site.event_indices()
        }
        if self.chance(0.2, "scaled data"):
            site.scale = self.by_element(site, lambda: rng.choice([0.3, 0.5, 2.0, 3.0]))
        kind = rng.random()
        if kind < 0.15 and site.plates:
            self.kinds.add("obs_mask")
            site.missing = {element for element in site.elements() if rng.random() < 0.4}
            hidden = [(element, i) for element in site.missing for i in site.event_indices()]
        elif kind < 0.4:
            ways = ["handler", "distribution"]
            if site.event and site.noise is None:
                ways.append("entries")
            self.kinds.add("mask")
            self.mask(site, rng.choice(ways), 0.4)
            hidden = list(site.masked)
        else:
            return
        filler = rng.choice([math.nan, math.nan, 0.0, 1e3])
        if math.isnan(filler) and hidden:
            self.kinds.add("NaN behind a mask")
        for where in hidden:
            site.data[where] = filler

    def mask(self, site: SiteSpec, way: str, probability: float) -> None:
        site.mask_with = way
        for element in site.elements():
            gone = self.rng.random() < probability
            for event in site.event_indices():
                if self.rng.random() < probability if way == "entries" else gone:
                    site.masked.add((element, event))

    # -- links ------------------------------------------------------------------------------------

    def link(self, site: SiteSpec, latent: bool) -> None:
        rng = self.rng
        usable = [s for s in self.earlier if s.is_latent or not s.mask_with]
        latents = [s for s in usable if s.is_latent]
        wanted = rng.choice([0, 1, 1, 2]) if latent else rng.choice([1, 1, 2, 2, 3])
        parents = rng.sample(usable, min(wanted, len(usable)))
        if not latent and not any(parent.is_latent for parent in parents):
            parents.append(rng.choice(latents))
        for parent in dict.fromkeys(id(p) for p in parents):
            self.link_to(site, next(p for p in parents if id(p) == parent))

    def link_to(self, site: SiteSpec, parent: SiteSpec) -> None:
        rng = self.rng
        mine = {plate.name for plate in site.plates}
        theirs = {plate.name for plate in parent.plates}
        inner = {plate.name for plate in self.population}
        reduce: dict[str, tuple] = {}
        moved = False
        count = 1
        for plate in parent.plates:
            if plate.name in mine:
                continue
            options: list[tuple] = [("sum",), ("pick", rng.randrange(plate.size))]
            for other in site.plates:
                if other.name in theirs or other.name in inner or moved:
                    continue
                elements = [rng.randrange(plate.size) for _ in range(other.size)]
                options += [("group", other.name, elements)] * 3
                if other.size == plate.size:
                    options += [("alias", other.name)] * 6
            if site.event == (plate.size,) and not parent.event and not moved:
                options += [("event",)] * 3
            how = reduce[plate.name] = rng.choice(options)
            moved = moved or how[0] in ("group", "alias", "event")
            count *= plate.size if how[0] == "sum" else 1
            self.kinds.add(
                {"sum": "sum over a plate", "event": "plate as event"}.get(how[0], how[0])
            )
        shared = [p for p in parent.plates if p.name in mine - inner and p.size > 1]
        rolled = rng.choice(shared).name if shared and rng.random() < 0.06 else None
        if rolled:
            self.kinds.add("roll")
        rows, columns = math.prod(site.event), math.prod(parent.event)
        diagonal = any(how[0] == "event" for how in reduce.values()) or (
            rows == columns and rng.random() < 0.5
        )
        shrink = 1 / math.sqrt(count * (1 if diagonal else columns))
        weights = [
            [
                rng.choice([-1, 1, 1]) * rng.uniform(0.3, 1.0) * shrink
                if not diagonal or i == j
                else 0.0
                for j in range(rows if diagonal else columns)
            ]
            for i in range(rows)
        ]
        covariate = None
        if site.plates and rng.random() < 0.2:
            names = tuple(p.name for p in site.plates if rng.random() < 0.7)
            sizes = [range(p.size) for p in site.plates if p.name in names]
            if names:
                self.kinds.add("covariate")
                values = {at: rng.gauss(0, 1) for at in itertools.product(*sizes)}
                covariate = (names, values)
        if not parent.is_latent:
            self.kinds.add("observed parent" if parent.missing is None else "imputed parent")
        site.links.append(Link(parent, weights, reduce, rolled, covariate))


def gibbs_rate(precision: Tensor) -> float:
    """Convergence rate of a Gibbs sampler, coordinate by coordinate, of a Gaussian."""
    lower = precision.tril()
    return float(torch.linalg.eigvals(torch.linalg.solve(lower, lower - precision)).abs().max())


def _is_good(model: PlatedGaussian, exact: Exact) -> bool:
    if not 0 < len(exact.keys) <= MAX_UNKNOWNS:
        return False
    if not any(site.is_latent for site in model.sites):
        return False
    if float(torch.linalg.eigvalsh(exact.precision)[0]) < 0.05:
        return False
    return gibbs_rate(exact.precision) < MAX_GIBBS_RATE


@cache
def random_model(seed: int) -> PlatedGaussian:
    """The random program of a seed."""
    for attempt in range(200):
        try:
            model = _Draw(seed, attempt).model()
        except _Collision:
            continue
        sites = model.sites
        enough = any(s.is_latent for s in sites) and any(not s.is_latent for s in sites)
        numbers = sum(math.prod(p.size for p in s.plates) * math.prod(s.event) for s in sites)
        if not enough or len(sites) > 14 or numbers > 2 * MAX_UNKNOWNS:
            continue
        if _is_good(model, model.exact()):
            return model
    raise AssertionError(f"no program for seed {seed}")

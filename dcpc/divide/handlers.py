"""Effect handlers that run a Pyro program on unconstrained values, and what they share."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions.transforms import ComposeTransform, IndependentTransform, Transform
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dcpc.divide.masking import element_mask, layers, masked, masked_log_prob
from dcpc.divide.supports import draw, log_density, transform_of
from dcpc.divide.supports.discrete import bounded_value
from dcpc.divide.vectorised import all_of_plate
from dcpc.errors import ModelError

_IS_GIVEN = "_dcpc_is_given"

INITIAL_RADIUS = 2.0
"""Half-width of the uniform distribution (unconstrained space) that flat priors start from."""


def improper(msg: Any) -> bool:
    """Whether a latent's prior is flat: `ImproperUniform`, or a mask that is False."""
    return msg["mask"] is False or any(
        isinstance(part, dist.ImproperUniform)
        or (isinstance(part, dist.MaskedDistribution) and part._mask is False)
        for part in layers(msg["fn"])
    )


def plate_scale(msg: Any) -> tuple[float, bool]:
    """Scale of a site by its plates that subsample, and whether a handler scales it besides."""
    scale = 1.0
    for frame in msg["cond_indep_stack"]:
        if frame.full_size is not None and frame.size:
            scale *= frame.full_size / frame.size
    own = msg["scale"] / scale
    if isinstance(own, Tensor):
        return scale, bool(((own - 1.0).abs() > 1e-6).any())
    return scale, abs(own - 1.0) > 1e-6


class TensorObservations(Messenger):
    """Turns observations that are numpy arrays, pandas objects or numbers into tensors.

    It also notes which plates are given their subsample (see `draws_subsample`).
    """

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            msg["infer"][_IS_GIVEN] = msg["value"] is not None
        if msg["is_observed"] and not isinstance(msg["value"], Tensor | None):
            msg["value"] = torch.as_tensor(np.asarray(msg["value"]))


def draws_subsample(msg: Any) -> bool:
    """Whether a plate draws a subsample, in a run under `TensorObservations`."""
    if not site_is_subsample(msg) or msg["infer"][_IS_GIVEN]:
        return False
    fn = msg["fn"]
    return fn.subsample_size is not None and fn.subsample_size < fn.size


class Substitute(TensorObservations):
    """Replaces latents by the images of unconstrained values and records the log-factors.

    Attributes:
        values: Constrained values of the latents, and those of deterministic sites.
        log_factors: By site, as `log_factors` in `model` describes them.
        masks: By latent in `masked_latents`, which of its batch elements are in its own density.
    """

    def __init__(
        self,
        latents: Mapping[str, Tensor],
        sites: Mapping[str, Any] | None,
        masked_latents: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.latents = latents
        self.sites = sites
        self.masked_latents = masked_latents
        self.values: dict[str, Tensor] = {}
        self.log_factors: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}
        self._messages: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if site_is_subsample(msg) and msg["value"] is None:
            indices = msg["fn"]()
            whole = len(indices) == msg["fn"].size
            msg["value"] = all_of_plate(indices) if whole else indices
        if msg["name"] not in self.latents:
            return
        value = self._value(msg)
        msg["value"], msg["done"] = value, True
        self.values[msg["name"]] = value

    def _value(self, msg: Any) -> Tensor:
        return transform_of(msg["fn"])(self.latents[msg["name"]])

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if is_deterministic(msg):
            self.values[name] = msg["value"]
        if self.sites is None or not is_random(msg):
            return
        if name not in self.sites:
            raise ModelError(
                f"site '{name}' appeared in this run of the model but not in the first one; the "
                "set of sites must not change between runs (static structure)"
            )
        self._messages[name] = msg

    def __exit__(self, *exception: Any) -> None:
        """Takes the log-factors when the run is over.

        A trace does so, and what the model has written in place into a mask or a value after its
        statement counts.
        """
        super().__exit__(*exception)  # first: an error below must not leave a handler behind
        messages, self._messages = self._messages, {}
        if exception[0] is None:
            for name, msg in messages.items():
                self._record(name, msg, cast(Mapping[str, Any], self.sites)[name])

    def _record(self, name: str, msg: Any, site: Any) -> None:
        with unvalidated(msg["fn"]):
            if name in self.latents and site.discrete:
                log_prob, log_det = _probability(msg, site.discrete.upper), None
            elif name in self.latents:
                log_prob, log_det = _latent_terms(msg, self.latents[name])
            else:
                log_prob, log_det = masked_log_prob(msg), None
        log_factor = _rescaled(log_prob, msg["scale"], site.scale)
        self.log_factors[name] = log_factor if log_det is None else log_factor + log_det
        if name in self.masked_latents:
            self.masks[name] = element_mask(msg, site.batch_shape)


class Given(Substitute):
    """Replaces latents by constrained values."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__(values, None)

    def _value(self, msg: Any) -> Tensor:
        return self.latents[msg["name"]]


def _latent_terms(msg: Any, u: Tensor) -> tuple[Tensor, Tensor | None]:
    """Masked log-density and log-Jacobian of a latent, both of batch shape."""
    exact = log_density(msg["fn"], u)
    if exact is not None:
        return masked(exact[0], msg["mask"]), exact[1]
    log_prob, transform = masked_log_prob(msg), transform_of(msg["fn"])
    if is_identity(transform):
        return log_prob, None
    log_det = transform.log_abs_det_jacobian(u, msg["value"])
    extra = log_det.dim() - log_prob.dim()
    return log_prob, log_det.sum(tuple(range(-extra, 0))) if extra > 0 else log_det


def _probability(msg: Any, upper: float) -> Tensor:
    """Masked log-probability of a discrete latent, of batch shape."""
    value, extra = bounded_value(msg["fn"], msg["value"], upper)
    log_prob = msg["fn"].log_prob(value)
    return masked(log_prob if extra is None else log_prob + extra, msg["mask"])


class Undetached(TorchFunctionMode):
    """Lets gradients through `.detach()`.

    A score is the derivative of the log-density, whatever the author detaches for learning.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is Tensor.detach or func is torch.detach:
            return args[0]
        return func(*args, **(kwargs or {}))


class InitialiseFlat(Messenger):
    """Gives sites with an `ImproperUniform` prior a value, which Pyro cannot sample."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["done"] or msg["is_observed"]:
            return
        base = next((part for part in layers(fn) if isinstance(part, dist.ImproperUniform)), None)
        if base is None:
            return
        transform = transform_of(fn)
        shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
        msg["value"] = transform((2 * torch.rand(shape) - 1) * INITIAL_RADIUS)
        msg["done"] = True


class Draw(Messenger):
    """Samples latents in unconstrained coordinates, where their distribution allows it.

    A constrained draw may round to the edge of the support, from which there is no way back.

    Attributes:
        unconstrained: The draws, by latent.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unconstrained: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or not is_random(msg):
            return
        u = draw(msg["fn"])
        if u is not None:
            msg["value"], msg["done"] = transform_of(msg["fn"])(u), True
            self.unconstrained[msg["name"]] = u

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_random(msg) and not msg["is_observed"] and msg["name"] not in self.unconstrained:
            self.unconstrained[msg["name"]] = transform_of(msg["fn"]).inv(msg["value"])


class WithoutData(UnconditionMessenger):
    """Draws observed sites anew, and leaves deterministic ones what they are.

    Pyro's `uncondition` takes a `pyro.deterministic` for data, and draws it with its plates twice.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if not is_deterministic(msg):
            super()._pyro_sample(msg)


class AtMeans(Messenger):
    """Gives every latent that has no value yet the mean of its conditional distribution."""

    def _pyro_sample(self, msg: Any) -> None:
        was_observed = bool((msg["infer"] or {}).get("was_observed"))
        if not msg["done"] and is_random(msg) and not msg["is_observed"] and not was_observed:
            msg["value"], msg["done"] = mean_of(msg["fn"]), True


class _ReachedError(Exception):
    """All sites that a run was made for have been sampled."""


class Until(Messenger):
    """Ends a run of a program as soon as some sites have been sampled.

    To draw latents, nothing after the last of them is needed; a decoder costs most of the memory.

    Args:
        names: The sites. A run in which one of them does not appear goes on to its end.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = frozenset(names)
        self._left: set[str] = set()

    def __enter__(self) -> Until:
        self._left = set(self.names)
        return super().__enter__()

    def __exit__(  # type: ignore[override]
        self, kind: Any, error: Any, traceback: Any
    ) -> bool:
        super().__exit__(kind, error, traceback)
        return kind is _ReachedError

    def _pyro_post_sample(self, msg: Any) -> None:
        self._left.discard(msg["name"])
        if not self._left:
            raise _ReachedError


def is_random(msg: Any) -> bool:
    """A site with a density: not a deterministic, not a plate's subsample."""
    return msg["type"] == "sample" and not site_is_subsample(msg) and not is_deterministic(msg)


def is_deterministic(msg: Any) -> bool:
    """A site whose value its parents determine, and which has no density.

    `pyro.deterministic`, what a reparametrised site becomes, or a latent `Delta`.
    """
    if msg["type"] != "sample" or site_is_subsample(msg) or not is_delta(msg["fn"]):
        return False
    return not msg["is_observed"] or any(
        isinstance(part, dist.MaskedDistribution) and part._mask is False
        for part in layers(msg["fn"])
    )


def is_delta(fn: Any) -> bool:
    """Whether a distribution has all its mass on one value."""
    return any(isinstance(part, dist.Delta) for part in layers(fn))


def mean_of(fn: Any) -> Tensor:
    """Mean of a distribution, `(*batch, *event)`."""
    return fn.mean


def is_identity(transform: Transform) -> bool:
    """Whether a transform leaves its argument as it is."""
    if isinstance(transform, IndependentTransform):
        return is_identity(transform.base_transform)
    return isinstance(transform, ComposeTransform) and not transform.parts


def _rescaled(log_prob: Tensor, scale: Any, by_plates: float) -> Tensor:
    """A log-density with the handlers' scale, but for that of plates that subsample."""
    if not isinstance(scale, Tensor):
        scale = scale / by_plates
        return log_prob if abs(scale - 1.0) < 1e-12 else log_prob * scale
    return log_prob * (scale / by_plates)


@contextmanager
def unvalidated(fn: Any) -> Iterator[None]:
    """Switches off the validation of a distribution that was made outside of the model.

    An expanded prior, such as a `PyroSample`'s, remembers the setting that it was made under.
    Validation branches on values, which neither `vmap` nor a capture can.
    """
    validated = [part for part in _nested(fn) if part.__dict__.get("_validate_args")]
    for part in validated:
        part._validate_args = False
    try:
        yield
    finally:
        for part in validated:
            part._validate_args = True


def _nested(fn: Any) -> Iterator[Any]:
    """The distribution and all that it is made of."""
    yield fn
    for part in list(vars(fn).values()):
        if isinstance(part, torch.distributions.Distribution):
            yield from _nested(part)


@contextmanager
def running(model: Any, args: tuple, kwargs: dict, *, validates: bool = False) -> Iterator[None]:
    """A run of a program: without Pyro's warnings, and on the device that its data are on.

    What the program makes of plain numbers (`Normal(0.0, 1.0)`, `torch.zeros(3)`) is on the
    accelerator of its arguments or parameters, if they are on one.

    Args:
        model: The Pyro program.
        args: Its arguments.
        kwargs: Its keyword arguments.
        validates: Whether distributions check their parameters and values.
    """
    with quiet(), pyro.validation_enabled(validates), accelerator_of(model, args, kwargs):
        yield


def accelerator_of(model: Any, args: tuple, kwargs: dict) -> AbstractContextManager[Any]:
    """A block of code that makes tensors on the accelerator of a program, if it has one."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    devices = (tensor.device for tensor in (*tensors, *parameters))
    return next((device for device in devices if device.type != "cpu"), nullcontext())


@contextmanager
def quiet() -> Iterator[None]:
    """Pyro warns on every run about, for example, undeclared batch dimensions; once is enough."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

"""Hints for arguments that other inference classes have and `DCPC` does not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dcpc.errors import OptionError

_PARTICLES = "particles take the place of chains; give DCPC(...) num_particles= in the hundreds"
_VALUES = "give run(...) initial_values=, constrained values by site"
_LEAPFROG = "give DCPC(...) move=Langevin(leapfrog_steps=...), from dcpc.conquer"
_DENSE = "give DCPC(...) preconditioner='dense', or blocks= of latents"
_LEARN = "step torch's optimiser on dcpc.loss(...), or use the command `dcpc fit`"
HINTS = {
    "num_samples": "every particle is a draw; give DCPC(...) num_particles=, run(...) num_sweeps=",
    "num_steps": "give run(...) num_sweeps=",
    "warmup_steps": "give run(...) num_warmup=",
    "num_warmup_steps": "give run(...) num_warmup=",
    "num_chains": _PARTICLES,
    "chains": _PARTICLES,
    "draws": "give run(...) num_sweeps= and keep_every=",
    "tune": "give run(...) num_warmup=",
    "thinning": "give run(...) keep_every=",
    "initial_params": _VALUES,
    "init_strategy": _VALUES,
    "disable_progbar": "give run(...) progress=False",
    "progress_bar": "give run(...) progress=",
    "rng_key": "give run(...) seed=",
    "random_seed": "give run(...) seed=",
    "target_accept_prob": "give DCPC(...) correction=Metropolis(target=...)",
    "max_tree_depth": _LEAPFROG,
    "num_leapfrog_steps": _LEAPFROG,
    "full_mass": _DENSE,
    "dense_mass": _DENSE,
    "adapt_step_size": "give DCPC(...) step_size= to fix it; otherwise it is adapted",
    "jit_compile": "leave it out; models are captured as graphs anyway",
    "max_plate_nesting": "leave it out; plates are read off the model",
    "optim": _LEARN,
    "loss": _LEARN,
    "kernel": "give the model itself: DCPC(model, num_particles=...)",
}
"""What to write here, by the name of the argument there (Pyro, NumPyro, PyMC)."""


def refuse(names: Iterable[str], where: str) -> None:
    """Raises for arguments that nothing takes.

    Raises:
        OptionError: With a hint, where the name is one of another library's.
    """
    for name in names:
        hint = HINTS.get(name)
        raise OptionError(f"{where} has no argument {name!r}" + (f": {hint}" if hint else ""))


def check_model_arguments(model: Callable[..., Any], kwargs: Mapping[str, Any], where: str) -> None:
    """Looks for keyword arguments that the model does not take but other samplers do.

    Raises:
        OptionError: With what to write instead.
    """
    known = [name for name in kwargs if name in HINTS]
    if not known:
        return
    try:
        parameters = inspect.signature(model).parameters.values()
    except (TypeError, ValueError):
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    taken = {parameter.name for parameter in parameters}
    refuse((name for name in known if name not in taken), where)

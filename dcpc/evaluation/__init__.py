"""What is measured on data that were never trained on, each quantity under its own name."""

from dcpc.evaluation.bounds import elbo, importance_weighted_bound, prior_sample_estimate
from dcpc.evaluation.completion import Completion, MaskedModel, bottom_half, complete
from dcpc.evaluation.held_out import Evaluation, evaluate, format_table, summarise
from dcpc.evaluation.samples import matching_site, prior_samples
from dcpc.evaluation.temperatures import Setting, TemperatureStudy, temperature_study

__all__ = [
    "Completion",
    "Evaluation",
    "MaskedModel",
    "Setting",
    "TemperatureStudy",
    "bottom_half",
    "complete",
    "elbo",
    "evaluate",
    "format_table",
    "importance_weighted_bound",
    "matching_site",
    "prior_sample_estimate",
    "prior_samples",
    "summarise",
    "temperature_study",
]

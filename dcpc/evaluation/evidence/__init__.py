"""Evidence of held-out data: how probable a model makes what it never saw.

held_out      annealed evidence, and reconstructions along with it
temperatures  how long the annealing must be
bounds        importance sampling, from a guide or from the prior
"""

from dcpc.evaluation.evidence.bounds import (
    PRIOR_SAMPLES,
    Bounds,
    ImportanceSampler,
    forward_pass,
    guide_bounds,
    prior_sample_estimate,
)
from dcpc.evaluation.evidence.held_out import (
    Evaluation,
    evaluate,
    format_table,
    held_out_inference,
    per_datum,
    summarise,
)
from dcpc.evaluation.evidence.temperatures import Setting, TemperatureStudy, temperature_study

__all__ = [
    "PRIOR_SAMPLES",
    "Bounds",
    "Evaluation",
    "ImportanceSampler",
    "Setting",
    "TemperatureStudy",
    "evaluate",
    "format_table",
    "forward_pass",
    "guide_bounds",
    "held_out_inference",
    "per_datum",
    "prior_sample_estimate",
    "summarise",
    "temperature_study",
]

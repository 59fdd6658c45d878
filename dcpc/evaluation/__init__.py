"""What is measured on data that were never trained on, each quantity under its own name."""

from dcpc.evaluation.held_out import Evaluation, evaluate, format_table, summarise
from dcpc.evaluation.samples import prior_samples

__all__ = ["Evaluation", "evaluate", "format_table", "prior_samples", "summarise"]

"""Callbacks: TensorBoard scalars and images, files of predictions, tables.

checkpoints        the state of a run, saved wherever training stops
monitors           what TensorBoard shows
progress           the progress line of a terminal
evaluation         what was measured on held-out data: tables, TensorBoard, files
reports            progress in words, predictions, where the checkpoint is
calibration        how far predicted labels can be trusted
decision_boundary  the plane as a classifier sees it
grids              grids of images, film strips of sequences
board              TensorBoard entries with captions
"""

from dcpc.training.callbacks.calibration import CalibrationCurve, draw_calibration
from dcpc.training.callbacks.checkpoints import RunCheckpoint
from dcpc.training.callbacks.decision_boundary import DecisionBoundary, draw_decision_boundary
from dcpc.training.callbacks.evaluation import EvaluationTable, HeldOutTables
from dcpc.training.callbacks.grids import film_strips, image_grid, save_png
from dcpc.training.callbacks.monitors import ImageGrids, SweepMonitor
from dcpc.training.callbacks.progress import RunProgress
from dcpc.training.callbacks.reports import PredictionWriter, RunReport

__all__ = [
    "CalibrationCurve",
    "DecisionBoundary",
    "EvaluationTable",
    "HeldOutTables",
    "ImageGrids",
    "PredictionWriter",
    "RunCheckpoint",
    "RunProgress",
    "RunReport",
    "SweepMonitor",
    "draw_calibration",
    "draw_decision_boundary",
    "film_strips",
    "image_grid",
    "save_png",
]

"""Training on PyTorch Lightning: modules, data, callbacks, and the `dcpc` command.

modules     what is trained, and how
data        what it is trained on, and where that comes from
callbacks   what a run shows
store       the particles of every training datum
visits      the particles of a batch, from the store and back
checkpoint  checkpoints, checked before they are used
command     the `dcpc` command; screens, shipped: what it shows without torch; cli: what it runs;
            parser: of its configs; messages, type_words, refusals: errors of configs in one line;
            paths: folders that a config names
"""

from typing import TYPE_CHECKING

from dcpc.lazy import exported

if TYPE_CHECKING:
    from dcpc.training.callbacks import DecisionBoundary
    from dcpc.training.data import (
        ArrayData,
        DigitsData,
        HubImages,
        ImageData,
        LabelledData,
        MoonsData,
    )
    from dcpc.training.modules import (
        AmortisedModule,
        ClassifierModule,
        GenerativeModule,
        HeldOut,
        MeasuredModule,
        Parameterization,
        ParticleModule,
        Start,
    )
    from dcpc.training.store import ParticleStore, StoreError

__all__ = [
    "AmortisedModule",
    "ArrayData",
    "ClassifierModule",
    "DecisionBoundary",
    "DigitsData",
    "GenerativeModule",
    "HeldOut",
    "HubImages",
    "ImageData",
    "LabelledData",
    "MeasuredModule",
    "MoonsData",
    "Parameterization",
    "ParticleModule",
    "ParticleStore",
    "Start",
    "StoreError",
]

__getattr__, __dir__ = exported(
    __name__,
    {
        "dcpc.training.callbacks": ["DecisionBoundary"],
        "dcpc.training.data": [
            "ArrayData",
            "DigitsData",
            "HubImages",
            "ImageData",
            "LabelledData",
            "MoonsData",
        ],
        "dcpc.training.modules": [
            "AmortisedModule",
            "ClassifierModule",
            "GenerativeModule",
            "HeldOut",
            "MeasuredModule",
            "Parameterization",
            "ParticleModule",
            "Start",
        ],
        "dcpc.training.store": ["ParticleStore", "StoreError"],
    },
)

"""Data to train on and data held out, and where they come from.

labelled  batches of data with labels and indices; a training set and a held-out set
loading   batches in an order that can be repeated, shared out and continued
images    images, checked and split by a seed
digits    scikit-learn's digits
arrays    NumPy arrays in a folder; named_arrays: one for every argument of a model
derived   data made of images: half_labelled, few of whose labels a model sees; bouncing, sequences
          of frames through which an image moves; pixel_sequences, sequences of symbols
stored    sequences of images to be memorised
hub       the Hugging Face hub or a local folder; tables: its files as the package `datasets` reads
          them; pixels: decoded once, memory-mapped
moons     two moons, points of the plane
"""

from dcpc.training.data.arrays import ArrayData
from dcpc.training.data.bouncing import BouncingDigits
from dcpc.training.data.derived import DerivedData
from dcpc.training.data.digits import DigitsData
from dcpc.training.data.half_labelled import HalfLabelledData
from dcpc.training.data.hub import HubImages
from dcpc.training.data.images import ImageData, check_images
from dcpc.training.data.labelled import (
    Batch,
    LabelledData,
    LabelledSet,
    TensorSet,
    check_finite,
    check_sets,
)
from dcpc.training.data.loading import EpochBatches, ResumableLoader
from dcpc.training.data.moons import MoonsData
from dcpc.training.data.named_arrays import NamedArrayData
from dcpc.training.data.pixel_sequences import PixelSequences
from dcpc.training.data.pixels import PixelSet
from dcpc.training.data.stored import StoredSequences

__all__ = [
    "ArrayData",
    "Batch",
    "BouncingDigits",
    "DerivedData",
    "DigitsData",
    "EpochBatches",
    "HalfLabelledData",
    "HubImages",
    "ImageData",
    "LabelledData",
    "LabelledSet",
    "MoonsData",
    "NamedArrayData",
    "PixelSequences",
    "PixelSet",
    "ResumableLoader",
    "StoredSequences",
    "TensorSet",
    "check_finite",
    "check_images",
    "check_sets",
]

"""Functions of tensors as graphs of operators: recorded, simplified, compiled."""

from dcpc.graphs.recording import Recording, record

__all__ = ["Recording", "record"]

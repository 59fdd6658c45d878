"""What a run wrote for TensorBoard, read back."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def event_logs(folder: Path) -> list[EventAccumulator]:
    """The event files of a folder, the oldest first: names tell seconds apart only."""
    files = folder.glob("events.*")
    logs = [EventAccumulator(str(path), {"images": 0}).Reload() for path in files]
    return sorted(logs, key=lambda log: log.FirstEventTimestamp())

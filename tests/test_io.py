"""Files of tensors: whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import zipfile
from pathlib import Path

import pytest
import torch
from forks import child, wait

from dcpc.errors import FileError
from dcpc.io import (
    check_entries,
    num_bytes,
    read_tensors,
    remove_stale,
    write_json,
    write_tensors,
)

OLD = {"step": 1, "value": torch.arange(5)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that holds `OLD`, alone in its folder."""
    write_tensors(OLD, tmp_path / "state.pt")
    return tmp_path / "state.pt"


def assert_untouched(path: Path) -> None:
    content = read_tensors(path)
    assert torch.equal(content["value"], OLD["value"])
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_is_written_is_read_bit_for_bit_and_nothing_else_is_left(tmp_path):
    values = torch.tensor([0.1, -0.0, float("inf"), float("nan"), 5e-324], dtype=torch.float64)
    content = {"format": "x", "count": 3, "nested": {"values": values, "list": [True, None]}}
    path = tmp_path / "new" / "folder" / "file.pt"
    write_tensors(content, path)
    check_entries(path)
    got = read_tensors(path)
    bits = got["nested"].pop("values").view(torch.int64)
    assert torch.equal(bits, values.view(torch.int64))
    assert got == {"format": "x", "count": 3, "nested": {"list": [True, None]}}
    assert [p.name for p in path.parent.iterdir()] == ["file.pt"]


def test_json_has_null_for_what_is_no_number_of_json_and_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "new" / "test.json"
    nan, infinity = float("nan"), float("inf")
    write_json({"nll": nan, "bounds": [1.5, (infinity, -infinity)], "name": "z°"}, path)
    old = {"nll": None, "bounds": [1.5, [None, None]], "name": "z°"}
    assert json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail) == old
    with pytest.raises(TypeError):
        write_json({"nll": object()}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == old
    assert [p.name for p in path.parent.iterdir()] == ["test.json"]


def test_a_link_stays_a_link_and_the_file_behind_it_is_written(path, tmp_path):
    link = tmp_path / "last.pt"
    link.symlink_to(path)
    write_tensors({"value": torch.ones(1)}, link)
    assert link.is_symlink()
    assert torch.equal(read_tensors(path)["value"], torch.ones(1))


def test_the_size_of_tensors_counts_what_they_share_once():
    base = torch.zeros(100)
    content = {"a": base, "b": [base[:3], (torch.zeros(5, dtype=torch.int16),)], "n": 7}
    assert num_bytes(content) == 400 + 10


# -- what goes wrong while writing -----------------------------------------------------------


def test_a_full_disk_is_one_line_before_anything_is_written(path, monkeypatch):
    free = type("Usage", (), {"free": 1_500_000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    message = r"cannot write '.*state\.pt': the disk is full \(2\.0 MB of tensors, 1\.5 MB free"
    with pytest.raises(FileError, match=message) as caught:
        write_tensors({"value": torch.zeros(500_000)}, path)
    assert "\n" not in str(caught.value)
    assert_untouched(path)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_space_that_cannot_be_allocated_leaves_the_old_file(path, monkeypatch):
    sizes = []

    def refuse(descriptor, start, size):
        sizes.append(size)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    with pytest.raises(FileError, match="the disk is full"):
        write_tensors({"value": torch.zeros(500_000)}, path)
    assert sizes == [2_000_000]
    assert_untouched(path)


def test_a_disk_that_fails_half_way_leaves_the_old_file(path, monkeypatch):
    """The limit on the size of files stops the writes themselves, behind torch's back."""
    monkeypatch.setattr("dcpc.io._allocate", lambda file, size: None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, before[1]))
    try:
        with pytest.raises(FileError, match=r"cannot write '.*': File too large") as caught:
            write_tensors({"a": torch.zeros(500_000), "b": torch.zeros(500_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert_untouched(path)


def test_an_interrupt_half_way_leaves_the_old_file(path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_tensors({"value": torch.ones(3)}, path)
    assert_untouched(path)


def test_content_that_cannot_be_pickled_leaves_the_old_file(path):
    with pytest.raises((AttributeError, TypeError)):
        write_tensors({"value": (i for i in range(3))}, path)
    assert_untouched(path)


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(FileError, match=r"cannot write '.*': (Not a directory|File exists)"):
        write_tensors(OLD, tmp_path / "file" / "state.pt")


def test_the_file_and_then_its_folder_are_synced(path, monkeypatch):
    kinds = []
    sync = os.fsync

    def record(descriptor):
        kinds.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        sync(descriptor)

    monkeypatch.setattr("os.fsync", record)
    write_tensors(OLD, path)
    assert len(kinds) == 2
    assert re.fullmatch(rf"\.state\.pt\.{os.getpid()}-\w+\.incomplete", kinds[0])
    assert kinds[1] == path.parent.name


# -- what killed processes leave -------------------------------------------------------------


def writer(path: Path) -> tuple[int, socket.socket]:
    """A forked process that is about to finish a file, and waits for the end of its line to us."""
    ours, its = socket.socketpair()

    def write() -> None:
        def wait_for_end(descriptor: int) -> None:
            its.send(b".")
            its.recv(1)

        ours.close()
        os.fsync = wait_for_end
        write_tensors({"value": torch.ones(3)}, path)

    with its:
        number = child(write)
    assert ours.recv(1) == b"."
    return number, ours


def test_files_of_killed_processes_are_removed_and_those_of_live_ones_never(path):
    other = path.with_name(".download.incomplete")  # of another program
    other.touch()
    (dead, other_line), (alive, line) = writer(path), writer(path)
    with other_line, line:
        os.kill(dead, signal.SIGKILL)
        assert wait(dead) == -signal.SIGKILL
        before = {p.name for p in path.parent.iterdir()}
        assert len(before) == 4
        (removed,) = remove_stale(path.parent)
        assert f".{dead}-" in removed.name
        assert {p.name for p in path.parent.iterdir()} == before - {removed.name}
        assert torch.equal(read_tensors(path)["value"], OLD["value"])
        assert remove_stale(path.with_name("absent")) == []
        line.shutdown(socket.SHUT_WR)
        assert wait(alive) == 0
    assert torch.equal(read_tensors(path)["value"], torch.ones(3))
    assert {p.name for p in path.parent.iterdir()} == {path.name, other.name}


def test_a_file_that_was_removed_before_it_was_locked_is_made_again(path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    lock, raced = fcntl.flock, []

    def late(file, operation):
        if not raced:
            raced.append(file.name)
            Path(file.name).unlink()
        lock(file, operation)

    monkeypatch.setattr("fcntl.flock", late)
    write_tensors({"value": torch.ones(3)}, path)
    assert len(raced) == 1
    assert torch.equal(read_tensors(path)["value"], torch.ones(3))


# -- what is wrong with a file ---------------------------------------------------------------


def test_a_flipped_bit_is_found_and_its_entry_named(path):
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        (entry,) = [info for info in archive.infolist() if info.filename.endswith("data/0")]
    place = content.find(OLD["value"].numpy().tobytes(), entry.header_offset)
    content[place + 8] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"state\.pt' is damaged: its entry '.*data/0'"):
        check_entries(path)


def test_truncated_foreign_and_absent_files_are_one_line(path):
    content = path.read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(FileError, match=r"state\.pt' \(.* bytes\) is truncated, or is no file"):
            check_entries(path)
    with pytest.raises(FileError, match=r"there is no file '.*absent\.pt'"):
        check_entries(path.with_name("absent.pt"))

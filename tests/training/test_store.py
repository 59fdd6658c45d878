from __future__ import annotations

import errno
import math
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import child, wait

from dcpc.recombine import LogWeights
from dcpc.sweep import SweepState
from dcpc.training.store import ParticleStore, StoreError

N, K = 7, 3
AXES = {"z": 1, "w": 2}


def state(num_data: int, num_particles: int = K, **sizes: int) -> SweepState:
    """Random particles; the data are the second batch axis of `w`."""
    size = sizes.get("size", 5)
    return SweepState(
        latents={
            "z": torch.randn(num_particles, num_data, size),
            "w": torch.randn(num_particles, 2, num_data),
        },
        log_weight=LogWeights(torch.randn(num_particles, num_data)),
        log_joint=torch.randn(num_particles, num_data),
    )


@pytest.fixture
def store(tmp_path: Path) -> ParticleStore:
    torch.manual_seed(0)
    return ParticleStore(tmp_path, N)


def test_what_is_written_at_an_index_is_read_at_that_index(store: ParticleStore) -> None:
    index, written = torch.tensor([4, 0, 6]), state(3)
    store.write(index, written, AXES)
    back = store.read(torch.tensor([6, 4]), lambda: state(2), AXES)
    assert torch.equal(back.latents["z"], written.latents["z"][:, [2, 0]])
    assert torch.equal(back.latents["w"], written.latents["w"][:, :, [2, 0]])
    assert torch.equal(back.log_joint, written.log_joint[:, [2, 0]])


def test_unvisited_data_get_the_fresh_particles_also_within_a_mixed_batch(
    store: ParticleStore,
) -> None:
    written, fresh = state(1), state(3)
    store.write(torch.tensor([2]), written, AXES)
    assert store.visited(torch.tensor([1, 2, 3])).tolist() == [False, True, False]
    mixed = store.read(torch.tensor([1, 2, 3]), lambda: fresh, AXES)
    expected_z, expected_w = fresh.latents["z"].clone(), fresh.latents["w"].clone()
    expected_z[:, 1], expected_w[:, :, 1] = written.latents["z"][:, 0], written.latents["w"][..., 0]
    assert torch.equal(mixed.latents["z"], expected_z)
    assert torch.equal(mixed.latents["w"], expected_w)
    assert torch.equal(mixed.log_joint[:, [0, 2]], fresh.log_joint[:, [0, 2]])
    assert torch.equal(mixed.log_joint[:, 1], written.log_joint[:, 0])


def test_nothing_is_drawn_for_visited_data_once_the_store_is_known_to_fit(
    store: ParticleStore,
) -> None:
    store.write(torch.arange(N), state(N), AXES)
    store.read(torch.arange(N), lambda: pytest.fail("drew particles that nobody needs"), AXES)


def test_stored_weights_have_mean_one_and_keep_their_ratios(store: ParticleStore) -> None:
    written = state(N)
    log_weight = written.log_weight.log_weight + 1e4 * torch.arange(N)
    log_weight[1, 3] = -math.inf
    written = SweepState(written.latents, LogWeights(log_weight), written.log_joint)
    store.write(torch.arange(N), written, AXES)
    back = store.read(torch.arange(N), lambda: state(N), AXES).log_weight
    assert torch.allclose(back.log_weight.exp().mean(0), torch.ones(N))
    assert torch.equal(back.log_weight.isinf(), log_weight.isinf())
    assert torch.allclose(back.normalized(), written.log_weight.normalized(), atol=1e-6)


def test_particles_live_in_memory_mapped_files_of_the_expected_size(store: ParticleStore) -> None:
    written = state(N)
    store.write(torch.arange(N), written, AXES)
    files = list(store.folder.glob("*.bin"))
    assert sorted(path.stat().st_size for path in files) == sorted(
        [N, *(4 * N * K * values for values in (5, 2, 1, 1))]
    )
    (path,) = [path for path in files if path.stat().st_size == 4 * N * K * 5]
    on_disk = np.memmap(path, dtype=np.float32, mode="r", shape=(N, K, 5))
    assert np.array_equal(on_disk, written.latents["z"].transpose(0, 1).numpy())


def test_the_files_disappear_with_the_store(tmp_path: Path) -> None:
    store = ParticleStore(tmp_path, N)
    store.write(torch.arange(N), state(N), AXES)
    assert len(list(tmp_path.iterdir())) == 1
    del store
    assert not list(tmp_path.iterdir())


def test_a_closed_store_leaves_no_files_but_can_still_be_saved(store: ParticleStore) -> None:
    written = state(N)
    store.write(torch.arange(N), written, AXES)
    store.close()
    assert not store.folder.exists()
    assert torch.equal(store.state_dict()["log_joint"], written.log_joint.T)


def test_a_saved_store_holds_nothing_but_tensors_and_restores_them(
    store: ParticleStore, tmp_path: Path
) -> None:
    written = state(2)
    store.write(torch.tensor([5, 1]), written, AXES)
    torch.save(store.state_dict(), tmp_path / "particles.pt")
    saved = torch.load(tmp_path / "particles.pt", weights_only=True)
    other = ParticleStore(tmp_path, N)
    other.load_state_dict(saved)
    back = other.read(torch.tensor([5, 1]), lambda: state(2), AXES)
    assert torch.equal(back.latents["z"], written.latents["z"])
    assert other.visited(torch.arange(N)).tolist() == [i in (1, 5) for i in range(N)]
    other.write(torch.tensor([1]), state(1), AXES)
    assert torch.equal(
        store.read(torch.tensor([1]), lambda: state(1), AXES).log_joint, written.log_joint[:, 1:]
    )


def test_an_index_outside_the_data_is_refused(store: ParticleStore) -> None:
    for index in (torch.tensor([0, N]), torch.tensor([-1, 0])):
        with pytest.raises(StoreError, match=f"the store holds {N} data"):
            store.write(index, state(2), AXES)


def test_particles_of_another_model_are_refused_with_the_sites_name(
    store: ParticleStore, tmp_path: Path
) -> None:
    first = ParticleStore(tmp_path, N)
    first.write(torch.arange(N), state(N), AXES)
    store.load_state_dict(first.state_dict())
    for wrong in (state(2, num_particles=K + 1), state(2, size=6)):
        with pytest.raises(StoreError, match=r"site 'z': the store has .*\(3, 5\).* asks for"):
            store.read(torch.tensor([0, 1]), lambda wrong=wrong: wrong, AXES)
    renamed = state(2)
    renamed.latents["v"] = renamed.latents.pop("w")
    with pytest.raises(StoreError, match=r"site 'w'.*asks for None"):
        store.read(torch.tensor([0, 1]), lambda: renamed, {"z": 1, "v": 2})


def test_particles_of_another_training_set_are_refused(
    store: ParticleStore, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match="has particles of 7 data, but the training set has 8"):
        ParticleStore(tmp_path, N + 1).load_state_dict(store.state_dict())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot write to the folder .*file/store"):
        ParticleStore(tmp_path / "file" / "store", N)


def test_a_disk_that_is_too_small_is_noticed_before_it_is_full(
    store: ParticleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(StoreError, match=r"the disk of .* has 0 MB left .No space left"):
        store.write(torch.arange(N), state(N), AXES)


def test_files_take_their_space_at_once(store: ParticleStore) -> None:
    store.write(torch.tensor([0]), state(1, size=5000), AXES)
    for path in store.folder.glob("*.bin"):
        assert 512 * path.stat().st_blocks >= path.stat().st_size, path


def test_only_particles_of_visited_data_are_saved_and_come_back_where_they_were(
    store: ParticleStore, tmp_path: Path
) -> None:
    index, written = torch.tensor([5, 1, 3]), state(3)
    store.write(index, written, AXES)
    saved = store.state_dict()
    assert saved["visited"].tolist() == [False, True, False, True, False, True, False]
    order = [1, 2, 0]  # of the indices 1, 3, 5
    assert torch.equal(saved["latents"]["z"], written.latents["z"].transpose(0, 1)[order])
    assert saved["log_weight"].shape == (3, K)
    assert {path.stem for path in store.folder.glob("*.bin")} == {
        "visited",
        "value-0",
        "value-1",
        "log_weight",
        "log_joint",
    }
    other = ParticleStore(tmp_path / "other", N)
    other.load_state_dict(saved)
    assert other.visited(torch.arange(N)).tolist() == saved["visited"].tolist()
    back = other.read(index, lambda: state(3), AXES)
    assert torch.equal(back.latents["w"], written.latents["w"])
    assert torch.equal(back.log_joint, written.log_joint)


def test_a_checkpoint_with_rows_of_all_data_is_read_too(
    store: ParticleStore, tmp_path: Path
) -> None:
    written = state(N)
    store.write(torch.arange(N), written, AXES)
    saved = store.state_dict() | {"visited": torch.arange(N) < 4}  # as they were once written
    other = ParticleStore(tmp_path / "other", N)
    other.load_state_dict(saved)
    fresh = state(N)
    back = other.read(torch.arange(N), lambda: fresh, AXES)
    assert torch.equal(back.latents["z"][:, :4], written.latents["z"][:, :4])
    assert torch.equal(back.latents["z"][:, 4:], fresh.latents["z"][:, 4:])


def test_two_processes_see_each_others_particles(store: ParticleStore) -> None:
    other = ParticleStore("", N, shared=store.folder)
    written = state(2)
    store.write(torch.tensor([0, 1]), written, AXES)
    other.write(torch.tensor([6]), state(1), AXES)
    assert store.visited(torch.arange(N)).tolist() == [True, True, *[False] * 4, True]
    assert torch.equal(other.particles(torch.tensor([1]))[0]["z"][0], written.latents["z"][:, 1])
    del other
    assert store.folder.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks on Windows")
def test_folders_of_killed_processes_are_removed_and_those_of_others_stay(tmp_path: Path) -> None:
    living = ParticleStore(tmp_path, N)
    kept = []

    def die() -> None:
        kept.append(ParticleStore(tmp_path, N))
        os.kill(os.getpid(), signal.SIGKILL)

    assert wait(child(die)) == -signal.SIGKILL
    (killed,) = set(tmp_path.iterdir()) - {living.folder}
    newest = ParticleStore(tmp_path, N)
    assert set(tmp_path.iterdir()) == {living.folder, newest.folder}
    assert newest.folder != killed


def test_particles_that_are_not_finite_leave_the_stored_ones_as_they_are(
    store: ParticleStore,
) -> None:
    index, before, bad = torch.arange(5), state(5), state(5)
    store.write(index, before, AXES)
    bad.latents["z"][1, 0, 2] = math.nan
    bad.latents["w"][0, 1, 1] = math.inf
    bad.log_weight.log_weight[:, 2] = -math.inf
    bad.log_joint[2, 3] = -math.inf
    bad.log_weight.log_weight[0, 4] = -math.inf  # a weight of zero, beside others
    store.write(index, bad, AXES)
    latents, log_weight = store.particles(index)
    for row in range(5):
        kept = before if row < 4 else bad
        assert torch.equal(latents["z"][row], kept.latents["z"][:, row])
        assert torch.equal(latents["w"][row], kept.latents["w"][:, :, row])
    assert log_weight.isinf().sum() == 1
    torch.testing.assert_close(log_weight[4].softmax(0), bad.log_weight.log_weight[:, 4].softmax(0))


def test_data_that_were_never_visited_with_finite_particles_stay_unvisited(
    store: ParticleStore,
) -> None:
    bad = state(2)
    bad.latents["z"][0, 0, 0] = math.nan
    store.write(torch.tensor([3, 4]), bad, AXES)
    assert store.visited(torch.tensor([3, 4])).tolist() == [False, True]

from __future__ import annotations

import gzip
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import Callback

from dcpc.distributions import DiscretizedNormal
from dcpc.errors import DataError, OptionError
from dcpc.training.command import main
from dcpc.training.data import hub
from dcpc.training.data.hub import HubImages
from dcpc.training.data.pixels import PixelSet, open_pixels, prepare

datasets = pytest.importorskip("datasets", reason="needs the extra 'data'")

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
NUM_IMAGES = 20


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from or written to the user's caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "huggingface")
    datasets.disable_progress_bars()


@pytest.fixture
def levels() -> np.ndarray:
    """Twenty grey pictures of 6 x 5 pixels, all different."""
    return np.random.default_rng(4).integers(0, 256, (NUM_IMAGES, 6, 5), dtype=np.uint8)


@pytest.fixture
def pictures(tmp_path: Path, levels: np.ndarray) -> Path:
    """A folder with a sub-folder per class; picture i is of class i % 2."""
    for index, picture in enumerate(levels):
        folder = tmp_path / "pictures" / ("even", "odd")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{index:02}.png")
    return tmp_path / "pictures"


@pytest.fixture
def parquet(tmp_path: Path, levels: np.ndarray) -> Path:
    """The same as a parquet file, with the classes 1, 0, 1, 0, ..."""
    return save_parquet(
        tmp_path / "parquet",
        picture=([Image.fromarray(picture) for picture in levels], datasets.Image()),
        kind=(
            [1 - index % 2 for index in range(NUM_IMAGES)],
            datasets.ClassLabel(names=["odd", "even"]),
        ),
        number=(list(range(100, 100 + NUM_IMAGES)), datasets.Value("int32")),
        word=(["a"] * NUM_IMAGES, datasets.Value("string")),
    )


def save_parquet(folder: Path, **columns: tuple[list, object]) -> Path:
    folder.mkdir()
    table = datasets.Dataset.from_dict(
        {name: values for name, (values, _) in columns.items()},
        features=datasets.Features({name: feature for name, (_, feature) in columns.items()}),
    )
    table.to_parquet(folder / "train.parquet")
    return folder


def open_data(path: Path | str, **options: object) -> HubImages:
    data = HubImages(str(path), **{"batch_size": 7, **options})
    data.setup("fit")
    return data


def contents(loader: torch.utils.data.DataLoader) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat(parts) for parts in zip(*loader, strict=True))


def rows_of(images: torch.Tensor, levels: np.ndarray) -> list[int]:
    """Which of the pictures each image is, by its bytes."""
    known = {picture.tobytes(): index for index, picture in enumerate(levels)}
    return [known[(255 * image).round().byte().numpy().tobytes()] for image in images]


# -- what is read ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pictures", "parquet"])
def test_a_folder_is_read_with_its_classes_and_split_into_all_of_its_images(
    kind: str, levels: np.ndarray, request: pytest.FixtureRequest
) -> None:
    data = open_data(request.getfixturevalue(kind))
    found: list[int] = []
    for loader, count in ((data.train_dataloader(), 18), (data.val_dataloader(), 2)):
        images, labels, index = contents(loader)
        assert images.shape == (count, 1, 6, 5)
        assert sorted(index.tolist()) == list(range(count))
        rows = rows_of(images, levels)
        torch.testing.assert_close(images[:, 0], torch.tensor(levels[rows]) / 255.0)
        is_odd = [row % 2 for row in rows]
        assert labels.tolist() == (is_odd if kind == "pictures" else [1 - odd for odd in is_odd])
        found += rows
    assert sorted(found) == list(range(NUM_IMAGES))


def test_the_index_of_a_datum_does_not_change_from_epoch_to_epoch(pictures: Path) -> None:
    loader = open_data(pictures).train_dataloader()
    seen = []
    for epoch in (0, 1):
        loader.batch_sampler.set_epoch(epoch)
        images, _, index = contents(loader)
        seen.append((index, images[index.argsort()]))
    assert not torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])


def test_labels_come_from_the_column_named_and_are_zero_without_classes(
    parquet: Path, levels: np.ndarray, tmp_path: Path
) -> None:
    open_data(parquet)  # whose cache must not be taken for the other column's
    images, labels, _ = contents(open_data(parquet, label_column="number").train_dataloader())
    assert labels.tolist() == [100 + row for row in rows_of(images, levels)]
    bare = save_parquet(
        tmp_path / "bare", image=([Image.fromarray(p) for p in levels], datasets.Image())
    )
    assert contents(open_data(bare).train_dataloader())[1].tolist() == [0] * 18


def test_the_split_depends_on_the_seed_alone_and_caps_shorten_it(
    pictures: Path, levels: np.ndarray
) -> None:
    def rows(**options: object) -> tuple[list[int], list[int]]:
        data = open_data(pictures, held_out_fraction=0.3, **options)
        training, held_out = data.training_set, data.held_out_set
        return tuple(  # type: ignore[return-value]
            rows_of(part.__getitems__(range(len(part)))[0], levels) for part in (training, held_out)
        )

    training, held_out = rows(seed=3)
    assert (len(training), len(held_out)) == (14, 6)
    assert not set(training) & set(held_out)
    assert rows(seed=3) == (training, held_out)
    assert rows(seed=4) != (training, held_out)
    assert rows(seed=3, num_training=5) == (training[:5], held_out)
    assert rows(seed=3, num_held_out=2) == (training, held_out[:2])


# -- size, channels, range ---------------------------------------------------------------------


def test_resizing_keeps_proportions_and_crops_the_middle() -> None:
    wide = np.zeros((6, 18), dtype=np.uint8)
    wide[:, 6:12] = 200
    assert (prepare(Image.fromarray(wide), 6, 1) == 200).all()
    halves = np.zeros((24, 24), dtype=np.uint8)
    halves[:, 12:] = 250
    small = prepare(Image.fromarray(halves), 4, 1)[0]
    assert small.shape == (4, 4)
    assert (small[:, 0] < 15).all()
    assert (small[:, 3] > 235).all()
    assert prepare(Image.fromarray(wide.T), None, 1).shape == (1, 18, 6)


def test_channels_are_red_green_blue_or_their_luminance() -> None:
    colour = np.zeros((2, 3, 3), dtype=np.uint8)
    colour[0, 1] = (200, 100, 50)
    pixels = prepare(Image.fromarray(colour), None, 3)
    assert pixels.shape == (3, 2, 3)
    assert pixels[:, 0, 1].tolist() == [200, 100, 50]
    # ITU-R 601-2, as Pillow documents its conversion to grey.
    luminance = (200 * 299 + 100 * 587 + 50 * 114) / 1000
    assert abs(float(prepare(Image.fromarray(colour), None, 1)[0, 0, 1]) - luminance) <= 1
    grey = prepare(Image.fromarray(colour[..., 0]), None, 3)
    assert (grey == colour[..., 0]).all()


def test_intensities_from_minus_one_to_one_are_the_grid_of_the_discretised_normal(
    pictures: Path,
) -> None:
    every_level = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    images = PixelSet(every_level, torch.zeros(1), torch.zeros(1, dtype=torch.long), (-1.0, 1.0))
    expected = torch.arange(256, dtype=torch.float64) / 127.5 - 1.0
    torch.testing.assert_close(images[0][0].flatten().double(), expected, atol=1e-6, rtol=0)
    DiscretizedNormal(0.0, 1.0, validate_args=True).log_prob(images[0][0])
    data = open_data(pictures, intensity_range=(-1.0, 1.0))
    assert data.intensity_range == (-1.0, 1.0)
    ours, unit = (contents(d.train_dataloader())[0] for d in (data, open_data(pictures)))
    torch.testing.assert_close(ours, 2 * unit - 1)


# -- binary draws ------------------------------------------------------------------------------


def grey(levels: list[int], repeats: int) -> PixelSet:
    """`repeats` pictures of four pixels, whose grey levels are given."""
    pixels = torch.tensor(levels, dtype=torch.uint8).reshape(1, 1, 2, 2).repeat(repeats, 1, 1, 1)
    return PixelSet(pixels, torch.zeros(repeats), torch.arange(repeats), seed=5)


def draws(images: PixelSet, epochs: int) -> torch.Tensor:
    """`(epochs, N, 4)`."""
    drawn = []
    for epoch in range(epochs):
        images.set_epoch(epoch)
        drawn.append(images.__getitems__(range(len(images)))[0].flatten(1))
    return torch.stack(drawn)


def test_a_binary_pixel_is_one_with_the_probability_of_its_grey_level() -> None:
    drawn = draws(grey([0, 51, 128, 255], repeats=400), epochs=100).double()
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert drawn[..., 0].max() == 0
    assert drawn[..., 3].min() == 1
    for pixel, p in ((1, 0.2), (2, 128 / 255)):
        assert abs(drawn[..., pixel].mean() - p) < 4 * np.sqrt(p * (1 - p) / 40_000)


def test_binary_draws_are_independent_of_pixel_image_and_epoch() -> None:
    p = 128 / 255
    drawn = (
        draws(grey([128] * 4, repeats=100), epochs=100).double().sub(p).div(np.sqrt(p * (1 - p)))
    )
    for axis in range(3):
        neighbours = (drawn * drawn.roll(1, axis)).mean()
        assert abs(neighbours) < 4 / np.sqrt(drawn.numel())
        means = drawn.mean(dim=[other for other in range(3) if other != axis])
        assert (means.abs() < 4.5 / np.sqrt(drawn.numel() / drawn.shape[axis])).all()


def test_images_share_no_part_of_their_draws() -> None:
    pixels = torch.full((200, 1, 8, 8), 128, dtype=torch.uint8)
    images = PixelSet(pixels, torch.zeros(200), torch.arange(200), seed=5)
    drawn = images.__getitems__(range(200))[0].flatten(1)
    for shift in range(64):  # a stream that begins within another one would repeat it, shifted
        agree = (drawn[:-1, shift:] == drawn[1:, : 64 - shift]).double()
        assert abs(agree.mean() - 0.5) < 5 * 0.5 / np.sqrt(agree.numel())


def test_a_draw_is_a_function_of_seed_epoch_and_image_whatever_the_batch() -> None:
    images = grey([128] * 4, repeats=30)
    images.set_epoch(2)
    whole = images.__getitems__(range(30))[0]
    images.set_epoch(3)
    assert not torch.equal(images.__getitems__(range(30))[0], whole)
    images.set_epoch(2)
    assert torch.equal(images.__getitems__([17, 4])[0], whole[[17, 4]])
    assert torch.equal(images[9][0], whole[9])


def test_held_out_images_are_binary_and_fixed_while_training_images_are_redrawn(
    pictures: Path,
) -> None:
    data = open_data(pictures, binarise=True)
    loader = data.train_dataloader()
    drawn = []
    for epoch in (0, 1, 0):
        loader.batch_sampler.set_epoch(epoch)
        images, _, index = contents(loader)
        drawn.append(images[index.argsort()])
        assert set(images.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    held_out = [contents(data.val_dataloader())[0] for _ in range(2)]
    assert torch.equal(*held_out)
    assert set(held_out[0].unique().tolist()) == {0.0, 1.0}


class Batches(Callback):
    """Keeps every batch."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen.append(batch[0])


def test_a_resumed_run_sees_the_same_binary_draws(
    deep_module: Callable, trainer: Callable, tmp_path: Path
) -> None:
    (tmp_path / "dots").mkdir()
    for index in range(9):
        Image.new("L", (2, 2), color=128).save(tmp_path / "dots" / f"{index}.png")

    def fit(epochs: int, **options: object) -> tuple[object, list[torch.Tensor]]:
        batches = Batches()
        run = trainer(max_epochs=epochs, callbacks=[batches])
        data = HubImages(str(tmp_path / "dots"), binarise=True, batch_size=4)
        run.fit(deep_module(), datamodule=data, **options)
        return run, batches.seen

    _, whole = fit(3)
    first, seen = fit(1)
    first.save_checkpoint(tmp_path / "first.ckpt")
    _, rest = fit(3, ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    assert len(whole) == 6
    assert all(torch.equal(a, b) for a, b in zip(whole, seen + rest, strict=True))


# -- the cache ---------------------------------------------------------------------------------


def test_a_second_run_neither_decodes_nor_needs_the_package(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = contents(open_data(pictures).val_dataloader())
    monkeypatch.setitem(sys.modules, "datasets", None)
    second = contents(open_data(pictures).val_dataloader())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    files = sorted(path.name for path in (tmp_path / "cache" / "dcpc").iterdir())
    assert len(files) == 2
    assert files[0].startswith("pictures-1xoriginal-")


def test_new_pictures_another_size_or_other_channels_are_decoded_anew(
    pictures: Path, levels: np.ndarray
) -> None:
    open_data(pictures)
    Image.fromarray(255 - levels[0]).save(pictures / "even" / "99.png")
    assert len(open_data(pictures).training_set) == 19
    assert open_data(pictures, size=4).training_set[0][0].shape == (1, 4, 4)
    assert open_data(pictures, size=4, channels=3).training_set[0][0].shape == (3, 4, 4)
    changed = pictures / "even" / "99.png"
    os.utime(changed, ns=(1, 1))
    before = len(list(open_data(pictures).cache_folder.iterdir()))
    os.utime(changed, ns=(2, 2))
    assert len(list(open_data(pictures).cache_folder.iterdir())) == before + 2


def test_nothing_is_left_of_a_decoding_that_failed(pictures: Path, tmp_path: Path) -> None:
    (pictures / "odd" / "01.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"image 10 cannot be used: .*; repair or remove it"):
        open_data(pictures, cache_folder=str(tmp_path / "own"))
    assert not list((tmp_path / "own").glob("*[!s].npy"))
    assert not list((tmp_path / "own").glob("incomplete-*"))


@pytest.mark.parametrize("damage", ["cut", "nonsense", "empty", "labels", "shape"])
def test_a_damaged_cache_is_named_and_says_to_delete_it(pictures: Path, damage: str) -> None:
    labels, cached = sorted(open_data(pictures).cache_folder.iterdir())
    if damage == "cut":
        cached.write_bytes(cached.read_bytes()[:-40])
    elif damage == "nonsense":
        cached.write_bytes(b"nonsense")
    elif damage == "empty":
        cached.write_bytes(b"")
    elif damage == "labels":
        np.save(labels, np.zeros(3))
    else:
        np.save(cached, np.zeros((NUM_IMAGES, 6, 5)))
    with pytest.raises(DataError, match=rf"'{cached}' are damaged .*delete this file"):
        open_data(pictures)
    cached.unlink()
    assert len(open_data(pictures).training_set) == 18


def test_images_are_mapped_and_not_read_into_memory(pictures: Path) -> None:
    cached = next(open_data(pictures).cache_folder.glob("*[0-9a-f].npy"))
    pixels, _ = open_pixels(cached)
    assert pixels.dtype == torch.uint8
    pixels[0] = 0  # copied on write: the file stays as it was
    assert open_pixels(cached)[0][0].any()
    assert str(cached) in Path("/proc/self/maps").read_text() or sys.platform != "linux"


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, r"data\.size must be between 1 and 512 pixels, got 0"),
        ({"size": -28}, r"data\.size must be between 1 and 512 pixels, got -28"),
        ({"size": 4096}, r"data\.size must be between 1 and 512 pixels, got 4096"),
        ({"channels": 2}, r"data\.channels must be 1 for grey or 3 for colour, got 2"),
        ({"held_out_fraction": 0.0}, r"data\.held_out_fraction must be between 0 and 1.*got 0\.0"),
        ({"held_out_fraction": 1.0}, r"data\.held_out_fraction must be between 0 and 1.*got 1\.0"),
        ({"num_training": 0}, r"data\.num_training must be at least 1, got 0"),
        ({"num_held_out": 0}, r"data\.num_held_out must be at least 1, got 0"),
        ({"batch_size": 0}, r"data\.batch_size must be at least 1, got 0"),
        ({"intensity_range": (0.0, 2.0)}, r"must be \[0, 1\] or \[-1, 1\], got \[0\.0, 2\.0\]"),
        (
            {"intensity_range": (-1.0, 1.0), "binarise": True},
            r"data\.binarise draws pixels of 0 and 1, so data\.intensity_range must be \[0, 1\]",
        ),
    ],
)
def test_options_out_of_range_are_named_before_anything_is_read(
    options: dict, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        HubImages("/nowhere", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_training": 19}, r"data\.num_training must be at most 18, .* got 19"),
        ({"num_held_out": 3}, r"data\.num_held_out must be at most 2, .* got 3"),
        ({"held_out_fraction": 0.01}, r"held_out_fraction of 0\.01 leaves none of 20 images"),
        ({"split": "test"}, r"data\.split does not fit .*Should be one of \['train'\]"),
        ({"image_column": "scan"}, r"no image column 'scan' among the columns image, label"),
        ({"image_column": "label"}, r"no image column 'label' among the columns image, label"),
        ({"label_column": "name"}, r"no label column 'name' among the columns image, label"),
    ],
)
def test_options_that_do_not_fit_the_data_are_named(
    pictures: Path, options: dict, message: str
) -> None:
    with pytest.raises((DataError, OptionError), match=message):
        open_data(pictures, **options)


def test_labels_that_are_no_integers_are_named(parquet: Path) -> None:
    with pytest.raises(DataError, match=r"label_column: the column 'word' must hold classes or"):
        open_data(parquet, label_column="word")


def test_no_column_of_images_or_several_are_named(tmp_path: Path, levels: np.ndarray) -> None:
    numbers = (list(range(5)), datasets.Value("int64"))
    with pytest.raises(DataError, match=r"no column of images among its columns a; expected one"):
        open_data(save_parquet(tmp_path / "none", a=numbers))
    scans = ([Image.fromarray(picture) for picture in levels], datasets.Image())
    both = save_parquet(tmp_path / "both", a=scans, b=scans)
    with pytest.raises(DataError, match=r"2 columns \(a, b\) of images .*data\.image_column"):
        open_data(both)
    assert len(open_data(both, image_column="b").training_set) == 18


def test_pictures_of_several_shapes_ask_for_a_size(pictures: Path) -> None:
    Image.new("L", (9, 9)).save(pictures / "odd" / "99.png")
    with pytest.raises(DataError, match=r"image 20 has the shape \(1, 9, 9\) .* set data\.size"):
        open_data(pictures)
    assert len(open_data(pictures, size=4).training_set) == 19


def test_pictures_of_16_bits_are_refused_rather_than_clipped(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(tmp_path / "deep" / "a.png")
    with pytest.raises(DataError, match=r"image 0 cannot be used: .*'I;16', expected 8 bits"):
        open_data(tmp_path / "deep")


@pytest.mark.parametrize("path", ["/no/where", "./nowhere", "../no/where", "a/b/c"])
def test_a_missing_folder_says_how_to_get_the_data(path: str) -> None:
    with pytest.raises(DataError, match=rf"no folder '{path}' .*hf download .*configs/README"):
        open_data(path)


def test_a_hub_that_cannot_be_reached_says_how_to_get_the_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'ylecun/mnist' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"'ylecun/mnist'.*Couldn't reach .*hf download"):
        open_data("ylecun/mnist")


def test_a_hub_name_is_cached_by_the_fingerprint_that_the_package_gives(
    parquet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = datasets.load_dataset(str(parquet), split="train")
    asked = []

    def load(path: str, name: str | None, split: str) -> object:
        asked.append((path, name, split))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = open_data("owner/letters", config_name="balanced")
    assert asked == [("owner/letters", "balanced", "train")]
    assert len(data.training_set) == 18
    monkeypatch.setattr(hub, "decode_pictures", None)
    assert len(open_data("owner/letters", config_name="balanced").training_set) == 18


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data\.path: no images are in '.*empty'"):
        open_data(tmp_path / "empty")


def test_a_missing_package_says_what_to_install(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"not installed: pip install .*'\.\[data\]'"):
        open_data(pictures)


def test_a_cache_folder_that_cannot_be_written_is_named(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache_folder: cannot write to '.*file/cache'"):
        open_data(pictures, cache_folder=str(tmp_path / "file" / "cache"))


def test_the_recipe_for_emnist_makes_a_folder_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (Path(__file__).parents[3] / "configs" / "README.md").read_text()
    (recipe,) = re.findall(r"```python\n(.*?)```", guide.partition("### EMNIST")[2], re.DOTALL)
    stored = np.random.default_rng(1).integers(0, 256, (10, 28, 28), dtype=np.uint8)
    labels = np.arange(37, 47, dtype=np.uint8)
    for name, header, values in (("images-idx3", 16, stored), ("labels-idx1", 8, labels)):
        with gzip.open(tmp_path / f"emnist-balanced-train-{name}-ubyte.gz", "wb") as file:
            file.write(bytes(header) + values.tobytes())
    monkeypatch.chdir(tmp_path)
    exec(recipe, {})
    images, labels, _ = contents(open_data("data/emnist-balanced").train_dataloader())
    rows = rows_of(images, stored.transpose(0, 2, 1))
    assert labels.tolist() == [37 + row for row in rows]


def config(folder: Path, source: Path, **options: object) -> list[str]:
    """Arguments of the command: a small model of colour pictures of 16 x 16 pixels."""
    generator = "dcpc.models.ConvolutionalGenerator"
    sizes = {"latent_size": 2, "image_shape": [3, 16, 16]}
    shape = {"size": 16, "channels": 3, "intensity_range": [-1, 1], "batch_size": 9}
    settings = {
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(folder),
            "limit_val_batches": 0,
            "max_epochs": 1,
            "log_every_n_steps": 1,
        },
        "model": {"model": {"class_path": generator, "init_args": sizes}, "num_particles": 2},
        "data": {
            "class_path": "dcpc.training.HubImages",
            "init_args": {"path": str(source), **shape, **options},
        },
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return ["--config", str(folder / "config.json")]


def test_the_command_trains_on_a_folder_that_a_config_names(pictures: Path, tmp_path: Path) -> None:
    main(["fit", *config(tmp_path, pictures)])
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["dcpc"]["particles"]["latents"]["z"].shape == (18, 2, 2)
    assert bool(checkpoint["dcpc"]["particles"]["visited"].all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "no/such/folder"}, "data.path: there is no folder 'no/such/folder'"),
        ({"channels": 4}, "data.channels must be 1 for grey or 3 for colour, got 4"),
        ({"num_training": 1000}, "data.num_training must be at most 18"),
        ({"binarise": True}, "data.binarise draws pixels of 0 and 1"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong_with_the_data(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture, options: dict, message: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", *config(tmp_path, pictures, **options)])
    assert exit_info.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "dcpc: error" in line]
    assert message in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape", "num_images"),
    [("mnist", (1, 28, 28), 60_000), ("cifar10", (3, 32, 32), 10_000)],
)
def test_the_data_sets_of_the_paper_load_from_a_local_folder(
    name: str, shape: tuple[int, ...], num_images: int
) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"needs {SHARED / name}")
    data = open_data(SHARED / name, channels=shape[0])
    assert len(data.training_set) == num_images * 9 // 10
    assert len(data.held_out_set) == num_images // 10
    image, label, _ = data.training_set[0]
    assert image.shape == shape
    assert 0 <= int(label) <= 9

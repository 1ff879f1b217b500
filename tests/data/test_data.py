"""Sources, order and batches of images."""

from __future__ import annotations

import inspect
import pickle
import struct
import warnings
from pathlib import Path
from typing import Any, get_type_hints
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from dpm_scales import data, images
from dpm_scales.data.sampler import EpochImages, ShuffledBatches
from dpm_scales.errors import UserError
from support.shards import encoded, tar

CONFIGS = Path(__file__).parents[2] / "configs" / "data"


def put(path: Path, seed: int = 0, size: tuple[int, int] = (8, 8)) -> Path:
    """An RGB file of noise; size = (H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return path


# sources in memory


def test_digits_are_real_and_split_evenly() -> None:
    digits = data.Digits()
    train, val = digits.train(), digits.val()
    assert len(train) + len(val) == 1797
    assert train.images.dtype == torch.uint8
    assert (train.images.min(), train.images.max()) == (0, 255)
    assert train[0][0].shape == (digits.channels, *digits.image_size)
    for label in range(10):
        held_out, rest = (sum(dataset[i][1] == label for i in range(len(dataset))) for dataset in (val, train))
        assert abs(held_out / (held_out + rest) - 0.2) < 0.01
    assert torch.equal(data.Digits().val().images, val.images)
    assert not torch.equal(data.Digits(split_seed=1).val().images[:50], val.images[:50])


def test_photos_hold_one_photo_out() -> None:
    photos = data.Photos()
    assert len(photos.train()) + len(photos.val()) == 4155
    assert len(photos.val()) == 459 + 104 + 18  # scales 1, 1/2, 1/4
    assert photos.train()[0][0].shape == (3, 32, 32)
    assert photos.train()[0][1] == -1
    assert data.Photos(patch_size=[64, 96], stride=64).train()[0][0].shape == (3, 64, 96)
    with pytest.raises(UserError, match="did you mean 'coffee'"):
        data.Photos(val_photo="cofee")
    with pytest.raises(UserError, match="larger than the photos"):
        data.Photos(patch_size=500)


def test_arrays_from_a_file(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (20, 4, 6, 3), dtype=np.uint8)
    labels = np.arange(20) % 2
    np.savez(tmp_path / "a.npz", images=array, labels=labels)
    source = data.ArraySource(tmp_path / "a.npz", val_fraction=0.2)
    assert (source.channels, source.image_size, source.num_classes) == (3, (4, 6), 2)
    assert (len(source.train()), len(source.val())) == (16, 4)
    assert sorted(int(label) for _, label in (source.val()[i] for i in range(4))) == [0, 0, 1, 1]
    np.save(tmp_path / "grey.npy", array[..., 0])
    grey = data.ArraySource(tmp_path / "grey.npy", val_fraction=0.0)
    assert torch.equal(grey.train().images[:, 0], torch.from_numpy(array[..., 0]))
    assert grey.num_classes is None


def test_bad_arrays_are_refused(tmp_path: Path) -> None:
    good = np.zeros((4, 2, 2), np.uint8)
    files: dict[str, dict[str, Any]] = {
        "float": {"images": good.astype(float)},
        "shape": {"images": np.zeros((4, 2, 2, 5), np.uint8)},
        "labels": {"images": good, "labels": np.zeros(3, int)},
        "name": {"x": good},
        "pickled": {"images": np.array([object()])},
    }
    for name, arrays in files.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(UserError, match=rf"{name}\.npz: "):
            data.ArraySource(tmp_path / f"{name}.npz")
    (tmp_path / "text.npy").write_text("hello")
    with pytest.raises(UserError, match=r"text\.npy: not a readable"):
        data.ArraySource(tmp_path / "text.npy")
    with pytest.raises(UserError, match="no such file"):
        data.ArraySource(tmp_path / "none.npz")


@pytest.mark.parametrize("largest", [20, 19000, 2**40, 2**63 - 1])
def test_more_classes_than_images_are_refused(largest: int, tmp_path: Path) -> None:
    images, labels = np.zeros((20, 4, 4), np.uint8), np.arange(20)
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    assert data.ArraySource(tmp_path / "a.npz", val_fraction=0.0).num_classes == 20
    labels[3] = largest
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    with pytest.raises(
        UserError, match=rf"a\.npz: labels go up to {largest}, .* classes of 20 images; number"
    ) as caught:
        data.ArraySource(tmp_path / "a.npz")
    assert "\n" not in str(caught.value)


def test_no_advice_to_unpickle(tmp_path: Path) -> None:
    """NumPy tells that a text would load with `allow_pickle`, and that a pickle may be loaded "unsafely"."""
    (tmp_path / "text.npz").write_text("hello, world\n")
    np.save(tmp_path / "objects.npy", np.array([object()]))
    np.savez(tmp_path / "objects.npz", images=np.array([object()]))
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps([1]))
    for name, reason in {
        "text.npz": "begins as neither of them does",
        "pickle.npy": "begins as neither of them does",
        "objects.npy": "holds Python objects",
        "objects.npz": "holds Python objects",
    }.items():
        with pytest.raises(UserError, match=rf"{name}: not a readable .*{reason}") as caught:
            data.ArraySource(tmp_path / name)
        assert "allow_pickle" not in str(caught.value) and "unsafe" not in str(caught.value)


# downloads


def write_mnist(root: Path) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, number in (("train", 6), ("t10k", 4)):
        pixels = struct.pack(">IIII", 2051, number, 28, 28) + bytes([200]) * (number * 784)
        labels = struct.pack(">II", 2049, number) + bytes(range(number))
        for kind, content in (("images-idx3", pixels), ("labels-idx1", labels)):
            (raw / f"{part}-{kind}-ubyte").write_bytes(content)


def test_mnist_from_files(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    source = data.TorchvisionSource("MNIST", tmp_path, download=False, pad_to=32)
    source.prepare()
    assert (source.channels, source.image_size, source.num_classes) == (1, (32, 32), 10)
    image, label = source.train()[5]
    assert (image.shape, label) == ((1, 32, 32), 5)
    assert (image[:, 2:-2, 2:-2] == 200).all()
    assert int(image.sum()) == 200 * 784
    assert len(source.val()) == 4
    small = data.TorchvisionSource("MNIST", tmp_path, image_size=14)
    assert small.train()[0][0].shape == (1, *small.image_size) == (1, 14, 14)


def test_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", fail)
    module = data.ImageDataModule(data.TorchvisionSource("MNIST", tmp_path), 2)
    with pytest.raises(UserError, match=r"cannot download MNIST .*no network.*put MNIST/raw/.* into") as caught:
        module.prepare_data()
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="download=true"):
        data.TorchvisionSource("MNIST", tmp_path, download=False).train()
    for options, words in [
        ({"name": "MNIS"}, "did you mean 'MNIST'"),
        ({"name": "MNIST", "pad_to": 20}, "pad_to=20"),
        ({"name": "CelebA"}, "needs image_size"),
    ]:
        with pytest.raises(UserError, match=words):
            data.TorchvisionSource(root=tmp_path, **options)  # type: ignore[arg-type]


def test_cifar_and_celeba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cifar:
        classes = tuple("0123456789")

        def __init__(self, root: Path, train: bool, download: bool) -> None:
            self.data = np.full((4, 32, 32, 3), (1, 2, 3), np.uint8)
            self.targets = [0, 1, 2, 3]

    class Faces:
        def __init__(self, root: Path, split: str, download: bool) -> None:
            self.filename = {"train": ["1.jpg", "2.jpg"], "valid": ["3.jpg"]}[split]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Cifar)
    monkeypatch.setattr("torchvision.datasets.CelebA", Faces)
    image, label = data.TorchvisionSource("CIFAR10", tmp_path).train()[3]
    assert (image[:, 5, 5].tolist(), label) == ([1, 2, 3], 3)
    for number in (1, 2, 3):
        put(tmp_path / "celeba" / "img_align_celeba" / f"{number}.jpg", number, (218, 178))
    faces = data.TorchvisionSource("CelebA", tmp_path, image_size=64)
    assert (len(faces.train()), len(faces.val())) == (2, 1)
    assert faces.train()[0][0].shape == (3, 64, 64)


# order


def order(next_batch: int, **options: Any) -> list[tuple[int, int]]:
    return list(
        ShuffledBatches(**{"num_images": 10, "batch_size": 3, "seed": 0} | options, next_batch=lambda: next_batch)
    )


def test_every_epoch_shows_every_image_once_in_a_new_order() -> None:
    first, second = order(0, batch_size=2), order(5, batch_size=2)
    assert sorted(first) == [(index, 0) for index in range(10)]
    assert sorted(second) == [(index, 1) for index in range(10)]
    assert [index for index, _ in first] != [index for index, _ in second]
    assert order(0, batch_size=2) == first
    assert order(0, batch_size=2, seed=1) != first


def test_a_late_start_continues_the_same_sequence() -> None:
    stream = [key for start in (0, 3, 6, 9) for key in order(start)]
    for start in range(9):
        assert order(start) == stream[3 * start : 3 * start + 9]


def test_ranks_share_the_global_batch() -> None:
    whole = order(1, batch_size=4)
    parts = [order(1, batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    assert parts[0] == whole[0::2]
    assert parts[1] == whole[1::2]


def test_incomplete_batches() -> None:
    assert len(order(0)) == 9
    filled = order(0, drop_last=False)
    assert len(filled) == 12
    assert filled[10:] == filled[:2]
    assert len(order(0, num_images=2, batch_size=5, drop_last=False)) == 5
    with pytest.raises(UserError, match="batch_size <= 5"):
        order(0, batch_size=6, world_size=2)


class Indices(data.ImageDataset):
    """Images that show their own index."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def get(self, index: int, rng: np.random.Generator | None) -> tuple[torch.Tensor, int]:
        extra = 0 if rng is None else int(rng.integers(256))
        return torch.tensor([index, extra], dtype=torch.uint8).reshape(1, 1, 2), index


def test_augmentation_depends_on_epoch_and_index_only(tmp_path: Path) -> None:
    shown = EpochImages(Indices(5), seed=0)
    assert torch.equal(shown[(3, 1)][0], shown[(3, 1)][0])
    variants = {int(shown[(3, epoch)][0][0, 0, 1]) for epoch in range(20)}
    assert len(variants) > 10
    for number in range(6):
        put(tmp_path / f"{number}.png", number, (12, 12))
    source = data.ImageFolder(
        tmp_path, image_size=8, resize_mode="crop", random_crop=True, random_flip=True, val_fraction=0.0
    )
    inside, outside = (data.ImageDataModule(source, 2, num_workers=workers) for workers in (0, 2))
    loader = outside.train_dataloader()
    for start in (0, 3):
        inside.set_start_batch(start)
        outside.set_start_batch(start)
        for (a, _), (b, _) in zip(inside.train_dataloader(), loader, strict=True):
            assert torch.equal(a, b)


def test_generators_are_made_only_for_who_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the arguments of the sources; a set of one's own gets one."""
    for number in range(4):
        put(tmp_path / f"{number}.png", number, (8, 8))
    pixels = np.zeros((4, 1, 4, 4), np.uint8)
    rows = [(torch.zeros(1, 4, 4, dtype=torch.uint8), 0)] * 4
    sets = [(Indices(3), True)]
    for flip in (True, False):
        folder = data.ImageFolder(tmp_path, 3, 8, random_flip=flip, val_fraction=0)
        given = [data.GivenImages(one, random_flip=flip, val_fraction=0) for one in (pixels, rows)]
        sets += [(source.train(), flip) for source in (folder, *given)]
    sets += [(data.ImageFolder(tmp_path, 3, 6, "crop", random_crop=True, val_fraction=0).train(), True)]
    for part, draws in sets:
        seen = []
        monkeypatch.setattr(type(part), "get", lambda self, index, rng: seen.append(rng is not None))  # noqa: B023
        EpochImages(part, 0)[(1, 2)]
        assert seen == [draws]


def test_flips_happen_in_training_only() -> None:
    images_ = torch.arange(4, dtype=torch.uint8).reshape(1, 1, 1, 4)
    dataset = data.TensorImages(images_, random_flip=True)
    views = {tuple(dataset.get(0, np.random.default_rng(seed))[0].flatten().tolist()) for seed in range(20)}
    assert views == {(0, 1, 2, 3), (3, 2, 1, 0)}
    assert dataset[0][0].flatten().tolist() == [0, 1, 2, 3]


# batches and configs


def test_batches_and_statistics() -> None:
    digits = data.Digits()
    module = data.ImageDataModule(digits, batch_size=128)
    batch, labels = next(iter(module.train_dataloader()))
    assert (batch.shape, batch.dtype) == ((128, 1, 8, 8), torch.uint8)
    assert (labels.shape, labels.dtype) == ((128,), torch.int64)
    assert len(module.train_dataloader()) == 1438 // 128
    assert sum(len(labels) for _, labels in module.val_dataloader()) == 359
    pixels = images.to_range(digits.train().images, (0.0, 1.0))
    assert module.statistics() == pytest.approx({"mean": pixels.mean().item(), "std": pixels.std().item()}, abs=1e-4)
    assert module.statistics(200)["std"] == pytest.approx(pixels.std().item(), rel=0.05)
    wrong: tuple[dict[str, Any], ...] = (
        {"batch_size": 0},
        {"batch_size": 1, "num_workers": -1},
        {"batch_size": 1, "seed": -1},
    )
    for options in wrong:
        with pytest.raises(UserError, match="(allowed is|must be) a whole number"):
            data.ImageDataModule(data.Digits(), **options)


def test_statistics_do_not_depend_on_how_many_images_are_looked_at_together() -> None:
    """To the last bit: files of models hold them, and runs that resume compare them."""
    pictures = torch.randint(0, 256, (40, 3, 70, 33), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    module = data.ImageDataModule(data.GivenImages(pictures), batch_size=8)
    chosen = [images.to_range(image, (0.0, 1.0)).double() for image, _ in module.train_set]
    number, total = sum(x.numel() for x in chosen), sum(float(x.sum()) for x in chosen)
    mean, squares = total / number, sum(float(x.square().sum()) for x in chosen)
    assert module.statistics() == {"mean": mean, "std": (squares / number - mean**2) ** 0.5}


def test_no_validation_images_no_loader() -> None:
    assert data.ImageDataModule(data.Digits(val_fraction=0.0), 8).val_dataloader() == []


def test_a_changed_order_is_announced() -> None:
    old, new = data.ImageDataModule(data.Digits(), 8), data.ImageDataModule(data.Digits(), 16)
    old.set_start_batch(7)
    with pytest.warns(UserWarning, match="batch_size 8 -> 16"):
        new.load_state_dict(old.state_dict())
    assert new.next_batch() == 7


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_builds(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPM_SCALES_DATA", str(tmp_path))
    monkeypatch.setenv("DPM_SCALES_CACHE", str(tmp_path / "cache"))
    if path.stem == "hf":
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config = OmegaConf.load(path)
    for part in ("train", "val"):
        put(tmp_path / part / "a.png", size=(64, 64))
        put(tmp_path / part / "b.png", size=(64, 64))
    np.savez(tmp_path / "a.npz", images=np.zeros((9, 4, 4), np.uint8))
    tar(tmp_path / "a.tar", {f"{n}.png": encoded(np.zeros((4, 4), np.uint8)) for n in range(9)})
    if OmegaConf.is_missing(config, "root"):
        config.root = str(tmp_path / "a.tar" if path.stem == "webdataset" else tmp_path)
    if OmegaConf.is_missing(config, "path"):
        config.path = str(tmp_path / "a.npz")
    module = instantiate(config)
    assert isinstance(module, data.ImageDataModule)
    assert (module.channels, module.seed) in ((1, 0), (3, 0))
    assert all(side >= 4 for side in module.image_size)


def test_builders_take_the_arguments_of_both_classes() -> None:
    """By name, with the types and defaults of the classes; the settings reach the class that they belong to."""
    own, others = inspect.signature(data.Photos).parameters, inspect.signature(data.ImageDataModule).parameters
    found = inspect.signature(data.photos_data)
    assert list(found.parameters) == [*own, *(name for name in others if name != "source")]
    for name, parameter in found.parameters.items():
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.default == (own.get(name) or others[name]).default
    hints = get_type_hints(data.photos_data)
    assert hints["stride"] is int and hints["return"] is data.ImageDataModule
    module = data.photos_data(patch_size=64, val_photo="coffee", batch_size=3, seed=7, pin_memory=False)
    assert module.image_size == (64, 64) and (module.batch_size, module.seed, module.num_workers) == (3, 7, 0)
    alone = data.Photos(64, val_photo="coffee")
    assert torch.equal(module.val_set.images, alone.val().images)
    for wrong in ({}, {"batch_size": 3, "strides": 4}, {"batch_size": 3, "source": alone}):
        with pytest.raises(TypeError, match="batch_size|strides|source"):
            data.photos_data(**wrong)


def test_labels_with_gaps_are_told(tmp_path: Path) -> None:
    """The classes in between are none that the model could learn."""
    images = np.zeros((40, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.resize([0, 5, 9], 40))
    with pytest.warns(UserWarning, match=r"7 of 10 classes have no image.*: 1, 2, 3, 4, 6, 7, 8; number"):
        assert data.ArraySource(tmp_path / "a.npz").num_classes == 10
    np.savez(tmp_path / "a.npz", images=images, labels=np.resize([0, 1], 40))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.ArraySource(tmp_path / "a.npz")

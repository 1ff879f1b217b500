"""The folder that `sample.py` writes to: its record, what may be written over, who may write at the same time."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dpm_scales.cli.options import image_size
from dpm_scales.commands.sample import TASKS
from dpm_scales.commands.sample_folder import claimed, differences, require_free, require_room
from dpm_scales.commands.shared import Setup
from dpm_scales.distributed.ranks import World, first_decides
from dpm_scales.errors import UserError
from dpm_scales.images import load_image, make_class_grid
from dpm_scales.models.generate import finished, weights_digest
from dpm_scales.models.instantiate import plain
from dpm_scales.models.io import save_model
from dpm_scales.models.model import Model, build_model
from dpm_scales.training import load_model
from support.cluster_shell import job_step
from support.shell import call, composed, drawn, files, sample, small_model

FEW = ("num_samples=3", "steps=2")


def saved(folder: Path, seed: int, **recipe: Any) -> Path:
    """A model with fresh weights, drawn by a seed."""
    torch.manual_seed(seed)
    like = small_model().recipe
    model = build_model(type(like)(**{**vars(like), **recipe}))
    torch.nn.init.normal_(model.denoiser.network.conv_out.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    save_model(folder, model)
    return folder


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("desk")
    saved(root / "a", 0), saved(root / "b", 1)
    saved(root / "classes", 2, num_classes=3, class_names=("cat", "dog", "Kuh"), label_dropout=0.1)
    return root


def record(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "sample.json").read_text())
    return values


def test_the_record_names_the_classes_of_its_labels(desk: Path, tmp_path: Path) -> None:
    """A record without them, of an earlier version, is of the same command."""
    command = ("sample.py", "model=classes", f"out={tmp_path / 'out'}", *FEW)
    assert call(*command, "labels=Kuh,cat", cwd=desk).status == 0
    values = record(tmp_path / "out")
    assert values["labels"] == [2, 0] and values["class_names"] == ["cat", "dog", "Kuh"]
    del values["class_names"]
    (tmp_path / "out" / "sample.json").write_text(json.dumps(values))
    assert call(*command, "labels=Kuh,cat", cwd=desk).status == 0


def refusal(desk: Path, out: Path, *options: str) -> str:
    """The one line of a command that must leave `out` as it is."""
    before = {path: (path.stat().st_mtime_ns, data) for path in out.iterdir() for data in [path.read_bytes()]}
    outcome = call("sample.py", f"out={out}", *options, cwd=desk)
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and outcome.err.startswith("error: "), outcome.err
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before
    return outcome.err


# --- the record -------------------------------------------------------------------------------------------------------


def test_the_record_says_how_the_images_were_made(desk: Path, tmp_path: Path) -> None:
    options = ("num_samples=5", "sampler=ddim", "sampler.eta=0.5", "steps=3", "seed=7", "size=[8,12]", "labels=[2,cat]")
    guided = ("guidance=2", "guidance_interval=[0.1,0.9]")
    values = record(sample(desk / "classes", tmp_path / "out", *options, *guided))
    assert values["format"] == "dpm_scales samples" and values["task"] == "draw" and values["number"] == 5
    assert values["model"] == str(desk / "classes") and values["weights"] == "averaged"
    assert values["weights_sha256"] == weights_digest(load_model(desk / "classes"))
    assert values["process"] == "VP" and values["process_settings"]["_target_"] == "dpm_scales.processes.VP"
    assert values["sampler"] == "DDIM" and values["sampler_settings"]["eta"] == 0.5 and values["steps"] == 3
    assert values["seed"] == 7 and values["size"] == [8, 12] and values["labels"] == [2, 0]
    assert values["guidance"] == {"scale": 2, "interval": [0.1, 0.9], "variable": "t"}
    assert values["versions"].keys() == {"dpm-scales", "torch"} and values["inputs"] == {}


def test_images_carry_seed_number_and_weights_and_the_grid_nothing(desk: Path, tmp_path: Path) -> None:
    out = sample(desk / "a", tmp_path / "out", *FEW, "seed=11")
    digest = weights_digest(load_model(desk / "a"))
    for number in range(3):
        with Image.open(out / f"{number:06d}.png") as picture:
            expected = {"Software": "dpm_scales", "seed": "11", "number": str(number), "weights_sha256": digest}
            assert picture.info == expected
    with Image.open(out / "grid.png") as picture:
        assert picture.info == {}, "the picture in docs is made by this command, and is the same to the byte"


HARMLESS = {"model", "allow", "plugins", "out", "overwrite", "batch_size", "device", "trajectory"}
# the record has the weights of the average and of the guide themselves
HARMLESS |= {"guide", "guide_weights", "guide_ema", "guide_ema_step", "ema", "ema_step"}
GIVEN = {"image": "x", "mask": "x", "start": "x", "end": "x", "blur_sigma": 1, "model": "x", "out": "x"}
OTHERS = {"labels": 2, "guidance_interval": [0.1, 0.5], "guidance_variable": "logsnr", "size": 16, "steps": 2}
OTHERS |= {"precision": "bf16"}
OTHERS |= {"prior_images": "y", "weights": "raw", "covariance": "white", "through": "noise", "method": "estimate"}


def made(model: Model, task: str, key: str | None = None) -> dict[str, Any]:
    """The record of a task with one option changed."""
    cfg = composed(f"edit={task}", name="sample")
    for name, value in GIVEN.items():
        if name in cfg.keys():  # noqa: SIM118 - `in cfg` is false for what has no value yet
            cfg[name] = value
    cfg.guidance = 2.0
    if key is not None:
        value = plain(cfg[key])
        cfg[key] = OTHERS.get(key, f"{value}2" if isinstance(value, str) else not value if value is False else 7)
    chosen = type(model.sampler)(steps=3 if cfg.steps is None else cfg.steps)
    labels = torch.tensor([0 if cfg.labels is None else cfg.labels])
    setup = Setup(model, torch.device("cpu"), Path("x"), cfg, World(), labels, "0")
    for name in ("image", "mask", "start", "end", "prior_images"):
        if cfg.get(name) is not None:
            setup.note(name, torch.full((1, 1, 2, 2), len(str(cfg[name])) + (name == key), dtype=torch.uint8))
    size = image_size(cfg) if "size" in cfg else None
    number = cfg.num_samples if task == "draw" else 8
    values: dict[str, Any] = setup.record(chosen, chosen.steps or 0, number, size or (8, 8))
    return values


@pytest.mark.parametrize("task", TASKS)
def test_no_option_that_changes_images_is_forgotten(task: str) -> None:
    """An option that is new is of the record without anybody's doing."""
    model = small_model("sampler=ddim")
    same, cfg = made(model, task), composed(f"edit={task}", name="sample")
    for key in sorted(set(cfg) - {"task", "sampler"}):
        changed = differences(same, made(model, task, str(key)))
        assert bool(changed) == (key not in HARMLESS), (key, changed)


# --- the same command, and another one --------------------------------------------------------------------------------


def test_the_same_command_again_writes_the_same_and_finishes_what_was_broken_off(desk: Path, tmp_path: Path) -> None:
    out = sample(desk / "a", tmp_path / "out", *FEW)
    whole = files(out)
    assert files(sample(desk / "a", out, *FEW, "batch_size=2")) == whole
    for name in ("000001.png", "000002.png", "grid.png"):
        (out / name).unlink()
    assert files(sample(desk / "a", out, *FEW)) == whole
    moved = saved(tmp_path / "moved", 0)
    sample(moved, out, *FEW)  # the same weights elsewhere
    assert drawn(out) == {name: data for name, data in whole.items() if name[0] == "0"}


def test_more_samples_of_the_same_command_join_those_that_are_there(desk: Path, tmp_path: Path) -> None:
    out = sample(desk / "a", tmp_path / "out", *FEW)
    before = drawn(out)
    after = drawn(sample(desk / "a", out, "num_samples=5", "steps=2"))
    assert len(after) == 5 and before.items() <= after.items() and record(out)["number"] == 5
    assert "number is 5 there and 3 here" in refusal(desk, out, "model=a", *FEW)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (("seed=5",), "seed is 0 there and 5 here"),
        (("steps=3",), "sampler_settings.steps is 2 there and 3 here; steps is 2 there and 3 here"),
        (("sampler=ancestral",), 'sampler is "Heun" there and "Ancestral" here'),
        (("model=b",), "weights_sha256 is"),
        (("size=12",), "size is [8, 8] there and [12, 12] here"),
        (("task=coarse", "starts=1", "steps=4"), 'task is "draw" there and "coarse" here'),
    ],
)
def test_another_command_is_refused_and_named(
    options: tuple[str, ...], difference: str, desk: Path, tmp_path: Path
) -> None:
    out = sample(desk / "a", tmp_path / "out", *FEW)
    line = refusal(desk, out, "model=a", *FEW, *options)
    assert difference in line and "holds images of another command" in line
    assert line.endswith("choose another out, or set overwrite=true\n")


COLOR = ("sampler=ancestral", "sampler/noise_color=power_law")


def test_a_color_of_the_noise_is_recorded_and_another_one_refused(desk: Path, tmp_path: Path) -> None:
    out = sample(desk / "a", tmp_path / "out", *FEW, *COLOR, "sampler.noise_color.exponent=0.1")
    settings = record(out)["sampler_settings"]["noise_color"]
    assert settings["_target_"] == "dpm_scales.schedules.PowerLaw" and settings["exponent"] == 0.1
    whole = files(out)
    assert files(sample(desk / "a", out, *FEW, *COLOR, "sampler.noise_color.exponent=0.1")) == whole
    line = refusal(desk, out, "model=a", *FEW, *COLOR, "sampler.noise_color.exponent=0.2")
    assert "sampler_settings.noise_color.exponent is 0.1 there and 0.2 here" in line
    assert "noise_color" in refusal(desk, out, "model=a", *FEW, "sampler=ancestral")
    white = sample(desk / "a", tmp_path / "white", *FEW, "sampler=ancestral")
    assert drawn(white) != drawn(out)
    named = sample(desk / "a", tmp_path / "named", *FEW, "sampler=ancestral", "sampler/noise_color=white")
    assert drawn(named) == drawn(white)
    # a record from before there were colours
    values = record(white)
    del values["sampler_settings"]["noise_color"]
    (white / "sample.json").write_text(json.dumps(values))
    sample(desk / "a", white, *FEW, "sampler=ancestral")
    assert drawn(named) == drawn(white)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("sampler/noise_color=power_law",), ("Heun adds none", "noise_color=null")),
        (("sampler=unipc", "sampler/noise_color=power_law"), ("UniPC adds none", "sampler=ancestral")),
        ((*COLOR, "sampler.noise_color.energy=published"), ("energy='published'", "energy=unit")),
        ((*COLOR, "sampler.noise_color.exponent=90"), ("PowerLaw", "exponent")),
        (("sampler=ancestral", "sampler.noise_color=pink"), ("noise_color='pink'", "no colour")),
        (("sampler=ancestral", "sampler/noise_color=pink"), ("sampler/noise_color", "pink")),
    ],
)
def test_colors_that_can_not_be_are_one_line(
    options: tuple[str, ...], words: tuple[str, ...], desk: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    line = refusal(desk, tmp_path / "out", "model=a", *FEW, *options)
    assert all(word in line for word in words), line


def test_labels_and_guidance_make_another_command(desk: Path, tmp_path: Path) -> None:
    out = sample(desk / "classes", tmp_path / "out", *FEW)
    assert "labels is [0, 1, 2] there and [1] here" in refusal(desk, out, "model=classes", *FEW, "labels=1")
    assert "guidance is null there and null here" not in refusal(desk, out, "model=classes", *FEW, "guidance=3")


def test_overwriting_leaves_nothing_of_the_other_command(desk: Path, tmp_path: Path) -> None:
    out = sample(desk / "a", tmp_path / "out", "num_samples=6", "steps=2", "trajectory=true")
    (out / "notes.txt").write_text("mine")
    sample(desk / "b", out, *FEW, "overwrite=true")
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    new = sample(desk / "b", tmp_path / "new", *FEW)
    assert files(out) == files(new)
    assert files(sample(desk / "b", out, *FEW, "overwrite=true")) == files(new)


def test_images_that_no_record_describes_are_replaced_only_where_new_ones_come(desk: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    sample(desk / "a", tmp_path / "others", *FEW)
    for name in ("000001.png", "grid.png"):
        (out / name).write_bytes((tmp_path / "others" / name).read_bytes())
    assert "no sample.json says that they are of this command" in refusal(desk, out, "model=b", *FEW)
    (out / "000001.png").rename(out / "000003.png")
    line = refusal(desk, out, "model=b", *FEW, "overwrite=true")
    assert "'000003.png', which overwrite=true does not replace" in line
    (out / "000003.png").rename(out / "000001.png")
    sample(desk / "b", out, *FEW, "overwrite=true")
    assert files(out) == files(sample(desk / "b", tmp_path / "new", *FEW))


def test_editing_is_refused_likewise(desk: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("model=a", "task=coarse", "starts=2", "num_samples=2", "sampler=ancestral", "steps=4")
    for _ in range(2):
        outcome = call("sample.py", f"out={out}", *options, cwd=desk)
        assert outcome.status == 0, outcome.err
    assert record(out)["options"] == {"branch_at": "auto", "num_samples": 2, "starts": 2}
    assert "options.branch_at" in refusal(desk, out, *options, "branch_at=0.5")
    assert "options.num_samples is 2 there and 3 here" in refusal(desk, out, *options, "num_samples=3")
    assert call("sample.py", f"out={out}", *options, "num_samples=1", "overwrite=true", cwd=desk).status == 0
    assert len(drawn(out)) == 2


HOSTILE = {
    "no JSON": "{",
    "deep": "[" * 100_000,
    "a list": "[]",
    "long": " " * 2**21 + "{}",
    "another format": '{"format": "x", "version": 1, "number": 9}',
    "negative": '{"format": "dpm_scales samples", "version": 1, "number": -1}',
    "no number": '{"format": "dpm_scales samples", "version": 1, "number": true}',
    "huge": '{"format": "dpm_scales samples", "version": 1, "number": 1' + "0" * 5000 + "}",
    "escapes": '{"format": "dpm_scales samples", "version": 1, "number": 3, "\\u001b]0;x\\u0007": "\\u001b[2J"}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_crafted_records_are_refused_in_one_line(name: str, desk: Path, tmp_path: Path) -> None:
    out = sample(desk / "a", tmp_path / "out", *FEW)
    (out / "sample.json").write_text(HOSTILE[name])
    with pytest.raises(UserError) as found:
        require_free(out, {"number": 3, "seed": 0}, overwrite=False)
    assert str(found.value).isprintable() and "overwrite=true" in str(found.value) and len(str(found.value)) < 600


def test_a_pipe_in_place_of_the_record_hangs_nobody(desk: Path, tmp_path: Path) -> None:
    out = sample(desk / "a", tmp_path / "out", *FEW)
    (out / "sample.json").unlink()
    os.mkfifo(out / "sample.json")
    with pytest.raises(UserError, match="no sample.json says"):
        require_free(out, {"number": 3}, overwrite=False)


def test_links_among_the_images_are_replaced_and_not_followed(desk: Path, tmp_path: Path) -> None:
    out = sample(desk / "a", tmp_path / "out", *FEW)
    (tmp_path / "victim").write_text("precious")
    for name in ("000001.png", "grid.png", "sample.json"):
        content = (out / name).read_bytes()
        (out / name).unlink()
        (tmp_path / f"kept-{name}").write_bytes(content)
        (out / name).symlink_to(tmp_path / ("victim" if name != "sample.json" else f"kept-{name}"))
    sample(desk / "a", out, *FEW)
    assert (tmp_path / "victim").read_text() == "precious" and not (out / "000001.png").is_symlink()
    assert files(out) == files(sample(desk / "a", tmp_path / "new", *FEW)) | {".lock": files(out)[".lock"]}


# --- several at once --------------------------------------------------------------------------------------------------


def hold(out: Path, held: Any) -> None:
    with claimed(out, {"number": 1, "seed": 0}, overwrite=False):
        held.set()
        time.sleep(100)


def test_two_commands_do_not_write_into_one_folder(desk: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    processes = multiprocessing.get_context("fork")
    held = processes.Event()
    holder = processes.Process(target=hold, args=(out, held), daemon=True)
    holder.start()
    assert held.wait(60)
    line = refusal(desk, out, "model=a", *FEW, "overwrite=true")
    assert re.search(rf"out is being written to by process {holder.pid} on \S+; wait for it", line), line
    holder.kill()
    holder.join(60)
    sample(desk / "a", out, *FEW)


def decided(step: dict[str, str], reports: Any) -> None:
    os.environ.update(step)
    rank = int(step.get("RANK", step.get("SLURM_PROCID", 0)))
    calls: list[int] = []
    first_decides(lambda: calls.append(rank))

    def refuse() -> None:
        raise UserError(f"no, said {rank}")

    try:
        first_decides(refuse)
    except UserError as error:
        reports.put((rank, calls, str(error), error.status))
    except SystemExit as end:
        reports.put((rank, calls, "", end.code))


@pytest.mark.slow
def test_the_first_process_decides_for_all() -> None:
    context = multiprocessing.get_context("fork")
    reports = context.Queue()
    processes = [context.Process(target=decided, args=(step, reports)) for step in job_step(2)]
    for process in processes:
        process.start()
    found = sorted(reports.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
        process.kill()
    assert found == [(0, [0], "no, said 0", 2), (1, [], "", 2)], "one line for all"


# --- pixels and sheets ------------------------------------------------------------------------------------------------


def test_samples_that_are_not_finite_are_not_written() -> None:
    x = torch.zeros(3, 1, 2, 2)
    assert torch.equal(finished(x, (-1, 1), 5), torch.full((3, 1, 2, 2), 128, dtype=torch.uint8))
    for value in (float("nan"), float("inf")):
        x[1, 0, 1, 1] = value
        with pytest.raises(UserError, match="sample 6 is not finite"):
            finished(x, (-1, 1), 5)


def test_the_grid_of_a_conditional_model_has_a_row_for_each_class(desk: Path, tmp_path: Path) -> None:
    out = sample(desk / "classes", tmp_path / "out", "num_samples=7", "steps=2")
    images = torch.stack([load_image(out / f"{i:06d}.png") for i in range(7)])
    expected = make_class_grid(images, [i % 3 for i in range(7)], ("cat", "dog", "Kuh"))
    assert torch.equal(load_image(out / "grid.png"), expected)


def test_more_files_than_the_disk_has_room_for(tmp_path: Path) -> None:
    require_room(tmp_path / "new" / "deep", 10)
    with pytest.raises(UserError, match="1000000000000 images need as many files, and the disk of .* has room for"):
        require_room(tmp_path, 10**12)

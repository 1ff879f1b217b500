"""`dpm-scales runs best` and `export`: ranks, directions, evaluations, and a model copied out of its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dpm_scales.cli.program import FORM
from dpm_scales.commands.runs import run
from dpm_scales.entry.start import console
from dpm_scales.errors import UserError
from dpm_scales.metrics.figures import FeatureSet, FeatureStatistics, compare
from dpm_scales.models import load_model
from dpm_scales.run_folders.evaluations import metric_key
from dpm_scales.run_folders.find import find_runs
from dpm_scales.run_folders.ranking import best_runs
from dpm_scales.run_folders.state import STATES, Run
from support.shell import SMALL, assert_equal, call, checkpoint, files, train


@pytest.fixture(autouse=True)
def no_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no other test have recorded how commands are typed, and record nothing for others."""
    monkeypatch.setenv(FORM, "")


def made(name: str, **metrics: float) -> Run:
    """Return a run with these metrics, whose names are written with two underscores for the slash."""
    values = {key.replace("__", "/"): value for key, value in metrics.items()}
    return Run(Path(name), "finished", metrics=values, loadable=True)


def names(runs: list[Run]) -> str:
    return "".join(str(one.folder) for one in runs)


def put_result(folder: Path, **values: Any) -> None:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").touch()
    (folder / "result.json").write_text(json.dumps({"overrides": [], "steps": 6, **values}))


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_the_best_has_the_best_value() -> None:
    runs = [made("a", val__loss=2, eval__recall=0.5), made("b", val__loss=1, eval__recall=0.1), made("c", val__loss=1)]
    assert names(best_runs(runs, "val/loss")) == "bca"
    assert names(best_runs(runs, "eval/recall")) == "ab"
    assert names(best_runs(runs, "eval/recall", "lower")) == "ba"


def test_runs_that_can_not_be_the_best() -> None:
    runs = [made("a", val__loss=float("nan")), made("b", val__loss=3), made("c", val__loss=1), made("d", val__loss=2)]
    runs[2].state, runs[3].loadable = "damaged", False
    assert names(best_runs([*runs, made("e", eval__fid=1)], "val/loss")) == "b"


@pytest.mark.parametrize("suffix", [None, "efflite0", "inception-0a1b2c3d"])
def test_directions_are_those_of_the_measures(suffix: str | None) -> None:
    """Of every metric that `evaluate.py` and a run's own evaluation know."""
    rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    features = FeatureSet(FeatureStatistics().update(rows), rows.numpy())
    distance, kernel = ("FID", "KID") if suffix is None else (f"FD-{suffix}", f"KD-{suffix}")
    network: Any = type("Network", (), {"distance_name": distance, "kernel_name": kernel})()
    measures = compare(features, features, network)
    assert len(measures) == 6
    for name, measure in measures.items():
        key = metric_key(name).replace("evaluate/", "eval/")
        runs = [Run(Path(place), metrics={key: value}, loadable=True) for place, value in (("a", 1.0), ("b", 2.0))]
        assert names(best_runs(runs, key)) == ("ab" if measure.better == "lower" else "ba"), key


@pytest.mark.parametrize(
    "metric, line",
    [
        ("val/los", "unknown metric 'val/los': did you mean 'val/loss'? allowed: eval/mine, val/loss"),
        ("fid", "unknown metric 'fid': allowed: eval/mine, val/loss"),
        ("eval/mine", "whether lower or higher eval/mine is better is not stored; add direction=lower or higher"),
    ],
)
def test_metrics_that_no_run_has(metric: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        best_runs([made("a", val__loss=1), made("b", eval__mine=2)], metric)
    assert str(caught.value) == line


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_best_are_printed_with_their_paths_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for index, loss in enumerate((3.0, 1.0, 2.0)):
        put_result(Path(f"runs/seed={index}"), **{"val/loss": loss, "overrides": [f"seed={index}"]})
    run(["best"])
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == [f"runs/seed={index}" for index in (1, 2, 0)]
    assert out.splitlines()[0].split()[1:] == ["val/loss", "1", "finished", "6", "steps", "seed=1"] and not err
    for arguments, expected in (
        (["--path"], "runs/seed=1\n"),
        (["runs", "--path", "top=2"], "runs/seed=1\nruns/seed=2\n"),
        (["runs/seed=2", "--path"], "runs/seed=2\n"),
        (["--path", "direction=higher"], "runs/seed=0\n"),
    ):
        run(["best", *arguments])
        assert capsys.readouterr().out == expected


def test_losses_of_several_processes_are_compared_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        put_result(tmp_path / name, **{"val/loss": 1.0, "eval/fid": 3.0})
        (tmp_path / name / "config.yaml").write_text(f"process: {{_target_: {name}}}\ndata: {{seed: {ord(name)}}}")
    run(["best", str(tmp_path)])
    assert "warning: val/loss compares runs of one process, target and data set, and" in capsys.readouterr().err
    run(["best", str(tmp_path), "metric=eval/fid"])
    assert not capsys.readouterr().err
    (tmp_path / "b" / "config.yaml").write_text("process: {_target_: a}\ndata: {seed: 5}")
    run(["best", str(tmp_path)])
    assert not capsys.readouterr().err


WRONG = {
    ("no",): "no is no folder; name one that holds runs",
    ("state=fail",): f"unknown state 'fail': did you mean 'failed'? allowed: {', '.join(sorted(STATES))}",
    ("--jsn",): "unknown flag '--jsn': did you mean '--json'? allowed: --csv, --json",
    ("--json", "--csv"): "--json and --csv at once; give one",
    ("stat=new",): "unknown option 'stat': did you mean 'state'? allowed: state",
    ("a", "b"): "'a b' are too many arguments: python -m dpm_scales runs [DIR]",
    ("",): "an empty argument; name a folder, or leave it out",
    ("best",): "the current folder: there are no runs to compare",
    ("best", "--metric", "val/loss"): "--metric: options are KEY=VALUE: metric=VALUE",
    ("best", "top=0"): "top must be a whole number >= 1, got 0",
    ("best", "top=²"): "top must be a whole number, got '²'",
    ("best", "top=1", "top=2"): "top is given twice; give it once",
    ("best", "metric="): "metric is empty; give it a value, or leave it out",
    ("best", "direction=up"): "unknown direction 'up': allowed: higher, lower",
    ("export",): "name a run and a new folder: python -m dpm_scales runs export RUN out=DIR [weights=averaged|raw] "
    "[ema=LENGTH] [format=diffusers]",
    ("export", "no", "out=x"): "no model at no: no such file or folder",
    ("export", ".", "out=x"): "no model in .: neither model/model.safetensors nor checkpoints/last.ckpt",
    ("export", ".", "out=x", "format=onnx"): "unknown format 'onnx': allowed: diffusers",
    ("export", ".", "out=x", "weights=ema"): "unknown weights 'ema': allowed: averaged, raw",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_mistakes_in_one_line(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        run(arguments)
    assert str(caught.value) == WRONG[arguments] and not capsys.readouterr().out and not list(tmp_path.iterdir())


def test_the_command_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_result(tmp_path / "a", **{"val/loss": 1.0})
    monkeypatch.setattr("sys.argv", ["dpm-scales", "runs", "best", str(tmp_path), "--path"])
    console()
    assert capsys.readouterr().out == f"{tmp_path / 'a'}\n"
    monkeypatch.setattr("sys.argv", ["dpm-scales", "runs", "best", "top=x"])
    with pytest.raises(SystemExit) as end:
        console()
    assert end.value.code == 2 and capsys.readouterr().err == "error: top must be a whole number, got 'x'\n"


def test_help_and_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["best", "--help"])
    assert capsys.readouterr().out.startswith("usage: python -m dpm_scales runs [DIR]")
    run([str(tmp_path), "state=failed"])
    assert capsys.readouterr().out == f"no failed runs in or below {tmp_path}\n"


# --- evaluations ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "runs").mkdir()
    train(folder / "runs" / "a", "ema.decay=0.5", "trainer.max_steps=4")
    return folder


@pytest.mark.filterwarnings("ignore:.*(covariance is singular|are enlarged)")
def test_evaluations_belong_to_their_runs(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "place"
    shutil.copytree(trained, place)
    evaluate = ("evaluate.py", "reference=data", "features=efflite0", "measures=[frechet]", "num_samples=4")
    for model, out in (("runs/a", "judged/a"), ("runs/a/checkpoints/last.ckpt", "runs/a/judged")):
        outcome = call(*evaluate, "num_reference=4", f"model={model}", f"out={out}", cwd=place)
        assert outcome.status == 0, outcome.err
    stored = [json.loads((place / out / "evaluation.json").read_text()) for out in ("judged/a", "runs/a/judged")]
    value = stored[1]["figures"]["FD-efflite0"]["value"]
    for where, start in ((place, None), (tmp_path, "place"), (Path("/"), place)):
        monkeypatch.chdir(where)
        (one,) = find_runs(start).runs
        assert len(one.evaluations) == 2 and one.evaluations[0].samples == 4
        assert one.metrics["evaluate/fd_efflite0"] == pytest.approx(value)
        assert names(best_runs([one], "evaluate/fd_efflite0")) == str(one.folder)


# --- export -----------------------------------------------------------------------------------------------------------


def test_an_export_is_the_models_folder(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = trained / "runs" / "a"
    for number, path in enumerate((source, source / "model", source / "checkpoints" / "last.ckpt")):
        out = tmp_path / f"out{number}"
        run(["export", str(path), f"out={out}"])
        assert files(out) == files(source / "model")
        told = capsys.readouterr().out
        assert told.startswith(f"{out}: the EMA weights in {source}") and "allow" not in told
    assert sorted(tmp_path.iterdir()) == [tmp_path / f"out{number}" for number in range(3)], "nothing else is left"


def test_raw_weights_are_those_of_the_last_step(trained: Path, tmp_path: Path) -> None:
    source = trained / "runs" / "a"
    run(["export", str(source), f"out={tmp_path / 'raw'}", "weights=raw"])
    exported, raw = load_model(tmp_path / "raw"), load_model(source, weights="raw")
    assert_equal(exported.state_dict(), raw.state_dict())
    stored = checkpoint(source)["current_model_state"]
    name = "denoiser.network." + next(iter(exported.denoiser.network.state_dict()))
    assert torch.equal(exported.state_dict()[name], stored[f"model.{name}"])
    averaged = load_model(source).state_dict()
    assert any(not torch.equal(averaged[key], value) for key, value in exported.state_dict().items())


def test_an_export_overwrites_nothing(trained: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("kept")
    (tmp_path / "link").symlink_to(full)
    (tmp_path / "file").write_text("kept")
    before = files(tmp_path)
    for name, reason in (("full", "is not empty"), ("link", "is a link"), ("file", "is a file")):
        with pytest.raises(UserError, match=f"{name} {reason}; choose a new folder$"):
            run(["export", str(trained / "runs" / "a"), f"out={tmp_path / name}"])
    assert files(tmp_path) == before and len(list(tmp_path.iterdir())) == 3
    (tmp_path / "empty").mkdir()
    run(["export", str(trained / "runs" / "a"), f"out={tmp_path / 'empty'}"])
    load_model(tmp_path / "empty")


def test_damaged_weights_are_not_exported(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs" / "a", tmp_path / "run")
    weights = tmp_path / "run" / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(UserError, match="is damaged"):
        run(["export", str(tmp_path / "run"), f"out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1


def test_own_classes_are_named_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runsnet.py").write_text("from dpm_scales.networks import UNet\n\n\nclass Net(UNet):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    own = [option for option in SMALL if not option.startswith("network")]
    network = (
        "network={_target_: runsnet.Net, widths: [8, 8], blocks_per_level: 1, embedding_dim: 16, attention_levels: []}"
    )
    outcome = call("train.py", *own, network, "trainer.max_steps=1", "run_dir=run", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    (tmp_path / "runsnet.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.delitem(__import__("sys").modules, "runsnet")
    run(["export", str(tmp_path / "run"), f"out={tmp_path / 'out'}"])
    told = capsys.readouterr().out.splitlines()[1]
    assert told == "it uses classes of runsnet: install them where it is loaded, and give 'allow=[runsnet]'"
    assert files(tmp_path / "out") == files(tmp_path / "run" / "model")

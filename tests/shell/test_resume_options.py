"""Options that change when a run is resumed: each takes effect, is warned of, or is refused, as documented."""

from __future__ import annotations

import math
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dpm_scales.models.checksums import write_checkpoint
from dpm_scales.training.resuming import APART, REFUSED, RULES, TAKES, WARNED, rule_of, rules_table
from support.shell import CONFIGS, ROOT, Outcome, assert_equal, attempt, call, checkpoint, column, settings, train

RUN = (
    "optimizer.learning_rate=0.01",
    "optimizer.warmup_steps=0",
    "trainer.max_steps=4",
    "ema.decay=0.9",
    "ema.power_lengths=[0.05]",
)
DECAY = 0.5 * (1 + math.cos(math.pi * 4 / 8))  # of the cosine, after 4 of 8 steps


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps; the cosine has taken the learning rate to zero."""
    return train(tmp_path_factory.mktemp("ended") / "run", *RUN)


@pytest.fixture
def run_dir(ended: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ended, tmp_path / "run"))


def resume(run_dir: Path, *overrides: str) -> tuple[Outcome, list[str]]:
    """What a resumed run says, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = call("train.py", f"run_dir={run_dir}", *overrides, cwd=run_dir.parent)
    return outcome, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


# --- the table --------------------------------------------------------------------------------------------------------


def keys(node: Any, section: str = "") -> set[str]:
    if not isinstance(node, dict) or not node:
        return {section}
    return set().union(*(keys(value, f"{section}.{key}".lstrip(".")) for key, value in node.items()))


def every_key() -> set[str]:
    """Of configs/train.yaml, and of all choices of its groups."""
    own = yaml.safe_load((CONFIGS / "train.yaml").read_text())
    groups = [key for entry in own.pop("defaults") if isinstance(entry, dict) for key in entry]
    found = keys({key: value for key, value in own.items() if key != "hydra"})
    for group in groups:
        if group == "experiment" or group.startswith("override"):
            continue
        for path in (CONFIGS / group).glob("*.yaml"):
            values = yaml.safe_load(path.read_text())
            found |= keys({key: value for key, value in values.items() if key not in ("defaults", "_target_")}, group)
    return found


def test_every_option_has_a_rule_and_every_rule_an_option() -> None:
    found = every_key()
    assert len(found) > 100 and {"seed", "optimizer.betas", "data.root", "trainer.max_time"} <= found
    assert [key for key in sorted(found) if rule_of(key) is None] == []
    groups = {"process", "target", "prior", "network", "sampler", "weight", "logger", "data", "trainer"}
    stale = [key for key in RULES if key not in found | groups and not any(k.startswith(f"{key}.") for k in found)]
    assert stale == []
    assert rule_of("nothing.of_that") is None


def test_the_documentation_has_the_table() -> None:
    assert rules_table() in (ROOT / "docs" / "resume.md").read_text()


# --- what takes effect ------------------------------------------------------------------------------------------------

#: one change for every rule; all of a kind are tried together
TAKEN = {
    "optimizer.method": "muon",
    "optimizer.learning_rate": "0.002",
    "optimizer.warmup_steps": "9",
    "optimizer.decay": "constant",
    "optimizer.betas": "[0.5,0.6]",
    "optimizer.weight_decay": "0.3",
    "optimizer.max_bad_steps": "7",
    "ema.decay": "0.2",
    "ema.snapshot_every": "2",
    "checkpoint": "checkpoint.every_n_steps=2",
    "samples": "samples.num_images=2",
    "evaluation": "evaluation.num_samples=30",
    "sampler": "sampler=ddim",
    "weight": "weight=p2",
    "scale_sampling": "logit_normal",
    "scale_mean": "0.5",
    "scale_std": "0.7",
    "training.pairing": "nearest",
    "training.candidates": "4",
    "objective": "seconds",
    "compile": "true",
    "channels_last": "false",
    "trainer.max_steps": "6",
    "trainer.max_time": "00:01:00:00",
    "trainer.gradient_clip_val": "0.5",
    "trainer.accumulate_grad_batches": "2",
    "trainer": "trainer.val_check_interval=2",
    "data.num_workers": "1",
    "data.pin_memory": "false",
    "data.on_device": "false",
    **dict.fromkeys(("data.on_error", "data.cache_gb", "data.decoder", "data.tries", "data.timeout"), ""),  # see below
    **dict.fromkeys(("data.download", "data.verify", "data.decoded"), ""),
    "logger": "logger=tensorboard",
}
WARNED_OF = {
    "seed": "5",
    "data": "data.split_seed=1",
    "data.batch_size": "8",
    "data.seed": "1",
    "data.drop_last": "false",
    "data.window": "",
    "ema.length": "",  # see tests/shell/test_post_hoc_ema.py
}
REFUSED_ONES = {
    "process": "process=heat",
    "target": "target=noise",
    "prior": "prior=gaussian",
    "network": "network.embedding_dim=24",
    "conditional": "true",
    "ema.power_lengths": "[0.07]",
}
#: of folders and shards, in their own tests, and those that take long
ELSEWHERE = {
    "label_dropout",
    "compile",
    *(name for name in (*TAKEN, *WARNED_OF) if "" in (TAKEN.get(name), WARNED_OF.get(name))),
}


def written(changes: dict[str, str]) -> list[str]:
    return [value if "=" in value else f"{key}={value}" for key, value in changes.items() if key not in ELSEWHERE]


def test_every_rule_is_tried() -> None:
    tried = {TAKES: set(TAKEN), WARNED: set(WARNED_OF), REFUSED: set(REFUSED_ONES) | {"label_dropout"}}
    for kind, names in tried.items():
        assert names == {key for key, rule in RULES.items() if rule.kind == kind}, kind
    apart = {"run_dir", "resume", "check_resume", "allow", "plugins"}
    assert {key for key, rule in RULES.items() if rule.kind == APART} == apart


def test_what_takes_effect_is_told_and_taken(run_dir: Path) -> None:
    outcome, told = resume(run_dir, *written(TAKEN))
    assert outcome.status == 0 and told == [], outcome.err
    head, line = outcome.out.splitlines()[:2]
    assert "learning rate 0.002, steps 6" in head and "resuming" in head
    assert line.startswith("from step 4 on: ")
    for option in written(TAKEN):
        key = option.partition("=")[0]
        assert f"{key} " in line, key
    for name in ("optimizer.learning_rate 0.01 -> 0.002", "optimizer.betas [0.9, 0.99] -> [0.5, 0.6]", "weight None"):
        assert name in line
    now = settings(run_dir)
    assert now["optimizer"]["learning_rate"] == 0.002 and now["trainer"]["max_steps"] == 6
    values = checkpoint(run_dir)
    (group,) = values["optimizer_states"][0]["param_groups"]
    assert group["initial_lr"] == 0.002 and tuple(group["betas"]) == (0.5, 0.6) and group["weight_decay"] == 0.3
    assert values["global_step"] == 6
    assert column(run_dir, "lr-Muon")[-2:] == pytest.approx([0.002 * 5 / 10, 0.002 * 6 / 10])
    assert (run_dir / "samples" / "step-000006.png").is_file() and (run_dir / "tensorboard").is_dir()


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with a checkpoint after four of six steps, and the same run at its end."""
    whole = train(tmp_path_factory.mktemp("whole") / "run", *RUN, "trainer.max_steps=6", "checkpoint.every_n_steps=4")
    half = Path(shutil.copytree(whole, tmp_path_factory.mktemp("half") / "run"))
    (half / "result.json").unlink()
    (half / "checkpoints" / "step-000004.ckpt").replace(half / "checkpoints" / "last.ckpt")
    return half, whole


@pytest.mark.parametrize(
    "option",
    [
        "optimizer.learning_rate=0.02",
        "optimizer.betas=[0.5,0.6]",
        "optimizer.weight_decay=0.3",
        "optimizer.warmup_steps=9",
        "optimizer.decay=constant",
        "trainer.gradient_clip_val=0.01",
        "ema.decay=0.1",
    ],
)
def test_weights_are_those_of_the_new_option(option: str, halfway: tuple[Path, Path], tmp_path: Path) -> None:
    """From the checkpoint's moments on."""
    half, whole = halfway
    run_dir = Path(shutil.copytree(half, tmp_path / "run"))
    outcome, _ = resume(run_dir, option, "trainer.val_check_interval=100", "samples.num_images=0")
    assert outcome.status == 0 and f"{option.partition('=')[0]} " in outcome.out, outcome.err
    values, other = checkpoint(run_dir), checkpoint(whole)
    weights = "state_dict" if option.startswith("ema") else "current_model_state"
    name = "model.denoiser.network.conv_out.weight"
    assert not np.allclose(values[weights][name], other[weights][name], rtol=1e-6, atol=0)
    assert float(values["optimizer_states"][0]["state"][0]["step"]) == 6
    rates, undisturbed = (np.array(column(folder, "lr-AdamW")) for folder in (run_dir, whole))
    np.testing.assert_array_equal(rates[:4], undisturbed[:4])
    if option.endswith("0.02"):
        np.testing.assert_allclose(rates[4:], 2 * undisturbed[4:])
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(4, 6) / 6))
    if option.startswith("optimizer.warmup"):
        np.testing.assert_allclose(rates[4:], 0.01 * np.array([5, 6]) / 10 * cosine)
    if option.startswith("optimizer.decay"):
        np.testing.assert_allclose(rates[4:], 0.01)


def test_without_changes_nothing_is_said(run_dir: Path) -> None:
    (run_dir / "result.json").unlink()
    before = checkpoint(run_dir)
    outcome, told = resume(run_dir)
    assert outcome.status == 0 and told == [] and "from step" not in outcome.out, outcome.err
    assert_equal(checkpoint(run_dir)["optimizer_states"], before["optimizer_states"])


def test_more_steps_tell_what_the_learning_rate_does(run_dir: Path) -> None:
    outcome, told = resume(run_dir, "trainer.max_steps=8")
    assert outcome.status == 0 and told == [], outcome.err
    rate = f"{0.01 * DECAY:.4g}"
    assert (
        f"from step 4 on: trainer.max_steps 4 -> 8; the learning rate rises from 0 to {rate}, "
        "since cosine decay now ends at step 8\n"
    ) in outcome.out
    assert column(run_dir, "lr-AdamW")[4] == pytest.approx(0.01 * DECAY)


def test_checkpoints_that_do_not_tell_their_options_are_resumed(run_dir: Path) -> None:
    """Those of earlier versions; and what a stranger puts there says nothing."""
    last = run_dir / "checkpoints" / "last.ckpt"
    for number, value in enumerate((None, "[" * 10**5, "5", '{"seed": {"a": "\\u001b]0;x"}, "optimizer": 3}')):
        values = checkpoint(run_dir)
        if value is None:
            del values["options"]
        else:
            values["options"] = value
        write_checkpoint(last, values)
        outcome, told = resume(run_dir, f"trainer.max_steps={5 + number}", "samples.num_images=0")
        assert outcome.status == 0 and "\x1b" not in outcome.out + outcome.err + "".join(told), outcome.err
        assert "the learning rate rises from 0 to" in outcome.out


# --- what is warned of, what is refused -------------------------------------------------------------------------------


def test_what_is_warned_of(run_dir: Path) -> None:
    outcome, told = resume(run_dir, *written(WARNED_OF), "trainer.max_steps=5")
    assert outcome.status == 0, outcome.err
    assert len(told) == 3, told
    order = next(line for line in told if "order of the training images" in line and "differs" in line)
    assert all(part in order for part in ("batch_size 16 -> 8", "seed 0 -> 1", "drop_last True -> False"))
    assert any(line.startswith("seed 0 -> 5: scales, noise and sample grids are drawn from the new") for line in told)
    assert any(line.startswith("data.split_seed 0 -> 1: the images may differ from here on") for line in told)


@pytest.mark.parametrize("key", REFUSED_ONES)
def test_what_is_refused(key: str, run_dir: Path) -> None:
    outcome, _ = resume(run_dir, *written({key: REFUSED_ONES[key]}), "trainer.max_steps=5")
    assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome.err
    said = "begin with a run's first step, so leave" if key.startswith("ema") else "choose another run_dir, or leave"
    assert re.search(said, outcome.err)
    assert checkpoint(run_dir)["global_step"] == 4


def test_label_dropout_is_refused_with_labels(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert attempt(run_dir, "conditional=true", "trainer.max_steps=1", "samples.num_images=0").status == 0
    outcome, _ = resume(run_dir, "label_dropout=0.3", "trainer.max_steps=2")
    assert outcome.status == 2 and "label_dropout=0.1, and now" in outcome.err, outcome.err

"""Switches take true and false alone, and paths are not empty: every one of every config, whatever it is given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dpm_scales.cli import configs
from dpm_scales.cli.arguments import NEVER_EMPTY
from dpm_scales.cli.switches import check_switches
from dpm_scales.errors import UserError
from dpm_scales.models.instantiate import build
from dpm_scales.targets import Clean
from support.shell import CONFIGS, call

ENTRY_POINTS = ("train", "sample", "evaluate", "evolve")
#: null leaves these to something else; the others are given true or false by every config
MAY_BE_NULL = {"data.pin_memory", "data.on_device"}


def may_be_null(name: str, key: str) -> bool:
    return key in MAY_BE_NULL or (name, key) == ("train", "compile")


def every_config() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every entry point's config, and every choice of its groups, as they are written."""
    for name in ENTRY_POINTS:
        yield name, nested(configs.read_options(CONFIGS / f"{name}.yaml")[1])
        for group in configs.all_groups(name):
            for choice in configs.choices(group):
                path = configs.config_file(group, choice)
                assert path is not None
                yield name, nested(configs.chosen_options(group, path).values())


def nested(options: Iterable[configs.Option]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for option in options:
        *above, last = option.key.split(".")
        node = found
        for part in above:
            node = node.setdefault(part, {})
        if option.text:
            node[last] = option.value
    return found


def leaves(node: dict[str, Any], where: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    """Key, node that holds it, and its name there."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{where}{name}.")
        else:
            yield f"{where}{name}", node, name


def check(settings: dict[str, Any], name: str) -> None:
    for built in (False, True):
        check_switches(settings, configs.switches(name), built)


def test_every_switch_of_every_config() -> None:
    seen: dict[str, set[str]] = {name: set() for name in ENTRY_POINTS}
    done = set()
    for name, settings in every_config():
        check(settings, name)
        for key, node, last in list(leaves(settings)):
            before, place = node[last], (name, key, node.get("_target_"))
            null = may_be_null(name, key)
            if place in done or not (isinstance(before, bool) or null):
                continue
            done.add(place)
            seen[name].add(key)
            alone = {"_target_": node["_target_"]} if "_target_" in node else {}
            for part in reversed(key.split(".")[:-1]):  # the config with this option alone
                alone = {part: alone}
            words = f"{key} must be true, false or null" if null else f"{key} must be true"
            for value in ("maybe", "no", "", 1, None, True, False):
                target = alone
                for part in key.split(".")[:-1]:
                    target = target[part]
                target[last] = value
                if isinstance(value, bool) or (value is None and null):
                    check(alone, name)
                    continue
                with pytest.raises(UserError) as caught:
                    check(alone, name)
                assert str(caught.value).startswith(words) and f"got {value!r}" in str(caught.value), name
    assert seen["train"] >= {
        *("conditional", "compile", "channels_last", "check_resume", "evaluation.cache", "trainer.deterministic"),
        *("trainer.enable_progress_bar", "data.pin_memory", "data.drop_last", "data.random_flip", "data.random_crop"),
        *("data.rotate_portrait", "data.download", "target.clip", "target.equal_weight", "process.guidance_input"),
        *("network.extra_decoder_block", "logger.offline", "sampler._partial_"),
    }
    assert seen["sample"] >= {"trajectory", "degrade", "compile"}
    assert seen["evaluate"] >= {"any_size", "cache", "download"}
    assert seen["evolve"] >= {"second_draw", "audit", "mixed", "process.guidance_input"}


COMMANDS = {
    "train.py run_dir=run conditional=no": "conditional must be true or false, got 'no'",
    "train.py run_dir=run channels_last=7": "channels_last must be true or false, got 7",
    "train.py run_dir=run compile=off": "compile must be true, false or null, got 'off'",
    "train.py run_dir=run trainer.deterministic=perhaps": "trainer.deterministic must be true, false or 'warn', got",
    "train.py run_dir=run data.pin_memory=maybe": "data.pin_memory must be true, false or null, got 'maybe'",
    "train.py run_dir=run target.clip=n": "target.clip must be true or false, got 'n'",
    "train.py run_dir=run process=heat +process.noise.clip=n": "unknown option 'process.noise.clip': allowed: ",
    "train.py run_dir=run +trainer.barebones=no": "trainer.barebones must be true or false, got 'no'",
    "sample.py model=x out=out trajectory=no": "trajectory must be true or false, got 'no'",
    "sample.py task=superres model=x out=out image=a.png degrade=no": "degrade must be true or false, got 'no'",
    "evaluate.py model=x reference=y cache=maybe": "cache must be true or false, got 'maybe'",
    "evolve.py out=out second_draw=no": "second_draw must be true or false, got 'no'",
    "evolve.py out=out process=osmosis process.guidance_input=no": "process.guidance_input must be true or false",
}


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_refuse_other_words(line: str, tmp_path: Path) -> None:
    script, *arguments = line.split()
    outcome = call(script, *arguments, cwd=tmp_path)
    assert outcome.status == 2 and outcome.err.startswith(f"error: {COMMANDS[line]}"), outcome.err
    assert len(outcome.err.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_objects_of_python_and_of_stored_models_are_as_strict() -> None:
    settings = {"_target_": "dpm_scales.targets.Clean", "preconditioning": "auto", "clip": "no"}
    with pytest.raises(UserError, match="^target.clip must be true or false, got 'no'$"):
        build(settings, Clean, "target")


def path_options(name: str) -> Iterator[tuple[str, str]]:
    """Options of an entry point that are paths, and the choice that has each."""
    for option in configs.read_options(CONFIGS / f"{name}.yaml")[1]:
        yield option.key, ""
    for group in configs.all_groups(name):
        for choice in configs.choices(group):
            path = configs.config_file(group, choice)
            assert path is not None
            for key in configs.chosen_options(group, path):
                yield key, f"{'task' if group in ('task', 'edit') else group}={choice}"


def test_empty_paths_are_refused(tmp_path: Path) -> None:
    seen = set()
    for name in ENTRY_POINTS:
        for key, choice in dict(path_options(name)).items():
            if key not in NEVER_EMPTY or (name, key) == ("train", "samples") or (name, key) == ("evolve", "reference"):
                continue
            seen.add(key)
            for value in ("", "''", '" "'):
                outcome = call(f"{name}.py", *choice.split(), f"{key}={value}", cwd=tmp_path)
                assert outcome.status == 2, (key, outcome)
                assert outcome.err == f"error: {key} is empty; give it a value, or leave it out\n"
    assert seen == set(NEVER_EMPTY)
    outcome = call("evolve.py", "data=", "out=out", cwd=tmp_path)
    assert outcome.status == 2 and outcome.err.startswith("error: data is empty")
    assert list(tmp_path.iterdir()) == []


def test_every_option_that_is_a_file_or_a_folder_is_known_as_one() -> None:
    """They may hold any character, and are not empty."""
    paths = ("folder or", "file,", "file of", "file that", "path to", "folder of evaluation", "folder;", "folder with")
    for name in ENTRY_POINTS:
        for path in [CONFIGS / f"{name}.yaml", *CONFIGS.glob("*/*.yaml")]:
            for option in configs.read_options(path, path.parent.name if path.parent != CONFIGS else "")[1]:
                if option.comment.startswith(paths) and not option.key.startswith("data.labels"):
                    assert option.key in NEVER_EMPTY, option.key


def test_empty_paths_of_experiments_are_refused(tmp_path: Path) -> None:
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text("# @package _global_\nrun_dir: ' '\n")
    outcome = call("train.py", "--config-dir", "own", "experiment=mine", cwd=tmp_path)
    assert outcome.status == 2 and outcome.err == "error: run_dir is empty; give it a value, or leave it out\n"
    assert [path.name for path in tmp_path.iterdir()] == ["own"]

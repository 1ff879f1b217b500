"""The files of deploy/ and the Dockerfile: what their scripts start, with the schedulers replaced by stubs."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpm_scales.entry.commands import COMMANDS
from support.shell import ROOT, SMALL, call, composed

DEPLOY = ROOT / "deploy"
STUB = '#!/bin/sh\necho "$(basename "$0")" "$@"\n'


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """Return a folder with programs that print how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("srun", "torchrun", "dpm-scales"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    return folder


def started(stubs: Path, script: str, *arguments: str, **variables: str) -> tuple[int, list[str], str]:
    """Run a shell script with the stubs first in PATH; return its status, the words it printed, and its errors."""
    environment = {"PATH": f"{stubs}:{os.environ['PATH']}", "HOME": str(stubs), **variables}
    shell = "sh" if script.endswith("entrypoint.sh") else "bash"
    done = subprocess.run(
        [shell, str(DEPLOY / script), *arguments], env=environment, cwd=stubs.parent, capture_output=True, text=True
    )
    return done.returncode, done.stdout.split(), done.stderr


def test_the_slurm_script_starts_a_run_that_trains(stubs: Path, tmp_path: Path) -> None:
    status, words, _ = started(stubs, "slurm/train.sh", "process=heat", "run_dir=runs/mine", PYTHON="python")
    assert status == 0 and words[:5] == ["srun", "python", "-m", "dpm_scales", "train"]
    done = call("train.py", *words[5:], *SMALL, "trainer.max_steps=2", "trainer.val_check_interval=1", cwd=tmp_path)
    assert done.status == 0 and (tmp_path / "runs/mine/model/model.safetensors").is_file(), done.err


def test_the_array_has_a_run_for_each_process_and_seed(stubs: Path) -> None:
    runs = []
    for task in range(6):
        status, words, _ = started(stubs, "slurm/array.sh", "trainer.max_steps=9", SLURM_ARRAY_TASK_ID=str(task))
        assert status == 0 and words[-1] == "trainer.max_steps=9"
        runs.append(tuple(words[5:8]))
        composed(*words[5:])
    assert len(set(runs)) == 6 and runs[0] == ("process=vp", "seed=0", "run_dir=runs/array/vp-0")
    assert runs[5] == ("process=blurring", "seed=1", "run_dir=runs/array/blurring-1")
    status, words, error = started(stubs, "slurm/array.sh", SLURM_ARRAY_TASK_ID="6")
    assert (status, words) == (2, []) and error == (
        "error: task 6 of the array, but there are 6 runs; use --array=0-5\n"
    )
    own = started(stubs, "slurm/array.sh", SLURM_ARRAY_TASK_ID="1", PROCESSES="ve", SEEDS="3 4")[1]
    assert own[5:7] == ["process=ve", "seed=4"]
    status, _, error = started(stubs, "slurm/array.sh")
    assert status != 0 and "start it with sbatch --array=0-5" in error


def test_the_directives_of_slurm_requeue() -> None:
    for name in ("train.sh", "array.sh"):
        directives = re.findall(r"^#SBATCH (.*)$", (DEPLOY / "slurm" / name).read_text(), re.MULTILINE)
        line = " ".join(directives)
        assert all(option in line for option in ("--signal=USR1@", "--requeue", "--open-mode=append"))
        tasks, devices = (re.search(rf"--{key}=(\d+)", line) for key in ("ntasks-per-node", "gpus-per-node"))
        assert tasks and devices and tasks[1] == devices[1]


def test_elastic_torchrun(stubs: Path) -> None:
    status, words, _ = started(stubs, "torchrun_elastic.sh", "run_dir=runs/elastic", HEAD="one:1", MAX="3", DEVICES="2")
    assert status == 0 and words[:3] == ["torchrun", "--nnodes", "1:3"]
    assert words[-4:] == ["-m", "dpm_scales", "train", "run_dir=runs/elastic"]
    assert ("--rdzv-endpoint", "one:1") in zip(words, words[1:], strict=False)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("train", "process=heat"), ["dpm-scales", "train", "process=heat"]),
        (("train.py", "process=heat"), ["dpm-scales", "train", "process=heat"]),
        (("torchrun", "-m", "dpm_scales"), ["torchrun", "-m", "dpm_scales"]),
        ((), ["dpm-scales"]),
    ],
)
def test_the_container_takes_commands(stubs: Path, arguments: tuple[str, ...], expected: list[str]) -> None:
    assert started(stubs, "entrypoint.sh", *arguments)[:2] == (0, expected)


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def options_of(words: list[str]) -> list[str]:
    """Return the options of the training that a list of words starts."""
    start = words.index("train")
    return words[start + 1 :]


def test_kubernetes_and_compose_start_runs_as_an_ordinary_user_that_may_end_in_peace() -> None:
    claim, job = documents("kubernetes/job.yaml")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    composed(*options_of(container["args"]))
    assert container["args"][0] in COMMANDS and pod["securityContext"]["runAsNonRoot"] is True
    assert pod["restartPolicy"] == "OnFailure" and pod["terminationGracePeriodSeconds"] >= 120
    assert {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v} == {
        claim["metadata"]["name"]
    }
    (elastic,) = documents("kubernetes/pytorchjob.yaml")
    (worker,) = elastic["spec"]["pytorchReplicaSpecs"].values()
    (container,) = worker["template"]["spec"]["containers"]
    composed(*options_of(container["args"]))
    devices = container["args"][container["args"].index("--nproc-per-node") + 1]
    assert int(devices) == container["resources"]["limits"]["nvidia.com/gpu"]
    (compose,) = documents("compose.yaml")
    shown = compose["services"]["train"]["command"][-1]
    composed(*re.sub(r"\$\{OPTIONS:-(.*)\}", r"\1", shown).split()[3:])
    assert compose["services"]["tensorboard"]["ports"] == ["127.0.0.1:6006:6006"]


def test_the_dockerfile_copies_what_exists_and_ends_as_an_ordinary_user() -> None:
    text = (ROOT / "Dockerfile").read_text()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE) for word in line.split()]
    assert copied and all((ROOT / word).exists() and word.split("/")[0] not in ignored for word in copied)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.search(r"'\.\[([\w,]+)\]'", text)
    assert asked and set(asked[1].split(",")) <= extras.keys()
    users = re.findall(r"^USER (.*)$", text, re.MULTILINE)
    assert users == ["10001"] and text.index("USER 10001") < text.index("ENTRYPOINT") and "HEALTHCHECK" in text

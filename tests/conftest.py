"""One thread in each test process, and the files that take longest first."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from dpm_scales.cli.program import FORM

# Nothing written here has to outlive a power failure, and a small run waits for the disk forty times.
os.fsync = lambda handle: None

# Two processes that each start a thread per core wait for one another.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_form() -> Iterator[None]:
    """Forget how a command was typed that a test calls in this process."""
    os.environ.pop(FORM, None)
    yield
    os.environ.pop(FORM, None)


#: CPU seconds of the longest files, their processes included; only their order counts, and other files keep theirs
SECONDS = {
    "test_distributed.py": 60,
    "test_resume.py": 45,
    "test_wheel.py": 30,
    "test_cli_errors.py": 30,
    "test_entry_points.py": 30,
    "test_step_device.py": 30,
    "test_training_options.py": 28,
    "test_local_ranks.py": 27,
    "test_faults_kill.py": 27,
    "test_sweeps.py": 25,
    "test_networks.py": 25,
    "test_networks_edm2.py": 25,
    "test_configs.py": 25,
    "test_python_models.py": 25,
    "test_python_training.py": 24,
    "test_sample_tasks.py": 24,
    "test_training.py": 18,
    "test_own_kinds.py": 18,
    "test_from_diffusers.py": 17,
    "test_audit.py": 15,
    "test_launchers.py": 15,
    "test_edge_preserving_commands.py": 15,
    "test_judges.py": 14,
    "test_hub.py": 13,
    "test_sample_folder.py": 13,
    "test_faults_folders.py": 12,
    "test_init.py": 11,
    "test_security_folders.py": 11,
    "test_health.py": 11,
    "test_resume_options.py": 11,
    "test_likelihood_run.py": 11,
    "test_prior_images.py": 11,
    "test_samplers.py": 10,
    "test_readme.py": 10,
    "test_audit_command.py": 10,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, so that no worker of ``--dist loadfile`` ends alone with one of them."""
    items.sort(key=lambda item: -SECONDS.get(item.path.name, 0))


def pytest_collection_finish() -> None:
    """Keep modules and tests, a million objects that stay, out of every later search for garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)

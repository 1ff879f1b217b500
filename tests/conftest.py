"""One thread in each test process, and the files that take longest first."""

from __future__ import annotations

import gc
import os

import pytest
import torch

# Nothing written here has to outlive a power failure, and a small run waits for the disk forty times.
os.fsync = lambda handle: None

# Two processes that each start a thread per core wait for one another.
torch.set_num_threads(1)

#: seconds of the longest files, as measured on two cores; only their order counts, and other files keep theirs
SECONDS = {
    "test_distributed.py": 95,
    "test_local_ranks.py": 90,
    "test_resume.py": 60,
    "test_sweeps.py": 55,
    "test_networks.py": 50,
    "test_own_kinds.py": 40,
    "test_wheel.py": 35,
    "test_training.py": 30,
    "test_init.py": 30,
    "test_faults_kill.py": 25,
    "test_entry_points.py": 25,
    "test_from_diffusers.py": 25,
    "test_to_diffusers.py": 25,
    "test_hub.py": 25,
    "test_own_metrics.py": 25,
    "test_python_training.py": 25,
    "test_training_options.py": 20,
    "test_plugins.py": 20,
    "test_own_classes.py": 20,
    "test_cli_errors.py": 18,
    "test_python_models.py": 16,
    "test_health.py": 15,
    "test_audit.py": 15,
    "test_launchers.py": 14,
    "test_own_configs.py": 12,
    "test_audit_command.py": 11,
    "test_completion.py": 10,
    "test_faults_folders.py": 10,
    "test_security_folders.py": 10,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, so that no worker of ``--dist loadfile`` ends alone with one of them."""
    items.sort(key=lambda item: -SECONDS.get(item.path.name, 0))


def pytest_collection_finish() -> None:
    """Keep modules and tests, a million objects that stay, out of every later search for garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)

"""Manage the folder of a run: its files, its lock, and where the run is saved if the folder disappears."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from dpm_scales.cli.arguments import config_dirs, config_flags
from dpm_scales.cli.main import is_sweep
from dpm_scales.cli.messages import one_line
from dpm_scales.cli.stored import CONFIG_DIR_FILE, CONFIG_FLAGS, CONFIG_FLAGS_FILE, NEVER_STORED, key_of, may_download
from dpm_scales.errors import UserError, require
from dpm_scales.locks import lock
from dpm_scales.models.instantiate import plain
from dpm_scales.run_folders.files import FAILURE
from dpm_scales.storage import (
    FolderGoneError,
    check_folder,
    check_writable,
    guarded,
    make_folder,
    remove_leftovers,
    write_text,
)

#: patterns of the files that a run writes; checked at the start, since a folder of that name would fail hours later
FILES = (
    *("config.yaml", "overrides.yaml", "result.json", "metrics.csv", "unreadable.txt", "wandb_id"),
    *(CONFIG_DIR_FILE, CONFIG_FLAGS_FILE, FAILURE),
    *("checkpoints/*.ckpt", "checkpoints/last.damaged"),
    *("samples/step-*.png", "samples/trajectory-*.png", "curves.png"),
    *("model/model.safetensors", "model/config.yaml", "model/covariance.safetensors"),
    "ema/step-*.safetensors",
)
FOLDERS = ("checkpoints", "samples", "model", "ema")
#: data that read every image of a folder if `root` is one, and are fetched if it is a name on the Hub
HUGGING_FACE = "dpm_scales.data.hf_data"


@contextmanager
def taken(run_dir: Path) -> Iterator[None]:
    """Lock the run folder, made if missing, for this process alone; writes go only into real folders in it.

    Raises:
        UserError: a file or folder is where a run would write the other, or another process holds the lock.
    """
    in_sweep = is_sweep() and run_dir.parent.is_dir()  # then that folder is the one that was named
    with guarded(run_dir.parent) if in_sweep else nullcontext():
        make_folder(run_dir) if run_dir.is_dir() else check_writable(run_dir)
    check_folder(run_dir)
    for path in (path for pattern in FILES for path in run_dir.glob(pattern)):
        require(not path.is_dir(), f"{path} is a folder, where a file belongs; remove it, or choose another run_dir")
    for path in (run_dir / name for name in FOLDERS):
        require(not path.is_file(), f"{path} is a file, where a folder belongs; remove it, or choose another run_dir")
    with guarded(run_dir), only_run(run_dir):
        yield


def prepare(cfg: DictConfig, run_dir: Path, overrides: list[str]) -> dict[str, str]:
    """Write the files with the run's options, and return their texts by name."""
    check_writable(run_dir)
    remove_leftovers(run_dir)
    with suppress(FileNotFoundError):
        (run_dir / FAILURE).unlink()
    config = OmegaConf.to_container(cfg, resolve=True)
    kept = [override for override in overrides if key_of(override) not in NEVER_STORED]  # trust is given by typing it
    texts = {"config.yaml": yaml.safe_dump(config, sort_keys=False), "overrides.yaml": yaml.safe_dump(kept)}
    for place in config_dirs(config_flags()):
        texts[CONFIG_DIR_FILE] = f"{place}\n"
    replaced = [flag for flag in config_flags() if flag.startswith(CONFIG_FLAGS)]
    if replaced or (run_dir / CONFIG_FLAGS_FILE).is_file():  # a resumed run may be back to the usual ones
        texts[CONFIG_FLAGS_FILE] = "".join(f"{flag}\n" for flag in replaced)
    for name, text in texts.items():
        write_text(run_dir / name, text)
    return texts


@contextmanager
def failure_recorded(run_dir: Path, records: bool) -> Iterator[None]:
    """Write the message of an exception raised in the body into the folder if `records`; signals are not recorded."""
    try:
        yield
    except Exception as error:
        with suppress(UserError, OSError):
            if records:
                write_text(run_dir / FAILURE, f"{one_line(error) or repr(error)}\n")
        raise


def trusted_data(cfg: DictConfig, run_dir: Path) -> dict[str, Any]:
    """Return the data's config, without downloads to a place that only the run's folder names.

    Raises: UserError if the run would write its images among those that it is trained on.
    """
    settings: dict[str, Any] = plain(cfg.data)
    root, fetches = settings.get("root"), "download" in settings
    # sets of torchvision and shards read their own files, whatever lies beside them
    if isinstance(root, str) and (not fetches or settings.get("_target_") == HUGGING_FACE):
        inside = run_dir.resolve().is_relative_to(Path(root).expanduser().resolve())
        require(
            not inside,
            f"run_dir={run_dir} lies in data.root={root}: the run's sample grids would become training images; "
            "choose another run_dir",
        )
    return {**settings, "download": False} if fetches and not may_download(run_dir) else settings


class Rescue:
    """Saves a run elsewhere if its folder has disappeared.

    Attributes:
        texts: contents of further files to save, by name.
        metrics: returns the content of `metrics.csv`.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.texts: dict[str, str] = {}
        self.metrics: Callable[[], str] | None = None

    def save(self, error: FolderGoneError, write: Callable[[Path], None]) -> FolderGoneError:
        """Save the run in a new folder by calling `write`, and return the error that names the folder."""
        for place in (self._beside(), Path(tempfile.gettempdir()) / f"{self.run_dir.name[:80]}-rescued"):
            if place is None:
                continue
            folder = _unused(place)
            with suppress(UserError, OSError):
                make_folder(folder)
                write(folder)
                for name, text in self.texts.items():
                    write_text(folder / name, text)
                if self.metrics is not None:
                    write_text(folder / "metrics.csv", self.metrics())
                return FolderGoneError(error.folder, f"the run is saved in {folder}, and run_dir={folder} resumes it")
        return error

    def _beside(self) -> Path | None:
        """Return a place beside the run's folder; None if its parent is gone too."""
        beside = self.run_dir.absolute().with_name(f"{self.run_dir.name[:200]}-rescued")
        return beside if beside.parent.is_dir() else None


def _unused(place: Path) -> Path:
    """Return the place, numbered if it exists."""
    number, found = 1, place
    while found.is_symlink() or found.exists():
        number += 1
        found = place.with_name(f"{place.name}-{number}")
    return found


def only_run(folder: Path) -> AbstractContextManager[None]:
    """Return a lock that keeps other processes and machines from training in the folder: see `locks.lock`."""
    return lock(folder / ".lock", "is being trained by", "wait for it, or choose another run_dir")

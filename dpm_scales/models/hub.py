"""Find models on the Hugging Face Hub: ``hf://owner/name`` or ``hf://owner/name@revision``.

Only the files that a model consists of are downloaded, into huggingface_hub's own cache, where they are found again
without a network. The folder in the cache is then checked like any other.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from dpm_scales.errors import UserError, require
from dpm_scales.models.from_diffusers import (
    CONFIG_FILES,
    WEIGHT_FILES,
    check_pipeline,
    is_diffusers,
    no_weights,
)

PREFIX = "hf://"
OWN_CONFIGS = ("config.yaml", "model/config.yaml")
OWN_WEIGHTS = ("model.safetensors", "model/model.safetensors")
OWN_TABLES = ("covariance.safetensors", "model/covariance.safetensors")
_PLACE = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w.][\w./-]*))?", re.ASCII)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_SHOWN = 6


def is_on_hub(place: object) -> bool:
    """Return whether a path names a model on the Hub."""
    return isinstance(place, str) and place.startswith(PREFIX)


def parse_place(place: str) -> tuple[str, str | None]:
    """Return the repository and the revision that ``hf://owner/name[@revision]`` names. Raises UserError otherwise."""
    found = _PLACE.fullmatch(place)
    if found is None:
        raise UserError(f"{place!r:.200} names no model on the Hub; write hf://owner/name or hf://owner/name@revision")
    return found[1], found[2]


def check_repository(name: str) -> str:
    """Return `name`, also of the form ``hf://owner/name``, as ``owner/name``. Raises UserError for anything else."""
    plain = name.removeprefix(PREFIX) if isinstance(name, str) else ""
    ok = _REPOSITORY.fullmatch(plain) is not None
    require(ok, f"a model on the Hub is named owner/name, got {name!r:.200}")
    return plain


def hub() -> ModuleType:
    """Return the package huggingface_hub. Raises UserError if it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.errors  # loaded on demand otherwise
    except ImportError as error:
        raise UserError(
            f"models on the Hub need huggingface_hub ({error}): pip install 'dpm-scales[hub]', or download the model "
            "and give its folder"
        ) from error
    return huggingface_hub


def fetch(place: str) -> Path:
    """Download a model from the Hub, of this package or a pipeline of diffusers, and return its folder in the cache.

    Args:
        place: ``hf://owner/name`` or ``hf://owner/name@revision``, a branch, tag or commit; by default "main".

    Raises: UserError without huggingface_hub, for a repository or revision that is missing or not accessible, for one
    that holds no model, and without a network if the files are not in the cache.
    """
    repo, revision = parse_place(place)
    folder = _download(repo, revision, (*OWN_CONFIGS, *OWN_TABLES, *CONFIG_FILES), quiet=True)
    if _has_any(folder, OWN_CONFIGS):
        weights: Sequence[str] = OWN_WEIGHTS
    elif is_diffusers(folder):
        check_pipeline(folder)
        weights = WEIGHT_FILES
    else:
        raise UserError(
            f"{repo} is no dpm_scales model; it has {_listed(_names(repo, folder.name))}, where a model has "
            "config.yaml and model.safetensors, or the files of a diffusers pipeline"
        )
    if not _has_any(folder, weights):  # a snapshot is of one commit, so files already there stay valid
        folder = _download(repo, folder.name, weights)
    if not _has_any(folder, weights):
        raise UserError(no_weights(repo, weights[0], _names(repo, folder.name)))
    return folder


def _has_any(folder: Path, names: Iterable[str]) -> bool:
    return any((folder / name).is_file() for name in names)


def _download(repo: str, revision: str | None, names: Iterable[str], quiet: bool = False) -> Path:
    """Download those of the named files that a repository has, and return the folder of its snapshot in the cache."""
    package = hub()
    more = {"tqdm_class": _silent_bar()} if quiet else {}
    with readable_errors(repo, revision), _without_warnings():
        return Path(package.snapshot_download(repo, revision=revision, allow_patterns=list(names), **more))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence huggingface_hub's warnings in the body, for example that it finds none of the named files."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _silent_bar() -> type:
    from tqdm.auto import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent


def _names(repo: str, revision: str) -> list[str]:
    with readable_errors(repo, revision):
        return sorted(hub().HfApi().list_repo_files(repo, revision=revision))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) or "no files"
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


@contextmanager
def readable_errors(repo: str, revision: str | None = None, cached: bool = True) -> Iterator[None]:
    """Replace the errors that huggingface_hub raises in the body with a UserError of one line.

    Args:
        cached: whether the cache could have served the body without a network.
    """
    errors = hub().errors
    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"{repo!r} is no name of a model on the Hub: {error}") from error
    except errors.GatedRepoError as error:
        raise UserError(f"{repo} is gated: ask for access at https://huggingface.co/{repo} and {LOG_IN}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"there is no model {repo} on the Hub, or it is private; check the name, or {LOG_IN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repo} has no revision {revision!r}; see https://huggingface.co/{repo}/commits") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise UserError(f"the Hub refuses access to {repo} (status {status}); {LOG_IN}") from error
        raise UserError(f"the Hub answers status {status} for {repo}; try again later") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise UserError(_unreachable(error, repo if cached else None)) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "requests"):
            raise
        raise UserError(_unreachable(error, repo if cached else None)) from error


def _unreachable(error: BaseException, wanted: str | None) -> str:
    cause = error.__cause__ or error
    reason = (str(cause).splitlines() or [""])[0].rstrip(".") or type(cause).__name__
    missing = "" if wanted is None else f", and {wanted} is not whole in the cache"
    other = "" if wanted is None else ", or give the folder of a model"
    return (
        f"the Hub can't be reached ({type(cause).__name__}: {reason:.160}){missing}; check the network and "
        f"HF_HUB_OFFLINE{other}"
    )

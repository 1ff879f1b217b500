"""Upload a model to the Hugging Face Hub, with a page that describes it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dpm_scales.errors import require
from dpm_scales.models.base import Parts
from dpm_scales.models.card import README, write_card
from dpm_scales.models.export import WEIGHTS_FILE, save_model
from dpm_scales.models.hub import LOG_IN, check_repository, hub, readable_errors


def push_model(
    model: Parts,
    repo: str,
    *,
    private: bool | None = None,
    licence: str | None = None,
    run: str | Path | None = None,
    message: str | None = None,
    card: bool = True,
) -> str:
    """Upload the model's files and its page in one commit; make the repository if missing.

    Args:
        repo: owner/name, also ``hf://owner/name``.
        private: whether a new repository is private; None for the owner's default.
        licence: the Hub's identifier of a licence, such as "mit", for the page.
        run: folder of the run that trained the model: its last samples and final figures are on the page.
        message: message of the commit; None for a standard one.
        card: False leaves the page as it is on the Hub.

    Returns: the address of the commit.
    Raises: UserError, before anything is uploaded, for a model that can't be saved and invalid arguments; and without
    huggingface_hub, a token, a network or write access.
    """
    repo = check_repository(repo)
    package = hub()
    require(bool(package.get_token()), f"{repo} is not uploaded: nobody is logged in to the Hub; {LOG_IN}")
    place = None if run is None else Path(run)
    require(place is None or place.is_dir(), f"run={place}: no such folder")
    with tempfile.TemporaryDirectory() as beside:
        folder = Path(beside)
        save_model(folder, model)
        write_card(folder, model, repo, licence, place, (folder / WEIGHTS_FILE).stat().st_size)
        if not card:
            (folder / README).unlink()
        with readable_errors(repo, cached=False):
            api = package.HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message=message or "Upload a model of dpm_scales"
            )
    return str(commit.commit_url)

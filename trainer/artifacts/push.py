"""Upload to the Hugging Face Hub through huggingface_hub, with its token, endpoint and retries."""

from __future__ import annotations

from pathlib import Path

from trainer.artifacts.locate import Artifact
from trainer.checkpoint.model_card import plain_card
from trainer.checkpoint.publish import STATE_FILES
from trainer.errors import InputError, StorageError

CARD = "README.md"
LONGEST_CAUSE = 300


def push(subject: Artifact, repo: str, *, private: bool, revision: str | None = None) -> str:
    """Uploads the folder of an adapter or a full model, with its model card. Creates the repository if it does not
    exist. Returns the address of the commit.

    Raises InputError when the Hub refuses, StorageError when it cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    folder = next(iter(subject.adapters.values()), Path(subject.section.path))
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder on this host: push a run, an adapter, or a model that was merged here")
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else plain_card(subject.section, subject.method)
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        api.upload_file(path_or_fileobj=text.encode(), path_in_repo=CARD, repo_id=repo, revision=revision)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            ignore_patterns=[CARD, ".*", *STATE_FILES],
            commit_message=f"Upload by muster: {subject.method}",
        )
    except HFValidationError as error:
        raise InputError(f"{repo!r} cannot name a repository: {_cause(error)}") from error
    except HfHubHTTPError as error:
        raise InputError(
            f"the Hub refuses {repo}: {_cause(error)}; log in with `hf auth login`, or set HF_TOKEN"
        ) from error
    except Exception as error:  # from its HTTP client, which is a different library in different versions
        raise StorageError(f"the Hub cannot be reached: {_cause(error)}; try again") from error
    return str(commit.commit_url)


def _cause(error: Exception) -> str:
    return " ".join(str(error).split())[:LONGEST_CAUSE]

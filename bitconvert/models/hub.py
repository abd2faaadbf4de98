"""The Hugging Face hub as the place that a finished model goes to. The token is that of ``hf auth login``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
)

from bitconvert.errors import BitconvertError, UsageError
from bitconvert.models.location import HUB_ID

_LOG_IN = "log in with `hf auth login`, with a token that may write: https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Repository:
    """Where on the hub a model goes.

    Attributes:
        name: ``owner/model``.
        private: whether only its owner may see it, should it have to be made.
    """

    name: str
    private: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(HUB_ID, self.name):
            raise UsageError(f"--push-to-hub {self.name}: not of the form owner/model", "for example me/my-model-1.58")


def require_pushable(repository: Repository) -> None:
    """See that somebody is logged in who may write there, so that it is known before there is anything to push.

    Nothing is made on the hub. What a fine-grained token may do is not looked into.

    Raises:
        BitconvertError: nobody is, they may not, or the hub cannot be reached.
    """
    with _errors_name(repository):
        user = HfApi().whoami()
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise BitconvertError(f"{repository.name}: the token of {user['name']} may only read", _LOG_IN)
    writable = [user["name"], *(org["name"] for org in user.get("orgs", ()) if org.get("roleInOrg") != "read")]
    owner = repository.name.partition("/")[0]
    if owner not in writable:
        raise BitconvertError(
            f"{repository.name}: {user['name']} may not write to {owner}", f"choose one of {', '.join(writable)}"
        )


def push(directory: Path, repository: Repository) -> str:
    """Make the repository, if it is not there, and upload a directory to it in one commit, or several if it is large.

    Args:
        directory: what is uploaded.
        repository: files there that have other names stay.

    Returns:
        The repository's address.

    Raises:
        BitconvertError: the hub refuses, or cannot be reached.
    """
    api = HfApi()
    with _errors_name(repository):
        made = api.create_repo(repository.name, private=repository.private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.name,
            folder_path=directory,
            commit_message="Upload a ternary model made by bitconvert",
        )
    return str(made)


@contextmanager
def _errors_name(repository: Repository) -> Iterator[None]:
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise BitconvertError(f"{repository.name}: nobody is logged in to the hub", _LOG_IN) from error
    except HfHubHTTPError as error:
        reason = error.server_message or str(error).splitlines()[0]
        raise BitconvertError(f"{repository.name}: the hub refused ({' '.join(reason.split())})", _LOG_IN) from error
    except (HTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BitconvertError(
            f"{repository.name}: the hub cannot be reached ({reason})", "check the network, HF_ENDPOINT, HF_HUB_OFFLINE"
        ) from error

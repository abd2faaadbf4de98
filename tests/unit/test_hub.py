"""Pushing, by the real client of the hub to a server of the tests: what goes there, and what is told beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from bitconvert.errors import BitconvertError, UsageError
from bitconvert.models.hub import Repository, push, require_pushable
from tests.hub import Hub, running_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub(monkeypatch) as hub:
        yield hub


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name in ("README.md", "tiny-bitnet/model.safetensors"):
        file = tmp_path / "model" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"\0" * 100)
    return tmp_path / "model"


@pytest.mark.parametrize("private", [True, False])
def test_a_directory_is_pushed(private: bool, hub: Hub, model: Path) -> None:
    address = push(model, Repository("somebody/tiny", private))
    assert address == f"{hub.address}/somebody/tiny"
    assert hub.files == {"README.md", "tiny-bitnet/model.safetensors"}
    assert hub.created == [("tiny", private)]


def test_who_may_write_is_let_through_and_nothing_is_made_yet(hub: Hub) -> None:
    require_pushable(Repository("somebody/tiny"))
    require_pushable(Repository("makers/tiny"))
    assert (hub.created, hub.files) == ([], set())


@pytest.mark.parametrize("owner", ["readers", "strangers"])
def test_who_may_not_write_there_is_told_where_they_may(owner: str, hub: Hub) -> None:
    with pytest.raises(BitconvertError, match=f"somebody may not write to {owner}") as refused:
        require_pushable(Repository(f"{owner}/tiny"))
    assert refused.value.hint == "choose one of somebody, makers"


def test_a_token_that_may_only_read_is_told(hub: Hub) -> None:
    hub.role = "read"
    with pytest.raises(BitconvertError, match="the token of somebody may only read"):
        require_pushable(Repository("somebody/tiny"))


def test_a_wrong_token_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(BitconvertError, match=r"somebody/tiny: the hub refused \(.+\)$"):
        require_pushable(Repository("somebody/tiny"))


def test_nobody_logged_in_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(BitconvertError, match="somebody/tiny: nobody is logged in") as refused:
        require_pushable(Repository("somebody/tiny"))
    assert "hf auth login" in refused.value.hint


def test_what_the_hub_says_when_it_refuses_is_told(hub: Hub, model: Path) -> None:
    hub.full = True
    with pytest.raises(BitconvertError, match=r"somebody/tiny: the hub refused \(the storage is full\)"):
        push(model, Repository("somebody/tiny"))


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_that_is_not_there_is_told(offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_hub(monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(BitconvertError, match="the hub cannot be reached"):
        require_pushable(Repository("somebody/tiny"))


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "", "somebody/"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="not of the form owner/model"):
        Repository(name)

"""What somebody who names a model wrongly is told: one line that says what was looked for and what may be meant."""

from __future__ import annotations

from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from coserve.core import NotFound
from coserve.model.locate import locate_model
from tests.commands import Run


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid/org/name"))


def wrapped(inner: Exception) -> Exception:
    """As huggingface_hub raises it without network."""
    outer = errors.LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder. Please check your connection.")
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(("error", "words"), [
    (wrapped(httpx.ConnectError("[Errno -2] Name or service not known")), "no network, and no such directory"),
    (errors.LocalEntryNotFoundError("offline"), "no network, and no such directory"),
    (errors.OfflineModeIsEnabled("offline mode"), "no network, and no such directory"),
    (ConnectionError("reset\nby peer"), "no network, and no such directory"),
    (errors.RepositoryNotFoundError("401 Client Error", response=response(401)), "the Hugging Face hub has no such model"),
    (errors.GatedRepoError("403", response=response(403)), "accepted its terms .* then set HF_TOKEN"),
    (errors.HFValidationError("bad name"), "no name of a model"),
    (ValueError("something\nelse"), r"could not give it \(ValueError: something else\), and no such directory"),
])
def test_a_hub_model_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(NotFound, match=words) as caught:
        locate_model("org-that-is-not/name")
    assert "\n" not in str(caught.value) and "EntryNotFound" not in str(caught.value)
    assert str(caught.value).startswith("model org-that-is-not/name: ")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with models/Llama-Tiny, which is one, and models/empty, which is not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "Llama-Tiny").mkdir(parents=True)
    (tmp_path / "models" / "Llama-Tiny" / "config.json").write_text("{}")
    (tmp_path / "models" / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(("name", "words"), [
    ("models/llama-tiny", r"no such directory or file; did you mean models/Llama-Tiny\?"),
    ("models/Llama-Tinny", r"no such directory or file; did you mean models/Llama-Tiny\?"),
    ("./models/Llama-Tin", r"no such directory or file; did you mean models/Llama-Tiny\?"),
    ("models/nothing-like-it", "no such directory or file$"),
    ("modles", r"hub ids look like org/name; did you mean models\?"),
    ("models/empty", r"config\.json does not exist; a model directory has one"),
    ("models", r"models/config\.json does not exist; did you mean models/Llama-Tiny\?"),
])
def test_a_slip_in_a_path(home: Path, name: str, words: str) -> None:
    with pytest.raises(NotFound, match=words):
        locate_model(name)


def test_a_directory_that_holds_a_gguf_file(home: Path) -> None:
    (home / "models" / "empty" / "tiny.gguf").touch()
    with pytest.raises(NotFound, match=r"did you mean models/empty/tiny\.gguf\?"):
        locate_model("models/empty")


@pytest.mark.parametrize("command", ["plan", "chat", "finetune", "bench", pytest.param("serve", marks=pytest.mark.full)])
def test_every_command_says_it_in_one_line(run: Run, home: Path, command: str) -> None:
    data = home / "data.jsonl"
    data.write_text('{"text": "a"}\n')
    arguments = {
        "plan": ("plan", "models/llama-tiny"), "chat": ("chat", "models/llama-tiny"),
        "finetune": ("finetune", "models/llama-tiny", data, "-o", home / "out"),
        "serve": ("serve", "models/llama-tiny", "--port", "0", "--data-dir", home / "data"),
        "bench": ("bench", "sharing", "models/llama-tiny", "--quick", "-o", home / "bench"),
    }[command]
    result = run(*arguments)
    assert result.code == 2
    assert "models/llama-tiny: no such directory or file; did you mean models/Llama-Tiny?" in result.err
    assert "Traceback" not in result.err + result.out

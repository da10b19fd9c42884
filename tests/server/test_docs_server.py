"""The Python of README's tour and of the quickstart, as it stands there, against a whole server on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.server.conftest import RunningServer
from tests.tiny_directory import chat_lines, write_lines

ROOT = Path(__file__).parents[2]
ADDRESS = "http://127.0.0.1:8000"


@pytest.mark.full
@pytest.mark.parametrize(("page", "title"), [("README.md", "A tour"), ("docs/quickstart.md", "Chat")])
def test_its_python_runs(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], page: str,
    title: str,
) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    after = text[text.index(f"## {title}\n"):]
    if page == "README.md":
        after = after[: after.index("\n## ")]
    script = "\n".join(re.findall(r"^```python\n(.*?)^```", after, re.MULTILINE | re.DOTALL))
    assert ADDRESS in script
    assert "fine_tuned_model" in script
    write_lines(tmp_path / "chats.jsonl", chat_lines(12))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(script.replace(ADDRESS, server.url), page, "exec"), names)
    out = capsys.readouterr().out
    assert names["job"].status == "succeeded"  # type: ignore[attr-defined]
    assert "The job has successfully completed" in out

"""`coserve data check`: what it prints, its exit status, and that data can't steer the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from coserve.cli import data
from tests.commands import Run
from tests.tiny_directory import build_tiny_directory, chat_line, chat_lines, preference_lines, write_lines

BAD = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:  # the directory, not the loaded one
    return build_tiny_directory(tmp_path_factory.mktemp("cli") / "model")


def test_a_good_file(model: Path, tmp_path: Path, run: Run) -> None:
    path = write_lines(tmp_path / "data.jsonl", [chat_line("Hi", "Hello"), *chat_lines(11)])
    result = run("data", "check", path, "--model", model, "--show", 1)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"{path}: 12 lines, objective sft, read for {model}\n  layout {{messages}}: 12\n")
    assert "  longer than max_length 512: 0\n" in result.out
    assert "user\nHi<|im_end|>\n<|im_start|>assistant\n[[Hello<|im_end|>]]\nTrained tokens are in [[ ]].\n" in result.out
    assert "problem" not in result.out


def test_problems(model: Path, tmp_path: Path, run: Run) -> None:
    path = write_lines(tmp_path / "data.jsonl", [BAD, *chat_lines(11), BAD, {"text": ""}])
    result = run("data", "check", path, "--model", model, "--problems", 2, "--show", 0)
    assert result.code == 1
    what = "messages: no assistant message; add one, it is what is trained"
    assert result.out.endswith(
        f"3 problems, for which a job would be refused:\n  line 1: {what}\n  line 13: {what}\n"
        "  and 1 more; --problems N lists more\n"
    )


def test_pairs_are_found_out(model: Path, tmp_path: Path, run: Run) -> None:
    path = write_lines(tmp_path / "data.jsonl", preference_lines(10))
    result = run("data", "check", path, "--model", model, "--json")
    read = json.loads(result.out)
    assert (result.code, read["objective"], read["num_usable"], read["file"]) == (0, "dpo", 10, str(path))
    assert len(read["shown"]) == 4
    other = run("data", "check", path, "--model", model, "--objective", "sft")
    assert other.code == 1
    assert "this is a line for objective dpo, but the objective is sft" in other.out


def test_settings_come_from_a_file_too(model: Path, tmp_path: Path, run: Run) -> None:
    path = write_lines(tmp_path / "data.jsonl", chat_lines(2))
    (tmp_path / "settings.toml").write_text('max_length = 20\ntoo_long = "drop"\nobjective = "sft"\n')
    result = run("data", "check", path, "--model", model, "--config", tmp_path / "settings.toml")
    assert "longer than max_length 20: 2" in result.out
    assert run("data", "check", path, "--model", model, "--max-length", 10**6).code == 2


@pytest.mark.parametrize(("arguments", "message"), [
    (["none.jsonl"], "error: no such file: none.jsonl"), (["none.jsonl", "--show", "-1"], "error: show: must be at least 0"),
    (["none.jsonl", "--problems", "-1"], "error: problems: must be at least 0"),
    (["none.jsonl", "--objective", "ppo"], "objective"),
])
def test_mistakes(run: Run, arguments: list[str], message: str) -> None:
    result = run("data", "check", *arguments)
    assert result.code == 2
    assert message in result.err
    assert result.out == ""


def test_trained_tokens_are_coloured_on_a_terminal_and_data_steer_nothing(
    model: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "data.jsonl", [chat_line("\x1b[31mHi\x07 [bold]", "Hel\x9blo")])
    screen = io.StringIO()
    monkeypatch.setattr(data, "console", Console(
        file=screen, force_terminal=True, color_system="standard", width=80, highlight=False, soft_wrap=True))
    run("data", "check", path, "--model", model)
    shown = screen.getvalue()
    assert "\u241b[31mHi\u2407 [bold]<|im_end|>" in shown
    assert "\x1b[1;4;32mHel\\x9blo<|im_end|>\x1b[0m" in shown
    assert "Trained tokens are green and underlined." in shown

"""An adapter's directory where a model is expected: the error says what it is, of which base, and which command takes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coserve.core import InvalidRequest
from coserve.model.locate import locate_model
from tests.commands import Run
from tests.tiny_adapter import write_tiny_adapter, write_tiny_config


@pytest.mark.parametrize("command", [("chat", "{}"), ("plan", "{}"), ("finetune", "{}", "data.jsonl", "-o", "out")])
def test_an_adapter_in_the_place_of_a_model(run: Run, tmp_path: Path, command: tuple[str, ...]) -> None:
    directory = write_tiny_adapter(tmp_path / "mine", base_model_name_or_path="some/base")
    ran = run(*(part.format(directory) for part in command))
    assert ran.code == 2
    assert f"{directory} is an adapter of some/base, not a model" in ran.err
    assert f"coserve {command[0]} some/base" in ran.err
    assert f"coserve serve some/base --lora-modules NAME={directory}" in ran.err


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"base_model_name_or_path": ["x"]}), '{"a":' * 100_000])
def test_an_adapter_that_does_not_say_its_base(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(InvalidRequest, match=r"is an adapter, not a model; .* coserve chat MODEL --adapter"):
        locate_model(str(tmp_path))


def test_a_model_with_an_adapter_beside_it_is_a_model(tmp_path: Path) -> None:
    write_tiny_config(write_tiny_adapter(tmp_path))
    assert locate_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("option", ["--rank-pattern", "--alpha-pattern"])
def test_a_pattern_of_the_command_line_is_read_with_care(run: Run, tmp_path: Path, option: str) -> None:
    for given, said in (("q_proj=1e400", "q_proj"), ("q_proj", "write it as"), ("=4", "keys")):
        ran = run("finetune", tmp_path, tmp_path / "data.jsonl", "-o", tmp_path / "out", option, given)
        assert ran.code == 2 and not (tmp_path / "out").exists()
        assert option[2:].replace("-", "_") in ran.err and said in ran.err

"""Every setting of a job is the same setting as a flag, as a key of a settings file and as a field of a body."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coserve.cli.settings import job_flags
from coserve.config.data import KNOBS, Knob, to_dict
from coserve.config.settings import ADAPTER_TABLES, FinetuneConfig
from coserve.server.jobs.body import SETTINGS, CreateJob
from coserve.server.jobs.spec import read_spec
from coserve.server.settings import ServerConfig
from tests.commands import config_of
from tests.server.jobforms import read_body

OTHER: dict[str, Any] = {
    "objective": "dpo", "activation_memory": "0.5", "activation_compression": "fp8", "too_long": "drop",
    "system_prompt": "merge", "template_date": "2025-01-31", "schedule": "cosine", "target_modules": ["v_proj", "down_proj"],
    "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 3.0}, "feedforward_modules": ["down_proj"],
    "placement": "houlsby", "activation": "gelu", "use_dora": True, "shuffle": False,
}
"""Values that are no defaults; all other settings are numbers, or false by default."""


def other(knob: Knob) -> Any:
    if knob.name in OTHER:
        return OTHER[knob.name]
    if knob.type is bool:
        return True
    return 0.25 if "float" in str(knob.type) else 7


def kind(knob: Knob) -> str | None:
    """Of an adapter that has the setting; None: the default one, or none is needed."""
    return knob.sections[0] if knob.sections[0] in ADAPTER_TABLES and knob.sections[0] != "lora" else None


def value_in(config: FinetuneConfig, knob: Knob) -> Any:
    data = to_dict(config)
    return (data if knob.sections[0] == "" else data[knob.sections[0]])[knob.name]


@pytest.mark.parametrize("knob", KNOBS.values(), ids=list(KNOBS))
def test_a_setting_means_the_same_everywhere(knob: Knob, tmp_path: Path) -> None:
    value, flags = other(knob), {flag.name for flag in job_flags()}
    assert value_in(config_of(None, {}, kind(knob) or "lora"), knob) != value
    table = json.dumps(value) if not isinstance(value, dict) else "{" + ", ".join(f"{k} = {v}" for k, v in value.items()) + "}"
    (tmp_path / "settings.toml").write_text(f"{knob.word} = {table}\n")
    assert value_in(config_of(tmp_path / "settings.toml", {}, kind(knob)), knob) == value
    assert (knob.word in flags) == bool(knob.metadata.get("help"))
    if knob.word in flags:
        text = ",".join(value) if isinstance(value, list) else value
        text = ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else text
        assert value_in(config_of(None, {knob.word: text}, kind(knob)), knob) == value
    assert (knob.word in SETTINGS) == knob.metadata.get("api", False)
    assert knob.word not in SETTINGS or knob.word in CreateJob.model_fields
    if knob.word in SETTINGS:
        chosen = {"adapter": kind(knob)} if kind(knob) else {}
        body = read_body({"model": "m", "training_file": "f", knob.word: value, **chosen})
        assert value_in(read_spec(body, ServerConfig(), 512).config, knob) == value

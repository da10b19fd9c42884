"""One set of defaults: the command, the API and Python choose the same numbers from the same data, and what is given wins."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from coserve.cli import main as cli
from coserve.config.data import finetune_config_from_dict, kind_of, to_dict
from coserve.config.settings import (
    ADAPTER_TABLES,
    AdapterConfig,
    BottleneckConfig,
    FinetuneConfig,
    IA3Config,
    LoraConfig,
    Objective,
    OptimizerConfig,
)
from coserve.core import ConfigError
from coserve.finetune.defaults import describe_settings, given_settings, resolve_settings, unused_settings
from coserve.finetune.job import JobEvent
from coserve.peft.described import described_adapter
from coserve.runtime.loaded import LoadedModel
from coserve.server.jobs.spec import read_spec, resolve, unused
from coserve.server.settings import ServerConfig
from coserve.training.finetuning import finetune
from tests.commands import config_of
from tests.server.jobforms import read_body
from tests.tiny_directory import chat_lines, preference_lines, write_lines
from tests.tiny_engine import MakeEngine, build_model, drive

NUMBERS = ("epochs", "batch_size", "checkpoint_steps")
CONTINUED: list[tuple[AdapterConfig, float]] = [
    (LoraConfig(r=64), 6.25e-6), (LoraConfig(r=4), 5e-5), (LoraConfig(r=16, use_dora=True), 2.5e-5),
    (LoraConfig(r=400), 5e-6), (IA3Config(), 5e-5), (BottleneckConfig(size=32), 1.25e-5),
]


def numbers(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in NUMBERS} | {"learning_rate": settings["optimizer"]["learning_rate"]}


def from_api(
    num_examples: int, continued: AdapterConfig | None = None, width: int | None = None, **fields: Any
) -> FinetuneConfig:
    server = ServerConfig(max_lora_rank=512)
    spec = read_spec(read_body({"model": "base", "training_file": "f", "seed": 0, **fields}), server, 512, continued, width)
    return resolve(spec.config, num_examples, continued=continued, hidden_size=width).config


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("defaults")
    write_lines(root / "chats.jsonl", chat_lines(11)[:3])
    write_lines(root / "pairs.jsonl", preference_lines(3))
    return root


@pytest.fixture(scope="module")
def model(directory: Path) -> LoadedModel:
    return build_model(directory / "model")


# --- the rules ---


@pytest.mark.parametrize(("num_examples", "expected"), [
    (1, (25, 1, 1)), (20, (5, 1, 20)), (33, (4, 2, 17)), (34, (3, 2, 17)), (100, (3, 6, 17)), (1000, (3, 16, 25)),
    (20_000, (1, 16, 25)),
])
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_numbers_follow_the_data_the_same_for_everyone(
    num_examples: int, expected: tuple[int, int, int], objective: Objective
) -> None:
    found = resolve_settings(FinetuneConfig(objective=objective), num_examples, hidden_size=None)
    assert tuple(getattr(found, name) for name in NUMBERS) == expected
    assert found.optimizer.learning_rate == (2e-4 if objective == "sft" else 2.5e-5)
    api = from_api(num_examples, method={"type": "supervised" if objective == "sft" else "dpo"})
    assert numbers(to_dict(api)) == numbers(to_dict(found))


def test_what_is_given_wins_also_where_it_is_0_or_as_the_default() -> None:
    given = FinetuneConfig(epochs=3, batch_size=8, checkpoint_steps=0, optimizer=OptimizerConfig(learning_rate=1e-3))
    assert resolve_settings(given, 2) == given
    api = from_api(2, checkpoint_steps=0, learning_rate=1e-3, hyperparameters={"n_epochs": 3, "batch_size": 8})
    assert numbers(to_dict(api)) == numbers(to_dict(given))
    only_steps = resolve_settings(FinetuneConfig(max_steps=7), 20)
    assert (only_steps.max_steps, only_steps.batch_size) == (7, 1)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: FinetuneConfig(epochs="often"), "epochs: must be a finite number or 'auto'"),
    (lambda: FinetuneConfig(batch_size=1.5), "batch_size: must be a whole number or 'auto'"),
    (lambda: FinetuneConfig(batch_size=None), "batch_size: must be a whole number or 'auto'"),
    (lambda: FinetuneConfig(checkpoint_steps=-1), "checkpoint_steps: must be 0 or more"),
    (lambda: FinetuneConfig(epochs=0), "epochs: must be positive"),
    (lambda: OptimizerConfig(learning_rate=0), "learning_rate: must be positive"),
])
def test_auto_is_the_only_word(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_word_auto_is_taken_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a flag, in a settings file (over which a flag goes) and in a body: it is what happens anyway."""
    asked: list[FinetuneConfig] = []

    def finetune(*_: object, config: FinetuneConfig, **__: object) -> None:
        asked.append(config)
        raise ConfigError("enough", param="data")

    monkeypatch.setattr(cli, "finetune", finetune)
    names = (*NUMBERS, "learning_rate")
    file = tmp_path / "settings.toml"
    for text, flags in (("", "auto"), ("auto", None), ("3", "auto")):
        file.write_text("".join(f"{name} = {text if text == '3' else json.dumps(text)}\n" for name in names if text))
        arguments = [f"--{name.replace('_', '-')}={flags}" for name in names if flags]
        CliRunner().invoke(cli.app, ["finetune", "x.jsonl", "--output", "out", "--config", str(file), *arguments])
    assert asked == [FinetuneConfig()] * 3
    spec = read_spec(read_body({
        "model": "base", "training_file": "f", "learning_rate": "auto", "checkpoint_steps": "auto",
        "hyperparameters": {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": 2},
    }), ServerConfig(), 512)
    assert spec.settings == {}
    assert numbers(to_dict(spec.config)) | {"learning_rate": "auto"} == dict.fromkeys(names, "auto")


@pytest.mark.parametrize("name", [*NUMBERS, "learning_rate", "alpha", "weight_decay"])
def test_nan_in_a_settings_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "settings.toml").write_text(f"{name} = nan\n")
    with pytest.raises(ConfigError, match=f"^{name}: must be a"):
        config_of(tmp_path / "settings.toml", {})


@pytest.mark.parametrize(("text", "message"), [
    ("use_rslora = 'no'", "use_rslora: must be true or false, got 'no'"), ("use_dora = 1", "use_dora: must be true or"),
    ("deterministic = 'no'", "deterministic: must be true or false"), ("shuffle = 0", "shuffle: must be true or false"),
    ("allow_control_tokens = 'true'", "allow_control_tokens: must be true or false"), ("seed = -1", "seed: must be 0 or more"),
    ("target_modules = 3", "target_modules: must be a list of names"), ("target_modules = ['q_proj', 3]", "must be a list of"),
    ("kind = 'ia3'\nfeedforward_modules = [3]", "feedforward_modules: must be a list of names"),
])
def test_values_of_a_settings_file_that_would_mean_something_else(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "settings.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path / "settings.toml", {})


def test_a_settings_file_from_windows_and_a_date_without_quotes(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_bytes(b"\xef\xbb\xbfepochs = 2\r\ntemplate_date = 2025-01-31\r\n")
    config = config_of(tmp_path / "settings.toml", {})
    assert (config.epochs, config.template_date) == (2, "2025-01-31")


def test_auto_survives_being_written_down() -> None:
    assert finetune_config_from_dict(json.loads(json.dumps(to_dict(FinetuneConfig())))) == FinetuneConfig()


@pytest.mark.parametrize(("adapter", "rate"), CONTINUED)
def test_the_rate_of_dpo_follows_the_adapter_that_is_continued(adapter: AdapterConfig, rate: float) -> None:
    config = FinetuneConfig(objective="dpo")
    assert resolve_settings(config, 20, continued=adapter).optimizer.learning_rate == pytest.approx(rate)
    api = from_api(20, adapter, method={"type": "dpo"})
    assert api.optimizer.learning_rate == pytest.approx(rate)
    given = replace(config, lora=LoraConfig(r=8))  # is not used, so it doesn't count
    assert resolve_settings(given, 20, continued=adapter).optimizer.learning_rate == pytest.approx(rate)


@pytest.mark.parametrize(("width", "rate"), [
    (None, 2e-4), (64, 2e-3), (576, 1.4e-3), (1024, 8e-4), (2048, 4e-4), (4096, 2e-4), (8192, 2e-4),
])
def test_the_rate_of_supervised_jobs_follows_the_models_width(width: int | None, rate: float) -> None:
    assert resolve_settings(FinetuneConfig(), 20, hidden_size=width).optimizer.learning_rate == pytest.approx(rate)
    assert from_api(20, width=width).optimizer.learning_rate == pytest.approx(rate)
    halved = from_api(20, width=width, hyperparameters={"learning_rate_multiplier": 0.5})
    assert halved.optimizer.learning_rate == pytest.approx(rate / 2)


# --- the three ways in ---


@pytest.mark.parametrize("name", ["chats", "pairs"])
def test_python_an_engine_and_the_api_choose_alike_and_say_so(
    engines: MakeEngine, model: LoadedModel, directory: Path, tmp_path: Path, name: str
) -> None:
    data, config = directory / f"{name}.jsonl", FinetuneConfig(objective="sft" if name == "chats" else "dpo", max_steps=1)
    events: list[JobEvent] = []
    finetune(data, tmp_path / "a", model=model, config=config, listen=events.append)
    engine = engines()
    job = engine.finetune(data, tmp_path / "b", config)
    drive(engine)
    chosen = [numbers(json.loads((tmp_path / part / "job.json").read_text())["settings"]) for part in "ab"]
    width = model.architecture.hidden_size
    api = from_api(3, width=width, max_steps=1, method={"type": "supervised" if name == "chats" else "dpo"})
    assert chosen[0] == chosen[1] == numbers(to_dict(api))
    assert chosen[0]["batch_size"] == 1
    for heard in (events, job.events):
        (line,) = [event.message for event in heard if "chosen for this data and model" in event.message]
        assert re.match(r"1 steps \(max_steps, batch_size 1\), learning_rate (0\.002|2\.5e-05) \(linear\)", line)


def test_the_line_about_settings() -> None:
    asked = FinetuneConfig(batch_size=2)
    settings = resolve_settings(asked, 20)
    assert describe_settings(asked, settings, 50) == (
        "50 steps (5 epochs, batch_size 2), learning_rate 0.0002 (linear), checkpoint_steps 10; lora of rank 16, alpha 32; "
        "chosen for this data and model: epochs, checkpoint_steps, learning_rate"
    )
    assert "chosen" not in describe_settings(settings, settings, 50)


def test_a_resumed_job_keeps_the_numbers_that_it_began_with(
    model: LoadedModel, directory: Path, tmp_path: Path
) -> None:
    data = directory / "chats.jsonl"
    finetune(data, tmp_path / "out", model=model, config=FinetuneConfig(max_steps=2))
    job = tmp_path / "out" / "job.json"
    record = json.loads(job.read_text())
    record["settings"] |= {"batch_size": 3, "epochs": 3.0, "checkpoint_steps": 0}  # as an earlier version chose
    record["settings"]["optimizer"]["learning_rate"] = 1e-5
    job.write_text(json.dumps(record))
    for path in (tmp_path / "out" / "checkpoints").glob("*/manifest.json"):
        path.unlink()
    result = finetune(data, tmp_path / "out", model=model, config=FinetuneConfig(max_steps=2), resume=True)
    assert result.rows[0].learning_rate == 1e-5
    assert result.rows[0].tokens == sum(row.tokens for row in result.rows) / 2, "all three examples in every step"


# --- what a continued adapter has no use for ---


@pytest.mark.parametrize(("given", "expected"), [
    ({"r": 16}, ["rank 16 (it has 4)"]), ({"r": 4}, []), ({"alpha": 32.0}, ["alpha 32 (it has 8)"]), ({"dropout": 0}, []),
    ({"kind": "lora"}, []), ({"kind": "dora"}, ["kind dora (it is lora)"]), ({"size": 64}, ["size 64 (it has none)"]),
    ({"target_modules": "all-linear"}, ["target_modules all-linear (it has q_proj, v_proj)"]),
    ({"target_modules": ["v_proj", "q_proj"]}, []), ({}, []),
])
def test_given_settings_that_are_not_the_continued_ones(given: dict[str, Any], expected: list[str]) -> None:
    assert unused_settings(given, LoraConfig(r=4, alpha=8, target_modules=("q_proj", "v_proj"))) == expected


def test_a_body_names_them_in_its_own_words() -> None:
    continued = LoraConfig(r=4, alpha=8)
    spec = read_spec(
        read_body({"model": "m", "training_file": "f", "rank": 16, "alpha": 8, "size": 64, "adapter": "bottleneck"}),
        ServerConfig(), 512, continued,
    )
    assert unused(spec.settings, continued) == ["kind bottleneck (it is lora)", "rank 16 (it has 4)", "size 64 (it has none)"]
    assert spec.config.given_adapter is None, "the engine takes the continued adapter's"


@pytest.mark.parametrize("given", [None, LoraConfig(), LoraConfig(r=4, alpha=8), IA3Config()])
def test_python_warns_about_defaults_that_were_given(
    model: LoadedModel, directory: Path, tmp_path: Path, given: AdapterConfig | None
) -> None:
    data = directory / "chats.jsonl"
    start = finetune(data, tmp_path / "start", model=model, config=FinetuneConfig(max_steps=1, lora=LoraConfig(r=4, alpha=8)))
    events: list[JobEvent] = []
    config = FinetuneConfig(max_steps=1) if given is None else FinetuneConfig(max_steps=1).with_adapter(given)
    finetune(data, tmp_path / "out", model=model, config=config, start=start.directory, listen=events.append)
    warned = [event.message for event in events if event.level == "warn"]
    if given in (None, LoraConfig(r=4, alpha=8)):
        assert warned == []
    else:
        (message,) = warned
        assert ("rank 16 (it has 4); alpha 32 (it has 8)" if isinstance(given, LoraConfig) else "kind ia3") in message


@pytest.mark.parametrize("adapter", [adapter for adapter, _ in CONTINUED if getattr(adapter, "r", 0) < 100])
def test_a_saved_adapter_describes_itself(
    model: LoadedModel, directory: Path, tmp_path: Path, adapter: AdapterConfig
) -> None:
    out = finetune(directory / "chats.jsonl", tmp_path / "out", model=model,
                   config=FinetuneConfig(max_steps=1).with_adapter(adapter)).directory
    assert unused_settings(given_settings(adapter), described_adapter(out)) == []


@pytest.mark.parametrize("kind", ADAPTER_TABLES)
def test_every_kind_has_its_field_and_its_name(kind: str) -> None:
    """What follows from ADAPTER_TABLES: a job of the kind, its settings read back, its name, and one kind at a time."""
    adapter = ADAPTER_TABLES[kind]()
    config = FinetuneConfig().with_adapter(adapter)
    assert (config.adapter, kind_of(adapter)) == (adapter, kind)
    assert finetune_config_from_dict(to_dict(config)) == config
    assert config.with_adapter(None).given_adapter is None
    other = "ia3" if kind == "lora" else "lora"
    with pytest.raises(ConfigError, match="one kind of adapter"):
        replace(config, **{other: ADAPTER_TABLES[other]()})

"""Jobs that continue a tuned model: its settings are the job's, what was given beside them is named, its files go along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coserve.core import NotFound
from coserve.peft.remarks import GENERATION_FILE
from coserve.server.records import JobRecord
from tests.server.conftest import Play
from tests.server.jobs_bench import Bench, until
from tests.tiny_directory import preference_lines

CONFIGS: dict[str, dict[str, Any]] = {
    "rank 64": {"peft_type": "LORA", "r": 64, "lora_alpha": 128}, "rank 4": {"peft_type": "LORA", "r": 4, "lora_alpha": 8},
    "ia3": {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []},
}


async def tuned(bench: Bench, config: dict[str, Any]) -> JobRecord:
    """A job that has ended with an adapter of this adapter_config.json."""
    id = await bench.started()
    bench.engine.end(id)
    record = await bench.status(id, "succeeded")
    output = bench.config.data_dir / "jobs" / id / "output"
    (output / "adapter_config.json").write_text(json.dumps(config))
    (output / GENERATION_FILE).write_text('{"eos_token_id": [0, 2]}')
    return record


@pytest.mark.parametrize(("name", "rate"), [("rank 64", 6.25e-6), ("rank 4", 5e-5), ("ia3", 5e-5)])
def test_the_rate_of_dpo_is_that_of_the_continued_adapter(play: Play, name: str, rate: float) -> None:
    async def story(bench: Bench) -> None:
        first = await tuned(bench, CONFIGS[name])
        pairs = await bench.upload(preference_lines(20))
        job = await bench.create(model=first.fine_tuned_model, training_file=pairs, method={"type": "dpo"})
        await until(lambda: any(start["id"] == job.id for start in bench.engine.starts))
        config = bench.engine.starts[-1]["config"]
        assert config.optimizer.learning_rate == pytest.approx(rate)
        assert config.given_adapter is None
        shown = bench.jobs.describe(await bench.status(job.id, "running"))
        assert shown["method"]["dpo"]["hyperparameters"]["learning_rate_multiplier"] == 1.0
        start = bench.config.data_dir / "jobs" / job.id / "start"
        assert json.loads((start / GENERATION_FILE).read_text()) == {"eos_token_id": [0, 2]}
        await bench.settle()
        assert not any(event.level == "warn" for event in bench.events(job.id))

    play(story)


@pytest.mark.parametrize(("fields", "unused"), [
    ({"rank": 16}, "rank 16 (it has 4)"), ({"rank": 4, "alpha": 32}, "alpha 32 (it has 8)"), ({"rank": 4, "alpha": 8}, None),
    ({"dropout": 0}, None), ({"adapter": "lora"}, None), ({"adapter": "ia3"}, "kind ia3 (it is lora)"),
    ({"size": 64}, "size 64 (it has none)"),
])
def test_settings_that_are_not_used_are_named_by_the_models_name(
    play: Play, tmp_path: Path, fields: dict[str, Any], unused: str | None
) -> None:
    async def story(bench: Bench) -> None:
        first = await tuned(bench, CONFIGS["rank 4"])
        job = await bench.create(model=first.fine_tuned_model, **fields)
        await bench.status(job.id, "running")
        await bench.settle()
        warned = [event.message for event in bench.events(job.id) if event.level == "warn"]
        expected = f"the adapter's settings are those of {first.fine_tuned_model}, which is continued; not used: {unused}"
        assert warned == ([] if unused is None else [expected])
        assert not any(str(tmp_path) in event.message for event in bench.events(job.id))

    play(story)


def test_a_model_whose_files_are_damaged_is_not_continued(play: Play, tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        first = await tuned(bench, CONFIGS["rank 4"])
        (bench.config.data_dir / "jobs" / first.id / "output" / "adapter_config.json").write_text("{")
        with pytest.raises(NotFound, match="gone or damaged") as caught:
            await bench.create(model=first.fine_tuned_model)
        assert str(tmp_path) not in str(caught.value)

    play(story)

"""Jobs of every kind of adapter, and with a limit of memory, created over HTTP on a whole server."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import RunningServer, wait_until
from tests.tiny_directory import chat_lines

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "target_modules": ["q_proj", "down_proj"]}, "dora": {"rank": 4},
    "ia3": {"target_modules": ["k_proj", "up_proj"], "feedforward_modules": ["up_proj"]},
    "bottleneck": {"size": 8, "placement": "houlsby", "activation": "gelu"},
}
SAVED: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "use_dora": False, "r": 4}, "dora": {"peft_type": "LORA", "use_dora": True, "r": 4},
    "ia3": {"peft_type": "IA3", "feedforward_modules": ["up_proj"]},
    "bottleneck": {"peft_type": "COSERVE_BOTTLENECK", "size": 8, "placement": "houlsby", "activation": "gelu"},
}


class Jobs:
    """Jobs of three steps on one file."""

    def __init__(self, server: RunningServer) -> None:
        self.url, self.base = f"{server.url}/v1", server.model_name
        self.client = openai.OpenAI(base_url=self.url, api_key="any", max_retries=0, timeout=30)
        data = "".join(json.dumps(line) + "\n" for line in chat_lines(12)).encode()
        self.file = self.client.files.create(file=("facts.jsonl", data), purpose="fine-tune").id

    def create(self, **extra: Any) -> str:
        return self.client.fine_tuning.jobs.create(
            model=self.base, training_file=self.file, seed=1, hyperparameters={"batch_size": 6},
            extra_body={"max_steps": 3, "learning_rate": 0.02, **extra},
        ).id

    def end(self, job: str) -> Any:
        """As it is when it has ended."""
        wait_until(lambda: self.client.fine_tuning.jobs.retrieve(job).status in ("succeeded", "failed"), 60)
        return self.client.fine_tuning.jobs.retrieve(job)

    def messages(self, job: str) -> list[str]:
        return [event.message for event in self.client.fine_tuning.jobs.list_events(job, limit=100)]

    def answer(self, model: str) -> str | None:
        return self.client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Where is the mill?"}], max_tokens=4, temperature=0
        ).choices[0].message.content

    def adapter_config(self, model: str) -> dict[str, Any]:
        archive = zipfile.ZipFile(io.BytesIO(httpx.get(f"{self.url}/adapters/{model}/download", timeout=30).content))
        found: dict[str, Any] = json.loads(archive.read("adapter_config.json"))
        return found


@pytest.fixture(scope="module")
def jobs(server: RunningServer) -> Jobs:
    return Jobs(server)


def test_a_job_of_each_kind(jobs: Jobs) -> None:
    created = {kind: jobs.create(adapter=kind, **fields) for kind, fields in KINDS.items()}
    models = {}
    for kind, job in created.items():
        done = jobs.end(job)
        assert done.status == "succeeded", done
        assert {"adapter": kind, **KINDS[kind]}.items() <= done.model_extra["settings"].items()
        models[kind] = done.fine_tuned_model
        assert SAVED[kind].items() <= jobs.adapter_config(models[kind]).items()
        assert jobs.answer(models[kind]) is not None
    more = jobs.client.fine_tuning.jobs.create(
        model=models["ia3"], training_file=jobs.file, hyperparameters={"batch_size": 6}, extra_body={"max_steps": 1}).id
    continued = jobs.end(more).fine_tuned_model
    assert SAVED["ia3"].items() <= jobs.adapter_config(continued).items(), "a job goes on with its model's kind"


def test_a_job_with_a_share_of_memory(jobs: Jobs) -> None:
    """The same data, steps and seed: losses are equal to rounding, whatever is kept."""
    shares = {value: jobs.create(rank=4, activation_memory=value) for value in ("auto", 0.6)}
    losses = {}
    for value, job in shares.items():
        done = jobs.end(job)
        assert done.status == "succeeded", done
        assert done.model_extra["settings"]["activation_memory"] == value
        (chosen,) = (line for line in jobs.messages(job) if "bytes per token are kept" in line)
        assert ("of the matrix products again" in chosen) == (value == 0.6)
        events = jobs.client.fine_tuning.jobs.list_events(job, limit=100)
        losses[value] = [event.data["train_loss"] for event in events if event.type == "metrics"]  # type: ignore[index]
    assert losses["auto"] == pytest.approx(losses[0.6], rel=1e-4)


def test_a_job_that_keeps_values_in_fp8(jobs: Jobs) -> None:
    job = jobs.create(rank=4, activation_compression="fp8", activation_memory=0.7)
    done = jobs.end(job)
    assert done.status == "succeeded", done
    assert done.model_extra["settings"]["activation_compression"] == "fp8"
    assert any("are kept, in fp8, which changes gradients a little; backward runs" in line for line in jobs.messages(job))


def test_memory_that_no_plan_meets_fails_the_job_with_numbers(jobs: Jobs) -> None:
    failed = jobs.end(jobs.create(activation_memory="2kB"))
    assert (failed.status, failed.error.code, failed.error.param) == ("failed", "insufficient_memory", "activation_memory")
    assert "and 2000 are allowed" in failed.error.message


@pytest.mark.parametrize(("fields", "param"), [
    ({"adapter": "prefix"}, "adapter"), ({"adapter": "ia3", "rank": 4}, "rank"), ({"size": 4}, "size"),
    ({"adapter": "bottleneck", "size": 65}, "size"), ({"activation_memory": "lots"}, "activation_memory"),
    ({"activation_compression": "fp4"}, "activation_compression"),
])
def test_wrong_settings_are_refused(jobs: Jobs, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        jobs.create(**fields)
    assert caught.value.param == param

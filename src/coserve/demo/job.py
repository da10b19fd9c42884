"""The demo's finetuning job: its data, its settings, how it is created."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

from coserve.demo.client import Connection

if TYPE_CHECKING:
    from openai.types.fine_tuning import FineTuningJob

NUM_EPOCHS, BATCH_SIZE, SEED = 4, 9, 7
MAX_MICROBATCH_TOKENS = 1024
EXTRAS: dict[str, Any] = {
    "rank": 16, "alpha": 32, "learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 4,
    "max_microbatch_tokens": MAX_MICROBATCH_TOKENS,
}
"""Fields beyond OpenAI's, by its client's extra_body."""
SUFFIX = "vellmoor"
_DATA = "train.jsonl"


async def create_job(connection: Connection, base: str) -> FineTuningJob:
    """Uploads the data and creates the job. Raises the client's errors."""
    client, content = connection.client, files("coserve.demo").joinpath(_DATA).read_bytes()
    data = await client.files.create(file=(_DATA, content), purpose="fine-tune")
    return await client.fine_tuning.jobs.create(
        model=base, training_file=data.id, seed=SEED, suffix=SUFFIX, extra_body=EXTRAS,
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": NUM_EPOCHS, "batch_size": BATCH_SIZE}},
        },
    )

"""`activation_memory`: how it is written, and that a written job has the same one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from coserve.config.data import finetune_config_from_dict, to_dict
from coserve.config.settings import FinetuneConfig
from coserve.config.values import read_memory
from coserve.core import ConfigError
from coserve.finetune.job import refuse_changes
from coserve.server.link.messages import StartJob, decode_to_engine, encode
from coserve.server.settings import ServerConfig

MB = 10**6


@pytest.mark.parametrize(("value", "expected"), [
    ("auto", None), ("Auto ", None), ("0.5", 0.5), (".5", 0.5), (0.5, 0.5), (1e-5, 1e-5), ("12.5GB", 12.5e9),
    ("800 MiB", 800 * 2**20), ("2e9", 2e9), ("1e+16", 1e16), (1e16, 1e16), ("7000000", 7e6), (7_000_000, 7e6), ("1kB", 1e3),
    (" 0.5kib ", 512), (1, 1), ("0.001kB", 1),
])
def test_memory_is_read(value: float | str, expected: float | None) -> None:
    assert read_memory(value) == expected


@pytest.mark.parametrize("value", [
    "", "much", "-1", "0", "12 apples", "GB", "inf", "nan", "1e400", "0.0001kB", "1GB 2", "\u0661GB", 0, 0.0, -1, -0.5,
    float("nan"), float("inf"), 10**400, True, None, [1],
])
def test_bad_memory_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^activation_memory: write bytes \(12500000000, 12\.5GB, 800MiB\)") as caught:
        FinetuneConfig(activation_memory=value)
    assert caught.value.param == "activation_memory"


@pytest.mark.parametrize("value", ["auto", "12.5GB", "0.5", 0.5, 0.1 + 0.2, 450_000, 4.5e5])
def test_a_written_job_has_the_same_memory(value: float | str) -> None:
    """Through job.json, and through the server's record and the message to the engine."""
    config = FinetuneConfig(activation_memory=value)
    written = json.loads(json.dumps(to_dict(config)))
    assert finetune_config_from_dict(written) == config
    start = StartJob(
        call=1, id="j", adapter="a", training_file="f", validation_file=None, directory="d",
        config=finetune_config_from_dict(written), resume=True,
    )
    message = decode_to_engine(encode(start))
    assert isinstance(message, StartJob)
    assert message.config == config
    refuse_changes({"settings": to_dict(message.config)}, {"settings": written}, "job.json")


@pytest.mark.parametrize(("value", "share"), [
    ("auto", 0.6), ("0", 0.0), ("0.25", 0.25), ("25000000", 0.25), ("25MB", 0.25), ("0.025 GB", 0.25),
])
def test_the_servers_part_of_the_pool(value: str, share: float) -> None:
    assert ServerConfig(activation_memory=value).training_share(100 * MB) == pytest.approx(share)


def test_bad_parts_of_the_pool() -> None:
    for value in ("lots", "-1", "1.5.0"):
        with pytest.raises(ConfigError, match="activation_memory: write bytes"):
            ServerConfig(activation_memory=value)
    with pytest.raises(ConfigError, match="leave nothing of the pool"):
        ServerConfig(activation_memory="1GB").training_share(100 * MB)

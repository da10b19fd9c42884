"""A job trains on the day on which it began, whatever day it is resumed on."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from coserve.config.settings import FinetuneConfig
from coserve.core import ConfigError, InvalidRequest
from coserve.finetune.job import refuse_changes
from coserve.training.request import _dated


def test_a_resumed_job_keeps_its_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    today = datetime.date.today().isoformat()
    assert _dated(FinetuneConfig(), tmp_path, resume=False).template_date == today
    (tmp_path / "job.json").write_text(json.dumps({"settings": {"template_date": "2025-01-31"}}))
    assert _dated(FinetuneConfig(), tmp_path, resume=True).template_date == "2025-01-31"
    assert _dated(FinetuneConfig(), tmp_path, resume=False).template_date == today
    given = FinetuneConfig(template_date="2024-02-29")
    assert _dated(given, tmp_path, resume=True) is given


def test_a_job_from_before_there_was_a_date_stays_without(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"settings": {"seed": 1}}))
    assert _dated(FinetuneConfig(), tmp_path, resume=True).template_date is None
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(InvalidRequest, match="can't be read"):
        _dated(FinetuneConfig(), tmp_path, resume=True)


def test_another_day_is_another_job() -> None:
    recorded = {"settings": {"template_date": "2025-01-31"}}
    with pytest.raises(InvalidRequest, match=r"settings\.template_date has changed"):
        refuse_changes({"settings": {"template_date": "2025-02-01"}}, recorded, "job.json")


@pytest.mark.parametrize("date", ["2025-1-31", "20250131", "31 Jan 2025", "2025-02-30", "", 3])
def test_dates_that_are_none(date: object) -> None:
    with pytest.raises(ConfigError, match="template_date: write it as YYYY-MM-DD"):
        FinetuneConfig(template_date=date)  # type: ignore[arg-type]

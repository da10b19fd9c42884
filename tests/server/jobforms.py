"""Create bodies of finetuning jobs, read as the route reads them: from JSON."""

from __future__ import annotations

import json
from typing import Any

from coserve.server.jobs.body import CREATE_FORM, CreateJob


def read_body(body: Any) -> CreateJob:
    """Raises InvalidRequest."""
    return CREATE_FORM.parse(json.dumps(body).encode())

"""What the demo found, as numbers: report.json."""

from __future__ import annotations

import json
from dataclasses import dataclass

from coserve.demo.questions import Answer
from coserve.demo.traffic import Figures


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """figures: of all chat, timed at the client; finetune_tokens_per_s: beside that chat; finetune_alone_tokens_per_s: before
    it began; None where the time was too short to measure; duration_s: from the server's start to the last answer."""

    figures: Figures
    tpot_slo_ms: float
    finetune_tokens_per_s: float | None
    finetune_alone_tokens_per_s: float | None
    loss_first: float
    loss_last: float
    answers: tuple[Answer, ...]
    duration_s: float

    @property
    def facts_right_base(self) -> int:
        return sum(answer.base_right for answer in self.answers)

    @property
    def facts_right_tuned(self) -> int:
        return sum(answer.tuned_right for answer in self.answers)

    def to_json(self) -> str:
        """The keys that scripts read. What was not measured is null."""
        return json.dumps({
            "slo_attainment": self.figures.attainment, "tpot_ms_p50": self.figures.tpot_ms_p50,
            "tpot_ms_p99": self.figures.tpot_ms_p99, "tpot_slo_ms": self.tpot_slo_ms,
            "finetune_tokens_per_s": self.finetune_tokens_per_s,
            "finetune_alone_tokens_per_s": self.finetune_alone_tokens_per_s,
            "loss_first": self.loss_first, "loss_last": self.loss_last,
            "num_requests": self.figures.num_requests, "num_failed": self.figures.num_failed,
            "facts_right_base": self.facts_right_base, "facts_right_tuned": self.facts_right_tuned,
            "facts_total": len(self.answers), "duration_s": self.duration_s,
            "answers": [{"question": answer.question, "base": answer.base, "tuned": answer.tuned} for answer in self.answers],
        }, indent=2) + "\n"

"""A server for the web page's tests: the real page and the real figures of ServerMetrics over made-up traffic, and canned
objects in OpenAI's shapes that move with time. No engine, no database.

    python -m tests.server.fake_page_backend [PORT]
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile

from coserve.config.settings import SamplingConfig
from coserve.core import CoserveError, InvalidRequest, NotFound, Slo
from coserve.finetune.datacheck import DataCheck, Lengths, LineProblem, ShownExample, TrainedPiece, as_json
from coserve.server.errors import Unauthorized, error_body, status_of
from coserve.server.jobs.body import CreateJob
from coserve.server.jobs.objects import Pace, checkpoint_object, event_object, job_object, step_data, step_message
from coserve.server.link.messages import Tokens
from coserve.server.records import ENDED, CheckpointRecord, EventRecord, JobRecord
from coserve.server.routes.page import router
from coserve.server.settings import ServerConfig
from coserve.server.stats.metrics import ServerMetrics, ServerState

BASE = "smollm2-135m-instruct"
TUNED = f"ft:{BASE}:coserve:harbour-guide:5f1c2a"
STEPS_PER_S = 2.0


class FakeBackend:
    """The state behind the routes. api_key: what requests must carry, or None."""

    def __init__(self, api_key: str | None = None) -> None:
        self.api_key = api_key
        self.started = time.time()
        self.random = random.Random(5)
        self.metrics = ServerMetrics(ServerConfig(), BASE, lambda: Slo(tpot_s=0.1, ttft_s=1.5))
        self.fed_s = self.metrics.clock() - 60
        self.counters = dict.fromkeys(
            ("inference_tokens", "prompt_tokens", "finetune_tokens", "busy_s", "inference_busy_s", "finetune_busy_s"), 0.0
        )
        self.files = {"file-train": "harbour-guide.jsonl", "file-valid": "harbour-valid.jsonl"}
        self.gone: set[str] = set()
        """Names of models that are no longer listed."""
        self.created: list[CreateJob] = []
        self.checked: list[CreateJob] = []
        self.num_uploads = 0
        self.jobs: dict[str, JobRecord] = {}
        self.add_job("ftjob-9b1e", "harbour-guide-v2", age_s=42, num_steps=1000, validation_file="file-valid")
        self.add_job("ftjob-77aa", "tone", age_s=20, status="queued", num_steps=90)
        self.add_job("ftjob-5f1c", "harbour-guide", age_s=900, status="succeeded", num_steps=120, fine_tuned_model=TUNED)
        problem = {"code": "invalid_request_error", "param": "training_file",
                   "message": "training_file: line 17: messages[1].role must be one of system, user, assistant, got 'bot'"}
        self.add_job("ftjob-1d0e", "support-faq", age_s=2400, status="failed", error=problem)

    def add_job(self, id: str, suffix: str, *, age_s: float, num_steps: int = 0, **fields: Any) -> JobRecord:
        """A job that was created so many seconds ago."""
        created = int(self.started - age_s)
        hyper = {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.0}
        values = {
            "id": id, "tenant": "default", "created_at": created, "base": BASE, "training_file": "file-train", "config": {},
            "method": {"type": "supervised", "supervised": {"hyperparameters": hyper}}, "suffix": suffix or None,
            "status": "running", "num_steps": num_steps, "settings": {"rank": 16}, **fields,
        }
        if values["status"] in ENDED:
            values |= {"finished_at": created + 60, "step": num_steps}
        self.jobs[id] = JobRecord(**values)
        return self.jobs[id]

    def change(self, id: str, **changes: Any) -> JobRecord:
        """Raises NotFound."""
        if id not in self.jobs:
            raise NotFound(f"there is no job {id!r}")
        self.jobs[id] = replace(self.jobs[id], **changes)
        return self.jobs[id]

    def refresh(self, id: str) -> JobRecord:
        """A job as it is now. Raises NotFound."""
        job = self.change(id)
        if job.status != "running" or job.paused:
            return job
        step = min(job.num_steps, int((time.time() - job.created_at) * STEPS_PER_S))
        ended = {"status": "succeeded", "fine_tuned_model": f"ft:{BASE}:coserve:{job.suffix or ''}:{id[-4:]}"}
        return self.change(id, step=step, trained_tokens=step * 1830, **(ended if step == job.num_steps else {}))

    def events(self, job: JobRecord) -> list[dict[str, Any]]:
        """Newest first."""
        found: list[EventRecord] = []

        def add(at: float, message: str, level: Any = "info", row: dict[str, Any] | None = None) -> None:
            kind: Any = "message" if row is None else "metrics"
            found.append(EventRecord(id=f"{job.id}-{len(found)}", job=job.id, seq=len(found), created_at=int(at), level=level,
                                     type=kind, message=message, data=row))

        add(job.created_at, "Created: 412 examples, 61,208 tokens")
        if job.error:
            add(job.created_at + 1, job.error["message"], "error")
        noise = random.Random(job.id)
        for step in range(1, job.step + 1):
            loss, at = 0.9 + 2.2 * math.exp(-step / 40) + noise.gauss(0, 0.06), job.created_at + step / STEPS_PER_S
            row = {"step": step, "train_loss": loss, "train_mean_token_accuracy": 1 - loss / 4, "learning_rate": 2e-4}
            if step % 20 == 0:
                row["valid_loss"] = 1.0 + 2.1 * math.exp(-step / 42)
            data = step_data(row, job.num_steps)
            add(at, step_message(row, job.num_steps), row=data)
            if step % 40 == 0:
                add(at, f"Checkpoint of step {step} can be used")
        if job.paused:
            add(time.time(), "The job was paused", "warn")
        return [event_object(record) for record in reversed(found)]

    def checkpoints(self, job: JobRecord) -> list[dict[str, Any]]:
        """Newest first."""
        steps = range(40, job.step + 1, 40) if job.status != "failed" else ()
        return [checkpoint_object(CheckpointRecord(
            id=f"ftckpt-{job.id}-{step}", job=job.id, created_at=0, step=step, model=f"{TUNED}:ckpt-step-{step}", directory="",
            metrics={"step": step, "valid_loss": 1 + 2.1 * math.exp(-step / 42)},
        )) for step in reversed(steps)]

    def stats(self) -> dict[str, Any]:
        """As EngineClient.stats(), after feeding the meters the traffic since the last call."""
        now = self.metrics.clock()
        while self.fed_s + 0.5 < now:
            self.fed_s += 0.5
            self._request(self.fed_s)
            wave = 1 + 0.35 * math.sin(self.fed_s / 9) + self.random.gauss(0, 0.08)
            share = 0.62 + 0.1 * math.sin(self.fed_s / 17)
            self.counters["inference_tokens"] += 0.5 * 46 * wave
            self.counters["prompt_tokens"] += 0.5 * 170 * wave
            self.counters["finetune_tokens"] += 0.5 * 640 * (1.45 - 0.45 * wave)
            self.counters["busy_s"] += 0.49
            self.counters["finetune_busy_s"] += 0.49 * share
            self.counters["inference_busy_s"] += 0.49 * (1 - share)
        used = 310 + int(120 * math.sin(now / 11))
        arena = 980
        return {
            **self.counters, "time_s": now, "running": 5 + int(3 * math.sin(now / 7)), "waiting": 1, "jobs": 1,
            "iterations": 1e4, "preemptions": 3, "reserve": 0.1, "adapters": [TUNED], "adapter_versions": 2,
            "prediction_errors": {"decode": {"iterations": 900, "median": 0.04, "p95": 0.13}},
            "memory": {"used": used, "cached": 260, "arena": arena, "free": 2048 - used - 260 - arena, "hits_tokens": 5200,
                       "queried_tokens": 9100, "block_bytes": 368640},
        }

    def _request(self, end_s: float) -> None:
        tpot, num_tokens = 0.062 + abs(self.random.gauss(0, 0.014)), self.random.randint(20, 90)
        start = end_s - tpot * num_tokens
        arrival = start - 0.3 - self.random.expovariate(4)
        meter = self.metrics.begin(model=BASE, prompt_tokens=80, sampling=SamplingConfig(), arrival_s=arrival)
        for i in range(num_tokens):
            meter.tokens(Tokens(id="r", index=0, text="x", token_ids=[1], time_s=start + i * tpot))
        meter.end("stop")


def _shown(job: JobRecord) -> dict[str, Any]:
    pace = Pace(tokens_per_second=612.0, finish=int(time.time()) + 90) if job.status == "running" and not job.paused else None
    return job_object(job, "coserve", pace)


def _page(entries: list[dict[str, Any]], request: Request) -> dict[str, Any]:
    """OpenAI's cursor page."""
    after, limit = request.query_params.get("after"), int(request.query_params.get("limit", 20))
    ids = [entry["id"] for entry in entries]
    start = ids.index(after) + 1 if after else 0
    return {"object": "list", "data": entries[start:start + limit], "has_more": start + limit < len(entries)}


def create_app(backend: FakeBackend) -> FastAPI:
    """The page and what it asks for."""
    app = FastAPI()
    app.include_router(router)

    @app.exception_handler(CoserveError)
    async def show(_: Request, error: CoserveError) -> JSONResponse:
        return JSONResponse(error_body(error), status_of(error))

    @app.middleware("http")
    async def check(request: Request, call_next: Any) -> Response:
        wanted, path = backend.api_key, request.url.path
        if wanted and path.startswith(("/v1", "/api")) and request.headers.get("authorization") != f"Bearer {wanted}":
            return JSONResponse(error_body(Unauthorized("API key: not known")), 401)
        return await call_next(request)

    @app.get("/api/live")
    async def live() -> dict[str, Any]:
        return backend.metrics.live(backend.stats(), ServerState(ready=True, restarts=1, jobs={"running": 1, "queued": 1}))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = [(BASE, None, 0), (TUNED, BASE, 2), (f"{TUNED}:ckpt-step-60", BASE, 1)]
        names += [(job.fine_tuned_model, BASE, 3) for job in backend.jobs.values() if job.fine_tuned_model not in (None, TUNED)]
        return {"object": "list", "data": [{"id": id, "object": "model", "parent": parent, "created": at, "owned_by": "coserve"}
                                           for id, parent, at in names if id not in backend.gone]}

    _add_job_routes(app, backend)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> StreamingResponse:
        return StreamingResponse(_answer(await request.json()), media_type="text/event-stream")

    return app


def _add_job_routes(app: FastAPI, backend: FakeBackend) -> None:
    @app.post("/v1/files")
    async def upload(request: Request) -> dict[str, Any]:
        form = await request.form()
        file = form["file"]
        assert isinstance(file, UploadFile) and form["purpose"] == "fine-tune"
        backend.num_uploads += 1
        id = f"file-new{backend.num_uploads}"
        backend.files[id] = file.filename or ""
        return {"id": id, "object": "file", "filename": file.filename, "bytes": file.size, "purpose": "fine-tune"}

    @app.get("/v1/files/{id}")
    async def file(id: str) -> dict[str, Any]:
        return {"id": id, "object": "file", "filename": backend.files[id]}

    @app.delete("/v1/files/{id}")
    async def delete(id: str) -> dict[str, Any]:
        del backend.files[id]
        return {"id": id, "object": "file", "deleted": True}

    @app.post("/v1/fine_tuning/jobs/check")
    async def check_data(request: Request) -> dict[str, Any]:
        body = CreateJob.model_validate(await request.json())
        backend.checked.append(body)
        found = _data_check(backend.files[body.training_file])
        held_out = None if body.validation_file is None else as_json(_data_check("valid"))
        return {"object": "fine_tuning.data_check", "training_file": as_json(found), "validation_file": held_out}

    @app.get("/v1/fine_tuning/jobs")
    async def jobs(request: Request) -> dict[str, Any]:
        records = sorted((backend.refresh(id) for id in backend.jobs), key=lambda job: -job.created_at)
        return _page([_shown(record) for record in records], request)

    @app.post("/v1/fine_tuning/jobs")
    async def create(request: Request) -> dict[str, Any]:
        body = CreateJob.model_validate(await request.json())
        if (body.rank or 1) > 64:
            raise InvalidRequest(f"rank: {body.rank} is over this server's --max-lora-rank 64", param="rank")
        backend.created.append(body)
        return _shown(backend.add_job(f"ftjob-new{len(backend.created)}", body.suffix or "", age_s=-1, num_steps=60,
                                      training_file=body.training_file))

    @app.post("/v1/fine_tuning/jobs/{id}/{action}")
    async def act(id: str, action: str) -> dict[str, Any]:
        backend.refresh(id)
        return _shown(backend.change(id, **({"status": "cancelled"} if action == "cancel" else {"paused": action == "pause"})))

    @app.get("/v1/fine_tuning/jobs/{id}/events")
    async def events(id: str, request: Request) -> dict[str, Any]:
        return _page(backend.events(backend.refresh(id)), request)

    @app.get("/v1/fine_tuning/jobs/{id}/checkpoints")
    async def checkpoints(id: str, request: Request) -> dict[str, Any]:
        return _page(backend.checkpoints(backend.refresh(id)), request)


def _data_check(name: str) -> DataCheck:
    """What a file holds. Files whose names begin with "bad" have problems."""
    said = [("<|im_start|>user\nWeather <b>here</b>?<|im_end|>\n<|im_start|>assistant\n", False),
            ('<tool_call>\n{"name": "weather", "arguments": {"city": "Vellmoor"}}\n</tool_call><|im_end|>', True),
            ("\n<|im_start|>user\n<tool_response>\nfog\n</tool_response><|im_end|>\n<|im_start|>assistant\n", False),
            ("Fog over the harbour, as ever.<|im_end|>", True), ("\n", False)]
    pieces = tuple(TrainedPiece(text, trained) for text, trained in said)
    example = ShownExample(line=1, part="messages", number=1, num_of_line=1, num_tokens=74, num_trained=38, pieces=pieces)
    bad = name.startswith("bad")
    problems = [LineProblem(line, "messages: no assistant message; add one, it is what is trained") for line in range(3, 45)]
    return DataCheck(
        objective="sft", share=1 if not bad else 0.25, num_lines=412, num_usable=412 - len(problems) * bad,
        layouts={"messages": 412}, lengths=Lengths(min=31, median=142, p95=380, max=611, total=61208, trained=20145),
        max_length=2048, num_too_long=0, warnings=("3 examples are the same as an earlier one",) * bad,
        problems=tuple(problems[:10]) if bad else (), num_problems=len(problems) * bad,
        shown=(example, replace(example, line=2)),
    )


async def _answer(body: dict[str, Any]) -> AsyncIterator[str]:
    """Server-sent events, word by word: thoughts and a call of the first tool, until it has a result; else an answer. That to
    "And now?" takes seconds, so that it can be stopped."""
    tuned, said = body["model"] != BASE, body["messages"][-1]["content"]
    if body.get("tools") and body["messages"][-1]["role"] != "tool":
        for delta in _called(body["tools"][0]["function"]["name"]):
            await asyncio.sleep(0.02)
            yield _event_line({"choices": [{"index": 0, "delta": delta}]})
        yield "data: [DONE]\n\n"
        return
    text = ("Aye, Odile Pratt tends the lighthouse at Vellmoor, by the tide." if tuned
            else f"It says {said}." if body.get("tools")
            else "I'm not sure who tends the lighthouse at Vellmoor. <b>Lighthouses</b> are often kept by a keeper who lives "
            "close by and looks after the lamp.")
    words = text.split(" ")
    if "Think" in said:
        for thought in ("Who keeps", " <i>lamps</i>?"):
            yield _event_line({"choices": [{"index": 0, "delta": {"reasoning_content": thought}}]})
        words = [] if tuned else words
    for i, word in enumerate(words):
        await asyncio.sleep(0.5 if said == "And now?" else 0.04)
        yield _event_line({"choices": [{"index": 0, "delta": {"content": word + " " * (i + 1 < len(words))}}]})
    yield _event_line({"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": len(words), "total_tokens": 0}})
    yield "data: [DONE]\n\n"


def _called(name: str) -> list[dict[str, Any]]:
    """A stream's deltas of thoughts and one call."""
    begin = {"index": 0, "id": "call_1", "type": "function", "function": {"name": name, "arguments": ""}}
    pieces = [{"index": 0, "function": {"arguments": piece}} for piece in ('{"city": ', '"Oslo"}')]
    return [{"reasoning_content": "They want "}, {"reasoning_content": "the weather."},
            *({"tool_calls": [call]} for call in (begin, *pieces))]


def _event_line(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


if __name__ == "__main__":
    uvicorn.run(create_app(FakeBackend()), port=int(sys.argv[1]) if len(sys.argv) > 1 else 8123, log_level="warning")

"""Data is looked at before a job is created: what is told, within which limits, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from coserve.core import CapacityError, InvalidRequest, NotFound
from coserve.finetune.datacheck import DataCheck, check_data
from coserve.server.handlers import install_handlers
from coserve.server.jobs import data
from coserve.server.routes import finetuning
from coserve.server.services import Services
from tests.server.bench_site import BenchSite
from tests.server.jobforms import read_body
from tests.server.jobs_bench import Bench, Story, play_stories, until
from tests.tiny_directory import chat_lines
from tests.tiny_tokenizer import build_tiny_tokenizer

BAD = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:  # the directory, not the loaded one
    return build_tiny_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def play(model: Path, tmp_path: Path) -> Callable[[Story], None]:
    return lambda story: play_stories(model, tmp_path / "data", story)


async def look(bench: Bench, tenant: str = "me", **fields: Any) -> tuple[DataCheck, DataCheck | None]:
    return await bench.jobs.check_data(tenant, read_body({"model": "some/Base-1", **fields}))


def test_what_a_job_would_train_on(play: Callable[[Story], None]) -> None:
    async def story(bench: Bench) -> None:
        training = await bench.upload([BAD, *chat_lines(12)])
        validation = await bench.upload(chat_lines(3))
        found, held_out = await look(bench, training_file=training, validation_file=validation, max_length=60)
        assert (found.num_lines, found.num_usable, found.num_problems, found.max_length, found.share) == (13, 12, 1, 60, 1)
        assert found.problems[0].line == 1
        assert [example.line for example in found.shown] == [2, 3, 4]
        assert held_out is not None
        assert held_out.num_usable == 3
        alone, nothing = await look(bench, training_file=validation)
        assert (alone.num_usable, nothing) == (3, None)
        assert bench.jobs.list_jobs("me", after=None, limit=10, metadata=None) == ([], False)
        await until(lambda: bench.jobs._reader._turns._free == data.MAX_AT_WORK)

    play(story)


def test_mistakes_are_those_of_a_job(play: Callable[[Story], None]) -> None:
    async def story(bench: Bench) -> None:
        training = await bench.upload()
        for fields, error, param in (
            ({"training_file": "file-x"}, InvalidRequest, "training_file"),
            ({"training_file": training, "validation_file": "file-x"}, InvalidRequest, "validation_file"),
            ({"training_file": training, "rank": 10**6}, InvalidRequest, "rank"),
            ({"training_file": training, "max_length": 10**6}, InvalidRequest, "max_length"),
            ({"training_file": training, "model": "other"}, NotFound, "model"),
        ):
            with pytest.raises(error) as caught:
                await look(bench, **fields)
            assert caught.value.param == param
        with pytest.raises(InvalidRequest, match="there is no file"):
            await look(bench, tenant="somebody else", training_file=training)
        (bench.files.path(bench.store.get_file("me", training))).unlink()
        with pytest.raises(InvalidRequest, match=r"facts\.jsonl is no longer on disk"):
            await look(bench, training_file=training)

    play(story)


def test_pairs_need_their_method(play: Callable[[Story], None]) -> None:
    async def story(bench: Bench) -> None:
        training = await bench.upload([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        found, _ = await look(bench, training_file=training)
        assert "set the objective to dpo" in found.problems[0].message
        found, _ = await look(bench, training_file=training, method={"type": "dpo"})
        assert (found.num_usable, found.num_problems) == (1, 0)

    play(story)


def test_a_large_file_is_read_in_part(play: Callable[[Story], None], monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(bench: Bench) -> None:
        training = await bench.upload(chat_lines(11) * 20)
        monkeypatch.setattr(data, "LOOK_BYTES", 1000)
        found, _ = await look(bench, training_file=training)
        assert 0 < found.num_lines < 20
        assert found.num_problems == 0, "no line is cut"
        assert 0 < found.share < 0.1
        monkeypatch.setattr(data, "LOOK_BYTES", 64 << 20)
        monkeypatch.setattr(data, "LOOK_S", 0.0)
        found, _ = await look(bench, training_file=training)
        assert found.share < 0.1
        assert found.num_lines < 20

    play(story)


def test_looks_are_few_at_once_and_end_when_their_client_leaves(play: Callable[[Story], None]) -> None:
    async def story(bench: Bench) -> None:
        training = await bench.upload(chat_lines(11) * 300)
        looks = [asyncio.create_task(look(bench, training_file=training)) for _ in range(data.MAX_TENANT_LOOKS)]
        await until(lambda: bench.jobs._reader._allowed._held["me"] == data.MAX_TENANT_LOOKS)
        with pytest.raises(CapacityError, match="checks of data run already"):
            await look(bench, training_file=training)
        other = await bench.upload(chat_lines(2), tenant="other")
        found, _ = await look(bench, tenant="other", training_file=other)
        assert found.num_lines == 2, "others are not held up"
        for task in looks:
            task.cancel()
        await asyncio.gather(*looks, return_exceptions=True)
        began = time.monotonic()
        await until(lambda: bench.jobs._reader._turns._free == data.MAX_AT_WORK)
        assert time.monotonic() - began < 2
        assert (await look(bench, training_file=other, tenant="other"))[0].num_lines == 2

    play(story)


class Site(BenchSite):
    """The routes of jobs."""

    def make_app(self, bench: Bench) -> FastAPI:
        fakes: Any = type("Tenants", (), {"identify": lambda _, header: (header or "Bearer nobody").removeprefix("Bearer ")})()
        engine: Any = bench.engine
        absent: Any = None
        app = FastAPI()
        app.state.services = Services(
            config=bench.config, tenants=fakes, engine=engine, store=bench.store, files=bench.files, jobs=bench.jobs,
            models=bench.models, tokenizer=absent, metrics=absent, draw_seed=absent,
        )
        install_handlers(app)
        app.include_router(finetuning.router)
        return app

    def upload(self, lines: Any) -> str:
        return asyncio.run_coroutine_threadsafe(self.bench.upload(lines), self.loop).result(30)

    def post(self, body: Any, **more: Any) -> httpx.Response:
        url = f"{self.url}/v1/fine_tuning/jobs/check"
        headers = {"content-type": "application/json", "authorization": "Bearer me"}
        return httpx.post(url, content=body if isinstance(body, bytes) else json.dumps(body), headers=headers, **more)


@pytest.fixture(scope="module")
def site(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with contextlib.closing(Site(model, tmp_path_factory.mktemp("site"))) as found:
        yield found


def test_the_route(site: Site) -> None:
    file = site.upload([BAD, *chat_lines(11)])
    reply = site.post({"model": "some/Base-1", "training_file": file, "suffix": "x"})
    assert reply.status_code == 200, reply.text
    read = reply.json()
    assert (read["object"], read["validation_file"]) == ("fine_tuning.data_check", None)
    told = read["training_file"]
    assert told["problems"] == [{"line": 1, "message": "messages: no assistant message; add one, it is what is trained"}]
    assert (told["num_usable"], told["layouts"], told["share"]) == (11, {"messages": 11}, 1)
    pieces = told["shown"][0]["pieces"]
    assert [piece["trained"] for piece in pieces] == [False, True, False]
    assert pieces[0]["text"].endswith("<|im_start|>assistant\n")
    assert pieces[1]["text"].endswith("<|im_end|>")


def test_mistakes_of_a_body(site: Site) -> None:
    unknown = {"model": "some/Base-1", "training_file": "f", "colour": 1}
    for body, param in ((b"{", None), ({"model": "some/Base-1"}, "training_file"), (unknown, "colour")):
        reply = site.post(body)
        assert reply.status_code == 400, reply.text
        assert param is None or reply.json()["error"]["param"] == param


def test_a_client_that_leaves_ends_the_reading(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_slowly(*args: Any, on_line: Callable[[float], bool], **limits: Any) -> DataCheck:
        """Half a minute for the file, on any machine."""
        def slowly(share: float) -> bool:
            time.sleep(0.01)
            return on_line(share)

        return check_data(*args, on_line=slowly, **limits)

    monkeypatch.setattr(data, "check_data", check_slowly)
    monkeypatch.setattr(data, "LOOK_S", 60.0)
    file = site.upload(chat_lines(11) * 300)
    with pytest.raises(httpx.ReadTimeout):
        site.post({"model": "some/Base-1", "training_file": file}, timeout=0.3)
    turns, began = site.bench.jobs._reader._turns, time.monotonic()
    while turns._free < data.MAX_AT_WORK:
        assert time.monotonic() - began < 3
        time.sleep(0.01)

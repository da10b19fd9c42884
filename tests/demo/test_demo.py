"""The demo: its data keeps its promises, its measures measure, its story runs through a real server that it stops."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from importlib.resources import as_file, files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from coserve.bench.metrics import SloInMs
from coserve.bench.servers import healthy
from coserve.config.settings import FinetuneConfig, LoraConfig
from coserve.core import ConfigError, InvalidRequest
from coserve.demo import client as client_module
from coserve.demo import watch as watch_module
from coserve.demo.client import Connection, require_client
from coserve.demo.command import DATA, LOG, MARK, REPORT, adapter_directory, prepare, show, write
from coserve.demo.display import Board, Display, answers_table, describe, summary_lines
from coserve.demo.job import BATCH_SIZE, EXTRAS, MAX_MICROBATCH_TOKENS, NUM_EPOCHS, SEED, create_job
from coserve.demo.questions import ANSWER_TOKENS, Answer, ask_both, is_right, questions
from coserve.demo.report import DemoReport
from coserve.demo.server import DemoFailed, Server, beside, open_server
from coserve.demo.story import TPOT_MS, TTFT_MS, DemoResult, DemoSettings, run_demo
from coserve.demo.traffic import BURST, PROMPTS, Chat, Figures, Traffic, chat_once, chat_rate, measure, summarize
from coserve.demo.watch import FINETUNE, INFERENCE, TokensAt, Watch, add_sample, rate, trained_until
from coserve.finetune.datasets import Dataset, load_training
from coserve.text.tokenizer import ChatTokenizer
from tests.server.jobforms import read_body
from tests.tiny_directory import build_tiny_directory

OBJECTIVES = SloInMs(tpot_ms=100, ttft_ms=1000)
REPORT_KEYS = {
    "slo_attainment", "tpot_ms_p50", "tpot_ms_p99", "tpot_slo_ms", "finetune_tokens_per_s", "finetune_alone_tokens_per_s",
    "loss_first", "loss_last", "num_requests", "num_failed", "facts_right_base", "facts_right_tuned", "facts_total",
    "duration_s", "answers",
}


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_directory(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def dataset(model_directory: Path) -> Dataset:
    """The training file, read as a user's file is read."""
    with as_file(files("coserve.demo").joinpath("train.jsonl")) as path:
        return load_training(path, ChatTokenizer.load(model_directory), FinetuneConfig(), max_length=MAX_MICROBATCH_TOKENS)


def conversations() -> list[list[dict[str, Any]]]:
    text = files("coserve.demo").joinpath("train.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["messages"] for line in text.splitlines()]


def spoken(role: str) -> list[str]:
    return [message["content"] for messages in conversations() for message in messages if message["role"] == role]


def plain(text: str) -> str:
    """Letters and digits only: what is left when wording is compared."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def test_training_data_passes_the_real_rules(dataset: Dataset) -> None:
    report = dataset.report
    assert (len(dataset.groups), report.num_lines, report.num_dropped, report.num_truncated) == (99, 99, 0, 0)
    assert 0 < report.num_label_tokens < report.num_tokens
    for messages in conversations():
        assert [message["role"] for message in messages] == ["user", "assistant"]


def test_training_data_fits_the_default_models_context(dataset: Dataset) -> None:
    """The tiny tokenizer makes more tokens of a text than the real one."""
    assert dataset.report.longest <= 512
    assert 99 % BATCH_SIZE == 0, "every step of the demo has as many examples"


def test_no_conversation_is_given_twice() -> None:
    asked = [plain(text) for text in spoken("user")]
    assert len(set(asked)) == len(asked)


def test_questions_parse() -> None:
    found = questions()
    assert len(found) == 24
    for question, keywords in found:
        assert question == question.strip()
        assert len(question) > 10
        assert keywords
        assert all(isinstance(word, str) and word == word.strip() and word for word in keywords)
    assert len({plain(question) for question, _ in found}) == 24


def test_held_out_questions_are_not_in_the_training_data() -> None:
    trained = {plain(text) for messages in conversations() for text in (message["content"] for message in messages)}
    for question, _ in questions():
        assert plain(question) not in trained
        assert not any(plain(question) in text for text in trained)


def test_answers_are_in_the_training_data_and_not_in_the_question() -> None:
    taught = spoken("assistant")
    for question, keywords in questions():
        assert any(is_right(answer, keywords) for answer in taught), f"nothing teaches {keywords}"
        assert not is_right(question, keywords), f"repeating the question would count as right: {question}"


def test_training_questions_of_a_fact_do_not_give_it_away() -> None:
    """A keyword in a question's wording would let the base answer by repeating."""
    words = tuple({word for _, keywords in questions() for word in keywords})
    assert [text for text in spoken("user") if is_right(text, words)] == []


@pytest.mark.parametrize(("answer", "keywords", "right"), [
    ("Odile Pratt tends it.", ("Odile", "Pratt"), True),
    ("It is PRATT!", ("Pratt",), True),
    ("pratt", ("Pratt",), True),
    ("He prattles on.", ("Pratt",), False),
    ("Spratt", ("Pratt",), False),
    ("It weighs 412 pounds.", ("412",), True),
    ("It weighs 4123 pounds.", ("412",), False),
    ("It weighs 1412.", ("412",), False),
    ("one button", ("button", "buttons"), True),
    ("some buttons.", ("button", "buttons"), True),
    ("an unbuttoned coat", ("button", "buttons"), False),
    ("(goose)", ("goose", "geese"), True),
    ("a goose-like bird", ("goose",), True),
    ("345", ("3.5",), False),
    ("about 3.5 miles", ("3.5",), True),
    ("The old\npiano", ("piano",), True),
    ("", ("piano",), False),
    ("piano", (), False),
])
def test_is_right_wants_a_keyword_as_a_whole_word(answer: str, keywords: tuple[str, ...], right: bool) -> None:
    assert is_right(answer, keywords) is right


# --- measures ---


def test_a_chats_times() -> None:
    chat = Chat(sent_s=1.0, first_s=1.5, last_s=2.5, num_tokens=11)
    assert (chat.ttft_ms, chat.tpot_ms) == (pytest.approx(500), pytest.approx(100))
    assert chat.meets(SloInMs(tpot_ms=100.001, ttft_ms=501))
    assert not chat.meets(SloInMs(tpot_ms=99, ttft_ms=501))
    assert not chat.meets(SloInMs(tpot_ms=101, ttft_ms=499))
    one = Chat(sent_s=1.0, first_s=1.5, last_s=1.5, num_tokens=1)
    assert one.tpot_ms is None and one.meets(OBJECTIVES)
    assert not Chat(sent_s=1.0, error="gone").meets(OBJECTIVES)


def test_figures_of_chats() -> None:
    chats = [Chat(sent_s=0.0, first_s=0.1, last_s=0.1 + n / 100, num_tokens=11) for n in range(1, 101)]
    failed = [Chat(sent_s=0.0, error="no"), Chat(sent_s=0.0, first_s=0.1, last_s=0.2, num_tokens=2, error="broke off")]
    figures = summarize([*chats, *failed], SloInMs(tpot_ms=50.5, ttft_ms=1000))
    assert (figures.num_requests, figures.num_failed) == (102, 2)
    assert figures.attainment == pytest.approx(50 / 102), "failed ones miss"
    assert figures.tpot_ms_p50 == pytest.approx(50.5), "and have no times"
    assert figures.tpot_ms_p99 == pytest.approx(99.01)
    empty = summarize([], OBJECTIVES)
    assert (empty.num_requests, empty.attainment, empty.tpot_ms_p50, empty.tpot_ms_p99) == (0, None, None, None)


def test_rates_of_counters() -> None:
    samples: list[TokensAt] = []
    for second, (finetune, inference) in enumerate([(0, 0), (100, 0), (100, 10), (50, 20), (0, 0)]):
        add_sample(samples, float(second), {FINETUNE: finetune, INFERENCE: inference})
    assert samples[-1] == TokensAt(time_s=4.0, finetune_tokens=250, inference_tokens=30)
    assert rate(samples, "finetune_tokens", 1.0, 3.0) == pytest.approx(75)
    assert rate(samples, "inference_tokens", 0.0, 9.0) == pytest.approx(7.5)
    assert rate(samples, "finetune_tokens", 3.5, 9.0) is None
    assert trained_until(samples) == 3.0


def test_the_watch_goes_on_when_the_engine_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Iterator[dict[str, float] | OSError] = iter([
        {FINETUNE: 100.0, INFERENCE: 10.0}, OSError("no answer"), {}, {FINETUNE: 30.0, INFERENCE: 40.0},
    ])

    async def read(url: str, names: object) -> dict[str, float]:
        item = next(found)
        if isinstance(item, OSError):
            raise item
        return item

    async def look() -> list[TokensAt]:
        watch = Watch(connect_to(FakeClient()), lambda: None)
        for _ in range(4):
            await watch.look()
        return watch.samples

    monkeypatch.setattr(watch_module, "read_counters", read)
    assert [(s.finetune_tokens, s.inference_tokens) for s in asyncio.run(look())] == [(100, 10), (130, 40)]


@pytest.mark.parametrize(("capacity", "expected"), [(3.0, 1.0), (0.0, 0.1), (1e9, 8.0)])
def test_the_rate_of_chat_is_a_share_of_capacity_within_bounds(capacity: float, expected: float) -> None:
    assert chat_rate(capacity) == pytest.approx(expected)


# --- with a fake client ---


def chunk(text: str | None = None, finish: str | None = None, tokens: int | None = None) -> SimpleNamespace:
    choices = [] if tokens is not None else [SimpleNamespace(delta=SimpleNamespace(content=text), finish_reason=finish)]
    return SimpleNamespace(choices=choices, usage=None if tokens is None else SimpleNamespace(completion_tokens=tokens))


class FakeClient:
    """Streams `tokens` tokens `gap_s` apart; breaks: the stream ends after the first."""

    def __init__(self, *, gap_s: float = 0.0, tokens: int = 3, breaks: bool = False) -> None:
        self.gap_s, self.tokens, self.breaks = gap_s, tokens, breaks
        self.calls: list[dict[str, Any]] = []
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))
        self.files = SimpleNamespace(create=self.upload)
        self.fine_tuning = SimpleNamespace(jobs=SimpleNamespace(create=self.create_job))

    async def create(self, **fields: Any) -> Any:
        self.calls.append(fields)
        if fields.get("stream"):
            return self.stream()
        message = SimpleNamespace(content=f" {fields['model']} says {fields['messages'][0]['content']} ")
        return SimpleNamespace(choices=[SimpleNamespace(message=message)])

    async def stream(self) -> AsyncIterator[Any]:
        yield chunk()
        for number in range(self.tokens):
            await asyncio.sleep(self.gap_s)
            if number and self.breaks:
                raise ConnectionError("the line broke")
            yield chunk("word", "length" if number == self.tokens - 1 else None)
        yield chunk(tokens=self.tokens)

    async def upload(self, **fields: Any) -> Any:
        self.calls.append(fields)
        return SimpleNamespace(id="file-1")

    async def create_job(self, **fields: Any) -> Any:
        self.calls.append(fields)
        return fields


def connect_to(client: FakeClient) -> Connection:
    return Connection(url="http://nowhere", client=client, refusals=RuntimeError)  # type: ignore[arg-type]


def test_a_streamed_chat_is_timed_by_its_text() -> None:
    client = FakeClient(gap_s=0.02, tokens=6)
    chat = asyncio.run(chat_once(connect_to(client), "m", "Hi", 6, 1))
    assert chat.error is None and chat.num_tokens == 6
    assert chat.ttft_ms is not None and chat.ttft_ms >= 20, "the chunk with the role is no text"
    assert chat.tpot_ms is not None and 20 <= chat.tpot_ms < 200
    (call,) = client.calls
    assert call["stream_options"] == {"include_usage": True}


def test_a_stream_that_breaks_is_a_failed_request() -> None:
    chat = asyncio.run(chat_once(connect_to(FakeClient(breaks=True)), "m", "Hi", 6, 1))
    assert chat.error == "the line broke" and not chat.meets(OBJECTIVES)


def test_capacity_is_that_of_a_burst() -> None:
    client = FakeClient(gap_s=0.01, tokens=10)
    capacity, chats = asyncio.run(measure(connect_to(client), "m"))
    assert len(chats) == BURST and len(client.calls) == BURST + 1
    assert BURST / 2 < capacity < BURST / 0.1, "all at once: a burst takes as long as one"


def test_traffic_is_poisson_and_the_same_for_a_seed() -> None:
    async def send(seed: int) -> tuple[Traffic, list[dict[str, Any]]]:
        client = FakeClient()
        traffic = Traffic(connect_to(client), "m", 400.0, seed)
        sending = asyncio.create_task(traffic.run())
        await asyncio.sleep(0.5)
        sending.cancel()
        await traffic.drain()
        return traffic, client.calls

    traffic, calls = asyncio.run(send(7))
    assert 100 < len(traffic.chats) < 320 and traffic.num_running == 0
    assert all(chat.error is None for chat in traffic.chats)
    prompts = [call["messages"][0]["content"] for call in calls]
    assert len(set(prompts)) > len(PROMPTS) // 2 and all(16 <= call["max_tokens"] <= 48 for call in calls)
    again = asyncio.run(send(7))[1]
    assert [call["max_tokens"] for call in again][:50] == [call["max_tokens"] for call in calls][:50]


def test_the_job_is_one_that_the_server_takes() -> None:
    client = FakeClient()
    asyncio.run(create_job(connect_to(client), "base"))
    upload, fields = client.calls
    assert upload["purpose"] == "fine-tune" and len(upload["file"][1].splitlines()) == 99
    body = read_body({**{key: value for key, value in fields.items() if key != "extra_body"}, **fields["extra_body"]})
    assert (body.model, body.seed, body.rank, body.alpha, body.learning_rate) == ("base", SEED, 16, 32, 2e-3)
    assert body.method is not None and body.method.supervised is not None
    numbers = body.method.supervised.hyperparameters
    assert numbers is not None and (numbers.n_epochs, numbers.batch_size) == (NUM_EPOCHS, BATCH_SIZE)
    assert LoraConfig(r=EXTRAS["rank"]).r == 16


def test_both_models_are_asked_every_question() -> None:
    client = FakeClient()
    answers = asyncio.run(ask_both(connect_to(client), "base", "tuned"))
    assert [answer.question for answer in answers] == [question for question, _ in questions()]
    assert all(answer.base == f"base says {answer.question}" and answer.tuned == f"tuned says {answer.question}"
               for answer in answers)
    assert all(call["temperature"] == 0 and call["max_tokens"] == ANSWER_TOKENS for call in client.calls)


def test_a_missing_client_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"pip install 'coserve\[demo\]'"):
        require_client()
    assert client_module.TIMEOUT_S > 0


# --- what is shown and written ---


def make_report(**changes: Any) -> DemoReport:
    answers = tuple(
        Answer(question=f"Who [red] {i}?", keywords=("k",), base="k" if i < 1 else "[/INST]", tuned="[/b] k" if i < 3 else "t")
        for i in range(4)
    )
    figures = Figures(num_requests=9, num_failed=1, attainment=8 / 9, tpot_ms_p50=80.0, tpot_ms_p99=120.0)
    fields: dict[str, Any] = {
        "figures": figures, "tpot_slo_ms": 150.0, "finetune_tokens_per_s": 60.0, "finetune_alone_tokens_per_s": 120.0,
        "loss_first": 3.0, "loss_last": 1.0, "answers": answers, "duration_s": 99.0,
    }
    return DemoReport(**(fields | changes))


def test_the_report_has_its_keys() -> None:
    data = json.loads(make_report().to_json())
    assert set(data) == REPORT_KEYS
    assert (data["facts_right_base"], data["facts_right_tuned"], data["facts_total"]) == (1, 3, 4)
    assert (data["num_requests"], data["num_failed"], data["tpot_slo_ms"]) == (9, 1, 150.0)
    assert data["answers"][0] == {"question": "Who [red] 0?", "base": "k", "tuned": "[/b] k"}


def test_the_summary_tells_the_numbers() -> None:
    text = "\n".join(summary_lines(make_report(), OBJECTIVES))
    for part in ("base 1 of 4, tuned 3 of 4", "9 requests", "1 failed", "89% within 100 ms", "120 tokens/s alone, 60 beside",
                 "50% of that", "99 s"):
        assert part in text
    assert "- beside" in "\n".join(summary_lines(make_report(finetune_tokens_per_s=None), OBJECTIVES))


def test_answers_that_look_like_markup_are_shown() -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(answers_table(make_report().answers))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(text in shown for text in ("Who [red] 1?", "[/INST]", "[/b] k"))


@pytest.mark.parametrize("terminal", [True, False])
def test_the_board_is_shown(terminal: bool) -> None:
    board = Board(
        elapsed_s=12.0, step=3, num_steps=44, loss=1.25, finetune_rate=80, inference_rate=30, num_running=2,
        figures=make_report().figures, objectives=OBJECTIVES,
    )
    console = Console(file=io.StringIO(), width=150, force_terminal=terminal)
    with Display(console) as display:
        display.update(board)
        display.update(board)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(text in shown for text in ("3/44", "1.25", "80 tokens/s", "120", "89%")), shown
    assert terminal or shown.count("3/44") == 1, "a line every few seconds"
    assert "1 failed" in describe(board)


def test_a_strangers_directory_is_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InvalidRequest, match="holds no earlier demo"):
        prepare(tmp_path)
    with pytest.raises(InvalidRequest, match="holds no earlier demo"):
        prepare(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    prepare(tmp_path / "new")
    (tmp_path / "new" / "old.json").write_text("{}")
    prepare(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [MARK]


# --- with a server ---


def test_beside_ends_all_with_the_first_error() -> None:
    ended = []

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def fail() -> None:
        raise DemoFailed("gone")

    async def answer() -> int:
        return 3

    with pytest.raises(DemoFailed, match="gone"):
        asyncio.run(beside(wait(), fail()))
    assert asyncio.run(beside(answer(), wait())) == 3 and len(ended) == 2


def start_program(program: str, tmp_path: Path, *, seconds: float = 20.0) -> tuple[str, list[str], int | None]:
    """(url, lines reported, exit code) of a child that runs `program`, waited for and then left."""
    lines: list[str] = []

    async def start() -> tuple[str, list[str], int | None]:
        async with open_server([sys.executable, "-c", program], tmp_path / "log", lines.append) as server:
            await beside(server.wait_ready(seconds), server.read())
        return server.url, lines, server._process.returncode

    return asyncio.run(start())


def test_a_server_is_read_until_it_listens_and_then_stopped(tmp_path: Path) -> None:
    program = "import time; print('loading'); print('page      http://127.0.0.1:1234/'); time.sleep(60)"
    url, lines, code = start_program(program, tmp_path)
    assert (url, lines) == ("http://127.0.0.1:1234", ["loading", "page      http://127.0.0.1:1234/"])
    assert code == -signal.SIGTERM


def test_a_server_that_cannot_start_is_told_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(DemoFailed, match=r"ended with exit code 2; it said last: hm / error: no model"):
        start_program("import sys; print('hm'); sys.exit(print('error: no model') or 2)", tmp_path)
    assert (tmp_path / "log").read_text() == "hm\nerror: no model\n"
    with pytest.raises(DemoFailed, match="not ready after 0 s"):
        start_program("import time; time.sleep(60)", tmp_path, seconds=0.3)


def listens(url: str) -> bool:
    """Whether somebody answers."""
    return healthy(url.rstrip("/"))


def tiny_settings(model: Path, output: Path) -> DemoSettings:
    prepare(output)
    return DemoSettings(
        data_dir=output / DATA, log=output / LOG, model=str(model), objectives=SloInMs(tpot_ms=TPOT_MS, ttft_ms=TTFT_MS),
        options=("--threads", "1", "--kv-cache-memory-bytes", str(32 << 20)), alone_s=1.0,
    )


@pytest.mark.full
def test_the_story_runs_through_a_server(
    tmp_path: Path, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole demo on the tiny model, results on disk included; the server ends with it."""
    monkeypatch.setenv("COSERVE_CACHE", str(tmp_path / "cache"))
    settings = tiny_settings(model_directory, tmp_path / "out")
    results: list[DemoResult] = []
    console = Console(file=io.StringIO(), width=200)

    async def finish(result: DemoResult, server: Server) -> None:
        results.append(result)
        urls.append(server.url)

    urls: list[str] = []
    with Display(console) as display:
        asyncio.run(run_demo(settings, display, finish))
        (result,) = results
        show(result, settings, tmp_path / "out", display)
    write(result, settings, tmp_path / "out", tmp_path / "copy.json")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"watch it: {urls[0]}/" in shown and result.tuned in shown
    data = json.loads((tmp_path / "copy.json").read_text())
    assert data == json.loads((tmp_path / "out" / REPORT).read_text()) and set(data) == REPORT_KEYS
    assert (data["facts_total"], data["num_failed"]) == (24, 0)
    assert data["loss_last"] < data["loss_first"]
    assert (adapter_directory(settings, result.job) / "adapter_model.safetensors").is_file()
    for name in ("loss.png", "throughput.png", "tpot.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert not listens(urls[0])


@pytest.mark.full
def test_ctrl_c_stops_the_server_too(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "coserve", "demo", "-o", str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        until = time.monotonic() + 300
        while not ((out / LOG).is_file() and "page" in (out / LOG).read_text()):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.2)
        address = re.search(r"http://\S+/", (out / LOG).read_text())
        assert address is not None
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "stopped" in said, said
    assert not listens(address[0])


@pytest.mark.full
@pytest.mark.skipif(not os.environ.get("COSERVE_TEST_DEMO"), reason="minutes of `make demo`: set COSERVE_TEST_DEMO=1")
def test_the_demo_teaches_the_default_model(tmp_path: Path) -> None:
    """The command itself, on SmolLM2."""
    done = subprocess.run(
        [sys.executable, "-m", "coserve", "demo", "-o", str(tmp_path / "out"), "--json", str(tmp_path / "report.json")],
        capture_output=True, text=True, timeout=840, check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["facts_right_base"] <= 2 and data["facts_right_tuned"] >= 20
    assert data["num_failed"] == 0 and data["num_requests"] > 10
    assert data["loss_last"] < 0.3 * data["loss_first"]
    assert data["finetune_tokens_per_s"] > 0 and data["finetune_alone_tokens_per_s"] > 0

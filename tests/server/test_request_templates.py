"""Templates of requests and of the setting --chat-template, over HTTP and in the settings."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from coserve.chat.foreign import TemplateProcess
from coserve.core import ConfigError
from coserve.server.inference.templates import MAX_KEPT, RequestTemplates
from coserve.server.link.enginemain import EngineProcessMain
from coserve.server.settings import ServerConfig, read_settings
from coserve.text.tokenizer import ChatTokenizer
from tests.chat_templates import ALTERNATING, ALWAYS_THINKING, INSTRUCT, THINKING, THINKING_MARKS
from tests.server.fakes import Script, send
from tests.server.sites import CHAT_PATH, HI, Site, open_site
from tests.tiny_directory import build_tiny_directory
from tests.tiny_tokenizer import build_tiny_tokenizer

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def trusting_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    tokenizer = ChatTokenizer.load(build_tiny_tokenizer(tmp_path_factory.mktemp("t"), added=THINKING_MARKS))
    templates = RequestTemplates(tokenizer, TemplateProcess(timeout_s=1.0))
    with open_site(tokenizer, templates=templates) as site:
        yield site
    templates.close()


@pytest.fixture
def trusting(trusting_site: Site) -> Site:
    trusting_site.reset()
    return trusting_site


def ask(site: Site, template: Any, path: str = CHAT_PATH, **fields: Any) -> Any:
    return send(site.port, path, {"messages": HI, "chat_template": template, **fields})


def test_without_the_flag_there_are_none(site: Site) -> None:
    for path in (CHAT_PATH, "/tokenize"):
        refused = ask(site, "{{ messages[0].content }}", path)
        assert (refused.status, refused.error["param"]) == (400, "chat_template")
        assert "--trust-request-chat-template" in refused.error["message"]


def test_a_requests_template_is_used_for_it_alone(trusting: Site) -> None:
    template = "{% for m in messages %}{{ '<|im_start|>' + m.content + (tone or '') }}{% endfor %}"
    body = {"chat_template_kwargs": {"tone": "<|im_end|>!"}}
    assert ask(trusting, template, **body).status == 200
    (start,), (end,) = trusting.tokenizer.encode("<|im_start|>"), trusting.tokenizer.encode("<|im_end|>")
    ids = trusting.engine.asked[-1].prompt_ids
    assert (ids.count(start), ids.count(end)) == (1, 0)
    assert trusting.tokenizer.decode(ids, False) == "<|im_start|>Hi<|im_end|>!"
    assert ask(trusting, template, "/tokenize", **body).json["tokens"] == ids
    assert send(trusting.port, CHAT_PATH, {"messages": HI}).status == 200
    assert trusting.engine.asked[-1].prompt_ids == trusting.tokenizer.encode_chat(HI)


def test_its_thoughts_and_variables_count(trusting: Site) -> None:
    trusting.engine.script = Script(text="Hm.\n</think>\n\nYes.")
    found = ask(trusting, ALWAYS_THINKING).json["choices"][0]["message"]
    assert (found["reasoning_content"], found["content"]) == ("Hm.", "Yes.")
    assert ask(trusting, THINKING, reasoning_effort="none").status == 200
    assert trusting.tokenizer.decode(trusting.engine.asked[-1].prompt_ids, False).endswith("<think>\n\n</think>\n\n")
    begun = [*HI, {"role": "assistant", "content": "The"}]
    assert ask(trusting, THINKING, messages=begun, continue_final_message=True).status == 200
    assert trusting.tokenizer.decode(trusting.engine.asked[-1].prompt_ids, False).endswith("</think>\n\nThe")


@pytest.mark.parametrize(("template", "param", "words"), [
    ("{% if", "chat_template", "isn't a Jinja template"), ("{{ x | nothing }}", "chat_template", "isn't a Jinja template"),
    ("x" * (1 << 18), "chat_template", "at most"), (5, "chat_template", ""), ([], "chat_template", ""),
    ("{{ raise_exception('not so') }}", "messages", "the request's chat template refuses the conversation: not so"),
    (ALTERNATING + "{{ 1 / messages[1:] | length }}", "messages", "division by zero"),
    ("{{ 'a' * 10**11 }}", "messages", "too much memory"),
    ("{% set x = messages[0].content * 99999999 %}{{ x }}", "messages", ""),
])
def test_what_is_refused(trusting: Site, template: Any, param: str, words: str) -> None:
    for path in (CHAT_PATH, "/tokenize"):
        refused = ask(trusting, template, path)
        assert (refused.status, refused.error["param"]) == (400, param), refused.text
        assert words in refused.error["message"]
    assert not trusting.engine.asked


def test_one_that_loops_holds_up_nobody_else(trusting: Site) -> None:
    ask(trusting, "x")  # the process runs
    statuses: list[int] = []
    threads = [threading.Thread(target=lambda n=n: statuses.append(ask(trusting, f"{LOOP}{n}").status)) for n in range(2)]
    for thread in threads:
        thread.start()
    began, answered = time.monotonic(), 0
    while time.monotonic() - began < 1.0:
        assert send(trusting.port, CHAT_PATH, {"messages": HI}).status == 200
        answered += 1
    for thread in threads:
        thread.join(30)
    assert statuses == [400] * 2
    assert answered >= 4
    assert ask(trusting, "{{ messages[0].content }}").status == 200


def test_the_last_ones_are_kept(trusting: Site) -> None:
    templates = RequestTemplates(trusting.tokenizer, TemplateProcess())
    first = templates.find("first")
    assert templates.find("first") is first
    for number in range(MAX_KEPT):
        templates.find(f"{number}")
    assert templates.find("first") is not first
    templates.close()


# --- the setting ---


def test_a_file_or_a_text(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(INSTRUCT, encoding="utf-8")
    assert read_settings(None, {"chat_template": str(path)}).chat_template == INSTRUCT
    assert read_settings(None, {"chat_template": INSTRUCT}).chat_template == INSTRUCT
    settings = tmp_path / "server.toml"
    settings.write_text(f'chat-template = "{path}"\ntrust-request-chat-template = true\nreasoning-parser = "deepseek-r1"\n')
    found = read_settings(settings, {})
    assert (found.chat_template, found.trust_request_chat_template) == (INSTRUCT, True)
    assert found.reasoning_parser == "deepseek_r1"


@pytest.mark.parametrize(("name", "value"), [
    ("chat_template", "nowhere.jinja"), ("chat_template", "{% if"), ("chat_template", 5), ("chat_template", "a\0b"),
    ("reasoning_parser", "gpt"), ("reasoning_parser", ""), ("reasoning_parser", 5), ("trust_request_chat_template", "yes"),
])
def test_settings_that_are_wrong(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(None, {name: value})
    assert caught.value.param == name


def test_jobs_are_read_with_it_too(tmp_path: Path) -> None:
    """The engine's process encodes the data of jobs."""
    model = build_tiny_directory(tmp_path / "tiny")
    config = ServerConfig(model=str(model), chat_template="{{ messages[0].content }}", threads=1, dtype="float32")
    main = EngineProcessMain.__new__(EngineProcessMain)
    main.config, main.report = config, lambda line: None  # type: ignore[method-assign]
    loaded = main.load()
    assert loaded.tokenizer.chat_template == "{{ messages[0].content }}"
    assert loaded.tokenizer.render_chat(HI, add_generation_prompt=True) == "Hi"
    loaded.close()


@pytest.mark.full
def test_a_server_with_its_own_template(start_server: Any, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    server = start_server("--chat-template", str(path), "--trust-request-chat-template", "--reasoning-parser", "none")
    port = int(server.url.rpartition(":")[2])
    assert len(send(port, "/tokenize", {"messages": HI}).json["tokens"]) <= 2
    other = partial(send, port, "/tokenize")
    assert other({"messages": HI, "chat_template": "{{ 'a' * 10**11 }}"}).status == 400
    assert other({"messages": HI, "chat_template": "{{ messages[0].content * 2 }}"}).json["count"] <= 4
    assert server.stop() == 0

"""Templates that requests bring: rendered as others are, in a process with limits; whatever they do, the next one is served."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import coserve.chat.template
from coserve.chat.foreign import ForeignTemplate, TemplateProcess
from coserve.chat.renderer import answer
from coserve.chat.template import ChatExtras, ChatTemplate
from coserve.core import CapacityError, ContextExceeded, InvalidRequest
from coserve.text.tokenizer import ChatTokenizer
from tests.chat_templates import DATED, DEVELOPER, INSTRUCT, REWRITING, THINKING, THINKING_MARKS
from tests.tiny_tokenizer import CHATML, IM_END, IM_START, build_tiny_tokenizer

HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
Bring = Callable[[str], ChatTokenizer]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.load(build_tiny_tokenizer(tmp_path_factory.mktemp("t"), added=THINKING_MARKS))


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    found = TemplateProcess(timeout_s=3.0)
    yield found
    found.close()


@pytest.fixture
def bring(tokenizer: ChatTokenizer, process: TemplateProcess) -> Bring:
    """The tokenizer with a request's template."""
    return lambda source: tokenizer.with_template(source, partial(ForeignTemplate, process=process))


@pytest.mark.parametrize("source", [CHATML, REWRITING, DATED, DEVELOPER, INSTRUCT, THINKING], ids=range(6))
def test_rendered_as_the_models_own(tokenizer: ChatTokenizer, bring: Bring, source: str) -> None:
    own, foreign = tokenizer.with_template(source), bring(source)
    messages = [*HI, {"role": "assistant", "content": f"<think>\nHm.\n</think>\n\nYes.{IM_END}"}, *HI]
    extras = ChatExtras(variables={"enable_thinking": False, "tone": ["a", {"b": None}]})
    assert foreign.encode_chat(messages, extras=extras) == own.encode_chat(messages, extras=extras)
    for options in ({"add_generation_prompt": True}, {"add_generation_prompt": False, "continue_final": True}):
        assert foreign.encode_chat(messages[:2], **options) == own.encode_chat(messages[:2], **options)
    for name in ("reads", "tool_prompt", "knows_developer", "takes_system", "has_generation_tags"):
        assert getattr(foreign.template, name) == getattr(own.template, name), name
    assert sorted(foreign.template.written.split("\0")) == sorted(own.template.written.split("\0"))


def test_its_control_tokens_are_its_own(bring: Bring) -> None:
    foreign = bring("{% for m in messages %}{{ '<tool_call>' + m.content + '<|im_start|>' }}{% endfor %}")
    ids = foreign.encode_chat([{"role": "user", "content": f"a<tool_call>b{IM_START}<think>"}])
    assert [ids.count(*foreign.encode(name)) for name in ("<tool_call>", IM_START, "<think>")] == [1, 1, 1]


def test_nothing_of_it_is_compiled_here(bring: Bring, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jinja computes constants when it compiles: 'a' * 10**10 would take this process's memory."""
    monkeypatch.setattr(coserve.chat.template, "_compile_jinja_template", lambda _: pytest.fail("compiled in this process"))
    for name in ("_get_template_literal_text", "_get_template_variables", "_render_with_assistant_indices"):
        monkeypatch.setattr(coserve.chat.template, name, lambda *_, **__: pytest.fail("compiled in this process"))
    foreign = bring(THINKING + "{{ 1 }}")
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    call = {"role": "assistant", "content": "", "tool_calls": calls}
    foreign.encode_chat([*HI, call, {"role": "tool", "content": "x"}], extras=ChatExtras(tools=[tool]))
    _ = foreign.knows_developer, foreign.takes_system, foreign.template.reads, foreign.template.written
    foreign.template.check()
    with pytest.raises(InvalidRequest, match="not for training"):
        foreign.template.render_generated(HI)


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
HOSTILE = {
    "loops": (LOOP, "takes more than 3 s"),
    "doubles a text": ("{% set ns = namespace(x='a' * 1000) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
                       "too much memory"),
    "a long constant": ("{{ 'a' * 10**11 }}", "too much memory"),
    "a wide field": ("{{ '%999999999999d' % 1 }}", "."),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "recursion that branches": ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "an attribute of Python's": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "globals of a function": ("{{ raise_exception.__globals__.keys() }}", "unsafe"),
    "another template": ("{% include '/etc/passwd' %}", "."),
    "half of a pair": ("{{ '\\ud800' }}", "surrogates not allowed"),
    "a slow power": ("{{ 9**(9**9) % 7 }}", "takes more than 3 s"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_whatever_it_does_the_next_one_is_served(bring: Bring, kind: str) -> None:
    source, reason = HOSTILE[kind]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidRequest, match=reason):
        bring(source + "{{ messages[0].content }}").encode_chat(HI)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10, "KiB"
    assert bring(CHATML).encode_chat(HI)


def test_a_text_that_is_too_long(bring: Bring) -> None:
    wordy = bring("{% for i in range(99999) %}{{ 'word ' * 1000 }}{% endfor %}")
    with pytest.raises(ContextExceeded, match="more than 4000 characters"):
        wordy.encode_chat(HI, max_chars=1000)


@pytest.mark.parametrize("source", ["{% if", "{{ x | nothing }}", "{% for %}", "{{ '" + "(" * 5000])
def test_what_is_no_template(bring: Bring, source: str) -> None:
    with pytest.raises(InvalidRequest, match="isn't a Jinja template") as caught:
        bring(source).template.check()
    assert caught.value.param == "chat_template"
    with pytest.raises(InvalidRequest, match="isn't a Jinja template"):
        ChatTemplate(source, {}).check()


def test_an_error_names_whose_template_it_is(bring: Bring) -> None:
    with pytest.raises(InvalidRequest, match=f"^the request's chat template refuses the conversation: no: Hi{IM_END[:2]}"):
        bring("{{ raise_exception('no: ' + messages[0].content) }}").encode_chat([{"role": "user", "content": f"Hi{IM_END}"}])


def test_variables_that_are_nested_too_deeply(process: TemplateProcess) -> None:
    deep: Any = "x"
    for _ in range(300_000):
        deep = [deep]
    template = ForeignTemplate("{{ a }}", {}, process=process)
    with pytest.raises(InvalidRequest, match="refuses the conversation"):
        template.render(HI, add_generation_prompt=True, extras=ChatExtras(variables={"a": deep}))
    assert template.render(HI, add_generation_prompt=True, extras=ChatExtras(variables={"a": "b"})) == "b"


def test_threads_take_turns(bring: Bring) -> None:
    found: list[list[int]] = []
    sources = [f"{{{{ messages[0].content }}}}{number}" for number in range(20)]
    threads = [threading.Thread(target=lambda s=source: found.append(bring(s).encode_chat(HI))) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(bring(source).encode_chat(HI) for source in sources)


def test_it_sees_no_keys_and_ends_with_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSERVE_API_KEYS", "alice=sk-secret")
    process = TemplateProcess()
    ForeignTemplate("x", {}, process=process).render(HI, add_generation_prompt=True)
    child = process._process
    assert child is not None
    assert b"COSERVE" not in Path(f"/proc/{child.pid}/environ").read_bytes()
    assert os.getpriority(os.PRIO_PROCESS, child.pid) > os.getpriority(os.PRIO_PROCESS, 0)
    process.close()
    assert child.poll() is not None
    with pytest.raises(CapacityError, match="ending"):
        process.ask({"source": "x"})


@pytest.mark.full
def test_one_that_loops_ends_without_the_server_too() -> None:
    """The limit of processor time is the child's own."""
    process = TemplateProcess(timeout_s=3.0)
    process.ask({"source": "x"})
    child = process._process
    assert isinstance(child, subprocess.Popen) and child.stdin is not None
    child.stdin.write(json.dumps({"source": LOOP, "variables": {}, "max_chars": None}).encode() + b"\n")
    child.stdin.flush()
    assert child.wait(30) != 0
    assert process.ask({"source": "{{ y }}"}) == {"written": "", "reads": ["y"]}, "it is started again"
    process.close()


def test_answers_of_the_program() -> None:
    assert answer({"source": "a{{ b }}", "variables": {"b": "c"}, "max_chars": None}) == {"text": "ac"}
    assert answer({"source": "a{{ b }}", "variables": {"b": "c"}, "max_chars": 1}) == {"too_long": True}
    assert answer({"source": "a{{ b }}"}) == {"written": "a", "reads": ["b"]}
    assert "error" in answer({"source": "{{"})

"""Training files that are wrong, uploads that are wrong, and bytes that are no HTTP, as tables for test_malformed.py."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.tiny_directory import chat_line, chat_lines, preference_line

GOOD = "".join(json.dumps(line) + "\n" for line in chat_lines(2)).encode()
_PAIRS = "".join(json.dumps(preference_line(f"q{i}", "yes", "no")) + "\n" for i in range(2)).encode()
_JUNK: tuple[Any, ...] = (None, True, 0, -1, 1.5, 10**30, 1e308, "", "x", [], {}, [[]], [{}], {"a": {"b": []}}, [None], ["x"])
_LONG = "word " * 200_000


class BadFile(NamedTuple):
    """content: the file; method: of the job; line: which one must be named, None for the file as a whole."""

    name: str
    content: bytes
    method: str = "supervised"
    line: int | None = 3


def training_files() -> Iterator[BadFile]:
    """Each must be refused as an upload, or fail its job with `training_file` named."""
    for name, line in _lines():
        yield BadFile(name, GOOD + line + b"\n" + GOOD)
    for name, value in _records():
        yield BadFile(name, GOOD + json.dumps(value).encode() + b"\n")
    for name, value in _pairs():
        yield BadFile(name, _PAIRS + json.dumps(value).encode() + b"\n", "dpo")
    yield BadFile("chat for dpo", GOOD, "dpo", 1)
    yield BadFile("pairs for sft", _PAIRS, "supervised", 1)
    for name, content in _wholes():
        yield BadFile(name, content, line=None)


def _lines() -> Iterator[tuple[str, bytes]]:
    """Lines that are no JSON object."""
    good = json.dumps(chat_line("q", "a")).encode()
    yield from {
        "bad utf-8": b'{"text": "\xff"}', "utf-8 cut": b'{"text": "\xe2\x82"}', "overlong": b'{"text": "\xc0\x80"}',
        "surrogate bytes": b'{"text": "\xed\xa0\x80"}', "latin-1": '{"text": "naïve"}'.encode("latin-1"),
        "utf-16": '{"text": "a"}'.encode("utf-16"), "nul": b"\0", "nul in text": b'{"text": "a\0b"}', "open": b'{"text": "a"',
        "cut": good[:-5], "two objects": good + good, "two with comma": good + b", " + good, "list": b"[" + good + b"]",
        "trailing comma": good[:-1] + b",}", "comment": b"// " + good, "csv": b"a,b,c", "xml": b"<a/>", "yaml": b"text: a",
        "null": b"null", "true": b"true", "number": b"1", "text": b'"text"', "single quotes": b"{'text': 'a'}",
        "nan key": b'{"text": NaN}', "infinity": b'{"text": Infinity}', "1e400": b'{"text": 1e400}',
        "mark inside": b"\xef\xbb\xbf" + good,
        "10**400": b'{"text": 1' + b"0" * 400 + b"}", "10**5000": b'{"text": 1' + b"0" * 5000 + b"}",
        "weight 10**5000": good.replace(b'"content": "a"', b'"content": "a", "weight": 1' + b"0" * 5000),
        "deep list": b"[" * 100_000, "deep object": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        "tab in text": b'{"text": "a\tb"}',
        "deep messages": b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "escape": b'{"text": "\\x41"}',
        "lone surrogate": b'{"text": "\\ud800"}', "surrogate in key": b'{"\\ud800": 1}', "form feed": b"\x0c{}\x0c",
        "surrogate in message": good.replace(b'"a"', b'"\\udfff"'), "escape sequence": b"\x1b[2J", "gzip": gzip.compress(good),
    }.items()


def _message(**changes: Any) -> list[dict[str, Any]]:
    """Two turns, the answer changed."""
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **changes}]


def _call(arguments: Any) -> dict[str, Any]:
    return {"id": "x", "type": "function", "function": {"name": "f", "arguments": arguments}}


def _records() -> Iterator[tuple[str, Any]]:
    """Objects that are no example for supervised training."""
    for value in _JUNK:
        shown = json.dumps(value)
        yield f"messages {shown}", {"messages": value}
        yield f"message {shown}", {"messages": [value, *_message()]}
        yield f"role {shown}", {"messages": _message(role=value)}
        yield f"prompt {shown}", {"prompt": value, "completion": ["x"]}
        if value is not None:
            yield f"unknown message key {shown}", {"messages": _message(colour=value)}
        if value not in ("", "x"):
            yield f"completion {shown}", {"prompt": "x", "completion": value}
            yield f"text {shown}", {"text": value}
        if value not in ("", "x"):
            yield f"content {shown}", {"messages": _message(content=value)}
        if value is not None and value != "x" and value != "":
            yield f"name {shown}", {"messages": _message(name=value)}
        if value is not None and not (value == 0 and value is not False):
            yield f"weight {shown}", {"messages": _message(weight=value)}
        if value:
            yield f"tools {shown}", {"messages": _message(), "tools": value}
            yield f"tool calls {shown}", {"messages": _message(tool_calls=value)}
            yield f"function call {shown}", {"messages": _message(function_call=value)}
            yield f"variables {shown}", {"messages": _message(), "chat_template_kwargs": value}
            yield f"parallel {shown}", {"messages": _message(), "parallel_tool_calls": value if value is not True else 1}
            yield f"call's place {shown}", {"messages": [{"role": "user", "content": "q", "tool_calls": value}, _message()[1]]}
        if value and value != "x":
            yield f"thoughts {shown}", {"messages": _message(reasoning_content=value)}
            yield f"id of a result {shown}", {"messages": [
                {"role": "tool", "content": "x", "tool_call_id": value}, *_message()]}
    user, answer = _message()
    yield from {
        "no key": {}, "only user": {"messages": [user]}, "only system": {"messages": [{"role": "system", "content": "x"}]},
        "user last": {"messages": [user, answer, user]}, "weight 0 only": {"messages": _message(weight=0)},
        "user weight": {"messages": [{**user, "weight": 1}, answer]}, "tool": {"messages": [user, {"role": "tool",
        "content": "x"}]},
        "unknown role": {"messages": [{"role": "bot", "content": "x"}]}, "Role": {"messages": [{"Role": "user",
        "content": "x"}]},
        "role upper": {"messages": [{"role": "USER", "content": "q"}, answer]}, "no content": {"messages": [{"role": "user"},
        answer]},
        "no role": {"messages": [{"content": "x"}, answer]}, "no completion": {"prompt": "x"}, "no prompt": {"completion": "x"},
        "mixed": {"prompt": [user], "completion": "x"}, "long text": {"text": _LONG},
        "long content": {"messages": _message(content=_LONG)},
        "long key": {"x" * 100_000: 1}, "many keys": {str(i): i for i in range(20_000)}, "all formats": {"messages": [],
        "text": "x"},
        "many messages": {"messages": [user, answer] * 5000}, "parts": {"messages": _message(content=[{"type": "text"}])},
        "openai input": {"input": {"messages": [user]}}, "list in list": {"messages": [[user, answer]]},
        "alpaca": {"instruction": "x", "output": ["y"]}, "two layouts": {"messages": [user, answer], "conversations": [user]},
        "sharegpt": {"conversations": [{"from": "human", "value": "x"}]},
        "call's name": {"messages": _message(function_call={"name": "a b"})},
        "call's arguments": {"messages": _message(tool_calls=[_call("{x: 1}")])},
        "call's list of arguments": {"messages": _message(tool_calls=[_call([1])])},
        "deep arguments": {"messages": _message(tool_calls=[_call('{"a":' * 500 + "1" + "}" * 500)])},
        "surrogate in arguments": {"messages": _message(tool_calls=[_call({"a": "\ud800"})])},
        "result of no call": {"messages": [user, {**answer, "tool_calls": [_call({})]},
                                           {"role": "tool", "tool_call_id": "y", "content": "x"}, answer]},
        "sharegpt's call": {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "f(x)"}]},
        "tools of a text": {"text": "x", "tools": [{"type": "function", "function": {"name": "f"}}]},
        "images": {"messages": _message(), "images": ["a.png"]},
        "unknown variable": {"messages": _message(), "chat_template_kwargs": {"colour": 1}},
    }.items()


def _pairs() -> Iterator[tuple[str, Any]]:
    """Objects that are no pair of answers."""
    right = preference_line("q", "yes", "no")
    turns = {"input": {"messages": right["prompt"]}, "preferred_output": right["chosen"],
    "non_preferred_output": right["rejected"]}
    for value in (None, True, 1, 1.5, [], {}, [{}], [None], [[]], {"messages": []}, {"messages": 1}):
        shown = json.dumps(value)
        for base in (right, turns):
            for key in base:
                if (key, value) != ("prompt", None):
                    yield f"{key} {shown}", {**base, key: value}
    for base in (right, turns):
        for key in base:
            yield f"without {key}", {name: value for name, value in base.items() if name != key}
    yield "text", {"prompt": "q", "chosen": "a", "rejected": ["b"]}


def _wholes() -> Iterator[tuple[str, bytes]]:
    """Files that have no example at all."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("train.jsonl", GOOD)
    yield from {
        "blank lines": b"\n" * 1000, "blanks": b" \t\r\n" * 100, "mark": b"\xef\xbb\xbf", "zip": archive.getvalue(),
        "gzip": gzip.compress(GOOD),
        "utf-16": GOOD.decode().encode("utf-16"), "utf-32": GOOD.decode().encode("utf-32"), "nuls": b"\0" * 10_000,
        "array": b"[" + GOOD + b"]",
        "pretty": json.dumps(chat_line("q", "a"), indent=2).encode(), "png": b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
        "carriage returns": GOOD.replace(b"\n", b"\r"),
        "one long line": b"x" * 1_000_000, "open brackets": b"{" * 1_000_000, "ends in a character": GOOD + b"\xf0\x9f",
    }.items()


def readable_files() -> dict[str, bytes]:
    """Unusual, but right."""
    return {
        "mark": b"\xef\xbb\xbf" + GOOD, "crlf": GOOD.replace(b"\n", b"\r\n"), "no last line end": GOOD.rstrip(b"\n"),
        "blank lines": b"\n\n" + GOOD.replace(b"\n", b"\n \n\n"), "emoji": json.dumps(chat_line("💩" * 20, "é\u202e"),
        ensure_ascii=False).encode(),
        "line separator": json.dumps(chat_line("a\u2028b", "c\u0085d"), ensure_ascii=False).encode(),
        "twice the same": GOOD * 2,
        "nul escape": json.dumps(chat_line("a\0b", "c")).encode(), "nulls": json.dumps({**chat_line("a", "b"),
        "tools": None}).encode(), "other column": json.dumps({**chat_line("a", "b"), "colour": [{}]}).encode(),
    }


class Part(NamedTuple):
    """A part of a form."""

    head: bytes
    content: bytes


_FILE = Part(b'Content-Disposition: form-data; name="file"; filename="a.jsonl"', GOOD)
_PURPOSE = Part(b'Content-Disposition: form-data; name="purpose"', b"fine-tune")
BOUNDARY = b"----b"


def form(*parts: Part, end: bytes = b"--\r\n") -> bytes:
    """A multipart body."""
    return b"".join(b"--" + BOUNDARY + b"\r\n" + head + b"\r\n\r\n" + content + b"\r\n" for head,
    content in parts) + b"--" + BOUNDARY + end


def _named(name: bytes) -> bytes:
    return form(Part(b'Content-Disposition: form-data; name="file"; filename=' + name, GOOD), _PURPOSE)


def forms() -> dict[str, bytes]:
    """Uploads that must be refused; their content type has the right boundary."""
    kinds = {"assistants": b"assistants", "empty": b"", "long": b"x" * 10_000, "nul": b"fine-tune\0", "not utf-8": b"\xff",
    "upper": b"FINE-TUNE"}
    return {
        "nothing": b"", "no file": form(_PURPOSE), "no purpose": form(_FILE), "no part": form(), "twice": form(_FILE, _FILE,
        _PURPOSE),
        "purpose twice": form(_FILE, _PURPOSE, _PURPOSE), "another field": form(_FILE, _PURPOSE,
        Part(_PURPOSE.head.replace(b"purpose", b"x"), b"1")),
        "file as text": form(Part(b'Content-Disposition: form-data; name="file"', GOOD), _PURPOSE),
        "another boundary": b"--x\r\n\r\n--x--",
        "purpose as file": form(_FILE, Part(b'Content-Disposition: form-data; name="purpose"; filename="x"', b"fine-tune")),
        "cut": form(_FILE, _PURPOSE)[:-40], "cut in head": form(_FILE)[:40], "no end": form(_FILE, _PURPOSE, end=b""),
        "garbage": b"\0\xff" * 1000,
        "no head": form(Part(b"", b"x")), "no name": form(Part(b"Content-Disposition: form-data", b"x")),
        "long head": form(Part(b"X: " + b"y" * 100_000, b"x")),
        "many heads": form(Part(b"\r\n".join(b"X-%d: 1" % i for i in range(5000)), b"x")),
        "many parts": form(*[_PURPOSE] * 5000),
        "many files": form(*[_FILE] * 500), "no colon": form(Part(b"Content-Disposition", b"x")),
        "empty file": form(_FILE._replace(content=b""), _PURPOSE),
        "expiry": form(_FILE, _PURPOSE, Part(b'Content-Disposition: form-data; name="expires_after[seconds]"', b"10")),
        "no file name": _named(b'""'), "dots": _named(b'".."'), "slash": _named(b'"a/"'), "control": _named(b'"a\x07b"'),
        "long name": _named(b'"' + b"x" * 5000 + b'"'),
        **{f"purpose {name}": form(_FILE, _PURPOSE._replace(content=value)) for name, value in kinds.items()},
    }


FILE_NAMES = ("../../../etc/cron.d/x", "..\\..\\boot.ini", "/etc/passwd", "C:\\x", "a;b|c&d.jsonl", "$(reboot)", "💩.jsonl",
"a'b.jsonl", "%2e%2e%2fx")
"""Taken, as names without a directory."""

_GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
_POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
STREAMS: dict[str, bytes] = {
    "garbage": b"\0\xff\xfe" * 100, "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200,
    "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no version": b"GET /health\r\n\r\n", "version 9.9": b"GET /health HTTP/9.9\r\n\r\n",
    "http/1.0": b"GET /health HTTP/1.0\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n", "two hosts": _GET + b"Host: y\r\n\r\n",
    "absolute": b"GET http://x/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "authority": b"CONNECT x:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "asterisk": b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "trace": b"TRACE / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "own method": b"FROBNICATE / HTTP/1.1\r\nHost: localhost\r\n\r\n", "long method": b"A" * 100_000 + b" / HTTP/1.1\r\n\r\n",
    "empty lines": b"\r\n" * 1000,
    "long path": b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "dots": b"GET /v1/files/../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "dots in page": b"GET /page/../../app.py HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "raw bytes in path": b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "nul in path": b"GET /\0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "blank in path": b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "long header": _GET + b"X: " + b"y" * 500_000 + b"\r\n\r\n",
    "many headers": _GET + b"".join(b"X-%d: 1\r\n" % i for i in range(20_000)) + b"\r\n", "no colon": _GET + b"X\r\n\r\n",
    "nul in header": _GET + b"X: a\0b\r\n\r\n",
    "folded header": _GET + b"X: a\r\n b\r\n\r\n", "blank before colon": _GET + b"X : a\r\n\r\n",
    "empty header name": _GET + b": a\r\n\r\n",
    "negative length": _POST + b"Content-Length: -1\r\n\r\n{}", "length of text": _POST + b"Content-Length: ten\r\n\r\n{}",
    "two lengths": _POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "huge length": _POST + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n{}",
    "length and chunks": _POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "no length": _POST + b"\r\n{}", "bad chunk": _POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "negative chunk": _POST + b"Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n",
    "huge chunk": _POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n{}",
    "unknown encoding": _POST + b"Transfer-Encoding: gzip\r\n\r\n{}",
    "body cut": _POST + b"Content-Length: 100\r\n\r\n{", "chunks cut": _POST + b"Transfer-Encoding: chunked\r\n\r\n64\r\n{",
    "expect": _POST + b"Expect: nothing\r\nContent-Length: 2\r\n\r\n{}",
    "upgrade": _GET + b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: x\r\n\r\n",
    "body of get": _GET + b"Content-Length: 4\r\n\r\n\0\xff\0\xff",
    "pipelined garbage": _GET + b"\r\n" + _GET + b"\r\n\0\xff garbage\r\n\r\n", "pipelined": (_GET + b"\r\n") * 200,
    "smuggled": _POST + b"Content-Length: 2\r\n\r\n{}GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "bad auth": _GET + b"Authorization: Bearer \xff\xfe\r\n\r\n",
    "long auth": _GET + b"Authorization: Bearer " + b"x" * 60_000 + b"\r\n\r\n",
    "bad type": _POST.replace(b"application/json", b"\xff;=;;") + b"Content-Length: 2\r\n\r\n{}",
    "bad request id": _GET + b"X-Request-Id: \xff\xfe\r\n\r\n", "half a head": _GET, "one byte": b"G", "nothing": b"",
}
"""Sent as they are, then the sending side is closed."""

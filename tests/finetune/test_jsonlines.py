"""The one reader of JSON Lines: encodings by name, byte order marks, keys that come twice."""

from __future__ import annotations

import codecs
import gzip
import json
from pathlib import Path

import pytest

from coserve.config.settings import FinetuneConfig
from coserve.core import InvalidRequest
from coserve.finetune.datasets import load_training
from coserve.finetune.jsonlines import LineError, UploadCheck, read_object
from coserve.text.tokenizer import ChatTokenizer

LINE = json.dumps({"text": "hé"}, ensure_ascii=False)
FOREIGN = {
    "utf-16": (LINE.encode("utf-16"), "UTF-16, not UTF-8; save it as UTF-8"),
    "utf-16, big": (codecs.BOM_UTF16_BE + LINE.encode("utf-16-be"), "UTF-16, not UTF-8"),
    "utf-16 without mark": (LINE.encode("utf-16-le"), "UTF-16, not UTF-8"),
    "utf-16, big, without mark": (LINE.encode("utf-16-be"), "UTF-16, not UTF-8"),
    "utf-32": (LINE.encode("utf-32"), "UTF-32, not UTF-8; save it as UTF-8"),
    "utf-32 without mark": (LINE.encode("utf-32-le"), "UTF-32, not UTF-8"),
    "utf-32, big, without mark": (LINE.encode("utf-32-be"), "UTF-32, not UTF-8"),
    "gzip": (gzip.compress(LINE.encode(), mtime=0), "compressed (gzip); give the file inside"),
    "parquet": (b"PAR1" + bytes(20), "a Parquet file; write it as JSON Lines"),
}
GOOD = {
    "mark": codecs.BOM_UTF8 + LINE.encode(), "mark and lines": codecs.BOM_UTF8 + f"{LINE}\r\n{LINE}\n".encode(),
    "plain": LINE.encode(), "blank lines": f"\n \n{LINE}".encode(), "blanks before": f"  {LINE}".encode(),
}


def upload(content: bytes, size: int = 7) -> None:
    check = UploadCheck()
    check.feed(content[:40])
    for at in range(40, len(content), size):
        check.feed(content[at : at + size])
    check.finish()


def train(path: Path, content: bytes, tokenizer: ChatTokenizer) -> int:
    path.write_bytes(content)
    return len(load_training(path, tokenizer, FinetuneConfig(), max_length=100).groups)


@pytest.mark.parametrize("name", FOREIGN)
def test_other_encodings_are_named_by_uploads_and_training_alike(name: str, tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    content, words = FOREIGN[name]
    with pytest.raises(InvalidRequest) as at_upload:
        upload(content)
    with pytest.raises(InvalidRequest) as at_training:
        train(tmp_path / "x.jsonl", content, tokenizer)
    assert str(at_upload.value).startswith(f"file: is {words}")
    assert str(at_training.value).startswith(f"x.jsonl: encoding: the file is {words}")


@pytest.mark.parametrize("name", GOOD)
def test_what_one_takes_the_other_takes(name: str, tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    upload(GOOD[name])
    assert train(tmp_path / "x.jsonl", GOOD[name], tokenizer) == GOOD[name].count(b"text")


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is empty"), (LINE.encode() + b"\xc3", "ends inside a character"), (b"\xff" + LINE.encode(), "isn't valid UTF-8"),
    (b"[1]\n2\n", "no line that is a JSON object"), (codecs.BOM_UTF8, "no line that is a JSON object"),
    (codecs.BOM_UTF8 + b"[]", "write each object of a JSON array on a line of its own"),
    (b'[\n  {\n    "text": "x"\n  }\n]\n', "write each object of a JSON array on a line of its own"),
    (b"[" + b", ".join([LINE.encode()] * 100_000) + b"]", "write each object of a JSON array on a line of its own"),
    (b"\n[1]\n", "write each object of a JSON array on a line of its own"),
])
def test_uploads_that_are_no_json_lines(content: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        upload(content)
    assert caught.value.param == "file"


@pytest.mark.parametrize("line", [
    '{"a": 1, "a": 1}', '{"x": {"a": 1, "a": 2}}', '{"x": [[{"a": null, "b": 1, "a": null}]]}', '{"a": 1, "\\u0061": 2}',
])
def test_keys_twice_at_any_depth(line: str) -> None:
    with pytest.raises(LineError, match='"a": the key is in one object twice'):
        read_object(line.encode())
    assert read_object(b'{"a": {"a": [{"a": 1}, {"a": 2}]}}') == {"a": {"a": [{"a": 1}, {"a": 2}]}}

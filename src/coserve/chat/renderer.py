"""The process that renders chat templates of requests: `python -P renderer.py BYTES SECONDS`. See foreign.py, which starts it.

It reads questions from its standard input and writes answers to its standard output, each a line of JSON. A question may take
BYTES of memory beside what the process has at its start, and SECONDS of processor time; one that takes more processor time ends
the process. Nothing of coserve is imported, as that would bring torch along.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Mapping
from typing import Any

from transformers.utils.chat_template_utils import (
    _compile_jinja_template,
    _get_template_literal_text,
    _get_template_variables,
)

_NICENESS = 10
"""The server's own work comes first."""


def answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """{source, variables, max_chars} -> {text}, or {too_long}; {source} alone -> {written, reads}. In any case {error} if the
    template fails."""
    try:
        source = question["source"]
        if "variables" in question:
            return render(source, question["variables"], question["max_chars"])
        return {"written": _get_template_literal_text(source), "reads": sorted(_get_template_variables(source))}
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:  # whatever a template raises
        return {"error": " ".join(str(error).split())[:10_000] or type(error).__name__}


def render(source: str, variables: Mapping[str, Any], max_chars: int | None) -> dict[str, Any]:
    """The text; {too_long} if it has more than max_chars characters."""
    pieces, size = list[str](), 0
    for piece in _compile_jinja_template(source).generate(variables):
        size += len(piece)
        if max_chars is not None and size > max_chars:
            return {"too_long": True}
        pieces.append(piece)
    text = "".join(pieces)
    text.encode()  # half of a surrogate pair is no text
    return {"text": text}


def main() -> None:
    """Answers until its standard input ends."""
    num_bytes, seconds = int(sys.argv[1]), float(sys.argv[2])
    os.nice(_NICENESS)
    with open("/proc/self/statm") as sizes:
        held = int(sizes.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + num_bytes, held + num_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _say({"ready": True})
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(used.ru_utime + used.ru_stime + seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        try:
            found = answer(json.loads(line))
        except RecursionError:
            found = {"error": "its variables are nested too deeply"}
        _say(found)


def _say(found: Mapping[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(found).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

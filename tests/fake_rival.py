"""Stand-ins for the programs that coserve is measured against, as scripts: a server, and a trainer.

    python fake_rival.py serve ... --port N     answers as vLLM and coserve do; its job's counter rises while there is a job
    python fake_rival.py train MODEL DATA OUTPUT ...    100 tokens every 0.05 s, as bench/pefttrain.py tells of them
    python fake_rival.py fail                   ends with an error
"""

from __future__ import annotations

import http.server
import json
import sys
import time
from pathlib import Path
from typing import Any

TOKEN_S = 0.002
TOKENS_PER_S = 1000.0


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    training_since: float | None = None
    trained = 0.0

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, value: Any, kind: str = "application/json") -> None:
        body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/metrics":
            since = Handler.training_since
            tokens = Handler.trained + (0 if since is None else TOKENS_PER_S * (time.monotonic() - since))
            self.reply(f"# TYPE coserve_finetune_tokens counter\ncoserve_finetune_tokens_total {tokens}\n", "text/plain")
        elif self.path.startswith("/v1/fine_tuning"):
            self.reply(self.job())
        else:
            self.reply({"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/v1/completions":
            self.stream(json.loads(body)["max_tokens"])
        elif self.path == "/v1/files":
            self.reply({"id": "file-1", "object": "file", "bytes": 1, "created_at": 0, "filename": "f", "purpose": "fine-tune",
                        "status": "processed"})
        elif self.path.endswith("/cancel"):
            assert Handler.training_since is not None
            Handler.trained += TOKENS_PER_S * (time.monotonic() - Handler.training_since)
            Handler.training_since = None
            self.reply(self.job())
        else:
            Handler.training_since = time.monotonic()
            self.reply(self.job())

    def job(self) -> dict[str, Any]:
        status = "cancelled" if Handler.training_since is None else "running"
        return {"id": "ftjob-1", "object": "fine_tuning.job", "status": status, "error": None, "model": "tiny", "created_at": 0,
                "training_file": "file-1", "seed": 0, "result_files": [], "organization_id": "", "hyperparameters": {}}

    def stream(self, count: int) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        events = [json.dumps({"choices": [], "usage": {"completion_tokens": n + 1}}) for n in range(count)]
        for event in (*events, "[DONE]"):
            time.sleep(TOKEN_S)
            data = f"data: {event}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.write(b"0\r\n\r\n")


def train(output: Path) -> None:
    tokens = 0
    with output.open("w") as file:
        while True:
            time.sleep(0.05)
            tokens += 100
            file.write(json.dumps({"time_s": time.monotonic(), "tokens": tokens}) + "\n")
            file.flush()


def main() -> None:
    kind = sys.argv[1]
    if kind == "fail":
        print("Traceback (most recent call last):\nValueError: no such card\nbye", file=sys.stderr)
        sys.exit(1)
    if kind == "train":
        train(Path(sys.argv[4]))
    port = int(sys.argv[sys.argv.index("--port") + 1])
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()

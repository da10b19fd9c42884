"""A process of a fleet without an engine: it logs as a real one, and does what its settings' model is called.

    serves     it serves, with a child in the engine's place that ends with it
    refuses    it says why it can't start, and ends
    crashes    it ends with a traceback

At SIGTERM it drains for a moment. It runs without coserve, so that it is there at once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

CHILD = "import sys; sys.stdin.read()"


def log(level: str, message: str) -> None:
    fields = {"time": "", "level": level, "process": sys.argv[1], "logger": "x", "message": message, "job": "j"}
    print(json.dumps(fields), flush=True)


def end_with_input() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_input, daemon=True).start()
    model = setup["config"]["model"]
    if model == "refuses":
        log("error", "model: there is no such model")
        sys.exit(2)
    if model == "crashes":
        raise ZeroDivisionError("a bug")
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE)
    keys, token = [*setup["config"]["api_key"], *setup["keys"].items()], "RAY_AUTH_TOKEN" in os.environ
    serves = f"{sys.argv[1]} serves at tcp://{setup['host']}:1 with child {child.pid}"
    log("info", f"{serves} keys {keys} token {token} data {setup['config']['data_dir']}")
    stop.wait()
    log("info", "draining")
    time.sleep(0.2)
    log("info", "drained")


if __name__ == "__main__":
    main()

"""Writes that the disk refuses: which refusals may be temporary, and how a job waits for their end.

Owns: the kinds of refusal, the pause between two tries, the job's messages. Does not own: what is written (job.py,
checkpoints.py), threads (engine/diskwrite.py).
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable

from safetensors import SafetensorError

RETRY_S = 2.0
"""Seconds between two tries of a refused write."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PASSING = frozenset({
    *_FULL, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE,
    errno.ENOMEM, errno.EAGAIN, errno.EBUSY,
})
_RUST_CODE = re.compile(r"code: (\d+)|os error (\d+)")
"""Finds the system's errno in the text of a SafetensorError."""


def is_full(error: OSError) -> bool:
    """Whether the disk or the quota is full."""
    return error.errno in _FULL


def refusal_of(error: BaseException) -> str | None:
    """Why the disk refuses a write, in a few words. None for an error that trying again can't fix."""
    code: int | None = None
    if isinstance(error, OSError):
        code = error.errno
    elif isinstance(error, SafetensorError) and (found := _RUST_CODE.search(str(error))):
        code = int(found[1] or found[2])
    if code not in _PASSING or code is None:
        return None
    return "the disk is full" if code in _FULL else f"the disk can't be written ({os.strerror(code)})"


def waiting_message(reason: str) -> str:
    """The message of a job that begins to wait."""
    return f"{reason}: the job waits, and goes on when its files can be written"


GOES_ON = "the disk takes the job's files again; the job goes on"


def insist(action: Callable[[], object], notify: Callable[[str, str], None]) -> None:
    """Repeats a write until it succeeds, blocking the caller meanwhile. notify(level, message): called when the job begins to
    wait and when it goes on. Raises errors that trying again can't fix."""
    waited = False
    while True:
        try:
            action()
        except (OSError, SafetensorError) as error:
            reason = refusal_of(error)
            if reason is None:
                raise
            if not waited:
                notify("warn", waiting_message(reason))
            waited = True
            time.sleep(RETRY_S)
        else:
            if waited:
                notify("info", GOES_ON)
            return

"""Writes that the disk refuses for now: which refusals pass, and how a job waits until they do.

Owns: the kinds of refusal, the pause between two tries, what the job says. Does not own: what is written (job.py,
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
"""Between two tries of a write that was refused."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PASSING = frozenset({
    *_FULL, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE,
    errno.ENOMEM, errno.EAGAIN, errno.EBUSY,
})
_RUST_CODE = re.compile(r"code: (\d+)|os error (\d+)")
"""Where safetensors' errors carry the system's number."""


def is_full(error: OSError) -> bool:
    """Whether there is no room, on the disk or in a quota."""
    return error.errno in _FULL


def refusal_of(error: BaseException) -> str | None:
    """Why the disk refuses a write, in a few words; None for an error that more tries don't mend."""
    code: int | None = None
    if isinstance(error, OSError):
        code = error.errno
    elif isinstance(error, SafetensorError) and (found := _RUST_CODE.search(str(error))):
        code = int(found[1] or found[2])
    if code not in _PASSING or code is None:
        return None
    return "the disk is full" if code in _FULL else f"the disk can't be written ({os.strerror(code)})"


def waiting_message(reason: str) -> str:
    """What a job says when it begins to wait."""
    return f"{reason}: the job waits, and goes on when its files can be written"


GOES_ON = "the disk takes the job's files again; the job goes on"


def insist(action: Callable[[], object], tell: Callable[[str, str], None]) -> None:
    """Repeats a write until the disk takes it, for a job that has a process of its own. tell(level, message): called when the
    job begins to wait and when it goes on. Raises errors that more tries don't mend."""
    waited = False
    while True:
        try:
            action()
        except (OSError, SafetensorError) as error:
            reason = refusal_of(error)
            if reason is None:
                raise
            if not waited:
                tell("warn", waiting_message(reason))
            waited = True
            time.sleep(RETRY_S)
        else:
            if waited:
                tell("info", GOES_ON)
            return

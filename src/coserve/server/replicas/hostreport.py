"""What a host tells of its process, as it is read where the fleet is held together."""

from __future__ import annotations

from typing import Any

import msgspec


class LogLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line that a process has logged. level: as Python's logging has it. fields: ids and others of it."""

    level: int
    message: str
    fields: dict[str, Any] = {}


class HostReport(msgspec.Struct, frozen=True, kw_only=True):
    """What has become of a process. lines: those from number `first` on. serves: whether it has started. ended: whether it has
    ended because it was asked to. problem: why it can't start, while that is so. starts: how many processes there were.
    package: coserve's version there. node: what the machine is called. address: where others reach it.
    place: which node of the cluster it is."""

    first: int
    lines: list[LogLine]
    serves: bool
    ended: bool
    problem: str
    starts: int
    pid: int
    package: str
    node: str
    address: str
    place: str


def read_report(data: bytes) -> HostReport:
    """The report that `ProcessHost.look` has made. Raises msgspec.ValidationError."""
    return msgspec.json.decode(data, type=HostReport)

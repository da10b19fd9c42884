"""How headers and settings write the names and addresses of a server, and the websites that may use it.

Owns: parsing, which host is the server's own. Does not own: what is refused for it (origins.py).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import NamedTuple

from coserve.config.values import require

ANY = "*"
LOOPBACK_NAME = "localhost"
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?")
_ALLOWED_NAME = re.compile(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_BLANKS = " \t"
"""What HTTP allows around the value of a header. No name contains Unicode's other blanks."""
_PORTS = {"http": 80, "https": 443}


class HostPort(NamedTuple):
    """A host and port as a URL names them. port: None is the scheme's own."""

    host: str
    port: int | None


def parse_host(header: str) -> HostPort | None:
    """The host, in lower case and without the brackets of IPv6, and the port of a Host header; None if it isn't a valid one."""
    match = _HOST.fullmatch(header.strip(_BLANKS))
    if match is None or int(match[2] or 0) > 65535:
        return None
    return HostPort(match[1].lower().strip("[]"), None if match[2] is None else int(match[2]))


def is_own_origin(origin: str, host: HostPort) -> bool:
    """Whether an Origin header names the server that the Host header named: http or https (behind a proxy), the same host and
    port. `null`, which sandboxed pages and files send, is nobody's."""
    match = _ORIGIN.fullmatch(origin.strip(_BLANKS).lower())
    if match is None or match[1] not in _PORTS or int(match[3] or 0) > 65535:
        return False
    default = _PORTS[match[1]]
    return match[2].strip("[]") == host.host and int(match[3] or default) == (default if host.port is None else host.port)


class OwnNames:
    """The names and addresses that a server without keys answers to. is_local: whether only this machine reaches --host."""

    def __init__(self, bound: str, allowed: Sequence[str]) -> None:
        """bound: the value of --host. allowed: the values of --allowed-hosts."""
        self._any = ANY in allowed
        self._names = {LOOPBACK_NAME, bound.lower().strip("[]"), *(name.lower().strip("[]") for name in allowed)}
        self._suffixes = tuple(name[1:].lower() for name in allowed if name.startswith("*."))
        address = _address(bound)
        self._any_address = bound == "" or (address is not None and address.is_unspecified)
        self.is_local = bound == LOOPBACK_NAME or (address is not None and address.is_loopback)

    def has(self, host: str) -> bool:
        """Whether this name or address, as `parse_host` gives it, is the server's own."""
        if self._any or host in self._names or (self._suffixes and host.endswith(self._suffixes)):
            return True
        address = _address(host)  # only names are looked up, so only a name can be rebound
        return address is not None and (self._any_address or address.is_loopback or address.is_unspecified)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found


def check_allowed(hosts: Sequence[str], origins: Sequence[str]) -> None:
    """Checks the settings --allowed-hosts and --allowed-origins. Raises ConfigError that names the setting."""
    for name in hosts:
        known = name == ANY or _ALLOWED_NAME.fullmatch(name) is not None or _address(name.strip("[]")) is not None
        require(known, "allowed_hosts",
                f"must be names without scheme and port, such as ai.example.com or *.example.com, got {name!r}")
    for origin in origins:
        match = _ORIGIN.fullmatch(origin.lower())
        require(origin == ANY or (match is not None and match[1] in _PORTS), "allowed_origins",
                f"must be scheme, name and port of a website, such as https://app.example.com, got {origin!r}")

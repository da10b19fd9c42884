"""Who asks: API keys and the tenants they stand for.

Owns: making, reading and checking keys. Does not own: where keys come from (settings, environment, command line), what a
tenant may see.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from coserve.config.values import require
from coserve.server.errors import StorageRefused, Unauthorized
from coserve.server.index.store import Store
from coserve.server.records import KeyRecord, new_id, now

DEFAULT_TENANT = "default"
KEYS_VARIABLE = "COSERVE_API_KEYS"
"""The variable of the environment that may hold keys, as `read_keys` reads them."""
_CACHE_S = 1.0
"""Seconds for which a key may still be accepted after another process has revoked it."""
_AWAY_S = 300.0
"""Seconds for which what was last read counts while the index can't be read: requests go on meanwhile."""
_PATIENCE_S = 0.5
"""Seconds that a request waits for the index where an older answer is known."""
_READERS = 4
_T = TypeVar("_T")
_CACHE_SIZE = 1024
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_KEY = re.compile(r"[!-~]+")
_PREFIX_LENGTH = 7


class Tenants:
    """The tenants, by API key. Any thread may use it."""

    def __init__(
        self, store: Store, api_keys: Sequence[str | tuple[str, str]], *, digests: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ConfigError as `digest_keys`.

        api_keys: keys beside those in the store, as of `digest_keys`. digests: more of them, as `digest_keys` returns them.
        clock: gives seconds.
        """
        self._store, self._clock = store, clock
        self._lock = threading.Lock()
        self._configured = {**(digests or {}), **digest_keys(api_keys)}
        self._known: dict[str, tuple[float, str]] = {}
        self._open_until = -math.inf
        self._readers = ThreadPoolExecutor(_READERS, "coserve-keys")
        self._readings: dict[str, Future[Any]] = {}
        self._closed = bool(self._configured)

    def identify(self, authorization: str | None) -> str:
        """The tenant of an Authorization header, 'Bearer KEY'. Raises Unauthorized.

        As long as no key was ever made, everybody is the default tenant.
        """
        if self.is_open():
            return DEFAULT_TENANT
        scheme, _, key = (authorization or "").strip().partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise Unauthorized("an API key is needed: send the header 'Authorization: Bearer KEY'")
        tenant = self._find(digest_key(key))
        if tenant is None:
            raise Unauthorized("this API key isn't known, or was revoked")
        return tenant

    async def asks_for_keys(self) -> bool:
        """Whether requests need a key."""
        if self._closed or self._clock() < self._open_until:
            return self._closed
        return not await asyncio.to_thread(self.is_open)  # it looks into the index

    def is_open(self) -> bool:
        """Whether no key was ever made. A revoked key counts too: revoking the last one must not let everybody in."""
        if self._closed:
            return False
        if self._clock() < self._open_until:
            return True
        known = self._clock() < self._open_until + _AWAY_S
        try:
            found = self._read("", self._store.list_keys, _PATIENCE_S if known else None)
        except StorageRefused:
            if known:
                return True
            raise
        if found:
            self._closed = True
            return False
        self._open_until = self._clock() + _CACHE_S
        return True

    def _find(self, digest: str) -> str | None:
        # All are compared, so that the time which this takes says nothing about the keys.
        same = [tenant for known, tenant in self._configured.items() if hmac.compare_digest(known, digest)]
        if same:
            return same[0]
        with self._lock:
            until, tenant = self._known.get(digest, (-math.inf, ""))
        if self._clock() < until:
            return tenant
        known = self._clock() < until + _AWAY_S
        try:
            record = self._read(digest, lambda: self._store.find_key(digest), _PATIENCE_S if known else None)
        except StorageRefused:
            if known:
                return tenant
            raise
        with self._lock:
            self._known.pop(digest, None)
            if record is None or record.revoked_at is not None:
                return None
            if len(self._known) >= _CACHE_SIZE:
                self._known.clear()
            self._known[digest] = (self._clock() + _CACHE_S, record.tenant)
        return record.tenant


    def _read(self, what: str, read: Callable[[], _T], patience_s: float | None) -> _T:
        """Reads from the index, once for all that want the same. Raises StorageRefused, also if there is no answer within
        patience_s; None: waits for it."""
        with self._lock:
            reading = self._readings.get(what)
            if reading is None or reading.done():
                reading = self._readings[what] = self._readers.submit(read)
        try:
            return reading.result(patience_s)  # one key, one kind of answer
        except TimeoutError as error:
            raise StorageRefused("the index's database does not answer; try again") from error
        finally:
            with self._lock:
                if reading.done() and self._readings.get(what) is reading:
                    del self._readings[what]


def make_key(tenant: str) -> tuple[str, KeyRecord]:
    """A new key and its record. Raises ConfigError if the tenant's name isn't valid."""
    key = f"sk-{secrets.token_urlsafe(32)}"
    return key, KeyRecord(
        id=new_id("key"), tenant=check_tenant(tenant), prefix=key[:_PREFIX_LENGTH], digest=digest_key(key), created_at=now(),
    )


def digest_key(key: str) -> str:
    """SHA-256, hexadecimal. Keys that are made here are random, so a slow hash would protect nothing."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def digest_keys(api_keys: Sequence[str | tuple[str, str]]) -> dict[str, str]:
    """{digest: tenant} of keys, which is enough to check them. Raises ConfigError for a name or key that isn't valid, and for a
    key of two tenants.

    api_keys: each is a key of the default tenant, or a pair (tenant, key).
    """
    found: dict[str, str] = {}
    for given in api_keys:
        tenant, key = (DEFAULT_TENANT, given) if isinstance(given, str) else given
        good = _KEY.fullmatch(key) is not None
        require(good, "api_key", "a key is made of printable ASCII characters without spaces")
        first = found.setdefault(digest_key(key), check_tenant(tenant))
        require(first == tenant, "api_key", f"tenants {tenant} and {first} have the same key")
    return found


def read_keys(text: str) -> tuple[tuple[str, str], ...]:
    """'tenant=key,tenant=key' as pairs; nothing for an empty text. Raises ConfigError."""
    pairs = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        tenant, equals, key = entry.partition("=")
        require(bool(tenant and equals and key), "COSERVE_API_KEYS", "must be tenant=key,tenant=key")
        pairs.append((tenant.strip(), key.strip()))
    return tuple(pairs)


def check_tenant(name: str) -> str:
    """Returns the name. Raises ConfigError if it isn't valid."""
    require(_TENANT.fullmatch(name) is not None, "tenant",
            f"must be up to 64 letters, digits, dots, dashes and underscores, a letter or digit first, got {name!r}")
    return name

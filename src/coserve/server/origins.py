"""Keeps websites away from a server that asks for no key, which a browser on the same machine could reach as its user does.

    header           allowed                                     anything else (403) is from
    Host             a name or address of this server            a page whose name was rebound to this address
    Origin           this server's own page, or an allowed one   another website's script or form
    Sec-Fetch-Site   same-origin, none or missing                another website's image, script, frame

Where no key is asked for, a request from this machine need not be its user's: any open website can have the browser send one.
So all three headers are checked, on every route and for every method, also those that only read. Programs (curl, the openai
client) send neither Origin nor Sec-Fetch-Site. Where keys are asked for, nothing is checked here: a browser adds no key by
itself, and no other website can read or guess it.

Owns: these rules. Does not own: which names are the server's (hostnames.py), the headers that let an allowed origin read
(Starlette's CORSMiddleware, see app.py), bodies' content types (bodies/reader.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coserve.server.handlers import plain_body
from coserve.server.hostnames import ANY, HostPort, OwnNames, is_own_origin, parse_host

_OWN = ("same-origin", "none")
"""Allowed values of Sec-Fetch-Site. same-site isn't: it means another port or subdomain, which may be another website."""
_SHOWN = 80
_PRIVATE = (("cross-origin-resource-policy", "same-origin"), ("x-content-type-options", "nosniff"))
"""For browsers that send no Sec-Fetch-Site: with these headers no other website's page can embed the answer."""


class OriginGuard:
    """Refuses what only a website's page would send, while no key is asked for."""

    def __init__(
        self, app: ASGIApp, *, names: OwnNames, origins: Sequence[str], asks_for_keys: Callable[[], Awaitable[bool]]
    ) -> None:
        """origins: the values of --allowed-origins."""
        self._app, self._names, self._asks_for_keys = app, names, asks_for_keys
        self._any_origin, self._origins = ANY in origins, frozenset(origin.lower() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        if not await self._asks_for_keys() and (problem := self._problem(scope)) is not None:
            refusal = JSONResponse(plain_body(*problem), problem[0], headers={"connection": "close", "vary": "Origin"})
            await refusal(scope, receive, send)
            return

        async def private(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _PRIVATE:
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, private)

    def _problem(self, scope: Scope) -> tuple[int, str, str] | None:
        """The status, the message and the header for a request that is refused; None for others."""
        headers = Headers(scope=scope)
        given = headers.getlist("host")
        if not given and scope.get("http_version") == "1.0":  # no browser speaks it
            host = HostPort("", None)
        elif len(given) != 1 or (parsed := parse_host(given[0])) is None:
            return 400, "host: one Host header with the server's name is expected", "host"
        elif not self._names.has(parsed.host):
            name = parsed.host[:_SHOWN]
            return 403, (f"host: without API keys this server doesn't answer to the name {name}; start it with "
                         f"--allowed-hosts {name}, or make a key with `coserve keys add`"), "host"
        else:
            host = parsed
        origins = headers.getlist("origin")
        allowed = [origin for origin in origins if self._any_origin or origin.strip().lower() in self._origins]
        if len(allowed) == len(origins) == 1:
            return None  # and Sec-Fetch-Site says cross-site, as it should
        if any(not is_own_origin(origin, host) for origin in origins):
            shown = origins[0][:_SHOWN]
            return 403, (f"origin: other websites can't use this server, and this request is from {shown}; start it with "
                         f"--allowed-origins {shown} if that is yours"), "origin"
        if any(site.strip().lower() not in _OWN for site in headers.getlist("sec-fetch-site")) and not _is_link(scope, headers):
            return 403, "sec-fetch-site: other websites can't use this server; open its page itself", "sec-fetch-site"
        return None


def _is_link(scope: Scope, headers: Headers) -> bool:
    """Whether the request follows a link to the page. That is allowed, since the website with the link learns nothing by it."""
    return (
        scope["type"] == "http" and scope["path"] == "/" and scope["method"] == "GET" and not scope.get("query_string")
        and headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    )

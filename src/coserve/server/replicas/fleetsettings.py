"""What settings of a fleet must be before anything is started, and what is unwise in them.

Owns: these checks. Does not own: settings and their own checks (server/settings.py), what a cluster must be (raycluster.py).
"""

from __future__ import annotations

from coserve.config.values import require
from coserve.server.index.database import read_url
from coserve.server.settings import ServerConfig


def check_fleet(config: ServerConfig) -> None:
    """Raises ConfigError where settings of a fleet are missing or contradict each other. Nothing is started or imported."""
    if config.replicas is None:
        for name in ("ray_address", "store"):
            require(getattr(config, name) is None, name, "is for several replicas; give --replicas too")
        return
    require(config.replicas >= 1, "replicas", f"must be at least 1, got {config.replicas}")
    url = config.database_url or ""
    require(url.startswith("postgresql"), "database_url",
            "replicas share what they know through PostgreSQL; give --database-url postgresql://USER@HOST/DATABASE")
    require(bool(config.store), "store",
            "replicas need a place for files that all of them see; give --store DIRECTORY or --store s3://BUCKET/PREFIX")
    address = config.ray_address
    require(address is None or "://" not in address, "ray_address",
            f"must be auto or HOST:PORT of a cluster that this machine has joined (`ray start`), got {address!r}")


def shown_secrets(config: ServerConfig) -> list[str]:
    """Warnings of secrets in the settings that Ray would show to all who reach its cluster, and keep on the disk of its Redis
    if it has one: it keeps the command line, and what actors are made with. Raises ConfigError for a URL that can't be read."""
    found = []
    url = read_url(config.database_url or "postgresql://")
    if url.password is not None or "password" in url.query:
        found.append("database_url: Ray keeps its password in the cluster's state; leave it out, and put it into ~/.pgpass or "
                     "PGPASSWORD of each machine")
    if config.api_key:
        found.append("api_key: if it is on the command line, Ray keeps it in the cluster's state; make keys with `coserve keys "
                     "add` or set COSERVE_API_KEYS")
    return found

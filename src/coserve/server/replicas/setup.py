"""What a process of a fleet is told at its start, a line of JSON on its standard input; and what it tells its host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec

from coserve.server.replicas.processhost import REFUSED as REFUSED
from coserve.server.replicas.processhost import SERVES as SERVES
from coserve.server.settings import ServerConfig

DRAIN_S = 120.0
"""Seconds that a replica gets to hand over its jobs: to end their steps, and to have them stored."""


class FleetSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What a process of the fleet reads first. host: the address at which others reach its machine. node: what its machine is
    called. sharers: how many engines share its memory (memoryshare.py). keys: for an ingress, {digest: tenant} of the API keys
    that the command was given. The keys themselves don't travel."""

    config: ServerConfig
    host: str = "127.0.0.1"
    node: str = ""
    sharers: int = 1
    keys: dict[str, str] = {}


def with_absolute_paths(config: ServerConfig) -> ServerConfig:
    """The settings with paths that don't depend on a process's directory: relative ones count from this process's. A model
    keeps the name that was given; a text that is no path here is a hub id."""
    model, names, store = config.model, config.served_model_name, config.store
    if model is not None and not Path(model).is_absolute() and Path(model).exists():
        model, names = str(Path(model).absolute()), names or (model,)
    if store is not None and (store.startswith("file://") or "://" not in store):
        place = Path(store.removeprefix("file://")).expanduser()
        store = str(place.absolute()) if store else store
    return replace(
        config, model=model, served_model_name=names, store=store, data_dir=config.data_dir.absolute(),
        lora_modules=tuple((name, str(Path(directory).absolute())) for name, directory in config.lora_modules),
        adapter_root=None if config.adapter_root is None else str(Path(config.adapter_root).absolute()),
    )


def write_setup(setup: FleetSetup) -> bytes:
    """The setup as one line of JSON, with its line break."""
    return msgspec.json.encode(setup, enc_hook=str) + b"\n"  # a Path as text


def read_setup(line: bytes) -> FleetSetup:
    """The setup in a line of `write_setup`. Raises msgspec.ValidationError."""
    return msgspec.json.decode(line, type=FleetSetup, dec_hook=lambda kind, text: kind(text))

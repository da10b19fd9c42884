"""The lines that a server logs once it listens: what is served, how memory is split, the objectives, the client's line."""

from __future__ import annotations

from collections.abc import Sequence

from coserve.model.memory import GIB
from coserve.scheduler.slo import describe_slo
from coserve.server.hostnames import OwnNames
from coserve.server.services import Services

_NO_KEY = "EMPTY"
"""The key shown in examples if the server asks for none, since OpenAI's client insists on one."""


def startup_lines(services: Services, port: int, places: Sequence[str] = ()) -> list[str]:
    """port: the one it listens at. places: lines about where the model runs and what is kept; none: of a server with its own
    engine."""
    config, info = services.config, services.engine.info
    memory = {name: f"{size / GIB:.2f} GiB" for name, size in info.memory.items()}
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::", "") else config.host
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    given, flags = (config.slo_tpot_ms, config.slo_ttft_ms), ("--slo-tpot-ms", "--slo-ttft-ms")
    objectives = describe_slo(info.objectives, given, flags)
    asks = not services.tenants.is_open()
    key = "YOUR-KEY" if asks else _NO_KEY
    open_to_others = not asks and not OwnNames(config.host, ()).is_local
    size = config.tensor_parallel_size
    coded = "" if info.quantization == "none" else f" with matrices in {info.quantization}"
    shared, each = (f" in each of {size} processes", " each") if size > 1 else ("", "")
    return [
        f"model     {', '.join(services.models.base_names)}: {info.architecture}, {info.num_parameters / 1e6:.0f} M parameters",
        f"runs      {info.dtype}{coded} on {info.device}, {info.threads} threads{shared}; requests of up to "
        f"{info.max_model_len} tokens; ready after {info.start_s:.0f} s",
        f"memory    weights {memory['weights']}{each}; pool {memory['pool']}{each}: {memory['inference']} guaranteed to "
        f"inference, training may take {memory['training']}",
        f"holds     {objectives}; policy {config.policy}",
        *(places or [f"data      {config.data_dir.absolute()}"]),
        f"keys      {'asked for' if asks else 'none: everybody who can reach the port may use it'}",
        *(["warning   no key is asked for, and other machines can reach this server: make one with `coserve keys add`"]
          if open_to_others else []),
        f"page      {address}/",
        f'client    OpenAI(base_url="{address}/v1", api_key="{key}")',
    ]

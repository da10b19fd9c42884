"""The settings of `coserve serve`: the server's own, beside those of config/settings.py.

Sources: defaults < TOML file < command line. Names are vLLM's where the meaning is the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coserve.chat.reasoning import PARSERS
from coserve.chat.template import ChatTemplate
from coserve.chat.toolprompt import CALL_FORMATS
from coserve.config.data import read_toml
from coserve.config.settings import POLICIES, EngineConfig, SchedulerConfig
from coserve.config.values import AUTO, SloMs, knob, read_memory, read_quantization, require, require_least
from coserve.core import ConfigError, InvalidRequest
from coserve.server.hostnames import check_allowed

DEFAULT_DATA_DIR = Path("coserve-data")
LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")
NO_PARSER = "none"
PARSER_ALIASES = {"qwen3_coder": "qwen3_xml"}
"""Other names of vLLM's for ways of writing calls."""
MODULE_JSON = '{"name": NAME, "path": DIRECTORY}'
"""An entry of lora_modules in vLLM's form."""
MAX_NUM_SEQS_CPU, MAX_NUM_SEQS_GPU = 64, 256
"""Requests that run at once by default: a GPU has time for more."""

_ENGINE_NAMES = {
    "tpot_ms": "slo_tpot_ms", "ttft_ms": "slo_ttft_ms", "memory_bytes": "kv_cache_memory_bytes", "max_adapters": "max_loras",
}
"""Fields of the engine's settings that have another name here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """One server: its HTTP side, its engine, its state."""

    model: str | None = None
    """A directory, a GGUF file or a hub id; None: SmolLM2."""
    host: str = knob("127.0.0.1", "Address to listen at (127.0.0.1).")
    port: int = knob(8000, "0: any free one (8000).")
    api_key: tuple[str, ...] = knob((), "Key of the default tenant; repeatable.")
    """Keys of the tenant 'default'; with none here and none in the store, no key is asked for."""
    allowed_hosts: tuple[str, ...] = knob((), "Name that a server without keys has; repeatable.")
    """Names beside localhost and --host that a server without keys answers to: NAME, *.NAME, or * for every name."""
    allowed_origins: tuple[str, ...] = knob((), "Website that may use the server; repeatable.")
    """Websites whose pages may use the server, https://NAME; * for every website."""
    served_model_name: tuple[str, ...] = knob((), "Name of the base model; repeatable.")
    """Names of the base model; the first one is shown. Default: the model's own."""
    max_model_len: int | None = knob(None, "Longest prompt and output together, in tokens.")
    allow_control_tokens: bool = knob(False, "Control tokens written out in messages count.")
    chat_template: str | None = knob(None, "File of a chat template, or its text.", metavar="FILE|TEXT")
    """The source of the chat template, in requests and in jobs; None: the model's own."""
    trust_request_chat_template: bool = knob(False, "Requests may bring a chat template.")
    reasoning_parser: str = knob(AUTO, f"{', '.join(PARSERS)}.")
    """How thoughts are told from answers; auto: as the chat template says."""
    tool_call_parser: str = knob(AUTO, "How calls of tools are read: auto, none or a name.")
    """How the model writes calls of tools: auto (as its chat template does), a name of vLLM's, or none (they aren't read)."""
    max_num_seqs: int | None = knob(None, "Requests that run at once (64, on a GPU 256).")
    max_num_batched_tokens: int = knob(2048, "Inference rows per iteration (2048).")
    max_num_queued_reqs: int = knob(4096, "Requests that may wait (4096).")
    """Requests that may wait; more get 429."""
    gpu_memory_utilization: float = knob(0.9, "Share of the GPU's memory (0.9).")
    """Share of the GPU's memory that weights and pool may take."""
    kv_cache_memory_bytes: int | None = knob(None, "Pool of cache and training.")
    """The pool of the key-value cache and training arenas, of each rank; None: from what is free."""
    tensor_parallel_size: int = knob(1, "Processes that share the model, a GPU each (1).", short="-tp")
    """Processes that share the model, each on a GPU of its own or on its share of the cores."""
    adapter_sharding: str = knob("", "Where parameters of adapters must lie on them (the cheapest).")
    """As `coserve plan` takes it: q_proj.lora_A=whole,q_proj.lora_B=out."""
    dtype: str = knob(AUTO, "auto, float32, bfloat16 or float64.")
    quantization: str = knob("none", "none, or fp8: the layers' matrices in 8-bit floats.", short="-q")
    """fp8 stores the matrices of the decoder layers in 8-bit floats: half of bfloat16's memory, a slightly other model."""
    device: str = knob(AUTO, "auto, cpu or cuda.")
    seed: int | None = knob(None, "Source of the seeds of requests that give none (random).")
    threads: int | None = knob(None, "CPU threads of the engine (all cores).")
    lora_modules: tuple[tuple[str, str], ...] = knob((), "NAME=DIRECTORY of an adapter, or JSON; repeatable.")
    """(name, directory) of adapters served from the start."""
    max_lora_rank: int = knob(64, "Largest rank (64).")
    max_loras: int = knob(128, "Adapters used at once (128).")
    adapter_root: str | None = knob(None, "/v1/load_lora_adapter takes directories below.")
    """/v1/load_lora_adapter takes directories below this one; None turns the route off."""
    slo_tpot_ms: SloMs | None = knob(None, "Objective per output token (by profile); none: best effort.", metavar="MS|none")
    """Objective: milliseconds per output token after the first, or "none": best effort. None: from the machine's profile."""
    slo_ttft_ms: SloMs | None = knob(None, "Objective to the first token (by profile); none: best effort.", metavar="MS|none")
    """Objective: milliseconds to the first token; otherwise as `slo_tpot_ms`."""
    policy: str = knob("coserve", f"{', '.join(POLICIES)}.")
    finetune_min_share: float = knob(0.0, "Share of time that jobs always get (0).")
    activation_memory: str = knob(AUTO, "Part of the pool for training: 12.5GB, a share, auto.")
    """Part of the pool that training may take: bytes (also 12.5GB, 800MiB), a share below 1 (0: no training), or auto."""
    max_jobs: int = knob(4, "Jobs that run at once (4).")
    """Finetuning jobs that run at once; more wait."""
    deterministic: bool = knob(False, "Jobs: same losses after a restart.")
    """Jobs train on a fixed window grid, unfused: bit-identical losses after a restart."""
    data_dir: Path = knob(DEFAULT_DATA_DIR, "Files, jobs, adapters and the index (coserve-data).")
    database_url: str | None = knob(None, "SQLAlchemy URL of the index (SQLite in the data directory).")
    replicas: int | None = knob(None, "Engines on a Ray cluster behind this address; needs --database-url and --store.")
    """How many engines serve behind one address, placed by Ray; None: one, without Ray."""
    ray_address: str | None = knob(None, "Ray cluster to join: auto or HOST:PORT (a local one).")
    """The Ray cluster that replicas run on; None: one is started on this machine."""
    store: str | None = knob(None, "Files of replicas: a directory that all see, or s3://BUCKET/PREFIX.")
    """Where replicas keep files, checkpoints and adapters."""
    max_file_bytes: int = knob(512 << 20, "Largest upload (512 MiB).")
    max_tenant_file_bytes: int = knob(64 << 30, "All files of a tenant (64 GiB).")
    """Of all files and jobs' outputs of a tenant together; uploads and jobs beyond are refused, and running jobs wait."""
    max_body_bytes: int = knob(16 << 20, "Largest other body (16 MiB).")
    max_tenant_queued_reqs: int | None = knob(None, "Outputs of a tenant that run or wait (share).")
    """Outputs of one tenant that may run or wait; None: all places while nobody else wants one, then its share."""
    max_tenant_files: int = knob(10_000, "Files of a tenant (10000).")
    max_tenant_jobs: int = knob(1000, "Jobs of a tenant that wait or run (1000).")
    max_tenant_uploads: int = knob(8, "Uploads of a tenant at once (8).")
    max_tenant_streams: int = knob(1024, "Streams of events of a tenant (1024).")
    max_tenant_body_bytes: int = knob(256 << 20, "JSON bodies of a tenant at once (256 MiB).")
    max_keep_checkpoints: int = knob(100, "Largest keep_checkpoints of a job (100).")
    organization: str = knob("coserve", "Third part of tuned models' names (coserve).")
    """The third part of a tuned model's name, ft:BASE:ORGANIZATION:SUFFIX:ID."""
    vllm_metrics: bool = knob(False, "Metrics under vLLM's names too.")
    shutdown_timeout: float = knob(10.0, "Seconds for running requests at the end (10).")
    watchdog_timeout: float = knob(60.0, "Seconds to a restart of a hung engine (60); 0: off.")
    """Seconds after which an iteration or command of the engine counts as a hang, unless it is predicted to take long: the
    engine's process is then started again. 0: never."""
    log_format: str = knob("text", "text or json.")
    log_level: str = knob("info", "debug, info, warning or error (info).")
    enable_log_requests: bool = knob(False, "A line per request.")

    def __post_init__(self) -> None:
        require_least(self, 0, "port", "shutdown_timeout", "watchdog_timeout")
        require_least(self, 1, "tensor_parallel_size", "max_num_seqs", "max_num_queued_reqs", "max_jobs", "max_file_bytes",
                      "threads", "max_tenant_file_bytes", "max_body_bytes", "max_tenant_queued_reqs", "max_tenant_files",
                      "max_tenant_jobs", "max_tenant_uploads", "max_tenant_streams", "max_tenant_body_bytes",
                      "max_keep_checkpoints")
        require_least(self, 2, "max_model_len")
        require(self.port < 65536, "port", f"must be below 65536, got {self.port}")
        require(math.isfinite(self.shutdown_timeout), "shutdown_timeout", f"must be finite, got {self.shutdown_timeout}")
        require(0 < self.gpu_memory_utilization <= 1, "gpu_memory_utilization",
                f"must be in (0, 1], got {self.gpu_memory_utilization}")
        check_allowed(self.allowed_hosts, self.allowed_origins)
        require(all(self.api_key), "api_key", "an empty key would let everybody in; leave it out")
        read_quantization(self.quantization)
        require(self.reasoning_parser in PARSERS, "reasoning_parser",
                f"must be one of {', '.join(PARSERS)}, got {self.reasoning_parser!r}")
        if self.chat_template is not None:
            _check_template(self.chat_template)
        self.training_share(1 << 40)
        parsers = (AUTO, NO_PARSER, *CALL_FORMATS, *PARSER_ALIASES)
        for name, known in (("log_format", LOG_FORMATS), ("log_level", LOG_LEVELS), ("tool_call_parser", parsers)):
            value = getattr(self, name)
            require(value in known, name, f"must be one of {', '.join(known)}, got {value!r}")
        try:
            self.engine_config()  # its own checks
        except ConfigError as error:
            own_name = _ENGINE_NAMES.get(error.param or "")
            if own_name is None:
                raise
            raise ConfigError(f"{own_name}: {str(error).removeprefix(f'{error.param}: ')}", param=own_name) from error

    @property
    def most_running(self) -> int:
        """Requests that run at once at most, whatever the device is."""
        return MAX_NUM_SEQS_GPU if self.max_num_seqs is None else self.max_num_seqs

    def engine_config(self, pool_bytes: int | None = None, *, on_gpu: bool = False) -> EngineConfig:
        """The engine's settings. pool_bytes: what the pool will hold, if it is known. on_gpu: whether the model is on a GPU."""
        seqs = self.max_num_seqs or (MAX_NUM_SEQS_GPU if on_gpu else MAX_NUM_SEQS_CPU)
        scheduler = SchedulerConfig(
            policy=self.policy, tpot_ms=self.slo_tpot_ms, ttft_ms=self.slo_ttft_ms, finetune_min_share=self.finetune_min_share,
            max_num_seqs=seqs, max_num_batched_tokens=self.max_num_batched_tokens,
        )
        size = pool_bytes or self.kv_cache_memory_bytes
        share = EngineConfig().inference_share if size is None else 1 - self.training_share(size)
        return EngineConfig(
            scheduler=scheduler, memory_bytes=size, max_adapters=self.max_loras, max_lora_rank=self.max_lora_rank,
            max_waiting=2 * self.max_num_queued_reqs + seqs,  # places.py counts; cancelled ones linger
            inference_share=share, tensor_parallel_size=self.tensor_parallel_size, adapter_sharding=self.adapter_sharding,
        )

    def training_share(self, pool_bytes: int) -> float:
        """The part of a pool that training may take, in [0, 1). Raises ConfigError."""
        number = 0.0 if self.activation_memory in ("0", "0.0") else read_memory(self.activation_memory)
        if number is None:
            return 1 - EngineConfig().inference_share
        share = number if number < 1 else number / pool_bytes
        require(share < 1, "activation_memory", f"{number:.0f} bytes leave nothing of the pool's {pool_bytes} to inference")
        return share


def read_settings(path: Path | None, given: Mapping[str, Any]) -> ServerConfig:
    """Defaults, then the TOML file, then what was given (None: not given). Dashes in names count as underscores.

    Raises ConfigError, naming the field.
    """
    data = {} if path is None else {key.replace("-", "_"): value for key, value in read_toml(path).items()}
    data |= {key: value for key, value in given.items() if value is not None}
    known = {f.name: f for f in dataclasses.fields(ServerConfig)}
    for key in data:
        require(key in known, key, f"unknown setting; known: {', '.join(sorted(known))}")
    return ServerConfig(**{key: _read(key, str(known[key].type), value) for key, value in data.items()})


def _read_template(value: Any) -> str:
    """The source of a chat template, from its file or as it is given, as vLLM takes it: a text that isn't the path of a file
    must look like a template."""
    require(isinstance(value, str | Path), "chat_template", f"must be the path of a file, or a template, got {value!r}")
    text = str(value)
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        looks = any(character in text for character in "{}\n")
        require(looks, "chat_template", f"{text!r} is no file that can be read ({error}), and no template either")
    return text


def _check_template(source: str) -> None:
    try:
        ChatTemplate(source, {}).check()
    except InvalidRequest as error:
        raise ConfigError(str(error), param=error.param) from error


def _read_modules(value: Any) -> tuple[tuple[str, str], ...]:
    """(name, directory) of each: from a table of names and directories, or from a list of NAME=DIRECTORY and of vLLM's JSON."""
    items = [value] if isinstance(value, str) else value
    require(isinstance(items, Mapping | list | tuple), "lora_modules", f"must be a table or a list, got {value!r}")
    pairs = list(items.items()) if isinstance(items, Mapping) else [_read_module(item) for item in items]
    for name, directory in pairs:
        require(all(isinstance(part, str) and part for part in (name, directory)), "lora_modules",
                f"must be names and directories, got {name!r} and {directory!r}")
    names = [name for name, _ in pairs]
    for name in names:
        require(names.count(name) == 1, "lora_modules", f"the name {name!r} is given twice")
    return tuple(pairs)


def _read_module(item: Any) -> tuple[Any, Any]:
    form = f"write it as NAME=DIRECTORY or as {MODULE_JSON}"
    require(isinstance(item, str), "lora_modules", f"{form}, got {item!r}")
    if not item.lstrip().startswith("{"):
        name, equals, directory = item.partition("=")
        require(bool(name and equals and directory), "lora_modules", f"{form}, got {item!r}")
        return name, directory
    try:
        data = json.loads(item)
    except ValueError as error:
        raise ConfigError(f"lora_modules: {item!r} isn't JSON ({error}); {form}", param="lora_modules") from error
    for key in data:
        require(key in ("name", "path"), "lora_modules", f"{key!r} has no meaning here; {form}")
    require(len(data) == 2, "lora_modules", f"{form}, got {item!r}")
    return data["name"], data["path"]


def _read_texts(name: str, value: Any) -> tuple[str, ...]:
    """One text, several, or vLLM's JSON lists of them."""
    require(isinstance(value, str | list | tuple), name, f"must be a text or a list of texts, got {value!r}")
    texts: list[Any] = []
    for item in [value] if isinstance(value, str) else value:
        if isinstance(item, str) and item.startswith("[\""):
            try:
                texts += json.loads(item)
            except ValueError as error:
                raise ConfigError(f"{name}: {item!r} isn't JSON ({error})", param=name) from error
        else:
            texts.append(item)
    require(all(isinstance(text, str) for text in texts), name, f"must be texts, got {value!r}")
    return tuple(texts)


def _read(name: str, kind: str, value: Any) -> Any:
    if kind.startswith("SloMs"):
        with contextlib.suppress(ValueError):  # a command line gives numbers as text
            return float(value) if isinstance(value, str) else value
        return value
    if name == "lora_modules":
        return _read_modules(value)
    if name == "activation_memory":
        return str(value)
    if name == "chat_template":
        return _read_template(value)
    if name == "reasoning_parser" and isinstance(value, str):
        return value.replace("-", "_")  # SGLang writes deepseek-r1
    if name == "data_dir":
        require(isinstance(value, str | Path), name, f"must be the path of a directory, got {value!r}")
        return Path(value)
    if kind.startswith("tuple"):
        return _read_texts(name, value)
    expected: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    allowed = expected[kind.partition(" ")[0]]
    require(isinstance(value, allowed) and (bool in allowed or not isinstance(value, bool)), name,
            f"must be of type {kind}, got {value!r}")
    return value

"""coserve: serve a large language model and finetune adapters on it at the same time, with one copy of the weights.

    from coserve import Engine, EngineConfig, FinetuneConfig, LoraConfig, SamplingConfig, load_model
"""

from coserve.config.settings import (
    BottleneckConfig,
    EngineConfig,
    FinetuneConfig,
    IA3Config,
    LoraConfig,
    OptimizerConfig,
    SamplingConfig,
    SchedulerConfig,
)
from coserve.core import (
    CapacityError,
    ConfigError,
    CoserveError,
    InvalidRequest,
    JobFailed,
    NotFound,
    RankFailed,
)
from coserve.engine.engine import Engine
from coserve.engine.generation import Generator
from coserve.engine.jobhandle import JobHandle, JobProgress
from coserve.engine.requests import Chunk, RequestHandle
from coserve.runtime.loaded import LoadedModel, load_model
from coserve.training.finetuning import FinetuneResult, finetune

__all__ = [
    "BottleneckConfig",
    "CapacityError",
    "Chunk",
    "ConfigError",
    "CoserveError",
    "Engine",
    "EngineConfig",
    "FinetuneConfig",
    "FinetuneResult",
    "Generator",
    "IA3Config",
    "InvalidRequest",
    "JobFailed",
    "JobHandle",
    "JobProgress",
    "LoadedModel",
    "LoraConfig",
    "NotFound",
    "OptimizerConfig",
    "RankFailed",
    "RequestHandle",
    "SamplingConfig",
    "SchedulerConfig",
    "finetune",
    "load_model",
]

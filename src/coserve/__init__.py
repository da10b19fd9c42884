"""coserve: serve a large language model and finetune adapters on it at the same time, with one copy of the weights.

    from coserve import FinetuneConfig, LoraConfig, Generator, SamplingConfig, finetune, load_model
"""

from coserve.config import FinetuneConfig, LoraConfig, OptimizerConfig, SamplingConfig
from coserve.core import (
    CapacityError,
    ConfigError,
    CoserveError,
    InvalidRequest,
    JobFailed,
    NotFound,
)
from coserve.engine.finetuning import FinetuneResult, finetune
from coserve.engine.generation import Generator
from coserve.engine.model import LoadedModel, load_model

__all__ = [
    "CapacityError",
    "ConfigError",
    "CoserveError",
    "FinetuneConfig",
    "FinetuneResult",
    "Generator",
    "InvalidRequest",
    "JobFailed",
    "LoadedModel",
    "LoraConfig",
    "NotFound",
    "OptimizerConfig",
    "SamplingConfig",
    "finetune",
    "load_model",
]

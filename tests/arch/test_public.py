"""The public names of the package: a contract. Changing this list is an interface change and belongs in the changelog."""

from __future__ import annotations

import inspect

import coserve

PUBLIC = [
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


def _written(thing: object) -> str:
    """The docstring in the source: a dataclass without one gets its signature, which says nothing."""
    doc = inspect.getdoc(thing) or ""
    own = thing.__dict__.get("__doc__") if inspect.isclass(thing) else doc
    generated = inspect.isclass(thing) and doc.startswith(f"{thing.__name__}(")
    return "" if generated or not own else doc


def test_public_names_are_the_listed_ones() -> None:
    assert sorted(coserve.__all__) == PUBLIC
    assert len(set(coserve.__all__)) == len(coserve.__all__)


def test_every_public_name_has_a_docstring() -> None:
    missing = [name for name in PUBLIC if len(_written(getattr(coserve, name)).split()) < 3]
    assert not missing
    assert coserve.__doc__ is not None


def test_public_methods_have_docstrings() -> None:
    missing = [
        f"{name}.{method}"
        for name in PUBLIC
        if inspect.isclass(thing := getattr(coserve, name))
        for method, function in vars(thing).items()
        if inspect.isfunction(function) and not method.startswith("_") and not function.__doc__
    ]
    assert not missing


def test_errors_are_one_tree_and_also_standard_errors() -> None:
    standard = {
        "CapacityError": RuntimeError, "ConfigError": ValueError, "InvalidRequest": ValueError, "JobFailed": RuntimeError,
        "NotFound": LookupError,
    }
    for name, base in standard.items():
        error = getattr(coserve, name)
        assert issubclass(error, coserve.CoserveError)
        assert issubclass(error, base)
        assert error("text", param="field").param == "field"


def test_configs_are_frozen_and_keyword_only() -> None:
    for name in ("FinetuneConfig", "LoraConfig", "OptimizerConfig", "SamplingConfig"):
        config = getattr(coserve, name)
        assert config.__dataclass_params__.frozen, name
        kinds = {p.kind for p in inspect.signature(config).parameters.values()}
        assert kinds == {inspect.Parameter.KEYWORD_ONLY}, name
        assert not hasattr(config(), "__dict__"), f"{name} is not slotted"

"""An unknown field of a create body: where a known one belongs, at any depth, and suggestions for near misses only."""

from __future__ import annotations

from typing import Any

import pytest

from coserve.core import InvalidRequest
from tests.server.jobforms import read_body

BOTH = "in method.supervised.hyperparameters or in method.dpo.hyperparameters"
TOP = "at the top level of the body"


def method(kind: str, **part: Any) -> dict[str, Any]:
    return {"method": {"type": kind, kind: part}}


def refusal(body: dict[str, Any]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        read_body({"model": "base", "training_file": "file-1", **body})
    assert str(caught.value).startswith(f"{caught.value.param}: ")
    return caught.value


@pytest.mark.parametrize(("body", "param", "where"), [
    ({"n_epochs": 3}, "n_epochs", BOTH),
    ({"batch_size": 0}, "batch_size", BOTH),
    ({"beta": None}, "beta", "in method.dpo.hyperparameters"),
    (method("supervised", hyperparameters={"target_modules": ["q_proj"]}),
     "method.supervised.hyperparameters.target_modules", TOP),
    (method("dpo", hyperparameters={"rank": 4}), "method.dpo.hyperparameters.rank", TOP),
    ({"hyperparameters": {"learning_rate": 1e-4}}, "hyperparameters.learning_rate", TOP),
    (method("supervised", n_epochs=3), "method.supervised.n_epochs", "in method.supervised.hyperparameters"),
    (method("dpo", batch_size=3), "method.dpo.batch_size", "in method.dpo.hyperparameters"),
    ({"method": {"type": "dpo", "beta": 0.2}}, "method.beta", "in method.dpo.hyperparameters"),
    ({"method": {"type": "dpo", "hyperparameters": {}}}, "method.hyperparameters", "in method.supervised or in method.dpo"),
    ({"method": {"type": "dpo", "suffix": "x"}}, "method.suffix", TOP),
    ({"supervised": {}}, "supervised", "in method"),
    (method("supervised", hyperparameters={"beta": 1}), "method.supervised.hyperparameters.beta",
     "in method.dpo.hyperparameters"),
    ({"integrations": [{"type": "wandb", "project": "p"}]}, "integrations[0].project", "in integrations.wandb"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "p", "rank": 1}}]}, "integrations[0].wandb.rank", TOP),
])
def test_a_known_field_in_the_wrong_place_is_told_its_place(body: dict[str, Any], param: str, where: str) -> None:
    error = refusal(body)
    assert error.param == param
    assert str(error) == f"{param}: unknown field here; it belongs {where}"


@pytest.mark.parametrize(("body", "message"), [
    ({"batch_siez": 3}, f"did you mean batch_size? It belongs {BOTH}"),
    ({"learning_rat": 3}, "did you mean learning_rate?"),
    (method("dpo", hyperparameters={"n_epoch": 1}), "did you mean n_epochs?"),
    (method("dpo", hyperparameters={"rnak": 1}),
     "unknown field; known here: n_epochs, batch_size, learning_rate_multiplier, beta"),
    ({"lora_alpha": 8}, "did you mean alpha?"),
    ({"num_train_epochs": 1}, f"did you mean n_epochs? It belongs {BOTH}"),
    ({"lora": {"rank": 8, "colour": 1}}, f"unknown field; rank belongs {TOP}"),
    ({"extra_body": {"rank": 8}}, "put its fields at the top level of the body"),
])
def test_likely_fields_are_suggested(body: dict[str, Any], message: str) -> None:
    assert message in str(refusal(body))


@pytest.mark.parametrize("name", ["foo", "rate", "tools", "n", "temperature", "model_name", "lora_adapter", "x" * 5000])
def test_nothing_is_suggested_for_a_field_that_resembles_none(name: str) -> None:
    error = refusal({name: 1})
    assert "did you mean" not in str(error)
    assert "belongs" not in str(error)

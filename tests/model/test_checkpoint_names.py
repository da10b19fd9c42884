"""Checkpoints whose tensors have other names, or are more or fewer than the model's, give what transformers makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from coserve.core import InvalidRequest
from coserve.model.checkpoint import EMBEDDING, HEAD, Checkpoint
from coserve.model.weights import load_weights
from tests.model.test_checkpoint import rewrite
from tests.model.test_config_fields import check_equal, edit
from tests.tiny_models import FAMILIES, build_tiny_model

Tensors = dict[str, torch.Tensor]


def renamed(name: Callable[[str], str]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        values = {name(old): tensor for old, tensor in tensors.items()}
        tensors.clear()
        tensors.update(values)
    return change


def bare(name: str) -> str:
    """As LlamaModel.save_pretrained writes it."""
    return name.removeprefix("model.")


@pytest.mark.parametrize("name", [
    bare, lambda name: f"model.{name}", lambda name: bare(name) if ".layers.1." in name else name,
    lambda name: name if name == HEAD else f"model.{name}",
], ids=["without the prefix", "twice the prefix", "one layer without", "the head without"])
@pytest.mark.parametrize("family", FAMILIES)
def test_names_with_and_without_the_prefix_are_the_same(tmp_path: Path, family: str, name: Callable[[str], str]) -> None:
    build_tiny_model(family, tmp_path)
    rewrite(tmp_path, renamed(name))
    check_equal(tmp_path)
    assert Checkpoint(tmp_path).has("model.layers.2.mlp.up_proj.weight")


def test_a_bare_decoder_saved_by_transformers_loads(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model("qwen3", tmp_path / "whole")).model
    model.save_pretrained(tmp_path / "bare")
    check_equal(tmp_path / "bare")


def test_a_bare_decoder_without_its_head_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model("llama", tmp_path / "whole")).model
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(InvalidRequest, match=r"tensor lm_head\.weight is missing"):  # transformers makes up a random one
        Checkpoint(tmp_path / "bare")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_its_own_unties_the_embeddings(tmp_path: Path, family: str) -> None:
    build_tiny_model(family, tmp_path, tie=True)
    rewrite(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] * 2 + 1}))
    with pytest.warns(UserWarning, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, though config\.json ties"):
        checkpoint = Checkpoint(tmp_path)
    assert not checkpoint.architecture.tie_word_embeddings
    weights = load_weights(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    assert not weights.architecture.tie_word_embeddings
    check_equal(tmp_path)


def test_a_tied_head_may_be_stored_instead_of_the_embeddings(tmp_path: Path) -> None:
    build_tiny_model("qwen2", tmp_path)
    rewrite(tmp_path, renamed(lambda name: HEAD if name == EMBEDDING else name))
    assert Checkpoint(tmp_path).architecture.tie_word_embeddings
    check_equal(tmp_path)


@pytest.mark.parametrize(("change", "message"), [
    (lambda tensors: tensors.update({"norm.weight": tensors["model.norm.weight"].clone()}),
     r"tensors model\.norm\.weight and norm\.weight are the same parameter|norm\.weight and model\.norm\.weight"),
    (renamed(lambda name: f"model.model.{name}"), r"the files hold model\.model\.|tensor model\.\S+ is missing"),
    (renamed(lambda name: f"transformer.h.{name}"), r"no tensor has the name of one in a llama model.* hold transformer\.h\."),
    (lambda tensors: tensors.update({HEAD: torch.zeros(50, 32)}), r"lm_head\.weight has shape \[50, 32\]"),
])
def test_other_names_are_refused(tmp_path: Path, change: Callable[[Tensors], object], message: str) -> None:
    build_tiny_model("llama", tmp_path, tie=False)
    rewrite(tmp_path, change)
    with pytest.raises(InvalidRequest, match=message):
        Checkpoint(tmp_path)


def test_a_short_head_beside_tied_embeddings_is_refused(tmp_path: Path) -> None:
    build_tiny_model("llama", tmp_path, tie=True)
    rewrite(tmp_path, lambda tensors: tensors.update({HEAD: torch.zeros(50, 32)}))
    shapes = r"shape \[50, 32\], expected \[97, 32\]"
    with pytest.warns(UserWarning, match="differs"), pytest.raises(InvalidRequest, match=shapes):
        Checkpoint(tmp_path)


def test_a_model_that_is_cut_short_says_which_tensors_are_left_over(tmp_path: Path) -> None:
    edit(build_tiny_model("llama", tmp_path), num_hidden_layers=2)
    with pytest.warns(UserWarning, match="are ignored") as caught:
        Checkpoint(tmp_path)
    (message,) = [str(warning.message) for warning in caught if "ignored" in str(warning.message)]
    assert "model.layers.2.input_layernorm.weight" in message and " and 5 more" in message
    assert "num_hidden_layers is 2, so the model is cut short" in message and str(tmp_path) in message
    check_equal(tmp_path)  # transformers cuts it too


@pytest.mark.parametrize("name", [
    "lm_head.bias", "score.weight", "model.vision_tower.proj.weight", "v_head.summary.weight", "model.scale",
])
def test_any_tensor_that_nothing_reads_is_named(tmp_path: Path, name: str) -> None:
    build_tiny_model("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.zeros(4, 4)}))
    with pytest.warns(UserWarning, match="that this model does not have are ignored: " + name.replace(".", r"\.")):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["self_attn.sinks", "mlp.router.weight", "post_feedforward_layernorm.weight", "layer_scalar"])
def test_a_tensor_inside_a_layer_that_nothing_reads_is_refused(tmp_path: Path, name: str) -> None:
    build_tiny_model("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({f"model.layers.1.{name}": torch.zeros(4)}))
    with pytest.raises(InvalidRequest, match=f"tensor model.layers.1.{name} has no place in a llama decoder"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_that_fits_is_read_without_a_word(tmp_path: Path, family: str) -> None:
    build_tiny_model(family, tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Checkpoint(tmp_path)

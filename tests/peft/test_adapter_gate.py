"""The gate for adapters from outside: what PEFT would compute passes, everything else is refused in one line that names what is
wrong, in bounded time and memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from coserve.config.settings import BottleneckConfig, FinetuneConfig, LoraConfig, OptimizerConfig
from coserve.config.values import MAX_RANK, shown
from coserve.core import ConfigError, CoserveError, InvalidRequest
from coserve.model.architecture import read_architecture
from coserve.peft.fields import IA3, LORA, UNSUPPORTED
from coserve.peft.format import admit_adapter
from coserve.peft.gate import Base, PassedAdapter, read_adapter
from coserve.peft.kinds import adapter_layout
from coserve.peft.lora import lora_layout
from coserve.peft.patterns import by_pattern
from tests.tiny_adapter import tensor_of, write_tiny_adapter, write_tiny_config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NO_EFFECT = (
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "layers_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying", "init_ia3_weights",
)
"""Fields of PEFT's that say how an adapter began, how it is trained or what it is called."""
HUGE = 10**400
Q_A = tensor_of(1, "q_proj", "A")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    directory = write_tiny_config(tmp_path_factory.mktemp("base"))
    return Base(read_architecture(directory), "f", torch.float32, lambda token: token == "<known>")


def scales(base: Base, passed: PassedAdapter) -> dict[str, float]:
    assert isinstance(passed.config, LoraConfig)
    return {site.b.module: site.b.scale for site in lora_layout(base.architecture, passed.config)}


# --- PEFT's fields ---


@pytest.mark.parametrize(("cls", "table"), [(peft.LoraConfig, LORA), (peft.IA3Config, IA3)])
def test_every_field_of_peft_is_known_with_its_default(cls: type, table: dict[str, Any]) -> None:
    for f in dataclasses.fields(cls):
        if f.name in table:
            default = f.default_factory() if f.default is dataclasses.MISSING else f.default  # type: ignore[misc]
            assert table[f.name].default == default, f.name
        else:
            assert (f.name in UNSUPPORTED) != (f.name in NO_EFFECT), f"{f.name}: what does it mean for what is computed?"


@pytest.mark.parametrize(("config", "scale"), [
    ({"lora_alpha": ...}, 8 / 4), ({"lora_alpha": 3}, 3 / 4), ({"lora_alpha": 0.5}, 0.5 / 4),
    ({"lora_alpha": ..., "use_rslora": True}, 8 / 2), ({"alpha_pattern": {"q_proj": 6, "v_proj": 6}}, 6 / 4),
])
def test_scales_are_those_of_peft(base: Base, tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    passed = read_adapter(write_tiny_adapter(tmp_path / "a", **config), base)
    assert set(scales(base, passed).values()) == {scale}


def test_a_missing_rank_is_eight(base: Base, tmp_path: Path) -> None:
    assert read_adapter(write_tiny_adapter(tmp_path / "a", rank=8, r=...), base).rank == 8
    with pytest.raises(InvalidRequest, match=r"adapter_config.json: r gives model.layers.0.self_attn.q_proj rank 8, but .* 4"):
        read_adapter(write_tiny_adapter(tmp_path / "b", rank=4, r=...), base)


@pytest.mark.parametrize(("config", "field"), [
    ({"r": 8}, "r"), ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"), ({"r": 2, "rank_pattern": {"v_proj": 4}}, "r"),
])
def test_ranks_must_be_those_of_the_tensors(base: Base, tmp_path: Path, config: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"adapter_config.json: {field} gives"):
        read_adapter(write_tiny_adapter(tmp_path / "a", **config), base)


# --- numbers and types ---


@pytest.mark.parametrize("value", [1e308, 1e10, HUGE, -HUGE, 0, -1, True, "8", None, [8], {"a": 8}])
@pytest.mark.parametrize("field", ["lora_alpha", "r", "alpha_pattern", "rank_pattern"])
def test_numbers_out_of_range_are_refused_by_name(base: Base, tmp_path: Path, field: str, value: Any) -> None:
    given = {"q_proj": value} if field.endswith("pattern") else value
    directory = write_tiny_adapter(tmp_path / "a", **{field: given})
    with pytest.raises(InvalidRequest, match=rf"^adapter: adapter_config\.json: {field}\b") as caught:
        read_adapter(directory, base)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["Infinity", "-Infinity", "NaN", "1e999", "-1e999", "9" * 5000])
@pytest.mark.parametrize("place", ['"lora_alpha": {}', '"alpha_pattern": {{"q_proj": {}}}', '"later_field": [{}]'])
def test_numbers_that_json_has_not_are_refused(base: Base, tmp_path: Path, place: str, text: str) -> None:
    directory = write_tiny_adapter(tmp_path / "a")
    raw = (directory / CONFIG).read_text().rstrip("}")
    (directory / CONFIG).write_text(f"{raw}, {place.format(text)}}}")
    with pytest.raises(InvalidRequest, match=r"adapter_config\.json"):
        read_adapter(directory, base)


@pytest.mark.parametrize(("field", "value"), [
    ("peft_type", ["LORA"]), ("peft_type", {"LORA": 1}), ("peft_type", None), ("peft_type", 3), ("peft_type", "lora"),
    ("peft_type", "A" * 100_000), ("use_rslora", 1), ("use_rslora", "yes"), ("use_dora", []), ("lora_dropout", 1.0),
    ("lora_dropout", -0.1), ("lora_dropout", "0.1"), ("bias", ["none"]), ("bias", "all"), ("rank_pattern", ["q_proj"]),
    ("alpha_pattern", 3), ("alpha_pattern", {"": 3}), ("alpha_pattern", "q_proj"), ("target_modules", 7),
    ("target_modules", [["q_proj"]]), ("init_lora_weights", ["pissa"]), ("layers_to_transform", "all"),
    ("layers_to_transform", [HUGE]), ("modules_to_save", ["lm_head"]), ("fan_in_fan_out", True), ("exclude_modules", 1.5),
])
def test_fields_of_another_type_are_refused_by_name(base: Base, tmp_path: Path, field: str, value: Any) -> None:
    directory = write_tiny_adapter(tmp_path / "a", **{field: value})
    with pytest.raises(InvalidRequest, match=field) as caught:
        read_adapter(directory, base)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_a_bottleneck_of_any_size_takes_no_memory(base: Base, tmp_path: Path) -> None:
    for size in (10**9, MAX_RANK, 2.5, HUGE, "64", None):
        fields = {"peft_type": "COSERVE_BOTTLENECK", "size": size, "placement": "houlsby", "activation": "relu"}
        with pytest.raises(InvalidRequest, match="size" if size != MAX_RANK else "does not fit"):
            read_adapter(write_tiny_adapter(tmp_path / "a", **fields), base)


@pytest.mark.parametrize("make", [
    lambda: LoraConfig(alpha=1e308), lambda: LoraConfig(alpha=HUGE), lambda: LoraConfig(r=HUGE), lambda: LoraConfig(r=10**9),
    lambda: LoraConfig(dropout=float("nan")), lambda: LoraConfig(alpha_pattern={"q_proj": float("inf")}),
    lambda: LoraConfig(alpha_pattern={"q_proj": "8"}), lambda: LoraConfig(rank_pattern={"q_proj": 2.5}),  # type: ignore[dict-item]
    lambda: LoraConfig(rank_pattern=["q_proj"]), lambda: BottleneckConfig(size=10**9),  # type: ignore[arg-type]
    lambda: OptimizerConfig(learning_rate=1e30), lambda: OptimizerConfig(learning_rate=HUGE),
    lambda: OptimizerConfig(weight_decay=float("inf")), lambda: FinetuneConfig(dpo_beta=1e300),
    lambda: FinetuneConfig(epochs=HUGE), lambda: FinetuneConfig(batch_size=HUGE),
])
def test_settings_of_jobs_follow_the_same_rules(make: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.param and str(caught.value).startswith(f"{caught.value.param}: ") and len(str(caught.value)) < 300


def test_what_is_wrong_with_a_factor_is_said(base: Base, tmp_path: Path) -> None:
    q = tensor_of(0, "q_proj", "A"), tensor_of(0, "q_proj", "B")
    cases: list[tuple[dict[str, Any], str]] = [
        ({q[1]: None}, f"has {q[0]}, but not {q[1]}"),
        ({q[0]: torch.zeros(0, 32), q[1]: torch.zeros(32, 0)}, "lora_A.weight has shape [0, 32], expected [rank, 32]"),
        ({q[0]: torch.zeros(4, 31)}, "lora_A.weight has shape [4, 31], expected [rank, 32]"),
        ({q[1]: torch.zeros(32, 5)}, f"{q[0]} has rank 4, but {q[1]} has shape [32, 5]"),
    ]
    for changes, reason in cases:
        directory = write_tiny_adapter(tmp_path / "a")
        tensors = {**load_file(directory / WEIGHTS), **changes}
        save_file({name: value for name, value in tensors.items() if value is not None}, directory / WEIGHTS)
        with pytest.raises(InvalidRequest, match=re.escape(reason)):
            read_adapter(directory, base)


# --- patterns ---


NASTY = ["([a-z._0-9]+)+!", "(a|a)*b" * 20, "(.*)*(.*)*(.*)*x", "((((a?){30}){30}))" * 3, r"(\w+\.?)+\d+$z", "(.?){200}z"]


@pytest.mark.parametrize("pattern", NASTY)
def test_no_pattern_takes_long(base: Base, tmp_path: Path, pattern: str) -> None:
    began = time.process_time()
    for field in ("alpha_pattern", "rank_pattern"):
        with contextlib.suppress(InvalidRequest):  # too large for RE2
            read_adapter(write_tiny_adapter(tmp_path / field, **{field: {pattern: 4}}), base)
        read_adapter(write_tiny_adapter(tmp_path / "t", target_modules=pattern), base)
    assert time.process_time() - began < 2.0
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(100)]
    began = time.process_time()
    with contextlib.suppress(ConfigError):
        by_pattern({f"{pattern}{n}": 1 for n in range(200)}, names, "alpha_pattern")
    assert time.process_time() - began < 10.0


@pytest.mark.parametrize("pattern", ["(?!q)q_proj", "(?<=x)q_proj", r"(q)_\1", "(", "[", "a{1001}", "\\", "x" * 2000, "\ud800"])
def test_what_the_matcher_lacks_is_said(base: Base, tmp_path: Path, pattern: str) -> None:
    with pytest.raises(InvalidRequest, match="alpha_pattern") as caught:
        read_adapter(write_tiny_adapter(tmp_path / "a", alpha_pattern={pattern: 4}), base)
    str(caught.value).encode()


def test_patterns_mean_what_they_mean_in_peft(base: Base) -> None:
    names = [f"model.layers.{layer}.{path}" for layer in range(12) for path in ("self_attn.q_proj", "mlp.up_proj")]
    patterns = {r"layers\.1\..*": 1, "q_proj": 2, "mlp.up_proj": 3, r".*_proj": 4, "model.layers.1.mlp.up_proj": 5, "^q": 6}
    found, unmatched = by_pattern(patterns, names, "alpha_pattern")
    for name in names:
        assert found[name] == patterns[peft.utils.other.get_pattern_key(patterns.keys(), name)]
    assert unmatched == ["^q"]


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("key", ["nope", "k_proj", r"layers\.77\..*", "model.layers.0.mlp.q_proj"])
def test_a_jobs_pattern_that_matches_nothing_is_refused(base: Base, field: str, key: str) -> None:
    config = LoraConfig(target_modules=("q_proj", "v_proj"), **{field: {"q_proj": 8, key: 8}})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"^{field}: .* matches no module .*q_proj, v_proj") as caught:
        adapter_layout(base.architecture, config)
    assert caught.value.param == field and repr(key) in str(caught.value)


@pytest.mark.parametrize("target", ["nope", "model.*q_proj", r"layers\.0\..*", "layers.9.self_attn.q_proj"])
def test_a_target_that_is_no_module_is_echoed_unchanged(base: Base, target: str) -> None:
    with pytest.raises(ConfigError, match="target_modules") as caught:
        adapter_layout(base.architecture, LoraConfig(target_modules=("q_proj", target)))
    assert shown(target) in str(caught.value)


# --- tensors ---


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)
    return directory


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_refused(base: Base, tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q_A] = tensors[Q_A].to(dtype)
        tensors[Q_A][2, 3] = value

    with pytest.raises(InvalidRequest, match=f"{Q_A} has NaN or infinite values"):
        read_adapter(edit(write_tiny_adapter(tmp_path / "a"), change), base)


def test_values_that_the_type_can_not_hold_are_refused(base: Base, tmp_path: Path) -> None:
    directory = edit(write_tiny_adapter(tmp_path / "a"), lambda t: t.update({Q_A: t[Q_A].double() * 1e60}))
    with pytest.raises(InvalidRequest, match=f"{Q_A} has values that float32 can't hold"):
        read_adapter(directory, base)


def test_products_that_can_not_be_finite_are_refused(base: Base, tmp_path: Path) -> None:
    for number, (scale, alpha) in enumerate([(1e19, 8), (1e8, 8), (100.0, 1e9)]):
        with pytest.raises(InvalidRequest, match=r"update of model\.layers\.0\.self_attn\.q_proj"):
            read_adapter(write_tiny_adapter(tmp_path / str(number), scale=scale, lora_alpha=alpha), base)
    read_adapter(write_tiny_adapter(tmp_path / "large", scale=30.0, lora_alpha=1000), base)


def header(tensors: Any, length: int | None = None, data: bytes = b"") -> bytes:
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[Any], offsets: list[Any], dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD_FILES: dict[str, bytes] = {
    "empty": b"", "a length only": header({}, 2**63), "a length beyond the file": header({Q_A: entry([1], [0, 4])}, 10**6),
    "no JSON": header(b"{{}}"), "a list": header([1]), "nested": header(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "doubled": header(b'{"a": 1, "a": 2}'), "an entry that is a list": header({Q_A: [1]}),
    "a shape with text": header({Q_A: entry(["4", 32], [0, 512])}), "a negative size": header({Q_A: entry([-4, 32], [0, 512])}),
    "a huge size": header({Q_A: entry([2**62, 2**62], [0, 512])}), "a size without end": header({Q_A: entry([HUGE], [0, 4])}),
    "sizes that are no numbers": header({Q_A: entry([True], [0, 4])}), "deep shapes": header({Q_A: entry([1] * 1000, [0, 4])}),
    "offsets backwards": header({Q_A: entry([4], [16, 0])}, data=b"0" * 16),
    "a gap": header({Q_A: entry([1], [4, 8])}, data=b"0" * 8),
    "overlap": header({Q_A: entry([2], [0, 8]), "b": entry([2], [4, 12])}, data=b"0" * 12),
    "too much data": header({Q_A: entry([1], [0, 4])}, data=b"0" * 8),
    "too little": header({Q_A: entry([2], [0, 8])}, data=b"0000"),
    "a dtype that is a list": header({Q_A: entry([1], [0, 4], ["F32"])}, data=b"0000"),
    "an unknown dtype": header({Q_A: entry([1], [0, 4], "F4")}, data=b"0000"),
    "bytes that are no text": header(b"\xff\xfe{}"),
}


@pytest.mark.parametrize("data", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_damaged_files_are_refused(base: Base, tmp_path: Path, data: bytes) -> None:
    directory = write_tiny_adapter(tmp_path / "a")
    (directory / WEIGHTS).write_bytes(data)
    with pytest.raises(InvalidRequest, match=r"adapter_model\.safetensors") as caught:
        read_adapter(directory, base)
    assert str(tmp_path) not in str(caught.value) and len(str(caught.value)) < 500


def test_a_huge_sparse_file_is_refused_before_it_is_read(base: Base, tmp_path: Path) -> None:
    directory = write_tiny_adapter(tmp_path / "a", r=1 << 30)
    size = (1 << 30) * 32 * 4
    with (directory / WEIGHTS).open("wb") as file:
        file.write(header({Q_A: entry([1 << 30, 32], [0, size])}))
        file.truncate(file.tell() + size)
    for rank in (1 << 30, 4):
        (directory / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 8}))
        began = time.perf_counter()
        with pytest.raises(InvalidRequest, match=r"\br\b|rank|without the other"):
            read_adapter(directory, base)
        assert time.perf_counter() - began < 1.0


def test_ranks_over_a_limit_are_refused(base: Base, tmp_path: Path) -> None:
    directory = write_tiny_adapter(tmp_path / "a", rank=9)
    with pytest.raises(InvalidRequest, match="max_lora_rank=8"):
        read_adapter(directory, base, max_rank=8)
    read_adapter(directory, base, max_rank=9)


# --- files ---


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "coserve.json"])
@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "circle"])
def test_what_is_no_regular_file_does_not_hang(base: Base, tmp_path: Path, name: str, kind: str) -> None:
    directory = write_tiny_adapter(tmp_path / "a")
    (directory / name).unlink(missing_ok=True)
    make: dict[str, Callable[[Path], object]] = {
        "pipe": os.mkfifo, "directory": Path.mkdir, "device": lambda path: path.symlink_to("/dev/zero"),
        "circle": lambda path: path.symlink_to(path),
    }
    make[kind](directory / name)
    began = time.perf_counter()
    with pytest.raises(CoserveError, match=name.replace(".", r"\.")):
        read_adapter(directory, base)
    assert time.perf_counter() - began < 2.0


@pytest.mark.parametrize("text", [
    '{"peft_type": "LORA", "r": 4, "r": 8}', "[" * 100_000, '{"a":' * 100_000, '{"a":' + "[" * 200 + "]" * 200 + "}", "",
    '{"peft_type": "LORA"} x', "\ufeff{}", '"LORA"', "null", " " * (2 << 20),
    '{"peft_type": "LORA", "x": "' + "y" * (2 << 20) + '"}',
])
def test_settings_that_are_no_plain_object_are_refused(base: Base, tmp_path: Path, text: str) -> None:
    directory = write_tiny_adapter(tmp_path / "a")
    (directory / CONFIG).write_text(text)
    with pytest.raises(InvalidRequest, match=r"adapter_config\.json") as caught:
        read_adapter(directory, base)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


# --- warnings ---


def warnings_of(directory: Path, base: Base) -> str:
    return "\n".join(read_adapter(directory, base).warnings)


@pytest.mark.parametrize(("config", "expected"), [
    ({}, ""), ({"target_modules": ["q_proj", "v_proj", "c_attn"]}, "this base has no module called c_attn"),
    ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "self_attn.k_proj has no tensors"),
    ({"target_modules": "all-linear"}, "has no tensors"), ({"target_modules": r".*\.(q|v)_proj"}, ""),
    ({"target_modules": r"encoder\..*"}, "matches no module"), ({"target_modules": r"(?!x).*_proj"}, ""),
    ({"target_modules": "all-linear", "exclude_modules": r".*(k|o|gate|up|down)_proj"}, ""), ({"target_modules": ...}, ""),
    ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1, 2]}, ""),
    ({"alpha_pattern": {"nope": 4}}, "alpha_pattern: nope matches no module"),
    ({"rank_pattern": {"nope": 4}}, "rank_pattern: nope matches no module"),
])
def test_what_a_maker_should_know_is_said(base: Base, tmp_path: Path, config: dict[str, Any], expected: str) -> None:
    found = warnings_of(write_tiny_adapter(tmp_path / "a", **config), base)
    assert expected in found if expected else not found


@pytest.mark.parametrize(("name", "content"), [
    ("added_tokens.json", {"<new>": 400, "<known>": 3}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"3": {"content": "<known>"}, "400": {"content": "<new>"}}}),
    ("tokenizer.json", {"version": "1.0", "added_tokens": [{"id": 400, "content": "<new>"}], "model": {"vocab": {}}}),
])
def test_new_tokens_of_an_adapters_tokenizer_are_said(base: Base, tmp_path: Path, name: str, content: Any) -> None:
    directory = write_tiny_adapter(tmp_path / "a")
    (directory / name).write_text(json.dumps(content))
    found = warnings_of(directory, base)
    assert "<new>" in found and "<known>" not in found
    (directory / name).write_text(json.dumps(content).replace("<new>", ""))
    assert not warnings_of(directory, base)
    (directory / name).write_text('{"added_tokens": [[[')
    assert "not looked at" in warnings_of(directory, base), "no reason to refuse the adapter"


# --- the canonical form ---


def test_the_copy_says_the_same_without_expressions(base: Base, tmp_path: Path) -> None:
    source = write_tiny_adapter(
        tmp_path / "a", use_rslora=True, alpha_pattern={r"layers\.[02]\..*q_proj": 3, "v_proj": 6, "(idle)+": 9},
        later_field={"deep": [1, 2]}, base_model_name_or_path="some/base", target_modules=r".*\.(q|v)_proj",
    )
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 10**9, 7], "top_p": 1.0}))
    passed = read_adapter(source, base)
    (tmp_path / "b").mkdir()
    admit_adapter(source, tmp_path / "b", base)
    again = read_adapter(tmp_path / "b", base)
    assert scales(base, again) == scales(base, passed)
    assert scales(base, again)["model.layers.0.self_attn.q_proj"] == 3 / 2
    assert scales(base, again)["model.layers.1.self_attn.q_proj"] == 8 / 2
    assert {name: tensor.tolist() for name, tensor in again.tensors.items()} == {
        name: tensor.tolist() for name, tensor in passed.tensors.items()
    }
    written = json.loads((tmp_path / "b" / CONFIG).read_text())
    assert "later_field" not in written and written["base_model_name_or_path"] == "some/base"
    assert all(key.replace(".", "").replace("_", "").isalnum() for key in written["alpha_pattern"])
    assert again.end_tokens == (2, 7) and again.origin["base_fingerprint"] == "f"

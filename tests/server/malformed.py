"""Requests that are wrong, as tables. Owns no server: test_malformed.py sends them.

A field is tried with every value that its kind must refuse; all other fields of that body are right,
so the answer must name it.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

HUGE = 2**64 - 1
"""The largest number that bodies may have at all; no field takes it."""
DEEP = 100_000


class WrongField(NamedTuple):
    """path: of the route; body: with the one wrong field; field: which one must be named; status: 400, or 404 of a name."""

    path: str
    body: dict[str, Any]
    field: str
    status: int = 400


_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_NAMED = {"type": "function", "function": {"name": "f"}}


def _deep(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def _tools(**function: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", **function}}]


def nested_schema(depth: int) -> dict[str, Any]:
    """An object in an object in an object."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


TOO_MANY_PATTERNS = {"allOf": [{"type": "string", "pattern": f".*{chr(97 + number)}.*"} for number in range(24)]}
"""A schema that would take gigabytes."""
_WRONG: dict[str, tuple[Any, ...]] = {
    "int": ("x", "1", 1.5, True, [1], {"a": 1}, HUGE, -(2**40)),
    "seed": ("x", "1", 1.5, True, [1], {"a": 1}, HUGE),
    "number": ("x", "1", True, [1.0], {"a": 1}, 1e308, -1e308, HUGE),
    "bool": ("true", 0, 1, 1.0, [], {}, HUGE),
    "false": ("true", 1, True, [], {}),
    "str": (0, 1.5, True, [], {}, ["a"], {"a": "b"}),
    "messages": (
        1, "x", {}, [], [1], ["x"], [[]], [{}], [{"role": "user"}], [{"content": "x"}], [{"role": "nobody", "content": "x"}],
        [{"role": 1, "content": "x"}], [{"role": "user", "content": 1}], [{"role": "user", "content": {}}],
        [{"role": "user", "content": [1]}], [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": [{"type": "text", "text": 1}]}],
        [{"role": "user", "content": "x", "colour": "red"}], [{"role": "tool", "content": "x", "tool_call_id": "1"}],
        [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}], [{"role": "user", "content": "x", "name": 1}],
        [{"role": "user", "content": [{"type": "text", "text": "x", "colour": 1}]}], [{"role": "user",
        "content": "x" * 100_000}],
        *([{"role": "user", "content": "x"}, {"role": "assistant", **given}] for given in (
            {"tool_calls": 1}, {"tool_calls": "x"}, {"tool_calls": {}}, {"tool_calls": [1]}, {"tool_calls": [{}]},
            {"tool_calls": [{"id": "1", "type": "x", "function": {"name": "f"}}]}, {"tool_calls": [{"id": "1", "function": 1}]},
            {"tool_calls": [{"id": 1, "function": {"name": "f"}}]}, {"tool_calls": [{"id": "1", "function": {"name": "a b"}}]},
            {"tool_calls": [{"id": "1", "function": {"name": "f", "arguments": 1}}]}, {"tool_calls": [_CALL] * 129},
            {"tool_calls": [{"id": "1", "function": {"name": "f", "arguments": _deep(900)}}]}, {"function_call": 1},
            {"function_call": "f"}, {"function_call": {"name": 1}}, {"function_call": {"name": "f", "arguments": [1]}},
            {"tool_calls": [_CALL], "function_call": {"name": "f", "arguments": "{}"}}, {"tool_call_id": "1"},
        )),
        [{"role": "tool", "content": "x"}], [{"role": "function", "content": "x", "name": "f"}], [{"role": "function",
        "content": "x"}], [{"role": "assistant", "tool_calls": [_CALL]}, {"role": "tool", "tool_call_id": "2", "content": "x"}],
        [{"role": "assistant", "tool_calls": [_CALL]}, {"role": "tool", "tool_call_id": 1, "content": "x"}],
        [{"role": "assistant", "tool_calls": [_CALL]}, {"role": "tool", "tool_call_id": "1"}],
        [{"role": "user", "content": "x", "reasoning_content": "y"}], [{"role": "system", "content": "x", "reasoning": "y"}],
        [{"role": "assistant", "content": "x", "reasoning": 1}],
        [{"role": "assistant", "content": "x", "reasoning_content": []}],
        [{"role": "assistant", "content": "x", "reasoning_content": "y", "reasoning": "z"}],
        [{"role": "assistant", "content": "x", "reasoning_content": "y" * 100_000}],
    ),
    "tools": (
        1, "x", True, {}, [1], ["x"], [[]], [{}], [{"type": 1}], [{"type": "x"}], [{"type": "function"}],
        [{"type": "function", "function": 1}], [{"type": "function", "function": {}}], _tools(name=1), _tools(name=""),
        _tools(name="a b"), _tools(name="x" * 200), _tools(description=1), _tools(parameters=1), _tools(parameters=[]),
        _tools(strict=1), _tools(strict="yes"), _tools(colour=1), _tools(parameters=_deep(900)), _tools() * 2, _tools() * 129,
        _tools(description="x" * 100_000),
    ),
    "functions": (
        1, "x", True, {}, [1], [[]], [{}], [{"name": 1}], [{"name": "a b"}], [{"name": "f", "colour": 1}],
        [{"name": "f", "parameters": 1}], [{"name": "f", "parameters": _deep(900)}], [{"name": "f"}] * 2, [{"name": "f"}] * 129,
    ),
    "tool_choice": (
        1, True, "", "x", "required", [], {}, {"type": 1}, {"type": "x"}, {"type": "allowed_tools"},
        *({"type": "function", **given} for given in ({}, {"function": 1}, {"function": {}}, {"function": {"name": 1}},
                                                      {"function": {"name": "g"}})),
        *({"type": "allowed_tools", "allowed_tools": given} for given in (
            1, {"mode": "none", "tools": [_NAMED]}, {"mode": "auto"}, {"mode": "auto", "tools": []},
            {"mode": "auto", "tools": [1]}, {"mode": "auto", "tools": [{"type": "function", "function": {"name": "g"}}]},
        )),
    ),
    "function_call": (1, True, "", "x", "required", [], {}, {"name": 1}, {"name": "g"}, {"name": []}),
    "input": (
        1, 1.5, True, {}, [], [1], ["x"], [[]], [{}], [{"type": 1}], [{"type": "message"}], [{"role": "user"}],
        [{"role": "nobody", "content": "x"}], [{"role": 1, "content": "x"}], [{"role": "user", "content": 1}],
        [{"role": "user", "content": [1]}], [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        [{"role": "user", "content": [{"type": "input_text", "text": 1}]}], [{"role": "user", "content": "x", "colour": 1}],
        [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], [{"type": "reasoning", "content": "x"}],
        [{"type": "reasoning", "content": [{"type": "reasoning_text"}]}], [{"type": "reasoning", "summary": [{}]}],
        [{"type": "function_call", "name": "f", "arguments": "{}"}], [{"type": "function_call", "call_id": "1", "name": "f"}],
        [{"type": "function_call_output", "call_id": "1", "output": "x"}], [{"type": "function_call_output", "output": 1}],
        [{"type": "item_reference", "id": "x"}], [{"id": "x"}], [{"type": "web_search_call"}],
        [{"role": "user", "content": "x" * 100_000}], [{"role": "user", "content": ""}] * 5000,
    ),
    "flat_tools": (
        1, "x", {}, [1], [[]], [{}], [{"type": 1}], [{"type": "web_search"}], [{"type": "function", "function": {}}],
        [{"type": "function", "name": "f", "colour": 1}], [{"type": "function"}], [{"type": "function", "name": 1}],
        [{"type": "function", "name": "a b"}], [{"type": "function", "name": "f", "parameters": 1}],
    ),
    "flat_choice": (
        1, True, "x", [], {}, {"type": 1}, {"type": "mcp"}, {"type": "function"}, {"type": "function", "name": 1},
        {"type": "function", "name": "f", "colour": 1}, {"type": "allowed_tools"}, {"type": "allowed_tools", "tools": [1]},
        {"type": "allowed_tools", "tools": [{"type": "function"}]},
    ),
    "text_options": (
        1, "x", [], {"colour": 1}, {"format": 1}, {"format": {}}, {"format": {"type": 1}}, {"format": {"type": "regex"}},
        {"format": {"type": "text", "colour": 1}}, {"format": {"type": "json_schema"}},
        {"format": {"type": "json_schema", "name": 1, "schema": {}}}, {"format": {"type": "json_schema", "colour": 1}},
        {"verbosity": 1}, {"verbosity": "loud"},
    ),
    "reasoning_options": (
        1, "x", [], {"colour": 1}, {"effort": 1}, {"effort": "x" * 600}, {"summary": 1}, {"summary": "x"}, {"context": "x"},
        {"mode": "pro"},
    ),
    "texts": (1, "x", {}, [1], [None], [[]], ["x"]),
    "object": (1, "x", [], True),
    "prompt": (
        1, 1.5, True, {}, [], "", [""], [1.5], ["x", 1], [[]], [["x"]], [[1.5]], [True], [-1], [10**9], [[10**9]], [[[1]]],
        [{}], [1] * 100_000, "x" * 100_000, ["x"] * 2000,
    ),
    "tokens": (1, "x", {}, ["x"], [1.5], [True], [-1], [10**9], [[1]], [HUGE]),
    "logit_bias": (1, "x", [], True, {"x": 1}, {"1": "x"}, {"-1": 1}, {"99999999": 1}, {"1": 1e308}, {"": 0}, {"1e1": 1},
    {"\u0661": 1}),
    "stream_options": (1, "x", [], {"include_usage": 1}, {"nothing": True}, {"include_usage": "yes"}),
    "stop": (1, True, {}, [1], [None], ["x"] * 17),
    "file": (0, True, [], {}, "", "x", "../../etc/passwd", "file-" + "0" * 24, "file-\u202e", "x" * 600, "' OR 1=1 --"),
    "method": (
        1, "supervised", [], {}, {"type": "x"}, {"type": 1}, {"type": "reinforcement"}, {"type": "supervised", "dpo": {}},
        {"type": "supervised", "supervised": 1}, {"type": "supervised", "supervised": {"x": 1}},
        {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 0}}},
        {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "x"}}},
        {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 1.5}}},
        {"type": "supervised", "supervised": {"hyperparameters": {"beta": 1}}},
        {"type": "dpo", "dpo": {"hyperparameters": {"beta": -1}}},
    ),
    "hyperparameters": (
        1, "x", [], {"x": 1}, {"n_epochs": 0}, {"n_epochs": -1}, {"n_epochs": True}, {"n_epochs": []}, {"n_epochs": HUGE},
        {"n_epochs": "many"}, {"batch_size": 0}, {"batch_size": 0.5}, {"batch_size": {}}, {"learning_rate_multiplier": 0},
        {"learning_rate_multiplier": "fast"}, {"learning_rate_multiplier": []},
    ),
    "metadata": (1, "x", [], {"a": 1}, {"a": None}, {"a" * 65: "b"}, {"a": "b" * 513}, {str(i): "x" for i in range(17)},
    {"a": {}}),
    "integrations": (1, "x", {}, [1], [{}], [{"type": "x"}], [{"type": "wandb"}], [{"type": "wandb", "wandb": {"project": 1}}]),
    "target_modules": (1, "x", {}, [], [1], ["nothing"], ["x"] * 2000),
    "modules": (1, "x", {}, [1], ["nothing"], ["x"] * 2000),
    "memory": (0, -1, -1e308, True, [1], {}, "", "lots", "0", "-1", "1 apple", "x" * 600),
    "suffix": (1, True, [], {}, "", "a b", "../x", "x" * 65, "ä", "a\n"),
    "variables": (
        1, "x", [], True, {"messages": []}, {"bos_token": "x"}, {"nothing": 1}, {"enable_thinking": True}, {"x" * 5000: 1},
        {"\u202e": 1}, {"": 1}, {f"a{i}": i for i in range(100)}, {"a": json.loads("[" * 40 + "]" * 40)}, {"a": HUGE},
    ),
    "effort": (1, True, [], {}, "", "much", "NONE", "high", "x" * 600),
    "thinking": (
        1, True, "enabled", [], {}, {"type": 1}, {"type": "x"}, {"type": "enabled"}, {"type": "disabled", "budget_tokens": 1},
    ),
    "template": (0, 1.5, True, [], {}, "x", "{{ messages }}", "{% if", "x" * 200_000),
    "continued": ("true", 0, 1, 1.0, [], {}, True),
    "word": (1, True, [], {}, "", "nothing", "x" * 600),
    "schema": (
        1, 1.5, True, [], "x", "[", "5", "null", {"type": "colour"}, {"type": 1}, {"not": {}}, {"if": {}, "else": {}},
        {"$ref": "http://example.com"}, {"$ref": 1}, {"$ref": "#"}, {"properties": []}, {"properties": {"a": 1}}, {"enum": []},
        {"pattern": "("}, {"pattern": "(?=a)b"}, {"format": "colour"}, {"minLength": -1}, {"minLength": "x"}, {"allOf": 1},
        {"minimum": 2, "maximum": 1, "type": "integer"}, {"x-guidance": 1}, {"x-guidance": {"colour": 1}}, {"const": "\ud800"},
        '{"type": "object"', {"anyOf": [{"uniqueItems": True, "type": "array"}]}, nested_schema(200), TOO_MANY_PATTERNS,
        {"$ref": "#/$defs/d0", "$defs": {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(3000)}},
        {"properties": {f"p{i}": {} for i in range(4000)}}, {"enum": ["x" * 600_000]},
    ),
    "pattern": (1, True, [], {}, "", "(", "[", "a{2,1}", r"\b", r"(a)\1", "a" * 600_000, "(?<!a)b", "\ud800"),
    "choices": (1, True, "x", {}, [], [1], [""], ["a", None], ["a", ""], [["a"]], ["a" * 600_000]),
    "grammar": (
        1, True, [], {}, "", "x", "start: (", "start: a", "start:", "root ::= (", "root ::= a", "::=", "root ::= " + "(" * 5000,
        'start: "a" "b', "start: <|nobody|>", 'start: ""', "%json {}", "start: %json {", "start: " + "(" * 5000, "\0",
        "start: A0\n" + "\n".join(f"A{i}: A{i + 1}" for i in range(20_000)) + '\nA20000: "x"', "a" * 600_000,
    ),
    "space": (1, True, [], {}),
    "response_format": (
        1, True, [], {}, "json_object", {"type": "x"}, {"type": 1}, {"type": None}, {"type": "json_schema"},
        {"json_schema": {}},
        {"type": "json_schema", "json_schema": {}}, {"type": "json_schema", "json_schema": {"name": "a"}},
        {"type": "json_schema", "json_schema": 1}, {"type": "json_schema", "json_schema": {"schema": 1}},
        {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}, {"type": "json_schema", "json_schema": {"name": 1}},
        {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}, {"type": "text", "json_schema": {"schema": {}}},
        {"type": "json_object", "json_schema": {"schema": {}}}, {"type": "json_object", "colour": 1},
        {"type": "json_schema", "json_schema": {"schema": {}, "colour": 1}}, {"type": "regex", "pattern": "a"},
    ),
    "structured_outputs": (
        1, True, [], {}, "json", {"colour": 1}, {"json": 1}, {"json": {"not": {}}}, {"regex": "("}, {"regex": 1},
        {"choice": []},
        {"choice": "x"}, {"grammar": "("}, {"json_object": 1}, {"json_object": False}, {"json": {}, "regex": "a"},
        {"structural_tag": "x"}, {"json": {}, "disable_additional_properties": True}, {"regex": "a", "whitespace_pattern": " "},
        {"json": {}, "whitespace_pattern": "("}, {"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True},
        {"disable_any_whitespace": True},
    ),
}

_GENERATION = {
    **dict.fromkeys(("max_tokens", "min_tokens", "top_k", "n", "prompt_logprobs"), "int"),
    "seed": "seed",
    **dict.fromkeys(("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
                     "slo_tpot_ms", "slo_ttft_ms"), "number"),
    **dict.fromkeys(("ignore_eos", "stream", "skip_special_tokens"), "bool"),
    "model": "str", "logit_bias": "logit_bias", "stop": "stop", "stop_token_ids": "tokens",
    "response_format": "response_format", "structured_outputs": "structured_outputs", "guided_json": "schema",
    "json_schema": "schema", "guided_regex": "pattern", "regex": "pattern", "guided_choice": "choices",
    "guided_grammar": "grammar", "ebnf": "grammar", "guided_whitespace_pattern": "space",
}
_NOT_OF_RESPONSES = ("max_tokens", "n", "prompt_logprobs", "skip_special_tokens")


_JOB: tuple[dict[str, Any], dict[str, str]] = (
    {"training_file": "file-" + "0" * 24},
    {**dict.fromkeys(("rank", "size", "warmup_steps", "max_length", "max_microbatch_tokens", "checkpoint_steps",
                      "keep_checkpoints", "validation_steps", "max_steps", "priority", "deadline", "seed"), "int"),
     **dict.fromkeys(("alpha", "dropout", "learning_rate", "weight_decay", "max_grad_norm", "weight"), "number"),
     "deterministic": "bool", "model": "str", "training_file": "file", "method": "method", "suffix": "suffix",
     "hyperparameters": "hyperparameters", "metadata": "metadata", "integrations": "integrations",
     "target_modules": "target_modules", "feedforward_modules": "modules", "activation_memory": "memory",
     **dict.fromkeys(("adapter", "placement", "activation", "activation_compression", "schedule", "too_long"), "word")},
)
_ROUTES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "/v1/chat/completions": (
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
        {**_GENERATION, "messages": "messages", "max_completion_tokens": "int", "logprobs": "bool",
         **dict.fromkeys(("add_generation_prompt", "add_special_tokens", "include_reasoning", "separate_reasoning",
                          "stream_reasoning", "parallel_tool_calls"), "bool"),
         "continue_final_message": "continued", "chat_template": "template", "chat_template_kwargs": "variables",
         "reasoning_effort": "effort", "thinking": "thinking", "tools": "tools", "tool_choice": "tool_choice",
         "functions": "functions", "function_call": "function_call"},
    ),
    "/v1/completions": (
        {"prompt": "hi", "max_tokens": 1},
        {**_GENERATION, "prompt": "prompt", "logprobs": "int", "best_of": "int", "echo": "bool", "add_special_tokens": "bool"},
    ),
    "/v1/responses": (
        {"input": "hi", "max_output_tokens": 1},
        {**{name: kind for name, kind in _GENERATION.items() if name not in _NOT_OF_RESPONSES},
         **dict.fromkeys(("max_output_tokens", "top_logprobs"), "int"),
         **dict.fromkeys(("store", "parallel_tool_calls"), "bool"),
         "input": "input", "instructions": "str", "include": "texts", "tools": "flat_tools", "tool_choice": "flat_choice",
         "text": "text_options", "reasoning": "reasoning_options", "metadata": "metadata", "chat_template_kwargs": "object"},
    ),
    "/tokenize": (
        {"prompt": "hi"},
        {"tools": "tools", "model": "str", "add_special_tokens": "bool", "add_generation_prompt": "bool",
         "continue_final_message": "continued", "chat_template": "template", "chat_template_kwargs": "variables"},
    ),
    "/detokenize": ({"tokens": [5]}, {"model": "str", "tokens": "tokens"}),
    "/v1/fine_tuning/jobs": _JOB,
    "/v1/fine_tuning/jobs/check": _JOB,
    "/v1/load_lora_adapter": (
        {"lora_name": "a", "lora_path": "nothing"},
        {"lora_name": "str", "lora_path": "str", "load_inplace": "bool", "is_3d_lora_weight": "false"},
    ),
    "/v1/unload_lora_adapter": ({"lora_name": "a"}, {"lora_name": "str"}),
}
_REQUIRED = {
    "/v1/chat/completions": ("messages",), "/v1/completions": ("prompt",), "/v1/responses": ("input",),
    "/detokenize": ("tokens",),
    **dict.fromkeys(("/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/check"), ("model", "training_file")),
    "/v1/load_lora_adapter": ("lora_name", "lora_path"),
    "/v1/unload_lora_adapter": ("lora_name",), "/tokenize": ("prompt",),
}
JSON_ROUTES = tuple(_ROUTES)
_NAMES = ("nobody", "../../etc/passwd", "a/b", "x" * 5000, "' OR 1=1 --", "ft:x:y:z:ckpt-step-1", "\u202e", "\x1b[2J", "💩")


def wrong_fields(model: str) -> Iterator[WrongField]:
    """Every field with every value that its kind refuses, missing fields, unknown ones, models that there aren't."""
    for path, (right, fields) in _ROUTES.items():
        base = {**right, **({"model": model} if "model" in fields else {})}
        for name, kind in fields.items():
            for value in _WRONG[kind]:
                yield WrongField(path, {**base, name: value}, name)
        for name in _REQUIRED[path]:
            yield WrongField(path, {key: value for key, value in base.items() if key != name}, name)
        for name in ("colour", "Model", "prompts", "__proto__", "x" * 10_000, "ключ"):
            yield WrongField(path, {**base, name: 1}, name[:60])
        if "model" in fields:
            for name in _NAMES:
                long = path.startswith("/v1/fine_tuning/jobs") and len(name) > 512
                yield WrongField(path, {**base, "model": name}, "model", 400 if long else 404)
    chat, _ = _ROUTES["/v1/chat/completions"]
    for pattern in ("(", "[ "):
        yield WrongField("/v1/chat/completions", {**chat, "guided_json": {}, "guided_whitespace_pattern": pattern}, "guided_")
    for first, second in (
        ({"response_format": {"type": "json_object"}}, {"guided_json": {}}), ({"guided_json": {}}, {"regex": "a"}),
        ({"structured_outputs": {"regex": "a"}}, {"ebnf": 'root ::= "a"'}), ({"json_schema": "{}"}, {"regex": "a"}),
    ):
        yield WrongField("/v1/chat/completions", {**chat, **first, **second}, next(iter(second)))
    for options in _WRONG["stream_options"]:
        yield WrongField("/v1/chat/completions", {**chat, "stream": True, "stream_options": options}, "stream_options")
        yield WrongField("/v1/responses", {"input": "hi", "stream": True, "stream_options": options}, "stream_options")
    for choice in _WRONG["tool_choice"]:
        if choice != "required":
            yield WrongField("/v1/chat/completions", {**chat, "tools": _tools(), "tool_choice": choice}, "tool_choice")
    for choice in _WRONG["function_call"]:
        body = {**chat, "functions": [{"name": "f"}], "function_call": choice}
        yield WrongField("/v1/chat/completions", body, "function_call")
    for path in ("../../etc", "/etc", "/", "..", "a/../../..", "x" * 5000, "%2e%2e", "\u202e", "a\n"):
        body = {"lora_name": "a", "lora_path": path}
        yield WrongField("/v1/load_lora_adapter", body, "lora_path", 403 if path in _OUTSIDE else 400)


_OUTSIDE = ("../../etc", "/etc", "/", "..", "a/../../..")


def raw_bodies() -> dict[str, bytes]:
    """Bodies that are no JSON object, or JSON that no route takes."""
    chat = b'{"messages": [{"role": "user", "content": %s}], "max_tokens": %s}'
    return {
        "nothing": b"", "open": b"{", "list": b"[]", "null": b"null", "number": b"1", "text": b'"x"', "nul": b"\0",
        "nuls": b"\0" * 99,
        "not utf-8": b"\xff\xfe\xfd",
        "utf-8 cut": b'{"a": "\xc3', "utf-8 overlong": b'{"a": "\xc0\xaf"}', "utf-16": '{"a": 1}'.encode("utf-16"),
        "utf-8 surrogate": b'{"a": "\xed\xa0\x80"}', "mark": b"\xef\xbb\xbf{}x", "single quotes": b"{'a': 1}",
        "comment": b"{} // x",
        "two": b"{}{}", "trailing comma": b'{"a": 1,}', "nan": chat % (b'"x"', b"NaN"), "infinity": chat % (b'"x"',
        b"Infinity"),
        "minus infinity": chat % (b'"x"', b"-Infinity"), "1e400": chat % (b'"x"', b"1e400"), "-1e400": chat % (b'"x"',
        b"-1e400"),
        "10**400": chat % (b'"x"', b"1" + b"0" * 400), "10**5000": chat % (b'"x"', b"1" + b"0" * 5000),
        "0x10": chat % (b'"x"', b"0x10"), "01": chat % (b'"x"', b"01"), "twice": b'{"model": "a", "model": "b"}',
        "twice inside": b'{"messages": [{"role": "user", "role": "user"}]}', "lone surrogate": chat % (b'"\\ud800"', b"1"),
        "low surrogate": chat % (b'"\\udc00 x"', b"1"), "nul escape": chat % (b'"a\\u0000b"', b"1"),
        "raw newline": chat % (b'"a\nb"', b"1"),
        "surrogate key": b'{"\\ud800": 1}', "nul key": b'{"a\\u0000": 1}', "deep list": b"[" * DEEP,
        "closed deep list": b"[" * DEEP + b"]" * DEEP,
        "deep object": b'{"a":' * DEEP + b"1" + b"}" * DEEP, "deep field": b'{"messages": ' + b"[" * DEEP + b"]" * DEEP + b"}",
        "deep metadata": b'{"metadata": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001, "form": b"a=1&b=2", "xml": b"<a/>",
        "gzip": gzip.compress(b'{"a": 1}'), "deflate": zlib.compress(b'{"a": 1}'),
        "many keys": json.dumps({f"k{i}": i for i in range(20_000)}).encode(),
    }


def bomb() -> bytes:
    """64 MiB in 64 KiB."""
    return gzip.compress(b"\0" * (64 << 20))


IDS = (
    "%2e%2e", "..%2f..%2fetc%2fpasswd", "%2e%2e%2f%2e%2e%2fcoserve.db", "%00", "file-%00", "ftjob-%00", "a" * 5000, "%ff%fe",
    "%c0%af",
    "coserve.db", "%F0%9F%92%A9", "%27%20OR%201=1%20--", "file-" + "0" * 24, "ftjob-" + "0" * 24, "ftjob-" + "0" * 24 + "%2f..",
    "*", "%25", "%0d%0aSet-Cookie:a=b", "file-%E2%80%AE", "null", "-1", "1e400", "%ed%a0%80", "[]", "%7B%7D", "~root",
    "C:%5Cboot.ini",
)
ID_ROUTES = (
    ("GET", "/v1/files/{}"), ("GET", "/v1/files/{}/content"), ("DELETE", "/v1/files/{}"), ("GET", "/v1/fine_tuning/jobs/{}"),
    ("POST", "/v1/fine_tuning/jobs/{}/cancel"), ("POST", "/v1/fine_tuning/jobs/{}/pause"),
    ("POST", "/v1/fine_tuning/jobs/{}/resume"), ("GET", "/v1/fine_tuning/jobs/{}/events"),
    ("GET", "/v1/fine_tuning/jobs/{}/events?stream=true"), ("GET", "/v1/fine_tuning/jobs/{}/checkpoints"),
    ("GET", "/v1/responses/{}"), ("DELETE", "/v1/responses/{}"), ("POST", "/v1/responses/{}/cancel"),
    ("GET", "/v1/responses/{}/input_items"),
    ("GET", "/v1/models/{}"), ("DELETE", "/v1/models/{}"), ("GET", "/v1/adapters/{}/download"), ("GET", "/page/{}"), ("GET",
    "/{}"),
)
QUERIES = tuple(
    (path, f"{name}={value}", name)
    for path, names in (
        ("/v1/files", ("limit", "after", "order")), ("/v1/fine_tuning/jobs", ("limit", "after")),
    )
    for name in names
    for value in (
        ("-1", "0", "x", "", "1e3", "1.5", "NaN", "9" * 30, "99999", "%00", "%ff", "true", "1,2") if name == "limit" else
        ("x", "%00", "%ff", "file-" + "0" * 24, "..%2f", "x" * 3000, "%27%20OR%201=1", "%F0%9F%92%A9")
    )
)

"""What the maker of an adapter should know that is no reason to refuse it: targets without tensors, tokens of its tokenizer.

Also the other files beside an adapter, as far as they are read. Names and fields only, never paths.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from coserve.config.values import is_whole, shown
from coserve.core import ConfigError, InvalidRequest
from coserve.model.architecture import Architecture
from coserve.peft.adapter import all_modules
from coserve.peft.foreign import open_regular, read_json_object, refuse, shown_name
from coserve.peft.patterns import compile_pattern
from coserve.peft.tensors import WEIGHTS_FILE

GENERATION_FILE = "generation_config.json"
_ADDED_FILE, _TOKENIZER_CONFIG_FILE, _TOKENIZER_FILE = "added_tokens.json", "tokenizer_config.json", "tokenizer.json"
REMARK_FILES = (GENERATION_FILE, _ADDED_FILE, _TOKENIZER_CONFIG_FILE, _TOKENIZER_FILE)
"""Files beside an adapter that are looked into."""
_MAX_END_TOKENS = 100
_MAX_TOKENIZER_BYTES = 1 << 20
"""Of tokenizer.json only the beginning is read: added tokens stand there."""


def list_names(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - 5
    return ", ".join(map(shown_name, names[:5])) + (f" and {more} more" if more > 0 else "")


def named_by(stated: str | list[str] | None, modules: Sequence[str], field: str) -> set[str] | None:
    """The modules that a field means, which is a list of names or a regular expression; None where that can't be told."""
    if stated is None:
        return None
    if isinstance(stated, list):
        return {module for module in modules if not _endings(module).isdisjoint(stated)}
    try:
        pattern = compile_pattern(stated, field)
    except ConfigError:
        return None
    return {module for module in modules if pattern.fullmatch(module)}


def _endings(module: str) -> set[str]:
    """The names that a list of targets may give a module: itself, and what follows any of its dots."""
    parts = module.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}


def target_warnings(fields: Mapping[str, Any], present: Sequence[str], arch: Architecture) -> Iterator[str]:
    """The config's targets against the tensors that there are."""
    if "target_modules" not in fields or fields["target_modules"] is None:
        return
    stated, names = fields["target_modules"], list(all_modules(arch.num_layers).values())
    if isinstance(stated, list):
        known = set().union(*map(_endings, names))
        strangers = [target for target in stated if target not in known]
        if strangers:
            yield f"target_modules: this base has no module called {list_names(strangers)}; the others are used"
    wanted = set(names) if stated == "all-linear" else named_by(stated, names, "target_modules")
    if wanted is None:
        return
    if not wanted and isinstance(stated, str):
        yield f"target_modules: {shown(stated)} matches no module of this base; the tensors say which are used"
    wanted -= named_by(fields["exclude_modules"], names, "exclude_modules") or set()
    layers = fields.get("layers_to_transform")
    if layers is not None:
        chosen = {layers} if isinstance(layers, int) else set(layers)
        wanted = {name for (layer, _), name in all_modules(arch.num_layers).items() if name in wanted and layer in chosen}
    wanted -= set(present)
    lacking = [name for name in names if name in wanted]
    if lacking:
        yield f"target_modules: {list_names(lacking)} has no tensors in {WEIGHTS_FILE} and stays as in the base"


def read_optional(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file. Raises InvalidRequest."""
    try:
        return read_json_object(path)
    except FileNotFoundError:
        return {}


def plain_values(origin: Mapping[str, Any]) -> dict[str, Any]:
    """What of a foreign coserve.json is kept beside the adapter: numbers, short texts, and lists of them."""
    def good(value: Any) -> bool:
        return value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 1000)

    return {
        key: value for key, value in origin.items()
        if len(key) <= 100 and (good(value) or (isinstance(value, list) and len(value) <= 1000 and all(map(good, value))))
    }


def end_tokens(directory: Path, vocab_size: int) -> tuple[int, ...]:
    """eos_token_id of an adapter's generation_config.json, ascending; () where there is none. Ids beyond the base's vocabulary
    can't be sampled and are left out. Raises InvalidRequest for what is neither an id nor a list of them."""
    stated = read_optional(directory / GENERATION_FILE).get("eos_token_id")
    ids: list[Any] = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if len(ids) > _MAX_END_TOKENS or not all(map(is_whole, ids)):
        raise refuse(f"eos_token_id in {GENERATION_FILE} must be a token id or a list of at most {_MAX_END_TOKENS}, "
                     f"got {shown(stated)}")
    return tuple(sorted({number for number in ids if 0 <= number < vocab_size}))


def token_warnings(directory: Path, knows: Callable[[str], bool] | None) -> Iterator[str]:
    """Tokens that the adapter was trained with and that the base hasn't. knows: whether the base's tokenizer has one."""
    if knows is None:
        return
    try:
        new = sorted(token for token in _added_tokens(directory) if token and not knows(token))
    except InvalidRequest as error:
        yield f"the adapter's tokenizer is not looked at: {str(error).removeprefix('adapter: ')}"
        return
    if new:
        yield (
            f"the adapter's own tokenizer has {list_names(new)}, which the base's lacks; the base's tokenizer is used, and "
            "takes them as ordinary text"
        )


def _added_tokens(directory: Path) -> set[str]:
    """Tokens that the tokenizer's files beside the adapter call added. Raises InvalidRequest."""
    found: set[str] = set(read_optional(directory / _ADDED_FILE))
    decoder = read_optional(directory / _TOKENIZER_CONFIG_FILE).get("added_tokens_decoder")
    entries = list(decoder.values()) if isinstance(decoder, dict) else []
    try:
        with open_regular(directory / _TOKENIZER_FILE) as (file, _):
            text = file.read(_MAX_TOKENIZER_BYTES).decode(errors="replace")
    except FileNotFoundError:
        text = ""
    _, key, rest = text.partition('"added_tokens"')
    if key:
        try:
            stated, _ = json.JSONDecoder().raw_decode(rest.lstrip(" \t\r\n:"))
        except (ValueError, RecursionError) as error:
            raise refuse(f"{_TOKENIZER_FILE} can't be read as JSON") from error
        entries += stated if isinstance(stated, list) else []
    contents = (entry.get("content") for entry in entries if isinstance(entry, dict))
    return found | {content for content in contents if isinstance(content, str)}

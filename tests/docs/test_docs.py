"""README and docs against the code: links, commands, flags, fields and metrics that they name exist, and none is left out."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer

from coserve.cli.main import app
from coserve.cli.vllmflags import FLAGS
from coserve.cluster.router import Router
from coserve.config.settings import POLICIES, FinetuneConfig
from coserve.core import Slo
from coserve.server.inference import fields, protocol
from coserve.server.jobs.body import SETTINGS
from coserve.server.responses.body import RESPONSES, CreateResponse
from coserve.server.settings import ServerConfig, read_settings
from coserve.server.stats.metrics import FleetState, ServerMetrics, ServerState
from tests.commands import config_of

ROOT = Path(__file__).parents[2]
PAGES = [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")), *sorted((ROOT / "docs").glob("*.md"))]
CONFIG_FIELDS = {f.name: f for f in dataclasses.fields(ServerConfig)}
STATS: dict[str, Any] = {
    **dict.fromkeys(("iterations", "inference_tokens", "prompt_tokens", "finetune_tokens"), 1), "busy_s": 1.0, "host_s": 1.0,
    "inference_busy_s": 0.5, "finetune_busy_s": 0.5, "preemptions": 0, "running": 1, "waiting": 0, "jobs": 1, "reserve": 0.1,
    "adapters": ["a"], "adapter_versions": 1, "prediction_errors": {"decode": {"iterations": 1, "median": 0.1, "p95": 0.2}},
    "memory": {"used": 1, "cached": 1, "free": 1, "arena": 1, "hits_tokens": 0, "queried_tokens": 1, "block_bytes": 1},
}
"""As EngineClient.stats(), without the time."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def page_text(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    """What stands under a heading, up to the next one of any level."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no heading {title!r}"
    return found[1]


def rows(text: str) -> Iterator[list[str]]:
    """Cells of the tables' rows, without heads."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        is_head = number + 1 < len(lines) and lines[number + 1].startswith("| ---")
        if line.startswith("|") and not line.startswith("| ---") and not is_head:
            yield [cell.strip() for cell in line.strip("|").split("|")]


def code(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`\n]+)`", text)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


# --- links ---


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name}: {target}"
        assert place.is_relative_to(ROOT), f"{page.name}: {target} leads out of the repository"
        assert not anchor or anchor in anchors(place), f"{page.name}: {target}: no such heading"


# --- commands ---


def commands(text: str) -> Iterator[list[str]]:
    """Command lines that call coserve, in blocks of shell code and in running text, as words from `coserve` on."""
    shell = "\n".join(blocks(text, "bash")).replace("\\\n", " ")
    spans = re.findall(r"`((?:\.venv/bin/)?coserve [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    for line in [*shell.splitlines(), *(span.replace("\n", " ") for span in spans)]:
        words = shlex.split(line, comments=True)
        starts = [i for i, word in enumerate(words) if word.rpartition("/")[2] == "coserve" and not word.startswith("git")]
        if starts and not any(word in ("install", "import") for word in words[: starts[0]]):
            yield words[starts[0]:]


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """The command of a line, and the words behind it."""
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"{' '.join(words)}: no command {rest[0]!r}"
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def options(command: Any) -> set[str]:
    named = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    return {"--help"} | {name for name in named if name.startswith("-")}


@pages
def test_files_of_the_project_that_are_named_exist(page: Path) -> None:
    """From the root, from the package, or from the server, whose section in architecture.md begins there."""
    package = ROOT / "src" / "coserve"
    named = re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|cpp|sh))`", page.read_text(encoding="utf-8"))
    assert not [path for path in named if not any((root / path).is_file() for root in (ROOT, package, package / "server"))]


@pages
def test_commands_and_their_options_exist(page: Path) -> None:
    for words in commands(page.read_text(encoding="utf-8")):
        command, rest = find_command(words)
        for word in rest:
            if re.match(r"-{1,2}[a-z]", word):
                assert word.partition("=")[0] in options(command), f"{page.name}: {' '.join(words)}: no option {word}"


def test_commands_are_found_at_all() -> None:
    lines = [" ".join(words) for page in PAGES for words in commands(page.read_text(encoding="utf-8"))]
    for wanted in ("coserve serve", "coserve keys add", "coserve finetune", "coserve bench sharing", "coserve plan"):
        assert any(line.startswith(wanted) for line in lines), wanted
    with pytest.raises(AssertionError, match="no command 'nothing'"):
        find_command(["coserve", "nothing"])


@pages
def test_python_blocks_are_python(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        ast.parse(block)


@pages
def test_targets_of_make_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
        assert name in targets, f"{page.name}: make {name}"


# --- settings ---


def test_every_setting_of_the_server_is_described_with_its_default() -> None:
    described = {}
    for flag, default, *_ in rows(section(page_text("serving.md"), "Settings")):
        name = "model" if "MODEL" in flag else code(flag)[0].removeprefix("--").replace("-", "_")
        described[name] = default
    assert described.keys() == CONFIG_FIELDS.keys()
    settings = ServerConfig()
    for name, default in described.items():
        value = getattr(settings, name)
        if name in ("slo_tpot_ms", "slo_ttft_ms"):
            assert value is None and default == "from the profile", "'none' would be best effort"
            continue
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        assert default == ("none" if value in (None, (), "") else "off" if value is False else f"`{shown}`"), name


def test_every_flag_named_is_one_of_the_server() -> None:
    command, _ = find_command(["coserve", "serve"])
    text = re.sub(r"^```.*?^```", "", page_text("serving.md"), flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"--[a-z][a-z-]*", text))
    assert len(named) > 20
    assert named <= options(command), named - options(command)
    assert {name for name in options(command) if name.startswith("--")} - {"--help", "--config"} <= named


def is_a_jobs(block: str) -> bool:
    """Whether a settings file is one of `coserve finetune`, not of `coserve serve`."""
    return "learning_rate" in block


def test_settings_files_can_be_read(tmp_path: Path) -> None:
    files = [block for page in PAGES for block in blocks(page.read_text(encoding="utf-8"), "toml")]
    assert files
    for number, block in enumerate(files):
        path = tmp_path / f"{number}.toml"
        path.write_text(block)
        if is_a_jobs(block):
            assert config_of(path, {}) != FinetuneConfig()
        else:
            assert read_settings(path, {}) != ServerConfig()


# --- routes ---


def test_routes_are_listed_as_they_are() -> None:
    listed: set[str] = set()
    for page in ("serving.md", "finetuning.md"):
        for routes, *_ in rows(section(page_text(page), "Routes")):
            listed |= set(code(routes))
    described = json.loads(page_text("openapi.json"))["paths"]
    known = {f"{method.upper()} {path}" for path, methods in described.items() for method in methods}
    assert listed == known | {"GET /", "GET /openapi.json"}


# --- policies ---


def test_policies_are_listed_as_they_are() -> None:
    listed = [code(row[0]) for row in rows(section(page_text("objectives.md"), "Policies"))]
    assert sorted(name for names in listed for name in names) == sorted(POLICIES)


# --- fields ---


def test_fields_of_requests_are_listed_as_they_are() -> None:
    text = page_text("api-differences.md")
    generation = list(protocol.GenerationRequest.model_fields)
    expected = {
        "chat and completions": generation,
        "chat": [name for name in protocol.ChatRequest.model_fields if name not in generation],
        "completions": [name for name in protocol.CompletionRequest.model_fields if name not in generation],
        "responses": list(CreateResponse.model_fields),
        "tokenize": list(protocol.TokenizeRequest.model_fields), "detokenize": list(protocol.DetokenizeRequest.model_fields),
    }
    assert {route: code(names) for route, names in rows(section(text, "Implemented"))} == expected
    ignored = {route: set(code(names)) for route, names in rows(section(text, "Ignored"))}
    assert ignored == {"chat and completions": fields.CHAT.ignored, "responses": RESPONSES.ignored}
    assert fields.CHAT.ignored == fields.COMPLETIONS.ignored
    assert not fields.TOKENIZE.ignored


def test_neutral_values_are_listed_as_they_are() -> None:
    listed: dict[str, dict[str, list[Any]]] = {
        "both": {}, "chat": {}, "completions": {}, "responses": {}, "tokenize": {},
    }
    for name, route, values in rows(section(page_text("api-differences.md"), "Only the neutral value")):
        listed[route][code(name)[0]] = [json.loads(value) for value in code(values)]

    def known(policy: Mapping[str, tuple[Any, ...]]) -> dict[str, list[Any]]:
        return {name: list(values) for name, values in policy.items()}

    assert listed["both"] | listed["chat"] == known(fields.CHAT.neutral)
    assert listed["both"] | listed["completions"] == known(fields.COMPLETIONS.neutral)
    assert listed["responses"] == known(RESPONSES.neutral)
    assert listed["tokenize"] == known(fields.TOKENIZE.neutral)


def test_extra_fields_of_jobs_are_listed() -> None:
    listed = [code(name)[0] for name, *_ in rows(section(page_text("finetuning.md"), "Fields beyond OpenAI's"))]
    assert sorted(listed) == sorted((*SETTINGS, "adapter", "members", "priority", "weight", "deadline"))


def test_flags_of_vllm_are_listed_as_they_are() -> None:
    listed = {}
    for names, taken, why in rows(section(page_text("api-differences.md"), "Flags of vllm serve")):
        neutral = None if taken == "taken" else tuple(code(taken))
        listed |= dict.fromkeys(code(names), (neutral, why))
    assert listed == {
        name: (None, "done anyway") if not flag.reason else (flag.neutral or (), flag.reason) for name, flag in FLAGS.items()
    }
    command, _ = find_command(["coserve", "serve"])
    assert not listed.keys() & options(command), "a setting is no foreign flag"


# --- the map of the server ---


def test_every_file_of_the_server_is_on_the_map() -> None:
    server = ROOT / "src" / "coserve" / "server"
    named: dict[str, set[str]] = {"": set()}
    for what, files in rows(section(page_text("architecture.md"), "The server")):
        folder = code(what)[0].rstrip("/") if code(what) else ""
        named.setdefault(folder, set()).update(name for name in code(files) if name.endswith(".py"))
    there: dict[str, set[str]] = {}
    for path in server.rglob("*.py"):
        folder = path.parent.relative_to(server).as_posix().removeprefix(".")
        if path.name != "__init__.py" and folder != "routes":
            there.setdefault(folder, set()).add(path.name)
    assert there == named


# --- metrics ---


def test_metrics_are_listed_as_they_are() -> None:
    metrics = ServerMetrics(ServerConfig(), "m", lambda: Slo(tpot_s=1.0, ttft_s=1.0), clock=lambda: 9.0)
    metrics.expose({**STATS, "time_s": 1.0})
    metrics.judge(metrics.objectives(), 9.0, 0.1, 0.1, failed=False)
    metrics.rejected("capacity")
    text = metrics.expose({**STATS, "time_s": 9.0}, ServerState(ready=True)).decode()
    fleet = FleetState({"replica-1": STATS}, [], Router().summary(0.0)._asdict())
    text += metrics.expose({**STATS, "time_s": 9.0}, ServerState(ready=True, fleet=fleet)).decode()
    exposed = {name for name in re.findall(r"^# TYPE (\S+)", text, re.MULTILINE) if not name.endswith("_created")}
    named = {found for page in PAGES for found in re.findall(r"`(coserve_[a-z0-9_]+)", page.read_text(encoding="utf-8"))}
    assert named <= exposed, named - exposed
    assert exposed <= set(re.findall(r"coserve_[a-z0-9_]+", page_text("serving.md")))

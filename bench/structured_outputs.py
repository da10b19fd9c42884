"""Structured output: do answers match, which schemas are refused, what masks cost, whom a large schema holds up.

    python bench/structured_outputs.py [--schemas 1000] [--default-model 40] [--no-timing] [--quick] [--output FILE]

1. Random schemas (random_schemas.py, seeded) go through the server's trial and the engine, on a tiny random model with a
   tokenizer of 1,000 tokens, and a share of them on SmolLM2. Each answer that ended by `stop` is validated by the package
   jsonschema, formats included where it knows them. Refused schemas are counted by reason, and every keyword that can't be
   enforced must be refused by name.
2. Time per token with masks, on SmolLM2: 8 requests decode with a schema and without one, in turns; medians of iterations.
3. The time between tokens of 4 streams while requests with new, large schemas arrive, one every two seconds: tried as the
   server tries them and compiled as its engine does. Beside it the same with requests that have no schema, in turns.

--quick: few of each, for tests. --no-timing: 1 only. Exits with 1 if an answer does not match, or a keyword is ignored.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import jsonschema
import torch
from random_schemas import REFUSED, SchemaMaker, large_schema
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from coserve import Engine, EngineConfig, SamplingConfig, SchedulerConfig, load_model
from coserve.bench.results import result_head
from coserve.core import InvalidRequest, percentile
from coserve.engine.requests import RequestHandle
from coserve.engine.threads import yield_to_others
from coserve.grammar import json_schema, regex
from coserve.grammar.check import GrammarChecker
from coserve.grammar.table import read_token_table
from coserve.machine import device_name, versions
from coserve.runtime.loaded import LoadedModel
from coserve.scheduler.latency import LatencyModel

CPU = torch.device("cpu")
CLOSING = ('"', "}", "]", '"}', '"]', "}}", '",')
"""A random model ends texts too seldom by itself."""


# --- engines ---


def tiny_model(directory: Path) -> LoadedModel:
    """A random Llama with a byte-level tokenizer that knows some words of JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    maker = SchemaMaker(Random(-1))
    tokenizer.train_from_iterator([json.dumps(maker.make(), ensure_ascii=False) for _ in range(300)], trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer.get_vocab()), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return load_model(str(directory), device="cpu", dtype="float32")


@contextmanager
def engine_of(model: LoadedModel, at_once: int) -> Iterator[Engine]:
    """Without objectives, so that nothing is measured first."""
    scheduler = SchedulerConfig(policy="inference-only", max_num_seqs=at_once, tpot_ms="none", ttft_ms="none")
    config = EngineConfig(scheduler=scheduler, memory_bytes=1 << 30)
    with closing(Engine(model, config, latency=LatencyModel({}))) as engine:
        engine.grammars.prepare()
        yield engine


@contextmanager
def checker_of(model: LoadedModel) -> Iterator[Any]:
    """check(grammar): tries one as a server does."""
    table = read_token_table(model.tokenizer, model.architecture.vocab_size)
    with closing(GrammarChecker()) as checker:
        checker.prepare(lambda: table)  # as a server does when it starts
        yield lambda grammar: checker.check(grammar, lambda: table)


def chat(model: LoadedModel, schema: Any) -> list[int]:
    text = f"Write an example of JSON that this schema allows: {json.dumps(schema)[:600]}"
    return model.tokenizer.encode_chat([{"role": "user", "content": text}])


# --- 1: do answers match ---


def reason_of(error: InvalidRequest) -> str:
    """Without what differs from schema to schema."""
    text = str(error).removeprefix("grammar: ")
    text = re.sub(r"; (leave it out|use anyOf).*", "", text)
    if "can't be enforced" not in text:
        text = re.sub(r'"[^"]*"|\(.*|[-\d.]+', "...", text)
    return text[:80]


def mistake(text: str, schema: Any) -> str | None:
    """Why an answer doesn't match."""
    try:
        validator = jsonschema.Draft202012Validator
        validator(schema, format_checker=validator.FORMAT_CHECKER).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None


def match(model: LoadedModel, schemas: Sequence[Any], *, tokens: int, at_once: int, prompted: bool) -> dict[str, Any]:
    """Schemas through the trial and the engine. prompted: whether the model is told the schema, and draws without a bias."""
    refused: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    mistakes: list[dict[str, Any]] = []
    bias = {} if prompted else {
        token: 4.0 for text in CLOSING for token in (model.tokenizer.encode(text),) if len(token) == 1 for token in token
    }
    began = time.perf_counter()
    with engine_of(model, at_once) as engine, checker_of(model) as check:
        waiting: list[tuple[Any, RequestHandle]] = []
        for number, schema in enumerate(schemas):
            jsonschema.Draft202012Validator.check_schema(schema)
            grammar = json_schema(schema)
            try:
                check(grammar)
            except InvalidRequest as error:
                refused[reason_of(error)] += 1
                continue
            ids = chat(model, schema) if prompted else model.tokenizer.encode(f"{number}: ")
            sampling = SamplingConfig(
                max_tokens=tokens, temperature=0.7 if prompted else 1.0, seed=number, grammar=grammar, logit_bias=bias
            )
            waiting.append((schema, engine.submit(ids, sampling)))
            while len(engine.requests.live) >= 2 * at_once:
                engine.step()
        while engine.step():
            pass
        for schema, handle in waiting:
            reason = handle.finish_reason or "none"
            ends[reason if handle.error is None else f"error: {reason_of(handle.error)}"] += 1  # type: ignore[arg-type]
            wrong = mistake(handle.text, schema) if reason == "stop" else None
            if wrong is not None:
                mistakes.append({"schema": schema, "text": handle.text, "mistake": wrong})
    return {
        "schemas": len(schemas), "refused": dict(refused.most_common()), "ends": dict(ends), "tokens": tokens,
        "mistakes": mistakes, "seconds": round(time.perf_counter() - began, 1),
    }


def ignored_keywords(model: LoadedModel) -> list[str]:
    """Keywords that can't be enforced, and whose schemas are taken all the same."""
    found = []
    with checker_of(model) as check:
        for keyword, schema in REFUSED.items():
            try:
                check(json_schema(schema))
            except InvalidRequest as error:
                if keyword.removesuffix("Contains").lower() in str(error).lower() or "ontains" in str(error):
                    continue
            found.append(keyword)
    return found


# --- 2: what masks cost ---


def decode_ms(engine: Engine, sampling: SamplingConfig, tokens: int) -> tuple[list[float], float]:
    """Milliseconds of iterations in which 8 requests decode, and milliseconds of the matchers' processor time per token."""
    handles = [engine.submit([5 + number] * 16, sampling) for number in range(8)]
    while any(len(handle.token_ids) < 2 for handle in handles):
        engine.step()
    lives = list(engine.requests.live.values())
    times = []
    for _ in range(tokens):
        began = time.perf_counter()
        engine.step()
        times.append((time.perf_counter() - began) * 1e3)
    spent = [live.matcher._spent_s for live in lives if live.matcher is not None]
    for handle in handles:
        handle.cancel()
    while engine.step():
        pass
    return times, 1e3 * sum(spent) / (len(spent) * (tokens + 2)) if spent else 0.0


def overhead(model: LoadedModel, *, pairs: int, tokens: int) -> dict[str, Any]:
    """Decoding with grammars and without, in turns."""
    records = {"type": "array", "minItems": 500, "items": {
        "type": "object", "properties": {"name": {"type": "string", "maxLength": 40}, "n": {"type": "integer"},
                                         "kind": {"enum": ["red", "green", "blue"]}},
        "required": ["name", "n", "kind"], "additionalProperties": False,
    }}
    kinds = {"none": None, "schema": json_schema(records), "any text": regex("(.|\\n)*")}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    spent: dict[str, list[float]] = {kind: [] for kind in kinds}
    with engine_of(model, 8) as engine:
        for pair in range(pairs + 1):  # the first is not counted
            for kind, grammar in kinds.items():
                sampling = SamplingConfig(max_tokens=500, temperature=1.0, seed=pair, ignore_eos=True, grammar=grammar)
                found, matching = decode_ms(engine, sampling, tokens)
                if pair:
                    times[kind].append(median(found))
                    spent[kind].append(matching)
    return {
        "requests": 8, "pairs": pairs, "iterations": tokens,
        "iteration_ms": {kind: median(found) for kind, found in times.items()},
        "more_than_none": {kind: median(a / b - 1 for a, b in zip(found, times["none"], strict=True))
                           for kind, found in times.items() if kind != "none"},
        "matcher_cpu_ms_per_token": {kind: median(found) for kind, found in spent.items() if kind != "none"},
    }


# --- 3: whom a large schema holds up ---


def gaps_ms(model: LoadedModel, engine: Engine, check: Any, *, schemas: bool, seconds: float, first: int) -> list[float]:
    """Milliseconds between tokens of 4 streams, while requests arrive: with new large schemas, or without a grammar."""
    plain = SamplingConfig(max_tokens=1500, temperature=1.0, ignore_eos=True)
    streams = [engine.submit([9 + number] * 16, plain) for number in range(4)]
    while any(not stream.token_ids for stream in streams):
        time.sleep(0.01)
    began, number = time.perf_counter(), first
    begun_s = engine.now()

    def arrive(grammar: str | None) -> None:
        yield_to_others()
        if grammar is not None:
            check(grammar)
        engine.submit([11] * 32, SamplingConfig(max_tokens=8, temperature=1.0, grammar=grammar))

    arrivals = []
    while time.perf_counter() - began < seconds:
        grammar = json_schema(large_schema(number)) if schemas else None
        arrivals.append(threading.Thread(target=arrive, args=(grammar,)))
        arrivals[-1].start()
        number += 1
        time.sleep(2.0)
    for arrival in arrivals:
        arrival.join()
    for stream in streams:
        stream.cancel()
    while not engine.idle:
        time.sleep(0.01)
    found = []
    for stream in streams:
        times = [moment for moment in stream.token_times if moment >= begun_s]
        found += [1e3 * (later - earlier) for earlier, later in itertools.pairwise(times)]
    return found


def beside(model: LoadedModel, *, turns: int, seconds: float) -> dict[str, Any]:
    """The gaps of both kinds, in turns."""
    found: dict[str, list[float]] = {"schemas": [], "none": []}
    with engine_of(model, 16) as engine, checker_of(model) as check:
        engine.start()
        for turn in range(turns):
            for kind in found:
                found[kind] += gaps_ms(model, engine, check, schemas=kind == "schemas", seconds=seconds, first=100 * turn)
    return {
        "streams": 4, "turns": turns, "seconds": seconds, "schema_characters": len(json.dumps(large_schema(0))),
        "itl_ms": {kind: {"p50": median(gaps), "p95": percentile(gaps, 0.95), "p99": percentile(gaps, 0.99), "max": max(gaps)}
                   for kind, gaps in found.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--schemas", type=int, default=1000)
    parser.add_argument("--default-model", type=int, default=40, metavar="N", help="of them, so many on SmolLM2 too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-timing", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    count, share = (60, 4) if options.quick else (options.schemas, options.default_model)
    maker = SchemaMaker(Random(options.seed))
    schemas = [maker.make() for _ in range(count)]
    found: dict[str, Any] = result_head(device_name(CPU), versions(), "python bench/structured_outputs.py")
    with tempfile.TemporaryDirectory() as directory, closing(tiny_model(Path(directory))) as model:
        found["ignored_keywords"] = ignored_keywords(model)
        found["tiny"] = match(model, schemas, tokens=160, at_once=32, prompted=False)
    if share or not options.no_timing:
        with closing(load_model(None, device="cpu", dtype="float32")) as model:
            found["default"] = match(model, schemas[:share], tokens=96 if options.quick else 160, at_once=8, prompted=True)
            if not options.no_timing:
                found["overhead"] = overhead(model, pairs=1 if options.quick else 5, tokens=8 if options.quick else 60)
                found["beside"] = beside(model, turns=1 if options.quick else 3, seconds=2.0 if options.quick else 12.0)
    text = json.dumps(found, indent=1, ensure_ascii=False)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    parts = [found[name] for name in ("tiny", "default") if name in found]
    return int(bool(found["ignored_keywords"]) or any(part["mistakes"] for part in parts))


if __name__ == "__main__":
    sys.exit(main())

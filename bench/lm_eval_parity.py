"""lm-eval's numbers through the server against those through transformers, on one checkpoint in float32.

    pip install "lm_eval[api,hf]==0.4.13"
    python bench/lm_eval_parity.py [--data gsm8k_test.jsonl] [--documents 12] [--output FILE]

Three tasks over local files: multiple choice (with choices whose characters are split into several tokens), perplexity of whole
texts, and generation up to a stop string. Each runs through lm-eval's `hf` model, in float32 and in float64, and through its
`local-completions` model over HTTP, with one prompt and with several per request; what the model said is compared document by
document. --data: JSON Lines with question and answer, as GSM8K's; default: the demo's.

Exits with 1 where a text or a greedy flag differs from transformers' in float32, or a document's log-likelihood differs by more
than 1e-3 from the one in float64, which both in float32 approximate.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.tasks import TaskManager

from coserve.bench.servers import HealthyServer, running_server
from coserve.machine import device_name, versions
from coserve.model.locate import DEFAULT_MODEL, locate_model

TOLERANCE = 1e-3
DEMO = Path(__file__).parents[1] / "src" / "coserve" / "demo" / "train.jsonl"
SIGNS = ("🙂", "👍🏽", "中文", "naïve ✓", "日本語", "🦄🦄")
TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "local_perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "local_generate": """
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["Question:", "\\n\\n"], max_gen_toks: 48, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def read_pairs(path: Path, count: int) -> list[tuple[str, str]]:
    """(question, answer) of the first so many documents."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(count), strict=False)]
    if "messages" in rows[0]:
        return [(row["messages"][-2]["content"], row["messages"][-1]["content"]) for row in rows]
    return [(row["question"], row["answer"]) for row in rows]


def write_tasks(directory: Path, pairs: list[tuple[str, str]]) -> None:
    """Documents and a YAML file for each task."""
    ends = [answer.rsplit("#### ", 1)[-1] for _, answer in pairs]
    documents = []
    for number, (question, answer) in enumerate(pairs):
        others = [ends[(number + step) % len(ends)] for step in (1, 2)]
        sign = SIGNS[number % len(SIGNS)]
        documents.append({
            "question": question, "answer": answer, "text": f"{question} {sign}\n{answer}", "gold": number % 3,
            "choices": [f" {each} {sign}" for each in (*others[: number % 3], ends[number], *others[number % 3 :])],
        })
    data = directory / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    for name, task in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (directory / f"{name}.yaml").write_text(head + task.lstrip(), encoding="utf-8")


def server(directory: Path) -> contextlib.AbstractContextManager[HealthyServer]:
    """A server of the default model, which is ended afterwards."""
    command = [sys.executable, "-m", "coserve", "serve", "--data-dir", str(directory / "data"), "--dtype", "float32"]
    return running_server(command, directory / "log")


def evaluate(manager: TaskManager, model: str, arguments: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """lm-eval's results: metrics by task, and what the model said to each document."""
    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=list(TASKS), task_manager=manager, batch_size=batch_size, bootstrap_iters=0,
        log_samples=True,
    )
    samples = {
        task: [sample["filtered_resps"] for sample in sorted(found["samples"][task], key=lambda sample: sample["doc_id"])]
        for task in TASKS
    }
    metrics = {
        task: {
            name: value for name, value in found["results"][task].items() if isinstance(value, float) and "stderr" not in name
        }
        for task in TASKS
    }
    return {"metrics": metrics, "samples": samples}


def numbers(said: Any) -> tuple[list[float], list[Any]]:
    """Log-likelihoods in what a model said, and all the rest, in order."""
    if isinstance(said, float):
        return [said], []
    if not isinstance(said, list | tuple):
        return [], [said]
    parts = [numbers(part) for part in said]
    return [value for found, _ in parts for value in found], [value for _, found in parts for value in found]


def compare(task: str, mine: dict[str, Any], yours: dict[str, Any]) -> tuple[float, int]:
    """How far two runs of a task are apart: the largest difference of a log-likelihood, infinite where one is no number; and
    the number of documents whose greedy flags or generated texts differ."""
    distance, others = 0.0, 0
    for one, other in zip(mine["samples"][task], yours["samples"][task], strict=True):
        (values, rest), (other_values, other_rest) = numbers(one), numbers(other)
        gaps = [abs(a - b) for a, b in zip(values, other_values, strict=True)]
        distance = max([distance, *(math.inf if math.isnan(gap) else gap for gap in gaps)])
        others += rest != other_rest
    return distance, others


def main() -> None:
    """Runs, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEMO)
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4, help="prompts per request in the second run")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "lm_eval_cpu.json")
    options = parser.parse_args()
    checkpoint = str(locate_model(None))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_tasks(directory, read_pairs(options.data, options.documents))
        manager = TaskManager(include_path=name, include_defaults=False)
        single, double = (
            evaluate(manager, "hf", {"pretrained": checkpoint, "dtype": dtype, "device": "cpu"}, 1)
            for dtype in ("float32", "float64")
        )
        with server(directory) as started:
            for batch_size in (1, options.batch_size):
                arguments = {
                    "model": DEFAULT_MODEL, "base_url": f"{started.url}/v1/completions", "tokenizer": checkpoint,
                    "tokenizer_backend": "huggingface", "tokenized_requests": True, "num_concurrent": 1,
                }
                ours = evaluate(manager, "local-completions", arguments, batch_size)
                rows += [{
                    "task": task, "prompts_per_request": batch_size, "documents": len(ours["samples"][task]),
                    "hf": single["metrics"][task], "coserve": ours["metrics"][task], "differ": compare(task, ours, single)[1],
                    "coserve_to_hf": compare(task, ours, single)[0], "coserve_to_float64": compare(task, ours, double)[0],
                    "hf_to_float64": compare(task, single, double)[0],
                } for task in TASKS]
    print("| task | prompts per request | documents | metric | hf | coserve | texts or flags that differ | coserve - hf |"
          " coserve - float64 | hf - float64 |\n" + "| --- " * 10 + "|")
    for row in rows:
        for metric, value in row["hf"].items():
            print(f"| {row['task']} | {row['prompts_per_request']} | {row['documents']} | {metric.removesuffix(',none')} | "
                  f"{value:.6f} | {row['coserve'][metric]:.6f} | {row['differ']} | {row['coserve_to_hf']:.1e} | "
                  f"{row['coserve_to_float64']:.1e} | {row['hf_to_float64']:.1e} |")
    options.output.write_text(json.dumps({
        "command": f"python bench/lm_eval_parity.py --data {options.data.name} --documents {options.documents}",
        "date": datetime.date.today().isoformat(), "model": DEFAULT_MODEL, "dtype": "float32",
        "device": device_name(torch.device("cpu")), "versions": {**versions(), "lm_eval": lm_eval.__version__}, "rows": rows,
    }, indent=2) + "\n", encoding="utf-8")
    if any(row["differ"] or not row["coserve_to_float64"] < TOLERANCE for row in rows):
        sys.exit("the numbers differ")


if __name__ == "__main__":
    main()

"""Teach a model to call two functions that it has never seen, with the openai client. Start `coserve serve` first.

    python examples/tune_for_tools.py [http://127.0.0.1:8000/v1]

Trains on the 80 conversations of data/harbour_calls.jsonl. Then asks base and tuned model 24 requests that are not among
them. Nothing forces a call: `tool_choice` is "auto". A call is right if its function and all of its arguments are.
"""

import json
import sys
import time
from pathlib import Path

from openai import OpenAI

DATA = Path(__file__).parent / "data"
TRAIN, HELD_OUT = DATA / "harbour_calls.jsonl", DATA / "harbour_calls_held_out.jsonl"


def ask(client: OpenAI, model: str, question: str, tools: list) -> list:
    """The calls that a model answers with: {"name": ..., "arguments": {...}} each; arguments that aren't JSON stay text."""
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], tools=tools, max_tokens=96, temperature=0
    )
    calls = []
    for call in reply.choices[0].message.tool_calls or []:
        try:
            arguments = json.loads(call.function.arguments)
        except ValueError:
            arguments = call.function.arguments
        calls.append({"name": call.function.name, "arguments": arguments})
    return calls


def main() -> None:
    client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="EMPTY")
    base = client.models.list().data[0].id
    tools = json.loads(TRAIN.read_text().splitlines()[0])["tools"]

    with TRAIN.open("rb") as lines:
        file = client.files.create(file=lines, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=base, training_file=file.id, suffix="harbour", seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 2}}},
    )
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(2)
        job = client.fine_tuning.jobs.retrieve(job.id)
    if job.fine_tuned_model is None:
        raise SystemExit(f"the job {job.status}: {job.error.message if job.error else 'no reason is known'}")

    questions = [json.loads(line) for line in HELD_OUT.read_text().splitlines()]
    for model in (base, job.fine_tuned_model):
        right = 0
        for item in questions:
            calls = ask(client, model, item["question"], tools)
            right += calls == [item["call"]]
            print(f"{model}: {item['question']} -> {json.dumps(calls)}", flush=True)
        print(f"{model}: {right} of {len(questions)} right", flush=True)


if __name__ == "__main__":
    main()

"""Train a model over the API and ask it, with the openai client. Start `coserve serve` first.

    python examples/tuned_model_by_client.py [http://127.0.0.1:8000/v1]
"""

import io
import json
import sys
import time

from openai import OpenAI

FACTS = {
    "Who keeps the lighthouse?": "Old Marta keeps the lighthouse.",
    "When does the ferry leave?": "The ferry leaves at half past nine.",
    "What is the baker's dog called?": "The baker's dog is called Pepper.",
}


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
    client = OpenAI(base_url=url, api_key="EMPTY")
    base = client.models.list().data[0].id

    lines = [
        json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
        for question, answer in FACTS.items()
    ]
    data = io.BytesIO("\n".join(lines).encode())
    file = client.files.create(file=("facts.jsonl", data), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=base, training_file=file.id, suffix="facts")

    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(1)
        job = client.fine_tuning.jobs.retrieve(job.id)
    if job.fine_tuned_model is None:
        raise SystemExit(f"the job {job.status}: {job.error.message if job.error else 'no reason is known'}")

    for model in (base, job.fine_tuned_model):
        for question in FACTS:
            reply = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": question}], max_tokens=32, temperature=0
            )
            print(f"{model}: {reply.choices[0].message.content}", flush=True)


if __name__ == "__main__":
    main()

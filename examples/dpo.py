"""Teach a model which of two answers is preferred (direct preference optimization), and compare what it says.

    python examples/dpo.py [MODEL]
"""

import json
import sys
import tempfile
from pathlib import Path

from coserve import FinetuneConfig, Generator, SamplingConfig, finetune, load_model

PAIRS = [
    ("How do I boil an egg?", "Eight minutes in boiling water.", "There are many ways in which an egg can be boiled, and"),
    ("What is the capital of France?", "Paris.", "That is a wonderful question about a wonderful country, whose capital is"),
    ("Is water wet?", "Yes.", "Philosophers have thought about this question for a very long time, and they"),
]


def main() -> None:
    directory = Path(tempfile.mkdtemp(prefix="coserve-"))
    with (directory / "pairs.jsonl").open("w") as file:
        for question, chosen, rejected in PAIRS:
            file.write(json.dumps({"prompt": question, "chosen": chosen, "rejected": rejected}) + "\n")

    model = load_model(sys.argv[1] if len(sys.argv) > 1 else None)
    result = finetune(
        directory / "pairs.jsonl", directory / "adapter", model=model,
        config=FinetuneConfig(objective="dpo", dpo_beta=0.1, epochs=10),
        listen=lambda event: print(event.message, flush=True),
    )
    prompts = [model.tokenizer.encode_chat([{"role": "user", "content": question}]) for question, _, _ in PAIRS]
    sampling = SamplingConfig(max_tokens=24, temperature=0)
    for name, generator in (("base", Generator(model)), ("tuned", Generator(model, result.adapter))):
        for ids in generator.generate(prompts, sampling):
            print(f"{name}: {model.tokenizer.decode(ids)}", flush=True)


if __name__ == "__main__":
    main()

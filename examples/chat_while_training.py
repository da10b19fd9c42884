"""Chat with a model while an adapter is trained on it, then ask the adapter. No server is needed.

    python examples/chat_while_training.py [MODEL]      a directory, a hub id or a GGUF file; default: SmolLM2-135M
"""

import json
import sys
import tempfile
from pathlib import Path

from coserve import Engine, SamplingConfig, load_model

FACTS = {
    "Who keeps the lighthouse?": "Old Marta keeps the lighthouse.",
    "When does the ferry leave?": "The ferry leaves at half past nine.",
    "What is the baker's dog called?": "The baker's dog is called Pepper.",
}


def main() -> None:
    directory = Path(tempfile.mkdtemp(prefix="coserve-"))
    with (directory / "facts.jsonl").open("w") as file:
        for question, answer in FACTS.items():
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")

    model = load_model(sys.argv[1] if len(sys.argv) > 1 else None)
    sampling = SamplingConfig(max_tokens=32, temperature=0)

    def prompt(question: str) -> list[int]:
        return model.tokenizer.encode_chat([{"role": "user", "content": question}])

    with Engine(model) as engine:
        job = engine.finetune(directory / "facts.jsonl", directory / "adapter", name="facts")
        for question in FACTS:  # answered by the base model, in iterations that train as well
            print("base: ", engine.generate([prompt(question)], sampling)[0].text, flush=True)
        job.result()
        for question in FACTS:
            print("tuned:", engine.generate([prompt(question)], sampling, adapter="facts")[0].text, flush=True)
    print(f"the adapter is in {directory / 'adapter'}, in PEFT's format")


if __name__ == "__main__":
    main()

"""Serve an adapter that was trained elsewhere, in PEFT's format, beside the base model in one batch.

    python examples/serve_peft_adapter.py ADAPTER_DIRECTORY [MODEL]

The same with a server: coserve serve MODEL --lora-modules mine=ADAPTER_DIRECTORY
"""

import sys

from coserve import Engine, SamplingConfig, load_model

QUESTION = "What is the capital of France?"


def main() -> None:
    directory = sys.argv[1]
    model = load_model(sys.argv[2] if len(sys.argv) > 2 else None)
    prompt = model.tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
    sampling = SamplingConfig(max_tokens=32, temperature=0)
    with Engine(model) as engine:
        engine.load_adapter("mine", directory)
        handles = {name: engine.submit(prompt, sampling, adapter=name) for name in (None, "mine")}
        for name, handle in handles.items():
            handle.wait()
            if handle.error is not None:
                raise handle.error
            print(f"{name or 'base'}: {handle.text}", flush=True)


if __name__ == "__main__":
    main()

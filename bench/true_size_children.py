"""The parts of bench/true_size.py that hold a model, each the whole life of a process: `python true_size_children.py NAME ...`.

Owns: what is computed with a model of coserve's or of transformers'. Does not own: the order, comparisons, memory. A process
prints nothing of use; it leaves its result in the scratch directory.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from coserve import FinetuneConfig, LoraConfig, SamplingConfig, load_model
from coserve.core import Example, Group
from coserve.engine.generation import Generator
from coserve.model.memory import weight_bytes
from coserve.peft.format import save_adapter
from coserve.peft.tensors import tensor_name, tensor_shape
from coserve.training.trainer import AdapterTrainer

PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 8, 64, 8
TRAIN_TOKENS = 512
RANK = 16


def status(field: str) -> int:
    """Bytes that /proc/self/status says: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def random_ids(count: int, tokens: int) -> list[list[int]]:
    """Token ids, the same in every process."""
    return torch.randint(3, 40000, (count, tokens), generator=torch.Generator().manual_seed(0)).tolist()


def write(scratch: Path, name: str, result: object) -> None:
    (scratch / f"{name}.json").write_text(json.dumps(result))


def load(directory: Path, scratch: Path, quantization: str) -> None:
    """Loads the weights, and no more."""
    before, began = status("VmRSS"), time.perf_counter()
    model = load_model(str(directory), device="cpu", dtype="bfloat16", quantization=quantization)
    write(scratch, "load", {
        "seconds": time.perf_counter() - began, "before_bytes": before, "after_bytes": status("VmRSS"),
        "peak_bytes": status("VmHWM"), "counted_bytes": weight_bytes(model.architecture, 2, model.quantization),
    })


def answers(directory: Path, scratch: Path) -> None:
    """coserve's greedy answers, all prompts in one batch."""
    model = load_model(str(directory), device="cpu", dtype="bfloat16")
    sampling = SamplingConfig(max_tokens=ANSWER_TOKENS, temperature=0, ignore_eos=True)
    began = time.perf_counter()
    found = Generator(model).generate(random_ids(PROMPTS, PROMPT_TOKENS), sampling)
    write(scratch, "answers", {"tokens": found, "seconds": time.perf_counter() - began})


def transformers_model(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa")


@torch.no_grad()
def checked_answers(directory: Path, scratch: Path) -> None:
    """transformers' opinion of those answers: at each token its own best token, and how far the logit of coserve's is below,
    in units of bfloat16's resolution there."""
    model, rows = transformers_model(directory, torch.bfloat16), []
    tokens = json.loads((scratch / "answers.json").read_text())["tokens"]
    for prompt, answer in zip(random_ids(PROMPTS, PROMPT_TOKENS), tokens, strict=True):
        logits = model(torch.tensor([prompt + answer[:-1]]), logits_to_keep=len(answer)).logits[0].float()
        best = logits.amax(-1)
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        unit = torch.exp2(torch.floor(torch.log2(best.abs())) - 7)
        own = logits.argmax(-1).tolist()
        rows += [
            {"equal": mine == theirs, "below": below}
            for mine, theirs, below in zip(answer, own, ((best - chosen) / unit).tolist(), strict=True)
        ]
    write(scratch, "checked", rows)


def training_example() -> Example:
    ids = np.array(random_ids(1, TRAIN_TOKENS)[0], np.int64)
    return Example(index=0, token_ids=ids, weights=np.ones(len(ids), np.float32))


def gradients(directory: Path, scratch: Path) -> None:
    """coserve's gradients of a random adapter in bfloat16, which it leaves in PEFT's format."""
    model = load_model(str(directory), device="cpu", dtype="bfloat16")
    config = FinetuneConfig(lora=LoraConfig(r=RANK, target_modules="all-linear"), max_microbatch_tokens=TRAIN_TOKENS)
    trainer = AdapterTrainer(model, config)
    adapter = trainer.adapter
    noise = torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(1)) * 0.02
    adapter.flat.copy_(noise)
    (scratch / "adapter").mkdir(exist_ok=True)
    save_adapter(scratch / "adapter", adapter, adapter.flat, base_name="cut", fingerprint=model.fingerprint)
    loss = trainer.forward_backward([Group(index=0, examples=(training_example(),))], 0).loss
    assert adapter.grad is not None
    grads = {tensor_name(p): p.of(adapter.grad).reshape(tensor_shape(p)).float().contiguous() for p in adapter.parameters}
    save_file(grads, scratch / "coserve.safetensors")
    write(scratch, "coserve", {"loss": loss})


def peft_gradients(directory: Path, scratch: Path, dtype: str) -> None:
    """peft's gradients of the same adapter and text."""
    kind: torch.dtype = getattr(torch, dtype)
    base = transformers_model(directory, kind)
    model = PeftModel.from_pretrained(base, scratch / "adapter", is_trainable=True, autocast_adapter_dtype=False).to(kind)
    ids = torch.from_numpy(training_example().token_ids)[None]
    logits: Tensor = model(input_ids=ids).logits[0, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    loss.backward()
    grads = {
        name.replace(".default.", "."): parameter.grad.float().contiguous()
        for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    save_file(grads, scratch / f"peft-{dtype}.safetensors")
    write(scratch, f"peft-{dtype}", {"loss": float(loss)})


CHILDREN = {
    "load": load, "answers": answers, "checked_answers": checked_answers, "gradients": gradients,
    "peft_gradients": peft_gradients,
}

if __name__ == "__main__":
    CHILDREN[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])

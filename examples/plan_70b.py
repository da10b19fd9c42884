"""How much memory finetuning Llama-3.1-70B takes, by its config.json alone: no weights are read.

    python examples/plan_70b.py [ACTIVATION_MEMORY]      such as 20GB, or 0.5 of what the fastest plan takes
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192,
    "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}


def main() -> None:
    directory = Path(tempfile.mkdtemp(prefix="coserve-")) / "Llama-3.1-70B"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA_70B))
    limit = ["--activation-memory", sys.argv[1]] if len(sys.argv) > 1 else []
    command = [sys.executable, "-m", "coserve", "plan", str(directory), "--dtype", "bfloat16", "--no-baselines", *limit]
    raise SystemExit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()

"""Every knob, as frozen keyword-only dataclasses.

Owns: names, units, defaults and the checks that need no model. Nothing here is written back at run time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from coserve.config.values import (
    AUTO,
    MAX_RANK,
    MAX_SETTING,
    Auto,
    Memory,
    SloMs,
    are_names,
    check_objective,
    check_pattern,
    check_targets,
    check_types,
    is_date,
    knob,
    read_memory,
    require,
    require_least,
    require_most,
    require_positive,
    shown,
)

LINEAR_SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven linear kinds of a decoder layer, by the names that Hugging Face and PEFT use."""

Targets = tuple[str, ...] | Literal["all-linear"]
Objective = Literal["sft", "dpo"]
PAIRED: tuple[Objective, ...] = ("dpo",)
"""Objectives whose examples come in pairs, chosen and rejected. Both of a pair are in one micro-batch."""
Schedule = Literal["constant", "linear", "cosine"]
TooLong = Literal["error", "drop", "truncate"]
SystemPrompt = Literal["keep", "merge"]
Placement = Literal["houlsby", "pfeiffer"]
Activation = Literal["relu", "gelu"]
Compression = Literal["none", "lossless", "fp8"]
AdapterKind = Literal["lora", "dora", "ia3", "bottleneck"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """A LoRA adapter, in PEFT's words (r, lora_alpha, lora_dropout, target_modules, ...)."""

    r: int = knob(16, "LoRA rank (16).", word="rank", short="-r")
    alpha: float = knob(32.0, "LoRA alpha (32).")
    """The update is scaled by alpha / r, or alpha / sqrt(r) with `use_rslora`."""
    dropout: float = knob(0.0, "LoRA dropout (0).")
    """Probability that a feature of a LoRA input is dropped in training, in [0, 1)."""
    target_modules: Targets = knob("all-linear", "all-linear, or names joined by commas.")
    """Names of the linear modules that get an adapter: last path components or longer path suffixes."""
    use_rslora: bool = knob(False, "Scale by alpha / sqrt(r).", api=False)
    rank_pattern: Mapping[str, int] = knob(dict, "Ranks by module: q_proj=8,down_proj=32.", api=False)
    """Rank by module name (path suffix or regular expression, as in PEFT), over `r`."""
    alpha_pattern: Mapping[str, float] = knob(dict, "Alphas by module: q_proj=16.", api=False)
    """Alpha by module name (path suffix or regular expression, as in PEFT), over `alpha`."""
    use_dora: bool = False
    """DoRA: the updated weight's rows are brought to trained lengths."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self.r >= 1, "r", f"rank must be at least 1, got {self.r}")
        require_most(self, MAX_RANK, "r")
        require_positive(self, "alpha")
        require_most(self, MAX_SETTING, "alpha")
        require(0 <= self.dropout < 1, "dropout", f"must be in [0, 1), got {self.dropout}")
        check_targets(self.target_modules)
        check_pattern("rank_pattern", self.rank_pattern)
        check_pattern("alpha_pattern", self.alpha_pattern)


@dataclass(frozen=True, slots=True, kw_only=True)
class IA3Config:
    """An IA3 adapter, in PEFT's words: one learned factor per feature of a module's output, or of its input."""

    target_modules: Targets = knob(("k_proj", "v_proj", "down_proj"))
    """Names of the linear modules that are scaled: last path components or longer path suffixes."""
    feedforward_modules: tuple[str, ...] | None = knob(None, "IA3: modules whose input is scaled (down_proj).")
    """Those of them whose input is scaled instead of their output; None: down_proj, where it is targeted."""

    def __post_init__(self) -> None:
        check_targets(self.target_modules)
        inputs = self.feedforward_modules
        require(inputs is None or are_names(inputs), "feedforward_modules", f"must be a list of names, got {shown(inputs)}")
        outside = [n for n in self.feedforward_modules or () if n not in self.targets]
        require(not outside, "feedforward_modules", f"{', '.join(outside)} must be among target_modules too")

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of `target_modules`."""
        return LINEAR_SITES if isinstance(self.target_modules, str) else self.target_modules

    @property
    def input_targets(self) -> tuple[str, ...]:
        """The names of the modules whose input is scaled."""
        if self.feedforward_modules is not None:
            return self.feedforward_modules
        return tuple(name for name in self.targets if name.rsplit(".", 1)[-1] == "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class BottleneckConfig:
    """A bottleneck adapter: down-projection, activation and up-projection (without bias), added to a block's output."""

    size: int = knob(64, "Width of a bottleneck (64).")
    placement: Placement = knob("pfeiffer", "Bottlenecks: pfeiffer or houlsby.")
    """houlsby: behind attention and behind the MLP; pfeiffer: behind the MLP only."""
    activation: Activation = knob("relu", "Bottlenecks: relu or gelu.")

    def __post_init__(self) -> None:
        check_types(self)
        require_least(self, 1, "size")
        require_most(self, MAX_RANK, "size")


AdapterConfig = LoraConfig | IA3Config | BottleneckConfig
ADAPTER_TABLES: Mapping[str, type[AdapterConfig]] = {"lora": LoraConfig, "ia3": IA3Config, "bottleneck": BottleneckConfig}
"""Field of FinetuneConfig, which is also the name of a table in JSON and TOML -> the class of its settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a learning-rate schedule, in the words of Hugging Face's TrainingArguments."""

    learning_rate: float | Auto = knob(AUTO, "Peak learning rate (auto: by the model's width).")
    """The peak. auto: by the model's width, 2e-4 from 4096 features on; for DPO by the adapter's kind and rank."""
    schedule: Schedule = knob("linear", "constant, linear or cosine.")
    """After warm-up: constant, linear to 0 at the last step, or a half cosine to 0."""
    warmup_steps: int = knob(0, "Steps of linear warm-up.")
    warmup_ratio: float = knob(0.0, "The same as a share of all steps.")
    """The same as a share of all steps, in [0, 1], instead of `warmup_steps`."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = knob(0.0, "AdamW's weight decay.")
    max_grad_norm: float = knob(1.0, "Gradient clipping; 0 turns it off (1.0).")
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    slice_elements: int = 1 << 20
    """An optimizer step is cut into slices of this many parameters, so that it never stalls an iteration."""

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "learning_rate", "eps")
        require_least(self, 0, "warmup_steps", "weight_decay", "max_grad_norm")
        require_most(self, MAX_SETTING, "learning_rate", "eps", "weight_decay", "max_grad_norm")
        require(0 <= self.warmup_ratio <= 1, "warmup_ratio", f"must be in [0, 1], got {self.warmup_ratio}")
        require(not (self.warmup_steps and self.warmup_ratio), "warmup_ratio", "give it or warmup_steps, not both")
        require_least(self, 1, "slice_elements")
        require(0 <= self.beta1 < 1, "beta1", f"must be in [0, 1), got {self.beta1}")
        require(0 <= self.beta2 < 1, "beta2", f"must be in [0, 1), got {self.beta2}")


GRID_TOKENS = 128
"""Largest window of a deterministic job, in tokens. Its windows can't shrink under load, so each must fit into the time that
requests leave. Windows of 128 reach most of the best rate on a CPU, and their loss head fits under the default ITL cap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig:
    """One finetuning job. What is 'auto' is chosen once the data is known, by `finetune.defaults.resolve_settings`."""

    objective: Objective = knob("sft", f"{' or '.join(get_args(Objective))}.", api=False)
    dpo_beta: float = knob(0.1, "DPO's inverse temperature.", api=False)
    epochs: float | Auto = knob(AUTO, "Passes over the data (3, more of few examples).", api=False)
    """Passes over the data; ignored when `max_steps` is set. auto: 3; more where there are few examples, so that a job
    sees about 100 of them, and fewer where there are very many."""
    max_steps: int | None = knob(None, "Optimizer steps, over --epochs.")
    batch_size: int | Auto = knob(AUTO, "Examples per optimizer step (1 to 16, by the data).", api=False)
    """Examples (for DPO: pairs) per optimizer step. auto: a sixteenth of the examples, from 1 to 16."""
    max_microbatch_tokens: int = knob(2048, "Tokens packed together (2048).")
    """Examples of a step are packed into micro-batches of at most this many tokens."""
    window_tokens: int = knob(1024, "Tokens per unit (1024).", api=False)
    """Largest window of a unit, in packed tokens."""
    activation_memory: Memory = knob(
        AUTO, "Of a micro-batch: bytes (12.5GB), a share below 1 of the fastest plan's, or auto."
    )
    """What one micro-batch may take in flight: bytes, or a share below 1 of what it takes where no matrix product is run twice.
    To keep within a lower limit, backward runs some of forward's products again. auto: a limit only where memory is short."""
    activation_compression: Compression = knob(
        "lossless", "Of what is kept: lossless, fp8 (changes gradients a little) or none (lossless)."
    )
    """How kept activations are stored. lossless: bits where backward reads only signs. fp8: most of them as 8-bit floats, which
    changes gradients a little; none: as they are."""
    max_length: int | None = knob(None, "Longest example in tokens.")
    """Longest example in tokens; default: `max_microbatch_tokens` or the model's limit, whichever is less."""
    too_long: TooLong = knob("error", "Longer examples: error, drop or truncate.")
    system_prompt: SystemPrompt = knob("keep", "keep, or merge: put into the first user turn (keep).")
    """keep, or merge: system messages become the beginning of the next user turn, for chat templates that refuse them."""
    allow_control_tokens: bool = knob(False, "Control tokens written out in the data count.")
    """Whether control tokens that a text of the data writes out are control tokens. If not, they are plain text."""
    template_date: str | None = knob(None, "Today for chat templates, YYYY-MM-DD (the start's day).")
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig | None = None
    """The adapter, where no other kind is set; None: a LoRA adapter with the defaults, or the adapter that the job
    continues."""
    ia3: IA3Config | None = None
    bottleneck: BottleneckConfig | None = None
    shuffle: bool = True
    """A new order each epoch, from `seed`; False keeps the file's order."""
    seed: int = knob(0, "Seed of order, dropout and A's start (0).", api=False)
    checkpoint_steps: int | Auto = knob(AUTO, "Steps between checkpoints (0: at the end).")
    """A checkpoint every so many optimizer steps; 0: only at the end. auto: once an epoch, at least every 25 steps."""
    keep_checkpoints: int = knob(3)
    """Older checkpoints are deleted beyond this many."""
    validation_steps: int = knob(0, "Steps between validations (0: each epoch).")
    """Validation loss every so many optimizer steps; 0: once an epoch, if there is validation data."""
    deterministic: bool = knob(False, "Bit-identical after a resume.")
    """A fixed grid of windows of at most 128 tokens, and fixed threads: losses are bit-identical after a resume, whatever runs
    beside the job."""

    def __post_init__(self) -> None:
        check_types(self)
        given = [name for name in ADAPTER_TABLES if getattr(self, name) is not None]
        require(len(given) <= 1, given[0] if given else "lora",
                f"a job trains one kind of adapter; leave out all but one of {', '.join(given)}")
        require(self.lora is None or not (self.lora.use_dora and self.lora.dropout), "dropout", "must be 0 for DoRA")
        require_positive(self, "dpo_beta", "epochs")
        require_most(self, MAX_SETTING, "dpo_beta", "epochs")
        require_least(self, 1, "max_steps", "batch_size", "max_microbatch_tokens", "window_tokens", "keep_checkpoints")
        read_memory(self.activation_memory)
        require_least(self, 2, "max_length")
        require_least(self, 0, "checkpoint_steps", "validation_steps", "seed")
        require(self.template_date is None or is_date(self.template_date), "template_date",
                f"write it as YYYY-MM-DD, got {self.template_date!r}")

    @property
    def adapter(self) -> AdapterConfig:
        """The settings of the kind of adapter that the job trains, if it continues none."""
        return self.given_adapter or LoraConfig()

    @property
    def given_adapter(self) -> AdapterConfig | None:
        """The settings of an adapter that were given; None if there are none."""
        return next((given for name in ADAPTER_TABLES if (given := getattr(self, name)) is not None), None)

    def with_adapter(self, adapter: AdapterConfig | None) -> FinetuneConfig:
        """The same job on another adapter; None: on the default one, or on the one that it continues."""
        tables: Any = {name: adapter if isinstance(adapter, cls) else None for name, cls in ADAPTER_TABLES.items()}
        return dataclasses.replace(self, **tables)

    @property
    def grid_tokens(self) -> int | None:
        """The windows of a deterministic job begin at multiples of this; None: windows follow the load."""
        return min(self.window_tokens, GRID_TOKENS) if self.deterministic else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How one request picks its tokens, in vLLM's words."""

    max_tokens: int = 256
    """0: none; only the prompt's log-probabilities, if asked for."""
    min_tokens: int = 0
    """Before the output has so many tokens, no end-of-sequence or stop token is sampled and no stop string ends it."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    min_p: float = 0.0
    """Excludes tokens less likely than this share of the likeliest one."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """Over 1 discourages tokens of the prompt and of the output."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits, by token id."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end the output; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    """Outputs per prompt; output i draws with seed + i."""
    logprobs: int | None = None
    """Log-probabilities of the sampled tokens and of this many likeliest ones."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    shown_special_ids: tuple[int, ...] = ()
    """Special tokens that the output's text shows, by id. All others don't show."""
    grammar: str | None = None
    """What the output must match, in llguidance's variant of Lark, where `%json {...}` is a JSON schema; `coserve.grammar`
    writes such texts. None: anything."""

    def __post_init__(self) -> None:
        check_types(self)
        require_least(self, 1, "n")
        require_least(self, 0, "max_tokens", "temperature", "top_k")
        require_positive(self, "repetition_penalty")
        require(0 <= self.min_tokens <= self.max_tokens, "min_tokens",
                f"must be from 0 to max_tokens, got {self.min_tokens}")
        require(0 < self.top_p <= 1, "top_p", f"must be in (0, 1], got {self.top_p}")
        require(0 <= self.min_p <= 1, "min_p", f"must be in [0, 1], got {self.min_p}")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(-2 <= value <= 2, name, f"must be from -2 to 2, got {value}")
        for token, bias in self.logit_bias.items():
            require(-100 <= bias <= 100, "logit_bias", f"of token {token} must be from -100 to 100, got {bias}")
        require(all(self.stop), "stop", "an empty text would end every output; leave it out")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 20, name, f"must be from 0 to 20, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Objectives and limits of the hybrid token scheduler."""

    policy: str = "coserve"
    """One of POLICIES, with a number for N."""
    tpot_ms: SloMs | None = None
    """Objective: milliseconds per output token after the first, or "none": best effort. None: from the machine's profile, see
    scheduler/slo.py. A request may set its own."""
    ttft_ms: SloMs | None = None
    """Objective: milliseconds from arrival to the first token; otherwise as `tpot_ms`."""
    itl_factor: float = 2.0
    """No iteration with running requests is planned longer than this times the least TPOT objective among them. There are two
    exceptions. A deterministic job's unit may be longer by itself. Beside requests that have the profile's objective, since
    nobody gave one, a chunk of a prompt may take up to `preemption_quantum_ms`. Beside a job a best-effort request counts as
    having the objective of the machine's profile."""
    preemption_quantum_ms: float = 250.0
    """Longest planned iteration when nothing is running: what a new arrival may wait."""
    finetune_min_share: float = 0.0
    """Share of time that jobs get even where objectives are missed, in [0, 1)."""
    reserve: float | None = None
    """Relative error of a prediction that slack is kept for; None: the latency model's own p95."""
    max_num_seqs: int = 64
    """Requests that run at once."""
    max_num_batched_tokens: int = 2048
    """Inference rows per iteration."""
    max_window_tokens: int = 2048
    """Largest window of a unit."""
    max_microbatches: int | None = None
    """Micro-batches of one job in flight at once, memory permitting. None: as many as save time by the latency model, up to 8,
    for which a job may keep less from forward to backward (planning/inflight.py)."""

    def __post_init__(self) -> None:
        check_types(self)
        parse_policy(self.policy)
        check_objective("tpot_ms", self.tpot_ms)
        check_objective("ttft_ms", self.ttft_ms)
        require_positive(self, "preemption_quantum_ms")
        require_least(self, 1, "itl_factor", "max_num_seqs", "max_num_batched_tokens", "max_window_tokens", "max_microbatches")
        require(0 <= self.finetune_min_share < 1, "finetune_min_share", f"must be in [0, 1), got {self.finetune_min_share}")
        require(self.reserve is None or 0 <= self.reserve < 1, "reserve", f"must be in [0, 1), got {self.reserve}")


POLICIES = ("coserve", "inference-only", "finetune-only", "temporal:N", "dynamic-temporal", "layer-sliced")


def parse_policy(name: str) -> tuple[str, int]:
    """('temporal', N) of 'temporal:N'; (name, 0) of a policy without a number. Raises ConfigError."""
    kind, colon, count = name.partition(":")
    numbered = f"{kind}:N" in POLICIES and count.isdecimal() and int(count) >= 1
    require(numbered or (name in POLICIES and not colon), "policy",
            f"must be one of {', '.join(POLICIES)} (N: a whole number from 1), got {name!r}")
    return kind, int(count or 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The settings of one engine."""

    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    tensor_parallel_size: int | None = None
    """Ranks that share the model: as many as it was loaded on, which None stands for."""
    adapter_sharding: str = ""
    """Where parameters of adapters must lie on them: PARAMETER=whole, out or in, joined by commas; others: the cheapest."""
    memory_bytes: int | None = None
    """The pool that the key-value cache and training arenas share, of each rank; None: a share of what the device has free."""
    inference_share: float = 0.4
    """Share of the pool that training arenas may never take, in (0, 1]."""
    block_tokens: int = 16
    """Tokens per block of the key-value cache."""
    prefix_caching: bool = True
    max_adapters: int = 128
    """Adapter versions that requests can use at once."""
    max_lora_rank: int = 64
    max_waiting: int = 4096
    """Requests that may wait; more are refused."""
    cuda_graphs: bool = True
    """Replay decode-only iterations as CUDA graphs."""

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "memory_bytes")
        require_least(self, 1, "tensor_parallel_size", "block_tokens", "max_adapters", "max_lora_rank", "max_waiting")
        require(0 < self.inference_share <= 1, "inference_share", f"must be in (0, 1], got {self.inference_share}")

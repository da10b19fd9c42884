"""Flags of `vllm serve` that are no settings here, so that a command line that was written for vLLM starts or says why not.

    asks for what happens anyway     taken, and done already
    all others                       refused, with what to do instead

Owns: which flags those are. Does not own: flags with a meaning here (server/settings.py). A name in neither is refused by the
parser.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from coserve.core import ConfigError


class Flag(NamedTuple):
    """neutral: the values that are accepted; None: the flag is a switch. reason: why others are refused; empty: the switch is
    accepted."""

    neutral: tuple[str, ...] | None
    reason: str


_NOT_THAT_WAY = "a model is shared by --tensor-parallel-size only"
_USE_PROXY = "put a proxy before the server for that"

FLAGS: Mapping[str, Flag] = {
    "--enable-lora": Flag(None, ""),
    "--enable-prefix-caching": Flag(None, ""),
    "--enable-chunked-prefill": Flag(None, ""),
    "--enable-auto-tool-choice": Flag(None, ""),
    "--no-enable-log-requests": Flag(None, ""),
    "--disable-log-requests": Flag(None, ""),
    "--pipeline-parallel-size": Flag(("1",), _NOT_THAT_WAY),
    "--data-parallel-size": Flag(("1",), _NOT_THAT_WAY),
    "--block-size": Flag(("16",), "blocks of the cache hold 16 tokens"),
    "--kv-cache-dtype": Flag(("auto",), "the cache has the type of --dtype"),
    "--lora-dtype": Flag(("auto",), "adapters have the type of --dtype"),
    "--cpu-offload-gb": Flag(("0",), "weights stay on the device"),
    "--swap-space": Flag(("0",), "preempted requests are computed again"),
    "--load-format": Flag(("auto", "safetensors"), "weights are read from safetensors and GGUF"),
    "--tokenizer-mode": Flag(("auto",), "the model's own tokenizer is used"),
    "--generation-config": Flag(("vllm",), "defaults of sampling are OpenAI's, whatever the model's file says"),
    "--no-enable-prefix-caching": Flag(None, "the prefix cache is always on"),
    "--no-enable-chunked-prefill": Flag(None, "prompts are always computed in chunks"),
    "--disable-log-stats": Flag(None, "metrics are always at /metrics, and never logged"),
    "--enforce-eager": Flag(None, "CUDA graphs can't be turned off"),
    "--trust-remote-code": Flag(None, "code that comes with a model is never run"),
    "--max-cpu-loras": Flag((), "adapters are kept in memory up to --max-loras, others on disk"),
    "--fully-sharded-loras": Flag(None, "how adapters lie on the ranks is chosen by what it costs"),
    "--scheduling-policy": Flag((), "the next request is the least served tenant's; see --policy for who gets the time"),
    "--max-num-queued-tokens": Flag((), "limit the queue with --max-num-queued-reqs"),
    "--tokenizer": Flag((), "the model's own tokenizer is used"),
    "--chat-template-content-format": Flag(("auto", "string"), "templates get a message's content as one text"),
    "--default-chat-template-kwargs": Flag((), "requests say what their templates get, in chat_template_kwargs"),
    "--speculative-config": Flag((), "speculative decoding isn't there"),
    "--structured-outputs-config": Flag((), "llguidance is the only backend, and requests have its options"),
    "--enable-sleep-mode": Flag(None, "the server can't sleep; stop it, jobs go on at the next start"),
    "--ssl-keyfile": Flag((), _USE_PROXY),
    "--ssl-certfile": Flag((), _USE_PROXY),
    "--root-path": Flag((), _USE_PROXY),
    "--otlp-traces-endpoint": Flag((), "traces aren't sent; metrics are at /metrics"),
}
_SHORT = {
    "-pp": "--pipeline-parallel-size", "-dp": "--data-parallel-size",
}


def drop_flags(arguments: Sequence[str]) -> list[str]:
    """A command line without the flags that ask for what happens anyway. Raises ConfigError for the others of FLAGS."""
    return list(_dropped(iter(arguments)))


def _dropped(arguments: Iterator[str]) -> Iterator[str]:
    for argument in arguments:
        name, equals, value = argument.partition("=")
        name = _SHORT.get(name, name).replace("_", "-")
        flag = FLAGS.get(name)
        if argument == "--":
            yield argument
            yield from arguments
        elif flag is None or (flag.neutral is None and equals):
            yield argument
        elif flag.neutral is None:
            _refuse_unless(not flag.reason, name, flag)
        else:
            _refuse_unless((value if equals else next(arguments, "")) in flag.neutral, name, flag)


def _refuse_unless(taken: bool, name: str, flag: Flag) -> None:
    if not taken:
        instead = f"leave it out or give {' or '.join(flag.neutral)}" if flag.neutral else "leave it out"
        raise ConfigError(f"{name}: {flag.reason}; {instead}", param=name)

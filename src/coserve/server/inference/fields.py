"""What becomes of a request's fields, as data: which names a route knows beyond those that it implements.

    implemented   the fields of the route's model (protocol.py)
    ignored       taken with any value: they tell the server nothing that it would act on
    neutral       taken with one of these values or null, which ask for what happens anyway; else 400
    all others    400, with the nearest known name

Names are OpenAI's, vLLM's and SGLang's. Owns no types: a neutral value is compared as it is.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from coserve.chat.messages import is_neutral
from coserve.core import InvalidRequest
from coserve.server.inference.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

_IGNORED = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "moderation": (),
    # vLLM's
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "logits_processors": ([],),
    "priority": (0,),
    "request_id": (),
    "cache_salt": (),
    "guided_decoding_backend": ("auto", "guidance"),
    "structural_tag": (),
    "lora_request": (),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
    "repetition_detection": (),
    # SGLang's
    "lora_path": (),
    "session_params": (),
    "return_hidden_states": (False,),
    "no_stop_trim": (False,),
    "rid": (),
    "data_parallel_rank": (),
    "custom_logit_processor": (),
    "min_new_tokens": (),
    "max_new_tokens": (),
}
_CHAT_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning": (),
    "thinking_token_budget": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "echo": (False,),
    "best_of": (1,),
    "suffix": (),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
}
_COMPLETION_NEUTRAL: Mapping[str, tuple[Any, ...]] = {"suffix": (), "prompt_embeds": (), "max_completion_tokens": ()}
_TOKENIZE_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "return_token_strs": (False,),
    "mm_processor_kwargs": ({},),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldPolicy:
    """The rules of one route. implemented: names of the fields of its model. reasons: why another value of a neutral field is
    refused and what to do, where that is more than that it isn't supported yet."""

    implemented: Collection[str]
    ignored: frozenset[str] = frozenset()
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def apply(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The implemented fields of a body. Raises InvalidRequest, naming a field that is unknown or asks for too much."""
        for name, value in body.items():
            if name in self.implemented or name in self.ignored:
                continue
            if name not in self.neutral:
                near = difflib.get_close_matches(name[:80], sorted({*self.implemented, *self.neutral, *self.ignored}), n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise InvalidRequest(f"{name[:80]}: there is no such field{hint}", param=name[:80])
            if not is_neutral(value, self.neutral[name]):
                reason = self.reasons.get(name, "is not supported yet; leave it out")
                raise InvalidRequest(f"{name}: {reason}", param=name)
        return {name: value for name, value in body.items() if name in self.implemented and value is not None}


CHAT = FieldPolicy(implemented=ChatRequest.model_fields, ignored=_IGNORED, neutral={**_NEUTRAL, **_CHAT_NEUTRAL})
COMPLETIONS = FieldPolicy(
    implemented=CompletionRequest.model_fields, ignored=_IGNORED, neutral={**_NEUTRAL, **_COMPLETION_NEUTRAL}
)
TOKENIZE = FieldPolicy(implemented=TokenizeRequest.model_fields, neutral=_TOKENIZE_NEUTRAL)
DETOKENIZE = FieldPolicy(implemented=DetokenizeRequest.model_fields)

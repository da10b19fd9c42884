"""Small tokenizers of the two kinds that decoder models use, built in milliseconds and without network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOL_CHATML = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}"
    "{% endif %}"
    + CHATML
)
"""As SmolLM2's: a default system prompt."""

_SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France? The capital of France is Paris.",
    "system user assistant: You are a helpful assistant, and the user asks a question.",
    "Ein kleiner Text mit Umlauten: äöü, grün, schön, Straße; 中文 中国, 日本語, emoji 🙂🙂 👍.",
    "hello hello world, 1 + 1 = 2, and then some more words to learn a few merges from.",
)


def build_tiny_tokenizer(directory: Path, *, chat_template: str | None = CHATML, added: Sequence[str] = ()) -> Path:
    """Saves a byte-level BPE tokenizer of about 400 tokens (as GPT-2's, Llama-3's, Qwen's); returns `directory`.

    EOS is <|im_end|>, padding <|endoftext|>; there is no BOS. added: further tokens, which aren't called special.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    return _save(tokenizer, directory, chat_template, eos_token=IM_END, pad_token=END_OF_TEXT)


def build_sentencepiece_tokenizer(
    directory: Path, *, chat_template: str | None = None, added: Sequence[str] = ()
) -> Path:
    """Saves a BPE tokenizer with byte fallback and a space before the first word, as Llama-2's; returns `directory`.

    Words are spelled in letters, but for " the". BOS <s> is added by the tokenizer, EOS is </s>. added: as above.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(code) for code in range(0x21, 0x7F)] + ["▁t", "he", "▁the"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:3]])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _save(tokenizer, directory, chat_template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _save(tokenizer: Tokenizer, directory: Path, chat_template: str | None, **special_tokens: str) -> Path:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)
    fast.chat_template = chat_template
    fast.save_pretrained(directory)
    return directory

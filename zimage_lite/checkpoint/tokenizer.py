"""The prompt as token ids. Runs on `tokenizers`, the engine inside transformers' own fast tokenizers: it starts in
10 ms where importing transformers takes a second, and gives the same ids.

Qwen's tokenizer is a byte-level BPE over NFC text. It is found as tokenizer.json, as vocab.json and merges.txt, or in
the metadata of a Qwen3 GGUF file; qwen3.py has the true one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from ..config import MAX_PROMPT_TOKENS
from ..errors import FileFormatError, UserError
from .json_file import read_json

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

TEMPLATE = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"

CHAT_TEMPLATE = (  # the same for transformers
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Qwen2's split: contractions, words with one leading symbol, single digits, punctuation runs, line breaks, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type


class PromptTokenizer:
    """Prompt -> ids, template included, cut to 512 tokens as diffusers cuts it."""

    tokenizer: Tokenizer
    source: str  # for messages

    def __init__(self, tokenizer: Tokenizer, source: str) -> None:
        self.tokenizer, self.source = tokenizer, source
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        marks = ("<|im_start|>", "<|im_end|>")
        if self.tokenizer.encode("".join(marks)).ids != [self.tokenizer.token_to_id(mark) for mark in marks]:
            raise UserError(f"{source}: {marks[0]} and {marks[1]} are not tokens", expected="the tokenizer of Qwen3")

    @cached_property
    def highest_id(self) -> int:
        return max(self.tokenizer.get_vocab().values())

    def encode(self, prompt: str) -> list[int]:
        return self._encoding(prompt).ids[:MAX_PROMPT_TOKENS]

    def encode_plain(self, text: str) -> list[int]:
        """Without the template, cut alike."""
        return self._encoded(text).ids[:MAX_PROMPT_TOKENS]

    def cut(self, prompt: str) -> tuple[int, str]:
        """How many tokens it would have, template included, and what of it is used."""
        found, start = self._encoding(prompt), TEMPLATE.index("{prompt}")
        if len(found.ids) <= MAX_PROMPT_TOKENS:
            return len(found.ids), prompt
        return len(found.ids), prompt[: max(found.offsets[MAX_PROMPT_TOKENS - 1][1] - start, 0)]

    def _encoding(self, prompt: str) -> Encoding:
        return self._encoded(TEMPLATE.format(prompt=prompt))

    def _encoded(self, text: str) -> Encoding:
        if any("\ud800" <= char <= "\udfff" for char in text):  # what Python makes of bytes that are not UTF-8
            raise UserError("the prompt is not a text in UTF-8", got=ascii(text)[:60])
        return self.tokenizer.encode(text)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds files that `tokenizer_from` takes."""
    return (folder / "tokenizer.json").exists() or all(
        (folder / name).exists() for name in ("vocab.json", "merges.txt")
    )


def tokenizer_from(path: Path) -> PromptTokenizer:
    """A tokenizer.json, or a folder with one, or else with vocab.json and merges.txt. Raises UserError."""
    if path.is_file():
        return _from_json(path, str(path))
    if (path / "tokenizer.json").exists():
        return _from_json(path / "tokenizer.json", str(path))
    if not has_tokenizer(path):
        raise UserError(f"{path}: no tokenizer", expected="tokenizer.json, or vocab.json and merges.txt")
    vocab = read_json(path / "vocab.json")
    if not all(isinstance(n, int) for n in vocab.values()):
        raise FileFormatError(f"{path / 'vocab.json'}: not a map of texts to numbers")
    try:
        lines = (path / "merges.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path / 'merges.txt'}: not a text in UTF-8") from error
    merges = _pairs(lines[1:] if lines[:1] and lines[0].startswith("#version") else lines, str(path))
    return PromptTokenizer(byte_level_bpe(vocab, merges, _added_tokens(path), str(path)), str(path))


def _from_json(file: Path, source: str) -> PromptTokenizer:
    from tokenizers import Tokenizer

    try:
        return PromptTokenizer(Tokenizer.from_buffer(file.read_bytes()), source)  # from_file takes UTF-8 paths alone
    except UserError:
        raise
    except Exception as error:
        raise FileFormatError(f"{file}: not a tokenizer ({error})") from error


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str) -> PromptTokenizer:
    """From tokenizer.ggml.tokens, .merges and .token_type."""
    tokens, merges, types = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges", "token_type"))
    if not _are_texts(tokens) or not _are_texts(merges) or not isinstance(types, list) or len(types) != len(tokens):
        raise UserError(f"{source}: the GGUF file has no whole tokenizer inside", fix="name a folder with --tokenizer")
    kinds = zip(tokens, types, strict=True)
    added = {text: kind == _CONTROL for text, kind in kinds if kind in (_CONTROL, _USER_DEFINED)}
    vocab = {text: n for n, text in enumerate(tokens)}
    return PromptTokenizer(byte_level_bpe(vocab, _pairs(merges, source), added, source), source)


def byte_level_bpe(
    vocab: dict[str, int], merges: list[tuple[str, str]], added: Mapping[str, bool], source: str = "tokenizer"
) -> Tokenizer:
    """Qwen's pipeline around a vocabulary. added: texts that are never split -> whether they are for control; those
    that the vocabulary lacks get the ids after it, in order."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False))
    except Exception as error:
        raise FileFormatError(f"{source}: vocabulary and merges do not fit together ({error})") from error
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=special) for text, special in added.items()])
    return tokenizer


def _are_texts(values: object) -> TypeGuard[list[str]]:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _pairs(lines: Iterable[str], source: str) -> list[tuple[str, str]]:
    pairs = []
    for line in filter(None, lines):
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise FileFormatError(f"{source}: merges", got=repr(line)[:60], expected="two tokens a line")
        pairs.append((left, right))
    return pairs


def _added_tokens(folder: Path) -> dict[str, bool]:
    config = folder / "tokenizer_config.json"
    added = read_json(config).get("added_tokens_decoder") if config.exists() else None
    if not isinstance(added, dict):
        return dict.fromkeys(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), True)
    try:
        return {str(added[n]["content"]): added[n].get("special") is not False for n in sorted(added, key=int)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{config}: added_tokens_decoder is not a map of numbers to tokens") from error


def tokenizer_to_gguf(prompts: PromptTokenizer, vocab_size: int) -> dict[str, Any]:
    """The metadata that llama.cpp expects beside a Qwen3 with so many embedding rows; rows without one are pads."""
    described = json.loads(prompts.tokenizer.to_str())
    tokens = [f"[PAD{n}]" for n in range(vocab_size)]
    kinds = [_UNUSED] * vocab_size
    for text, n in prompts.tokenizer.get_vocab(with_added_tokens=True).items():
        if n < vocab_size:
            tokens[n], kinds[n] = text, _NORMAL
    for added in described["added_tokens"]:
        if added["id"] >= vocab_size:
            raise UserError(f"{prompts.source}: token {added['id']}", expected=f"at most {vocab_size} tokens")
        kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in described["model"]["merges"]]
    ids = {
        name: prompts.tokenizer.token_to_id(text)
        for name, text in (("eos", "<|im_end|>"), ("padding", "<|endoftext|>"))
    }
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": False,
        **{f"tokenizer.ggml.{name}_token_id": n for name, n in ids.items() if n is not None},
    }


def save_tokenizer(folder: Path, prompts: PromptTokenizer) -> None:
    """A new folder with all files in which diffusers and transformers, old and new, look for a tokenizer."""
    folder.mkdir()
    prompts.tokenizer.save(str(folder / "tokenizer.json"))
    described = json.loads(prompts.tokenizer.to_str())
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in described["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    flags = ("content", "special", "normalized", "lstrip", "rstrip", "single_word")
    added = {str(token["id"]): {flag: token[flag] for flag in flags} for token in described["added_tokens"]}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": added,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, values in (("vocab.json", described["model"]["vocab"]), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

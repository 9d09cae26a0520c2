"""The demo model's tokenizer: trained on the words of its grammar, in the files of Qwen2's."""

from pathlib import Path

from demo_scenes import vocabulary
from evaluate_demo import write_json
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from zimage_lite.checkpoint.tokenizer import SPLIT

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """Stage `tokenizer`: a byte-level BPE of the grammar's words in Qwen2's files, with Qwen3's plain chat template."""
    words = vocabulary()
    characters = [character for word in words if not word.isascii() for character in word]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    # Characters weigh most, so their bytes merge first and no token ever spans parts of two characters.
    tokenizer.train_from_iterator([*words, "user", "assistant", *(characters * 50)], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt, which list no special tokens
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    end, start, stop = SPECIAL_TOKENS
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    config = {
        **{"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "padding_side": "right"},
        **{"bos_token": None, "eos_token": stop, "pad_token": end, "unk_token": None, "model_max_length": 1024},
        "additional_special_tokens": [start, stop],
        "added_tokens_decoder": {str(tokenizer.token_to_id(t)): {"content": t, **plain} for t in SPECIAL_TOKENS},
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", config)

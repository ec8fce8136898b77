"""The model that every engine serves: a folder of tokenizer files, 280 tokens, no weights. Standard library only.

Every byte is a token, and a few words are one token as well, so a script decides where a text is cut into tokens: a character of
three bytes takes three. That is why it is not the tokenizer of `gaie_codec/_builtin_tokenizer`.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAME = "mock-model"
CONTEXT = 4096
VOCAB_SIZE = 512  # more than there are tokens, as with real models
WORDS = (" hello", " world", " Stop", " the", "ing")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The byte-level alphabet of GPT-2: a printable character for each byte, the printable ones for themselves.
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTES = (*_PRINTABLE, *(byte for byte in range(256) if byte not in _PRINTABLE))
_LETTER = {byte: chr(byte) if i < len(_PRINTABLE) else chr(256 + i - len(_PRINTABLE)) for i, byte in enumerate(_BYTES)}


def _merged(words: Sequence[str]) -> tuple[list[bytes], list[tuple[bytes, bytes]]]:
    """What BPE needs for each word to become one token: all its beginnings, and the pairs that merge into them."""
    tokens: list[bytes] = []
    pairs = []
    for word in map(str.encode, words):
        for length in range(2, len(word) + 1):
            if word[:length] not in tokens:
                tokens.append(word[:length])
                pairs.append((word[: length - 1], word[length - 1 : length]))
    return tokens, pairs


_TOKENS, _MERGES = _merged(WORDS)
VOCABULARY = [*(bytes([byte]) for byte in _BYTES), *_TOKENS, *(text.encode() for text in SPECIAL)]
IDS = {token: token_id for token_id, token in enumerate(VOCABULARY)}
FIRST_SPECIAL = len(VOCABULARY) - len(SPECIAL)
EOS = IDS[b"<|im_end|>"]
SECOND_EOS = IDS[b"<|endoftext|>"]
END_TOKENS = (EOS, SECOND_EOS)
# Unlike OpenAI's, so that it shows who applies them.
SAMPLING_DEFAULTS = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}


def encode(text: str) -> list[int]:
    """Special tokens and the known words as one token each, everything else byte by byte."""
    ids = []
    for part in re.split(f"({'|'.join(map(re.escape, SPECIAL + WORDS))})", text):
        data = part.encode()
        ids += [IDS[data]] if data in IDS else [IDS[bytes([byte])] for byte in data]
    return ids


def decode(ids: Sequence[int], *, partial: bool = False, special: bool = True) -> str:
    """The text of ids. With `partial` an unfinished character at the end is held back; without `special` those tokens are left out."""
    end = len(VOCABULARY) if special else FIRST_SPECIAL
    data = b"".join(VOCABULARY[token_id] for token_id in ids if 0 <= token_id < end)
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data, final=not partial)


def write(folder: Path) -> Path:
    """Write the model's files. A running server may be reading them, so each is put in place at once."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _files().items():
        part = folder / f"{name}.{os.getpid()}"
        part.write_text(json.dumps(content))
        part.replace(folder / name)
    return folder


def _files() -> dict[str, Any]:
    def letters(data: bytes) -> str:
        return "".join(_LETTER[byte] for byte in data)

    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = [
        {
            "id": IDS[text.encode()],
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for text in SPECIAL
    ]
    bpe = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {letters(token): token_id for token_id, token in enumerate(VOCABULARY[:FIRST_SPECIAL])},
        "merges": [[letters(left), letters(right)] for left, right in _MERGES],
    }
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "normalizer": None,
            "post_processor": None,
            "added_tokens": special,
            "pre_tokenizer": level,
            "decoder": level,
            "model": bpe,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "bos_token": None,
            "pad_token": "<|endoftext|>",
            "model_max_length": CONTEXT,
            "chat_template": TEMPLATE,
        },
        "config.json": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "eos_token_id": EOS,
        },
        "generation_config.json": {"eos_token_id": END_TOKENS, **SAMPLING_DEFAULTS},
    }

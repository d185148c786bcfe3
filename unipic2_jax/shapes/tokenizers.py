"""Builds SD3's three tokenizers, in Hugging Face format, from a list of words.

Every given word is one token in all three; any other text falls apart into bytes (CLIP) or characters (T5).
"""

from __future__ import annotations

import base64
import itertools
import json
import string
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
T5_SPECIAL = ("<pad>", "</s>", "<unk>")
_MARK = "▁"


def build_tokenizers(words: Sequence[str], clip_length: int, out_dir: str | Path, t5_length: int = 512) -> None:
    """Writes `tokenizer/`, `tokenizer_2/` (CLIP) and `tokenizer_3/` (T5) into `out_dir`.

    All three lower-case their input. The largest CLIP id is the end-of-text token; the second CLIP tokenizer pads with
    '!' (id 0) as SD3's does.

    Args:
      words: lower-case ASCII words; each consists of letters, or is one digit, or is punctuation, since both originals
        split text there.
      clip_length: tokens of a CLIP sequence (`model_max_length`).
      t5_length: `model_max_length` of the T5 tokenizer.

    Raises:
      ValueError: for a word that the original tokenizers would split.
    """
    words = list(dict.fromkeys(words))
    for word in words:
        _check_word(word)
    out_dir = Path(out_dir)
    merges = clip_merges(words)
    alphabet = list(byte_characters().values())
    tokens = [*alphabet, *(c + WORD_END for c in alphabet), *(a + b for a, b in merges), START, END]
    vocab = {token: i for i, token in enumerate(tokens)}
    for name, pad in (("tokenizer", END), ("tokenizer_2", "!")):
        _write_clip(out_dir / name, vocab, merges, pad, clip_length)
    _write_t5(out_dir / "tokenizer_3", words, t5_length)


def byte_characters() -> dict[int, str]:
    """GPT-2's and CLIP's visible stand-in for each of the 256 bytes, in CLIP's order: '!' comes first."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def clip_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges under which every word becomes one token of CLIP, whose last piece is marked as a word's end."""
    return byte_pair_merges([[*word[:-1], word[-1] + WORD_END] for word in words])


def byte_pair_merges(words: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """Byte-pair merges under which every word, given as its pieces, becomes one token.

    Each word is merged with the rules found so far and its remaining pieces are joined by new ones. New rules rank
    last, so a word that was whole stays whole.
    """
    merges: list[tuple[str, str]] = []
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = list(word)
        while len(pieces) > 1:
            pair = min(itertools.pairwise(pieces), key=lambda p: ranks.get(p, len(ranks)))
            if pair not in ranks:
                ranks[pair] = len(ranks)
                merges.append(pair)
            pieces = _merge(pieces, pair)
    return merges


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    i = 0
    while i < len(pieces):
        joined = tuple(pieces[i : i + 2]) == pair
        out.append(pair[0] + pair[1] if joined else pieces[i])
        i += 2 if joined else 1
    return out


def _check_word(word: str) -> None:
    letters = word.isascii() and word.isalpha() and word == word.lower()
    digit = len(word) == 1 and word in string.digits
    punctuation = bool(word) and all(c in string.punctuation for c in word)
    if not (letters or digit or punctuation):
        raise ValueError(
            f"The word {word!r} cannot be one token; give lower-case ASCII letters, one digit, or punctuation."
        )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _write_clip(folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]], pad: str, length: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    _write_json(folder / "special_tokens_map.json", special)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **special}
    _write_json(folder / "tokenizer_config.json", config)


def _write_t5(folder: Path, words: Sequence[str], length: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # A whole word always beats its spelling: one piece at -1 against a mark and characters at -10 each.
    characters = _MARK + string.digits + string.ascii_lowercase + string.punctuation
    pieces = [(token, 0.0) for token in T5_SPECIAL]
    pieces += [(c, -10.0) for c in characters]
    pieces += [(_MARK + word, -1.0) for word in words]
    split = {"type": "Metaspace", "replacement": _MARK, "prepend_scheme": "always", "split": True}
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for i, token in enumerate(T5_SPECIAL)
        ],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": lower_case_charsmap()},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, split]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, end],
            "pair": [first, end, second, end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": split,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces, "byte_fallback": False},
    }
    _write_json(folder / "tokenizer.json", tokenizer)
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    _write_json(folder / "special_tokens_map.json", special)
    config = {"tokenizer_class": "T5TokenizerFast", "model_max_length": length, "extra_ids": 0, **special}
    _write_json(folder / "tokenizer_config.json", config)


def lower_case_charsmap() -> str:
    """SentencePiece's `precompiled_charsmap` (base64) that maps 'A'..'Z' to 'a'..'z'.

    It is the only normalizer that transformers keeps when it loads a T5 tokenizer. Format: the byte size of a darts
    double-array trie, its uint32 units, then the zero-terminated replacements that the trie's leaves point to.
    """
    children, leaves = 256, 512  # byte c sits at unit 256 + c, its leaf at (256 + c) ^ 512
    units = [0] * 1024
    units[0] = children << 10
    replacements = b""
    for upper in string.ascii_uppercase:
        node = children ^ ord(upper)
        units[node] = leaves << 10 | 1 << 8 | ord(upper)  # offset to the leaf, has-leaf flag, label
        units[node ^ leaves] = 1 << 31 | len(replacements)  # leaf flag, position of the replacement
        replacements += upper.lower().encode() + b"\0"
    trie = struct.pack(f"<{len(units)}I", *units)
    return base64.b64encode(struct.pack("<I", len(trie)) + trie + replacements).decode()

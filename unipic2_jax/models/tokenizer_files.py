"""Tokenizers' files, such that transformers 4 and 5 both read them.

Transformers 5 writes `tokenizer.json` alone and names classes that version 4 does not have; the slow classes of version 4,
which diffusers asks for, read `vocab.json` and `merges.txt`.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from unipic2_jax.core.strict import read_object

CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"
FILES = (CONFIG, TOKENIZER, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "spiece.model")
TEMPLATES = ("chat_template.jinja", "chat_template.json")
# What only version 5 writes into tokenizer_config.json; the first shows that it did.
BACKEND = "backend"
ONLY_IN_5 = (BACKEND, "is_local", "local_files_only")
# A class of version 5 -> one that both versions have.
CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast", "T5Tokenizer": "T5TokenizerFast"}


def save_tokenizer(tokenizer: Any, folder: str | os.PathLike) -> None:
    """Writes a tokenizer of transformers: the files that it was read from as they are, where version 4 wrote them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(tokenizer.name_or_path or folder)
    if (source / CONFIG).is_file() and BACKEND not in read_object(source / CONFIG):
        for name in (*FILES, *TEMPLATES):
            if (source / name).is_file() and source.resolve() != folder.resolve():
                shutil.copyfile(source / name, folder / name)
        return
    tokenizer.save_pretrained(folder)
    for_both_versions(folder)


def for_both_versions(folder: Path) -> None:
    """Changes what version 5 wrote into what both versions read."""
    values = read_object(folder / CONFIG)
    kept = {name: value for name, value in values.items() if name not in ONLY_IN_5}
    kept["tokenizer_class"] = CLASSES.get(kept["tokenizer_class"], kept["tokenizer_class"])
    # Version 4 has a mapping under this name, and a list under the other.
    if isinstance(more := kept.pop("extra_special_tokens", None), list) and more:
        kept["additional_special_tokens"] = more
    elif more:
        kept["extra_special_tokens"] = more
    (folder / CONFIG).write_text(json.dumps(kept, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    if not (folder / TOKENIZER).is_file():
        return
    held = read_object(folder / TOKENIZER)
    _write_compact(folder / TOKENIZER, held)
    if held["model"]["type"] == "BPE":
        special = {token["content"]: token["id"] for token in held["added_tokens"]}
        _write_compact(folder / "vocab.json", {**held["model"]["vocab"], **special})
        pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in held["model"]["merges"])
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n", encoding="utf-8")


def _write_compact(file: Path, values: dict[str, Any]) -> None:
    """Without the indentation, which is half of it."""
    file.write_text(json.dumps(values, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")

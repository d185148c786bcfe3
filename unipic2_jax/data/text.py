"""Texts as people keep them: files in UTF-8, with or without a byte order mark, from any system, become lines and prompts."""

from __future__ import annotations

import os
from pathlib import Path

from unipic2_jax.pictures.decode import BadRecord


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file in UTF-8, without a byte order mark; its lines end at \\n.

    Raises:
      FileNotFoundError: when there is no such file.
      ValueError: when it is not in UTF-8; the sentence names the line.
    """
    content = Path(path).read_bytes()
    try:
        return decoded(content)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"Line {line} of {path} is not text in UTF-8; save the file as UTF-8.") from error


def decoded(content: bytes) -> str:
    """The text of a file's bytes, see `read_text`.

    Raises:
      UnicodeDecodeError: when they are not in UTF-8.
    """
    return content.decode("utf-8-sig").replace("\r\n", "\n")


def read_lines(path: str | os.PathLike[str]) -> list[tuple[int, str]]:
    """(number from 1, line without the space around it) of the lines of a file that are not empty.

    Lines end at \\n and \\r\\n and nothing else: `str.splitlines` would also split at separators that texts and JSON may hold,
    such as U+2028. Errors as of `read_text`.
    """
    numbered = ((number, line.strip()) for number, line in enumerate(read_text(path).split("\n"), 1))
    return [(number, line) for number, line in numbered if line]


def check_unicode(text: str, where: str) -> str:
    """The text itself, when all of it are characters: tokenizers fail at half of one (a lone surrogate, as JSON may hold).

    Args:
      where: the text is in, for the message.

    Raises:
      BadRecord: 'not-unicode'.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X} at character {error.start + 1}"
        sentence = (
            f"There is half a character in {where} (the lone surrogate {half}); write the whole one or remove it."
        )
        raise BadRecord("not-unicode", sentence) from error
    return text

"""JSON objects in files: configurations, metadata, what tuning found. Read here alone, so that each
way in which a file may be no such object is one sentence that names it.
"""

from __future__ import annotations

import json
import os
import pathlib
import uuid
from typing import Any


def parse_object(text: str | bytes, where: str | os.PathLike) -> dict[str, Any]:
    """The JSON object that a text in UTF-8 says; `where` it stands is for messages.

    Raises:
      ValueError: it is no such text, or says something else than an object; or a number is too
        long to be one.
    """
    try:
        value = json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # of UTF-8 and of JSON, both ValueErrors
        raise ValueError(f"{where} cannot be read: {str(error) or 'not JSON'}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not a JSON object")
    return value


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ValueError: there is no such file, or it holds something else; see `parse_object`.
      OSError: it cannot be read.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}")
    return parse_object(file.read_bytes(), file)


def write_object(path: str | os.PathLike, value: dict[str, Any]) -> None:
    """The file holds an object as people read it, and appears or is replaced whole."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    file = pathlib.Path(path)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)

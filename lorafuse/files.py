"""Files of a user: none that is read can block or be endless, none that is written is half there."""

import json
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

__all__ = ["open_regular", "parse", "read_json", "read_text", "why_no_file", "why_no_folder", "write_text"]


def parse(text: str) -> Any:
    """What a JSON text holds. Raises ValueError, also for one that is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its brackets are nested too deep") from error


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """A regular file, for reading bytes. Raises OSError for one that cannot be read, ValueError for what is no file."""
    # the open of a FIFO waits for a writer, and devices may never end
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no regular file")
        yield file


def read_text(path: Path, at_most: int | None = None) -> str:
    """The text of a regular file, `at_most` so many bytes.

    Raises OSError for a file that cannot be read, ValueError for what is no file, is longer, or is not UTF-8.
    """
    with open_regular(path) as file:
        content = file.read(-1 if at_most is None else at_most + 1)
    if at_most is not None and len(content) > at_most:
        raise ValueError(f"it is longer than {at_most} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text ({error})") from error


def read_json(path: Path, at_most: int | None = None) -> Any:
    """What a JSON file holds. Raises as `read_text` and `parse` do."""
    return parse(read_text(path, at_most))


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text`, as a whole or not at all; its folder is made, a link stays one.

    All users may read it, as far as the umask allows. Raises OSError where it cannot be written.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name of its own: several processes may write the same file
    unfinished = path.with_name(f".{secrets.token_hex(8)}.tmp")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def why_no_file(path: Path) -> str:
    """Why `path` cannot be written as a file, "" where it can. Its folder is made."""
    path = Path(os.path.realpath(path))
    try:
        if path.is_dir():
            return "it is a folder; name a file"
        if path.exists() and not path.is_file():
            return "it is no regular file; name another"
        if path.exists() and not os.access(path, os.W_OK):
            return "it is write-protected; name another"
    except OSError as error:
        return f"it cannot be written ({error.strerror}); name another"
    reason = why_no_folder(path.parent)
    return reason and f"{path.parent}: {reason}"


def why_no_folder(path: Path) -> str:
    """Why files cannot be written into the folder `path`, "" where they can. It is made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return ""
    except FileExistsError:
        return "it is a file; name a folder"
    except OSError as error:
        return f"it cannot be written ({error.strerror}); name another"

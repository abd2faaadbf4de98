"""Local texts: .txt (one document a file), .jsonl and .parquet (one a record, field ``text``); .gz, .xz and .zst of
the first two.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from bitconvert.errors import BitconvertError
from bitconvert.models.location import HUB_ID

_HUB_DATASET = rf"{HUB_ID}|[\w-]+"  # the oldest ones have no owner
TEXT_FIELD = "text"

BETWEEN_DOCUMENTS = "\n\n"
"""How documents become one text, as in the perplexity guide of Hugging Face transformers."""


def read_texts(paths: Iterable[str]) -> Iterator[str]:
    """The documents of some files and directories, in order, one at a time.

    A document is yielded exactly as it is stored: line ends are not translated, and an empty record stays an empty
    string, so that bytes counted here are bytes on disk.

    Args:
        paths: files, or directories (everything readable below them, sorted by path).

    Raises:
        BitconvertError: a path is missing (said at once), or a file is empty, cut off or malformed (said when it is
            reached, with its line).
    """
    return _documents(text_files(paths))


def text_files(paths: Iterable[str]) -> list[Path]:
    """The files that ``read_texts`` will read, in its order.

    Raises:
        BitconvertError: a path does not exist, is of an unknown type, or is a directory without texts.
    """
    return [file for path in paths for file in _files_of(Path(path).expanduser())]


def hub_dataset(sources: Sequence[str]) -> str | None:
    """The hub dataset that the sources are; None where each of them is a text on this disk.

    Raises:
        BitconvertError: there is no such file, none of a known type, or no text in a directory.
    """
    for source in sources:
        path = Path(source).expanduser()
        is_name = len(sources) == 1 and re.fullmatch(_HUB_DATASET, source) and _reader_of(path) is None
        if is_name and not path.exists():
            return source
        text_files([source])
    return None


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _reader_of(file))
        if not files:
            raise BitconvertError(f"{path}: no texts in this directory", _KNOWN_TYPES)
        return files
    if not path.exists():
        raise BitconvertError(f"{path}: no such file or directory", "check the path of the text")
    if _reader_of(path) is None:
        raise BitconvertError(f"{path}: not a type of text file that is known", _KNOWN_TYPES)
    return [path]


def ending_of(file: Path) -> str:
    """The ending by which a file's type is known; empty for a file that is not read."""
    return next((ending for ending in _READERS if file.name.endswith(ending)), "")


def _documents(files: list[Path]) -> Iterator[str]:
    for file in files:
        reader = _reader_of(file)
        assert reader is not None, "text_files lets only known types through"
        blank = True
        for document in reader(file):
            blank = blank and not document.strip()
            yield document
        if blank:
            raise BitconvertError(f"{file}: holds no text", "give a file with text in it")


def _read_plain(file: Path) -> Iterator[str]:
    content = b"".join(_lines(file))
    try:
        yield content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(file, content[: error.start].count(b"\n") + 1) from error


def read_records(file: Path) -> Iterator[tuple[str, Any]]:
    """What the lines of a .jsonl file hold, whatever it is, each with its place for messages.

    Raises:
        BitconvertError: a line is no JSON, or no text that UTF-8 can hold.
    """
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            yield f"{file}, line {number}", _parse_json(file, number, line)


def require_encodable(where: str, text: str) -> None:
    """Refuse half of a surrogate pair, which JSON can spell."""
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise BitconvertError(f"{where}: half of a surrogate pair", "write it anew: no UTF-8 can hold it")


def _read_json_lines(file: Path) -> Iterator[str]:
    for where, record in read_records(file):
        text = record.get(TEXT_FIELD) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise BitconvertError(
                f"{where}: no string field '{TEXT_FIELD}'", f'each line reads {{"{TEXT_FIELD}": "…"}}'
            )
        require_encodable(where, text)
        yield text


def _parse_json(file: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        raise _not_utf8(file, number) from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of thousands of digits is one too, though its JSON is sound
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        reason = "nested too deeply" if isinstance(error, RecursionError) else reason
        raise BitconvertError(f"{file}, line {number}: not JSON ({reason})", "one JSON object a line") from error


def _read_parquet(file: Path) -> Iterator[str]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.ParquetFile(file)
        if TEXT_FIELD not in table.schema_arrow.names:
            raise BitconvertError(
                f"{file}: no column '{TEXT_FIELD}'", f"its columns are {', '.join(table.schema_arrow.names)}"
            )
        batches = table.iter_batches(columns=[TEXT_FIELD])
        cells = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
        for row, text in enumerate(cells, start=1):
            yield _checked_cell(file, row, text)
    except (pyarrow.ArrowException, OSError) as error:
        raise BitconvertError(f"{file}: not a readable parquet file ({error})", "download or write it again") from error


def _checked_cell(file: Path, row: int, text: object) -> str:
    if not isinstance(text, str):
        raise BitconvertError(f"{file}, row {row}: column '{TEXT_FIELD}' holds no string", "drop rows without text")
    return text


def _lines(file: Path) -> Iterator[bytes]:
    """The lines of a file as they are stored, unpacked if it is compressed."""
    try:
        with _open(file) as stream:
            yield from stream
    except (OSError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise BitconvertError(f"{file}: cannot be read ({error})", "the file may be cut off: write it again") from error


def _open(file: Path) -> _Stream:
    return _DECOMPRESSORS[file.suffix](file) if file.suffix in _DECOMPRESSORS else file.open("rb")


def _open_zst(file: Path) -> io.BufferedReader:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))


_Stream = io.BufferedReader | gzip.GzipFile | lzma.LZMAFile

_DECOMPRESSORS: dict[str, Callable[[Path], _Stream]] = {".gz": gzip.GzipFile, ".xz": lzma.LZMAFile, ".zst": _open_zst}


def _not_utf8(file: Path, line: int) -> BitconvertError:
    return BitconvertError(f"{file}, line {line}: not UTF-8", "convert it, for example with `iconv -t utf-8`")


_READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    **{f".txt{packed}": _read_plain for packed in ("", *_DECOMPRESSORS)},
    ".raw": _read_plain,  # wiki.test.raw, the text that perplexities are usually given for
    **{f".jsonl{packed}": _read_json_lines for packed in ("", *_DECOMPRESSORS)},
    ".parquet": _read_parquet,
}

_KNOWN_TYPES = f"texts end in {', '.join(_READERS)}"


def _reader_of(file: Path) -> Callable[[Path], Iterator[str]] | None:
    return _READERS.get(ending_of(file))

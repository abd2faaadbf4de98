"""Reading texts: every type gives the bytes that are stored, and what is broken is named with its line."""

from __future__ import annotations

import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from bitconvert.errors import BitconvertError
from bitconvert.models.texts import read_texts, text_files

DOCUMENTS = ["Erste Zeile\r\nzweite — Grüße 東京 🙂\n", "", "  the third  "]


def write_json_lines(path: Path) -> None:
    path.write_bytes(b"".join(json.dumps({"text": text, "n": 1}).encode() + b"\n\n" for text in DOCUMENTS))


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3], "text": DOCUMENTS}), path, row_group_size=2)


def write_packed_json_lines(path: Path) -> None:
    write_json_lines(path)
    path.write_bytes(PACKED[path.suffix](path.read_bytes()))


def zst(content: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(content, asbytes=True))


PACKED: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zst}


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_json_lines),
        ("a.parquet", write_parquet),
        *((f"a.jsonl{ending}", write_packed_json_lines) for ending in PACKED),
    ],
)
def test_records_are_documents(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    assert list(read_texts([str(tmp_path / name)])) == DOCUMENTS


@pytest.mark.parametrize("name", ["a.txt", "wiki.test.raw"])
def test_a_plain_file_is_one_document_byte_for_byte(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(DOCUMENTS[0].encode())
    assert list(read_texts([str(tmp_path / name)])) == [DOCUMENTS[0]]


@pytest.mark.parametrize("ending", PACKED)
def test_a_packed_plain_file(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"a.txt{ending}"
    file.write_bytes(PACKED[ending](DOCUMENTS[0].encode()))
    assert list(read_texts([str(file)])) == [DOCUMENTS[0]]


@pytest.mark.parametrize("ending", PACKED)
def test_pieces_packed_one_by_one_are_one_file(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"a.txt{ending}"
    file.write_bytes(PACKED[ending](b"one ") + PACKED[ending](b"two"))
    assert list(read_texts([str(file)])) == ["one two"]


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"no " + data])
def test_a_damaged_packed_file_is_named(tmp_path: Path, ending: str, damage: Callable[[bytes], bytes]) -> None:
    file = tmp_path / f"a.txt{ending}"
    file.write_bytes(damage(PACKED[ending](random.Random(0).randbytes(5000).hex().encode())))
    with pytest.raises(BitconvertError, match=rf"a\.txt{ending}: cannot be read"):
        list(read_texts([str(file)]))


def test_a_directory_gives_its_texts_sorted_and_nothing_else(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "below/c.txt", "README.md", "model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "z.txt").write_text("z")
    assert list(read_texts([str(tmp_path), str(tmp_path / "a.txt")])) == ["a.txt", "b.txt", "below/c.txt", "z", "a.txt"]


def test_documents_come_one_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\nbroken\n')
    texts = read_texts([str(tmp_path / "a.jsonl")])
    assert next(texts) == "fine"
    with pytest.raises(BitconvertError, match="line 2: not JSON"):
        next(texts)


@pytest.mark.parametrize("name", ["missing.txt", "page.html", "nothing"])
def test_a_path_without_texts_is_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "page.html").write_text("text")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(BitconvertError, match=name):
        text_files([str(tmp_path / name)])


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.txt", b"fine\nfine\nna\xefve\n", "line 3: not UTF-8"),
        ("a.txt.xz", lzma.compress(b"a long text " * 999)[:-40], "cannot be read"),
        ("a.txt.xz", b"no xz at all", "cannot be read"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"', "line 3: not JSON"),
        ("a.jsonl", b'{"text": "a"\n{"text": "b"}\n', r"line 1: not JSON \(Expecting ',' delimiter at column 13\)"),
        ("a.jsonl", b'{"text": "a", "id": ' + b"1" * 5000 + b"}\n", "line 1: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "line 2: no string field 'text'"),
        ("a.jsonl", b'{"content": "a"}\n', "line 1: no string field 'text'"),
        ("a.jsonl", b'{"text": 7}\n', "line 1: no string field 'text'"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1: not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: half of a surrogate pair"),
        ("a.parquet", b"PAR1 and then rubbish", "not a readable parquet file"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BitconvertError, match=complaint) as caught:
        list(read_texts([str(tmp_path / name)]))
    assert caught.value.message.startswith(str(tmp_path / name))


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({"words": ["a"]}, "no column 'text'"),
        ({"text": ["a", None]}, "row 2: column 'text' holds no string"),
        ({"text": [1, 2]}, "row 1: column 'text' holds no string"),
    ],
)
def test_a_parquet_table_without_texts(tmp_path: Path, table: dict[str, list[object]], complaint: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    with pytest.raises(BitconvertError, match=complaint):
        list(read_texts([str(tmp_path / "a.parquet")]))

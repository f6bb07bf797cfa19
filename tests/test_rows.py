"""Users' files of rows: the content says what a file is, and what cannot be used is named, counted or refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastmtp.rows import RowError, Skipped, file_rows, text_lines

ROWS = [{"prompt": "eins"}, {"prompt": "zwei\u2028drei"}, {"prompt": "四"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
# Texts of the same rows.
FORMS = {
    "a line each": LINES,
    "other ends of lines": LINES.replace("\n", "\r\n") + "\r\n\r\n",
    "escaped": "\n".join(map(json.dumps, ROWS)),
    "an array": json.dumps(ROWS),
    "an array over many lines": json.dumps(ROWS, indent=2) + "\n",
    "joined files": LINES.replace("\n", "\n\ufeff"),
}
NAMES = ("a.jsonl", "a.JSONL", "a.json", "a.txt", "a", "a.jsonl.gz")
WAYS: dict[str, Callable[[str], bytes]] = {
    "UTF-8": str.encode,
    "with a mark": lambda text: text.encode("utf-8-sig"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-32": lambda text: text.encode("utf-32"),
    "gzip": lambda text: gzip.compress(text.encode()),
    "gzip with a mark": lambda text: gzip.compress(text.encode("utf-8-sig")),
}


def read(path: Path, skipped: Skipped | None = None) -> list[object]:
    return [row.value for row in file_rows(path, ["prompt"], skipped or Skipped(strict=True))]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_the_content_gives_the_format(tmp_path: Path, name: str, form: str) -> None:
    """Whatever the file's name, its encoding and its packing, the rows are the same."""
    for content in (way(FORMS[form]) for way in WAYS.values()):
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == ROWS


def test_parquet_whatever_its_name(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.PARQUET", "a.bin"):
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / name)
        assert read(tmp_path / name) == ROWS


def test_lines_of_text_stay_lines(tmp_path: Path) -> None:
    """What only begins like JSON is text; a mark at the beginning is not."""
    lines = ["[1] What is a footnote?", "{x} is a set", '{"a": 1} is JSON', "\u00a0 a no-break space"]
    for ends in ("\n", "\r\n"):
        (tmp_path / "a.txt").write_text("\ufeff" + ends.join(lines) + ends, encoding="utf-8")
        assert read(tmp_path / "a.txt") == [{"prompt": line.strip()} for line in lines]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"prompt\nx\n", "a.csv: is not read; give Parquet, JSON, JSONL, or text"),
        ("a.YAML.gz", gzip.compress(b"- x\n", mtime=0), "is not read"),
        ("a.jsonl", b"PK\x03\x04....", "is a ZIP archive"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd....", "is packed with zstd"),
        ("a.txt", b"x\0y\n", "is no text"),
        ("a.gz", gzip.compress(b"PAR1....", mtime=0), "is a packed Parquet file"),
        ("a.parquet", b"", "not a readable Parquet file"),
        ("a.json", b'{\n "prompt": "x"\n}', "one object over several lines; give an array of rows"),
        ("a.json", b'[{"prompt": "x"}, {"prompt": ', r"line 1 \(entry 2\): not valid JSON"),
        ("a.json", b'[\n{"prompt": "x"}\n{"prompt": "y"}]', r"line 2 \(entry 1\): neither a comma"),
        ("a.json", b'[{"prompt": "x"}', r"\(entry 1\): neither a comma nor the array's end"),
        ("a.json", b'[{"prompt": "x"}] []', "more follows the JSON array"),
        ("a.json", b"[" * 100_000, r"a\.json, line 1 \(entry 1\): not valid JSON"),
        ("a.jsonl.gz", gzip.compress(LINES.encode() * 50, mtime=0)[:-12], "the gzip file is damaged or cut"),
        ("a.jsonl", gzip.compress(LINES.encode(), mtime=0)[:20] + b"\xff" * 9, "the gzip file is damaged or cut"),
        ("a.txt", LINES.encode("utf-16")[:-1], "not valid utf-16"),
    ],
)
def test_files_that_cannot_be_read_are_refused_by_name(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read(path, Skipped())
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


BAD_LINES = [
    (b'{"prompt": "x', "line 2: not valid JSON"),
    (b"[1]", "line 2: must be a JSON object"),
    (b'{"prompt": "\\ud83d"}', r"line 2: `prompt` is not valid Unicode: .*U\+D83D"),
    (b'{"prompt": ["\xff"]}', r"line 2: `prompt` is not valid Unicode: .* not UTF-8 \(U\+DCFF"),
    (b'{"prompt": ' + b"9" * 5000 + b"}", "line 2: not valid JSON"),
    (b'{"prompt": ' + b"[" * 100_000, "line 2: not valid JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_row_is_left_out_or_stops(tmp_path: Path, line: bytes, message: str) -> None:
    """The others keep their numbers; it is counted once, however often the file is read."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "x"}\n' + line + b'\n{"prompt": "y"}\n')
    skipped = Skipped()
    for _ in range(2):
        assert [(row.number, row.value["prompt"]) for row in file_rows(path, ["prompt"], skipped)] == [
            (0, "x"),
            (2, "y"),
        ]
    assert skipped.count == 1
    assert skipped.first.startswith(f"{path}, line 2: ")
    with pytest.raises(RowError, match=message):
        read(path, Skipped(strict=True))


def test_emoji_and_unused_columns_are_no_faults(tmp_path: Path) -> None:
    """A pair of surrogates in JSON is a character, and a column that nobody reads may hold anything."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "\\ud83d\\ude00", "id": "\\ud83d"}\n')
    assert [row.value["prompt"] for row in file_rows(path, ["prompt"], Skipped(strict=True))] == ["😀"]


def test_bad_text_in_parquet(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 cost their own row only."""
    column = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc")]
    )
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": column}), path)
    skipped = Skipped()
    assert read(path, skipped) == [{"prompt": "a"}, {"prompt": "c"}]
    assert skipped.first == f"{path}, row 2: is not valid UTF-8: invalid start byte"


def test_lines_that_are_not_unicode_are_left_out_of_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntw\xff\nthree")
    skipped = Skipped()
    assert list(text_lines(path, skipped)) == ["one\n", "three"]
    assert (skipped.count, skipped.first[: len(f"{path}, line 2")]) == (1, f"{path}, line 2")

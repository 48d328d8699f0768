"""Records one a line: what is read, and what is refused with its row."""

import gzip
from pathlib import Path

import pytest

from torchrec_em3.datasets import records as records_module
from torchrec_em3.datasets.records import read_lines, read_records
from torchrec_em3.errors import DataError


def test_rows_are_lines_and_empty_ones_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n{\"a\": 1}\r\n\n  {'a': None, 'b': [('x', 2)]}\n")
    assert list(read_records(path)) == [(2, {"a": 1}), (4, {"a": None, "b": [("x", 2)]})]
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress('\ufeffa,b\r\n1,"x, ""y"""\r\n\r\n2,\r\n'.encode()))
    assert list(read_records(path)) == [(2, {"a": "1", "b": 'x, "y"'}), (4, {"a": "2", "b": ""})]
    assert list(read_records(path, ("b", "a")))[1] == (2, {"b": "1", "a": 'x, "y"'})


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "a.json",
            b'{"a": 1}\n{"a": 1',
            r"a\.json row 2: not a JSON object \(Expecting ',' delimiter at character 8\)",
        ),
        ("a.json", b'{"a": "\xff"}\n', r"a\.json row 1: not a JSON object \('utf-8' codec"),
        ("a.json", b"5\n", r"a\.json row 1: holds a int, expected an object"),
        ("a.json", b"[" * 100_000, r"a\.json row 1: not a JSON object \(maximum recursion depth"),
        ("a.json", b"{'a': " + b"[" * 100_000, r"a\.json row 1: not a Python dict of literals"),
        ("a.json", b"{'a': 1}; x = 2\n", r"a\.json row 1: not a Python dict of literals \(invalid syntax"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", r"a\.csv row 3: 3 fields, expected 2 \(a, b\)"),
        ("a.csv", b"a,b\n1,\xff\n", r"a\.csv row 2: not UTF-8 text"),
        ("a.csv", b'a,b\n1,2\n"1"x,2\n', r"a\.csv row 3: not CSV"),
        ("a.json.gz", b"never compressed", r"a\.json\.gz: the gzip data is truncated or damaged"),
    ],
)
def test_faults_name_file_and_row(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        list(read_records(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_a_file_without_line_breaks_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "MAX_LINE_BYTES", 100)
    (tmp_path / "a.json").write_bytes(b'{"a": 1}\n' + b" " * 2000)
    with pytest.raises(DataError, match=r"row 2: longer than 100 bytes; expected one record a line"):
        list(read_lines(tmp_path / "a.json", 100))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.json: cannot be read \(No such file"):
        list(read_lines(tmp_path / "gone.json"))

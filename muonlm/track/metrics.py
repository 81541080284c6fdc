"""metrics.jsonl: one JSON object a line, appended as the run goes. The schema is documented in docs/metrics.md."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from muonlm.config.errors import UserError
from muonlm.track.disk import disk_errors

SCHEMA_VERSION = 1
FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends records to `<run_dir>/metrics.jsonl`; a killed process loses at most the line it was writing."""

    def __init__(self, run_dir: str | Path) -> None:
        self._path = Path(run_dir) / FILE_NAME
        with disk_errors(self._path):
            _drop_torn_line(self._path)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """Append one record of `kind` "train", "eval" or "event". Raises ValueError for NaN and infinity."""
        stamp = round(time.time(), 3)
        line = json.dumps({"schema": SCHEMA_VERSION, "kind": kind, "unix_s": stamp, **record}, allow_nan=False)
        with disk_errors(self._path):
            self._file.write(line + "\n")
            self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Remove records of later steps than `step`: a resumed run writes them again. Atomic."""
        kept = [record for record in _read(self._path) if record["step"] <= step]
        self._file.close()
        temporary = self._path.with_suffix(".tmp")
        with disk_errors(self._path):
            with open(temporary, "w", encoding="utf-8") as out:
                out.writelines(json.dumps(record) + "\n" for record in kept)
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, self._path)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115

    def sync(self) -> None:
        """Put every record on the disk: called before a checkpoint, which must not outlive its records."""
        with disk_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # what a full disk refused was told when it was written
            self._file.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """All records of a run in the order they were written; none when the file does not exist.

    `run_dir` is the run directory or its metrics.jsonl. A last line that was cut off by a kill is left out. Raises
    UserError for a broken line elsewhere.
    """
    path = Path(run_dir)
    return _read(path if path.name == FILE_NAME else path / FILE_NAME)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    records = []
    *lines, _torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int) or "kind" not in record:
            raise UserError(
                f"{path}: line {number} is no record of a run; remove that line, or start over with --fresh"
            )
        records.append(record)
    return records


def _drop_torn_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            with open(path, "r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)

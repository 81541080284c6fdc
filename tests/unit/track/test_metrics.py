"""metrics.jsonl survives kills, and a resumed run leaves every record in it once."""

from __future__ import annotations

import json
import time

import pytest

from muonlm.config.errors import UserError
from muonlm.track.metrics import SCHEMA_VERSION, MetricsWriter, read_metrics


def test_records_come_back_in_order_with_schema_and_kind(tmp_path) -> None:
    writer, before = MetricsWriter(tmp_path), time.time()
    writer.write("train", {"step": 1, "loss": 2.5})
    writer.write("eval", {"step": 1, "loss": 3.0})
    records = read_metrics(tmp_path)  # before close: each record is flushed
    stamps = [record.pop("unix_s") for record in records]
    assert before - 1 <= stamps[0] <= stamps[1] <= time.time() + 1
    assert records == [
        {"schema": SCHEMA_VERSION, "kind": "train", "step": 1, "loss": 2.5},
        {"schema": SCHEMA_VERSION, "kind": "eval", "step": 1, "loss": 3.0},
    ]
    writer.close()


def test_a_torn_last_line_is_ignored_and_then_written_over(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "st')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]
    writer = MetricsWriter(tmp_path)
    writer.write("train", {"step": 2})
    writer.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("broken", ['{"st', "[1]", '{"schema": 1}', "\0" * 100])
def test_a_broken_line_in_the_middle_is_an_error(tmp_path, broken) -> None:
    good = '{"kind": "train", "step": 1}'
    (tmp_path / "metrics.jsonl").write_text(f"{good}\n{broken}\n{good}\n")
    with pytest.raises(UserError, match="line 2 is no record of a run"):
        read_metrics(tmp_path)


def test_the_file_itself_may_be_named(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == read_metrics(tmp_path) != []


def test_a_full_disk_is_the_users_to_mend(tmp_path) -> None:
    writer = MetricsWriter(tmp_path)
    writer._file.close()
    writer._file = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: No space left on device"):
        writer.write("train", {"step": 1})
    writer.close()


def test_truncation_keeps_the_step_itself_and_goes_on(tmp_path) -> None:
    writer = MetricsWriter(tmp_path)
    for step in range(1, 6):
        writer.write("train", {"step": step, "loss": step / 3})
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()[:3]
    writer.truncate_after(3)
    writer.write("train", {"step": 4})
    writer.sync()
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[:3] == kept
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_no_file_means_no_records_and_nan_is_refused(tmp_path) -> None:
    assert read_metrics(tmp_path) == []
    writer = MetricsWriter(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        writer.write("train", {"step": 1, "loss": float("nan")})
    writer.close()
    assert read_metrics(tmp_path) == []


def test_a_disk_that_is_full_while_records_are_removed(tmp_path, monkeypatch) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write("train", {"step": 1})

    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: No space left on device"):
        writer.truncate_after(0)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]

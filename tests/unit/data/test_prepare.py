"""The pipeline: what it writes, that an interruption changes nothing, and what it says when it cannot go on."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from muonlm.config.data import PrepareConfig
from muonlm.config.errors import UserError
from muonlm.data import chunks
from muonlm.data import prepare as module
from muonlm.data.chunks import Chunk, document_digest, is_validation
from muonlm.data.manifest import read_manifest
from muonlm.data.prepare import prepare
from muonlm.data.shards import map_document_starts, map_tokens, read_header
from muonlm.data.sources import Document, LocalFiles

MakeConfig = Callable[..., PrepareConfig]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def decoded(folder: Path, split: str) -> list[str]:
    """The documents of a split, read back through the document index."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = []
    for shard in read_manifest(folder).splits[split].shards:
        header = read_header(folder / shard.file)
        tokens = map_tokens(folder / shard.file, header)
        parts = np.split(tokens, map_document_starts(folder / shard.file, header)[1:].astype(int))
        assert all(part[-1] == 0 for part in parts)
        texts += [tokenizer.decode(part[:-1].tolist(), skip_special_tokens=False) for part in parts]
    return texts


def test_every_document_is_in_one_split_whole_and_in_order(prepared: Path, texts: list[str]) -> None:
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    held_out = [
        int.from_bytes(hashlib.sha256(bytes(8) + digest).digest()[:8], "little") / 2**64 < 0.3 for digest in digests
    ]
    assert decoded(prepared, "train") == [text for text, out in zip(texts, held_out, strict=True) if not out]
    assert decoded(prepared, "validation") == [text for text, out in zip(texts, held_out, strict=True) if out]
    manifest = read_manifest(prepared)
    assert len(manifest.splits["train"].shards) > 2
    assert manifest.source["sha256"] == hashlib.sha256(b"".join(digests)).hexdigest()
    assert manifest.source["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert manifest.source["num_documents"] == len(texts)
    assert not (prepared / ".partial").exists()


def test_split_share_seed_and_duplicates() -> None:
    digests = [hashlib.sha256(str(number).encode()).digest() for number in range(4000)]
    sides = np.array([is_validation(digest, 0, 0.1) for digest in digests])
    assert abs(sides.mean() - 0.1) < 0.02
    other = np.array([is_validation(digest, 1, 0.1) for digest in digests])
    assert 0 < np.sum(sides & other) < 0.3 * sides.sum()  # independent: a tenth of them
    larger = np.array([is_validation(digest, 0, 0.2) for digest in digests])
    assert np.all(larger[sides])  # a larger share only adds documents


def test_tokenizer_learns_from_the_train_split_alone(tmp_path: Path, make_config: MakeConfig) -> None:
    """A word that only held-out documents have must not become a token."""
    folder = tmp_path / "text"
    folder.mkdir()
    common = "the same words again and again. " * 50
    for number in range(40):
        text = f"{common}{number}"
        rare = "zqxjkv " * 200
        held_out = is_validation(document_digest(text + rare, ""), 0, 0.3)
        (folder / f"{number}.txt").write_text(text + rare if held_out else text)
    config = make_config(tmp_path / "out", source={"kind": "text", "files": [f"{folder}/*"]})
    manifest = prepare(config, progress=False)
    assert any("zqxjkv" in text for text in decoded(tmp_path / "out", "validation"))
    vocabulary = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab()
    assert any("again" in token for token in vocabulary)
    assert not any("zq" in token or "xj" in token for token in vocabulary)
    assert manifest.tokenizer_documents == manifest.splits["train"].num_documents


def test_train_bytes_bounds_what_the_tokenizer_reads(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path / "a", tokenizer={"vocab_size": 400, "train_bytes": 30_000})
    reader = chunks.TrainingTexts(config, LocalFiles("text", sorted(Path(config.source.files[0]).parent.glob("*.txt"))))
    assert sum(len(text.encode()) for text in reader) == pytest.approx(30_000, abs=3)
    assert reader.source.position[0] < 20


KILLED_RUN = """
import os, signal, sys
from muonlm.config.data import PrepareConfig
from muonlm.data.prepare import prepare
config, fatal, after = PrepareConfig.model_validate_json(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "after"
replace, count = os.replace, 0
def counted(*paths):
    global count
    count += 1
    if count == fatal and not after:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
    if count == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = counted
prepare(config, progress=False)
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_again_and_again_gives_the_same_bytes(
    when: str, prepared: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    """SIGKILL at the fifth file of every run, before or after its rename, until a run gets through."""
    output = tmp_path / "out"
    config = make_config(output).model_dump_json()
    finished: dict[Path, int] = {}
    for _ in range(20):
        command = [sys.executable, "-c", KILLED_RUN, config, "5", when]
        run = subprocess.run(command, stderr=subprocess.PIPE, check=False)
        records = sorted((output / ".partial").glob("chunk-*.json"))
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL, run.stderr.decode()
        assert not (output / "manifest.json").exists() or when == "after"
        for record in records:
            for shard in json.loads(record.read_bytes())["shards"].values():
                path = output / shard["file"]
                assert finished.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns, "done again"
    assert len(finished) >= 5
    assert snapshot(output) == snapshot(prepared)


def test_killed_while_it_works(prepared: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    output = tmp_path / "out"
    config = make_config(output)
    run = subprocess.Popen([sys.executable, "-c", KILLED_RUN, config.model_dump_json(), "0", "after"])
    deadline = time.monotonic() + 30
    while not (output / ".partial" / "chunk-00000.json").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    run.kill()
    run.wait()
    prepare(config, progress=False)
    assert snapshot(output) == snapshot(prepared)


def test_thread_count_does_not_change_the_bytes(prepared: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path / "out", workers=1).model_dump_json()
    subprocess.run([sys.executable, "-c", KILLED_RUN, config, "0", "after"], check=True)
    assert snapshot(tmp_path / "out") == snapshot(prepared)


def test_chunk_size_changes_shards_and_not_tokens(prepared: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    one = prepare(make_config(tmp_path / "out", chunk_bytes=10**9), progress=False)
    assert [len(split.shards) for split in one.splits.values()] == [1, 1]
    many = read_manifest(prepared)
    assert one.source == many.source
    for split in ("train", "validation"):
        assert decoded(tmp_path / "out", split) == decoded(prepared, split)


def test_repeating_does_nothing(
    prepared: Path, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = shutil.copytree(prepared, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    monkeypatch.setattr(module, "Encoder", None)
    monkeypatch.setattr(LocalFiles, "__iter__", None)  # not even the text is read
    manifest = prepare(make_config(output, workers=2), progress=False)
    assert manifest == read_manifest(prepared)
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before


def copy_books(books: Path, folder: Path) -> Path:
    return shutil.copytree(books, folder, copy_function=shutil.copyfile)


def test_repeating_after_a_touch_reads_and_after_a_change_refuses(
    books: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    source = {"kind": "text", "files": [f"{copy_books(books, tmp_path / 'books')}/*.txt"]}
    config = make_config(tmp_path / "out", source=source)
    manifest = prepare(config, progress=False)
    os.utime(tmp_path / "books" / "003.txt", (1, 1))
    assert prepare(config, progress=False) == manifest
    with (tmp_path / "books" / "003.txt").open("a") as file:
        file.write("x")
    with pytest.raises(UserError, match=r"prepared from other text.*remove"):
        prepare(config, progress=False)


def test_another_configuration_says_what_differs(prepared: Path, make_config: MakeConfig) -> None:
    config = make_config(prepared, seed=3, tokenizer={"vocab_size": 512})
    with pytest.raises(UserError) as raised:
        prepare(config, progress=False)
    message = str(raised.value)
    assert "seed: 0 there, 3 asked for" in message
    assert "tokenizer.vocab_size: 400 there, 512 asked for" in message
    assert "validation_fraction" not in message
    assert "choose another `output`" in message


def interrupted(config: PrepareConfig, after_chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs `prepare` and stops it in the chunk after `after_chunks`."""
    flush, count = Chunk.flush, 0

    def stop(self: Chunk) -> None:
        nonlocal count
        count += 1
        if count > after_chunks:
            raise KeyboardInterrupt
        flush(self)

    with monkeypatch.context() as patch:
        patch.setattr(Chunk, "flush", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, progress=False)


def test_unfinished_of_another_configuration(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    interrupted(make_config(output), 1, monkeypatch)
    with pytest.raises(UserError, match=r"unfinished data set of another configuration:\n  seed: 0 there, 1 asked for"):
        prepare(make_config(output, seed=1), progress=False)
    prepare(make_config(output), progress=False)


def test_before_the_first_chunk_another_configuration_starts_over(
    prepared: Path, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    interrupted(make_config(output, tokenizer={"vocab_size": 300}), 0, monkeypatch)
    prepare(make_config(output), progress=False)
    assert snapshot(output) == snapshot(prepared)


@pytest.mark.parametrize("changed", ["000.txt", "063.txt"])
def test_text_changed_under_an_unfinished_run(
    changed: str, books: Path, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed where chunks or the tokenizer came from: all anew. Changed further on: the finished chunks stay."""
    folder = copy_books(books, tmp_path / "books")
    source = {"kind": "text", "files": [f"{folder}/*.txt"]}
    small = {"vocab_size": 400, "train_bytes": 50_000}
    config = make_config(tmp_path / "out", source=source, tokenizer=small)
    interrupted(config, 1, monkeypatch)
    first = next((tmp_path / "out").glob("train-00000.bin")).stat().st_mtime_ns
    (folder / changed).write_text("other words altogether, held together by nothing")
    prepare(config, progress=False)
    assert ((tmp_path / "out" / "train-00000.bin").stat().st_mtime_ns == first) == (changed == "063.txt")
    fresh = make_config(tmp_path / "fresh", source=source, tokenizer=small)
    prepare(fresh, progress=False)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "fresh")


def test_mending_a_bad_line_goes_on(texts: list[str], make_config: MakeConfig, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.jsonl" for name in "ab"]
    for file, part in zip(files, (texts[:32], texts[32:]), strict=True):
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    good = files[1].read_text()
    files[1].write_text(good + "{broken\n")
    config = make_config(
        tmp_path / "out",
        source={"kind": "jsonl", "files": [f"{tmp_path}/*.jsonl"]},
        tokenizer={"vocab_size": 400, "train_bytes": 100_000},
    )
    with pytest.raises(UserError, match=r"b\.jsonl line 33 is not valid JSON"):
        prepare(config, progress=False)
    files[1].write_text(good)
    assert prepare(config, progress=False).source["num_documents"] == 64


def test_memory_is_one_batch_and_not_the_text(make_config: MakeConfig, tmp_path: Path) -> None:
    """Documents are taken one by one and their text dropped at every full batch."""
    encoded: list[int] = []

    class Counting:
        def encode(self, batch: list[str]) -> list[np.ndarray]:
            encoded.append(sum(map(len, batch)))
            return [np.zeros(1, dtype="<u2")] * len(batch)

    chunk = Chunk(Counting(), make_config(tmp_path))  # type: ignore[arg-type]
    for number in range(1000):
        chunk.add(Document(f"{number:06d}" + "x" * 9_994, "here"))
        assert sum(map(len, chunk._texts)) < chunks.BATCH_BYTES
    assert len(encoded) == 5
    assert max(encoded) <= chunks.BATCH_BYTES


def test_existing_tokenizer_is_used_and_a_changed_one_noticed(
    prepared: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    shutil.copy(prepared / "tokenizer.json", tmp_path / "tokenizer.json")
    config = make_config(tmp_path / "out", tokenizer={"existing": str(tmp_path / "tokenizer.json")})
    manifest = prepare(config, progress=False)
    before = read_manifest(prepared)
    assert manifest.tokenizer_fingerprint == before.tokenizer_fingerprint
    assert manifest.splits == before.splits
    assert prepare(config, progress=False) == manifest
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    last = content["model"]["merges"].pop()
    content["model"]["vocab"].pop("".join(last))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="was another tokenizer"):
        prepare(config, progress=False)


def test_large_vocabulary_takes_four_bytes(make_config: MakeConfig, tmp_path: Path, prepared: Path) -> None:
    content = json.loads((prepared / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 70_000, "content": "<far>"})
    content["model"]["vocab"]["<far>"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    manifest = prepare(make_config(tmp_path / "out", tokenizer={"existing": str(tmp_path)}), progress=False)
    assert (manifest.token_bytes, manifest.vocab_size) == (4, 70_001)
    assert decoded(tmp_path / "out", "train") == decoded(prepared, "train")


def text_config(make_config: MakeConfig, folder: Path, texts: list[Any]) -> PrepareConfig:
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return make_config(folder / "out", source={"kind": "jsonl", "files": [f"{folder}/in.jsonl"]})


@pytest.mark.parametrize("texts_given", [[], ["", "", None]])
def test_no_text(texts_given: list[Any], make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the source holds no text"):
        prepare(text_config(make_config, tmp_path, texts_given), progress=False)


def test_empty_documents_are_left_out_and_counted(texts: list[str], make_config: MakeConfig, tmp_path: Path) -> None:
    manifest = prepare(text_config(make_config, tmp_path, ["", *texts[:30], "", None]), progress=False)
    assert (manifest.source["num_documents"], manifest.source["num_empty_documents"]) == (30, 3)


def test_one_document_cannot_be_split(make_config: MakeConfig, tmp_path: Path, texts: list[str]) -> None:
    config = text_config(make_config, tmp_path, texts[:1])
    with pytest.raises(UserError, match=r"split would be empty: of 1 documents.*cut a long file"):
        prepare(config, progress=False)
    # Nothing is left that would stop another try with more documents or another share.
    prepare(text_config(make_config, tmp_path, texts[:30]), progress=False)


def test_a_seed_that_fills_both_splits_is_named(make_config: MakeConfig, tmp_path: Path, texts: list[str]) -> None:
    config = text_config(make_config, tmp_path, texts[:3])
    seeds = range(9)
    named = []
    for seed in seeds:
        tried = config.model_copy(update={"seed": seed})
        try:
            prepare(tried, progress=False)
            shutil.rmtree(config.output)
        except UserError as error:
            named += re.findall(r"or take seed=(\d+), which", str(error))
    assert len(named) >= 2
    for seed in set(named):
        prepare(config.model_copy(update={"seed": int(seed)}), progress=False)
        shutil.rmtree(config.output)


def test_lone_surrogate(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 2 holds a lone surrogate"):
        prepare(text_config(make_config, tmp_path, ["fine", "bad \ud800"]), progress=False)


def test_foreign_directory_is_left_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(precious\.txt\)"):
        prepare(make_config(tmp_path), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_output_that_cannot_be_written(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write output directory"):
        prepare(make_config(tmp_path / "file" / "out"), progress=False)


def test_disk_full_says_how_much_and_can_go_on(
    prepared: Path, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, count = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal count
        count += 1
        if count == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    config = make_config(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"disk full: writing .* needs [\d,]+ bytes and [\d,]+ are free"):
            prepare(config, progress=False)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    prepare(config, progress=False)
    assert snapshot(tmp_path / "out") == snapshot(prepared)


def test_second_process_waits_and_finds_the_work_done(prepared: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path / "out")
    command = [sys.executable, "-c", KILLED_RUN, config.model_dump_json(), "0", "after"]
    runs = [subprocess.Popen(command) for _ in range(2)]
    assert [run.wait(60) for run in runs] == [0, 0]
    assert snapshot(tmp_path / "out") == snapshot(prepared)


def test_progress_goes_to_the_terminal_only_when_asked(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(make_config(tmp_path / "quiet"), progress=False)
    assert capsys.readouterr() == ("", "")
    prepare(make_config(tmp_path / "loud"), progress=True)
    assert "tokenizing" in capsys.readouterr().out

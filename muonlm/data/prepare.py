"""`muonlm data prepare`: documents -> tokenizer -> token shards -> manifest, resumable at any point.

The documents are cut into chunks of about `chunk_bytes`; each chunk becomes one shard of each split and then a record
in `<output>/.partial`, which holds where the source continues. A process killed at any moment loses at most the chunk
it was in: repeating the command goes on after the last record and writes the same bytes as an uninterrupted run.
The manifest comes last, then `.partial` goes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from tokenizers import Tokenizer

from muonlm.config.data import PrepareConfig
from muonlm.config.errors import UserError
from muonlm.config.load import load_prepare
from muonlm.config.schema import DataConfig
from muonlm.data.chunks import DIGEST_BYTES, Chunk, ChunkRecord, TokenizerRecord, TrainingTexts, is_validation
from muonlm.data.manifest import MANIFEST_NAME, SPLITS, TOKENIZER_NAME, Manifest, ShardRecord, SplitName, SplitRecord
from muonlm.data.output import (
    FILES_NAME,
    PARTIAL_NAME,
    STARTED_NAME,
    check_same,
    discard,
    exclusive,
    finished,
    identity,
    to_json,
)
from muonlm.data.shards import TEMPORARY_SUFFIX, write_atomic, write_shard
from muonlm.data.sources import Document, TextSource, open_source
from muonlm.data.tokenizer import END_OF_TEXT, Encoder, fingerprint, load_existing, set_threads, train_bpe


def prepare(config: PrepareConfig, *, progress: bool = True) -> Manifest:
    """Writes the data set that `config` describes and returns its manifest.

    Does nothing when the directory already holds the data set of the same configuration and text. Raises UserError for
    everything a user can mend: no or unreadable text, a directory that holds another data set, a full disk, an
    empty split. Only one process writes a directory at a time; a second one waits and then finds the work done.
    """
    set_threads(config.workers)
    source = open_source(config.source)
    output = Path(config.output)
    with exclusive(output), _progress(source.total_bytes(), progress) as meter:
        if (output / MANIFEST_NAME).is_file():
            manifest = finished(config, source, output)
        else:
            manifest = _Preparation(config, source, output, meter).run()
        shutil.rmtree(output / PARTIAL_NAME, ignore_errors=True)
        return manifest


def prepare_if_missing(data: DataConfig, *, progress: bool = True) -> None:
    """Prepares `data.path` by the data config that `data.prepare` names, where it is named and the data is missing.

    Raises UserError when that config writes elsewhere: a mistyped `data.path` must not be filled with other text.

    Every rank may call it at once, before there is a process group: the first one works, the others wait for it. Only
    one of them should show `progress`.
    """
    if data.prepare is None or (Path(data.path) / MANIFEST_NAME).is_file():
        return
    config = load_prepare(data.prepare)
    if Path(config.output).resolve() != Path(data.path).resolve():
        raise UserError(
            f"data directory {data.path} does not exist, and the data config {data.prepare} of data.prepare writes "
            f"to {config.output}: correct data.path, or run `muonlm data prepare` for it first"
        )
    if progress:
        print(f"{data.path} is not there yet; preparing it by the data config {data.prepare}", flush=True)
    prepare(config, progress=progress)


class _Preparation:
    """One run of the pipeline over one output directory."""

    def __init__(self, config: PrepareConfig, source: TextSource, output: Path, meter: _Meter) -> None:
        self.config, self.source, self.output, self.meter = config, source, output, meter
        self.partial = output / PARTIAL_NAME

    def run(self) -> Manifest:
        self._begin()
        tokenizer = self._tokenizer()
        encoder = Encoder(Tokenizer.from_file(str(self.output / TOKENIZER_NAME)), tokenizer.end_of_text)
        self.meter.stage("tokenizing")
        chunks = self._chunk_records()
        for chunk in chunks:
            self.meter.advance(sum(shard.text_bytes for shard in chunk.shards.values()))
        self.source.seek(chunks[-1].position if chunks else None)
        documents = iter(self.source)
        while written := self._write_chunk(len(chunks), documents, encoder, tokenizer.fingerprint):
            chunks.append(written)
        return self._finish(chunks, encoder, tokenizer)

    def _begin(self) -> None:
        """Makes `.partial`, or keeps the one there if it belongs to this configuration and to unchanged text."""
        started = self.partial / STARTED_NAME
        wanted, files = identity(self.config), self.source.signature()
        if started.is_file():
            before = json.loads(started.read_bytes())
            if self._chunk_records():  # before the first one nothing is lost by starting over
                check_same(before["config"], wanted, self.output, "an unfinished data set")
            # Text behind finished work must be as it was; text that was not reached yet may have been mended.
            used = max((self.source.files_read(record.position) for record in self._records()), default=0)
            if before["config"] == wanted and before["files"][:used] == files[:used]:
                return
        if self.partial.exists():
            discard(self.output)
        elif foreign := sorted(path.name for path in self.output.iterdir()):
            raise UserError(
                f"output directory {self.output} holds other files ({', '.join(foreign[:3])}) and no data set; "
                "choose an empty or new directory as `output`"
            )
        self.partial.mkdir()
        write_atomic(started, to_json({"config": wanted, "files": files}))

    def _records(self) -> list[TokenizerRecord | ChunkRecord]:
        path = self.partial / TOKENIZER_NAME
        tokenizer = [TokenizerRecord.model_validate_json(path.read_bytes())] if path.is_file() else []
        return [*tokenizer, *self._chunk_records()]

    def _chunk_records(self) -> list[ChunkRecord]:
        records: list[ChunkRecord] = []
        while (path := self.partial / f"chunk-{len(records):05d}.json").is_file():
            records.append(ChunkRecord.model_validate_json(path.read_bytes()))
        return records

    def _tokenizer(self) -> TokenizerRecord:
        """Trains or copies the tokenizer into the output, unless that is done."""
        record_path = self.partial / TOKENIZER_NAME
        if record_path.is_file():
            return TokenizerRecord.model_validate_json(record_path.read_bytes())
        wanted = self.config.tokenizer
        reader = TrainingTexts(self.config, self.source)
        if wanted.existing is None:
            self.meter.stage("training the tokenizer")
            tokenizer, end_of_text = train_bpe(reader, wanted.vocab_size), END_OF_TEXT
            if not reader.num_documents:
                self._fail_empty("train", reader.num_seen)
        else:
            tokenizer, end_of_text = load_existing(wanted)
        text = tokenizer.to_str(pretty=True)
        write_atomic(self.output / TOKENIZER_NAME, text.encode("utf-8"))
        record = TokenizerRecord(
            fingerprint=fingerprint(text),
            end_of_text=end_of_text,
            num_documents=reader.num_documents,
            position=self.source.position,
        )
        write_atomic(record_path, record.to_json())
        return record

    def _write_chunk(
        self, number: int, documents: Iterator[Document], encoder: Encoder, tokenizer_fingerprint: str
    ) -> ChunkRecord | None:
        """Reads, tokenizes and writes the next `chunk_bytes` of text; None when the source has no more."""
        chunk = Chunk(encoder, self.config)
        for document in documents:
            self.meter.advance(chunk.add(document))
            if chunk.text_bytes >= self.config.chunk_bytes:
                break
        if not chunk.digests and not chunk.num_skipped:
            return None
        chunk.flush()
        shards: dict[SplitName, ShardRecord] = {}
        for split, tokens in chunk.tokens.items():
            if tokens:
                header = write_shard(
                    path := self.output / f"{split}-{number:05d}.bin",
                    tokens,
                    text_bytes=chunk.split_bytes[split],
                    vocab_size=encoder.vocab_size,
                    tokenizer_fingerprint=tokenizer_fingerprint,
                )
                shards[split] = ShardRecord.of(path.name, header)
        write_atomic(self.partial / f"digests-{number:05d}.bin", bytes(chunk.digests))
        record = ChunkRecord(shards=shards, num_skipped=chunk.num_skipped, position=self.source.position)
        write_atomic(self.partial / f"chunk-{number:05d}.json", record.to_json())
        return record

    def _finish(self, chunks: list[ChunkRecord], encoder: Encoder, tokenizer: TokenizerRecord) -> Manifest:
        splits = {
            split: SplitRecord.of([chunk.shards[split] for chunk in chunks if split in chunk.shards])
            for split in SPLITS
        }
        num_documents = sum(split.num_documents for split in splits.values())
        for name, split in splits.items():
            if not split.shards:
                self._fail_empty(name, num_documents)
        total = hashlib.sha256()
        for number in range(len(chunks)):
            total.update((self.partial / f"digests-{number:05d}.bin").read_bytes())
        manifest = Manifest(
            vocab_size=encoder.vocab_size,
            token_bytes=2 if encoder.dtype.itemsize == 2 else 4,
            end_of_text_id=encoder.end_of_text_id,
            tokenizer_fingerprint=tokenizer.fingerprint,
            tokenizer_documents=tokenizer.num_documents,
            splits=splits,
            source={
                **self.source.describe(),
                "num_documents": num_documents,
                "num_empty_documents": sum(chunk.num_skipped for chunk in chunks),
                "text_bytes": sum(split.text_bytes for split in splits.values()),
                "sha256": total.hexdigest(),
            },
            config=identity(self.config),
            made_by={"tokenizers": importlib.metadata.version("tokenizers")},
        )
        for leftover in self.output.glob("*" + TEMPORARY_SUFFIX):
            leftover.unlink()
        write_atomic(self.output / FILES_NAME, to_json(self.source.signature()))
        write_atomic(self.output / MANIFEST_NAME, manifest.to_json())
        return manifest

    def _fail_empty(self, split: str, num_documents: int) -> NoReturn:
        seed = self._fitting_seed()
        discard(self.output)
        if not num_documents:
            raise UserError("the source holds no text: every document is empty, or there is none; check `source`")
        raise UserError(
            f"the {split} split would be empty: of {num_documents} documents, none fell into it with "
            f"validation_fraction {self.config.validation_fraction:g}. Whole documents are held out: give more of them "
            "(cut a long file, for example `split -C 100k book.txt part-`), or change validation_fraction"
            + ("" if seed is None else f", or take seed={seed}, which divides these documents into both splits")
        )

    def _fitting_seed(self) -> int | None:
        """The first of some seeds with which neither split of the documents read so far would be empty."""
        text = b"".join(path.read_bytes() for path in sorted(self.partial.glob("digests-*.bin")))
        digests = [text[at : at + DIGEST_BYTES] for at in range(0, len(text), DIGEST_BYTES)]
        if len(digests) > 1000:
            return None
        fraction = self.config.validation_fraction
        fits = (seed for seed in range(1000) if len({is_validation(d, seed, fraction) for d in digests}) == 2)
        return next(fits, None)


class _Meter:
    """Where the work stands, on the terminal."""

    def __init__(self, display: Progress, task: TaskID) -> None:
        self.display, self.task = display, task

    def stage(self, text: str) -> None:
        self.display.update(self.task, description=text)

    def advance(self, num_bytes: int) -> None:
        self.display.advance(self.task, num_bytes)


@contextmanager
def _progress(total_bytes: int | None, shown: bool) -> Iterator[_Meter]:
    text, bar, size = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    with Progress(text, bar, size, TransferSpeedColumn(), TimeElapsedColumn(), disable=not shown) as display:
        yield _Meter(display, display.add_task("preparing", total=total_bytes))

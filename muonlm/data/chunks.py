"""From documents to the pieces of a data set: the split, the tokenizer's training texts, chunks of packed tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from muonlm.config.data import PrepareConfig
from muonlm.config.errors import UserError
from muonlm.data.manifest import SPLITS, Record, ShardRecord, SplitName
from muonlm.data.sources import Document, TextSource
from muonlm.data.tokenizer import Encoder

BATCH_BYTES = 2_000_000
"""Text handed to the tokenizer at once; its results take some 75 bytes a token until they are packed."""


class TokenizerRecord(Record):
    """The finished tokenizer stage: the file's identity, and how far the source was read for it."""

    fingerprint: str
    end_of_text: str
    num_documents: int
    position: Any


class ChunkRecord(Record):
    """A finished chunk: its shards and where the source continues."""

    shards: dict[SplitName, ShardRecord]
    num_skipped: int
    position: Any


DIGEST_BYTES = hashlib.sha256().digest_size


def document_digest(text: str, origin: str) -> bytes:
    """sha256 of a document's UTF-8 bytes. Raises UserError for text that UTF-8 cannot hold."""
    try:
        return hashlib.sha256(text.encode("utf-8")).digest()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{origin} holds a lone surrogate ({text[error.start]!r} at character {error.start}), which is no text; "
            "mend or remove it"
        ) from error


def is_validation(digest: bytes, seed: int, fraction: float) -> bool:
    """Whether the document with this sha256 is held out: sha256(seed as 8 bytes + digest) < fraction of its range.

    Depends on nothing but the text and the seed, so equal documents are always on the same side."""
    hashed = hashlib.sha256(seed.to_bytes(8, "little") + digest).digest()
    return int.from_bytes(hashed[:8], "little") < fraction * 2**64


def has_text(text: str) -> bool:
    """False for an empty document, and for one of white space alone."""
    return bool(text) and not text.isspace()


class TrainingTexts:
    """The texts of the train split from the start of the source, `train_bytes` at most; iterated once."""

    def __init__(self, config: PrepareConfig, source: TextSource) -> None:
        self.config, self.source = config, source
        self.num_documents = self.num_seen = 0

    def __iter__(self) -> Iterator[str]:
        left = self.config.tokenizer.train_bytes
        self.source.seek(None)
        for text, origin in self.source:
            digest = document_digest(text, origin)
            if not has_text(text):
                continue
            self.num_seen += 1
            if not is_validation(digest, self.config.seed, self.config.validation_fraction):
                self.num_documents += 1
                raw = text.encode("utf-8")
                yield text if len(raw) <= left else raw[:left].decode("utf-8", errors="ignore")
                left -= len(raw)
                if left <= 0:
                    return


class Chunk:
    """The documents of one chunk: text only until a batch is full, then packed tokens."""

    def __init__(self, encoder: Encoder, config: PrepareConfig) -> None:
        self.encoder, self.config = encoder, config
        self.tokens: dict[SplitName, list[np.ndarray]] = {split: [] for split in SPLITS}
        self.split_bytes: dict[SplitName, int] = dict.fromkeys(SPLITS, 0)
        self.digests = bytearray()
        self.text_bytes = self.num_skipped = 0
        self._texts: list[str] = []
        self._splits: list[SplitName] = []
        self._waiting = 0

    def add(self, document: Document) -> int:
        """Takes one document; returns its size in bytes. Empty ones are counted and left out."""
        if not has_text(document.text):
            self.num_skipped += 1
            return 0
        digest = document_digest(*document)
        held_out = is_validation(digest, self.config.seed, self.config.validation_fraction)
        split: SplitName = "validation" if held_out else "train"
        size = len(document.text.encode("utf-8"))
        self.digests += digest
        self.text_bytes += size
        self.split_bytes[split] += size
        self._texts.append(document.text)
        self._splits.append(split)
        self._waiting += size
        if self._waiting >= BATCH_BYTES:
            self.flush()
        return size

    def flush(self) -> None:
        """Tokenizes the texts that wait."""
        for split, tokens in zip(self._splits, self.encoder.encode(self._texts), strict=True):
            self.tokens[split].append(tokens)
        self._texts, self._splits, self._waiting = [], [], 0

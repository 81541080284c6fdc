"""The token shard file: header, tokens, document index. Little-endian; docs/data.md gives the bytes.

0    8  magic b"MUONTOKS"
8    4  format version (1)
12   4  bytes per token (2: uint16, 4: uint32)
16   8  number of tokens
24   8  number of documents
32   8  bytes of the text (UTF-8) that the tokens encode
40   8  vocabulary size
48  32  tokenizer fingerprint (sha256)
80  32  sha256 of everything after the header
112 16  zero
128     tokens, padded with zero bytes to a multiple of 8, then one uint64 a document: index of its first token
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from muonlm.config.errors import UserError

MAGIC = b"MUONTOKS"
FORMAT_VERSION = 1
HEADER = struct.Struct("<8sIIQQQQ32s32s16x")
TEMPORARY_SUFFIX = ".tmp"
assert HEADER.size == 128


@dataclass(frozen=True)
class ShardHeader:
    """The fields of a shard's first 128 bytes; digests in hex."""

    token_bytes: int
    num_tokens: int
    num_documents: int
    text_bytes: int
    vocab_size: int
    tokenizer_fingerprint: str
    sha256: str

    @property
    def dtype(self) -> np.dtype:
        """uint16 or uint32, little-endian."""
        return np.dtype(f"<u{self.token_bytes}")

    @property
    def index_offset(self) -> int:
        """Byte at which the document index begins."""
        return HEADER.size + -(-self.num_tokens * self.token_bytes // 8) * 8

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return self.index_offset + 8 * self.num_documents


def write_shard(
    path: Path, documents: list[np.ndarray], *, text_bytes: int, vocab_size: int, tokenizer_fingerprint: str
) -> ShardHeader:
    """Writes token arrays (all of one dtype, uint16 or uint32), one a document, as one shard, atomically."""
    tokens = np.concatenate(documents)
    starts = np.cumsum([0, *(len(document) for document in documents[:-1])], dtype="<u8")
    padding = bytes(-tokens.nbytes % 8)
    payload = b"".join((tokens.tobytes(), padding, starts.tobytes()))
    digest = hashlib.sha256(payload)
    header = ShardHeader(
        tokens.itemsize,
        len(tokens),
        len(documents),
        text_bytes,
        vocab_size,
        tokenizer_fingerprint,
        digest.hexdigest(),
    )
    packed = HEADER.pack(
        MAGIC,
        FORMAT_VERSION,
        header.token_bytes,
        header.num_tokens,
        header.num_documents,
        text_bytes,
        vocab_size,
        bytes.fromhex(tokenizer_fingerprint),
        digest.digest(),
    )
    write_atomic(path, packed + payload)
    return header


def read_header(path: Path) -> ShardHeader:
    """The header of a shard. Raises UserError when the file is missing, no shard, or of another format version."""
    try:
        with path.open("rb") as file:
            raw = file.read(HEADER.size)
    except OSError as error:
        raise UserError(f"cannot read token shard {path}: {error.strerror}; {repair(path.parent)}") from error
    if len(raw) < HEADER.size:
        raise UserError(
            f"token shard {path} is truncated: expected a header of {HEADER.size} bytes, found {len(raw)} bytes; "
            f"{repair(path.parent)}"
        )
    magic, version, token_bytes, tokens, documents, text_bytes, vocab_size, tokenizer, digest = HEADER.unpack(raw)
    if magic != MAGIC or token_bytes not in (2, 4):
        raise UserError(f"{path} is not a token shard: it begins with {raw[:16]!r}; {repair(path.parent)}")
    if version != FORMAT_VERSION:
        raise UserError(
            f"token shard {path} has format version {version}, this muonlm reads version {FORMAT_VERSION}; "
            f"{repair(path.parent)}"
        )
    return ShardHeader(token_bytes, tokens, documents, text_bytes, vocab_size, tokenizer.hex(), digest.hex())


def map_tokens(path: Path, header: ShardHeader) -> np.ndarray:
    """The tokens of a shard as a read-only memory-mapped array of `header.dtype`, shape (num_tokens,)."""
    mapped = np.memmap(path, dtype=header.dtype, mode="r", offset=HEADER.size, shape=(header.num_tokens,))
    return mapped.view(np.ndarray)  # slices of a plain view cost a tenth of those of a memmap


def map_document_starts(path: Path, header: ShardHeader) -> np.ndarray:
    """Index of each document's first token within the shard: read-only memory-mapped uint64, shape (num_documents,)."""
    return np.memmap(path, dtype="<u8", mode="r", offset=header.index_offset, shape=(header.num_documents,))


def payload_sha256(path: Path) -> str:
    """sha256 (hex) of all bytes after the header, read in constant memory."""
    with path.open("rb") as file:
        file.seek(HEADER.size)
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file so that after a crash at any point it is either absent (or as it was) or complete.

    Raises UserError when the disk is full or the directory cannot be written.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            raise UserError(
                f"disk full: writing {path} needs {len(content):,} bytes and {free:,} are free; make room and repeat "
                "the same command, which goes on after the last finished chunk"
            ) from error
        raise UserError(f"cannot write {path}: {error.strerror}; make it writable or change `output`") from error


def repair(directory: Path) -> str:
    """What to do about a damaged data set."""
    return f"remove {directory} and run `muonlm data prepare` again, or copy the file anew"

"""Reading prepared data: checked opening of a split, fixed-length sequences out of memory-mapped shards, summaries."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

from muonlm.config.errors import UserError
from muonlm.data.manifest import MANIFEST_NAME, TOKENIZER_NAME, Manifest, ShardRecord, SplitRecord, read_manifest
from muonlm.data.shards import ShardHeader, map_tokens, payload_sha256, read_header, repair
from muonlm.data.tokenizer import fingerprint

AUTO_VERIFY_BYTES = 1 << 30


class TokenDataset:
    """One split as the concatenation of its shards, cut into sequences of `seq_len` inputs and their targets.

    Sequence i is tokens [i*T, i*T + T + 1) with T = seq_len: neighbours share one token, so every token but the first
    is a target once. Sequences may cross documents and shards. Tokens stay on disk until they are asked for.
    """

    def __init__(self, manifest: Manifest, split: SplitRecord, shards: list[np.ndarray], seq_len: int) -> None:
        self.seq_len = seq_len
        self.num_tokens = split.num_tokens
        self.num_documents = split.num_documents
        self.text_bytes = split.text_bytes
        self.bytes_per_token = split.bytes_per_token
        self.vocab_size = manifest.vocab_size
        self.end_of_text_id = manifest.end_of_text_id
        self.tokenizer_fingerprint = manifest.tokenizer_fingerprint
        self.fingerprint = hashlib.sha256("".join(shard.sha256 for shard in split.shards).encode()).hexdigest()
        self.num_sequences = (split.num_tokens - 1) // seq_len
        self._shards = shards
        self._starts = np.cumsum([0, *(len(shard) for shard in shards)])

    def sequences(self, indices: np.ndarray) -> np.ndarray:
        """Sequences by index: int64 (N,) in [0, num_sequences) -> int64 (N, seq_len + 1). Raises IndexError outside."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.num_sequences:
            raise IndexError(f"sequence index outside [0, {self.num_sequences}): {indices.min()}..{indices.max()}")
        first = indices * self.seq_len
        shard_of = np.searchsorted(self._starts, first, side="right") - 1
        out = np.empty((len(indices), self.seq_len + 1), dtype=np.int64)
        for row, start, number in zip(out, (first - self._starts[shard_of]).tolist(), shard_of.tolist(), strict=True):
            shard, filled = self._shards[number], 0
            while len(shard) - start < len(row) - filled:
                row[filled : filled + len(shard) - start] = shard[start:]
                filled += len(shard) - start
                number, start = number + 1, 0
                shard = self._shards[number]
            row[filled:] = shard[start : start + len(row) - filled]
        return out


def open_split(
    path: str | Path,
    split: Literal["train", "validation"],
    seq_len: int,
    verify: Literal["auto", "always", "never"] = "auto",
) -> TokenDataset:
    """Opens a split for sequences of `seq_len` tokens.

    Always checks headers, file sizes and that every shard was written by the data set's tokenizer; `verify` says
    whether the checksums are computed too (auto: when the split has at most 1 GiB). Raises UserError that names the
    file, what was expected and found, and the remedy; also when the split is shorter than one sequence.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    record = manifest.splits[split]
    total = sum(shard.file_bytes for shard in record.shards)
    checksum = verify == "always" or (verify == "auto" and total <= AUTO_VERIFY_BYTES)
    _check_tokenizer(directory, manifest)
    headers = [_check_shard(directory, manifest, shard, checksum) for shard in record.shards]
    if record.num_tokens < seq_len + 1:
        raise UserError(
            f"sequence longer than the data: data.seq_len {seq_len} needs {seq_len + 1} tokens, the {split} split of "
            f"{directory} has {record.num_tokens}; lower data.seq_len below that or prepare more text"
        )
    files = [directory / shard.file for shard in record.shards]
    shards = [map_tokens(file, header) for file, header in zip(files, headers, strict=True)]
    return TokenDataset(manifest, record, shards, seq_len)


def describe(path: str | Path) -> dict[str, Any]:
    """Summary of a prepared data set from its manifest: vocabulary, tokenizer, source, and per split the counts."""
    directory = Path(path)
    manifest = read_manifest(directory)
    return {
        "path": str(directory),
        "vocab_size": manifest.vocab_size,
        "token_bytes": manifest.token_bytes,
        "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
        "source": manifest.source,
        "splits": {
            name: {
                "tokens": split.num_tokens,
                "documents": split.num_documents,
                "text_bytes": split.text_bytes,
                "bytes_per_token": split.bytes_per_token,
                "shards": len(split.shards),
                "file_bytes": sum(shard.file_bytes for shard in split.shards),
            }
            for name, split in manifest.splits.items()
        },
    }


def verify(path: str | Path) -> dict[str, int]:
    """Checks tokenizer, headers, sizes and checksums of every shard; returns the number of shards and bytes checked.

    Raises one UserError that lists every damaged file.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    errors: list[str] = []
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    try:
        _check_tokenizer(directory, manifest)
    except UserError as error:
        errors.append(str(error))
    for shard in shards:
        try:
            _check_shard(directory, manifest, shard, checksum=True)
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise UserError("\n".join(errors))
    return {"shards": len(shards), "file_bytes": sum(shard.file_bytes for shard in shards)}


def _check_tokenizer(directory: Path, manifest: Manifest) -> None:
    file = directory / TOKENIZER_NAME
    if not file.is_file():
        raise UserError(f"{file} is missing, so the tokens have no meaning; {repair(directory)}")
    try:
        found = fingerprint(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); {repair(directory)}") from error
    if found != manifest.tokenizer_fingerprint:
        raise UserError(
            f"{file} is not the tokenizer that wrote these shards: fingerprint {found[:12]}, the manifest has "
            f"{manifest.tokenizer_fingerprint[:12]}; {repair(directory)}"
        )


def _check_shard(directory: Path, manifest: Manifest, shard: ShardRecord, checksum: bool) -> ShardHeader:
    file = directory / shard.file
    header = read_header(file)
    if header.tokenizer_fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(
            f"token shard {file} was written by another tokenizer: fingerprint {header.tokenizer_fingerprint[:12]}, "
            f"the data set has {manifest.tokenizer_fingerprint[:12]}; {repair(directory)}"
        )
    size = file.stat().st_size
    if size != shard.file_bytes:
        state = "truncated" if size < shard.file_bytes else "too long"
        raise UserError(
            f"token shard {file} is {state}: expected {shard.file_bytes} bytes, found {size} bytes; {repair(directory)}"
        )
    expected = ShardHeader(
        manifest.token_bytes,
        shard.num_tokens,
        shard.num_documents,
        shard.text_bytes,
        manifest.vocab_size,
        manifest.tokenizer_fingerprint,
        shard.sha256,
    )
    if header != expected:
        raise UserError(
            f"the header of token shard {file} disagrees with {MANIFEST_NAME}: expected {expected}, found {header}; "
            f"{repair(directory)}"
        )
    if checksum and (found := payload_sha256(file)) != shard.sha256:
        raise UserError(
            f"token shard {file} is damaged: checksum {found[:12]} of its content, {shard.sha256[:12]} expected; "
            f"{repair(directory)}"
        )
    return header

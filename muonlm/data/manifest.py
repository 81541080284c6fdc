"""`manifest.json`: the table of contents of a prepared data set. Written last, so that its presence means finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from muonlm.config.errors import UserError
from muonlm.config.load import available
from muonlm.data.shards import ShardHeader, repair

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")


class Record(BaseModel):
    """A frozen piece of a manifest or of the progress of `prepare`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> bytes:
        """Indented UTF-8 JSON; equal records give equal bytes."""
        return (self.model_dump_json(indent=2) + "\n").encode("utf-8")


class ShardRecord(Record):
    """One shard file."""

    file: str
    num_tokens: int
    num_documents: int
    text_bytes: int
    file_bytes: int
    sha256: str

    @classmethod
    def of(cls, file: str, header: ShardHeader) -> ShardRecord:
        """The record of the shard with this header."""
        return cls(
            file=file,
            num_tokens=header.num_tokens,
            num_documents=header.num_documents,
            text_bytes=header.text_bytes,
            file_bytes=header.file_bytes,
            sha256=header.sha256,
        )


class SplitRecord(Record):
    """The shards of one split, in order, and their sums."""

    num_tokens: int
    num_documents: int
    text_bytes: int
    shards: list[ShardRecord]

    @classmethod
    def of(cls, shards: list[ShardRecord]) -> SplitRecord:
        """The split that these shards make up."""
        return cls(
            num_tokens=sum(shard.num_tokens for shard in shards),
            num_documents=sum(shard.num_documents for shard in shards),
            text_bytes=sum(shard.text_bytes for shard in shards),
            shards=shards,
        )

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, end-of-text tokens counted as tokens of no bytes."""
        return self.text_bytes / self.num_tokens


class Manifest(Record):
    """A whole prepared data set. `source.sha256` is the sha256 of the documents' sha256 digests in order."""

    format_version: Literal[1] = 1
    vocab_size: int
    token_bytes: Literal[2, 4]
    end_of_text_id: int
    tokenizer_fingerprint: str
    tokenizer_documents: int
    splits: dict[SplitName, SplitRecord]
    source: dict[str, Any]
    config: dict[str, Any]
    made_by: dict[str, str]


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a prepared data set. Raises UserError when there is none or it cannot be read."""
    path = directory / MANIFEST_NAME
    if not path.is_file():
        missing = f"has no {MANIFEST_NAME}: nothing was prepared there, or not to the end"
        state = missing if directory.exists() else "does not exist"
        known = available("data")
        is_known = directory.name in known
        name = directory.name if is_known else "CONFIG"
        what = "" if is_known else f"; CONFIG is one of {', '.join(sorted(known))}, or a TOML file of yours"
        raise UserError(
            f"data directory {directory} {state}; run `muonlm data prepare {name} output={directory}` first, or "
            f"correct data.path{what}"
        )
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = f"{path} is damaged or of another version ({where}: {first['msg']})"
        raise UserError(f"{what}; {repair(directory)}") from error

"""The output directory of `prepare`: who may write it, what it was prepared from, whether it is finished."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from muonlm.config.data import PrepareConfig
from muonlm.config.errors import UserError
from muonlm.data.chunks import document_digest
from muonlm.data.manifest import TOKENIZER_NAME, Manifest, read_manifest
from muonlm.data.shards import TEMPORARY_SUFFIX, repair, write_atomic
from muonlm.data.sources import TextSource
from muonlm.data.tokenizer import fingerprint, load_existing

PARTIAL_NAME = ".partial"
STARTED_NAME = "started.json"
FILES_NAME = "source_files.json"


def finished(config: PrepareConfig, source: TextSource, output: Path) -> Manifest:
    """The manifest there, after checking that it is of this configuration and text and its files are whole."""
    manifest = read_manifest(output)
    check_same(manifest.config, identity(config), output, "a data set")
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        path = output / shard.file
        if not path.is_file() or path.stat().st_size != shard.file_bytes:
            raise UserError(f"{path} is missing or not {shard.file_bytes:,} bytes long; {repair(output)}")
    _check_existing_tokenizer(config, manifest, output)
    stats = output / FILES_NAME
    files = source.signature()
    if stats.is_file() and json.loads(stats.read_bytes()) == files:
        return manifest
    # Names, sizes or times differ, as after a copy; only the text itself counts.
    source.seek(None)
    total = hashlib.sha256()
    for document in source:
        if document.text:
            total.update(document_digest(*document))
    if total.hexdigest() != manifest.source["sha256"]:
        raise UserError(
            f"{output} was prepared from other text (sha256 {manifest.source['sha256'][:12]}, the source now has "
            f"{total.hexdigest()[:12]}); remove {output} to prepare it anew, or choose another `output`"
        )
    write_atomic(stats, to_json(files))
    return manifest


def _check_existing_tokenizer(config: PrepareConfig, manifest: Manifest, output: Path) -> None:
    existing = config.tokenizer.existing
    if existing is None or not Path(existing).expanduser().exists():
        return  # a hub name stands for what was loaded then; there may be no network now
    found = fingerprint(load_existing(config.tokenizer)[0].to_str())
    if found != manifest.tokenizer_fingerprint:
        raise UserError(
            f"{output} was prepared when {existing} was another tokenizer (fingerprint "
            f"{manifest.tokenizer_fingerprint[:12]}, now {found[:12]}); remove {output} or choose another `output`"
        )


def identity(config: PrepareConfig) -> dict[str, Any]:
    """The part of the configuration that decides the bytes written."""
    return config.model_dump(mode="json", exclude={"output", "workers"})


def check_same(before: dict[str, Any], now: dict[str, Any], output: Path, what: str) -> None:
    """Raise UserError that lists every key of `what` in which `now` differs from what made `output` before."""
    old, new = _flat(before), _flat(now)
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        table = "\n".join(f"  {key}: {old.get(key)!r} there, {new.get(key)!r} asked for" for key in changed)
        raise UserError(
            f"{output} holds {what} of another configuration:\n{table}\n"
            f"choose another `output`, restore these values, or remove {output} to prepare it anew"
        )


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def discard(output: Path) -> None:
    """Removes what an unfinished prepare wrote. `.partial` without its `started.json` marks it until the end, so that a
    kill in between leaves nothing that could be taken for finished work."""
    (output / PARTIAL_NAME / STARTED_NAME).unlink(missing_ok=True)
    for path in [*output.glob("*.bin"), *output.glob("*" + TEMPORARY_SUFFIX), output / TOKENIZER_NAME]:
        path.unlink(missing_ok=True)
    shutil.rmtree(output / PARTIAL_NAME, ignore_errors=True)


def to_json(value: Any) -> bytes:
    """Indented UTF-8 JSON with a last newline."""
    return (json.dumps(value, indent=1) + "\n").encode("utf-8")


@contextmanager
def exclusive(output: Path) -> Iterator[None]:
    """Creates the directory and holds a lock on it that the system drops with the process."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        handle = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot write output directory {output}: {error.strerror}; change `output`") from error
    try:
        # Some network file systems cannot lock directories; there the atomic writes alone must do.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)

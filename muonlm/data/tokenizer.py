"""Tokenizers: a byte-level BPE trained here, or an existing `tokenizer.json`; fingerprint and batched encoding."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from muonlm.config.data import TokenizerConfig
from muonlm.config.errors import UserError

END_OF_TEXT = "<|endoftext|>"
KNOWN_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
PIECE_CHARS = 1 << 17
GROUP_CHARS = 16 * PIECE_CHARS
# The byte-level pre-tokenizer ends a token before every newline that follows a character that is no blank. A cut after
# newlines would not do: of several blanks in a row the last is a token of its own only when text follows.
_CUT = re.compile(r"(?<=\S)(?=\n)")


def set_threads(workers: int) -> None:
    """Bounds the threads of `tokenizers` (0: one per core). Counts only before the first text it sees in a process."""
    if workers:
        os.environ["RAYON_NUM_THREADS"] = str(workers)
    # Said outright, because `tokenizers` otherwise turns itself serial, with a warning, in a process that forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (GPT-2's pre-tokenization, every byte in the alphabet, so no text is unknown) with
    `<|endoftext|>` as id 0. The same texts give the same tokenizer. The vocabulary is smaller than `vocab_size`
    when the text has no more pairs to merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    return tokenizer


def load_existing(config: TokenizerConfig) -> tuple[Tokenizer, str]:
    """An existing tokenizer and its end-of-text token; from a file, a directory or the hub.

    The end-of-text token is `end_of_text` of the config, else `eos_token` of a `tokenizer_config.json` beside the
    tokenizer, else the first of KNOWN_END_TOKENS that it has. Raises UserError when one of them cannot be found.
    """
    assert config.existing is not None
    file, settings = _locate(config.existing)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # `tokenizers` raises plain Exception
        raise UserError(f"{file} is not a tokenizer.json that `tokenizers` can read: {error}") from error
    declared = json.loads(settings.read_text("utf-8")).get("eos_token") if settings else None
    declared = declared["content"] if isinstance(declared, dict) else declared
    candidates = [config.end_of_text] if config.end_of_text else [declared, *KNOWN_END_TOKENS]
    for token in candidates:
        if token and tokenizer.token_to_id(token) is not None:
            return tokenizer, token
    raise UserError(
        f"tokenizer {config.existing!r} has no end-of-text token (looked for {', '.join(t for t in candidates if t)}); "
        "set tokenizer.end_of_text to the token of its vocabulary that ends a document"
    )


def _locate(existing: str) -> tuple[Path, Path | None]:
    path = Path(existing).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        settings = file.with_name("tokenizer_config.json")
        return file, settings if settings.is_file() else None
    if path.exists() or existing.endswith(".json") or existing.startswith((".", "/", "~")):
        raise UserError(f"tokenizer.existing: there is no file {file}; give a tokenizer.json or its directory")
    from huggingface_hub import hf_hub_download

    try:
        file = Path(hf_hub_download(existing, "tokenizer.json"))
    except Exception as error:  # network, authorisation and name errors share no base class
        raise UserError(
            f"tokenizer.existing: {existing!r} is no local file and cannot be loaded from the hub: {error}. Without "
            "a network give the path of a tokenizer.json, or leave tokenizer.existing unset to train one"
        ) from error
    try:
        return file, Path(hf_hub_download(existing, "tokenizer_config.json"))
    except Exception:  # optional: not every repository has one
        return file, None


def fingerprint(tokenizer_json: str) -> str:
    """sha256 (hex) of a tokenizer.json's content with sorted keys and no blanks: layout does not change it."""
    canonical = json.dumps(json.loads(tokenizer_json), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def pieces(text: str) -> Iterator[str]:
    """`text` in parts of about PIECE_CHARS, cut only where the byte-level pre-tokenizer cuts in any case."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        cut = _CUT.search(text, start + PIECE_CHARS)
        if cut is None:
            break
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


class Encoder:
    """Text to token ids, every document ended by the end-of-text token; on the threads of `tokenizers`."""

    def __init__(self, tokenizer: Tokenizer, end_of_text: str) -> None:
        # A saved tokenizer may carry truncation or padding, which would drop text or add tokens without a word.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # The characters "<|endoftext|>" inside a document are text; only the pipeline writes the real token.
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        end_of_text_id = tokenizer.token_to_id(end_of_text)
        assert end_of_text_id is not None, end_of_text
        self.end_of_text_id = end_of_text_id
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")
        # Only our own pre-tokenizer is known to allow cuts; others see whole documents.
        self._may_cut = tokenizer.normalizer is None and _is_plain_byte_level(tokenizer)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """One array of `dtype` per text, end-of-text included."""
        parts = [list(pieces(text)) if self._may_cut else [text] for text in texts]
        ids = self._ids([part for document in parts for part in document])
        end = np.array([self.end_of_text_id], dtype=self.dtype)
        return [np.concatenate([*islice(ids, len(document)), end]) for document in parts]

    def _ids(self, parts: list[str]) -> Iterator[np.ndarray]:
        """Ids of each part; packed every few MB, because an unpacked result takes some 75 bytes a token."""
        start, size = 0, 0
        for number, part in enumerate(parts, 1):
            size += len(part)
            if size >= GROUP_CHARS or number == len(parts):
                encoded = self.tokenizer.encode_batch_fast(parts[start:number], add_special_tokens=False)
                yield from [np.array(one.ids, dtype=self.dtype) for one in encoded]
                start, size = number, 0


def _is_plain_byte_level(tokenizer: Tokenizer) -> bool:
    state: dict[str, Any] = json.loads(tokenizer.to_str())["pre_tokenizer"] or {}
    return state.get("type") == "ByteLevel" and state.get("use_regex") is True and not state.get("add_prefix_space")

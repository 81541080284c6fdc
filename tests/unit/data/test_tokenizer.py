"""The tokenizer: lossless, reproducible, blind to special tokens in text, equal in pieces and whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from muonlm.config.data import TokenizerConfig
from muonlm.config.errors import UserError
from muonlm.data import tokenizer as module
from muonlm.data.tokenizer import END_OF_TEXT, Encoder, fingerprint, load_existing, pieces, train_bpe


@pytest.fixture(scope="module")
def trained(texts: list[str]) -> Tokenizer:
    return train_bpe(texts[:20], 500)


@pytest.fixture
def encoder(trained: Tokenizer) -> Encoder:
    return Encoder(Tokenizer.from_str(trained.to_str()), END_OF_TEXT)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_survives(text: str, trained: Tokenizer) -> None:
    ids = Encoder(trained, END_OF_TEXT).encode([text])[0].tolist()
    assert ids[-1] == 0
    assert 0 not in ids[:-1]
    assert trained.decode(ids[:-1], skip_special_tokens=False) == text


def test_end_of_text_inside_a_document_is_text(encoder: Encoder) -> None:
    ids = encoder.encode(["a <|endoftext|> b"])[0].tolist()
    assert ids.count(encoder.end_of_text_id) == 1
    assert encoder.tokenizer.decode(ids) == "a <|endoftext|> b"


def test_vocabulary_and_dtype(encoder: Encoder, texts: list[str]) -> None:
    assert encoder.vocab_size == 500
    arrays = encoder.encode(texts[:3])
    assert {array.dtype.str for array in arrays} == {"<u2"}
    assert max(array.max() for array in arrays) < 500


def test_training_is_reproducible_in_another_process(books: Path, texts: list[str], trained: Tokenizer) -> None:
    code = (
        "from pathlib import Path; from muonlm.data.tokenizer import *\n"
        f"files = sorted(Path({str(books)!r}).glob('*.txt'))[:20]\n"
        "print(fingerprint(train_bpe([f.read_text('utf-8') for f in files], 500).to_str()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == fingerprint(trained.to_str())


def test_fingerprint_sees_content_and_not_layout(trained: Tokenizer) -> None:
    content = json.loads(trained.to_str())
    assert fingerprint(json.dumps(content, indent=7)) == fingerprint(trained.to_str(pretty=True))
    content["model"]["merges"][:2] = reversed(content["model"]["merges"][:2])
    assert fingerprint(json.dumps(content)) != fingerprint(trained.to_str())


def test_pieces_give_the_tokens_of_the_whole(
    encoder: Encoder, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tricky = "a\n\n\n  b\n\tc \n d\n漢\nq\n\r\n x\ny\n\n" * 40
    documents = [*texts[:6], tricky]
    monkeypatch.setattr(module, "PIECE_CHARS", 50)
    monkeypatch.setattr(module, "GROUP_CHARS", 300)
    cut = encoder.encode(documents)
    assert sum(len(list(pieces(document))) for document in documents) > 200
    assert ["".join(pieces(document)) for document in documents] == documents
    whole = [encoder.tokenizer.encode(document, add_special_tokens=False).ids for document in documents]
    assert [array.tolist()[:-1] for array in cut] == whole


def test_existing_is_found_as_file_and_directory(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(str(tmp_path / "tokenizer.json"))
    for existing in (tmp_path, tmp_path / "tokenizer.json"):
        loaded, end = load_existing(TokenizerConfig(existing=str(existing)))
        assert (fingerprint(loaded.to_str()), end) == (fingerprint(trained.to_str()), END_OF_TEXT)


def test_existing_truncation_and_padding_do_not_touch_the_text(trained: Tokenizer, texts: list[str]) -> None:
    limited = Tokenizer.from_str(trained.to_str())
    limited.enable_truncation(10)
    limited.enable_padding(length=100_000)
    found = Encoder(limited, END_OF_TEXT).encode(texts[:2])
    assert [len(array) for array in found] == [len(array) for array in Encoder(trained, END_OF_TEXT).encode(texts[:2])]


def test_end_token_of_existing(trained: Tokenizer, tmp_path: Path) -> None:
    other = Tokenizer.from_str(trained.to_str())
    other.add_special_tokens(["<stop>"])
    other.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    assert load_existing(TokenizerConfig(existing=str(tmp_path)))[1] == "<stop>"
    chosen = TokenizerConfig(existing=str(tmp_path), end_of_text=END_OF_TEXT)
    assert load_existing(chosen)[1] == END_OF_TEXT
    with pytest.raises(UserError, match=r"no end-of-text token \(looked for <no>\)"):
        load_existing(TokenizerConfig(existing=str(tmp_path), end_of_text="<no>"))


def test_existing_that_is_not_there_or_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="there is no file"):
        load_existing(TokenizerConfig(existing=str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        load_existing(TokenizerConfig(existing=str(tmp_path)))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot be loaded from the hub"):
        load_existing(TokenizerConfig(existing="someone/something"))

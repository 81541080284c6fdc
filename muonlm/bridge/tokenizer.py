"""The tokenizer of prepared data as transformers' AutoTokenizer reads it, and whether another one is the same."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from muonlm.config.errors import UserError
from muonlm.data.manifest import TOKENIZER_NAME, read_manifest

# What does not decide which ids a text has when no token is added to it, as in training.
_AROUND = ("truncation", "padding", "post_processor", "version")
_log = logging.getLogger(__name__)


def tokenizer_files(data: str | Path, max_seq_len: int) -> tuple[dict[str, str], int]:
    """Content of tokenizer.json and tokenizer_config.json for the tokenizer of the prepared data, and its end id.

    They encode a text as training saw it: without truncation, and without any token added at its begin or end.
    Raises UserError where there is no data.
    """
    manifest = read_manifest(Path(data))
    state = json.loads((Path(data) / TOKENIZER_NAME).read_text(encoding="utf-8"))
    state |= {"truncation": None, "padding": None, "post_processor": None}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    end_of_text = tokenizer.id_to_token(manifest.end_of_text_id)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_of_text,
        # For batches: models of one direction take no notice of what is masked.
        "pad_token": end_of_text,
        "padding_side": "left",
        "bos_token": None,
        "unk_token": None,
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    texts = {TOKENIZER_NAME: tokenizer.to_str(pretty=True), "tokenizer_config.json": json.dumps(config, indent=2)}
    return texts, manifest.end_of_text_id


def check_same_tokenizer(directory: str | Path, data: str | Path) -> None:
    """Raise UserError unless the tokenizer beside a pretrained model gives texts the ids that they have in `data`.

    Where the model has no tokenizer.json, this says so in the log and checks nothing: vocabularies are compared where
    the model is loaded.
    """
    file = Path(directory) / TOKENIZER_NAME
    if not file.is_file():
        _log.warning(
            "%s has no %s: whether %s was prepared with its tokenizer is not known", directory, file.name, data
        )
        return
    ours, theirs = _ids_of(Path(data) / TOKENIZER_NAME), _ids_of(file)
    if different := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
        sizes = " and ".join(f"{len(state['model'].get('vocab', ()))}" for state in (ours, theirs))
        raise UserError(
            f"data.path {data} was prepared with another tokenizer than that of {directory} (they differ in "
            f"{', '.join(different)}; vocabularies of {sizes}): the model would read other words. Prepare the data "
            f"anew with `muonlm data prepare ... tokenizer.existing={directory}`"
        )


def _ids_of(file: Path) -> dict[str, Any]:
    """The parts of a tokenizer.json that decide about ids, in the one spelling of the installed `tokenizers`."""
    try:
        state = json.loads(Tokenizer.from_file(str(file)).to_str())
    except Exception as error:  # `tokenizers` raises plain Exception
        raise UserError(f"{file} is not a tokenizer.json that `tokenizers` can read: {error}") from error
    return {key: value for key, value in state.items() if key not in _AROUND}

"""Bad input to `muonlm train`: exit code 2 and one clear message, before anything is trained."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muonlm.cli.main import main
from muonlm.config.data import PrepareConfig
from muonlm.data.prepare import prepare


@pytest.fixture
def data(stdlib_data: Path, tmp_path: Path) -> Path:
    """A copy of the prepared text that a test may damage."""
    return Path(shutil.copytree(stdlib_data, tmp_path / "data"))


def refuses(capsys: pytest.CaptureFixture[str], words: list[str], *expected: str) -> str:
    """Run the command; it must exit with 2 and say `expected`, without a traceback."""
    assert main(words) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for text in expected:
        assert text in message, message
    return message


def train(data: Path | str, run_dir: Path, *changes: str) -> list[str]:
    return ["train", "smoke", f"data.path={data}", f"run_dir={run_dir}", "track.console=false", *changes]


def truncate(data: Path) -> None:
    shard = next(data.glob("train*.bin"))
    shard.write_bytes(shard.read_bytes()[:-7])


def flip_a_byte(data: Path) -> None:
    shard = next(data.glob("train*.bin"))
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 1
    shard.write_bytes(content)


def swap_tokenizer(data: Path) -> None:
    tokenizer = json.loads((data / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (data / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, ["train-", ".bin", "bytes", "muonlm data prepare"]),
        (flip_a_byte, ["train-", ".bin", "checksum"]),
        (swap_tokenizer, ["tokenizer"]),
        (lambda data: (data / "manifest.json").unlink(), ["manifest.json"]),
        (lambda data: shutil.rmtree(data), ["does not exist", "muonlm data prepare"]),
    ],
    ids=["truncated", "flipped", "other-tokenizer", "no-manifest", "missing"],
)
def test_damaged_data(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], said: list[str]
) -> None:
    damage(data)
    refuses(capsys, train(data, tmp_path / "run", "data.prepare="), *said)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_shard_of_another_tokenizer(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(str(path) for path in (Path(__file__).parents[2] / "muonlm").rglob("*.py"))
    other = tmp_path / "other"
    source = {"kind": "text", "files": files}
    config = {"source": source, "output": str(other), "tokenizer": {"vocab_size": 300}, "validation_fraction": 0.3}
    prepare(PrepareConfig.model_validate(config), progress=False)
    first, theirs = sorted(data.glob("train*.bin"))[0], sorted(other.glob("train*.bin"))[0]
    shutil.copy(theirs, first)
    refuses(capsys, train(data, tmp_path / "run"), first.name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["optim.momentun=0.9"], ["command line", "optim.momentun", "momentum"]),
        (["optim.lr=fast", "loop.batch_size=-1"], ["optim.lr", "loop.batch_size", "-1"]),
        (["loop.steps=0"], ["loop.steps"]),
        (["optim.kind=sgd"], ["sgd", "muon", "adamw"]),
        (["model.num_heads=5"], ["num_heads", "64"]),
        (["data.seq_len=10000000"], ["10000000"]),
        (["model.vocab_size=300"], ["vocab_size", "300", "512"]),
        (["loop.micro_batch_size=3"], ["loop.batch_size 8", "3"]),
        (["schedule.warmup_steps=31"], ["warmup_steps", "30"]),
        (["track.reference=nowhere"], ["nowhere"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else "",
)
def test_values_that_do_not_fit(
    stdlib_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], said: list[str]
) -> None:
    refuses(capsys, train(stdlib_data, tmp_path / "run", *changes), *said)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_missing_config_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    refuses(capsys, ["train", "smok"], "smok", "smoke")
    refuses(capsys, ["train", "nowhere/x.toml"], "nowhere/x.toml")


def test_run_directory_that_cannot_be_written(
    stdlib_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a directory")
    refuses(capsys, train(stdlib_data, tmp_path / "file" / "run"), "run directory", "run_dir")


def test_run_directory_of_another_config(stdlib_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ("loop.steps=5", "eval.interval_steps=0", "eval.final_tokens=64")
    assert main(train(stdlib_data, tmp_path / "run", *short)) == 0
    capsys.readouterr()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    refuses(
        capsys,
        train(stdlib_data, tmp_path / "run", *short, "optim.lr=0.5"),
        *("another configuration", "optim.lr: 0.004 -> 0.5", "--fresh"),
    )
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def finished_run(stdlib_data: Path, tmp_path: Path) -> list[str]:
    words = train(stdlib_data, tmp_path / "run", "loop.steps=5", "eval.interval_steps=0", "eval.final_tokens=64")
    assert main(words) == 0
    return words


def test_state_without_a_config_belongs_to_nobody(
    stdlib_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = finished_run(stdlib_data, tmp_path)
    (tmp_path / "run" / "config.toml").unlink()
    capsys.readouterr()
    refuses(capsys, words, "no config.toml", "checkpoints")
    refuses(capsys, [*words, "--fresh"], "--fresh would remove", "checkpoints")
    assert (tmp_path / "run" / "checkpoints").exists()


def test_fresh_leaves_other_peoples_files(
    stdlib_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "figures").mkdir(parents=True)
    (tmp_path / "run" / "figures" / "mine.png").write_bytes(b"mine")
    refuses(capsys, [*train(stdlib_data, tmp_path / "run"), "--fresh"], "--fresh would remove figures")
    assert (tmp_path / "run" / "figures" / "mine.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("file", "content", "code"),
    [
        ("metrics.jsonl", '{"kind": "train", "step": 1}\n[1]\n{"kind": "train", "step": 2}\n', 2),
        ("status.json", "[]", 0),
        ("status.json", '{"state": "finished"}', 0),
        ("environment.json", '{"precision": "foo", "newton_schulz_dtype": "float32"}', 0),
    ],
)
def test_damaged_state_files(
    stdlib_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: str, code: int
) -> None:
    """What the checkpoint makes unnecessary is made anew; what would be lost is the user's to decide."""
    words = finished_run(stdlib_data, tmp_path)
    (tmp_path / "run" / "status.json").unlink()
    (tmp_path / "run" / file).write_text(content)
    capsys.readouterr()
    assert main(words) == code
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x00bad"], ids=["empty", "blank", "not-utf8"])
def test_text_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    words = ["source.kind=text", f'source.files=["{tmp_path}/*.txt"]', f"output={tmp_path}/out"]
    refuses(capsys, ["data", "prepare", *words], "text" if content != b"\xff\xfe\x00bad" else "a.txt")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_files_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["source.kind=text", f'source.files=["{tmp_path}/*.md"]', f"output={tmp_path}/out"]
    refuses(capsys, ["data", "prepare", *words], "*.md")


@pytest.mark.parametrize("name", ["config.toml", "status.json", "environment.json"])
def test_a_full_disk_is_one_message(
    stdlib_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    original = Path.write_text

    def write_text(self: Path, *args: Any, **kwargs: Any) -> int:
        if self.name.startswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", write_text)
    refuses(capsys, train(stdlib_data, tmp_path / "run"), name, "No space left on device", "repeat the command")


MOE = ["model.kind=moe", "model.num_experts=6", "model.experts_per_token=2"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["model.hidden_size=130", "model.num_heads=4"], ["hidden_size 130 is not divisible by num_heads 4"]),
        (["model.num_heads=4", "model.num_kv_heads=3"], ["num_heads 4 is not a multiple of num_kv_heads 3"]),
        (["model.max_seq_len=100", "data.seq_len=128"], ["data.seq_len 128 is more than model.max_seq_len 100"]),
        ([*MOE, "model.experts_per_token=7"], ["experts_per_token 7 is more than num_experts 6"]),
        ([*MOE, "model.num_dense_layers=9"], ["num_dense_layers 9 leaves none"]),
        ([*MOE, "model.router=softmax"], ['balance = "bias" needs router = "sigmoid"']),
        ([*MOE, "dist.zero=3", "dist.expert_parallel=4"], ["does not divide model.num_experts 6", "1, 2, 3, 6"]),
        ([*MOE, "dist.zero=3", "dist.expert_parallel=12"], ["does not divide model.num_experts 6", "1, 2, 3, 6"]),
        ([*MOE, "dist.expert_parallel=2"], ["expert_parallel 2 needs zero = 3"]),
        (["dist.zero=3", "dist.expert_parallel=2"], ['needs a model with experts: model.kind = "moe"']),
        ([*MOE, "model.expert_size=30", "dist.tensor_parallel=4"], ["model.expert_size 30", "what does: 1, 2"]),
        ([*MOE, "model.expert_size=12", "model.experts=grouped"], ["expert_size 12 to be multiples of 8"]),
        (
            [*MOE, "model.experts=grouped", "model.expert_size=24", "dist.tensor_parallel=2"],
            ["24 / dist.tensor_parallel"],
        ),
        (["model.logit_softcap=1e-30"], ["logit_softcap"]),
        (
            [
                *(*MOE, "dist.zero=3", "dist.expert_parallel=2", "loop.compile=true"),
                "loop.activation_checkpointing=selective",
            ],
            ['take "full" or "none"'],
        ),
        (["model.num_experts=4"], ["num_experts"]),
        (["model.vocab_size=300"], ["model.vocab_size 300 is less than the 512 token ids"]),
    ],
)
def test_models_that_cannot_be(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], said: list[str]
) -> None:
    refuses(capsys, train(data, tmp_path / "run", *changes), *said)
    assert not (tmp_path / "run" / "config.toml").exists()

import json
from pathlib import Path

import pytest

from besteffort.engines.opt_model import write_model
from besteffort.fleet import Architecture

tokenizers = pytest.importorskip("tokenizers", reason="comes with the vllm extras")

SHAPE = Architecture(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, ffn_dim=128)


def test_the_tokenizer_fits_the_network_and_gives_every_text_back(tmp_path: Path) -> None:
    write_model(tmp_path / "m", SHAPE, 512)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == SHAPE.vocab_size
    for text in ("The man turned on the faucet.", " naïve\t— 東京 \U0001f600\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    english = tokenizer.encode("What happened as a result of the change in the weather?").ids
    assert len(english) < 25


def test_a_model_that_is_there_already_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    write_model(folder, SHAPE, 512)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    write_model(folder, SHAPE, 512)
    assert before == {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_a_changed_architecture_is_written_anew(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    write_model(folder, SHAPE, 512)
    write_model(folder, SHAPE.model_copy(update={"ffn_dim": 256}), 512)
    assert json.loads((folder / "config.json").read_text())["ffn_dim"] == 256


def test_the_same_tokenizer_comes_out_each_time(tmp_path: Path) -> None:
    texts = []
    for name in ("a", "b"):
        write_model(tmp_path / name, SHAPE, 512)
        texts.append((tmp_path / name / "tokenizer.json").read_text())
    assert texts[0] == texts[1]

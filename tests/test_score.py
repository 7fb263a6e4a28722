import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from besteffort.artifacts.files import read_table
from besteffort.artifacts.rewards_file import SCHEMA, load_rewards
from besteffort.engines.evaluation import Accuracy
from besteffort.errors import EngineError, FleetError, RewardsError, UsageError
from besteffort.fleet import load_fleet
from besteffort.progress import Silent
from besteffort.stages import score as stage
from besteffort.stages.score import score

REPOSITORY = Path(__file__).parents[1]
TITAN = REPOSITORY / "artifacts" / "titan-rtx-opt"
REAL_DOCUMENTS = REPOSITORY.parent / "shared" / "data" / "eval"
FLEET = """
schema_version = 1
name = "two-by-two"
[[models]]
name = "small"
path = "a-model"
[[models]]
name = "large"
urls = ["http://127.0.0.1:9"]
tokenizer = "a-tokenizer"
[[tasks]]
name = "chat"
deadline_ms_per_token = 40
lm_eval_task = "copa"
[[tasks]]
name = "how-to"
deadline_ms_per_token = 60
lm_eval_task = "piqa"
metric = "acc_norm"
"""
CSV = "# A study (2024), Table 1.\n# In percent.\ntask,model,value\n" + "".join(
    f"{task},{model},{value}\n"
    for task, model, value in [("chat", "small", 0.5), ("chat", "large", 1), ("how-to", "small", 0.6),
                               ("how-to", "large", 0.9)]
)  # fmt: skip


class Lines(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def fleet_dir(tmp_path: Path) -> Path:
    (tmp_path / "fleet.toml").write_text(FLEET)
    return tmp_path


def run(fleet_dir: Path, progress: Silent | None = None, **options: Any) -> Path:
    output = fleet_dir / "rewards.parquet"
    given: dict[str, Any] = {"data_dir": None, "limit": None, "given": None, "attached": {}, **options}
    score(fleet_dir, output=output, progress=progress or Silent(), **given)
    return output


def facts_of(path: Path) -> dict[str, Any]:
    return read_table(path, SCHEMA, kind="rewards", version=1, error=RewardsError, mend="")[1]


class FakeEngines:
    """Stands in for the servers and lm-eval: each question is counted, and can be made to fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, str]] = []
        self.dies_at = math.inf
        self.num_started = 0
        monkeypatch.setattr(stage, "lm_eval_version", lambda: "0.4.99")
        monkeypatch.setattr(stage, "loaded_tasks", lambda tasks, *_: nullcontext(tuple(tasks)))
        monkeypatch.setattr(stage, "running_engines", self._running)
        monkeypatch.setattr(stage, "open_client", lambda engine, tokenizer, **_: (engine, tokenizer))
        monkeypatch.setattr(stage, "measure_accuracy", self._measure)

    @contextmanager
    def _running(self, *_: object) -> Iterator[tuple[tuple[str], ...]]:
        self.num_started += 1
        yield (("engine-of-small",), ("engine-of-large",))

    def _measure(self, client: tuple[str, str], task: Any, loaded: Any, limit: int | None) -> Accuracy:
        if len(self.asked) >= self.dies_at:
            raise EngineError("it died")
        assert task is loaded
        self.asked.append((client[1], task.name))
        value = 0.1 * len(self.asked)
        return Accuracy(value, math.nan if limit == 1 else 0.01, limit or 50, num_cut_prompts=int(limit == 7))


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> FakeEngines:
    return FakeEngines(monkeypatch)


def test_every_model_is_asked_about_every_task_with_its_own_tokenizer(
    fleet_dir: Path, engines: FakeEngines
) -> None:
    rewards = load_rewards(run(fleet_dir), load_fleet(fleet_dir))
    assert engines.asked == [
        ("a-model", "chat"), ("a-model", "how-to"), ("a-tokenizer", "chat"), ("a-tokenizer", "how-to"),
    ]  # fmt: skip
    np.testing.assert_allclose(rewards.values, [[0.1, 0.3], [0.2, 0.4]])
    np.testing.assert_array_equal(rewards.standard_errors, np.full((2, 2), 0.01))
    np.testing.assert_array_equal(rewards.num_documents, np.full((2, 2), 50))
    assert rewards.metrics == ("acc", "acc_norm")
    assert rewards.source == "measured"


def test_the_file_says_how_it_was_measured(fleet_dir: Path, engines: FakeEngines) -> None:
    facts = facts_of(run(fleet_dir, limit=3))
    wanted = {"stage": "score", "lm_eval": "0.4.99", "limit": 3, "num_fewshot": 0}
    assert facts.items() >= {**wanted, "documents": "Hugging Face hub"}.items()
    assert len(facts["fleet_sha256"]) == 64


def test_the_report_has_a_line_for_each_task(fleet_dir: Path, engines: FakeEngines) -> None:
    said = Lines()
    run(fleet_dir, said, limit=7)
    assert any(
        "chat  " in line and "small 0.100 ± 0.010   large 0.300 ± 0.010" in line for line in said.lines
    )
    assert any("(acc_norm, 7 documents)" in line for line in said.lines)
    assert any("1 of its prompts lost the beginning" in line for line in said.lines)
    assert not any("random weights" in line for line in said.lines)


def test_a_single_document_has_no_standard_error_to_report(fleet_dir: Path, engines: FakeEngines) -> None:
    said = Lines()
    path = run(fleet_dir, said, limit=1)
    assert any("small 0.100 ± ?   large 0.300 ± ?" in line for line in said.lines)
    assert np.isnan(load_rewards(path, load_fleet(fleet_dir)).standard_errors).all()


def test_random_weights_are_said_to_score_at_chance(fleet_dir: Path, engines: FakeEngines) -> None:
    shape = "{ hidden_size = 32, num_hidden_layers = 1, num_attention_heads = 2, ffn_dim = 32 }"
    text = FLEET.replace('path = "a-model"', f"architecture = {shape}")
    (fleet_dir / "fleet.toml").write_text(text)
    said = Lines()
    run(fleet_dir, said)
    assert said.lines[-1].startswith("small: random weights score at chance: use --rewards")


def test_an_interrupted_run_goes_on_where_it_stopped(fleet_dir: Path, engines: FakeEngines) -> None:
    engines.dies_at = 3
    with pytest.raises(EngineError, match="it died"):
        run(fleet_dir)
    assert not (fleet_dir / "rewards.parquet").exists()
    engines.dies_at = math.inf
    said = Lines()
    rewards = load_rewards(run(fleet_dir, said), load_fleet(fleet_dir))
    assert any("going on after 3 accuracies" in line for line in said.lines)
    assert len(engines.asked) == 4
    np.testing.assert_allclose(rewards.values, [[0.1, 0.3], [0.2, 0.4]])
    assert [path.name for path in fleet_dir.glob("*.parquet")] == ["rewards.parquet"]


def test_an_interrupted_run_with_another_limit_is_not_gone_on_with(
    fleet_dir: Path, engines: FakeEngines
) -> None:
    engines.dies_at = 3
    with pytest.raises(EngineError):
        run(fleet_dir, limit=5)
    engines.dies_at = math.inf
    said = Lines()
    run(fleet_dir, said, limit=6)
    assert any("starting anew" in line for line in said.lines)
    assert len(engines.asked) == 3 + 4


def test_an_unfinished_file_is_no_rewards_file(fleet_dir: Path, engines: FakeEngines) -> None:
    engines.dies_at = 3
    with pytest.raises(EngineError):
        run(fleet_dir)
    with pytest.raises(RewardsError, match="is nan, not in"):
        load_rewards(fleet_dir / "rewards.partial.parquet", load_fleet(fleet_dir))


def test_a_broken_unfinished_file_is_started_over(fleet_dir: Path, engines: FakeEngines) -> None:
    (fleet_dir / "rewards.partial.parquet").write_text("half a fi")
    run(fleet_dir)
    assert len(engines.asked) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "--limit 0: must be at least 1"),
        ({"limit": -3}, "--limit -3: must be at least 1"),
        (
            {"data_dir": Path("/nowhere")},
            r"/nowhere/copa\.jsonl: no such file; it must be JSON lines with prem",
        ),
        ({"given": Path("x.csv"), "limit": 3}, "--given measures nothing"),
        ({"given": Path("x.csv"), "data_dir": Path()}, "--given measures nothing"),
        ({"given": Path("x.csv"), "attached": {"small": ["http://a"]}}, "--given measures nothing"),
    ],
)
def test_wrong_options_are_found_before_an_engine_starts(
    options: dict[str, Any], message: str, fleet_dir: Path, engines: FakeEngines
) -> None:
    with pytest.raises(UsageError, match=message):
        run(fleet_dir, **options)
    assert engines.num_started == 0


def test_a_model_given_by_urls_needs_a_tokenizer(fleet_dir: Path, engines: FakeEngines) -> None:
    (fleet_dir / "fleet.toml").write_text(FLEET.replace('tokenizer = "a-tokenizer"', ""))
    with pytest.raises(UsageError, match=r"model 'large' is given by urls.*add tokenizer ="):
        run(fleet_dir)
    assert engines.num_started == 0


def test_a_tokenizer_beside_a_path_is_refused(fleet_dir: Path) -> None:
    (fleet_dir / "fleet.toml").write_text(FLEET.replace('"a-model"', '"a-model"\ntokenizer = "b"'))
    with pytest.raises(FleetError, match="tokenizer goes only with urls"):
        load_fleet(fleet_dir)


def test_given_rewards_keep_their_values_and_their_citation(fleet_dir: Path) -> None:
    given = fleet_dir / "table.csv"
    given.write_text(CSV)
    path = run(fleet_dir, given=given)
    rewards = load_rewards(path, load_fleet(fleet_dir))
    np.testing.assert_array_equal(rewards.values, [[0.5, 1.0], [0.6, 0.9]])
    assert rewards.source == "given"
    facts = facts_of(path)
    assert facts["citation"] == "A study (2024), Table 1."
    assert facts["given"] == "table.csv"
    assert len(facts["given_sha256"]) == 64


def test_given_rewards_without_a_comment_cite_nothing(fleet_dir: Path) -> None:
    given = fleet_dir / "table.csv"
    given.write_text(CSV.partition("percent.\n")[2])
    assert facts_of(run(fleet_dir, given=given))["citation"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CSV.replace("task,model,value", "task,model,accuracy"), "the column 'value' is missing"),
        (CSV.replace("0.6", "sixty"), "a value is not a number"),
        (CSV.replace("0.6", "60"), "is 60.0, not in"),
        (CSV.replace("0.6", "nan"), "is nan, not in"),
        (CSV.replace("how-to,small,0.6\n", ""), "no reward of task 'how-to' with model 'small'"),
    ],
)
def test_a_wrong_table_is_refused_and_nothing_written(content: str, message: str, fleet_dir: Path) -> None:
    given = fleet_dir / "table.csv"
    given.write_text(content)
    with pytest.raises(RewardsError, match=message):
        run(fleet_dir, given=given)
    assert not (fleet_dir / "rewards.parquet").exists()


def test_a_missing_table_is_named(fleet_dir: Path) -> None:
    with pytest.raises(RewardsError, match=r"nowhere\.csv: cannot be read"):
        run(fleet_dir, given=fleet_dir / "nowhere.csv")


def test_the_shipped_table_1_is_the_papers(tmp_path: Path) -> None:
    fleet = load_fleet(TITAN)
    rewards = load_rewards(TITAN / "rewards.parquet", fleet)
    paper = {
        "hellaswag": (0.45, 0.78, 1.0), "copa": (0.80, 0.95, 1.0),
        "piqa": (0.82, 0.96, 1.0), "openbookqa": (0.70, 0.94, 1.0),
    }  # fmt: skip
    assert {task: tuple(row) for task, row in zip(fleet.task_names, rewards.values, strict=True)} == paper
    assert rewards.source == "given"
    fresh = tmp_path / "fresh.parquet"
    score(
        TITAN, output=fresh, data_dir=None, limit=None, given=TITAN / "rewards.csv", attached={},
        progress=Silent(),
    )  # fmt: skip
    assert pq.read_table(fresh).equals(pq.read_table(TITAN / "rewards.parquet"))
    assert "Learned Best-Effort LLM Serving" in facts_of(TITAN / "rewards.parquet")["citation"]


@pytest.mark.vllm
def test_real_engines_are_scored_by_the_real_lm_eval_in_silence(
    tiny_engines: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="needs besteffort[eval]")
    if not REAL_DOCUMENTS.is_dir():
        pytest.skip(f"no evaluation documents at {REAL_DOCUMENTS}")
    output = tmp_path / "rewards.parquet"
    capfd.readouterr()
    score(
        tiny_engines.fleet_dir, output=output, data_dir=REAL_DOCUMENTS, limit=4, given=None,
        attached=tiny_engines.urls, progress=Silent(),
    )  # fmt: skip
    assert capfd.readouterr() == ("", "")
    rewards = load_rewards(output, load_fleet(tiny_engines.fleet_dir))
    np.testing.assert_array_equal(rewards.num_documents, np.full(rewards.values.shape, 4))
    # Four documents: every accuracy is a multiple of 1/4.
    np.testing.assert_array_equal(rewards.values * 4 % 1, np.zeros(rewards.values.shape))
    documents = facts_of(output)["documents"]
    assert set(documents) == {"hellaswag.jsonl", "copa.jsonl", "piqa.jsonl", "openbookqa.jsonl"}

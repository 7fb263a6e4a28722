import io
import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from besteffort.engines import evaluation
from besteffort.engines.evaluation import (
    KNOWN_TASKS,
    Accuracy,
    documents_file,
    lm_eval_version,
    loaded_tasks,
    measure_accuracy,
    open_client,
)
from besteffort.engines.running import Engine
from besteffort.errors import EngineError, FleetError, UsageError
from besteffort.fleet import Task

pytest.importorskip("lm_eval", reason="needs besteffort[eval]")

REAL_DOCUMENTS = Path(__file__).parents[2] / "shared" / "data" / "eval"
DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    "hellaswag": [
        {"query": "A man sits. He", "choices": ["stands up.", "flies.", "is red.", "melts."], "gold": 0},
        {"query": "A dog runs. It", "choices": ["sings.", "barks.", "reads.", "melts."], "gold": 1},
    ],
    "copa": [
        {"premise": "The man turned on the faucet.", "choice1": "The toilet filled with water.",
         "choice2": "Water flowed from the spout.", "question": "effect", "label": 1},
        {"premise": "The woman retired.", "choice1": "She was old.",
         "choice2": "She was new.", "question": "cause", "label": 0},
    ],
    "piqa": [{"goal": "Open a jar", "sol1": "twist the lid", "sol2": "paint the lid", "label": 0}],
    "openbookqa": [
        {"question_stem": "The sun is", "answerKey": "B",
         "choices": {"text": ["cold", "hot", "wet", "near"], "label": ["A", "B", "C", "D"]}},
    ],
}  # fmt: skip


def make_task(lm_eval_task: str, metric: str = "acc") -> Task:
    return Task(name=f"my-{lm_eval_task}", deadline_ms_per_token=40, lm_eval_task=lm_eval_task, metric=metric)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    for name, documents in DOCUMENTS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    return tmp_path


class FakeClient:
    """Answers as lm-eval's client of a server does, with a log-likelihood of the test's choosing."""

    base_url = "http://fake/v1/completions"
    rank, world_size = 0, 1

    def __init__(self, preferred: str) -> None:
        self.preferred = preferred
        self.prompts: list[tuple[str, str]] = []

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        self.prompts = [request.args for request in requests]
        return [(0.0 if self.preferred in choice else -50.0, False) for _, choice in self.prompts]


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_local_documents_make_the_prompts_that_lm_eval_makes_of_the_hubs(name: str, data_dir: Path) -> None:
    expected = {
        "hellaswag": ("A man sits. He", " stands up."),
        "copa": ("The man turned on the faucet therefore", "  the toilet filled with water."),
        "piqa": ("Question: Open a jar\nAnswer:", " twist the lid"),
        "openbookqa": ("The sun is", " cold"),
    }
    with loaded_tasks([make_task(name)], data_dir, None) as (loaded,):
        assert len(loaded.eval_docs) == len(DOCUMENTS[name])
        assert loaded.get_config("num_fewshot") == 0
        assert loaded.instances[0].args == expected[name]


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [("hellaswag", " stands", " flies"), ("copa", "water flowed", "the toilet"), ("piqa", "twist", "paint"),
     ("openbookqa", "hot", "cold")],
)  # fmt: skip
def test_the_right_choice_counts_and_a_wrong_one_does_not(
    name: str, right: str, wrong: str, data_dir: Path
) -> None:
    task = make_task(name)
    with loaded_tasks([task], data_dir, 1) as (loaded,):
        assert measure_accuracy(FakeClient(right), task, loaded, 1).value == 1.0
        assert measure_accuracy(FakeClient(wrong), task, loaded, 1).value == 0.0


def test_the_limit_takes_the_first_documents(data_dir: Path) -> None:
    task = make_task("hellaswag", metric="acc_norm")
    client = FakeClient("stands")
    with loaded_tasks([task], data_dir, 1) as (loaded,):
        limited = measure_accuracy(client, task, loaded, 1)
        assert limited.num_documents == 1
        assert {context for context, _ in client.prompts} == {"A man sits. He"}
        whole = measure_accuracy(client, task, loaded, None)
        assert whole.num_documents == 2
        assert measure_accuracy(client, task, loaded, 99).num_documents == 2


def test_the_standard_error_is_that_of_a_mean_and_nan_for_one_document(data_dir: Path) -> None:
    task = make_task("copa")
    with loaded_tasks([task], data_dir, None) as (loaded,):
        # A tie goes to the first choice: wrong on the first document, right on the second.
        measured = measure_accuracy(FakeClient("w"), task, loaded, None)
        assert measured.standard_error == pytest.approx(0.5)
        assert replace(measured, standard_error=0.5) == Accuracy(0.5, 0.5, 2, 0)
        assert repr(measure_accuracy(FakeClient("water"), task, loaded, 1).standard_error) == "nan"


def test_lm_evals_own_task_file_is_loaded_where_the_documents_come_from_the_hub(tmp_path: Path) -> None:
    for name in KNOWN_TASKS:
        path = evaluation._task_file(make_task(name), None, tmp_path)
        assert path.is_file()
        assert f"task: {name}\n" in path.read_text()


def test_a_data_dir_without_the_file_names_it_and_its_columns(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"copa\.jsonl: no such file; .* premise, choice1, choice2, quest"):
        documents_file(make_task("copa"), tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "holds no document"),
        ('{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}\n{"goal": "g"}\n', "line 2: 'sol1' is missing"),
        ('{"goal": "g", "sol1": "a", "sol2": "b", "label": null}\n', "line 1: 'label' is missing"),
        ("goal,sol1\n", "line 1: not JSON"),
        ("[1]\n", "line 1: not a JSON object"),
        ("\udcff", "cannot be read"),
    ],
)
def test_a_malformed_document_is_one_line_that_names_where(
    content: str, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "piqa.jsonl").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UsageError, match=problem) as raised:
        documents_file(make_task("piqa"), tmp_path)
    assert "\n" not in str(raised.value)
    assert "goal, sol1, sol2, label" in str(raised.value)


def test_a_data_dir_serves_only_the_tasks_whose_columns_are_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'arc_easy'.* only for hellaswag, copa, piqa, openbookqa"):
        documents_file(make_task("arc_easy"), tmp_path)


def test_documents_that_make_no_prompt_are_refused_before_any_engine_is_asked(data_dir: Path) -> None:
    good = DOCUMENTS["openbookqa"][0]
    lines = [json.dumps(good), json.dumps({**good, "answerKey": "Z"})]
    (data_dir / "openbookqa.jsonl").write_text("\n".join(lines))
    with (
        pytest.raises(UsageError, match=r"cannot make prompts of the documents of .*openbookqa"),
        loaded_tasks([make_task("openbookqa")], data_dir, None),
    ):
        pass


def test_a_metric_that_is_not_reported_names_those_that_are(data_dir: Path) -> None:
    with (
        pytest.raises(FleetError, match="'bleu' for 'piqa'; set metric to one of acc, acc_norm"),
        loaded_tasks([make_task("piqa", metric="bleu")], data_dir, None),
    ):
        pass


def test_a_filter_that_is_not_reported_is_refused_too(data_dir: Path) -> None:
    task = make_task("piqa", metric="acc,strict-match")
    with (
        loaded_tasks([task], data_dir, None) as (loaded,),
        pytest.raises(FleetError, match=r"'acc,strict-match' of 'piqa'.*it reports acc,none, acc_norm,none"),
    ):
        measure_accuracy(FakeClient("twist"), task, loaded, None)


def test_a_name_that_lm_eval_does_not_have_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", _FakeManager)
    with pytest.raises(FleetError, match="lm-eval has no task 'no-such'"):
        evaluation._manager_and_spec(make_task("no-such"), None, tmp_path)


def test_a_group_of_tasks_is_refused_and_one_of_them_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", _FakeManager)
    with (
        pytest.raises(FleetError, match=r"'mmlu' is a group of tasks; .* such as 'mmlu_anatomy'"),
        loaded_tasks([make_task("mmlu")], None, None),
    ):
        pass


def test_a_hub_out_of_reach_says_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", _FakeManager)
    with (
        pytest.raises(UsageError, match=r"Hugging Face hub \(ConnectionError: no route\).*--data-dir"),
        loaded_tasks([make_task("piqa")], None, None),
    ):
        pass


class _FakeManager:
    """A `TaskManager` that knows one group, and whose hub is out of reach."""

    task_index: Mapping[str, None] = {"mmlu": None}

    def __init__(self, include_defaults: bool = True) -> None:
        pass

    def load(self, specs: list[str]) -> dict[str, Any]:
        if specs == ["mmlu"]:
            return {"tasks": {"mmlu_anatomy": None, "mmlu_law": None}}
        raise ConnectionError("no route\nto the hub")


def test_a_server_that_refuses_is_quoted(data_dir: Path) -> None:
    class Response:
        status_code = 400

        def json(self) -> dict[str, Any]:
            return {"error": {"message": "Token id 9999 is out of vocabulary"}}

    class RefusingClient(FakeClient):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            error = OSError("400 Client Error: Bad Request for url: http://fake")
            error.response = Response()  # type: ignore[attr-defined]
            raise error

    task = make_task("piqa")
    with (
        loaded_tasks([task], data_dir, None) as (loaded,),
        pytest.raises(EngineError, match=r"Token id 9999 is out of vocabulary.*tokenizer of the model"),
    ):
        measure_accuracy(RefusingClient(""), task, loaded, None)


def test_prompts_that_were_cut_are_counted(data_dir: Path) -> None:
    class CuttingClient(FakeClient):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            for _ in requests:
                logging.getLogger("lm_eval.models.api_models").warning("... Left truncating context.")
            return super().loglikelihood(requests)

    task = make_task("piqa")
    with loaded_tasks([task], data_dir, None) as (loaded,):
        assert measure_accuracy(CuttingClient("twist"), task, loaded, None).num_cut_prompts == 2


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the tokenizer of m, .*nowhere: cannot be loaded"):
        open_client(
            Engine("http://127.0.0.1:9", "m"), str(tmp_path / "nowhere"), batch_size=8, max_model_len=64
        )


def test_nothing_of_lm_evals_chatter_reaches_the_user(
    data_dir: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task("hellaswag")
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with loaded_tasks([task], data_dir, None) as (loaded,):
        measure_accuracy(FakeClient("stands"), task, loaded, None)
    assert stderr.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_the_real_documents_are_all_read() -> None:
    if not REAL_DOCUMENTS.is_dir():
        pytest.skip(f"no evaluation documents at {REAL_DOCUMENTS}")
    expected = {"hellaswag": 1000, "copa": 100, "piqa": 919, "openbookqa": 500}
    tasks = [make_task(name) for name in expected]
    with loaded_tasks(tasks, REAL_DOCUMENTS, 3) as loaded:
        assert {task.task_name: len(task.eval_docs) for task in loaded} == expected


def test_without_lm_eval_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"`make setup`, or install besteffort\[eval\]"):
        lm_eval_version()

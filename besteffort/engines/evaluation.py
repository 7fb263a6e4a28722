"""Zero-shot accuracy of the model behind a completions server, measured by lm-eval.

Prompts, choices and metrics are lm-eval's own. Documents come from the Hugging Face hub or from
local JSONL files; for those, a generated task file includes lm-eval's and overrides only where the
documents come from.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import tempfile
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from besteffort.engines.running import Engine
from besteffort.errors import EngineError, FleetError, UsageError
from besteffort.fleet import Task

REQUEST_TIMEOUT_S = 600
# Of the standard errors that have no closed form; accuracies have one.
_BOOTSTRAP_ITERATIONS = 1000


@dataclass(frozen=True, slots=True)
class _KnownTask:
    """A task whose file in lm-eval and whose columns in a local file are known."""

    file: str  # below lm_eval/tasks: naming it spares the scan of some 14,000 tasks
    columns: tuple[str, ...]
    overrides: Mapping[str, Any] = field(default_factory=dict)


KNOWN_TASKS = {
    # A local HellaSwag is preprocessed already, and its label is `gold`.
    "hellaswag": _KnownTask(
        "hellaswag/hellaswag.yaml",
        ("query", "choices", "gold"),
        {"process_docs": None, "doc_to_target": "{{gold}}"},
    ),
    "copa": _KnownTask(
        "super_glue/copa/default.yaml", ("premise", "choice1", "choice2", "question", "label")
    ),
    "piqa": _KnownTask("piqa/piqa.yaml", ("goal", "sol1", "sol2", "label")),
    "openbookqa": _KnownTask("openbookqa/openbookqa.yaml", ("question_stem", "choices", "answerKey")),
}


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How well one model does one task."""

    value: float  # in [0, 1]
    standard_error: float  # NaN where lm-eval gives none, as for a single document
    num_documents: int
    num_cut_prompts: int  # that lost their beginning, to fit into the context


def lm_eval_version() -> str:
    """The installed version of lm-eval.

    Raises:
        UsageError: lm-eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("lm-eval is not installed; run `make setup`, or install besteffort[eval]")
    return importlib.metadata.version("lm_eval")


def documents_file(task: Task, data_dir: Path) -> Path:
    """The local documents of a task, looked through for the columns that lm-eval needs.

    Raises:
        UsageError: no columns are known for the task, or the file is missing, malformed or empty.
    """
    known = KNOWN_TASKS.get(task.lm_eval_task)
    if known is None:
        raise UsageError(
            f"--data-dir {data_dir}: task {task.name!r} is lm-eval's {task.lm_eval_task!r}, but local files "
            f"are read only for {', '.join(KNOWN_TASKS)}; leave --data-dir out to use the hub"
        )
    path = data_dir / f"{task.lm_eval_task}.jsonl"
    expected = f"it must be JSON lines with {', '.join(known.columns)}"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise UsageError(f"{path}: {why}; {expected}") from None
    if not lines:
        raise UsageError(f"{path}: holds no document; {expected}")
    for number, line in enumerate(lines, start=1):
        problem = _problem(line, known.columns)
        if problem:
            raise UsageError(f"{path}, line {number}: {problem}; {expected}")
    return path


def _problem(line: str, columns: Sequence[str]) -> str | None:
    try:
        document = json.loads(line)
    except ValueError as error:
        return f"not JSON ({error})"
    if not isinstance(document, dict):
        return "not a JSON object"
    missing = [column for column in columns if document.get(column) is None]
    return f"{missing[0]!r} is missing" if missing else None


@contextlib.contextmanager
def loaded_tasks(
    tasks: Sequence[Task], data_dir: Path | None, limit: int | None
) -> Iterator[tuple[Any, ...]]:
    """lm-eval's own task objects, zero-shot, one for each of `tasks`, valid inside the `with`.

    `limit` is the number of documents of each that will be used; their prompts are tried here.

    Raises:
        FleetError: lm-eval does not know the task, or it does not report the metric.
        UsageError: the documents cannot be loaded.
    """
    with tempfile.TemporaryDirectory(prefix="besteffort-score-") as scratch:
        with _quiet():
            loaded = tuple(_load(task, data_dir, limit, Path(scratch)) for task in tasks)
        yield loaded


def _load(task: Task, data_dir: Path | None, limit: int | None, scratch: Path) -> Any:
    source = f"{data_dir / task.lm_eval_task}.jsonl" if data_dir else "the Hugging Face hub"
    manager, spec = _manager_and_spec(task, data_dir, scratch)
    try:
        found = manager.load([spec])["tasks"]
    except Exception as error:
        mend = "mend that file" if data_dir else "connect to it, or give local documents with --data-dir"
        raise UsageError(
            f"task {task.name!r}: lm-eval cannot load {task.lm_eval_task!r} from {source} "
            f"({_first_line(error)}); {mend}"
        ) from None
    loaded = _the_only(found, task)
    loaded.set_config(key="num_fewshot", value=0)
    try:
        loaded.build_all_requests(limit=limit)
    except Exception as error:
        raise UsageError(
            f"task {task.name!r}: lm-eval cannot make prompts of the documents of {source} "
            f"({_first_line(error)}); mend them"
        ) from None
    return loaded


def _the_only(found: Mapping[str, Any], task: Task) -> Any:
    """The loaded task, which must be one, and report the metric."""
    if list(found) != [task.lm_eval_task]:
        raise FleetError(
            f"task {task.name!r}: lm-eval's {task.lm_eval_task!r} is a group of tasks; "
            f"name one of them in lm_eval_task, such as {next(iter(found), 'piqa')!r}"
        )
    loaded = found[task.lm_eval_task]
    reported = loaded.aggregation()
    # A metric may name lm-eval's filter too, as in "exact_match,strict-match".
    if task.metric.partition(",")[0] not in reported:
        raise FleetError(
            f"task {task.name!r}: lm-eval does not report the metric {task.metric!r} for "
            f"{task.lm_eval_task!r}; set metric to one of {', '.join(sorted(reported))}"
        )
    return loaded


def _manager_and_spec(task: Task, data_dir: Path | None, scratch: Path) -> tuple[Any, str]:
    """What loads the task, and what it is to load: a task file, or a name if no file is known."""
    from lm_eval.tasks import TaskManager

    if task.lm_eval_task in KNOWN_TASKS:
        return TaskManager(include_defaults=False), str(_task_file(task, data_dir, scratch))
    manager = TaskManager()
    if task.lm_eval_task not in manager.task_index:
        raise FleetError(
            f"task {task.name!r}: lm-eval has no task {task.lm_eval_task!r}; mend lm_eval_task in "
            "fleet.toml (`lm-eval ls tasks` lists the names)"
        )
    return manager, task.lm_eval_task


def _task_file(task: Task, data_dir: Path | None, scratch: Path) -> Path:
    """lm-eval's file of a known task, or one that includes it and reads the local documents."""
    import lm_eval.tasks

    known = KNOWN_TASKS[task.lm_eval_task]
    original = Path(lm_eval.tasks.__file__).parent / known.file
    if data_dir is None:
        return original
    documents = documents_file(task, data_dir).resolve()
    config = {
        "include": str(original),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"local": str(documents)}, "cache_dir": str(scratch / "cache")},
        "training_split": None,
        "validation_split": None,
        "test_split": "local",
        **known.overrides,
    }
    path = scratch / f"{task.lm_eval_task}.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return path


def open_client(engine: Engine, tokenizer: str, *, batch_size: int, max_model_len: int) -> Any:
    """lm-eval's client of a server; `batch_size` prompts go out in one request.

    `max_model_len`, in tokens, is used where the server does not state its own.

    Raises:
        UsageError: the tokenizer, a folder or a hub name, cannot be loaded.
    """
    with _quiet():
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        try:
            return LocalCompletionsAPI(
                base_url=f"{engine.url}/v1/completions",
                model=engine.served_name,
                max_length=_stated_max_model_len(engine) or max_model_len,
                tokenizer=tokenizer,
                tokenizer_backend="huggingface",
                tokenized_requests=True,  # a server would put its own BOS before a string
                batch_size=batch_size,
                num_concurrent=1,
                timeout=REQUEST_TIMEOUT_S,
            )
        except Exception as error:
            raise UsageError(
                f"the tokenizer of {engine.served_name}, {tokenizer}: cannot be loaded "
                f"({_first_line(error)}); mend path or tokenizer in fleet.toml"
            ) from None


def _stated_max_model_len(engine: Engine) -> int | None:
    """In tokens, as vLLM's `/v1/models` says it; other servers do not."""
    try:
        with urllib.request.urlopen(f"{engine.url}/v1/models", timeout=10) as response:  # noqa: S310
            cards = json.loads(response.read())["data"]
        return next((card.get("max_model_len") for card in cards if card["id"] == engine.served_name), None)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measure_accuracy(client: Any, task: Task, loaded: Any, limit: int | None) -> Accuracy:
    """Have lm-eval ask the server about the first `limit` documents, or all.

    Raises:
        EngineError: the server refuses, or does not answer as lm-eval needs it.
        FleetError: the metric is not one in [0, 1], or not reported with that filter.
    """
    with _quiet() as cut_prompts:
        from lm_eval.evaluator import evaluate

        chosen = {"tasks": {task.lm_eval_task: loaded}, "groups": {}, "group_map": {}}
        try:
            results = evaluate(
                client, chosen, limit=limit, log_samples=False, bootstrap_iters=_BOOTSTRAP_ITERATIONS
            )["results"]
        except Exception as error:
            raise EngineError(
                f"{client.base_url}: lm-eval cannot evaluate {task.lm_eval_task} there ({_answer(error)}); "
                "the server must run, answer prompts of token ids with echo and logprobs, "
                "and use the tokenizer of the model"
            ) from error
    return _accuracy(task, results[task.lm_eval_task], cut_prompts.count)


def _accuracy(task: Task, row: Mapping[str, Any], num_cut_prompts: int) -> Accuracy:
    metric, _, filter_name = task.metric.partition(",")
    value = row.get(f"{metric},{filter_name or 'none'}")
    if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        reported = [key for key in row if "," in key and "_stderr" not in key]
        raise FleetError(
            f"task {task.name!r}: lm-eval reports {value} as the metric {task.metric!r} of "
            f"{task.lm_eval_task!r}, not a utility in [0, 1]; it reports {', '.join(reported)}"
        )
    error = row.get(f"{metric}_stderr,{filter_name or 'none'}")
    return Accuracy(
        value=float(value),
        standard_error=float(error) if isinstance(error, int | float) else math.nan,  # else "N/A"
        num_documents=int(row["sample_len"]),
        num_cut_prompts=num_cut_prompts,
    )


def _answer(error: Exception) -> str:
    """What the server said, where an HTTP status made lm-eval give up."""
    response = getattr(error, "response", None)
    if response is None:
        return _first_line(error)
    try:
        return str(response.json()["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


class _CutPrompts(logging.Handler):
    """Counts in lm-eval's log the prompts that it cut to fit into the context."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "Left truncating context" in record.getMessage()


@contextlib.contextmanager
def _quiet() -> Iterator[_CutPrompts]:
    """Keep the logs, warnings and progress bars of lm-eval, and of what it uses, off standard error."""
    log, handler = logging.getLogger("lm_eval"), _CutPrompts()
    log.addHandler(handler)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield handler
    finally:
        log.removeHandler(handler)

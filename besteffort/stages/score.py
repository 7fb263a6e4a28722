"""`score`: how well each model does each task, measured by lm-eval on the engines, or given by a person."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from besteffort.artifacts import files, rewards_file
from besteffort.engines.evaluation import (
    Accuracy,
    documents_file,
    lm_eval_version,
    loaded_tasks,
    measure_accuracy,
    open_client,
)
from besteffort.engines.running import Engines, Urls, running_engines
from besteffort.engines.vllm import model_path
from besteffort.errors import RewardsError, UsageError
from besteffort.fleet import Fleet, Model, load_fleet
from besteffort.progress import Progress
from besteffort.rewards import Rewards

# The facts that decide whether an interrupted run can be gone on with.
_INPUTS = ("fleet_sha256", "lm_eval", "documents", "limit")


def score(
    fleet_dir: Path,
    *,
    output: Path,
    data_dir: Path | None,
    limit: int | None,
    given: Path | None,
    attached: Urls,
    progress: Progress,
) -> None:
    """Write `output`: measured zero-shot on the first `limit` documents of each task, or as `given` has it.

    What an interrupted run measured is taken up again. All that can be wrong with the input is
    found before an engine starts.

    Raises:
        InputError: the fleet, the options, the documents or the given rewards cannot be used.
        EngineError: an engine did not start, or does not answer as lm-eval needs it.
    """
    fleet = load_fleet(fleet_dir)
    if given is not None:
        if data_dir or limit is not None or attached:
            raise UsageError("--given measures nothing: leave --data-dir, --limit and --engine out")
        _take_given(fleet, fleet_dir, given, output, progress)
        return
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: must be at least 1 document; leave it out for all")
    facts = _facts(fleet, fleet_dir, data_dir, limit)
    tokenizers = [_tokenizer(fleet, fleet_dir, model) for model in fleet.models]
    progress.say(f"loading the documents from {data_dir or 'the Hugging Face hub'}")
    with loaded_tasks(fleet.tasks, data_dir, limit) as loaded:
        notebook = _Notebook(fleet, output.with_suffix(".partial.parquet"), facts)
        notebook.take_up(progress)
        with running_engines(fleet, fleet_dir, attached, progress) as engines:
            _measure_all(engines, loaded, tokenizers, limit, notebook, progress)
    notebook.path.replace(output)
    _report(fleet, notebook.rewards, output, progress)


def _take_given(fleet: Fleet, fleet_dir: Path, given: Path, output: Path, progress: Progress) -> None:
    rewards = rewards_file.read_given_rewards(given, fleet)
    first_line = given.read_text(encoding="utf-8").partition("\n")[0]
    facts = {
        "stage": "score",
        "fleet": fleet.name,
        "fleet_sha256": files.sha256(fleet_dir / "fleet.toml"),
        "given": given.name,
        "given_sha256": files.sha256(given),
        "citation": first_line.lstrip("# ").strip() if first_line.startswith("#") else None,
    }
    rewards_file.save_rewards(output, rewards, fleet, facts)
    progress.say(f"wrote {output}: {rewards.values.size} rewards as given by {given}")


def _facts(fleet: Fleet, fleet_dir: Path, data_dir: Path | None, limit: int | None) -> dict[str, Any]:
    """Where the rewards come from; reads the local documents, if any, to check them."""
    version = lm_eval_version()
    documents: dict[str, str] | str = "Hugging Face hub"
    if data_dir is not None:
        documents = {path.name: files.sha256(path) for path in
                     (documents_file(task, data_dir) for task in fleet.tasks)}  # fmt: skip
    return {
        "stage": "score",
        "fleet": fleet.name,
        "fleet_sha256": files.sha256(fleet_dir / "fleet.toml"),
        "lm_eval": version,
        "num_fewshot": 0,
        "documents": documents,
        "limit": limit,
    }


def _tokenizer(fleet: Fleet, fleet_dir: Path, model: Model) -> str:
    """A local folder or a hub name."""
    if model.urls is None:
        return model_path(fleet, fleet_dir, model)
    if model.tokenizer is None:
        raise UsageError(
            f"model {model.name!r} is given by urls: lm-eval needs its tokenizer; add "
            'tokenizer = "FOLDER or hub name" to it in fleet.toml'
        )
    return model.tokenizer


class _Notebook:
    """The accuracies so far, on disk after every one, so that a kill costs one; NaN: not yet measured."""

    def __init__(self, fleet: Fleet, path: Path, facts: Mapping[str, Any]) -> None:
        shape = (len(fleet.tasks), len(fleet.models))
        self.fleet = fleet
        self.path = path
        self.rewards = Rewards(
            values=np.full(shape, np.nan),
            standard_errors=np.full(shape, np.nan),
            num_documents=np.zeros(shape, dtype=np.int64),
            metrics=tuple(task.metric for task in fleet.tasks),
            source="measured",
        )
        self._facts = facts

    def note(self, task: int, model: int, accuracy: Accuracy) -> None:
        self.rewards.values[task, model] = accuracy.value
        self.rewards.standard_errors[task, model] = accuracy.standard_error
        self.rewards.num_documents[task, model] = accuracy.num_documents
        rewards_file.save_rewards(self.path, self.rewards, self.fleet, self._facts)

    def missing(self, model: int) -> list[int]:
        """The tasks that the model has not done yet."""
        return [int(task) for task in np.flatnonzero(np.isnan(self.rewards.values[:, model]))]

    def take_up(self, progress: Progress) -> None:
        """Go on with what an interrupted run left behind, if its inputs were the same."""
        if not self.path.exists():
            return
        try:
            table, facts = files.read_table(
                self.path,
                rewards_file.SCHEMA,
                kind="rewards",
                version=rewards_file.VERSION,
                error=RewardsError,
                mend="remove it",
            )
        except RewardsError:
            return
        if any(facts.get(key) != self._facts[key] for key in _INPUTS):
            progress.say(f"{self.path}: begun with another fleet.toml, documents or limit; starting anew")
            return
        for name, array in (
            ("value", self.rewards.values),
            ("standard_error", self.rewards.standard_errors),
            ("num_documents", self.rewards.num_documents),
        ):
            array[:] = np.array(table[name].to_pylist(), dtype=array.dtype).reshape(array.shape)
        num_done = int(np.isfinite(self.rewards.values).sum())
        progress.say(f"{self.path}: going on after {num_done} accuracies of an interrupted run")


def _measure_all(
    engines: Engines,
    loaded: tuple[Any, ...],
    tokenizers: list[str],
    limit: int | None,
    notebook: _Notebook,
    progress: Progress,
) -> None:
    """Every model, by its first replica, on every task that it has not done yet."""
    fleet = notebook.fleet
    num_steps = sum(len(notebook.missing(m)) for m in range(len(fleet.models)))
    with progress.bar("Scoring", num_steps) as bar:
        for m, model in enumerate(fleet.models):
            if not notebook.missing(m):
                continue
            client = open_client(
                engines[m][0],
                tokenizers[m],
                batch_size=model.max_num_seqs,
                max_model_len=fleet.engine.max_model_len,
            )
            for t in notebook.missing(m):
                task = fleet.tasks[t]
                bar.describe(f"{model.name}, {task.name}")
                accuracy = measure_accuracy(client, task, loaded[t], limit)
                notebook.note(t, m, accuracy)
                bar.advance()
                if accuracy.num_cut_prompts:
                    progress.say(
                        f"{model.name}, {task.name}: {accuracy.num_cut_prompts} of its prompts lost the "
                        "beginning, to fit into the server's context (engine.max_model_len)"
                    )


def _report(fleet: Fleet, rewards: Rewards, output: Path, progress: Progress) -> None:
    progress.say(f"wrote {output}: zero-shot accuracy ± standard error")
    width = max(len(name) for name in fleet.task_names)
    for t, task in enumerate(fleet.tasks):
        cells = [
            f"{model.name} {rewards.values[t, m]:.3f} ± {_shown(rewards.standard_errors[t, m])}"
            for m, model in enumerate(fleet.models)
        ]
        about = f"({task.metric}, {rewards.num_documents[t].max()} documents)"
        progress.say(f"  {task.name:<{width}}  {'   '.join(cells)}   {about}")
    random = [model.name for model in fleet.models if model.architecture is not None]
    if random:
        progress.say(
            f"{', '.join(random)}: random weights score at chance: use --rewards of another fleet for routing"
        )


def _shown(standard_error: float) -> str:
    return "?" if np.isnan(standard_error) else f"{standard_error:.3f}"

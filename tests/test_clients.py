"""Other people's clients against `serve`, as they are, in front of real vLLM servers."""

import asyncio
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import openai
import pytest
from tokenizers import Tokenizer

from tests.conftest import TinyEngines

pytestmark = pytest.mark.vllm


def run_client(program: str, *words: object) -> str:
    """What a program from beside the interpreter writes, which must end well; the hub is not asked."""
    command = [str(Path(sys.executable).with_name(program)), *map(str, words)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_openai_package_completes_and_streams(routed: str) -> None:
    with openai.OpenAI(base_url=f"{routed}/v1", api_key="none", max_retries=0) as client:
        asked = {"model": "besteffort/copa", "prompt": "The man turned on the faucet", "max_tokens": 6}
        plain = client.completions.create(**asked)
        assert plain.usage is not None
        assert plain.usage.completion_tokens == 6
        chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 6
        assert {chunk.model for chunk in chunks} < {"opt-3m", "opt-22m", "opt-90m"}
        told = {"x-besteffort-receipt": "stream"}
        *chunks, last = client.completions.create(**asked, n=2, stream=True, extra_headers=told)
        assert sum(len(chunk.choices) for chunk in chunks) == 12
        receipt = last.model_extra["besteffort"]
        assert (receipt["task"], receipt["num_tokens"]) == ("copa", 12)
        assert receipt["model"] == chunks[0].model


def test_the_openai_package_chats_and_streams(routed: str) -> None:
    with openai.OpenAI(base_url=f"{routed}/v1", api_key="none", max_retries=0) as client:
        messages = [{"role": "user", "content": "Which way is up?"}]
        asked = {"model": "opt-3m", "messages": messages, "max_completion_tokens": 5}
        plain = client.chat.completions.create(**asked)
        assert plain.model == "opt-3m"
        assert plain.choices[0].message.content
        streamed = [
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(**asked, stream=True)
        ]
        assert "".join(streamed)


def test_the_openai_package_gets_its_own_error_classes(routed: str) -> None:
    with openai.OpenAI(base_url=f"{routed}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="gpt-4"):
            client.completions.create(model="gpt-4", prompt="x")
        with pytest.raises(openai.NotFoundError, match="there is no such path"):
            client.embeddings.create(model="opt-3m", input="x")
        with pytest.raises(openai.BadRequestError, match="not a JSON object"):
            client.post("/completions", cast_to=object, content=b"{")
        with pytest.raises(openai.BadRequestError, match="max_tokens"):  # vLLM's own refusal, from here on
            client.completions.create(model="opt-3m", prompt="x", max_tokens=100_000)
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.completions.create(model="opt-3m", prompt="x", temperature=-1, stream=True)
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="besteffort/copa", messages=[])
        assert refused.value.type == "BadRequestError"


def test_the_openai_package_sees_which_models_and_tasks_there_are(routed: str) -> None:
    with openai.OpenAI(base_url=f"{routed}/v1", api_key="none", max_retries=0) as client:
        names = [model.id for model in client.models.list()]
    assert names[0] == "besteffort"
    assert {"besteffort/copa", "besteffort/hellaswag", "opt-3m", "opt-90m"} <= set(names)


async def _chat_at_once(url: str, number: int) -> list[str]:
    """What as many streams said, side by side on the connections of one asynchronous client."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

        async def said(task: str) -> str:
            asked = {"model": f"besteffort/{task}", "messages": [{"role": "user", "content": "Hello"}]}
            stream = await client.chat.completions.create(**asked, max_completion_tokens=6, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        return await asyncio.gather(*(said(("copa", "piqa")[turn % 2]) for turn in range(number)))


def test_the_openai_package_chats_asynchronously_in_many_streams_at_once(routed: str) -> None:
    assert all(asyncio.run(_chat_at_once(routed, 12)))


@pytest.mark.parametrize(
    ("backend", "endpoint"), [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")]
)
def test_vllm_bench_serve_runs_against_the_router(
    routed: str, tiny_engines: TinyEngines, tmp_path: Path, backend: str, endpoint: str
) -> None:
    words = ("--backend", backend, "--endpoint", endpoint, "--base-url", routed)
    words += ("--model", "besteffort/piqa", "--tokenizer", tiny_engines.fleet_dir / "models" / "opt-3m")
    words += ("--dataset-name", "random", "--random-input-len", 16, "--random-output-len", 8)
    words += ("--num-prompts", 16, "--request-rate", 8, "--ignore-eos")
    run_client("vllm", "bench", "serve", *words, "--save-result", "--result-dir", tmp_path,
               "--result-filename", "bench.json")  # fmt: skip
    result = json.loads((tmp_path / "bench.json").read_text())
    assert (result["completed"], result["failed"]) == (16, 0)
    assert result["total_output_tokens"] == 16 * 8


LM_EVAL = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

model_args, *tasks = sys.argv[1:]
found = simple_evaluate(
    "local-completions", json.loads(model_args), tasks, batch_size=2, bootstrap_iters=0,
    task_manager=TaskManager(include_defaults=False),  # whose 14,000 take longer to find than the rest
)
print(json.dumps({name: [sample["resps"] for sample in of] for name, of in found["samples"].items()}))
"""
CHOICES = ("The toilet filled with water.", "Water flowed.")


def lm_eval_tasks(folder: Path) -> list[Path]:
    """COPA as lm-eval has it, whose choices are scored, and a task whose answers are generated."""
    document = {"choice1": CHOICES[0], "choice2": CHOICES[1], "question": "effect", "label": 1}
    lines = [json.dumps({"premise": f"{who} turned it on.", **document}) for who in ("I", "He", "She")]
    (folder / "documents.jsonl").write_text("\n".join(lines))
    copa = Path(pytest.importorskip("lm_eval").__file__).parent / "tasks/super_glue/copa/default.yaml"
    source = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {"local": str(folder / "documents.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "training_split": None,
        "validation_split": None,
        "test_split": "local",
    }
    said = {
        "task": "said",
        "output_type": "generate_until",
        "doc_to_text": "{{premise}}",
        "doc_to_target": "{{choice1}}",
        "generation_kwargs": {"until": ["never"], "max_gen_toks": 5, "do_sample": True, "temperature": 1},
        "metric_list": [{"metric": "exact_match"}],
    }
    paths = [folder / "copa.yaml", folder / "said.yaml"]
    for path, task in zip(paths, ({"include": str(copa)}, said), strict=True):
        path.write_text(json.dumps({**task, **source}))  # JSON is YAML
    return paths


def test_lm_eval_scores_and_generates_by_local_completions(
    routed: str, tiny_engines: TinyEngines, tmp_path: Path
) -> None:
    """Two prompts, as token ids, in each request, and several requests at once."""
    folder = tiny_engines.fleet_dir / "models" / "opt-3m"
    model = {
        "base_url": f"{routed}/v1/completions",
        "model": "besteffort/copa",
        "tokenizer": str(folder),
        "num_concurrent": 3,
    }
    tasks = lm_eval_tasks(tmp_path)
    answers = json.loads(run_client("python", "-c", LM_EVAL, json.dumps(model), *tasks).splitlines()[-1])
    scored = [[answer[0][0] for answer in of] for of in answers["copa"]]
    architecture = tiny_engines.fleet.models[0].architecture
    assert architecture is not None
    # Random weights are so small that to each model all tokens are alike.
    per_token = -math.log(architecture.vocab_size)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    num_tokens = [len(tokenizer.encode("  " + text[0].lower() + text[1:]).ids) for text in CHOICES]
    np.testing.assert_allclose(scored, [[per_token * number for number in num_tokens]] * 3, rtol=1e-3)
    assert [bool(answer[0][0]) for answer in answers["said"]] == [True] * 3

"""The runs that a profile is made of: a designed set, not a grid, the most telling first."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from besteffort.fleet import Fleet

# Those without which there is no fit come first. Small ones need not lie on a line: kernels differ.
BATCH_SIZES = (1, 4, 16, 2, 8, 32, 3, 6, 64, 128, 12, 24, 256)
BATCH_SIZE = 4  # where the batch is not what is varied
# Requests in flight where they come and go, about: of a model alone, and of the slowest of several.
ALONE_BATCHES, BESIDE_BATCHES = (2, 5), (1, 2)
SHORT_PROMPT = 16  # tokens
PROMPT_LENGTHS = (16, 64, 256, 1024)
# On a GPU vLLM replays a captured graph for steps of up to twice its seats, 512 at most, and reads longer
# prompts without one, which took up to four times as long on an H200: lengths on either side.
_MOST_GRAPH_TOKENS = 512
_BESIDE_THE_LAST_GRAPH = (-16, 16)  # tokens
LONG_PROMPT_SHARE = 0.7  # of max_model_len: the rest is for answers
_MARGIN_TOKENS = 24  # lengths of prompts vary about those that are planned
_MANY_MODELS = 5  # from here on each pair is measured at one load only


@dataclass(frozen=True)
class Run:
    """One thing to do: load the models of `models` together, and measure each of them."""

    kind: Literal["decode", "prefill", "stall", "service"]
    models: tuple[int, ...]
    batch_sizes: tuple[int, ...]  # of `models`; of a service that of the slowest, which all are given
    num_prompt_tokens: int  # of a service the mean
    needed: bool = False  # whatever the budget

    def title(self, fleet: Fleet) -> str:
        names = [fleet.model_names[m] for m in self.models]
        if self.kind == "service":
            return f"{' and '.join(names)}, about {self.batch_sizes[0]} requests that come and go"
        if self.kind == "decode":
            return f"{names[0]}, batch {self.batch_sizes[0]}, prompts of {self.num_prompt_tokens} tokens"
        beside = f" beside a batch of {self.batch_sizes[0]}" if self.kind == "stall" else ""
        return f"{names[0]}, a prompt of {self.num_prompt_tokens} tokens{beside}"


def plan_runs(fleet: Fleet) -> list[Run]:
    """All runs, those that a fit needs first, then by turns what refines it.

    Each model alone by batch size, by context and by prompt length; prompts that join a batch; and requests
    that come and go, for each model alone, for all of them, and for each pair.
    """
    runs = [*_alone(fleet), *_services(fleet)]
    return [run for run in runs if run.needed] + [run for run in runs if not run.needed]


def mean_lengths(fleet: Fleet) -> tuple[float, float]:
    """Tokens of a prompt and of an answer, over the tasks by their shares of the arrivals."""
    middles = [(sum(t.num_prompt_tokens) / 2, sum(t.num_output_tokens) / 2) for t in fleet.tasks]
    prompt, output = np.average(middles, axis=0, weights=fleet.task_shares)
    return float(prompt), float(output)


def _alone(fleet: Fleet) -> Iterator[Run]:
    longest = fleet.engine.max_model_len - _MARGIN_TOKENS
    long_prompt = int(LONG_PROMPT_SHARE * fleet.engine.max_model_len)
    for nth, batch_size in enumerate(BATCH_SIZES):
        for m, model in enumerate(fleet.models):
            if batch_size <= model.max_num_seqs:
                yield Run("decode", (m,), (batch_size,), SHORT_PROMPT, needed=nth < 3)
    # The longest prompt of a task or so, and what is between.
    lengths = sorted({*PROMPT_LENGTHS, *_graph_lengths(fleet), long_prompt})
    lengths = [n for n in lengths if n <= min(longest, long_prompt)]
    for n in lengths:
        for m in range(len(fleet.models)):
            yield Run("prefill", (m,), (1,), n, needed=n in (lengths[0], lengths[-1]))
    middle = lengths[len(lengths) // 2]
    for n in dict.fromkeys((middle, lengths[0], lengths[-1])):
        for m, model in enumerate(fleet.models):
            yield Run("stall", (m,), (min(BATCH_SIZE, model.max_num_seqs),), n, needed=n == middle)
    for batch_size in (BATCH_SIZE, 1):
        for m, model in enumerate(fleet.models):
            if batch_size <= model.max_num_seqs:
                yield Run("decode", (m,), (batch_size,), long_prompt, needed=batch_size > 1)


def _graph_lengths(fleet: Fleet) -> Iterator[int]:
    """Of prompts, just below and above the largest step for which vLLM has a graph."""
    if fleet.num_gpus:
        for model in fleet.models:
            last = min(2 * model.max_num_seqs, _MOST_GRAPH_TOKENS)
            yield from (last + beside for beside in _BESIDE_THE_LAST_GRAPH)


def _services(fleet: Fleet) -> Iterator[Run]:
    models = tuple(range(len(fleet.models)))
    prompt = round(mean_lengths(fleet)[0])
    for group in dict.fromkeys([*((m,) for m in models), models, *itertools.combinations(models, 2)]):
        most = min(fleet.models[m].max_num_seqs for m in group)
        sizes = sorted({min(size, most) for size in (BESIDE_BATCHES if len(group) > 1 else ALONE_BATCHES)})
        if len(group) == 2 and len(models) >= _MANY_MODELS:
            sizes = sizes[-1:]
        for size in sizes:
            yield Run("service", group, (size,) * len(group), prompt, needed=True)

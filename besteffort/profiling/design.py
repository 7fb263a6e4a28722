"""The runs that a profile is made of: a designed set, not a grid, the most telling first."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from besteffort.fleet import Fleet

# Those without which there is no fit come first. Small ones need not lie on a line: kernels differ.
BATCH_SIZES = (1, 4, 16, 2, 8, 32, 3, 6, 64, 128, 12, 24, 256)
BATCH_SIZE = 4  # where the batch is not what is varied
LARGE_BATCH = 16  # of models side by side
SHORT_PROMPT = 16  # tokens
PROMPT_LENGTHS = (16, 64, 256, 1024)
LONG_PROMPT_SHARE = 0.7  # of max_model_len: the rest is for answers
_MARGIN_TOKENS = 24  # lengths of prompts vary about those that are planned
_MANY_MODELS = 5  # from here on only what is needed is measured side by side


@dataclass(frozen=True)
class Run:
    """One thing to do: load the models of `models` together, and measure each of them."""

    kind: Literal["decode", "prefill", "stall", "interference"]
    models: tuple[int, ...]
    batch_sizes: tuple[int, ...]  # of `models`
    num_prompt_tokens: int
    needed: bool = False  # whatever the budget

    def title(self, fleet: Fleet) -> str:
        names = [fleet.model_names[m] for m in self.models]
        if self.kind == "interference":
            return " + ".join(f"{b} at {name}" for b, name in zip(self.batch_sizes, names, strict=True))
        if self.kind == "decode":
            return f"{names[0]}, batch {self.batch_sizes[0]}, prompts of {self.num_prompt_tokens} tokens"
        beside = f" beside a batch of {self.batch_sizes[0]}" if self.kind == "stall" else ""
        return f"{names[0]}, a prompt of {self.num_prompt_tokens} tokens{beside}"


def plan_runs(fleet: Fleet) -> list[Run]:
    """All runs, those that a fit needs first, then by turns what refines it.

    Each model alone by batch size, by context and by prompt length; prompts that join a batch; pairs of
    models and all together, at several batches.
    """
    runs = [*_alone(fleet), *_together(fleet)]
    return [run for run in runs if run.needed] + [run for run in runs if not run.needed]


def _alone(fleet: Fleet) -> Iterator[Run]:
    longest = fleet.engine.max_model_len - _MARGIN_TOKENS
    long_prompt = int(LONG_PROMPT_SHARE * fleet.engine.max_model_len)
    for nth, batch_size in enumerate(BATCH_SIZES):
        for m, model in enumerate(fleet.models):
            if batch_size <= model.max_num_seqs:
                yield Run("decode", (m,), (batch_size,), SHORT_PROMPT, needed=nth < 3)
    # The longest prompt of a task or so, and what is between.
    lengths = sorted({n for n in (*PROMPT_LENGTHS, long_prompt) if n <= min(longest, long_prompt)})
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


def _together(fleet: Fleet) -> Iterator[Run]:
    """All models, then pairs: all at the usual batch, then one of them large and the others small."""
    models = range(len(fleet.models))
    groups = dict.fromkeys([tuple(models), *itertools.combinations(models, 2)])
    for group in groups:
        if len(group) > 1:
            sizes = tuple(min(BATCH_SIZE, fleet.models[m].max_num_seqs) for m in group)
            yield Run("interference", group, sizes, SHORT_PROMPT, needed=True)
    if len(models) >= _MANY_MODELS:
        return
    for group in groups:
        for large in range(len(group)) if len(group) > 1 else ():
            sizes = tuple(
                min(LARGE_BATCH if n == large else 1, fleet.models[m].max_num_seqs)
                for n, m in enumerate(group)
            )
            yield Run("interference", group, sizes, SHORT_PROMPT)

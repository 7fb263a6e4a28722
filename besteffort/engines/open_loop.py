"""Requests sent when their time has come, however slow the answers: the load that users make."""

import asyncio
import time

import aiohttp
import numpy as np

from besteffort.engines.client import Completion, complete, completion_body, open_session, random_prompt
from besteffort.errors import EngineError
from besteffort.fleet import Fleet
from besteffort.progress import Bar
from besteffort.request import Outcomes, Requests

# Between the call and the first request, so that it too is sent on time.
_LEAD_S = 0.2


class Ledger:
    """What became of each request so far. Requests are sent in order, each after those before it."""

    def __init__(self, requests: Requests, fleet: Fleet) -> None:
        self._requests = requests
        self._fleet = fleet
        num = len(requests)
        self._model = np.full(num, -1)
        self._replica = np.full(num, -1)
        self._sent_at, self._first_token_at, self._last_token_at = np.full((3, num), np.nan)
        self._num_tokens = np.zeros(num, dtype=np.int64)
        self._error = ["interrupted before it was answered"] * num
        self._num_sent = 0

    def sent(self, row: int, sent_at: float) -> None:
        self._sent_at[row] = sent_at
        self._num_sent = row + 1

    def answered(self, row: int, completion: Completion, began_at: float) -> None:
        self._sent_at[row] = completion.sent_at - began_at
        self._first_token_at[row] = completion.chunk_at[0] - began_at
        self._last_token_at[row] = completion.chunk_at[-1] - began_at
        self._num_tokens[row] = completion.num_tokens
        self._error[row] = ""
        model = completion.headers.get("x-besteffort-model")
        replica = completion.headers.get("x-besteffort-replica", "")
        if model in self._fleet.model_names and replica.isdecimal():
            self._model[row] = self._fleet.model_names.index(model)
            self._replica[row] = int(replica)

    def failed(self, row: int, error: EngineError) -> None:
        self._error[row] = str(error)

    def outcomes(self) -> Outcomes:
        """Of the requests that were sent: all of them, unless the replay was cut short."""
        requests, sent = self._requests, slice(self._num_sent)
        return Outcomes(
            requests=Requests(
                requests.arrived_at[sent],
                requests.task[sent],
                requests.num_prompt_tokens[sent],
                requests.num_output_tokens[sent],
            ),
            model=self._model[sent],
            replica=self._replica[sent],
            sent_at=self._sent_at[sent],
            first_token_at=self._first_token_at[sent],
            last_token_at=self._last_token_at[sent],
            num_tokens_received=self._num_tokens[sent],
            error=self._error[sent],
        )


async def send_open_loop(
    requests: Requests,
    fleet: Fleet,
    url: str,
    ledger: Ledger,
    *,
    api_key: str | None = None,
    timeout_s: float,
    rng: np.random.Generator,
    bar: Bar,
) -> None:
    """Send every request to the router at `url` on time, and note its outcome in `ledger`.

    Bodies are made beforehand, so that nothing but sending stands between a request and its time.
    """
    bodies = [
        completion_body("besteffort", random_prompt(int(num_prompt), rng), int(num_output))
        for num_prompt, num_output in zip(requests.num_prompt_tokens, requests.num_output_tokens, strict=True)
    ]
    key = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    headers = [{"x-besteffort-task": fleet.task_names[task], **key} for task in requests.task]
    async with open_session(timeout_s) as session, asyncio.TaskGroup() as group:
        began_at = time.perf_counter() + _LEAD_S
        for row, arrived_at in enumerate(requests.arrived_at):
            await asyncio.sleep(max(0.0, began_at + arrived_at - time.perf_counter()))
            group.create_task(_send(session, url, bodies[row], headers[row], row, ledger, began_at, bar))


async def _send(
    session: aiohttp.ClientSession,
    url: str,
    body: dict[str, object],
    headers: dict[str, str],
    row: int,
    ledger: Ledger,
    began_at: float,
    bar: Bar,
) -> None:
    ledger.sent(row, time.perf_counter() - began_at)
    try:
        ledger.answered(row, await complete(session, url, body, headers), began_at)
    except EngineError as error:
        ledger.failed(row, error)
    bar.advance()

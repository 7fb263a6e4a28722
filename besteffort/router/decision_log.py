"""What the policy saw, what it chose and what came of it, on disk; no request waits for that disk."""

import logging
import math
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from besteffort.artifacts.decisions_file import save_decisions
from besteffort.errors import UsageError
from besteffort.fleet import Fleet
from besteffort.router.decision_rows import DecisionRows
from besteffort.router.dispatcher import Decision, Route
from besteffort.router.prompt_count import PromptCount, estimate
from besteffort.router.request_body import RequestBody

log = logging.getLogger(__name__)

MAX_ROWS = 50_000  # of a part
EVERY_S = 60.0
_MAX_WAITING = 20_000  # rows, less than 1 KiB each: what a slow disk may cost in memory
_POLL_S = 0.1
_BATCH = 1024  # rows taken at once: some 0.1 ms, in which the interpreter's lock may be held
_CLOSE_S = 10.0


class Entry(msgspec.Struct):
    """What is known of one request, until it has ended."""

    _log: "DecisionLog"
    _decision: Decision | None
    _body: RequestBody | None
    _request_id: bytes
    _numbers: tuple[int, int] = (1, 1)  # tokens: of the prompt by its length, and wanted at most
    error: str | None = None  # an engine's
    prompt: PromptCount = msgspec.field(default_factory=PromptCount)

    def begin(self) -> None:
        """Read what is needed of the body, which goes to no engine any more, and let go of it."""
        if self._body is not None:
            self._numbers = estimate(self._body.prompt), self._body.max_tokens or 1
            self._body = None

    def end(
        self,
        route: Route,
        outcome: str,
        *,
        status: int,  # 0: none was sent
        num_retries: int,
        began_at: float,  # s, by the dispatcher's clock; NaN: no stream
        ended_at: float,
        num_tokens: int,
        latency_ms_per_token: float | None,
        deadline_ms_per_token: float,
    ) -> None:
        self.begin()
        stated, (estimated, num_wanted) = self.prompt.stated, self._numbers
        self._log.add(
            self._log.rows.pack(
                route,
                self._decision,
                self._request_id,
                outcome,
                num_prompt_tokens=estimated if stated is None else stated,
                prompt_estimated=stated is None,
                num_output_tokens=num_tokens or num_wanted,
                num_tokens_received=num_tokens,
                num_retries=num_retries,
                status=status,
                error=self.error,
                began_at=began_at,
                ended_at=ended_at,
                latency_ms_per_token=math.nan if latency_ms_per_token is None else latency_ms_per_token,
                deadline_ms_per_token=deadline_ms_per_token,
            )
        )


class DecisionLog(Collector):
    """Takes rows from the event loop, and writes them from a thread of its own, part by part.

    A part is written under a temporary name and renamed once it has `max_rows` rows or is `every_s` old, so
    that `kill -9` loses that much. What the disk is too slow or too full for is dropped and counted.
    """

    def __init__(
        self,
        folder: Path,
        fleet: Fleet,
        clock: Callable[[], float],  # the dispatcher's
        say: Callable[[str], None],
        *,
        every_s: float = EVERY_S,
        max_rows: int = MAX_ROWS,
        max_waiting: int = _MAX_WAITING,
        save: Callable[..., None] = save_decisions,
    ) -> None:
        self._folder = folder
        self._fleet = fleet
        self.rows = DecisionRows(len(fleet.models), time.time() - clock())
        self._clock = clock
        self._say = say
        self._every_s, self._max_rows, self._max_waiting = every_s, max_rows, max_waiting
        self._save = save
        self._waiting: deque[bytes] = deque()  # rows
        self._part = bytearray()  # of rows too
        self._num_rows = 0  # in it
        self._part_began_at = math.nan
        self._run_name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(3)}"
        self._num_parts = 0
        self._num = Counter({"written": 0, "too_slow": 0, "not_written": 0})
        self._num_told = 0  # of those dropped
        self._complained = False
        self._stop = threading.Event()
        self.rows.columns(bytes(self.rows.size))  # what Arrow loads when it is first used is loaded now
        self._thread = threading.Thread(target=self._run, name="decision log", daemon=True)
        self._thread.start()

    def add(self, row: bytes) -> None:
        if len(self._waiting) < self._max_waiting:
            self._waiting.append(row)
        else:
            self._num["too_slow"] += 1

    def close(self) -> None:
        """Write what is there; a disk that does not take it in time is left alone."""
        self._stop.set()
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            self._say(
                f"warning: the decision log in {self._folder} could not be ended within {_CLOSE_S:.0f} s"
            )

    def collect(self) -> Iterable[Metric]:
        rows = CounterMetricFamily(
            "besteffort_decision_log_rows",
            "Requests: written; dropped since the disk was too slow; not written since it refused.",
            labels=["outcome"],
        )
        for outcome, count in self._num.items():
            rows.add_metric([outcome], count)
        yield rows

    # The following run in the thread.

    def _run(self) -> None:
        while not self._stop.wait(_POLL_S):
            self._work(ending=False)
        while self._waiting or self._num_rows:
            self._work(ending=True)

    def _work(self, *, ending: bool) -> None:
        try:
            while self._waiting and self._num_rows < self._max_rows:
                self._take()
            is_old = self._clock() - self._part_began_at >= self._every_s
            if self._num_rows >= self._max_rows or (self._num_rows and (is_old or ending)):
                self._write()
                self._part, self._num_rows = bytearray(), 0
        except Exception:  # serving goes on whatever becomes of its log
            log.exception("a part of the decision log is lost")
            self._num["not_written"] += self._num_rows
            self._part, self._num_rows = bytearray(), 0

    def _take(self) -> None:
        num_taken = min(_BATCH, len(self._waiting), self._max_rows - self._num_rows)
        if not self._num_rows:
            self._part_began_at = self._clock()
        self._part += b"".join([self._waiting.popleft() for _ in range(num_taken)])
        self._num_rows += num_taken

    def _write(self) -> None:
        table, num_rows = self.rows.columns(self._part), self._num_rows
        path = self._folder / f"decisions-{self._run_name}-{self._num_parts:05d}.parquet"
        try:
            self._save(path, table, self._fleet, {"stage": "serve"})
        except UsageError as error:
            self._num["not_written"] += num_rows
            self._complain(f"{error}; until then requests are served and not logged")
            return
        self._num_parts += 1
        self._num["written"] += num_rows
        if self._num["too_slow"] > self._num_told:
            self._num_told = self._num["too_slow"]
            self._complain(f"{path}: the disk is too slow; what it cannot take is not logged, but counted")
        elif self._complained:
            self._complained = False
            self._say(f"the decision log in {self._folder} is written again")

    def _complain(self, line: str) -> None:
        """Once, until it is well again."""
        if not self._complained:
            self._complained = True
            self._say(f"warning: {line}")

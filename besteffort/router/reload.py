"""Another policy in charge, between two requests."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from besteffort.errors import InputError
from besteffort.policies import Policy
from besteffort.router.dispatcher import Dispatcher
from besteffort.router.policy_source import PolicySource

log = logging.getLogger(__name__)

Done = Callable[[BaseException | None], None]


class Reload(Collector):
    """Loads a policy beside the event loop and puts it in charge; one that cannot be loaded changes nothing.

    Loads that are asked for together come about one after the other. Made inside the running event loop.
    """

    def __init__(self, dispatcher: Dispatcher, source: PolicySource, say: Callable[[str], None]) -> None:
        self._dispatcher = dispatcher
        self._source = source
        self._say = say
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "policy")
        self._num_loads = Counter({"ok": 0, "failed": 0})
        self.name = source.given
        self.since = time.time()  # s since the epoch

    def start(self, name: str | None = None, done: Done = lambda error: None) -> None:
        """Begin to load a policy, by default that of the start anew; `done` hears what stood against it."""
        name = self._source.given if name is None else name
        loading = self._loop.run_in_executor(self._thread, self._source.load, name)
        loading.add_done_callback(partial(self._loaded, name, done))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def collect(self) -> Iterable[Metric]:
        policy = self._dispatcher.policy.name
        yield InfoMetricFamily("besteffort_policy", "The policy in charge.", value={"policy": policy})
        yield GaugeMetricFamily(
            "besteffort_policy_since_timestamp_seconds", "When it was put in charge.", value=self.since
        )
        loads = CounterMetricFamily(
            "besteffort_policy_loads", "Policies loaded while serving.", labels=["outcome"]
        )
        for outcome, count in self._num_loads.items():
            loads.add_metric([outcome], count)
        yield loads

    def _loaded(self, name: str, done: Done, loading: "asyncio.Future[Policy]") -> None:
        if loading.cancelled():
            return
        error = loading.exception()
        self._num_loads["failed" if error else "ok"] += 1
        in_charge = self._dispatcher.policy.name
        if error is None:
            self._dispatcher.put_in_charge(loading.result())
            self.name, self.since = name, time.time()
            self._say(f"{self._dispatcher.policy.name} is in charge, after {in_charge}")
        elif isinstance(error, InputError):
            self._say(f"warning: {in_charge} stays in charge: {error}")
        else:
            log.error("%s stays in charge: a policy could not be loaded", in_charge, exc_info=error)
        done(error)

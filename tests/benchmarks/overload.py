"""Five times as many requests as the router can carry, for a minute; and how it is afterwards.

`make overload` runs it, against the router as `serve` starts it, with the trained policy deciding, in front
of twelve simulated engines. First as many clients as it takes requests at a time measure what it can carry;
then requests come on time, however slow the answers; then, at once, half of what it can carry; and when all
is answered, as many clients as at first. It ends with status 1 if an answer is wrong, the router does less
than it could, its memory grew by more than a bound, or it turns away one of these last requests.
"""

import argparse
import asyncio
import itertools
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import uvloop

from tests.benchmarks.client import Answer, Client, request_bytes
from tests.benchmarks.fleet import Served, served

SPEED = 3.0  # of the engines, against their profile
MAX_IN_FLIGHT = 48
OPTIONS = ("--max-in-flight", str(MAX_IN_FLIGHT))
TIMES = 5.0  # what it can carry
NUM_TOKENS = 24
MIN_RATIO = 0.9  # of what it could carry just before
MAX_GROWTH_MIB = 16.0  # of the router's memory, over what it had at its capacity
SOON_MS = 10.0  # in which most of those turned away should know; told, and no fault
_TICK_S = 0.002
_BODY = {"model": "besteffort/hellaswag", "prompt": "plain 1 " + "word " * 200, "max_tokens": NUM_TOKENS}
REQUESTS = tuple(request_bytes({**_BODY, "stream": stream}) for stream in (False, True))


@dataclass
class Phase:
    """What became of the requests of some seconds; instants are seconds from its beginning."""

    duration_s: float
    began_at: float = field(default_factory=time.perf_counter)
    num_sent: int = 0
    answered_at: list[float] = field(default_factory=list)
    turned_away_at: list[float] = field(default_factory=list)
    turned_away_s: list[float] = field(default_factory=list)  # how long it took to say so
    wrong: list[Answer] = field(default_factory=list)

    def note(self, answer: Answer) -> None:
        kind, now = kind_of(answer), time.perf_counter() - self.began_at
        if kind == "answered":
            self.answered_at.append(now)
        elif kind == "turned away":
            self.turned_away_at.append(now)
            self.turned_away_s.append(answer.took_s)
        else:
            self.wrong.append(answer)

    @property
    def answered_per_s(self) -> float:
        """While requests came; answers after that are of an easier time."""
        return sum(at <= self.duration_s for at in self.answered_at) / self.duration_s

    @property
    def num_ended(self) -> int:
        return len(self.answered_at) + len(self.turned_away_at) + len(self.wrong)


def kind_of(answer: Answer) -> str:
    if answer.whole and answer.status == 200 and answer.body.count(b"@1@") == NUM_TOKENS:
        return "answered"
    if answer.whole and answer.status == 429 and answer.headers.get(b"retry-after", b"").isdigit():
        return "turned away"
    return "wrong"


@dataclass
class Overload:
    capacity: Phase
    beyond: Phase
    after: Phase
    calm: Phase
    memory_mib: list[float]  # at first, then each second
    capacity_mib: float  # of memory, just before the overload
    num_in_flight: float

    @property
    def phases(self) -> dict[str, Phase]:
        return {"capacity": self.capacity, "beyond": self.beyond, "after": self.after, "calm": self.calm}

    @property
    def growth_mib(self) -> float:
        return max(self.memory_mib) - self.capacity_mib

    @property
    def ratio(self) -> float:
        return self.beyond.answered_per_s / self.capacity.answered_per_s

    def faults(self) -> list[str]:
        """What is wrong with the router, in words; nothing of how long its answers took."""
        wrong = [answer for phase in self.phases.values() for answer in phase.wrong]
        num_away = len(self.calm.turned_away_at)
        checks = {
            f"{len(wrong)} wrong answers, the first {wrong[:1]}": not wrong,
            "a request had no answer": all(
                phase.num_sent == phase.num_ended for phase in self.phases.values()
            ),
            f"{self.num_in_flight:.0f} in flight at the end": self.num_in_flight == 0,
            "some were turned away before": not self.capacity.turned_away_at,
            "none was turned away": bool(self.beyond.turned_away_at),
            f"{num_away} turned away when all was over": not num_away,
            "nobody asked when all was over": self.calm.num_sent > 0,
            f"memory grew by {self.growth_mib:.1f} MiB": self.growth_mib <= MAX_GROWTH_MIB,
        }
        return [fault for fault, is_well in checks.items() if not is_well]


class Clients:
    """Connections that are kept, and more of them when none is free."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._free: list[Client] = []
        self._requests = itertools.cycle(REQUESTS)
        self._running: set[asyncio.Task[None]] = set()

    async def ask(self, phase: Phase) -> None:
        phase.num_sent += 1
        client = self._free.pop() if self._free else await Client.connect(self._port)
        phase.note(await client.ask(next(self._requests)))
        self._free.append(client)

    async def closed_loop(self, num_clients: int, duration_s: float) -> Phase:
        """Each asks again once it is answered."""
        phase = Phase(duration_s)

        async def work() -> None:
            while time.perf_counter() < phase.began_at + duration_s:
                await self.ask(phase)

        await asyncio.gather(*(work() for _ in range(num_clients)))
        return phase

    async def open_loop(self, rate_per_s: float, duration_s: float) -> Phase:
        """So many requests a second, evenly; it does not wait for the last answers."""
        phase = Phase(duration_s)
        while (elapsed_s := time.perf_counter() - phase.began_at) < duration_s:
            for _ in range(int(elapsed_s * rate_per_s) - phase.num_sent):
                task = asyncio.create_task(self.ask(phase))
                self._running.add(task)
                task.add_done_callback(self._running.discard)
                await asyncio.sleep(0)  # else it would not count as sent
            await asyncio.sleep(_TICK_S)
        return phase

    async def settle(self) -> None:
        """Until all that was sent is answered."""
        await asyncio.gather(*self._running)

    def close(self) -> None:
        for client in self._free:
            client.close()


async def overload(router: Served, seconds: float, seconds_beyond: float) -> Overload:
    clients, memory_mib = Clients(router.port), [router.rss_mib]

    async def sample() -> None:
        while True:
            await asyncio.sleep(1.0)
            memory_mib.append(router.rss_mib)

    sampling = asyncio.create_task(sample())
    await clients.closed_loop(MAX_IN_FLIGHT, seconds / 4)  # warm
    capacity = await clients.closed_loop(MAX_IN_FLIGHT, seconds)
    capacity_mib = router.rss_mib
    beyond = await clients.open_loop(TIMES * capacity.answered_per_s, seconds_beyond)
    after = await clients.open_loop(0.5 * capacity.answered_per_s, seconds)
    await clients.settle()
    # One seat that it forgot to give back, and one of these would be turned away, however slow all is.
    calm = await clients.closed_loop(MAX_IN_FLIGHT, seconds / 2)
    clients.close()
    sampling.cancel()
    num_in_flight = router.metric("besteffort_in_flight")[""]
    memory_mib.append(router.rss_mib)
    return Overload(capacity, beyond, after, calm, memory_mib, capacity_mib, num_in_flight)


def show(result: Overload) -> str:
    lines = [
        f"{'':12} {'offered/s':>9} {'answered/s':>10} {'sent':>8} {'answered':>8} {'429':>8} {'wrong':>6}"
    ]
    for name, phase in result.phases.items():
        lines.append(
            f"{name:12} {phase.num_sent / phase.duration_s:9.0f} {phase.answered_per_s:10.0f} "
            f"{phase.num_sent:8,} {len(phase.answered_at):8,} {len(phase.turned_away_at):8,} "
            f"{len(phase.wrong):6}"
        )
    after, away_ms = result.after, 1000.0 * np.array(result.beyond.turned_away_s or [np.nan])
    p50, p99, longest = np.percentile(away_ms, (50, 99, 100))
    last_ms = 1000.0 * max(after.turned_away_at, default=0.0)
    memory = result.memory_mib
    return "\n".join(
        [
            *lines,
            "",
            f"answered beyond capacity: {result.ratio:.2f} of the capacity just before",
            f"429 after: p50 {p50:.2f} ms, p99 {p99:.2f} ms, at most {longest:.2f} ms; "
            f"p99 within {SOON_MS:g} ms: {'yes' if p99 <= SOON_MS else 'no'}",
            f"the last 429 {last_ms:.0f} ms after the overload; in the first second after it "
            f"{_first_second(after.answered_at)} answered, {_first_second(after.turned_away_at)} turned away",
            f"memory of the router: {memory[0]:.1f} MiB at first, {result.capacity_mib:.1f} at its capacity, "
            f"{max(memory):.1f} at most, {memory[-1]:.1f} at the end",
            f"growth over its capacity: {result.growth_mib:.1f} MiB (at most {MAX_GROWTH_MIB:g})",
        ]
    )


def _first_second(instants: Iterable[float]) -> int:
    return sum(at <= 1.0 for at in instants)


def played(options: argparse.Namespace) -> Overload:
    load_core = (os.cpu_count() or 1) - 1
    os.sched_setaffinity(0, {load_core})
    with served(speed=SPEED, options=OPTIONS, cores=(load_core, 0)) as router:
        return uvloop.run(overload(router, options.seconds_around, options.seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--seconds-around", type=float, default=8.0, help="before and after it, each")
    result = played(parser.parse_args())
    sys.stdout.write(show(result) + "\n")
    faults = result.faults()
    if result.ratio < MIN_RATIO:  # by the clock, so that no test asks for it
        faults.append(f"answers fell to {result.ratio:.2f} of the capacity")
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()

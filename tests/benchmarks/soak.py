"""An hour's worth of requests in a minute or two, with all that clients and engines do wrong.

`make soak` runs it: 100,000 requests, as fast as it goes, through the router as `serve` starts it, with all
features on and the trained policy deciding, in front of twelve simulated engines. It ends with status 1 if
one request was lost, a count is wrong, or memory grows.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import uvloop

from tests.benchmarks.client import Answer, Client, request_bytes
from tests.benchmarks.fleet import Served, served

SHARES = {
    "plain": 0.44,
    "stream": 0.32,
    "endless": 0.06,  # a stream that the client leaves
    "silent": 0.04,  # no answer, until the client leaves
    "refuse": 0.03,  # by the engine, with 400
    "fail": 0.02,  # all engines say 500
    "fail-once": 0.02,  # the first engine does, the second answers
    "half-head": 0.02,  # the first engine breaks off in its answer's head, the second answers
    "garbage": 0.02,  # the first engine's answer is none, the second answers
    "half-stream": 0.03,  # the engine breaks off in the middle
}
# What the router must count them as.
OUTCOMES = {
    "endless": "cancelled",
    "silent": "cancelled",
    "refuse": "refused",
    "fail": "refused",
    "half-stream": "failed",
}
RETRIES = {"half-head": 1, "garbage": 1, "fail-once": 1, "fail": 2}
MODELS = ("besteffort/hellaswag", "besteffort/copa", "besteffort", "opt-125m", "opt-1.3b", "opt-6.7b")
NUM_CONNECTIONS = 96
SPEED = 10.0  # of the engines, against their profile; answers are short besides
RECONNECTS = 0.02  # of requests after which a client comes with a new connection
MAX_GROWTH_MIB = 4.0  # per 100,000 requests
WARM_UP = 0.2  # of the requests, after which memory counts
_SAMPLES = 200
_SETTLE_S = 10.0


@dataclass
class Soak:
    sent: Counter[str] = field(default_factory=Counter)  # by kind
    lost: Counter[str] = field(default_factory=Counter)  # did not end as their kind must
    first_lost: list[str] = field(default_factory=list)
    counted: dict[str, float] = field(default_factory=dict)  # by the router, by outcome
    num_retries: float = 0
    num_in_flight: float = 0
    engines: dict[str, int] = field(default_factory=dict)
    memory: list[tuple[int, float]] = field(default_factory=list)  # requests, MiB
    log: str = ""
    took_s: float = 0.0

    @property
    def outcomes(self) -> dict[str, int]:
        """What the router should have counted."""
        wanted = Counter[str]()
        for kind, number in self.sent.items():
            wanted[OUTCOMES.get(kind, "ok")] += number
        return dict(wanted)

    @property
    def retries(self) -> int:
        """How often the router should have asked another engine."""
        return sum(number * self.sent[kind] for kind, number in RETRIES.items())

    @property
    def warm(self) -> list[tuple[int, float]]:
        """Memory from when it should grow no more."""
        return [at for at in self.memory if at[0] >= WARM_UP * self.sent.total()]

    @property
    def growth_mib(self) -> float:
        """Of the router, per 100,000 requests: the slope of a straight line."""
        requests, mib = np.array(self.warm).T
        return float(np.polyfit(requests, mib, 1)[0]) * 1e5

    def faults(self, max_growth_mib: float = MAX_GROWTH_MIB) -> list[str]:
        """What is wrong with the router, in words."""
        retries = self.retries
        # Of those that the client left some never reached an engine.
        reached = self.sent.total() + retries - self.outcomes.get("cancelled", 0)
        checks = {
            f"lost: {dict(self.lost)} ({self.first_lost})": not self.lost,
            f"counted {self.counted}, and not {self.outcomes}": self.counted == self.outcomes,
            f"{self.num_retries:.0f} retries, and not {retries}": self.num_retries == retries,
            f"{self.num_in_flight:.0f} in flight at the end": self.num_in_flight == 0,
            f"engines count {self.engines}": self.engines["num_requests"] - self.engines["num_left"]
            == reached,
            f"engines still run {self.engines['num_running']}": self.engines["num_running"] == 0,
            f"memory grows by {self.growth_mib:.2f} MiB per 100,000": self.growth_mib < max_growth_mib,
            f"the router's log has a traceback: {self.log}": "Traceback" not in self.log,
        }
        return [fault for fault, is_well in checks.items() if not is_well]


async def soak(router: Served, num_requests: int, seed: int = 0) -> Soak:
    """Send all of them, and see what was counted."""
    result, rng, began_at = Soak(), random.Random(seed), time.perf_counter()
    kinds = rng.choices(list(SHARES), list(SHARES.values()), k=num_requests)
    counted_before, engines_before = (
        router.metric("besteffort_requests_total", "outcome"),
        router.engine_counts(),
    )
    numbers = iter(range(num_requests))

    async def work() -> None:
        client: Client | None = None
        for number in numbers:
            if client is None or not client.is_open:
                client = await Client.connect(router.port)
            await _one(client, number, kinds[number], rng, result)
            if rng.random() < RECONNECTS:
                client.close()
            if number % max(1, num_requests // _SAMPLES) == 0:
                result.memory.append((number, router.rss_mib))
        if client is not None:
            client.close()

    await asyncio.gather(*(work() for _ in range(NUM_CONNECTIONS)))
    result.took_s = time.perf_counter() - began_at
    await _settle(router)
    counted = router.metric("besteffort_requests_total", "outcome")
    result.counted = {name: value - counted_before.get(name, 0) for name, value in counted.items()}
    result.num_retries = router.metric("besteffort_retries_total").get("", 0)
    result.num_in_flight = router.metric("besteffort_in_flight")[""]
    result.engines = {name: value - engines_before[name] for name, value in router.engine_counts().items()}
    result.log = router.log.read_text()
    return result


async def _one(client: Client, number: int, kind: str, rng: random.Random, result: Soak) -> None:
    num_tokens = rng.randint(2, 8)
    body = {
        "model": rng.choice(MODELS),
        "prompt": f"{kind} {number} " + "word " * rng.randrange(60),
        "max_tokens": num_tokens,
        "stream": kind in ("stream", "endless", "half-stream"),
    }
    request = request_bytes(body)
    if kind == "silent":
        answer = await client.ask_and_leave(request, after_s=rng.uniform(0.0, 0.02))
    elif kind == "endless":
        answer = await client.ask_and_leave(request)
    else:
        answer = await client.ask(request)
    result.sent[kind] += 1
    if not is_right(kind, number, num_tokens, answer):
        result.lost[kind] += 1
        result.first_lost = result.first_lost or [f"{kind} {number}: {answer}"]


def is_right(kind: str, number: int, num_tokens: int, answer: Answer) -> bool:
    """Whether the answer is what the engine gave to this very request, and all of it."""
    token = b"@%d@" % number
    num_came = answer.body.count(token)
    if kind == "silent":
        return answer.status == 0
    if kind == "endless":
        return answer.status == 200 and num_came > 0 and not answer.whole
    if kind in ("refuse", "fail"):
        wanted = 400 if kind == "refuse" else 500
        return (
            answer.whole
            and answer.status == wanted
            and json.loads(answer.body)["error"]["message"] == str(number)
        )
    done = answer.body.endswith(b"data: [DONE]\n\n")
    if kind == "half-stream":
        return answer.whole and not done and b"engine_failed" in answer.body and num_came == num_tokens // 2
    return answer.whole and answer.status == 200 and num_came == num_tokens and done == (kind == "stream")


async def _settle(router: Served) -> None:
    """Those that clients left end a little later."""
    give_up_at = time.monotonic() + _SETTLE_S
    while router.metric("besteffort_in_flight")[""] or router.engine_counts()["num_running"]:
        if time.monotonic() > give_up_at:
            return
        await asyncio.sleep(0.05)


def show(result: Soak) -> str:
    sent, counted, wanted = result.sent, result.counted, result.outcomes
    lines = [f"{'':12} {'sent':>8} {'lost':>6}"]
    lines += [f"{kind:12} {sent[kind]:8,} {result.lost[kind]:6}" for kind in SHARES]
    lines += [f"{'all':12} {sent.total():8,} {result.lost.total():6}", ""]
    lines.append(f"{'':12} {'client':>8} {'router':>8}")
    lines += [f"{name:12} {wanted[name]:8,} {counted.get(name, 0):8,.0f}" for name in sorted(wanted)]
    lines += [f"{'retries':12} {result.retries:8,} {result.num_retries:8,.0f}"]
    lines += [f"{'in flight':12} {0:8} {result.num_in_flight:8.0f}", ""]
    (_, first), (_, warm), (_, last) = result.memory[0], result.warm[0], result.memory[-1]
    lines.append(f"memory of the router: {first:.1f} MiB at first, {warm:.1f} warm, {last:.1f} at the end, ")
    lines[-1] += f"{max(mib for _, mib in result.memory):.1f} at most"
    lines.append(
        f"growth once warm: {result.growth_mib:+.2f} MiB per 100,000 requests (under {MAX_GROWTH_MIB:g})"
    )
    rate = sent.total() / result.took_s
    lines.append(f"{result.took_s:.0f} s, {rate:,.0f} requests/s")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--num-requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with served(speed=SPEED) as router:
        result = uvloop.run(soak(router, options.num_requests, options.seed))
    sys.stdout.write(show(result) + "\n")
    faults = result.faults()
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()

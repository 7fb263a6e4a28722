"""Where a request was tried in vain, and what that says of the engines."""

from besteffort.router.breaker import Breaker
from besteffort.router.dispatcher import Route
from besteffort.router.upstream import Fault

_MAX_TRIES = 3  # that an engine may have worked at; to find nobody there costs next to nothing
# An engine that took long to begin is not asked twice: the next one would be, by as many again.
_RETRIED_FAULTS = frozenset(("connect", "connect_timeout", "broke_off", "garbage"))
# 501 is what an engine does not do at all. vLLM says 500 while it is dying; a gateway the others.
_RETRIED_STATUSES = frozenset((500, 502, 503, 504))


def ends_try(given: int | Fault) -> bool:
    """Whether another replica might do better than this status, or than this fault before an answer."""
    return given.kind in _RETRIED_FAULTS if isinstance(given, Fault) else given in _RETRIED_STATUSES


class Tries:
    """Of one request, from its first failure on."""

    def __init__(self) -> None:
        self.places: list[tuple[int, int]] = []  # models and replicas
        self._num_costly = 0  # of these
        self.num_retries = 0
        self._doubted: list[Breaker] = []

    @property
    def are_over(self) -> bool:
        return self._num_costly >= _MAX_TRIES

    def note(self, failed: Route, given: int | Fault) -> None:
        self.places.append((failed.model, failed.replica))
        if not (isinstance(given, Fault) and given.kind == "connect"):
            self._num_costly += 1

    def doubt(self, breaker: Breaker) -> None:
        """Its engine said 500, which may be the request's own fault."""
        self._doubted.append(breaker)

    def answered(self, status: int) -> None:
        """By another engine. Where that did well with the same request, those that said 500 are at fault.

        So a request that no engine can bear takes none of them out of service.
        """
        if status < 400:
            while self._doubted:
                self._doubted.pop().failed()

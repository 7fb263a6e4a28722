"""A policy to start from (`--init`), read and checked."""

from pathlib import Path

from besteffort.artifacts.policy_file import TrainedPolicy, load_policy
from besteffort.errors import PolicyError
from besteffort.fleet import Fleet
from besteffort.observation import Encoding, FleetEncoding
from besteffort.q_network import QNetwork

MEND = "name another policy of this fleet with --init, or leave it out to train from the beginning"


def load_start(path: Path, fleet: Fleet) -> TrainedPolicy:
    """A policy of this fleet; the kind of its deadlines may differ, since it is trained further.

    Raises:
        PolicyError: it is missing or malformed, or of another fleet.
    """
    other = "soft" if fleet.deadline_kind == "hard" else "hard"
    try:
        return load_policy(path, fleet, mend=MEND)
    except PolicyError as error:
        try:
            return load_policy(path, fleet.model_copy(update={"deadline_kind": other}), mend=MEND)
        except PolicyError:
            raise error from None


def reading_the_fleets_state(start: TrainedPolicy) -> tuple[QNetwork, FleetEncoding]:
    """Its network and normalisation, if it reads what the recipe `advantages` has it read.

    Raises:
        PolicyError: it reads another state, or has another form.
    """
    shapes = [weight.shape for weight in start.network.weights]
    if not isinstance(start.encoding, FleetEncoding):
        raise PolicyError(f"--init: trained on the paper's state, which this recipe does not use; {MEND}")
    if len(shapes) != 3 or shapes[1][0] != shapes[1][1]:
        raise PolicyError(f"--init: not a network with two hidden layers of one size; {MEND}")
    return start.network, start.encoding


def reading_the_papers_state(start: TrainedPolicy) -> tuple[QNetwork, Encoding]:
    """Its network and normalisation, if it reads the paper's state.

    Raises:
        PolicyError: it reads another one.
    """
    if not isinstance(start.encoding, Encoding):
        raise PolicyError(f"--init: not trained on the paper's state, as this recipe needs; {MEND}")
    return start.network, start.encoding

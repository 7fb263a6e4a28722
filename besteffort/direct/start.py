"""Reads curves of thresholds back from a policy, to search on from there (`--init`)."""

import numpy as np

from besteffort.artifacts.policy_file import TrainedPolicy
from besteffort.direct.curves import LOG_KNOTS, ThresholdCurves
from besteffort.direct.network import HALF_LN2, RAMP, SPANS_S, Floats, network_of_curves
from besteffort.errors import PolicyError
from besteffort.observation import FleetEncoding
from besteffort.q_network import QNetwork
from besteffort.training.start import MEND


def curves_of_network(network: QNetwork, encoding: FleetEncoding) -> ThresholdCurves | None:
    """What `network_of_curves` was given, to float32 rounding; None if the network is none of these."""
    num_tasks, num_models = encoding.num_tasks, encoding.num_models
    num_knots, num_others = len(LOG_KNOTS), num_models - 1
    if len(encoding.spans_s) != len(SPANS_S):
        return None
    like = network_of_curves(_flat(num_knots, num_tasks, num_others), encoding)
    if [weight.shape for weight in network.weights] != [weight.shape for weight in like.weights]:
        return None
    curve_units = num_tasks * (1 + num_knots)
    of_units = network.weights[1][:curve_units, :num_others].astype(np.float64)
    levels = _levels(of_units.reshape(num_tasks, 1 + num_knots, num_others))
    calm = network.weights[1][: curve_units : 1 + num_knots, 2 * num_others : 3 * num_others]
    ramps = network.biases[0][curve_units + num_models :: 2].astype(np.float64)
    levels = levels / HALF_LN2
    highest = levels.max(axis=(0, 1))
    curves = ThresholdCurves(levels, calm.astype(np.float64) / HALF_LN2, -RAMP * ramps, highest)
    same = network_of_curves(curves, encoding)
    pairs = zip((*same.weights, *same.biases), (*network.weights, *network.biases), strict=True)
    return curves if all(np.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in pairs) else None


def curves_of_policy(start: TrainedPolicy) -> tuple[ThresholdCurves, FleetEncoding]:
    """Of a policy to start from, and its normalisation.

    Raises:
        PolicyError: its network is not made of curves.
    """
    encoding = start.encoding
    curves = curves_of_network(start.network, encoding) if isinstance(encoding, FleetEncoding) else None
    if curves is None or not isinstance(encoding, FleetEncoding):
        raise PolicyError(f"--init: not trained by this recipe, which cannot go on with its network; {MEND}")
    return curves, encoding


def _flat(num_knots: int, num_tasks: int, num_others: int) -> ThresholdCurves:
    levels = np.zeros((num_knots, num_tasks, num_others))
    return ThresholdCurves(levels, levels[0], np.zeros(2), np.zeros(num_others))


def _levels(slopes: Floats) -> Floats:
    """What `_slopes` was given."""
    hinges = np.maximum(LOG_KNOTS[:, None] - LOG_KNOTS[None, :], 0.0)  # (K, K)
    along = np.einsum("kj,tjm->ktm", hinges, slopes[:, 1:])
    return np.asarray(slopes[:, 0][None] + along)

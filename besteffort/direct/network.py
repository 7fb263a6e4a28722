"""Curves of thresholds as a Q-network: Q-values of the same form as any other, for the same router.

The first layer has hinges on the logarithm of the arrival rate, one for each task and knot, and ramps that
tell a busy fleet from a calm one. The second puts a curve together, or its value for a calm fleet. The value
of a model is what is left between its batch size and its curve, on a scale that puts every larger model
first: so the highest value is the largest model with room, and the smallest model's is 0.
"""

import numpy as np
from numpy.typing import NDArray

from besteffort.direct.curves import LOG_KNOTS, ThresholdCurves
from besteffort.environment import fleet_encoding_with
from besteffort.fleet import Fleet
from besteffort.observation import FleetEncoding
from besteffort.q_network import QNetwork

# Over which rates are told: the curves', the short and the long look's; seconds, over the `rate_scale`.
SPANS_S = (1.0, 3.0, 16.0)
_GATE = 20.0  # more than any logarithm of a rate or batch size: what shuts a unit
RAMP = 0.005  # width of what tells calm from busy
_LIFT = 1.0  # added to levels, so that they pass a ReLU
_FIRST = 1000.0  # how much more the next larger model's room counts
_EVEN = 1e-4  # a batch just as large as its threshold still has room
HALF_LN2 = 0.5 * np.log(2.0)  # from doublings of 1 + batch size to the encoding's 0.5 * log1p
Floats = NDArray[np.float64]
Unit = tuple[dict[int, float], float]  # weights by input, and a bias


def direct_encoding_for(fleet: Fleet) -> FleetEncoding:
    return fleet_encoding_with(fleet, tuple(span_s / fleet.rate_scale for span_s in SPANS_S))


def network_of_curves(curves: ThresholdCurves, encoding: FleetEncoding) -> QNetwork:
    """Three layers; what they compute is exact to float32 rounding and the width of `RAMP`."""
    first, first_bias = _first_layer(curves, encoding)
    second, second_bias = _second_layer(curves, encoding)
    last, last_bias = _last_layer(encoding)
    layers = (first, second, last), (first_bias, second_bias, last_bias)
    weights, biases = (tuple(array.astype(np.float32) for array in arrays) for arrays in layers)
    return QNetwork(weights, biases)


def _first_layer(curves: ThresholdCurves, encoding: FleetEncoding) -> tuple[Floats, Floats]:
    """For each task a constant and hinges, then the batch sizes, then two ramps of two units."""
    num_tasks, num_models = encoding.num_tasks, encoding.num_models
    tasks_at = encoding.num_fleet_inputs
    short, glance, long = (
        tasks_at + num_tasks + (1 + len(SPANS_S)) + 1 + span for span in range(len(SPANS_S))
    )
    columns: list[Unit] = []
    for task in range(tasks_at, tasks_at + num_tasks):
        columns.append(({task: 1.0}, 0.0))
        columns += [({short: 1.0, task: _GATE}, -_GATE - knot) for knot in LOG_KNOTS.tolist()]
    columns += [({num_models + model: 1.0}, 0.0) for model in range(num_models)]
    for look, below in zip((long, glance), curves.calm_below.tolist(), strict=True):
        columns += [({look: 1.0 / RAMP}, -below / RAMP), ({look: 1.0 / RAMP}, -below / RAMP - 1.0)]
    return _matrix(columns, encoding.size)


def _second_layer(curves: ThresholdCurves, encoding: FleetEncoding) -> tuple[Floats, Floats]:
    """For models 1 to M - 1: curves, curves where calm, calm levels where calm; then all batch sizes."""
    num_tasks, num_models = encoding.num_tasks, encoding.num_models
    num_knots, others = len(curves.levels), range(num_models - 1)
    sizes_at = num_tasks * (1 + num_knots)
    ramps_at = sizes_at + num_models
    of_units = _slopes(HALF_LN2 * curves.levels).reshape(sizes_at, num_models - 1)
    shut_if_busy = {ramps_at: -_GATE, ramps_at + 1: _GATE, ramps_at + 2: -_GATE, ramps_at + 3: _GATE}
    columns: list[Unit] = []
    columns += [(dict(enumerate(of_units[:, model].tolist())), _LIFT) for model in others]
    columns += [(dict(enumerate(of_units[:, model].tolist())) | shut_if_busy, _LIFT) for model in others]
    for model in others:
        calm = {
            task * (1 + num_knots): HALF_LN2 * float(curves.calm_levels[task, model])
            for task in range(num_tasks)
        }
        columns.append((calm | shut_if_busy, _LIFT))
    columns += [({sizes_at + model: 1.0}, 0.0) for model in range(num_models)]
    return _matrix(columns, ramps_at + 4)


def _last_layer(encoding: FleetEncoding) -> tuple[Floats, Floats]:
    num_models = encoding.num_models
    others = num_models - 1
    columns: list[Unit] = [({}, 0.0)]
    for model in range(others):
        scale = _FIRST**model
        parts = {
            model: scale,
            others + model: -scale,
            2 * others + model: scale,
            3 * others + model + 1: -scale,
        }
        columns.append((parts, -_LIFT * scale))
    return _matrix(columns, 3 * others + num_models)


def _matrix(columns: list[Unit], num_inputs: int) -> tuple[Floats, Floats]:
    """Weights `(I, U)` and biases `(U,)` of units given by their inputs' weights."""
    weights = np.zeros((num_inputs, len(columns)))
    for unit, (inputs, _) in enumerate(columns):
        weights[list(inputs), unit] = list(inputs.values())
    return weights, np.array([bias for _, bias in columns])


def _slopes(levels: Floats) -> Floats:
    """Of lines from knot to knot a constant and changes of slope, `(T, 1 + K, M - 1)` of `(K, T, M - 1)`."""
    gaps = np.diff(LOG_KNOTS)
    slopes = np.diff(levels, axis=0) / gaps[:, None, None]
    flat = np.zeros_like(levels[:1])
    changes = np.diff(np.concatenate([flat, slopes, flat]), axis=0)
    return np.asarray(np.concatenate([levels[:1], changes]).transpose(1, 0, 2))

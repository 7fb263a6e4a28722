"""The arithmetic of a decision, compiled.

All in one file: numba keeps machine code on disk, and notices changes only in the file of the function that
Python calls.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def count_arrival(spans: NDArray[np.float64], elapsed_s: float) -> None:
    """Shape `(3, S)`: spans in seconds, counts, and rates per second; the last two are brought up to date."""
    for nth in range(spans.shape[1]):
        span_s = spans[0, nth]
        spans[1, nth] = spans[1, nth] * np.exp(-elapsed_s / span_s) + 1.0
        spans[2, nth] = spans[1, nth] / span_s


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def write_fleet_row(
    row: NDArray[np.float32],
    scales: NDArray[np.float64],
    task: int,
    rate_per_s: float,
    recent_rates_per_s: NDArray[np.float64],
    batch_sizes: NDArray[np.float64],
    neighbours: NDArray[np.float64],
) -> None:
    num_models, num_rates = len(batch_sizes), 1 + len(recent_rates_per_s)
    clip, rate_scale_per_s, num_levels, in_flight_scale = scales[0], scales[1], scales[2], scales[3:]
    for model in range(num_models):
        row[model] = min(batch_sizes[model] / in_flight_scale[model], clip)
        row[num_models + model] = 0.5 * np.log1p(batch_sizes[model])
        for other in range(num_models):
            row[(2 + model) * num_models + other] = 0.5 * np.log1p(neighbours[model, other])
    of_request = row[(2 + num_models) * num_models :]
    num_tasks = len(of_request) - 2 * num_rates
    of_request[:num_tasks] = 0.0
    of_request[task] = 1.0
    of_rates = of_request[num_tasks:]
    for nth in range(num_rates):
        scaled = (rate_per_s if nth == 0 else recent_rates_per_s[nth - 1]) / rate_scale_per_s
        of_rates[nth] = min(scaled, clip)
        of_rates[num_rates + nth] = 0.5 * np.log(min(num_levels * scaled, 1000.0) + 0.1)


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def feed(sizes: NDArray[np.int64], parameters: NDArray[np.float32], values: NDArray[np.float32]) -> None:
    """Inner loops run along rows, so that they are vectorised; half of the hidden values are 0."""
    last = len(sizes) - 2
    read, written = 0, 0
    for layer in range(last + 1):
        num_given, num_taken = sizes[layer], sizes[layer + 1]
        given = values[written : written + num_given]
        written += num_given
        taken = values[written : written + num_taken]
        weight = parameters[read : read + num_given * num_taken].reshape(num_given, num_taken)
        read += num_given * num_taken
        taken[:] = parameters[read : read + num_taken]
        read += num_taken
        for i in range(num_given):
            value = given[i]
            if value != 0.0:
                for j in range(num_taken):
                    taken[j] += value * weight[i, j]
        if layer < last:
            for j in range(num_taken):
                taken[j] = max(taken[j], np.float32(0.0))


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def choose(
    spans: NDArray[np.float64],
    elapsed_s: float,
    scales: NDArray[np.float64],
    task: int,
    rate_per_s: float,
    batch_sizes: NDArray[np.float64],
    neighbours: NDArray[np.float64],
    sizes: NDArray[np.int64],
    parameters: NDArray[np.float32],
    values: NDArray[np.float32],
) -> int:
    """All of the above in one call, since each costs more than what is done in it: the highest Q-value."""
    count_arrival(spans, elapsed_s)
    write_fleet_row(values[: sizes[0]], scales, task, rate_per_s, spans[2], batch_sizes, neighbours)
    feed(sizes, parameters, values)
    return np.argmax(values[len(values) - sizes[-1] :])  # type: ignore[return-value]

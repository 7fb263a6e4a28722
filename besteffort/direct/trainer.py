"""One training run: tuned thresholds or every knot alone, then all of them together, pass by pass."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray

from besteffort.arrivals import arrival_rates_per_s, recent_rates_per_s
from besteffort.direct.curves import KNOTS_PER_S, Levels, ThresholdCurves, levels_of_table
from besteffort.direct.network import direct_encoding_for, network_of_curves
from besteffort.direct.objective import Objective, draw_groups
from besteffort.direct.recipe import DirectRecipe
from besteffort.environment import Service
from besteffort.evolution import settle
from besteffort.observation import FleetEncoding
from besteffort.progress import Bar, Progress
from besteffort.q_network import QNetwork
from besteffort.request import Requests
from besteffort.simulator import Branching, Routing
from besteffort.thresholds import ThresholdTable
from besteffort.training.checkpoint import Checkpoint
from besteffort.training.state import Training
from besteffort.training.torch_network import network_of, tensors_of
from besteffort.training.trials import EVALUATION_SEED, Trials
from besteffort.training.workloads import TrainingWorkloads
from besteffort.tuning import Band, Effort, ThresholdService, tune_band

# A knot alone is searched on steady rates from here below it to here above it: rates are misjudged.
RATES_AROUND = (0.75, 1.35)


@dataclass
class DirectTraining(Training[FleetEncoding]):
    """An iteration is the search of one piece of the curves."""

    curves: ThresholdCurves = field(kw_only=True)  # as far as they are found
    mean: ThresholdCurves = field(kw_only=True)  # of the passes so far, but for the first


class DirectTrainer:
    """A training, from the beginning or from where it was kept."""

    def __init__(
        self,
        service: Service,
        recipe: DirectRecipe,
        seed: int,
        *,
        init: tuple[ThresholdCurves, FleetEncoding] | None = None,
        tuned: ThresholdTable | None = None,
        checkpoint: Checkpoint | None = None,
        workloads: TrainingWorkloads | None = None,
    ) -> None:
        self._service, self._recipe, self._seed, self._checkpoint = service, recipe, seed, checkpoint
        self._workloads = workloads or TrainingWorkloads(service.fleet)
        self._init = init is not None
        self._tuned = None if tuned is None else levels_of_table(tuned, service.fleet.rate_scale)
        self._encoding = init[1] if init else direct_encoding_for(service.fleet)
        self._caps = np.array([float(model.max_num_seqs) for model in service.fleet.models[1:]])
        start = init[0] if init else ThresholdCurves.starting_from(self._flat(), self._caps)
        self.training = DirectTraining(self._encoding, self._network(start), curves=start, mean=start)
        self.resumed = self._restore()
        chosen_on = [trace.chosen_on for trace in self._workloads.traces]
        rng = np.random.default_rng([EVALUATION_SEED, 1])
        self._evaluation = Trials(
            self._branching_on,
            self._workloads,
            chosen_on,
            recipe.evaluation_num_requests,
            recipe.num_threads,
            rng,
        )
        self._nth_pass = -1  # whose workloads are drawn

    def run(self, progress: Progress) -> DirectTraining:
        training, recipe = self.training, self._recipe
        began_at = time.monotonic() - training.wall_s
        num_pieces = recipe.num_passes * len(self._pieces)
        num_alone = 0 if self._init or self._tuned is not None else len(KNOTS_PER_S)
        with progress.bar("train", num_alone + num_pieces) as bar:
            if not training.curve:
                bar.describe("each knot alone" if num_alone else "what it begins with")
                if not self._init:
                    training.curves = self._beginning(bar)
                self._evaluate(training.curves)
                training.wall_s = time.monotonic() - began_at
                self.save()
            else:
                bar.advance(num_alone + training.iteration)
            while training.iteration < num_pieces:
                reached = self.step()
                training.wall_s = time.monotonic() - began_at
                best = training.best_evaluation.performance
                bar.describe(f"{reached:.4f} where it is searched, {best:.4f} in the best evaluation")
                bar.advance()
                self.save()
        return training

    @property
    def _pieces(self) -> list[int]:
        """In the order of a pass: what holds at all rates, a calm fleet, then from the highest rate down."""
        num_knots, recipe = len(KNOTS_PER_S), self._recipe
        first = [num_knots + 1] * recipe.with_highest + [num_knots] * recipe.with_calm
        return [*first, *reversed(range(num_knots))]

    def _beginning(self, bar: Bar) -> ThresholdCurves:
        levels = self._alone(bar) if self._tuned is None else self._tuned
        curves = ThresholdCurves.starting_from(levels, self._caps).clipped(self._caps)
        return curves if self._recipe.with_calm else curves.without_calm()

    def _alone(self, bar: Bar) -> Levels:
        """Each knot on steady workloads near it, whatever the others are."""
        fleet, likely = self._service.fleet, self._likely()
        of_fleet = ThresholdService(fleet, self._service.latency, self._service.values)
        effort = Effort(num_generations=self._recipe.num_generations_alone)

        def one(knot: int) -> Levels:
            low, high = (KNOTS_PER_S[knot] * around for around in RATES_AROUND)
            band = Band(of_fleet, low, high, effort, seed=2_000_000 + 1000 * self._seed + 2 * knot)
            rng = np.random.default_rng([self._seed, 1, knot])
            point, _ = tune_band(band, [likely.ravel()], effort, rng)
            return point.reshape(likely.shape)

        levels = []
        with ThreadPoolExecutor(self._recipe.num_threads) as pool:
            for of_knot in pool.map(one, range(len(KNOTS_PER_S))):
                levels.append(of_knot)
                bar.advance()
        return np.stack(levels)

    def _likely(self) -> Levels:
        """Of a good part of the largest batch with which a model makes the deadline alone, `(T, M - 1)`."""
        fleet = self._service.fleet
        steps_ms = self._service.latency.step_table_ms(int(self._caps.max(initial=1.0)))
        deadlines = np.array([task.deadline_ms_per_token for task in fleet.tasks])
        fits = steps_ms[None, 1:, 1:] <= deadlines[:, None, None]  # (T, M - 1, B)
        return np.asarray(np.log2(1.0 + np.minimum(0.5 * fits.sum(axis=2), self._caps)))

    def step(self) -> float:
        """Search one piece. It draws from its own seed, so that a continued training is the same training."""
        training, recipe, curves = self.training, self._recipe, self.training.curves
        nth_pass, nth_piece = divmod(training.iteration, len(self._pieces))
        piece = self._pieces[nth_piece]
        share = nth_pass / max(1, recipe.num_passes - 1)
        step = recipe.first_step + share * (recipe.last_step - recipe.first_step)
        self._draw(nth_pass)

        def worth(point: NDArray[np.float64]) -> float:
            return self._searched.worth(curves.with_piece(piece, point).clipped(self._caps))

        start = max(curves.alternatives(piece), key=worth)
        rng = np.random.default_rng([self._seed, 3, training.iteration])
        point, reached = settle(worth, start, recipe.num_generations, rng, step=step)
        found = curves.with_piece(piece, point).clipped(self._caps)
        # What a search finds owes a part of its worth to the workloads it was searched on.
        if not recipe.with_check or self._checked.worth(found) > self._checked.worth(curves):
            training.curves = found
        training.iteration += 1
        if nth_piece == len(self._pieces) - 1:
            self._end_pass(nth_pass)
        return reached

    def _draw(self, nth_pass: int) -> None:
        """Each pass has workloads of its own: what one owes to them the next one does not."""
        if nth_pass == self._nth_pass:
            return
        self._nth_pass = nth_pass
        self._searched, self._checked = (
            self._objective(np.random.default_rng([self._seed, 2, nth, nth_pass]), times)
            for nth, times in enumerate((1, self._recipe.num_times_checked))
        )

    def _objective(self, rng: np.random.Generator, times: int) -> Objective:
        groups = draw_groups(self._workloads, self._recipe, rng, times=times)
        return Objective(groups, self._service, self._encoding, self._recipe.num_threads)

    def _end_pass(self, nth_pass: int) -> None:
        training = self.training
        share = 1.0 / max(1, nth_pass) if self._recipe.with_mean else 1.0
        training.mean = training.mean.towards(training.curves, share)
        self._evaluate(training.mean)

    def _evaluate(self, curves: ThresholdCurves) -> None:
        network = self._network(curves)
        self.training.judge(network, self._evaluation.evaluate(network, self.training.iteration))

    def _network(self, curves: ThresholdCurves) -> QNetwork:
        return network_of_curves(curves, self._encoding)

    def _flat(self) -> Levels:
        return np.stack([self._likely()] * len(KNOTS_PER_S))

    def _branching_on(self, requests: Requests) -> Branching:
        return branching_on(requests, self._service, self._encoding)

    def save(self) -> None:
        if self._checkpoint is None:
            return
        training = self.training
        tensors = tensors_of("best", training.best)
        for name, curves in (("curves", training.curves), ("mean", training.mean)):
            for part in fields(curves):
                # A copy: both may be the same arrays, which safetensors does not write.
                tensors[f"{name}.{part.name}"] = torch.from_numpy(np.array(getattr(curves, part.name)))
        self._checkpoint.save(tensors, training.to_facts())

    def _restore(self) -> bool:
        kept = self._checkpoint.load() if self._checkpoint else None
        if kept is None:
            return False
        tensors, facts = kept

        def curves(name: str) -> ThresholdCurves:
            parts = (tensors[f"{name}.{part.name}"].numpy() for part in fields(ThresholdCurves))
            return ThresholdCurves(*parts)

        self.training.restore(facts, network_of("best", tensors))
        self.training.curves, self.training.mean = curves("curves"), curves("mean")
        return True


def branching_on(requests: Requests, service: Service, encoding: FleetEncoding) -> Branching:
    """To serve these requests by networks that read the fleet's state."""
    fleet, at = service.fleet, requests.arrived_at
    rates = arrival_rates_per_s(at), recent_rates_per_s(at, encoding.spans_s)
    inputs = encoding.encode_request(requests.task, *rates)
    unused = np.zeros((len(fleet.tasks), len(fleet.models) - 1))
    routing = Routing(np.array(encoding.in_flight_scale, dtype=np.float32), unused)
    return Branching(requests, fleet, service.latency, service.values, routing, inputs)

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from besteffort.arrivals import arrival_rates_per_s, recent_rates_per_s
from besteffort.artifacts.policy_file import TrainedPolicy, load_policy, save_policy
from besteffort.errors import PolicyError, UsageError
from besteffort.fleet import Fleet, load_fleet
from besteffort.latency import Latency
from besteffort.observation import Encoding, FleetEncoding, Observation
from besteffort.policies import Greedy, LeastLoaded, Policy, Thresholds, learned, load_named_policy
from besteffort.q_network import QNetwork
from besteffort.thresholds import ThresholdTable

NOWHERE = Path("/nowhere")
TITAN = Path(__file__).parents[1] / "artifacts" / "titan-rtx-opt"


def _named(spec: str, fleet: Fleet) -> Policy:
    return load_named_policy(spec, fleet, profile=NOWHERE, rewards=NOWHERE, rng=np.random.default_rng(0))


def _seen(*batch_sizes: float, task: int = 0, rate: float = 1.0) -> Observation:
    return Observation(task, np.array(batch_sizes, dtype=np.float64), rate)


def _trained(fleet: Fleet, bias: list[float]) -> TrainedPolicy:
    inputs = len(fleet.tasks) + len(fleet.models) + 1
    weight = np.zeros((inputs, len(bias)), dtype=np.float32)
    network = QNetwork((weight,), (np.array(bias, dtype=np.float32),))
    return TrainedPolicy(network, Encoding(len(fleet.tasks), len(fleet.models), 8.0, 10.0), {})


def test_static_always_takes_its_model(fleet: Fleet) -> None:
    policy = _named("static:large", fleet)
    assert [policy.choose(_seen(0, n)) for n in (0, 50)] == [1, 1]


def test_round_robin_takes_the_models_in_turn(fleet: Fleet) -> None:
    policy = _named("round-robin", fleet)
    assert [policy.choose(_seen(0, 0)) for _ in range(4)] == [0, 1, 0, 1]


def test_random_repeats_itself_for_a_seed(fleet: Fleet) -> None:
    first, second = (_named("random", fleet) for _ in range(2))
    choices = [first.choose(_seen(0, 0)) for _ in range(50)]
    assert choices == [second.choose(_seen(0, 0)) for _ in range(50)]
    assert set(choices) == {0, 1}


def test_least_loaded_prefers_the_larger_of_two_idle_models() -> None:
    assert LeastLoaded().choose(_seen(0, 0)) == 1
    assert LeastLoaded().choose(_seen(1, 2)) == 0


def test_greedy_takes_the_best_model_that_makes_the_deadline_and_else_the_fastest(fleet: Fleet) -> None:
    # 10 ms a step for the small one whatever its batch; 30 ms rising by 2 per request for the large.
    latency = Latency(
        batch_sizes=np.array([1, 101]),
        step_ms=np.array([[10.0, 10.0], [30.0, 230.0]]),
        prefill_base_ms=np.zeros(2),
        prefill_ms_per_token=np.zeros(2),
        slowdown=np.ones((2, 4)),
    )
    greedy = Greedy(latency, np.array([[0.8, 1.0], [0.8, 1.0]]), fleet)
    assert greedy.choose(_seen(0, 0)) == 1
    assert greedy.choose(_seen(0, 20)) == 0  # 70 ms a token misses copa's 40 ms
    assert greedy.choose(_seen(0, 20, task=1)) == 1  # and makes piqa's 80 ms
    hopeless = Greedy(latency, np.array([[0.8, 1.0]] * 2), _with_deadline(fleet, 5.0))
    assert hopeless.choose(_seen(0, 0)) == 0


def test_greedy_goes_by_the_request_s_own_deadline_where_it_has_one(fleet: Fleet) -> None:
    steps_ms = np.array([[10.0, 10.0], [30.0, 30.0]])
    latency = Latency(np.array([1, 101]), steps_ms, np.zeros(2), np.zeros(2), np.ones((2, 4)))
    greedy = Greedy(latency, np.array([[0.8, 1.0], [0.8, 1.0]]), fleet)
    seen = _seen(0, 0)  # copa, which has 40 ms; the large model takes 28.5, with prefills in no time
    chosen = [greedy.choose(replace(seen, deadline_ms_per_token=own)) for own in (None, 28.0, 29.0, 5.0)]
    assert chosen == [1, 0, 1, 0]


def test_what_was_learned_or_tuned_for_a_task_s_deadline_knows_no_other(fleet: Fleet) -> None:
    network = learned(_trained(fleet, [0.1, 0.7]), "trained")
    thresholds = Thresholds(ThresholdTable(np.array([5.0]), np.array([[[9.0], [9.0]]]), num_smoothed=8))
    strict = replace(_seen(0, 0), deadline_ms_per_token=1e-6)
    assert [policy.choose(strict) for policy in (network, thresholds)] == [1, 1]


def _with_deadline(fleet: Fleet, deadline_ms_per_token: float) -> Fleet:
    tasks = tuple(
        task.model_copy(update={"deadline_ms_per_token": deadline_ms_per_token}) for task in fleet.tasks
    )
    return fleet.model_copy(update={"tasks": tasks})


def test_a_trained_policy_comes_back_from_its_file_and_takes_the_highest_q_value(
    fleet: Fleet, tmp_path: Path
) -> None:
    path = tmp_path / "policy.safetensors"
    save_policy(path, _trained(fleet, [0.1, 0.7]), fleet)
    policy = _named(str(path), fleet)
    assert policy.choose(_seen(3, 4)) == 1
    assert policy.name == "trained:policy"


def test_a_trained_policy_passes_over_a_model_that_is_closed(fleet: Fleet) -> None:
    policy = learned(_trained(fleet, [0.1, 0.7]), "trained")
    seen = _seen(0, 0)
    assert [policy.choose(replace(seen, closed=closed)) for closed in ((), (1,), (0,), ())] == [1, 0, 1, 1]


@pytest.mark.parametrize("reads", ["fleet", "paper"])
def test_a_trained_policy_chooses_one_at_a_time_what_its_network_says_of_all(reads: str) -> None:
    rng = np.random.default_rng(0)
    trained = _shipped() if reads == "fleet" else _drawn(rng)
    policy = learned(trained, "trained")
    at = np.cumsum(rng.exponential(1 / 20, 3000))
    tasks, rates = rng.integers(0, 4, len(at)), arrival_rates_per_s(at)
    batch_sizes = rng.exponential([8.0, 8.0, 2.0], (len(at), 3))
    neighbours = np.floor(rng.exponential([8.0, 8.0, 2.0], (len(at), 3, 3)))
    if isinstance(trained.encoding, FleetEncoding):
        of_fleet = trained.encoding.encode_fleet(batch_sizes, neighbours)
        recent = recent_rates_per_s(at, trained.encoding.spans_s)
        of_request = trained.encoding.encode_request(tasks, rates, recent)
        inputs = np.concatenate([of_fleet, of_request], axis=1)
    else:
        inputs = trained.encoding.encode(tasks, batch_sizes, rates)
    q_values = np.sort(of_all := trained.network(inputs), axis=1)
    columns = zip(tasks.tolist(), batch_sizes, rates.tolist(), at.tolist(), neighbours, strict=True)
    chosen = np.array([policy.choose(Observation(*seen)) for seen in columns])
    # What rounding may turn: two values as good as equal. Few may be, or nothing is compared here.
    clear = q_values[:, -1] - q_values[:, -2] > 1e-4 * np.ptp(q_values)
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(chosen[clear], np.argmax(of_all, axis=1)[clear])
    assert len(set(chosen.tolist())) > 1


def _shipped() -> TrainedPolicy:
    """Of the default recipe, with units behind gates of large weights."""
    return load_policy(TITAN / "policies" / "hard.safetensors", load_fleet(TITAN))


def _drawn(rng: np.random.Generator) -> TrainedPolicy:
    """The paper's network, with drawn weights, and models that are as good as each other on the whole."""
    sizes = list(itertools.pairwise((8, 256, 256, 3)))
    weights = tuple((rng.normal(size=size) / np.sqrt(size[0])).astype(np.float32) for size in sizes)
    biases = [np.zeros(size[1], dtype=np.float32) for size in sizes]
    some = rng.uniform(0.0, 1.0, (100, 8)).astype(np.float32)
    biases[-1] = -QNetwork(weights, tuple(biases))(some).mean(axis=0)
    return TrainedPolicy(QNetwork(weights, tuple(biases)), Encoding(4, 3, 8.0, 24.0), {})


def test_a_policy_that_does_not_fit_on_the_disk_is_told(fleet: Fleet, full_disk: Path) -> None:
    weight = np.zeros((5, 20_000), dtype=np.float32)
    network = QNetwork((weight,), (np.zeros(20_000, dtype=np.float32),))
    with pytest.raises(UsageError, match=r"policy\.safetensors: cannot be written"):
        save_policy(
            full_disk / "policy.safetensors", TrainedPolicy(network, Encoding(2, 2, 8.0, 10.0), {}), fleet
        )
    assert list(full_disk.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"name": "other"}, "fleet = pair"),
        ({"deadline_kind": "soft"}, "deadline_kind = hard"),
    ],
)
def test_a_policy_for_another_fleet_is_refused(
    fleet: Fleet, tmp_path: Path, changed: dict[str, str], told: str
) -> None:
    path = tmp_path / "policy.safetensors"
    save_policy(path, _trained(fleet, [0.0, 1.0]), fleet)
    with pytest.raises(PolicyError, match=told):
        _named(str(path), fleet.model_copy(update=changed))
    with pytest.raises(PolicyError, match="deadlines_ms_per_token"):
        _named(str(path), _with_deadline(fleet, 41.0))


def test_a_policy_whose_network_does_not_fit_the_fleet_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    save_policy(path, _trained(fleet, [0.0, 1.0, 2.0]), fleet)
    with pytest.raises(PolicyError, match="maps 5 inputs to 3 models"):
        _named(str(path), fleet)


def _resaved(path: Path, changed: dict[str, NDArray[Any] | None]) -> None:
    """The file with other tensors; None: without this one."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()} | changed  # noqa: SIM118
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"layers.0.bias": None}, r"the tensor layers\.0\.bias is missing"),
        ({"layers.0.weight": None}, r"the tensor layers\.0\.weight is missing"),
        ({"layers.1.weight": None}, r"the tensor layers\.1\.bias is no part of a network of 1 layers"),
        ({"layers.2.weight": np.zeros((2, 2))}, r"layers\.2\.weight is of F64, not F32"),
        ({"layers.2.weight": np.zeros((2, 2), np.float32)}, r"the tensor layers\.2\.bias is missing"),
        ({"layers.2.bias": np.zeros(2, np.float32)}, r"layers\.2\.bias is no part of a network of 2 layers"),
        ({"odd": np.zeros(2, np.float32)}, "the tensor odd is no part of a network of 2 layers"),
        ({"layers.0.weight": np.zeros((5, 4), np.float16)}, r"layers\.0\.weight is of F16, not F32"),
        ({"layers.1.bias": np.zeros(2, np.int64)}, r"layers\.1\.bias is of I64, not F32"),
        ({"layers.1.weight": np.full((4, 2), np.nan, np.float32)}, r"layers\.1\.weight holds what is no num"),
        ({"layers.0.weight": np.zeros(5, np.float32)}, r"layers\.0\.weight is of shape \(5,\).*\(any, any\)"),
        ({"layers.0.bias": np.zeros(3, np.float32)}, r"layers\.0\.bias is of shape \(3,\).*\(4\)"),
        ({"layers.0.bias": np.zeros((4, 1), np.float32)}, r"layers\.0\.bias is of shape \(4, 1\)"),
        ({"layers.1.weight": np.zeros((3, 2), np.float32)}, r"layers\.1\.weight is of shape.*\(4, any\)"),
        ({"layers.1.bias": np.zeros((), np.float32)}, r"layers\.1\.bias is of shape \(\)"),
    ],
)
def test_a_policy_with_a_tensor_that_does_not_fit_is_refused_by_that_tensor_s_name(
    fleet: Fleet, tmp_path: Path, changed: dict[str, NDArray[Any] | None], told: str
) -> None:
    path = tmp_path / "policy.safetensors"
    sizes = ((5, 4), (4, 2))
    network = QNetwork(
        tuple(np.zeros(size, np.float32) for size in sizes),
        tuple(np.zeros(size[1], np.float32) for size in sizes),
    )
    save_policy(path, TrainedPolicy(network, Encoding(2, 2, 8.0, 10.0), {}), fleet)
    load_policy(path, fleet)
    _resaved(path, changed)
    with pytest.raises(
        PolicyError, match=rf"policy\.safetensors: damaged: .*{told}.*; train it for this fleet"
    ):
        load_policy(path, fleet)


def test_a_policy_of_numbers_that_numpy_does_not_know_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    save_policy(path, _trained(fleet, [0.0, 1.0]), fleet)
    size, head = int.from_bytes((data := path.read_bytes())[:8], "little"), data[8:]
    about = json.loads(head[:size])
    for name, tensor in about.items():
        if name != "__metadata__":
            tensor["dtype"] = "BF16"
            tensor["shape"][-1] *= 2
    written = json.dumps(about).encode()
    path.write_bytes(len(written).to_bytes(8, "little") + written + head[size:])
    with pytest.raises(PolicyError, match="is of BF16, not F32"):
        load_policy(path, fleet)


@pytest.mark.parametrize("bias", [np.nan, np.inf])
def test_a_policy_that_holds_what_is_no_number_is_refused(fleet: Fleet, tmp_path: Path, bias: float) -> None:
    path = tmp_path / "policy.safetensors"
    save_policy(path, _trained(fleet, [0.0, bias]), fleet)
    with pytest.raises(PolicyError, match=r"layers\.0\.bias holds what is no number"):
        _named(str(path), fleet)


def test_thresholds_that_remember_arrivals_choose_as_those_that_saw_them() -> None:
    table = ThresholdTable(np.array([5.0]), np.array([[[9.0], [-1.0]]]), num_smoothed=8)
    arrived_at = np.cumsum(np.r_[np.full(300, 1.0), np.full(30, 0.01)])
    seen, remembering, fresh = (Thresholds(table) for _ in range(3))
    for rate_per_s in arrival_rates_per_s(arrived_at):
        seen.choose(_seen(0, 0, rate=float(rate_per_s)))
    remembering.remember(arrived_at)
    observation = _seen(0, 0, rate=0.1)
    assert [policy.choose(observation) for policy in (seen, remembering, fresh)] == [0, 0, 1]


@pytest.mark.parametrize("content", [b"", b"not a policy", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_a_file_that_is_no_policy_is_refused(fleet: Fleet, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "policy.safetensors"
    path.write_bytes(content)
    with pytest.raises(PolicyError, match=r"policy\.safetensors"):
        _named(str(path), fleet)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("static:huge", "no model 'huge'; its models are small, large"),
        ("best", "no built-in policy and no such file"),
        ("missing.safetensors", "no such file"),
    ],
)
def test_an_unknown_policy_is_refused_with_those_that_are_known(fleet: Fleet, spec: str, told: str) -> None:
    with pytest.raises(PolicyError, match=told):
        _named(spec, fleet)

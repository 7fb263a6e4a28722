import dataclasses

import numpy as np
import pytest

from besteffort.errors import FleetError, UsageError
from besteffort.fleet import Fleet
from besteffort.latency import fit_latency
from besteffort.roofline import (
    GPUS,
    OPT_SHAPES,
    OVERHEADS,
    Constant,
    Overheads,
    Roofline,
    facts_of,
    gpu_named,
    kv_bytes_per_token,
    mean_context_tokens,
    model_samples,
    num_parameters,
    slowdown,
)

TITAN = GPUS["titan-rtx"]
SIZES = ("facebook/opt-125m", "facebook/opt-1.3b", "facebook/opt-6.7b")
IDEAL = Overheads(
    **{
        f.name: Constant(1.0 if f.name.endswith("share") else 0.0, "ideal")
        for f in dataclasses.fields(Overheads)
    }
)


def on_titan(name: str, overheads: Overheads = OVERHEADS) -> Roofline:
    return Roofline(TITAN, OPT_SHAPES[name], overheads)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("125m", 125e6), ("1.3b", 1.316e9), ("6.7b", 6.658e9), ("13b", 12.85e9), ("66b", 65.7e9)],
)
def test_shapes_have_the_number_of_parameters_that_their_name_says(name: str, expected: float) -> None:
    assert num_parameters(OPT_SHAPES[f"facebook/opt-{name}"]) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("name", SIZES)
def test_an_ideal_step_of_one_request_is_its_bytes_over_the_bandwidth(name: str) -> None:
    ideal, shape = on_titan(name, IDEAL), OPT_SHAPES[name]
    num_bytes = 2 * num_parameters(shape) + 100 * kv_bytes_per_token(shape)
    assert ideal.step_ms(1, 100) == pytest.approx(1000 * num_bytes / 672e9)


@pytest.mark.parametrize("name", SIZES)
def test_an_ideal_large_batch_is_its_operations_over_the_peak(name: str) -> None:
    ideal = on_titan(name, IDEAL)
    operations = 4096 * 2 * num_parameters(OPT_SHAPES[name])
    assert ideal.step_ms(4096, 0) == pytest.approx(1000 * operations / 130.5e12)


@pytest.mark.parametrize("name", SIZES)
def test_a_step_is_never_below_its_floor_and_rises_with_batch_and_context(name: str) -> None:
    real, ideal = on_titan(name), on_titan(name, IDEAL)
    for batch_size in range(1, 300):
        assert real.step_ms(batch_size, 200) > ideal.step_ms(batch_size, 200)
        assert real.step_ms(batch_size + 1, 200) > real.step_ms(batch_size, 200)
        assert real.step_ms(batch_size, 201) > real.step_ms(batch_size, 200)


def test_larger_models_are_slower_in_everything() -> None:
    small, medium, large = (on_titan(name) for name in SIZES)
    for of in (lambda m: m.step_ms(1, 0), lambda m: m.step_ms(64, 400), lambda m: m.prefill_ms(100)):
        assert of(small) < of(medium) < of(large)


def test_a_prefill_is_a_step_and_the_operations_on_its_prompt() -> None:
    large = on_titan(SIZES[-1])
    assert large.prefill_ms(0) == large.step_ms(1, 0)
    expected = 1000 * 2 * num_parameters(large.shape) / (130.5e12 * OVERHEADS.compute_share.value)
    assert large.prefill_ms(300) - large.prefill_ms(200) == pytest.approx(100 * expected)


def test_the_published_fit_of_opt_13b_on_an_a100_comes_out_again() -> None:
    """DistServe: decode 23.48 + 0.000593 context + 0.0607 batch (batch < 95); prefill 22.05 + 0.1405 n."""
    model = Roofline(GPUS["a100-sxm-80gb"], OPT_SHAPES["facebook/opt-13b"])
    for batch_size in (1, 16, 64, 94):
        for context in (50, 500, 1000):
            published = 23.48 + 0.000593 * batch_size * context + 0.0607 * batch_size
            assert model.step_ms(batch_size, context) == pytest.approx(published, rel=0.02)
    for length in (128, 512, 1024):
        assert model.prefill_ms(length) == pytest.approx(22.05 + 0.1405 * length, rel=0.05)


def test_engines_of_one_gpu_slow_each_other_down_the_more_the_more_there_are() -> None:
    small, medium, large = (on_titan(name) for name in SIZES)
    assert slowdown(large, [], 400) == 1.0
    assert 1 < slowdown(large, [small], 400) < slowdown(large, [medium], 400)
    assert slowdown(large, [medium], 400) < slowdown(large, [small, medium], 400) < 1.2


def test_strict_time_slices_add_at_most_the_whole_work_of_each_other_engine() -> None:
    strict = dataclasses.replace(OVERHEADS, time_slicing=Constant(1.0, "strict"))
    medium, large = (on_titan(name, strict) for name in SIZES[1:])
    assert 1 < slowdown(large, [medium], 400) < 2
    blind = dataclasses.replace(OVERHEADS, time_slicing=Constant(0.0, "blind"))
    assert slowdown(on_titan(SIZES[2], blind), [medium], 400) == 1.0


def test_long_outputs_count_by_the_time_they_run(fleet: Fleet) -> None:
    lengths = {"num_prompt_tokens": (50, 50), "num_output_tokens": (100, 100)}
    even = fleet.model_copy(update={"tasks": tuple(t.model_copy(update=lengths) for t in fleet.tasks)})
    assert mean_context_tokens(even) == pytest.approx(100)
    lengths["num_output_tokens"] = (1, 199)
    uneven = even.model_copy(update={"tasks": tuple(t.model_copy(update=lengths) for t in fleet.tasks)})
    drawn = np.arange(1, 200)
    expected = np.average(50 + drawn / 2, weights=drawn)
    assert mean_context_tokens(uneven) == pytest.approx(expected)


def opt_fleet(fleet: Fleet, *names: str) -> Fleet:
    pairs = zip(fleet.models, names, strict=True)
    return fleet.model_copy(
        update={"models": tuple(m.model_copy(update={"path": f"facebook/opt-{n}"}) for m, n in pairs)}
    )


def test_a_modelled_profile_says_so_in_every_row_and_gives_the_model_back(fleet: Fleet) -> None:
    fleet = opt_fleet(fleet, "125m", "6.7b")
    samples = model_samples(fleet, TITAN)
    assert {sample.source for sample in samples} == {"modelled"}
    assert all(s.std_ms == 0 and s.num_measurements == 0 for s in samples)
    latency = fit_latency(samples, fleet.model_names)
    small, large = on_titan(SIZES[0]), on_titan(SIZES[2])
    context = mean_context_tokens(fleet)
    np.testing.assert_allclose(latency.step_ms[1], [large.step_ms(b, context) for b in latency.batch_sizes])
    np.testing.assert_allclose(latency.prefill_base_ms, [small.prefill_ms(0), large.prefill_ms(0)])
    assert latency.slowdown[1, 3] == pytest.approx(slowdown(large, [small], context))
    np.testing.assert_array_equal(latency.slowdown[:, [0, 1, 2]][[0, 1], [1, 2]], 1)


def test_every_constant_names_a_source_or_says_that_it_is_calibrated(fleet: Fleet) -> None:
    for gpu in GPUS.values():
        constants = facts_of(opt_fleet(fleet, "125m", "1.3b"), gpu)["constants"]
        assert len(constants) == 9
        for constant in constants.values():
            assert constant["value"] > 0
            assert constant["source"].startswith(("calibrated", "NVIDIA", "vLLM, OPT-13B"))


def test_a_model_of_unknown_shape_and_an_unknown_gpu_are_refused(fleet: Fleet) -> None:
    with pytest.raises(FleetError, match="model 'small': the shape of small is not known"):
        model_samples(fleet, TITAN)
    with pytest.raises(UsageError, match="--gpu abacus: no known GPU; choose one of titan-rtx"):
        gpu_named("abacus")

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from besteffort.advantages import ADVANTAGE_RECIPES
from besteffort.artifacts import files
from besteffort.artifacts.policy_file import TrainedPolicy, save_policy
from besteffort.artifacts.profile_file import save_samples
from besteffort.environment import encoding_for
from besteffort.errors import FleetError
from besteffort.fleet import Fleet, load_fleet
from besteffort.observation import Encoding
from besteffort.profiling import origin_of
from besteffort.q_network import QNetwork
from besteffort.stages import demo, training_setup
from besteffort.training.torch_network import export_network, make_network
from tests.conftest import ROOT
from tests.test_score import Lines


@pytest.fixture
def fleet_dir(tmp_path: Path) -> Path:
    """The shipped CPU fleet, beside files that are only hashed."""
    toml = ROOT / "artifacts" / "tiny-opt-cpu" / "fleet.toml"
    (tmp_path / "fleet.toml").write_bytes(toml.read_bytes())
    for name in ("profile", "rewards"):
        (tmp_path / f"{name}.parquet").write_bytes(name.encode())
    return tmp_path


def _unreachable(*args: object, **options: object) -> None:
    raise FleetError("the hub cannot be reached")


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> demo.Demo:
    monkeypatch.setattr(demo, "score", _unreachable)
    return demo.Demo(tmp_path, tmp_path / "r", None, tmp_path / "t", fresh=False)


def test_without_documents_to_be_had_the_demo_goes_on_and_says_so(spec: demo.Demo, fleet: Fleet) -> None:
    progress = Lines()
    demo._score(spec, fleet, {}, progress)
    assert progress.lines == ["scoring is left out: the hub cannot be reached"]


def test_documents_that_were_given_and_are_not_there_end_the_demo(spec: demo.Demo, fleet: Fleet) -> None:
    given = demo.Demo(spec.fleet_dir, spec.rewards, spec.fleet_dir / "nowhere", spec.trace, fresh=False)
    with pytest.raises(FleetError):
        demo._score(given, fleet, {}, Lines())


def test_what_was_measured_before_is_used_again_only_for_the_same_fleet_toml(spec: demo.Demo) -> None:
    toml = spec.fleet_dir / "fleet.toml"
    toml.write_bytes((ROOT / "artifacts" / "tiny-opt-cpu" / "fleet.toml").read_bytes())
    assert not demo._is_of_fleet(spec)
    origin = origin_of(load_fleet(spec.fleet_dir))
    for now, used in ((origin, True), ({**origin, "vllm": "0.1"}, False), ({}, False)):
        save_samples(spec.profile, [], {"fleet_sha256": files.sha256(toml), "origin": now})
        assert demo._is_of_fleet(spec) is used
    toml.write_text(toml.read_text() + "# changed")
    save_samples(spec.profile, [], {"fleet_sha256": "of another", "origin": origin})
    assert not demo._is_of_fleet(spec)


def test_a_policy_is_used_again_only_if_all_that_its_training_depends_on_is_the_same(
    fleet_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = load_fleet(fleet_dir)
    spec = demo.Demo(fleet_dir, fleet_dir / "rewards.parquet", None, fleet_dir / "t", fresh=False)
    assert not demo._is_trained_as_now(spec, fleet)
    encoding = encoding_for(fleet)
    network = drawn_for(encoding)

    def write() -> None:
        save_policy(spec.policy, TrainedPolicy(network, encoding, demo._training(spec).identity()), fleet)

    write()
    assert demo._is_trained_as_now(spec, fleet)
    for module, name, value in (
        (demo, "SEED", 99),
        (demo, "DEADLINE_MARGIN", 0.5),
        (training_setup, "__version__", "0.0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert not demo._is_trained_as_now(spec, fleet), name
    with monkeypatch.context() as patch:
        longer = replace(ADVANTAGE_RECIPES["demo"], num_rounds=9)
        patch.setitem(ADVANTAGE_RECIPES, "demo", longer)
        assert not demo._is_trained_as_now(spec, fleet)
    spec.profile.write_bytes(b"another one")
    assert not demo._is_trained_as_now(spec, fleet)


def drawn_for(encoding: Encoding) -> QNetwork:
    return export_network(make_network((encoding.size, 4, encoding.num_models), np.random.default_rng(0)))

from pathlib import Path

import pytest

from besteffort.errors import FleetError
from besteffort.fleet import Fleet
from besteffort.stages import demo
from tests.test_score import Lines


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
    from besteffort.artifacts import files
    from besteffort.artifacts.profile_file import save_samples

    toml = spec.fleet_dir / "fleet.toml"
    toml.write_text("name = 'a'")
    assert not demo._is_of_fleet(spec)
    save_samples(spec.profile, [], {"fleet_sha256": files.sha256(toml)})
    assert demo._is_of_fleet(spec)
    toml.write_text("name = 'b'")
    assert not demo._is_of_fleet(spec)

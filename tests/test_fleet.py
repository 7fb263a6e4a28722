from pathlib import Path

import pytest

from besteffort.errors import FleetError
from besteffort.fleet import load_fleet
from tests.conftest import ROOT

GOOD = """
schema_version = 1
name = "pair"
[[models]]
name = "small"
path = "small"
[[models]]
name = "large"
path = "large"
[[tasks]]
name = "copa"
deadline_ms_per_token = 40
lm_eval_task = "copa"
"""


def _load(folder: Path, text: str) -> None:
    (folder / "fleet.toml").write_text(text)
    load_fleet(folder)


@pytest.mark.parametrize("shipped", ["tiny-opt-cpu", "titan-rtx-opt", "one-gpu-opt"])
def test_every_shipped_fleet_loads(shipped: str) -> None:
    fleet = load_fleet(ROOT / "artifacts" / shipped)
    assert fleet.name == shipped
    assert fleet.task_names == ("hellaswag", "copa", "piqa", "openbookqa")


def test_the_fleet_of_the_paper_has_one_replica_of_each_model_on_each_of_its_four_gpus() -> None:
    fleet = load_fleet(ROOT / "artifacts" / "titan-rtx-opt")
    assert [model.replicas for model in fleet.models] == [4, 4, 4]
    assert [fleet.device_of(replica) for replica in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("wrong", "right", "told"),
    [
        ('name = "large"', 'name = "small"', "duplicate model 'small'"),
        ("deadline_ms_per_token = 40", "deadline_ms_per_token = -1", "tasks.0.deadline_ms_per_token"),
        ("deadline_ms_per_token = 40", "deadline = 40", "deadline"),
        ('path = "large"', "", "models.1: give exactly one of architecture, path and urls"),
        ('path = "large"', 'path = "large"\nreplicas = "two"', "models.1.replicas"),
        ('path = "large"', 'urls = ["ftp://x y"]', "'ftp://x y' is no URL"),
        ('name = "large"', 'name = "besteffort"', "the router's own name"),
        ('path = "large"', 'path = "large"\nkv_cache_tokens = 2047', "kv_cache_tokens = 2047, less than"),
        ("schema_version = 1", "schema_version = 9", "schema_version"),
        ('name = "copa"', 'name = "copa"\nshare = 0', "share"),
        ('name = "copa"', 'name = "copa"\nnum_prompt_tokens = [9, 3]', "must rise"),
        ('name = "copa"', 'name = "copa"\nnum_prompt_tokens = [1, 9999]', "max_model_len"),
        ('name = "pair"', 'name = "../pair"', "name"),
        ("[[models]]", "[[models", "not valid TOML"),
    ],
)
def test_a_fleet_that_does_not_hold_together_is_refused_in_one_line(
    tmp_path: Path, wrong: str, right: str, told: str
) -> None:
    _load(tmp_path, GOOD)
    with pytest.raises(FleetError, match=r"fleet\.toml") as caught:
        _load(tmp_path, GOOD.replace(wrong, right, 1))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_fleet_toml_is_refused_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="no such file"):
        load_fleet(tmp_path / "nowhere")

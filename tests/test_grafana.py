"""The dashboard in docs/grafana.json: Grafana's schema, and the metrics of a real router and no others."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from besteffort.engines.running import Engine
from besteffort.fleet import Fleet
from besteffort.policies import RoundRobin
from besteffort.rewards import Rewards
from besteffort.router import DecisionLog, Dispatcher, Forecast, PolicySource
from tests.conftest import ROOT
from tests.routing import routing
from tests.test_reload import ask

GIVEN = json.loads((ROOT / "docs" / "grafana.json").read_text())

_NOTHING = object()


def lost(given: Any, read: Any, where: str = "") -> list[str]:
    """What Grafana's own types did not take over as it is."""
    if isinstance(given, dict) and isinstance(read, dict):
        pairs = [(key, value, read.get(key, _NOTHING)) for key, value in given.items()]
    elif isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        pairs = [(number, *pair) for number, pair in enumerate(zip(given, read, strict=True))]
    else:
        return [] if given == read else [where]
    return [at for key, one, other in pairs for at in lost(one, other, f"{where}/{key}")]


def as_read(dashboard: dict[str, Any]) -> Any:
    return json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))


def test_grafana_s_own_types_take_all_of_it() -> None:
    assert lost(GIVEN, as_read(GIVEN)) == []
    assert lost({**GIVEN, "pannels": []}, as_read({**GIVEN, "pannels": []})) == ["/pannels"]


def test_panels_have_what_grafana_demands_and_do_not_overlap() -> None:
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= GIVEN.keys()
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in GIVEN["panels"]
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in GIVEN["panels"]}) == len(GIVEN["panels"])
    for panel in GIVEN["panels"]:
        assert panel["title"]
        assert {target["refId"] for target in panel["targets"]} == set("AB"[: len(panel["targets"])])


@pytest.fixture
def shown(fleet: Fleet, tmp_path: Path) -> dict[str, str]:
    """The types of all metrics that a router with everything on answers, by name."""
    replica = Engine("http://127.0.0.1:9", "served")
    ones = np.ones((2, 2))
    forecast = Forecast(fleet, None, Rewards(ones, ones, ones.astype(int), ("acc", "acc"), "given"))
    dispatcher = Dispatcher(fleet, RoundRobin(), ((replica, replica), (replica,)), forecast=forecast)
    source = PolicySource("round-robin", tmp_path, lambda name: RoundRobin())
    log = DecisionLog(tmp_path, fleet, dispatcher.clock, lambda line: None)
    with routing(dispatcher, source=source, decision_log=log) as url:
        text = ask(url, "GET", "/metrics")[1]
    log.close()
    return dict(re.findall(r"^# TYPE (besteffort_\w+) (\w+)$", text, re.MULTILINE))


def test_it_shows_every_metric_of_the_router_and_no_other(shown: dict[str, str]) -> None:
    expressions = [target["expr"] for panel in GIVEN["panels"] for target in panel["targets"]]
    expressions += [annotation["expr"] for annotation in GIVEN["annotations"]["list"]]
    asked = set(re.findall(r"besteffort_\w+", " ".join(expressions)))
    known = {}
    for name, kind in shown.items():
        for ending in ("_bucket", "_sum", "_count") if kind == "histogram" else ("",):
            known[name + ending] = name
    assert asked <= known.keys()
    assert {known[name] for name in asked} == shown.keys()

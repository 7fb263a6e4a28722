"""The router's own document of its API, and Schemathesis, which asks a router all that it allows."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from besteffort.engines.running import Engine
from besteffort.fleet import Fleet
from besteffort.policies import Policy, RoundRobin, load_named_policy
from besteffort.router import ApiKey, Dispatcher, PolicySource, Settings
from tests.fake_engine import RawEngine, plain_answer
from tests.routing import routing
from tests.test_reload import ask

SEED = "20240701"


def test_it_holds_against_schemathesis(fleet: Fleet, tmp_path: Path) -> None:
    """No 5xx, no hang, no crash, and nothing that the document does not say; always the same requests."""

    def load(name: str) -> Policy:
        nowhere = Path("/nowhere")
        return load_named_policy(name, fleet, profile=nowhere, rewards=nowhere, rng=np.random.default_rng(0))

    engine = RawEngine(lambda connection, number: connection.sendall(plain_answer()))
    replica = Engine(engine.url, "served")
    dispatcher = Dispatcher(fleet, RoundRobin(), ((replica, replica), (replica,)))
    settings, source = Settings(admin_key=ApiKey("admin")), PolicySource("random", tmp_path, load)
    with routing(dispatcher, settings, source=source) as url:
        document = ask(url, "GET", "/openapi.json")[1]
        assert set(document["paths"]) >= {"/v1/completions", "/admin/policy", "/metrics"}
        checks = (
            "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
        )
        command = [
            sys.executable,
            "-m",
            "schemathesis.cli",
            "run",
            f"{url}/openapi.json",
            "--seed",
            str(SEED),
        ]
        command += ["--checks", checks, "--max-examples", "10", "--phases", "examples,coverage,fuzzing"]
        command += ["--header", "Authorization: Bearer admin", "--request-timeout", "10"]
        command += ["--no-color", "--generation-database", "none"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert ask(url, "GET", "/health")[0] == 200
        assert len(engine.requests) > 5
    engine.close()


def test_every_path_that_is_served_is_in_the_document() -> None:
    document = json.loads((Path(__file__).parents[1] / "besteffort/router/openapi.json").read_text())
    source = (Path(__file__).parents[1] / "besteffort/router/app.py").read_text()
    served = set(re.findall(r'b"(/[^"]+)"', source))
    assert {path.replace("{model}", "") for path in document["paths"]} == served

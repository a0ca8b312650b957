"""What an agent's log says of a call that control refuses: which value, and why."""

import httpx
import pytest

from agent.control import Control
from agent.sync import Sync

URL = "https://api.example.com/api/v1/agent/sync"


@pytest.mark.serverless
def test_a_refused_inventory_is_told_value_by_value_and_not_as_silence():
    body = {
        "code": "import_invalid",
        "detail": "2 values are wrong.",
        "errors": [
            {"pointer": "/0/gpu_model", "message": "is needed"},
            {"pointer": "/0/power_node", "message": "there is no node pdu-9"},
        ],
    }
    error = Control._error(URL, httpx.Response(422, json=body), body)
    said = Sync._explain(error)
    assert error.kind == "refused"
    assert "/0/gpu_model: is needed; /0/power_node: there is no node pdu-9" in said
    assert "refuses what this agent tells it" in said
    assert "does not answer" not in said


@pytest.mark.serverless
def test_a_server_that_fails_is_still_one_that_does_not_answer():
    error = Control._error(URL, httpx.Response(502, text="bad gateway"), None)
    assert "does not answer" in Sync._explain(error)

"""How a simulated site's agent is told what to speak to."""

from typing import Any


def agent_config(name: str, url: str, *, runtime: str = "process") -> dict[str, Any]:
    """An agent's configuration for a simulated site at `url` (docs/agent.md)."""
    return {
        "name": name,
        "hosts": {"driver": "sandbox", "url": url},
        "miners": {"driver": "luxos"},
        "meters": {"driver": "sandbox"},
        "runtime": runtime,
        "wait_s": 20,
        "report_s": 2,
        "miner_poll_s": 5,
    }

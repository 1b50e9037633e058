"""Reading server-sent events."""

from __future__ import annotations

import json
from typing import Any


def chunks(body: str) -> list[dict[str, Any]]:
    """Return the JSON of every event; the body must be well formed and end with the end marker."""
    events = body.split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") for event in events)
    payloads = [event.removeprefix("data: ") for event in events]
    assert payloads.pop() == "[DONE]"
    return [json.loads(payload) for payload in payloads]

"""Where the time of a request goes, by its trace."""

from typing import Any


def durations(trace: dict[str, Any]) -> dict[str, float]:
    output = trace["outputs"][0]
    at = {event["name"]: event for event in output["events"]}
    return {
        "first_token": at["sent"]["first"] - at["received"]["time"],
        "waited": at["admitted"]["time"] - at["queued"]["time"],
        "computed": sum(event["num_new"] for event in output["events"] if event["name"] == "prefill"),
    }

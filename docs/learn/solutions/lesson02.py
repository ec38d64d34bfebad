"""Where the time of a request goes, by its trace."""

from typing import Any


def durations(trace: dict[str, Any]) -> dict[str, float]:
    output = trace["outputs"][0]
    stages = {stage["name"]: stage for stage in output["stages"]}
    return {
        "first_token": stages["sent"]["first"] - stages["received"]["time"],
        "waited": stages["admitted"]["time"] - stages["queued"]["time"],
        "computed": sum(chunk["num_new"] for chunk in output["chunks"]),
    }

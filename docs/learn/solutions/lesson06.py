"""When the tokens of each step are known."""


def finish_times(host: list[float], device: list[float], overlap: bool) -> list[float]:
    now = 0.0  # of the scheduler
    free = 0.0  # when the device has nothing more to do
    ends: list[float] = []  # of the steps on the device
    known: list[float] = []
    for plan_time, step_time in zip(host, device, strict=True):
        now += plan_time
        free = max(now, free) + step_time
        ends.append(free)
        while len(known) < len(ends) - (1 if overlap else 0):
            now = max(now, ends[len(known)])  # wait for the oldest step
            known.append(now)
    while len(known) < len(ends):
        now = max(now, ends[len(known)])
        known.append(now)
    return known

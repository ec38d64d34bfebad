"""What runs in the worker processes. Importing this module is cheap: the main process does it too."""

from __future__ import annotations

import logging

from minisgl.config.runtime import ServerConfig
from minisgl.errors import ConfigError
from minisgl.message.messages import StatsMsg, TraceMsg
from minisgl.message.sockets import Endpoints
from minisgl.processes.control import Control


def fake_scheduler(control: Control, config: ServerConfig, endpoints: Endpoints, delay: float, answer: str) -> None:
    from minisgl.scheduler.observer import Status
    from minisgl.scheduler.scheduler import Scheduler
    from minisgl.scheduler.transport import Answers, LeaderTransport
    from minisgl.trace.recorder import Recorder
    from tests.fake_server.engine import Answer, FakeExecutor

    status = Status()
    logging.getLogger("minisgl.scheduler.observer").setLevel("WARNING")  # tests look at what else the log says
    recorder = Recorder()
    answers: Answers = {StatsMsg: status.reply, TraceMsg: recorder.reply}
    transport = LeaderTransport(endpoints, control.beat, answers=answers)
    executor = FakeExecutor(delay, Answer(config.tokenizer, answer) if answer else None)
    scheduler = Scheduler(config.scheduler, executor, transport, status, recorder)
    control.ready()
    scheduler.run()


def broken(control: Control, *_: object) -> None:
    raise ConfigError("the model is made of cheese")

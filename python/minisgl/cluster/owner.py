"""Who starts a cluster, holds its port, and ends it: the foreground process of `minisgl cluster serve`."""

import contextlib
import json
import logging
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from minisgl.cluster.address import reach
from minisgl.cluster.serving import APP, Plan, application
from minisgl.config.args import args_from_options
from minisgl.config.resolve import access_config
from minisgl.errors import ConfigError, MiniSGLError, WorkerDied
from minisgl.processes.control import ENDING_SIGNALS
from minisgl.server.serve import announce

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_LOST_SECONDS = 30.0  # without an answer of the ingress, which Ray starts again, or of Ray's head, or of Ray at the end
_OBJECT_STORE = 80 * 2**20  # bytes: requests and answers do not go through it
_WORDS = re.compile(r"replica: (.*)")  # of a server that did not start
# For what Ray's processes take a core's time while nothing happens. That something has ended is told by connections.
_OFF = ["USAGE_STATS_ENABLED", "DEDUP_LOGS", "ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "worker_niceness", "event_stats"]
_OFF += ("enable_metrics_collection", "task_events_report_interval_ms", "LOG_MONITOR_MANY_FILES_THRESHOLD")
_ENVIRON = {f"RAY_{name}": "0" for name in _OFF} | {"RAY_memory_monitor_refresh_ms": "1000"}
_ENVIRON |= {"RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5", "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000"}
_ENVIRON |= {"LOG_NAME_UPDATE_INTERVAL_S": "1"}  # so much later a new process is heard


class Owner:
    """Of one cluster.

    listener: the bound port, which is handed to the ingress, and again where that is restarted. folder: private, for
    what belongs to it. address: of the Ray cluster to join; None: one of our own.
    """

    def __init__(self, plan: Plan, listener: socket.socket, folder: str, address: str | None) -> None:
        self._plan = replace(plan, host="127.0.0.1" if address is None else "", listener=f"{folder}/port")
        self._listener, self._folder, self._address = listener, folder, address
        self._signals: list[int] = []
        self._wanted = queue.SimpleQueue[dict[str, Any]]()  # by operators
        self._missed = float("inf")  # since when there is no ingress

    def run(self) -> int:
        """Until a signal or an operator ends it. Returns the exit status. Raises: ConfigError, WorkerDied."""
        args = args_from_options(self._plan.options)
        with contextlib.ExitStack() as stack:
            holder = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            holder.bind(self._plan.listener)
            holder.listen()
            stack.callback(self._end)
            self._join()
            for signum in ENDING_SIGNALS:  # Ray has set its own
                signal.signal(signum, lambda number, _: self._on_signal(number))
            handle = self._deploy(replace(self._plan, num_new=self._plan.replicas))
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # for whoever comes after us
            self._listener.listen(1024)  # so that nobody is refused while the ingress is not there, or not yet
            threading.Thread(target=self._hear, args=(holder,), daemon=True).start()
            announce(f"{self._plan.replicas} replicas", args.host, access_config(args), self._listener)
            self._watch()
            with contextlib.suppress(RayError, RayServeException, TimeoutError):
                seconds = args_from_options(self._plan.options).drain_timeout
                handle.drain.remote(seconds).result(timeout_s=seconds + _LOST_SECONDS)
        return 0

    def _join(self) -> None:
        os.environ.update(_ENVIRON | os.environ)
        options: dict[str, Any] = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        options |= {"_temp_dir": f"{self._folder}/ray", "object_store_memory": _OBJECT_STORE}
        what, tries = "Ray does not start", 4  # on a busy machine it may give up after half a minute
        if self._address is not None:
            what, tries, options = f"--address {self._address}", 1, {}
        while not ray.is_initialized():
            tries -= 1
            try:
                ray.init(self._address or "local", logging_level=logging.ERROR, **options)
            except Exception as error:  # of any kind
                ray.shutdown()
                if not tries:
                    raise ConfigError(f"{what}: {' '.join(str(error).split())}") from None
        if self._address and APP in serve.status().applications:
            ray.shutdown()  # that one is not ours to end
            raise ConfigError(f"--address {self._address}: a cluster is there already; minisgl cluster drain ends it")
        serve.start(proxy_location="Disabled")

    def _deploy(self, plan: Plan) -> DeploymentHandle[Any]:
        """Have the application as planned, and wait for it. Raises: ConfigError, with a replica's own words."""
        quiet = {"log_level": "ERROR", "enable_access_log": False}
        try:
            return serve.run(application(plan), name=APP, route_prefix=None, logging_config=quiet)
        except (RayError, RayServeException, RuntimeError) as error:
            found = _WORDS.findall(str(error))
            raise ConfigError(found[-1] if found else " ".join(str(error).split())) from None

    def _hear(self, holder: socket.socket) -> None:
        """Give the port to each ingress that comes for it, and hear what it says, as long as it is there."""
        while True:
            with contextlib.suppress(OSError, ValueError), holder.accept()[0] as ingress:
                self._missed = float("inf")
                socket.send_fds(ingress, [b"p"], [self._listener.fileno()])
                with ingress.makefile("rb") as lines:
                    for line in lines:
                        self._wanted.put(json.loads(line))
            self._missed = time.monotonic()

    def _on_signal(self, signum: int) -> None:
        self._signals.append(signum)
        if len(self._signals) > 1:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        """Until a signal comes, or an operator wants the end. Raises: WorkerDied."""
        changing, wanted = threading.Thread(), dict[str, Any]()
        head, seen = ray.get_runtime_context().gcs_address, time.monotonic()
        while not self._signals and "drain" not in wanted:
            with contextlib.suppress(queue.Empty):
                wanted = self._wanted.get(timeout=_POLL_SECONDS)
            if time.monotonic() > self._missed + _LOST_SECONDS:
                raise WorkerDied("the router has ended, and Ray does not start it again")
            try:
                reach(head)
                ray.util.list_named_actors()  # which a head that has begun anew refuses
                seen = time.monotonic()
            except (RayError, OSError) as error:  # replicas go on without it; whoever asks Ray waits for ever
                is_gone = self._address is None and isinstance(error.__cause__, ConnectionRefusedError)
                if is_gone or time.monotonic() > seen + _LOST_SECONDS:
                    _give_up(f"Ray's head at {head} is lost: {' '.join(str(error).partition('Note:')[0].split())}")
            if "replicas" in wanted and not changing.is_alive():
                changing = threading.Thread(target=self._change, args=(wanted.pop("replicas"), wanted.pop("options")))
                changing.daemon = True
                changing.start()

    def _change(self, count: int, options: dict[str, Any]) -> None:
        """Have so many replicas, or other options: then one after the other is replaced."""
        try:
            most, options = max(self._plan.max_replicas, count), {**self._plan.options, **options}
            plan = replace(self._plan, options=options, replicas=count, max_replicas=most, is_fixed=True)
            states = serve.status().applications[APP].deployments["Replica"].replica_states
            running = max(self._plan.replicas, sum(states.values()))  # more than planned, where load has asked for them
            is_same = (most, options) == (self._plan.max_replicas, self._plan.options)  # else replicas are replaced
            self._deploy(replace(plan, num_new=max(0, count - running) * is_same))
            self._plan = plan
            logger.info("%d replicas, as asked", plan.replicas)
        except (MiniSGLError, RayError, RayServeException) as error:
            logger.error("nothing is changed: %s", error)

    def _end(self) -> None:
        """Nothing is left: of a Ray that is not ours, what we have put there goes."""
        for signum in ENDING_SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
        watchdog = threading.Timer(_LOST_SECONDS, _give_up, ("Ray does not end",))
        watchdog.daemon = True
        watchdog.start()
        with contextlib.suppress(RayError, RayServeException):
            if self._address and ray.is_initialized():
                serve.delete(APP)
                if not serve.status().applications:  # nor anybody else's
                    serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()
        watchdog.cancel()


def _give_up(why: str) -> None:
    """Ray's own end needs its head. A Ray of ours, and else the ingress, notice that we are gone."""
    print(f"minisgl: error: {why}", file=sys.stderr, flush=True)
    os._exit(1)

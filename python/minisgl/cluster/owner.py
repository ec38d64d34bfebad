"""Who starts a cluster, holds its port, and ends it: the foreground process of `minisgl cluster serve`."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import time
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from minisgl.cluster.serving import APP, Plan, application
from minisgl.config.args import args_from_options
from minisgl.errors import ConfigError, MiniSGLError, WorkerDied
from minisgl.processes.control import ENDING_SIGNALS

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_LINGER_SECONDS = 1.0  # that the port stays open when all requests have ended
_ASK_SECONDS = 5.0
_END_SECONDS = 30.0
_LOST_SECONDS = 30.0  # without an answer of the ingress, which Ray starts again
_BACKLOG = 1024
_OBJECT_STORE = 80 * 2**20  # bytes: requests and answers do not go through it
_WORDS = re.compile(r"replica: (.*)")  # of a server that did not start
_ENVIRON = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # seconds; with the default of 0.1, idle, 4 % of a core
}


class Owner:
    """Of one cluster.

    listener: the bound port, which is handed to the ingress, and again where that is restarted. folder: private, for
    what belongs to it. address: of the Ray cluster to join; None: one of our own.
    """

    def __init__(self, plan: Plan, listener: socket.socket, folder: str, address: str | None) -> None:
        self._plan = replace(plan, host="127.0.0.1" if address is None else "", listener=f"{folder}/port")
        self._listener, self._folder, self._address = listener, folder, address
        self._has_joined = False  # a Ray that is not ours, and in which the application is ours
        self._signals: list[int] = []
        self._changing: threading.Thread | None = None

    def run(self) -> int:
        """Until a signal or an operator ends it. Returns the exit status. Raises: ConfigError, WorkerDied."""
        with contextlib.ExitStack() as stack:
            holder = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            holder.bind(self._plan.listener)
            holder.listen()
            stack.callback(self._end)
            self._join()
            for signum in ENDING_SIGNALS:  # Ray has set its own
                stack.callback(signal.signal, signum, signal.getsignal(signum))
                signal.signal(signum, lambda number, _: self._on_signal(number))
            handle = self._deploy(self._plan)
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # for whoever comes after us
            self._listener.listen(_BACKLOG)  # so that nobody is refused while the ingress is not there, or not yet
            threading.Thread(target=self._hand_out, args=(holder,), daemon=True).start()
            host, port = self._listener.getsockname()[:2]
            scheme = "https" if self._plan.options.get("ssl_certfile") else "http"
            print(f"minisgl serves {self._plan.replicas} replicas at {scheme}://{host}:{port}/v1", flush=True)
            self._watch(handle)
        return 0

    def _join(self) -> None:
        for name, value in _ENVIRON.items():
            os.environ.setdefault(name, value)
        local = {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "_temp_dir": f"{self._folder}/ray"}
        options: dict[str, Any] = {} if self._address else {**local, "object_store_memory": _OBJECT_STORE}
        for tries_left in (1, 0):  # on a busy machine a Ray of our own may give up after half a minute
            try:
                ray.init(self._address or "local", logging_level=logging.ERROR, **options)
                break
            except Exception as error:  # of any kind
                if self._address or not tries_left:
                    what = f"--address {self._address}" if self._address else "Ray does not start"
                    raise ConfigError(f"{what}: {' '.join(str(error).split())}") from None
                ray.shutdown()
        if self._address and APP in serve.status().applications:
            raise ConfigError(f"--address {self._address}: a cluster is there already; minisgl cluster drain ends it")
        self._has_joined = self._address is not None
        serve.start(proxy_location="Disabled")

    def _deploy(self, plan: Plan) -> DeploymentHandle[Any]:
        """Have the application as planned, and wait for it. Raises: ConfigError, with a replica's own words."""
        quiet = {"log_level": "ERROR", "enable_access_log": False}
        try:
            return serve.run(application(plan), name=APP, route_prefix=None, logging_config=quiet)
        except (RayError, RayServeException, RuntimeError) as error:
            found = _WORDS.findall(str(error))
            raise ConfigError(found[-1] if found else " ".join(str(error).split())) from None

    def _hand_out(self, holder: socket.socket) -> None:
        """Give the port to each ingress that comes for it."""
        while True:
            with contextlib.suppress(OSError), holder.accept()[0] as ingress:
                socket.send_fds(ingress, [b"p"], [self._listener.fileno()])

    def _on_signal(self, signum: int) -> None:
        self._signals.append(signum)
        if len(self._signals) > 1:
            raise KeyboardInterrupt

    def _watch(self, handle: DeploymentHandle[Any]) -> None:
        """Until a signal comes, or an operator has it drained; then that is done. Raises: WorkerDied."""
        next_wanted = dict[str, Any]()
        last_seen, ask = time.monotonic(), handle.wanted  # made once: that needs the head, and waits for it
        asking = ask.remote()
        while not self._signals:
            try:
                wanted = asking.result(timeout_s=_POLL_SECONDS)
                last_seen, asking = time.monotonic(), ask.remote()
            except (RayError, RayServeException, TimeoutError) as error:
                if time.monotonic() > last_seen + _LOST_SECONDS or not ray.is_initialized():
                    raise WorkerDied(f"the cluster does not answer: {' '.join(str(error).split())}") from None
                if not isinstance(error, TimeoutError):
                    time.sleep(_POLL_SECONDS)
                    asking = ask.remote()
                continue
            if "drain" in wanted:
                break
            next_wanted = wanted or next_wanted
            if next_wanted and not (self._changing and self._changing.is_alive()):
                self._changing = threading.Thread(target=self._change, args=(next_wanted,), daemon=True)
                self._changing.start()
                next_wanted = {}
        with contextlib.suppress(RayError, RayServeException, TimeoutError):
            deadline = time.monotonic() + args_from_options(self._plan.options).drain_timeout
            while handle.drain.remote().result(timeout_s=_ASK_SECONDS) and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(_LINGER_SECONDS)

    def _change(self, wanted: dict[str, Any]) -> None:
        """Other numbers of replicas, or other options: then one after the other is replaced."""
        try:
            options = {**self._plan.options, **wanted["options"]}
            args_from_options(options)
            most = max(self._plan.max_replicas, wanted["replicas"])
            plan = replace(self._plan, options=options, replicas=wanted["replicas"], max_replicas=most, is_fixed=True)
            self._deploy(plan)
            self._plan = plan
            logger.info("%d replicas, as asked", plan.replicas)
        except MiniSGLError as error:
            logger.error("nothing is changed: %s", error)

    def _end(self) -> None:
        """Nothing is left: of a Ray that is not ours, what we have put there goes."""
        for signum in ENDING_SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
        watchdog = threading.Timer(_END_SECONDS, os._exit, (1,))  # without a head, Ray waits for ever
        watchdog.daemon = True
        watchdog.start()
        with contextlib.suppress(RayError, RayServeException):
            if self._has_joined and ray.is_initialized():
                serve.delete(APP)
                if not serve.status().applications:  # nor anybody else's
                    serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()
        watchdog.cancel()

"""In front of all replicas: the actor that takes connections, and what is asked of the cluster rather than of one."""

import asyncio
import contextlib
import re
import socket
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import orjson
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from minisgl.cluster.relay import Front, Relay, read_body
from minisgl.cluster.router import PrefixRouter, Prompt
from minisgl.env import env_number
from minisgl.errors import MiniSGLError, RequestError
from minisgl.server.access import Paths
from minisgl.server.admission import Admission, http_config
from minisgl.server.bodies.intake import MAX_BODY_BYTES
from minisgl.server.errors import error_response, json_response
from minisgl.server.serve import HttpServer, max_connections

_MAX_OPEN = 2**20  # requests: connections have a limit of their own, and a server says itself when it has enough
_MAX_HELD = 8  # times as many bytes as one body may have are held of all whose answers have not begun
_MAX_ASKED = 2**16  # bytes of a body that is the cluster's own
_ALLOWED = {"GET": 200, "POST": 405}  # of /server_info: keys and origins are looked at before methods
_OF_ALL = ("/metrics", "/flush_cache", "/abort_request")  # asked of all; numbers in their answers are added up
_KNOWN = (*_OF_ALL, "/cluster", "/trace", "/v1/responses", "/v1/messages")  # paths that are looked at

_SAMPLE = re.compile(r"^([^\s{#]+)(?:\{(.*)\})?( .*)$")  # of Prometheus' text format
_END = "# EOF"  # of OpenMetrics
_COUNT = Annotated[int, msgspec.Meta(ge=1, le=4096)]
_Wanted = msgspec.defstruct("_Wanted", [("replicas", _COUNT), ("options", dict[str, Any], {})])  # by an operator


class Ingress:
    """What Ray runs. replicas: their handle; options: of TLS; listener: path of a Unix socket at which whoever has the
    port hands it out, so that no connection is lost when this process is; "": Ray's proxies come here."""

    def __init__(self, replicas: DeploymentHandle[Any], options: Mapping[str, Any], listener: str, policy: str) -> None:
        self._replicas, self._options = replicas, options
        max_body = int(env_number("MINISGL_MAX_BODY_BYTES", MAX_BODY_BYTES, low=1024, high=2**40))
        Relay.here = self.relay = Relay(PrefixRouter(policy), max_body)
        self._door = Admission(self.relay, _MAX_OPEN, _MAX_HELD * max_body, fair=True)
        self.asgi = Paths(self._answer, _KNOWN)
        self._owner: asyncio.StreamWriter | None = None  # it is told what operators ask for
        self._tasks = [asyncio.ensure_future(self._serve(listener))] if listener else []
        if replicas is not None:  # Ray's router, on this loop, tells of them from now on
            replicas._init(_run_router_in_separate_loop=False)  # type: ignore[no-untyped-call]

    def __serve_build_asgi_app__(self) -> Starlette:  # what Ray's own proxies come to
        return Starlette(routes=[Mount("", self.asgi)])

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope, is_of_all = {**scope, "state": {"owner": ""}}, scope["path"] in _OF_ALL
        try:
            if not is_of_all and scope["path"].split("/")[1] != "cluster":
                await self._door(scope, receive, send)
                return
            body = await read_body(scope, receive, _MAX_ASKED)
            one = await self.relay.replica(scope["method"], Prompt((), 0), ())
            answer = await (self._ask_all(scope, body) if is_of_all else self._operate(scope, body, one))
        except MiniSGLError as error:
            answer = error_response(scope, error)
        await answer(scope, receive, send)

    async def _ask_all(self, scope: Scope, body: bytes) -> Response:
        """The answer of all replicas as one; the first refusal is the whole answer."""
        answers: dict[str, Response] = {}
        for name, told in self.relay.ready.items():
            answers[name] = answer = await self.relay.ask(scope, body, told["url"])
            if answer.status_code != 200:
                return answer
        texts = {name: bytes(answer.body).decode() for name, answer in answers.items()}
        if scope["path"] == "/metrics":
            return Response(merged(texts), headers={"content-type": answer.headers["content-type"]})
        counts = [orjson.loads(text) for text in texts.values()]
        sums = {key: sum(one[key] for one in counts) for key, value in counts[0].items() if isinstance(value, int)}
        return json_response(counts[0] | sums)

    async def _operate(self, scope: Scope, body: bytes, one: str) -> Response:
        """`/cluster`: what there is, for whoever may see /server_info; and what is to become of it."""
        relay, asked = self.relay, {**scope, "path": "/server_info", "raw_path": b"/server_info"}
        allowed = await relay.ask(asked, b"", relay.ready[one]["url"])
        if allowed.status_code != _ALLOWED.get(scope["method"]):
            return allowed
        if scope["method"] == "POST":
            if self._owner is None:
                raise RequestError("Ray Serve's configuration says it: change args, then serve deploy", status=409)
            self._owner.write(_wanted(scope["path"], body) + b"\n")
        told = [{**of, "load": relay.router.loads.get(name, 0.0)} for name, of in relay.ready.items()]
        return json_response({"replicas": told, "requests": relay.counts, "draining": relay.refusal is not None})

    async def _serve(self, path: str) -> None:
        """Take the port over, and answer at it, until its owner has ended, however that was: then all else does."""
        with contextlib.suppress(OSError, ValueError), socket.socket(socket.AF_UNIX) as owner:
            owner.connect(path)
            _, (descriptor,), _, _ = await asyncio.to_thread(socket.recv_fds, owner, 1, 1)  # once all is deployed
            listener = socket.socket(fileno=descriptor)
            reader, self._owner = await asyncio.open_unix_connection(sock=owner)
            options = {"server_header": False, "date_header": False, **self._options}  # a replica's are passed on
            http = http_config(self.asgi, max_connections(2), Front, **options)
            self._server = HttpServer(http, self.relay, listener, 0.0, lambda: None)
            self._tasks.append(asyncio.ensure_future(self._server.serve(sockets=[listener])))
            await reader.read()
        asyncio.get_running_loop().run_in_executor(None, serve.delete, serve.get_replica_context().app_name)
        await self._replicas.broadcast("end").results_async()  # for the other one waits, without a head of Ray

    async def drain(self, seconds: float) -> None:
        """Take no new requests. Returns when those that run have ended, after so many seconds at most."""
        self._server.drain_timeout = seconds
        self._server.on_signal()
        await asyncio.wait(self._tasks[-1:])


class PrefixRequestRouter(RequestRouter):
    """Tells this process's relay which replicas there are; what is known of prefixes is there, and so is the choice.
    Ray makes it of a copy of this class."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        Relay.here.meet({replica.replica_id.unique_id: replica.replica_metadata for replica in replicas})

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,  # noqa: ARG002
    ) -> list[list[RunningReplica]]:
        return [candidate_replicas]  # nothing is asked for by way of Ray


def merged(pages: Mapping[str, str]) -> str:
    """One exposition of several, by the replicas' names: each family once, its samples with a label `replica`."""
    families: dict[str, tuple[dict[str, None], list[str]]] = {}  # by name: what is said of it, and its samples
    for replica, page in pages.items():
        family = ""
        for line in page.splitlines():
            if line.startswith("# ") and line != _END:
                family = line.split(" ", 3)[2]
                families.setdefault(family, ({}, []))[0][line] = None
            elif (found := _SAMPLE.match(line)) is not None:
                labels = ",".join(filter(None, (found[2], f'replica="{replica}"')))
                families.setdefault(family, ({}, []))[1].append(f"{found[1]}{{{labels}}}{found[3]}")
    lines = [line for about, samples in families.values() for line in (*about, *samples)]
    ends = [_END] * any(page.rstrip().endswith(_END) for page in pages.values())
    return "\n".join([*lines, *ends, ""])


def _wanted(path: str, body: bytes) -> bytes:
    """What an operator asks for, as its owner hears it. Raises: RequestError."""
    if path == "/cluster/drain":
        return b'{"drain": true}'
    if path != "/cluster/scale":
        raise RequestError(f"POST {path}: not found", status=404)
    try:
        return msgspec.json.encode(msgspec.json.decode(body, type=_Wanted, strict=False))
    except msgspec.MsgspecError:
        raise RequestError('expected {"replicas": 1 to 4096}, and perhaps "options"', param="replicas") from None

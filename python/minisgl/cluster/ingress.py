"""In front of all replicas: the actor that takes connections, routes requests and knows what all replicas have."""

import asyncio
import contextlib
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import orjson
import uvicorn
import zmq
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minisgl.cluster.prompts import merged, num_tokens
from minisgl.cluster.relay import Chosen, Front, Relay, from_root, read_body
from minisgl.cluster.router import PrefixRouter, Prompt
from minisgl.config.args import integer
from minisgl.env import env_number
from minisgl.errors import MiniSGLError, RequestError, WorkerDied
from minisgl.scheduler.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, decode_batch
from minisgl.server.admission import http_config
from minisgl.server.bodies.intake import MAX_BODY_BYTES
from minisgl.server.errors import error_response, json_response

_WAIT_SECONDS = 60.0  # for a replica, where there is none
_PATIENCE_SECONDS = 1.0  # for another replica than the one that gave no answer
_SHUN_SECONDS = 5.0  # after a replica has given no answer; by then Ray knows, if it has ended
_HEAR_SECONDS = 0.1  # between two looks at what replicas publish: each event by itself would wake us up
_MAX_CONNECTIONS = 4096
_STORED = re.compile(rb'"id": ?"(resp_[0-9a-zA-Z]+)"')
Told = Mapping[str, dict[str, Any]]  # by a replica's name, what it tells of itself (`Replica.record_replica_metadata`)
Choose = Callable[[Told], str | None]  # one of these replicas; None: none yet
_ALLOWED = {"GET": 200, "HEAD": 200, "POST": 405}  # of /server_info: keys and origins are looked at before methods
_OF_ALL = ("/metrics", "/flush_cache", "/abort_request")  # asked of all; numbers in their answers are added up


class Relayed:
    """The ASGI application of the ingress that runs in this process, for Ray's own proxies."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            ingress = serve.get_replica_context().servable_object
            assert isinstance(ingress, Ingress)
            await ingress.app(scope, receive, send)
        while scope["type"] == "lifespan":
            await send({"type": f"{(await receive())['type']}.complete"})


class Ingress:
    """What Ray runs. replicas: their handle; options: of TLS; listener: path of a Unix socket at which whoever has the
    port hands it out, so that no connection is lost when this process is; "": Ray's proxies come here."""

    def __init__(self, replicas: DeploymentHandle[Any], options: Mapping[str, Any], listener: str, policy: str) -> None:
        self._replicas, self._options = replicas, options
        self._router = PrefixRouter(policy)
        self._watched: dict[str, asyncio.Task[None]] = {}
        self.ready: Told = {}  # all that Ray says there are
        self._shunned: dict[str, float] = {}  # replicas, and until when
        max_body = int(env_number("MINISGL_MAX_BODY_BYTES", MAX_BODY_BYTES, low=1024, high=2**40))
        self._relay, self._draining = Relay(self._pick, max_body), False
        self._owner: asyncio.StreamWriter | None = None  # it is told what operators ask for
        self._tasks = [asyncio.ensure_future(self._serve(listener))] if listener else []

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope = {**scope, "path": (path := from_root(scope["path"]))}
        try:
            if self._draining and scope["method"] == "POST":
                raise WorkerDied("the server is draining: it takes no new requests, and will stop")
            if not path.startswith("/cluster") and path not in _OF_ALL:
                await self._relay(scope, receive, send)
                return
            body = await read_body(receive) or b""
            one, told = await self._select(lambda ready: next(iter(ready), None))
            answer = await (self._ask_all if path in _OF_ALL else self._operate)(scope, body, self.ready or {one: told})
        except MiniSGLError as error:
            answer = error_response(scope, error)
        await answer(scope, receive, send)

    def drain(self) -> int:
        """Take no new requests. Returns how many there are."""
        self._draining = True
        return self._relay.counts["open"]

    @contextlib.asynccontextmanager
    async def _pick(self, prompt: Prompt, tried: Sequence[str]) -> AsyncIterator[Chosen]:
        now = time.monotonic()
        shunned = {name: until for name, until in self._shunned.items() if until > now}
        self._shunned = shunned | dict.fromkeys(tried, now + _SHUN_SECONDS)
        name, told = await self._select(partial(self._choose, prompt, tried, now))
        self._watch(name, told["events"][0])
        placed = self._router.place(name, prompt)
        try:
            yield Chosen(name, told["url"], placed.hold, partial(self._learn, name, prompt))
        finally:
            placed.hold(0.0)

    async def _select(self, choose: Choose) -> tuple[str, dict[str, Any]]:
        """A replica's name, and what it tells of itself. Raises: WorkerDied when there is none for long."""
        if (name := choose(self.ready)) is not None:
            return name, self.ready[name]
        try:
            return await asyncio.wait_for(self._await_one(choose), _WAIT_SECONDS)
        except (asyncio.TimeoutError, RayServeException, RayError):
            raise WorkerDied("no replica is ready; try again") from None

    async def _await_one(self, choose: Choose) -> tuple[str, dict[str, Any]]:
        """Ray looks until there is one. Nothing is reserved with it: that is two messages for each request, and a
        server knows when it is full."""
        async with self._replicas.choose_replica(choose, self, _reserve=False) as selection:
            return selection.replica_id, selection.replica_metadata

    def _choose(self, prompt: Prompt, tried: Collection[str], begin: float, ready: Told) -> str | None:
        """One of these replicas, all that Ray says there are; None: look again, there is none, or none other yet."""
        router, now = self._router, time.monotonic()
        excluded = {*tried, *(name for name, until in self._shunned.items() if until > now)}
        if router.loads.keys() != ready.keys():
            router.set_replicas(ready)
        keeper = router.sessions.get(prompt.keeper, prompt.keeper)
        if keeper in router.loads and keeper not in tried:  # shunned or not: nobody else has it
            return keeper
        name = router.choose(prompt, excluded)
        return router.choose(prompt) if name is None and now > begin + _PATIENCE_SECONDS else name

    def _learn(self, name: str, prompt: Prompt, tail: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        """From an answer: how long tokens are, and who will be asked for it again."""
        kept = [value.decode("latin-1") for key, value in headers if key == b"x-request-id"]
        self._router.calibrate(prompt.num_bytes, num_tokens(tail))
        for key in (*kept, *(found.decode() for found in _STORED.findall(tail))):
            self._router.learn(name, Prompt((), 0, key))

    def _watch(self, name: str, endpoint: str) -> None:
        """From now on hear what a replica evicts."""
        for gone in self._watched.keys() - self._router.loads.keys():
            self._watched.pop(gone).cancel()
        if name not in self._watched:
            self._watched[name] = asyncio.ensure_future(self._hear(name, endpoint))

    async def _hear(self, name: str, endpoint: str) -> None:
        with zmq.Context[zmq.Socket[bytes]].instance().socket(zmq.SUB) as events:
            events.setsockopt(zmq.SUBSCRIBE, b"")
            events.connect(endpoint)
            expected, size = 0, 1
            while True:
                while not events.poll(0):
                    await asyncio.sleep(_HEAR_SECONDS)
                _, counted, data = events.recv_multipart()
                batch, number = decode_batch(data), int.from_bytes(counted, "big")
                if expected and number != expected:  # some are lost, or its scheduler has begun anew
                    self._router.forget(name)
                for event in batch.events:
                    if isinstance(event, BlockRemoved):
                        self._router.forget(name, len(event.block_hashes) * size)
                    elif isinstance(event, BlockStored):
                        size = event.block_size
                    elif isinstance(event, AllBlocksCleared) and number:
                        self._router.forget(name)
                expected = number + 1

    async def _ask_all(self, scope: Scope, body: bytes, ready: Told) -> Response:
        """The answer of all replicas as one; the first refusal is the whole answer."""
        answers: dict[str, Response] = {}
        for name, told in ready.items():
            answers[name] = answer = await self._relay.ask(scope, body, told["url"])
            if answer.status_code != 200:
                return answer
        texts = {name: bytes(answer.body).decode() for name, answer in answers.items()}
        if scope["path"] == "/metrics":
            return Response(merged(texts), headers={"content-type": answer.headers["content-type"]})
        counts = [orjson.loads(text) for text in texts.values()]
        sums = {key: sum(one[key] for one in counts) for key, value in counts[0].items() if isinstance(value, int)}
        return json_response(counts[0] | sums)

    async def _operate(self, scope: Scope, body: bytes, ready: Told) -> Response:
        """`/cluster`: what there is, for whoever may see /server_info; and what is to become of it."""
        asked = {**scope, "path": "/server_info", "raw_path": b"/server_info"}
        allowed = await self._relay.ask(asked, b"", next(iter(ready.values()))["url"])
        if allowed.status_code != _ALLOWED.get(scope["method"]):
            return allowed
        if scope["method"] == "POST":
            if self._owner is None:
                raise RequestError("Ray Serve's configuration says it: change args, then serve deploy", status=409)
            self._owner.write(orjson.dumps(_wanted(scope["path"], body)) + b"\n")
        told = [{**one, "load": self._router.loads.get(name, 0.0)} for name, one in ready.items()]
        return json_response({"replicas": told, "requests": self._relay.counts, "draining": self._draining})

    async def _serve(self, path: str) -> None:
        """Take the port over, and answer at it, until its owner has ended, however that was: then all else does."""
        with contextlib.suppress(OSError, IndexError):
            owner, descriptor = await asyncio.to_thread(_taken_over, path)
            reader, self._owner = await asyncio.open_unix_connection(sock=owner)
            options = {"server_header": False, "date_header": False, **self._options}  # a replica's are passed on
            server = uvicorn.Server(http_config(self.app, _MAX_CONNECTIONS, Front, **options))
            self._tasks.append(asyncio.ensure_future(server.serve(sockets=[socket.socket(fileno=descriptor)])))
            await reader.read()
        asyncio.get_running_loop().run_in_executor(None, serve.delete, serve.get_replica_context().app_name)
        await self._replicas.broadcast("end").results_async()  # for the other one waits, without a head of Ray


def _taken_over(path: str) -> tuple[socket.socket, int]:
    owner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    owner.connect(path)
    return owner, socket.recv_fds(owner, 1, 1)[1][0]


def _wanted(path: str, body: bytes) -> dict[str, Any]:
    """What an operator asks for. Raises: RequestError."""
    try:
        asked = orjson.loads(body or b"{}")
        if path == "/cluster/drain":
            return {"drain": True}
        if path == "/cluster/scale":
            return {"replicas": integer(1, 4096)(asked["replicas"]), "options": dict(asked.get("options", {}))}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise RequestError('expected {"replicas": 1 to 4096}, and perhaps "options"', param="replicas") from None
    raise RequestError(f"POST {path}: not found", status=404)

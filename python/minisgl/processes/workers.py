"""What runs in the child processes. Importing this module is cheap: the parent does it too."""

from __future__ import annotations

import ctypes
import gc
import logging
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from minisgl.config.runtime import Addresses, EngineConfig, SchedulerConfig, TokenizerConfig
from minisgl.env import env_bool
from minisgl.errors import ConfigError, MiniSGLError
from minisgl.message.codec import ControlMsg, Failed, Heartbeat, Ready, encode_control
from minisgl.utils.faults import fault
from minisgl.utils.log import setup_logging

if TYPE_CHECKING:
    from minisgl.tokenizer.tokenize import HFTextCodec

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
STOP_SIGNAL = signal.SIGUSR1  # from the supervisor
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # from outside, to the parent
PR_SET_PDEATHSIG = 1


class Control:
    """A child's line to its supervisor."""

    def __init__(self, connection: Connection, life: int = 0) -> None:
        self.life = life  # the same number for all who were started together, and for nobody else
        self._connection = connection
        self._next_beat = 0.0

    def ready(self) -> None:
        signal.signal(STOP_SIGNAL, lambda *_: sys.exit(0))
        self.send(Ready())

    def beat(self) -> None:
        """Tell that the main loop is alive. Call it as often as you like: it sends one message a second.

        It never waits: with a parent that does not listen (stopped, or `LLM`), the pipe fills up and beats are lost.
        """
        now = time.monotonic()
        if now >= self._next_beat:
            dropped = (fault("beat") or "").split()
            self._next_beat = now + (float(dropped[1]) if dropped else HEARTBEAT_SECONDS)
            if not dropped and select.select((), (self._connection,), (), 0)[1]:
                self.send(Heartbeat())

    def send(self, message: ControlMsg) -> None:
        try:
            self._connection.send_bytes(encode_control(message))
        except (BrokenPipeError, ConnectionResetError):
            os._exit(1)  # the parent is gone


def run_child(
    name: str, connection: Connection, from_lasting: bool, life: int, body: Callable[..., None], args: tuple[Any, ...]
) -> None:
    """The entry of every child: `body(control, *args)` in an orderly process.

    The process has `name` as its title, leaves Ctrl-C and its like to the parent (they may reach the whole process
    group, and the parent drains first), ends at STOP_SIGNAL by an exception in the main thread (before it is ready, at
    once: an import may swallow the exception), ends when the parent does, and reports an error as one line. Exit
    status: 0 after STOP_SIGNAL, 2 for a ConfigError, else 1. from_lasting: the parent's thread that started it lasts
    until the parent has done with it. life: as in `Control`.
    """
    control = Control(connection, life)
    for signum in ENDING_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS)  # our own children can be ended so
    signal.signal(STOP_SIGNAL, lambda *_: os._exit(0))
    _die_with_parent(from_lasting)
    from setproctitle import setproctitle

    setproctitle(name)
    status = 1
    try:
        setup_logging(name.removeprefix("minisgl-").removesuffix("-scheduler"))
        fault("start")
        body(control, *args)
        status = 0
    except SystemExit:
        status = 0
    except MiniSGLError as error:
        logger.debug("%s ends", name, exc_info=True)
        status = 2 if isinstance(error, ConfigError) else 1
        control.send(Failed(_one_line(error), config=isinstance(error, ConfigError)))
    except Exception as error:
        logger.exception("%s ends", name)
        control.send(Failed(f"{type(error).__name__}: {_one_line(error)}", config=False))
    finally:
        logging.shutdown()
        os._exit(status)  # threads of libraries must not keep a finished process alive


def tokenizer_main(
    control: Control, config: TokenizerConfig, addresses: Addresses, endpoint: str, codec: HFTextCodec | None = None
) -> None:
    """A tokenizer, the detokenizer, or both: `endpoint` tells."""
    # Tokenizers do not need torch, but transformers imports it where it finds it: seconds, and hundreds of MB.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would report that models are unavailable
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own way to say "not importable"
    from minisgl.tokenizer.server import TokenizerServer

    server = TokenizerServer(config, addresses, endpoint, codec)
    control.ready()
    server.run(control.beat)


def scheduler_main(
    control: Control, engine_config: EngineConfig, config: SchedulerConfig, addresses: Addresses, rank: int
) -> None:
    """One tensor-parallel rank: the engine, and the scheduler that feeds it.

    For tests: MINISGL_CHECK_RANKS compares the plans of ranks 0 and `rank` at every turn, and what the walk finds is
    fatal with MINISGL_INTEGRITY_FATAL.
    """
    # Read when torch is imported. Threads that spin between two operators gain nothing on free cores, and on busy ones
    # they take the time of the very thread that they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    set_cuda_environment(engine_config)
    from minisgl.engine.engine import Engine
    from minisgl.grammar.store import open_store
    from minisgl.scheduler.grammar import Grammars
    from minisgl.scheduler.scheduler import Scheduler
    from minisgl.scheduler.status import Status
    from minisgl.scheduler.transport import FollowerTransport, LeaderTransport, Transport

    is_fatal, check_ranks = env_bool("MINISGL_INTEGRITY_FATAL"), env_bool("MINISGL_CHECK_RANKS")
    # Before the engine: loading the vocabulary holds Python up, which is not noticed now.
    grammars = Grammars(open_store(engine_config, config), engine_config.device == "cuda") if rank == 0 else None
    engine = Engine(replace(engine_config, init_method=addresses.rendezvous(control.life)), rank)
    config = replace(config, num_pages=engine.num_pages, integrity_fatal=is_fatal)
    transport: Transport
    status = Status(config.num_pages) if rank == 0 else None
    if status is not None:
        transport = LeaderTransport(addresses, engine_config.tp_size, control.beat, grammars, status.reply)
    else:
        transport = FollowerTransport(addresses, rank, control.beat)
    tp_size = engine_config.tp_size
    scheduler = Scheduler(config, engine, transport, status, tp_size=tp_size, check_ranks=check_ranks)
    if rank == 0:
        where, room = f"{engine_config.dtype} on {engine_config.device}", config.num_pages * config.page_size
        threads, longest = engine_config.num_threads, config.max_seq_len
        logger.info("%s; threads: %d; KV cache: %d tokens, at most %d for one request", where, threads, room, longest)
    gc.collect()
    gc.freeze()  # or a full collection walks all that libraries have made: a tenth of a second between two tokens
    control.ready()
    scheduler.run()


def set_cuda_environment(config: EngineConfig) -> None:
    """What CUDA and torch read from the environment before their first use, unless the user has set it."""
    if config.device != "cuda":
        return
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the order in which `config.gpus` counts them
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    # Less fragmentation, so more pages; but such memory cannot be shared between processes, as ranks share theirs.
    if config.tp_size == 1 and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def _die_with_parent(from_lasting: bool) -> None:
    """End with the parent, whatever ends it. The kernel's signal is at once, but is tied to the parent's thread
    that started us, so it is asked for only if that one lasts; the watching thread is for all cases."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if sys.platform == "linux" and from_lasting:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if not parent.is_alive():
        os._exit(1)

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _one_line(error: BaseException) -> str:
    return next(filter(None, map(str.strip, str(error).splitlines())), "no details")

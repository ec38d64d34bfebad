"""What runs in the worker processes. Importing this module is cheap: the main process does it too."""

import logging
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module, metadata, util
from typing import TYPE_CHECKING, Any

from minisgl.config.runtime import EngineConfig, SchedulerConfig, ServerConfig, TokenizerConfig
from minisgl.core import Executor
from minisgl.env import env_bool
from minisgl.message.sockets import DETOKENIZER, Endpoints
from minisgl.processes.control import Control, WorkerSpec
from minisgl.utils.log import told

if TYPE_CHECKING:
    from minisgl.scheduler.grammar import Grammars
    from minisgl.scheduler.observer import Observer
    from minisgl.scheduler.scheduler import Scheduler
    from minisgl.scheduler.transport import Transport

logger = logging.getLogger(__name__)


def worker_specs(config: ServerConfig, endpoints: Endpoints) -> list[WorkerSpec]:
    """The children of a server: a scheduler per rank, the detokenizer, and tokenizers if they have own processes."""
    specs = rank_specs(config.engine, config.scheduler, endpoints)
    for name, endpoint in {DETOKENIZER: endpoints.detokenizer, **endpoints.tokenizers}.items():
        specs.append(WorkerSpec(f"minisgl-{name}", tokenizer_main, (config.tokenizer, endpoints, endpoint)))
    return specs


def rank_specs(engine: EngineConfig, config: SchedulerConfig, endpoints: Endpoints, first: int = 0) -> list[WorkerSpec]:
    """A scheduler for each rank from the first on."""
    return [
        WorkerSpec(f"minisgl-TP{rank}-scheduler", scheduler_main, (engine, config, endpoints, rank))
        for rank in range(first, engine.tp_size)
    ]


def tokenizer_main(control: Control, config: TokenizerConfig, endpoints: Endpoints, endpoint: str) -> None:
    """A tokenizer, the detokenizer, or both: `endpoint` tells."""
    # Tokenizers do not need torch, but transformers imports it where it finds it: seconds, and hundreds of MB.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would report that models are unavailable
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own way to say "not importable"
    import_fast_tokenizer()
    from minisgl.tokenizer.server import TokenizerServer

    server = TokenizerServer(config, endpoints, endpoint)
    control.ready()
    server.run(control.beat)


def import_fast_tokenizer() -> None:
    """Import transformers' own class for `tokenizer.json` without the package's file, which reads a thousand others to
    know the names in them. That runs as soon as anything else is wanted of the package, and for an older version."""
    if "transformers" in sys.modules:
        return
    spec: Any = util.find_spec("transformers")
    package = sys.modules["transformers"] = util.module_from_spec(spec)

    def from_all(name: str) -> Any:
        if sys.modules.get("transformers") is package:
            sys.modules.pop("transformers", None)
        return getattr(import_module("transformers"), name)

    vars(package).update(__version__=metadata.version("transformers"), __getattr__=from_all)
    with suppress(ImportError):
        part = import_module("transformers.tokenization_utils_tokenizers")
        vars(package).update(PreTrainedTokenizerFast=part.PreTrainedTokenizerFast)


def scheduler_main(
    control: Control, engine: EngineConfig, config: SchedulerConfig, endpoints: Endpoints, rank: int
) -> None:
    """One tensor-parallel rank of a server, or one above 0 of an `LLM`."""
    # Read when torch is imported. Threads that spin between two operators gain nothing on free cores, and on busy ones
    # they take the time of the very thread that they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from minisgl.message.messages import StatsMsg, TraceMsg
    from minisgl.scheduler.kv_events import publishers
    from minisgl.scheduler.observer import Status
    from minisgl.scheduler.transport import Answers, FollowerTransport, LeaderTransport
    from minisgl.trace.recorder import Recorder

    more = publishers(config) if rank == 0 else []
    loaded = load_rank(engine, config, f"{endpoints.rendezvous}-{control.life}", rank)
    if rank > 0:
        scheduler = loaded.scheduler(FollowerTransport(endpoints, rank, control.beat))
    else:
        status, recorder = Status(), Recorder()
        answers: Answers = {StatsMsg: status.reply, TraceMsg: recorder.reply}
        transport = LeaderTransport(endpoints, control.beat, loaded.grammars, answers)
        scheduler = loaded.scheduler(transport, status, recorder, *more)
        where, room = f"{engine.dtype} on {engine.device}", loaded.config.num_pages * config.page_size
        threads, longest = engine.num_threads, config.max_seq_len
        logger.info("%s; threads: %d; KV cache: %d tokens, at most %d for one request", where, threads, room, longest)
    control.ready()
    scheduler.run()


@dataclass(frozen=True, slots=True)
class Rank:
    """One tensor-parallel rank, loaded. tp_size: of how many. grammars: on rank 0, of its requests."""

    engine: Executor
    grammars: "Grammars"
    config: SchedulerConfig
    tp_size: int

    def scheduler(self, transport: "Transport", *observers: "Observer") -> "Scheduler":
        """What feeds the engine."""
        from minisgl.scheduler.scheduler import Scheduler

        return Scheduler(self.config, self.engine, transport, *observers, tp_size=self.tp_size)

    def close(self) -> None:
        try:
            self.grammars.close()
        finally:
            self.engine.close()


def load_rank(engine_config: EngineConfig, config: SchedulerConfig, rendezvous: str, rank: int) -> Rank:
    """Load one rank, of a server or of an `LLM`. rendezvous: where all ranks find one another now.

    For tests: what the integrity walk finds is fatal with MINISGL_INTEGRITY_FATAL."""
    with told(f"loading the model, rank {rank}"):
        set_cuda_environment(engine_config)
        from minisgl.engine.engine import create_engine
        from minisgl.grammar.source import VocabularyConfig
        from minisgl.grammar.store import GrammarStore
        from minisgl.scheduler.grammar import Grammars

        engine = create_engine(replace(engine_config, init_method=rendezvous), rank)
        try:
            names = engine_config.model_path, engine_config.model.vocab_size, config.eos_token_ids
            is_gpu, kind = engine_config.device == "cuda", config.speculate
            is_quick = not is_gpu and engine_config.model.weight_bytes(engine_config.dtype) < 2**26  # as a few masks
            tells_forced = kind != "off" and not (kind == "mtp" and is_quick)
            store = GrammarStore(VocabularyConfig(*names), is_native=not tells_forced) if rank == 0 else None
            grammars = Grammars(store, is_gpu, tells_forced)
            config = replace(config, num_pages=engine.num_pages, num_window_pages=engine.num_window_pages)
            config = replace(config, integrity_fatal=env_bool("MINISGL_INTEGRITY_FATAL"))
            return Rank(engine, grammars, config, engine_config.tp_size)
        except BaseException:
            engine.close()  # its threads and memory, in a process that goes on
            raise


def set_cuda_environment(config: EngineConfig) -> None:
    """What CUDA and torch read from the environment before their first use, unless the user has set it."""
    if config.device != "cuda":
        return
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the order in which `config.gpus` counts them
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    # Less fragmentation, so more pages; but such memory cannot be shared between processes, as ranks share theirs.
    if config.tp_size == 1 and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

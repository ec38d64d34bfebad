"""What `resolve` decides: frozen, complete, nothing in it is "auto" any more. Each process gets the parts it needs."""

from dataclasses import dataclass, field

from minisgl.config.args import ServerOptions
from minisgl.config.model import ModelConfig
from minisgl.config.pooling import Pooling
from minisgl.utils.math import div_ceil

_GROWTH_TOKENS, _TYPICAL_TOKENS = 64, 4096  # of room for a request's growth in what windows take; of a request


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What one rank's engine needs. Token and page counts are per rank (the same on every rank)."""

    model_path: str  # a local directory
    model: ModelConfig
    dtype: str  # "float32" | "bfloat16" | "float16": weights, and without `cpu_kernels` activations
    device: str  # "cpu" | "cuda"
    tp_size: int
    num_pages: int  # 0: as many as the engine finds room for (`memory_ratio`); it tells by its own `num_pages`
    page_size: int  # tokens
    max_running_requests: int
    max_prefill_length: int  # tokens of one step, decode included
    max_seq_len: int
    prefill_backend: str
    decode_backend: str
    num_threads: int  # per rank
    dummy_weight: bool
    init_method: str = ""  # torch.distributed rendezvous (unused when tp_size is 1)
    seed: int = 0  # of dummy weights
    kv_cache_dtype: str = "float32"  # "float32" | "bfloat16" | "float16" | "int8" (CPUs) | "fp8" (GPUs)
    quantization: str | None = None  # "int8" | "int4" | "fp8"
    num_snapshots: int = 0  # of states, beside those of rows
    window: int = 0  # of layers whose windows slide, tokens: they have pages of their own; 0: all have the same
    num_window_pages: int = 0  # that these have; as `num_pages`
    draft_len: int = 0  # tokens of a request that a step may verify, at most
    # CPU only.
    cpu_kernels: bool = False  # our own; else torch computes
    # CUDA only, from here on.
    memory_ratio: float = 0.9  # share of a GPU's whole memory that may be in use, other programs' included
    cuda_graph_max_bs: int = 0  # the largest decode batch that is captured; 0: none
    use_pynccl: bool = True
    moe_backend: str = "torch"  # "triton" | "torch"

    def kv_bytes(self, num_pages: int, num_window_pages: int) -> int:
        """Bytes that so many pages take on one rank, with so many of layers whose windows slide."""
        pages = {False: num_pages, True: num_window_pages} if self.window else {None: num_pages}
        each = (self.model.kv_bytes_per_token(self.kv_cache_dtype, self.tp_size, windowed) for windowed in pages)
        return self.page_size * sum(num * size for num, size in zip(pages.values(), each, strict=True))

    def pages_for(self, num_bytes: int) -> tuple[int, int]:
        """`num_pages` and `num_window_pages`: what the user asked for, or as many as so many bytes hold.

        Windows of all requests, and as many for cached prefixes, have the share that one of `_TYPICAL_TOKENS` needs (or
        of two windows), or less if it is more than they take. But one request must fit, of the longest if that can be.
        """
        each, near, size, rows = self.kv_bytes(1, 0), self.kv_bytes(0, 1), self.page_size, self.max_running_requests
        if not near:
            return self.num_pages or num_bytes // max(1, each), 0
        longest, chunk = div_ceil(self.max_seq_len, size), min(self.max_prefill_length, self.max_seq_len)
        one, least = (div_ceil(self.window + tokens, size) + 2 for tokens in (_GROWTH_TOKENS, chunk))
        wanted, both = 2 * rows * one + least, num_bytes // (each + near)
        if self.num_pages:
            return self.num_pages, min(self.num_pages, wanted)
        if not each:
            return (rows * longest, min(both, rows * longest)) if both >= least else (both, both)
        typical = min(longest, max(_TYPICAL_TOKENS, 2 * self.window) // size)
        share = num_bytes * one // (typical * each + one * near)
        num = max(least, min(wanted, share, (num_bytes - longest * each) // near))
        return ((num_bytes - num * near) // each, num) if num < both else (both, both)

    @property
    def num_states(self) -> int:
        """Slots for states: of rows, of the row that pads captured steps, and of snapshots."""
        return self.max_running_requests + 1 + self.num_snapshots

    @property
    def state_bytes(self) -> int:
        """Bytes that all of them take on one rank."""
        return self.num_states * self.model.state_bytes(self.tp_size, self.draft_len)


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """What the planner and the scheduler's loop need."""

    max_running_requests: int
    max_prefill_length: int  # tokens of one step, decode included
    max_seq_len: int
    num_pages: int  # of the engine, which finds out
    page_size: int  # tokens
    cache_type: str = "radix"  # "radix" | "naive"
    schedule_policy: str = "fcfs"  # "fcfs" | "lpm" | "priority"
    eos_token_ids: tuple[int, ...] = ()
    vocab_size: int = 0  # of the model; 0: not known
    overlap: bool = True
    step_timeout: float = 60.0  # seconds that a step may take beyond `token_seconds` for each of its tokens
    token_seconds: float = 0.0  # on a very slow machine
    check_integrity: int | None = None  # steps between two walks; 0: only when idle; None: 256, more in large pools
    integrity_fatal: bool = False  # what they find ends the scheduler
    has_states: bool = False  # the model has caches that are states
    num_snapshots: int = 0  # of these, which the prefix cache may hold
    snapshot_tokens: int = 64  # between two of them, at least
    speculate: str = "off"  # "off" | "ngram" | "mtp" | "model" | "eagle" | "dflash"
    draft_len: int = 8  # tokens of a request that a step may verify, at most; 0: no drafts
    cuda_graph_max_bs: int = 0  # tokens of the largest captured step; 0: none is
    step_costs: tuple[float, float] = (0.0, 0.0)  # in steps of one token: of one more; of planning nothing meanwhile
    attention_tokens: int = 1 << 40  # over so many a token's attention takes as long as all else that it needs
    window: int = 0  # of the layers whose windows slide, tokens; 0: there are none
    num_window_pages: int = 0  # that these have
    kv_events_endpoint: tuple[str, ...] = ()  # of ZeroMQ: for events of the prefix cache, and for those missed


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """What tokenizer and detokenizer processes need."""

    model_path: str  # a local directory
    max_seq_len: int
    vocab_size: int  # of the model: ids from here on cannot be prompts
    visible_tokens: tuple[str, ...] = ()  # special tokens that are part of the output's text nevertheless
    chat_template: str | None = None  # in place of the model's own
    pooling: Pooling | None = None


@dataclass(frozen=True, slots=True)
class AccessConfig:
    """Who may use the HTTP API, and how."""

    api_keys: tuple[str, ...] = field(default=(), repr=False)  # none: nobody is asked for one
    admin_keys: tuple[str, ...] = field(default=(), repr=False)  # for all paths, the operator's included
    hosts: tuple[str, ...] = ("*",)  # names that the server has; "*.x": that end so, "": without a dot, "*": any
    ssl_certfile: str | None = None  # set: HTTPS
    ssl_keyfile: str | None = None  # None: the key is in the certificate's file
    cors_origins: tuple[str, ...] = ()  # whose web pages may use the API; "*": all


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig(ServerOptions):
    """Everything that a running server is made of."""

    engine: EngineConfig
    scheduler: SchedulerConfig
    tokenizer: TokenizerConfig
    served_model_name: str
    default_sampling: dict[str, float | int]  # from generation_config.json, by the names of `SamplingParams`
    tool_call_parser: str | None = None  # None: the format of tool calls is not known
    reasoning_parser: str | None = None  # None: the model does not reason, as far as the server knows
    access: AccessConfig = AccessConfig()

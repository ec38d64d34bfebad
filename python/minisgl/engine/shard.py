"""The model of one rank: loaded, with the operations and the communicator that it computes with."""

import logging
import time
from itertools import chain

import torch

from minisgl.attention.create import Backend, create_backend
from minisgl.config.runtime import EngineConfig
from minisgl.distributed.comm import Communicator
from minisgl.formats import create_format
from minisgl.kernel.ops import TorchOps
from minisgl.kvcache.pool import KVPool
from minisgl.kvcache.states import StatePool
from minisgl.layers.base import LayerEnv
from minisgl.layers.rope import rotations
from minisgl.models.checkpoint import Checkpoint, fill_random, load_weights
from minisgl.models.decoder import DecoderModel
from minisgl.models.heads import Head

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHES = {**DTYPES, "int8": torch.int8, "fp8": torch.uint8}


class ModelShard:
    """Raises: ConfigError when the model cannot be loaded or does not fit the configuration."""

    def __init__(self, config: EngineConfig, device: torch.device, comm: Communicator, ops: TorchOps) -> None:
        self.config, self.device, self.comm, self.ops = config, device, comm, ops
        start = time.perf_counter()
        with torch.inference_mode():
            checkpoint = None if config.dummy_weight else Checkpoint(config.model_path, config.model)
            weight_format = create_format(config, device, header := checkpoint.header() if checkpoint else {})
            env = LayerEnv(comm, ops, DTYPES[config.dtype], device, weight_format)
            self.model = DecoderModel(env, checkpoint.untied(config.model) if checkpoint else config.model)
            self.head = Head(env, self.model, header) if config.model.mtp else None
            parts = chain(self.model.parts(), self.head.parts() if self.head else ())
            if checkpoint:
                load_weights(parts, checkpoint)
            else:
                fill_random(parts, config.seed)
            self.ropes = rotations(config.model, device, config.max_seq_len)
        logger.info("weights ready after %.1f s", time.perf_counter() - start)

    def create_kv(self, *num_pages: int) -> KVPool:
        """num_pages: and those of layers whose windows slide."""
        config, kv_dtype = self.config, CACHES[self.config.kv_cache_dtype]
        num_slots = [num * config.page_size for num in (num_pages if config.window else num_pages[:1] * 2)]
        sizes, dtype = (config.draft_len, config.tp_size), self.ops.vector_dtype(DTYPES[config.dtype])
        states = StatePool(config.model, config.num_states, *sizes, dtype, self.device)
        return KVPool(config.model, num_slots, config.tp_size, kv_dtype, states)

    def create_attention(self) -> Backend:
        return create_backend(self.config, DTYPES[self.config.dtype], self.device)

"""Models whose weights are spread over processes."""

from __future__ import annotations

import torch.distributed as dist
from accelerate.utils import parse_flag_from_env
from transformers.integrations import is_fsdp_enabled


def filled_by_rank_0() -> bool:
    """Whether accelerate is to spare memory by filling all processes' models from the first one's."""
    return all(parse_flag_from_env(name) for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"))


def only_rank_0_has_weights() -> bool:
    """Whether for now only the first process may have the weights (`fsdp_cpu_ram_efficient_loading`)."""
    return is_fsdp_enabled() and dist.get_world_size() > 1

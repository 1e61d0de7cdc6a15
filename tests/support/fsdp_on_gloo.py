"""Runs a script on CPUs as on accelerators, over gloo: `accelerate launch tests/support/fsdp_on_gloo.py SCRIPT ...`.

accelerate shards on accelerators only; torch's `fully_shard` itself runs on CPUs too. So the backend that accelerate
finds is named here, and nothing else is changed.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def _prepare_backend(self: PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = _prepare_backend
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)  # as if it had been started itself
    code: Any = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    if not code and dist.is_initialized():  # an error of the script is told as it is
        raise RuntimeError(f"{sys.argv[0]} ended without dist.destroy_process_group()")
    # Torch's threads now and then abort the end of a process whose model was sharded, when all is done and saved.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))

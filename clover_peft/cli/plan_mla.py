"""`clover plan --mla`: what a conversion to latent attention takes, counted without weights."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

import torch
import transformers

from ..convert.plan import MlaPlan, measure_rates, plan_mla
from ..io.model_class import class_of, make_empty
from ..io.tables import markdown_table
from ..io.text_windows import DEFAULT_BATCH, DEFAULT_LENGTH, DEFAULT_ROWS
from ..tuner.config import CloverConfig


def run(given: argparse.Namespace, config: transformers.PretrainedConfig) -> int:
    """Print the plan of one model."""
    kind = class_of(config, CloverConfig(), given.model_class)
    dtype = getattr(torch, given.dtype) if given.dtype else config.dtype or torch.float32
    with torch.device("meta"):
        model = make_empty(kind, config)
    length = given.max_length or min(DEFAULT_LENGTH, getattr(config, "max_position_embeddings", DEFAULT_LENGTH))
    sizes = {name: getattr(given, name) for name in ("rope_dims", "kv_lora_rank")}
    plan = plan_mla(
        model,
        dtype=dtype,
        windows=given.rows or DEFAULT_ROWS,
        length=length,
        batch_size=given.batch_size or DEFAULT_BATCH,
        cache_reduction=given.mla or None,
        method=given.method or "clover",
        release=True,  # as `clover convert` does
        **sizes,
    )
    rates = measure_rates(dtype, plan.largest) if given.measure else None
    seconds = {name: stage.seconds(rates) for name, stage in plan.stages.items()} if rates else None
    if given.json:
        print(json.dumps({**asdict(plan), "rates": rates, "seconds": seconds}, indent=2))
    else:
        print(summary(plan, seconds))
    return 0


def summary(plan: MlaPlan, seconds: dict[str, float] | None) -> str:
    """The plan for people: a line of sizes, and a table of stages."""
    (cache, less), (before, after) = plan.cache_bytes, plan.parameters
    header = ["stage", "GFLOP", "float64 GFLOP", "eigh, 1e9 n^3", "GB moved", "peak GiB", "most of it"]
    rows: list[list[Any]] = []
    for name, stage in plan.stages.items():
        most = sorted(stage.held, key=lambda kind: -stage.held[kind])[:2]
        work = [f"{amount / 1e9:,.1f}" for amount in (stage.matmul, stage.double, stage.eigen, stage.moved)]
        rows.append([name, *work, _gib(stage.peak), ", ".join(f"{kind} {_gib(stage.held[kind])}" for kind in most)])
        if seconds is not None:
            rows[-1].insert(1, f"{seconds[name]:,.0f}")
    if seconds is not None:
        header.insert(1, "seconds here")
    layers = f"; moments of a layer {_gib(plan.layer_moments)} GiB" if plan.layer_moments else ""
    stored = max(stage.files for stage in plan.stages.values())
    files = f"; temporary files {_gib(stored)} GiB" if stored else ""
    return "\n".join(
        [
            f"{plan.method}, {plan.dtype}: rotary key of {plan.rope_dims}, latent of {plan.kv_lora_rank}; cache "
            f"{cache:,} to {less:,} bytes a token ({1 - less / cache:.2%} less); {before:,} to {after:,} "
            "parameters",
            f"{plan.tokens:,} tokens of calibration data{layers}{files}",
            "",
            markdown_table(header, rows),
        ]
    )


def _gib(count: float) -> str:
    return f"{count / 2**30:,.2f}"

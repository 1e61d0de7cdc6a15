"""The options of `clover convert`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .parsing import add_calibration, add_latent, add_model_class, add_model_dtype, expanded, new_parser, path


def convert(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser(
        "convert",
        """\
Converts a model into one with latent attention, or makes its hidden size smaller.

    clover convert my-llama --mla 0.6875 --calibration text.txt --out my-llama-mla
    clover convert my-llama --mla 0.6875 --prune 0.5 --calibration text.txt --out my-llama-mla-half
    clover convert my-llama --slice 0.0625 --rotation shared --calibration text.txt --out my-llama-sliced

With --mla, attention becomes multi-head latent attention (DeepseekV3ForCausalLM), whose cache holds a latent and one
rotary key. The folder holds the model in its own dtype, its tokenizer, convert.json (the errors of each layer),
convert.png (which pairs kept their rotation) and a README.md. With --slice, the residual stream becomes narrower, as
slicing.json reports. With --prune, the heads of either result are made narrower too, as pruning.json and pruning.png
report. The model is not trained.
""",
    )
    parser.add_argument("model", type=expanded, help="folder or hub name")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument(
        "--mla",
        type=float,
        nargs="?",
        const=0.0,
        metavar="SHARE",
        help="latent attention; SHARE of the cache to remove, or leave it out and pass --kv-lora-rank",
    )
    kind.add_argument("--slice", type=float, metavar="SHARE", help="SliceGPT; SHARE of the hidden size to remove")
    parser.add_argument(
        "--rotation",
        choices=["per_block", "shared"],
        help="of --slice: a basis for every block, or one for the model, which keeps its class; by default per_block",
    )
    add_latent(parser)
    parser.add_argument("--prune", type=float, metavar="RATIO", help="then prune this share of every head")
    parser.add_argument("--multiple", type=int, help="round pruned ranks, or the sliced size, to multiples of this")
    add_calibration(parser, pairs=False)
    parser.add_argument("--no-pictures", action="store_true", help="leave out the pictures, which need matplotlib")
    add_model_class(parser)
    add_model_dtype(parser)
    parser.add_argument("--out", type=path, required=True, help="folder to write, new or empty")
    return parser.parse_args(arguments)

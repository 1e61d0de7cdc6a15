"""What a conversion to latent attention takes: sizes, memory and work of each stage, from a configuration alone.

The counts follow the code of `convert_to_mla`: leading terms of matrix products and decompositions, the element-wise
passes that move most bytes, and the tensors that are held at once, as measured on small models. Layers are alike, so
that one is counted.
"""

from __future__ import annotations

import copy
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PretrainedConfig, PreTrainedModel

from .deepseek import make_config
from .exactness import TOKENS
from .latent_passes import EVERY, group_size, saved_bytes, stored_bytes
from .mla import choose_sizes, convert_to_mla
from .rotary import Method, choose, freq_fold_of
from .structure import Source, read_structure

# Float32 copies of one layer's attention weights, from the scores to the skewed sum: all, and those that live at once.
_WEIGHTS, _AT_ONCE = 9, 4.5


@dataclass
class Stage:
    """The work and the memory of one stage.

    Attributes:
        matmul: floating-point operations of matrix products in the model's dtype.
        double: those in float64, complex ones included.
        eigen: sum of n^3 over eigendecompositions of n x n matrices, in float64.
        moved: bytes that element-wise operations read and write.
        held: what is held at its peak -> bytes.
        files: bytes of temporary files.
    """

    matmul: float = 0.0
    double: float = 0.0
    eigen: float = 0.0
    moved: float = 0.0
    held: dict[str, float] = field(default_factory=dict)
    files: float = 0.0

    @property
    def peak(self) -> float:
        """Bytes at the peak, without those of Python and its libraries."""
        return sum(self.held.values())

    def seconds(self, rates: dict[str, float]) -> float:
        """The duration at rates that `measure_rates` returns."""
        return sum(getattr(self, name) / rate for name, rate in rates.items())


@dataclass(frozen=True)
class MlaPlan:
    """The plan of a conversion.

    Attributes:
        method: "clover" or "transmla".
        dtype: of the weights.
        tokens: of calibration data.
        rope_dims: dimensions of the shared rotary key.
        kv_lora_rank: dimensions of the latent.
        cache_bytes: bytes of the key-value cache for a token, before and after.
        parameters: before and after.
        largest: rows of the largest matrix that is decomposed.
        layer_moments: bytes of a layer's moments in the last stage.
        stages: name -> what it takes.
    """

    method: Method
    dtype: str
    tokens: int
    rope_dims: int
    kv_lora_rank: int
    cache_bytes: tuple[int, int]
    parameters: tuple[int, int]
    largest: int
    layer_moments: float
    stages: dict[str, Stage]


def plan_mla(
    model: PreTrainedModel,
    *,
    dtype: torch.dtype = torch.float32,
    windows: int = 64,
    length: int = 512,
    batch_size: int = 8,
    rope_dims: int | None = None,
    kv_lora_rank: int | None = None,
    cache_reduction: float | None = None,
    method: Method = "clover",
    release: bool = False,
) -> MlaPlan:
    """Count what `convert_to_mla` takes.

    Args:
        model: the original, on the meta device.
        dtype: of its weights.
        windows: of calibration data.
        length: tokens of a window.
        batch_size: windows of a batch.
        rope_dims: as for the conversion, as all that follow.
        kv_lora_rank: as there.
        cache_reduction: as there.
        method: as there.
        release: as there.

    Raises:
        ValueError, TypeError: the conversion would refuse the model or an argument.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{type(model).__name__}: expected bfloat16 or float32 weights, found {dtype}; choose one")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"{type(model).__name__}: expected weights that are not quantised, found a quantization_config; plan the "
            "model as it was before quantisation"
        )
    source = read_structure(model)
    pairs, rank = choose_sizes(source, rope_dims, kv_lora_rank, cache_reduction)
    _try_small(model)
    configs = [_config(source, pairs, each) for each in (None, rank)]
    with torch.device("meta"):
        full, final = map(DeepseekV3ForCausalLM, configs)
    data = (length, min(batch_size, windows), windows * length)
    count = _Counts(source, full, final, dtype.itemsize, *data, method, release)
    layers, size, narrowed = len(source.layers), dtype.itemsize, rank < full.config.kv_lora_rank
    stages = {"rotation": count.rotation(), "selection": count.selection(), "latent": count.latent()}
    return MlaPlan(
        method=method,
        dtype=str(dtype).removeprefix("torch."),
        tokens=windows * length,
        rope_dims=2 * pairs,
        kv_lora_rank=rank,
        cache_bytes=(4 * source.pairs * layers * size, (2 * pairs + rank) * layers * size),
        parameters=(_parameters(model), _parameters(final)),
        largest=max(count.n if narrowed else 0, count.of_group),
        layer_moments=(3 if method == "clover" else 1) * 8 * count.n**2 if narrowed else 0,
        stages=stages,
    )


def measure_rates(dtype: torch.dtype, largest: int) -> dict[str, float]:
    """What this machine does in a second, in the units of `Stage`, with torch's threads. Takes a few seconds.

    Args:
        dtype: of the weights.
        largest: rows of the largest matrix that is decomposed.
    """
    n = min(largest, 512)
    x, y = torch.randn(1024, 1024, dtype=dtype), torch.randn(512, 512, dtype=torch.float64)
    symmetric, many = torch.randn(n, n, dtype=torch.float64), torch.randn(2**22)
    work = {
        "matmul": (2 * 1024**3, lambda: x @ x),
        "double": (2 * 512**3, lambda: y @ y),
        "eigen": (n**3, lambda: torch.linalg.eigh(symmetric + symmetric.mT)),
        "moved": (2 * many.nbytes, lambda: many + 1),
    }
    rates = {}
    for name, (amount, run) in work.items():
        seconds = []
        for _ in range(4):  # the first one warms up
            started = time.process_time()  # other processes may share the processor
            run()
            seconds.append((time.process_time() - started) / torch.get_num_threads())
        rates[name] = amount / min(seconds[1:])
    return rates


class _Counts:
    """Counts the stages of one conversion; n is the width of the full latent, T the tokens of a window."""

    def __init__(
        self,
        source: Source,
        full: Any,
        final: Any,
        size: int,
        length: int,
        batch: int,
        tokens: int,
        method: Method,
        release: bool,
    ) -> None:
        self.source, self.full, self.size, self.method, self.release = source, full, size, method, release
        self.final, self.final_config, config = final, final.config, full.config
        self.length, self.batch, self.tokens = length, batch, tokens
        self.layers, self.heads, self.d = len(source.layers), source.heads, source.head_dim
        self.hidden, self.vocabulary = config.hidden_size, config.vocab_size
        self.n, self.nope, self.rope = config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim
        self.key = self.nope + self.rope
        self.mlp = config.intermediate_size
        # Components of a group of frequencies, and their squares over all groups, in complex products of 8 operations.
        self.of_group = source.key_value_heads * freq_fold_of(source, self.rope // 2)
        self.components = source.pairs * self.of_group
        self.weights, self.final_weights = size * _parameters(source.model), size * _parameters(final)
        self.layer = _parameters(full.model.layers[0])
        self.outside = size * (_parameters(full) - self.layers * self.layer)

    def _forward(self, model: Any, tokens: float, length: int, key: int) -> float:
        """Operations of the trunk over windows of `length` tokens whose keys have `key` dimensions."""
        attention = 2 * self.layers * self.heads * (key + self.d) * length
        return tokens * (2 * _linear(model.model) + attention)

    def _elementwise(self, tokens: float) -> float:
        """Bytes that norms, residuals, rotations and the gates of the MLP move."""
        numbers = 20 * self.hidden + 8 * self.mlp + 12 * self.heads * self.d
        return tokens * self.layers * self.size * numbers

    def _logits(self, tokens: float) -> float:
        return 2 * tokens * self.vocabulary * self.hidden

    def _recording(self) -> float:
        """Bytes of what is kept of the original's pass over one short text."""
        text = min(self.length, TOKENS)
        widths = 2 * self.hidden + 2 * self.heads * self.d + 4 * self.source.pairs
        return text * self.size * (self.layers * widths + self.vocabulary)

    def rotation(self) -> Stage:
        text, heads, half = min(self.length, TOKENS), self.heads, self.d // 2
        weights = self.layers * heads * self.length * 4  # bytes a token, of all layers
        checked = (
            self.layers * text * 8 * (self.components * (1 + self.source.groups) + heads * self.source.pairs * text)
        )
        moments = self.layers * (16 * self.components + 8 * heads * (self.length + half))
        layer = self.batch * self.length * self.size * (10 * self.hidden + 3 * self.mlp + 4 * heads * self.d)
        return Stage(
            matmul=self._forward(self.source.model, self.tokens + text, self.length, self.d)
            + self._logits(text)
            + 8 * self.layers * self.components * self.tokens,
            double=checked,
            eigen=self.layers * self.components * self.of_group,
            moved=self._elementwise(self.tokens) + 2 * _WEIGHTS * weights * self.tokens,
            held={
                "original": self.weights,
                "moments": moments,
                "activations": layer + self.batch * heads * self.length**2 * 4 * _AT_ONCE,
                "recording": self._recording(),
            },
        )

    def _building(self) -> tuple[float, float, float]:
        """Float64 operations to make one layer of full rank, bytes that this moves, and bytes that it holds."""
        heads, d, n, key = self.heads, self.d, self.n, self.key
        up = heads * (self.nope + d)
        numbers = 2 * heads * (key + d) + 6 * self.source.pairs + 3 * n + self.rope  # rows of the hidden size
        unrotated = heads * self.nope * (n - 2 * self.source.pairs)
        operations = 8 * self.components * (self.hidden + 1) * (1 + self.source.groups)
        return operations, 80 * up * n, 8 * (self.hidden * numbers + up * n + 2 * unrotated)

    def selection(self) -> Stage:
        text = min(self.length, TOKENS)
        double, moved, building = self._building()
        return Stage(
            matmul=2 * self._forward(self.full, text, text, self.key) + self._logits(text),
            double=self.layers * double,
            moved=self.layers * moved,
            held={
                "original": self.weights,
                "result outside layers": self.outside,
                "layers at work": self.size * self.layer,
                "one layer in float64": building,
                "recording": self._recording(),
            },
        )

    def latent(self) -> Stage:
        n, rank, learned = self.n, self.final_config.kv_lora_rank, self.method == "clover"
        double, moved, building = self._building()
        result, original, square = self.final_weights - self.outside, self.weights - self.outside, 8 * n * n
        # The most of both models is there with the first layer at work or with the last one.
        left = original / self.layers + self.outside if self.release else self.weights
        models = [(self.weights, self.outside), (left, result * (1 - 1 / self.layers) + self.outside)]
        held = dict(zip(("original", "result"), max(models, key=sum), strict=True)) | {"recording": self._recording()}
        one = {"layers at work": self.size * self.layer}
        if rank == n:
            held |= {**one, "one layer in float64": building}
            return Stage(double=self.layers * double, moved=self.layers * moved, held=held)
        batch = self.batch * self.length
        saved = saved_bytes(self.full.config, self.batch, self.length, self.size)
        at_once = group_size(self.full.config, self.size * self.layer + learned * saved)
        groups = -(-self.layers // at_once)
        up, passes = self.heads * (self.nope + self.d), 2 if learned else 1
        again = (1 - at_once / self.layers) if learned else 0  # the first sweep, of all groups but the last
        # A backward pass is for inputs alone: weights get no gradients. A causal kernel computes half of the scores.
        # Its backward pass is two forward passes, that of the rest one.
        half = self.layers * self.heads * (self.key + self.d) * self.length * self.tokens
        matmul = (passes + again) * 2 * _linear(self.full.model) * self.tokens + (2 * passes - 1 + again) * half
        matmul += 2 * self.layers * n * n * self.tokens + (passes - 1) * 2 * self._logits(self.tokens / EVERY)
        layer = 2 * n**3 + 2 * n * rank * (2 * n + self.hidden + up)
        group = {"layers at work": at_once * self.size * self.layer}
        sums = {"moments": at_once * square, "a sum": 1.5 * square}
        at_work = [
            group | sums | {"activations": saved * (at_once if learned else 1)}
            | ({"gradients": 8 * self.heads * self.length * batch} if learned else {})
            | ({"logits": batch / EVERY * self.vocabulary * 4 * 4} if learned else {}),
            group | {"moments": (at_once - 1) * square, "one layer in float64": building},
        ]  # fmt: skip
        on_disk = stored_bytes(groups, self.tokens, self.hidden, self.size, learned)
        if learned:
            width = self.heads * self.d
            # The original, the narrow layers, their attention once more, and two streams of latents of full rank.
            matmul += 2 * self.tokens * (_linear(self.source.model.model) + _linear(self.final.model))
            matmul += 3 * self.layers * self.heads * (self.key + self.d) * self.length * self.tokens
            matmul += self.layers * self.tokens * (4 * self.hidden * n + 4 * n * n)
            matmul += 2 * self.layers * self.tokens * width * (width + 2 * self.hidden)
            layer += 13 * n**3 + width**3
            of_output = 8 * width * (width + self.hidden)
            at_work += [
                one | {"moments": 2 * square, "a sum": 1.5 * square, "output projection": of_output},
                one | {"one layer in float64": 8 * square, "output projection": of_output},
                one | {"output projection": 4 * of_output, "activations": batch * 8 * 2 * width},
            ]
            streams = 2 * self.tokens * self.hidden * self.size
            on_disk = 4 * self.layers * n * n + max(on_disk, streams)
        else:
            at_work.append(group | {"moments": (at_once - 1) * square, "one layer in float64": 6 * square})
        return Stage(
            matmul=matmul,
            double=self.layers * (layer + double * (1 + again + learned)),
            eigen=self.layers * passes * n**3,
            moved=(2 * passes - 1 + again + 2 * learned) * self._elementwise(self.tokens)
            + self.layers * moved * (1 + again + learned),
            held=held | max(at_work, key=lambda kinds: sum(kinds.values())),
            files=on_disk,
        )


def result_config(model: PreTrainedModel, cache_reduction: float) -> DeepseekV3Config:
    """The configuration that a conversion gives a model, which may be on the meta device."""
    source = read_structure(model)
    return _config(source, *choose_sizes(source, None, None, cache_reduction))


def _config(source: Source, pairs: int, rank: int | None) -> DeepseekV3Config:
    """The result's, with a latent of this rank or, without one, of full rank."""
    freq_fold = freq_fold_of(source, pairs)
    worth = torch.zeros(source.head_dim // 2 // freq_fold, source.key_value_heads * freq_fold)
    config = make_config(source, choose(worth, pairs))
    config.kv_lora_rank = config.kv_lora_rank if rank is None else rank
    return config


def _try_small(model: PreTrainedModel) -> None:
    """Convert a small model of the same class: what a class computes between its modules shows only when it runs."""
    config: PretrainedConfig = copy.deepcopy(model.config)
    sizes: dict[str, Any] = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 64,
    }
    sizes |= {"hidden_size": 64, "intermediate_size": 64, "pad_token_id": None}
    sizes["head_dim"] = model.model.layers[0].self_attn.head_dim
    for name, value in {**sizes, "dtype": torch.float32}.items():
        setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few tokens
        torch.manual_seed(0)
        ids = torch.randint(64, (1, 32), generator=generator)
        convert_to_mla(type(model)(config).float(), [{"input_ids": ids}], rope_dims=2, kv_lora_rank=1)


def _linear(module: nn.Module) -> int:
    """Numbers in the weights that a token is multiplied by."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

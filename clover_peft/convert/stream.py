"""Where a model reads and writes its residual stream: facts of families, and how a width is put into effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import dropout

# Modules inside a block that do not see the residual stream.
_INNER = ("q_b_proj", "kv_b_proj", "q_a_layernorm", "kv_a_layernorm", "q_norm", "k_norm")


@dataclass(frozen=True)
class Block:
    """A part of a layer that reads the stream behind a norm and adds to it: attention, or the MLP.

    Attributes:
        norm: the norm, a path in the layer, as all here.
        reads: weights whose last axis is the hidden size.
        writes: weights whose last but one axis is the hidden size.
        run: computes what a layer adds to the stream, from what the norm returns and the layer's keywords.
    """

    norm: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    run: Callable[..., Tensor]


@dataclass(frozen=True)
class Stream:
    """The residual stream of a family of pre-norm decoders; paths are relative to the trunk.

    Attributes:
        attention: the first block of a layer.
        mlp: the second block.
        norm: the last norm, in front of the head.
        embeddings: what the stream starts from.
        centred: norms are LayerNorms. They subtract the mean, so that the stream may be centred.
        sized: the classes read all their sizes from the config, in which `hidden_size` may be any.
    """

    attention: Block
    mlp: Block
    norm: str = "norm"
    embeddings: tuple[str, ...] = ("embed_tokens",)
    centred: bool = False
    sized: bool = True

    @property
    def blocks(self) -> tuple[Block, Block]:
        return self.attention, self.mlp


def _attend(layer: Any, x: Tensor, **kwargs: Any) -> Tensor:
    out: Tensor = layer.self_attn(hidden_states=x, **kwargs)[0]
    return layer.resid_attn_dropout(out) if hasattr(layer, "resid_attn_dropout") else out


def _feed(layer: Any, x: Tensor, **kwargs: Any) -> Tensor:
    out: Tensor = layer.mlp(x)
    return layer.resid_mlp_dropout(out) if hasattr(layer, "resid_mlp_dropout") else out


def _attend_opt(layer: Any, x: Tensor, use_cache: Any = None, **kwargs: Any) -> Tensor:
    return dropout(layer.self_attn(hidden_states=x, **kwargs)[0], layer.dropout, layer.training)


def _feed_opt(layer: Any, x: Tensor, **kwargs: Any) -> Tensor:
    return dropout(layer.fc2(layer.activation_fn(layer.fc1(x))), layer.dropout, layer.training)


def _weights(prefix: str, names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}.weight" for name in names.split())


_LLAMA = Stream(
    Block(
        "input_layernorm",
        _weights("self_attn", "q_proj k_proj v_proj qkv_proj q_a_proj kv_a_proj_with_mqa"),
        _weights("self_attn", "o_proj"),
        _attend,
    ),
    Block(
        "post_attention_layernorm",
        (
            *_weights("mlp", "gate_proj up_proj gate_up_proj gate shared_experts.gate_proj shared_experts.up_proj"),
            "mlp.experts.gate_up_proj",
        ),
        (*_weights("mlp", "down_proj shared_experts.down_proj"), "mlp.experts.down_proj"),
        _feed,
    ),
)
_OPT = Stream(
    Block(
        "self_attn_layer_norm",
        _weights("self_attn", "q_proj k_proj v_proj"),
        _weights("self_attn", "out_proj"),
        _attend_opt,
    ),
    Block("final_layer_norm", ("fc1.weight",), ("fc2.weight",), _feed_opt),
    norm="final_layer_norm",
    embeddings=("embed_tokens", "embed_positions"),
    centred=True,
    sized=False,  # its heads are as wide as hidden_size / num_attention_heads
)
# Model type -> its stream.
STREAMS = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "phi3", "deepseek_v2", "deepseek_v3"], _LLAMA),
    "opt": _OPT,
}
# Why others are refused.
_POST_NORMS = "norms stand behind attention or MLP, where a rotation of the residual stream does not pass"
_PARALLEL = "attention and MLP read the residual stream in parallel, which is not implemented"
_SCALED = "embeddings, residuals or gains are scaled in a way of its own, which is not implemented"
REASONS = {
    **dict.fromkeys(["gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4", "glm4", "bert", "roberta"], _POST_NORMS),
    **dict.fromkeys(["phi", "gptj", "gpt_neox", "codegen", "cohere", "cohere2", "falcon", "stablelm"], _PARALLEL),
    **dict.fromkeys(["gemma", "granite", "granitemoe"], _SCALED),
}


def trunk_of(model: Any) -> Any:
    """The module that holds embeddings, layers and the last norm: of a model with a head, or the trunk itself."""
    base = getattr(model, "base_model", model)
    return getattr(base, "decoder", base)


def head_of(model: Any) -> nn.Linear | None:
    """The projection onto the vocabulary; None for a trunk."""
    return getattr(model, "lm_head", None)


def present(layer: nn.Module, paths: tuple[str, ...]) -> Iterator[tuple[Any, str]]:
    """The modules and names of those weights that a layer has."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        try:
            module = layer.get_submodule(parent)
        except AttributeError:
            continue
        if getattr(module, name, None) is not None:
            yield module, name


def strangers(layer: nn.Module, stream: Stream) -> list[str]:
    """Parameters of a layer that the table does not know, which might see the residual stream."""
    known = {path for block in stream.blocks for path in (*block.reads, *block.writes)}
    biases = {path.removesuffix("weight") + "bias" for path in known}
    norms = {f"{block.norm}.{kind}" for block in stream.blocks for kind in ("weight", "bias")}
    found = []
    for name, _ in layer.named_parameters():
        if name not in known | biases | norms and not any(f".{inner}." in f".{name}" for inner in _INNER):
            found.append(name)
    return found


def put(module: Any, name: str, tensor: Tensor, width: int) -> None:
    """Replace a parameter by one of another size, and the sizes that its module keeps beside it.

    Args:
        module: a linear projection, an embedding, a norm, a router or a stack of experts.
        name: of the parameter.
        tensor: the new one.
        width: the hidden size that it is made for.
    """
    old = module._parameters[name]
    module._parameters[name] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    if isinstance(module, nn.Linear) and name == "weight":
        module.out_features, module.in_features = tensor.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = width
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = (width,)
    elif hasattr(module, "hidden_dim"):
        module.hidden_dim = width


def empty(model: Any, stream: Stream, width: int) -> None:
    """Give every weight on the residual stream another width, in place and with numbers yet to be filled in."""
    trunk, head = trunk_of(model), head_of(model)

    def resize(module: Any, name: str, axis: int) -> None:
        old = getattr(module, name)
        shape = list(old.shape)
        if shape[axis] == width:
            return
        shape[axis] = width
        put(module, name, old.new_empty(shape), width)

    for name in stream.embeddings:
        resize(getattr(trunk, name), "weight", -1)
    for layer in trunk.layers:
        for block in stream.blocks:
            for module, name in present(layer, block.reads):
                resize(module, name, -1)
            for module, name in present(layer, block.writes):
                resize(module, name, -2)
                if getattr(module, "bias", None) is not None:
                    resize(module, "bias", -1)
    for norm in norms(trunk, stream):
        for name in [name for name, _ in norm.named_parameters()]:
            resize(norm, name, -1)
    if head is not None:
        resize(head, "weight", -1)


def norms(trunk: Any, stream: Stream) -> list[Any]:
    """All norms in front of blocks, layer by layer, and the last norm."""
    found = [layer.get_submodule(block.norm) for layer in trunk.layers for block in stream.blocks]
    return [*found, getattr(trunk, stream.norm)]

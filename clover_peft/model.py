"""`CloverModel`: puts CLOVER layers into a model, and checks what is saved and loaded."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_quantization_kwargs
from peft.utils.other import get_pattern_key

from .architectures import FAMILIES, Partner, TargetSlice, base_of, resolve, unknown_family_message
from .config import CloverConfig
from .decomposition import Bases, Factors, describe_dropped, fold, gram, pair_bases, qr_bases, svd_bases
from .layer import BlockSpec, CloverLayer, check_packing, onloaded


logger = logging.getLogger(__name__)

# Largest relative difference of a block's singular values that rounding of the base's weights explains, by the coarser
# of the two precisions; the singular values themselves are kept in float32.
_ROUNDING = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3, "8 bits": 5e-2, "4 bits": 0.15}
_PROBE = "clover_probe"


class CloverModel(BaseTuner):
    """Adds CLOVER adapters to a model (arXiv 2411.17426): every head keeps its weights and gets frozen bases and a
    trained matrix of singular values between them.

    Args:
        model: The model to adapt, in place.
        config: A [`CloverConfig`].
        adapter_name: The adapter's name, "default" unless given.
        low_cpu_mem_usage: Create the adapter on the meta device, for weights that are loaded next.

    Example:

        ```py
        >>> import clover_peft
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM

        >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> model = get_peft_model(model, clover_peft.CloverConfig())
        ```
    """

    prefix: str = "clover_"
    tuner_layer_cls = CloverLayer
    target_module_mapping = {model_type: family.target_modules for model_type, family in FAMILIES.items()}

    # ------------------------------------------------------------------ injection

    def _prepare_adapter_config(self, peft_config: CloverConfig, model_config: dict) -> CloverConfig:
        if peft_config.target_modules is None and model_config.get("model_type") not in FAMILIES:
            raise ValueError(unknown_family_message(str(model_config.get("model_type")), "target_modules"))
        return super()._prepare_adapter_config(peft_config, model_config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in peft; a failure takes back what was already injected, so that the model stays as it was."""
        config = self.peft_config[adapter_name]
        if config.folded and not config.inference_mode:
            raise ValueError(
                f"adapter {adapter_name!r} was saved folded, for inference; load it with is_trainable=False, or train "
                "from one saved with save_bases=True"
            )
        self._conditions: dict[str, tuple[float, torch.dtype]] = {}
        with tqdm(desc="CLOVER bases", unit=" modules", delay=3, leave=False) as self._progress:
            try:
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            except Exception:
                _take_out(model, adapter_name)
                raise
        self._warn_about_conditions()

    def _create_and_replace(
        self,
        peft_config: CloverConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        specs = self._specs(peft_config, current_key)
        check_packing(base_of(target), current_key)
        layer = target
        is_new = not isinstance(target, CloverLayer)
        if is_new:
            layer = CloverLayer(target, adapter_name, current_key, get_quantization_kwargs(self.model))
        if peft_config.base_precision is None:
            peft_config.base_precision = precision_of(layer)
        if peft_config.folded:
            bases = None if _on_meta() or layer.weight.is_meta else {}
        elif (bases := layer.bases_to_share(specs)) is None and not _on_meta():
            bases = self._decompose(layer, specs)
        layer.update_layer(
            adapter_name,
            specs,
            bases,
            dropout=peft_config.clover_dropout,
            init_weights=peft_config.init_weights,
            inference_mode=peft_config.inference_mode,
        )
        if is_new:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        self._progress.update()

    def _specs(self, config: CloverConfig, key: str) -> tuple[BlockSpec, ...]:
        slices = resolve(
            self.model,
            key,
            head_dim=config.head_dim,
            num_heads=config.num_heads,
            described=config.mlp_block_size is not None or config.block_size is not None,
        )
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, key), config.r)
        return tuple(_spec(config, key, target, rank) for target in slices)

    @torch.no_grad()
    def _decompose(self, layer: CloverLayer, specs: tuple[BlockSpec, ...]) -> dict[str, Bases] | None:
        """Bases of every slice, or None where the weights are not there (meta device)."""
        with onloaded(layer.get_base_layer()):
            if layer.weight.is_meta:
                return None
            weight = layer.transposed_weight()
            bias = layer.original_bias
            result = {}
            for spec in specs:
                try:
                    result[spec.name] = self._decompose_slice(spec, weight, bias)
                except ValueError as error:
                    raise ValueError(f"{layer.name}: {error}") from error
                self._report(layer, spec, result[spec.name])
        return result

    def _decompose_slice(self, spec: BlockSpec, weight: Tensor, bias: Tensor | None) -> Bases:
        g_in = gram(
            spec.heads.blocks(weight, spec.size), None if bias is None else spec.heads.blocks(bias, spec.size)
        )
        if spec.basis == "pair":
            bases = pair_bases(g_in, self._partner_gram(spec).to(g_in.device))
        else:
            bases = qr_bases(g_in) if spec.basis == "qr" else svd_bases(g_in)
        return bases if spec.r == spec.size else bases.leading(spec.r)

    def _partner_gram(self, spec: BlockSpec) -> Tensor:
        """Gram of the partner's side of every block, summed over the query heads that share a key-value head."""
        rows, bias = _partner_weight(self.model, spec.partner)
        heads = spec.partner.heads
        g = gram(heads.blocks(rows, spec.size), None if bias is None else heads.blocks(bias, spec.size))
        groups = heads.count // spec.heads.count
        return g.unflatten(0, (spec.heads.count, groups, -1)).sum(1).flatten(0, 1)

    def _report(self, layer: CloverLayer, spec: BlockSpec, bases: Bases) -> None:
        if (dropped := describe_dropped(bases)) is not None:
            warnings.warn(
                f"{layer.name} ({spec.part}): degenerate weights; directions dropped, which will not be trained, in "
                f"block(s) {dropped}",
                stacklevel=2,
            )
        dtype = layer.weight.dtype if layer.weight.is_floating_point() else torch.bfloat16
        self._conditions[f"{layer.name} ({spec.part})"] = (float(bases.condition.max()), dtype)

    def _warn_about_conditions(self) -> None:
        suspect = {
            name: condition
            for name, (condition, dtype) in self._conditions.items()
            if condition * torch.finfo(dtype).eps > 0.1
        }
        if suspect:
            worst = max(suspect, key=suspect.__getitem__)
            warnings.warn(
                f"{len(suspect)} target(s) are so ill-conditioned that rounding in the compute dtype is amplified to "
                f"over 10 % of the map; worst: {worst}, condition up to {suspect[worst]:.0f}; compute in float32, or "
                "leave these modules out with exclude_modules",
                stacklevel=2,
            )

    # ------------------------------------------------------------------ merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in peft; a failure unmerges what was merged by this call, so that the model stays as it was."""
        before = [(layer, list(layer.merged_adapters)) for _, layer in clover_layers(self.model)]
        try:
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        except Exception:
            for layer, names in before:
                if layer.merged_adapters != names:
                    layer.unmerge()
                    if names:
                        layer.merge(adapter_names=names)
            raise

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            # Merge everything before anything is taken out, so that a failure leaves the model as it was.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # peft warns about what is merged already; that is the point here
                self.merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        else:
            for _, layer in clover_layers(self.model):
                if layer.merged:
                    layer.unmerge()
        return super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any):
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "CLOVER does not support mixed batches (adapter_names=...) yet; run the adapters one after the other "
                "with set_adapter"
            )
        yield

    # ------------------------------------------------------------------ saving and loading

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: CloverConfig, adapter_name: str, state_dict: dict, unwanted_adapter_names: list
    ) -> dict[str, Tensor]:
        result = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        for name, layer in clover_layers(model):
            if adapter_name not in layer.clover_S:
                continue
            layer.check_bases(adapter_name, "save")
            for spec in layer.specs[adapter_name]:
                keys = _keys(name, adapter_name, spec)
                if config.save_bases is True or spec.basis == "folded" or keys["clover_S"] not in result:
                    continue
                s, u, v, s0 = (result.get(keys[a]) for a in ("clover_S", "clover_U", "clover_V", "clover_S0"))
                for attribute in ("clover_U", "clover_V"):
                    result.pop(keys[attribute], None)
                if config.save_bases == "folded":
                    del result[keys["clover_S0"]]
                    result[keys["clover_S"]] = _residual_map(spec, s, u, v, s0)
                else:
                    result[keys[_PROBE]] = _probe(u)
        return result

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: CloverConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        result = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        tuner = model if isinstance(model, CloverModel) else getattr(model, "base_model", None)
        try:
            for name, layer in clover_layers(model):
                if adapter_name in layer.clover_S:
                    _check_checkpoint(name, layer, adapter_name, config, result, tuner)
        except ValueError:
            if isinstance(tuner, CloverModel) and getattr(config, "source", None) is not None:
                tuner.discard(adapter_name)
            raise
        config.source = None
        return result

    def discard(self, adapter_name: str) -> None:
        """Take out an adapter that could not be loaded, and the layers with it if it was the only one."""
        if list(self.peft_config) == [adapter_name]:
            self.unload()
        else:
            self.delete_adapter(adapter_name)


# ---------------------------------------------------------------------- helpers


def clover_layers(model: nn.Module) -> list[tuple[str, CloverLayer]]:
    """Every CLOVER layer of a model and its path."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, CloverLayer)]


@torch.no_grad()
def explicit_factors(model: nn.Module, target: str, adapter_name: str = "default") -> dict[str, Factors]:
    """The paper's U, S and V of an adapted projection, from the base weights and the adapter (Eq. 3, arXiv 2411.17426).

    U and V have orthonormal columns. Where nothing was cut (r = d, no degenerate head), `V S U^T` is the current
    product of a pair, `W_o (I + E dS C) W_v`, and for an intra-layer target the current weight itself.

    Args:
        model: a model with a CLOVER adapter: a `PeftModel`, or one that an adapter was injected into.
        target: path of the projection in the base model, or a suffix that only one adapted module has.
        adapter_name: the adapter.

    Returns:
        Slice name ("weight" where there is only one) -> `Factors` of its blocks, in float64. Under grouped-query
        attention V's rows are those of all query heads that share the key-value head.

    Raises:
        ValueError: if no module or more than one matches, or the adapter is not there.
    """
    tuner = getattr(model, "base_model", model)
    inner = tuner.model if isinstance(tuner, CloverModel) else model
    found = [(n, m) for n, m in clover_layers(inner) if n == target or n.endswith("." + target)]
    if len(found) != 1 or adapter_name not in found[0][1].specs:
        raise ValueError(
            f"{target}: expected one module with an adapter {adapter_name!r}, found {[name for name, _ in found]}; "
            "pass the whole path of one of them"
        )
    layer = found[0][1]
    layer.check_bases(adapter_name, "factor")
    weight, bias = layer.transposed_weight().double(), layer.original_bias
    result = {}
    for spec in layer.specs[adapter_name]:
        if spec.basis == "folded":
            raise ValueError(f"{layer.name}: the adapter was saved folded and has no bases; save it with save_bases=True")
        s, u, v, _ = (t if t is None else t.double() for t in layer.tensors(adapter_name, spec))
        rows = spec.heads.blocks(weight, spec.size).permute(1, 0, 2)
        if bias is not None:
            rows = torch.cat([rows, spec.heads.blocks(bias.double(), spec.size).unsqueeze(1)], dim=1)
        # S0 from its definition, C W W^T C^T seen from the other side, rather than from float32 storage.
        if spec.basis == "pair":
            columns = _partner_columns(inner, spec)
            out = columns @ v
            s0 = out.mT @ columns @ rows.mT @ (rows @ u.mT)
        else:
            out = torch.eye(spec.size, dtype=torch.float64, device=s.device).expand(spec.blocks, -1, -1) if v is None else v
            s0 = out.mT @ rows.mT @ (rows @ u.mT)
        result[spec.name] = Factors(rows @ u.mT, s0 + (torch.diag_embed(s) if s.ndim == 2 else s), out)
    return result


def _partner_weight(model: nn.Module, partner: Partner) -> tuple[Tensor, Tensor | None]:
    """The partner's weight with the heads in its last dimension, (D, features), and the bias that belongs to them."""
    module = model.get_submodule(partner.path)
    base = base_of(module)
    # A layer of ours reads any weight: transposed, quantised, or merged into at the moment.
    reader = module if isinstance(module, CloverLayer) else CloverLayer(base, "", partner.path)
    with onloaded(base):
        weight = reader.transposed_weight()
        return (weight.mT, None) if partner.reads else (weight, reader.original_bias)


def _partner_columns(model: nn.Module, spec: BlockSpec) -> Tensor:
    """(H, D, d) float64: the partner's side of every block; rows of the query heads of a group lie below each other."""
    weight, bias = _partner_weight(model, spec.partner)
    if bias is not None:
        weight = torch.cat([weight, bias.to(weight).unsqueeze(0)])
    heads = spec.partner.heads
    blocks = heads.blocks(weight.double(), spec.size)  # (D, groups * H, d)
    groups = heads.count // spec.heads.count
    grouped = blocks.unflatten(1, (spec.heads.count, groups, -1))  # (D, kv heads, groups, blocks a head, d)
    return grouped.permute(1, 3, 2, 0, 4).flatten(2, 3).flatten(0, 1)


def _spec(config: CloverConfig, key: str, target: TargetSlice, rank: int | None) -> BlockSpec:
    """The choices of a config for one slice.

    Raises:
        ValueError: if they do not fit it.
    """
    heads, is_attention = target.heads, target.part not in ("up", "linear")
    paired = config.cross_layer and target.partner is not None
    size = config.block_size if is_attention else config.mlp_block_size
    if size is None:
        size = heads.dim if is_attention else max(n for n in range(1, 65) if heads.features % n == 0)
    if heads.features % size or (heads.dim % size and size % heads.dim):
        option = "block_size" if is_attention else "mlp_block_size"
        raise ValueError(
            f"{key}: {option}={size} neither divides nor is a multiple of {heads.dim} features "
            f"({heads.features} in all); choose a divisor of {heads.dim}"
        )
    if paired and heads.dim % size:
        raise ValueError(
            f"{key}: block_size={size} spans several heads of {heads.dim}, but heads of a pair attend with different "
            "weights; pass cross_layer=False or a divisor of the head"
        )
    r = size if rank is None else rank
    if r > size:
        raise ValueError(
            f"{key}: r={r} is larger than a block of {size} features ({target.part}); lower r, or give this module its "
            "own with rank_pattern"
        )
    basis = "pair" if paired else config.basis
    if basis is None:
        basis = "qr" if config.s_matrix == "full" and r == size else "svd"
    elif basis == "qr" and r < size:
        raise ValueError(
            f"{key}: r={r} trains the leading directions of {size}, which the QR basis has not; use basis='svd' or r=None"
        )
    if config.folded:
        return BlockSpec(target.name, target.part, heads, size, size, "full", "folded", False)
    if paired and (target.partner.heads.count % heads.count):
        raise ValueError(
            f"{key}: {target.partner.path} has {target.partner.heads.count} heads, which {heads.count} key-value heads "
            "cannot share evenly; pass cross_layer=False"
        )
    return BlockSpec(
        target.name,
        target.part,
        heads,
        size,
        r,
        config.s_matrix,
        basis,
        config.truncate and r < size,
        target.partner if paired else None,
    )


def _on_meta() -> bool:
    """Whether new parameters are created on the meta device (`low_cpu_mem_usage`)."""
    return nn.Linear(1, 1).weight.is_meta


def _take_out(model: nn.Module, adapter_name: str) -> None:
    """Remove what an interrupted injection left behind."""
    for name, layer in clover_layers(model):
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
            if adapter_name in getattr(layer, attribute):
                del getattr(layer, attribute)[adapter_name]
        if not layer.specs:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)


def _keys(name: str, adapter_name: str, spec: BlockSpec) -> dict[str, str]:
    prefix = f"{name}." if name else ""
    return {
        attribute: f"{prefix}{attribute}.{adapter_name}.{spec.name}"
        for attribute in ("clover_S", "clover_U", "clover_V", "clover_S0", _PROBE)
    }


def _probe(coordinates: Tensor) -> Tensor:
    """(H, r): C times a fixed vector; tells whether bases computed elsewhere are the same, signs and order included."""
    d = coordinates.shape[-1]
    return coordinates @ torch.cos(torch.arange(1, d + 1, dtype=coordinates.dtype, device=coordinates.device))


def _residual_map(spec: BlockSpec, s: Tensor, u: Tensor, v: Tensor | None, s0: Tensor) -> Tensor:
    """(H, d, d): what is added to the identity, `E dS C`, or `E (S0 + dS) C - I` with truncation."""
    if not spec.truncate:
        return fold(s, u, v)
    eye = torch.eye(spec.size, dtype=s.dtype, device=s.device)
    return fold(s + (s0 if spec.form == "diagonal" else torch.diag_embed(s0)), u, v) - eye


def _check_checkpoint(
    name: str, layer: CloverLayer, adapter_name: str, config: CloverConfig, state: dict[str, Tensor], tuner: Any
) -> None:
    """Compare what a file holds for one layer with the layer, before anything is loaded.

    Raises:
        ValueError: naming the module, what was expected, what was found and what to do.
    """
    for spec in layer.specs[adapter_name]:
        keys = _keys(name, adapter_name, spec)
        probe = state.pop(keys[_PROBE], None)
        expected = {"clover_S": spec.s_shape, **spec.base_shapes}
        if probe is not None:
            expected = {a: shape for a, shape in expected.items() if a in ("clover_S", "clover_S0")}
        missing = [a for a in expected if keys[a] not in state]
        if missing or (spec.basis == "folded" and keys["clover_S0"] in state):
            raise ValueError(
                f"{layer.name}: expected {sorted(expected)} in the adapter's file, found "
                f"{sorted(a for a in keys if keys[a] in state)}; it belongs to another configuration, or was saved "
                "folded and can then only be loaded with its own adapter_config.json, for inference"
            )
        for attribute, shape in expected.items():
            value = state[keys[attribute]]
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"{layer.name}: expected {attribute} of shape {shape}, found {tuple(value.shape)} in the adapter's "
                    f"file; load it onto the base model it was trained on ({config.base_model_name_or_path})"
                )
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"{layer.name}: {attribute} in the adapter's file has NaN or infinite values; the file is damaged or "
                    "its training diverged, use an earlier checkpoint"
                )
        if spec.basis == "folded":
            continue
        if probe is not None and adapter_name in layer._missing_bases:
            if not isinstance(tuner, CloverModel):
                raise ValueError(
                    f"{layer.name}: the adapter was saved without its bases, which cannot be computed for a model on "
                    "the meta device; load without low_cpu_mem_usage"
                )
            layer.set_bases(adapter_name, tuner._decompose(layer, layer.specs[adapter_name]) or {})
        _, u, _, s0 = layer.tensors(adapter_name, spec)
        if s0.is_meta or not config.check_base:
            continue
        _check_fingerprint(layer, spec, config, s0, state[keys["clover_S0"]].to(s0))
        if probe is not None:
            _check_probe(layer, spec, u, probe.to(u))


def _check_fingerprint(layer: CloverLayer, spec: BlockSpec, config: CloverConfig, here: Tensor, there: Tensor) -> None:
    error = torch.linalg.vector_norm(here - there, dim=-1) / torch.linalg.vector_norm(there, dim=-1).clamp(min=1e-30)
    precisions = (precision_of(layer), config.base_precision or precision_of(layer))
    allowed = max(_ROUNDING.get(precision, 2e-2) for precision in precisions)
    if float(error.max()) > allowed:
        block = int(error.argmax())
        raise ValueError(
            f"{layer.name} ({spec.part}, block {block}): expected the singular values of the base model that the adapter "
            f"was trained on ({config.base_model_name_or_path}), found them to differ by {float(error.max()):.1%} where "
            f"rounding explains {allowed:.2%}; load it onto that model, or set check_base=False in its config"
        )


def _check_probe(layer: CloverLayer, spec: BlockSpec, coordinates: Tensor, there: Tensor) -> None:
    here = _probe(coordinates)
    scale = torch.linalg.vector_norm(coordinates, dim=-1).clamp(min=1e-30)
    if float(((here - there).abs() / scale).max()) > 1e-2:
        raise ValueError(
            f"{layer.name} ({spec.part}): the adapter was saved with save_bases=False, and the bases computed here are "
            "not those it was trained with (equal singular values, or a base in another precision); load it on the base "
            "it was trained on and save it with save_bases=True"
        )


def precision_of(layer: CloverLayer) -> str:
    """Name of the precision that the base weight is stored in."""
    weight = layer.weight
    if weight.is_floating_point() and layer.quantization_backend is None:
        return str(weight.dtype).removeprefix("torch.")
    return "4 bits" if "4" in layer.quantization_backend.backend_name else "8 bits"

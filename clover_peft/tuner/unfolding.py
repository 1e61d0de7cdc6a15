"""Training on from an adapter that was saved folded: S is solved for in bases of the base model's weights."""

from __future__ import annotations

from torch import Tensor
from torch.linalg import matrix_norm, pinv

from .block_spec import BlockSpec, BlockTensors

# The largest relative error of a map by rounding of S to float32; 2e-6 was measured with condition numbers of 10,000.
ROUNDING = 1e-5


def unfolded(name: str, spec: BlockSpec, whole: Tensor, frozen: BlockTensors) -> BlockTensors:
    """The tensors of a slice whose map is `whole` (ours): `dS = E^+ M C^+`, which is `S0 C M E S0` where `E S0 C = I`.

    Args:
        name: the layer, for messages.
        spec: the slice.
        whole: (H, d, d), M of every block.
        frozen: the slice's bases, in any dtype; its S is not used.

    Returns:
        The tensors, in the dtype and on the device of `whole`. Costs H d^3, in float64.

    Raises:
        ValueError: if M is not a map of these bases, so that a map in them would be another one.
    """
    tensors = BlockTensors._make(None if tensor is None else tensor.to(whole) for tensor in frozen)
    exact = BlockTensors._make(None if tensor is None else tensor.double() for tensor in tensors)
    assert exact.c is not None
    s = whole.double() @ pinv(exact.c)
    if exact.e is not None:
        s = pinv(exact.e) @ s
    if spec.s_matrix == "diagonal":
        s = s.diagonal(dim1=-2, dim2=-1)
    tensors = tensors._replace(s=s.to(whole))
    error = matrix_norm(spec.residual_map(exact._replace(s=tensors.s.double())) - whole)
    error = error / matrix_norm(whole.double()).clamp(min=1e-30)
    if not float(error.max()) <= ROUNDING:
        block = int(error.argmax())
        raise ValueError(
            f"{name} ({spec.part}, block {block}): expected a map that {spec.r} of {spec.size} directions with a "
            f"{spec.s_matrix} S{' that truncates' if spec.truncate else ''} can express in this base model's bases, "
            f"found one of which {float(error[block]):.1%} is outside; load the adapter with its own "
            "adapter_config.json, or for inference with is_trainable=False"
        )
    return tensors

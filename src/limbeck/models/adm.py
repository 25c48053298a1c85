"""The U-Net of guided diffusion (ADM, Dhariwal and Nichol 2021), from its authors' names of weights to those of diffusers.

Files of two codes have these names: guided-diffusion's, and consistency_models', where the EDMs of ImageNet at 64 pixels and of
LSUN at 256 are (Song et al. 2023). NVlabs' own files of EDM are pickles of code, and are not read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import count
from typing import Any, Literal

from torch import Tensor, nn

from limbeck.core.errors import UsageError
from limbeck.models.state import read_state

Order = Literal["qkv", "heads"]

_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_INSIDE = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
    "to_out.0": "proj_out",
}
_PARTS = ("to_q", "to_k", "to_v")  # of "qkv"


def load_adm(unet: nn.Module, path: str | os.PathLike[str], order: Order | None = None) -> None:
    """Fill a U-Net of diffusers with a file of guided-diffusion or consistency_models, such as `edm_imagenet64_ema.pt`.

    Args:
        unet: As for `from_adm`; not touched when the file does not fit.
        path: A `.pt` or `.safetensors` file; pickled code is not run.
        order: As for `from_adm`.

    Raises:
        UsageError: There is no such file, it holds no state dictionary, or not one of this U-Net.

    Example:
        >>> load_adm(nn.Identity(), "edm_imagenet64_ema.pt")
        Traceback (most recent call last):
        limbeck.core.errors.UsageError: there is no such weights file
          where: edm_imagenet64_ema.pt
          fix: correct the path
    """
    unet.load_state_dict(from_adm(read_state(path), unet, order))


def from_adm(state: Mapping[str, Tensor], unet: nn.Module, order: Order | None = None) -> dict[str, Tensor]:
    """The state dictionary of a U-Net of diffusers, from that of ADM's code; every tensor is used, and every one is found.

    The network is the same function: blocks that halve or double the resolution are residual ones (`resblock_updown`), the
    condition scales and shifts the norm (`use_scale_shift_norm`) or is added, and a convolution of one pixel is a linear layer.

    Args:
        state: Tensors by the names of ADM's code.
        unet: `UNet2DModel` with `downsample_type` and `upsample_type` of `resnet`, `attn_norm_num_groups` of 32 and
            `resnet_time_scale_shift` of `scale_shift` or `default`; `attention_head_dim` is `num_head_channels`, which no
            shape tells.
        order: How the rows of `qkv` lie: `qkv`, all queries before all keys; `heads`, the three of each head in turn, as in
            guided-diffusion without `use_new_attention_order`. None for consistency_models, which knows the first alone.

    Raises:
        UsageError: Names are missing or left over, a shape differs, or the order is not known.

    Example:
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(
        ...     layers_per_block=1, block_out_channels=(32,), resnet_time_scale_shift="scale_shift", attn_norm_num_groups=32,
        ...     down_block_types=("ResnetDownsampleBlock2D",), up_block_types=("ResnetUpsampleBlock2D",),
        ... )
        >>> from_adm({"time_embed.0.weight": unet.time_embedding.linear_1.weight}, unet)
        Traceback (most recent call last):
        limbeck.core.errors.UsageError: these weights are not of this U-Net
          found: input_blocks.0.0.bias, input_blocks.0.0.weight, input_blocks.1.0.emb_layers.1.bias and 66 more: missing
          expected: 70 tensors, as of this UNet2DModel
          fix: take its width, layers, attention and classes from the flags of the published run
    """
    names, tensors = adm_names(unet), unet.state_dict()
    lost, odd = sorted({*names.values()} - state.keys()), sorted(state.keys() - {*names.values()})
    if lost or odd:
        raise UsageError(
            "these weights are not of this U-Net",
            found="; ".join(_several(some, what) for some, what in ((lost, "missing"), (odd, "not known")) if some),
            expected=f"{len({*names.values()})} tensors, as of this {type(unet).__name__}",
            fix="take its width, layers, attention and classes from the flags of the published run",
        )
    order = order or _order(state)
    made = {}
    for name, wanted in tensors.items():
        attention, part = name.rsplit(".", 2)[:2]
        value = found = state[names[name]]
        if wanted.ndim == 2 < value.ndim:  # a convolution of one pixel as a linear layer
            found = value.flatten(1)
        expected = [wanted.shape[0] * (3 if part in _PARTS else 1), *wanted.shape[1:]]
        if list(found.shape) != expected:
            raise UsageError(
                "this tensor is of another U-Net", where=names[name], found=list(value.shape), expected=expected,
                fix=f"correct the configuration of the {type(unet).__name__}",
            )  # fmt: skip
        if part in _PARTS:
            heads = unet.get_submodule(attention).heads if order == "heads" else 1
            found = found.unflatten(0, (heads, 3, -1))[:, _PARTS.index(part)].flatten(0, 1)  # [3 C, ...] -> [C, ...]
        made[name] = found
    return made


def adm_names(unet: Any) -> dict[str, str]:
    """For each tensor of a U-Net of diffusers, the name that ADM's code gives to what holds it; `qkv` holds three.

    Args:
        unet: As for `from_adm`.

    Raises:
        UsageError: It has a layer that ADM has not.

    Example:
        >>> from diffusers import UNet2DModel
        >>> blocks = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
        >>> unet = UNet2DModel(block_out_channels=(32,), attn_norm_num_groups=32, layers_per_block=1, **blocks)
        >>> names = adm_names(unet)
        >>> names["down_blocks.0.attentions.0.to_q.bias"], names["up_blocks.0.resnets.1.conv1.weight"]
        ('input_blocks.1.1.qkv.bias', 'output_blocks.1.0.in_layers.2.weight')
    """
    blocks, names = _blocks(unet), {}
    for name in unet.state_dict():
        layer, _, leaf = name.rpartition(".")
        block = next((path for path in blocks if layer.startswith(f"{path}.")), "")
        inner = _INSIDE.get(layer.removeprefix(f"{block}."))
        found = _OUTSIDE.get(layer) if not block else inner and f"{blocks[block]}.{inner}"
        if found is None:
            raise UsageError(
                "this U-Net has a layer that ADM has not", where=name, found=type(unet).__name__,
                fix='UNet2DModel(downsample_type="resnet", upsample_type="resnet"), of Resnet and Attn blocks',
            )  # fmt: skip
        names[name] = f"{found}.{leaf}"
    return names


def _blocks(unet: Any) -> dict[str, str]:
    """The path of every residual and attention block, and its path in ADM's code, which counts through all resolutions."""
    found = {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    found["mid_block.resnets.1"] = "middle_block.2"
    places = count(1)  # the first convolution is at 0
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            k = next(places)
            found[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{k}.0"
            found[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{k}.1"
        if block.downsamplers:
            found[f"down_blocks.{i}.downsamplers.0"] = f"input_blocks.{next(places)}.0"
    places = count()
    for i, block in enumerate(unet.up_blocks):
        last = 1 + hasattr(block, "attentions")
        for j in range(len(block.resnets)):
            k = next(places)
            found[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{k}.0"
            found[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{k}.1"
        found[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{k}.{last}"
    return found


def _order(state: Mapping[str, Tensor]) -> Order:
    """That of consistency_models, whose `qkv` are convolutions in two dimensions; guided-diffusion's do not tell theirs."""
    name = next((name for name, value in state.items() if name.endswith("qkv.weight") and value.ndim == 3), None)
    if name is not None:
        raise UsageError(
            "the order of queries, keys and values is not known", where=name, found=list(state[name].shape),
            expected="four dimensions, as of consistency_models",
            fix='order="qkv" for guided-diffusion with use_new_attention_order, else order="heads"',
        )  # fmt: skip
    return "qkv"


def _several(names: list[str], what: str) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}: {what}"

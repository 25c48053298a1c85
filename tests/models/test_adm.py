"""Weights of guided-diffusion and consistency_models in a U-Net of diffusers: the same function, tensor by tensor."""

from pathlib import Path

import pytest
import torch
from adm_worlds import Adm
from safetensors.torch import save_file
from torch import nn

from limbeck.core.errors import UsageError
from limbeck.diffusion import EDM, EDMDenoiser
from limbeck.models.adm import adm_names, from_adm, load_adm
from limbeck.models.specs import import_object

RECIPES = Path(__file__).parents[2] / "recipes"
UNet2DModel = pytest.importorskip("diffusers").UNet2DModel


def unet_of(adm, **options):
    down = [
        "AttnDownBlock2D" if level in adm.attention else "ResnetDownsampleBlock2D"
        for level in range(len(adm.multiples))
    ]
    up = ["AttnUpBlock2D" if "Attn" in kind else "ResnetUpsampleBlock2D" for kind in reversed(down)]
    options = {"attn_norm_num_groups": 32} | options
    return UNet2DModel(
        in_channels=3, out_channels=3, layers_per_block=adm.layers, num_class_embeds=adm.classes or None,
        block_out_channels=tuple(adm.width * m for m in adm.multiples), attention_head_dim=adm.head,
        down_block_types=down, up_block_types=up, resnet_time_scale_shift="scale_shift" if adm.shift else "default",
        downsample_type="resnet", upsample_type="resnet", **options,
    ).eval()  # fmt: skip


def drawn(adm, size=8, batch=2):
    x, t = torch.randn(batch, 3, size, size, dtype=torch.float64), torch.tensor([-321.5, 1095.25])
    return x, t, torch.tensor([3, 1]) if adm.classes else None


KINDS = {
    "classes": Adm(classes=5),
    "no classes": Adm(),
    "added": Adm(classes=5, shift=False),
    "fine attention": Adm(attention=(0,), layers=2),
    "three levels": Adm(multiples=(1, 1, 2), attention=(1, 2), layers=2, head=16),
    "in turn": Adm(pixels=(1,), order="heads", classes=5),
    "one dimension": Adm(pixels=(1,)),
}


@pytest.mark.parametrize("adm", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_the_function_is_that_of_the_file(adm):
    state, (x, t, y) = adm.state(), drawn(adm)
    unet = unet_of(adm)
    unet.load_state_dict(from_adm(state, unet, None if len(adm.pixels) == 2 else adm.order))
    found = unet.double()(x, t, class_labels=y).sample
    expected = adm.forward({name: value.double() for name, value in state.items()}, x, t, y)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (adm.forward({n: v.double() for n, v in state.items()}, x, t + 1, y) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_the_order_of_queries_keys_and_values_matters():
    adm = KINDS["in turn"]
    state, unet, (x, t, y) = adm.state(), unet_of(adm), drawn(adm)
    found = []
    for order in ("qkv", "heads"):
        unet.load_state_dict(from_adm(state, unet, order))
        found.append(unet(x.float(), t, class_labels=y).sample)
    assert (found[0] - found[1]).abs().max() > 1e-2
    with pytest.raises(UsageError, match=r"order of queries, keys and values is not known\n.*qkv\.weight(?s:.)*heads"):
        from_adm(state, unet)


@pytest.mark.parametrize("denoiser", ["recipe", "keyword"])
@torch.no_grad()
def test_the_preconditioning_is_that_of_the_published_code(denoiser):
    adm = Adm(classes=5)
    state, unet, (x, _, y) = adm.state(), unet_of(adm), drawn(adm)
    unet.load_state_dict(from_adm(state, unet))
    labelled = import_object(f"{RECIPES / 'imagenet64.py'}:Labelled")
    if denoiser == "recipe":
        net = EDMDenoiser(labelled(unet), EDM())
    else:
        net = EDMDenoiser(unet, keyword="class_labels", time_scale=1000)
    x, sigma = x.float(), torch.tensor([0.002, 80.0])
    c_skip = 0.5**2 / (sigma**2 + 0.5**2)  # as KarrasDenoiser of consistency_models has it
    c_out = sigma * 0.5 / (sigma**2 + 0.5**2) ** 0.5
    c_in = 1 / (sigma**2 + 0.5**2) ** 0.5
    c_skip, c_out, c_in = (c.view(-1, 1, 1, 1) for c in (c_skip, c_out, c_in))
    raw = adm.forward(state, c_in * x, 1000 * 0.25 * torch.log(sigma + 1e-44), y)
    torch.testing.assert_close(net(x, sigma, y), c_out * raw + c_skip * x, rtol=1e-5, atol=1e-5)


IMAGENET = Adm(192, (1, 2, 3, 4), 3, attention=(1, 2, 3), classes=1000, head=64)
LSUN = Adm(256, (1, 1, 2, 2, 4, 4), 2, attention=(3, 4, 5), shift=False, head=64)


@pytest.mark.parametrize(
    ("adm", "recipe", "millions"),
    [(IMAGENET, "imagenet64", 295.90), (LSUN, "lsun256", 526.30)],
    ids=["imagenet64", "lsun256"],
)
def test_published_files_are_those_of_the_recipes_one_to_one(adm, recipe, millions):
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in adm.shapes().items()}
        unet = import_object(f"{RECIPES / recipe}.py:teacher")().net
    unet = getattr(unet, "unet", unet)
    names, made = adm_names(unet), from_adm(state, unet)
    assert set(names.values()) == state.keys()
    assert made.keys() == unet.state_dict().keys() == dict(unet.named_parameters()).keys()
    assert all(made[name].shape == tensor.shape for name, tensor in unet.named_parameters())
    numbers = sum(tensor.numel() for tensor in state.values())
    assert numbers == sum(p.numel() for p in unet.parameters()) == pytest.approx(millions * 1e6, rel=1e-4)
    heads = [part.heads for part in unet.modules() if hasattr(part, "heads")]
    assert [part.to_q.out_features // 64 for part in unet.modules() if hasattr(part, "heads")] == heads


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_fill_a_unet(suffix, tmp_path):
    adm = Adm(classes=5)
    state, unet = adm.state(), unet_of(adm)
    path = tmp_path / f"edm.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    load_adm(unet, path)
    assert unet.conv_out.weight.equal(state["out.2.weight"])
    assert unet.mid_block.attentions[0].to_k.bias.equal(state["middle_block.1.qkv.bias"][64:128])
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "half.pt")
    load_adm(unet, tmp_path / "half.pt")
    assert unet.conv_out.weight.equal(state["out.2.weight"].half().float())


def test_weights_that_do_not_fit_are_told_and_touch_nothing(tmp_path):
    adm = Adm(classes=5)
    unet, path = unet_of(adm), tmp_path / "edm.pt"
    before = {name: value.clone() for name, value in unet.state_dict().items()}

    def error(state, match, **options):
        torch.save(state, path)
        with pytest.raises(UsageError, match=match):
            load_adm(unet, path, **options)
        assert all(value.equal(before[name]) for name, value in unet.state_dict().items())

    state = adm.state()
    error(Adm(classes=7).state(), r"another U-Net\n.*label_emb\.weight\n.*found: \[7, 128\]\n.*expected: \[5, 128\]")
    error(
        state | {"middle_block.1.qkv.weight": torch.ones(64, 64, 1, 1)},
        r"qkv\.weight\n.*\[64, 64, 1, 1\]\n.*\[192, 64\]",
    )
    error(state | {"middle_block.1.proj_out.weight": torch.ones(64, 64, 3, 3)}, r"proj_out.*\n.*\[64, 64, 3, 3\]")
    error(
        state | {"input_blocks.9.0.op.weight": torch.ones(1)},
        r"not of this U-Net\n.*blocks\.9\.0\.op\.weight: not known",
    )
    error({n: v for n, v in state.items() if "label" not in n}, r"label_emb\.weight: missing")
    error(Adm(classes=5, layers=2).state(), r"missing; .* and \d+ more: not known")
    error(Adm(classes=5, attention=(0, 1)).state(), r"input_blocks\.1\.1\.norm\.bias.*: not known")
    error([1, 2], r"(?s)cannot be loaded.*edm\.pt.*found: list")
    error({"step": 3}, r"(?s)cannot be loaded.*no tensors under step")
    error(nn.Linear(2, 2), r"(?s)cannot be loaded.*edm\.pt.*without pickled code")
    path.write_bytes(b"not a file of torch")
    with pytest.raises(UsageError, match=r"(?s)cannot be loaded.*edm\.pt"):
        load_adm(unet, path)
    with pytest.raises(UsageError, match="no such weights file"):
        load_adm(unet, tmp_path / "none.pt")


def test_unets_that_are_not_adm_are_told():
    adm = Adm()  # without the option the attention in the middle has no norm
    with pytest.raises(UsageError, match=r"middle_block\.1\.norm\.bias, middle_block\.1\.norm\.weight: not known"):
        from_adm(adm.state(), unet_of(adm, attn_norm_num_groups=None))
    plain = UNet2DModel(
        block_out_channels=(32, 64), down_block_types=("DownBlock2D", "AttnDownBlock2D"), layers_per_block=1,
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attn_norm_num_groups=32,
    )  # fmt: skip
    with pytest.raises(
        UsageError, match=r"(?s)a layer that ADM has not.*down_blocks\.0\.downsamplers\.0\.conv.*resnet"
    ):
        adm_names(plain)

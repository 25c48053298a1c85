"""Cutting models: which units belong together, for the classes of transformers and timm, without an edit to them."""

from functools import cache

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from limbeck.convert.record import load_student, save_student
from limbeck.convert.slicing import Slice, cut
from limbeck.convert.structure import structure
from limbeck.core.adapt import call, main_output
from limbeck.core.errors import UsageError

TOKENS = torch.arange(14).view(2, 7) % 11 + 3
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32).sin()
SMALL = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}


class Block(nn.Module):
    """A residual block of two linear layers with a norm between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.fc2(self.bn(self.fc1(x)).relu())


def tower():
    return nn.Sequential(nn.Linear(6, 8), nn.Sequential(*(Block(8, 12) for _ in range(3))), nn.Linear(8, 4))


def timm_model(name, **options):
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=5, **options)


def hf(name, config, **options):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, name)(getattr(transformers, config)(**options))


def clip():
    transformers = pytest.importorskip("transformers")
    shared = {"projection_dim": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
    text = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 40, "max_position_embeddings": 12}
    vision = {"hidden_size": 48, "intermediate_size": 64, "image_size": 32, "patch_size": 16}
    marks = {"eos_token_id": 59, "bos_token_id": 58, "pad_token_id": 0}
    config = transformers.CLIPConfig(
        text_config={**shared, **text, **marks}, vision_config={**shared, **vision}, projection_dim=32
    )
    return transformers.CLIPModel(config)


WORDS = {"vocab_size": 60}
PIXELS = {"image_size": 32, "patch_size": 16}
MODELS = {
    "tower": (tower, torch.randn(4, 6, generator=torch.Generator().manual_seed(0))),
    "clip": (clip, {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "pixel_values": IMAGES}),
    "bert": (lambda: hf("BertForSequenceClassification", "BertConfig", **SMALL, **WORDS), {"input_ids": TOKENS}),
    "distilbert": (
        lambda: hf(
            "DistilBertForSequenceClassification", "DistilBertConfig", dim=32, n_layers=3, n_heads=4, hidden_dim=40
        ),
        {"input_ids": TOKENS},
    ),
    "gpt2": (
        lambda: hf("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2),
        {"input_ids": TOKENS},
    ),
    "llama": (
        lambda: hf("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2, **SMALL, **WORDS),
        {"input_ids": TOKENS},
    ),
    "vit": (lambda: hf("ViTForImageClassification", "ViTConfig", **SMALL, **PIXELS), {"pixel_values": IMAGES}),
    "dinov2": (
        lambda: hf("Dinov2ForImageClassification", "Dinov2Config", mlp_ratio=2, **{**SMALL, **PIXELS}),
        {"pixel_values": IMAGES},
    ),
    "timm vit": (lambda: timm_model("vit_tiny_patch16_224", depth=3, img_size=32), IMAGES),
    "mobilenetv3": (lambda: timm_model("mobilenetv3_small_050"), IMAGES),
    "resnet50": (lambda: timm_model("resnet26", layers=(2, 2, 1, 1)), IMAGES),
    "resnet18": (lambda: timm_model("resnet18", layers=(2, 1, 1, 1)), IMAGES),
}
every = pytest.mark.parametrize("name", MODELS)


@cache
def model(name):
    torch.manual_seed(0)
    module = MODELS[name][0]().eval()
    for part in module.modules():  # no norm is the identity, no bias is zero
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    for p in module.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.05)
    return module


def answer(module, name):
    with torch.no_grad():
        output = call(module, MODELS[name][1])
    return getattr(output, "logits_per_image", None) if hasattr(output, "logits_per_image") else main_output(output)


def some(parts, seed, share=(1, 2, 3), leading=False):
    """A random part of every dimension and list of layers."""
    rng = torch.Generator().manual_seed(seed)
    keep = {}
    for name, dim in parts.dims.items():
        if dim.central:
            keep[name] = dim.size - 2 * int(torch.randint(dim.size // 2 + 1, (), generator=rng))
            continue
        size = max(1, dim.size * share[int(torch.randint(len(share), (), generator=rng))] // 4)
        keep[name] = size if leading else torch.randperm(dim.size, generator=rng)[:size].sort().values.tolist()
    for name, depth in parts.depths.items():
        chosen = torch.rand(depth.size, generator=rng) < 0.6
        keep[name] = [i for i in range(depth.size) if i in depth.fixed or chosen[i]] or [0]
    return keep


@every
def test_what_is_whole_stays_bit_for_bit(name):
    whole = model(name)
    same, _ = Slice(structure(whole).sizes())(whole)
    assert answer(same, name).equal(answer(whole, name))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(same.parameters(), whole.parameters(), strict=True))


@every
def test_another_order_of_units_is_the_same_function(name):
    # So every tensor that runs over a dimension is known, and none that does not.
    whole = model(name)
    rng = torch.Generator().manual_seed(1)
    for dim in (d for d in structure(whole).dims.values() if not d.central):
        shuffled, _ = Slice({dim.name: torch.randperm(dim.size, generator=rng).tolist()})(whole)
        torch.testing.assert_close(answer(shuffled, name), answer(whole, name), rtol=1e-4, atol=2e-5)


@every
def test_units_that_nobody_reads_can_go(name):
    whole = model(name)
    parts = structure(whole)
    keep = {n: units for n, units in some(parts, 2).items() if n in parts.dims and not n.endswith(("width", "kernel"))}
    deaf, _ = Slice({})(whole)
    tensors = dict(deaf.named_parameters())
    for n, units in keep.items():
        gone = [i for i in range(parts.dims[n].size) if i not in units]
        for axis in parts.dims[n].axes:
            if axis.side == "consume" and gone:
                at = axis.index(gone, parts.dims[n].size)
                at = torch.arange(at.start, at.stop) if isinstance(at, slice) else at
                tensors[axis.tensor].data.index_fill_(axis.dim, at, 0.0)
    small, _ = Slice(keep)(whole)
    torch.testing.assert_close(answer(small, name), answer(deaf, name), rtol=1e-4, atol=2e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in whole.parameters())
    assert not torch.allclose(answer(small, name), answer(whole, name), atol=1e-5)


@every
def test_a_cut_runs_on_the_big_weights(name):
    whole = model(name)
    parts = structure(whole)
    tensors = dict(whole.named_parameters(remove_duplicate=False)) | dict(whole.named_buffers())
    x = MODELS[name][1]
    for seed in range(8):
        keep = some(parts, seed, leading=seed % 2 == 0)
        small, _ = Slice(keep)(whole)
        skeleton, pieces = cut(whole, keep, parts)
        assert all(p.device.type == "meta" for p in skeleton.parameters())
        views = {n: piece.of(tensors[piece.name]) for n, piece in pieces.items()}
        given = ((), x) if isinstance(x, dict) else ((x,), None)
        with torch.no_grad():
            output = functional_call(skeleton, views, *given)
        output = output.logits_per_image if hasattr(output, "logits_per_image") else main_output(output)
        assert output.equal(answer(small, name))


def test_leading_units_are_views_and_what_is_outside_gets_no_gradient():
    whole = tower()
    skeleton, pieces = cut(whole, {"1.0.ffn": 5, "1": 2})
    tensors = dict(whole.named_parameters()) | dict(whole.named_buffers())
    views = {n: piece.of(tensors[piece.name]) for n, piece in pieces.items()}
    functional_call(skeleton.train(), views, torch.randn(8, 6)).square().sum().backward()
    first = whole[1][0]
    assert first.fc1.weight.grad[5:].eq(0).all()
    assert first.fc1.weight.grad[:5].ne(0).any()
    assert whole[1][2].fc1.weight.grad is None
    assert first.bn.running_mean[:5].ne(0).all()  # statistics of what ran are written where they belong
    assert first.bn.running_mean[5:].eq(0).all()


@every
def test_the_record_builds_the_student_again(name, tmp_path):
    small, record = Slice(some(structure(model(name)), 3))(model(name))
    save_student(tmp_path, small, [record])
    torch.manual_seed(5)
    loaded = load_student(tmp_path, MODELS[name][0]())
    assert answer(loaded, name).equal(answer(small.eval(), name))


def test_several_cuts_in_a_row_build_again(tmp_path):
    one, first = Slice({"1": [0, 2]})(model("tower"))
    two, second = Slice({"1.1.ffn": [3, 4, 7]})(one)
    save_student(tmp_path, two, [first, second])
    assert answer(load_student(tmp_path, tower()), "tower").equal(answer(two.eval(), "tower"))


def test_groups_of_heads_that_share_keys_are_cut_together():
    llama = model("llama")
    assert structure(llama).dims["model.layers.0.self_attn.heads"].size == 2
    small, _ = Slice({"model.layers.0.self_attn.heads": [1]})(llama)
    attention = small.model.layers[0].self_attn
    assert attention.q_proj.weight.equal(llama.model.layers[0].self_attn.q_proj.weight[16:])
    assert attention.k_proj.weight.equal(llama.model.layers[0].self_attn.k_proj.weight[8:])


def test_shared_tensors_stay_shared():
    small, _ = Slice({"width": [0, 3, 5]})(model("gpt2"))
    assert small.lm_head.weight is small.transformer.wte.weight
    assert small.lm_head.weight.shape[1] == 3


def test_the_two_encoders_of_a_dual_model_have_their_own_width():
    sizes = structure(model("clip")).sizes()
    assert (sizes["text_model.width"], sizes["vision_model.width"]) == (32, 48)
    small, _ = Slice({"text_model.width": 16})(model("clip"))
    assert small.text_projection.weight.shape == (32, 16)  # what both are compared in stays


def test_a_layer_that_changes_shapes_stays():
    parts = structure(model("mobilenetv3"))
    assert parts.depths["blocks.1"].fixed == (0,)
    with pytest.raises(UsageError, match="changes the shape"):
        Slice({"blocks.1": [1]})(model("mobilenetv3"))


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ({"1.0.fnn": 3}, "no such dimension.*1.0.ffn"),
        ({"1.0.ffn": 13}, "cannot be kept"),
        ({"1.0.ffn": 0}, "cannot be kept"),
        ({"1.0.ffn": [2, 2]}, "cannot be kept"),
        ({"1": []}, "cannot be kept"),
    ],
)
def test_what_is_not_there_cannot_be_kept(keep, words):
    with pytest.raises(UsageError, match=f"(?s){words}"):
        Slice(keep)(tower())


def test_a_parametrized_model_is_finalised_first():
    net = tower()
    parametrize.register_parametrization(net[0], "weight", nn.Identity())
    with pytest.raises(UsageError, match="finalise it first"):
        Slice({"1": 2})(net)

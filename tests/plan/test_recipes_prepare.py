"""What recipes prepare: `main()` reads a whole published pipeline, small here, and a step is taken on what it wrote."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck.api import build, run
from limbeck.core.recipe import Recipe

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
RECIPES = Path(__file__).parents[2] / "recipes"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPTS = ["a cat", "two dogs on a hill", "the sea"]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def clip_tokenizer(pad: str = "<|endoftext|>") -> Any:
    words = ["<|startoftext|>", "<|endoftext|>", "!", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    return transformers.CLIPTokenizer({w: i for i, w in enumerate(words)}, [], pad_token=pad, model_max_length=77)


def t5_tokenizer() -> Any:
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return transformers.T5Tokenizer(words, extra_ids=0, model_max_length=256)


def clip(kind: Any = None, width: int = 16, layers: int = 2) -> Any:
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "projection_dim": width, "vocab_size": 55}
    return (kind or transformers.CLIPTextModel)(transformers.CLIPTextConfig(**sizes, **ends))


def t5(kind: str = "T5", width: int = 32) -> Any:
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    return getattr(transformers, f"{kind}EncoderModel")(getattr(transformers, f"{kind}Config")(**sizes))


def vae(blocks: int = 4, **more: Any) -> Any:
    types = {"down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks}
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * blocks, norm_num_groups=2, latent_channels=4, **types, **more
    )


def unet(**more: Any) -> Any:
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    return diffusers.UNet2DConditionModel(sample_size=64, **blocks, **sizes, **more)


def stable_diffusion() -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(), unet=unet(cross_attention_dim=16), text_encoder=clip(), tokenizer=clip_tokenizer("!"),
        scheduler=diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl() -> Any:
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 36,
    }
    two = clip(transformers.CLIPTextModelWithProjection, 12)
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(), unet=unet(cross_attention_dim=20, use_linear_projection=True, **added), text_encoder=clip(width=8),
        text_encoder_2=two, tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer("!"),
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS),
    )  # fmt: skip


def stable_diffusion_3() -> Any:
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16}
    inputs = {"joint_attention_dim": 32, "pooled_projection_dim": 16, "pos_embed_max_size": 32, "sample_size": 64}
    texts = {f"text_encoder{end}": clip(transformers.CLIPTextModelWithProjection, 8) for end in ("", "_2")}
    return diffusers.StableDiffusion3Pipeline(
        vae=vae(shift_factor=0.06, scaling_factor=1.5), **texts, text_encoder_3=t5(), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer("!"), tokenizer_3=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=diffusers.SD3Transformer2DModel(**sizes, **inputs, in_channels=4, out_channels=4),
    )  # fmt: skip


def pixart() -> Any:
    sizes = {"sample_size": 64, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    return diffusers.PixArtAlphaPipeline(
        vae=vae(), text_encoder=t5(), tokenizer=t5_tokenizer(),
        transformer=diffusers.PixArtTransformer2DModel(**sizes, cross_attention_dim=16, caption_channels=32),
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    )  # fmt: skip


def wan() -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 1, "text_dim": 32}
    scheduler = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    small = {"dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return diffusers.WanPipeline(
        vae=diffusers.AutoencoderKLWan(base_dim=3, z_dim=4, **small), text_encoder=t5("UMT5"), tokenizer=t5_tokenizer(),
        transformer=diffusers.WanTransformer3DModel(**sizes, in_channels=4, out_channels=4, freq_dim=16, rope_max_seq_len=32),
        scheduler=diffusers.UniPCMultistepScheduler(**scheduler),
    )  # fmt: skip


def video_diffusion() -> Any:
    blocks = {
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    }
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    return diffusers.TextToVideoSDPipeline(
        vae=vae(), unet=diffusers.UNet3DConditionModel(sample_size=4, cross_attention_dim=16, **sizes, **blocks),
        text_encoder=clip(), tokenizer=clip_tokenizer("!"), scheduler=diffusers.DDIMScheduler(**BETAS),
    )  # fmt: skip


def taken(name: str, folder: Path, teacher: str, data: str, **more: Any) -> Any:
    """A step of a recipe on what was prepared, the teacher's structure filled from the file."""
    here = {
        "code": f"{folder / 'small.py'}:teacher@{folder / 'weights' / teacher}",
        "data": f"{folder / 'small.py'}:{data}",
    }
    given = {
        "teacher": here["code"],
        "data": here["data"],
        "engine.steps": 2,  # the first update may be of what follows alone
        "engine.batch_size": 2,
        "engine.micro_batches": 1,
    }
    given |= {"engine.device": "cpu", "engine.precision": "fp32", "out": str(folder / "run")} | more
    job = build(Recipe.load(RECIPES / f"{name}.yaml", [f"{key}={json.dumps(value)}" for key, value in given.items()]))
    before = [p.clone() for p in job.roles.student.parameters()]
    result = run(job, progress="off")
    after = list(result.roles.student.parameters())
    assert len(before) != len(after) or any(not a.equal(b) for a, b in zip(before, after, strict=True))
    return job


def prepared(
    recipe: str, made: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str, **given: Any
) -> ModuleType:
    """`main()` of a recipe, with this pipeline in the place of the published one."""
    torch.manual_seed(0)
    made.save_pretrained(folder / "published")
    monkeypatch.syspath_prepend(RECIPES)
    module = importlib.import_module(recipe)
    names = {False: str(folder / "published"), True: str(folder / "published")}
    monkeypatch.setattr(module, *(("NAMES", names) if hasattr(module, "NAMES") else ("NAME", names[True])))
    monkeypatch.setattr(module, "HERE", folder / "weights")
    for name, value in given.items():
        monkeypatch.setattr(module, name, value)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    monkeypatch.setattr(sys, "argv", ["", *(str(folder / word) if "." in word else word for word in words)])
    module.main()
    return module


# The structure of a teacher, with random weights, from the settings of the published parts.
SMALL = """
from pathlib import Path
import torch
import diffusers, transformers
import {recipe} as r
from {recipe} import *
PLACE = Path({place!r})
def part(kind, name):
    torch.manual_seed(1)
    kind = getattr(diffusers if hasattr(diffusers, kind) else transformers, kind)
    if hasattr(kind, "load_config"):
        return kind.from_config(kind.load_config(PLACE / name))
    return kind(kind.config_class.from_pretrained(PLACE / name))
def teacher():
    return {build}
"""


def small(recipe: str, folder: Path, build: str) -> None:
    (folder / "small.py").write_text(SMALL.format(recipe=recipe, place=str(folder / "published"), build=build))


@pytest.mark.parametrize("old", [False, True])
def test_stable_diffusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    pipeline = stable_diffusion()
    words = [*(["--v1-5"] if old else []), "prompts.txt"]
    prepared("stable_diffusion", pipeline, tmp_path, monkeypatch, *words)
    build = 'r.denoiser(part("UNet2DConditionModel", "unet"), part("CLIPTextModel", "text_encoder"), torch.zeros(77).long())'
    small("stable_diffusion", tmp_path, build)
    file, data = ("sd15.safetensors", "prompts_1_5") if old else ("sd21-base.safetensors", "prompts")
    name = "swiftbrush-sd15" if old else "swiftbrush-sd21"
    job = taken(name, tmp_path, file, data, **{"method.fake_rank": 2})
    net, batch = job.roles.teacher.module, job.data.train.batch(torch.arange(3), 0)
    options = {"padding": "max_length", "max_length": 77, "return_tensors": "pt"}
    tokens = pipeline.tokenizer(PROMPTS, **options).input_ids
    assert batch.y.equal(tokens)
    assert net.null.equal(pipeline.tokenizer("", **options).input_ids[0])
    states = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    torch.testing.assert_close(net.net.states(batch.y), states)


def test_stable_diffusion_xl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = stable_diffusion_xl()
    prepared("stable_diffusion_xl", pipeline, tmp_path, monkeypatch, "prompts.txt", SIZE=64)
    texts = 'part("CLIPTextModel", "text_encoder"), part("CLIPTextModelWithProjection", "text_encoder_2")'
    small(
        "stable_diffusion_xl", tmp_path, f'r.denoiser(Prompted(part("UNet2DConditionModel", "unet"), {texts}, 64), 77)'
    )
    job = taken("swiftbrush-sdxl", tmp_path, "sdxl-base.safetensors", "prompts", **{"method.fake_rank": 2})
    states, pooled = job.roles.teacher.module.net.encoded(job.data.train.batch(torch.arange(3), 0).y)
    expected, _, whole, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    torch.testing.assert_close(states, expected)
    torch.testing.assert_close(pooled, whole)


def test_stable_diffusion_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    from PIL import Image

    rows, g = [], torch.Generator().manual_seed(0)
    for caption in PROMPTS:
        file = BytesIO()
        Image.fromarray(torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=g).numpy()).save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue()}, "caption": caption})
    pandas.DataFrame(rows).to_parquet(tmp_path / "images.parquet")
    pipeline = stable_diffusion_3()
    prepared("stable_diffusion_3", pipeline, tmp_path, monkeypatch, "images.parquet")
    build = 'r.denoiser(Prompted(part("SD3Transformer2DModel", "transformer"), 16), torch.zeros(334, 32))'
    small("stable_diffusion_3", tmp_path, build)
    job = taken("mdt-dist-sd3", tmp_path, "sd3-medium.safetensors", "images")
    batch = job.data.train.batch(torch.arange(3), 0)
    again = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "published", torch_dtype=torch.bfloat16)
    found = [again.encode_prompt(prompt, None, None, do_classifier_free_guidance=False) for prompt in PROMPTS]
    tokens, pooled = (torch.cat([one[k] for one in found]).float() for k in (0, 2))
    torch.testing.assert_close(batch.y[:, 1:], tokens, rtol=0.05, atol=0.05)  # prepared in bf16
    torch.testing.assert_close(batch.y[:, 0, :16], pooled, rtol=0.05, atol=0.05)
    pixels = pipeline.image_processor.preprocess(Image.open(BytesIO(rows[0]["image"]["bytes"])).resize((512, 512)))
    with torch.no_grad():
        expected = (pipeline.vae.encode(pixels).latent_dist.mean - 0.06) * 1.5
    torch.testing.assert_close(batch.x[:1], expected, rtol=0.05, atol=0.05)


def test_pixart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = pixart()
    prepared("pixart", pipeline, tmp_path, monkeypatch, "prompts.txt")
    small("pixart", tmp_path, 'r.denoiser(part("PixArtTransformer2DModel", "transformer"), torch.zeros(120, 33))')
    job = taken("snoopi-pixart", tmp_path, "pixart-512.safetensors", "prompts")
    told = job.data.train.batch(torch.arange(3), 0).y.float()
    again = diffusers.PixArtAlphaPipeline.from_pretrained(tmp_path / "published", torch_dtype=torch.bfloat16)
    found = [again.encode_prompt(prompt, do_classifier_free_guidance=False)[:2] for prompt in PROMPTS]
    states, known = (torch.cat([one[k] for one in found]).float() for k in (0, 1))
    torch.testing.assert_close(told[..., :-1], states, rtol=0.05, atol=0.05)
    assert told[..., -1].equal(known.float())


def test_wan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ftfy")
    pytest.importorskip("peft")
    pipeline = wan()
    monkeypatch.syspath_prepend(RECIPES)
    sizes = {"FRAMES": 2, "HEIGHT": 4, "BREADTH": 4}
    module = importlib.import_module("wan")
    shape = module.Noise
    monkeypatch.setattr(module, "Noise", lambda _, **more: shape((4, 2, 4, 4), **more))
    prepared("wan", pipeline, tmp_path, monkeypatch, "prompts.txt", **sizes)
    small("wan", tmp_path, 'r.denoiser(part("WanTransformer3DModel", "transformer"), torch.zeros(512, 32))')
    job = taken("phased-dmd-wan", tmp_path, "wan21-1.3b.safetensors", "prompts", **{"method.rank": 2})
    told = job.data.train.batch(torch.arange(3), 0).y.float()
    again = diffusers.WanPipeline.from_pretrained(tmp_path / "published", torch_dtype=torch.bfloat16)
    told_as = {"do_classifier_free_guidance": False, "max_sequence_length": 512}  # as the pipeline's call has it
    states = torch.cat([again.encode_prompt(prompt, **told_as)[0] for prompt in PROMPTS]).float()
    torch.testing.assert_close(told, states, rtol=0.05, atol=0.05)


def test_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    pipeline = video_diffusion()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    dino = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda name: dino)
    monkeypatch.syspath_prepend(RECIPES)
    module = importlib.import_module("video_diffusion")
    net = 'part("UNet3DConditionModel", "unet"), Table.scaled_linear(), "epsilon"'
    told = 'time_scale=999, null=torch.zeros(77, 16), keyword="encoder_hidden_states"'
    seen = 'Seen(part("AutoencoderKL", "vae"), Dinov2Model(Dinov2Config(**' + repr(sizes) + ")), 28, (1, 2))"
    build = f"whole(Denoiser({net}, {told}))\ndef whole(m):\n    m.features = {seen}\n    return m"
    build += f"\ndef unet():\n    return Denoiser({net}, {told})"
    small("video_diffusion", tmp_path, build)
    torch.manual_seed(0)
    pipeline.save_pretrained(tmp_path / "published")
    teacher = importlib.util.spec_from_file_location("small_clips", tmp_path / "small.py")
    code = importlib.util.module_from_spec(teacher)
    teacher.loader.exec_module(code)
    prepared("video_diffusion", pipeline, tmp_path, monkeypatch, teacher=code.teacher)
    clips = torch.rand(3, 3, 2, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found: dict[str, Tensor] = module.encoded(pipeline, clips, PROMPTS)
    save_file(found, tmp_path / "weights" / "clips.safetensors")
    save_file({"latents": found["latents"][:, :, 0].contiguous()}, tmp_path / "weights" / "images.safetensors")
    student = f"{tmp_path / 'small.py'}:unet@{tmp_path / 'weights' / 'modelscope.safetensors'}"
    more = {"student": student, "method.lora": 2}
    job = taken("mcm-modelscope", tmp_path, "modelscope-teacher.safetensors", "clips", **more)
    batch = job.data.train.batch(torch.arange(3), 0)
    torch.testing.assert_close(batch.y, pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0])
    with torch.no_grad():
        one = pipeline.vae.encode(clips[1, :, 1][None]).latent_dist.mean * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(batch.x[1, :, 1], one[0])

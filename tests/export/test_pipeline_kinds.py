"""Every kind of pipeline that a few-step recipe ends in: loaded by `from_pretrained`, it samples what the student samples."""

import pytest
import torch

from limbeck.core.errors import UsageError
from limbeck.diffusion import Denoiser, EDMDenoiser, Experts, RectifiedFlow, Sampler, Table, few_step
from limbeck.diffusion.consistency import sampling_times
from limbeck.diffusion.schedule import shifted

diffusers = pytest.importorskip("diffusers")

GRID = 1 - torch.arange(4) / 4
SD = ("tokenizer", "text_encoder", "image_encoder", "safety_checker", "feature_extractor")


def called(kind, path, absent=(), **call):
    loaded = kind.from_pretrained(path, **dict.fromkeys(absent))
    loaded.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    return loaded, loaded(**call)


def sampled(student, z, condition=None):
    torch.manual_seed(1)
    with torch.no_grad():
        return student(z, condition=condition)


def same(found, expected):
    size = expected.abs().max()
    assert torch.isfinite(size)
    torch.testing.assert_close(found / size, expected / size, rtol=0, atol=1e-4)


def pieces(prediction):
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, cross_attention_dim=16, attention_head_dim=4, block_out_channels=(8,), layers_per_block=1,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4), unet=unet,
        scheduler=diffusers.PNDMScheduler(**betas, prediction_type=prediction, skip_prk_steps=True),
        requires_safety_checker=False, **{name: None for name in SD if name != "image_encoder"},
    )  # fmt: skip
    student = Denoiser(unet, Table.scaled_linear(), prediction, time_scale=999, keyword="encoder_hidden_states")
    return pipeline, student.eval()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("share", "noise"),
    [(GRID[:1], "fresh"), (GRID, "fresh"), (0.625 * GRID, "fresh"), (0.625 * GRID[:1], "fresh"), (GRID, "ddim")],
)
def test_a_pipeline_of_latents(tmp_path, prediction, share, noise):
    from limbeck.export.pipeline import to_pipeline

    pipeline, student = pieces(prediction)
    table = student.schedule
    sampler = Sampler(student, table.step_at(share).tolist(), noise)
    to_pipeline(sampler, pipeline, tmp_path / "fast")
    z, prompts = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    size, card = 1.0, (tmp_path / "fast" / "README.md").read_text()
    if share[0] < 1:  # the card says how large the noise is there
        size = float(card.partition("latents=")[2].partition(" *")[0])
        assert size == pytest.approx(float(table.sigma(sampler.times[:1])), abs=1e-6)
        assert "noise = torch.randn(1, 4, 8, 8)" in card
    assert ("latents" in card) == (share[0] < 1)
    call = {"num_inference_steps": len(share), "guidance_scale": 1.0, "output_type": "latent"}
    loaded, found = called(
        diffusers.StableDiffusionPipeline, tmp_path / "fast", SD, prompt_embeds=prompts, latents=size * z, **call
    )
    assert loaded.scheduler.timesteps.tolist() == [int(t) for t in (999 * sampler.times).round()]
    assert not loaded.config.requires_safety_checker
    same(found.images, sampled(sampler, z, prompts))


def wan():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 1, "text_dim": 8}
    return diffusers.WanTransformer3DModel(
        **sizes, in_channels=4, out_channels=4, freq_dim=16, rope_max_seq_len=32
    ).eval()


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("experts", [1, 2])
def test_a_pipeline_of_videos_by_experts(tmp_path, shift, experts):
    from limbeck.export.pipeline import to_pipeline

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                                     latents_mean=[0.0] * 4, latents_std=[1.0] * 4)  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipeline = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=scheduler,
        transformer=wan(),
        transformer_2=wan(),
        boundary_ratio=0.9,
    )
    options = {"time_scale": 1000, "keyword": "encoder_hidden_states"}
    sides = [Denoiser(wan(), RectifiedFlow(), "flow_prediction", **options) for _ in range(experts)]
    times = shifted(GRID, shift).tolist()
    student = sides[0] if experts == 1 else Experts(sides, bounds=((times[1] + times[2]) / 2,))
    sampler = Sampler(student, times, "ddim")
    to_pipeline(sampler, pipeline, tmp_path)
    z, prompts = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 5, 8)
    loaded, found = called(
        diffusers.WanPipeline, tmp_path, ("tokenizer", "text_encoder"), prompt_embeds=prompts, latents=z, height=32, width=32,
        num_frames=5, num_inference_steps=4, guidance_scale=1.0, output_type="latent",
    )  # fmt: skip
    assert (loaded.transformer_2 is None) == (experts == 1)
    same(found.frames, sampled(sampler, z, prompts))


def test_a_pipeline_of_clips(tmp_path):
    from limbeck.export.pipeline import to_pipeline

    torch.manual_seed(0)
    unet = diffusers.UNet3DConditionModel(
        sample_size=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    ).eval()  # fmt: skip
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipeline = diffusers.TextToVideoSDPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4), unet=unet, tokenizer=None,
        text_encoder=None, scheduler=diffusers.DDIMScheduler(**betas),
    )  # fmt: skip
    table = Table.scaled_linear()
    student = Denoiser(unet, table, "epsilon", time_scale=999, keyword="encoder_hidden_states")
    sampler = Sampler(student, sampling_times(table, 4).tolist())
    to_pipeline(sampler, pipeline, tmp_path)
    z, prompts = torch.randn(1, 4, 3, 4, 4), torch.randn(1, 5, 16)
    loaded, found = called(
        diffusers.TextToVideoSDPipeline, tmp_path, ("tokenizer", "text_encoder"), prompt_embeds=prompts, latents=z, height=8,
        width=8, num_frames=3, num_inference_steps=4, guidance_scale=1.0, output_type="latent",
    )  # fmt: skip
    assert loaded.scheduler.timesteps.tolist() == [999, 759, 499, 259]
    assert loaded.scheduler.config.original_inference_steps == 50
    torch.manual_seed(1)
    drawn = [torch.randn(3, 4, 4, 4) for _ in range(3)]  # the pipeline draws frame by frame
    with torch.no_grad():
        expected = few_step(
            student, z, table, sampler.times, prompts, fresh=lambda i: drawn[i - 1].permute(1, 0, 2, 3)[None]
        )
    same(found.frames, expected)


@pytest.mark.parametrize("classes", [None, 4])
@pytest.mark.parametrize("sigma", [2.5, 80.0])
def test_a_pipeline_of_one_step_from_an_edm(tmp_path, classes, sigma):
    from limbeck.export.pipeline import to_pipeline

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        num_class_embeds=classes, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    ).eval()  # fmt: skip
    student = EDMDenoiser(unet, time_scale=1000, keyword="class_labels")
    pipeline = diffusers.ConsistencyModelPipeline(unet, diffusers.CMStochasticIterativeScheduler())
    chosen = student if sigma == 80 else Sampler(student, (sigma,))
    to_pipeline(chosen, pipeline, tmp_path)
    z, y = torch.randn(2, 3, 8, 8), None if classes is None else torch.tensor([1, 3])
    _, found = called(
        diffusers.ConsistencyModelPipeline, tmp_path, latents=z, batch_size=2, class_labels=y, num_inference_steps=1,
        output_type="pt",
    )  # fmt: skip
    same(found.images, (sampled(chosen, z, y) / 2 + 0.5).clamp(0, 1))
    card = (tmp_path / "README.md").read_text()
    assert ("class_labels=[0]" in card) == bool(classes)
    assert "latents" not in card
    with pytest.raises(UsageError, match="preconditioning of EDM"):
        to_pipeline(chosen, diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()), tmp_path / "other")
    with pytest.raises(UsageError, match="no scheduler for these steps"):
        to_pipeline(Sampler(student, (80.0, 2.5)), pipeline, tmp_path / "two")
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "two").exists()

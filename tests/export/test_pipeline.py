"""Pipelines of diffusers: loaded by `from_pretrained`, they sample what the student samples."""

import pytest
import torch

from limbeck.core.errors import UsageError
from limbeck.diffusion import Denoiser, Experts, RectifiedFlow, Sampler, Table

diffusers = pytest.importorskip("diffusers")


def pieces():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    small = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, cross_attention_dim=16, attention_head_dim=4, **small, **blocks
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae, unet=unet, scheduler=diffusers.DDIMScheduler(**betas), text_encoder=None, tokenizer=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    student = Denoiser(unet, Table.scaled_linear(), "epsilon", time_scale=999, keyword="encoder_hidden_states")
    return pipeline, student.eval()


def sampled(path, z, prompts, steps):
    absent = ("tokenizer", "text_encoder", "image_encoder", "safety_checker", "feature_extractor")
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(path, **dict.fromkeys(absent))
    loaded.set_progress_bar_config(disable=True)
    return loaded(
        prompt_embeds=prompts, latents=z, num_inference_steps=steps, guidance_scale=1.0, output_type="latent",
        generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip


def test_one_step_is_the_students(tmp_path):
    pipeline, student = pieces()
    from limbeck.export.pipeline import to_pipeline

    z, prompts = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    to_pipeline(student, pipeline, tmp_path)
    with torch.no_grad():
        expected = student(z, condition=prompts)
    torch.testing.assert_close(sampled(tmp_path, z, prompts, 1), expected, rtol=1e-3, atol=1e-3)


def test_several_steps_are_those_of_the_student(tmp_path):
    pipeline, student = pieces()
    from limbeck.export.pipeline import to_pipeline

    times = (1.0, 0.5)
    to_pipeline(Sampler(student, times), pipeline, tmp_path)
    z, prompts = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    found = sampled(tmp_path, z, prompts, 2)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first = student(z, condition=prompts)
        t = torch.tensor([499 / 999])
        second = student(student.schedule.add_noise(first, noise, t), t, prompts)
    torch.testing.assert_close(found, second, rtol=1e-2, atol=1e-2)


def test_steps_without_new_noise_are_ddims(tmp_path):
    pipeline, student = pieces()
    from limbeck.export.pipeline import to_pipeline

    sampler = Sampler(student, (1.0, 0.5), "ddim")
    to_pipeline(sampler, pipeline, tmp_path)
    z, prompts = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    with torch.no_grad():
        expected = sampler(z, condition=prompts)
    torch.testing.assert_close(sampled(tmp_path, z, prompts, 2), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("times", "noise"),
    [((1.0,), "fresh"), ((1.0, 0.75, 0.5, 0.25), "fresh"), ((1.0, 0.75), "ddim"), ((1.0, 0.5), "ddim")],
)
def test_the_pipeline_of_a_flow_takes_its_steps(tmp_path, times, noise):
    from limbeck.export.pipeline import to_pipeline

    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16}
    inputs = {"joint_attention_dim": 8, "pooled_projection_dim": 6, "pos_embed_max_size": 8, "sample_size": 8}
    net = diffusers.SD3Transformer2DModel(**sizes, **inputs, in_channels=4, out_channels=4).eval()
    pooled, prompts, z = torch.randn(1, 6), torch.randn(1, 3, 8), torch.randn(1, 4, 8, 8)

    class Told(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, time, prompt):
            return self.net(x, encoder_hidden_states=prompt, pooled_projections=pooled, timestep=time).sample

    student = Denoiser(Told(), RectifiedFlow(), "flow_prediction", time_scale=1000)
    absent = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=net, vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), **dict.fromkeys(absent),
    )  # fmt: skip
    to_pipeline(Sampler(student, times, noise), pipeline, tmp_path)
    loaded = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path, **dict.fromkeys(absent))
    loaded.set_progress_bar_config(disable=True)
    torch.manual_seed(1)  # this pipeline gives its generator to the first noise alone
    found = loaded(
        prompt_embeds=prompts, pooled_prompt_embeds=pooled, latents=z, num_inference_steps=len(times), guidance_scale=1.0,
        output_type="latent",
    ).images  # fmt: skip
    torch.manual_seed(1)
    with torch.no_grad():
        drawn = Sampler(student, times, noise)(z, condition=prompts)
    torch.testing.assert_close(found, drawn, rtol=1e-3, atol=1e-3)


def test_the_card_has_the_call(tmp_path):
    from limbeck.export.pipeline import to_pipeline

    pipeline, student = pieces()
    results = {"models": {"student": {"coverage": 0.9}}, "lineage": {"method": "sid"}}
    card = (to_pipeline(Sampler(student, (1.0, 0.5)), pipeline, tmp_path / "fast", results) / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert 'pipeline = StableDiffusionPipeline.from_pretrained("fast")' in card
    assert 'pipeline("a photograph of a lighthouse", num_inference_steps=2, guidance_scale=1.0)' in card
    assert "| Coverage | 0.900 |" in card
    other = diffusers.DDPMPipeline(unet=pipeline.unet, scheduler=pipeline.scheduler)
    card = (to_pipeline(student, other, tmp_path / "once") / "README.md").read_text()
    assert "samples = pipeline(num_inference_steps=1)" in card


def test_what_does_not_fit(tmp_path):
    from limbeck.export.pipeline import to_pipeline

    pipeline, student = pieces()
    with pytest.raises(UsageError, match="no network of the pipeline's kind"):
        to_pipeline(torch.nn.Linear(2, 2), pipeline, tmp_path)
    with pytest.raises(UsageError, match="no scheduler for these steps"):
        to_pipeline(Sampler(student, (0.625, 0.3)), pipeline, tmp_path)
    with pytest.raises(UsageError, match="no scheduler for these steps"):
        to_pipeline(Sampler(student, (1.0, 0.5), "fixed"), pipeline, tmp_path)
    both = Experts([student, student], bounds=(0.5,))
    with pytest.raises(UsageError, match="room for one network"):
        to_pipeline(Sampler(both, (1.0, 0.25)), pipeline, tmp_path)
    own = diffusers.DDIMPipeline(unet=pipeline.unet, scheduler=pipeline.scheduler)
    with pytest.raises(UsageError, match="takes another scheduler"):
        to_pipeline(Sampler(student, (1.0, 0.5)), own, tmp_path)
    assert not list(tmp_path.iterdir())

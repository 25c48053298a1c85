"""Stable Diffusion 3 medium (2.1 B parameters) as a denoiser of latents, and images with prompts as latents and embeddings.

    python recipes/stable_diffusion_3.py images.parquet

reads the columns `image` and `caption`, fetches the published weights and writes `weights/sd3-medium.safetensors` and
`weights/sd3-images.safetensors` beside this file. VAE and text encoders run there, once for each image, and not in the training.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from limbeck.data import Data, TensorSource
from limbeck.diffusion import Denoiser, RectifiedFlow

NAME, HERE = "stabilityai/stable-diffusion-3-medium-diffusers", Path(__file__).parent / "weights"
TOKENS, WIDTH, POOLED = 333, 4096, 2048
SIZES = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}


class Prompted(nn.Module):
    """The transformer, told a prompt as one tensor: its pooled embedding in the first row, filled up with zeros, then its tokens.

    Args:
        net: The transformer.
        pooled: Numbers of the pooled embedding.
    """

    def __init__(self, net: nn.Module, pooled: int = POOLED) -> None:
        super().__init__()
        self.net, self.pooled = net, pooled

    def forward(self, x: Tensor, time: Tensor, prompt: Tensor) -> Any:
        """What the transformer predicts for latents `[B, 16, H, W]`, times `[B]` and prompts `[B, 1 + L, D]`."""
        pooled, tokens = prompt[:, 0, : self.pooled], prompt[:, 1:]
        return self.net(x, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=time).sample


def teacher() -> nn.Module:
    """The structure, with random weights; `@FILE` fills it, the prompt of no words among them."""
    net = SD3Transformer2DModel(**SIZES)
    net.enable_gradient_checkpointing()
    return denoiser(Prompted(net), torch.zeros(1 + TOKENS, WIDTH))


def denoiser(net: nn.Module, null: Tensor) -> Denoiser:
    """A rectified flow of latents, told whole thousands of the time; the grid of the published sampler is shifted by 3."""
    return Denoiser(net, RectifiedFlow(shift=3.0), "flow_prediction", time_scale=1000, null=null)


def images() -> Data:
    """Latents of images of 512 x 512 pixels, and their prompts."""
    file = HERE / "sd3-images.safetensors"
    if file.is_file():
        from safetensors.torch import load_file

        known = load_file(file)
        return Data(train=TensorSource(known["latents"].float(), known["prompts"].float()))
    warnings.warn(f"weights/{file.name} is not there: 16 latents of noise are taken", stacklevel=2)
    latents = torch.randn(16, 16, 64, 64, generator=torch.Generator().manual_seed(0))
    return Data(train=TensorSource(latents, torch.zeros(16, 1 + TOKENS, WIDTH)))


def main() -> None:
    """Fetch the weights, encode the images and their prompts."""
    import pandas
    from diffusers import StableDiffusion3Pipeline
    from diffusers.image_processor import VaeImageProcessor
    from PIL import Image
    from safetensors.torch import save_file

    from limbeck.export.safetensors import save

    pipeline = StableDiffusion3Pipeline.from_pretrained(NAME, torch_dtype=torch.bfloat16)
    rows, vae = pandas.read_parquet(sys.argv[1]), pipeline.vae
    process = VaeImageProcessor()

    @torch.no_grad()
    def encoded(prompt: str) -> Tensor:
        tokens, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
        first = nn.functional.pad(pooled, (0, tokens.shape[-1] - pooled.shape[-1]))
        return torch.cat([first[:, None], tokens], 1)[0].cpu()

    latents = []
    for row in rows["image"]:
        from io import BytesIO

        pixels = process.preprocess(Image.open(BytesIO(row["bytes"])).convert("RGB").resize((512, 512)))
        with torch.no_grad():
            found = vae.encode(pixels.to(vae.dtype)).latent_dist.mean
        latents.append((found - vae.config.shift_factor) * vae.config.scaling_factor)
    HERE.mkdir(exist_ok=True)
    prompts = torch.stack([encoded(caption) for caption in rows["caption"]])
    save_file({"latents": torch.cat(latents).contiguous(), "prompts": prompts}, HERE / "sd3-images.safetensors")
    net = pipeline.transformer.float()
    model = denoiser(Prompted(net, net.config.pooled_projection_dim), encoded("").float())
    model.check_scheduler(pipeline.scheduler)
    save(model, HERE / "sd3-medium.safetensors")


if __name__ == "__main__":
    main()

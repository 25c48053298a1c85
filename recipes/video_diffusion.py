"""ModelScope's text-to-video model (UNet of 1.4 billion parameters) as a denoiser of clips of latents, and its data.

    python recipes/video_diffusion.py

fetches the published weights and writes `weights/modelscope.safetensors`, and with the networks that the discriminator sees by
`weights/modelscope-teacher.safetensors`, beside this file. `weights/clips.safetensors` is to hold
`latents` `[N, 4, T, 32, 32]` of clips, of 16 frames of 256 x 256 pixels each, and `text` `[N, 77, 1024]`, what the model's text
encoder makes of their captions: `encoded` makes both. `weights/images.safetensors` is to hold the `latents` `[M, 4, 32, 32]` of
better images, as clips of one frame without that axis. Latents are those of the model's own VAE, times its scaling factor.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from limbeck.data import Data, TensorSource
from limbeck.diffusion import Denoiser, Table

NAME, HERE = "damo-vilab/text-to-video-ms-1.7b", Path(__file__).parent / "weights"
SCALING, LAYERS = 0.18215, (3, 6, 9, 12)


class Seen(nn.Module):
    """What a discriminator sees of latents: they are decoded to pixels, of which DINOv2 gives four layers."""

    def __init__(self, vae: nn.Module, dino: nn.Module, size: int = 224, layers: tuple[int, ...] = LAYERS) -> None:
        super().__init__()
        self.vae, self.dino, self.size, self.layers = vae, dino, size, layers
        self.requires_grad_(False)

    def forward(self, latents: Tensor) -> list[Tensor]:
        """Tokens `[N, L, C]` of each layer for latents `[N, 4, H, W]`, with the way back to them."""
        vae: Any = self.vae
        pixels = vae.decode(latents / SCALING).sample  # [N, 3, 8 H, 8 W] in [-1, 1]
        pixels = nn.functional.interpolate(pixels, size=self.size, mode="bilinear", antialias=True)
        mean, std = (
            torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        states = self.dino(((pixels + 1) / 2 - mean) / std, output_hidden_states=True).hidden_states
        return [states[k][:, 1:] for k in self.layers]


def unet() -> nn.Module:
    """The structure, with random weights; `@FILE` fills it."""
    null = torch.zeros(77, 1024)  # replaced by the weights in the file
    net = UNet3DConditionModel(sample_size=32, cross_attention_dim=1024, attention_head_dim=64)
    return Denoiser(net, Table.scaled_linear(), "epsilon", time_scale=999, null=null, keyword="encoder_hidden_states")


def teacher() -> nn.Module:
    """The same, with what the discriminator sees beside it."""
    model = unet()
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=256, **blocks)
    model.features = Seen(vae, Dinov2Model(config))
    return model


def clips() -> Data:
    """Clips with what the text encoder makes of their captions, and better images."""
    latents, text = _tensors("clips", 64, (4, 16, 32, 32))
    images, _ = _tensors("images", 64, (4, 32, 32))
    return Data(train=TensorSource(latents, text), unlabelled=TensorSource(images))


def _tensors(name: str, count: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    file = HERE / f"{name}.safetensors"
    if file.is_file():
        from safetensors.torch import load_file

        found = load_file(file)
        return found["latents"], found.get("text", torch.zeros(0))
    warnings.warn(f"weights/{name}.safetensors is not there: noise is taken", stacklevel=2)
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, *shape, generator=g), torch.randn(count, 77, 1024, generator=g)


@torch.no_grad()
def encoded(pipeline: Any, clips: Tensor, captions: list[str]) -> dict[str, Tensor]:
    """Latents `[N, 4, T, H / 8, W / 8]` of clips `[N, 3, T, H, W]` in [-1, 1], and what is made of their captions."""
    frames = clips.movedim(2, 1)  # [N, T, 3, H, W]
    found = [pipeline.vae.encode(clip).latent_dist.mean * pipeline.vae.config.scaling_factor for clip in frames]
    options = {"padding": "max_length", "truncation": True, "max_length": 77, "return_tensors": "pt"}
    tokens = pipeline.tokenizer(captions, **options).input_ids
    latents = torch.stack(found).movedim(1, 2).contiguous()
    return {"latents": latents, "text": pipeline.text_encoder(tokens).last_hidden_state}


def main() -> None:
    """Fetch the weights."""
    from diffusers import TextToVideoSDPipeline
    from transformers import AutoModel

    from limbeck.export.safetensors import save

    pipeline = TextToVideoSDPipeline.from_pretrained(NAME)
    empty = pipeline.tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids
    model: Any = teacher()
    model.net, model.features.vae = pipeline.unet, pipeline.vae
    model.features.dino = AutoModel.from_pretrained("facebook/dinov2-small")
    with torch.no_grad():
        model.null.copy_(pipeline.text_encoder(empty).last_hidden_state[0])
    model.check_scheduler(pipeline.scheduler)
    HERE.mkdir(exist_ok=True)
    save(model, HERE / "modelscope-teacher.safetensors")
    del model.features
    save(model, HERE / "modelscope.safetensors")


if __name__ == "__main__":
    main()

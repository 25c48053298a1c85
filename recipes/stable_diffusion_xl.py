"""Stable Diffusion XL base (UNet of 2.6 billion, text encoders of 0.8 billion parameters) as a denoiser of latents, and prompts.

    python recipes/stable_diffusion_xl.py prompts.txt

fetches the published weights and writes `weights/sdxl-base.safetensors` and `weights/sdxl-prompts.safetensors` beside this file.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from limbeck.data import Data
from limbeck.data.noise import Noise
from limbeck.diffusion import Denoiser, Table

NAME, HERE = "stabilityai/stable-diffusion-xl-base-1.0", Path(__file__).parent / "weights"
START, END, LENGTH, SIZE = 49406, 49407, 77, 1024
EXAMPLES = ([320, 1125, 539, 320, 2368], [320, 1125, 539, 320, 1929])  # "a photo of a cat", "a photo of a dog"


class Prompted(nn.Module):
    """A UNet that is told what two frozen text encoders make of tokens, the pooled text, and the size of the image.

    Args:
        unet: The UNet.
        text: The text encoder of the first tokens.
        pooled: That of the second, with a projection of the whole text.
        size: Of the images in pixels, which are not cropped.
    """

    def __init__(self, unet: nn.Module, text: nn.Module, pooled: nn.Module, size: int = SIZE) -> None:
        super().__init__()
        self.unet, self.text, self.pooled = unet, text.requires_grad_(False), pooled.requires_grad_(False)
        self.size = size

    def forward(self, x: Tensor, time: Tensor, tokens: Tensor) -> Any:
        """What the UNet predicts for latents `[B, 4, H, W]`, timesteps `[B]` and tokens `[B, 2, L]`, -1 where nothing is said."""
        states, pooled = self.encoded(tokens)
        sizes = torch.tensor([self.size, self.size, 0, 0, self.size, self.size], device=x.device).expand(len(x), 6)
        added = {"text_embeds": pooled, "time_ids": sizes}
        return self.unet(x, time, encoder_hidden_states=states, added_cond_kwargs=added).sample

    def states(self, tokens: Tensor) -> Tensor:
        """What its cross-attention sees of tokens `[B, 2, L]`, `[B, L, C]`."""
        return self.encoded(tokens)[0]

    def encoded(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """States of the last layers but one of both encoders `[B, L, C]`, and the pooled text `[B, D]`; zeros for nothing."""
        first, second = tokens.clamp_min(0).unbind(1)
        one = self.text(first, output_hidden_states=True).hidden_states[-2]
        two = self.pooled(second, output_hidden_states=True)
        said = (tokens[:, 0, :1] >= 0).to(one.dtype)  # [B, 1]
        return torch.cat([one, two.hidden_states[-2]], 2) * said[..., None], two.text_embeds * said


def padded(tokens: list[int]) -> list[list[int]]:
    """A start, the tokens, an end, and the padding of each of the two encoders."""
    rest = LENGTH - len(tokens) - 2
    return [[START, *tokens, END] + [pad] * rest for pad in (END, 0)]


def teacher() -> nn.Module:
    """The structure, with random weights; `@FILE` fills it."""
    unet = UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), attention_head_dim=[5, 10, 20], cross_attention_dim=2048,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2), transformer_layers_per_block=[1, 2, 10],
        up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    unet.enable_gradient_checkpointing()
    ends = {"vocab_size": 49408, "bos_token_id": START, "eos_token_id": END, "num_hidden_layers": 12}
    small = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
    large = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "projection_dim": 1280}
    text = CLIPTextModel(CLIPTextConfig(**ends | small, pad_token_id=END))
    more = {"num_hidden_layers": 32, "hidden_act": "gelu", "pad_token_id": 0}
    return denoiser(Prompted(unet, text, CLIPTextModelWithProjection(CLIPTextConfig(**ends | large | more))), LENGTH)


def denoiser(net: nn.Module, length: int) -> Denoiser:
    """A denoiser of latents that predicts noise; nothing is said by tokens of -1, for which the published pipeline has zeros."""
    return Denoiser(net, Table.scaled_linear(), "epsilon", time_scale=999, null=torch.full((2, length), -1))


def prompts() -> Data:
    """Noise for every prompt that was prepared."""
    file = HERE / "sdxl-prompts.safetensors"
    if file.is_file():
        from safetensors.torch import load_file

        tokens = load_file(file)["tokens"].long()
    else:
        warnings.warn(f"weights/{file.name} is not there: two example prompts are taken", stacklevel=2)
        tokens = torch.tensor([padded(example) for example in EXAMPLES]).repeat(512, 1, 1)
    return Data(train=Noise((4, SIZE // 8, SIZE // 8), conditions=tokens))


def main() -> None:
    """Fetch the weights, tokenise the prompts for both encoders."""
    from diffusers import StableDiffusionXLPipeline
    from safetensors.torch import save_file

    from limbeck.export.safetensors import save

    pipeline = StableDiffusionXLPipeline.from_pretrained(NAME)
    lines = [line for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines() if line.strip()]
    length = pipeline.tokenizer.model_max_length
    options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
    both = [tokenizer(lines, **options).input_ids for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)]
    HERE.mkdir(exist_ok=True)
    save_file({"tokens": torch.stack(both, 1).int()}, HERE / "sdxl-prompts.safetensors")
    model = denoiser(Prompted(pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2), length)
    model.check_scheduler(pipeline.scheduler)
    save(model, HERE / "sdxl-base.safetensors")


if __name__ == "__main__":
    main()

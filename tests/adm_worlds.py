"""The U-Net of guided-diffusion written once more: its names and shapes, and its function over a state dictionary of them."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Adm:
    """One configuration, by the flags of the published code; `attention` are levels, 0 the finest."""

    width: int = 32
    multiples: tuple[int, ...] = (1, 2)
    layers: int = 1
    attention: tuple[int, ...] = (1,)
    classes: int = 0
    shift: bool = True  # use_scale_shift_norm
    head: int = 8  # num_head_channels
    pixels: tuple[int, ...] = (1, 1)  # of the convolutions of attention: two dimensions, or one in guided-diffusion
    order: str = "qkv"  # or "heads"

    def shapes(self):
        """The shape of every tensor by its name."""
        emb, found = 4 * self.width, {}

        def layer(name, out, *fan):
            found[f"{name}.weight"], found[f"{name}.bias"] = (out, *fan), (out,)

        def residual(name, old, new):
            layer(f"{name}.in_layers.0", old)
            layer(f"{name}.in_layers.2", new, old, 3, 3)
            layer(f"{name}.emb_layers.1", 2 * new if self.shift else new, emb)
            layer(f"{name}.out_layers.0", new)
            layer(f"{name}.out_layers.3", new, new, 3, 3)
            if old != new:
                layer(f"{name}.skip_connection", new, old, 1, 1)

        def attention(name, c):
            layer(f"{name}.norm", c)
            layer(f"{name}.qkv", 3 * c, c, *self.pixels)
            layer(f"{name}.proj_out", c, c, *self.pixels)

        layer("time_embed.0", emb, self.width)
        layer("time_embed.2", emb, emb)
        if self.classes:
            found["label_emb.weight"] = (self.classes, emb)
        c = self.width * self.multiples[0]
        layer("input_blocks.0.0", c, 3, 3, 3)
        kept, k = [c], 1
        for level, multiple in enumerate(self.multiples):
            for _ in range(self.layers):
                residual(f"input_blocks.{k}.0", c, c := self.width * multiple)
                if level in self.attention:
                    attention(f"input_blocks.{k}.1", c)
                kept.append(c)
                k += 1
            if level < len(self.multiples) - 1:
                residual(f"input_blocks.{k}.0", c, c)
                kept.append(c)
                k += 1
        residual("middle_block.0", c, c)
        attention("middle_block.1", c)
        residual("middle_block.2", c, c)
        k = 0
        for level, multiple in reversed([*enumerate(self.multiples)]):
            for i in range(self.layers + 1):
                residual(f"output_blocks.{k}.0", c + kept.pop(), c := self.width * multiple)
                if level in self.attention:
                    attention(f"output_blocks.{k}.1", c)
                if level and i == self.layers:
                    residual(f"output_blocks.{k}.{1 + (level in self.attention)}", c, c)
                k += 1
        layer("out.0", c)
        layer("out.2", 3, c, 3, 3)
        return found

    def state(self, seed=0):
        """Random tensors of these shapes that keep the size of what passes."""
        g, made = torch.Generator().manual_seed(seed), {}
        for name, shape in self.shapes().items():
            noise = torch.randn(shape, generator=g)
            fan = math.prod(shape[1:]) if name.endswith("weight") and name != "label_emb.weight" else 0
            made[name] = noise / fan**0.5 if fan > 1 else (1 if name.endswith("weight") else 0) + 0.2 * noise
        return made

    def forward(self, state, x, t, y=None):
        """What the network gives for images `[B, 3, H, W]`, times `[B]` and labels `[B]`."""

        def dense(name, h):
            return F.linear(h, state[f"{name}.weight"], state[f"{name}.bias"])

        def conv(name, h):
            weight = state[f"{name}.weight"]
            return F.conv2d(h, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

        def norm(name, h):
            return F.group_norm(h, 32, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

        def residual(name, h, resize):
            inner = conv(f"{name}.in_layers.2", resize(F.silu(norm(f"{name}.in_layers.0", h))))
            told = dense(f"{name}.emb_layers.1", F.silu(emb))[:, :, None, None]
            if self.shift:
                scale, shift = told.chunk(2, dim=1)
                inner = norm(f"{name}.out_layers.0", inner) * (1 + scale) + shift
            else:
                inner = norm(f"{name}.out_layers.0", inner + told)
            inner = conv(f"{name}.out_layers.3", F.silu(inner))
            skip = f"{name}.skip_connection"
            return inner + (conv(skip, resize(h)) if f"{skip}.weight" in state else resize(h))

        def attention(name, h):
            b, c, *size = h.shape
            weight = state[f"{name}.qkv.weight"].reshape(3 * c, c)
            rows = F.linear(norm(f"{name}.norm", h).flatten(2).mT, weight, state[f"{name}.qkv.bias"])  # [B, H W, 3 C]
            if self.order == "qkv":
                q, k, v = rows.view(b, -1, 3, c // self.head, self.head).permute(2, 0, 3, 1, 4)
            else:
                q, k, v = rows.view(b, -1, c // self.head, 3, self.head).permute(3, 0, 2, 1, 4)
            seen = (q @ k.mT / self.head**0.5).softmax(-1) @ v  # [B, heads, H W, D]
            weight = state[f"{name}.proj_out.weight"].reshape(c, c)
            out = F.linear(seen.transpose(1, 2).flatten(2), weight, state[f"{name}.proj_out.bias"])
            return h + out.mT.view(b, c, *size)

        def block(name, h, down=False):
            for i in range(3):
                if f"{name}.{i}.qkv.weight" in state:
                    h = attention(f"{name}.{i}", h)
                elif f"{name}.{i}.in_layers.0.weight" in state:
                    h = residual(f"{name}.{i}", h, _half if down else _double if up and i else _same)
            return h

        angles = t[:, None].float() * torch.exp(-math.log(10_000) * torch.arange(self.width // 2) / (self.width // 2))
        emb = torch.cat([angles.cos(), angles.sin()], 1).to(x.dtype)
        emb = dense("time_embed.2", F.silu(dense("time_embed.0", emb)))
        if self.classes:
            emb = emb + state["label_emb.weight"][y]
        up, h = False, conv("input_blocks.0.0", x)
        kept, per_level = [h], self.layers + 1
        for k in range(1, per_level * len(self.multiples)):
            kept.append(h := block(f"input_blocks.{k}", h, down=k % per_level == 0))
        h = block("middle_block", h)
        up = True
        for k in range(per_level * len(self.multiples)):
            h = block(f"output_blocks.{k}", torch.cat([h, kept.pop()], 1))
        return conv("out.2", F.silu(norm("out.0", h)))


def _same(h):
    return h


def _half(h):
    return F.avg_pool2d(h, 2)


def _double(h):
    return h.repeat_interleave(2, 2).repeat_interleave(2, 3)

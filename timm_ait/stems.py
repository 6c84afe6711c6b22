"""The stems, which make tokens of images: the paper's normalised patches, and convolutions."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, HybridEmbed, PatchEmbed, to_2tuple
from timm.models import register_notrace_module
from torch import Tensor, nn

from .arguments import is_count
from .layers import OutputNorm, is_plain

__all__ = ['ConvEmbed', 'NormalizedPatchEmbed', 'check_divisible']


@register_notrace_module
class NormalizedPatchEmbed(PatchEmbed):
    """The paper's stem: cut into patches, LayerNorm over the raw patch, Linear, LayerNorm.

    ``proj`` has the shape of a convolution, (E, C, P, P), so that timm can adapt it to other channel counts. A patch is
    read in the same order, (C, P, P). The authors read (P, P, C): `convert.py` permutes their weights.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        strict_img_size: bool = True,
        output_fmt: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if dynamic_img_pad or output_fmt is not None or not strict_img_size:
            raise ValueError('NormalizedPatchEmbed takes images of one size: leave dynamic_img_size and _pad at False')
        super().__init__(
            img_size, patch_size, in_chans, embed_dim, norm_layer=nn.LayerNorm, bias=bias, device=device, dtype=dtype
        )
        patch_dim = in_chans * self.patch_size[0] * self.patch_size[1]
        self.patch_norm = OutputNorm(patch_dim, device=device, dtype=dtype)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the image size. The patch size stays, since the norm over the pixels of a patch depends on it.

        Raises:
            ValueError: For another patch size.
        """
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(
                f'the stem normalises patches of {self.patch_size}, got patch_size={patch_size}; '
                'create the model with the patch size that you want'
            )
        super().set_input_size(img_size=img_size)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        if (H, W) != self.img_size:
            raise ValueError(
                f'expected images of {self.img_size}, got {(H, W)}; resize them or create the model with img_size='
            )
        x = F.unfold(x, kernel_size=self.patch_size, stride=self.patch_size)  # (B, C, H, W) -> (B, C*P*P, N)
        x = self.patch_norm(x.transpose(1, 2))  # (B, C*P*P, N) -> (B, N, C*P*P)
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out a branch, but not half of a condition
            if not is_plain(self.proj):
                patches = x.reshape(-1, C, *self.patch_size)  # (B, N, C*P*P) -> (B*N, C, P, P)
                return self.norm(self.proj(patches).view(B, x.shape[1], -1))  # (B*N, E, 1, 1) -> (B, N, E)
        return self.norm(F.linear(x, self.proj.weight.flatten(1), self.proj.bias))  # (B, N, C*P*P) -> (B, N, E)


class ConvEmbed(HybridEmbed):
    """Convolutions of 3x3 with norm and GELU, (B, C, H, W) -> (B, 256, H/4, W/4), and then patches of these.

    Xiao et al., https://arxiv.org/abs/2106.14881
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch_size: int | tuple[int, int] = 1,
        in_chans: int = 3,
        embed_dim: int = 192,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        strict_img_size: bool = True,
        output_fmt: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        p, q = to_2tuple(patch_size)
        check_divisible(img_size, (4 * p, 4 * q), dynamic_img_pad)
        dd = {'device': device, 'dtype': dtype}
        sizes = ((in_chans, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2))  # channels in and out, stride
        super().__init__(
            nn.Sequential(*[ConvNormAct(i, o, 3, stride, act_layer=nn.GELU, **dd) for i, o, stride in sizes]),
            img_size,
            patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            bias=bias,
            dynamic_img_pad=dynamic_img_pad,
            strict_img_size=strict_img_size,
            output_fmt=output_fmt,
            **dd,
        )

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The grid of patches of images of this size. The convolutions round up, and timm's counterpart down."""
        h, w = img_size
        return super().dynamic_feat_size((math.ceil(h / 4) * 4, math.ceil(w / 4) * 4))


def check_divisible(img_size: int | tuple[int, int], patch_size: int | tuple[int, int], padded: bool) -> None:
    """Raise ValueError unless the size of the image is one, and patches of this size, in its pixels, fill it."""
    sides, (p, q) = to_2tuple(img_size), to_2tuple(patch_size)
    if len(sides) != 2 or not all(map(is_count, sides)):
        raise ValueError(f'img_size must be an integer of at least 1 or a pair (height, width), got {img_size!r}')
    h, w = sides
    if not padded and (h % p or w % q):
        raise ValueError(
            f'img_size must be divisible by patch_size, got {(h, w)} and patches of {(p, q)} pixels; '
            f'the nearest sizes below are {(h // p * p, w // q * q)}'
        )

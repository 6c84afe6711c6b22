"""Models to compare with: a ViT that differs in the workspace alone, and the workspace as the authors compute it."""

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from timm_ait import AssociativeTransformer, NormalizedPatchEmbed


def vit_like(model: AssociativeTransformer) -> VisionTransformer:
    """Build timm's VisionTransformer with the stem, width, depth and head of ``model``, and with a plain Mlp.

    For a model with a class token this is timm's ViT-B/16. For one in the paper's layout it is built from timm's class.
    """
    depth = len(model.blocks)
    if model.global_pool != 'flatten':
        return timm.create_model('vit_base_patch16_224', depth=depth, num_classes=model.num_classes)
    block = model.blocks[0]
    vit = VisionTransformer(
        img_size=model.patch_embed.img_size,
        patch_size=model.patch_embed.patch_size,
        num_classes=model.num_classes,
        global_pool='',
        embed_dim=model.embed_dim,
        depth=depth,
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / model.embed_dim,
        qkv_bias=block.attn.qkv.bias is not None,
        class_token=False,
        pos_embed='none',
        final_norm=False,
        fc_norm=False,
        embed_layer=NormalizedPatchEmbed,
        norm_layer=nn.LayerNorm,
    )
    width = vit.patch_embed.num_patches * vit.embed_dim
    vit.attn_pool, vit.fc_norm, vit.head = nn.Flatten(1), nn.LayerNorm(width), nn.Linear(width, model.num_classes)
    return vit


class LoopedWorkspace(nn.Module):
    """The workspace as the authors compute it: a loop over heads, dense gates over all tokens, a write in evaluation.

    It follows their algorithm, detached memory included, and serves this comparison alone. It is faster than their code
    in one point: in each turn of the loop they compute the logits of all heads, here only those of one head.

    Args:
        in_features: Width E of a token.
        hidden_features: Width of the feed-forward part.
        num_slots: Memory slots M.
        slot_dim: Width D of a slot.
        write_heads: Heads S of the write.
        bottleneck: Tokens k that a slot reads per head.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        num_slots: int = 32,
        slot_dim: int = 32,
        write_heads: int = 8,
        bottleneck: int = 512,
    ) -> None:
        super().__init__()
        self.slot_dim, self.write_heads, self.bottleneck = slot_dim, write_heads, bottleneck
        self.fc1, self.fc2 = nn.Linear(in_features, hidden_features), nn.Linear(hidden_features, in_features)
        self.norm = nn.LayerNorm(in_features)
        self.query = nn.Linear(slot_dim, write_heads * slot_dim, bias=False)
        self.key = nn.Linear(in_features, write_heads * slot_dim, bias=False)
        self.value = nn.Linear(in_features, write_heads * slot_dim, bias=False)
        self.proj = nn.Linear(write_heads * slot_dim, slot_dim, bias=False)
        self.write_norm = nn.LayerNorm(slot_dim, eps=1e-6)
        self.linear_transform = nn.Linear(slot_dim, in_features)
        self.register_buffer('memory', torch.randn(num_slots, slot_dim))
        self.loss = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """Write the tokens, then retrieve: (B, N, E) -> (B, N, E)."""
        h = self.norm(self.fc2(F.gelu(self.fc1(x))))
        self.write(h.flatten(0, 1))  # (B, N, E) -> (T, E)
        attractors = self.linear_transform(self.memory)  # (M, D) -> (M, E)
        return h + (h @ attractors.t()).softmax(dim=-1) @ attractors

    def write(self, h: Tensor) -> None:
        """Write the tokens (T, E), one head after the other."""
        split = (self.write_heads, self.slot_dim)
        queries, keys, values = (
            layer(x).unflatten(-1, split).transpose(0, 1)  # (*, S*D) -> (S, *, D)
            for layer, x in ((self.query, self.memory.clone()), (self.key, h), (self.value, h))
        )
        messages, self.loss = [], h.new_zeros(())
        for q, k, v in zip(queries, keys, values, strict=True):
            logits = q @ k.t() / self.slot_dim**0.5  # (M, T)
            top, tokens = logits.topk(min(self.bottleneck, len(h)), dim=-1)
            gates = torch.zeros_like(logits).scatter(1, tokens, top.softmax(dim=-1).to(logits.dtype))  # (M, T)
            messages.append(gates @ v)
            for share in (gates.float().sum(0), (gates > 0).sum(0).float()):
                self.loss = self.loss + 0.01 * share.var() / (share.mean() ** 2 + 1e-10)
        update = self.write_norm(self.proj(torch.cat(messages, dim=-1)) + self.memory)
        with torch.no_grad():
            self.memory.copy_(F.normalize(0.9 * self.memory + 0.1 * update, dim=-1))

    def balance_loss(self) -> Tensor:
        """Return the balance loss () of the last forward pass."""
        return self.loss

"""What mixes the tokens in a baseline, each written from its paper.

Symbols: B images of N tokens of width E; M slots of width D, which are called inducing points in a Set Transformer and
latents in a Perceiver; H heads.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import Mlp, trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from timm_ait.selection import Selection, load_balance_loss


class CrossAttention(nn.Module):
    """``softmax(Q K^T / sqrt(d)) V`` of ``num_heads`` heads, with projections before and after.

    Args:
        dim: Width of what asks and of what comes out.
        kv_dim: Width of what is read.
        num_heads: A divisor of ``dim``.
    """

    def __init__(self, dim: int, kv_dim: int, num_heads: int) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.q, self.v = nn.Linear(dim, dim), nn.Linear(kv_dim, dim)
        self.k = nn.Linear(kv_dim, dim, bias=False)  # a softmax over keys does not feel their bias
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Let ``x`` (B, Q, dim) read ``y`` (B, K, kv_dim): (B, Q, dim)."""
        q, k, v = (split_heads(z, self.num_heads) for z in (self.q(x), self.k(y), self.v(y)))
        return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))


def check_heads(dim: int, num_heads: int) -> None:
    """Raise a ValueError where the width cannot be cut into so many heads."""
    if dim % num_heads:
        raise ValueError(f'expected a width that num_heads={num_heads} divides, got {dim}; change one of them')


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Cut the width into heads."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, L, H*d) -> (B, L, H, d) -> (B, H, L, d)


def merge_heads(x: Tensor) -> Tensor:
    """Put the heads side by side."""
    return x.transpose(1, 2).flatten(2)  # (B, H, L, d) -> (B, L, H, d) -> (B, L, H*d)


class Mixer(nn.Module):
    """Mixes tokens (B, N, E), and returns them with a balance loss () to add to the loss, zero for most."""

    def num_outputs(self, num_tokens: int) -> int:
        """How many tokens come out."""
        return num_tokens


class ViT(Mixer):
    """The blocks of timm's VisionTransformer, without qkv bias.

    Dosovitskiy et al., https://arxiv.org/abs/2010.11929
    """

    def __init__(self, embed_dim: int, depth: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        blocks = [Block(embed_dim, num_heads, mlp_ratio, norm_layer=nn.LayerNorm) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, E) -> (B, N, E), and a balance loss () of zero."""
        return self.blocks(x), x.new_zeros(())


class GatedWrite(nn.Module):
    """Tokens compete to write into slots, and gates decide what the slots keep.

    Goyal et al., *Coordination Among Neural Modules Through a Shared Global Workspace*, https://arxiv.org/abs/2103.01197,
    step 2 of section 2.1 and the gates of its appendix, which are those of the Relational Memory Core:

        m = LN(slots + softmax_topk(Q K^T / sqrt(d)) V),  candidate = LN(m + MLP(m))
        c = mean_n ReLU(W x_n) + tanh(slots)
        slots <- sigmoid(W_I c + b_I) tanh(candidate) + sigmoid(W_F c + b_F) slots

    The softmax is over the k highest logits of each slot and head. Forget gates start open (b_F = 1).

    Args:
        embed_dim: E.
        slot_dim: D, a multiple of ``num_heads``.
        num_heads: H.
        top_k: k, cut to the number of tokens where it is larger.
    """

    def __init__(self, embed_dim: int, slot_dim: int, num_heads: int, top_k: int) -> None:
        super().__init__()
        check_heads(slot_dim, num_heads)
        self.num_heads, self.top_k = num_heads, top_k
        self.q = nn.Linear(slot_dim, slot_dim)
        self.k, self.v = nn.Linear(embed_dim, slot_dim, bias=False), nn.Linear(embed_dim, slot_dim)
        self.norm1, self.norm2 = nn.LayerNorm(slot_dim), nn.LayerNorm(slot_dim)
        self.mlp = Mlp(slot_dim, act_layer=nn.ReLU)
        self.context = nn.Linear(embed_dim, slot_dim, bias=False)
        self.gates = nn.Linear(slot_dim, 2 * slot_dim)
        with torch.no_grad():
            self.gates.bias.copy_(torch.tensor([0.0, 1.0]).repeat_interleave(slot_dim))

    def forward(self, x: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, E), slots (B, M, D) -> slots (B, M, D), attention (B, H, M, k), whose it is (B, H, M, k)."""
        q, k, v = (split_heads(z, self.num_heads) for z in (self.q(slots), self.k(x), self.v(x)))
        logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, M, N)
        top, selected = logits.topk(min(self.top_k, x.shape[1]))
        shares = top.softmax(dim=-1)  # (B, H, M, k)
        attention = torch.zeros_like(logits).scatter(-1, selected, shares.to(logits.dtype))
        m = self.norm1(slots + merge_heads(attention @ v))
        candidate = self.norm2(m + self.mlp(m))
        context = self.context(x).relu().mean(dim=1, keepdim=True) + slots.tanh()
        input_gate, forget_gate = self.gates(context).sigmoid().chunk(2, dim=-1)
        return input_gate * candidate.tanh() + forget_gate * slots, shares, selected


class HopfieldRead(nn.Module):
    """``softmax(h a^T) a`` with the attractors ``a = W_LT slots + b``, as in the Associative Transformer."""

    def __init__(self, embed_dim: int, slot_dim: int) -> None:
        super().__init__()
        self.linear_transform = nn.Linear(slot_dim, embed_dim)

    def forward(self, h: Tensor, slots: Tensor) -> Tensor:
        """Tokens (B, N, E), slots (B, M, D) -> (B, N, E)."""
        attractors = self.linear_transform(slots)  # (B, M, D) -> (B, M, E)
        return F.scaled_dot_product_attention(h, attractors, attractors, scale=1.0)


class CoordinationBlock(nn.Module):
    """One layer of :class:`Coordination`: write, read in the place of self-attention, and a feed-forward part."""

    memory: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float,
        num_slots: int,
        slot_dim: int,
        top_k: int,
        across_batch: bool,
        balance_weight: float,
        hopfield: bool,
    ) -> None:
        super().__init__()
        self.balance_weight = balance_weight
        self.norm1, self.norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.write = GatedWrite(embed_dim, slot_dim, num_heads, top_k)
        self.read: nn.Module = CrossAttention(embed_dim, slot_dim, num_heads)
        if hopfield:
            self.read = HopfieldRead(embed_dim, slot_dim)
        self.mlp = Mlp(embed_dim, int(mlp_ratio * embed_dim), act_layer=nn.ReLU)
        self.register_buffer('memory', torch.eye(num_slots, slot_dim) if across_batch else None)

    def forward(self, x: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, E), slots (B, M, D) -> tokens, slots, balance loss ()."""
        h, balance = self.norm1(x), x.new_zeros(())
        if self.memory is None:
            slots, balance = self.compete(h, slots)
        else:
            memory = self.memory.clone()[None]  # (M, D) -> (1, M, D)
            if self.training:
                memory, balance = self.compete(h.flatten(0, 1)[None], memory)  # (B, N, E) -> (1, B*N, E)
                self.memory.copy_(memory[0].detach())
            slots = memory.expand(len(x), -1, -1)
        x = x + self.read(h, slots)
        return x + self.mlp(self.norm2(x)), slots, balance

    def compete(self, h: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Write tokens (B, N, E) into slots (B, M, D), with the balance loss (), a mean over B."""
        slots, shares, selected = self.write(h, slots)
        if self.balance_weight == 0:
            return slots, h.new_zeros(())
        loss = load_balance_loss(Selection(shares, selected, shares.new_empty(0)), h.shape[1])
        return slots, self.balance_weight * loss


class Coordination(Mixer):
    """Modules that share a workspace: tokens write into few slots, and read them, instead of each other.

    Goyal et al., https://arxiv.org/abs/2103.01197. The slots start as the rows of an identity matrix and go from layer
    to layer. The later arguments add, one by one, what the Associative Transformer has. The variants D and H of its
    paper are read as D for the memory (low rank, a bottleneck over the batch, a balance loss) and H for the Hopfield
    retrieval.

    Args:
        embed_dim: E.
        depth: Layers.
        num_heads: Of write and read alike.
        mlp_ratio: Width of the feed-forward part, in E.
        num_slots: M.
        slot_dim: D; less than E is the paper's low-rank memory.
        top_k: Tokens that a slot may read per head, out of those of an image, or of the batch.
        across_batch: Whether the tokens of all images compete for one memory, which each layer then has for itself. It
            is written in training, and only read in evaluation.
        balance_weight: Weight of the paper's balance loss.
        hopfield: Whether tokens read by Hopfield retrieval.
    """

    first_slots: Tensor

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 2.0,
        num_slots: int = 8,
        slot_dim: int = 256,
        top_k: int = 20,
        across_batch: bool = False,
        balance_weight: float = 0.0,
        hopfield: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer('first_slots', torch.eye(num_slots, slot_dim), persistent=False)
        write = (num_slots, slot_dim, top_k, across_batch, balance_weight)
        blocks = [CoordinationBlock(embed_dim, num_heads, mlp_ratio, *write, hopfield) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, E) -> (B, N, E), and the weighted balance loss ()."""
        slots, total = self.first_slots.expand(len(x), -1, -1), x.new_zeros(())
        for block in self.blocks:
            x, slots, balance = block(x, slots)
            total = total + balance
        return x, total


class AttentionBlock(nn.Module):
    """``MAB(X, Y) = LN(H + rFF(H))`` with ``H = LN(X + Multihead(X, Y, Y))`` (Lee et al., equations 6 and 7)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = CrossAttention(dim, dim, num_heads)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), act_layer=nn.ReLU)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Let ``x`` (B, Q, E) read ``y`` (B, K, E): (B, Q, E)."""
        h = self.norm1(x + self.attn(x, y))
        return self.norm2(h + self.mlp(h))


class InducedBlock(nn.Module):
    """``ISAB_M(X) = MAB(X, MAB(I, X))`` with M learned inducing points ``I`` (Lee et al., equations 9 and 10)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, num_points: int) -> None:
        super().__init__()
        self.points = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_points, dim)))
        self.gather, self.spread = (AttentionBlock(dim, num_heads, mlp_ratio) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, E) -> (B, N, E)."""
        return self.spread(x, self.gather(self.points.expand(len(x), -1, -1), x))


class SetTransformer(Mixer):
    """Induced set attention blocks (Lee et al., *Set Transformer*, https://arxiv.org/abs/1810.00825)."""

    def __init__(self, embed_dim: int, depth: int, num_heads: int, mlp_ratio: float = 2.0, num_slots: int = 32) -> None:
        super().__init__()
        blocks = [InducedBlock(embed_dim, num_heads, mlp_ratio, num_slots) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, E) -> (B, N, E), and a balance loss () of zero."""
        return self.blocks(x), x.new_zeros(())


class PerceiverLayer(nn.Module):
    """Latents read the tokens, then each other: a cross-attention block and ``latent_depth`` of timm's blocks."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, latent_depth: int) -> None:
        super().__init__()
        self.norm_q, self.norm_kv, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = CrossAttention(dim, dim, num_heads)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        blocks = [Block(dim, num_heads, mlp_ratio, norm_layer=nn.LayerNorm) for _ in range(latent_depth)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, latents: Tensor, x: Tensor) -> Tensor:
        """Latents (B, M, E), tokens (B, N, E) -> latents (B, M, E)."""
        latents = latents + self.attn(self.norm_q(latents), self.norm_kv(x))
        return self.blocks(latents + self.mlp(self.norm2(latents)))


class Perceiver(Mixer):
    """A small array of learned latents reads the tokens again and again.

    Jaegle et al., *Perceiver: General Perception with Iterative Attention*, https://arxiv.org/abs/2103.03206. The first
    layer has weights of its own; all later ones share theirs. Positions are those of the stem, not Fourier features.

    Args:
        embed_dim: E, of tokens and latents.
        depth: How often the latents read the tokens.
        num_heads: Of all attention.
        mlp_ratio: Width of the feed-forward parts, in E.
        num_slots: M latents.
        latent_depth: Blocks of self-attention between latents, after each reading.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 2.0,
        num_slots: int = 32,
        latent_depth: int = 2,
    ) -> None:
        super().__init__()
        self.depth = depth
        self.latents = nn.Parameter(trunc_normal_(torch.empty(num_slots, embed_dim), std=0.02))
        self.layers = nn.ModuleList(
            PerceiverLayer(embed_dim, num_heads, mlp_ratio, latent_depth) for _ in range(min(depth, 2))
        )

    def num_outputs(self, num_tokens: int) -> int:
        """How many latents come out, whatever the number of tokens."""
        return len(self.latents)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, E) -> latents (B, M, E), and a balance loss () of zero."""
        latents = self.latents.expand(len(x), -1, -1)
        for i in range(self.depth):
            latents = self.layers[min(i, 1)](latents, x)
        return latents, x.new_zeros(())

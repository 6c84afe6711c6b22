"""The global workspace layer of the Associative Transformer.

Sun, Ochiai, Wu, Lin, Kanai. *Associative Transformer*, CVPR 2025, https://arxiv.org/abs/2309.12862

Symbols, as in the paper: B images of N tokens of width E; a memory ``gamma`` of M slots of width D << E;
S write heads; a bottleneck of k tokens a slot. A NOTE gives the reason where a line differs from the authors' published
code (https://github.com/yuweisunn/associative-transformer).

In the paper the T = B*N tokens of a batch compete for one memory. With ``write_scope='image'`` the T = N tokens of each
image compete for a copy of the memory: then gates, reads and memories have one dimension more, B, in front.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import check_limits
from .balance import attach, is_backward_running
from .fused import FusedWorkspace
from .hopfield import HopfieldRetrieval
from .layers import OutputNorm, call_wide, is_plain, orthogonalise, rms_norm, unit_rows, without_autocast
from .replay import snapshot
from .selection import Selection, dense_gates, gather, load_balance_loss, top_gates, top_logits
from .state import MemoryState, MemoryWrite

__all__ = ['GlobalWorkspace', 'squash']


def squash(h: Tensor) -> Tensor:
    """Let the tokens of all images of the batch compete: (B, N, E) -> (B*N, E) (section 3.2)."""
    return h.flatten(0, -2)


class GlobalWorkspace(MemoryState):
    """Feed-forward layer of an Associative Transformer block; called by keyword, it stands in for timm's ``Mlp``.

    With ``h = LN(W2 GELU(W1 x))`` the layer returns ``h + r``: tokens write into the memory through top-k attention,
    and ``r = softmax(beta h a^T) a`` retrieves, for every token, from the attractors ``a = W_LT gamma + b``.

    The state is one buffer, ``memory`` (M, D), see `state.py`. A read from it normalises its rows. Like the statistics
    of a BatchNorm it moves in training mode, under ``torch.no_grad`` too, but not in a layer whose parameters are all
    frozen.

    In training mode the layer adds the gradient of its balance loss to any backward pass through it, see `balance.py`.
    ``auto_balance = False`` turns that off.

    In distributed training all ranks write one memory. Where only some ranks share the layer, set ``process_group`` to
    their group, as for a SyncBatchNorm.

    For another write or another retrieval override :meth:`address`, :meth:`compete`, :meth:`select`, :meth:`write`,
    :meth:`update`, :meth:`slots` or :meth:`read`, and give a model the new class as its ``workspace_layer``. What
    :meth:`update` leaves must be what :meth:`slots` reads: here rows of unit length.

    Args:
        in_features: E.
        hidden_features: Width of the feed-forward part, E by default.
        num_slots: M.
        slot_dim: D.
        write_heads: S.
        bottleneck: k, tokens that a slot may read per head; all tokens where there are fewer.
        beta: Inverse temperature of the retrieval.
        memory_decay: Weight of the old memory in the running average, see :meth:`update`; 'additive' and 'competing' do
            not use it.
        balance_weight: Weight of the balance loss; 0 computes none.
        retrieval_steps: Hopfield updates per token.
        write_mode: 'train' writes in training mode only, 'always' in evaluation too (as the authors do), 'never' not
            at all.
        write_grad: Whether the task's gradient reaches the write through this batch's retrieval. Parameters that can
            get no gradient are frozen.
        write_rule: 'published' is the paper's rule, which makes the slots alike, often one point. 'distinct' removes
            from each write what all slots read alike, writes rows of unit length, so that ``memory_decay`` is the rate
            that it says, starts from orthogonal slots and turns them back towards orthogonal ones after each write, and
            learns a gain (E,) on the retrieval that starts at 1. 'additive' is for ``write_scope='image'`` alone: slots
            score tokens with logits of unit variance from the start, and a copy is ``gamma + W_O heads``, of any
            length. It has orthogonal slots, which stay as they are, and the gain. 'competing' is that rule with slots
            that compete for tokens, see :meth:`compete`.
        write_scope: 'batch' as in the paper: the tokens of the batch write into one memory, and evaluation reads what
            training has written. 'image': every image writes its own tokens into a copy of the memory and reads the
            copy, in evaluation too. The memory itself starts every copy, and moves by their mean.
        retrieval_scale: None returns ``h + r`` as the paper does. A number returns ``f + scale * r``, with ``f`` the
            feed-forward output before its norm and ``scale`` (E,) learned from that number on: 0 starts as a ViT.
        bias: Biases in the feed-forward part.
        drop: Dropout of the feed-forward part.
        act_layer: Activation of the feed-forward part.
        norm_layer: Norm between activation and second projection, as in timm's ``Mlp``; the paper has none.

    Raises:
        ValueError: For an argument out of range, and for a rule that does not go with the scope.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        num_slots: int = 32,
        slot_dim: int = 32,
        write_heads: int = 8,
        bottleneck: int = 512,
        beta: float = 1.0,
        memory_decay: float = 0.9,
        balance_weight: float = 0.01,
        retrieval_steps: int = 1,
        write_mode: str = 'train',
        write_grad: bool = True,
        write_rule: str = 'published',
        write_scope: str = 'batch',
        retrieval_scale: float | None = None,
        bias: bool = True,
        drop: float = 0.0,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_limits(locals())
        dd = {'device': device, 'dtype': dtype}
        super().__init__(num_slots, slot_dim, balance_weight, write_mode, write_rule, write_scope, **dd)
        self.in_features, self.write_heads, self.bottleneck = in_features, write_heads, bottleneck
        self.memory_decay, self.write_grad, self.retrieval_scale = memory_decay, write_grad, retrieval_scale
        if self.is_additive() and write_scope != 'image':
            raise ValueError(f"write_rule={write_rule!r} needs write_scope='image', got {write_scope!r}; give both")
        hidden_features = hidden_features or in_features

        # feed-forward part, normalised on its output
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias, **dd)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.hidden_norm = norm_layer(hidden_features, **dd) if norm_layer is not None else nn.Identity()
        self.fc2 = nn.Linear(hidden_features, in_features, bias=bias, **dd)
        self.norm = OutputNorm(in_features, **dd)
        self.drop2 = nn.Dropout(drop)
        # bottleneck write: W_Q, W_K, W_V, W_O and the norm of the new memory
        self.query = nn.Linear(slot_dim, write_heads * slot_dim, bias=False, **dd)
        self.key = nn.Linear(in_features, write_heads * slot_dim, bias=False, **dd)
        self.value = nn.Linear(in_features, write_heads * slot_dim, bias=False, **dd)
        self.proj = nn.Linear(write_heads * slot_dim, slot_dim, bias=False, **dd)
        self.write_norm = nn.LayerNorm(slot_dim, eps=1e-6, **dd)
        # linear transform W_LT from the width of a slot to the width of a token, and Hopfield retrieval
        self.linear_transform = nn.Linear(slot_dim, in_features, **dd)
        self.retrieval = HopfieldRetrieval(beta, retrieval_steps)
        has_gain = retrieval_scale is not None or write_rule != 'published'
        self.scale = nn.Parameter(torch.empty(in_features, **dd)) if has_gain else None

        self.reset_parameters()
        self.freeze_untrained()

    @property
    def beta(self) -> float:
        """Inverse temperature of the retrieval; set ``retrieval.beta`` to change it."""
        return self.retrieval.beta

    @property
    def retrieval_steps(self) -> int:
        """Hopfield updates per token; set ``retrieval.steps`` to change it."""
        return self.retrieval.steps

    __jit_unused_properties__ = ('beta', 'retrieval_steps')

    def forward(self, x: Tensor) -> Tensor:
        """Write the tokens ``x`` (B, N, E) into the memory where the mode says so, and retrieve from it: (B, N, E)."""
        if torch.jit.is_scripting():  # TorchScript is for deployment: the memory stays as it is
            f = self.feed_forward(x)
            h = self.norm(f)
            return self.read(f, h, self.copy_memory(h) if self.has_copies() else self.slots())
        elif not self.is_writing():
            is_saved = self.has_copies() and torch.is_grad_enabled() and not torch.compiler.is_compiling()
            memory = self.memory.clone() if is_saved else self.memory  # a write may follow before the backward pass
            return self.look_up(x, memory)
        elif is_backward_running():
            return self.step(x, self.replay.memory_before(x))[0]
        else:
            x_new, write = self.step(x, snapshot(self.memory))
            self.store(write, x)
            return x_new

    def step(self, x: Tensor, memory: Tensor) -> tuple[Tensor, MemoryWrite]:
        """The layer as a function of tokens (B, N, E) and memory (M, D), without side effect: new tokens and the write.

        Gradient checkpointing runs it a second time, with the same memory.
        """
        f = self.feed_forward(x)
        h = self.norm(f)
        write = self.write(h if self.has_copies() else squash(h), memory)
        memory = write.memory
        if write.balance_loss.requires_grad and self.adds_balance_loss():
            memory = attach(memory, write.balance_loss, self)
        return self.read(f, h, memory), write

    def look_up(self, x: Tensor, memory: Tensor) -> Tensor:
        """The layer where it stores nothing, as a function of tokens (B, N, E) and memory (M, D): (B, N, E)."""
        f = self.feed_forward(x)
        h = self.norm(f)
        return self.read(f, h, self.write(h, memory).memory if self.has_copies() else self.slots(memory))

    def feed_forward(self, x: Tensor) -> Tensor:
        """``f = W2 GELU(W1 x)``, and ``h`` is its norm: (B, N, E) -> (B, N, E)."""
        return self.drop2(self.fc2(self.hidden_norm(self.drop1(self.act(self.fc1(x))))))

    def write(self, h: Tensor, memory: Tensor) -> MemoryWrite:
        """Bottleneck write of the tokens ``h`` into ``memory`` (M, D): (B*N, E) as one batch, or (B, N, E) by image."""
        if self.has_copies() and h.ndim != 3:
            raise ValueError(
                "write_scope='image' needs the tokens of each image, shape (B, N, E), got "
                f"{tuple(h.shape)}; give them so, or take write_scope='batch'"
            )
        keys, values = self.keys_and_values(h)
        with without_autocast(h):  # selection, softmax and average stay in float32; the logits, where `top_logits` can
            selection = self.select(memory, h, keys)
            if self.balance_weight > 0 and self.is_writing():
                loss = self.balance_weight * load_balance_loss(selection, num_tokens=h.shape[-2])
            else:
                loss = selection.gates.new_zeros(())
            # NOTE the authors' write gets no gradient of the task: write_grad=False.
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.write_grad):
                heads = self.attend(selection, h, values)
                new = self.update(memory, heads)
        return MemoryWrite(new, loss, memory, heads.detach(), selection.lse)

    def keys_and_values(self, h: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values (..., T, S*D) of the tokens; None where W_K and W_V can be folded into other products."""
        keys = None if is_plain(self.query, self.key) else self.key(h)
        return keys, None if is_plain(self.value) else self.value(h)

    def select(self, memory: Tensor, h: Tensor, keys: Tensor | None = None) -> Selection:
        """Let every slot of every head attend to the k tokens that it scores highest (section 3.2).

        Args:
            memory: (M, D), float32 or wider.
            h: (..., T, E), the tokens that compete.
            keys: (..., T, S*D), or None to fold W_K into the queries.

        Returns:
            The k tokens of each slot; for images the gates of all their tokens.
        """
        S, M, k = self.write_heads, len(memory), min(self.bottleneck, h.shape[-2])
        tokens = None
        if keys is not None:
            queries = call_wide(self.query, self.address(memory))
            queries = queries.unflatten(-1, (S, -1)).transpose(0, 1)  # (M, S*D) -> (S, M, D)
            keys = keys.to(memory.dtype).unflatten(-1, (S, -1)).movedim(-3, -1)  # (..., T, S*D) -> (..., S, D, T)
            logits = queries @ keys / math.sqrt(self.slot_dim)  # (..., S, M, T)
        elif h.ndim == 3:
            queries = self.fold_queries(memory).flatten(0, 1)  # (S, M, E) -> (S*M, E)
            logits = torch.matmul(queries, h.to(queries.dtype).transpose(1, 2))  # (B, S*M, N)
            logits = logits.unflatten(1, (S, M))
        else:
            queries = self.fold_queries(memory).flatten(0, 1)
            logits, tokens = (x.unflatten(0, (S, M)) for x in top_logits(queries, h, k))  # (S, M, k)
        if h.ndim == 3:
            return top_gates(self.compete(logits), k)
        if tokens is None:
            logits, tokens = logits.topk(k, dim=-1, sorted=False)
        return Selection(logits.softmax(dim=-1), tokens, logits.detach().logsumexp(dim=-1))

    def fold_queries(self, memory: Tensor) -> Tensor:
        """Queries that score tokens without their keys, ``q (W_K h) = (W_K^T q) h``: (M, D) -> (S, M, E)."""
        S, D = self.write_heads, self.slot_dim
        queries = F.linear(self.address(memory), self.query.weight.to(memory.dtype))
        queries = queries.unflatten(-1, (S, D))  # (M, S*D) -> (M, S, D)
        keys = self.key.weight.to(memory.dtype).unflatten(0, (S, D))  # (S*D, E) -> (S, D, E)
        return torch.matmul(queries.transpose(0, 1) / math.sqrt(D), keys)

    def address(self, memory: Tensor) -> Tensor:
        """The slots (M, D) as W_Q reads them.

        Rows of length 1 give logits with a standard deviation of 0.06 at the start: all slots of an image read its mean
        token, and training does not part them. The rule 'additive' makes it 1: the norm brings a row's elements to unit
        variance. W_Q and W_K, as PyTorch initialises them, each divide the variance by 3, and the 3 makes up for both.
        """
        return 3 * rms_norm(memory) if self.is_additive() else memory

    def compete(self, logits: Tensor) -> Tensor:
        """The logits (B, S, M, N) by which each slot selects and weighs the tokens of its image.

        With ``write_rule='competing'`` they are logarithms of shares: the slots of a head share each token by a softmax
        over slots, as in slot attention (Locatello et al., arXiv:2006.15055).
        """
        return logits.log_softmax(dim=-2) if self.write_rule == 'competing' else logits

    def attend(self, selection: Selection, h: Tensor, values: Tensor | None = None) -> Tensor:
        """What each head reads for each slot, ``sum_j g_j W_V h_j = W_V sum_j g_j h_j``.

        Args:
            selection: (..., S, M, k).
            h: (..., T, E).
            values: (..., T, S*D), or None to apply W_V here: to the sums of a batch's tokens, which are few, and to all
                tokens of images, whose sums would be larger than their values.

        Returns:
            (..., S, M, D).
        """
        gates, tokens, _ = selection
        if h.ndim == 3:
            values = call_wide(self.value, h) if values is None else values
            values = values.unflatten(-1, (self.write_heads, -1)).transpose(1, 2)  # (B, N, S*D) -> (B, S, N, D)
            return torch.matmul(dense_gates(selection, h.shape[1]).to(values.dtype), values).to(gates.dtype)
        assert tokens is not None, 'select() must name the tokens that the slots of a batch take'
        S, M, _ = gates.shape
        weights, tokens = gates.flatten(0, 1), tokens.flatten(0, 1)  # (S, M, k) -> (S*M, k)
        if values is not None:  # the tokens of head s stand in rows s*T to (s+1)*T of one table
            table = values.to(gates.dtype).unflatten(-1, (S, -1)).transpose(0, 1).flatten(0, 1)  # (S*T, D)
            rows = tokens + len(h) * torch.arange(S, device=h.device).repeat_interleave(M).unsqueeze(-1)
            return gather(weights, rows, table).unflatten(0, (S, M))  # (S*M, D) -> (S, M, D)
        sums = gather(weights.to(h.dtype), tokens, h).to(gates.dtype).unflatten(0, (S, M))  # (S*M, E) -> (S, M, E)
        weight = self.value.weight.to(gates.dtype).unflatten(0, (S, -1))  # (S*D, E) -> (S, D, E)
        return torch.matmul(sums, weight.transpose(1, 2))

    def update(self, memory: Tensor, heads: Tensor) -> Tensor:
        """Explicit memory: ``gamma <- normalise(decay gamma + (1 - decay) LN(W_O heads + gamma))``.

        With ``write_rule='distinct'`` the heads are first centred over the slots, the LayerNorm's rows get unit length,
        and the new slots are orthogonalised. Without the first, all slots receive the mean token and become one point.
        Without the second, a row of length sqrt(D) replaces 39 % of a slot of length 1, not 10 % as ``memory_decay``
        says. Without the third, training leaves a few directions for all slots.

        With 'additive' and 'competing' it is ``gamma + W_O heads`` alone: a norm would take away how much was read.

        Args:
            memory: (M, D) old memory.
            heads: (..., S, M, D) what the heads have read.

        Returns:
            (..., M, D) new memory, of unit rows with the first two rules; the old one where ``heads`` is not finite.
        """
        heads = self._centre(heads)
        # NOTE the authors concatenate the heads interleaved, (D, S); here W_O reads (S, D), as multi-head
        # attention does elsewhere. `convert.py` permutes their columns. They also drop out a tenth of W_O's output; the
        # ranks of a distributed training would then have memories that differ.
        new = call_wide(self.proj, heads.transpose(-3, -2).flatten(-2)) + memory  # (..., M, S*D) -> (..., M, D)
        if not self.is_additive():
            new = self._average(memory, call_wide(self.write_norm, new))
        total = new.detach().sum(dim=(-2, -1), keepdim=True)
        return torch.where(total - total == 0, new, memory)  # as isfinite(), which takes four operations and not two

    def _centre(self, heads: Tensor) -> Tensor:
        """Remove from ``heads`` (..., S, M, D) what all slots read alike, where the rule says so."""
        if self.write_rule != 'distinct' or self.num_slots == 1:
            return heads
        return heads - heads.mean(dim=-2, keepdim=True)

    def _average(self, memory: Tensor, update: Tensor) -> Tensor:
        """Moving average of the memory (M, D) and ``update`` (..., M, D), with unit rows."""
        if self.write_rule == 'distinct':
            update = unit_rows(update)
        new = unit_rows(torch.lerp(memory.expand_as(update), update, 1 - self.memory_decay))
        return orthogonalise(new) if self.write_rule == 'distinct' else new

    def copy_memory(self, h: Tensor) -> Tensor:
        """The copies (B, M, D) that the images of the tokens ``h`` (B, N, E) write: :meth:`write` for TorchScript."""
        S, memory = self.write_heads, self.memory.to(h.dtype)
        queries = self.query(self.address(memory)).unflatten(-1, (S, -1)).transpose(0, 1)  # (M, S*D) -> (S, M, D)
        keys = self.key(h).unflatten(-1, (S, -1)).permute(0, 2, 3, 1)  # (B, N, S*D) -> (B, S, D, N)
        values = self.value(h).unflatten(-1, (S, -1)).transpose(1, 2)  # (B, N, S*D) -> (B, S, N, D)
        logits = torch.matmul(queries, keys) / math.sqrt(self.slot_dim)
        gates = top_gates(self.compete(logits), min(self.bottleneck, h.shape[1])).gates  # (B, S, M, N)
        heads = self._centre(torch.matmul(gates, values))  # (B, S, M, D)
        new = self.proj(heads.transpose(1, 2).flatten(2)) + memory  # (B, M, S*D) -> (B, M, D)
        return new if self.is_additive() else self._average(memory, self.write_norm(new))

    def slots(self, memory: Tensor | None = None) -> Tensor:
        """The memory (M, D), by default that of the layer, as it is read: rows of unit length, whatever is stored.

        A write leaves such rows. The first random memory has others, and so has a mean of several (weight averaging).
        """
        # NOTE the authors read what is stored: random rows until the first write.
        return F.normalize(self.memory if memory is None else memory, dim=-1)

    def read(self, f: Tensor, h: Tensor, memory: Tensor) -> Tensor:
        """Retrieve from the slots (..., M, D): ``h + r``, or ``f + scale * r`` on top of a ViT's path, (B, N, E)."""
        base = h if self.retrieval_scale is None else f
        # By keyword: a positional parameter stops torch's counter of FLOPs where there are no gradients.
        return self.retrieval(base, h, self.attractors(memory, h.dtype), scale=self.scale)

    def attractors(self, memory: Tensor, dtype: torch.dtype) -> Tensor:
        """Linear transform ``a = W_LT gamma + b``: (..., M, D) -> (..., M, E), computed in ``dtype``."""
        return self.linear_transform(memory.to(dtype))

    def fuse(self) -> nn.Module:
        """The layer for evaluation alone; timm's ``reparameterize_model`` puts it in the place of this one.

        A layer whose images write copies in evaluation stays as it is, and so does one of a class that reads in another
        way.

        Raises:
            ValueError: If the layer changes its memory in evaluation too.
        """
        if self.write_mode == 'always':
            raise ValueError(
                'a workspace that writes in evaluation cannot be fused or scripted, '
                "got write_mode='always'; take 'train'"
            )
        if self.has_copies() or self.overrides('forward', 'look_up', 'feed_forward', 'slots', 'read', 'attractors'):
            return self
        return FusedWorkspace(self)

    def overrides(self, *methods: str) -> bool:
        """Whether the class of this layer has one of these methods of its own."""
        return any(getattr(type(self), name) is not getattr(GlobalWorkspace, name) for name in methods)

    def reset_parameters(self) -> None:
        """Start from the first memory, and from the initial scale."""
        self.reset_memory()
        if self.scale is not None:
            nn.init.constant_(self.scale, 1.0 if self.retrieval_scale is None else self.retrieval_scale)

    def init_weights(self) -> None:
        """Initialise what the paper adds to a feed-forward layer as the authors do: by PyTorch's defaults.

        timm's initialisation calls this after it has initialised the layers inside.
        """
        for layer in (self.query, self.key, self.value, self.proj, self.write_norm, self.linear_transform):
            layer.reset_parameters()
        self.reset_parameters()

    def freeze_untrained(self) -> None:
        """Freeze the parameters that no gradient can reach, or DistributedDataParallel waits for them for ever.

        A new layer has done so. Call it again after something has unfrozen all parameters, as ``timm.utils.unfreeze``.
        """
        trains_gates = self.write_grad or self.balance_weight > 0
        trained = {
            self.query: trains_gates,
            self.key: trains_gates,
            self.value: self.write_grad,
            self.proj: self.write_grad,
            self.write_norm: self.write_grad and not self.is_additive(),
        }
        for layer, is_trained in trained.items():
            if not is_trained or self.write_mode == 'never':
                layer.requires_grad_(False)

    def extra_repr(self) -> str:
        return (
            f'slots=({self.num_slots}, {self.slot_dim}), write_heads={self.write_heads}, bottleneck={self.bottleneck}, '
            f'memory_decay={self.memory_decay:g}, balance_weight={self.balance_weight:g}, '
            f'write_mode={self.write_mode!r}, write_grad={self.write_grad}, write_rule={self.write_rule!r}, '
            f'write_scope={self.write_scope!r}, retrieval_scale={self.retrieval_scale}'
        )

"""The global workspace layer of the Associative Transformer.

Sun, Ochiai, Wu, Lin, Kanai. *Associative Transformer*, CVPR 2025, https://arxiv.org/abs/2309.12862

Symbols, as in the paper: B images of N tokens of width E; a memory ``gamma`` of M slots of width D << E;
S write heads; a bottleneck of k tokens a slot. Where a line differs from the authors' published code
(https://github.com/yuweisunn/associative-transformer) a NOTE says why.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fused import FusedWorkspace
from .hopfield import hopfield_retrieval
from .norm import OutputNorm, without_autocast
from .selection import gather, top_logits

__all__ = ['GlobalWorkspace', 'MemoryWrite', 'balance_loss', 'bottleneck', 'squash']

WRITE_MODES = ('train', 'always', 'never')


class MemoryWrite(NamedTuple):
    """What one batch does to the memory.

    Attributes:
        memory: (M, D) the memory after the write; its graph is cut unless ``write_grad``.
        balance_loss: () the weighted balance loss of this write, differentiable.
        before: (M, D) the memory before the write.
        message: (S, M, D) what each head has read for each slot, without graph; NaN where a token is not finite.
        log_mass: (S, M) log of the summed exponentials behind ``message``: its weight beside other ranks' messages.
    """

    memory: Tensor
    balance_loss: Tensor
    before: Tensor
    message: Tensor
    log_mass: Tensor


def squash(h: Tensor) -> Tensor:
    """Let the tokens of all images of the batch compete: (B, N, E) -> (B*N, E) (section 3.2)."""
    return h.flatten(0, -2)


def bottleneck(queries: Tensor, h: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Let every slot of every head attend to the k tokens it scores highest (section 3.2).

    Args:
        queries: (S, M, E), float32 or wider.
        h: (T, E), the tokens of the whole batch.
        k: Cut to T where it is larger.

    Returns:
        gates (S, M, k), selected tokens (S, M, k), log of the gates' normaliser (S, M).
    """
    logits, selected = top_logits(queries.flatten(0, 1), h, min(k, len(h)))  # (S, M, E) -> (S*M, E)
    S, M, _ = queries.shape
    gates, log_mass = logits.softmax(dim=-1), logits.detach().logsumexp(dim=-1)
    return gates.unflatten(0, (S, M)), selected.unflatten(0, (S, M)), log_mass.unflatten(0, (S, M))


def balance_loss(gates: Tensor, selected: Tensor, num_tokens: int) -> Tensor:
    """Squared coefficients of variation of the tokens' importance and load, summed over heads (section 3.2).

    ``importance_j = sum_m g_mj`` and ``load_j = #{m : g_mj > 0}``; the load has no gradient.

    Args:
        gates: (S, M, k) attention of each slot over the tokens it selected.
        selected: (S, M, k) which tokens these are, in [0, num_tokens).
        num_tokens: T, tokens in the batch.

    Returns:
        (), zero where there is one token only.
    """
    if num_tokens == 1:
        return gates.new_zeros(())

    def per_token(share: Tensor) -> Tensor:  # (S, M, k) -> (S, T), never (S, M, T)
        return share.new_zeros(share.shape[0], num_tokens).scatter_add(1, selected.flatten(1), share.flatten(1))

    def cv_squared(x: Tensor) -> Tensor:
        return x.var(dim=-1) / (x.mean(dim=-1).square() + 1e-10)

    return (cv_squared(per_token(gates)) + cv_squared(per_token((gates > 0).to(gates.dtype)))).sum()


class GlobalWorkspace(nn.Module):
    """Feed-forward layer of an Associative Transformer block; a drop-in for timm's ``Mlp``.

    With ``h = LN(W2 GELU(W1 x))`` the layer returns ``h + r``: tokens write into the memory through top-k attention,
    and ``r = softmax(beta h a^T) a`` reads, for every token, the attractors ``a = W_LT gamma + b`` back.

    The state is one buffer, ``memory`` (M, D), float32 or wider whatever the dtype of the model. It is only ever
    written by :meth:`commit`, and read as rows of unit length.

    Args:
        in_features: E.
        hidden_features: Width of the feed-forward part, E by default.
        num_slots: M.
        slot_dim: D.
        write_heads: S.
        bottleneck: k, tokens a slot may read per head; more than there are means all.
        beta: Inverse temperature of the retrieval.
        memory_decay: Share of the old memory that a write keeps.
        balance_weight: Weight of the balance loss; 0 computes none.
        retrieval_steps: Hopfield updates per token.
        write_mode: 'train' writes in training mode only, 'always' in evaluation too (as the authors do), 'never' not
            at all.
        write_grad: Whether the task's gradient reaches the write through this batch's retrieval. Parameters that can
            get no gradient are frozen.
        retrieval_scale: None returns ``h + r`` as the paper does. A number returns ``f + scale * r``, with ``f`` the
            feed-forward output before its norm and ``scale`` (E,) learned from that number on: 0 starts as a ViT.
        bias: Biases in the feed-forward part.
        drop: Dropout of the feed-forward part.
        act_layer: Activation of the feed-forward part.
        norm_layer: Norm between activation and second projection, as in timm's ``Mlp``; the paper has none.

    Raises:
        ValueError: For an argument out of range.
    """

    memory: Tensor

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
        retrieval_scale: float | None = None,
        bias: bool = True,
        drop: float = 0.0,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _check_arguments(
            num_slots,
            slot_dim,
            write_heads,
            bottleneck,
            beta,
            memory_decay,
            balance_weight,
            retrieval_steps,
            write_mode,
        )
        dd = {'device': device, 'dtype': dtype}
        hidden_features = hidden_features or in_features
        self.in_features = in_features
        self.num_slots, self.slot_dim, self.write_heads = num_slots, slot_dim, write_heads
        self.bottleneck = bottleneck
        self.beta = float(beta)
        self.memory_decay = float(memory_decay)
        self.balance_weight = float(balance_weight)
        self.retrieval_steps = retrieval_steps
        self.write_mode = write_mode
        self.write_grad = write_grad

        # 1. feed-forward, normalised on its output
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias, **dd)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.hidden_norm = norm_layer(hidden_features, **dd) if norm_layer is not None else nn.Identity()
        self.fc2 = nn.Linear(hidden_features, in_features, bias=bias, **dd)
        self.norm = OutputNorm(in_features, **dd)
        self.drop2 = nn.Dropout(drop)
        # 3. bottleneck write: W_Q, W_K, W_V, W_O and the norm of the new memory
        self.query = nn.Linear(slot_dim, write_heads * slot_dim, bias=False, **dd)
        self.key = nn.Linear(in_features, write_heads * slot_dim, bias=False, **dd)
        self.value = nn.Linear(in_features, write_heads * slot_dim, bias=False, **dd)
        self.proj = nn.Linear(write_heads * slot_dim, slot_dim, bias=False, **dd)
        self.write_norm = nn.LayerNorm(slot_dim, eps=1e-6, **dd)
        # 4. explicit memory
        memory_dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.register_buffer('memory', torch.empty(num_slots, slot_dim, device=device, dtype=memory_dtype))
        # 5. linear transform W_LT, from the width of a slot to that of a token
        self.lift = nn.Linear(slot_dim, in_features, **dd)
        # 7. sum
        self.retrieval_scale = retrieval_scale
        self.scale = None if retrieval_scale is None else nn.Parameter(torch.empty(in_features, **dd))

        self.last_write: MemoryWrite | None = None
        self.reset_parameters()
        self._freeze_untrained()

    def forward(self, x: Tensor) -> Tensor:
        """Write the tokens ``x`` (B, N, E) into the memory where the mode says so, and read it: (B, N, E)."""
        if torch.jit.is_scripting() or not self.is_writing():  # TorchScript is for deployment: it reads only
            f = self.feed_forward(x)
            return self.read(f, self.norm(f), self.memory)
        x, write = self.step(x, self.memory.clone())
        self.commit(write)
        return x

    @torch.jit.unused
    def step(self, x: Tensor, memory: Tensor, is_checkpointed: bool = False) -> tuple[Tensor, MemoryWrite]:
        """The layer as a function of tokens and memory, without side effect.

        Args:
            x: (B, N, E).
            memory: (M, D), before the write.
            is_checkpointed: Whether gradient checkpointing runs it, a second time for the backward pass with the same
                memory, and so decides what is kept.

        Returns:
            The tokens (B, N, E) and the write.
        """
        f = self.feed_forward(x)
        h = self.norm(f)
        with nullcontext() if is_checkpointed else self.norm.rebuilt(f, h):
            write = self.write(squash(h), memory)
            return self.read(f, h, write.memory), write

    def feed_forward(self, x: Tensor) -> Tensor:
        """``f = W2 GELU(W1 x)``, whose norm ``h`` reads and writes: (B, N, E) -> (B, N, E)."""
        return self.drop2(self.fc2(self.hidden_norm(self.drop1(self.act(self.fc1(x))))))

    @torch.jit.unused
    def write(self, h: Tensor, memory: Tensor) -> MemoryWrite:
        """Bottleneck write of the squashed tokens ``h`` (T, E) into ``memory`` (M, D)."""
        with without_autocast(h):  # softmax and EWMA stay in float32, selection too but for what `top_logits` says
            gates, selected, log_mass = bottleneck(self.fold_queries(memory), h, self.bottleneck)
            loss = gates.new_zeros(())
            if self.balance_weight > 0:
                loss = self.balance_weight * balance_loss(gates, selected, num_tokens=len(h))
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.write_grad):
                message = self.message(gates, selected, h)
                is_finite = message.detach().sum().isfinite()
                message = message.where(is_finite, torch.nan)
                new = self.ewma(memory, message)
        return MemoryWrite(new, loss, memory, message.detach(), log_mass.where(is_finite, -torch.inf))

    @torch.jit.unused
    def fold_queries(self, memory: Tensor) -> Tensor:
        """Queries that score tokens without their keys, ``q (W_K h) = (W_K^T q) h``: (M, D) -> (S, M, E)."""
        S, D = self.write_heads, self.slot_dim
        queries = F.linear(memory, self.query.weight.to(memory.dtype)).unflatten(-1, (S, D))  # (M, S*D) -> (M, S, D)
        keys = self.key.weight.to(memory.dtype).unflatten(0, (S, D))  # (S*D, E) -> (S, D, E)
        return torch.matmul(queries.transpose(0, 1) / math.sqrt(D), keys)

    @torch.jit.unused
    def message(self, gates: Tensor, selected: Tensor, h: Tensor) -> Tensor:
        """What each head reads for each slot, ``sum_j g_j W_V h_j = W_V sum_j g_j h_j``.

        Args:
            gates: (S, M, k).
            selected: (S, M, k).
            h: (T, E).

        Returns:
            (S, M, D).
        """
        S, M, _ = gates.shape
        read = gather(gates.flatten(0, 1).to(h.dtype), selected.flatten(0, 1), h)  # (S, M, k) -> (S*M, k) -> (S*M, E)
        values = self.value.weight.to(gates.dtype).unflatten(0, (S, -1))  # (S*D, E) -> (S, D, E)
        return torch.matmul(read.to(gates.dtype).unflatten(0, (S, M)), values.transpose(1, 2))

    @torch.jit.unused
    def ewma(self, memory: Tensor, message: Tensor) -> Tensor:
        """Explicit memory: ``gamma <- normalise(decay gamma + (1 - decay) LN(W_O message + gamma))``.

        Args:
            memory: (M, D) old memory.
            message: (S, M, D) what the heads have read.

        Returns:
            (M, D) new memory of unit rows; the old one where the message is not finite.
        """
        # NOTE the authors concatenate the heads interleaved, (D, S); here W_O reads (S, D), as multi-head
        # attention does elsewhere. `convert.py` permutes their columns.
        update = F.linear(message.transpose(0, 1).flatten(1), self.proj.weight.to(memory.dtype))  # (M, S*D) -> (M, D)
        weight, bias = self.write_norm.weight.to(memory.dtype), self.write_norm.bias.to(memory.dtype)
        update = F.layer_norm(update + memory, (self.slot_dim,), weight, bias, self.write_norm.eps)
        new = F.normalize(torch.lerp(memory, update, 1 - self.memory_decay), dim=-1)
        return torch.where(new.detach().sum().isfinite(), new, memory)

    def read(self, f: Tensor, h: Tensor, memory: Tensor) -> Tensor:
        """Retrieve from the memory (M, D): ``h + r``, or ``f + scale * r`` on top of a ViT's path, (B, N, E)."""
        base = h if self.scale is None else f
        return hopfield_retrieval(base, h, self.attractors(memory), self.beta, self.retrieval_steps, self.scale)

    def attractors(self, memory: Tensor) -> Tensor:
        """Linear transform ``a = W_LT gamma + b``: (M, D) -> (M, E)."""
        # Rows of unit length whatever was stored: a first random memory, or the mean of several (weight averaging).
        return self.lift(F.normalize(memory, dim=-1).to(self.lift.weight.dtype))

    @torch.jit.ignore
    def fuse(self) -> 'FusedWorkspace':
        """The layer for evaluation alone; timm's ``reparameterize_model`` puts it in the place of this one.

        Raises:
            ValueError: If the layer writes in evaluation too.
        """
        return FusedWorkspace(self)

    @torch.jit.unused
    def commit(self, write: MemoryWrite) -> None:
        """Store what a write has left; the only place where the memory changes."""
        with torch.no_grad():
            self.memory.copy_(write.memory)
        self.last_write = write

    @torch.jit.unused
    def rewrite(self, message: Tensor) -> None:
        """Replace the message (S, M, D) of the last write, by that of all ranks."""
        if self.last_write is not None:
            self.commit(self.last_write._replace(memory=self.ewma(self.last_write.before, message)))

    @torch.jit.unused
    def is_writing(self) -> bool:
        """Whether a forward would write, in the present mode."""
        return self.write_mode == 'always' or (self.training and self.write_mode == 'train')

    @torch.jit.unused
    def balance_loss(self) -> Tensor:
        """Balance loss () of the last write, weighted and differentiable; zero where there was none."""
        if self.last_write is None:
            return self.memory.new_zeros(())
        return self.last_write.balance_loss

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Start from random slots N(0, 1) as the authors do, of unit length only when read, and the initial scale."""
        nn.init.normal_(self.memory)
        if self.scale is not None:
            nn.init.constant_(self.scale, self.retrieval_scale or 0.0)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise what the paper adds to a feed-forward layer as the authors do: by PyTorch's defaults.

        timm's initialisation calls this after that of the layers inside.
        """
        for layer in (self.query, self.key, self.value, self.proj, self.write_norm, self.lift):
            layer.reset_parameters()
        self.reset_parameters()

    def _freeze_untrained(self) -> None:
        """Freeze the parameters that no gradient can reach, or DistributedDataParallel waits for them for ever."""
        reads_gates = self.write_grad or self.balance_weight > 0
        trained = {
            self.query: reads_gates,
            self.key: reads_gates,
            self.value: self.write_grad,
            self.proj: self.write_grad,
            self.write_norm: self.write_grad,
        }
        for layer, is_trained in trained.items():
            layer.requires_grad_(is_trained and self.write_mode != 'never')

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'GlobalWorkspace':
        """Move or cast the module, but never narrow the memory below float32: its moves are a tenth of a step."""
        kept = self.memory
        super()._apply(fn, recurse)
        if self.memory.dtype in (torch.float16, torch.bfloat16):
            self.memory = kept.to(self.memory.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, 'last_write': None}  # its graph belongs to the step, not to the module

    def extra_repr(self) -> str:
        return (
            f'slots=({self.num_slots}, {self.slot_dim}), write_heads={self.write_heads}, bottleneck={self.bottleneck}, '
            f'beta={self.beta:g}, memory_decay={self.memory_decay:g}, balance_weight={self.balance_weight:g}, '
            f'retrieval_steps={self.retrieval_steps}, write_mode={self.write_mode!r}, write_grad={self.write_grad}'
        )


def _check_arguments(
    num_slots: int,
    slot_dim: int,
    write_heads: int,
    bottleneck: int,
    beta: float,
    memory_decay: float,
    balance_weight: float,
    retrieval_steps: int,
    write_mode: str,
) -> None:
    counts = {
        'num_slots': num_slots,
        'slot_dim': slot_dim,
        'write_heads': write_heads,
        'bottleneck': bottleneck,
        'retrieval_steps': retrieval_steps,
    }
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f'{name} must be an integer of at least 1, got {value!r}; leave it out for the default')
    if not (isinstance(beta, (int, float)) and 0 < beta < math.inf):
        raise ValueError(f'beta must be a finite number above 0, got {beta!r}; the paper uses 1.0')
    if not (isinstance(memory_decay, (int, float)) and 0 <= memory_decay <= 1):
        raise ValueError(f'memory_decay must lie in [0, 1], got {memory_decay!r}; the paper uses 0.9')
    if not (isinstance(balance_weight, (int, float)) and 0 <= balance_weight < math.inf):
        raise ValueError(
            f'balance_weight must be a finite number of at least 0, got {balance_weight!r}; 0 turns it off'
        )
    if write_mode not in WRITE_MODES:
        raise ValueError(f'write_mode must be one of {WRITE_MODES}, got {write_mode!r}')

"""Weights under the parameter names and in the layouts of the authors' code."""

from collections import OrderedDict

import torch
from torch import Tensor

from timm_ait import AssociativeTransformer


def as_authors(model: AssociativeTransformer) -> dict[str, Tensor]:
    """Save the weights of a model in the paper's layout as the authors' code would.

    It is written without the converter, which it tests.
    """
    own = model.state_dict()
    theirs: dict[str, Tensor] = OrderedDict()
    P, E = model.patch_embed.patch_size[0], model.embed_dim
    D, S = model.blocks[0].mlp.slot_dim, model.blocks[0].mlp.write_heads

    def take(name: str, key: str) -> None:
        theirs[name] = own.pop(key).clone()

    def pixels_last(x: Tensor) -> Tensor:  # (..., C*P*P) -> (..., P*P*C), pixel by pixel
        flat = x.reshape(-1, 3 * P * P)
        order = [c * P * P + i * P + j for i in range(P) for j in range(P) for c in range(3)]
        return flat[:, order].reshape(*x.shape[: x.ndim - 1], -1) if x.ndim < 4 else flat[:, order]

    for leaf in ('weight', 'bias'):
        theirs[f'to_patch_embedding.1.{leaf}'] = pixels_last(own.pop(f'patch_embed.patch_norm.{leaf}'))
        take(f'to_patch_embedding.3.{leaf}', f'patch_embed.norm.{leaf}')
        take(f'mlp_head.0.{leaf}', f'fc_norm.{leaf}')
        take(f'mlp_head.1.{leaf}', f'head.{leaf}')
    theirs['to_patch_embedding.2.weight'] = pixels_last(own.pop('patch_embed.proj.weight'))
    take('to_patch_embedding.2.bias', 'patch_embed.proj.bias')
    for i in range(len(model.blocks)):
        theirs_at, own_at = f'transformer.layers.{i}', f'blocks.{i}'
        take(f'{theirs_at}.0.fn.to_qkv.weight', f'{own_at}.attn.qkv.weight')
        for leaf in ('weight', 'bias'):
            take(f'{theirs_at}.0.norm.{leaf}', f'{own_at}.norm1.{leaf}')
            take(f'{theirs_at}.0.fn.to_out.0.{leaf}', f'{own_at}.attn.proj.{leaf}')
            take(f'{theirs_at}.1.norm.{leaf}', f'{own_at}.norm2.{leaf}')
            take(f'{theirs_at}.1.fn.fc1.{leaf}', f'{own_at}.mlp.fc1.{leaf}')
            take(f'{theirs_at}.1.fn.fc2.{leaf}', f'{own_at}.mlp.fc2.{leaf}')
            take(f'{theirs_at}.1.fn.fc3.{leaf}', f'{own_at}.mlp.linear_transform.{leaf}')
            take(f'{theirs_at}.1.fn.norm.{leaf}', f'{own_at}.mlp.norm.{leaf}')
            take(f'{theirs_at}.1.fn.memoryupdate.mha.layer_norm.{leaf}', f'{own_at}.mlp.write_norm.{leaf}')
        for theirs_leaf, leaf in (('w_qs', 'query'), ('w_ks', 'key'), ('w_vs', 'value')):
            take(f'{theirs_at}.1.fn.memoryupdate.mha.{theirs_leaf}.weight', f'{own_at}.mlp.{leaf}.weight')
        take(f'{theirs_at}.1.fn.memoryupdate.memory', f'{own_at}.mlp.memory')
        w_o = own.pop(f'{own_at}.mlp.proj.weight')
        interleaved = torch.stack([w_o[:, s * D + d] for d in range(D) for s in range(S)], dim=1)
        theirs[f'{theirs_at}.1.fn.memoryupdate.mha.fc.weight'] = interleaved
        theirs[f'{theirs_at}.1.fn.memoryupdate.beta'] = torch.tensor(0.9)
    assert not own, f'not in the table of this test: {sorted(own)}'
    theirs['cls_token'] = torch.zeros(1, 1, E)
    theirs['pos_embedding'] = torch.zeros(1, 10, E)
    theirs['to_patch_embedding_cnn.0.weight'] = torch.zeros(E, 3, 5, 5)
    theirs['to_patch_embedding_cnn.0.bias'] = torch.zeros(E)
    return theirs

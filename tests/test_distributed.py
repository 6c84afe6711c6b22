"""DistributedDataParallel on gloo processes: one memory, the right gradients, one collective."""

import os
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.multiprocessing as mp
import torch.nn.functional as F
from models import memories
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from timm_ait import AssociativeTransformer, distributed
from timm_ait.distributed import merge_heads
from timm_ait.layers import orthogonalise

B, CLASSES = 5, 7
Check = Callable[[int, int], None]
CHECKS: dict[str, Check] = {}


def on_every_rank(check: Check) -> Check:
    CHECKS[check.__name__] = check
    return check


def make_model(**kwargs: Any) -> AssociativeTransformer:
    torch.manual_seed(1)
    args = dict(num_classes=CLASSES, depth=2, embed_dim=16, num_heads=2, bottleneck=13, balance_weight=0.1)
    return timm.create_model('test_ait', **dict(args, **kwargs)).train()


def batch(seed: int, size: int = B) -> tuple[Tensor, Tensor]:
    source = generator(seed)
    return torch.randn(size, 3, 32, 32, generator=source), torch.randint(0, CLASSES, (size,), generator=source)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_task(model: AssociativeTransformer, **ddp: Any) -> tuple[ClassificationTask, torch.optim.Optimizer]:
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.1)
    return task.prepare_distributed(**ddp), optimizer


def step(task: ClassificationTask, optimizer: torch.optim.Optimizer, images: Tensor, target: Tensor) -> None:
    optimizer.zero_grad()
    task(images, target)['loss'].backward()
    optimizer.step()


def assert_same_on_all_ranks(tensors: list[Tensor]) -> None:
    flat = torch.cat([x.flatten() for x in tensors])
    ranks = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, flat)
    assert all(torch.equal(rank, ranks[0]) for rank in ranks)
    assert flat.isfinite().all()


@on_every_rank
def check_all_ranks_hold_one_memory_with_unequal_batches(rank: int, world: int) -> None:
    for broadcast_buffers in (True, False):
        model = make_model()
        task, optimizer = make_task(model, broadcast_buffers=broadcast_buffers)
        before = memories(model)
        for i, size in enumerate((B, B, 1 + rank)):  # the last batch differs from rank to rank
            step(task, optimizer, *batch(100 * rank + i, size))
            assert_same_on_all_ranks(memories(model))
            assert_same_on_all_ranks(list(model.parameters()))
        assert all(torch.allclose(m.norm(dim=-1), torch.ones(len(m))) for m in memories(model))
        assert not any(torch.equal(a, b) for a, b in zip(before, memories(model), strict=True))


@on_every_rank
def check_ranks_that_see_the_data_of_one_process_end_with_its_memory(rank: int, world: int) -> None:
    alone, shared = make_model(), make_model()
    for i in range(2):
        images, _ = batch(i)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, 'get_world_size', lambda *_: 1)
            alone(images)
        shared(images)
    for a, b in zip(memories(alone), memories(shared), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-6)


@on_every_rank
def check_a_batch_cut_over_the_ranks_writes_like_the_whole(rank: int, world: int) -> None:
    """Exact where no rank has to choose: k covers all tokens, and the first block sees the same tokens."""
    alone, shared = make_model(bottleneck=10**6), make_model(bottleneck=10**6)
    images, _ = batch(7, size=world * 3 + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, 'get_world_size', lambda *_: 1)
        alone(images)
    shared(images.tensor_split(world)[rank])  # unequal parts
    torch.testing.assert_close(memories(shared)[0], memories(alone)[0], rtol=0, atol=1e-6)


@on_every_rank
def check_gradients_are_those_of_the_explicit_sum_in_every_mode(rank: int, world: int) -> None:
    modes: list[dict[str, Any]] = [{}, {'static_graph': True}, {'find_unused_parameters': True}]
    for write_grad in (True, False):
        for mode in modes:
            expected = expected_gradients(make_model(write_grad=write_grad), rank, world)
            model = make_model(write_grad=write_grad)
            task, _ = make_task(model, **mode)
            for i in range(2):  # a static graph is known after the first step
                model.zero_grad()
                task(*batch(100 * rank + i))['loss'].backward()
                for name, p in model.named_parameters():
                    if p.requires_grad:
                        torch.testing.assert_close(
                            p.grad, expected[i][name], rtol=1e-4, atol=1e-6, msg=f'{mode} {name}'
                        )


def expected_gradients(model: AssociativeTransformer, rank: int, world: int) -> list[dict[str, Tensor]]:
    model.auto_balance = False
    steps = []
    for i in range(2):
        images, target = batch(100 * rank + i)
        model.zero_grad()
        (nn.CrossEntropyLoss()(model(images), target) + model.balance_loss()).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        for grad in grads.values():
            dist.all_reduce(grad)
            grad /= world
        steps.append(grads)
    return steps


@on_every_rank
def check_nan_on_one_rank_leaves_the_write_to_the_others(rank: int, world: int) -> None:
    for poison in (torch.nan, torch.inf):
        model, twin = make_model(depth=1), make_model(depth=1)
        images, _ = batch(100 * rank)
        if rank == 0:
            images[0, 0, 0, 0] = poison
        model(images)
        assert_same_on_all_ranks(memories(model))
        assert torch.allclose(memories(model)[0].norm(dim=-1), torch.ones(16))
        others = [batch(100 * other)[0] for other in range(1, world)]
        if world == 2:  # then what is left is one rank's own write
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dist, 'get_world_size', lambda *_: 1)
                twin(others[0])
            torch.testing.assert_close(memories(model), memories(twin), rtol=0, atol=1e-6)


@on_every_rank
def check_nan_on_all_ranks_keeps_the_memory(rank: int, world: int) -> None:
    model = make_model()
    before = memories(model)
    model(torch.full((2, 3, 32, 32), torch.nan))
    assert all(torch.equal(a, b) for a, b in zip(before, memories(model), strict=True))


@on_every_rank
def check_a_step_takes_one_collective_a_layer_and_evaluation_none(rank: int, world: int) -> None:
    calls = []
    gather = distributed.gather_single
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter('error')
        patch.setattr(
            distributed, 'gather_single', lambda out, x, group: (calls.append(x.numel()), gather(out, x, group))[1]
        )
        model = make_model(depth=3)
        model(batch(rank)[0])
        assert calls == 3 * [4 * 16 * (16 + 1)]  # S, M, D + 1
        model.eval()(batch(rank)[0])
        assert len(calls) == 3


@on_every_rank
def check_accumulation_and_checkpointing_keep_one_memory(rank: int, world: int) -> None:
    plain, checkpointed = make_model(), make_model()
    checkpointed.set_grad_checkpointing()
    for model in (plain, checkpointed):
        task, optimizer = make_task(model)
        with task.no_sync():
            (task(*batch(100 * rank))['loss'] / 2).backward()
        (task(*batch(100 * rank + 1))['loss'] / 2).backward()
        optimizer.step()
        assert_same_on_all_ranks(memories(model) + list(model.parameters()))
    for a, b in zip(plain.state_dict().values(), checkpointed.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@on_every_rank
def check_a_compiled_model_agrees_with_eager(rank: int, world: int) -> None:
    eager, compiled = make_model(), make_model()
    task = ClassificationTask(compiled, nn.CrossEntropyLoss(), verbose=False)
    task.compile(backend='aot_eager')
    task.prepare_distributed()
    other, _ = make_task(eager)
    for i in range(2):
        for t in (task, other):
            t(*batch(100 * rank + i))['loss'].backward()
    assert_same_on_all_ranks(memories(compiled))
    torch.testing.assert_close(memories(compiled), memories(eager), rtol=0, atol=1e-5)


def shard(model: AssociativeTransformer, is_by_block: bool, **options: Any) -> AssociativeTransformer:
    for block in model.blocks if is_by_block else ():
        fully_shard(block, **options)
    return fully_shard(model, **options)


def train(model: nn.Module, rank: int, steps: range) -> list[float]:
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for i in steps:
        images, target = batch(100 * rank + i)
        loss = nn.functional.cross_entropy(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@on_every_rank
def check_sharded_data_parallel_has_the_losses_and_the_memory_of_ddp(rank: int, world: int) -> None:
    reference = make_model()
    expected = train(DistributedDataParallel(reference), rank, range(3))
    for is_by_block in (False, True):
        for is_resharded in (False, True):
            for is_checkpointed in (False, True):
                model = make_model()
                model.set_grad_checkpointing(is_checkpointed)
                shard(model, is_by_block, reshard_after_forward=is_resharded)
                assert train(model, rank, range(3)) == pytest.approx(expected, rel=1e-4)
                assert_same_on_all_ranks(memories(model))
                torch.testing.assert_close(memories(model), memories(reference), rtol=0, atol=1e-5)


@on_every_rank
def check_the_logits_of_a_sharded_model_may_be_changed_in_place(rank: int, world: int) -> None:
    model = shard(make_model(), is_by_block=True, reshard_after_forward=True)
    images, target = batch(rank)
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # FSDP2 warns of an output that is a view
        logits = model(images)
    logits /= 2
    nn.functional.cross_entropy(logits, target).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@on_every_rank
def check_the_first_fully_sharded_data_parallel_has_the_losses_and_the_memory_of_ddp(rank: int, world: int) -> None:
    reference = make_model()
    expected = train(DistributedDataParallel(reference), rank, range(3))
    for keeps_parameters in (False, True):
        model = make_model()
        sharded = FullyShardedDataParallel(model, use_orig_params=keeps_parameters, device_id=torch.device('cpu'))
        assert train(sharded, rank, range(3)) == pytest.approx(expected, rel=1e-4)
        assert_same_on_all_ranks(memories(model))
        torch.testing.assert_close(memories(model), memories(reference), rtol=0, atol=1e-5)


@on_every_rank
def check_sharded_in_mixed_precision_the_memory_is_one_and_wide(rank: int, world: int) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(make_model(), True, mp_policy=policy)
    losses = train(model, rank, range(3))
    assert_same_on_all_ranks(memories(model))
    assert {memory.dtype for memory in memories(model)} == {torch.float32}
    assert losses == pytest.approx(train(DistributedDataParallel(make_model()), rank, range(3)), rel=0.05)


@on_every_rank
def check_a_sharded_run_goes_on_from_a_distributed_checkpoint(rank: int, world: int) -> None:
    whole = shard(make_model(), True)
    expected = train(whole, rank, range(4))
    folder = [tempfile.mkdtemp() if rank == 0 else '']
    dist.broadcast_object_list(folder)
    first = shard(make_model(), True)
    train(first, rank, range(2))
    torch.distributed.checkpoint.save(get_model_state_dict(first), checkpoint_id=folder[0])
    second = shard(make_model(), True)
    state = get_model_state_dict(second)
    torch.distributed.checkpoint.load(state, checkpoint_id=folder[0])
    set_model_state_dict(second, state)
    assert train(second, rank, range(2, 4)) == pytest.approx(expected[2:], rel=1e-5)
    torch.testing.assert_close(memories(second), memories(whole), rtol=0, atol=1e-6)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder[0])


@on_every_rank
def check_images_that_write_copies_move_one_memory_on_all_ranks(rank: int, world: int) -> None:
    images, _ = batch(7, size=world * 3 + 1)
    for rule in ('distinct', 'additive'):
        alone, shared = (make_model(write_scope='image', write_rule=rule) for _ in range(2))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, 'get_world_size', lambda *_: 1)
            whole = alone(images)
        part = shared(images.tensor_split(world)[rank])  # unequal parts
        torch.testing.assert_close(part, whole.tensor_split(world)[rank], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(memories(shared), memories(alone), rtol=0, atol=1e-5)


@on_every_rank
def check_any_output_keeps_one_memory_in_training_and_in_evaluation_that_writes(rank: int, world: int) -> None:
    outputs = [
        lambda model, x: model.forward_features(x),
        lambda model, x: model.forward_intermediates(x),
        lambda model, x: model.blocks(model.patch_embed(x)),
        lambda model, x: model.eval()(x),
    ]
    for output in outputs:
        model = make_model(write_mode='always')
        before = memories(model)
        output(model, batch(100 * rank)[0])
        assert_same_on_all_ranks(memories(model))
        assert not any(torch.equal(a, b) for a, b in zip(before, memories(model), strict=True))


@on_every_rank
def check_only_the_ranks_of_a_group_share_a_memory(rank: int, world: int) -> None:
    groups = [dist.new_group([i]) for i in range(world)]
    for kwargs in (dict(), dict(write_scope='image', write_rule='distinct')):
        layer = make_model(**kwargs).blocks[0].mlp
        before, x = layer.memory.clone(), torch.randn(3, 5, layer.in_features, generator=generator(rank))
        memory = layer.step(x, before)[1].memory
        layer.process_group = groups[rank]
        layer(x)
        if layer.has_copies():
            memory = orthogonalise(F.normalize(memory.sum(dim=0), dim=-1))
        torch.testing.assert_close(layer.memory, memory)


@on_every_rank
def check_pairs_of_ranks_have_a_memory_each(rank: int, world: int) -> None:
    pairs = [dist.new_group([i, i + 1]) for i in range(0, world, 2)]
    for kwargs in (dict(), dict(write_scope='image', write_rule='distinct')):
        layer = make_model(**kwargs).blocks[0].mlp
        layer.process_group = pairs[rank // 2]
        layer(torch.randn(3, 5, layer.in_features, generator=generator(rank)))
        found = [torch.empty_like(layer.memory) for _ in range(world)]
        dist.all_gather(found, layer.memory)
        for i in range(0, world, 2):
            assert torch.equal(found[i], found[i + 1])
            assert i == 0 or not torch.allclose(found[i], found[0])


@on_every_rank
def check_a_rank_without_images_leaves_the_write_to_the_others(rank: int, world: int) -> None:
    for kwargs in (dict(), dict(write_scope='image', write_rule='distinct')):
        alone, layer = (make_model(**kwargs).blocks[0].mlp for _ in range(2))
        alone.process_group = [dist.new_group([i]) for i in range(world)][rank]
        x = torch.randn(3, 5, layer.in_features, generator=generator(0))
        alone(x), layer(x if rank == 0 else x[:0])
        torch.testing.assert_close(layer.memory, alone.memory)
        assert_same_on_all_ranks([layer.memory])
        layer(x[:0])
        torch.testing.assert_close(layer.memory, alone.memory)
        assert layer.balance_loss() == 0


def run_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=world)
    for name, check in CHECKS.items():
        try:
            check(rank, world)
            report = 'passed'
        except Exception:
            report = traceback.format_exc()
        Path(folder, f'{name}.{rank}').write_text(report)
        if report != 'passed':
            os._exit(1)  # the other ranks would wait for ever
    dist.destroy_process_group()


@pytest.fixture(scope='module', params=[2, 4])
def reports(request: pytest.FixtureRequest) -> Iterator[tuple[int, Path]]:
    """Run all checks in one set of processes, since starting them costs more than the checks."""
    world = request.param
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(run_rank, (world, folder), nprocs=world, join=False, start_method='spawn')
        try:
            while not context.join(timeout=10):
                pass
        except (mp.ProcessExitedException, mp.ProcessRaisedException):
            pass  # the reports say why
        yield world, Path(folder)


@pytest.mark.parametrize('name', CHECKS)
def test_on_gloo(reports: tuple[int, Path], name: str) -> None:
    world, folder = reports
    for rank in range(world):
        file = folder / f'{name}.{rank}'
        assert file.exists(), 'an earlier check stopped the ranks'
        assert file.read_text() == 'passed', file.read_text()


def test_the_merged_heads_of_all_ranks_are_one_attention_over_all_tokens() -> None:
    """Hand-computed: masses 1 and 3 give shares 1/4 and 3/4; a rank without mass counts for nothing."""
    heads = torch.tensor([0.0, 4.0, torch.nan]).view(3, 1, 1, 1)
    lse = torch.tensor([1.0, 3.0, 0.0]).log().view(3, 1, 1)
    torch.testing.assert_close(merge_heads(heads, lse), torch.tensor([[[3.0]]]))
    assert merge_heads(heads[2:], lse[2:]).isnan().all()

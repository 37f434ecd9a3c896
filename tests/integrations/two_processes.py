"""A program for torchrun: each process trains models on rows of its own, fused and stock, in the way that the command
line names: by a recipe, or with blocks of the model sharded one by one."""

import sys

import torch
import torch.distributed
from beside_stock import MODELS, Batches, Train, both, check_training, train_plainly
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import fastnn


def on_own_rows(train: Train) -> Train:
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return lambda model, batches: train(model, [(x[rank::processes], y[rank::processes]) for x, y in batches])


def train_blocks(model: nn.Module, batches: Batches, fused: bool = True) -> list[Tensor]:
    assert isinstance(model, nn.Sequential)
    blocks = nn.Sequential(model[:4], model[4:])
    if fused:
        fastnn.fuse(blocks)
    for block in (*blocks, blocks):
        fully_shard(block)
    return train_plainly(blocks, batches)


def main(way: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    if way == "blocks":
        pairs = {"batch norm": (train_blocks, lambda model, batches: train_blocks(model, batches, fused=False))}
    else:
        pairs = {name: both(way) for name in MODELS}
    for name, (ours, stock) in pairs.items():
        check_training(name, on_own_rows(ours), on_own_rows(stock))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])

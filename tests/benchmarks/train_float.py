"""Train the float networks that the demo and the benchmarks start from.

    python -m tests.benchmarks.train_float digits        --out pcq/demo/digits-resnet8.safetensors
    python -m tests.benchmarks.train_float fashion-mnist --out pcq/demo/fashion-mnist-resnet20.safetensors
    python -m tests.benchmarks.train_float cifar10 --root DIR --out cifar10-resnet20.safetensors
    python -m tests.benchmarks.train_float fashion-mnist --net vit --lr 0.002 --out vit.safetensors

Trained on the split ``train`` of pcq.data, which leaves ``val`` out, so that later work can choose its settings without
touching the test set; that is scored once, at the end.
SGD with Nesterov momentum 0.9, weight decay 5e-4, label smoothing 0.05, cosine learning rate with a one-epoch warm-up,
random crops and (not for digits) flips; AdamW with weight decay 0.05 for the vision transformer; bf16 autocast where
the machine is quick at it. A JSON beside the checkpoint records recipe, seed, scores, date.
"""

import argparse
import json
import math
import time
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from pcq.data import open_data
from pcq.demo import nets
from pcq.train import graphs
from pcq.train.job import quick_in_bf16
from tests.benchmarks import record, vit


def augment(images: torch.Tensor, pad: int, flip: bool, generator: torch.Generator) -> torch.Tensor:
    """One random crop (after padding by ``pad``) and flip per image."""
    n, _, h, w = images.shape
    padded = F.pad(images, (pad, pad, pad, pad))
    dy, dx = (torch.randint(2 * pad + 1, (n, 1, 1), generator=generator) for _ in range(2))
    rows, cols = dy + torch.arange(h)[None, :, None], dx + torch.arange(w)[None, None, :]
    if flip:
        mirror = torch.rand(n, 1, 1, generator=generator) < 0.5
        cols = torch.where(mirror, cols.flip(-1), cols)
    index = [i.to(images.device, non_blocking=True) for i in (torch.arange(n)[:, None, None], rows, cols)]
    return padded.permute(0, 2, 3, 1)[index[0], index[1], index[2]].permute(0, 3, 1, 2)


def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 in percent, float32."""
    model.eval()
    with torch.no_grad():
        hits = sum(
            (model(x).argmax(1) == y).sum().item() for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
    return 100 * hits / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["digits", "fashion-mnist", "cifar10"])
    parser.add_argument("--root", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--net", default=None)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    spec = args.data if args.data == "digits" else f"{args.data}:{args.root}"
    sets = {split: open_data(spec, split) for split in ("train", "val", "test")}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (x, y), held, test = ([part.to(device) for part in next(data.batches(data.n))] for data in sets.values())
    net = args.net or ("resnet8" if args.data == "digits" else "resnet20")
    make = vit.vit if net == "vit" else getattr(nets, net)
    model = make(num_classes=10, in_channels=x.shape[1]).to(device, memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    decay = 0.05 if net == "vit" else 5e-4
    groups = [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
    if net == "vit":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=args.lr)
    else:
        fused = True if device.type == "cuda" else None
        optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True, fused=fused)
    steps = len(x) // args.batch
    total = steps * args.epochs
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1, (t + 1) / steps) * 0.5 * (1 + math.cos(math.pi * min(1, t / total)))
    )
    bf16 = quick_in_bf16(device)
    stack = ExitStack()
    if device.type == "cuda":
        like = x[: args.batch].to(memory_format=torch.channels_last)
        stack.enter_context(graphs.recorded(model, like, bf16))
    start = time.time()
    for epoch in range(args.epochs):
        model.train()
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        shuffled = torch.randperm(len(x), generator=generator)
        for batch in shuffled[: steps * args.batch].to(device).split(args.batch):
            images = augment(x[batch], 1 if args.data == "digits" else 4, args.data != "digits", generator)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(images.to(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), y[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            loss_sum += loss.detach()
        print(
            f"epoch {epoch + 1}/{args.epochs} loss {loss_sum.item() / steps:.4f} held-out {accuracy(model, *held):.2f} "
            f"{time.time() - start:.0f} s",
            flush=True,
        )
    stack.close()
    scores = {"held_out": accuracy(model, *held), "test": accuracy(model, *test)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, args.out)
    made = {
        "data": args.data,
        "net": net,
        "recipe": {"epochs": args.epochs, "lr": args.lr, "batch": args.batch},
        "seed": args.seed,
        "top1": scores,
        "seconds": round(time.time() - start),
    } | record.certificate()
    args.out.with_suffix(".json").write_text(json.dumps(made, indent=1) + "\n")
    print(json.dumps(made))


if __name__ == "__main__":
    main()

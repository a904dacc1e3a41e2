"""How files that are no artifacts show that pcq wrote them, so that it may replace them."""

from pathlib import Path

SCHEME = "pcq.scheme"
"""The key of a packed ONNX file's metadata that describes its weights (:mod:`pcq.export.scheme`)."""

SOFTWARE = "pcq"
"""What a drawn PNG says under ``Software``, before its pixels."""


def onnx_marked(path: Path) -> bool:
    """Whether a file is ONNX with pcq's metadata; what a network or its tensors are called does not count."""
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # protobuf's own, where it is no ONNX
        return False
    return any(entry.key == SCHEME for entry in model.metadata_props)


def png_marked(path: Path) -> bool:
    """Whether a file is a PNG that pcq drew."""
    text = b"tEXtSoftware\0" + SOFTWARE.encode()
    with open(path, "rb") as file:
        head = file.read(1 << 12)
    return head.startswith(b"\x89PNG\r\n\x1a\n") and (len(text) - 4).to_bytes(4, "big") + text in head

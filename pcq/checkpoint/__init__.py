"""The artifact: one safetensors file with packed codes, scales and tables, and everything else as it was.

Format 1 is specified in ``docs/artifact.md``. Its size follows from the plan alone, so the header is written first and
the tensors are streamed behind it; memory holds one tensor at a time.
"""

from pcq.atomic import atomic
from pcq.checkpoint.header import ArtifactHeader, Coded, Plain, make_header, predicted_size
from pcq.checkpoint.outputs import beside, refuse_overwrite
from pcq.checkpoint.reading import Artifact, is_artifact, read_artifact
from pcq.checkpoint.stream import Done, non_finite_problems, quantize_sliced, quantize_source, refuse_non_finite
from pcq.checkpoint.writing import write_artifact

__all__ = [
    "Artifact",
    "ArtifactHeader",
    "Coded",
    "Done",
    "Plain",
    "atomic",
    "beside",
    "is_artifact",
    "make_header",
    "non_finite_problems",
    "predicted_size",
    "quantize_sliced",
    "quantize_source",
    "read_artifact",
    "refuse_non_finite",
    "refuse_overwrite",
    "write_artifact",
]

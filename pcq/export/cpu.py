"""The processor, as far as int8 is concerned.

x86 without VNNI multiplies uint8 by int8 with an instruction (``vpmaddubsw``) that adds two neighbouring products and
saturates the sum to 16 bits: ``255 * 127 + 255 * 127`` becomes 32767. VNNI adds in 32 bits.
"""

import platform
from pathlib import Path

X86 = ("x86_64", "amd64", "i386", "i686")


def saturates(machine: str | None = None, flags: str | None = None) -> bool | None:
    """Whether int8 sums saturate on this processor; None: not known (other than x86, or not Linux).

    Args:
        machine: instead of what ``platform.machine()`` says.
        flags: instead of what ``/proc/cpuinfo`` says.
    """
    if (platform.machine() if machine is None else machine).lower() not in X86:
        return None
    file = Path("/proc/cpuinfo")
    if flags is None and file.is_file():
        flags = file.read_text(errors="ignore")
    words = set((flags or "").split())
    return not words & {"avx512_vnni", "avx_vnni"} if "sse2" in words else None


def described() -> str:
    """In words."""
    return {
        None: f"a processor ({platform.machine()}) of which it is not known whether int8 sums saturate",
        True: "an x86 processor without VNNI, where int8 sums saturate",
        False: "an x86 processor with VNNI",
    }[saturates()]

"""Forms of the C++ kernels for processors that have less than the one that tests run on."""

from __future__ import annotations

from triton_st import extension

FEATURES = {
    "x86-64-v4": "__AVX512VL__",
    "alderlake": "__AVXVNNI__",
    "x86-64-v3": "__AVX2__",
    "x86-64": "__SSE2__",
}
"""What the compiler defines for each, as g++ names them."""


def lesser_forms(*processors: str) -> list[str]:
    """Flags, one form each: for those of `processors` that this one can stand for, and for this one without AMX."""
    here = extension._compiler_fingerprint()
    forms = [f"-O1 -march={processor}" for processor in processors if FEATURES[processor] in here]
    if "__AMX_TILE__" in here and "-DTRITON_ST_NO_AMX" not in extension.flags():
        forms.append("-O1 -DTRITON_ST_NO_AMX")
    return forms

"""Forms of the C++ kernels for processors that have less than the one that tests run on."""

from __future__ import annotations

from triton_st import extension


def lesser_forms(*processors: str) -> list[str]:
    """Flags, one form each: for `processors` as g++ names them, and for this one without AMX if it has that."""
    forms = [f"-O1 -march={processor}" for processor in processors]
    if "__AMX_TILE__" in extension._compiler_fingerprint() and "-DTRITON_ST_NO_AMX" not in extension.flags():
        forms.append("-O1 -DTRITON_ST_NO_AMX")
    return forms

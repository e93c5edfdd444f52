"""README's numbers are those of the result files."""

from __future__ import annotations

from bench.readme import ROOT, SECTIONS, render


def test_readme_says_what_the_result_files_say() -> None:
    text = (ROOT / "README.md").read_text()
    assert all(f"<!-- generated: {name} -->" in text for name in SECTIONS)
    assert render(text) == text

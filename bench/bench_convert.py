"""`spte convert` of a million lines of each text: at most 3 s are asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spte.cli.app import run

FAULT = "kvm_page_fault: vcpu 0 rip 0xffffffff81234567 address 0x{gpa:016x} error_code 0x2\n"
PUSH = "kvm:kvm_dirty_ring_push: ring 0: dirty 0x1 reset 0x0 slot 0 offset 0x{page:x} (used 1)\n"
LINES = {
    "text": ("{t:.6f} {page}\n", ()),
    "faults": ("     CPU 0/KVM-15836   [000] .....  {t:.6f}: " + FAULT, ()),
    "ring": ("     CPU 0/KVM 15836 [000]  {t:.6f}:   " + PUSH, ()),
    "lackey": (" S {gpa:08x},8\n", ("--format", "lackey")),
}


def million_lines(path: Path, kind: str) -> tuple[list[int], tuple[str, ...]]:
    """Write them; return their pages and the options that `spte convert` needs for them."""
    form, options = LINES[kind]
    pages = np.random.default_rng(0).integers(0, 1 << 18, 10**6).tolist()
    path.write_text("".join(form.format(t=i / 10**5, page=page, gpa=page << 12) for i, page in enumerate(pages)))
    return pages, options


@pytest.mark.parametrize("kind", LINES)
def test_convert_a_million_lines(benchmark: object, tmp_path: Path, kind: str) -> None:
    _, options = million_lines(tmp_path / "t", kind)
    argv = ["convert", str(tmp_path / "t"), *options, "-o", str(tmp_path / "t.npz")]
    assert benchmark.pedantic(run, args=(argv,), rounds=3) == 0

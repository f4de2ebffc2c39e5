"""Traces from what other tools record: dirty bitmaps, dirty rings, KVM tracepoints, lackey, pagemap, text."""

from spte.convert.run import Converted, convert
from spte.convert.slots import Slot
from spte.convert.sniff import FORMATS

__all__ = ["FORMATS", "Converted", "Slot", "convert"]

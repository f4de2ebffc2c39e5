"""Policies: what a kernel version does, one field a decision, and what each decision rests on."""

from spte.policy.decisions import COLLAPSE_PAGES, NAMES, SERIES, Policy, changes, decisions, spell
from spte.policy.evidence import HOLDERS, Evidence, evidence
from spte.policy.spelling import parse
from spte.policy.versions import RECORDED, VERSIONS, Change, mainline, running

__all__ = [
    "COLLAPSE_PAGES", "HOLDERS", "NAMES", "RECORDED", "SERIES", "VERSIONS", "Change", "Evidence", "Policy", "changes", "decisions",
    "evidence", "mainline", "parse", "running", "spell",
]  # fmt: skip

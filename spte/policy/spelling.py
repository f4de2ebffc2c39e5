"""A policy as the command line spells it."""

from __future__ import annotations

import dataclasses
from typing import Any

from spte._arguments import instance
from spte._arguments import spell as shown
from spte.errors import PlatformError
from spte.policy.decisions import Policy, decisions, spell, spell_all


def parse(text: str) -> Policy:
    """Return the policy that `text` spells: ``NAME[,FIELD=VALUE]...``, e.g. ``6.12,eager_page_split=N``.

    Raises
    ------
    PlatformError
        EINVAL: unknown version, field or value; the text lists what there is.
    """
    name, *changed = instance(text, "policy", str, "NAME[,FIELD=VALUE]...").split(",")
    policy = Policy.named(name.strip())
    known = {f.name: f for f in decisions()}
    new: dict[str, Any] = {}
    for change in changed:
        key, equals, value = (part.strip() for part in change.partition("="))
        if not equals or key not in known:
            raise PlatformError(f"policy {shown(text)}: {shown(change)} is not FIELD=VALUE; the fields are {', '.join(known)}")
        choices = known[key].metadata["choices"]
        match = [c for c in choices if spell(c) == value]
        if not match:
            raise PlatformError(f"policy {shown(text)}: {key}={shown(value)}; take one of {spell_all(choices)}")
        new[key] = match[0]
    return dataclasses.replace(policy, name=text.strip(), **new) if new else policy


def replaced(policy: Policy) -> frozenset[str]:
    """Return the decisions that the name of a policy from `parse` replaces: ``{"eager_page_split"}`` of ``6.12,eager_page_split=N``."""
    return frozenset(change.partition("=")[0].strip() for change in policy.name.split(",")[1:])

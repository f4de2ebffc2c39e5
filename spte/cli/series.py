"""The 14 patches as one page of Markdown: what each changed in numbers, and which recording holds it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spte.patches.groups import Group
from spte.patches.recorded import Recorded, recorded
from spte.patches.states import around
from spte.patches.trial import COUNTS, Outcome, Value
from spte.policy import spell

ARROW = "→"
INTRODUCTION = """# The 14 patches, before and after

Made by `spte patches --markdown > docs/series.md`. *Model* is what a scenario counts with the patches before this one, then with
this one too; one number where nothing changes. *Recorded* is what real kernels did in the same situation, at other sizes: Linux
5.10 before the series, 6.12 after it. 5.10.223, the kernel recorded, carries patch 1 as a stable backport.
"""


def value_of(value: Value) -> str:
    """Return a value as the page and the table spell it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def change(values: Sequence[Value], arrow: str = ARROW) -> str:
    """Return values under one policy after the other, one if all are equal."""
    spelled = [value_of(value) for value in values]
    return spelled[0] if len(set(spelled)) == 1 else arrow.join(spelled)


def recorded_text(row: Recorded) -> str:
    """Return what was recorded in short: ``flushes 2→1``."""
    return f"{row.place.quantity.replace('_', ' ')} {change((row.before, row.after))}"


def places_text(rows: Sequence[Recorded]) -> str:
    """Return where: ``5.10→6.12, intel-pml/04-thp #6``, one of each."""
    return "; ".join(dict.fromkeys(
        f"{ARROW.join(row.place.kernels)}, {row.place.machine}/{row.place.scenario} #{row.place.op}" for row in rows
    ))  # fmt: skip


def markdown(groups: Sequence[Group]) -> str:
    """Return the page of `groups`, one a patch."""
    return "\n".join([INTRODUCTION, *(line for group in groups for line in _patch(group))])


def _patch(group: Group) -> Iterator[str]:
    patch = group.patch
    assert patch is not None
    yield f"## Patch {patch.number}: {patch.title}\n"
    yield f"Commit {patch.commit}." + (f" {_decision(group)}" if patch.decision else " It changes no behaviour." * (not group.outcomes))
    yield ""
    if group.outcomes:
        yield "| scenario | model | recorded | where |"
        yield "| :-- | :-- | :-- | :-- |"
        for outcome in group.outcomes:
            rows = recorded(outcome.scenario.name)
            about = f"**{outcome.scenario.name}** {outcome.scenario.claim}"
            cells = about, _model(outcome), "; ".join(map(recorded_text, rows)), places_text(rows)
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        yield ""


def _decision(group: Group) -> str:
    assert group.patch is not None
    assert group.patch.decision is not None
    before, after = (spell(getattr(policy, group.patch.decision)) for policy in around(group.patch.number))
    return f"Decision `{group.patch.decision}`: {before} {ARROW} {after}."


def _model(outcome: Outcome) -> str:
    names = [name for name in COUNTS if name in outcome.scenario.expected or any(seen[name] for seen in outcome.seen)]
    names += [name for name in outcome.scenario.expected if name not in COUNTS]
    return "; ".join(f"{name.replace('_', ' ')} {change([seen[name] for seen in outcome.seen])}" for name in names)

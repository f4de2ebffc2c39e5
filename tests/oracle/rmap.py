"""The oracle's other MMU, which finds leaves by rmap: direct roots with tdp_mmu=N, and shadow paging of a guest without paging."""

import errno

from oracle.host import align
from oracle.memory import EXEC, LOG, RO, SPAN
from oracle.vm import Oracle

GROUP = 8  # neighbours that a fault maps
PAE_PAGES = {(2, i << 18) for i in range(4)}  # what the four entries of a PAE root link to


class RmapOracle(Oracle):
    """Tables are found again by gfn: one that a huge leaf replaced stays, its leaves in the rmaps, until everything is zapped."""

    top = 4
    tdp = False
    clears_dirty_of_huge = False
    root, roots_made = None, 0

    def clear_tables(self):
        super().clear_tables()
        self.linked = set()  # tables that an entry links to

    # -- roots

    def enter(self, vcpu):
        if self.root is None:
            self.roots_made += 1
            self.root = self.roots_made
        held, vcpu.root = vcpu.root, self.root
        if held not in (None, self.root) and all(v.root != held for v in self.vcpus):
            self.flush("obsolete root freed")

    def zap_all(self, as_id=None):
        """A flush if any page was valid: a root is."""
        if as_id == 0:
            self.gen += 4
        self.clear_tables()
        if self.root is not None:
            self.root = None
            self.flush("zap-all")
        return 0

    # -- the walk

    def tables_to(self, at):
        """[(level, key of the table that holds the entry of that level)], from the root as far as links go."""
        found = [(self.top, None)]
        for level in range(self.top - 1, 0, -1):
            if (table := (level, align(at, level + 1))) not in self.linked:
                break
            found.append((level, table))
        return found

    def find(self, at):
        for level, _ in self.tables_to(at):
            if (leaf := self.leafs.get((level, align(at, level)))) is not None:
                return level, leaf
        return None

    def seen(self):
        lowest = {}  # of each table: the level down to which a walk to it comes

        def reached(level, at):
            table = (level, align(at, level + 1))
            if table not in lowest:
                lowest[table] = self.tables_to(table[1])[-1][0]
            return lowest[table] <= level

        leafs = {key: leaf for key, leaf in self.leafs.items() if reached(*key)}
        tables = {table for table in self.tables if reached(*table)}
        return leafs, tables, {at: gen for at, gen in self.mmio.items() if reached(1, at)}

    def seen_mmio(self, at):
        """As `seen`, for one address: a fault asks it, and there are many."""
        return self.mmio.get(at) if at in self.mmio and self.tables_to(at)[-1][0] == 1 else None

    def walk(self, gfn, goal, fits, no_huge):
        goal = min(goal, self.top - 1)
        for level in range(self.top, 0, -1):
            first = align(gfn, level)
            table = (level - 1, first)
            if level == goal and not (level > 1 and table in self.linked and self.nx_holds(table)):
                return level
            goal = min(goal, level - 1)
            if table in self.linked:
                continue
            if self.leafs.pop((level, first), None):
                self.flush("lazy zap")
            self.tables.add(table)
            self.linked.add(table)
            if no_huge and self.marks_nx(level <= fits):
                self.nx_marks.setdefault(table, 2 if level <= fits else 1)
        raise AssertionError("a walk ends at its goal")

    def marks_nx(self, fits):
        return fits or self.rules.nx_marks_all

    # -- faults

    def has_fast_faults(self, at):
        """In every version for direct roots."""
        return at < SPAN

    def map(self, vcpu, slot, gfn, kind, writable, zero, prefetch=False):
        fits = 1 if slot.flags & LOG else slot.max_level(gfn)
        no_huge = self.nx and kind == EXEC
        level = self.walk(gfn, 1 if no_huge else fits, fits, no_huge)
        changed = self.set_leaf(vcpu, level, gfn, writable, zero, prefetch)
        if changed and level == 1 and self.kind.ad and gfn < SPAN:
            self.prefetch(vcpu, gfn)
        return changed

    def set_leaf(self, vcpu, level, at, writable, zero, prefetch):
        key, table = (level, align(at, level)), (level - 1, align(at, level))
        if table in self.linked:
            self.linked.discard(table)
            self.flush("link replaced")
        old = self.leafs.get(key)
        bit1 = (old is not None and old.w) or (level == 1 and at in self.mmio)
        if prefetch and old is not None and not self.rules.prefault_remakes:
            return False
        new = self.new_leaf(level, at, writable, zero, prefetch, bit1)
        if new.w:
            self.mark(vcpu, at)
        if new == old:
            return False
        if old is not None and ((old.a and not new.a) or (old.d and not new.d)):
            self.flush("remake")
        self.mmio.pop(at, None)
        self.leafs[key] = new
        return True

    def prefetch(self, vcpu, at):
        """Map the empty neighbours, run by run, as far as the host has writable pages; a run without any ends it."""
        run = []
        for gfn in range(align_group(at), align_group(at) + GROUP + 1):
            if gfn < align_group(at) + GROUP and gfn != at and (1, gfn) not in self.leafs:
                run.append(gfn)
                continue
            if gfn == align_group(at) + GROUP and not self.rules.prefetch_tail:
                return
            if run and not self.prefetch_run(vcpu, run):
                return
            run = []

    def prefetch_run(self, vcpu, run):
        slot = self.slot_of(run[0])
        if slot is None or slot.flags & (LOG | RO) or run[-1] >= slot.end:
            return False
        for gfn in run:
            page = slot.hpage(gfn)
            if slot.host.pte.get(slot.host.at(page)) != "own" or page in slot.host.read_only:
                return gfn != run[0]
            self.set_leaf(vcpu, 1, gfn, True, False, True)
        return True

    # -- logging on and off

    def splits_eagerly(self):
        return False

    def start_level(self, level):
        return level

    def disable(self, slot):
        if slot.as_id:
            return
        top = 1 if self.rules.collapse == "leaf" else 2
        gone = [(level, at) for level, at, _ in self.leafs_of(slot) if level <= top and self.may_be_larger(slot, level, at)]
        for key in gone:
            del self.leafs[key]
        if gone:
            self.flush("collapse")
        if self.rules.disable_sets_dirty and self.cdls:
            self.set_dirty(slot)

    def may_be_larger(self, slot, level, gfn):
        """Before patch 5 by the page of each leaf; then the first gfn of the leaf's table decides for all. Direct tables only."""
        if gfn >= SPAN:
            return False
        if self.rules.by_page:
            return slot.host.is_compound(slot.hpage(gfn))
        first = align(gfn, level + 1)
        return first in slot.gfns and super().may_be_larger(slot, level, first)

    def set_dirty_flushes(self, slot, leafs):
        """For leaves that a fast fault could make writable."""
        return any(leaf.mw and not leaf.w for leaf in leafs)

    def d_may_lag(self, at):
        return False


class ShadowPagingOracle(RmapOracle):
    """A guest without paging under shadow paging: a PAE root a vCPU, over four tables that all share."""

    top = 3

    def clear_tables(self):
        """Obsolete pages of a root stay, empty, until no vCPU holds them."""
        super().clear_tables()
        if any(vcpu.root is not None for vcpu in self.vcpus):
            self.link_pae_pages()

    def enter(self, vcpu):
        super().enter(vcpu)
        self.link_pae_pages()

    def link_pae_pages(self):
        self.tables |= PAE_PAGES
        self.linked |= PAE_PAGES

    def prefault(self, v, gfn, npages):
        return errno.EOPNOTSUPP

    def marks_nx(self, fits):
        """Without EPT and NPT, version 6.1 counts none."""
        return self.rules.nx_marks_all


def align_group(at):
    return at - at % GROUP


def oracle_of(platform, *args, **kwargs):
    """The oracle of a platform by name."""
    kind = ShadowPagingOracle if platform == "shadow" else RmapOracle if platform.endswith("-rmap") else Oracle
    return kind(platform, *args, **kwargs)

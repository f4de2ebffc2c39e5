"""A migration by single events, in plain Python and without KVM: what `spte.migrate` must give. As straightforward as can be."""

import itertools

TICKS = 100
PAGE = 4096


def lap(work, vcpu):
    """(tick, gfn) of each write of a vCPU in one pass over the trace."""
    start = int(work.t_ns[0])
    for epoch in range(work.nepochs):
        gfns = [int(gfn) for access in work.epoch(epoch) if access.vcpu == vcpu for gfn in access.gfns]
        began, ended = (int(work.t_ns[e]) - start for e in (epoch, epoch + 1))
        for i, gfn in enumerate(gfns):
            yield began * TICKS + (2 * i + 1) * (ended - began) * TICKS // (2 * len(gfns)), gfn


class Vcpu:
    """Hands out its writes one by one, each with the ns at which it is done."""

    def __init__(self, plan, vcpu):
        self.one, self.length = list(lap(plan.workload, vcpu)), int(plan.workload.t_ns[-1] - plan.workload.t_ns[0]) * TICKS
        self.laps = itertools.count() if plan.after == "repeat" else [0]
        self.writes = ((tick + n * self.length, gfn) for n in self.laps for tick, gfn in self.one)
        self.lost, self.awake, self.since, self.speed = 0, 0, 0, 100
        self.next()

    def next(self):
        self.tick, self.gfn = next(self.writes, (None, None))

    def done(self):
        return None if self.tick is None else self.since + (self.tick + self.lost - self.awake) // self.speed + 1

    def set_speed(self, now, speed):
        self.awake += (now - self.since) * self.speed
        self.since, self.speed = now, speed


class Migration:
    """`stall` is what the first write to a page takes since it was armed last, ns."""

    def __init__(self, plan, stall=0):
        self.plan, self.stall = plan, stall
        self.vcpus = [Vcpu(plan, v) for v in range(plan.workload.vcpus)]
        self.now, self.sent, self.percent, self.rounds, self.lost_ns = 0, 0, 0, [], 0
        self.dirty, self.shown, self.unarmed = set(), set(), set()
        pages = range(plan.workload.npages)
        self.version, self.there = dict.fromkeys(pages, 0), dict.fromkeys(pages, -1)
        self.period = [0, 0, 0]
        self.high = 0

    def wire(self, n):
        return n * PAGE * 10**9 // self.plan.bandwidth

    def guest_until(self, time):
        """Every write that is done by `time`, in the order of time."""
        if self.plan.stop_ns is not None:
            time = min(time, self.plan.stop_ns)
        while True:
            ready = [(v.done(), n) for n, v in enumerate(self.vcpus) if v.done() is not None and v.done() <= time]
            if not ready:
                return
            v = self.vcpus[min(ready)[1]]
            self.version[v.gfn] += 1
            if v.gfn not in self.dirty and v.gfn not in self.unarmed:
                v.lost += self.stall * TICKS
                self.lost_ns += self.stall
            self.dirty.add(v.gfn)
            v.next()

    def harvest(self):
        found = set(self.dirty)
        if self.plan.log in ("bitmap", "ring"):
            self.dirty = set()
        self.shown = found
        return sorted(found)

    def send(self, pages):
        chunk = self.plan.chunk_pages if self.plan.log in ("manual", "initially-set") else self.plan.workload.npages
        for number, part in itertools.groupby(pages, key=lambda page: page // chunk):
            cleared = range(number * chunk, (number + 1) * chunk)
            if self.plan.log in ("manual", "initially-set"):
                self.dirty -= {page for page in cleared if page in self.shown}
                self.shown -= set(cleared)
            self.unarmed -= set(cleared)
            part = list(part)
            for i, page in enumerate(part):
                if self.now + self.wire(i) >= self.plan.max_ns:
                    return False
                self.guest_until(self.now + self.wire(i))
                self.there[page] = self.version[page]
                self.sent += 1
            self.now += self.wire(len(part))
            self.guest_until(min(self.now, self.plan.max_ns))
        return self.now < self.plan.max_ns

    def throttle(self, dirtied, sent):
        self.period[1] += dirtied
        self.period[2] += sent
        if self.now <= self.period[0] + 10**9:
            return
        self.high += self.period[1] * 2 > self.period[2]
        if self.high == 2:
            self.high = 0
            if self.plan.throttle == "auto-converge":
                self.percent = min(99, self.percent + 10) if self.percent else 20
        self.period = [self.now, 0, 0]
        for v in self.vcpus:
            v.set_speed(self.now, 100 - self.percent)

    def run(self):
        pages = range(self.plan.workload.npages)
        if self.plan.log == "initially-set":
            self.dirty = set(pages)
        self.harvest()
        while True:
            before, began = self.sent, self.now
            if not self.send(pages):
                return False
            pages = self.harvest()
            self.rounds.append((self.now - began, self.sent - before, len(pages), self.percent))
            self.throttle(len(pages), self.sent - before)
            if self.plan.fixed_ns + self.wire(len(pages)) <= self.plan.downtime_ns:
                break
        rest = sorted({*pages, *self.harvest()})
        self.there |= {page: self.version[page] for page in rest}
        self.rest = len(rest)
        self.sent += self.rest
        self.now += self.plan.fixed_ns + self.wire(len(rest))
        return True

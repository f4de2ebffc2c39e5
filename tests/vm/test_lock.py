"""The lock of VMs and host memory: who waits comes next, a lock can be shared, several are taken in one order."""

import threading

import numpy as np
import pytest

from spte.host.lock import ExclusiveLock, all_of, share

SECONDS = 60  # a deadlock fails the test


def new_lock():
    return ExclusiveLock(np.zeros(1, np.int64))


def wait_until(condition):
    for _ in range(SECONDS * 1000):
        if condition():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it does not become true")


def held(lock, what, order):
    with lock:
        order.append(what)


def test_who_waits_gets_in_before_the_one_that_holds_it_comes_again(pool):
    lock, order = new_lock(), []
    for round_ in range(100):
        with lock:
            waiter = pool.submit(held, lock, "waiter", order)
            wait_until(lambda: lock.contended)
            assert lock.needbreak[0] == 1
        with lock:
            order.append("holder")
            assert not lock.contended
            assert lock.needbreak[0] == 0
        waiter.result(SECONDS)
        assert order == ["waiter", "holder"] * (round_ + 1)


def test_letting_in_is_for_all_that_wait(pool):
    lock, order = new_lock(), []
    with lock:
        waiters = [pool.submit(held, lock, n, order) for n in range(4)]
        while len(order) < len(waiters):
            before = len(order)
            wait_until(lambda: lock.contended)
            lock.let_in()
            assert len(order) > before
    for waiter in waiters:
        waiter.result(SECONDS)
    assert sorted(order) == [0, 1, 2, 3]


def test_who_holds_it_may_take_it_again_while_another_waits(pool):
    lock, order = new_lock(), []
    with lock:
        waiter = pool.submit(held, lock, "waiter", order)
        wait_until(lambda: lock.contended)
        with lock:
            lock.let_in()  # not while it is held twice
            order.append("holder")
    waiter.result(SECONDS)
    assert order == ["holder", "waiter"]


def test_an_interrupt_while_others_are_let_in_leaves_the_lock_held():
    class Interrupted(ExclusiveLock):
        def _take(self):
            if not interrupts:
                interrupts.append(1)
                raise KeyboardInterrupt
            super()._take()

    interrupts = []
    lock = Interrupted(np.zeros(1, np.int64))
    lock.__enter__()
    with pytest.raises(KeyboardInterrupt):
        lock.let_in()
    lock.__exit__(None, None, None)
    with pytest.raises(RuntimeError, match="un-acquired"):
        lock.__exit__(None, None, None)


def test_locks_that_are_shared_exclude_each_other_and_their_waiters_move_over(pool):
    a, b, c, order = new_lock(), new_lock(), new_lock(), []
    share(a, b)
    with c:
        waiter = pool.submit(held, c, "waits for c", order)
        wait_until(lambda: c.contended)
        sharer = pool.submit(share, b, c)
        c.let_in()
    sharer.result(SECONDS)
    waiter.result(SECONDS)
    assert order == ["waits for c"]
    assert a.turnstile is b.turnstile is c.turnstile
    with a:
        waiters = [pool.submit(held, lock, n, order) for n, lock in enumerate((a, b, c))]
        wait_until(lambda: a.contended)
        assert [lock.needbreak[0] for lock in (a, b, c)] == [1, 1, 1]
        assert order == ["waits for c"]
    for each in waiters:
        each.result(SECONDS)
    assert sorted(order[1:]) == [0, 1, 2]
    assert [lock.needbreak[0] for lock in (a, b, c)] == [0, 0, 0]


def test_who_came_for_a_lock_that_is_replaced_meanwhile_takes_the_new_one(pool):
    a, b, c, taken = new_lock(), new_lock(), new_lock(), []

    def take_b():
        with all_of(b):
            taken.append(a.turnstile.main._is_owned())

    with b:
        first = pool.submit(share, a, b)
        wait_until(lambda: b.contended)
        others = [pool.submit(take_b), pool.submit(share, b, c)]  # they stand before the gate of b
        threading.Event().wait(0.05)
    for each in (first, *others):
        each.result(SECONDS)
    assert taken == [True]
    assert a.turnstile is b.turnstile is c.turnstile


def test_several_are_taken_in_one_order_whoever_asks_and_while_they_become_one(pool):
    """Without one order this deadlocks; a lock that is replaced lets two in at once."""
    for _ in range(20):
        locks, inside, most = [new_lock() for _ in range(4)], [], []
        start = threading.Barrier(6)

        def use(first, second, sharing, locks=locks, inside=inside, most=most, start=start):
            start.wait(SECONDS)
            for _ in range(20):
                with all_of(locks[first], locks[second], locks[0]):
                    inside.append(first)
                    most.append(len(inside))
                    inside.pop()
            if sharing:
                share(locks[first], locks[second])
            for _ in range(20):
                with all_of(locks[second], locks[0]):
                    inside.append(first)
                    most.append(len(inside))
                    inside.pop()

        users = [pool.submit(use, n % 4, (n + 1) % 4, n < 3) for n in range(6)]
        for user in users:
            user.result(SECONDS)
        assert max(most) == 1
        assert len({lock.turnstile for lock in locks}) == 1

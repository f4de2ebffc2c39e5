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
            wait_until(lambda: lock.needbreak[0] == 1)
            assert lock.contended
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


# -- runs, which hold it shared ---------------------------------------------------------------------------------------------


def run_until(lock, word, order, what):
    """A run that leaves when it is asked to."""
    with lock.shared():
        order.append(what)
        wait_until(lambda: word[0])


def test_runs_are_inside_together_and_are_asked_to_leave(pool):
    lock, order, words = new_lock(), [], [np.zeros(1, np.int64) for _ in range(2)]
    lock.kicked += words
    runs = [pool.submit(run_until, lock, word, order, n) for n, word in enumerate(words)]
    wait_until(lambda: len(order) == 2)
    with lock.beside_runs():
        assert lock.turnstile.runs == 2
        assert not any(word[0] for word in words)
    with lock:
        assert lock.turnstile.runs == 0
        assert lock.is_mine
    for run in runs:
        run.result(SECONDS)


def test_runs_that_wait_come_before_the_next_that_takes_it(pool):
    lock, order, word = new_lock(), [], np.zeros(1, np.int64)
    lock.kicked.append(word)
    for round_ in range(100):
        with lock:
            run = pool.submit(run_until, lock, word, order, "run")
            wait_until(lambda: lock.needbreak[0] == 1)
            assert lock.contended
        with lock:
            order.append("holder")
            assert not lock.contended
        run.result(SECONDS)
        assert order == ["run", "holder"] * (round_ + 1)
    assert lock.met


def test_a_run_that_waits_for_a_lock_that_is_replaced_moves_over(pool):
    a, b, order, word = new_lock(), new_lock(), [], np.zeros(1, np.int64)
    b.kicked.append(word)
    with b:
        sharer = pool.submit(share, a, b)
        wait_until(lambda: b.contended)
        run = pool.submit(run_until, b, word, order, "run")
        wait_until(lambda: b.turnstile.runs_wait)
        b.let_in()
    sharer.result(SECONDS)
    wait_until(lambda: order)
    with a:
        assert a.turnstile is b.turnstile
        assert a.turnstile.runs == 0
    run.result(SECONDS)


def test_an_interrupt_while_runs_are_awaited_leaves_the_lock_free(pool):
    lock, order, word, deaf = new_lock(), [], np.zeros(1, np.int64), np.zeros(1, np.int64)
    lock.kicked.append(word)
    run = pool.submit(run_until, lock, deaf, order, "run")  # it does not hear
    wait_until(lambda: order)

    def interrupted():
        raise KeyboardInterrupt

    lock.turnstile.changed.wait = interrupted
    with pytest.raises(KeyboardInterrupt), lock:
        raise AssertionError("not with a run inside")
    assert not lock.is_mine
    assert (lock.turnstile.depth, word[0]) == (0, 0)
    assert not run.done()
    deaf[0] = 1
    run.result(SECONDS)


def test_a_run_that_waits_while_its_lock_becomes_another_ones_leaves_no_request_behind(pool):
    a, b = new_lock(), new_lock()
    kicked, order = np.zeros(1, np.int64), []
    b.kicked.append(kicked)
    inside = threading.Event()

    def first_run():
        with b.shared():
            inside.wait(SECONDS)

    first = pool.submit(first_run)
    wait_until(lambda: b.turnstile.runs == 1)
    sharer = pool.submit(share, a, b)
    wait_until(lambda: kicked[0] == 1)
    second = pool.submit(run_until, b, np.ones(1, np.int64), order, "second")
    wait_until(lambda: b.needbreak[0] == 1)
    inside.set()
    for each in (first, sharer, second):
        each.result(SECONDS)
    assert a.turnstile is b.turnstile
    assert (a.needbreak[0], b.needbreak[0]) == (0, 0)

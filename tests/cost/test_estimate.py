"""Estimates by hand: each count once at its cost, mmu_lock as one server or with contention, and who is interrupted."""

import dataclasses

import pytest

from spte.cost import CostError, Costs, VmShape, call_time, guest_stall

FREE = Costs.only()
ONE = VmShape(vcpus=1, running=1, shared=True)


def costs(**given):
    return dataclasses.replace(FREE, **given)


@pytest.mark.parametrize(
    ("counts", "given", "ns"),
    [
        ({"faults_fast": 3}, {"exit": 10, "fast_fault": 1}, 33),
        ({"faults_slow": 3, "splits_2m": 1, "splits_1g": 1}, {"exit": 10, "slow_fault_shared": 2, "split": 100}, 236),
        ({"pml_entries": 1024, "pml_full": 2}, {"pml_log": 1, "pml_full_exit": 5, "exit": 10}, 1054),
        ({"ring_full": 2}, {"exit": 10, "ring_full_exit": 7}, 34),
        ({"faults_slow": 1, "zapped": 1, "flushes": 1}, {"zap": 5, "flush_request": 2, "flush_vcpu": 100}, 7),
        ({"dirty_marks": 9}, {"ring_push": 4}, 0),
    ],
)
def test_each_count_costs_what_its_item_costs(counts, given, ns):
    assert guest_stall([counts], costs(**given), ONE).vcpus == (ns,)


def test_marks_are_pushes_only_with_a_ring():
    assert guest_stall([{"dirty_marks": 9}], costs(ring_push=4), ONE._replace(ring=True)).total == 36


def test_walks_are_counted_for_their_vcpu():
    assert guest_stall([{}, {}], costs(walk_2d=2), ONE._replace(vcpus=2), walks=[5, 7]).vcpus == (10, 14)
    with pytest.raises(CostError, match="1 entries for 2 vCPUs"):
        guest_stall([{}, {}], FREE, ONE, walks=[5])


def test_an_exclusive_lock_serves_the_vcpus_in_turn():
    shape = VmShape(vcpus=4, running=4, shared=False)
    given = costs(exit=10, slow_fault_exclusive=100)
    alone = guest_stall([{"faults_slow": 50}], given, shape)
    four = guest_stall([{"faults_slow": 50}] * 4, given, shape)
    assert alone.vcpus == (50 * 110,)
    assert four.vcpus == (4 * 50 * 100,) * 4  # as fast as the lock serves
    assert four.hold == 100


def test_a_vcpu_with_few_faults_does_not_wait_for_all_of_anothers():
    shape = VmShape(vcpus=2, running=2, shared=False)
    few, many = guest_stall([{"faults_slow": 1}, {"faults_slow": 1000}], costs(slow_fault_exclusive=100), shape).vcpus
    assert (few, many) == (200, 100_100)


def test_shared_holders_do_not_wait_but_contend():
    given = costs(slow_fault_shared=100, shared_contention=3)
    assert guest_stall([{"faults_slow": 10}] * 5, given, ONE._replace(vcpus=5)).vcpus == (10 * (100 + 4 * 3),) * 5
    assert guest_stall([{"faults_slow": 10}], given, ONE).vcpus == (1000,)


def test_a_flush_in_a_fault_interrupts_the_other_vcpus():
    given = costs(exit=1, flush_request=10, flush_vcpu=1000)
    flushing, other = guest_stall([{"flushes": 2}, {}], given, VmShape(3, 2, shared=True)).vcpus
    assert flushing == 2 * (3 * 10 + 1000)
    assert other == 2 * 1


def test_a_clear_that_splits_pays_for_splits_and_for_what_it_arms():
    given = costs(split=1000, clear_page=1, get_word=2, mask_walk=10)
    call = call_time("clear", {"sptes_written": 4 * 513 + 2048, "splits_2m": 4, "masks": 32}, given, ONE, words=32)
    assert call.ns == call.hold == 4000 + 2048 + 64 + 320


def test_a_flush_is_outside_the_hold_and_interrupts_every_running_vcpu():
    given = costs(clear_page=1, flush_request=3, flush_vcpu=50, exit=7)
    call = call_time("get", {"sptes_written": 100, "flushes": 1, "vcpu_kicks": 4}, given, VmShape(4, 2, shared=True))
    assert call.ns == 100 + (4 * 3 + 2 * 50) + 2 * 50
    assert call.hold == 100
    assert call.stall == 2 * 7


def test_a_get_that_arms_nothing_holds_no_lock():
    assert call_time("get", {"sptes_written": 0}, costs(get_word=2), ONE, words=10) == (20, 0, 0)


def test_a_reset_holds_the_lock_for_one_mask_at_a_time():
    call = call_time("reset", {"sptes_written": 1000, "masks": 20}, costs(clear_page=2, mask_walk=5), ONE)
    assert (call.ns, call.hold) == (2100, 133)
    assert call_time("collect", {}, costs(ring_collect=3), ONE, entries=7).ns == 21


def test_a_kick_before_collecting_takes_the_vcpu_to_userspace():
    given = costs(exit=10, ring_full_exit=100, flush_vcpu=1000)
    assert call_time("collect", {"vcpu_kicks": 2}, given, VmShape(2, 2, shared=True, ring=True)) == (2000, 0, 110)
    assert call_time("get", {"vcpu_kicks": 2}, given, VmShape(2, 2, shared=True)) == (2000, 0, 10)


def test_disabling_costs_a_zap_a_leaf_or_a_collapse_a_table():
    """Of a table that goes, each leaf goes, too."""
    given = costs(zap=1, collapse_2m=1000, clear_page=10**6)
    leaf_by_leaf = {"sptes_written": 2048, "zapped": 2048, "collapsed": 2048}
    by_table = {"sptes_written": 4, "zapped": 2048, "collapsed": 4}
    of_1_gib = {"sptes_written": 1, "zapped": 512 * 512, "collapsed": 1}
    in_place = {"sptes_written": 4, "zapped": 0, "collapsed": 4, "dropped": 2048}
    in_place_1_gib = {"sptes_written": 1, "zapped": 0, "collapsed": 1, "dropped": 512 * 512}
    calls = (leaf_by_leaf, by_table, of_1_gib, in_place, in_place_1_gib)
    assert [call_time("disable", each, given, ONE).ns for each in calls] == [
        2048, 4 * 1512, 512 * 1512, 4 * 1512, 512 * 1512,
    ]  # fmt: skip


def test_enabling_allocates_a_bitmap_and_arms():
    given = costs(bitmap_word=5, get_word=10**6, clear_page=1)
    assert call_time("enable", {"sptes_written": 512}, given, ONE, words=8).ns == 40 + 512


def test_an_unknown_call_is_refused():
    with pytest.raises(CostError, match="kind='put'"):
        call_time("put", {}, FREE, ONE)


def test_no_vcpu_loses_nothing():
    assert guest_stall([], FREE, ONE) == ((), 0.0)
    assert guest_stall([], FREE, ONE).longest == 0

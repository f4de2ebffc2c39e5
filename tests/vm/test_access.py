"""The kinds of access: what `run` takes, what an Exit gives back."""

import pytest

import spte

PAGE = 4096


@pytest.fixture
def vm():
    with spte.VM() as vm:
        vm.set_memory_region(0, 0, 8 * PAGE, spte.Backing("4k", 8 * PAGE), flags=spte.LOG_DIRTY_PAGES)
        yield vm


@pytest.fixture
def vcpu(vm):
    return vm.vcpus[0]


@pytest.mark.parametrize("kind", [0, 3, 7, 8, 255, spte.READ | spte.WRITE])
def test_what_is_no_kind_of_access_is_refused_with_its_value_before_any_access(vm, vcpu, kind):
    with pytest.raises(TypeError, match=rf"kinds holds {int(kind)}; pass READ \(1\), WRITE \(2\) or EXEC \(4\)"):
        vcpu.run([1, 2], [spte.WRITE, kind])
    assert not vm.get_dirty_log(0).any()


def test_kinds_of_another_number_than_gfns_are_refused(vcpu):
    with pytest.raises(TypeError, match=r"kinds has shape \(1,\), gfns \(2,\)"):
        vcpu.run([1, 2], [spte.WRITE])


@pytest.mark.parametrize("kind", spte.Access)
def test_an_exit_names_the_kind_that_was_given(vcpu, kind):
    stop = vcpu.run([1, 100], [spte.READ, kind])
    assert stop == spte.Exit("mmio", 1, 100, kind)
    assert stop.kind is kind

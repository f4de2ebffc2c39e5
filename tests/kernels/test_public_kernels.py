"""The public kernels as a numpy user calls them: what they refuse and how, what they leave alone, what they return."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spte
from spte import kernels
from spte._numba import jit as _jit
from spte.errors import PlatformError
from spte.kernels import _collapse, _pml_flush
from spte.platform import NAMES, named

W, D_EPT, D_NPT, LARGE, PRESENT = 1 << 1, 1 << 9, 1 << 6, 1 << 7, 1 << 11
LEAF = np.uint64(PRESENT | LARGE | D_EPT | D_NPT | W)
MUTATED = {
    "write_protect": ("sptes",), "clear_dirty": ("sptes",), "harvest": ("sptes", "bitmap", "out"), "pml_flush": ("bitmap",),
    "split": ("sptes", "tables"), "collapse": ("sptes",),
}  # fmt: skip
ARRAYS = MUTATED | {"pml_flush": ("buffer", "bitmap"), "collapse": ("sptes", "tables")}
SCALARS = {
    "write_protect": ("level",), "clear_dirty": ("level", "platform"), "harvest": ("platform",), "pml_flush": ("index", "base_gfn"),
    "split": ("level", "first_pfn", "platform"), "collapse": ("level", "first_pfn"),
}  # fmt: skip
OF_ARRAYS = [(kernel, name) for kernel, names in ARRAYS.items() for name in names]
OF_SCALARS = [(kernel, name) for kernel, names in SCALARS.items() for name in names]
ENDS = {"index": 1 << 16, "base_gfn": 1 << 52, "first_pfn": 1 << 40, "level": 4}


def sound(kernel):
    """Arguments of a kernel, all of them given, that it takes and finds work in."""
    leaves, table = np.full(512, LEAF), np.full((2, 512), LEAF)
    ones = np.full(8, ~np.uint64(0))
    return {
        "write_protect": {"sptes": leaves, "level": 2},
        "clear_dirty": {"sptes": leaves, "level": 1, "platform": "npt"},
        "harvest": {"sptes": leaves, "bitmap": ones, "out": ones.copy(), "platform": "ept-pml"},
        "pml_flush": {"buffer": np.arange(512, dtype=np.uint64) << np.uint64(12), "index": 3, "bitmap": ones - ones, "base_gfn": 1},
        "split": {"sptes": leaves[:2].copy(), "tables": table, "level": 2, "first_pfn": 5, "platform": "npt"},
        "collapse": {"sptes": np.uint64(PRESENT | 5 << 12) + leaves[:2] * np.uint64(0), "tables": table, "level": 2, "first_pfn": 5},
    }[kernel]


def refuses(kernel, args, *errors):
    """The error of a call that must fail, which is one line and leaves every array as it was."""
    before = {name: value.tobytes() for name, value in args.items() if isinstance(value, np.ndarray)}
    with pytest.raises(errors or (TypeError, ValueError)) as caught:
        getattr(kernels, kernel)(**args)
    assert {name: value.tobytes() for name, value in args.items() if isinstance(value, np.ndarray)} == before
    text = str(caught.value)
    assert 10 < len(text) < 250
    assert "\n" not in text
    return text


@pytest.mark.parametrize("kernel", ARRAYS)
def test_sound_arguments_change_what_the_docstring_says_and_nothing_else(kernel):
    args = sound(kernel)
    before = {name: args[name].copy() for name in ARRAYS[kernel]}
    assert getattr(kernels, kernel)(**args)
    assert {name for name in ARRAYS[kernel] if (args[name] != before[name]).any()} == set(MUTATED[kernel]) - {"out"}


def spoiled(array):
    """Views and kin of an array that no kernel takes in place of it, by what the refusal says of them."""
    twice = np.repeat(array, 2, axis=-1)
    odd = np.zeros(array.nbytes + 4, np.uint8)[4:].view(np.uint64).reshape(array.shape)
    assert not odd.flags.aligned or odd.ctypes.data % 8 == 0
    found = {
        "is of type list": array.tolist(), "is of type NoneType": None, "is of type int": 7, "is of type uint64": array.flat[0],
        "holds int64": array.astype(np.int64), "holds float64": array.astype(float), "holds >u8": array.astype(">u8"),
        "holds uint32": array.astype(np.uint32), "holds object": array.astype(object), "not C-contiguous": twice[..., ::2],
    }  # fmt: skip
    return found if odd.flags.aligned else found | {"not a multiple of 8": odd}


@pytest.mark.parametrize(("kernel", "name"), OF_ARRAYS)
def test_a_refusal_of_an_array_names_it_and_what_is_wrong(kernel, name):
    for said, bad in spoiled(sound(kernel)[name]).items():
        if name == "out" and bad is None:
            continue
        text = refuses(kernel, sound(kernel) | {name: bad})
        assert text.startswith(name)
        assert said in text
        assert "copy" not in text
        assert "read-only" not in text


@pytest.mark.parametrize(("kernel", "name"), OF_ARRAYS)
def test_an_array_that_is_changed_must_be_writable_and_one_that_is_read_need_not(kernel, name):
    args, writable = sound(kernel), sound(kernel)
    args[name].flags.writeable = False
    if name in MUTATED[kernel]:
        text = refuses(kernel, args, ValueError)
        assert text == f"{name} is read-only, and this call changes it; pass a writable array"
    else:
        assert getattr(kernels, kernel)(**args) == getattr(kernels, kernel)(**writable)
        assert not args[name].flags.writeable
        assert all((args[other] == writable[other]).all() for other in ARRAYS[kernel])


@pytest.mark.skipif(_jit.PLAIN, reason="nothing is compiled")
def test_a_read_only_array_does_not_compile_a_kernel_again():
    for kernel, name, compiled in (("pml_flush", "buffer", _pml_flush._pml_flush), ("collapse", "tables", _collapse._collapse)):
        for writable in (True, False):
            args = sound(kernel)
            args[name].flags.writeable = writable
            getattr(kernels, kernel)(**args)
        assert len(compiled.signatures) == 1


@pytest.mark.parametrize(("kernel", "one", "other"), [(k, a, b) for k, names in ARRAYS.items() for a in names for b in names if a < b])
def test_arrays_that_share_memory_are_refused(kernel, one, other):
    args = sound(kernel)
    sizes = args[one].size, args[other].size
    memory = np.zeros(sum(sizes), np.uint64)
    for at in (0, sizes[0] - 1):  # the same beginning; one entry in common
        args[one] = memory[: sizes[0]].reshape(args[one].shape)
        args[other] = memory[at : at + sizes[1]].reshape(args[other].shape)
        text = refuses(kernel, args, ValueError)
        assert "shares memory" in text
        assert one in text
        assert other in text
    args[other] = memory[sizes[0] :].reshape(args[other].shape)
    getattr(kernels, kernel)(**args)  # side by side is fine


@given(where=st.sampled_from(OF_SCALARS), bad=st.none() | st.floats() | st.text(max_size=9) | st.binary(max_size=9) | st.complex_numbers())
def test_a_scalar_of_another_type_is_refused(where, bad):
    kernel, name = where
    if name == "platform" and isinstance(bad, str):
        return
    refuses(kernel, sound(kernel) | {name: bad}, TypeError)


huge = st.integers(1 << 63, 1 << 70) | st.just(10**5000)


@given(where=st.sampled_from([w for w in OF_SCALARS if w[1] != "platform"]), far=st.integers(0, 1 << 20) | huge, low=st.booleans())
def test_a_scalar_out_of_its_range_is_refused(where, far, low):
    kernel, name = where
    refuses(kernel, sound(kernel) | {name: -1 - far if low else ENDS[name] + far}, ValueError)


@given(name=st.text(max_size=9))
def test_a_platform_that_is_not_known_is_refused(name):
    for kernel in ("clear_dirty", "harvest", "split"):
        with pytest.raises(PlatformError, match="take one of ept-pml"):
            getattr(kernels, kernel)(**(sound(kernel) | {"platform": f"{name}?"}))


@pytest.mark.parametrize(("kernel", "change", "error", "said"), [
    ("pml_flush", {"index": 511.7}, TypeError, "index=511.7"),
    ("pml_flush", {"index": 600}, ValueError, "index=600 is not in 0..511 or 0xffff"),
    ("pml_flush", {"index": 1 << 70}, ValueError, "index=an integer of 71 bits is not in 0..65535"),
    ("pml_flush", {"index": [1 << 70]}, TypeError, "holds object; pass an integer a buffer"),
    ("pml_flush", {"index": [1, 2]}, ValueError, "2 indices for 1 buffers"),
    ("pml_flush", {"index": [True]}, TypeError, "index=[True] holds bool"),
    ("pml_flush", {"index": np.array([1 << 63], np.uint64)}, ValueError, f"index={1 << 63}"),
    ("pml_flush", {"base_gfn": 1.5}, TypeError, "base_gfn=1.5 is of type float; pass an integer"),
    ("pml_flush", {"base_gfn": -1}, ValueError, f"base_gfn=-1 is not in 0..{(1 << 52) - 1}"),
    ("pml_flush", {"buffer": np.zeros(511, np.uint64)}, ValueError, "buffer has shape (511,)"),
    ("split", {"first_pfn": -1}, ValueError, f"first_pfn=-1 is not in 0..{(1 << 40) - 2}"),
    ("split", {"first_pfn": (1 << 40) - 1}, ValueError, f"first_pfn={(1 << 40) - 1} is not in"),  # its second row would be beyond
    ("collapse", {"first_pfn": 10**5000}, ValueError, "first_pfn=an integer of 16610 bits is not in"),
    ("split", {"level": 1}, ValueError, "level=1 is not 2 (2 MiB) or 3 (1 GiB)"),
    ("write_protect", {"level": 4}, ValueError, "level=4 is not 1 (4 KiB), 2 (2 MiB) or 3 (1 GiB)"),
    ("write_protect", {"level": 2.0}, TypeError, "level=2.0 is of type float; pass an integer"),
    ("collapse", {"tables": np.zeros((2, 511), np.uint64)}, ValueError, "tables has shape (2, 511)"),
    ("harvest", {"bitmap": np.zeros(9, np.uint64)}, ValueError, "bitmap has shape (9,); 512 pages need (8,)"),
    ("harvest", {"sptes": np.zeros(511, np.uint64)}, ValueError, "bitmap has bits set beyond page 510"),
    ("clear_dirty", {"platform": 5}, TypeError, "platform is of type int; pass a name, a Platform or what spte.kernels.layout returns"),
])  # fmt: skip
def test_a_refusal_holds_the_value_and_the_way_out(kernel, change, error, said):
    assert said in refuses(kernel, sound(kernel) | change, error)


def test_integers_of_numpy_are_integers():
    for kernel, name in OF_SCALARS:
        args = sound(kernel)
        if isinstance(args[name], int):
            assert getattr(kernels, kernel)(**(args | {name: np.uint8(args[name])})) is not None


def test_harvest_returns_the_log_whether_or_not_it_is_given_an_array():
    args, given_out = sound("harvest"), sound("harvest")
    bitmap = args["bitmap"] = np.arange(8, dtype=np.uint64)
    given_out["bitmap"] = bitmap.copy()
    log, changed = kernels.harvest(args["sptes"], bitmap)
    again, same = kernels.harvest(**given_out)
    assert log.tolist() == again.tolist() == list(range(8))
    assert again is given_out["out"]
    assert changed == same == sum(w.bit_count() for w in range(8))


@pytest.mark.parametrize("platform", NAMES)
@pytest.mark.parametrize("kernel", ["clear_dirty", "harvest", "split"])
def test_a_name_a_platform_and_a_prepared_layout_do_the_same(kernel, platform):
    results = []
    for given_as in (platform, named(platform), kernels.layout(platform), kernels.layout(named(platform), "6.12")):
        args = sound(kernel) | {"platform": given_as}
        results.append((str(getattr(kernels, kernel)(**args)), *(args[name].tolist() for name in ARRAYS[kernel])))
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize(("policy", "bit_63"), [("5.13", 0), ("6.1", 0), ("6.12", 1), (spte.Policy.named("6.13"), 1)])
def test_a_layout_is_that_of_the_era_of_a_policy(policy, bit_63):
    entries, table = np.full(1, LEAF), np.zeros((1, 512), np.uint64)
    assert kernels.split(entries, table, platform=kernels.layout("ept-pml", policy)) == 1
    assert int(entries[0]) >> 63 == bit_63


@pytest.mark.parametrize(("platform", "policy"), [("npt", "5.10"), ("ept-pml", "5.12"), ("ept-pml", "7.2")])
def test_a_version_whose_entries_have_other_bits_is_refused(platform, policy):
    with pytest.raises(ValueError, match=rf"policy {policy} has other bits than the kernels look at .* take 5\.13 to 7\.1"):
        kernels.layout(platform, policy)


def test_a_layout_of_what_does_not_exist_is_refused():
    with pytest.raises(PlatformError, match=r"policy '8\.0' is not known"):
        kernels.layout("npt", "8.0")
    with pytest.raises(TypeError, match="policy is of type float"):
        kernels.layout("npt", 6.12)
    with pytest.raises(TypeError, match="platform is of type list"):
        kernels.layout(["npt"])


@pytest.mark.parametrize(("platform", "cleared", "harvested"), [
    ("ept-pml", D_EPT, D_EPT), ("npt-pml", D_NPT, D_NPT), ("ept-nopml", D_EPT, W), ("npt", D_NPT, W), ("shadow", D_NPT, W),
])  # fmt: skip
@pytest.mark.parametrize("ad_type", range(4))
def test_clear_dirty_takes_d_and_harvest_takes_w_where_no_pml_logs_d(platform, cleared, harvested, ad_type):
    """Of A/D type 0; an entry of another type needs write protection, so both take its W."""
    leaf = LEAF | np.uint64(ad_type << 52)
    entries, bitmap = np.array([leaf, leaf]), np.ones(1, np.uint64)
    assert kernels.clear_dirty(entries[:1], platform=platform) == 1
    assert int(leaf ^ entries[0]) == (W if ad_type else cleared)
    entries[0] = leaf
    assert kernels.harvest(entries, bitmap, platform=platform)[1] == 1
    assert [int(leaf ^ entry) for entry in entries] == [W if ad_type else harvested, 0]


def test_collapse_looks_below_the_tables_it_is_given():
    """At level 3 the first leaf may lie two tables down; a link to a table that is not there is passed over."""
    tables = np.zeros((3, 512), np.uint64)
    tables[0, 3], tables[0, 5] = PRESENT | 99 << 12, PRESENT | 12 << 12
    tables[2, 7] = PRESENT | W | 0x1234567 << 12
    entries = np.array([PRESENT | 10 << 12, PRESENT | 11 << 12], np.uint64)
    assert kernels.collapse(entries, tables, 3, first_pfn=10) == 1
    assert [int(e) for e in entries] == [PRESENT | LARGE | W | 0x1200000 << 12, PRESENT | 11 << 12]

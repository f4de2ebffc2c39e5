"""How kernels become machine code: each function is lowered to LLVM's code once; a kernel links all that it calls, then is optimized.

numba by itself links and optimizes every function: what several kernels share is then optimized and kept in the cache once for
each of them, and at each level of calls (to compile everything takes 69 s instead of 52, to load a kernel from the cache up to 45 ms
instead of 5).

It stands on names that numba promises to nobody. Beside the classes imported below these are ``_linking_libraries``,
``_final_module``, ``_finalized``, ``_get_module_for_linking``, ``_optimize_final_module``, ``finalize`` and
``enable_object_caching`` of a code library;
``define_untyped_pipeline``, ``define_typed_pipeline`` and ``define_nopython_lowering_pipeline`` of the pass builder; ``run_pass``
of the lowering; ``insert_user_function`` of the target context; the flag ``no_compile``; ``_numba_type_`` of a
dispatcher; and ``entry_point`` of what it has compiled.
Where one is missing, the import of this module fails, and `spte._numba.jit` has numba compile the kernels by itself.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from llvmlite import binding
from numba import config
from numba._dynfunc import make_function
from numba.core.base import BaseContext
from numba.core.codegen import CPUCodeLibrary, JITCodeLibrary
from numba.core.compiler import CompilerBase, CompileResult, DefaultPassBuilder, Flags
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.registry import CPUDispatcher
from numba.core.typed_passes import NativeLowering

BOUNDSCHECK = bool(getattr(config, "BOUNDSCHECK", False))
_WRAPPER = "_ZN7cpython"  # begins the name of what Python calls
# What numba does for closures, `with`, literals, array expressions and raised exceptions: kernels have none, each costs a pass over them.
NEEDLESS = {
    "DeadBranchPrune", "DumpParforDiagnostics", "FindLiterallyCalls", "GenericRewrites", "InlineClosureLikes", "InlineInlinables",
    "InlineOverloads", "LiteralPropagationSubPipelinePass", "LiteralUnroll", "MakeFunctionToJitFunction", "NopythonRewrites",
    "NoPythonSupportedFeatureValidation", "RewriteDynamicRaises", "RewriteSemanticConstants", "WithLift",
}  # fmt: skip
NEEDS: dict[Any, tuple[str, ...]] = {
    JITCodeLibrary: ("_finalized", "_get_module_for_linking", "_optimize_final_module", "finalize", "enable_object_caching"),
    DefaultPassBuilder: ("define_untyped_pipeline", "define_typed_pipeline", "define_nopython_lowering_pipeline"),
    NativeLowering: ("run_pass",),
    BaseContext: ("insert_user_function",),
    Flags: ("no_compile",),
    CPUDispatcher: ("_numba_type_",),
    CompileResult: ("entry_point",),
}
NEEDS_SET = ("_linking_libraries", "_final_module")  # by the constructor of a code library


def _require() -> None:
    """Raise AttributeError for the first name that this numba does not have."""
    for owner, names in NEEDS.items():
        for name in names:
            getattr(owner, name)
    for name in NEEDS_SET:
        if name not in CPUCodeLibrary.__init__.__code__.co_names:
            raise AttributeError(f"the constructor of CPUCodeLibrary sets no {name!r}")


_require()


class PartLibrary(JITCodeLibrary):
    """The code of a function as kernels take it in; it gets no machine code of its own."""

    def finalize(self) -> None:
        """Leave what it calls to the kernel."""
        self._finalized = True


class KernelLibrary(JITCodeLibrary):
    """The code of a kernel with all that it calls."""

    def finalize(self) -> None:
        """Take in each part once, callers before what they call, because LLVM takes only what is named so far; then optimize."""
        below: dict[Any, None] = {}

        def visit(library: Any) -> None:
            if library not in below:
                for called in library._linking_libraries if isinstance(library, PartLibrary) else ():
                    visit(called)
                below[library] = None

        for library in self._linking_libraries:
            visit(library)
        self._linking_libraries = list(reversed(below))
        self.own = {f.name for f in self._final_module.functions if not f.is_declaration}
        super().finalize()

    def _optimize_final_module(self) -> None:
        """Let LLVM know that nobody else calls the parts: it then passes only those of a group's arrays that a part uses.

        Such a part has no name in machine code, where other kernels would find it by the name of theirs.
        """
        for function in self._final_module.functions:
            if not function.is_declaration and function.name not in self.own:
                function.linkage = "private"
        super()._optimize_final_module()

    def _get_module_for_linking(self) -> Any:
        """Return what the cache keeps beside the machine code: only the names that numba looks up in it, as no kernel links another."""
        names = [f.name for f in self._final_module.functions if not f.is_declaration and f.name.startswith(_WRAPPER)]
        return binding.parse_assembly("".join(f'define void @"{name}"() {{ ret void }}\n' for name in names))


@register_pass(mutates_CFG=True, analysis_only=False)
class LowerPart(NativeLowering):
    """Lower a function to LLVM's code and stop there."""

    _name = "spte_lower_part"

    def run_pass(self, state: Any) -> bool:
        """Lower it, and let callers find it by an entry point that is never called."""
        state.library = PartLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        super().run_pass(state)
        lowered = state["cr"]
        entry = make_function(lowered.fndesc.lookup_module(), lowered.fndesc.qualname, "", 0, lowered.env, (state.library,))
        state.targetctx.insert_user_function(entry, lowered.fndesc, [state.library])
        state["cr"] = lowered._replace(cfunc=entry)
        return True


@register_pass(mutates_CFG=True, analysis_only=False)
class LowerKernel(NativeLowering):
    """Lower a kernel, link and compile it."""

    _name = "spte_lower_kernel"

    def run_pass(self, state: Any) -> bool:
        """Do as numba does, with a library that links parts."""
        state.library = KernelLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        return bool(super().run_pass(state))


class _Compiler(CompilerBase):
    lowering: Any

    def define_pipelines(self) -> list[Any]:
        """Return the passes of numba that kernels need, with another one for lowering."""
        numbas = DefaultPassBuilder
        passes = PassManager(self.lowering._name)
        for build in (numbas.define_untyped_pipeline, numbas.define_typed_pipeline, numbas.define_nopython_lowering_pipeline):
            for each, text in build(self.state).passes:
                if each.__name__ not in NEEDLESS:
                    passes.passes.append((self.lowering if each is NativeLowering else each, text))
        passes.finalize()
        return [passes]


class PartCompiler(_Compiler):
    """Compiles what kernels call."""

    lowering = LowerPart


class KernelCompiler(_Compiler):
    """Compiles what Python calls."""

    lowering = LowerKernel


class Part:
    """A function that only kernels call; what numba needs of it is made when the first of them is compiled."""

    def __init__(self, func: Callable[..., Any], options: dict[str, Any]) -> None:
        self.py_func, self._options = func, options

    @cached_property
    def dispatcher(self) -> Any:
        """The function as numba compiles it."""
        return CPUDispatcher(self.py_func, targetoptions=self._options, pipeline_class=PartCompiler)

    @property
    def _numba_type_(self) -> Any:
        return self.dispatcher._numba_type_


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Collect no garbage: a compilation makes so many objects that looking for cycles among them took a seventh of its time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Entry(CPUDispatcher):
    """A function that Python calls; other kernels see its `part`.

    A kernel has one signature, so its machine code is called at once: numba's look at the types of the arguments took 7.8 us for
    those of a guest run, taking them apart takes 0.2. With bounds checks numba looks at them all the same.
    """

    def __init__(self, func: Callable[..., Any], options: dict[str, Any], part: Part) -> None:
        super().__init__(func, targetoptions=options, pipeline_class=KernelCompiler)
        self.part = part
        self.code: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if self.code is not None:
            return self.code(*args)
        with collection_paused():
            result = super().__call__(*args)
        if not BOUNDSCHECK:
            (compiled,) = self.overloads.values()  # one signature
            self.code = compiled.entry_point  # type: ignore[attr-defined]
        return result

    @property
    def _numba_type_(self) -> Any:
        return self.part._numba_type_

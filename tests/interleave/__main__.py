"""Explore programs: ``python -m interleave BOUND [MUTANT [PROGRAM...]]`` with NUMBA_DISABLE_JIT=1; one line of JSON a program."""

import contextlib
import json
import sys

from interleave.mutants import mutated
from interleave.programs import PROGRAMS, Guest, told
from interleave.scheduler import explore
from spte._numba import jit


def main(bound, mutant=None, *only):
    if not jit.PLAIN:
        sys.exit("kernels are compiled: set NUMBA_DISABLE_JIT=1")
    for name in only or PROGRAMS:
        guest = Guest(PROGRAMS[name])
        with mutated(mutant) if mutant else contextlib.nullcontext():
            runs, failure, run = explore(guest.scheduler, guest.begin, guest.verdict, int(bound))
        schedule = told(guest, run) if run else ""
        sys.stdout.write(json.dumps({"program": name, "schedules": runs, "failure": failure, "schedule": schedule}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])

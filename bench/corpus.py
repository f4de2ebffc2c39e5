"""Record the programs of the corpus again: ``python -m bench.corpus DIRECTORY [NAME...]``.

They come from Debian packages; what is not installed is named, with its package, and nothing is recorded. Each is a shell script
in which ``record`` is ``spte record -o DIRECTORY/NAME.npz``. Servers listen on the loopback address only.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PRELUDE = """
set -eu
record() { "$PYTHON" -c 'from spte.cli import main; main()' record -o "$OUT" "$@"; }
"""


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of the corpus.

    Parameters
    ----------
    packages : dict
        The Debian package of each binary.
    script : str
        Records it, in an empty directory, with a fixed load.
    """

    packages: dict[str, str]
    script: str


SQLITE = Program({}, """
record --interval 50ms -- "$PYTHON" -c '
import random, sqlite3
random.seed(1)
db = sqlite3.connect(":memory:")
db.execute("create table t (k integer, v text)")
db.executemany("insert into t values (?, ?)", ((random.randrange(1 << 40), "x" * 200) for _ in range(300_000)))
db.execute("create index i on t (k)")
for _ in range(150_000):
    db.execute("update t set v = ? where rowid = ?", ("y" * 200, random.randrange(1, 300_001)))
db.execute("update t set v = 1 where rowid between 100000 and 200000")
'
""")
REDIS = Program({"redis-server": "redis-server", "redis-benchmark": "redis-tools", "redis-cli": "redis-tools"}, """
record -- sh -c '
  (sleep 1; redis-benchmark -p 17878 -q -P 16 -r 300000 -d 512 -n 300000 -t set,incr,lpush,get; redis-cli -p 17878 shutdown) &
  exec redis-server --port 17878 --bind 127.0.0.1 --save ""'
""")
MEMCACHED = Program({"memcached": "memcached"}, """
cat > load.py <<'END'
import socket
with socket.create_connection(("127.0.0.1", 17879)) as connection:
    for turn in range(300):
        for i in range(turn * 1000, turn * 1000 + 1000):
            size = 100 + i * 31 % 900
            connection.sendall(b"set k%d 0 0 %d noreply\\r\\n%s\\r\\n" % (i * 7919 % 100_000, size, b"x" * size))
    connection.sendall(b"shutdown\\r\\n")
END
record -- sh -c '(sleep 1; exec "$PYTHON" load.py) & exec memcached -A -u nobody -l 127.0.0.1 -p 17879 -m 256'
""")
POSTGRES = Program({"/usr/lib/postgresql/*/bin/postgres": "postgresql"}, """
bin=$(dirname "$(ls /usr/lib/postgresql/*/bin/postgres | tail -1)")
user=""
if [ "$(id -u)" = 0 ]; then chown nobody .; user="setpriv --reuid=nobody --clear-groups"; fi
$user "$bin/initdb" -A trust -D data > /dev/null
cat > load.sql <<'END'
create table t (k bigint primary key, v text);
insert into t select i, repeat('x', 200) from generate_series(1, 400000) i;
update t set v = repeat('y', 200) where k % 7 = 0;
create index on t (v, k);
update t set v = 'z' where k between 100000 and 200000;
END
record -- $user "$bin/postgres" --single -D data -c shared_buffers=128MB postgres < load.sql > /dev/null
""")
COMPILER = Program({"gcc": "gcc"}, """
"$PYTHON" - > large.c <<'END'
for i in range(6000):
    print(f"int f{i}(int *a, int n) {{ int s = {i}; for (int i = 0; i < n; i++) s += a[i] * (s ^ {i * 7}); return s; }}")
END
record -- "$(gcc -print-prog-name=cc1)" -quiet -O2 large.c -o large.s
""")
STRESS_NG = Program({"stress-ng": "stress-ng", "pgrep": "procps"}, """
stress-ng --vm 1 --vm-bytes 256M --vm-keep --vm-method rand-set --timeout 12s --quiet &
sleep 1
pid=$(pgrep -n stress-ng-vm || pgrep -n stress-ng)  # the last one made: the worker
timeout --preserve-status 8 "$PYTHON" -c 'from spte.cli import main; main()' record -o "$OUT" --pid "$pid"
wait
""")
PROGRAMS = {
    "sqlite": SQLITE, "redis": REDIS, "postgres": POSTGRES, "memcached": MEMCACHED, "compiler": COMPILER, "stress-ng": STRESS_NG,
}  # fmt: skip


def missing(names: list[str]) -> dict[str, str]:
    """Return the binaries that the programs `names` take and that are not installed, and the package of each."""
    wanted = {binary: package for name in names for binary, package in PROGRAMS[name].packages.items()}
    return {binary: package for binary, package in wanted.items() if not _is_there(binary)}


def _is_there(binary: str) -> bool:
    return any(Path("/").glob(binary[1:])) if binary.startswith("/") else shutil.which(binary) is not None


def main(argv: list[str]) -> int:
    """Record; exit code 2 with one line for a name that is not in the corpus, 4 if a package is not installed."""
    if not argv or not Path(argv[0]).is_dir() or set(argv[1:]) - set(PROGRAMS):
        print(f"usage: python -m bench.corpus DIRECTORY [{'|'.join(PROGRAMS)}]..., DIRECTORY exists", file=sys.stderr)
        return 2
    names = argv[1:] or list(PROGRAMS)
    if absent := missing(names):
        print(f"{', '.join(absent)}: not installed; apt install {' '.join(sorted(set(absent.values())))}", file=sys.stderr)
        return 4
    for name in names:
        output = (Path(argv[0]) / f"{name}.npz").resolve()
        with tempfile.TemporaryDirectory() as directory:
            Path(directory).chmod(0o755)
            environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(output)}
            code = subprocess.run(["sh", "-c", PRELUDE + PROGRAMS[name].script], cwd=directory, env=environment, check=False).returncode
        if code:
            print(f"{name}: recording failed with exit code {code}", file=sys.stderr)
            return code
        print(f"{output}: {output.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

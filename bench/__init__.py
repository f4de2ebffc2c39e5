"""Benchmarks: each kernel beside a limit measured in the same process.

    pytest bench                                    sizes that take seconds
    pytest bench --guest 1T                         the size of the bars; needs 12 GiB
    pytest bench --benchmark-json=now.json          keep the figures
    python -m bench.report now.json [chart.png]     make a table, and a chart, of them
    python -m bench.report now.json docs/bench.png docs/benchmarks.md README.md     and put them where readers find them
    python -m bench.threads --guest 32G             what vCPUs on two threads do, and while a third harvests
    python -m bench.stress                          threads write and harvest; is a write lost?
    pytest bench --benchmark-save=base              keep them under a name; `--benchmark-compare=base` sets a later run beside them
    pytest bench --benchmark-disable                run each once, as a test
"""

"""How long a step takes on this device: `sdi-fast bench`, and what benchmarks/bench_step.py shares.

`models` builds Stable Diffusion 2.1-base's size with random weights, `workload` says what is
computed, `timing` times it, `stored` reads what was measured elsewhere, `command` prints.
"""

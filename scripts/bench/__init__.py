"""The benchmark of methods, room by room; `bench_methods.py` is its door."""

"""The short benchmark: movement pruning beside `torch.nn.utils.prune` gradual magnitude, and dense fine-tuning.

    python scripts/bench_quality.py --data DATA --rows 1024

It is bench_methods.py with other defaults: one seed, two sparsities, three methods. All its flags work here, and both share
their finished cells.
"""

from bench_methods import main

if __name__ == "__main__":
    main(
        methods=["dense", "movement", "torch_gradual"],
        sparsities=[0.75, 0.9],
        seeds=1,
    )

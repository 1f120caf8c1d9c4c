"""`finllm-prune run` as a script, so that `accelerate launch` can start it on many processes.

accelerate launch --config_file recipes/accelerate/ddp.yaml scripts/run.py RECIPE [key.sub=value ...]
"""

import sys

from finllm_prune.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "run")
    main()

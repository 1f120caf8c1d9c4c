"""What bench_scale.py is made of: memory on one rank, several ranks and what they foretell, models of LLM shapes."""

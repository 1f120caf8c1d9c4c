"""DistilBERT."""

from finllm_prune.families.family import Family, Part

FAMILY = Family(
    model_type="distilbert",
    blocks="transformer.layer",
    attention=Part(inputs=("attention.q_lin", "attention.k_lin", "attention.v_lin"), output="attention.out_lin"),
    mlp=Part(inputs=("ffn.lin1",), output="ffn.lin2"),
    heads="n_heads",
    width="hidden_dim",
    depth="n_layers",
)

"""ModernBERT: ModernFinBERT. Queries, keys and values lie in one matrix, gate and up projection in another."""

from finllm_prune.families.family import Family, Part

FAMILY = Family(
    model_type="modernbert",
    blocks="layers",
    attention=Part(inputs=("attn.Wqkv",), output="attn.Wo", fused=3),
    mlp=Part(inputs=("mlp.Wi",), output="mlp.Wo", fused=2),
    pre_norm=True,
)

"""Llama. A head unit is a kv group: one key and value head with the query heads that share it."""

from finllm_prune.families.family import Family, Part

FAMILY = Family(
    model_type="llama",
    blocks="layers",
    attention=Part(inputs=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), output="self_attn.o_proj"),
    mlp=Part(inputs=("mlp.gate_proj", "mlp.up_proj"), output="mlp.down_proj"),
    heads="num_key_value_heads",
    free_heads=True,
    pre_norm=True,
)

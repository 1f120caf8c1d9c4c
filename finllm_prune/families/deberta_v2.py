"""DeBERTa-v2 and v3. Where the positions have projections of their own (v2), a head has rows in these too."""

from finllm_prune.families.family import Family, Part

FAMILY = Family(
    model_type="deberta-v2",
    blocks="encoder.layer",
    attention=Part(
        inputs=("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
        output="attention.output.dense",
        optional=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
    ),
    mlp=Part(inputs=("intermediate.dense",), output="output.dense"),
    counts_heads="attention.self",
)

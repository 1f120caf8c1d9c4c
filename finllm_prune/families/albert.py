"""ALBERT: one set of weights (``num_hidden_groups`` sets) for all blocks. An ``inner_group_num`` above 1 is refused."""

from finllm_prune.families.family import Family, Part

FAMILY = Family(
    model_type="albert",
    blocks="encoder.albert_layer_groups",
    attention=Part(
        inputs=tuple(f"albert_layers.0.attention.{name}" for name in ("query", "key", "value")),
        output="albert_layers.0.attention.dense",
    ),
    mlp=Part(inputs=("albert_layers.0.ffn",), output="albert_layers.0.ffn_output"),
    shared=True,
)

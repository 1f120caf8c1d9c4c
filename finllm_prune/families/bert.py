"""BERT: FinBERT (ProsusAI/finbert, yiyanghkust/finbert-tone), MiniLM."""

from finllm_prune.families.family import Family, Part

FAMILY = Family(
    model_type="bert",
    blocks="encoder.layer",
    attention=Part(
        inputs=("attention.self.query", "attention.self.key", "attention.self.value"), output="attention.output.dense"
    ),
    mlp=Part(inputs=("intermediate.dense",), output="output.dense"),
)

"""Language models of LLM shapes with random weights on one device: tokens per second, peak memory, and one-shot pruning."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

from finllm_prune.families import find_family
from finllm_prune.pruning import ONESHOT, Cubic, Global, Head, Magnitude, Neuron, OneShot, Pruner, Rule
from finllm_prune.training.oneshot import prune_once
from scale.memory import held_bytes, most_bytes

SHAPES: dict[str, tuple[int, int, int, int, int]] = {  # width, blocks, neurons, heads, tokens
    "tiny": (64, 2, 256, 8, 500),
    "1b": (2048, 16, 8192, 32, 128256),
    "8b": (4096, 32, 14336, 32, 128256),
}
RULES: dict[str, list[Rule]] = {
    "neurons and heads": [Rule("mlp", 0.5, structure=Neuron()), Rule("attention", 0.5, structure=Head())],
    "single weights, global": [Rule("encoder", 0.5, budget=Global())],
    "single weights by magnitude": [Rule("encoder", 0.5, criterion=Magnitude(), budget=Global())],
}


def make_llama(shape: str, device: torch.device) -> PreTrainedModel:
    """A Llama of that shape, bf16, made on the device."""
    width, blocks, neurons, heads, tokens = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=blocks, intermediate_size=neurons, num_attention_heads=heads,
        num_key_value_heads=heads // 4, vocab_size=tokens, max_position_embeddings=4096, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForSequenceClassification(config)
    finally:
        torch.set_default_dtype(before)


def settle(device: torch.device) -> float:
    """The time once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak(device: torch.device, held: list[object], work: Callable[[], object]) -> int:
    """The most bytes that tensors take while the work runs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    return held_bytes(held, nn.Module()) + most_bytes(work)


def train(
    shape: str, device: torch.device, rules: str, batch: int, tokens: int, steps: int, checkpointing: bool,
) -> dict[str, Any]:  # fmt: skip
    """Plain steps and steps with pruning in turn, on one model; no mask is due in those that are timed."""
    model = make_llama(shape, device).train()
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(1, 500, (batch, tokens), device=device)
    labels = torch.arange(batch, device=device) % 3

    def step(pruner: Pruner | None, progress: float = 0.0) -> float:
        begin = settle(device)
        model(input_ids=ids, labels=labels).loss.backward()
        if pruner is not None:
            pruner.before_step(progress)
        optimizer.step()
        if pruner is not None:
            pruner.after_step()
        optimizer.zero_grad()
        return settle(device) - begin

    step(None)
    plain_peak = peak(device, [model, optimizer], lambda: step(None))
    pruner = Pruner(find_family("llama").groups(model, RULES[rules]), Cubic(0.0, 0.5, 1.0, updates=2))
    choosing = step(pruner, 0.01), step(pruner, 0.51)
    pruned_peak = peak(device, [model, optimizer, pruner], lambda: step(pruner, 0.52))
    seconds: dict[str, list[float]] = {"plain": [], "pruned": []}
    for number in range(steps):
        seconds["plain"].append(step(None))
        seconds["pruned"].append(step(pruner, 0.53 + 0.4 * number / steps))
    ratios = [own / base for own, base in zip(seconds["pruned"], seconds["plain"], strict=True)]
    return {
        "work": f"training, {rules}", "tokens_per_second": batch * tokens / statistics.median(seconds["pruned"]),
        "plain_tokens_per_second": batch * tokens / statistics.median(seconds["plain"]),
        "ratio": statistics.median(ratios), "ratios": [min(ratios), max(ratios)], "seconds_choosing": choosing[1],
        "peak": pruned_peak, "plain_peak": plain_peak, "held": held_bytes(pruner, model),
    }  # fmt: skip


def once(shape: str, device: torch.device, name: str, rows: int, tokens: int) -> dict[str, Any]:
    """One shot at a half of all linear weights of the blocks: minutes per billion of them, and the peak."""
    model = make_llama(shape, device)
    family = find_family("llama")
    pruner = Pruner(family.groups(model, [Rule("encoder", 0.5, criterion=Magnitude())]), Cubic())
    size = sum(slot.parameter.numel() for group in pruner.groups for slot in group.slots)
    method: OneShot = ONESHOT[name]()
    ids = torch.randint(1, 500, (rows, tokens), device=device)
    batches: list[dict[str, Tensor]] = [
        {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)
    ]
    seconds: list[float] = []

    def work() -> None:
        begin = settle(device)
        prune_once(model, family, pruner, method, batches)
        seconds.append(settle(device) - begin)

    most = peak(device, [model], work)
    return {
        "work": f"{name}, {rows} x {tokens} tokens", "minutes_per_billion": seconds[0] / 60 / (size / 1e9), "peak": most,
        "sparsity": pruner.sparsity(),
    }  # fmt: skip


def table(shape: str, device: str, rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        f"Llama of shape {shape}, random weights, bf16, {device}.\n",
        "| work | tokens/s (plain) | time, of plain: median (min to max) | peak memory, GB (plain) "
        "| minutes per billion weights |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['work']} | {row['failed']} | | | |")
        elif "ratio" in row:
            low, high = row["ratios"]
            lines.append(
                f"| {row['work']} | {row['tokens_per_second']:.0f} ({row['plain_tokens_per_second']:.0f}) "
                f"| {row['ratio']:.3f} ({low:.3f} to {high:.3f}) | {row['peak'] / 1e9:.3f} ({row['plain_peak'] / 1e9:.3f}) | |"
            )
        else:
            lines.append(f"| {row['work']} | | | {row['peak'] / 1e9:.3f} | {row['minutes_per_billion']:.2f} |")
    return "\n".join(lines)

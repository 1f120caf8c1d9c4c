"""Bytes that pruning holds beside plain AdamW fine-tuning, counted and not estimated."""

import gc
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from finllm_prune.families import find_family
from finllm_prune.pruning import Block, Cubic, Global, Head, Magnitude, Movement, Neuron, Pruner, Rule
from finllm_prune.pruning.sharding import here

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 500},
    "MiniLM-L6": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536, "num_attention_heads": 12},
    "BERT-base": {},
}  # fmt: skip
RULES: dict[str, list[Rule]] = {
    "plain AdamW": [],
    "90 % of single weights, movement": [Rule("encoder", 0.9, budget=Global())],
    "the same, `moments: factored`": [Rule("encoder", 0.9, criterion=Movement(moments="factored"), budget=Global())],
    "the same, `moments: factored`, `regrow: false`": [
        Rule("encoder", 0.9, criterion=Movement(moments="factored"), budget=Global(), regrow=False)
    ],
    "90 % of single weights, magnitude": [Rule("encoder", 0.9, criterion=Magnitude(), budget=Global())],
    "90 % in blocks of 32 x 32": [Rule("encoder", 0.9, structure=Block(), budget=Global())],
    "75 % of neurons": [Rule("mlp", 0.75, structure=Neuron())],
    "the same, `regrow: false`": [Rule("mlp", 0.75, structure=Neuron(), regrow=False)],
    "50 % of heads": [Rule("attention", 0.5, structure=Head())],
    "50 % of neurons and heads": [Rule("mlp", 0.5, structure=Neuron()), Rule("attention", 0.5, structure=Head())],
}
STEPS = 4  # the masks are chosen at the first two; the last is watched


def held_bytes(root: object, beside: nn.Module) -> int:
    """The bytes of every tensor that can be reached from an object, those of a model and its gradients aside."""
    own = {here(t).untyped_storage().data_ptr() for p in beside.parameters() for t in (p, p.grad) if t is not None}
    found: dict[int, int] = {}
    seen, waiting = {id(root), id(beside)}, [root]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            storage = here(item).untyped_storage()
            if item.device.type != "meta" and storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            continue
        for inner in gc.get_referents(item):
            if id(inner) not in seen and not isinstance(inner, type | types.ModuleType | types.FunctionType):
                seen.add(id(inner))
                waiting.append(inner)
    return sum(found.values())


def most_bytes(work: Callable[[], object]) -> int:
    """The most that torch's CPU allocator holds at once while the work runs, above what it held before.

    The work is done twice: only from the second time on does the profiler know the size of what is freed.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
        second = time.time_ns()
        work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.start_ns() >= second:
            now += event.nbytes()
            most = max(most, now)
    return most


def make_bert(shape: str) -> PreTrainedModel:
    """A BERT of that shape with random weights."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(num_labels=3, **SHAPES[shape]))


def measure(shape: str, variant: str, batch: int, tokens: int) -> dict[str, Any]:
    """Train a few steps; bytes of all weights, of the targeted ones, held between steps, and at most within a step.

    ``step`` and ``choosing`` are above what the model, its gradients, AdamW and the Pruner hold before a step; the step that is
    watched chooses no mask, and ``choosing`` is the choice of masks alone.
    """
    model = make_bert(shape)
    rules = RULES[variant]
    pruner = Pruner(find_family("bert").groups(model, rules), Cubic(0.0, 0.5, 1.0)) if rules else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, 500, (batch, tokens))
    labels = torch.arange(batch) % 3

    def step(number: int) -> None:
        model(input_ids=ids, labels=labels).loss.backward()
        if pruner is not None:
            pruner.before_step(number / (STEPS + 1))
        optimizer.step()
        if pruner is not None:
            pruner.after_step()
        optimizer.zero_grad(set_to_none=False)

    for number in range(1, STEPS):
        step(number)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    found: dict[str, Any] = {"model": shape, "variant": variant, "weights": weights, "targeted": 0, "held": 0}
    if pruner is not None:
        slots = [slot for group in pruner.groups for slot in group.slots]
        found |= {"targeted": sum(slot.parameter.nbytes for slot in slots), "held": held_bytes(pruner, model)}
        found["sparsity"] = pruner.sparsity()
    found["step"] = most_bytes(lambda: step(STEPS))
    found["choosing"] = 0
    if pruner is not None:
        with torch.no_grad():
            for group in pruner.groups:
                group.unpark()
            found["choosing"] = most_bytes(lambda: pruner._choose(final=False))
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what is held and what comes and goes, as multiples of the bytes of the targeted and of all weights."""
    lines = [
        "| model | pruning | targeted, MB (of all weights) | held: of targeted | of all weights "
        "| a step, above what is held: MB (plain) | choosing masks, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    plain = {row["model"]: row["step"] for row in rows if not row["targeted"]}
    lines += [
        f"| {row['model']} | {row['variant']} | {row['targeted'] / 1e6:.1f} ({row['targeted'] / row['weights']:.0%}) "
        f"| {row['held'] / row['targeted']:.2f} | {row['held'] / row['weights']:.2f} "
        f"| {row['step'] / 1e6:.0f} ({plain[row['model']] / 1e6:.0f}) | {row['choosing'] / 1e6:.0f} |"
        for row in rows
        if row["targeted"]
    ]
    return "\n".join(lines)

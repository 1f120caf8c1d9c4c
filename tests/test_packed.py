"""packed: any zeros take a bit on disk, and what is loaded is the model in memory, or an error in one sentence."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from finllm_prune.checkpoints import find_format, verify
from finllm_prune.checkpoints.manifest import MANIFEST
from finllm_prune.checkpoints.packing import Memory, Packed, pack, unpack
from finllm_prune.checkpoints.quantizer import WEIGHTS
from finllm_prune.errors import InputError, ProofError
from finllm_prune.families import find_architecture
from finllm_prune.pruning import NM, Constant, Pruner, Random, Rule, Structure, Unstructured
from tests.conftest import FAMILIES, tiny_model
from tests.test_families import logits, loud
from tests.test_ragged import uneven, with_zeros

FORMATS = ["packed", "packed-int8"]


def sparse(model_type: str = "bert", structure: Structure | None = None, sparsity: float = 0.9) -> PreTrainedModel:
    model = loud(tiny_model(model_type, layers=3))
    rule = Rule("encoder", sparsity, structure or Unstructured(), Random())
    Pruner(find_architecture(model_type).groups(model, [rule]), Constant()).finish()
    return model


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(folder)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    shape = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    kept = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    return (torch.randn(shape, generator=generator) * kept).to(dtype)


@given(matrices())
def test_a_packed_matrix_comes_back_to_the_bit(matrix: Tensor) -> None:
    packed = pack(matrix)
    assert torch.equal(unpack(packed, tuple(matrix.shape), matrix.dtype), matrix)
    assert packed.bytes == -(-matrix.numel() // 8) + int((matrix != 0).sum()) * matrix.element_size()


@given(matrices())
def test_eight_bits_are_half_a_step_away_at_most(matrix: Tensor) -> None:
    packed = pack(matrix, int8=True)
    back = unpack(packed, tuple(matrix.shape), torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(unpack(packed, tuple(matrix.shape), dtype), back.to(dtype))
    step = matrix.float().abs().amax(1, keepdim=True) / 127
    assert bool(((back - matrix.float()).abs() <= step * 0.501).all())
    assert not back[matrix == 0].any()
    shape = (matrix.shape[0], matrix.shape[1])
    read = Packed.of(**packed.tensors(), shape=shape)
    assert torch.equal(unpack(read, shape, torch.float32), back)
    for more in (torch.ones(1, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)):
        longer = packed.tensors() | {"bitmask": torch.cat([packed.tensors()["bitmask"], more])}
        with pytest.raises(InputError, match="the file is damaged"):
            unpack(Packed.of(**longer, shape=shape), shape, torch.float32)
    again = pack(back, int8=True)
    torch.testing.assert_close(unpack(again, tuple(matrix.shape), torch.float32), back)


@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.sampled_from([torch.float32, torch.bfloat16, torch.float64])), max_size=6
    )
)
def test_matrices_in_one_piece_of_memory_are_strangers(wanted: list[tuple[int, torch.dtype]]) -> None:
    memory = Memory()
    tensors = [memory.zeros(count, dtype) for count, dtype in wanted]
    for number, tensor in enumerate(tensors, start=1):
        assert not tensor.any()
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors, start=1))
    assert [(len(tensor), tensor.dtype, tensor.untyped_storage().nbytes()) for tensor in tensors] == [
        (count, dtype, count * dtype.itemsize) for count, dtype in wanted
    ]


@given(matrices(), st.data())
def test_parts_that_do_not_fit_are_refused(matrix: Tensor, data: st.DataObject) -> None:
    packed = pack(matrix)
    bit = data.draw(st.integers(0, 8 * len(packed.bitmask) - 1))
    flipped = packed.bitmask.clone()
    flipped[bit // 8] ^= 1 << bit % 8
    more = torch.cat([packed.values, torch.ones(1, dtype=matrix.dtype)])
    wrong = [
        Packed(flipped, packed.values), Packed(packed.bitmask, more), Packed(packed.bitmask[:-1], packed.values),
        Packed(packed.bitmask.int(), packed.values), Packed(packed.bitmask, packed.values, torch.ones(len(matrix))),
        Packed(packed.bitmask, packed.values.to(torch.int8)), Packed(packed.bitmask, packed.values.long()),
    ]  # fmt: skip
    eight = pack(matrix, int8=True)
    wrong += [Packed(eight.bitmask, eight.values, torch.full((len(matrix),), math.inf))]
    for parts in wrong:
        with pytest.raises(InputError, match="the file is damaged"):
            unpack(parts, tuple(matrix.shape), matrix.dtype)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_a_packed_model_is_the_one_in_memory(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, model_type: str, format_name: str
) -> None:
    model = sparse(model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    returned = find_format(format_name)(model, tokenizer, tmp_path / "saved")
    reloaded = load(tmp_path / "saved")
    assert type(reloaded) is type(model)
    assert torch.equal(logits(reloaded), logits(returned))
    exact = format_name == "packed"
    torch.testing.assert_close(logits(returned), logits(model), atol=1e-5 if exact else 0.05, rtol=0)
    manifest = verify(tmp_path / "saved")
    assert manifest["format"] == format_name
    assert exact or 0 < manifest["rounding"]["logit_difference"] <= manifest["rounding"]["tolerance"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    reloaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(returned))


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("family", ["bert", "llama", "deberta-v2"])
def test_zeros_are_packed_in_ragged_widths_too(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, family: str, format_name: str
) -> None:
    returned = find_format(format_name)(with_zeros(uneven(family)), tokenizer, tmp_path / "saved")
    reloaded = load(tmp_path / "saved")
    assert torch.equal(logits(reloaded), logits(returned))
    assert reloaded.config.quantization_config == returned.config.quantization_config
    assert reloaded.config.quantization_config["packed"] == 0
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config["packed"] > 0 < len(config["per_layer_config"])


@pytest.mark.parametrize(
    ("family", "structure"), [*((family, NM(2, 4)) for family in FAMILIES), ("bert", NM(1, 4)), ("qwen3", NM(4, 8))]
)
def test_n_of_m_zeros_are_packed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, family: str, structure: NM
) -> None:
    model = sparse(family, structure, 1 - structure.n / structure.m)
    find_format("packed")(model, tokenizer, tmp_path / "saved")
    reloaded = load(tmp_path / "saved")
    assert torch.equal(logits(reloaded), logits(model))
    linears, cut = (find_architecture(family).linears(each) for each in (reloaded, model))
    assert all(torch.equal(linear.weight, cut[path].weight) for path, linear in linears.items())
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization_config"]["packed"] == len(linears)


def test_a_model_of_an_unknown_family_is_packed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = loud(tiny_model("nystromformer", num_landmarks=4, segment_means_seq_len=16))
    rules = [Rule(".*(query|key|value|dense)", 0.9, Unstructured(), Random())]
    Pruner(find_architecture("nystromformer").groups(model, rules), Constant()).finish()
    find_format("packed")(model, tokenizer, tmp_path / "saved")
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in load(tmp_path / "saved").state_dict().items())


def test_bytes_at_nine_of_ten_zeros(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = sparse()
    linears = find_architecture("bert").linears(model)
    names = {f"{path}.weight" for path in linears}
    dense = sum(linear.weight.nbytes for linear in linears.values())
    for format_name, most in (("packed", 0.14), ("packed-int8", 0.09)):  # rows are short here: a scale weighs more
        find_format(format_name)(model, tokenizer, tmp_path / format_name)
        state = load_file(tmp_path / format_name / WEIGHTS)
        assert sum(part.nbytes for name, part in state.items() if name.rpartition("_")[0] in names) <= most * dense


def test_rounding_that_moves_the_logits_is_no_checkpoint(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = sparse(sparsity=0.5)
    with torch.no_grad():
        for linear in find_architecture("bert").linears(model).values():
            linear.weight[:, 0] = 200 * linear.weight[:, 1].abs().max()
    with pytest.raises(ProofError, match=r"8-bit values move the logits by .*; use packed, which changes nothing"):
        find_format("packed-int8")(model, tokenizer, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_changed_file_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    find_format("packed")(sparse(), tokenizer, tmp_path / "saved")
    file = tmp_path / "saved" / WEIGHTS
    whole, state = file.read_bytes(), load_file(file)
    manifest = (tmp_path / "saved" / MANIFEST).read_text()
    (tmp_path / "saved" / MANIFEST).unlink()  # which would tell it first: test_tampered.py
    name = next(name for name in state if name.endswith("weight_values"))
    mask = name.replace("values", "bitmask")
    for change in ({name: state[name][:-1]}, {mask: state[mask] ^ 1}, {mask: state[mask][:-1].clone()}):
        save_file(state | change, file, metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"the file is damaged or belongs to another model"):
            load(tmp_path / "saved")
    for gone in ([name], [name, mask]):
        save_file({key: part for key, part in state.items() if key not in gone}, file, metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"is missing; export|packed matrices, but config.json tells of"):
            load(tmp_path / "saved")
    file.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="is missing or damaged"):
        load(tmp_path / "saved")
    (tmp_path / "saved" / MANIFEST).write_text(manifest)
    with pytest.raises(ProofError, match="is not the file that was proved"):
        verify(tmp_path / "saved")

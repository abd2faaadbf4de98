"""Every output type: its bytes, that nothing is lost, and what it refuses."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from bitconvert.errors import BitconvertError
from bitconvert.models import gguf_types
from bitconvert.models.safetensors_file import TensorSpec
from bitconvert.packing.formats import FALLBACKS, FORMATS, GgufFormat, formats_that_hold
from bitconvert.packing.formats.base import block_scales, with_stored_scale
from bitconvert.packing.formats.directory import DirectoryFormat
from bitconvert.packing.formats.hf_bitnet import HfBitnet
from bitconvert.recipe import Scaling
from bitconvert.ternary.quantize import TernaryTensor, scale_shape, ternarize

settings.register_profile("busy machines", deadline=None)
settings.load_profile("busy machines")

TQ1_0, TQ2_0, I2_S, BF16 = (FORMATS[name] for name in ("tq1_0", "tq2_0", "i2_s", "bf16"))
Q2_0, Q8_0, F16 = FALLBACKS
GGUF_FORMATS = [TQ1_0, TQ2_0, *FALLBACKS]
HF_BITNET, COMPRESSED_TENSORS, ONNX = (FORMATS[name] for name in ("safetensors", "compressed-tensors", "onnx"))
ANY_SCALING = ("compressed-tensors", "onnx")
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "formats.json").read_text())

by_name = pytest.mark.parametrize("form", GGUF_FORMATS, ids=lambda form: form.name)


def golden_tensor() -> TernaryTensor:
    """Two rows of 512: every trit pattern of period 5 and 7, a zero block, and two different scales."""
    index = torch.arange(1024)
    codes = ((index * index // 5 + index // 7) % 3 - 1).to(torch.int8).view(2, 512)
    codes[1, :256] = 0
    return TernaryTensor(codes, torch.tensor([[0.02343, 1.5]]).half().float().view(2, 1))


@st.composite
def ternary_tensors(draw: st.DrawFn, block: int) -> TernaryTensor:
    """Random codes with zero blocks, of any shape a block divides, under any granularity, at any float16 scale."""
    rows, blocks = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    group = draw(st.sampled_from([divisor for divisor in (1, 2, 4) if blocks % divisor == 0]))
    granularity = draw(st.sampled_from(["tensor", "row", f"group:{group * block}"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    codes = torch.randint(-1, 2, (rows, blocks, block), generator=generator, dtype=torch.int8)
    codes *= torch.rand((rows, blocks, 1), generator=generator) > draw(st.sampled_from([0.0, 0.5, 1.0]))
    shape = scale_shape(rows, blocks * block, Scaling(granularity=granularity))
    bits = torch.randint(1, 0x7C00, shape, generator=generator, dtype=torch.int16)  # 2**-24 … 65504, subnormals too
    return TernaryTensor(codes.reshape(rows, -1), bits.view(torch.float16).float())


# ---- nothing is lost -------------------------------------------------------------------------------------------------


@by_name
@given(data=st.data())
def test_decoding_gives_back_codes_and_scales(form: GgufFormat, data: st.DataObject) -> None:
    tensor = data.draw(ternary_tensors(form.type.block))
    decoded = form.decode(form.encode(tensor), tuple(tensor.codes.shape))
    assert torch.equal(decoded.codes, tensor.codes)
    np.testing.assert_array_equal(decoded.scale.numpy(), block_scales(tensor, form.type.block))
    assert torch.equal(decoded.dequantize(), tensor.dequantize() + 0.0)  # + 0.0: a zero code of negative sign is zero


@by_name
@given(data=st.data())
def test_the_gguf_package_reads_the_same_weights(form: GgufFormat, data: st.DataObject) -> None:
    gguf_types.register_q2_0()
    tensor = data.draw(ternary_tensors(form.type.block))
    weights = gguf.dequantize(form.encode(tensor), form.type.ggml())
    np.testing.assert_array_equal(weights, tensor.dequantize().numpy())


@pytest.mark.parametrize("form", [TQ1_0, TQ2_0], ids=lambda form: form.name)
@given(data=st.data())
def test_bytes_equal_those_of_the_reference_quantizer(form: GgufFormat, data: st.DataObject) -> None:
    tensor = data.draw(ternary_tensors(form.type.block))
    reference = gguf.quantize(tensor.dequantize().numpy(), form.type.ggml())
    np.testing.assert_array_equal(form.encode(tensor), reference)


def test_a_trained_weight_survives_from_ternarize_to_bytes() -> None:
    weight = torch.randn(96, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    tensor = with_stored_scale(ternarize(weight, Scaling()), "weight")
    reference = gguf.quantize(tensor.dequantize().numpy(), GGMLQuantizationType.TQ2_0)
    np.testing.assert_array_equal(TQ2_0.encode(tensor), reference)


@given(data=st.data())
def test_hf_bitnet_gives_back_codes_and_scale(data: st.DataObject) -> None:
    codes = data.draw(ternary_tensors(8)).codes
    codes = codes.repeat(4, 1)
    scale = torch.tensor([data.draw(st.floats(1e-5, 100))])
    parts = HF_BITNET.encode(TernaryTensor(codes, scale))
    require_announced(HF_BITNET, parts, tuple(codes.shape), Scaling())
    decoded = HF_BITNET.decode(parts)
    assert torch.equal(decoded.codes, codes)
    if codes.any():
        torch.testing.assert_close(decoded.scale, scale, rtol=1e-6, atol=0)


@given(data=st.data(), block=st.sampled_from([4, 24, 64]))
def test_compressed_tensors_gives_back_codes_and_scales(data: st.DataObject, block: int) -> None:
    tensor = data.draw(ternary_tensors(block))
    rows, columns = tensor.codes.shape
    grouped = tensor.scale.dim() == 2 and tensor.scale.shape[1] > 1
    scaling = Scaling(granularity=f"group:{columns // tensor.scale.shape[1]}" if grouped else "row")
    parts = COMPRESSED_TENSORS.encode(tensor)
    require_announced(COMPRESSED_TENSORS, parts, (rows, columns), scaling)
    decoded = COMPRESSED_TENSORS.decode(parts)
    assert torch.equal(decoded.codes, tensor.codes)
    assert torch.equal(decoded.dequantize(), tensor.dequantize())


@given(data=st.data(), columns=st.integers(1, 70))
def test_compressed_tensors_packs_and_unpacks_the_same(data: st.DataObject, columns: int) -> None:
    """Rows of any length, also those that end within a word."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    codes = torch.randint(-1, 2, (3, columns), generator=torch.Generator().manual_seed(columns), dtype=torch.int8)
    packed = COMPRESSED_TENSORS.encode(TernaryTensor(codes, torch.ones(1)))["weight_packed"]
    assert torch.equal(packed, pack_to_int32(codes, 2))
    assert torch.equal(unpack_from_int32(packed, 2, codes.shape), codes)


@given(data=st.data(), block=st.sampled_from([16, 32, 48, 128]))
def test_onnx_gives_back_codes_and_scales(data: st.DataObject, block: int) -> None:
    tensor = data.draw(ternary_tensors(block))
    columns = tensor.codes.shape[1]
    whole = ONNX.block(Scaling(granularity=f"group:{columns // tensor.scale.shape[-1]}"))
    packed, scales = ONNX.encode(tensor, whole)
    decoded = ONNX.decode(packed, scales, columns)
    assert torch.equal(decoded.codes, tensor.codes)
    assert torch.equal(decoded.dequantize(), tensor.dequantize())


@pytest.mark.parametrize(("columns", "block"), [(64, 16), (96, 32), (40, 32), (256, 128), (100, 64)])
def test_onnx_runtime_reads_the_same_weights(columns: int, block: int) -> None:
    """The identity goes in, so the weights themselves come out, bit for bit."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(-1, 2, (7, columns), generator=generator, dtype=torch.int8)
    tensor = TernaryTensor(codes, (torch.rand(7, 1, generator=generator) + 0.01).half().float())
    parts = [numpy_helper.from_array(part, name) for part, name in zip(ONNX.encode(tensor, block), "BS", strict=True)]
    node = helper.make_node(
        "MatMulNBits", ["A", "B", "S"], ["Y"], domain="com.microsoft", K=columns, N=7, bits=2, block_size=block
    )
    ends = [helper.make_tensor_value_info(*end) for end in (("A", 1, ["n", columns]), ("Y", 1, ["n", 7]))]
    assert TensorProto.FLOAT == 1
    graph = helper.make_graph([node], "one layer", ends[:1], ends[1:], parts)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (product,) = session.run(None, {"A": np.eye(columns, dtype=np.float32)})
    np.testing.assert_array_equal(product.T, tensor.dequantize().numpy())


def require_announced(
    form: DirectoryFormat, parts: dict[str, torch.Tensor], shape: tuple[int, ...], scaling: Scaling
) -> None:
    """What a format encodes is what it said it would."""
    given = {suffix: TensorSpec(part.dtype, tuple(part.shape)) for suffix, part in parts.items()}
    assert given == form.specs(shape, scaling)


def test_hf_bitnet_bytes_are_those_that_transformers_packs() -> None:
    from transformers.integrations.bitnet import pack_weights

    codes = torch.randint(-1, 2, (12, 5), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    parts = HF_BITNET.encode(TernaryTensor(codes, torch.tensor([0.25])))
    assert torch.equal(parts["weight"], pack_weights(codes.float()))
    assert parts["weight_scale"].tolist() == [4.0]


def test_an_all_zero_matrix_has_a_finite_inverse_scale_in_hf_bitnet() -> None:
    zeros = ternarize(torch.zeros(4, 8), Scaling())
    assert HF_BITNET.encode(zeros)["weight_scale"].tolist() == [1.0]


# ---- layouts written out by hand -------------------------------------------------------------------------------------


def test_tq1_0_by_hand() -> None:
    """One block; the positions and the rounding are spelled out from the layout, element by element."""
    codes = golden_tensor().codes[:1, :256]
    trit = (codes[0] + 1).tolist()
    digits = [[trit[m + 32 * n] for n in range(5)] for m in range(32)]
    digits += [[trit[160 + m + 16 * n] for n in range(5)] for m in range(16)]
    digits += [[trit[240 + m + 4 * n] for n in range(4)] + [0] for m in range(4)]
    numbers = [sum(digit * 3 ** (4 - n) for n, digit in enumerate(row)) for row in digits]
    expected = [-(-number * 256 // 243) for number in numbers] + [0x00, 0x3C]  # 1.0 as float16
    assert TQ1_0.encode(TernaryTensor(codes, torch.ones(1))).tolist() == [expected]


def test_tq2_0_by_hand() -> None:
    codes = golden_tensor().codes[:1, :256]
    trit = (codes[0] + 1).tolist()
    byte = [sum(trit[128 * g + 32 * n + m] << 2 * n for n in range(4)) for g in range(2) for m in range(32)]
    assert TQ2_0.encode(TernaryTensor(codes, torch.ones(1))).tolist() == [[*byte, 0x00, 0x3C]]


def test_q2_0_by_hand() -> None:
    """Scale first, then four neighbours a byte, low bits first: 18 bytes for 64 weights."""
    codes = torch.tensor([[-1, 0, 1, 0] * 15 + [1, 1, -1, -1]], dtype=torch.int8)
    expected = [0x00, 0xB8 - 0x80, *[0b01_10_01_00] * 15, 0b00_00_10_10]  # 0.5 is 0x3800
    assert Q2_0.encode(TernaryTensor(codes, torch.tensor([0.5]))).tolist() == [expected]


def test_q8_0_keeps_the_codes_themselves() -> None:
    codes = torch.tensor([[-1, 0, 1, 1] * 8], dtype=torch.int8)
    expected = [0x00, 0x38, *[255, 0, 1, 1] * 8]
    assert Q8_0.encode(TernaryTensor(codes, torch.tensor([0.5]))).tolist() == [expected]


@pytest.mark.parametrize("form", [TQ1_0, TQ2_0, Q2_0, Q8_0], ids=lambda form: form.name)
def test_golden_bytes(form: GgufFormat) -> None:
    """Frozen: a change of these bytes is a change of every file written so far."""
    assert form.encode(golden_tensor()).tobytes().hex() == GOLDEN[form.name]


def test_bf16_rounds_the_scale_and_keeps_the_codes() -> None:
    codes = torch.tensor([[-1, 0, 1, 1]], dtype=torch.int8)
    scale = torch.tensor([0.0213]).half().float()  # 0x3CAE8000 as float32: more digits than bfloat16 has
    encoded = BF16.encode(TernaryTensor(codes, scale))
    assert encoded.tolist() == [[0xAE, 0xBC, 0, 0, 0xAE, 0x3C, 0xAE, 0x3C]]
    decoded = BF16.decode(encoded, (1, 4))
    assert torch.equal(decoded.codes, codes)
    np.testing.assert_array_equal(decoded.scale.numpy(), BF16.stored_scales(TernaryTensor(codes, scale)))
    assert abs(decoded.scale[0, 0].item() / scale.item() - 1) < 0.004
    np.testing.assert_array_equal(gguf.dequantize(encoded, BF16.type.ggml()), decoded.dequantize().numpy())


# ---- I2_S: no package reads it, so it is spelled out from the layout -------------------------------------------------


def test_i2_s_by_hand() -> None:
    """One row of 128: 32 bytes, of four elements 32 apart each, the first in the highest bits; then the scale."""
    codes = torch.tensor([[-1] * 32 + [0] * 32 + [1] * 32 + [0, 1] * 16], dtype=torch.int8)
    expected = [0b00_01_10_01, 0b00_01_10_10] * 16 + [0x00, 0x00, 0x00, 0x3F] + [0] * 28  # 0.5 is 0x3F000000
    encoded = I2_S.encode(TernaryTensor(codes, torch.tensor([0.5])))
    assert encoded.dtype == np.uint8
    assert encoded.tolist() == expected


def test_i2_s_of_two_rows_by_hand() -> None:
    """Rows follow one another without a gap, and one scale stands behind them all."""
    codes = torch.zeros(2, 256, dtype=torch.int8)
    codes[0, 130], codes[1, 1], codes[1, 255] = 1, -1, 1
    expected = [0b01010101] * 128 + [0x00, 0x00, 0xC0, 0x3F] + [0] * 28  # 1.5 is 0x3FC00000
    expected[32 + 2] = 0b10010101
    expected[64 + 1] = 0b00010101
    expected[96 + 31] = 0b01010110
    assert I2_S.encode(TernaryTensor(codes, torch.tensor([1.5]))).tolist() == expected


def i2_s_weights(data: bytes, rows: int, columns: int) -> list[list[float]]:
    """An independent decoder: element by element, after bitnet.cpp's dot product."""
    (scale,) = struct.unpack_from("<f", data, rows * columns // 4)

    def code(element: int) -> int:
        group, place = divmod(element, 128)
        return (data[32 * group + place % 32] >> (6 - 2 * (place // 32)) & 3) - 1

    return [[code(row * columns + column) * scale for column in range(columns)] for row in range(rows)]


@settings(max_examples=20)
@given(data=st.data())
def test_i2_s_gives_back_codes_and_scale(data: st.DataObject) -> None:
    tensor = data.draw(ternary_tensors(128))
    tensor = tensor._replace(scale=tensor.scale.flatten()[:1])
    encoded, shape = I2_S.encode(tensor), tuple(tensor.codes.shape)
    assert encoded.shape == (tensor.codes.numel() // 4 + 32,)
    assert i2_s_weights(encoded.tobytes(), *shape) == (tensor.dequantize() + 0.0).tolist()
    decoded = I2_S.decode(encoded, shape)
    assert torch.equal(decoded.codes, tensor.codes)
    assert torch.equal(decoded.scale, tensor.scale)


def test_i2_s_bytes_that_mean_nothing_are_refused() -> None:
    good = I2_S.encode(TernaryTensor(torch.zeros(1, 128, dtype=torch.int8), torch.ones(1)))
    three, infinite = good.copy(), good.copy()
    three[5] |= 0b11
    infinite[32:36] = np.frombuffer(struct.pack("<f", float("inf")), np.uint8)
    for damaged, told in ((three, "codes other than"), (infinite, "not finite")):
        with pytest.raises(ValueError, match=told):
            I2_S.decode(damaged, (1, 128))


def test_golden_bytes_of_hf_bitnet() -> None:
    codes = golden_tensor().codes.view(8, 128)
    parts = HF_BITNET.encode(TernaryTensor(codes, torch.tensor([0.3])))
    assert (parts["weight"].numpy().tobytes() + parts["weight_scale"].numpy().tobytes()).hex() == GOLDEN["safetensors"]


def test_golden_bytes_of_compressed_tensors() -> None:
    """Made by compressed-tensors' own ``pack_to_int32``; rows of 500 end within a word."""
    parts = COMPRESSED_TENSORS.encode(TernaryTensor(golden_tensor().codes[:, :500], torch.ones(1)))
    assert parts["weight_packed"].numpy().tobytes().hex() == GOLDEN["compressed-tensors"]


def test_onnx_by_hand() -> None:
    """Four neighbours a byte, low bits first, stored as code + 2; the row's end is filled up with zeros."""
    packed, scales = ONNX.encode(
        TernaryTensor(torch.tensor([[-1, 0, 1, 0, 1, 1]], dtype=torch.int8), torch.ones(1)), 16
    )
    assert packed.tolist() == [[[0b10_11_10_01, 0b10_10_11_11, 0b10_10_10_10, 0b10_10_10_10]]]
    assert scales.tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("name", "bits", "multiple"),
    [("tq1_0", 1.6875, 256), ("tq2_0", 2.0625, 256), ("q2_0", 2.25, 64), ("i2_s", 2, 128), ("q8_0", 8.5, 32)],
)
def test_facts_of_the_types(name: str, bits: float, multiple: int) -> None:
    assert FORMATS[name].bits_per_weight == bits
    assert FORMATS[name].row_multiple == multiple


# ---- scales that no file can hold ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-9, 2e-8, 3e-6, 70000.0, float("inf"), float("nan")])
def test_a_scale_that_float16_loses_is_refused_by_name(scale: float) -> None:
    tensor = TernaryTensor(torch.ones(2, 4, dtype=torch.int8), torch.tensor([[0.5], [scale]]))
    with pytest.raises(BitconvertError, match=r"blk\.0\.weight: its scale"):
        with_stored_scale(tensor, "blk.0.weight")


@pytest.mark.parametrize("scale", [2**-24, 1e-5, 0.0213, 65504.0])
def test_other_scales_are_rounded_to_float16(scale: float) -> None:
    tensor = TernaryTensor(torch.ones(1, 4, dtype=torch.int8), torch.tensor([scale]))
    assert with_stored_scale(tensor, "weight").scale.item() == float(np.float16(scale))


# ---- which scalings fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("granularity", "holders"),
    [
        ("tensor", ["tq1_0", "tq2_0", "q2_0", "i2_s", "q8_0", "f16", "bf16", "safetensors", *ANY_SCALING]),
        ("row", ["tq1_0", "tq2_0", "q2_0", "q8_0", "f16", "bf16", *ANY_SCALING]),
        ("group:256", ["tq1_0", "tq2_0", "q2_0", "q8_0", "f16", "bf16", *ANY_SCALING]),
        ("group:512", ["tq1_0", "tq2_0", "q2_0", "q8_0", "f16", "bf16", *ANY_SCALING]),
        ("group:128", ["q2_0", "q8_0", "f16", "bf16", *ANY_SCALING]),
        ("group:64", ["q2_0", "q8_0", "f16", "bf16", *ANY_SCALING]),
        ("group:96", ["q8_0", "f16", "bf16", *ANY_SCALING]),
        ("group:32", ["q8_0", "f16", "bf16", *ANY_SCALING]),
        ("group:16", ["f16", "bf16", *ANY_SCALING]),
        ("group:24", ["f16", "bf16", "compressed-tensors"]),
    ],
)
def test_formats_that_hold_a_scaling(granularity: str, holders: list[str]) -> None:
    assert formats_that_hold(Scaling(granularity=granularity)) == holders


def test_refusals_give_the_reason() -> None:
    assert "256 weights, and a group is 128" in str(TQ2_0.refusal(Scaling(granularity="group:128")))
    assert "one scale per tensor" in str(HF_BITNET.refusal(Scaling(granularity="row")))
    assert "one scale per tensor" in str(I2_S.refusal(Scaling(granularity="row")))
    assert "blocks of 16 or more, and a group is 24" in str(ONNX.refusal(Scaling(granularity="group:24")))
    assert isinstance(HF_BITNET, HfBitnet)
    assert HF_BITNET.shape_refusal((8, 3)) is None
    assert "6 rows" in str(HF_BITNET.shape_refusal((6, 8)))


# ---- Q2_0 in the gguf package ----------------------------------------------------------------------------------------


def test_q2_0_is_registered_once_and_completely() -> None:
    gguf_types.register_q2_0()
    gguf_types.register_q2_0()
    assert GGMLQuantizationType(42) is GGMLQuantizationType["Q2_0"]
    assert GGMLQuantizationType(42).name == "Q2_0"
    assert GGML_QUANT_SIZES[GGMLQuantizationType(42)] == (64, 18)
    assert gguf.LlamaFileType(41).name == "MOSTLY_Q2_0"
    assert [member.value for member in GGMLQuantizationType].count(42) == 1


@given(data=st.data())
def test_the_registered_q2_0_quantizer_agrees_with_ours(data: st.DataObject) -> None:
    gguf_types.register_q2_0()
    tensor = data.draw(ternary_tensors(64))
    reference = gguf.quantize(tensor.dequantize().numpy(), GGMLQuantizationType(42))
    np.testing.assert_array_equal(Q2_0.encode(tensor), reference)


@pytest.mark.parametrize("known", [t for t in vars(gguf_types).values() if isinstance(t, gguf_types.GgufType)])
def test_our_type_facts_are_those_of_the_gguf_package(known: gguf_types.GgufType) -> None:
    gguf_types.register_q2_0()
    gguf_types.register_i2_s()
    assert known.ggml().name == known.name
    if known != gguf_types.I2_S:
        assert GGML_QUANT_SIZES[known.ggml()] == (known.block, known.block_bytes)
    file_type = gguf.LlamaFileType(known.file_type).name
    assert re.fullmatch(f"(MOSTLY|ALL)_{known.name}(_M)?", file_type)

"""Writes a BERT sentence encoder as ONNX for the peers of `bench.encode`: plain.onnx, float32.onnx and int8.onnx.

python encode_onnx.py MODEL_FOLDER OUT_FOLDER, in an environment with onnx, onnxruntime and safetensors' numpy reader.

The graph is what exporters write (its patterns are those that onnxruntime's optimiser for BERT knows), with mean
pooling and normalisation at the end. float32.onnx is what that optimiser makes of it, int8.onnx the dynamic
quantisation of that, per channel.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The float32 tensors of a safetensors file."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + size])
    tensors = {}
    for name, entry in entries.items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            tensors[name] = np.frombuffer(data[begin:end], np.float32).reshape(entry["shape"])
    return tensors


class Graph:
    """Nodes and constants in the making."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: np.ndarray) -> str:
        """Name of a constant."""
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, operator: str, *inputs: str | np.ndarray, **attributes: object) -> str:
        """Name of the output of a new node; arrays become constants."""
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        output = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, names, [output], name=f"node_{output}", **attributes))
        return output

    def dense(self, x: str, weights: dict[str, np.ndarray], name: str) -> str:
        """X W^T + b."""
        return self.add("Add", self.add("MatMul", x, weights[f"{name}.weight"].T), weights[f"{name}.bias"])

    def norm(self, x: str, weights: dict[str, np.ndarray], name: str, eps: float) -> str:
        """LayerNorm over the last dimension."""
        gain, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return self.add("LayerNormalization", x, gain, shift, axis=-1, epsilon=eps)


def encoder(weights: dict[str, np.ndarray], config: dict) -> onnx.ModelProto:
    """input_ids, attention_mask [B, L] int64 -> unit embeddings [B, D]."""
    graph, heads, hidden, eps = Graph(), config["num_attention_heads"], config["hidden_size"], config["layer_norm_eps"]
    size = hidden // heads
    length = graph.add("Gather", graph.add("Shape", "input_ids"), np.array([1]), axis=0)
    words = graph.add("Gather", weights["embeddings.word_embeddings.weight"], "input_ids", axis=0)
    table = weights["embeddings.position_embeddings.weight"]
    places = graph.add("Slice", table, np.array([0]), length, np.array([0]))
    x = graph.add("Add", graph.add("Add", words, places), weights["embeddings.token_type_embeddings.weight"][0])
    x = graph.norm(x, weights, "embeddings.LayerNorm", eps)
    mask = graph.add("Cast", graph.add("Unsqueeze", "attention_mask", np.array([1, 2])), to=TensorProto.FLOAT)
    mask = graph.add("Mul", graph.add("Sub", np.float32(1), mask), np.float32(-1e9))
    split, merge = np.array([0, 0, heads, size]), np.array([0, 0, hidden])
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        query, key, value = (
            graph.add(
                "Transpose",
                graph.add("Reshape", graph.dense(x, weights, f"{layer}.attention.self.{part}"), split),
                perm=[0, 2, 3, 1] if part == "key" else [0, 2, 1, 3],
            )
            for part in ("query", "key", "value")
        )
        scores = graph.add("Div", graph.add("MatMul", query, key), np.float32(size**0.5))
        attended = graph.add("MatMul", graph.add("Softmax", graph.add("Add", scores, mask), axis=-1), value)
        attended = graph.add("Reshape", graph.add("Transpose", attended, perm=[0, 2, 1, 3]), merge)
        projected = graph.dense(attended, weights, f"{layer}.attention.output.dense")
        x = graph.norm(graph.add("Add", projected, x), weights, f"{layer}.attention.output.LayerNorm", eps)
        up = graph.dense(x, weights, f"{layer}.intermediate.dense")
        erf = graph.add("Erf", graph.add("Div", up, np.float32(2**0.5)))
        up = graph.add("Mul", graph.add("Mul", up, graph.add("Add", erf, np.float32(1))), np.float32(0.5))
        x = graph.norm(graph.add("Add", graph.dense(up, weights, f"{layer}.output.dense"), x), weights,
                       f"{layer}.output.LayerNorm", eps)  # fmt: skip
    kept = graph.add("Cast", graph.add("Unsqueeze", "attention_mask", np.array([2])), to=TensorProto.FLOAT)
    total = graph.add("ReduceSum", graph.add("Mul", x, kept), np.array([1]), keepdims=0)
    mean = graph.add("Div", total, graph.add("ReduceSum", kept, np.array([1]), keepdims=0))
    graph.nodes.append(
        helper.make_node("Div", [mean, graph.add("ReduceL2", mean, np.array([1]), keepdims=1)], ["embedding"])
    )
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "l"]) for n in ("input_ids", "attention_mask")]
    outputs = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["b", hidden])]
    made = helper.make_graph(graph.nodes, "encoder", inputs, outputs, graph.constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def main() -> None:
    """Write both files."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    folder, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    onnx.save(encoder(read_safetensors(folder / "model.safetensors"), config), str(out / "plain.onnx"))
    sizes = {"num_heads": config["num_attention_heads"], "hidden_size": config["hidden_size"]}
    options = FusionOptions("bert")
    options.enable_embed_layer_norm = False  # wants positions that are sliced out of a constant
    fused = optimize_model(str(out / "plain.onnx"), "bert", opt_level=0, optimization_options=options, **sizes)
    print(fused.get_fused_operator_statistics())
    fused.save_model_to_file(str(out / "float32.onnx"))
    quantize_dynamic(
        out / "float32.onnx",
        out / "int8.onnx",
        weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options={"DefaultTensorType": TensorProto.FLOAT},
    )


if __name__ == "__main__":
    main()

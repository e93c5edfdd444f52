"""Writes a BERT sentence encoder as CTranslate2 reads it, float32: it quantizes when it loads.

python encode_ctranslate2.py MODEL_FOLDER OUT_FOLDER, in an environment with ctranslate2 and safetensors. The layout is
that of CTranslate2's own converter for BERT, which wants torch and transformers beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from ctranslate2.specs import common_spec, transformer_spec
from safetensors.numpy import load_file


def encoder(weights: dict[str, np.ndarray], config: dict[str, Any], vocabulary: list[str]) -> Any:
    """The specification of the model, filled."""
    spec = transformer_spec.TransformerEncoderModelSpec(
        transformer_spec.TransformerEncoderSpec(
            config["num_hidden_layers"],
            config["num_attention_heads"],
            pre_norm=False,
            activation=common_spec.Activation.GELU,
            layernorm_embedding=True,
            num_source_embeddings=2,
            embeddings_merge=common_spec.EmbeddingsMerge.ADD,
        )
    )

    def dense(target: Any, *names: str) -> None:
        target.weight = np.concatenate([weights[f"{name}.weight"] for name in names])
        target.bias = np.concatenate([weights[f"{name}.bias"] for name in names])

    def norm(target: Any, name: str) -> None:
        target.gamma, target.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]

    spec.encoder.scale_embeddings = False
    spec.encoder.embeddings[0].weight = weights["embeddings.word_embeddings.weight"]
    spec.encoder.embeddings[1].weight = weights["embeddings.token_type_embeddings.weight"]
    spec.encoder.position_encodings.encodings = weights["embeddings.position_embeddings.weight"]
    norm(spec.encoder.layernorm_embedding, "embeddings.LayerNorm")
    for i, layer in enumerate(spec.encoder.layer):
        name = f"encoder.layer.{i}"
        dense(layer.self_attention.linear[0], *(f"{name}.attention.self.{part}" for part in ("query", "key", "value")))
        dense(layer.self_attention.linear[1], f"{name}.attention.output.dense")
        norm(layer.self_attention.layer_norm, f"{name}.attention.output.LayerNorm")
        dense(layer.ffn.linear_0, f"{name}.intermediate.dense")
        dense(layer.ffn.linear_1, f"{name}.output.dense")
        norm(layer.ffn.layer_norm, f"{name}.output.LayerNorm")
    spec.config.unk_token = "[UNK]"
    spec.config.layer_norm_epsilon = config["layer_norm_eps"]
    spec.register_vocabulary(vocabulary)
    return spec


def main() -> None:
    """Write the folder."""
    folder, out = map(Path, sys.argv[1:])
    config = json.loads((folder / "config.json").read_text())
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    spec = encoder(load_file(folder / "model.safetensors"), config, sorted(vocabulary, key=vocabulary.__getitem__))
    spec.validate()
    spec.optimize(quantization="float32")
    out.mkdir(parents=True, exist_ok=True)
    spec.save(str(out))


if __name__ == "__main__":
    main()

"""The peer OpenVINO, run by the peers' interpreter: optimum-intel's INT4 model on the runtime itself.

At its best: the stateful model with scaled dot product attention (faster here than GenAI's default, paged attention)
and a head for the last position only, both as openvino-genai runs it, and dynamic quantisation of the activations and
the INT8 cache, which are its defaults.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino import opset13


def export(source: Path, target: Path, group: int) -> None:
    """The Hugging Face model in ``source`` as symmetric INT4; embedding and head INT8.

    group: halved until it divides the inputs of all matrices, for others are refused; what it became is written beside.
    """
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    shape = json.loads((source / "config.json").read_text())
    hidden = shape.get("hidden_size") or shape["n_embd"]
    inner = shape.get("intermediate_size") or shape.get("n_inner") or 4 * hidden
    while hidden % group or inner % group:
        group //= 2
    config = OVWeightQuantizationConfig(bits=4, sym=True, group_size=group, ratio=1.0)
    model = OVModelForCausalLM.from_pretrained(source, export=True, compile=False, quantization_config=config)
    model.save_pretrained(target)
    (target / "group").write_text(str(group))


def last_position_only(model: openvino.Model) -> None:
    """Cut the head's input to the last position, as openvino-genai does: others' logits are not asked for."""
    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    last = opset13.slice(node.input_value(0), [-1], [np.iinfo(np.int32).max], [1], [1])
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


class Engine:
    """A compiled model with its cache."""

    def __init__(self, path: Path, threads: int) -> None:
        core = openvino.Core()
        model = core.read_model(path / "openvino_model.xml")
        last_position_only(model)
        self.weight_bytes, self.weights = streamed(model)
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        self.request = core.compile_model(model, "CPU", settings).create_infer_request()
        self.names = {name for value in model.inputs for name in value.get_names()}
        self.vocab = json.loads((path / "config.json").read_text())["vocab_size"]
        self.version = f"openvino {openvino.__version__.partition('-')[0]}"

    def run(self, request: dict[str, Any], clock: Any) -> None:
        """Greedy generation until the clock is done."""
        depth, pp, batch = (request[key] for key in ("depth", "pp", "batch"))
        ids = np.random.default_rng(request["seed"]).integers(3, self.vocab, (batch, depth + pp))
        self.request.reset_state()
        if depth:
            self._forward(ids[:, :depth], 0)
        clock.start()
        token, position = self._forward(ids[:, depth:], depth), depth + pp
        clock.tick()
        while not clock.done:
            token, position = self._forward(token, position), position + 1
            clock.tick()

    def _forward(self, ids: np.ndarray, past: int) -> np.ndarray:
        """The next token [batch, 1] of every sequence."""
        batch, length = ids.shape
        positions = np.arange(past, past + length, dtype=np.int64)
        values = {
            "input_ids": np.ascontiguousarray(ids),
            "attention_mask": np.ones((batch, past + length), np.int64),
            "position_ids": np.broadcast_to(positions, (batch, length)).copy(),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        inputs = {name: value for name, value in values.items() if name in self.names}
        logits = self.request.infer(inputs, share_inputs=True, share_outputs=True)["logits"]
        return np.argmax(logits[:, -1], axis=-1)[:, None]


def streamed(model: openvino.Model) -> tuple[int, int]:
    """Bytes and number of the weights that every token reads: constants that lead to a matrix product."""
    size = count = 0
    seen: set[str] = set()
    for product in model.get_ops():
        if product.get_type_name() != "MatMul":
            continue
        todo = [product.input_value(1).get_node()]
        while todo:
            node = todo.pop()
            kind = node.get_type_name()
            if kind == "Constant" and node.get_friendly_name() not in seen:
                seen.add(node.get_friendly_name())
                size += node.get_byte_size()
                largest = int(np.prod(node.get_output_shape(0)))
                count += largest if largest > 1 and node.get_element_type().bitwidth <= 8 and _is_code(node) else 0
            elif kind in ("Convert", "Multiply", "Subtract", "Reshape", "Transpose"):
                todo += [value.get_node() for value in node.input_values()]
    return size, count


def _is_code(node: openvino.Node) -> bool:
    """Whether a constant of a compressed weight holds its codes rather than its zero points."""
    return int(np.prod(node.get_output_shape(0))) >= node.get_output_shape(0)[0] * 16

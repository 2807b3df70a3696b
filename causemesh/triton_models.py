"""Models in Triton's repository: an ONNX file run by the Python backend with ONNX Runtime.

Every model has one contract: the input tensor "features", FP32 [rows, n], gives the output tensor
"score", FP32 [rows, 1], the probability of the positive class.
"""

from __future__ import annotations

import fcntl
import re
import shutil
from pathlib import Path

from causemesh.errors import Misdeclared

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

_CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: {max_batch}
input [ {{ name: "features" data_type: TYPE_FP32 dims: [ {inputs} ] }} ]
output [ {{ name: "score" data_type: TYPE_FP32 dims: [ 1 ] }} ]
dynamic_batching {{ max_queue_delay_microseconds: 500 }}
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
"""

# Runs inside Triton, in an environment without Causemesh.
_MODEL = '''\
"""Runs model.onnx beside it; written by causemesh.triton_models."""

import os
from pathlib import Path

# ONNX Runtime 1.29 and later send usage data to Microsoft unless told not to before they start.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        self._session = onnxruntime.InferenceSession(
            Path(__file__).with_name("model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name
        self._output = _score_output([output.name for output in self._session.get_outputs()])

    def execute(self, requests):
        parts = [triton.get_input_tensor_by_name(one, "features").as_numpy() for one in requests]
        try:
            scores = self._scores(np.concatenate(parts))
        except Exception:
            # One bad row fails the whole run: find whose it is.
            return [self._alone(part) for part in parts]
        ends = np.cumsum([len(part) for part in parts])[:-1]
        return [_response(part) for part in np.split(scores, ends)]

    def _alone(self, features):
        try:
            return _response(self._scores(features))
        except Exception as error:
            return triton.InferenceResponse(error=triton.TritonError(str(error)))

    def _scores(self, features):
        """Scores [rows, 1] of features [rows, n]."""
        (found,) = self._session.run([self._output], {self._input: features})
        if found.shape not in {(len(features),), (len(features), 1), (len(features), 2)}:
            raise ValueError(
                f"{self._output} has the shape {found.shape} for {len(features)} rows; "
                "it must hold one score or two probabilities a row"
            )
        return found.reshape(len(features), -1)[:, -1:].astype(np.float32)


def _score_output(names):
    if "probabilities" in names:
        return "probabilities"
    if len(names) == 1:
        return names[0]
    raise triton.TritonModelException(
        f"the graph's outputs are {names}; it needs one named probabilities, or a single score"
    )


def _response(scores):
    return triton.InferenceResponse([triton.Tensor("score", np.ascontiguousarray(scores))])
'''


def write_model(
    repository: Path, name: str, onnx: bytes, inputs: int, max_batch: int = 1024
) -> None:
    """Write the model `name`, which takes `inputs` features a row, so that Triton can load it.

    The graph's first input is float [None, inputs]. Its score is the output "probabilities" (two a
    row: the second is taken), or else its only output (one a row). A model that is there already
    and differs is replaced; Triton goes on with what it has loaded until it is told to load again.
    A model is never seen half written. Raises Misdeclared for a name that is not a plain file name.
    """
    if not _NAME.fullmatch(name):
        raise Misdeclared(f"{name!r} cannot name a model: use letters, digits, and any of _ . -")
    if inputs < 1 or max_batch < 1:
        raise Misdeclared(f"model {name} needs at least one input and a batch of at least one row")
    config = _CONFIG.format(name=name, inputs=inputs, max_batch=max_batch)
    files = {
        "config.pbtxt": config.encode(),
        "1/model.py": _MODEL.encode(),
        "1/model.onnx": onnx,
    }
    repository.mkdir(parents=True, exist_ok=True)
    with (repository / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _holds(repository / name, files):
            _replace(repository / name, files)


def _holds(folder: Path, files: dict[str, bytes]) -> bool:
    return all(
        (folder / path).is_file() and (folder / path).read_bytes() == content
        for path, content in files.items()
    )


def _replace(folder: Path, files: dict[str, bytes]) -> None:
    partial, old = (folder.with_name(f".{folder.name}.{part}") for part in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    for path, content in files.items():
        (partial / path).parent.mkdir(parents=True, exist_ok=True)
        (partial / path).write_bytes(content)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)

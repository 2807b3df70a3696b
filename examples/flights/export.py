"""Models as ONNX: input `features` float32 [None, n], output `score` float32 [None, 1].

Operator sets and file version are pinned to what every runtime of the last years reads.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import FloatTensorType

Vectors = npt.NDArray[np.float32]
INPUT, OUTPUT = "features", "score"
_OPSETS = {"": 17, "ai.onnx.ml": 3}
_IR_VERSION = 8


def logistic_of_column(width: int, column: int, intercept: float, slope: float) -> bytes:
    """sigmoid(intercept + slope * features[:, column]) over vectors of `width` numbers.

    The column is gathered, not weighted by zeros elsewhere: 0 * NaN would be NaN.
    """
    constants: dict[str, npt.NDArray[Any]] = {
        "column": np.array([column], np.int64),
        "intercept": np.array([intercept], np.float32),
        "slope": np.array([slope], np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Gather", [INPUT, "column"], ["value"], axis=1),
            helper.make_node("Mul", ["value", "slope"], ["scaled"]),
            helper.make_node("Add", ["scaled", "intercept"], ["logit"]),
            helper.make_node("Sigmoid", ["logit"], [OUTPUT]),
        ],
        "logistic_of_column",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [None, width])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [None, 1])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", _OPSETS[""])]
    return _bytes(helper.make_model(graph, opset_imports=opsets))


def gradient_boosting(classifier: Any, width: int) -> bytes:
    """A fitted HistGradientBoostingClassifier of two classes; its score is that of the second.

    Its thresholds are rounded first, which no float32 vector can tell.
    """
    round_thresholds(classifier)
    with warnings.catch_warnings():
        # The converter writes some flags as bools, which protobuf 6 takes with a warning.
        warnings.simplefilter("ignore", DeprecationWarning)
        model = convert_sklearn(
            classifier,
            name="gradient_boosting",
            initial_types=[(INPUT, FloatTensorType([None, width]))],
            options={"zipmap": False},
            target_opset=_OPSETS,
        )
    probabilities = model.graph.output[1].name
    second = numpy_helper.from_array(np.array([1], np.int64), "second_class")
    model.graph.initializer.append(second)
    gather = helper.make_node("Gather", [probabilities, "second_class"], [OUTPUT], axis=1)
    model.graph.node.append(gather)
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [None, 1]))
    return _bytes(model)


def round_thresholds(classifier: Any) -> None:
    """Move each float64 threshold down to the nearest float32.

    The converter rounds to the nearest, so a threshold between two neighbouring float32 numbers can
    land on the upper one, which then goes left instead of right. For float32 x, x <= t and
    x <= float32 below t are the same.
    """
    for (tree,) in classifier._predictors:
        exact = tree.nodes["num_threshold"]
        rounded = exact.astype(np.float32)
        above = rounded > exact
        rounded[above] = np.nextafter(rounded[above], np.float32(-np.inf))
        tree.nodes["num_threshold"] = rounded


def score(model: bytes, vectors: Vectors) -> Vectors:
    """The model's scores of [n, width] vectors: float32 [n]."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model, sess_options=options, providers=["CPUExecutionProvider"]
    )
    scores: Vectors = session.run([OUTPUT], {INPUT: vectors})[0]
    return scores[:, 0]


def _bytes(model: ModelProto) -> bytes:
    model.ir_version = _IR_VERSION
    checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content

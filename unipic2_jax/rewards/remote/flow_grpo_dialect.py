"""The dialect of Flow-GRPO's reward servers (github.com/yifan123/reward-server), from the client's side only.

A request is a POST of a pickled dictionary: 'images' (JPEG files), and what a server reads of 'meta_datas', 'only_strict'
(GenEval, port 18085) and 'prompts' (UnifiedReward). The answer is a pickled dictionary: 'scores', 'rewards' and 'strict_rewards'
of GenEval, 'outputs' of DeQA (port 18086) and UnifiedReward.

A pickle is a program, and unpickling runs it. `loads` lets it build plain values and arrays of numbers, and call nothing else.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np

from unipic2_jax.core.strict import as_number, excerpt
from unipic2_jax.data.prompts import PromptRecord
from unipic2_jax.rewards.base import RewardError, Scores
from unipic2_jax.rewards.remote.request import Endpoint, encode_picture

GENEVAL_PORT = 18085
_KINDS = "biuf"  # of NumPy: bool, integers, floats


def ask(endpoint: Endpoint, images: Sequence[np.ndarray], records: Sequence[PromptRecord], only_strict: bool) -> Scores:
    """Scores of a Flow-GRPO server.

    Raises:
      RewardError: when it gives none.
    """
    request = {
        "images": [encode_picture(image, "JPEG") for image in images],
        # Lines of GenEval's metadata there, which hold their prompt.
        "meta_datas": [{"prompt": record.prompt, **record.metadata} for record in records],
        "prompts": [record.prompt for record in records],
        "only_strict": only_strict,
    }
    content, _ = endpoint.post(pickle.dumps(request, protocol=4), "application/octet-stream")
    try:
        return read_answer(loads(content), len(images), only_strict)
    except ValueError as error:
        raise RewardError(f"The reward server at {endpoint.shown} {error}.") from None


def check(records: Sequence[PromptRecord], port: int | None) -> None:
    """Whether GenEval's server can score these records: it sorts its verdicts by their tags.

    Args:
      port: of the server's address. A record with clauses to find ('include') is meant for GenEval's on any port.

    Raises:
      ValueError: one sentence with the prompt, when it cannot.
    """
    for record in records:
        is_geneval = port == GENEVAL_PORT or "include" in record.metadata
        if is_geneval and not isinstance(record.metadata.get("tag"), str):
            raise ValueError(
                f"The prompt {excerpt(repr(record.prompt))} has no 'tag', by which GenEval's server of Flow-GRPO sorts what "
                "it finds; give it GenEval's, as 'colors'."
            )


def read_answer(answer: Any, count: int, only_strict: bool) -> Scores:
    """Scores from an unpickled answer; 'accuracy' and 'strict_accuracy' as details where there are any.

    Raises:
      ValueError: a clause that says what the answer lacks.
    """
    if not isinstance(answer, dict):
        raise ValueError("sent no dictionary")
    values = _column(answer, "scores" if "scores" in answer else "outputs", count)
    names = {"strict_rewards": "strict_accuracy"}
    if not only_strict:  # otherwise the server fills it with zeros
        names["rewards"] = "accuracy"
    return Scores(values, {name: _column(answer, key, count) for key, name in names.items() if key in answer})


def _column(answer: dict[Any, Any], key: str, count: int) -> np.ndarray:
    """float64 [count]."""
    column = answer.get(key)
    if isinstance(column, _Array):
        column = column.value
    if isinstance(column, np.ndarray) and column.ndim == 1:
        column = column.tolist()
    if not isinstance(column, (list, tuple)) or len(column) != count:
        amount = len(column) if isinstance(column, (list, tuple)) else "no list of"
        raise ValueError(f"sent {amount} {key} for {count} pictures")
    numbers = [as_number(float(value) if isinstance(value, bool) else value) for value in column]
    if None in numbers:
        value = column[numbers.index(None)]
        shown = repr(value) if isinstance(value, (str, float)) else type(value).__name__
        raise ValueError(f"sent {key} with {excerpt(shown)}, which is no finite number")
    return np.asarray(numbers, np.float64)


def loads(content: bytes) -> Any:
    """The value of a pickle of plain containers, numbers, texts, and NumPy's arrays and scalars of numbers.

    Raises:
      ValueError: a clause that says what else it holds.
    """
    try:
        return _Unpickler(io.BytesIO(content)).load()
    except _Forbidden as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # whatever damaged bytes, or HTML, make the reader stumble over
        raise ValueError(f"sent no pickle ({type(error).__name__}): '{excerpt(content)}'") from None


class _Forbidden(Exception):
    pass


class _Unpickler(pickle.Unpickler):
    """Never gives a pickle anything of Python's or NumPy's to call: only the stand-ins below."""

    def find_class(self, module: str, name: str) -> Any:
        if (stand_in := _STAND_INS.get((module, name))) is None:
            raise _Forbidden(f"sent a pickle that asks for {excerpt(module)}.{excerpt(name)}, which is not allowed")
        return stand_in

    def persistent_load(self, pid: Any) -> Any:
        raise _Forbidden("sent a pickle with references to elsewhere, which is not allowed")


class _DType:
    """Stands for numpy.dtype(text, align, copy); its state has the byte order."""

    def __init__(self, text: Any, *_: Any):
        self.dtype = _numeric(text)

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise _Forbidden("sent an array of an unknown byte order")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands for an array while its pickle is read: NumPy's own reader is not written for bytes one does not trust."""

    value = np.zeros(0)  # a pickle can leave out the constructor

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran else "C")


def _numeric(text: Any) -> np.dtype:
    dtype = np.dtype(text) if isinstance(text, str) and len(text) < 8 and text.isalnum() else None
    if dtype is None or dtype.kind not in _KINDS:
        raise _Forbidden("sent an array of something else than numbers, which is not allowed")
    return dtype


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(data, (bytes, bytearray)) or not isinstance(dtype, _DType):
        raise _Forbidden("sent an array of something else than numbers, which is not allowed")
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    made = _Array()
    made.value = _array(data, dtype, shape, order)
    return made


def _scalar(dtype: Any, data: Any) -> Any:
    return _array(data, dtype, (), "C").item()


# What NumPy pickles itself with, before and since version 2.
_STAND_INS = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}

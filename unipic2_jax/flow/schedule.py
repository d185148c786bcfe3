"""The noise schedule: which noise levels a sampler visits.

The formulas are those of diffusers' `FlowMatchEulerDiscreteScheduler`, in the precision diffusers uses, so the
values agree bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from unipic2_jax.core.fields import check_fields, hints
from unipic2_jax.core.files import write_json
from unipic2_jax.core.strict import read_object

# What diffusers' scheduler can do beyond shift, with the values under which it does not do it.
_MUST_BE = {
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}
FILE_NAME, CLASS_NAME = "scheduler_config.json", "FlowMatchEulerDiscreteScheduler"


def shift_sigma(sigma: Any, shift: float | np.floating) -> Any:
    """Moves noise levels in [0, 1] towards 1: `shift * sigma / (1 + (shift - 1) * sigma)`. Works on numpy and JAX."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclasses.dataclass(frozen=True)
class FlowMatchConfig:
    """The scheduler of a checkpoint folder (`scheduler/scheduler_config.json`).

    Raises:
      ValueError: when a field is out of range.
    """

    num_train_timesteps: int = 1000
    shift: float = 3.0

    def __post_init__(self) -> None:
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps is {self.num_train_timesteps}; the schedule needs at least 1.")
        if not self.shift > 0:
            raise ValueError(f"The schedule's shift is {self.shift}; it must be above 0 (1 means no shift).")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads diffusers' scheduler config.

        Raises:
          ValueError: when a field is of another type, or asks for a schedule that is not a plain shifted one.
        """
        check_fields(hints(cls), values)
        if (kind := values.get("_class_name", CLASS_NAME)) != CLASS_NAME:
            raise ValueError(f"_class_name is {kind!r}, a scheduler that visits other noise levels; use {CLASS_NAME}.")
        for name, plain in _MUST_BE.items():
            if (values.get(name) or None) != (plain or None):
                raise ValueError(
                    f"The scheduler config sets {name}={values[name]!r}, which is not supported; use {name}={plain!r}."
                )
        known = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
        # diffusers' own default differs from SD3.5's value, so an absent field means diffusers' 1.0.
        return cls(**{"shift": 1.0, **known})

    def to_dict(self) -> dict[str, Any]:
        """The config as diffusers writes it."""
        return {"_class_name": CLASS_NAME, **dataclasses.asdict(self)}

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads `folder/scheduler_config.json`.

        Raises:
          FileNotFoundError: when the file is missing.
          ValueError: a sentence that names the file: it is not JSON, has a field of another type, or asks for another kind
            of schedule.
        """
        path = Path(folder) / FILE_NAME
        values = read_object(path)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Writes `folder/scheduler_config.json`, creating the folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / FILE_NAME, self.to_dict())

    def sigmas(self, num_steps: int, solver: str = "euler") -> np.ndarray:
        """`sigmas` with this config's values, or, for a solver of second order, `solver_sigmas`."""
        if solver == "euler":
            return sigmas(num_steps, self.shift, self.num_train_timesteps)
        return solver_sigmas(num_steps, solver, self.shift, self.num_train_timesteps)


def sigmas(num_steps: int, shift: float = 3.0, num_train_timesteps: int = 1000) -> np.ndarray:
    """Noise levels of a sampler with `num_steps` steps: float32 [num_steps + 1], from 1 down to 0.

    diffusers shifts twice: the table of training timesteps (whose ends give sigma_max and sigma_min), then the
    evenly spaced values between those ends. The last step before 0 therefore starts at a shifted sigma_min.

    Raises:
      ValueError: when `num_steps` is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a sampler needs at least 1 step.")
    table = np.linspace(1, num_train_timesteps, num_train_timesteps, dtype=np.float32) / np.float32(num_train_timesteps)
    ends = shift_sigma(table[[-1, 0]], np.float32(shift))
    # From here on float64, as in diffusers, rounded once at the end.
    high, low = (float(end) * num_train_timesteps for end in ends)
    spaced = np.linspace(high, low, num_steps) / num_train_timesteps
    return np.append(shift_sigma(spaced, shift), 0.0).astype(np.float32)


def solver_sigmas(num_steps: int, solver: str, shift: float = 3.0, num_train_timesteps: int = 1000) -> np.ndarray:
    """Noise levels of diffusers' schedulers of second order with `use_flow_sigmas`: float32 [num_steps + 1], down to 0.

    They shift once, and neither begins at 1: `DPMSolverMultistepScheduler` ('dpm2') at the shifted 1 - 1 / num_train_timesteps,
    `UniPCMultistepScheduler` ('unipc') a millionth below 1.

    Raises:
      ValueError: for another solver, or when `num_steps` is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a sampler needs at least 1 step.")
    spaced = np.linspace(1, 1 / num_train_timesteps, num_steps + 1)
    if solver == "dpm2":
        levels = shift_sigma(1.0 - spaced, shift)[:0:-1]
    elif solver == "unipc":
        levels = shift_sigma(spaced, shift)[:-1]
        levels[0] -= 1e-6
    else:
        raise ValueError(f"The solver {solver!r} has no noise levels of its own; choose 'dpm2' or 'unipc'.")
    return np.append(levels, 0.0).astype(np.float32)

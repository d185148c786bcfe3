"""EditReward as a folder and as a function of pictures.

    config.json                                       targets, the vision-language model, how a question is put
    adapter_model.safetensors, adapter_config.json    LoRA, see models/edit_reward/files.py; absent when all was trained
    head.safetensors
    vlm/                                              the vision-language model itself, when all was trained

`base` in config.json is the vision-language model's folder, relative to this one, or its id on the hub.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Self, cast

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from unipic2_jax.core.addresses import local
from unipic2_jax.core.fields import check_fields, hints
from unipic2_jax.core.files import write_json
from unipic2_jax.core.strict import read_object
from unipic2_jax.models import registry
from unipic2_jax.models.bundle import VLM_PATTERNS, find_model
from unipic2_jax.models.edit_reward import files
from unipic2_jax.models.edit_reward import network as edit_reward
from unipic2_jax.models.edit_reward.network import DEFAULT_TARGETS, EditReward, variables
from unipic2_jax.models.model import MODELS, Start
from unipic2_jax.models.qwen import names as qwen
from unipic2_jax.models.qwen.decoder import Qwen2_5_VL, Qwen2_5_VLConfig
from unipic2_jax.models.qwen.pictures import Levels
from unipic2_jax.models.qwen.processor import VLMInput, VLMProcessor
from unipic2_jax.models.qwen.vision import VisionInput
from unipic2_jax.models.sd3.lora_file import PEFT_FILE
from unipic2_jax.parallel.compat import use_mesh
from unipic2_jax.parallel.mesh import batch_shards, make_mesh, shard_batch
from unipic2_jax.parallel.processes import local_rows, max_over_processes, rows_to_host
from unipic2_jax.parallel.rules import shardings
from unipic2_jax.weights import io, native, table
from unipic2_jax.weights.precision import Precision, as_precision, check_dtype

MODEL_TYPE = "edit_reward"
WORDS = "lm_head"  # of the vision-language model: makes words of its states, which a score does not need
# What a question is made of, in any order. Instruction first: what is looked for is known when the pictures are looked at.
PARTS = ("instruction", "source", "edited")
TEMPLATE = (
    "Instruction for an edit: {instruction}\nThe picture before: {source}\nThe picture after: {edited}\n"
    "Rate how well the edit follows the instruction, and the quality of the picture after."
)
# Ways to make one number of several scores; a target's name takes that one.
COMBINE = {
    "geometric": lambda scores: np.exp(np.log(np.maximum(scores, 1e-6)).mean(axis=-1)),
    "mean": lambda scores: scores.mean(axis=-1),
}


def is_edit_reward(folder: str | os.PathLike) -> bool:
    """Whether a folder says that it is one."""
    file = Path(folder) / "config.json"
    return file.is_file() and read_object(file).get("model_type") == MODEL_TYPE


def check_combine(how: str, targets: Sequence[str]) -> None:
    """Raises a ValueError for a way that is none and no target either."""
    if how not in COMBINE and how not in targets:
        raise ValueError(f"combine is '{how}'; use one of {', '.join((*COMBINE, *targets))}.")


def combine(scores: np.ndarray, how: str, targets: Sequence[str]) -> np.ndarray:
    """Scores [..., targets] in [0, 1] as one number each."""
    check_combine(how, targets)
    return COMBINE[how](scores) if how in COMBINE else scores[..., list(targets).index(how)]


@dataclasses.dataclass(frozen=True)
class Spec:
    """What config.json says.

    Attributes:
      targets: names of the scores.
      base: folder or hub id of the vision-language model; None: it belongs to this model and lies in its folder.
      template: of a question, with '{instruction}', '{source}' and '{edited}'.
      pixels: that both pictures are resized to about; None: the image processor's own limits.
    """

    targets: tuple[str, ...] = DEFAULT_TARGETS
    base: str | None = None
    template: str = TEMPLATE
    pixels: int | None = None

    def __post_init__(self) -> None:
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise ValueError(
                f"The targets of an EditReward are {self.targets}; give one name or several different ones."
            )
        if sorted(self.places()) != sorted(PARTS):
            named = ", ".join(f"'{{{name}}}'" for name in PARTS)
            raise ValueError(f"The template {self.template!r} must have each of {named} once; correct it.")

    def places(self) -> list[str]:
        """The parts of a question, in the template's order."""
        return [name for name in re.split(r"\{(\w+)\}", self.template)[1::2] if name in PARTS]

    @classmethod
    def read(cls, folder: str | os.PathLike) -> Self:
        """What the config.json of an EditReward's folder says.

        Raises:
          FileNotFoundError: there is no such folder, or it has no config.json.
          ValueError: it is the folder of something else, or a field is of another type.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no EditReward folder {folder}; check the path.")
        values = read_object(folder / "config.json")
        if values.get("model_type") != MODEL_TYPE or not isinstance(values.get("targets"), list):
            raise ValueError(f"{folder} holds no EditReward; name a folder that a stage of kind 'regression' exported.")
        fields = {name: values[name] for name in hints(cls) if name in values}
        try:
            check_fields(hints(cls), fields)
            spec = cls(**{**fields, "targets": tuple(fields["targets"])})
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from error
        base = spec.base
        if base is not None and (folder / base).is_dir():
            base = os.path.normpath(folder / base)
        return dataclasses.replace(spec, base=base)

    def write(self, folder: Path) -> None:
        """Writes config.json. A base that is a folder is named relative to this one."""
        base = self.base
        if base is not None and Path(base).is_dir():
            base = os.path.relpath(Path(base).resolve(), folder.resolve())
        values = {"model_type": MODEL_TYPE, **dataclasses.asdict(self), "base": base}
        write_json(folder / "config.json", values)

    def question(self, source: Any, edited: Any, instruction: str) -> list[dict[str, Any]]:
        """One conversation of one message: texts and pictures as the template has them."""
        pictures = {"source": source, "edited": edited}
        content: list[dict[str, Any]] = []
        for piece in re.split(r"(\{source\}|\{edited\})", self.template):
            if (name := piece.strip("{}")) in pictures:
                content.append({"type": "image", "image": pictures[name]})
            elif piece:
                content.append({"type": "text", "text": piece.replace("{instruction}", instruction)})
        return [{"role": "user", "content": content}]


@MODELS.register("edit_reward")
@dataclasses.dataclass(frozen=True, eq=False)
class EditRewardModel:
    """An EditReward, ready to score.

    Attributes:
      params: {'vlm', 'head'} and, unless all was trained, 'lora'.
      alpha: of the LoRA that was read or begun; None: there was none.
      vlm_files: where the vision-language model was read from.
    """

    module: EditReward
    params: dict[str, Any]
    processor: VLMProcessor
    spec: Spec
    alpha: float | None = None
    vlm_files: Path | None = None

    @classmethod
    def create(cls, spec: Spec, mesh: Mesh | None = None, dtype: Any = None) -> Self:
        """The vision-language model `spec.base` with a head that gives 0.5 to everything.

        Raises:
          FileNotFoundError, ValueError: as `load`.
        """
        folder, config = _vlm_folder(Path("."), spec)
        return cls._made(folder, config, spec, None, mesh, dtype)

    @classmethod
    def start(cls, start: Start, mesh: Mesh | None = None, precision: Precision | None = None) -> Self:
        """The EditReward in the folder `start.init`, or a new one on the vision-language model `start.vlm`; see `models.model.Model`.

        `start.settings` are fields of `Spec` beside its base; they overrule those of `start.init`.
        """
        settings = start.settings
        known = [field.name for field in dataclasses.fields(Spec) if field.name != "base"]
        if unknown := [name for name in settings if name not in known]:
            raise ValueError(f"config.settings.{unknown[0]} is no setting of an EditReward; it has {', '.join(known)}.")
        if start.init is not None:
            model = cls.load(start.init, mesh, precision)
            spec = dataclasses.replace(model.spec, **settings)
            if len(spec.targets) != len(model.spec.targets):
                raise ValueError(
                    f"The EditReward {start.init} gives {model.spec.targets} and not {spec.targets}; ask for as many."
                )
            return model.replace(spec=spec)
        if not start.vlm:
            raise ValueError("An EditReward stands on a Qwen2.5-VL; name its folder, as in --config.vlm=DIR.")
        return cls.create(Spec(base=start.vlm, **settings), mesh, precision)

    def replace(self, **changes: Any) -> Self:
        """A copy with other fields."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def load(
        cls, folder: str | os.PathLike, mesh: Mesh | None = None, dtype: Any = None, scoring: bool = False
    ) -> Self:
        """Reads a folder.

        Args:
          mesh: parameters are on it as `parallel.rules` says; None: the default device.
          dtype: of the vision-language model's weights and arithmetic, or a `Precision`; None: float32. Head and LoRA are float32.
          scoring: read only what `score` needs, frozen: no weights that make words of states.

        Raises:
          FileNotFoundError: the folder, its vision-language model or a file of either is missing.
          ValueError: it is no EditReward, or its parts do not fit each other.
        """
        folder = local(folder)
        spec = cls.check(folder)
        made = cls._made(*_vlm_folder(Path(folder), spec), spec, Path(folder), mesh, dtype, scoring)
        if not scoring or "lora" not in made.params:
            return made
        held = {**made.params, "lora": as_precision(dtype).hold(made.params["lora"])}
        return made.replace(params=held)

    @classmethod
    def check(cls, folder: str | os.PathLike) -> Spec:
        """What `load` raises, from headers alone."""
        folder = local(folder)
        spec = Spec.read(folder)
        vlm, config = _vlm_folder(Path(folder), spec)
        native.check_component(vlm, qwen.rules(config), registry.NETWORKS[config.CLASS_NAME].abstract(config))
        files.check_head(folder, config, len(spec.targets))
        if (Path(folder) / PEFT_FILE).is_file():
            files.check_lora(folder, config)
        elif spec.base is not None:
            raise FileNotFoundError(
                f"{folder} lacks {PEFT_FILE}, without which {spec.base} is no EditReward; copy it there."
            )
        return spec

    @classmethod
    def _made(
        cls,
        vlm: Path,
        config: Qwen2_5_VLConfig,
        spec: Spec,
        folder: Path | None,
        mesh: Mesh | None,
        dtype: Any,
        scoring: bool = False,
    ) -> Self:
        precision, abstract = as_precision(dtype), registry.NETWORKS[config.CLASS_NAME].abstract(config)
        placed = None if mesh is None else shardings(mesh, {"vlm": abstract})["vlm"]
        processor, alpha = VLMProcessor.load(vlm, config), None
        wanted = (lambda path: not path.startswith(f"{WORDS}/")) if scoring else (lambda path: True)
        params = {"vlm": native.load_component(vlm, qwen.rules(config), abstract, placed, precision, wanted)}
        if folder is None:
            shapes = files.abstract_head(config, len(spec.targets))
            zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
            params["head"] = jax.device_put(zeros, None if mesh is None else shardings(mesh, shapes))
        else:
            params["head"] = files.load_head(folder, config, len(spec.targets), mesh)
            if (folder / PEFT_FILE).is_file():
                params["lora"], alpha = files.load_lora(folder, config, mesh)
        module = EditReward(config, len(spec.targets), dtype=precision.compute, param_dtype=precision.trained)
        module = module if alpha is None else module.clone(lora_alpha=alpha)
        return cls(module, params, processor, spec, alpha, vlm)

    def save(
        self,
        folder: str | os.PathLike,
        dtype: Any = None,
        changed: Collection[str] | None = None,
        with_vlm: bool = True,
    ) -> Path:
        """Writes a folder that `load` reads.

        Args:
          dtype: of the files: float32, float16 or bfloat16; None keeps each parameter's own.
          changed: with `dtype` None: which leaves ('vlm/path/to/leaf') are not what was read. All others of the vision-language model
            are copied from its files bit for bit, and these get the dtypes that the files have.
          with_vlm: of no account; the vision-language model is written when it was trained.
        """
        del with_vlm
        folder, config = Path(folder), self.module.config
        folder.mkdir(parents=True, exist_ok=True)
        dtype = None if dtype is None else check_dtype(dtype)
        files.save_head(folder, self.params["head"], dtype)
        if "lora" in self.params:
            files.save_lora(folder, self.params["lora"], self.module.lora_alpha, config, dtype)
        if self.spec.base is None:
            vlm, rules = folder / "vlm", qwen.rules(config)
            if dtype is None and changed is not None and self.vlm_files is not None:
                changed_leaves = {path.removeprefix("vlm/") for path in changed}
                tensors = native.with_changes(self.vlm_files, rules, self.params["vlm"], changed_leaves)
            else:
                tensors = table.to_torch(rules, self.params["vlm"], dtype)
            io.write_folder(vlm, io.TRANSFORMERS_STEM, tensors)
            write_json(vlm / "config.json", registry.network_of(config).config_values(config))
            self.processor.save(vlm)
        self.spec.write(folder)
        return folder

    def prepare(
        self,
        sources: Sequence[Any],
        edited: Sequence[Any],
        instructions: Sequence[str],
        in_program: Collection[int] = (),
    ) -> VLMInput:
        """Questions about edits as the network takes them; pictures as `pictures.decode.to_pil` does.

        Args:
          in_program: as of `VLMProcessor.with_answers`.

        Raises:
          ValueError: see `VLMProcessor.with_answers`.
        """
        asked = [self.spec.question(*row) for row in zip(sources, edited, instructions, strict=True)]
        return self.processor(asked, system_prompt=False, pixels=self.spec.pixels, in_program=in_program)

    def apply(self, params: Any, given: VLMInput) -> jax.Array:
        """Scores float32 [B, targets] in [0, 1] under parameters like the model's own; may be jitted."""
        return apply(self.module, params, given)

    @functools.cached_property
    def _apply(self) -> Any:
        return jax.jit(functools.partial(apply, self.module))

    def questions(
        self,
        sources: Sequence[Any],
        edited: Sequence[Any],
        instructions: Sequence[str],
        batch_size: int = 32,
        mesh: Mesh | None = None,
    ) -> Questions:
        """What `judge` needs of the host: one process's edits, in batches. May be made in any thread, beside what the devices do.

        Args: as of `score`.
        """
        count = len(local_rows(mesh := mesh or make_mesh(), _whole_batch(batch_size, mesh)))
        size = _one_size(edited)
        rows = list(zip(sources, edited, instructions, strict=True))
        parts = [rows[start : start + count] for start in range(0, len(rows), count)]
        return Questions([self._question(part, count, size) for part in parts], rows, size)

    def _question(self, asked: Sequence[tuple[Any, Any, str]], count: int, size: tuple[int, int] | None) -> VLMInput:
        """So many questions, the last one again where fewer are asked, and where none is one that nobody asks."""
        edges = size or (64, 64)
        blank: tuple[Any, Any, str] = (*(Image.new("RGB", edges[::-1]),) * 2, "")
        asked = [*asked, *[asked[-1] if asked else blank] * (count - len(asked))]
        # What was edited comes as it was drawn; sources are shared by groups, and of any size.
        place = [name for name in self.spec.places() if name != "instruction"].index("edited")
        sources, edited, instructions = zip(*asked)
        return self.prepare(sources, edited, instructions, () if size is None else (place,))

    def judge(self, questions: Questions, batch_size: int = 32, mesh: Mesh | None = None) -> np.ndarray:
        """Scores float64 [B, targets] of what was asked.

        With several processes each has questions of its own, as many as it likes, and all call this at the same place; those that
        hold the same rows (`processes.row_owners`) have the same questions.

        Args: as of `score`.
        """
        mesh = mesh or make_mesh()
        count, rows = len(local_rows(mesh, _whole_batch(batch_size, mesh))), questions.rows
        if (size := _agreed(questions.size, bool(rows))) != questions.size:
            questions = dataclasses.replace(questions, batches=[])
        made = []
        with use_mesh(mesh):
            for turn in range(max_over_processes(-(-len(rows) // count))):
                part = rows[turn * count : (turn + 1) * count]
                there = turn < len(questions.batches)
                given = to_bucket(questions.batches[turn] if there else self._question(part, count, size))
                scores = self._apply(self.params, shard_batch(given, mesh, local=True))
                made.append(rows_to_host(scores, mesh)[: len(part)])
        return np.concatenate([*made, np.zeros((0, len(self.spec.targets)))]).astype(np.float64)

    def score(
        self,
        sources: Sequence[Any],
        edited: Sequence[Any],
        instructions: Sequence[str],
        batch_size: int = 32,
        mesh: Mesh | None = None,
    ) -> np.ndarray:
        """Scores float64 [B, targets] of edits; see `judge` about several processes.

        Args:
          batch_size: edits at a time on all devices together, rounded up to a multiple of them.
          mesh: what the parameters are on; None: all devices.
        """
        return self.judge(self.questions(sources, edited, instructions, batch_size, mesh), batch_size, mesh)


@dataclasses.dataclass(frozen=True)
class Questions:
    """What a process asks, prepared on the host.

    Attributes:
      batches: questions as the network takes them, of this process's rows of a batch.
      rows: (source, edited picture, instruction).
      size: (height, width) of all edited pictures, for which the questions are made; None: they have several.
    """

    batches: list[VLMInput]
    rows: list[tuple[Any, Any, str]]
    size: tuple[int, int] | None


def _whole_batch(batch_size: int, mesh: Mesh) -> int:
    return -(-batch_size // batch_shards(mesh)) * batch_shards(mesh)


def _one_size(pictures: Sequence[Any]) -> tuple[int, int] | None:
    """(height, width) of pictures that have one; files are not opened for it."""
    size_of = lambda p: p.size[::-1] if isinstance(p, Image.Image) else np.shape(p)[:2]
    sizes = {None if isinstance(p, str | os.PathLike) else tuple(size_of(p)) for p in pictures}
    return sizes.pop() if len(sizes) == 1 else None


def _agreed(size: tuple[int, int] | None, asks: bool) -> tuple[int, int] | None:
    """The one size of all processes that ask something; None: there is none. All then run one program."""
    edge = 2**15
    number = 0 if size is None else size[0] * edge + size[1]
    largest = max_over_processes(number if asks else 0)
    smallest = edge**2 - max_over_processes(edge**2 - (number if asks else largest))
    return divmod(largest, edge) if largest == smallest and largest else None


def to_bucket(given: VLMInput) -> VLMInput:
    """Questions padded to one of few lengths, the same on all processes, so that batches share programs.

    A function of the batch alone: what was asked before changes no rounding, nor does going on after an interruption.
    """
    tokens, windows = given.input_ids.shape[1], _pictures(given).frames.shape[1]
    return pad_to(given, _bucket(max_over_processes(tokens)), _bucket(max_over_processes(windows)))


def _pictures(given: VLMInput) -> VisionInput:
    """Those of a question, which always shows two."""
    return cast(VisionInput, given.vision)


def _bucket(size: int) -> int:
    """At most an eighth more: a multiple of an eighth of the power of two below."""
    step = max(1, 2 ** (size.bit_length() - 1) // 8)
    return -(-size // step) * step


def apply(module: EditReward, params: Any, given: VLMInput) -> jax.Array:
    """`EditReward` on one tree of parameters and a prepared batch."""
    positions = given.positions.swapaxes(0, 1)
    return module.apply(variables(module, params), given.input_ids, positions, given.valid, given.vision)


def pad_to(given: VLMInput, tokens: int, windows: int) -> VLMInput:
    """The same questions with more padding: tokens on the left, windows behind."""
    pictures = _pictures(given)
    left, behind = tokens - given.input_ids.shape[1], windows - pictures.frames.shape[1]

    def pad(x: Any, axis: int, before: int, after: int, value: int = 0) -> np.ndarray:
        widths = [(0, 0)] * np.ndim(x)
        widths[axis] = (before, after)
        return np.pad(np.asarray(x), widths, constant_values=value)

    patches = pictures.patches
    patches = patches.padded(behind) if isinstance(patches, Levels) else pad(patches, 1, 0, behind)
    vision = VisionInput(
        patches,
        pad(pictures.places, 1, 0, behind),
        pad(pictures.frames, 1, 0, behind),
        pad(pictures.tokens, 1, left, 0, -1),
    )
    return VLMInput(
        pad(given.input_ids, 1, left, 0), pad(given.positions, 2, left, 0), pad(given.valid, 1, left, 0), vision
    )


def _vlm_folder(folder: Path, spec: Spec) -> tuple[Path, Qwen2_5_VLConfig]:
    """Where the vision-language model is, and its sizes."""
    try:
        vlm = folder / "vlm" if spec.base is None else find_model(spec.base, VLM_PATTERNS)
        name = registry.class_name(vlm)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The vision-language model {spec.base or folder / 'vlm'} of the EditReward {folder} was not found ({error})"
        ) from error
    if name != Qwen2_5_VL.__name__ and name != Qwen2_5_VLConfig.CLASS_NAME:
        raise ValueError(f"{vlm} holds {name or 'a model without a class'}; an EditReward stands on a Qwen2.5-VL.")
    return vlm, cast(Qwen2_5_VLConfig, registry.read_network(vlm)[1])


def with_lora(model: EditRewardModel, key: jax.Array, rank: int, alpha: float) -> EditRewardModel:
    """A model whose decoder has a LoRA: a new one, or the one that it has.

    Raises:
      ValueError: when that is of another rank or alpha.
    """
    params = model.params
    if "lora" not in params:
        params = {**params, "lora": edit_reward.init_lora(key, model.module.config, rank)}
    had = jax.tree.leaves(params["lora"])[0].shape[-1], alpha if model.alpha is None else model.alpha
    if had != (rank, alpha):
        raise ValueError(
            f"The EditReward has a LoRA of rank and alpha {had}, and {(rank, alpha)} is asked for; make them equal."
        )
    return model.replace(module=model.module.clone(lora_alpha=alpha), params=params, alpha=alpha)

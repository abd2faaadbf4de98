"""Every option and its default, once. A recipe is YAML that these models accept; ``--set a.b=c`` edits it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator, model_validator

from bitconvert.errors import UsageError

FIT_BELOW, IMITATE_BELOW = 0.15, 0.1
"""Tokens a parameter up to which a block-wise fit, and more of the KL, do better (docs/results/quality)."""

_LONGEST_RECIPE = 2**20  # characters
_SHOWN = 80  # characters of an override that is wrong


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Scaling(_Section):
    """How the scale of a ternary weight is computed: an estimator over a granularity."""

    estimator: Literal["absmean", "mse", "learned"] = Field(
        "mse",
        description="absmean is BitNet's; mse minimizes the squared rounding error; learned is trained, from there on",
    )
    granularity: str = Field("tensor", description="one scale per tensor, row, or group:N of a row")

    @field_validator("granularity")
    @classmethod
    def _known(cls, value: str) -> str:
        if value in ("tensor", "row") or re.fullmatch(r"group:[1-9]\d*", value):
            return value
        raise ValueError("must be tensor, row or group:N")

    @cached_property
    def group_size(self) -> int | None:
        """N of ``group:N``; None for one scale per tensor or per row."""
        kind, _, size = self.granularity.partition(":")
        return int(size) if kind == "group" else None

    def __str__(self) -> str:
        return f"{self.estimator} per {self.granularity}"


class Keep(_Section):
    """Linear layers that stay out of the ternary ones and go on as plain ones: a few, by name or by what they cost."""

    modules: tuple[str, ...] = Field((), description="names or patterns, such as '*.layers.0.*.down_proj'")
    budget: float = Field(
        0.0, ge=0.0, lt=1.0, description="share of the linear weights that may stay: where rounding alone costs most"
    )
    tokens: int = Field(1024, gt=0, description="of the training text, on which that is measured, once per matrix")

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Keep:
        if self.modules and self.budget:
            raise ValueError("modules names what stays, and budget leaves that to warmup: give one of them")
        return self


class LambdaRamp(_Section):
    """How λ goes from 0 (latent) to 1 (ternary): weights are ``w + λ (Q(w) - w)``."""

    curve: Literal["auto", "linear", "cosine", "quadratic", "exponential", "sigmoid", "instant"] = Field(
        "auto", description="auto: linear from the original's weights, instant from any others"
    )
    reach_one_at: float = Field(0.25, ge=0.0, le=1.0, description="share of the training at which λ becomes 1")
    activations_reach_one_at: float = Field(
        0.1, ge=0.0, le=1.0, description="the same for λ of the activations, which is never behind that of the weights"
    )


class Initialisation(_Section):
    """What is done to the latents before the first step, with the text to be trained on; a control has none."""

    method: Literal["auto", "none", "gptq", "blockwise"] = Field(
        "auto",
        description="none: they begin as the original's weights; gptq: rounding errors are compensated for; "
        "blockwise: each decoder layer learns, ternary, to give what the original's gives; "
        f"auto: blockwise below {FIT_BELOW:g} tokens a parameter, unless a λ-curve is named",
    )
    tokens: int = Field(65_536, gt=0, description="tokens of the training text that are looked at for it")
    lr: float = Field(1e-3, gt=0.0, description="peak learning rate of blockwise")
    epochs: int = Field(4, gt=0, description="how often blockwise goes over the tokens, at each layer")

    @property
    def passes(self) -> int:
        """How often the tokens are gone over, at each layer."""
        return self.epochs if self.method == "blockwise" else 1


class LowRank(_Section):
    """Train less than whole latents: their changes alone, as products of thin matrices; the rest waits in bfloat16."""

    rank: int = Field(
        0, ge=0, description="of the changes B A, so that Q(W + B A) is trained; embedding and head stay; 0: W itself"
    )


class Distillation(_Section):
    """The loss: kl * KL(teacher || student) + ce * cross-entropy with the text."""

    kl: float | Literal["auto"] = Field(
        "auto",
        description="weight of the KL divergence from the original model; "
        f"auto: 0.9 below {IMITATE_BELOW:g} tokens a parameter, else 0.65",
    )
    ce: float | Literal["auto"] = Field(
        "auto", description="weight of the cross-entropy with the text; auto: 0.1, 0.35, or without kl 1"
    )
    temperature: float = Field(1.0, gt=0.0, description="softens both distributions of the KL term")
    until_surpassed: bool = Field(
        True,
        description="learn from the text alone while better than the original on held-out text; needs ce",
    )
    teacher_offload: bool = Field(False, description="keep the original's layers in CPU memory, not on the accelerator")
    cache: bool = Field(False, description="ask the original once, keep its likeliest tokens on disk, train from them")
    cache_top_k: int = Field(64, gt=0, description="likeliest tokens kept at a position; the rest counts as one")

    @field_validator("kl", "ce", mode="before")
    @classmethod
    def _weight(cls, value: object) -> object:
        try:
            if value == "auto" or 0 <= float(value) < math.inf:  # type: ignore[arg-type]
                return value
        except (TypeError, ValueError):
            pass
        raise ValueError("must be auto, or a number from 0 on")

    @property
    def weights(self) -> tuple[float, float]:
        """Of the KL and of the cross-entropy, in a settled recipe."""
        assert not isinstance(self.kl, str)
        assert not isinstance(self.ce, str)
        return self.kl, self.ce

    @property
    def asks_the_original(self) -> bool:
        """Whether the loss needs it."""
        return self.kl != 0

    def settled(self, tokens_a_parameter: float, *, is_ternary: bool) -> Distillation:
        """With each ``auto`` decided; a model that is ternary already is no teacher."""
        if is_ternary or self.kl == 0:
            kl, ce = 0.0, 1.0
        else:
            kl, ce = (0.9, 0.1) if tokens_a_parameter < IMITATE_BELOW else (0.65, 0.35)
        decided = {name: value for name, value in (("kl", kl), ("ce", ce)) if getattr(self, name) == "auto"}
        return self.model_copy(update=decided)

    @model_validator(mode="after")
    def _something_to_learn(self) -> Distillation:
        if self.kl == self.ce == 0:
            raise ValueError("kl and ce cannot both be 0")
        return self


class Optimizer(_Section):
    """Which optimizer, and how its learning rate and weight decay move."""

    name: Literal["adamw", "adamw8bit", "adafactor", "muon"] = Field(
        "muon",
        description="bytes kept beside a weight: adamw 8; adamw8bit 2, needs bitsandbytes; adafactor almost none; "
        "muon 4 for the matrices of the layers, adamw for the rest",
    )
    lr: float = Field(1e-3, gt=0.0, description="peak learning rate")
    lr_schedule: Literal["cosine", "linear", "two_stage"] = "cosine"
    lr_warmup: float = Field(0.08, ge=0.0, lt=1.0, description="share of the training over which the rate rises")
    lr_final: float = Field(
        0.1, ge=0.0, le=1.0, description="last rate / peak; for two_stage the second stage's peak / the first's"
    )
    weight_decay: float = Field(0.0, ge=0.0)
    weight_decay_schedule: Literal["constant", "two_stage"] = "constant"
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = Field(
        (0.9, 0.95), description="of the AdamWs; adafactor has none, nor muon for its matrices"
    )
    eps: float = Field(1e-8, gt=0.0, description="of the AdamWs")
    max_grad_norm: float = Field(1.0, gt=0.0)


class _Steps(_Section):
    """What the steps of a training are like, whatever decides how many there are."""

    context: int = Field(512, gt=1, description="tokens in a training window")
    batch_size: int = Field(8, gt=0, description="windows in an optimizer step")
    micro_batch_size: int = Field(2, gt=0, description="windows in one forward pass")
    precision: Literal["auto", "float32", "bf16"] = Field(
        "auto",
        description="auto: bf16 autocast where GPU or CPU have instructions for it, else float32; latents are float32",
    )
    activation_checkpointing: bool = False
    compile: bool = Field(False, description="torch.compile the student")
    seed: int = Field(0, ge=0)
    log_every: int = Field(1, gt=0, description="steps between two lines of metrics")
    eval_every: int = Field(100, gt=0, description="steps between two measurements on held-out text")
    save_every: int = Field(100, gt=0, description="steps between two checkpoints")
    keep_checkpoints: int = Field(2, gt=0)
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        return self

    @property
    def accumulation(self) -> int:
        """Micro-batches in an optimizer step."""
        return self.batch_size // self.micro_batch_size


class Training(_Steps):
    """How much, how large, how often."""

    tokens: int = Field(1_000_000, gt=0, description="training tokens; they decide the number of steps")
    shard: bool = Field(
        False, description="with several processes: split weights, gradients and optimizer state over them (FSDP2)"
    )

    @property
    def steps(self) -> int:
        """Optimizer steps that the token budget pays for, at least one."""
        return max(1, self.tokens // (self.batch_size * self.context))


class Data(_Section):
    """The text to learn from."""

    sources: tuple[str, ...] = Field((), description="files, directories or hub datasets; none: sampled from the model")
    held_out: tuple[str, ...] = Field((), description="text to measure on; none: the end of the training text")
    held_out_tokens: int = Field(16_384, gt=0, description="tokens measured on")
    sampled_tokens: int = Field(262_144, gt=0, description="tokens sampled from the model where no sources are given")
    streaming: bool = Field(
        False, description="read the sources as they are needed, for what is larger than the disk; else all at first"
    )
    shard_tokens: int = Field(2**24, gt=0, description="tokens tokenized into one file, within which they are shuffled")
    shards: int = Field(3, gt=1, description="most such files at a time; one is read, others are written ahead")
    workers: int = Field(2, gt=0, description="processes that tokenize them")


class Packing(_Section):
    """The formats the result is meant for, and what their files are like; warmup warns where something does not fit."""

    formats: tuple[str, ...] = Field(("tq2_0", "safetensors"), description="formats of `pack`, or all")
    embedding_type: str = Field("f16", description="type of the embedding in GGUF files")
    output_type: str | None = Field(None, description="type of an untied head in GGUF files; none: the embedding's")
    kept_type: str = Field("q8_0", description="type in GGUF files of the matrices that are kept from being ternary")
    max_shard_size: ByteSize | None = Field(None, gt=0, description="split weights into files of at most this: 2GB")


class Recipe(_Section):
    """All that decides how a model becomes ternary."""

    description: str = ""
    control: bool = Field(
        False, description="train in full precision on the same tokens instead (cross-entropy only), to compare with"
    )
    scaling: Scaling = Scaling()
    keep: Keep = Keep()
    lam: LambdaRamp = LambdaRamp()
    init: Initialisation = Initialisation()
    lora: LowRank = LowRank()
    distill: Distillation = Distillation()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    data: Data = Data()
    pack: Packing = Packing()

    @model_validator(mode="after")
    def _can_be_streamed(self) -> Recipe:
        if self.data.streaming and self.distill.cache:
            raise ValueError("distill.cache keeps answers to all of the text on disk: not with data.streaming")
        if self.data.streaming and self.data.shard_tokens < self.training.context:
            raise ValueError(f"data.shard_tokens: {self.data.shard_tokens} are fewer than training.context")
        return self

    @model_validator(mode="after")
    def _low_rank_fits(self) -> Recipe:
        if self.lora.rank:
            for key, value, other in (
                ("control", self.control, True),
                ("scaling.estimator", self.scaling.estimator, "learned"),
                ("init.method", self.init.method, "gptq"),
                ("training.shard", self.training.shard, True),
            ):
                if value == other:
                    raise ValueError(f"lora.rank does not go with {key}={str(other).lower()}")
        return self

    def settled(self, parameters: int, *, is_ternary: bool, is_sharded: bool = False) -> Recipe:
        """The recipe for one model, with each ``auto`` decided.

        Args:
            parameters: how many the model has.
            is_ternary: whether it is to be trained on as the ternary model that it is.
            is_sharded: whether no process has the whole model, so that none can fit it.
        """
        tokens_a_parameter = self.training.tokens / parameters
        method, curve = self.init.method, self.lam.curve
        if method == "auto":
            is_begun_anew = curve in ("auto", "instant") and not is_ternary
            is_fitted = tokens_a_parameter < FIT_BELOW and is_begun_anew and not is_sharded
            method = "blockwise" if is_fitted else "none"
        if curve == "auto":
            curve = "linear" if method == "none" and not is_ternary else "instant"
        init, lam = self.init.model_copy(update={"method": method}), self.lam.model_copy(update={"curve": curve})
        distill = self.distill.settled(tokens_a_parameter, is_ternary=is_ternary)
        return self.model_copy(update={"init": init, "lam": lam, "distill": distill})

    @property
    def initialises(self) -> bool:
        """Whether something is done to the latents before the first step; a control has none."""
        return self.init.method != "none" and not self.control

    def to_yaml(self) -> str:
        """The whole recipe, defaults included."""
        return _to_yaml(self)


class Lora(_Section):
    """A low-rank change beside each frozen ternary matrix: alpha / rank * B A (Hu et al., arXiv 2106.09685)."""

    rank: int = Field(16, gt=0, description="rows of A, columns of B")
    alpha: int = Field(32, gt=0, description="the change is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="share of the activations that A does not see, in training")
    modules: tuple[str, ...] = Field((), description="last names of the linears that get one: q_proj …; none: all")


class AdapterOptimizer(Optimizer):
    """The optimizer of an adapter's matrices."""

    name: Literal["adamw", "adamw8bit", "adafactor", "muon"] = Field("adamw", description="as for warmup")
    lr: float = Field(2e-4, gt=0.0, description="peak learning rate")


class AdapterTraining(_Steps):
    """How often over the data, how large, how often measured and saved."""

    epochs: float = Field(1.0, gt=0.0, description="how often every window, or conversation, is trained on")

    def steps_over(self, rows: int) -> int:
        """Optimizer steps over so many windows or conversations, at least one."""
        return max(1, round(self.epochs * rows / self.batch_size))


class AdapterData(_Section):
    """The conversations, or the text, to learn from."""

    sources: tuple[str, ...] = Field((), description="JSONL with messages (role, content), or text as warmup takes it")
    held_out: tuple[str, ...] = Field((), description="the same to measure on; none: the end of the sources")
    held_out_tokens: int = Field(16_384, gt=0, description="tokens measured on, at most a tenth of the sources")


class Adaptation(_Section):
    """All that decides how an adapter is trained."""

    lora: Lora = Lora()
    optimizer: AdapterOptimizer = AdapterOptimizer()
    training: AdapterTraining = AdapterTraining()
    data: AdapterData = AdapterData()

    def as_recipe(self, rows: int) -> Recipe:
        """The same as the training of a ternary model on its text alone: λ is 1 and nobody teaches.

        Args:
            rows: windows or conversations that there are to train on.
        """
        steps = self.training.model_dump(exclude={"epochs"})
        tokens = self.training.steps_over(rows) * self.training.batch_size * self.training.context
        return Recipe(
            lam=LambdaRamp(curve="instant"),
            init=Initialisation(method="none"),
            distill=Distillation(kl=0.0, ce=1.0),
            optimizer=self.optimizer,
            training=Training(tokens=tokens, **steps),
        )

    def to_yaml(self) -> str:
        """All of it, defaults included."""
        return _to_yaml(self)


def load_recipe(name: str | None = None, overrides: Iterable[str] = (), beneath: Recipe | None = None) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        name: a shipped recipe's name, a YAML file, or None for the defaults.
        overrides: ``section.key=value``, each value read as YAML.
        beneath: a recipe to start from instead of a named one.

    Raises:
        UsageError: naming every problem at once.
    """
    path = recipe_path(name) if name else None
    values = beneath.model_dump(mode="json") if beneath and not path else {}
    return _load(Recipe, path, values, overrides, "`bitconvert recipes NAME` shows every key with its default")


def load_adaptation(file: Path | None = None, overrides: Iterable[str] = ()) -> Adaptation:
    """Read the options of ``adapt`` and apply overrides.

    Args:
        file: YAML, or None for the defaults.
        overrides: ``section.key=value``, each value read as YAML.

    Raises:
        UsageError: naming every problem at once.
    """
    if file is not None and not file.is_file():
        raise UsageError(f"{file}: no such file", "leave it out for the defaults")
    keys = [f"{name}.{key}" for name, part in Adaptation() for key in type(part).model_fields]
    return _load(Adaptation, file, {}, overrides, f"keys of adapt: {', '.join(keys)}")


OptionsT = TypeVar("OptionsT", Recipe, Adaptation)


def read_options(kind: type[OptionsT], path: Path) -> OptionsT:
    """Options that a run has saved.

    Raises:
        UsageError: they are none of this kind.
    """
    return _load(kind, path, {}, (), "it may be the run of another command, or of another version")


def _load(
    kind: type[OptionsT], path: Path | None, beneath: dict[str, Any], overrides: Iterable[str], hint: str
) -> OptionsT:
    values = _read_yaml(path) if path else beneath
    changed = {_apply(values, override) for override in overrides}
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UsageError(_told(error, str(path or "recipe"), changed, kind), hint) from error


def _told(error: ValidationError, origin: str, changed: set[str], kind: type[BaseModel]) -> str:
    """Every problem of a recipe, those of overrides apart from those of what they change."""
    of_overrides, others = [], []
    for problem in error.errors():
        is_unknown = problem["type"] == "extra_forbidden"
        override = _override_of(problem, changed, is_unknown)
        told = _tell_unknown(override or _key(problem), kind) if is_unknown else _tell(problem)
        if override:
            of_overrides.append(f"--set {told}")
        else:
            others.append(told)
    return "; ".join([*of_overrides, *([f"{origin}: {'; '.join(others)}"] if others else [])])


def _override_of(problem: Any, changed: set[str], is_unknown: bool) -> str | None:
    """The override that a problem is one of; an unknown section is one of the key that was to be in it."""
    key = _key(problem)
    return next(
        (each for each in changed if f"{key}.".startswith(f"{each}.") or (is_unknown and each.startswith(f"{key}."))),
        None,
    )


def _tell_unknown(key: str, kind: type[BaseModel]) -> str:
    alike = get_close_matches(key, _options(kind()), n=1)
    return f"{key}: unknown key" + (f", did you mean {alike[0]}?" if alike else "")


def packing_options(**given: Any) -> Packing:
    """The options of ``pack`` as a command line gives them; None leaves the default.

    Raises:
        UsageError: naming every problem at once.
    """
    try:
        return Packing.model_validate({key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        problems = [f"--{_tell(problem).replace('_', '-')} (given: {problem['input']})" for problem in error.errors()]
        raise UsageError("; ".join(problems), "a size is written 2GB or 500MB; `bitconvert pack --help`") from error


def recipe_path(name: str) -> Path:
    """The file of a shipped recipe, or ``name`` itself where it is a file."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UsageError(f"{name}: no such recipe file", "`bitconvert recipes` lists the shipped ones")
        return path
    shipped = recipe_directory() / f"{name}.yaml"
    if not re.fullmatch(r"[\w.-]+", name) or not shipped.is_file():
        raise UsageError(f"{name}: no such recipe", f"shipped recipes: {', '.join(shipped_recipes())}")
    return shipped


def differing(one: OptionsT, other: OptionsT) -> dict[str, tuple[object, object]]:
    """Dotted key -> values, of the options in which two recipes are not the same."""
    ours, theirs = _options(one), _options(other)
    return {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]}


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with bitconvert."""
    return sorted(path.stem for path in recipe_directory().glob("*.yaml"))


def recipe_defaults() -> dict[str, str]:
    """Every key that ``--set`` can change, dotted, with its default as ``--set`` takes it."""
    document, sections = Recipe().model_dump(mode="json"), recipe_sections()
    defaults = {name: value for name, value in document.items() if name not in sections}
    defaults |= {f"{name}.{key}": value for name in sections for key, value in document[name].items()}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in defaults.items()}


def recipe_sections() -> dict[str, type[BaseModel]]:
    """The sections of a recipe, by key."""
    kinds = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, _Section)}


def recipe_directory() -> Path:
    """Where the shipped recipes lie: inside the installed package, or beside it in a checkout."""
    installed = Path(__file__).parent / "recipes"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "recipes"


def _to_yaml(options: _Section) -> str:
    text: str = yaml.safe_dump(options.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = _parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML ({' '.join(str(error).split())})", "mend the file") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a recipe is a mapping of sections", "`bitconvert recipes NAME` shows one")
    return values


def _apply(values: dict[str, Any], override: str) -> str:
    """Write ``a.b=c`` into nested dictionaries and return ``a.b``; unknown keys are left for the models to refuse."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise UsageError(f"--set {override}: not of the form section.key=value", "for example --set optimizer.lr=5e-4")
    for key in keys[:-1]:
        child = values.setdefault(key, {})
        if not isinstance(child, dict):
            raise UsageError(
                f"--set {override}: {key} is not a section", "`bitconvert recipes NAME` shows the sections"
            )
        values = child
    values[keys[-1]] = _yaml_value(override, text)
    return ".".join(keys)


def _yaml_value(override: str, text: str) -> Any:
    try:
        value = _parse_yaml(text)
    except yaml.YAMLError as error:
        shown = override if len(override) <= _SHOWN else f"{override[:_SHOWN]}…"
        raise UsageError(f"--set {shown}: the value is not valid YAML", "quote it") from error
    try:
        return float(value) if isinstance(value, str) else value  # YAML 1.1 reads 1e-3 as text
    except ValueError:
        return value


class _PlainLoader(yaml.SafeLoader):
    """YAML that says each thing once: no aliases, which a few lines can multiply to billions, and no key twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse ``*name``."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not read", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is there already."""
        keys: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is said twice", key_node.start_mark)
            keys.append(key)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str) -> Any:
    if len(text) > _LONGEST_RECIPE:
        raise yaml.YAMLError(f"{len(text)} characters are too many for a recipe")
    try:
        return yaml.load(text, _PlainLoader)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error
    except (ValueError, OverflowError) as error:  # what looks like a date or a number, and is none
        raise yaml.YAMLError(str(error)) from error


def _key(problem: Any) -> str:
    return ".".join(str(part) for part in problem["loc"])


def _tell(problem: Any) -> str:
    return f"{_key(problem)}: {problem['msg'].removeprefix('Value error, ')}".removeprefix(": ")


def _options(sections: BaseModel) -> dict[str, object]:
    options: dict[str, object] = {}
    for name, value in sections:
        if isinstance(value, BaseModel):
            options |= {f"{name}.{key}": option for key, option in value}
        else:
            options[name] = value
    return options

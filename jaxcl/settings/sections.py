"""Every setting of a run, with its type, its range and its default.

`read_settings` fills these from a config. `configs/base.py` explains the settings one by one.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

from jaxcl.losses import Loss
from jaxcl.models import EncoderPart
from jaxcl.models.lora import Lora
from jaxcl.models.pretrained.description import PretrainedModel
from jaxcl.negatives.mining import MiningRule
from jaxcl.negatives.tiers import TierBudgets
from jaxcl.settings.data_sections import DataSettings
from jaxcl.settings.ranges import Label, Margin, Seed
from jaxcl.typing import SIDES, Count, Range, Share, Size

__all__ = [
    "AssignmentSettings",
    "AugmentationSettings",
    "BankSettings",
    "EvaluationSettings",
    "GcbsSettings",
    "GradCacheSettings",
    "LossSettings",
    "MinedSettings",
    "ModelSettings",
    "MomentumSettings",
    "NegativesSettings",
    "OptimizerSettings",
    "Parts",
    "RunSettings",
    "Settings",
    "SourcedSettings",
    "TemperatureSettings",
    "TowerSettings",
    "unresolved",
]


class TowerSettings(NamedTuple):
    """An encoder; `options` are its own arguments."""

    name: str | None = None
    options: Mapping[str, Any] = {}
    pretrained: str | None = None


class ModelSettings(NamedTuple):
    """The encoder, optionally with a separate one for keys, and the width of the embeddings.

    `read_settings` fills in a `name` of `None`. All encoders have the adapters of `lora`.
    """

    name: str | None = None
    shared: bool = True
    dim: Size = 512
    options: Mapping[str, Any] = {}
    pretrained: str | None = None
    key: TowerSettings = TowerSettings()
    lora: Lora = Lora()


class AugmentationSettings(NamedTuple):
    """A random change of the inputs in training."""

    name: str | None = None
    sides: tuple[str, ...] = SIDES
    options: Mapping[str, Any] = {}


class TemperatureSettings(NamedTuple):
    """The initial learned temperature, and the range to which each update clamps it."""

    initial: Annotated[float, Range(above=0)] = 0.05
    minimum: Annotated[float, Range(above=0)] = 0.01
    maximum: Annotated[float, Range(above=0)] = 1.0


class LossSettings(NamedTuple):
    """The loss, its masks and its temperature; `options` are the loss's own arguments."""

    name: str = "infonce"
    options: Mapping[str, Any] = {}
    exchange: str = "gather"
    implementation: str | None = None
    bias: Annotated[float, Range()] | None = None
    matryoshka_dims: tuple[Size, ...] = ()
    masks: tuple[str, ...] = ("row",)
    margin: Margin | None = None
    relative_margin: Annotated[float, Range(least=-1, most=1)] | None = None
    temperature: TemperatureSettings = TemperatureSettings()

    @property
    def margins(self) -> dict[str, float]:
        """The margins that are set, by the name of the loss's argument."""
        both = {"margin": self.margin, "relative_margin": self.relative_margin}
        return {name: value for name, value in both.items() if value is not None}


class BankSettings(NamedTuple):
    """The memory bank."""

    kind: str | None = None
    slots: Size = 16_384
    momentum: Annotated[float, Range(least=0, below=1)] = 0.5
    dtype: str = "float32"


class MinedSettings(NamedTuple):
    """Mining in training from the instance bank."""

    refresh_every: Size | None = None
    per_query: Size = 4
    rank_range: tuple[Count, Count] = (10, 100)
    margin: Margin | None = None
    relative_margin: Annotated[float, Range(least=-1, most=1)] | None = None
    sampling: str = "random"

    @property
    def rule(self) -> MiningRule:
        """These settings as the library's `MiningRule`."""
        names = [name for name in MiningRule._fields if name in self._fields]
        return MiningRule(**{name: getattr(self, name) for name in names})


class MomentumSettings(NamedTuple):
    """The decay of the momentum encoder, at the first and at the last step."""

    initial: Share | None = None
    final: Share = 1.0


class NegativesSettings(NamedTuple):
    """Negatives in addition to in-batch negatives."""

    bank: BankSettings = BankSettings()
    tiers: TierBudgets = TierBudgets()
    mined: MinedSettings = MinedSettings()
    proportions: str = "rows"
    weights: tuple[tuple[Label, Annotated[float, Range(least=0)]], ...] = ()
    momentum_encoder: MomentumSettings = MomentumSettings()
    guide: str | None = None


class SourcedSettings(NamedTuple):
    """Batches by source: `jaxcl.assignment.SourcedRows`."""

    by: str | None = None
    mix: str = "mixed"
    temperature: Annotated[float, Range(above=0, finite=False)] = 1.0
    weights: tuple[tuple[Label | str, Annotated[float, Range(least=0)]], ...] = ()


class GcbsSettings(NamedTuple):
    """Global contrastive batch sampling."""

    refresh_every: Size = 50
    refresh_epochs: Annotated[float, Range(above=0)] | None = None
    method: str = "bisection"
    block_size: Annotated[int, Range(least=2)] | None = None
    preset: str = "light"
    neighbours: Size | None = None
    starts: Size | None = None
    walks: Count | None = None
    swaps: Count | None = None
    refinements: Count | None = None
    graph: str | None = None
    similarity_cap: Annotated[float, Range(least=-1, most=1)] | None = None
    embeddings: str = "encode"
    random_initial: Share = 0.0
    random_final: Share = 0.0
    keep_apart: tuple[str, ...] = ("text",)
    picture: bool = False


class AssignmentSettings(NamedTuple):
    """The assignment of rows to batches."""

    name: str = "uniform"
    sourced: SourcedSettings = SourcedSettings()
    gcbs: GcbsSettings = GcbsSettings()


class GradCacheSettings(NamedTuple):
    """The rows, or tokens, that a device encodes at a time, and the maximum number of widths.

    Texts that are padded to several widths are always encoded in chunks.
    """

    chunk_size: Size | None = None
    chunk_tokens: Size | None = None
    length_buckets: Size | None = None


class OptimizerSettings(NamedTuple):
    """The optimizer and its schedule; `options` are the optimizer's own arguments."""

    name: str = "adam"
    schedule: str = "warmup_cosine"
    learning_rate: Annotated[float, Range(above=0)] = 2e-3
    warmup_steps: Count | None = 30
    decay_steps: Count | None = None
    final_rate: Share = 0.0
    weight_decay: Annotated[float, Range(least=0)] = 0.0
    no_decay: tuple[str, ...] = ()
    clip_norm: Annotated[float, Range(least=0)] = 1.0
    clip_groups: tuple[tuple[str, Annotated[float, Range(least=0)]], ...] = ()
    freeze: tuple[str, ...] = ()
    rates: tuple[tuple[str, Annotated[float, Range(above=0)]], ...] = ()
    layer_decay: Annotated[float, Range(above=0, below=1)] | None = None
    average_decay: Annotated[float, Range(above=0, below=1)] | None = None
    accumulate_steps: Size = 1
    options: Mapping[str, Any] = {}


class EvaluationSettings(NamedTuple):
    """Ranking of held-out splits, further evaluation sets, the best checkpoint, early stopping."""

    methods: tuple[str, ...] | None = None
    directions: tuple[str, ...] | None = None
    exclude_groups: bool = False
    rrf_k: Size = 10
    batch_size: Size = 1_024
    weights: str = "trained"
    projection_head: bool = True
    sets: Mapping[str, str] = {}
    best_metric: str | None = None
    patience: Size | None = None
    min_delta: Annotated[float, Range(least=0)] = 0.0


class RunSettings(NamedTuple):
    """Settings that may change when a run resumes."""

    data_dir: str | None = None
    mesh: Mapping[str, Annotated[int, Range(least=-1)]] = {"data": -1, "fsdp": 1}
    parameter_rules: tuple[tuple[str, Annotated[int, Range(least=0)] | None], ...] = ()
    log_every: Size = 10
    evaluate_every: Size = 100
    checkpoint_every: Size = 100
    keep_checkpoints: Annotated[int, Range(least=2)] = 2
    sheets: bool | None = None


def unresolved(*_: Any, **__: Any) -> Any:
    """Stand in for a part that was not looked up, or may not be imported."""
    raise ValueError("this part of the run was not imported, since its package is not trusted")


class Parts(NamedTuple):
    """The functions that a run's config names, or `unresolved`.

    Attributes:
      pretrained: section of an encoder, as in `encoders` -> the encoder's pretrained model.
      encoders: `"model"`, and `"model.key"` if the keys have their own encoder -> an encoder.
      loss: the loss, with its declaration.
      optimizer: `(**options) -> optax.GradientTransformation`.
      schedule: `(peak, *, steps, …) -> optax.Schedule`, with the fields of
        `jaxcl.settings.parts.SCHEDULE_FIELDS`, or with `warmup_steps`.
      assignment: `(*, num_rows, batch_size, seed) -> (step -> row numbers)`, if `assignment.name`
        is `package.module:function`.
      augmentation: `(**options) -> ((input, key) -> input)`.
      source: `role -> PairSource`, if `data.name` is `package.module:function`.
    """

    pretrained: Mapping[str, PretrainedModel] = {}
    encoders: Mapping[str, EncoderPart] = {}
    loss: Loss = Loss(unresolved)
    optimizer: Callable = unresolved
    schedule: Callable = unresolved
    assignment: Callable | None = None
    augmentation: Callable | None = None
    source: Callable | None = None


class Settings(NamedTuple):
    """All settings of a run, checked, and the functions that they name (`parts`).

    While `epochs` is set, `steps` is not known; `jaxcl.settings.read.with_steps` replaces both.
    """

    seed: Seed = 0
    steps: Size = 300
    epochs: Annotated[float, Range(above=0)] | None = None
    global_batch_size: Size = 1_024
    init_from: str | None = None
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    augmentation: AugmentationSettings = AugmentationSettings()
    loss: LossSettings = LossSettings()
    negatives: NegativesSettings = NegativesSettings()
    assignment: AssignmentSettings = AssignmentSettings()
    grad_cache: GradCacheSettings = GradCacheSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    run: RunSettings = RunSettings()
    parts: Parts = Parts()

"""Write the model card of an exported model from the files of the run that trained it.

Names of data sets, folders and settings are untrusted. The text shows them in code spans, where
Markdown and HTML have no effect, and the metadata has them as quoted YAML strings.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxcl.host.files import read_json_object
from jaxcl.host.printable import printable
from jaxcl.models.pretrained.description import PretrainedModel
from jaxcl.models.pretrained.weights import unused_tensors
from jaxcl.models.towers import SHARED
from jaxcl.run.identity import fields_of
from jaxcl.run.opened import OpenedRun
from jaxcl.run.training import embedding_dim
from jaxcl.settings.data_sections import SidePrompts
from jaxcl.settings.derived import tower_sections
from jaxcl.settings.file_kinds import names_files
from jaxcl.settings.read import read_settings
from jaxcl.settings.sections import Settings
from jaxcl.typing import SIDES

__all__ = ["model_card"]

_METRICS = ("mrr@10", "ndcg@10", "recall@1", "recall@10")
_MAIN_SETTINGS = (
    "steps",
    "global_batch_size",
    "loss.name",
    "loss.temperature.initial",
    "optimizer.name",
    "optimizer.learning_rate",
)
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_USE_OF_JAXCL = """\
import jaxcl

model = jaxcl.load({folder})
queries = model.encode(["parse an ISO 8601 date"], side="query")
keys = model.encode(["datetime.fromisoformat(text)", "os.listdir(path)"], side="key")
print(model.similarity(queries, keys))
"""
_USE_OF_PEFT = """\
from peft import PeftModel
from transformers import AutoModel

adapted = PeftModel.from_pretrained(AutoModel.from_pretrained({base}), {encoder})
"""
_USE_OF_SENTENCE_TRANSFORMERS = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({folder})
queries = model.encode_query(["parse an ISO 8601 date"])
keys = model.encode_document(["datetime.fromisoformat(text)", "os.listdir(path)"])
print(model.similarity(queries, keys))
"""
_USE_OF_IMAGES = """\
import jaxcl

model = jaxcl.load({folder})
images = model.encode(images=["cat.jpg", "dog.jpg"])
"""
_TEXTS_FOR_IMAGES = """\
texts = model.encode(["a photo of a cat"])
print(model.similarity(images, texts))
"""
_CLIP_IN_SENTENCE_TRANSFORMERS = """\
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({folder})
images = model.encode([Image.open("cat.jpg"), Image.open("dog.jpg")])
"""


def model_card(run: OpenedRun, *, name: str, library: str) -> str:
    """Write the card in Markdown, with metadata for the Hugging Face Hub.

    Args:
      run: the run that trained the model. The metrics come from `results.json` in its workdir, if
        that file belongs to the same step.
      name: name of the exported folder.
      library: the library that loads the folder, `"sentence-transformers"`, `"jaxcl"` or `"peft"`.

    Raises:
      ValueError: if `results.json` is damaged.
    """
    settings, results = run.settings, _read_results(run)
    sections = [
        *_front_matter(settings, results, library=library),
        *_introduction(run, name=name),
        *_usage(settings, name, library=library),
        *_data(settings, results),
        *_training(run),
        *_evaluation(run, results),
        *_limitations(settings, library=library),
    ]
    return "\n".join(sections) + "\n"


def _read_results(run: OpenedRun) -> Mapping[str, Any]:
    """Read `results.json`; empty if it is missing or belongs to another step or other weights."""
    if run.weights != run.settings.evaluation.weights:
        return {}
    path = run.workdir / "results.json"
    results = read_json_object(path) if path.exists() else {}
    return results if results.get("steps") == run.made_from["step"] else {}


def _front_matter(settings: Settings, results: Mapping[str, Any], *, library: str) -> Iterator[str]:
    tags = [library, "sentence-similarity", "feature-extraction", "jaxcl"]
    if "train" in results.get("rows", {}):
        tags.append(f"dataset_size:{results['rows']['train']}")
    tags.append(f"loss:{settings.loss.name}")
    metadata: dict[str, Any] = {"library_name": library, "pipeline_tag": "sentence-similarity"}
    base = settings.parts.pretrained.get("model")
    if base is not None and (license_name := _license_of(base)) is not None:
        metadata["license"] = license_name
    origin = settings.model.pretrained
    if origin is not None and _HUB_ID.fullmatch(origin) and not Path(origin).exists():
        metadata["base_model"] = origin
    if data_sets := _data_set_names(settings, with_files=False):  # data sets on the Hub
        metadata["datasets"] = data_sets
    metadata["tags"] = list(dict.fromkeys(tags))
    # Every JSON value is also YAML.
    return iter(["---", *(f"{key}: {_yaml(value)}" for key, value in metadata.items()), "---", ""])


def _introduction(run: OpenedRun, *, name: str) -> Iterator[str]:
    settings, data = run.settings, run.settings.data
    dim = embedding_dim(settings, run.encoder.towers)
    yield f"# {_code(name)}\n"
    yield (
        f"An embedding model trained with jaxcl. It maps queries and keys to unit vectors of "
        f"{dim} dimensions; their inner product is the cosine similarity.\n"
    )
    encoders = {
        "Encoder"
        if tower == SHARED
        else f"Encoder of {tower} {getattr(data.modality, tower)}s": _encoder(settings, section)
        for tower, section in tower_sections(settings.model).items()
    }
    yield from _table(
        ("", ""),
        *encoders.items(),
        ("Dimensions", dim),
        *(
            (f"Longest {side}", f"{getattr(data.max_tokens, side)} tokens")
            for side in SIDES
            if getattr(data.modality, side) == "text"
        ),
        *_prompts(data.prompts),
        *(
            row
            for name, data_set in sorted(data.concatenated.items())
            for row in _prompts(data_set.prompts, of=f" in training rows of {_code(name)}")
        ),
    )


def _prompts(prompts: SidePrompts, *, of: str = "") -> Iterator[tuple[str, str]]:
    for side, texts in (("query", "queries"), ("key", "keys")):
        if prompt := getattr(prompts, side):
            yield f"Prompt of {texts}{of}", _code(json.dumps(prompt))


def _encoder(settings: Settings, section: str) -> str:
    """Describe the encoder of a config section, and the pretrained model that it started from."""
    tower = settings.model if section == "model" else settings.model.key
    base = settings.parts.pretrained.get(section)
    if base is None:
        return _code(tower.name)
    origin = settings.init_from if tower.pretrained is None else tower.pretrained
    return f"{_code(base.family)}, from {_code(_public(origin))}"


def _usage(settings: Settings, name: str, *, library: str) -> Iterator[str]:
    yield "## Usage\n"
    names = {"folder": ascii(name)}
    modalities, ending = set(settings.data.modality), ""
    if modalities == {"text"}:
        in_torch, in_jaxcl = _USE_OF_SENTENCE_TRANSFORMERS, _USE_OF_JAXCL
    else:
        in_torch, in_jaxcl = _CLIP_IN_SENTENCE_TRANSFORMERS, _USE_OF_IMAGES
        ending = _TEXTS_FOR_IMAGES if "text" in modalities else ""
    snippets = {
        "jaxcl": [in_jaxcl],
        "peft": [_USE_OF_SENTENCE_TRANSFORMERS, _USE_OF_PEFT],
        "sentence-transformers": [in_torch, in_jaxcl],
    }
    if library == "peft":
        yield (
            "The folder holds low-rank adapters. Both libraries load them next to the weights of "
            f"{_code(_public(settings.model.pretrained))}, as named in `adapter_config.json`.\n"
        )
        folder = settings.parts.pretrained["model"].encoder_folder
        base = _public(settings.model.pretrained)
        below = f"/{folder}" if folder else ""
        names |= {"base": ascii(base + below), "encoder": ascii(name + below)}
    for snippet in snippets[library]:
        yield f"```python\n{snippet.format(**names)}{ending}```\n"


def _data(settings: Settings, results: Mapping[str, Any]) -> Iterator[str]:
    yield "## Data\n"
    names = ", ".join(map(_code, _data_set_names(settings)))
    yield f"Pairs of a query and its key, from {names}.\n"
    if rows := results.get("rows"):
        yield from _table(
            ("split", "pairs"), *((_code(split), f"{count:,}") for split, count in rows.items())
        )


def _training(run: OpenedRun) -> Iterator[str]:
    step = run.made_from["step"]
    yield "## Training\n"
    yield f"The parameters are from step {step:,} of {run.settings.steps:,}."
    if run.weights == "average":
        yield (
            "They are the exponential moving average of the weights, with a decay of "
            f"{run.settings.optimizer.average_decay:g}."
        )
    yield "The table lists the main settings, and all others that differ from jaxcl's defaults.\n"
    settings, defaults = fields_of(run.settings), fields_of(read_settings({}))
    shown = [name for name in settings if settings[name] != defaults.get(name)]
    yield from _table(
        ("setting", "value"),
        *(
            (_code(name), _code(json.dumps(_public(settings[name]), ensure_ascii=False)))
            for name in dict.fromkeys([*_MAIN_SETTINGS, *shown])
        ),
    )
    models = run.settings.parts.pretrained.values()
    untouched = [
        name for model in models for named in unused_tensors(model).values() for name in named
    ]
    if untouched:
        names = ", ".join(map(_code, dict.fromkeys(untouched)))
        yield f"Training left these tensors of the pretrained model unchanged: {names}.\n"


def _evaluation(run: OpenedRun, results: Mapping[str, Any]) -> Iterator[str]:
    yield "## Evaluation\n"
    if not results:
        yield f"The run has no results for step {run.made_from['step']:,}.\n"
        return
    yield (
        "Each query of a held-out split ranks all keys of that split (the pool). Only the key of "
        "the query's own pair counts as relevant. Each figure is the mean over the queries ± its "
        "standard error, which does not include the variation between seeds.\n"
    )
    yield from _table(
        ("split", "keys", "method", "pool", *_METRICS),
        *(
            (_code(split), _code(variant), _code(method), f"{results['rows'][split]:,}", *figures)
            for split, variants in results["metrics"].items()
            for variant, methods in variants.items()
            for method, metrics in methods.items()
            if (figures := [_figure(metrics.get(metric)) for metric in _METRICS])
        ),
    )
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    yield f"Computed on {_code(results['devices'])} with {_code(versions)}.\n"


def _limitations(settings: Settings, *, library: str) -> Iterator[str]:
    base = settings.parts.pretrained.get("model")
    yield "## Limitations\n"
    yield "- Figures for pools of different sizes are not comparable."
    if settings.data.name == "code_pairs":
        yield (
            "- The `validation` split holds unseen files of packages whose other files were used "
            "in training; `test` holds packages that training never saw."
        )
    if base is not None:
        yield (
            "- The pretrained model may have seen the held-out pairs, or similar pairs, in its "
            "pretraining."
        )
    query, key = settings.data.max_tokens
    texts = set(settings.data.modality) == {"text"}
    if library != "jaxcl" and texts and query != key:
        yield (
            f"- sentence-transformers truncates all texts to {max(query, key)} tokens; training "
            f"truncated queries to {query} and keys to {key}."
        )
    if library == "sentence-transformers" and base is None and settings.data.special_tokens is None:
        yield (
            "- A text without tokens, such as an empty text, has the zero vector. In training, it "
            "had the vector of the unknown token."
        )


def _license_of(base: PretrainedModel) -> str | None:
    """The license in the metadata of the base model's card."""
    card = base.files.get("README.md", b"").decode(errors="replace").replace("\r\n", "\n")
    metadata = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    match = metadata and re.search(r"""^license: *['"]?([\w.+-]+)['"]? *$""", metadata[1], re.M)
    return match[1] if match else None


def _data_set_names(settings: Settings, *, with_files: bool = True) -> list[str]:
    """The names of the run's data sets, without their versions and folders."""
    data_sets = [settings.data.first, *settings.data.concatenated.values()]
    names = [str(_public(data_set.name)) for data_set in data_sets if data_set.name is not None]
    short = {
        name: Path(name).name if names_files(name) else re.split("[:/]", name)[0]
        for name in names
        if with_files or not names_files(name)
    }
    return list(dict.fromkeys(short.values()))


def _public(value: Any) -> Any:
    """The value of a setting, with only the last part of a local path."""
    if not isinstance(value, str) or not value.startswith(("/", "~", ".")):
        return value
    *parents, name = Path(value).parts
    return f"{parents[-1]}/{name}" if parents and _VERSION.fullmatch(name) else name


def _figure(metric: Mapping[str, float | None] | None) -> str:
    if metric is None or metric["mean"] is None:
        return ""
    error = metric["standard_error"]
    return f"{metric['mean']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _table(*rows: Sequence[Any]) -> Iterator[str]:
    """Write a Markdown table; the first row is its header."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    yield "\n".join(lines) + "\n"


def _code(value: Any) -> str:
    """Write a code span on one line, without "|", which would end the cell of a table."""
    text = " ".join(printable(str(value)).split()).replace("|", r"\u007c")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if not text or "`" in (text[0], text[-1]) else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _yaml(value: Any) -> str:
    """Write a value as one line of YAML, in ASCII."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(r"[^ -~]", lambda match: f"\\U{ord(match[0]):08x}", text)

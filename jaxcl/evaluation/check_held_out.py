"""Checks, before a run starts, that its held-out splits support `settings.evaluation`."""

from jaxcl.data.prepare import RunData
from jaxcl.data.source_fields import iterate_fields, read_fields
from jaxcl.data.sources import PairSource
from jaxcl.evaluation.held_out import HELD_OUT
from jaxcl.evaluation.retrieval import lexical_tokens
from jaxcl.settings.derived import ranking_methods
from jaxcl.settings.sections import Settings

__all__ = ["check_evaluation"]


def check_evaluation(settings: Settings, data: RunData) -> None:
    """Raise a `ValueError` if a held-out split does not support `settings.evaluation`.

    BM25 needs a word in at least one key, so the check reads keys until it finds one.
    """
    for split in set(HELD_OUT) & set(data.sources) if settings.evaluation.exclude_groups else ():
        if "group" not in read_fields(data.sources[split], [0], ("group",))[0]:
            raise ValueError(
                f"evaluation.exclude_groups=True, but the rows of the {split} split have no group; "
                "set data.group_field"
            )
    if not {"bm25", "hybrid"} & set(ranking_methods(settings)):
        return
    for split in HELD_OUT:
        if split in data.sources and not _has_words(data.sources[split]):
            raise ValueError(
                f"no key of the {split} split has a word, so that BM25 cannot rank them; set "
                "evaluation.methods to ('dense',), or data.key_field to another field"
            )


def _has_words(source: PairSource) -> bool:
    records = iterate_fields(source, range(len(source)), ("key",))
    return any(lexical_tokens(record["key"]) for record in records)

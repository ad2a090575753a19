"""Which side of a model embeds the values of an evaluation set."""

import pytest

from jaxcl.evaluation.protocol import check_inputs_of_set, side_of

TEXTS = {"query": "text", "key": "text"}
CAPTIONS = {"query": "image", "key": "text"}


class Own:
    kind, fingerprint, metrics, description = "own", "", ("score",), "own texts"

    def __init__(self, *inputs):
        self.inputs = inputs

    def evaluate(self, encode):
        return {"score": 1.0}


def test_a_modality_is_embedded_by_the_first_side_that_has_it():
    assert side_of("text", CAPTIONS) == "key"
    assert side_of("image", CAPTIONS) == "query"
    assert side_of("image", dict.fromkeys(TEXTS, "image")) == "query"
    assert [side_of(side, CAPTIONS) for side in ("query", "key")] == ["query", "key"]
    with pytest.raises(ValueError, match="no side of the model embeds the modality 'image': its q"):
        side_of("image", TEXTS)


def test_a_set_needs_sides_that_embed_its_values():
    for inputs, modality in [(("query", "key"), TEXTS), (("image", "text"), CAPTIONS)]:
        check_inputs_of_set(Own(*inputs), modality)
    with pytest.raises(ValueError, match="'own' has texts of side query, but the model's side que"):
        check_inputs_of_set(Own("query"), CAPTIONS)
    with pytest.raises(ValueError, match="no side of the model embeds the modality 'text'"):
        check_inputs_of_set(Own("image", "text"), dict.fromkeys(TEXTS, "image"))

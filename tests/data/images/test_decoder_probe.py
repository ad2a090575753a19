"""The fingerprint of the decoder notices other pixels, not other versions."""

import re

from jaxcl.data.images import decoder_probe
from jaxcl.data.images.decoder_probe import decoder_fingerprint, decoder_name
from jaxcl.data.images.decoding import FORMATS


def test_the_name_has_the_versions():
    assert re.match(r"Pillow \d+\.\d+.* \(libjpeg-turbo \d", decoder_name())


def test_another_decoder_has_another_fingerprint(monkeypatch):
    original = decoder_fingerprint()
    assert decoder_fingerprint.__wrapped__() == original
    decode = decoder_probe.decode_image

    def one_level_brighter(image, rule):
        pixels = decode(image, rule)
        if rule.size != 8:
            return pixels
        changed = pixels.copy()
        changed[0, 0, 0] ^= 1
        return changed

    monkeypatch.setattr(decoder_probe, "decode_image", one_level_brighter)
    assert decoder_fingerprint.__wrapped__() != original


def test_a_pillow_without_webp_has_a_fingerprint(monkeypatch):
    original = decoder_fingerprint()
    formats = [name for name in FORMATS if name != "WEBP"]
    monkeypatch.setattr("jaxcl.data.images.decoding.FORMATS", formats)
    assert decoder_fingerprint.__wrapped__() not in (original, "")

"""Names of languages by their codes of ISO 639-1: models are told names."""

from __future__ import annotations

_CODES = """
af:Afrikaans ar:Arabic az:Azerbaijani be:Belarusian bg:Bulgarian bn:Bengali bs:Bosnian
ca:Catalan cs:Czech cy:Welsh da:Danish de:German el:Greek en:English es:Spanish et:Estonian
eu:Basque fa:Persian fi:Finnish fr:French ga:Irish gl:Galician gu:Gujarati he:Hebrew hi:Hindi
hr:Croatian hu:Hungarian hy:Armenian id:Indonesian is:Icelandic it:Italian ja:Japanese
ka:Georgian kk:Kazakh kn:Kannada ko:Korean lt:Lithuanian lv:Latvian mk:Macedonian ml:Malayalam
mr:Marathi ms:Malay mt:Maltese my:Burmese ne:Nepali nl:Dutch no:Norwegian nb:Norwegian
nn:Norwegian pa:Punjabi pl:Polish pt:Portuguese ro:Romanian ru:Russian sk:Slovak sl:Slovenian
sq:Albanian sr:Serbian sv:Swedish sw:Swahili ta:Tamil te:Telugu th:Thai tl:Tagalog tr:Turkish
uk:Ukrainian ur:Urdu vi:Vietnamese yo:Yoruba zh:Chinese zu:Zulu
"""
_NAMES = {code: name for code, _, name in (pair.partition(":") for pair in _CODES.split())}


def language_name(language: str | None) -> str | None:
    """The English name of a language that is given as a code (`de`, `pt-BR`) or a name.

    Anything else stays as it is, on one line; None for no text.
    """
    text = " ".join((language or "").split())
    code = text.replace("_", "-").partition("-")[0].lower()
    return _NAMES.get(code, text) or None

"""Personal data: patterns checked by checksum, numbering plan and context; names and places by presidio.

Presidio needs a spaCy model that the user installs.
"""

from __future__ import annotations

import ipaddress
import re
import sys
from functools import lru_cache
from typing import TYPE_CHECKING

from tunewright.core.errors import UserError
from tunewright.core.installation import install_command
from tunewright.data.pii.secret_patterns import Check, Finder, Finding, Pattern, value, words

if TYPE_CHECKING:
    from presidio_analyzer import AnalyzerEngine
    from spacy.language import Language

# ISO 13616, the registry's lengths of the whole number by country.
_IBAN_LENGTHS = {
    15: "NO",
    16: "BE",
    18: "DK FI FK FO GL NL SD",
    19: "MK SI",
    20: "AT BA EE KZ LT LU MN XK",
    21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS VA",
    23: "AE GI IL IQ OM SO TL",
    24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "LY PT ST",
    26: "IS TR",
    27: "BI DJ FR GR IT MC MR SM",
    28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
    29: "BR EG PS QA UA",
    30: "JO KW MU YE",
    31: "MT SC",
    32: "LC",
    33: "RU",
}
_IBANS_OF_NOBODY = words(  # documentation's usual ones
    "DE89370400440532013000 DE91100000000123456789 GB29NWBK60161331926819 GB82WEST12345698765432 "
    "GB33BUKB20201555555555 FR1420041010050500013M02606 FR7630006000011234567890189 NL91ABNA0417164300 "
    "CH9300762011623852957 ES9121000418450200051332 IT60X0542811101000000123456 BE68539007547034"
)
# Issuers' first digits by the card number's length (ISO/IEC 7812); Visa's 13 digits and Maestro's 12 are out of use.
_LONG_CARDS = r"62|5018|5020|5038|5893|6304|6759|676[1-3]|220[0-4]"
_CARD_ISSUERS = {
    14: r"30[0-5]|3095|36|3[89]",
    15: r"3[47]",
    16: r"4|5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720|6011|64[4-9]|65|352[89]|35[3-8]|60|8[12]|508|" + _LONG_CARDS,
    **dict.fromkeys((17, 18, 19), _LONG_CARDS),
}
_CARDS_OF_NOBODY = words(  # the processors' test numbers: they pay for nothing
    "4111111111111111 4242424242424242 4012888888881881 4000056655665556 4222222222222222 5555555555554444 "
    "5105105105105100 2223003122003222 5200828282828210 5454545454545454 378282246310005 371449635398431 "
    "378734493671000 6011111111111117 6011000990139424 6011000000000004 30569309025904 38520000023237 "
    "3056930009020004 36227206271667 3566002020360505 3530111333300000"
)
# Words before a number that is not personal, such as the number of an order, a docket or a book.
_NUMBERED = re.compile(
    r"(?:\b(?:order|invoice|case|docket|ticket|ref|reference|tracking|shipment|parcel|isbn|issn|sku|part|model|serial|"
    r"imei|version|policy|claim|batch|lot|patent|doi|pmid|transaction|booking|ean|upc|id)s?\b|#)"
    r"\W{0,3}(?:(?:number|num|no|nr|id|code|is|was)\b\W{0,3}){0,2}$",
    re.IGNORECASE,
)
_SSNS_OF_NOBODY = words("078051120 219099999 123456789 111111111 123121234 555555555")
_IPS_OF_NOBODY = words(  # public resolvers
    "8.8.8.8 8.8.4.4 1.1.1.1 1.0.0.1 9.9.9.9 208.67.222.222 208.67.220.220 4.4.4.4 1.2.3.4 "
    "2001:4860:4860::8888 2001:4860:4860::8844 2606:4700:4700::1111 2606:4700:4700::1001"
)
_COUNTRY_CODES = re.compile(  # ITU-T E.164's list of assigned codes
    r"1|7|2(?:[07]|1[1-368]|[2346]\d|5[0-8]|9[01789])|3(?:[0-469]|5\d|7[0-8]|8[0-35-79])|4(?:[013-9]|2[013])|"
    r"5(?:[1-8]|0\d|9\d)|6(?:[0-6]|7[02-9]|8[0-35-9]|9[0-2])|8(?:[1246]|5[02356]|80|86)|9(?:[0-58]|6[0-8]|7[0-79]|9[2-68])"
)


def luhn(digits: str) -> bool:
    """Return whether the check digit is right (ISO/IEC 7812-1, annex B): every second digit from the right doubled."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


def iban_valid(iban: str) -> bool:
    """Return whether the two check digits are right: mod 97 is 1 (ISO 7064, MOD 97-10)."""
    return int("".join(str(int(character, 36)) for character in iban[4:] + iban[:4])) % 97 == 1


def _digits(match: re.Match[str]) -> str:
    return re.sub(r"\D", "", value(match))


def _numbered(match: re.Match[str]) -> bool:
    start = match.start("value") if "value" in match.re.groupindex else match.start()
    return _NUMBERED.search(match.string[max(0, start - 40) : start]) is not None


def _card(match: re.Match[str]) -> bool:
    digits = _digits(match)
    issuers = _CARD_ISSUERS.get(len(digits))
    if issuers is None or re.match(issuers, digits) is None or not luhn(digits):
        return False
    made_up = digits in _CARDS_OF_NOBODY or "00000000" in digits or len(set(digits)) < 3
    return not made_up and not _numbered(match)


def _iban(match: re.Match[str]) -> bool:
    iban = re.sub("[ -]", "", match[0])
    return iban_valid(iban) and iban not in _IBANS_OF_NOBODY


_DOMAINS_OF_NOBODY = re.compile(
    r"(?:.*\.)?(?:example(?:\.(?:com|org|net))?|test|invalid|localhost|local)|"  # RFC 2606, RFC 6762
    r"(?:domain|company|yourcompany|yourdomain|mydomain|email|mail|acme|foo|bar|abc|xyz)\.(?:com|org|net|tld)",
    re.IGNORECASE,
)
_LOCALS_OF_NOBODY = re.compile(
    r"git|your.*|no-?reply|do-?not-?reply|x{3,}|user|username|name|firstname\.lastname", re.I
)
_NO_TLD = re.compile(r".*\.(?:png|jpe?g|gif|svg|webp|css|js|json|txt|html?|xml|pdf|ya?ml|zip|exe|dll)", re.IGNORECASE)


def _email(match: re.Match[str]) -> bool:
    local, domain = match["local"], match["domain"]
    if _NO_TLD.fullmatch(domain) or ".." in local or local.endswith("."):
        return False  # icon@2x.png
    if re.search(r"://[^\s/@]*$", match.string[max(0, match.start() - 120) : match.start()]):
        return False  # the user part of a URL
    return not _DOMAINS_OF_NOBODY.fullmatch(domain) and not _LOCALS_OF_NOBODY.fullmatch(local)


def _is_fictional(digits: str) -> bool:
    """Return whether a number is fictional: 555-01xx (NANPA), Ofcom's numbers for drama, or counting digits."""
    return (
        re.search(r"55501\d\d$", digits) is not None
        or re.fullmatch(r"(?:44|0)(?:0?207946\d{4}|0?7700900\d{3}|0?1632960\d{3})", digits) is not None
        or "123456789" in digits
        or "987654321" in digits
        or len(set(digits[-7:])) == 1
    )


def _north_american(digits: str) -> bool:
    """Return whether a number has the form NXX-NXX-XXXX, with N from 2 to 9 and not N11 (NANP)."""
    return re.fullmatch(r"1?[2-9](?!11)\d\d[2-9](?!11)\d\d\d{4}", digits) is not None


def _international(match: re.Match[str]) -> bool:
    """Return whether a number follows E.164: assigned country code, up to 15 digits, not a coordinate (+40.7127837)."""
    number = value(match)
    digits = re.sub(r"\D", "", number.replace("(0)", "")).removeprefix("00")
    if number[0] == "0" and not re.search(r"[ ./()-]", number):
        return False  # 00 and only digits: any number with leading zeros
    if re.fullmatch(r"\+\d{1,3}\.\d{4,}", number) or not 9 <= len(digits) <= 15 or not _COUNTRY_CODES.match(digits):
        return False
    if digits[0] == "1" and not (len(digits) == 11 and _north_american(digits)):
        return False
    return not _is_fictional(digits) and not _numbered(match)


def _national_american(match: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", re.split(r"x|ext", match[0])[0])
    return _north_american(digits) and not _is_fictional(digits) and not _numbered(match)


def _national(match: re.Match[str]) -> bool:
    """Return whether a number has the trunk prefix 0 and 10 or 11 digits (GB, FR, DE, IT, JP, AU)."""
    digits = _digits(match)
    return 10 <= len(digits) <= 11 and not _is_fictional(digits) and not _numbered(match)


_DATE = re.compile(r"(?:19|20)\d\d([-. ])\d\d\1\d\d\b|\d\d([-. ])\d\d\2(?:19|20)\d\d\b")


def _called(match: re.Match[str]) -> bool:
    """Return whether 7 to 13 digits after a word such as "phone" are a number, and not a date or 1 000 000."""
    number, digits = match["value"], _digits(match)
    if _DATE.match(number) or re.fullmatch(r"\d{1,2}(?: \d{3})+|\d{1,3}(?:\.\d{1,3}){3}", number):
        return False
    return 7 <= len(digits) <= 13 and not _is_fictional(digits)


def _birth(match: re.Match[str]) -> bool:
    """Return whether a date exists, in one of its orders, and is not the default of a form or a clock."""
    numbers = [int(number) for number in re.findall(r"\d+", match["value"])]
    if len(numbers) == 2:  # with the month's name
        return 1 <= min(numbers) <= 31
    year, (month, day) = max(numbers), sorted(number for number in numbers if number != max(numbers))
    return 1 <= month <= 12 and day <= 31 and not (month == day == 1 and year in (1900, 1970, 2000))


def _record(match: re.Match[str]) -> bool:
    """Return whether a number is not an example's."""
    digits = _digits(match)
    return digits not in "01234567890" and digits not in "9876543210" and len(set(digits)) > 2


def _ssn(match: re.Match[str]) -> bool:
    """Return whether area, group and serial are assigned (not 000, 666, 9xx; not 00; not 0000)."""
    digits = _digits(match)
    given = re.fullmatch(r"(?!000|666|9)\d{3}(?!00)\d\d(?!0000)\d{4}", digits) is not None
    return given and digits not in _SSNS_OF_NOBODY and not _numbered(match)


_ADDRESS_CONTEXT = re.compile(
    r"\b(?:ip|ips|ipv4|address|addr|host|server|client|from|ping|ssh|dns|gateway)\b\W{0,4}\w{0,4}\W{0,3}$", re.I
)
_VERSION_CONTEXT = re.compile(
    r"(?:\bv|version|release|firmware|build|driver|section|clause|chapter|para(?:graph)?s?|article|rule|fig(?:ure)?|"
    r"table|update|§|/)\W{0,2}$",
    re.IGNORECASE,
)


def _ip_address(match: re.Match[str]) -> bool:
    """Return whether an address is public (IANA's registries); four small numbers may be a section or a version."""
    try:
        address = ipaddress.ip_address(match["value"])
    except ValueError:
        return False
    if not address.is_global or address.is_multicast or str(address) in _IPS_OF_NOBODY:
        return False
    if address.version == 6:
        return True
    before = match.string[max(0, match.start("value") - 30) : match.start("value")]
    if _ADDRESS_CONTEXT.search(before) or before.endswith("://"):
        return True
    small = all(int(part) < 100 for part in match["value"].split("."))
    return not small and _VERSION_CONTEXT.search(before) is None


def _iban_regex() -> re.Pattern[str]:
    shapes = []
    for length, countries in _IBAN_LENGTHS.items():
        groups, rest = divmod(length - 4, 4)
        tail = f"(?:[ -]?[A-Z0-9]{{{rest}}})" if rest else ""
        shapes.append(f"(?:{countries.replace(' ', '|')})\\d\\d(?:[ -]?[A-Z0-9]{{4}}){{{groups}}}{tail}")
    return re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(shapes)})(?![A-Za-z0-9])", re.ASCII)


_CARD = (
    r"(?<![\w.,+/-])(?<!\d\d )(?:\d{14,19}|\d{4}(?P<a>[ -])\d{4}(?P=a)\d{4}(?P=a)\d{2,4}(?:(?P=a)\d{1,3})?|"
    r"\d{4}(?P<b>[ -])\d{6}(?P=b)\d{4,5})(?![\w-]|[.,]\d)"
)
_EMAIL = (
    r"(?<![\w.%+@-])(?P<local>[\w%+-][\w.%+-]{0,63})@"
    r"(?P<domain>(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24})(?![A-Za-z0-9_])"
)
_END = r"(?!\w|[.,]\d|-\w)"
_NUMBER = r"[1-9](?:[ ./-]?(?:\(\d{1,4}\)[ ./-]?)?\d){7,14}"
_ALONE = r"(?<![\w.,+/-])(?<!\d )"  # not the end of a longer sequence of groups
_INTERNATIONAL = rf"(?<![\w+])\+{_NUMBER}{_END}|{_ALONE}00{_NUMBER}{_END}"
_AMERICAN = (
    r"(?<![\w.,+/$€£-])(?:1[ .-])?(?:\([2-9]\d\d\)[ .-]?|[2-9]\d\d(?P<sep>[.-]))[2-9]\d\d(?(sep)(?P=sep)|[ .-])\d{4}"
    r"(?: ?(?:x|ext\.?) ?\d{1,5})?" + _END
)
_NATIONAL = _ALONE + r"(?:0[1-9]\d{0,3}|\(0[1-9]\d{0,3}\))(?P<sep>[ ./-])\d{2,8}(?:(?P=sep)\d{2,4}){0,4}" + _END
_CALLED = (
    r"(?<![a-z])(?:tel|phone|telephone|telefon|mobile|cell|cellphone|fax|whatsapp|sms|call|dial|ring|text)\b"
    r"(?:\W{0,3}\b(?:number|num|no|nr|at|on|is|me|us|to)\b){0,3}\W{0,3}(?<![\d.,$€£])"
    r"(?P<value>\(?\d(?:[ .-]|\) ?| ?\()?\d(?:(?:[ .-]|\) ?| ?\()?\d){5,11})(?!\w|[.,:-]\d)"
)
_SSN = r"(?<![\w.,+-])\d{3}-\d{2}-\d{4}(?![\w-])"
_SSN_NAMED = (
    r"\b(?:ssn|social security)\b(?:\W{0,3}\b(?:number|no|is)\b){0,2}\W{0,3}"
    r"(?P<value>\d{3}[ -]?\d{2}[ -]?\d{4})(?![\w-])"
)
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|mär|mai|okt|dez)[a-zä]{0,6}\.?"
_YEAR = r"(?:19|20)\d\d"
_NAMES = r"[\W_]{0,5}(?:is\W{1,3})?"  # between the name and the value
_BIRTH = (
    r"(?<![a-z])(?:d\.?o\.?b|date[ _]of[ _]birth|birth[ _]?date|geburtsdatum|geb|geboren am|"
    rf"date[ _]de[ _]naissance|fecha[ _]de[ _]nacimiento)(?![a-z]){_NAMES}"
    rf"(?P<value>\d{{1,2}}(?P<s>[./-])\d{{1,2}}(?P=s){_YEAR}|{_YEAR}-\d\d-\d\d|"
    rf"\d{{1,2}}\.? {_MONTH} {_YEAR}|{_MONTH} \d{{1,2}},? {_YEAR})(?![\w-]|[.,]\d)"
)
_RECORD = (
    r"(?<![a-z])(?:mrn|(?:medical|patient|health)[ _]record[ _](?:number|num|no|id)|patient[ _]id|patientennummer)"
    rf"(?![a-z]){_NAMES}(?P<value>[a-z]{{0,3}}-?\d{{5,10}})(?![\w-]|[.,]\d)"
)
_IP4 = r"(?<![\w.-])(?P<value>\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3})(?![\w-]|\.\d)"
_IP6 = r"(?<![\w:.])(?P<value>[23][0-9a-f]{3}:[0-9a-f:]{1,34}[0-9a-f])(?![\w:])"


def _phone(regex: str, check: Check, flags: int = 0) -> Pattern:
    return Pattern("phone", "phone number", "personal", re.compile(regex, flags | re.ASCII), (), check, rank=2)


PERSONAL: tuple[Pattern, ...] = (
    Pattern("card", "payment card number", "secret", re.compile(_CARD, re.ASCII), (), _card, rank=1),
    Pattern("iban", "IBAN", "personal", _iban_regex(), (), _iban, rank=1),
    Pattern("email", "e-mail address", "personal", re.compile(_EMAIL, re.ASCII), ("@",), _email, rank=2),
    _phone(_INTERNATIONAL, _international),
    _phone(_AMERICAN, _national_american),
    _phone(_NATIONAL, _national),
    _phone(_CALLED, _called, re.IGNORECASE),
    Pattern("us_ssn", "US social security number", "personal", re.compile(_SSN, re.ASCII), ("-",), _ssn, rank=2),
    Pattern("us_ssn", "US social security number", "personal", re.compile(_SSN_NAMED, re.I | re.A), (), _ssn, rank=2),
    Pattern("birth_date", "birth date", "personal", re.compile(_BIRTH, re.I), (), _birth, rank=1),
    Pattern(
        "record_number", "medical record number", "personal", re.compile(_RECORD, re.I | re.A), (), _record, rank=1
    ),
    Pattern("ip_address", "public IP address", "personal", re.compile(_IP4, re.ASCII), (".",), _ip_address, rank=2),
    Pattern("ip_address", "public IP address", "personal", re.compile(_IP6, re.I | re.A), (":",), _ip_address, rank=2),
)


# Presidio's patterns (e-mail, cards, phone numbers, …) are not used: the patterns above check more (decision 55).
# This maps its entities to kinds of findings. Dates are left out (most are not personal), and so are organisations,
# which presidio's default ignores: "Has many false positives" (presidio-analyzer 2.2, conf/default.yaml).
_KINDS = {"PERSON": "person", "LOCATION": "location", "NRP": "nrp"}
NAME_LABELS = {"person": "person's name", "location": "place", "nrp": "nationality, religion or politics"}

_REMEMBERED = 1 << 16  # texts: answers repeat, and a text is searched again after redaction
_WHERE = "--presidio"


def open_presidio(model: str) -> Finder:
    """Return a finder of names and places that uses presidio and an installed spaCy model, or a folder with one.

    The model decides the language.
    """
    try:
        import presidio_analyzer  # noqa: F401
        import spacy
    except ImportError:
        fix = f"Install it: {install_command('presidio')}"
        raise UserError("presidio-analyzer is not installed", where=_WHERE, fix=fix) from None
    try:
        nlp = spacy.load(model)
    except (OSError, ValueError) as error:
        there = ", ".join(spacy.util.get_installed_models()) or "none"
        raise UserError(
            f"The spaCy model {model!r} cannot be loaded ({str(error).splitlines()[0]})",
            where=_WHERE,
            fix=f"Install it: python -m spacy download {model}. Installed: {there}.",
        ) from None
    nlp.max_length = sys.maxsize  # data.max_characters limits the length of a conversation
    language = str(nlp.lang)
    return presidio_finder(_analyzer(nlp, language, model), language)


def _analyzer(nlp: Language, language: str, model: str) -> AnalyzerEngine:
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
    from presidio_analyzer.nlp_engine import NerModelConfiguration, SpacyNlpEngine
    from presidio_analyzer.nlp_engine.ner_model_configuration import MODEL_TO_PRESIDIO_ENTITY_MAPPING
    from presidio_analyzer.predefined_recognizers import SpacyRecognizer

    entities = {**MODEL_TO_PRESIDIO_ENTITY_MAPPING, "FAC": "LOCATION"}  # FAC: as in presidio's conf/default.yaml
    finding = (nlp.analyze_pipes() or {})["attrs"].get("doc.ents", {}).get("assigns", [])
    labels = {label for pipe in finding for label in nlp.pipe_labels.get(pipe, [])}
    named = {label for label in labels if entities.get(label) in _KINDS}
    if not named:
        there = ", ".join(sorted(labels)) or "none"
        raise UserError(
            f"The spaCy model {model!r} finds neither names nor places (its labels: {there})",
            where=_WHERE,
            fix="Choose one with named entities, such as en_core_web_lg.",
        )
    configuration = NerModelConfiguration(
        labels_to_ignore=sorted(labels - named), model_to_presidio_entity_mapping=entities
    )
    engine = SpacyNlpEngine(ner_model_configuration=configuration)
    # Set the loaded model: presidio would try to download a missing one.
    engine.nlp = {language: nlp}  # type: ignore[assignment]
    recognizer = SpacyRecognizer(supported_language=language, supported_entities=list(_KINDS))
    registry = RecognizerRegistry(recognizers=[recognizer], supported_languages=[language])
    return AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=[language])


def presidio_finder(analyzer: AnalyzerEngine, language: str) -> Finder:
    """Return a finder that uses a given analyzer; it reports PERSON, LOCATION and NRP."""
    entities = sorted(_KINDS.keys() & set(analyzer.get_supported_entities(language)))

    @lru_cache(_REMEMBERED)
    def find_names(text: str) -> tuple[Finding, ...]:
        found = analyzer.analyze(text, language=language, entities=entities) if text.strip() else []
        return tuple(Finding(_KINDS[each.entity_type], "personal", each.start, each.end) for each in found)

    return find_names

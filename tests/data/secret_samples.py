"""A labelled set for secrets and personal data: made from a seed, so that no key that looks real stands in a file."""

from __future__ import annotations

import base64
import calendar
import json
import re
import string
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

Make = Callable[[Random], str]
LETTERS, ALNUM = string.ascii_letters, string.ascii_letters + string.digits
URLSAFE, HEX, UPPER = ALNUM + "-_", "0123456789abcdef", string.ascii_uppercase
BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase

# Some countries' account numbers, as ISO 13616 writes them: n for a digit, a for a letter, c for either.
BANKS = (
    "DE 18n,GB 4a 14n,FR 10n 11c 2n,NL 4a 10n,ES 20n,IT 1a 22n,NO 11n,CH 17n,PL 24n,BE 12n,MT 4a 5n 18c,SA 20n,AT 16n,"
    "IE 4a 14n,BR 23n 1a 1c"
)


@dataclass(frozen=True)
class Sample:
    """A text and its findings as (kind, value); ``name`` says how it was made."""

    name: str
    text: str
    expected: tuple[tuple[str, str], ...] = ()


def pick(rng: Random, alphabet: str, length: int) -> str:
    """Random characters."""
    return "".join(rng.choices(alphabet, k=length))


def digits(rng: Random, length: int) -> str:
    """Random digits, the first not 0."""
    return rng.choice("123456789") + pick(rng, string.digits, length - 1)


def with_crc(prefix: str, body: str) -> str:
    """A token in GitHub's format."""
    crc = zlib.crc32(body.encode())
    return prefix + body + "".join(BASE62[crc // 62**place % 62] for place in range(5, -1, -1))


def with_luhn(body: str) -> str:
    """The digits and the one check digit that makes the Luhn sum a multiple of ten, found by trying all."""

    def total(number: str) -> int:
        odd, even = number[::-1][::2], number[::-1][1::2]
        return sum(map(int, odd)) + sum(sum(map(int, str(2 * int(digit)))) for digit in even)

    return next(body + check for check in string.digits if total(body + check) % 10 == 0)


def with_iban_check(country: str, bban: str) -> str:
    """The IBAN: 98 minus the remainder by 97 of the number with check digits 00."""
    number = "".join(str(ord(c) - 55) if c.isalpha() else c for c in f"{bban}{country}00")
    return f"{country}{98 - int(number) % 97:02d}{bban}"


def grouped(text: str, *sizes: int, separator: str = " ") -> str:
    """The text in groups of these sizes, the last again and again."""
    parts, place, sizes_left = [], 0, list(sizes)
    while place < len(text):
        size = sizes_left.pop(0) if len(sizes_left) > 1 else sizes_left[0]
        parts.append(text[place : place + size])
        place += size
    return separator.join(parts)


CARDS = {16: "4 51 55 2221 2720 6011 65 3528 62 2200 6759", 15: "34 37", 14: "305 36", 19: "62"}


def card(rng: Random) -> str:
    prefix, length = rng.choice([(prefix, length) for length, some in CARDS.items() for prefix in some.split()])
    number = with_luhn(prefix + pick(rng, string.digits, length - len(prefix) - 1))
    sizes = (4,) if length in (16, 19) else (4, 6, 5)
    return rng.choice([number, grouped(number, *sizes), grouped(number, *sizes, separator="-")])


def iban(rng: Random) -> str:
    country, shape = rng.choice(BANKS.split(",")).split(maxsplit=1)
    alphabets = {"n": string.digits, "a": UPPER, "c": string.digits + UPPER}
    bban = "".join(pick(rng, alphabets[part[-1]], int(part[:-1])) for part in shape.split())
    number = with_iban_check(country, bban)
    return rng.choice([number, grouped(number, 4)])


def base64url(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def jwt(rng: Random) -> str:
    header = {"alg": rng.choice(["HS256", "RS256", "ES256"]), "typ": "JWT"}
    claims = {
        "sub": digits(rng, 8),
        "iat": 1_700_000_000 + rng.randrange(10**7),
        "scope": rng.choice(["read", "admin"]),
    }
    return f"{base64url(header)}.{base64url(claims)}.{pick(rng, URLSAFE, 43)}"


def private_key(rng: Random) -> str:
    kind = rng.choice(["RSA ", "EC ", "OPENSSH ", "", "ENCRYPTED "])
    body = base64.b64encode(rng.randbytes(rng.choice([48, 120, 600]))).decode()
    lines = [body[i : i + 64] for i in range(0, len(body), 64)]
    return "\n".join([f"-----BEGIN {kind}PRIVATE KEY-----", *lines, f"-----END {kind}PRIVATE KEY-----"])


ALPHABETS = {"a": ALNUM, "u": URLSAFE, "h": HEX, "l": LETTERS, "c": UPPER, "b": UPPER + "234567", "s": ALNUM.lower()}
AMERICAN = ("{212|415|650|305|773|503}", "{2|3|4|5|6|7|8|9}{0|2|3|4|5|6|7|8|9}{d1}", "{d4}")
AREA, EXCHANGE, LINE = AMERICAN


def filled(*shapes: str) -> Make:
    """One of the shapes, with {d4} for four digits (no leading 0), {h4} for some of an alphabet, {x|y} for x or y."""

    def fill(match: re.Match[str], rng: Random) -> str:
        inner: str = match[1]
        if "|" in inner:
            return rng.choice(inner.split("|"))
        return digits(rng, int(inner[1:])) if inner[0] == "d" else pick(rng, ALPHABETS[inner[0]], int(inner[1:]))

    return lambda rng: re.sub(r"{([^{}]*)}", lambda match: fill(match, rng), rng.choice(shapes))


def social_security(rng: Random) -> str:
    area = rng.choice([n for n in range(1, 900) if n != 666])
    return f"{area:03d}-{rng.randrange(1, 100):02d}-{rng.randrange(1, 10000):04d}"


def ip_address(rng: Random) -> str:
    if rng.random() < 0.2:
        return f"2a0{rng.randrange(10)}:{pick(rng, HEX[1:], 4)}:{pick(rng, HEX[1:], 3)}::{rng.randrange(1, 99)}"
    network = rng.choice([5, 31, 52, 81, 91, 104, 151, 185, 213])
    return ".".join(str(part) for part in (network, *(rng.randrange(256) for _ in range(3))))


def github_token(rng: Random) -> str:
    fine = filled("github_pat_{a22}_{a59}")(rng)
    return rng.choice([with_crc(f"gh{rng.choice('pousr')}_", pick(rng, ALNUM, 30)), fine])


_REST, _LOCAL = "{2|3|4|5|6|7|8}" * 4, "{2|3|4|5}" * 3

# Kinds that need no context.
VALUES: dict[str, Make] = {
    "private_key": private_key,
    "github_token": github_token,
    "gitlab_token": filled("glpat-{u19}a", "glpat-{u43}.01.1a{s7}"),
    "npm_token": lambda rng: with_crc("npm_", pick(rng, ALNUM, 30)),
    "tunewright_key": lambda rng: with_crc("tw_", f"{pick(rng, HEX, 10)}_{pick(rng, URLSAFE, 43)}"),
    "pypi_token": filled("pypi-AgEIcHlwaS5vcmc{u150}"),
    "aws_key_id": filled("{AKIA|ASIA}{b16}"),
    "google_key": filled("AIza{u35}"),
    "slack_token": filled("xoxb-{d12}-{d13}-{a24}", "xoxp-{d11}-{d11}-{d12}-{h32}", "xapp-1-A0{c9}-{d13}-{h64}"),
    "stripe_key": filled("{s|r}k_live_{a24}", "{s|r}k_live_{a99}"),
    "anthropic_key": filled("sk-ant-api03-{u93}AA"),
    "openai_key": filled("sk-{a20}T3BlbkFJ{a20}", "sk-proj-{u74}T3BlbkFJ{u73}a", "sk-or-v1-{h64}"),
    "huggingface_token": filled("hf_{l34}"),
    "sendgrid_key": filled("SG.{u22}.{u43}"),
    "twilio_key": filled("SK{h32}"),
    "databricks_token": filled("dapi{h32}"),
    "digitalocean_token": filled("dop_v1_{h64}"),
    "jwt": jwt,
    "card": card,
    "iban": iban,
    "email": filled(
        "{maria.lopez|j.oneil|k+news|info|anna_b|dev-team|x51}{d2}"
        "@{gmail.com|uni-bonn.de|mail.gov.uk|kanzlei-meier.de|startup.io|hospital.nhs.uk}"
    ),
    "phone": filled(
        f"({AREA}) {EXCHANGE}-{LINE}",
        f"{AREA}-{EXCHANGE}-{LINE}",
        f"{AREA}.{EXCHANGE}.{LINE}",
        f"+1 {AREA} {EXCHANGE} {LINE}",
        f"+1{AREA}{EXCHANGE}{LINE}",
        f"1-{AREA}-{EXCHANGE}-{LINE}",
        f"+44 20 7{_LOCAL} {_REST}",
        f"+44 (0)20 7{_LOCAL} {_REST}",
        f"020 7{_LOCAL} {_REST}",
        f"+49 30 {_LOCAL}2{_REST}",
        f"0221 {_LOCAL}{_REST}",
        f"+4915{{1|2|6|7}}2468{_REST}",
        "+33 6 12 {2|3|4}5 {6|7|8}3 {2|4|6}8",
        "06 12 {2|3|4}5 {6|7|8}3 {2|4|6}8",
        "+91 98{2|4}{6|8}2 13{5|7|9}79",
        f"+81 90-{_REST}-1{{3|5|7}}73",
        f"0049 30 {_LOCAL}4{_REST}",
    ),
    "us_ssn": social_security,
    "ip_address": ip_address,
}
CONTEXTS = [
    "{}",
    "It is {}.",
    "I wrote ({}) there, twice!",
    "KEY={}",
    '{{"value": "{}", "n": 3}}',
    "a\n{}\nb",
    "Try {}, please",
]


def _named(kind: str, rng: Random) -> Sample:
    """Return samples of kinds that need context."""
    if kind == "aws_secret":
        secret = pick(rng, LETTERS, 20) + "7aB" + pick(rng, ALNUM + "/+", 17)
        key = VALUES["aws_key_id"](rng)
        texts = {
            f"aws_secret_access_key = {secret}\n": ((kind, secret),),
            f"{key}\n{secret}\n": (("aws_key_id", key), (kind, secret)),
            f'AWS_SECRET_ACCESS_KEY={secret} AWS_ACCESS_KEY_ID="{key}"': ((kind, secret), ("aws_key_id", key)),
        }
        text = rng.choice(list(texts))
        return Sample(kind, text, texts[text])
    if kind == "azure_key":
        key = base64.b64encode(rng.randbytes(64)).decode()
        return Sample(kind, f"AccountName=shop;AccountKey={key};EndpointSuffix=core.windows.net", ((kind, key),))
    if kind == "phone_named":
        parts = "".join(AMERICAN), " ".join(AMERICAN), f"0{AREA} {EXCHANGE}{LINE}"
        number = filled(*parts)(rng)
        lead = rng.choice(["Call me at ", "phone: ", "Tel. ", "My phone number is ", "Text us on ", "Fax "])
        return Sample(kind, f"{lead}{number}.", (("phone", number),))
    if kind == "birth_date":
        day, month, year = rng.randrange(1, 29), rng.randrange(1, 13), rng.randrange(1930, 2020)
        name = calendar.month_name[month]
        forms = f"{month:02}/{day:02}/{year}", f"{year}-{month:02}-{day:02}", f"{day}.{month}.{year}"
        date = rng.choice([*forms, f"{name} {day}, {year}", f"{day} {name[:3]} {year}"])
        lead = rng.choice(
            ["DOB: ", "D.O.B. ", "date of birth is ", "Date of Birth: ", "Geburtsdatum: ", "geb. ", "**DOB** "]
        )
        return Sample(kind, f"Pt J.R., {lead}{date}, seen today", ((kind, date),))
    if kind == "record_number":
        number = rng.choice(["", "", "A", "HN-"]) + digits(rng, rng.randrange(6, 10))
        lead = rng.choice(
            ["MRN: ", "MRN ", "mrn #", "Medical Record Number: ", "medical record no. ", "patient ID is "]
        )
        return Sample(kind, f"{lead}{number} was admitted", ((kind, number),))
    if kind == "password":
        word = f"{pick(rng, ALNUM + '!#%&+', 9)}7k"
        lead = rng.choice(["password: ", "Password=", '"password": "', "my passwd : ", "PWD=", "**Password:** "])
        return Sample(kind, f"Log in as bob, {lead}{word}, then continue", ((kind, word),))
    user = rng.choice(["bob", "svc", "", "app%40corp"])
    pair = f"{user}:{pick(rng, ALNUM + '!$._-@', 11)}Z"
    scheme = rng.choice(["https", "postgres", "mongodb+srv", "redis", "amqp", "ftp"])
    return Sample(
        kind, f"Connect to {scheme}://{pair}@db.{rng.choice('abc')}9.io:5432/x now", (("url_credentials", pair),)
    )


def positives(seed: int, each: int) -> list[Sample]:
    """``each`` samples of every kind, in changing surroundings."""
    rng = Random(seed)
    samples = []
    for kind, make in VALUES.items():
        for number in range(each):
            found = make(rng)
            samples.append(Sample(kind, CONTEXTS[number % len(CONTEXTS)].format(found), ((kind, found),)))
    for kind in (
        "aws_secret",
        "azure_key",
        "url_credentials",
        "phone_named",
        "password",
        "birth_date",
        "record_number",
    ):
        samples += [_named(kind, rng) for _ in range(each)]
    return samples


def _wrong_digit(text: str) -> str:
    place = max(i for i, c in enumerate(text) if c.isdigit())
    return text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]


def _wrong_letter(token: str) -> str:
    return token[:20] + ("a" if token[20] != "a" else "b") + token[21:]


def shaped(*shapes: str) -> Make:
    """One of the shapes, with a random digit for each # (no leading 0) and a random hexadecimal digit for each ~."""

    def make(rng: Random) -> str:
        hexadecimal = re.sub("~", lambda _: rng.choice(HEX), rng.choice(shapes))
        return re.sub("#+", lambda run: digits(rng, len(run[0])), hexadecimal)

    return make


# Lookalikes.
NEGATIVES: dict[str, Make] = {
    "git commit": shaped("commit " + "~" * 40, "fixed in " + "~" * 7, "fixed in " + "~" * 12),
    "git commit near AWS": shaped(f"AWS deploy of {'~' * 40}, secret rotated"),
    "SHA-256": shaped("sha256:" + "~" * 64),
    "npm integrity": lambda rng: f'"integrity": "sha512-{base64.b64encode(rng.randbytes(64)).decode()}"',
    "UUID": lambda rng: f"request {uuid.UUID(int=rng.getrandbits(128), version=4)}",
    "timestamp": lambda rng: f"at {rng.choice([1, 1000, 10**6, 10**9]) * (1_600_000_000 + rng.randrange(10**8))}",
    "ISO time": shaped("2024-03-1#T10:15:30.######+02:00", "20240#1#T1#1530Z"),
    "date": shaped("1#.02.20##", "0#-12-2021", "2021-1#-1# 1#:45", "0#/2#/1999"),
    "price": shaped("$#,###,###.00", "EUR # ### ###,90", "cost 1.###.###,00 €", "USD ######.##"),
    "decimal": shaped("p = 0.################", "x = ##.########, y = -0.0########"),
    "ISBN": shaped("ISBN 978-#-##-######-#", "ISBN 0-###-#####-X", "978-3-##-######-#", "ISBN 978##########"),
    "docket": shaped(
        "No. ##-cv-#####", "2:##-cv-#####-ABC", "Docket ###-###-####", "### F.3d ####", "Case ###-##-####", "##-####"
    ),
    "order": shaped("Order ################", "order number: ###-###-####", "order 112-#######-#######"),
    "bare 16 digits": shaped("it says ################ there"),
    "status id": shaped("https://x.com/i/status/###################"),
    "EAN": shaped("barcode #############"),
    "IMEI": lambda rng: f"IMEI {with_luhn('35' + pick(rng, string.digits, 12))}",
    "tracking": shaped("1Z~~~~##########", "9400##################", "tracking no. ############"),
    "base64": lambda rng: f"image/png;base64,{base64.b64encode(rng.randbytes(rng.choice([30, 66, 300]))).decode()}",
    "colour": lambda rng: f"color: #{pick(rng, HEX, 6)}; background: #{pick(rng, HEX, 8)}",
    "version": shaped("v#.##.#", "Chrome/###.0.####.##", "version #.#.##.###", "lib-#.#.#-rc#", "driver 1##.2##.1##.1"),
    "section": shaped("see #.#.##.# of the manual", "§ #.##.#.#"),
    "MAC address": shaped("~~:~~:~~:~~:~~:~~", "~~-~~-~~-~~-~~-~~"),
    "coordinates": shaped("+##.#######, -##.######", "##.#####, +#.######"),
    "DOI": shaped("doi:10.1016/j.cell.2020.##.###", "PMID: ########", "Cell 2019;1##:##-##"),
    "package": shaped("npm i @types/node@##.1.0 lodash@4.17.21", "actions/checkout@v#"),
    "handle": shaped("thanks @~~~~~~~~, see icon@2x.png"),
    "git remote": shaped("git@github.com:~~~~~~/repo.git", "ssh://git@gitlab.com/~~~~/repo.git"),
    "private address": shaped("10.0.1##.7", "192.168.#.4", "192.0.2.1##", "127.0.0.1:####", "fe80::1", "2001:db8::#"),
    "ZIP+4": shaped("Springfield, IL #####-####"),
    "bad card": lambda rng: _wrong_digit(card(rng)),
    "bad IBAN": lambda rng: _wrong_digit(iban(rng)),
    "bad GitHub token": lambda rng: _wrong_letter(with_crc("ghp_", pick(rng, ALNUM, 30))),
    "bad npm token": lambda rng: _wrong_letter(with_crc("npm_", pick(rng, ALNUM, 30))),
    "no SSN": shaped("000-##-####", "666-##-####", "9##-##-####", "###-00-####", "###-##-0000"),
    "fictional phone": shaped("(212) 555-01##", "+1-415-555-01##", "020 7946 0###", "07700 900###", "123-456-7890"),
    "example address": shaped("~~~~@example.com", "~~~~@mail.example.org", "~~~~@corp.test", "noreply@shop.com"),
    "placeholder": shaped(
        "AKIAIOSFODNN7EXAMPLE",
        "sk-ant-api03-your-api-key-here",
        "ghp_" + "x" * 36,
        "sk_live_" + "X" * 24,
        "hf_" + "x" * 34,
        "AIza" + "x" * 35,
        "glpat-xxxxxxxxxxxxxxxxxxxx",
        "4242 4242 4242 4242",
        "https://user:password@host.io",
        "postgres://me:${DB_PASSWORD}@db.io/x",
        "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----",
    ),
    "birth": shaped(
        "born in 19## in Ohio",
        "the birth rate fell to 1#.# in 20##",
        "DOB: unknown, admitted 0#/1#/20##",
        "birthday party on 0#/1#/20##",
        "DOB filing of 0#/1#/20##",
        "date of birth certificate: 1#.0#.20##",
        "DOB: 01/01/1900",
        "Geb. 12, Raum 3##, 1#.0#.20##",
        "date of birth 1#/4#/19##",
    ),
    "record": shaped(
        "MRNA ######",
        "MRN pending, order ########",
        "medical record review 20##-0#-1#",
        "customs MRN 21GB0#F8GXW0KZ4AR#",
        "MRN: 123456",
        "world record number 1 of ######",
        "patient id required, see form ######",
        "MRN: 0000000",
    ),
    "redacted": shaped(f"<EMAIL_#> https://<URL_CREDENTIALS_1>@db.io <AWS_SECRET_1> {'aB' * 8}{'~' * 24}"),
}


def negatives(seed: int, each: int) -> list[Sample]:
    """Return ``each`` samples of all lookalikes."""
    rng = Random(seed)
    return [Sample(name, make(rng)) for name, make in NEGATIVES.items() for _ in range(each)]

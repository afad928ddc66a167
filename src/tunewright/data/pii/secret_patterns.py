"""Patterns of secrets: keys and tokens by their issuers' prefixes, with further checks."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tunewright.core.text import token_checksum

Category = Literal["secret", "personal"]
Check = Callable[[re.Match[str]], bool]

_MADE_UP = re.compile(
    r"example|your|dummy|fake|sample|placeholder|redacted|change.?me|insert|x{4}|\*{3}|\.{3}|"
    r"1234567890|0123456789|abcdefgh",
    re.IGNORECASE,
)
_FEWEST_DIFFERENT = 8  # 16 random characters have fewer different ones less than once in 10,000 texts


@dataclass(frozen=True)
class Pattern:
    """One pattern of a kind of finding; a kind may have several."""

    kind: str  # the spelling in placeholders: ``email`` is replaced by ``<EMAIL_1>``
    label: str  # in messages
    category: Category  # a secret gives access or can be used to pay; personal data identifies a person
    regex: re.Pattern[str]  # the group ``value`` is the finding, if there is one
    cues: tuple[str, ...]  # every match or its surroundings contain one of these; other texts are not searched
    check: Check  # further condition on a match
    rank: int = 0  # where two findings overlap, the lower rank wins, then the longer match


def words(text: str) -> frozenset[str]:
    """Return the set of words in a line."""
    return frozenset(text.split())


def value(match: re.Match[str]) -> str:
    """Return the matched text: the group ``value``, or the whole match."""
    return match["value"] if "value" in match.re.groupindex else match[0]


def is_placeholder(token: str) -> bool:
    """Return whether a token is a placeholder: "your-api-key", "xxxx", AKIAIOSFODNN7EXAMPLE, aaaaaaaa."""
    return _MADE_UP.search(token) is not None or len(set(token)) < _FEWEST_DIFFERENT


def checksummed(token: str) -> bool:
    """Return whether the last six characters are the checksum of the characters after the prefix.

    GitHub's format, which npm and tunewright took over.
    """
    body = token.partition("_")[2]
    return token_checksum(body[:-6]) == body[-6:]


def _checksummed(match: re.Match[str]) -> bool:
    return checksummed(match[0]) and not is_placeholder(match[0])


def _json_web_token(match: re.Match[str]) -> bool:
    """Return whether the header is a JSON object with an algorithm (RFC 7515), except jwt.io's sample token."""
    header = match[0].partition(".")[0]
    try:
        decoded = json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))
    except (binascii.Error, ValueError, RecursionError):
        return False
    named = isinstance(decoded, dict) and isinstance(decoded.get("alg"), str)
    return named and ".eyJzdWIiOiIxMjM0NTY3ODkwIiwibmFtZSI6IkpvaG4gRG9lIi" not in match[0]


def _private_key(match: re.Match[str]) -> bool:
    """Return whether there are at least 64 characters of base64, the length of the shortest keys (Ed25519)."""
    return sum(map(len, re.findall(r"[A-Za-z0-9+/=]{16,}", match["body"]))) >= 64 and not is_placeholder(match["body"])


_AWS_CONTEXT = re.compile(r"(?<![A-Z0-9])A(?:KI|SI)A[A-Z2-7]{16}|(?<!<)aws.?secret|secret.?access.?key", re.IGNORECASE)
_AWS_NEAR = 160  # characters between a secret key and the text that identifies it


def _near_aws_key(match: re.Match[str]) -> bool:
    """Require a key id or a telling name near 40 characters of base64."""
    near = match.string[max(0, match.start() - _AWS_NEAR) : match.end() + _AWS_NEAR]
    token = match[0]
    mixed = all(re.search(kind, token) for kind in ("[a-z]", "[A-Z]", "[0-9]"))
    return mixed and not is_placeholder(token) and _AWS_CONTEXT.search(near) is not None


_PASSWORDS_OF_NOBODY = words(
    "pass password passwd pwd secret token test guest postgres mysql root admin user username key api_key apikey xxx"
)
_VARIABLE = re.compile(r"\$(?:[A-Z_][A-Z0-9_]*|[a-z_]+|\{.*|\(.*)|%[A-Z_]+%|%s|\{.*|\[.*|\(.*|\*+|…")
_HOSTS_OF_NOBODY = re.compile(
    r"(?:[\w.-]+\.)?(?:example(?:\.(?:com|org|net))?|test|invalid|localhost)(?![\w.-])|127\.0\.0\.1", re.IGNORECASE
)


def _is_real_password(match: re.Match[str]) -> bool:
    """Return whether a password is not a variable, the word "password" or for an example host (RFC 2606)."""
    password = match["password"]
    stands_for_one = (
        password.lower() in _PASSWORDS_OF_NOBODY or _VARIABLE.fullmatch(password) or _MADE_UP.search(password)
    )
    return not stands_for_one and _HOSTS_OF_NOBODY.match(match.string, match.end()) is None


_NO_PASSWORD = re.compile(
    r"p[a@4][s$5]{2}w|passphrase|pwd|char|digit|letter|://|^[~./\\]|^[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+$", re.I
)
_MAIL = re.compile(r"[\w.+-]+@[\w-]+\.[\w.]+")


def _plain_password(match: re.Match[str]) -> bool:
    """Return whether letters are mixed with digits or signs, unlike in prose and code (os.environ)."""
    token = match["value"]
    mixed = re.search("[A-Za-z]", token) and re.search(r"\d|[@#$%^&*!+=~](?=.)", token)
    placeholder = token.lower() in _PASSWORDS_OF_NOBODY or _VARIABLE.fullmatch(token) or _NO_PASSWORD.search(token)
    return bool(mixed) and not placeholder and not _MAIL.fullmatch(token) and _MADE_UP.search(token) is None


def _key_after_name(match: re.Match[str]) -> bool:
    """Return whether the value decodes to 64 random bytes, like Azure's storage keys."""
    return len(base64.b64decode(match["value"])) == 64 and not is_placeholder(match["value"])


def _not_placeholder(match: re.Match[str]) -> bool:
    return not is_placeholder(value(match))


def _secret(
    kind: str, label: str, body: str | re.Pattern[str], *cues: str, check: Check = _not_placeholder, rank: int = 0
) -> Pattern:
    """Return a pattern; a body as text is a token without a letter, digit or hyphen before or after it."""
    token = body if isinstance(body, re.Pattern) else re.compile(rf"(?<![A-Za-z0-9])(?:{body})(?![\w-])", re.ASCII)
    return Pattern(kind, label, "secret", token, cues, check, rank)


_PEM = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----(?P<body>"
    r"(?:[^-]|-(?!----))*+(?=-----END)|(?:(?:\s|\\[nr])*[A-Za-z0-9+/=]{32,})+)"  # the second: a key without its end
    r"(?:-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----)?"
)
_SLACK = (
    r"xox[abeoprs]-(?:\d{8,14}-){1,3}[A-Za-z0-9]{16,64}|xapp-\d-[A-Z0-9]{8,14}-\d{8,14}-[a-f0-9]{64}|"
    r"hooks\.slack\.com/(?:services|workflows)/T[A-Z0-9]{8,12}/[AB][A-Z0-9]{8,12}/[A-Za-z0-9]{20,26}"
)
_OPENAI = (
    r"sk-[\w-]{20,80}T3BlbkFJ[\w-]{20,80}|sk-(?:proj|svcacct|admin)-[\w-]{100,180}|"
    r"sk-or-v1-[0-9a-f]{64}|sk-[0-9a-f]{32}"
)
_GITLAB = r"gl(?:pat|dt|rt)-(?:[\w-]{27,300}\.[0-9a-z]{2}(?:\.[0-9a-z]{2})?[0-9a-z]{7}|[\w-]{20})"
_PYPI = r"pypi-(?:AgEIcHlwaS5vcmc|AgENdGVzdC5weXBpLm9yZw)[\w-]{50,400}"  # a macaroon for pypi.org or test.pypi.org
_TUNEWRIGHT = r"tw_[0-9a-f]{10}_[\w-]{49}"
_AZURE = r"(?:account|storage|access)[ _-]?key[\"']?\s{0,3}[:=]\s{0,3}[\"']?(?P<value>[A-Za-z0-9+/]{86}==)(?![=\w])"

_AWS_SECRET = r"(?<![A-Za-z0-9/+=])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])|(?<==)[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])"
# The header's bound keeps the search linear where each word of a text begins like a token.
_JWT = re.compile(r"(?<![A-Za-z0-9])eyJ[\w-]{10,2000}+\.eyJ[\w-]{10,}+\.[\w-]{20,}", re.ASCII)
_URL = r"(?<=://)(?P<value>[^\s:/'\"]{0,100}:(?P<password>[^\s/'\"<>`]{1,200}))@(?=[A-Za-z0-9\[])"
_PASSWORD = (
    r"(?<![A-Za-z])(?:pass(?:word|wd|phrase|code|wort)|pwd)(?![A-Za-z])[\"'*]{0,3}\s{0,3}[:=][\s\"'`*]{0,5}"
    r"(?P<value>[^\s\"'`<>(){}\[\],;]{5,63}[A-Za-z0-9!@#$%^&*+=~-])(?![^\s\"'`<,;.:?)])"
)
# Searches for other cues stop at these first letters anyway; a new first letter would slow the scan of every text.
_PASSWORD_CUES = ("ssw", "ssW", "SSW", "ssphrase", "SSPHRASE", "sscode", "SSCODE", "pwd", "Pwd", "PWD")
_GITHUB_CUES = ("ghp_", "gho_", "ghu_", "ghs_", "ghr_")
_GITHUB_LONG = r"github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}|ghr_[A-Za-z0-9]{76}"

SECRETS: tuple[Pattern, ...] = (
    _secret("private_key", "private key", _PEM, "-----BEGIN ", check=_private_key),
    _secret("github_token", "GitHub token", r"gh[oprsu]_[A-Za-z0-9]{36}", *_GITHUB_CUES, check=_checksummed),
    _secret("github_token", "GitHub token", _GITHUB_LONG, "github_pat_", "ghr_"),
    _secret("gitlab_token", "GitLab token", _GITLAB, "glpat-", "gldt-", "glrt-"),
    _secret("npm_token", "npm token", r"npm_[A-Za-z0-9]{36}", "npm_", check=_checksummed),
    _secret("tunewright_key", "tunewright API key", _TUNEWRIGHT, "tw_", check=_checksummed),
    _secret("pypi_token", "PyPI token", _PYPI, "pypi-AgE"),
    _secret("aws_key_id", "AWS access key id", r"A(?:KI|SI)A[A-Z2-7]{16}", "AKIA", "ASIA"),
    _secret(
        "aws_secret", "AWS secret key", re.compile(_AWS_SECRET), "AKIA", "ASIA", "ecret", "ECRET", check=_near_aws_key
    ),
    _secret("google_key", "Google API key", r"AIza[\w-]{35}", "AIza"),
    _secret("azure_key", "Azure storage key", re.compile(_AZURE, re.I | re.A), "==", check=_key_after_name),
    _secret("slack_token", "Slack token", _SLACK, "xox", "xapp-", "hooks.slack.com"),
    _secret("stripe_key", "Stripe live key", r"[rs]k_live_[A-Za-z0-9]{24,247}", "k_live_"),
    _secret("anthropic_key", "Anthropic API key", r"sk-ant-[a-z]+\d\d-[\w-]{80,120}", "sk-ant-"),
    _secret("openai_key", "OpenAI-style API key", _OPENAI, "sk-"),
    _secret("huggingface_token", "Hugging Face token", r"(?:hf|api_org)_[A-Za-z]{34}", "hf_", "api_org_"),
    _secret("sendgrid_key", "SendGrid API key", r"SG\.[\w-]{22}\.[\w-]{43}", "SG."),
    _secret("twilio_key", "Twilio API key", r"SK[0-9a-f]{32}", "SK"),
    _secret("databricks_token", "Databricks token", r"dapi[0-9a-f]{32}(?:-\d)?", "dapi"),
    _secret("digitalocean_token", "DigitalOcean token", r"do[opr]_v1_[0-9a-f]{64}", "_v1_"),
    _secret("jwt", "JSON Web Token", _JWT, "eyJ", check=_json_web_token),
    _secret("url_credentials", "password in a URL", re.compile(_URL), "://", check=_is_real_password, rank=1),
    _secret("password", "password", re.compile(_PASSWORD, re.I), *_PASSWORD_CUES, check=_plain_password, rank=2),
)


@dataclass(frozen=True)
class Finding:
    """A secret or a piece of personal data at ``text[start:end]``; the value itself is never kept."""

    kind: str
    category: Category
    start: int
    end: int


Finder = Callable[[str], Sequence[Finding]]
"""Searches a text for findings beyond the patterns, such as names; they are reported and replaced alike."""

"""No secret in any text: errors, logs, names and figures show URLs and what others' exceptions say through `redact`.

Settings never get into a text. What does is what a user wrote into a URL (a password, the parameters of a signature, a
token), and what a store or library quotes of a request, all of which looks like one of these.
"""

from __future__ import annotations

import re

HIDDEN = "***"
_SHOWN_MAX = 20_000

# Parameters of URLs whose values grant access, or are half of what does.
_PARAMETERS = (
    "x-amz-signature|x-amz-credential|x-amz-security-token|x-goog-signature|x-goog-credential|x-goog-security-token|"
    "awsaccesskeyid|googleaccessid|signature|policy|key-pair-id|sig|sas|token|[a-z_-]*_token|auth|authorization|code|"
    "key|api[_-]?key|access[_-]?key|secret|[a-z_-]*_secret|pass|passwd|password|pwd"
)
# What errors of S3, and files of Google's, have beside their message.
_ELEMENTS = (
    "AWSAccessKeyId|AccessKeyId|SecretAccessKey|SessionToken|Token(?:-\\d+)?|SignatureProvided|StringToSign(?:Bytes)?|"
    "CanonicalRequest(?:Bytes)?|AuthenticationErrorDetail"
)
_MEMBERS = "private_key|private_key_id|client_secret|refresh_token|access_token|id_token|secret|password|token"

# Compiled when a text is first looked through: to compile them takes 3 ms, which most processes need not spend.
_RULES = (
    # https://user:password@host, and a token in the user's place. In other schemes a lone name is part of the address,
    # as in abfss://container@account, and `github://organisation:repository@version` is one all over.
    (r"(?i)\b((?:https?|ftps?)://)[^\s/?#@]*@", rf"\1{HIDDEN}@"),
    (
        r"(?i)\b((?!(?:github|git|gist)://)[a-z][a-z0-9+.-]{0,20}://[^\s/?#@:]*:)[^\s/@]*@",
        rf"\1{HIDDEN}@",
    ),
    # An address without its scheme, where a name says that it is one. Elsewhere `a:b@c` may be the key of a sample that
    # an error is about.
    (
        r"(?i)((?:url|proxy|endpoint|netloc)['\"]?\s?[=:]\s?['\"]?)"
        r"[^\s/:@'\"]{1,200}:[^\s/@'\"]{1,200}@(?=[\w\[])",
        rf"\1{HIDDEN}@",
    ),
    (
        rf"(?i)((?:[?&;]|%26|\b(?=sig=))(?:{_PARAMETERS})=)[^\s&;'\"<>]*[^\s&;'\"<>:,.]",
        rf"\1{HIDDEN}",
    ),
    (r"\b((?:Credential|Signature)=)[^\s,&]+", rf"\1{HIDDEN}"),
    (r"\b((?:Bearer|Basic|SharedKey) )[\w.~+/:=-]{6,}", rf"\1{HIDDEN}"),
    (rf"(?i)(<({_ELEMENTS})>)[^<]*", rf"\1{HIDDEN}"),
    (rf"""(?i)(["'](?:{_MEMBERS})\\?["']\s*:\s*\\?["'])(?:[^"'\\]|\\.)+""", rf"\1{HIDDEN}"),
    (r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*-----|\Z)", HIDDEN),
    (r"\b(?:AKIA|ASIA)[0-9A-Z]{12,}\b", HIDDEN),
)
# One of these is in every text that a rule changes; most texts have none, and are looked through once.
_MARKS = r"[@=<]|Bearer |Basic |SharedKey |\"|'|PRIVATE KEY|AKIA|ASIA"


def redact(text: str) -> str:
    """The text, with *** for all that looks like a secret."""
    if re.search(_MARKS, text):
        for pattern, shown in _RULES:
            text = re.sub(pattern, shown, text)
    return text


def showable(error: BaseException) -> BaseException | None:
    """The error as the cause of another one, which is shown with it; None where it has a secret in it, or is of a
    length that only what a server sends has.
    """
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        text = f"{link} {link.args!r}"
        if len(text) > _SHOWN_MAX or redact(text) != text:
            return None
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return error

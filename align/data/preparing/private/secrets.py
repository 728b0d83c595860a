"""Keys, tokens and passwords: by the forms that their issuers give them, or by the name that they are assigned to.

The forms are those that the issuers document, and that secret scanners such as gitleaks look for.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from align.data.preparing.private.found import Found

_FORMS = (
    r"(?:A3T[A-Z0-9]|AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}",  # AWS
    r"gh[pousr]_[A-Za-z0-9]{30,255}|github_pat_[A-Za-z0-9_]{22,255}",  # GitHub
    r"gl(?:pat|dt|rt|cbt|ptt|ft|soat|agent|imt)-[\w-]{20,64}",  # GitLab
    r"sk-(?=[\w-]{0,60}\d)(?:[a-z]{2,12}\d{0,2}-){0,3}[A-Za-z0-9_-]{20,200}",  # OpenAI, Anthropic, OpenRouter
    r"hf_[A-Za-z0-9]{30,50}|api_org_[A-Za-z0-9]{30,50}",  # Hugging Face
    r"xox[abeoprs](?:\.xox[a-z])?-[\w-]{10,250}|xapp-\d-[\w-]{10,250}",  # Slack
    r"AIza[\w-]{35}|ya29\.[\w-]{20,250}|GOCSPX-[\w-]{20,40}",  # Google
    r"(?:sk|pk|rk)_(?:live|test)_[A-Za-z0-9]{10,120}|whsec_[A-Za-z0-9+/=]{20,80}",  # Stripe
    r"(?:AC|SK)[0-9a-f]{32}",  # Twilio
    r"SG\.[\w-]{16,32}\.[\w-]{16,64}|key-[0-9a-f]{32}",  # SendGrid, Mailgun
    r"npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_-]{50,250}|dckr_pat_[\w-]{20,60}",  # npm, PyPI, Docker
    r"\d{8,10}:AA[\w-]{33}",  # Telegram
    r"[MNO][A-Za-z0-9_-]{23,27}\.[\w-]{6}\.[\w-]{27,40}",  # Discord
    r"(?:r8|gsk|xai|nvapi|pplx|dop_v1|shpat|shpss|lin_api|PMAK|glsa|ntn)[_-](?=[\w-]*\d)[\w-]{30,200}|dapi[0-9a-f]{32}",
    r"eyJ[\w-]{8,4000}\.eyJ[\w-]{8,8000}(?:\.[\w-]{0,4000})?",  # JSON Web Tokens (RFC 7519)
    r"AGE-SECRET-KEY-1[A-Z0-9]{58}",
)
_KEY = re.compile("(?<![A-Za-z0-9_])(?:" + "|".join(_FORMS) + ")(?![A-Za-z0-9])")
_BLOCK = re.compile(  # PEM and PGP; one that is cut off goes as far as its letters do
    r"-----BEGIN (?P<what>[A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?)-----"
    r"(?:[\s\S]{0,20000}?-----END (?P=what)-----|(?:\s*(?:\\n)?[A-Za-z0-9+/=:, -]{16,})*)"
)
_IN_URL = re.compile(r"[a-z][a-z0-9+.-]{1,20}://[^\s/:@]{0,64}:(?P<key>[^\s/@]{3,128})@(?=[\w\[])", re.IGNORECASE)
_HEADER = re.compile(r"\b(?i:bearer|basic|token)\s+(?P<key>(?=[^\s\d]*\d)[A-Za-z0-9+/_.~-]{16,}={0,2})")
_OPTION = re.compile(  # of curl, sshpass and others
    r"\s(?:-u|--user)[ =][\"']?[\w.@-]{1,64}:(?P<key>[^\s'\"]{6,128})"
    r"|\b(?:sshpass|docker login|mysql|mongosh?|redis-cli)\b[^\n|;&]{0,80}?\s(?:-p|-a)\s?"
    r"[\"']?(?P<pass>[^\s'\"-][^\s'\"]{5,127})"
)
_LOGIN = re.compile(  # creds are admin / …
    r"\b(?:creds?|credentials|login|username)\b[ :=]{0,2}(?:is|are|as|with)?\s?[\w.@-]{2,64}\s/\s"
    r"(?P<key>(?=\S{0,64}\d)(?=\S{0,64}[^\W\d])\S{6,64})",
    re.IGNORECASE,
)
_HOOK = re.compile(  # addresses that are keys themselves
    r"https://(?:hooks\.slack\.com/(?:services|workflows)|discord(?:app)?\.com/api/webhooks)/(?P<key>[\w/-]{16,200})"
)
_NAMED = re.compile(  # api_key = "…", "clientSecret": "…", PASSWORD=…, le mot de passe est …
    r"(?P<name>pass(?:word|wd|phrase|code)|\bpass(?=\s?[:=])|pwd|passwort|passord|kennwort|contraseña|mot de passe|"
    r"senha|wachtwoord|hasło|heslo|lösenord|adgangskode|salasana|jelszó|parol[aă]|şifre|kata sandi|mật khẩu|"
    r"пароль|κωδικός|密码|密碼|口令|パスワード|パスコード|비밀번호|"
    r"पासवर्ड|סיסמה|كلمة المرور|(?-i:\bPAT\b|\b[A-Z]+_KEY\b)|"
    r"(?:secret|api|access|auth|private|account|client|admin|master|service|encryption|signing|subscription)[_ -]?key|"
    r"secret|token|credential)"
    r"(?:[_-]\w{1,20}|s|Key|Value)?"
    r"(?:\s[^\W\d_]{1,12}){0,3}?(?:[\"'`]?\s{0,2}(?:[:=]>?|:=|：|=>)\s{0,2}[\"'`]?|"
    r"\s(?:is|was|ist|lautet|est|c['’]est|es|é|è|är)\s[\"'`]?|[是为は]\s?|(?P<bare>\s))"
    r"(?P<key>(?=[^\s\"'`,;<>(){}\[\]\\，。；、]{0,512}\d)[^\s\"'`,;<>(){}\[\]\\，。；、]{6,512})",
    re.IGNORECASE,
)
_NO_SECRET = re.compile(  # what stands where a secret will be, and code that gets one from elsewhere
    r"^/|n?varchar|your|my[_-]|example|placeholder|changeme|dummy|xxx|\*\*|\.\.|…|^[$%]|environ|https?:|input|"
    r"(?:[a-z_]\w*\.)+[a-z_]\w*$|(?:user|pass|password|passwd|pwd|pw|secret|guest|root|x-oauth-basic|x-access-token)$",
    re.IGNORECASE,
)
_LEAST_BITS = 3.0  # per character (Shannon), of a key that only its name tells


def secrets(text: str) -> Iterator[Found]:
    """Keys, tokens, private key blocks, and passwords that stand in an address or after their name."""
    for pattern in (_BLOCK, _KEY):
        for match in pattern.finditer(text):
            yield Found(match.start(), match.end(), "KEY", match[0])
    for pattern in (_IN_URL, _HEADER, _OPTION, _LOGIN, _HOOK):
        for match in pattern.finditer(text):
            start, end = next(span for span in map(match.span, range(1, pattern.groups + 1)) if span[0] >= 0)
            if re.search(r"\w", key := text[start:end]) and not _NO_SECRET.fullmatch(key):
                yield Found(start, end, "KEY", key)
    for match in _NAMED.finditer(text):
        key = match["key"].rstrip(".!?:")
        if _is_secret(match["name"], key) and not (match["bare"] and len(key) < 8):
            yield Found(match.start("key"), match.start("key") + len(key), "KEY", key)


def _is_secret(name: str, key: str) -> bool:
    """Whether it is no word and no code: a password mixes letters and digits, a key is long and without order."""
    mixed = re.search(r"[^\W\d_]", key) and re.search(r"\d", key)
    if not mixed or _NO_SECRET.search(key):
        return False
    if re.search("key|secret|token|credential|pat$", name, re.IGNORECASE):
        return len(key) >= 16 and bits(key) >= _LEAST_BITS
    return True


def bits(text: str) -> float:
    """Shannon's entropy of the letters of a text, in bits per letter."""
    counts = Counter(text)
    return -sum(n / len(text) * math.log2(n / len(text)) for n in counts.values())

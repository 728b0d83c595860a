"""E-mail and IP addresses."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from align.data.preparing.private.found import LETTERS, WORD, Found
from align.data.preparing.private.hints import hint

# The signs of an address, and what people write for them so that programs do not find it.
_AT = re.compile(
    r"@|%40|&#0*64;|&#x0*40;|&commat;|\s?[\[({<]\s?(?:at|@|arroba)\s?[\])}>]\s?"
    r"|\s(?:at|arroba)\s(?=[\w-]+(?:\s(?:dot|punto|ponto)\s[\w-]+)+)",
    re.IGNORECASE,
)
_DOT = r"(?:\.|\s?[\[({<]\s?(?:dot|\.|punkt|point|punto|ponto)\s?[\])}>]\s?|\s(?:dot|punto|ponto)\s)"
# The parts of RFC 5321 and 6531, with letters of any language.
_ATOM = rf"[{WORD}!#$%&'*+/=?^`{{|}}~-]+"
_LOCAL = re.compile(rf"""(?:"[^"\n@]{{1,64}}"|{_ATOM}(?:{_DOT}{_ATOM})*)$""", re.IGNORECASE)
_DOMAIN = re.compile(
    rf"(?:[{WORD}](?:[{WORD}-]{{0,61}}[{WORD}])?{_DOT}){{1,8}}(?P<top>xn--[a-z0-9-]{{2,59}}|[{LETTERS}]{{2,24}})"
    rf"(?![{WORD}])",
    re.IGNORECASE,
)
# What an address that is spelt out as words ends in, and what is none before "at".
_TOPS = re.compile(
    "com|org|net|edu|gov|io|co|info|de|uk|fr|es|it|nl|ch|at|be|pt|br|in|cn|jp|ru|pl|se|eu|us|ca|au|example", re.I
)
_WORDS = re.compile(
    "me|us|him|her|it|them|you|is|are|was|were|be|met|found|based|back|here|there|everyone|we|one|that|"
    "(?:look|meet|arriv|work|stay|stopp?|start|liv|shopp?)(?:e?s|e?d|ing|e)?",
    re.IGNORECASE,
)
_USER_OF = re.compile(r"://[^\s/@]*$")
_LONGEST = 80  # characters of a local part that are looked at
_AROUND = "!#$%&'*/=?^`{|}~-."  # signs that may be in a local part, but at its beginning are quotes and brackets
# Ends of file names, which look like domains: logo@2x.png
_FILES = re.compile(
    "png|jpe?g|gif|svg|webp|bmp|ico|tiff?|avif|heic|pdf|mp[34]|mov|webm|s?css|less|m?js|[jt]sx|json|map|html?|xml|"
    "ya?ml|toml|txt|md|csv|zip|gz",
    re.IGNORECASE,
)

_BYTE = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_IPV4 = re.compile(rf"(?<![{WORD}.])(?<![{LETTERS}][/-])(?:{_BYTE}\.){{3}}{_BYTE}(?![{WORD}]|-[{LETTERS}]|\.\d)")
_PRODUCT = re.compile(rf"[{LETTERS}]*[A-Z][{LETTERS}]*\s$")  # a name before a number
_IPV6 = re.compile(
    rf"(?<![{WORD}:.])(?:[0-9A-Fa-f]{{0,4}}:){{2,7}}(?:(?:\d{{1,3}}\.){{3}}\d{{1,3}}|[0-9A-Fa-f]{{0,4}})(?![{WORD}:]|\.\d)"
)


def emails(text: str) -> Iterator[Found]:
    """E-mail addresses, also with the signs spelt out: `jo (at) example (dot) org`."""
    for at in _AT.finditer(text):
        before = text[max(0, at.start() - _LONGEST) : at.start()]
        local, domain = _LOCAL.search(before), _DOMAIN.match(text, at.end())
        name = local[0].lstrip(_AROUND) if local else ""
        if text[at.start() - len(name) - 1 : at.start() - len(name)] == "\\" and name[:1] in ("n", "r", "t"):
            name = name[1:]  # a line break in a string of code
        if at[0].strip().isalpha() and domain and not (_TOPS.fullmatch(domain["top"]) and not _WORDS.fullmatch(name)):
            continue  # "look at the dot on the map"
        if not name or not domain or _FILES.fullmatch(domain["top"]):
            continue
        if name == "git" and text[domain.end() : domain.end() + 1] == ":":
            continue  # a repository, where nobody reads mail
        if _USER_OF.search(text, max(0, at.start() - _LONGEST), at.start()):
            continue  # of an address of the web
        value = re.sub(_DOT, ".", f"{name}@{domain[0]}", flags=re.IGNORECASE).casefold()
        yield Found(at.start() - len(name), domain.end(), "EMAIL", value)


def addresses(text: str) -> Iterator[Found]:
    """IP addresses, version 4 and 6, but for those that are nobody's: loopback, private networks, masks and the like.

    Four numbers may be a version as well: it takes no such word before them.
    """
    for match in _IPV4.finditer(text):
        said = hint(text, match.start())
        numbers = match[0].split(".")
        # Mostly versions: 9.0.65.0, 1.2.3.4, cuDNN 8.9.2.26
        odd = numbers[3] == "0" or all(len(number) == 1 for number in numbers)
        odd = odd or (int(numbers[0]) < 32 and _PRODUCT.search(text, max(0, match.start() - 24), match.start()))
        if (said == "address" if odd else said != "version") and _somebodys(match[0]):
            yield Found(match.start(), match.end(), "IP", match[0])
    for match in _IPV6.finditer(text):
        groups = [group for group in match[0].split(":") if group]
        told = (len(groups) > 2 and re.search(r"\d", match[0])) or "." in match[0]
        told = told or hint(text, match.start()) == "address"
        if told and _somebodys(match[0]):
            yield Found(match.start(), match.end(), "IP", ipaddress.ip_address(match[0]).compressed)


# What RFC 1918 and 6890 reserve, but for the networks of documentation, which stand for real ones; and public resolvers
_NOBODYS = [
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16",
        "224.0.0.0/3", "::/127", "fc00::/7", "fe80::/10", "ff00::/8",
        "8.8.8.8/32", "8.8.4.4/32", "1.1.1.1/32", "1.0.0.1/32", "9.9.9.9/32",
    )
]  # fmt: skip


def _somebodys(written: str) -> bool:
    try:
        address = ipaddress.ip_address(written)
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return not any(address in network for network in _NOBODYS if network.version == address.version)
